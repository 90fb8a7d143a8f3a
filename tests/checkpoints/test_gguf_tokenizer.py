from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from proxy_jax.checkpoints.gguf import GGUFCheckpoint
from proxy_jax.checkpoints.gguf_header import Metadata
from proxy_jax.checkpoints.gguf_tokenizer import make_tokenizer
from proxy_jax.errors import InputError
from tests.checkpoints.test_gguf import converted, hf_llama, write

BYTES = list("ĀāĂăĄąĆćĈĉĊċČčĎďĐđĒēĔĕĖėĘęĚěĜĝĞğĠ") + [chr(c) for c in range(33, 127)]
BYTES += list("ġĢģĤĥĦħĨĩĪīĬĭĮįİıĲĳĴĵĶķĸĹĺĻļĽľĿŀŁł")
BYTES += [chr(c) for c in [*range(161, 173), *range(174, 256)]] + ["Ń"]


def byte_level(pre, **extra):
    merges = ["Ġ a", "1 2", "12 3", "ĉ ĉ", "a b", "' S", "ab c", "x y"]
    tokens = BYTES + [m.replace(" ", "") for m in merges] + ["xyz", "<|bos|>", "<|end|>", "<tool>"]
    kinds = [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.CONTROL] * 2
    metadata = Metadata(Path("file.gguf"))
    metadata.update(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*tokens, "[PAD]"],
            "tokenizer.ggml.token_type": [*kinds, TokenType.USER_DEFINED, TokenType.UNUSED],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": tokens.index("<|bos|>"),
            "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }
    )
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in extra.items()})
    return metadata


TEXTS = [
    "",
    " ab  abc\n\n\tx = 12345;  \r\n",
    "I'S don't 1,234.5 — naïve ½ ٣ 日本語 🙂\u200d🌫️",
    "<|bos|>ab<|end|> <tool> <too l>",
]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["Ġa", "b", "'S", "123", "12"]),
        ("qwen2", ["Ġa", "b", "'S", "1", "2", "3", "1", "2"]),
        ("smollm", ["Ġa", "b", "'", "S", "1", "2", "3", "1", "2"]),
        ("dbrx", ["Ġa", "b", "'S", "123", "12"]),
        ("gpt-2", ["Ġa", "b", "'", "S", "123", "12"]),
        ("default", ["Ġa", "b", "'", "S", "123", "12"]),
        ("tekken", ["Ġa", "b", "'S", "1", "2", "3", "1", "2"]),
    ],
)
def test_byte_level_tokenizers(pre, pieces):
    metadata = byte_level(pre, add_bos_token=False)
    tokenizer = make_tokenizer(metadata)
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"]) - 1, "less the unused last one"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" ab'S12312")) == pieces
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_bos_and_template():
    tokenizer: Any = make_tokenizer(byte_level("llama-bpe"))
    bos, end, tool = (tokenizer.convert_tokens_to_ids(t) for t in ["<|bos|>", "<|end|>", "<tool>"])
    # The llama-bpe group adds BOS unless the file says otherwise; a piece that is a token is one.
    assert tokenizer.encode("xyz") == [bos, tokenizer.convert_tokens_to_ids("xyz")]
    assert tokenizer.encode("<tool><|end|>", add_special_tokens=False) == [tool, end]
    assert tokenizer.decode([bos, tool, end], skip_special_tokens=True) == "<tool>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, end)
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    both: Any = make_tokenizer(byte_level("qwen2", add_bos_token=True, add_eos_token=True))
    assert both.encode("x")[::2] == [bos, end]
    assert len(both.encode("xyz")) == 4  # no token of its own without the group's rule
    assert len(make_tokenizer(byte_level("qwen2")).encode("x")) == 1


SPM_PIECES = ["▁", "a", "b", "c", "ab", "▁ab", "bc", "▁▁"]


def sentencepiece(**extra):
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [TokenType.UNKNOWN] + [TokenType.CONTROL] * 2 + [TokenType.BYTE] * 256
    scores = {"ab": -1.0, "bc": -0.5, "▁ab": -3.0, "▁▁": -4.0}
    metadata = Metadata(Path("file.gguf"))
    metadata.update(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*tokens, *SPM_PIECES, "[box]"],
            "tokenizer.ggml.token_type": [
                *kinds,
                *[TokenType.NORMAL] * len(SPM_PIECES),
                TokenType.USER_DEFINED,
            ],
            "tokenizer.ggml.scores": [0.0] * len(tokens)
            + [scores.get(piece, -9.0) for piece in SPM_PIECES]
            + [0.0],
        }
    )
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in extra.items()})
    return metadata


def test_sentencepiece_tokenizer():
    metadata = sentencepiece()
    tokenizer = make_tokenizer(metadata)
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"])

    def pieces(text, tokenizer=tokenizer):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    # "bc" has a better score than "ab"; a leading space is added on top of those in the text.
    assert pieces("abc") == ["<s>", "▁", "a", "bc"]
    assert pieces("  ab") == ["<s>", "▁▁", "▁ab"]
    assert pieces("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    # Behind a special or user-defined token as well.
    assert pieces("[box]ab</s>ab") == ["<s>", "[box]", "▁ab", "</s>", "▁ab"]
    for text in ["", "abc  ab\n\tdé🙂", " a"]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    plain = make_tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert pieces("ab ab", plain) == ["ab", "▁ab"]
    assert plain.decode(plain.encode(" ab c")) == " ab c"


def test_user_defined_spaces_are_matched_in_the_text():
    metadata = sentencepiece(add_space_prefix=False)
    metadata["tokenizer.ggml.token_type"][3 + 256 + SPM_PIECES.index("▁▁")] = TokenType.USER_DEFINED
    tokenizer = make_tokenizer(metadata)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  ab")) == ["<s>", "a", "  ", "ab"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level("pre-next"), "'pre-next' is not supported; known: "),
        (byte_level("qwen2", model="t5"), "'t5' is not supported; known: gpt2, llama"),
        (byte_level("qwen2", tokens=["a", "a"], token_type=[1, 1]), "'a' twice"),
        (byte_level("qwen2", token_type=[1]), "token_type has 1 entries"),
        (byte_level("qwen2", merges=["a q q"]), "holds 'a q q'"),
        (byte_level("qwen2", eos_token_id=10**6), "eos_token_id must be between 0 and "),
        (byte_level("llama-bpe", bos_token_id=None), "bos_token_id is missing"),
        (sentencepiece(scores=[0.0]), "scores has 1 entries"),
        (Metadata(Path("file.gguf")), "tokenizer.ggml.model is missing"),
        (byte_level("qwen2", tokens="abc"), "tokens must be a list, not 'abc'"),
        (byte_level("qwen2", tokens=[1, 2]), "tokens must hold str values, not 1"),
        (byte_level("qwen2", tokens=[], token_type=[]), "tokens holds no token"),
        (byte_level("qwen2", token_type=["x"]), "token_type must hold int values, not 'x'"),
        (byte_level("qwen2", token_type=3), "token_type must be a list, not 3"),
        (byte_level("qwen2", merges=[3]), "merges must hold str values, not 3"),
        (byte_level("qwen2", eos_token_id=-1), "eos_token_id must be between 0 and "),
        (byte_level("qwen2", eos_token_id="2"), "eos_token_id must be an integer, not '2'"),
        (byte_level("qwen2", add_bos_token="false"), "add_bos_token must be true or false"),
        (byte_level("qwen2", add_eos_token=0), "add_eos_token must be true or false"),
        (byte_level(7), "pre must be a string, not 7"),
        (sentencepiece(scores=None), "scores is missing"),
        (sentencepiece(scores=["x"]), "scores must hold float values, not 'x'"),
        (sentencepiece(scores=[float("nan")] * 268), "scores must be finite"),
        (sentencepiece(add_space_prefix="no"), "add_space_prefix must be true or false"),
        (
            sentencepiece(tokens=["a"], token_type=[1], scores=[0.0]),
            "bos_token_id is missing, and 1 is no token",
        ),
    ],
)
def test_tokenizer_errors(metadata, message):
    with pytest.raises(InputError) as error:
        make_tokenizer(metadata)
    assert str(error.value).startswith("file.gguf: ")
    assert message in str(error.value)


def test_tokenizer_from_a_file(tmp_path):
    metadata = byte_level("qwen2", add_bos_token=False)
    extra = {
        key: [int(x) for x in value] if key.endswith("token_type") else value
        for key, value in metadata.items()
    }
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", converted(hf_llama()), extra=extra))
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.get_vocab() == make_tokenizer(metadata).get_vocab()
    assert checkpoint.hf_config["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]


@pytest.mark.real
def test_smollm2_tokenizer(smollm2_path):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = GGUFCheckpoint(smollm2_path).tokenizer()
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers leaves out the digit splitting of this model's own tokenizer.json.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert tokenizer.chat_template == theirs.chat_template
    for text in [*TEXTS, "<|im_start|>user\nx[12] ½ Ⅷ \n1<|im_end|>\n", Path(__file__).read_text()]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text
