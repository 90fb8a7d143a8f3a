"""Training examples: rows of a data set as token ids, and which of them are learnt."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.rows import Row
from proxy_jax.tokenization import encode
from train.conversations import encode_conversation, refuse_fields, with_date

Format = Literal["prompt_completion", "messages", "text"]
FORMATS = get_args(Format)
_WHITESPACE = (" ", "\n", "\t")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One sequence to learn from.

    Attributes:
      tokens: [n + 1] int32; the first n are read, the last n are their targets.
      trained: [n + 1] bool, the tokens predicted with a loss; the first never is one.
      line: the number of the row it was made of.
      offsets: [trained tokens, V] float16, added to their logits in consistent proxy tuning.
    """

    tokens: np.ndarray
    trained: np.ndarray
    line: int
    offsets: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the rows.

    Attributes:
      kept: examples.
      truncated: those among them that lost their end.
      dropped: rows without a trained token within the limit.
      invalid: rows that cannot be used and were skipped.
      tokens: places that the examples take, n each.
      trained_tokens: targets with a loss.
    """

    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    invalid: int = 0
    tokens: int = 0
    trained_tokens: int = 0


def digest_examples(examples: Sequence[Example]) -> str:
    """Computes the SHA-256 of what is learnt, and from what."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.int64(len(example.tokens)).tobytes())
        digest.update(example.tokens.tobytes() + example.trained.tobytes())
    return digest.hexdigest()


def hold_out(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Keeps the last rows aside, to measure on: (rows to train on, held-out rows).

    Raises:
      InputError: nothing would be left to train on.
    """
    if not 0 <= count < len(rows):
        raise InputError(f"cannot hold out {count} of {len(rows)} rows")
    kept = len(rows) - count
    return list(rows[:kept]), list(rows[kept:])


def make_examples(
    rows: Sequence[Row],
    format: Format,
    tokenizer: Any,
    max_length: int,
    *,
    skip_invalid: bool = False,
    date: datetime.date | None = None,
) -> tuple[list[Example], Counts]:
    """Tokenises rows, and marks what is trained.

    prompt_completion: {prompt, completion}, joined by a space where neither side has whitespace
      at the seam, tokenised once, with EOS at the end. As many tokens as the prompt alone has are
      not trained (open_instruct/finetune.py of the proxy-tuning paper's code).
    messages: {messages: [{role, content}, ...]} under the tokenizer's chat template. What the
      assistant writes is trained, its end-of-turn token included; see `encode_conversation`.
    text: {text}, with EOS at the end, all trained. A document beyond the limit is cut into pieces;
      each begins with the last token of the one before, so that every token is a target once.

    Args:
      rows: from proxy_jax.rows.
      format: which of the three.
      tokenizer: a transformers tokenizer.
      max_length: most tokens an example has; prompt_completion and messages are cut there.
      skip_invalid: leaves out a row that cannot be used, and counts it.
      date: what chat templates that print a date take for today; by default today.

    Raises:
      InputError: an unknown format, a tokenizer without EOS or chat template, a row that lacks a
        field or has an unusable one, or no example left.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r} is unknown; use {', '.join(FORMATS)}")
    if max_length < 2:
        raise InputError(f"max_length must be at least 2, not {max_length}")
    if format != "messages" and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to end an example with")
    if format == "messages" and not tokenizer.chat_template:
        raise InputError("format is 'messages', but the tokenizer has no chat template")
    if format == "messages":
        tokenizer = with_date(tokenizer, date or datetime.date.today())
    examples: list[Example] = []
    truncated = dropped = invalid = 0
    reason = ""
    for row in rows:
        try:
            ids, trained = _ENCODERS[format](row, tokenizer)
        except InputError as error:
            if not skip_invalid:
                raise
            reason = reason or f"; {error}"
            invalid += 1
            continue
        starts = range(0, len(ids) - 1, max_length - 1) if format == "text" else (0,)
        pieces = [
            Example(ids[at : at + max_length], trained[at : at + max_length], row.number)
            for at in starts
        ]
        kept = [piece for piece in pieces if piece.trained[1:].any()]
        examples += kept
        dropped += not kept
        truncated += bool(kept) and format != "text" and len(ids) > max_length
    if not examples:
        raise InputError(
            f"none of {len(rows)} rows has a trained token in its first {max_length}{reason}"
        )
    return examples, Counts(
        kept=len(examples),
        truncated=truncated,
        dropped=dropped,
        invalid=invalid,
        tokens=sum(len(example.tokens) - 1 for example in examples),
        trained_tokens=sum(int(example.trained[1:].sum()) for example in examples),
    )


def _prompt_completion(row: Row, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    refuse_fields(row, "system", "tools", "functions", "weight")
    prompt = row.text("prompt")
    completion = row.text("completion")
    seam = "" if prompt.endswith(_WHITESPACE) or completion.startswith(_WHITESPACE) else " "
    ids = [*encode(tokenizer, prompt + seam + completion), tokenizer.eos_token_id]
    prompt_tokens = len(encode(tokenizer, prompt))
    return np.asarray(ids, np.int32), np.arange(len(ids)) >= prompt_tokens


def _text(row: Row, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    text = row.text("text")
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    return np.asarray(ids, np.int32), np.ones(len(ids), bool)


_ENCODERS = {
    "prompt_completion": _prompt_completion,
    "messages": encode_conversation,
    "text": _text,
}
