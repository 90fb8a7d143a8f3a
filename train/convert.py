"""python -m train.convert gsm8k IN OUT: official data files as {prompt, completion} rows.

The prompts and completions are those of the proxy-tuning paper's task experts: a prompt is
"Question: ...\\nAnswer:", and a completion begins with a space.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxy_jax.errors import InputError
from train.examples import read_jsonl, text_field

BAD_INPUT = 2  # exit status
PromptCompletion = dict[str, str]


def gsm8k(path: Path) -> list[PromptCompletion]:
    """Rows of GSM8K's train.jsonl; the whole rationale is learnt, "<<a=b>>" and "#### n" included.

    Raises:
      InputError: names the line that cannot be used.
    """
    return [
        _row(row.fields, "question", row.fields, "answer", row.where) for row in read_jsonl(path)
    ]


def triviaqa(path: Path) -> list[PromptCompletion]:
    """Rows of TriviaQA's unfiltered-web-train.json; the answer is its one canonical form.

    Raises:
      InputError: names the question that cannot be used.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    questions = content.get("Data") if isinstance(content, dict) else None
    if not isinstance(questions, list) or not questions:
        raise InputError(f"{path}: expected an object with a list 'Data' of questions")
    rows = []
    for number, fields in enumerate(questions, 1):
        where = f"{path}: question {number}"
        if not isinstance(fields, dict):
            raise InputError(f"{where}: expected an object, found {type(fields).__name__}")
        where = f"{where} ({fields.get('QuestionId')})"
        answer = fields.get("Answer")
        if not isinstance(answer, dict):
            raise InputError(f"{where}: no Answer (the test questions have none)")
        rows.append(_row(fields, "Question", answer, "Value", where))
    return rows


def write_rows(path: Path, rows: Sequence[PromptCompletion]) -> None:
    """Writes JSONL; an earlier file stays as it is until the new one is complete.

    Raises:
      InputError: the file cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; bad input ends it with one line and status 2."""
    converters = {"gsm8k": gsm8k, "triviaqa": triviaqa}
    parser = argparse.ArgumentParser(prog="python -m train.convert", description=__doc__)
    parser.add_argument("dataset", choices=converters)
    parser.add_argument("input", type=Path, help="the official file")
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    given = parser.parse_args(arguments)
    try:
        rows = converters[given.dataset](given.input)
        write_rows(given.output, rows)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    print(f"{len(rows)} rows in {given.output}")


def _row(
    question: dict[str, Any], ask: str, answer: dict[str, Any], reply: str, where: str
) -> PromptCompletion:
    asked = text_field(question, ask, where).strip()
    replied = text_field(answer, reply, where).strip()
    return {"prompt": f"Question: {asked}\nAnswer:", "completion": f" {replied}"}


if __name__ == "__main__":
    main()
