"""Training examples: rows of a data set as token ids, and which of them are learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jinja2
import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.rows import Row

Format = Literal["prompt_completion", "messages", "text"]
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
      tokens: places that the examples take, n each.
      trained_tokens: targets with a loss.
    """

    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0


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
    rows: Sequence[Row], format: Format, tokenizer: Any, max_length: int
) -> tuple[list[Example], Counts]:
    """Tokenises rows, and marks what is trained.

    prompt_completion: {prompt, completion}, joined by a space where neither side has whitespace
      at the seam, tokenised once, with EOS at the end. As many tokens as the prompt alone has are
      not trained (open_instruct/finetune.py of the proxy-tuning paper's code).
    messages: {messages: [{role, content}, ...]} under the tokenizer's chat template. What the
      assistant writes is trained, its end-of-turn token included.
    text: {text}, with EOS at the end, all trained. A document beyond the limit is cut into pieces;
      each begins with the last token of the one before, so that every token is a target once.

    Args:
      rows: from proxy_jax.rows.
      format: which of the three.
      tokenizer: a transformers tokenizer.
      max_length: most tokens an example has; prompt_completion and messages are cut there.

    Raises:
      InputError: an unknown format, a tokenizer without EOS or chat template, a row that lacks a
        field or has an unusable one, or no example left.
    """
    encoders = {"prompt_completion": _prompt_completion, "messages": _messages, "text": _text}
    if format not in encoders:
        raise InputError(f"format {format!r} is unknown; use {', '.join(encoders)}")
    if max_length < 2:
        raise InputError(f"max_length must be at least 2, not {max_length}")
    if format != "messages" and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to end an example with")
    if format == "messages" and not tokenizer.chat_template:
        raise InputError("format is 'messages', but the tokenizer has no chat template")
    examples: list[Example] = []
    truncated = dropped = 0
    for row in rows:
        ids, trained = encoders[format](row, tokenizer)
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
        raise InputError(f"none of {len(rows)} rows has a trained token in its first {max_length}")
    return examples, Counts(
        kept=len(examples),
        truncated=truncated,
        dropped=dropped,
        tokens=sum(len(example.tokens) - 1 for example in examples),
        trained_tokens=sum(int(example.trained[1:].sum()) for example in examples),
    )


def _prompt_completion(row: Row, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    prompt = row.text("prompt")
    completion = row.text("completion")
    seam = "" if prompt.endswith(_WHITESPACE) or completion.startswith(_WHITESPACE) else " "
    ids = [*_encode(prompt + seam + completion, tokenizer), tokenizer.eos_token_id]
    prompt_tokens = len(_encode(prompt, tokenizer))
    return np.asarray(ids, np.int32), np.arange(len(ids)) >= prompt_tokens


def _text(row: Row, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    text = row.text("text")
    ids = [*_encode(text, tokenizer), tokenizer.eos_token_id]
    return np.asarray(ids, np.int32), np.ones(len(ids), bool)


def _encode(text: str, tokenizer: Any) -> list[int]:
    """Ids with the special tokens that the tokenizer puts before a text, not those behind it."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        return ids[:-1]
    return ids


def _messages(row: Row, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    messages = _checked_messages(row)
    ids = _render(messages, tokenizer, row)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    trained = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, row, add_generation_prompt=True)
        through = _render(messages[: i + 1], tokenizer, row)
        for prefix in (before, through):
            if ids[: len(prefix)] != prefix:
                raise InputError(
                    f"{row.where}: the tokens around message {i + 1} change as the conversation "
                    "goes on (the chat template rewrites earlier turns, or the message merges "
                    "with what stands before it), so what the assistant wrote cannot be told apart"
                )
        trained[len(before) : _end_of_turn(through, special, tokenizer)] = True
    return np.asarray(ids, np.int32), trained


def _checked_messages(row: Row) -> list[dict[str, Any]]:
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{row.where}: messages must be a list of {{role, content}} objects")
    for number, message in enumerate(messages, 1):
        part = Row(f"{row.where}: message {number}", row.number, message)
        part.text("role"), part.text("content")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{row.where}: no message of the assistant to learn from")
    return messages


def _render(messages: list[dict[str, Any]], tokenizer: Any, row: Row, **options: bool) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{row.where}: the chat template fails ({error})") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _end_of_turn(ids: list[int], special: set[int], tokenizer: Any) -> int:
    """Where a conversation ends, less the line break that templates put behind a special token."""
    end = len(ids)
    while end and tokenizer.decode(ids[end - 1]).isspace():
        end -= 1
    return end if end and ids[end - 1] in special else len(ids)
