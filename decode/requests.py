"""What is asked of the decoder, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from decode.sampling import (
    INT32,
    LARGEST_DIVISOR,
    SMALLEST_DIVISOR,
    Sampling,
    Truncation,
    as_python,
)
from decode.trace import Trace
from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, shown

# (first step, coefficient) pieces: from that new token on, that coefficient.
Schedule = tuple[tuple[int, float], ...]
FinishReason = Literal["eos", "stop", "length"]

_FLOAT32 = float(np.finfo(np.float32).max)
_MOST = 2**20  # rows of a batch, steps of a chunk, samples of a prompt: more than a machine holds
_STRINGS = ("stop", "banned", "banned_first", "banned_tokens", "banned_first_tokens")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job decodes.

    Values are checked and normalised: what changes nothing is None, a string where several may be
    given is that one string, numbers of numpy and JAX are Python's.

    Attributes:
      batch_size: slots that decode together.
      max_new_tokens: most tokens a completion has.
      alpha: coefficient of the offset: a number, or a schedule ((first step, coefficient), ...).
      beta: 1 for proxy-tuning; otherwise adds (beta - 1) (s_M - s_-).
      sampling: temperature and truncation; greedy by default.
      samples: completions a prompt.
      seed: of all randomness, at least 0 and less than 2^32.
      base_filter: truncation of M's own distribution before the offset.
      stop: strings that end a text; they are cut off.
      banned: strings that no text contains, in whatever tokens they are spelled. One that begins
        in M's prompt and would end in the text is banned, too.
      banned_first: strings that no text begins with.
      banned_tokens: strings of which one spelling is banned, as in the published implementation:
        the tokens that the tokenizer makes of the string alone may not be generated in sequence.
      banned_first_tokens: strings whose first token, in that spelling, may not be the first new
        one.
      min_new_tokens: no end of text before; a stop string that begins in the text of these tokens
        is passed over.
      repetition_penalty: 1 is none.
      eos_ids: ids that end a text; by default those the models' configs and tokenizers name.
      chunk_steps: steps between two looks of the host.
      trace: record what every model thought of each token (decode.trace).

    Raises:
      InputError: a value of another type, or out of range.
    """

    batch_size: int = 8
    max_new_tokens: int = 128
    alpha: float | Schedule = 1.0
    beta: float = 1.0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    samples: int = 1
    seed: int = 0
    base_filter: Truncation | None = None
    stop: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    banned_first: tuple[str, ...] = ()
    banned_tokens: tuple[str, ...] = ()
    banned_first_tokens: tuple[str, ...] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    eos_ids: tuple[int, ...] | None = None
    chunk_steps: int = 16
    trace: bool = False

    def __post_init__(self):
        fields = _fields(self, "options")
        values = {
            "batch_size": fields.integer("batch_size", 1, _MOST),
            "max_new_tokens": fields.integer("max_new_tokens", 1, INT32),
            "beta": checked_beta(self.beta),
            "sampling": _instance(self.sampling, Sampling, "sampling").checked(),
            "samples": fields.integer("samples", 1, _MOST),
            "seed": fields.integer("seed", 0, 2**32 - 1),
            "base_filter": checked_filter(self.base_filter),
            "min_new_tokens": fields.integer("min_new_tokens", 0, INT32),
            "repetition_penalty": fields.real(
                "repetition_penalty", SMALLEST_DIVISOR, LARGEST_DIVISOR
            ),
            "eos_ids": fields.array("eos_ids", int, default=None),
            "chunk_steps": fields.integer("chunk_steps", 1, _MOST),
            "trace": fields.flag("trace"),
        }
        if outside := [i for i in values["eos_ids"] or () if not 0 <= i <= INT32]:
            raise InputError(f"options: eos_ids must be ids, not {shown(outside[0])}")
        as_schedule(self.alpha)
        values |= {name: _strings(getattr(self, name), name) for name in _STRINGS}
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to make.

    Attributes:
      row: its identity, the source of its randomness: prompt index * samples + sample; less than
        2^32.
      ids: prompt ids by role, none empty; one object for the samples of a prompt.
      alpha: schedule of the coefficient.
      max_new_tokens: most new tokens.

    Raises:
      InputError: a row or a number of tokens out of range.
    """

    row: int
    ids: Mapping[str, Sequence[int]]
    alpha: Schedule
    max_new_tokens: int

    def __post_init__(self):
        fields = _fields(self, "request")
        fields.integer("row", 0, 2**32 - 1)
        fields.integer("max_new_tokens", 1, INT32)


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
      row: the request's.
      text: what was generated, without EOS, and without the stop string and what follows it.
      token_ids: the new tokens, up to and including the one that ended the text.
      finish_reason: "eos"; "stop", a stop string; or "length".
      prompt_tokens: length of each role's prompt.
      trace: of each of the token_ids; None unless asked for.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: Mapping[str, int]
    trace: Trace | None = None


def as_schedule(alpha: Any, what: str = "alpha") -> Schedule:
    """Makes a schedule of a number or of a list of (first step, coefficient) pairs.

    Raises:
      InputError: neither; steps that are no integers or do not rise from 0; a coefficient that is
        no number, or beyond float32.
    """
    alpha = as_python(alpha)
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        alpha = ((0, alpha),)
    pairs = isinstance(alpha, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in map(as_python, alpha)
    )
    if not pairs:
        raise InputError(
            f"{what} must be a number or a list of [first step, coefficient], not {shown(alpha)}"
        )
    pieces = []
    for start, value in map(as_python, alpha):
        fields = Fields(what, {"step": as_python(start), "coefficient": as_python(value)})
        step = fields.integer("step", 0, INT32)
        pieces.append((step, float(fields.real("coefficient", -_FLOAT32, _FLOAT32))))
    starts = [start for start, _ in pieces]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise InputError(f"{what}: the steps of a schedule rise from 0, not {shown(starts)}")
    return tuple(pieces)


def checked_beta(beta: Any) -> float:
    """Checks the scale of the base's own offset.

    Raises:
      InputError: no number, or beyond float32.
    """
    return Fields("options", {"beta": as_python(beta)}).real("beta", -_FLOAT32, _FLOAT32)


def checked_filter(base_filter: Truncation | None) -> Truncation | None:
    """Checks the truncation of M's distribution; None if it keeps every token.

    Raises:
      InputError: a value that is no number, or out of range.
    """
    if base_filter is None:
        return None
    checked = _instance(base_filter, Truncation, "base_filter").checked("base_filter")
    return None if checked == Truncation() else checked


def check_unicode(text: str, what: str) -> None:
    """Refuses half of a surrogate pair: no tokenizer and no file takes it.

    Raises:
      InputError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: not valid Unicode: {shown(text)}") from error


def _strings(value: Any, name: str) -> tuple[str, ...]:
    """A setting that may be several strings; one alone is just that."""
    value = (value,) if isinstance(value, str) else value
    strings = Fields("options", {name: value}).array(name, str)
    for text in strings:
        check_unicode(text, f"options: {name}")
        if not text:
            raise InputError(f"options: {name} takes non-empty strings")
    return strings


def _instance(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"options: {name} must be a {kind.__name__}, not {shown(value)}")
    return value


def _fields(values: Options | Request, where: str) -> Fields:
    names = (field.name for field in dataclasses.fields(values))
    return Fields(where, {name: as_python(getattr(values, name)) for name in names})
