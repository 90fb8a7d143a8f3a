"""Small evaluations over the llama trio, and the same rows as decode.generate makes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.evaluate.defaults import evaluation
from decode import generate
from tests.decode import jobs
from tests.trios import PROMPTS, TinyTrio

ALPHAS = (0.0, 0.5, 1.0, 2.0)
SWEPT = 5
TUNED = "[T] {prompt}"  # M under another prompt stands for a tuned M
NEW_TOKENS = {"gsm": 24, "triviaqa": 16}
# Whose text is right, question by question.
RIGHT = ("proxy", "tuned", "proxy", "expert", "proxy", "base", "tuned", "proxy")


def config_of(trio: TinyTrio, directory: Path, *tasks: str, **fields: Any) -> ConfigDict:
    """An evaluation in a directory; fields by their dotted name with "__" for the dot."""
    config = evaluation(jobs.config_of(trio, directory), *tasks)
    config.expert.template = "task"
    config.tuned.path, config.tuned.template = str(trio.paths["base"]), TUNED
    config.sweep.alphas, config.sweep.limit = ALPHAS, SWEPT
    config.output_dir = str(directory / "out")
    for task in tasks:
        config.tasks[task].data = str(directory / f"{task}.jsonl")
        config.tasks[task].max_new_tokens = NEW_TOKENS.get(task, 0)
    for name, value in fields.items():
        *parents, last = name.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    return config


def generated(trio: TinyTrio, directory: Path, task: str, row: str) -> list[str]:
    """The texts of a row, or of the proxy under an alpha ("0.5"), as decode.generate makes them."""
    jobs.write_prompts(directory / "questions.jsonl", [{"question": q} for q in PROMPTS])
    asked = "Question: {question}\n"
    if task == "gsm":
        asked = f"Answer the following question.\n\n{asked}"
    stop = () if task == "gsm" else ("\n",)
    config = jobs.config_of(
        trio,
        directory,
        prompts__path=str(directory / "questions.jsonl"),
        prompts__template=asked,
        response_prefix="Answer:",
        max_new_tokens=NEW_TOKENS[task],
        stop=stop,
        expert__template="reference" if task == "gsm" else "raw",
        output_dir=str(directory / f"{task}_{row}"),
    )
    if row in ("base", "expert", "antiexpert"):
        config.method = row
    elif row == "tuned":
        config.method, config.base.template = "base", TUNED
    elif row != "proxy":
        config.alpha = float(row)
    if task == "gsm" and row in ("expert", "tuned"):  # chat models alone
        config.prompts.template = asked.removesuffix("\n")
        config.response_prefix = " Answer:"
        if row == "expert":
            config.expert.template = "[INST] {prompt} [/INST]"
    generate.main(config)
    return [line["text"] for line in jobs.outputs(config)]


def last_number(text: str) -> str:
    """Of a text with integers only."""
    return (re.findall(r"\d+", text) or ["none"])[-1]


def write_data(directory: Path, task: str, right: list[str]) -> None:
    """The task's file, in which these texts are right."""
    rows: list[dict[str, Any]] = []
    for question, text in zip(PROMPTS, right, strict=True):
        if task == "gsm":
            number = last_number(text)
            answer = "77777" if number == "none" else number
            rows.append({"question": question, "answer": f"So it is.\n#### {answer}"})
        else:
            rows.append({"question": question, "answers": [text.upper(), "never said"]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / f"{task}.jsonl").write_text(text)


def results(config: ConfigDict) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "results.json").read_text())


def lines(config: ConfigDict, place: str, file: str = "predictions.jsonl") -> list[dict[str, Any]]:
    """The rows of a file below the output directory."""
    text = (Path(config.output_dir) / place / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
