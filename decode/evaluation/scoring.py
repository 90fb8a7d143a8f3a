"""From completions to what they are worth, kept in predictions.jsonl beside them.

Scoring runs again when the completions, the data, or the code of the tasks change, or what it wrote
is damaged. What a judge said of a text is kept in judged.jsonl, and a text is not judged twice by a
judge of that name; as that may have cost money, a damaged file is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from decode import tasks
from decode.evaluation.plan import OutputJob
from decode.requests import FinishReason
from decode.tasks import Example, Scored, Task, add_verdicts, ask_judge, load_judge
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, manifest
from proxy_jax.reading import Fields, read_json, reading
from proxy_jax.rows import Row, read_whole_lines

PREDICTIONS, JUDGED = "predictions.jsonl", "judged.jsonl"
_STATE = "scored_from.json"
_PIECE = 64  # completions between two looks at the progress


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A completion and what it is worth.

    Attributes:
      example: which it answers.
      sample: which of the example's completions it is.
      text: of the completion; for letters, their scores.
      scored: what it is worth.
      finish_reason, new_tokens: of the completion; None for letters.
    """

    example: Example
    sample: int
    text: str
    scored: Scored
    finish_reason: str | None
    new_tokens: int | None


@dataclasses.dataclass(frozen=True)
class _Record:
    """A line of an output file: a text, or the scores of letters, of which the text tells."""

    text: str
    letters: Mapping[str, float] | None = None
    finish_reason: str | None = None
    new_tokens: int | None = None


def predictions(job: OutputJob, progress: Callable[[int], None]) -> list[Prediction]:
    """What a finished job's completions are worth, in the order of the examples.

    Args:
      job: finished.
      progress: called with the number of completions just scored or judged.

    Raises:
      InputError: a judge that cannot be used, a file that is no longer what was written.
    """
    state = {"made_from": _made_from(job)}
    file, beside = job.directory / PREDICTIONS, job.directory / _STATE
    if file.is_file():
        with contextlib.suppress(InputError):  # then it is made again
            with reading(file):
                state["predictions"] = manifest.digest(file)
            if read_json(beside) == state:
                examples = {example.id: example for example in job.examples}
                return [_from_fields(examples, row.fields) for row in read_whole_lines(file)]
    found = _score(job, progress)
    files.replace(file, "".join(_line(one) for one in found).encode())
    state["predictions"] = manifest.digest(file)
    files.replace(beside, json.dumps(state).encode())
    return found


def by_example(found: Sequence[Prediction]) -> dict[str, list[Scored]]:
    """What the samples of each example are worth, by its id."""
    grouped: dict[str, list[Scored]] = {}
    for one in found:
        grouped.setdefault(one.example.id, []).append(one.scored)
    return grouped


def _score(job: OutputJob, progress: Callable[[int], None]) -> list[Prediction]:
    task, samples = job.run.task, job.run.task.decoding.samples
    records = _letters(job) if job.run.letters else _texts(job)
    examples = [example for example in job.examples for _ in range(samples)]
    scored: list[Scored] = []
    for first in range(0, len(records), _PIECE):
        piece = slice(first, first + _PIECE)
        scored += _scored(task, examples[piece], records[piece])
        progress(len(records[piece]))
    if job.run.judge:
        scored = _judged(job, examples, scored, progress)
    return [
        Prediction(
            example=example,
            sample=row % samples,
            text=one.text,
            scored=worth,
            finish_reason=one.finish_reason,
            new_tokens=one.new_tokens,
        )
        for row, (example, one, worth) in enumerate(zip(examples, records, scored, strict=True))
    ]


def _scored(
    task: Task, examples: Sequence[Example], records: Sequence[_Record]
) -> Sequence[Scored]:
    if records[0].letters is None:
        return task.score(examples, [one.text for one in records])
    assert task.choose is not None
    return [
        task.choose(example, one.letters or {})
        for example, one in zip(examples, records, strict=True)
    ]


def _judged(
    job: OutputJob,
    examples: Sequence[Example],
    scored: Sequence[Scored],
    progress: Callable[[int], None],
) -> list[Scored]:
    """Adds what the judge says; asks it only what it has not been asked."""
    task, name, file = job.run.task, job.run.judge, job.directory / JUDGED
    assert task.judging is not None
    rows = list(read_whole_lines(file)) if file.exists() else []
    entries = [_entry(row, name, task.judging.asks) for row in rows]
    known = {(one["id"], one["text"]): one["said"] for one in entries if one["judge"] == name}
    asked = {(e.id, s.extracted): (e, s.extracted) for e, s in zip(examples, scored, strict=True)}
    new = [pair for key, pair in asked.items() if key not in known]
    judge = load_judge(name)
    for first in range(0, len(new), _PIECE):
        piece = new[first : first + _PIECE]
        said = ask_judge(task, name, judge, *zip(*piece, strict=True))
        try:
            for (example, text), answer in zip(piece, said, strict=True):
                known[example.id, text] = answer
                entries.append({"judge": name, "id": example.id, "text": text, "said": answer})
        finally:  # what it said before it failed is kept
            lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in entries]
            files.replace(file, "".join(lines).encode())
        progress(len(piece))
    said_of_each = [
        known[example.id, one.extracted] for example, one in zip(examples, scored, strict=True)
    ]
    return add_verdicts(task, said_of_each, scored)


def _entry(row: Row, judge: str, asks: Sequence[str]) -> dict[str, Any]:
    """Checks a line of judged.jsonl; what this judge said must be all that is asked."""
    entry = {name: row.string(name) for name in ("judge", "id", "text")}
    said = Fields(f"{row.where}: said", row.part("said").fields)
    names = asks if entry["judge"] == judge else said.fields
    return entry | {"said": {name: float(said.real(name, 0, 1)) for name in names}}


def _texts(job: OutputJob) -> list[_Record]:
    """A job's completions, in the order of the examples."""
    return [
        _Record(
            text=row.string("text"),
            finish_reason=row.choice("finish_reason", get_args(FinishReason)),
            new_tokens=row.integer("new_tokens", 0),
        )
        for row in _rows(job)
    ]


def _letters(job: OutputJob) -> list[_Record]:
    """A job's scores of letters, in the order of the examples."""
    records = []
    for row in _rows(job):
        given = Fields(f"{row.where}: letters", row.part("letters").fields)
        # A letter that cannot follow has no score.
        offered = [letter for letter, score in given.fields.items() if score != -math.inf]
        letters = {letter: given.real(letter) for letter in offered}
        records.append(_Record(text=json.dumps(letters), letters=letters))
    return records


def _rows(job: OutputJob) -> list[Row]:
    """The lines of a job's output file, in the order of the examples."""
    by_row: dict[int, Row] = {}
    for row in read_whole_lines(job.outputs):
        number = row.integer("row", 0)
        if number in by_row:
            raise InputError(f"{row.where}: row {number} is there twice")
        by_row[number] = row
    if missing := set(range(job.completions)) - by_row.keys():
        raise InputError(f"{job.outputs}: row {min(missing)} is no longer there")
    return [by_row[number] for number in range(job.completions)]


def _made_from(job: OutputJob) -> str:
    """Digest of all that the worth of completions depends on, but what judges do inside."""
    sources = sorted(Path(tasks.__file__).parent.glob("*.py"))
    content = {
        "outputs": manifest.digest(job.outputs),
        "sources": [manifest.digest(path) for path in sources],
        "task": [job.run.task.name, job.run.task.form, job.run.letters, job.run.judge],
        "examples": [[e.id, e.fields, e.prompt.text] for e in job.examples],
    }
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _line(one: Prediction) -> str:
    fields = {
        "id": one.example.id,
        "sample": one.sample,
        "text": one.text,
        "extracted": one.scored.extracted,
        "values": dict(one.scored.values),
        "note": one.scored.note,
        "finish_reason": one.finish_reason,
        "new_tokens": one.new_tokens,
    }
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def _from_fields(examples: Mapping[str, Example], fields: dict[str, Any]) -> Prediction:
    return Prediction(
        example=examples[fields["id"]],
        sample=fields["sample"],
        text=fields["text"],
        scored=Scored(fields["extracted"], fields["values"], fields["note"]),
        finish_reason=fields["finish_reason"],
        new_tokens=fields["new_tokens"],
    )
