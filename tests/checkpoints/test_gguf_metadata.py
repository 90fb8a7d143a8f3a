"""Metadata and headers of GGUF files: where texts end, and what does not fit is named."""

import struct

import numpy as np
import pytest

from proxy_jax.checkpoints.gguf import GGUFCheckpoint
from proxy_jax.errors import InputError
from tests.checkpoints.test_gguf import HIDDEN, VOCAB, converted, fails, hf_llama, random, write

ENDS = ["a", "<|endoftext|>", "<|im_end|>", "</s>", "<|fim_pad|>", "<end_of_turn>", "[PAD]"]


def ends(tmp_path, tokens=ENDS, control=(1, 2, 4), **ids):
    """Ids that end a text, of a file with these tokens and keys."""
    kinds = [3 if i in control else 1 for i in range(len(tokens))]
    extra = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    extra |= {f"tokenizer.ggml.{role}_token_id": i for role, i in ids.items()}
    path = write(tmp_path / "m.gguf", converted(hf_llama()), extra=extra)
    return GGUFCheckpoint(path).eos_ids


def test_texts_end_at_keys_and_at_control_tokens_known_to_end_them(tmp_path):
    """The tokens and keys are those of llama.cpp's vocabulary."""
    assert ends(tmp_path) == (1, 2, 4)
    assert ends(tmp_path, eos=0) == (0, 1, 2, 4)
    # "</s>" also strikes text out in HTML: only as a control token it is an end.
    assert ends(tmp_path, control=(3, 6)) == (3, 6)
    named = {"eos": 0, "eot": 1, "eom": 2, "fim_pad": 3, "fim_rep": 4, "fim_sep": 5}
    assert ends(tmp_path, control=(), **named) == (0, 1, 2, 3, 4, 5)
    assert ends(tmp_path, control=(), bos=1, padding=2, unknown=3) == ()


def test_the_end_of_a_message_is_no_end_where_texts_have_their_own(tmp_path):
    assert ends(tmp_path, ["<|end|>", "a"], control=(0,)) == (0,)
    assert ends(tmp_path, ["<|end|>", "<|return|>"], control=(0, 1)) == (0, 1)
    assert ends(tmp_path, ["<|end|>", "<|return|>", "<|call|>"], control=(0, 1, 2)) == (1, 2)
    assert ends(tmp_path, ["<|end|>", "<|flush|>", "<|calls|>"], control=(0, 1, 2)) == (1, 2)


def test_ids_beyond_the_tokens_are_refused(tmp_path):
    for role in ("bos", "eos"):
        with pytest.raises(InputError, match=f"{role}_token_id must be between 0 and 6, not 7"):
            ends(tmp_path, **{role: 7})
        with pytest.raises(InputError, match=f"{role}_token_id must be an integer, not '7'"):
            ends(tmp_path, **{role: "7"})
    with pytest.raises(InputError, match="eot_token_id must be between 0 and 6, not 99"):
        ends(tmp_path, eot=99)
    # Without tokens, the rows of the embedding count.
    path = tmp_path / "m.gguf"
    extra = {"tokenizer.ggml.eos_token_id": VOCAB}
    fails(write(path, converted(hf_llama()), extra=extra), "eos_token_id must be between 0 and 9")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"block_count": 0}, "block_count must be between 1 and 1000, not 0"),
        ({"block_count": 10**7}, "block_count must be between 1 and 1000"),
        ({"block_count": "2"}, "block_count must be an integer, not '2'"),
        ({"embedding_length": 0}, "embedding_length must be at least 1"),
        ({"embedding_length": True}, "embedding_length must be an integer, not True"),
        ({"attention.head_count": 0}, "head_count must be at least 1"),
        ({"attention.head_count_kv": 0}, "head_count_kv must be at least 1"),
        ({"attention.key_length": 0}, "key_length must be at least 1"),
        ({"feed_forward_length": "x"}, "feed_forward_length must be an integer"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "epsilon must be above 0"),
        ({"attention.layer_norm_rms_epsilon": "x"}, "epsilon must be a number"),
        ({"rope.freq_base": -1.0}, "freq_base must be above 0"),
        ({"rope.freq_base": float("nan")}, "freq_base must be finite"),
        ({"rope.scaling.factor": -2.0}, "scaling.factor must be at least 0"),
        ({"rope.scaling.type": 3}, "scaling.type must be a string"),
        ({"rope.scaling.type": "linear"}, "scaling.factor is missing"),
        ({"split.count": "2"}, "split.count must be an integer"),
    ],
)
def test_values_of_the_metadata_are_checked(tmp_path, extra, words):
    drop = list(extra)
    fails(write(tmp_path / "m.gguf", converted(hf_llama()), drop=drop, extra=extra), words)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"attention.sliding_window": -4.5}, "sliding_window must be an integer"),
        ({"attention.sliding_window_pattern": 0}, "pattern must be at least 1"),
        ({"attention.sliding_window_pattern": "2"}, "pattern must be an integer"),
        ({"attention.sliding_window_pattern": [True]}, "0 or 1 for each of 2 layers"),
        ({"attention.sliding_window_pattern": [1, 2]}, "0 or 1 for each of 2 layers"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be above 0"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping must be a number"),
    ],
)
def test_values_of_gemmas_metadata_are_checked(tmp_path, extra, words):
    tensors = {"token_embd.weight": random(VOCAB, HIDDEN)}
    fails(write(tmp_path / "g.gguf", tensors, "gemma2", extra=extra), words)


def test_a_list_of_windows(tmp_path):
    extra = {"attention.sliding_window_pattern": [False, True]}
    tensors = {"token_embd.weight": random(VOCAB, HIDDEN)}
    config = GGUFCheckpoint(write(tmp_path / "g.gguf", tensors, "gemma2", extra=extra)).hf_config
    assert config["layer_types"] == ["full_attention", "sliding_attention"]


def test_rope_factors_are_half_a_head(tmp_path):
    for factors in (np.ones(3, np.float32), np.ones((2, 4), np.float32)):
        tensors = {**converted(hf_llama()), "rope_freqs.weight": factors}
        fails(write(tmp_path / "m.gguf", tensors), "'rope_freqs.weight' has shape", "(4,)")


def test_integers_are_no_weights(tmp_path):
    for dtype, kind in ((np.int8, "I8"), (np.int32, "I32"), (np.float64, "F64")):
        norm = np.ones(HIDDEN, dtype)
        path = write(tmp_path / "m.gguf", {**converted(hf_llama()), "output_norm.weight": norm})
        fails(path, "'output_norm.weight'", kind, "expected one of")


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def described(name, dims, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(keys=(), tensors=(), count=None):
    """A file spelled byte by byte."""
    numbers = struct.pack("<IQQ", 3, len(tensors) if count is None else count, len(keys))
    return b"GGUF" + numbers + b"".join(keys) + b"".join(tensors) + bytes(256)


U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
ALIGNMENT = text("general.alignment")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header([ALIGNMENT + struct.pack("<Ii", 5, -32)]), "alignment must be at least 1, not -32"),
        (header([ALIGNMENT + struct.pack("<II", U32, 0)]), "alignment must be at least 1, not 0"),
        (header([ALIGNMENT + struct.pack("<II", U32, 48)]), "must be a power of 2, not 48"),
        (header([ALIGNMENT + struct.pack("<I", STRING) + text("32")]), "must be an integer"),
        (header([ALIGNMENT + struct.pack("<IB", BOOL, 1)]), "must be an integer, not True"),
        (header([ALIGNMENT + struct.pack("<II", U32, 32)] * 2), "'general.alignment' stands there"),
        (header([text("k") + struct.pack("<I", 13)]), "damaged"),
        (header([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]), "array of arrays"),
        (header([text("k") + struct.pack("<IIQ", ARRAY, U32, 10**18)]), f"array of {10**18}"),
        (header([text("k") + struct.pack("<IIQ", ARRAY, STRING, 10**18)]), f"array of {10**18}"),
        (header([text("k") + struct.pack("<IIQ", ARRAY, 13, 1)]), "damaged"),
        (header([struct.pack("<Q", 2**63)]), f"string of {2**63} bytes"),
        (header([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]), "damaged"),
        (header([], [], count=2**60)[:24], "damaged"),
        (header([], [described("a", [8]), described("a", [8], offset=64)]), "'a' stands there"),
        (header([], [described("a", [8]), described("b", [8], offset=16)]), "'a' and 'b' overlap"),
        (header([], [described("a", [8]), described("b", [8])]), "overlap"),
        (header([], [described("a", [])]), "'a' has shape ()"),
        (header([], [described("a", [4, 0])]), "'a' has shape (0, 4)"),
        (header([], [described("a", [1] * 5)]), "a tensor of 5 dimensions"),
        (header([], [described("a", [2**62, 2**62])]), "truncated file: tensor 'a' ends"),
        (header([], [described("a", [8], kind=99)]), "'a' has type 99"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, content, words):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    fails(path, words)
