"""Tokenizers from GGUF metadata, as ``transformers.PreTrainedTokenizerFast`` without torch.

Meaning of the keys: llama.cpp's ``src/llama-vocab.cpp``. Split patterns: the ``tokenizer.json`` of
the models that each ``tokenizer.ggml.pre`` value stands for, grouped as llama.cpp groups them.
Unicode normalisation is not part of a GGUF file, so none is done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from proxy_jax.checkpoints.gguf_header import Metadata
from proxy_jax.errors import InputError

_SPACE = "\u2581"  # SentencePiece's visible space

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    # Applied one after the other, each to the pieces that the one before left.
    splits: tuple[str, ...]
    # A piece that is a token as it stands is not built up from merges.
    ignore_merges: bool = False
    # What a missing add_bos_token key means.
    add_bos: bool = False


def _group(names: str, pre: _Pre) -> dict[str, _Pre]:
    return dict.fromkeys(names.split(), pre)


_PRE_TOKENIZERS = {
    **_group(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **_group("tekken", _Pre((_TEKKEN,), ignore_merges=True, add_bos=True)),
    **_group("dbrx smaug-bpe", _Pre((_LLAMA3,))),
    **_group("qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan", _Pre((_QWEN2,))),
    **_group(
        "smollm starcoder refact command-r codeshell exaone minerva-7b",
        _Pre((r"\p{N}", _GPT2)),
    ),
    **_group(
        "gpt-2 phi-2 olmo mpt jais gigachat mellum exaone4 trillion granite-docling",
        _Pre((_GPT2,)),
    ),
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}

# Ids of the special tokens, and those that llama.cpp assumes for "llama" when a key is missing.
_ROLES = {
    "bos": ("tokenizer.ggml.bos_token_id", 1),
    "eos": ("tokenizer.ggml.eos_token_id", 2),
    "unk": ("tokenizer.ggml.unknown_token_id", 0),
    "pad": ("tokenizer.ggml.padding_token_id", None),
}


def make_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that a GGUF file's metadata describe.

    Its length is the number of tokens in the file, less the unused ones at the end: those only
    stand for padding rows of the embedding.

    Raises:
      InputError: a tokenizer model or pre-tokenizer that is not supported, a missing key, or lists
        that do not fit together.
    """
    model = metadata.choice("tokenizer.ggml.model", ("gpt2", "llama"))
    words = metadata.array("tokenizer.ggml.tokens", str)
    types = _per_token(metadata, "tokenizer.ggml.token_type", int, len(words))
    types = types or (TokenType.NORMAL,) * len(words)
    used = [index for index, kind in enumerate(types) if kind != TokenType.UNUSED]
    if not used:
        raise InputError(f"{metadata.path}: metadata key tokenizer.ggml.tokens holds no token")
    types = types[: used[-1] + 1]
    tokens = _tokens(metadata.path, words, types, visible_spaces=model == "llama")
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
    else:
        backend, add_bos = _sentencepiece(metadata, tokens, types, len(words)), True
    # Matched in the text as it is, before anything else looks at it.
    for kinds, special in (
        ((TokenType.CONTROL, TokenType.UNKNOWN), True),
        ((TokenType.USER_DEFINED,), False),
    ):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in kinds
            ]
        )
    special_tokens = _special_tokens(metadata, tokens, assume=model == "llama")
    flags = {
        "add_bos_token": metadata.flag("tokenizer.ggml.add_bos_token", default=add_bos),
        "add_eos_token": metadata.flag("tokenizer.ggml.add_eos_token", default=False),
    }
    for role in ("bos", "eos"):
        if flags[f"add_{role}_token"] and f"{role}_token" not in special_tokens:
            raise InputError(
                f"{metadata.path}: metadata key {_ROLES[role][0]} is missing,"
                " but the tokenizer has to add that token"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.string("tokenizer.chat_template", default=None),
        **flags,
        **special_tokens,
    )


def _per_token(metadata: Metadata, key: str, kind: type, count: int) -> tuple[Any, ...]:
    """A list with an entry for each token; empty where there is none."""
    values = metadata.array(key, kind, default=())
    if values and len(values) != count:
        raise InputError(
            f"{metadata.path}: metadata key {key} has {len(values)} entries, expected {count}"
        )
    return values


def _tokens(
    path: Path, words: Sequence[str], types: Sequence[int], visible_spaces: bool
) -> list[str]:
    tokens: dict[str, None] = {}
    for index, (token, kind) in enumerate(zip(words, types, strict=False)):
        if visible_spaces and kind == TokenType.USER_DEFINED:
            # Matched in the text as it is, so spelled like it; older converters left it visible.
            token = token.replace(_SPACE, " ")
        token = token or f"[EMPTY_{index}]"
        if token in tokens:
            raise InputError(f"{path}: metadata key tokenizer.ggml.tokens holds {token!r} twice")
        tokens[token] = None
    return list(tokens)


def _special_tokens(metadata: Metadata, tokens: list[str], assume: bool) -> dict[str, str]:
    found = {}
    for role, (key, assumed_id) in _ROLES.items():
        token_id = metadata.integer(key, 0, len(tokens) - 1, default=assumed_id if assume else None)
        if token_id is None:
            continue
        if token_id >= len(tokens):
            raise InputError(f"{metadata.path}: {key} is missing, and {token_id} is no token")
        found[f"{role}_token"] = tokens[token_id]
    return found


def _byte_level(metadata: Metadata, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it adds BOS unless told otherwise."""
    name = metadata.choice("tokenizer.ggml.pre", sorted(_PRE_TOKENIZERS), default="default")
    pre = _PRE_TOKENIZERS[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for merge in metadata.array("tokenizer.ggml.merges", str):
        # The left part may itself begin with a space.
        cut = merge.find(" ", 1)
        pair = merge[:cut], merge[cut + 1 :]
        if cut < 0 or any(part not in vocab for part in (*pair, "".join(pair))):
            raise InputError(
                f"{metadata.path}: metadata key tokenizer.ggml.merges holds {merge!r},"
                " expected two tokens of the vocabulary that join to a third"
            )
        merges.append(pair)
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: Sequence[int], count: int
) -> Tokenizer:
    """BPE by piece scores with byte fallback, over text whose spaces are made visible.

    The metadata describe `count` tokens, of which `tokens` are used.
    """
    scores = _per_token(metadata, "tokenizer.ggml.scores", float, count)
    if not scores:
        raise InputError(f"{metadata.path}: tokenizer.ggml.scores is missing")
    if not all(map(math.isfinite, scores)):
        raise InputError(f"{metadata.path}: metadata key tokenizer.ggml.scores must be finite")
    backend = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_score_merges(scores, tokens, types),
            unk_token=_special_tokens(metadata, tokens, assume=True)["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    make_visible = normalizers.Replace(" ", _SPACE)
    decode_steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag("tokenizer.ggml.add_space_prefix", default=True):
        # Before every stretch of text, also behind a special token, even if it has a space already.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), make_visible])
        decode_steps.append(decoders.Strip(" ", left=1))
    else:
        backend.normalizer = make_visible
    backend.decoder = decoders.Sequence(decode_steps)
    return backend


def _score_merges(
    scores: Sequence[float], tokens: list[str], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best third first.

    Only ordinary (and unused) pieces can come out of a merge. Among the ways to make one piece, a
    longer left part goes first, as in the ``tokenizer.json`` files made from SentencePiece models.
    """
    pieces = {
        token: index
        for index, token in enumerate(tokens)
        if types[index] in (TokenType.NORMAL, TokenType.UNUSED)
    }
    ranked = []
    for piece, index in pieces.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-scores[index], index, left, right))
    ranked.sort(key=lambda item: item[:2])
    return [(left, right) for _, _, left, right in ranked]
