"""python -m train.convert gsm8k IN OUT: official data files as {prompt, completion} rows.

The prompts and completions are those of the proxy-tuning paper's task experts: a prompt is
"Question: ...\\nAnswer:", and a completion begins with a space.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from proxy_jax.errors import InputError
from proxy_jax.jobs import files
from proxy_jax.jobs.exits import one_line_errors
from proxy_jax.reading import reading
from proxy_jax.rows import read_json, read_jsonl

PromptCompletion = dict[str, str]


def gsm8k(path: Path) -> list[PromptCompletion]:
    """Rows of GSM8K's train.jsonl; the whole rationale is learnt, "<<a=b>>" and "#### n" included.

    Raises:
      InputError: names the line that cannot be used.
    """
    return [_row(row.text("question"), row.text("answer")) for row in read_jsonl(path)]


def triviaqa(path: Path) -> list[PromptCompletion]:
    """Rows of TriviaQA's unfiltered-web-train.json; the answer is its one canonical form.

    Raises:
      InputError: names the question that cannot be used.
    """
    return [_row(row.text("Question"), row.part("Answer").text("Value")) for row in read_json(path)]


def write_rows(path: Path, rows: Sequence[PromptCompletion]) -> None:
    """Writes JSONL; an earlier file stays as it is until the new one is complete.

    Raises:
      InputError: the file cannot be written.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with reading(path, "cannot write"):
        if path.exists() and not path.is_file():  # a device or a pipe, which stays what it is
            path.write_bytes(content)
        else:
            files.replace(path, content)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; bad input ends it with one line and status 2."""
    converters = {"gsm8k": gsm8k, "triviaqa": triviaqa}
    parser = argparse.ArgumentParser(prog="python -m train.convert", description=__doc__)
    parser.add_argument("dataset", choices=converters)
    parser.add_argument("input", type=Path, help="the official file")
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    given = parser.parse_args(arguments)
    with one_line_errors():
        rows = converters[given.dataset](given.input)
        if not rows:
            raise InputError(f"{given.input}: no rows")
        write_rows(given.output, rows)
    print(f"{len(rows)} rows in {given.output}")


def _row(question: str, answer: str) -> PromptCompletion:
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "completion": f" {answer.strip()}"}


if __name__ == "__main__":
    main()
