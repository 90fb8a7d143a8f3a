"""What is asked of the decoder, and what it answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from decode.sampling import Sampling, Truncation
from decode.trace import Trace
from proxy_jax.errors import InputError

# (first step, coefficient) pieces: from that new token on, that coefficient.
Schedule = tuple[tuple[int, float], ...]
FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job decodes.

    Attributes:
      batch_size: slots that decode together.
      max_new_tokens: most tokens a completion has.
      alpha: coefficient of the offset: a number, or a schedule ((first step, coefficient), ...).
      beta: 1 for proxy-tuning; otherwise adds (beta - 1) (s_M - s_-).
      sampling: temperature and truncation; greedy by default.
      samples: completions a prompt.
      seed: of all randomness.
      base_filter: truncation of M's own distribution before the offset.
      stop: strings that end a text; they are cut off.
      banned: strings whose tokens may not be generated in sequence.
      banned_first: strings whose first token may not be the first new one.
      min_new_tokens: no end of text before.
      repetition_penalty: 1 is none.
      eos_ids: ids that end a text; by default those the models' configs and tokenizers name.
      chunk_steps: steps between two looks of the host.
      trace: record what every model thought of each token (decode.trace).
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
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    eos_ids: tuple[int, ...] | None = None
    chunk_steps: int = 16
    trace: bool = False

    def __post_init__(self):
        for field in ("batch_size", "max_new_tokens", "samples", "chunk_steps"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.min_new_tokens < 0:
            raise InputError(f"min_new_tokens must be at least 0, not {self.min_new_tokens}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be positive, not {self.repetition_penalty}")
        if not math.isfinite(self.beta):
            raise InputError(f"beta must be finite, not {self.beta}")
        if not all(isinstance(i, int) for i in self.eos_ids or ()):
            raise InputError(f"eos_ids must be ids, not {self.eos_ids}")
        if "" in (*self.stop, *self.banned, *self.banned_first):
            raise InputError("stop, banned and banned_first take non-empty strings")
        as_schedule(self.alpha)


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to make.

    Attributes:
      row: its identity, the source of its randomness: prompt index * samples + sample.
      ids: prompt ids by role, none empty; one object for the samples of a prompt.
      alpha: schedule of the coefficient.
      max_new_tokens: most new tokens.
    """

    row: int
    ids: Mapping[str, Sequence[int]]
    alpha: Schedule
    max_new_tokens: int


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


def as_schedule(alpha: object, what: str = "alpha") -> Schedule:
    """A number or a list of (first step, coefficient) pairs as a schedule.

    Raises:
      InputError: neither; steps that do not rise from 0; a coefficient that is not finite.
    """
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
        alpha = ((0, alpha),)
    try:
        pieces = tuple((int(start), float(value)) for start, value in alpha)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} must be a number or a list of [first step, coefficient], not {alpha!r}"
        ) from error
    starts = [start for start, _ in pieces]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise InputError(f"{what}: the steps of a schedule rise from 0, not {starts}")
    if not all(math.isfinite(value) for _, value in pieces):
        raise InputError(f"{what} must be finite, not {[value for _, value in pieces]}")
    return pieces
