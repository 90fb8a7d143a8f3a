"""Conversations as token ids under a chat template, and which of them are learnt."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.reading import parse_json, reading, shown
from proxy_jax.rows import Row
from proxy_jax.templates import render_chat

Message: TypeAlias = dict[str, Any]

# What a chat template may leave out of a message without a change of what is taught.
_NOT_SHOWN = ("role", "name", "tool_call_id")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"'\\]*)\1\s*\)""")
_WAY_OUT = "data.chat_template can set another template"


@dataclasses.dataclass(frozen=True)
class Renderer:
    """The chat template of a tokenizer, for one row.

    Attributes:
      tokenizer: a transformers tokenizer.
      where: how errors name the row.
      tools: JSON schemas of functions that the assistant may call.
      numbers: of the messages in the row.
    """

    tokenizer: Any
    where: str
    tools: list[dict[str, Any]] | None
    numbers: Sequence[int]

    def where_of(self, i: int) -> str:
        """Names a message."""
        return f"{self.where}: message {self.numbers[i]}"

    def text(self, messages: Sequence[Message], **options: bool) -> str:
        """Renders messages.

        Raises:
          InputError: the template fails.
        """
        return render_chat(self.tokenizer, messages, self.where, tools=self.tools, **options)

    def ids(self, text: str) -> list[int]:
        """Gives the ids of a rendered text."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def with_date(tokenizer: Any, date: datetime.date) -> Any:
    """Gives a tokenizer whose chat template takes a date for today, where it says so literally.

    A run that goes on another day would otherwise go on with other tokens.

    Raises:
      InputError: a date has no such format.
    """

    def dated(template: str) -> str:
        return _TODAY.sub(lambda match: repr(date.strftime(match["format"])), template)

    templates = tokenizer.chat_template
    tokenizer = copy.copy(tokenizer)
    with reading("the chat template", "prints a date that cannot be written"):
        tokenizer.chat_template = (
            dated(templates)
            if isinstance(templates, str)
            else {name: dated(template) for name, template in templates.items()}
        )
    return tokenizer


def encode_conversation(row: Row, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Encodes {messages: [{role, content}, ...]}; trains what the assistant writes.

    A message may have tool_calls, with or without content, a weight (0 is read but not learnt), and
    what else the chat template shows, such as reasoning_content. The row may have tools. A system
    message that is empty counts as absent, and so does a field of a message that is null.

    What would change what is taught and is not read is refused by name: a field of a message, or a
    whole message, that the template leaves out (`name` and `tool_call_id` apart), and the row's
    fields system, functions, function_call, documents, chat_template_kwargs and weight. Other
    fields of the row are taken for notes about it.

    Args:
      row: the row.
      tokenizer: a transformers tokenizer with a chat template.

    Returns:
      [n] int32 ids and [n] bool, the learnt ones. Messages behind the last learnt one are cut off
      if the template would show that one otherwise for their sake.

    Raises:
      InputError: names the row and message that cannot be used, and why.
    """
    refuse_fields(
        row,
        "system", "functions", "function_call", "documents", "chat_template_kwargs", "weight",
    )  # fmt: skip
    messages, learnt, numbers = _messages(row)
    renderer = Renderer(tokenizer, row.where, _tools(row), numbers)
    if not any(learnt):
        raise InputError(f"{row.where}: no message of the assistant to learn from")
    messages = _as_the_template_reads_them(messages, renderer)
    if renderer.tools and renderer.text(messages) == _text_if_any(
        dataclasses.replace(renderer, tools=None), messages
    ):
        raise InputError(f"{row.where}: the chat template does not show tools; {_WAY_OUT}")

    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = renderer.ids(renderer.text(messages))
    trained = np.zeros(len(ids), bool)
    for i in reversed(np.flatnonzero(learnt)):
        before, through = _turn(messages, i, renderer)
        if ids[: len(through)] != through:
            if trained.any():
                raise InputError(
                    f"{renderer.where_of(i)}: the chat template shows it otherwise once the "
                    "conversation goes on (it drops the reasoning of earlier turns, perhaps), so "
                    "it cannot be learnt together with what follows; weight 0 would only read it, "
                    "a row that ends with it learn it, and "
                    f"{_WAY_OUT}"
                )
            ids, trained = through, np.zeros(len(through), bool)
        trained[len(before) : _end_of_turn(through, special, tokenizer)] = True
    return np.asarray(ids, np.int32), trained


def refuse_fields(row: Row, *names: str) -> None:
    """Refuses a row with one of these fields, which it would have for nothing.

    Raises:
      InputError: names the field.
    """
    for name in names:
        if row.fields.get(name):
            raise InputError(f"{row.where}: {name} is not read, and changes what a row teaches")


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.fields.get("tools")
    if isinstance(tools, str) and tools:  # tables, whose rows have one schema, hold them as text
        tools = parse_json(tools, f"{row.where}: tools")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{row.where}: tools must be a list of objects, not {shown(tools)}")
    return tools or None


def _messages(row: Row) -> tuple[list[Message], list[bool], list[int]]:
    """The messages without their weights, which are learnt, and their numbers in the row."""
    rows = row.fields.get("messages")
    if not isinstance(rows, list) or not all(isinstance(m, dict) for m in rows):
        raise InputError(f"{row.where}: messages must be a list of {{role, content}} objects")
    messages, learnt, numbers = [], [], []
    for number, fields in enumerate(rows, 1):
        part = Row(f"{row.where}: message {number}", row.number, fields)
        role = part.text("role")
        message = {name: value for name, value in fields.items() if value is not None}
        weight = message.pop("weight", None)
        if weight is not None and role != "assistant":
            raise InputError(f"{part.where}: weight is for the assistant's messages")
        if calls := message.pop("tool_calls", None):
            message["tool_calls"] = _tool_calls(part, calls)
        if calls and not message.get("content"):
            message["content"] = ""
        else:
            part.text("content", empty=role in ("system", "tool"))
        if role == "system" and not message["content"].strip():
            continue
        messages.append(message)
        learnt.append(role == "assistant" and part.integer("weight", 0, 1, default=1) == 1)
        numbers.append(number)
    return messages, learnt, numbers


def _tool_calls(part: Row, calls: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, which in OpenAI's format are JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{part.where}: tool_calls must be a list of objects, not {shown(calls)}")
    read = []
    for number, call in enumerate(calls, 1):
        where = f"{part.where}: tool call {number}"
        function = Row(where, part.number, call)
        if "function" in call:
            function = function.part("function")
        function.text("name")
        arguments = function.fields.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}: arguments")
        if not isinstance(arguments, dict):
            raise InputError(f"{where}: arguments must be an object, not {shown(arguments)}")
        read.append(_with_arguments(call, arguments))
    return read


def _with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": call["function"] | {"arguments": arguments}}
    return call | {"arguments": arguments}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    return _with_arguments(call, json.dumps(_arguments(call), ensure_ascii=False))


def _arguments(call: dict[str, Any]) -> Any:
    return call.get("function", call)["arguments"]


def _as_the_template_reads_them(messages: list[Message], renderer: Renderer) -> list[Message]:
    """Spells tool calls so that the template shows them.

    Most templates write the JSON of arguments that are objects; DeepSeek's put JSON text in.

    Raises:
      InputError: something is not shown.
    """
    try:
        _check_shown(messages, renderer)
    except InputError:
        if not any("tool_calls" in message for message in messages):
            raise
        as_text = [
            message
            if "tool_calls" not in message
            else message | {"tool_calls": list(map(_with_text, message["tool_calls"]))}
            for message in messages
        ]
        with contextlib.suppress(InputError):
            _check_shown(as_text, renderer)
            return as_text
        raise
    return messages


def _check_shown(messages: list[Message], renderer: Renderer) -> None:
    """Refuses what the template leaves out of its text.

    The assistant's messages are looked at where the conversation ends with them.
    """
    whole = renderer.text(messages)
    for i, message in enumerate(messages):
        seen = messages[: i + 1] if message["role"] == "assistant" else messages
        text = renderer.text(seen)
        for name, value in message.items():
            if name in _NOT_SHOWN or not value:
                continue
            other = {k: v for k, v in message.items() if k != name}
            if isinstance(value, str):  # otherwise a default of the template's may be the same
                other[name] = f"{value}x"
            if _text_if_any(renderer, [*seen[:i], other, *seen[i + 1 :]]) == text:
                raise InputError(
                    f"{renderer.where_of(i)}: the chat template does not show {name} "
                    f"(role {message['role']!r}); {_WAY_OUT}"
                )
        for call in message.get("tool_calls", ()):
            arguments = _arguments(call)
            if isinstance(arguments, dict) and arguments and str(arguments) in whole:
                raise InputError(
                    f"{renderer.where_of(i)}: the chat template does not write the "
                    f"arguments of tool_calls as JSON; {_WAY_OUT}"
                )


def _text_if_any(renderer: Renderer, messages: Sequence[Message]) -> str | None:
    try:
        return renderer.text(messages)
    except InputError:
        return None


def _turn(messages: list[Message], i: int, renderer: Renderer) -> tuple[list[int], list[int]]:
    """The ids before the assistant's message i, and through it."""
    where = renderer.where_of(i)
    if not i:
        raise InputError(
            f"{where}: nothing stands before it to answer; weight 0 would only read it"
        )
    before = renderer.ids(renderer.text(messages[:i], add_generation_prompt=True))
    text = renderer.text(messages[: i + 1])
    through = renderer.ids(text)
    if through[: len(before)] != before:
        raise InputError(
            f"{where}: the chat template does not show it as a continuation of the prompt before "
            "it (it drops the reasoning that its prompt begins, or the message merges with what "
            f"stands before it), so what the assistant wrote cannot be told apart; {_WAY_OUT}"
        )
    if "".join(messages[i]["content"].split()) not in "".join(text.split()):
        raise InputError(
            f"{where}: the chat template does not show all of its content (it drops reasoning, "
            f"perhaps); {_WAY_OUT}"
        )
    return before, through


def _end_of_turn(ids: list[int], special: set[int], tokenizer: Any) -> int:
    """Where a conversation ends, less the line break that templates put behind a special token."""
    end = len(ids)
    while end and tokenizer.decode(ids[end - 1]).isspace():
        end -= 1
    return end if end and ids[end - 1] in special else len(ids)
