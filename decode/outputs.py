"""The output directory of a job: rows appended as they finish, a manifest, safe to resume.

outputs.jsonl has one line a completion, in the order they finish while the job runs, and in the
order of the prompts when it is done. A line counts when it ends in a newline: what a killed job
left half-written is dropped, and that row is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from proxy_jax.errors import InputError

# Config fields that do not change a row's result, and may differ when a job is resumed.
_FREE = ("output_dir", "overwrite", "chunk_steps", "distributed")
_PACKAGES = ("proxy_jax", "jax", "jaxlib", "flax", "transformers", "numpy")


class OutputFile:
    """outputs.jsonl and manifest.json of one job.

    Args:
      directory: created if need be.
      config: the resolved config, as a dict.
      inputs: digests of the files the job reads, compared when it is resumed.
      write: False in processes that only follow: they read what is done and write nothing.

    Attributes:
      done: rows that are already there.

    Raises:
      InputError: another job's output, a job that still runs, a directory that is not writable.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], inputs: dict[str, str], *, write: bool = True
    ):
        self.path = directory / "outputs.jsonl"
        self._manifest = directory / "manifest.json"
        self._write = write
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b" if write else "rb", buffering=0)
        except OSError as error:
            raise InputError(f"output_dir {directory}: {error.strerror}") from error
        if write:
            self._lock()
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
        if not self._write:
            return
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            rest = memoryview(lines.encode())
            while rest:  # an unbuffered file may take a part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot write ({error.strerror}); finished rows are kept, "
                "run the same command again to go on"
            ) from error
        self.done |= {record["row"] for record in records}

    def finish(self, summary: dict[str, Any]) -> None:
        """Puts the rows in the order of the prompts, and completes the manifest."""
        if not self._write:
            return
        self._file.seek(0)
        lines = sorted(self._file.read().splitlines(keepends=True), key=_row)
        self._content["runs"][-1] |= summary | {"seconds": round(time.time() - self._started, 1)}
        self._save_manifest()
        _replace(self.path, b"".join(lines))  # last: the lock is the replaced file's

    def close(self) -> None:
        """Lets go of the file and its lock."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.path}: another process is writing it") from error

    def _resume_manifest(self, config: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
        resolved = json.loads(json.dumps(config))  # tuples as lists, as they are read back
        if self._manifest.exists():
            try:
                content = json.loads(self._manifest.read_text())
                before = content["config"], content["inputs"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(f"{self._manifest}: not a manifest of a job") from error
            changed = _difference(before[0], resolved) or _difference(before[1], inputs)
            if changed and config.get("overwrite") and self._write:
                self._file.truncate(0)
                content = {"config": resolved, "inputs": inputs, "runs": []}
            elif changed:
                raise InputError(
                    f"{self.path.parent}: made by another job ({changed}); choose another "
                    "output_dir, or set overwrite=True"
                )
        elif self.path.stat().st_size:
            raise InputError(f"{self.path}: exists, but no manifest.json says what made it")
        else:
            content = {"config": resolved, "inputs": inputs, "runs": []}
        content["runs"].append(_run())
        return content

    def _recover(self) -> set[int]:
        """Rows of whole lines; cuts off a half-written last one."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and self._write:
            self._file.truncate(whole)
        rows = set()
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                rows.add(_row(line))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(f"{self.path}:{number}: not a row of this job") from error
        return rows

    def _save_manifest(self) -> None:
        _replace(self._manifest, json.dumps(self._content, indent=2).encode() + b"\n")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _row(line: bytes) -> int:
    return json.loads(line)["row"]


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that a kill at any instant leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror})") from error


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str | None:
    """The first field in which two configs differ, as "alpha: 1.0, now 0.5"."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if before == now or prefix + key in _FREE:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _difference(before, now, f"{prefix}{key}.")
        return f"{prefix}{key}: {before!r}, now {now!r}"
    return None


def _run() -> dict[str, Any]:
    """Who made it: versions, commit, command, device."""
    device = jax.devices()[0]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The checkout's commit, "+changes" if files differ; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")
