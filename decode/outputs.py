"""The output directory of a job: rows appended as they finish, a manifest, safe to resume.

outputs.jsonl has one line a completion, in the order they finish while the job runs, and in the
order of the prompts when it is done. A line counts when it ends in a newline: what a killed job
left half-written is dropped, and that row is made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from proxy_jax.errors import InputError
from proxy_jax.jobs import files, manifest, processes
from proxy_jax.reading import parse_json, reading
from proxy_jax.rows import Row
from proxy_jax.trio import ROLES

# Config fields that do not change a row's result, and may differ when a job is resumed. Models are
# told apart by what is in their files, which is among the inputs, not by their paths.
_PATHS = [f"{role}.{field}" for role in ROLES for field in ("path", "adapter")]
_FREE = (
    "output_dir", "overwrite", "chunk_steps", "distributed", "benchmark", "topology", "context",
    "prompts.path", *_PATHS, *(f"models.{path}" for path in _PATHS),
)  # fmt: skip
RENDERED = "rendered"  # an input that is known, and compared, only when rows are written


class OutputFile:
    """outputs.jsonl and manifest.json of one job.

    Args:
      directory: created if need be.
      config: the resolved config, as a dict.
      inputs: what else the rows depend on, compared when the job is resumed.
      prompts: by row, the text of its prompt.
      write: False only reads what is done.

    Attributes:
      done: rows that are already there.

    Raises:
      InputError: another job's output, rows that are not this job's, a job that still runs, a
        directory that is not writable.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        inputs: dict[str, Any],
        prompts: Sequence[str],
        *,
        write: bool = True,
    ):
        self.path = directory / "outputs.jsonl"
        self._prompts = prompts
        self._write = write
        self._file = files.AppendedFile(self.path, write=write)
        self._started = time.time()
        self._content = self._resume_manifest(config, inputs)
        self.done = self._recover()
        if write:
            self._save_manifest()

    def append(self, records: list[dict[str, Any]]) -> None:
        """Writes finished rows; they survive the process from then on.

        Raises:
          InputError: the disk is full or fails; the rows written before are kept.
        """
        with reading(self.path, "cannot write"):  # NaN, say, which JSON does not have
            lines = "".join(
                json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
            )
        self._file.append(lines.encode())
        self._file.sync()
        self.done |= {record["row"] for record in records}

    def finish(self, summary: dict[str, Any]) -> None:
        """Puts the rows in the order of the prompts, and completes the manifest."""
        lines = sorted(
            self._file.read().splitlines(keepends=True), key=lambda x: json.loads(x)["row"]
        )
        self._content["runs"][-1] |= summary | {"seconds": round(time.time() - self._started, 1)}
        self._save_manifest()
        files.replace(self.path, b"".join(lines))  # last: the lock is the replaced file's

    def close(self) -> None:
        """Lets go of the file and its lock."""
        self._file.close()

    def _resume_manifest(self, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        new, old = manifest.new(config, inputs), manifest.read(self.path.parent)
        if old is None and self._file.size:
            raise InputError(f"{self.path}: exists, but no {manifest.FILE} says what made it")
        free = _FREE if self._write else (*_FREE, RENDERED)
        if old and (changed := manifest.changed(old, new, free)):
            if not (config.get("overwrite") and self._write):
                raise InputError(
                    f"{self.path.parent}: made by another job ({changed}); choose another "
                    "output_dir, or set overwrite=True"
                )
            self._file.truncate(0)
            old = None
        content = old or new
        content["runs"].append(manifest.this_run())
        return content

    def _recover(self) -> set[int]:
        """Rows of whole lines; cuts off a half-written last one."""
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and self._write:
            self._file.truncate(whole)
        rows: set[int] = set()
        for number, line in enumerate(data[:whole].splitlines(), 1):
            row = self._row(line, number)
            if row in rows:
                raise InputError(f"{self.path}:{number}: row {row} is there twice")
            rows.add(row)
        return rows

    def _row(self, line: bytes, number: int) -> int:
        """The row that a line is of, once it is clear that this job may have written it."""
        where = f"{self.path}:{number}"
        fields = parse_json(line, where)
        if not isinstance(fields, dict):
            raise InputError(f"{where}: not a row of this job")
        record = Row(where, number, fields)
        row = record.integer("row", 0, len(self._prompts) - 1)
        if record.field("prompt") != self._prompts[row]:
            raise InputError(f"{where}: row {row} has another prompt in this job")
        if "letters" not in fields:
            record.text("text", empty=True)
        return row

    def _save_manifest(self) -> None:
        manifest.write(self.path.parent, self._content)


class FollowedOutput:
    """The output file in processes that do not write it.

    Attributes:
      path: of the file, where the first process sees it.
      done: rows that were already there.
    """

    def __init__(self, path: Path, done: set[int]):
        self.path = path
        self.done = done

    def append(self, records: list[dict[str, Any]]) -> None:
        """Leaves them to the first process."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Leaves it to the first process."""

    def close(self) -> None:
        """There is nothing to close."""


Output: TypeAlias = OutputFile | FollowedOutput


def open_output(
    directory: Path, config: dict[str, Any], inputs: dict[str, Any], prompts: Sequence[str]
) -> Output:
    """The output file in a job of any number of processes: the first one writes it.

    The others hear from the first what is done, and need not see the directory.

    Raises:
      InputError: see `OutputFile`; also a process that was given another job than the first.
    """
    processes.check_same(manifest.new(config, inputs))
    if processes.is_first():
        output = OutputFile(directory, config, inputs, prompts)
        processes.from_first(sorted(output.done))
        return output
    return FollowedOutput(directory / "outputs.jsonl", set(processes.from_first(None)))
