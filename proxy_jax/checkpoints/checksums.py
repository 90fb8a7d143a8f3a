"""Whether a run's checkpoint still holds what was saved, array by array.

Orbax compresses without checksums, so a flipped bit or a page of zeros reads as weights. So beside
what it has saved lies checksums.json: of every key of its store, how many bytes and their CRC-32.
A run that was killed between the two leaves a checkpoint without; it is read as it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, read_json, reading

FILE, STORE = "checksums.json", "state"


def store_spec(checkpoint: Path) -> dict[str, Any]:
    """Gives TensorStore's name for a checkpoint's key-value store."""
    path = f"{(checkpoint / STORE).absolute()}/"
    return {"driver": "ocdbt", "base": {"driver": "file", "path": path}}


def write_checksums(checkpoint: Path) -> None:
    """Writes the checksums of a checkpoint that is whole.

    Raises:
      InputError: it cannot be read, or the disk is full or fails.
    """
    content = json.dumps(dict(_checksums(checkpoint, ""))).encode()
    beside = checkpoint / f"{FILE}.new"
    with reading(checkpoint / FILE, "cannot write"):
        beside.write_bytes(content)
        os.replace(beside, checkpoint / FILE)


class Checksums:
    """The checksums of a checkpoint, if it has any.

    Args:
      checkpoint: its directory.

    Raises:
      InputError: checksums.json is something else.
    """

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        path = checkpoint / FILE
        self._saved = Fields(str(path), read_json(path)) if path.exists() else None
        self._whole: set[str] = set()

    def check(self, prefix: str = "") -> None:
        """Compares the keys that begin with a prefix with what was saved, once.

        Raises:
          InputError: names the checkpoint and the key that is lost or damaged.
        """
        if self._saved is None or prefix in self._whole:
            return
        expected = {key for key in self._saved.fields if key.startswith(prefix)}
        for key, found in _checksums(self._checkpoint, prefix):
            if key not in expected or list(self._saved.array(key, int)) != found:
                raise InputError(f"{self._checkpoint}: {key} is damaged, it is not what was saved")
            expected.remove(key)
        if expected:
            raise InputError(f"{self._checkpoint}: {min(expected)} is lost")
        self._whole.add(prefix)


def _checksums(checkpoint: Path, prefix: str) -> Iterator[tuple[str, list[int]]]:
    # Without a cache: what was read once is not read again.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    below = ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "")
    with reading(checkpoint, "not whole"):
        store = ts.KvStore.open(store_spec(checkpoint), context=context).result()
        for key in store.list(below).result():
            value = store.read(key).result().value
            yield key.decode(), [len(value), zlib.crc32(value)]
