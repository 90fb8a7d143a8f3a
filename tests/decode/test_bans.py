"""Banned strings against what the tokenizers decode, token by token and candidate by candidate."""

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from decode import Generator, Truncation, bans
from decode.text import Detokenizer
from proxy_jax.errors import InputError
from tests import trios
from tests.trios import EOS, PROMPTS, STEPS, complete, make_tokenizer, options


def sentencepiece():
    """Llama-2's kind: visible spaces, bytes for what it has no token for, the first space dropped.

    A few of its tokens hold others, so that a word has many spellings.
    """
    merged = ("▁a", "pp", "les", "app", "apples", "▁apples", "mo", "del", "model", "▁model", "▁▁")
    letters = sorted({*"".join(PROMPTS), *"".join(merged)} - {" "})
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words = [*dict.fromkeys([*words, "le", "de", "ap", *merged])]
    pairs = ("▁ a|p p|l e|le s|a p|ap p|app les|▁ apples|m o|d e|de l|mo del|▁ model|▁ ▁").split(
        "|"
    )
    merges: Any = [tuple(pair.split(" ")) for pair in pairs]
    backend = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {"byte-level": make_tokenizer, "sentencepiece": sentencepiece}


def forbidden(tokenizer, prompt, new, banned, banned_first):
    """The ids after which the text, decoded, has what it may not have."""

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    context = decode(prompt)
    found = set()
    for i in range(len(tokenizer)):
        whole = decode([*prompt, *new, i])
        ends_in_it = any(whole.find(b, max(0, len(context) - len(b) + 1)) >= 0 for b in banned)
        if ends_in_it or whole[len(context) :].startswith(tuple(banned_first) or ("\0",)):
            found.add(i)
    return found


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_state_and_token(kind):
    """Random texts that keep to a ban; at each step, all tokens."""
    tokenizer = TOKENIZERS[kind]()
    prompt = tokenizer("one two m")["input_ids"]
    banned, first = ("app", "ppl", "del", " m", "mode", "és", "€", "\n"), (" a", "t", "mo")
    automata = bans.string_bans(tokenizer, len(tokenizer) + 7, banned, first)
    tables = [automaton.table() for automaton in automata]
    draw = random.Random(4)
    # Whole words, their parts, and the bytes of characters.
    pool = [
        i
        for text in ("apples models", "é€s", "mod el\n", " two")
        for i in tokenizer(text)["input_ids"]
    ]
    met = set()
    for _ in range(30):
        states = [automaton.start(prompt) for automaton in automata]
        new: list[int] = []
        while len(new) < 12:
            rows = [table[state] for table, state in zip(tables, states, strict=True)]
            excluded = {int(i) for row in rows for i in np.flatnonzero(row == bans.BANNED)}
            if len(new) < 6:
                wanted = forbidden(tokenizer, prompt, new, banned, first)
                # After bytes that are no character some tokenizers hide the next ones, too.
                broken = "\ufffd" in tokenizer.decode([*prompt, *new])
                assert wanted <= excluded if broken else wanted == excluded, new
                met |= wanted
            choice = draw.choice(pool) if draw.random() < 0.7 else draw.randrange(3, len(tokenizer))
            if choice not in excluded:
                new.append(choice)
                states = [int(row[choice]) for row in rows]
        text = Detokenizer(tokenizer, prompt).text(new)
        assert not any(string in text for string in banned)
        assert not text.startswith(first)
    assert len(met) > 15
    assert not any((table[:, len(tokenizer) :] == bans.BANNED).any() for table in tables)


def constrained(tiny, prompt, combine=None, **fields):
    """The slow loop of tests.trios, in which each candidate's text is looked at."""
    tokenizer, ids = tiny.tokenizers["base"], tiny.ids(prompt)
    start = len(ids["base"])

    def change(context, scores):
        out = forbidden(tokenizer, ids["base"], context[start:], fields.get("banned", ()),
                        fields.get("banned_first", ()))  # fmt: skip
        return np.where(np.isin(np.arange(len(scores)), list(out)), -np.inf, scores)

    return tiny.greedy(ids, STEPS, combine, change=change)


def test_a_trio(llama, loaded, expected):
    """Parts of tokens, across tokens, across the end of a prompt, and what a text begins with."""
    decode = llama.tokenizers["base"].decode
    banned = (
        decode(expected[0][2:4])[1:-1],
        decode(expected[3][4:6]),
        PROMPTS[2][-1] + decode(expected[2])[0],
    )
    fields = {"banned": banned, "banned_first": (decode(expected[5])[:2],)}
    completions = Generator(loaded, options(**fields)).generate(PROMPTS)
    changed = []
    for row, (completion, prompt) in enumerate(zip(completions, PROMPTS, strict=True)):
        assert list(completion.token_ids) == constrained(llama, prompt, **fields), row
        assert not any(string in completion.text for string in banned)
        assert not completion.text.startswith(fields["banned_first"])
        changed.append(list(completion.token_ids) != expected[row])
    assert all(changed[row] for row in (0, 2, 3, 5))
    assert not all(changed)


def test_what_a_row_has_said_is_its_own(loaded):
    """In one batch or one by one, in chunks of any size, also where a slot is filled again."""
    fields: dict[str, Any] = {"banned": ("e", "an", "le m"), "banned_first": (" ",)}
    whole = complete(loaded, **fields)
    assert complete(loaded, batch_size=3, chunk_steps=5, **fields) == whole
    assert complete(loaded, PROMPTS[4:6], **fields) == whole[4:6]


@pytest.fixture(scope="module")
def bytes_and_pieces(tmp_path_factory):
    """A model alone whose tokenizer is of SentencePiece's kind."""
    tokenizer = sentencepiece()
    model = trios.make_model("llama", len(tokenizer), 6, num_hidden_layers=1)
    return trios.write_trio(tmp_path_factory.mktemp("pieces"), {"base": model}, {"base": tokenizer})


def test_sentencepiece(bytes_and_pieces):
    tiny, prompts = bytes_and_pieces, PROMPTS[:3]
    loaded = tiny.load(("base",))
    combine = lambda scores, step: scores["base"]  # noqa: E731
    free = [tiny.greedy(tiny.ids(prompt), STEPS, combine) for prompt in prompts]
    decode = tiny.tokenizers["base"].decode
    said = [
        decode([*tiny.ids(p)["base"], *ids])[len(p) :] for p, ids in zip(prompts, free, strict=True)
    ]
    letters = [next(c for c in text if c.isascii() and c.isalnum()) for text in said]
    fields = {
        "banned": (letters[0], letters[1], said[2].strip()[:2]),
        "banned_first": (said[2][:1],),
    }
    completions = Generator(loaded, options(**fields)).generate(prompts)
    for completion, prompt, before in zip(completions, prompts, free, strict=True):
        new = constrained(tiny, prompt, combine, **fields)
        assert list(completion.token_ids) == new != before
        assert not any(string in completion.text for string in fields["banned"])
        assert not completion.text.startswith(fields["banned_first"])


def test_special_tokens_add_nothing():
    """A ban holds around them, and never takes the end of a text away."""
    tokenizer = make_tokenizer()
    (ban,) = bans.string_bans(tokenizer, len(tokenizer), ("ab",), ())
    table, (a, b) = ban.table(), tokenizer("a")["input_ids"] + tokenizer("b")["input_ids"]
    assert table[table[table[0, a], trios.BOS], b] == bans.BANNED
    assert (table[:, EOS] == np.arange(len(table))).all()


def test_what_cannot_be_banned(loaded):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="need a tokenizer of byte-level BPE's or SentencePiece's"):
        bans.string_bans(PreTrainedTokenizerFast(tokenizer_object=backend), 3, ("a",), ())
    with pytest.raises(InputError, match=r"banned: .* has U\+FFFD"):
        complete(loaded, banned=("a\ufffd",))
    with pytest.raises(InputError, match=r"banned_first: 1000000 bytes of strings are too many"):
        complete(loaded, banned_first=("ab" * 500_000,))
    everything = tuple(map(chr, range(128)))
    fields: dict[str, Any] = {"banned_first": everything, "banned_first_tokens": trios.SPECIAL}
    with pytest.raises(InputError, match="row 0: bans and base_filter exclude every token"):
        complete(loaded, PROMPTS[:1], base_filter=Truncation(top_k=1), **fields)
