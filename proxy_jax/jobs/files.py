"""Files that survive a kill: replaced as a whole, or grown by one writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from proxy_jax.errors import InputError


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that a kill at any instant leaves the old one or the new one.

    Raises:
      InputError: the disk is full or fails.
    """
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror})") from error


def make_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Makes a directory that is there only when it is whole and on disk.

    Args:
      path: must not exist.
      write: fills the directory that it is given, which is renamed then.

    Raises:
      OSError: the disk is full or fails; and what write raises.
    """
    new = _beside(path)
    if new.exists():  # of a process that was killed
        shutil.rmtree(new)
    new.mkdir(parents=True)
    try:
        write(new)
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def lock(file: IO[bytes], where: Path, in_use: str) -> None:
    """Takes a file for this process alone, until it is closed.

    Args:
      file: open.
      where: what errors name.
      in_use: what they say of a file that another process has.

    Raises:
      InputError: another process has it, or its file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = in_use if isinstance(error, BlockingIOError) else error.strerror
        raise InputError(f"{where}: {reason}") from error


class AppendedFile:
    """A file that grows, held by its writer alone. What was synced survives the process.

    Args:
      path: its directory is created if need be.
      write: False only reads.

    Raises:
      InputError: a directory or file that cannot be opened, or that another process is writing.
    """

    def __init__(self, path: Path, *, write: bool = True):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b" if write else "rb", buffering=0)
        except OSError as error:
            raise InputError(f"{path.parent}: {error.strerror}") from error
        if write:
            try:
                lock(self._file, path, "another process is writing it")
            except InputError:
                self.close()
                raise

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.path.stat().st_size

    def read(self) -> bytes:
        """All of it."""
        self._file.seek(0)
        return self._file.read()

    def append(self, data: bytes) -> None:
        """Writes more at the end.

        Raises:
          InputError: the disk is full or fails; what was synced is kept.
        """
        rest = memoryview(data)
        with self._writing():
            while rest:  # an unbuffered file may take a part
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Has what was appended reach the disk.

        Raises:
          InputError: as in `append`.
        """
        with self._writing():
            os.fsync(self._file.fileno())

    def truncate(self, size: int) -> None:
        """Cuts off what is behind so many bytes."""
        with self._writing():
            self._file.truncate(size)

    def close(self) -> None:
        """Lets go of the file and its lock."""
        self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot write ({error.strerror}); what was done is kept, run the "
                "same command again to go on"
            ) from error


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".new")
