"""What tells one model on disk from another at the same path: sizes and contents of its files.

Of a large file the beginning, where the header is, and samples all over it are read: a model that
was trained further, converted or quantised again differs in nearly every one of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from proxy_jax.errors import InputError
from proxy_jax.reading import reading

# What a model's or adapter's directory may be made of; other files do not count.
_KINDS = (".safetensors", ".json", ".model", ".txt", ".jinja")
_HEAD, _SAMPLE, _SAMPLES = 2**20, 2**14, 64  # bytes, bytes, of each file
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(path: Path) -> str:
    """Computes the digest of a model or adapter: a file, a directory, or a run's checkpoint.

    A model of the hub has the hub's commit for one, whether its weights are downloaded or not.

    Args:
      path: absolute; of a run, the checkpoint's own directory.

    Raises:
      InputError: nothing there, or a file that cannot be read.
    """
    if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
        return f"commit {path.name}"
    if path.is_dir():
        files = _files(path)
        if not files:
            raise InputError(f"{path}: holds no files of a model")
        return digest([(str(file.relative_to(path)), _of_file(file)) for file in files])
    return _of_file(path)


def digest(parts: Sequence[object]) -> str:
    """Computes the SHA-256 of values that print alike when they are alike."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _files(directory: Path) -> list[Path]:
    if directory.parent.name == "checkpoints" and directory.name.isdigit():
        return sorted(file for file in directory.rglob("*") if file.is_file())
    return sorted(f for f in directory.iterdir() if f.suffix in _KINDS and f.is_file())


def _of_file(path: Path) -> str:
    found = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        found.update(str(size).encode())
        found.update(file.read(_HEAD))
        if size <= _HEAD + _SAMPLE * _SAMPLES:
            found.update(file.read())
            return found.hexdigest()
        for sample in range(_SAMPLES):
            file.seek(_HEAD + (size - _HEAD - _SAMPLE) * sample // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE))
    return found.hexdigest()
