"""From completions to what they are worth, kept in predictions.jsonl beside them.

Scoring runs again when the completions, the data, or the code of the tasks change. What a judge
said of a text is kept in judged.jsonl, and a text is not judged twice by a judge of that name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import manifest
from decode import tasks
from decode.evaluation.plan import Job
from decode.tasks import Example, Scored, apply_judge, load_judge
from proxy_jax.errors import InputError

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


def predictions(job: Job, progress: Callable[[int], None]) -> list[Prediction]:
    """What a finished job's completions are worth, in the order of the examples.

    Args:
      job: finished.
      progress: called with the number of completions just scored or judged.

    Raises:
      InputError: a judge that cannot be used, a file that is no longer what was written.
    """
    state = {"made_from": _made_from(job)}
    file, beside = job.directory / PREDICTIONS, job.directory / _STATE
    if file.exists() and beside.exists():
        state["predictions"] = manifest.digest(file)
        if _read_json(beside) == state:
            examples = {example.id: example for example in job.examples}
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]
            return [_from_fields(examples, json.loads(line)) for line in lines]
    found = _score(job, progress)
    manifest.replace(file, "".join(_line(one) for one in found).encode())
    state["predictions"] = manifest.digest(file)
    manifest.replace(beside, json.dumps(state).encode())
    return found


def by_example(found: Sequence[Prediction]) -> dict[str, list[Scored]]:
    """What the samples of each example are worth, by its id."""
    grouped: dict[str, list[Scored]] = {}
    for one in found:
        grouped.setdefault(one.example.id, []).append(one.scored)
    return grouped


def _score(job: Job, progress: Callable[[int], None]) -> list[Prediction]:
    task, samples = job.run.task, job.run.task.decoding.samples
    records = _records(job)
    examples = [example for example in job.examples for _ in range(samples)]
    scored: list[Scored] = []
    for first in range(0, len(records), _PIECE):
        piece = slice(first, first + _PIECE)
        if job.run.letters:
            assert task.choose is not None
            scored += [
                task.choose(example, one["letters"])
                for example, one in zip(examples[piece], records[piece], strict=True)
            ]
        else:
            scored += task.score(examples[piece], [one["text"] for one in records[piece]])
        progress(len(records[piece]))
    if job.run.judge:
        scored = _judged(job, examples, scored, progress)
    return [
        Prediction(
            example=example,
            sample=row % samples,
            text=json.dumps(one["letters"]) if job.run.letters else one["text"],
            scored=worth,
            finish_reason=one.get("finish_reason"),
            new_tokens=one.get("new_tokens"),
        )
        for row, (example, one, worth) in enumerate(zip(examples, records, scored, strict=True))
    ]


def _judged(
    job: Job, examples: Sequence[Example], scored: Sequence[Scored], progress: Callable[[int], None]
) -> list[Scored]:
    """Adds what the judge says; asks it only what it has not been asked."""
    task, name, file = job.run.task, job.run.judge, job.directory / JUDGED
    assert task.judging is not None
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    known = {
        (entry["id"], entry["text"]): entry["said"]
        for entry in map(json.loads, lines)
        if entry["judge"] == name
    }
    asked = {(e.id, s.extracted): (e, s) for e, s in zip(examples, scored, strict=True)}
    new = [pair for key, pair in asked.items() if key not in known]
    judge = load_judge(name)
    for first in range(0, len(new), _PIECE):
        piece = new[first : first + _PIECE]
        said: list[Mapping[str, float]] = []

        def ask(examples, texts, said=said):
            said.extend(judge(examples, texts))
            return said

        apply_judge(task, ask, *zip(*piece, strict=True))  # refuses answers that are none
        for (example, one), answer in zip(piece, said, strict=True):
            known[example.id, one.extracted] = {n: float(answer[n]) for n in task.judging.asks}
            entry = {"judge": name, "id": example.id, "text": one.extracted}
            lines.append(json.dumps(entry | {"said": known[example.id, one.extracted]}))
        manifest.replace(file, "".join(f"{line}\n" for line in lines).encode())
        progress(len(piece))

    def answered(examples, texts):
        return [known[example.id, text] for example, text in zip(examples, texts, strict=True)]

    return apply_judge(task, answered, examples, scored)


def _records(job: Job) -> list[dict[str, Any]]:
    """The lines of a job's output file, in the order of the examples."""
    by_row: dict[int, dict[str, Any]] = {}
    for line in job.outputs.read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        by_row[record["row"]] = record
    if missing := set(range(job.completions)) - by_row.keys():
        raise InputError(f"{job.outputs}: row {min(missing)} is no longer there")
    return [by_row[row] for row in range(job.completions)]


def _made_from(job: Job) -> str:
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
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _from_fields(examples: Mapping[str, Example], fields: dict[str, Any]) -> Prediction:
    return Prediction(
        example=examples[fields["id"]],
        sample=fields["sample"],
        text=fields["text"],
        scored=Scored(fields["extracted"], fields["values"], fields["note"]),
        finish_reason=fields["finish_reason"],
        new_tokens=fields["new_tokens"],
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
