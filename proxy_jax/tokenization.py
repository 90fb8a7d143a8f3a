"""Tokenizers of a trio: how their vocabularies agree, and what each role reads as its prompt."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxy_jax.errors import InputError

# Fewer shared ids than this share of the base tokenizer means another tokenizer, not a variant.
MIN_SHARED = 0.9
_FIELDS = {"prompt", "system", "response_prefix"}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How the vocabularies of a trio agree, id by id.

    Attributes:
      size: rows of the base model's output, V.
      tokens: ids of the base tokenizer; those from there to V are padding.
      valid: [V] bool, ids that may be generated: tokens of the base that every model can read.
      shared: [V] bool, ids that are the same token in every tokenizer.
      moved: per role, ids that are another token there than in the base tokenizer.
      absent: per role, base ids that its tokenizer lacks.
      padding: per role, rows of its output that no token uses.
    """

    size: int
    tokens: int
    valid: np.ndarray
    shared: np.ndarray
    moved: Mapping[str, tuple[int, ...]]
    absent: Mapping[str, int]
    padding: Mapping[str, int]


def align(tokenizers: Mapping[str, Any], sizes: Mapping[str, int]) -> Vocabulary:
    """Compares tokenizers id by id; the first role is the base.

    Args:
      tokenizers: transformers tokenizers by role.
      sizes: rows of each model's output.

    A tokenizer may have tokens that its model has no row for (of images, say): they are not valid.

    Raises:
      InputError: two tokenizers that share too few ids.
    """
    base, *others = tokenizers
    words = {role: _words(tokenizer) for role, tokenizer in tokenizers.items()}
    ours = _sized(words[base], sizes[base])
    # What a model has no row for cannot be fed to it, so it cannot be generated.
    valid = _present(ours) & (np.arange(sizes[base]) < min(sizes.values()))
    shared, tokens = valid, int(valid.sum())
    moved, absent = {}, {}
    for role in others:
        theirs = _sized(words[role], sizes[base])
        same = valid & (ours == theirs)
        elsewhere = valid & ~same & _present(theirs)
        moved[role] = tuple(int(i) for i in np.flatnonzero(elsewhere))
        absent[role] = tokens - int(same.sum()) - len(moved[role])
        if same.sum() < MIN_SHARED * tokens:
            examples = ", ".join(f"{i}: {ours[i]!r} / {theirs[i]!r}" for i in moved[role][:3])
            raise InputError(
                f"{role}: only {int(same.sum())} of the {tokens} ids of {base}'s "
                f"tokenizer mean the same in its own ({examples or 'the rest is absent'}); "
                "the models of a trio must share a vocabulary"
            )
        shared = shared & same
    return Vocabulary(
        size=sizes[base],
        tokens=min(len(words[base]), sizes[base]),
        valid=valid,
        shared=shared,
        moved=moved,
        absent=absent,
        padding={role: max(0, sizes[role] - len(found)) for role, found in words.items()},
    )


def _words(tokenizer: Any) -> list[str | None]:
    """Tokens by id; None where a tokenizer leaves an id out."""
    by_id = {i: word for word, i in tokenizer.get_vocab().items()}
    return [by_id.get(i) for i in range(max(by_id) + 1)]


def _present(words: np.ndarray) -> np.ndarray:
    return np.asarray([word is not None for word in words], bool)


def _sized(words: list[str | None], size: int) -> np.ndarray:
    """[size] of objects, cut or filled with None."""
    sized = np.full(size, None, dtype=object)
    sized[: len(words)] = words[:size]
    return sized


def open_tokenizer(location: str | Path) -> Any:
    """The transformers tokenizer of a directory or hub id.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except Exception as error:  # whatever a broken or absent tokenizer makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{location}: no readable tokenizer ({reason})") from error


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One logical prompt, before any role's template.

    Attributes:
      text: the instruction or document.
      system: a system prompt, for the templates that have a place for it.
      response_prefix: how the answer begins, in every role's context ("Answer:").
    """

    text: str
    system: str = ""
    response_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """How a role reads a prompt.

    Attributes:
      spec: "raw", the text and response prefix as they are; "chat", the chat template of the
        role's own tokenizer and, after white space, the response prefix; "reference", what the
        published implementation feeds a chat expert (Llama-2's format, its quirks included); or a
        format string with {prompt} and, if wanted, {system} and {response_prefix}, which otherwise
        ends the text.

    Raises:
      InputError: a format string without {prompt} or with another field.
    """

    spec: str

    def __post_init__(self):
        if self.spec in ("raw", "chat", "reference"):
            return
        try:
            parsed = {field for _, field, _, _ in string.Formatter().parse(self.spec)}
            fields = parsed - {None}
            if fields <= _FIELDS:
                self.spec.format_map(dict.fromkeys(_FIELDS, ""))  # the rest of the syntax
        except ValueError as error:
            raise InputError(f"template {self.spec!r}: {error}") from error
        if "prompt" not in fields or fields - _FIELDS:
            raise InputError(
                f"template {self.spec!r} is not raw, chat, reference or a format string with "
                "{prompt} and optionally {system} and {response_prefix}"
            )

    @property
    def has_system(self) -> bool:
        """Whether there is a place for a system prompt."""
        return self.spec in ("chat", "reference") or "{system}" in self.spec

    def encode(self, prompt: Prompt, tokenizer: Any, own_tokenizer: Any, role: str) -> list[int]:
        """The ids that a role reads.

        Args:
          prompt: the logical prompt.
          tokenizer: the trio's tokenizer, which makes the ids.
          own_tokenizer: the role's, for its chat template.
          role: named in errors.

        Raises:
          InputError: no chat template, or a template that repeats what the tokenizer adds itself.
        """
        if self.spec == "chat":
            text = _chat(prompt, own_tokenizer, role)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        text = self.render(prompt, tokenizer)
        bos = tokenizer.bos_token
        ids = tokenizer(text)["input_ids"]
        if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise InputError(
                f"{role}: its template starts with {bos!r}, which the tokenizer adds itself"
            )
        return ids

    def render(self, prompt: Prompt, tokenizer: Any) -> str:
        """The text of a template other than chat."""
        if self.spec == "raw":
            return prompt.text + prompt.response_prefix
        if self.spec == "reference":
            return _reference(prompt, tokenizer)
        text = self.spec.format(
            prompt=prompt.text, system=prompt.system, response_prefix=prompt.response_prefix
        )
        return text if "{response_prefix}" in self.spec else text + prompt.response_prefix


def _chat(prompt: Prompt, tokenizer: Any, role: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"{role}: template is 'chat', but its tokenizer has no chat template")
    # What parts the question from a response prefix is the template's matter here.
    question = prompt.text.rstrip() if prompt.response_prefix else prompt.text
    messages = [{"role": "user", "content": question}]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": prompt.system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if prompt.response_prefix and not text[-1:].isspace():
        text += " "
    return text + prompt.response_prefix.lstrip()


def _reference(prompt: Prompt, tokenizer: Any) -> str:
    """The chat expert's prompt as the published implementation makes it from the base's ids.

    It decodes the base prompt, deletes every occurrence of the response prefix, and joins three
    parts by single spaces. The system prompt follows [INST] without a space.
    """
    ids = tokenizer(prompt.text + prompt.response_prefix)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if prompt.response_prefix:
        text = text.replace(prompt.response_prefix.strip(), "").rstrip()
    opening, closing = "[INST]", "[/INST]"
    if prompt.system:
        opening += f"<<SYS>>\n{prompt.system}\n<</SYS>>\n\n"
    if prompt.response_prefix:
        closing += f" {prompt.response_prefix.strip()}"
    return f"{opening} {text} {closing}"
