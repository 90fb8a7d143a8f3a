"""Decodes the rows of an evaluation, each with its models loaded once and freed before the next.

The proxy and the sweep over alpha are one batched run, in which alpha differs by completion.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from decode import job
from decode.evaluation.plan import Evaluation, OutputJob, decoding_config
from decode.generate import record
from decode.outputs import Output
from decode.requests import Options, Request, as_schedule
from decode.scheduler import Generator, longest_contexts, make_requests
from decode.score import Passage, Scorer, make_passages
from decode.tasks import Example
from proxy_jax.jobs import files, processes
from proxy_jax.tokenization import Template
from proxy_jax.trio import LoadedTrio, Trio

FIRST_PROMPT = "first_prompt.json"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a row has to decode of one task.

    Attributes:
      jobs: with something left to do.
      trio: prompted as the task says.
      options: how it is decoded.
      requests: of every example of the task; empty for letters.
      passages: every letter after every example's prompt; empty for texts.
      contexts: by role, the longest context.
    """

    jobs: Sequence[OutputJob]
    trio: Trio
    options: Options
    requests: Sequence[Request]
    passages: Sequence[Passage]
    contexts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class OpenRow:
    """A row whose models are opened and checked, but not loaded.

    Attributes:
      row: of ROWS.
      job: the models, and how they are loaded.
      works: by task.
    """

    row: str
    job: job.Job
    works: Sequence[Work]


def unfinished(evaluation: Evaluation) -> set[Path]:
    """The directories of the jobs that have something left to do.

    Raises:
      InputError: a directory has the output of another job.
    """
    found = []
    if processes.is_first():
        found = [str(one.directory) for one in evaluation.jobs if one.waiting()]
    return set(map(Path, processes.from_first(found)))


def open_rows(
    config: ConfigDict, evaluation: Evaluation, waiting: Collection[Path]
) -> list[OpenRow]:
    """Opens the models of every row that has something left to do, and checks that all can run.

    Args:
      config: of the evaluation.
      evaluation: its plan.
      waiting: what is `unfinished`.

    Raises:
      InputError: a model that cannot be read or does not fit, a prompt that is too long.
    """
    opened = []
    for row in evaluation.rows:
        parts = [evaluation.of(row, run) for run in evaluation.runs]
        left = [[one for one in part if one.directory in waiting] for part in parts]
        if any(left):
            opened.append(_open_row(config, row, parts, left))
    return opened


def decode_row(opened: OpenRow) -> None:
    """Loads a row's models, decodes what is left of every task, and frees them.

    Raises:
      InputError: a checkpoint that is damaged, logits that are not finite, a full disk.
    """
    loaded = opened.job.load()
    for work in opened.works:
        _decode_work(dataclasses.replace(loaded, trio=work.trio), work, opened.row)


def _decode_work(loaded: LoadedTrio, work: Work, row: str) -> None:
    with contextlib.ExitStack() as stack:
        first = work.trio.encode(work.jobs[0].prompts[0])
        outputs = [stack.enter_context(contextlib.closing(one.open(first))) for one in work.jobs]
        _write_first_prompt(work, first)
        pairs = list(zip(work.jobs, outputs, strict=True))
        resumed = [len(file.done & set(range(one.completions))) for one, file in pairs]
        bar = stack.enter_context(
            tqdm(
                total=sum(one.completions for one in work.jobs),
                initial=sum(resumed),
                unit="text",
                desc=f"{work.jobs[0].run.task.name}, {row}",
                disable=not processes.is_first(),
            )
        )
        if work.passages:
            summary = _decode_letters(loaded, work, pairs, bar)
        else:
            summary = _decode_texts(loaded, work, pairs, bar)
        for (one, file), before in zip(pairs, resumed, strict=True):
            file.finish({"rows": one.completions - before, "rows_resumed": before, **summary})


def _decode_texts(
    loaded: LoadedTrio, work: Work, pairs: Sequence[tuple[OutputJob, Output]], bar: tqdm
) -> dict[str, Any]:
    """Decodes the jobs of a task in the same batches; returns figures of their common run."""
    generator = Generator(loaded, work.options)
    # A completion's row in the common run tells its job, too.
    stride = len(work.requests)
    waiting = [
        dataclasses.replace(
            request, row=request.row + one.number * stride, alpha=as_schedule(one.alpha)
        )
        for one, file in pairs
        for request in work.requests[: one.completions]
        if request.row not in file.done
    ]
    by_number = {one.number: (_prompt_rows(one), file) for one, file in pairs}
    start, speed = time.perf_counter(), 0.0
    for completions in generator.stream(waiting, work.contexts):
        records: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
        for completion in completions:
            number, row = divmod(completion.row, stride)
            own = dataclasses.replace(completion, row=row)
            records[number].append(record(own, by_number[number][0], work.options.samples))
        for number, some in records.items():
            by_number[number][1].append(some)
        speed = generator.new_tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
        bar.update(len(completions))
        bar.refresh()
    return {"new_tokens": generator.new_tokens, "tokens_per_second": round(speed, 2)}


def _decode_letters(
    loaded: LoadedTrio, work: Work, pairs: Sequence[tuple[OutputJob, Output]], bar: tqdm
) -> dict[str, Any]:
    """Scores the letters of every example, for all alphas in one pass of each model."""
    options, run = work.options, work.jobs[0].run
    examples = run.task.examples[: run.asked]
    scorer = Scorer(
        loaded,
        [one.alpha for one, _ in pairs],
        beta=options.beta,
        base_filter=options.base_filter,
        batch_size=options.batch_size,
    )
    letters = [
        (row, letter) for row, example in enumerate(examples) for letter in _letters(example)
    ]
    waiting = [
        place
        for place, (row, _) in enumerate(letters)
        if any(row < one.completions and row not in file.done for one, file in pairs)
    ]
    found: dict[int, dict[str, Any]] = collections.defaultdict(dict)
    for place, score in scorer.stream([work.passages[place] for place in waiting]):
        row, letter = letters[waiting[place]]
        found[row][letter] = score.totals
        if len(found[row]) < len(_letters(examples[row])):
            continue
        scores = found.pop(row)
        for alpha, (one, file) in enumerate(pairs):
            if row < one.completions and row not in file.done:
                fields = {"row": row, "id": examples[row].id, "prompt": one.prompts[row].text}
                totals = {name: float(scores[name][alpha]) for name in _letters(examples[row])}
                # A filter of M may exclude a letter, which then has no score.
                totals = {name: total for name, total in totals.items() if math.isfinite(total)}
                file.append([fields | {"letters": totals}])
                bar.update()
    return {}


def _letters(example: Example) -> str:
    return example.fields["letters"]


def _prompt_rows(one: OutputJob) -> list[job.PromptRow]:
    return [
        job.PromptRow(line, prompt, example.id)
        for line, (example, prompt) in enumerate(zip(one.examples, one.prompts, strict=True), 1)
    ]


def _open_row(
    config: ConfigDict,
    row: str,
    parts: Sequence[Sequence[OutputJob]],
    left: Sequence[Sequence[OutputJob]],
) -> OpenRow:
    """Opens a row.

    Args:
      config: of the evaluation.
      row: of ROWS.
      parts: by task, all its jobs.
      left: of those, the ones with something left to do.
    """
    opened = job.open_job(decoding_config(config, row))
    works = [
        _work(opened.trio, opened.options, jobs[0], some)
        for jobs, some in zip(parts, left, strict=True)
        if some
    ]
    for work in works:
        opened.estimate(work.contexts, work.options.max_new_tokens).check()
    return OpenRow(row, opened, works)


def _work(trio: Trio, options: Options, whole: OutputJob, jobs: Sequence[OutputJob]) -> Work:
    """One task's part of a row: `jobs` of it, asked like `whole`, its job on all examples."""
    run, trio = whole.run, _prompted(trio, whole.templates)
    options = run.task.decoding.options(options)
    if run.letters:
        pairs = [
            (prompt, f" {letter}")
            for example, prompt in zip(whole.examples, whole.prompts, strict=True)
            for letter in _letters(example)
        ]
        passages = make_passages(trio, pairs)
        contexts: dict[str, int] = {}
        for passage in passages:
            for role, ids in passage.contexts.items():
                contexts[role] = max(contexts.get(role, 0), len(ids) + len(passage.ids))
        return Work(jobs, trio, options, (), passages, contexts)
    names = [f"{run.task.name} {example.id}" for example in whole.examples]
    requests = make_requests(trio, options, whole.prompts, names=names)
    return Work(jobs, trio, options, requests, (), longest_contexts(requests))


def _prompted(trio: Trio, templates: Mapping[str, str]) -> Trio:
    """The same models with other templates."""
    members = {
        role: dataclasses.replace(member, template=Template(templates[role]))
        for role, member in trio.members.items()
    }
    return dataclasses.replace(trio, members=members)


def _write_first_prompt(work: Work, ids: Mapping[str, Sequence[int]]) -> None:
    """What each role reads of the first example, for the report."""
    first = work.jobs[0]
    if first.number or not processes.is_first():
        return
    texts = {role: work.trio.tokenizer.decode(some) for role, some in ids.items()}
    files.replace(first.directory / FIRST_PROMPT, json.dumps(texts, indent=2).encode())
