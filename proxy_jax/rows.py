"""Rows of data: JSON lines, JSON or CSV files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from proxy_jax.errors import InputError
from proxy_jax.reading import CheckedFields, parse_json, reading, reason, shown

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
class Row(CheckedFields):
    """One row.

    Attributes:
      where: how errors name it, "file:3".
      number: of its line, or of the row where rows have no lines of their own, from 1.
      fields: what it holds.
    """

    where: str
    number: int
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
            raise InputError(
                f"{self.where}: {names[0]} must be a list of strings, not {shown(value)}"
            )
        return value

    def part(self, *names: str) -> Row:
        """The row that a field holds.

        Raises:
          InputError: none is there, or it holds something else.
        """
        value = self.field(*names)
        if not isinstance(value, dict):
            raise InputError(f"{self.where}: {names[0]} must be an object, not {shown(value)}")
        return dataclasses.replace(self, fields=value)


def read_rows(location: str, hub: Hub | None) -> list[Row]:
    """Reads the rows of a data set.

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
    readers = {".jsonl": read_jsonl, ".json": read_json, ".csv": _read_csv}
    rows = list(readers[plain.suffix](path))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the objects of a file that has one a line; blank lines are passed over.

    Raises:
      InputError: names the file, or the line that is not a JSON object.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(where, number, _object(parse_json(line, where), where))


def read_whole_lines(path: Path) -> Iterator[Row]:
    """Yields the objects of a file that programs of ours write, one a line.

    A last line without a line break is one that a killed program left half-written, and is none.

    Raises:
      InputError: names the file, or the line that is not a JSON object.
    """
    with reading(path):
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    where = f"{path}:{number}"
                    with reading(where, "not UTF-8"):
                        text = line.decode()
                    yield Row(where, number, _object(parse_json(text, where), where))


def read_json(path: Path) -> Iterator[Row]:
    """Yields the objects of a list, be it the whole file or the "Data" of its object.

    Raises:
      InputError: it cannot be read, or holds something else.
    """
    lines = list(read_lines(path))
    if len(lines) > 1 and lines[0].rstrip().endswith("}"):  # as the datasets library writes it
        yield from read_jsonl(path)
        return
    content = parse_json("".join(lines), path)
    if isinstance(content, dict):  # one row; TriviaQA's files have all of theirs in "Data"
        content = content.get("Data", [content])
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of rows, or an object with a list 'Data'")
    for number, fields in enumerate(content, 1):
        where = f"{path}: row {number}"
        yield Row(where, number, _object(fields, where))


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, which a name in .gz says is compressed.

    Raises:
      InputError: it cannot be read.
    """
    with reading(path):
        if path.exists() and not path.is_file():
            raise InputError(
                f"{path}: not a regular file; a job reads its rows again when it goes on, so they "
                "must lie in one"
            )
        try:
            with _open(path) as file:
                yield from file
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({reason(error)})") from error


def local_path(location: str) -> Path:
    """A path with ~ and variables filled in.

    Raises:
      InputError: no path can be spelled so: a NUL, or the home of a user that does not exist.
    """
    if "\0" in location:
        raise InputError(f"{location!r}: not a path, it holds a NUL")
    with reading(location, "not a path"):
        return Path(os.path.expandvars(location)).expanduser()


def is_hub_id(location: str) -> bool:
    """Whether it reads as owner/name, and no file is called so."""
    outside = location.startswith(("/", ".", "~", "$"))
    return location.count("/") == 1 and not outside and not local_path(location).exists()


def _open(path: Path) -> IO[str]:
    # Line breaks as they are: in CSV they may be part of a field.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_csv(path: Path) -> Iterator[Row]:
    with reading(path, "not CSV"):
        for number, fields in enumerate(csv.DictReader(read_lines(path)), 1):
            where = f"{path}: record {number}"
            if None in fields:
                raise InputError(f"{where}: more values than the header has columns")
            yield Row(where, number, dict(fields))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_hub(hub: Hub) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{hub.id}: no such file, and hub data sets need the datasets library "
            "(pip install datasets)"
        ) from error
    try:
        if hub.id.startswith("hf://"):
            table = datasets.load_dataset("json", data_files=hub.id, split="train")
        else:
            table = datasets.load_dataset(hub.id, hub.subset, split=hub.split)
    except Exception as error:  # network, authorisation, format: of several libraries
        raise InputError(
            f"{hub.id}: no such file, and not from the hub ({reason(error)})"
        ) from error
    rows = [Row(f"{hub.id}:{hub.split}:{i}", i, dict(fields)) for i, fields in enumerate(table, 1)]
    if not rows:
        raise InputError(f"{hub.id}: no rows in split {hub.split!r}")
    return rows
