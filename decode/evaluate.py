"""Evaluates a trio on tasks: M, M+, M-, the proxy and a directly tuned M, and a sweep over alpha.

    python -m decode.evaluate --config=configs/evaluate/qwen_gguf_gsm.py \\
        --config.tasks.gsm.data=test.jsonl --config.output_dir=runs/gsm_report

Writes, after each row: results.json, report.md and report.html, and for each task and row a
directory with outputs.jsonl (what was decoded) and predictions.jsonl (what it is worth). Killed at
any instant, the same command goes on where it was; when all is decoded it only scores what has
changed, and renders. configs/evaluate/defaults.py explains every field.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from configs.defaults import decoding
from configs.evaluate.defaults import evaluation
from decode.evaluation.plan import Evaluation, plan_evaluation
from decode.evaluation.report import write_report
from decode.evaluation.results import make_results
from decode.evaluation.run import decode_row, open_rows, unfinished
from decode.evaluation.wording import below_expert
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, launch, manifest, processes
from proxy_jax.reading import Fields, reading


def main(config: ConfigDict) -> None:
    """Checks everything, decodes row by row, and reports after each."""
    evaluation = plan_evaluation(config)
    waiting = unfinished(evaluation)
    opened = open_rows(config, evaluation, waiting)
    if processes.is_first():
        _write_manifest(config, evaluation.directory)
    results = _publish(config, evaluation, waiting)
    while opened:
        row = opened.pop(0)
        decode_row(row)
        waiting -= {one.directory for one in evaluation.jobs if one.row == row.row}
        results = _publish(config, evaluation, waiting)
    if processes.is_first():
        for warning in filter(None, map(below_expert, results["tasks"].values())):
            print(f"warning: {warning}")
        print(f"report in {evaluation.directory / 'report.html'}")


def defaults(config: ConfigDict) -> ConfigDict:
    """An evaluation of the config's tasks, with every field."""
    return evaluation(decoding(), *config.tasks)


def _publish(
    config: ConfigDict, evaluation: Evaluation, waiting: Collection[Path]
) -> dict[str, Any]:
    """Scores what is finished, and writes results and report."""
    if not processes.is_first():
        return {}
    with tqdm(unit="text", desc="scoring", leave=False, delay=1) as bar:
        found = make_results(config, evaluation, waiting, bar.update)
    path = evaluation.directory / "results.json"
    with reading(path, "cannot be written"):  # NaN in the config, or a path that is not UTF-8
        content = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False).encode()
    files.replace(path, content + b"\n")
    results = json.loads(content)
    write_report(evaluation.directory, results, _runs(evaluation, waiting))
    return results


def _write_manifest(config: ConfigDict, directory: Path) -> None:
    """The evaluation's own manifest; those of its rows say what each depends on."""
    directory.mkdir(parents=True, exist_ok=True)
    content = manifest.new(config.to_dict(), {})
    old = manifest.read(directory)
    content["runs"] = [*(old["runs"] if old else []), manifest.this_run()]
    manifest.write(directory, content)


def _runs(evaluation: Evaluation, waiting: Collection[Path]) -> list[dict[str, Any]]:
    """What decoded each finished row."""
    found = []
    for one in evaluation.jobs:
        content = manifest.read(one.directory)
        if one.number or one.directory in waiting or content is None:
            continue
        last = _last_run(content, str(one.directory / manifest.FILE))
        versions = last.inner("versions") or Fields(f"{last.where}: versions", {})
        found.append(
            {
                "task": one.run.task.name,
                "row": one.row,
                "device": last.string("device"),
                "commit": last.string("commit", default=None),
                "versions": {name: versions.string(name) for name in ("proxy_jax", "jax")},
                "tokens_per_second": last.real("tokens_per_second", default=None),
            }
        )
    return found


def _last_run(content: dict[str, Any], where: str) -> Fields:
    """The last run of a manifest."""
    runs = Fields(where, content).array("runs", dict)
    if not runs:
        raise InputError(f"{where}: runs is empty")
    return Fields(f"{where}: runs", runs[-1])


if __name__ == "__main__":
    launch.run(main, defaults)
