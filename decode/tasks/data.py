"""Rows of a task's data: JSON lines, JSON or CSV files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

from proxy_jax.errors import InputError

_SUFFIXES = (".jsonl", ".json", ".csv")
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where a data set is on the hub.

    Attributes:
      id: owner/name, or for a single file its hf:// address.
      subset, split: which part.
    """

    id: str
    subset: str | None = None
    split: str = "test"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
      where: how errors name it, "file:3".
      fields: what it holds.
    """

    where: str
    fields: dict[str, Any]

    def field(self, *names: str) -> Any:
        """The first of several fields that is there.

        Raises:
          InputError: none is.
        """
        for name in names:
            if (value := self.fields.get(name, _ABSENT)) is not _ABSENT:
                return value
        found = ", ".join(map(repr, self.fields)) or "no field"
        raise InputError(f"{self.where}: no field {' or '.join(map(repr, names))}; it has {found}")

    def text(self, *names: str, empty: bool = False) -> str:
        """A field that must hold text.

        Raises:
          InputError: none is there, or it holds something else, or it is empty.
        """
        value = self.field(*names)
        if not isinstance(value, str):
            raise InputError(
                f"{self.where}: {names[0]} must be a string, not {type(value).__name__}"
            )
        if not (empty or value.strip()):
            raise InputError(f"{self.where}: {names[0]} is empty")
        return value

    def texts(self, *names: str) -> list[str]:
        """A field that must hold a list of strings, at least one.

        Raises:
          InputError: none is there, or it holds something else.
        """
        value = self.field(*names)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise InputError(f"{self.where}: {names[0]} must be a list of strings, not {value!r}")
        return value


def read_rows(location: str, hub: Hub | None) -> list[Row]:
    """Reads the rows of a task.

    Args:
      location: a file (.jsonl, .json, .csv, also with .gz), the hub id of a copy (owner/name), or
        "" for the hub's own.
      hub: where the hub has it; None if it does not.

    Raises:
      InputError: nothing there, the wrong format, no rows, or a hub data set that the datasets
        library cannot load.
    """
    if not location:
        if hub is None:
            raise InputError("this data set is not on the hub; give its file")
        return _read_hub(hub)
    path = local_path(location)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if hub and plain.suffix not in _SUFFIXES and is_hub_id(location):
        return _read_hub(dataclasses.replace(hub, id=location))
    if plain.suffix not in _SUFFIXES:
        raise InputError(f"{path}: expected a {', '.join(_SUFFIXES)} file, or one of those .gz")
    text = _read_text(path)
    if plain.suffix == ".jsonl":
        rows = _json_lines(text, path)
    elif plain.suffix == ".json":
        rows = _json_list(text, path)
    else:
        records = csv.DictReader(io.StringIO(text, newline=""))
        rows = [Row(f"{path}: record {i}", dict(fields)) for i, fields in enumerate(records, 1)]
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def local_path(location: str) -> Path:
    """A path with ~ and variables filled in."""
    return Path(os.path.expandvars(location)).expanduser()


def is_hub_id(location: str) -> bool:
    """Whether it reads as owner/name, and no file is called so."""
    outside = location.startswith(("/", ".", "~", "$"))
    return location.count("/") == 1 and not outside and not local_path(location).exists()


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: {reason}") from error


def _json_lines(text: str, path: Path) -> list[Row]:
    lines = ((f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
    return [Row(where, _object(_json(line, where), where)) for where, line in lines]


def _json_list(text: str, path: Path) -> list[Row]:
    content = _json(text, str(path))
    if isinstance(content, dict):  # TriviaQA's files
        content = content.get("Data")
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of rows, or an object with a list 'Data'")
    named = ((f"{path}: row {i}", fields) for i, fields in enumerate(content, 1))
    return [Row(where, _object(fields, where)) for where, fields in named]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_hub(hub: Hub) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{hub.id}: hub data sets need the datasets library (pip install datasets); "
            "or give a file"
        ) from error
    try:
        if hub.id.startswith("hf://"):
            table = datasets.load_dataset("json", data_files=hub.id, split="train")
        else:
            table = datasets.load_dataset(hub.id, hub.subset, split=hub.split)
    except Exception as error:  # network, authorisation, format: of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{hub.id}: no such file, and not from the hub ({reason})") from error
    rows = [Row(f"{hub.id}:{hub.split}:{i}", dict(fields)) for i, fields in enumerate(table, 1)]
    if not rows:
        raise InputError(f"{hub.id}: no rows in split {hub.split!r}")
    return rows
