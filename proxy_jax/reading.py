"""The boundary to files: what cannot be read becomes one line, values are checked when read.

Everything that a user's file says passes through here. `reading` turns whatever a library raises
while it reads into an InputError that names the file; `Fields` gives the values of a JSON object,
each of the type and in the range that is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxy_jax.errors import InputError

_ABSENT: Any = object()
_LONGEST_REASON = 300  # characters of a library's message
_LARGEST_JSON = 2**30  # bytes of a file that is parsed as a whole


@contextlib.contextmanager
def reading(where: object, what: str = "cannot be read") -> Iterator[None]:
    """Turns what is raised inside into an InputError of one line.

    Args:
      where: the file, key or tensor that is read.
      what: is wrong with it, should reading fail: "not JSON", "cannot be read".

    Raises:
      InputError: in place of any other error, also RecursionError, MemoryError and a panic in
        Rust; not of an interrupt or an exit.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or reason(error)}") from error
    except BaseException as error:  # whatever a library makes of a file
        # A panic of one that is written in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: {what} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """Shortens what an error says to a part of a line; its kind, if it says nothing."""
    text = ""
    with contextlib.suppress(Exception):  # that of foreign code may not even say what it is
        text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = f"{text[:_LONGEST_REASON]}..."
    return text or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds an object.

    Raises:
      InputError: the file is absent, no regular file, or not a JSON object.
    """
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def parse_json(text: str | bytes, where: object) -> Any:
    """Parses JSON.

    Raises:
      InputError: it is not JSON, or has half of a surrogate pair, which JSON can spell.
    """
    with reading(where, "not JSON"):
        value = json.loads(text)
    escape = b"\\u" if isinstance(text, bytes) else "\\u"
    if escape in text:  # type: ignore[operator]
        with reading(where, "not valid Unicode"):
            json.dumps(value, ensure_ascii=False).encode()
    return value


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
      InputError: the file is absent, no regular file, too large to be text, or not UTF-8.
    """
    with reading(path, "not UTF-8"):
        if not path.exists():
            raise InputError(f"{path}: no such file")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        if status.st_size > _LARGEST_JSON:
            raise InputError(f"{path}: {status.st_size} bytes are too many for a file of text")
        return path.read_text(encoding="utf-8")


class CheckedFields:
    """Values by name, each checked as it is read.

    A value that is null counts as absent. Without a default, a value that is absent is an error.

    Attributes:
      where: how errors name what holds the values, a file or "file:3".
      fields: the values.
    """

    where: str
    fields: Mapping[str, Any]

    def integer(
        self, name: str, low: int | None = None, high: int | None = None, *, default: Any = _ABSENT
    ) -> Any:
        """Gives an integer from low to high; 2.0 counts as one, True does not.

        Raises:
          InputError: it is absent without a default, of another type, or out of range.
        """
        value = self._value(name, default)
        if value is default:
            return default
        whole = isinstance(value, float) and math.isfinite(value) and value == int(value)
        if isinstance(value, bool) or not (isinstance(value, int) or whole):
            raise InputError(f"{self.where}: {name} must be an integer, not {shown(value)}")
        return self._within(name, int(value), low, high)

    def real(
        self,
        name: str,
        low: float | None = None,
        high: float | None = None,
        *,
        above: float | None = None,
        default: Any = _ABSENT,
    ) -> Any:
        """Gives a finite number from low to high and, if asked for, above a bound.

        Raises:
          InputError: it is absent without a default, of another type, or out of range.
        """
        value = self._value(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where}: {name} must be a number, not {shown(value)}")
        if isinstance(value, int) and abs(value) > 2**1000:  # more than a float holds
            raise InputError(f"{self.where}: {name} is out of range: {shown(value)}")
        if not math.isfinite(value):
            raise InputError(f"{self.where}: {name} must be finite, not {value}")
        if above is not None and value <= above:
            raise InputError(f"{self.where}: {name} must be above {above:g}, not {value}")
        return self._within(name, value, low, high)

    def flag(self, name: str, *, default: Any = _ABSENT) -> Any:
        """Gives true or false.

        Raises:
          InputError: it is absent without a default, or something else.
        """
        return self._of_kind(name, bool, "true or false", default)

    def string(self, name: str, *, default: Any = _ABSENT) -> Any:
        """Gives a string.

        Raises:
          InputError: it is absent without a default, or something else.
        """
        return self._of_kind(name, str, "a string", default)

    def choice(self, name: str, known: Sequence[str], *, default: Any = _ABSENT) -> Any:
        """Gives one of several strings.

        Raises:
          InputError: it is absent without a default, or none of them.
        """
        value = self.string(name, default=default)
        if value is not default and value not in known:
            raise InputError(
                f"{self.where}: {name} {shown(value)} is not supported; known: {', '.join(known)}"
            )
        return value

    def array(self, name: str, kind: type, *, default: Any = _ABSENT) -> Any:
        """Gives a list of values of one type (float also takes integers) as a tuple.

        Raises:
          InputError: it is absent without a default, or something else.
        """
        value = self._value(name, default)
        if value is default:
            return default
        if not isinstance(value, list | tuple):
            raise InputError(f"{self.where}: {name} must be a list, not {shown(value)}")
        kinds = (int, float) if kind is float else (kind,)
        for entry in value:
            if not isinstance(entry, kinds) or (kind is not bool and isinstance(entry, bool)):
                raise InputError(
                    f"{self.where}: {name} must hold {kind.__name__} values, not {shown(entry)}"
                )
        return tuple(value)

    def _of_kind(self, name: str, kind: type, words: str, default: Any) -> Any:
        value = self._value(name, default)
        if value is not default and not isinstance(value, kind):
            raise InputError(f"{self.where}: {name} must be {words}, not {shown(value)}")
        return value

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            if default is _ABSENT:
                raise InputError(f"{self.where}: {name} is missing")
            return default
        return value

    def _within(self, name: str, value: Any, low: Any, high: Any) -> Any:
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = (
                f"at least {low}" if high is None
                else f"at most {high}" if low is None
                else f"between {low} and {high}"
            )  # fmt: skip
            raise InputError(f"{self.where}: {name} must be {bounds}, not {shown(value)}")
        return value


@dataclasses.dataclass(frozen=True)
class Fields(CheckedFields):
    """The object of a file, or a part of one."""

    where: str
    fields: Mapping[str, Any]

    def inner(self, name: str) -> Fields | None:
        """Gives the object that a field holds; None where there is none.

        Raises:
          InputError: it is something else.
        """
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {name} must be an object, not {shown(value)}")
        return Fields(f"{self.where}: {name}", value)


def shown(value: Any) -> str:
    """Writes a value as errors quote it: cut short, whatever it is."""
    if isinstance(value, int) and abs(value) > 10**40:  # may be too long to be written at all
        return "an integer of more than 40 digits"
    with contextlib.suppress(Exception):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"a {type(value).__name__}"
