"""Tokenizers of a trio: how their vocabularies agree, and what each role reads as its prompt."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, read_json, read_text, reading, shown
from proxy_jax.templates import render_chat

# Fewer shared ids than this share of the base tokenizer means another tokenizer, not a variant.
MIN_SHARED = 0.9
_MOST_TOKENS = 2**24  # an id beyond is damage: the largest vocabularies have 2**18 tokens
_FIELDS = {"prompt", "system", "response_prefix"}
_WIDEST = 5  # digits of a width in a format string

_TOKENIZER_JSON = "tokenizer.json"
_JSON_FILES = (
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
# Texts that tokenizers which split, normalise or add differently encode differently.
_PROBES = (
    "",
    "In 2023 we paid $1415926 (not 271): 3.14, 1,000,000 and 0x1F.",
    "I'll say it's what they'd've done; WE'RE SURE HE'LL DO WHAT SHE'D DONE, I'M NOT.",
    " one space,  two,   three,\ttab,\t\ttabs , and the end  ",
    "a line\nanother\n\na paragraph\r\nand\r\n\r\n\n\n  indented\n\t\n",
    "naïve café, Ångström, cafe\u0301, ﬁne ½ ² Ⅷ, ĳ, ß, ŉ",
    "日本語のテキスト、中文字符，한국어 텍스트, العربية, हिन्दी, ไทย, עברית",
    "😀👩\u200d👩\u200d👧🇫🇷 ✓→∞ \u200b\u00a0\ufeff\u3000x",
    "def f(x_1: int) -> str:\n    return f'{x_1!r}'  # \\n\n\n\nclass A:\n\tf(**{})\n",
    '<b>HTML</b> &amp; https://example.org/a_b?c=d#e -- x@y.z --- ... !!! ``` [[ ]] "q"',
    "word Word WORD wordWord word_word re-word 1word word1 ▁word Ġword",
)
_PROBED_TOKENS = 64  # of the added ones


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
      InputError: two tokenizers that share too few ids, or a base without tokens.
    """
    base, *others = tokenizers
    ids = {role: tokenizer.get_vocab() for role, tokenizer in tokenizers.items()}
    counts = {role: max(by_word.values(), default=-1) + 1 for role, by_word in ids.items()}
    ours = _words(ids[base], sizes[base])
    # What a model has no row for cannot be fed to it, so it cannot be generated.
    valid = _present(ours) & (np.arange(sizes[base]) < min(sizes.values()))
    if not valid.any():
        raise InputError(f"{base}: its tokenizer has no token that the models have rows for")
    shared, tokens = valid, int(valid.sum())
    moved, absent = {}, {}
    for role in others:
        theirs = _words(ids[role], sizes[base])
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
        tokens=min(counts[base], sizes[base]),
        valid=valid,
        shared=shared,
        moved=moved,
        absent=absent,
        padding={role: max(0, sizes[role] - count) for role, count in counts.items()},
    )


def check_ids(ids: Iterable[int], rows: int, where: object, what: str) -> None:
    """Refuses ids that no row of an embedding belongs to.

    Args:
      ids: to look at.
      rows: of the embedding.
      where, what: the file and the field that the ids come from.

    Raises:
      InputError: names the file, the field and the id.
    """
    for i in ids:
        if not 0 <= i < rows:
            raise InputError(
                f"{where}: {what} {shown(i)} is out of range, at least 0 and below {rows}"
            )


def _words(ids: Mapping[str, int], size: int) -> np.ndarray:
    """[size] of objects: tokens by id; None where a tokenizer leaves an id out."""
    words = np.full(size, None, dtype=object)
    for word, i in ids.items():
        if i < size:
            words[i] = word
    return words


def _present(words: np.ndarray) -> np.ndarray:
    return np.asarray([word is not None for word in words], bool)


def open_tokenizer(location: str | Path) -> Any:
    """Opens the transformers tokenizer of a directory or hub id.

    Where there is a tokenizer.json, it says all that makes ids. transformers guesses a class from
    config.json and tokenizer_config.json, and some classes put a pre-tokenizer or tokens of their
    own in place of the file's. Which tokens are special, the chat template and other settings are
    read from the files beside it either way.

    Raises:
      InputError: there is none, or it cannot be read; also a BOS or EOS that is no token.
    """
    from huggingface_hub import snapshot_download
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(location)
    with reading(location, "no readable tokenizer"):
        if not path.is_dir():
            path = Path(snapshot_download(str(location), allow_patterns=_HUB_FILES))
        _check_files(path)
        # Asks nobody whether to run code that comes with the files.
        settings = {"trust_remote_code": False}
        file = path / _TOKENIZER_JSON
        if not file.exists():
            return AutoTokenizer.from_pretrained(path, **settings)
        with reading(file, "not a tokenizer"):
            content = read_text(file)
            backend = Tokenizer.from_str(content)
            added = json.loads(content).get("added_tokens") or ()
        ids = backend.get_vocab(with_added_tokens=True)
        _check_ids_of(file, ids, added)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **settings)
            if tokenizer.get_vocab() == ids and _encodes_alike(tokenizer, backend):
                return tokenizer
        except Exception:  # an unknown class, say; the file needs none
            pass
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        for name in ("bos_token", "eos_token"):
            token = getattr(tokenizer, name)
            if token is not None and token not in ids:
                raise InputError(f"{path}: {name} {token!r} is no token of {_TOKENIZER_JSON}")
        if not _encodes_alike(tokenizer, backend):
            raise InputError(f"{file}: the files beside it change what it says about ids")
        return tokenizer


def _check_ids_of(file: Path, ids: Mapping[str, int], added: Iterable[Mapping[str, Any]]) -> None:
    """Refuses a tokenizer.json without tokens, or with ids that no model has, doubled or ignored.

    Args:
      file: its path.
      ids: of all tokens, as the tokenizers library gives them.
      added: the entries of its added_tokens.
    """
    if not ids:
        raise InputError(f"{file}: has no tokens")
    check_ids(ids.values(), _MOST_TOKENS, file, "token id")
    if len(set(ids.values())) < len(ids):
        raise InputError(f"{file}: two tokens have one id")
    for entry in added:  # the library numbers them on, whatever they say
        token, i = entry["content"], entry["id"]
        if ids.get(token, i) != i:
            raise InputError(
                f"{file}: added token {shown(token)} has id {i}, expected {ids[token]}"
            )


def _check_files(path: Path) -> None:
    """Refuses settings of a tokenizer that are no JSON, or name ids that no model has."""
    for file in (path / name for name in _JSON_FILES if (path / name).exists()):
        fields = Fields(str(file), read_json(file))
        if file.name == "added_tokens.json":
            ids = [fields.integer(token) for token in fields.fields]
        else:  # tokenizer_config.json has it
            added = fields.inner("added_tokens_decoder")
            with reading(file, "added_tokens_decoder is not by id"):
                ids = [int(i) for i in added.fields] if added else []
        check_ids(ids, _MOST_TOKENS, file, "token id")
    for pattern in ("*.jinja", "additional_chat_templates/*.jinja"):
        for template in path.glob(pattern):
            read_text(template)


def _encodes_alike(tokenizer: Any, backend: Any) -> bool:
    """Whether a transformers tokenizer makes the ids and texts that a tokenizer.json makes."""
    backend.no_padding(), backend.no_truncation()  # as transformers does at every call
    backend.encode_special_tokens = tokenizer.split_special_tokens
    for text in _probes(backend):
        for special in (True, False):
            expected = backend.encode(text, add_special_tokens=special).ids
            encoded = tokenizer(text, add_special_tokens=special, verbose=False)
            if encoded["input_ids"] != expected:
                return False
        text = tokenizer.decode(expected, clean_up_tokenization_spaces=False)
        if text != backend.decode(expected, skip_special_tokens=False):
            return False
    return True


def _probes(backend: Any) -> Iterator[str]:
    yield from _PROBES
    for _, token in sorted(backend.get_added_tokens_decoder().items())[:_PROBED_TOKENS]:
        yield f"a{token.content}b {token.content} c\n{token.content}"


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Gives the ids of a text that goes on: nothing that a tokenizer adds behind it is among them.

    A context that ended with an EOS would be one that is over.

    Args:
      tokenizer: a transformers tokenizer.
      text: an EOS that it spells out itself stays.
      special: with the tokens, mostly a BOS, that the tokenizer puts before a text.

    Raises:
      InputError: something that is no text, as half of a surrogate pair.
    """
    with reading(f"text {shown(text)}", "cannot be tokenised"):
        text.encode()
        if not special:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
        ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
        if all(added):  # no text: only that of another tells what stands before it
            added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
            return ids[: len(list(itertools.takewhile(bool, added)))]
    end = max(place for place, is_added in enumerate(added) if not is_added) + 1
    return ids[:end]


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
        fields = format_fields(self.spec, f"template {self.spec!r}")
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
          InputError: no chat template, one that fails, or a template that repeats what the
            tokenizer adds itself.
        """
        if self.spec == "chat":
            return encode(tokenizer, _chat(prompt, own_tokenizer, role), special=False)
        text = self.render(prompt, tokenizer)
        bos = tokenizer.bos_token
        ids = encode(tokenizer, text)
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


def format_fields(spec: str, where: object, *, of_texts: bool = True) -> set[str]:
    """Gives the names that a format string fills in.

    Args:
      spec: the format string.
      where: how errors name it.
      of_texts: the fields hold texts; otherwise what JSON has, of which parts and formats of
        numbers may be asked for.

    Raises:
      InputError: no format string for texts, or one that asks for more than a text by its name,
        as an attribute or a width beyond all sense.
    """
    with reading(where, "not a format string"):
        spec.encode()  # half of a surrogate pair cannot be tokenised
        fields = set()
        for _, field, layout, _ in string.Formatter().parse(spec):
            if field is None or layout is None:  # text between fields
                continue
            if not field or field.isdigit() or "." in field or (of_texts and "[" in field):
                raise InputError(f"{where}: {{{field}}} is not the name of a field")
            if "{" in layout or any(len(n) > _WIDEST for n in re.findall(r"\d+", layout)):
                raise InputError(f"{where}: {{{field}:{layout}}} is not a layout for a text")
            fields.add(field)
        if of_texts:
            spec.format_map(dict.fromkeys(fields, ""))  # the rest of the syntax
    return fields


def _chat(prompt: Prompt, tokenizer: Any, role: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"{role}: template is 'chat', but its tokenizer has no chat template")
    # What parts the question from a response prefix is the template's matter here.
    question = prompt.text.rstrip() if prompt.response_prefix else prompt.text
    messages = [{"role": "user", "content": question}]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": prompt.system})
    text = render_chat(tokenizer, messages, role, add_generation_prompt=True)
    if prompt.response_prefix and not text[-1:].isspace():
        text += " "
    return text + prompt.response_prefix.lstrip()


def _reference(prompt: Prompt, tokenizer: Any) -> str:
    """The chat expert's prompt as the published implementation makes it from the base's ids.

    It decodes the base prompt, deletes every occurrence of the response prefix, and joins three
    parts by single spaces. The system prompt follows [INST] without a space.
    """
    ids = encode(tokenizer, prompt.text + prompt.response_prefix)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if prompt.response_prefix:
        text = text.replace(prompt.response_prefix.strip(), "").rstrip()
    opening, closing = "[INST]", "[/INST]"
    if prompt.system:
        opening += f"<<SYS>>\n{prompt.system}\n<</SYS>>\n\n"
    if prompt.response_prefix:
        closing += f" {prompt.response_prefix.strip()}"
    return f"{opening} {text} {closing}"
