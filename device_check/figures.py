"""Figures as they are made: a line of JSON each, on disk before the next one begins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
Record = Callable[[Figure], None]


def recorder(path: Path, stage: str) -> Record:
    """Makes the function that writes a stage's figures.

    Args:
      path: of the file, which grows.
      stage: who writes.
    """
    started = time.perf_counter()

    def record(figure: Figure) -> None:
        line = {"stage": stage, "at": round(time.perf_counter() - started, 1), **figure}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    return record


def read(path: Path) -> list[Figure]:
    """Reads the figures so far; a line that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
