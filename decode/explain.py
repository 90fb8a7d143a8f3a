"""What the tuning changed: analyses of completions that were recorded step by step (decode.trace).

records = list(read_records(Path("runs/first/outputs.jsonl"), Words(trio.tokenizer)))
summarise(records)

The analyses are those of Liu et al. 2024: section 6.1 (which tokens, which side of an equation) and
appendix C.2 (how often the likeliest token changes, and where).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import betainc

from decode.tasks.statistics import Estimate, estimate, wilson
from decode.trace import Trace
from proxy_jax.errors import InputError
from proxy_jax.reading import reading, shown
from proxy_jax.rows import read_whole_lines
from proxy_jax.tokenization import encode

Parse = Literal["published", "strict"]

_CONTEXT = 4  # tokens of the prompt that are decoded along, as a tokenizer may drop a first space
_GRAM = 4  # words of the context that a changed token is shown in
_WORD = re.compile(r"\w+(?:['’]\w+)?")
# The published parsing: what belongs to an equation, besides digits.
_SYMBOLS = ",$€+-x*/"
# The stricter one: operands with their decimals, brackets and units of money between operators. It
# never looks back (*+), so that no text takes long.
_NUMBER = r"(?:\d[\d,]*+(?:\.\d++)?+|\.\d++)"
_OPERAND = rf"[-−]?+[(\[$€£]*+{_NUMBER}[)\]%]*+ ?+"
_SIDE = rf"{_OPERAND}(?:[-+−*×x·/÷^] ?+{_OPERAND})*+"
_EQUATION = re.compile(rf"(?<![(\[$€£]){_SIDE}(?:= ?+{_SIDE})*+")
_ORNAMENT = re.compile(r"[\s,$€£()\[\]%]*")


@dataclasses.dataclass(frozen=True)
class Record:
    """A completion and what was recorded of it.

    Attributes:
      prompt: its text.
      ids: the T new tokens.
      words: what each reads as by itself.
      pieces: what each adds to the text; a token that ends within a character adds nothing, and the
        one that completes it the whole.
      trace: of T steps.
    """

    prompt: str
    ids: tuple[int, ...]
    words: tuple[str, ...]
    pieces: tuple[str, ...]
    trace: Trace


class Words:
    """What tokens read as; special tokens by their name."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.word = functools.cache(lambda i: self._decode([i]))

    def record(self, prompt: str, ids: Sequence[int], trace: Trace) -> Record:
        """The record of a completion."""
        words = tuple(self.word(i) for i in ids)
        return Record(prompt, tuple(ids), words, tuple(self._pieces(prompt, ids)), trace)

    def _pieces(self, prompt: str, ids: Sequence[int]) -> Iterator[str]:
        context = encode(self.tokenizer, prompt)[-_CONTEXT:]
        whole = [*context, *ids]
        first, done = 0, len(context)
        for end in range(done + 1, len(whole) + 1):
            before, after = self._decode(whole[first:done]), self._decode(whole[first:end])
            if after.endswith("\ufffd") and end < len(whole):  # part of a character
                yield ""
                continue
            yield after[len(before) :]
            first, done = done, end

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def read_records(path: Path, words: Words) -> Iterator[Record]:
    """Reads the completions of an outputs.jsonl, in its order.

    Raises:
      InputError: a line that is not one of decode.generate's with a trace.
    """
    names = None
    for row in read_whole_lines(path):
        if row.fields.get("trace") is None:
            raise InputError(f"{row.where}: nothing recorded; decode with trace=True")
        prompt, ids = row.string("prompt"), row.array("token_ids", int)
        wrong = "trace is not one of decode.generate's"
        with reading(row.where, wrong), np.errstate(invalid="raise"):
            trace = Trace.from_dict(row.part("trace").fields)
            _check(trace, len(ids))
        if names not in (None, trace.names):
            raise InputError(
                f"{row.where}: trace is of {', '.join(trace.names)}, and the rows before it "
                f"are of {', '.join(names)}"
            )
        names = trace.names
        with reading(row.where, "token_ids are not of this tokenizer"):
            for i in set(ids):
                if words.tokenizer.convert_ids_to_tokens(i) is None:
                    raise ValueError(f"{shown(i)} is no token")
            record = words.record(prompt, ids, trace)
        yield record


def _check(trace: Trace, steps: int) -> None:
    """Checks the figures of a completion.

    Raises:
      ValueError: they are of other steps, or no figures.
    """
    if not {"proxy", "base"} <= set(trace.names):
        raise ValueError("it needs proxy and base")
    each = steps, len(trace.names)
    finite = {"entropies": (trace.entropies, each), "kl": (trace.kl, (steps,))}
    if trace.overlap is not None:
        finite["overlap"] = trace.overlap, (steps,)
    figures = {
        "log_probs": (trace.log_probs, each),
        "ranks": (trace.ranks, each),
        "top_ids": (trace.top_ids[..., 0], each),
        "top_log_probs": (trace.top_log_probs, trace.top_ids.shape),
    }
    for name, (array, shape) in {**finite, **figures}.items():
        if array.shape != shape:
            raise ValueError(f"{name} of shape {array.shape}, not {shape}")
    for name, (array, _) in finite.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
    if (trace.log_probs > 0).any() or (trace.top_log_probs > 0).any():
        raise ValueError("a probability is above 1")
    if (trace.ranks < 0).any() or (trace.top_ids < 0).any():
        raise ValueError("ranks and top_ids must be at least 0")


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of steps whose likeliest token is another one than M's.

    Attributes:
      first, last: positions in the completion, from 0, both included.
      value, low, high: the share and its 95 % confidence interval.
      steps, completions: counted.
    """

    first: int
    last: int
    value: float
    low: float
    high: float
    steps: int
    completions: int


def changed(records: Sequence[Record], first: int = 0, last: int | None = None) -> Share:
    """How often the likeliest token changes; of positions first to last, both included.

    Steps of one completion are alike, so the interval is that of a cluster sample: Wilson's score
    interval with the effective number of steps, share (1 - share) / variance, where the variance is
    that of a ratio between completions (Kish, Survey sampling, 1965, sections 2.8 and 5.1).

    Raises:
      ValueError: no completion is that long.
    """
    stop = None if last is None else last + 1
    steps = [one.trace.changed[first:stop] for one in records if len(one.ids) > first]
    if not steps:
        raise ValueError(f"no completion has {first + 1} tokens")
    hits, sizes = np.asarray([s.sum() for s in steps]), np.asarray([len(s) for s in steps])
    total, rows = int(sizes.sum()), len(sizes)
    value = float(hits.sum() / total)
    spread = float(np.square(hits - value * sizes).sum())
    effective = float(rows)  # where completions do not differ, or there is one
    if rows > 1 and spread > 0:
        variance = rows / (rows - 1) * spread / total**2
        effective = min(value * (1 - value) / variance, float(total))
    low, high = wilson(value, effective)
    return Share(first, first + int(sizes.max()) - 1, value, low, high, total, rows)


def changed_by_position(records: Sequence[Record]) -> list[Share]:
    """How often the likeliest token changes at positions 0, 1, 2, 3, 4-7, 8-15, and so on."""
    longest = max(len(record.ids) for record in records)
    bounds = [0, 1, 2, 3, *(4 << n for n in range(longest.bit_length()))]
    return [
        changed(records, first, after - 1)
        for first, after in itertools.pairwise(bounds)
        if first < longest
    ]


@dataclasses.dataclass(frozen=True)
class Welch:
    """Welch's t-test of equal means: statistic, degrees of freedom, two-sided p-value."""

    t: float
    df: float
    p: float


@dataclasses.dataclass(frozen=True)
class EquationSides:
    """Mean p_proxy - p_M of tokens left and right of equality signs.

    Attributes:
      left, right: None without such tokens.
      test: of equal means; None where a side has fewer than two tokens or all are alike.
    """

    left: Estimate | None
    right: Estimate | None
    test: Welch | None


def equation_sides(records: Sequence[Record], parse: Parse = "published") -> EquationSides:
    """Whether the tuning changes how equations are set up or how they are worked out.

    published: as in the published analysis: from every token "=" to both sides as long as tokens
    are digits or pieces of ",$€+-x*/". So decimals and brackets end a side, a blank belongs to it,
    and the middle of a = b = c counts on both. strict: operands and operators, read from the text;
    of a = b = c, a is left and c is right; what is only a comma, bracket or unit does not count.
    """
    sides: tuple[list[float], list[float]] = ([], [])
    for record in records:
        if parse == "published":
            found = _published_sides(record.words)
        else:
            found = _strict_sides(record.pieces)
        deltas = record.trace.deltas
        for side, indices in zip(sides, found, strict=True):
            side += deltas[indices].tolist()
    left, right = (estimate(side, share=False) if side else None for side in sides)
    return EquationSides(left, right, welch(*sides))


def welch(a: Sequence[float], b: Sequence[float]) -> Welch | None:
    """Welch's t-test (Welch, Biometrika 1947); None where it is undefined."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = (float(np.var(x, ddof=1)) / len(x) for x in (a, b))
    if va + vb == 0:
        return None
    t = float(np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Welch(t, df, t_test_p(t, df))


def t_test_p(t: float, df: float) -> float:
    """Two-sided p-value of Student's t: the regularised incomplete beta function I_x(df/2, 1/2) at
    x = df / (df + t^2)."""
    return float(betainc(df / 2, 0.5, df / (df + t * t)))


@dataclasses.dataclass(frozen=True)
class ChangedToken:
    """A token that the tuning made more (or less) likely.

    Attributes:
      text: without blanks around it.
      delta: mean p_proxy - p_M.
      count: how often it was drawn.
      context: the most frequent four words with it, and how often they are around it.
    """

    text: str
    delta: float
    count: int
    context: str
    context_count: int


def most_changed(
    records: Sequence[Record], minimum: int = 100, top: int = 20
) -> list[ChangedToken]:
    """The tokens that the tuning raised most, the highest first.

    Args:
      minimum: how often a token was drawn at least; rarer ones are left out.
      top: how many tokens.
    """
    deltas: dict[str, list[float]] = collections.defaultdict(list)
    for record in records:
        for word, delta in zip(record.words, record.trace.deltas.tolist(), strict=True):
            deltas[word.strip(" ")].append(delta)
    means = {word: float(np.mean(d)) for word, d in deltas.items() if word and len(d) >= minimum}
    chosen = sorted(means, key=lambda word: means[word], reverse=True)[:top]
    contexts: dict[str, collections.Counter[str]] = {word: collections.Counter() for word in chosen}
    for record in records:
        _count_contexts(record, contexts)
    found = []
    for word in chosen:
        ((context, count),) = contexts[word].most_common(1) or [("", 0)]
        found.append(ChangedToken(word, means[word], len(deltas[word]), context, count))
    return found


def step_means(records: Sequence[Record]) -> dict[str, Any]:
    """Means over all steps: KL(proxy || M) and entropies in nats, and the overlap with M+, the
    share of its drafts that speculative decoding would accept; None without M+."""
    traces = [record.trace for record in records]
    entropies = np.concatenate([trace.entropies for trace in traces]).mean(axis=0, dtype=np.float64)
    overlaps = [trace.overlap for trace in traces if trace.overlap is not None]
    return {
        "kl": float(np.concatenate([trace.kl for trace in traces]).mean(dtype=np.float64)),
        "overlap": float(np.concatenate(overlaps).mean(dtype=np.float64)) if overlaps else None,
        "entropies": dict(zip(traces[0].names, entropies.tolist(), strict=True)),
    }


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """All analyses, for a JSON file.

    Raises:
      ValueError: nothing was recorded.
    """
    share = changed(records)
    # As published, if there is that much text: a token in a hundred otherwise.
    minimum = max(2, min(100, share.steps // 100))
    return {
        "completions": len(records),
        "tokens": share.steps,
        "changed": dataclasses.asdict(share),
        "changed_by_position": [dataclasses.asdict(one) for one in changed_by_position(records)],
        "means": step_means(records),
        "equations": {
            "published": dataclasses.asdict(equation_sides(records, "published")),
            "strict": dataclasses.asdict(equation_sides(records, "strict")),
        },
        "most_changed": {
            "minimum": minimum,
            "tokens": [dataclasses.asdict(one) for one in most_changed(records, minimum)],
        },
    }


def _published_sides(words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the tokens left and right of each "="."""
    # The published tokenizer drops the space that a word begins with.
    bare = [word.strip(" ") for word in words]
    belongs = [word.isdigit() or word in _SYMBOLS for word in bare]
    left: list[int] = []
    right: list[int] = []
    for at, word in enumerate(bare):
        if word == "=":
            left += itertools.takewhile(belongs.__getitem__, range(at - 1, -1, -1))
            right += itertools.takewhile(belongs.__getitem__, range(at + 1, len(bare)))
    return left, right


def _strict_sides(pieces: Sequence[str]) -> tuple[list[int], list[int]]:
    starts, text = _starts(pieces), "".join(pieces)
    sides: tuple[list[int], list[int]] = ([], [])
    for match in _EQUATION.finditer(text):
        if "=" not in match[0]:
            continue
        spans = (
            (match.start(), text.index("=", match.start())),
            (text.rindex("=", 0, match.end()) + 1, match.end()),
        )
        for side, (first, after) in zip(sides, spans, strict=True):
            for i in range(bisect.bisect_right(starts, first) - 1, len(pieces)):
                if starts[i] >= after:
                    break
                bare = pieces[i].strip()
                at = starts[i] + len(pieces[i]) - len(pieces[i].lstrip())
                if first <= at and at + len(bare) <= after and not _ORNAMENT.fullmatch(bare):
                    side.append(i)
    return sides


def _count_contexts(record: Record, contexts: dict[str, collections.Counter[str]]) -> None:
    """Counts the runs of four words that each occurrence of some tokens lies in."""
    text, starts = "".join(record.pieces), _starts(record.pieces)
    spans = [match.span() for match in _WORD.finditer(text)]
    first_letters = [first for first, _ in spans]
    for word, piece, start in zip(record.words, record.pieces, starts, strict=True):
        counter = contexts.get(word.strip(" "))
        if counter is None or not spans:
            continue
        # The word that the token is of; before punctuation, the last one.
        letter = start + len(piece) - len(piece.lstrip())
        own = max(0, bisect.bisect_right(first_letters, letter) - 1)
        for begin in range(max(0, own - _GRAM + 1), min(own, len(spans) - _GRAM) + 1):
            run = text[spans[begin][0] : spans[begin + _GRAM - 1][1]]
            counter[" ".join(run.split())] += 1


def _starts(pieces: Sequence[str]) -> list[int]:
    """Where in the text each piece begins."""
    return list(itertools.accumulate(map(len, pieces), initial=0))[:-1]
