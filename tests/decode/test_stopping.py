"""What may not be drawn, where a row ends, and the text it leaves."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)

from decode import Generator, Truncation
from decode.text import Detokenizer
from proxy_jax.errors import InputError
from tests import trios
from tests.trios import PROMPTS, STEPS, complete, make_tokenizer, options


def cut(tokens, ids):
    """A row up to and with its first EOS id."""
    for at, token in enumerate(tokens):
        if token in ids:
            return tokens[: at + 1]
    return tokens


@pytest.fixture(scope="module")
def eos_ids(expected):
    """Ordinary tokens that some rows draw, at different steps."""
    ids = (expected[0][3], expected[1][5], expected[2][0])
    assert len({len(cut(row, ids)) for row in expected}) > 2
    return ids


def test_several_eos_ids(llama, loaded, expected, eos_ids):
    done = Generator(loaded, options(eos_ids=eos_ids)).generate(PROMPTS)
    decode = llama.tokenizers["base"].decode
    for completion, row in zip(done, expected, strict=True):
        tokens = cut(row, eos_ids)
        ended = tokens[-1] in eos_ids
        assert list(completion.token_ids) == tokens
        assert completion.finish_reason == ("eos" if ended else "length")
        assert completion.text == decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)


def test_eos_ids_of_the_models(tmp_path):
    """Those of config.json and generation_config.json, and of the tokenizer, where ids agree."""
    models = {
        "base": trios.make_model("llama", 320, 0, num_hidden_layers=1, eos_token_id=[7, 2]),
        "expert": trios.make_model("llama", 320, 1, num_hidden_layers=1, eos_token_id=[9, 295]),
    }
    models["base"].generation_config.eos_token_id = [7, 2, 11]
    swapped = trios.make_tokenizer(swap=10)  # 290 to 299 are other tokens in the expert
    trio = trios.write_trio(tmp_path, models, {"expert": swapped})
    assert trio.load(("base", "expert")).trio.eos_ids() == (2, 7, 9, 11)


def with_processors(llama, make, eos=(trios.EOS,)):
    """The torch loop under transformers' processors; make(prompt length) gives them."""
    answers = []
    for prompt in PROMPTS:
        ids = llama.ids(prompt)
        chain = make(len(ids["base"]))

        def change(context, scores, chain=chain):
            for processor in chain:
                scores = trios.warp(processor, scores, context)
            return scores

        answers.append(llama.greedy(ids, STEPS, change=change, eos=eos))
    return answers


def test_min_new_tokens(llama, loaded, expected, eos_ids):
    answers = with_processors(
        llama, lambda n: [MinNewTokensLengthLogitsProcessor(n, 5, list(eos_ids))], eos_ids
    )
    assert min(len(row) for row in answers) == 6
    assert answers[1] == expected[1][:6]  # ends at the first step where it may
    assert complete(loaded, eos_ids=eos_ids, min_new_tokens=5) == answers


def test_banned_tokens(llama, loaded, expected):
    """A ban of one token, of two, of two of which one ends a prompt, and of a first token."""
    tokenizer = llama.tokenizers["base"]
    single, pair, first = expected[1][1:2], expected[0][3:5], expected[5][:1]
    straddling = [llama.ids(PROMPTS[2])["base"][-1], expected[2][0]]
    banned = [single, pair, straddling]
    texts = [tokenizer.decode(ids) for ids in banned]
    assert [tokenizer(text)["input_ids"] for text in texts] == banned
    answers = with_processors(
        llama,
        lambda n: [
            NoBadWordsLogitsProcessor(banned, [trios.EOS]),
            SuppressTokensAtBeginLogitsProcessor(first, n),
        ],
    )
    for row, at in ((1, 1), (0, 4), (2, 0), (5, 0)):
        assert answers[row][:at] == expected[row][:at]
        assert answers[row][at] != expected[row][at]
    fields = {"banned_tokens": tuple(texts), "banned_first_tokens": (tokenizer.decode(first),)}
    assert complete(loaded, **fields) == answers


def test_repetition_penalty(llama, loaded, expected):
    """Of M's prompt and of what was generated; never of M+'s template."""
    answers = with_processors(llama, lambda n: [RepetitionPenaltyLogitsProcessor(1.6)])
    assert sum(a != b for a, b in zip(answers, expected, strict=True)) > 3
    assert complete(loaded, repetition_penalty=1.6) == answers


@pytest.fixture(scope="module")
def stops(llama, expected):
    """Strings that no token boundary frames, one of them across the end of the fourth token."""
    decode = llama.tokenizers["base"].decode
    inner = decode(expected[0][:3])[3:-1] + decode(expected[0][2:3])[:1]
    stops = (inner, decode(expected[3][3:5])[1:], decode(expected[5][8:12])[2:-1])
    words = {decode([token]) for row in expected for token in row}
    assert not words & set(stops)
    return stops


def stopped(decode, tokens, stops):
    """The fewest tokens that hold a stop string, and the text before it."""
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count], skip_special_tokens=True)
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return tokens[:count], text[: min(found)], True
    return tokens, text, False


@pytest.mark.parametrize("chunk_steps", [1, 4, 16])
def test_stop_strings(llama, loaded, expected, stops, chunk_steps):
    decode = llama.tokenizers["base"].decode
    fields = {"stop": stops, "eos_ids": (expected[0][9],), "chunk_steps": chunk_steps}
    completions = Generator(loaded, options(**fields)).generate(PROMPTS)
    answers = [stopped(decode, row, stops) for row in expected]
    assert [row for row, answer in enumerate(answers) if answer[2]] == [0, 3, 5]
    for row, (completion, (tokens, text, found)) in enumerate(
        zip(completions, answers, strict=True)
    ):
        if not found:
            tokens = cut(tokens, fields["eos_ids"])
            ended = tokens[-1] in fields["eos_ids"]
            text = decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        assert list(completion.token_ids) == tokens, row
        assert completion.text == text, row
        assert (completion.finish_reason == "stop") == found, row


@pytest.mark.parametrize("least", [3, 9])
def test_stop_strings_after_min_new_tokens(llama, loaded, expected, stops, least):
    """One that begins in the text of the first tokens is passed over; a later one ends the text."""
    decode = llama.tokenizers["base"].decode
    stops = (*stops, decode(expected[6][2:3]), decode(expected[6][8:10])[:3])
    fields = {"stop": stops, "eos_ids": (), "min_new_tokens": least}
    completions = Generator(loaded, options(**fields)).generate(PROMPTS)
    ended = []
    for row, (completion, tokens) in enumerate(zip(completions, expected, strict=True)):
        start = len(decode(tokens[:least], skip_special_tokens=True))
        for count in range(1, len(tokens) + 1):
            text = decode(tokens[:count], skip_special_tokens=True)
            found = [at for stop in stops if (at := text.find(stop, start)) >= 0]
            if found:
                tokens, text = tokens[:count], text[: min(found)]
                ended.append(row)
                break
        assert list(completion.token_ids) == tokens, row
        assert completion.text == text, row
        assert len(completion.token_ids) >= least
    assert ended == {3: [3, 5, 6], 9: [5]}[least]


def test_text_of_parts_of_characters():
    """Three tokens make one character; a prompt ends before it."""
    tokenizer = make_tokenizer()
    prompt, euro = tokenizer("ü a")["input_ids"], tokenizer("€")["input_ids"]
    assert len(euro) == 3
    detokenizer = Detokenizer(tokenizer, prompt)
    assert detokenizer.text(euro) == "€"
    end = tokenizer("b!")["input_ids"]
    assert detokenizer.find_stop([*euro, *end], ["€b"]) == (4, "")
    assert detokenizer.find_stop([*euro, *end], ["b", "!"]) == (4, "€")
    assert detokenizer.find_stop(euro, ["b"]) is None
    assert detokenizer.find_stop(euro, ["a", "ü"]) is None, "in the prompt only"
    for least, count in ((0, 3), (2, 3), (3, None), (4, None)):  # it is whole with its last token
        found = detokenizer.find_stop([*euro, *end], ["€"], least)
        assert found == (None if count is None else (count, "")), least


def test_strings_without_effect_are_refused(loaded):
    for fields, message in [
        ({"stop": ("</s>",)}, "stop string '</s>' is a special token"),
        ({"banned": ("",)}, "non-empty strings"),
    ]:
        with pytest.raises(InputError, match=message):
            Generator(loaded, options(**fields)).generate(PROMPTS)


def test_nothing_left_to_draw(llama, loaded):
    """M keeps one token at each step, and it is banned at the first."""
    first = Generator(loaded, options(alpha=0.0)).generate(PROMPTS[:1])[0].token_ids[0]
    word = llama.tokenizers["base"].decode([first])
    fields = {"base_filter": Truncation(top_k=1), "banned_first_tokens": (word,)}
    with pytest.raises(InputError, match="row 0: bans and base_filter exclude every token"):
        Generator(loaded, options(**fields)).generate(PROMPTS[:1])


def test_text_keeps_the_space_of_the_first_word():
    """Llama-2's kind of tokenizer drops the space before the first word of what it decodes."""
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "<s>": 2}))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert tokenizer.decode([1, 0]) == "two one"
    assert Detokenizer(tokenizer, [2, 0]).text([1, 0]) == " two one"


@pytest.mark.parametrize("field", ["stop", "banned", "banned_first"])
def test_empty_strings(field):
    with pytest.raises(InputError, match="non-empty strings"):
        options(**{field: ("",)})


def test_characters_of_bytes():
    """A tokenizer that spells rare characters in bytes decodes a cut run of bytes to nothing else.

    So the prompt's context must begin at a character, and a stop string may be there for some
    counts of tokens and hidden for others.
    """
    vocab = {"<unk>": 0, "a": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    prompt, new = (tokenizer(text)["input_ids"] for text in ("a齉龘", "靐"))
    assert (len(prompt), len(new)) == (7, 3)
    assert Detokenizer(tokenizer, prompt).text(new) == "靐"
    ids = tokenizer("🌵" * 7 + "🦙" + "🌵" * 8)["input_ids"]
    detokenizer = Detokenizer(tokenizer, [1])
    for count in (32, 48, 64):
        assert detokenizer.find_stop(ids[:count], ["🦙"]) == (32, "🌵" * 7)
    assert detokenizer.find_stop(ids[:33], ["🦙"]) is None
