"""Runs generated code: each program in a process of its own, with limits, several at a time.

A program has passed when it came to its end; leaving early is no pass. It runs in an empty
directory that is deleted, with an empty environment and no input. sandbox.py, which runs in that
process, says how files and network are kept away; where the kernel offers nothing, a hook in
Python does, and `isolation` tells. Time counts from when the program starts, not the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from proxy_jax.errors import InputError
from proxy_jax.reading import parse_json, reading

_SANDBOX = Path(__file__).with_name("sandbox.py")
_STARTUP_SECONDS = 60.0  # for the interpreter to start on a busy machine
_OUTPUT_BYTES = 4096
_MESSAGE_BYTES = 1 << 16
_SHOWN = 300  # characters of what a sandbox says that does not start


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      seconds: wall-clock time; twice that of processor time, and some for the start.
      memory_bytes: address space.
      file_bytes: size of each file it writes, its printed output among them.
    """

    seconds: float = 3.0
    memory_bytes: int = 4 << 30
    file_bytes: int = 64 << 20


@dataclasses.dataclass(frozen=True)
class Isolation:
    """What keeps a program from things; "audit hook" is Python's own and can be got around.

    Attributes:
      files: "landlock" or "audit hook": it writes nowhere but in its directory.
      network: "namespace", without interfaces, and with it all that a program started ends;
        "landlock", no TCP, and the hook; or "audit hook".
      processes: "seccomp": it starts none, and connects to no UNIX socket; or "audit hook".
      memory: "rlimit", or "none" where the system has no such limit.
    """

    files: str
    network: str
    processes: str
    memory: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      result: "passed", "timed out", or "failed: " and why.
      output: the end of what it printed.
      isolation: None if it did not start.
    """

    result: str
    output: str = ""
    isolation: Isolation | None = None

    @property
    def passed(self) -> bool:
        """Whether it came to its end."""
        return self.result == "passed"


def run_programs(
    programs: Sequence[str], limits: Sequence[Limits] | Limits, workers: int | None = None
) -> list[Outcome]:
    """Runs programs; outcomes are in their order.

    Args:
      limits: of each program, or of all.
      workers: how many run at a time; by default as many as there are processors.
    """
    each = [limits] * len(programs) if isinstance(limits, Limits) else limits
    with ThreadPoolExecutor(workers or _processors()) as pool:
        return list(pool.map(run_program, programs, each))


def isolation() -> Isolation:
    """Says how programs are isolated on this machine.

    Raises:
      InputError: not even an empty program runs.
    """
    isolated = run_program("", Limits(seconds=_STARTUP_SECONDS)).isolation
    assert isolated is not None
    return isolated


def run_program(program: str, limits: Limits) -> Outcome:
    """Runs one program, and kills whatever it leaves behind.

    Raises:
      InputError: nothing can be run here, whatever the program: a full disk, no memory, an
        interpreter that does not start.
    """
    with contextlib.ExitStack() as stack:
        with reading("the directory of temporary files"):
            directory = stack.enter_context(_own_directory())
            output = stack.enter_context(tempfile.TemporaryFile())
        process, pipe = _start(directory, output)
        with process, os.fdopen(pipe, "rb", buffering=0) as messages:
            try:
                isolated, result = _follow(process, _Messages(messages), program, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if isolated is None:
            said = " ".join(_end_of(output).split())[-_SHOWN:] or f"status {status}"
            raise InputError(f"{sys.executable}: the sandbox does not start ({said})")
        return Outcome(
            result or f"failed: it ended with status {status}", _end_of(output), isolated
        )


def _start(directory: str, output: IO[bytes]) -> tuple[subprocess.Popen[bytes], int]:
    """Starts the sandbox; returns it and the descriptor that its messages are read from."""
    with reading(sys.executable):
        receiving, sending = os.pipe()
        try:
            process = subprocess.Popen(
                # -P and -s: neither this directory nor the user's packages on its path.
                [sys.executable, "-P", "-s", str(_SANDBOX), str(sending)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=_environment(directory),
                pass_fds=(sending,),
                start_new_session=True,
            )
        except BaseException:
            os.close(receiving)
            raise
        finally:
            os.close(sending)
    return process, receiving


def _follow(
    process: subprocess.Popen[bytes], messages: _Messages, program: str, limits: Limits
) -> tuple[Isolation | None, str | None]:
    """Its isolation, None if it did not start, and result, None where it did not say."""
    secret = secrets.token_hex()  # so that the program cannot by accident say that it passed
    job = dataclasses.asdict(limits) | {"program": program, "secret": secret}
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(job).encode())
    first = messages.next(_STARTUP_SECONDS)
    if not first:
        return None, None
    isolated = Isolation(**first)
    last = messages.next(limits.seconds)
    if last is None:
        return isolated, "timed out" if messages.timed_out else None
    if last.get("secret") != secret or not isinstance(last["result"], str):
        return isolated, "failed: it wrote where only the sandbox writes"
    return isolated, last["result"]


class _Messages:
    """JSON lines from a pipe, each with a deadline.

    Attributes:
      timed_out: the deadline passed; otherwise the pipe was closed.
    """

    def __init__(self, pipe: IO[bytes]):
        self._pipe, self._rest = pipe, b""
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)
        self.timed_out = False

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Reads the next line; gives None at the end or when it takes too long.

        What is no message, or too long for one, is an empty message: the program wrote it.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                self.timed_out = True
                return None
            if not (more := self._pipe.read(65536)):
                return None
            self._rest += more
            if len(self._rest) > _MESSAGE_BYTES:
                return {}
        line, _, self._rest = self._rest.partition(b"\n")
        with contextlib.suppress(InputError):
            message = parse_json(line, "message")
            return message if isinstance(message, dict) else {}
        return {}


@contextlib.contextmanager
def _own_directory() -> Iterator[str]:
    """Makes an empty directory, and removes it with all that a program left in it."""
    directory = tempfile.mkdtemp()
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            _remove(directory)


def _remove(directory: str) -> None:
    """Removes a directory however deep it is, and whatever rights were taken from its parts.

    What lies in a part moves up before that is removed, so that no path grows long.
    """
    names = iter(secrets.token_hex, "")
    while os.path.exists(directory):
        os.chmod(directory, stat.S_IRWXU)
        with os.scandir(directory) as entries:
            parts = list(entries)
        for part in parts:
            if not part.is_dir(follow_symlinks=False):
                os.unlink(part.path)
                continue
            os.chmod(part.path, stat.S_IRWXU)
            with os.scandir(part.path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, stat.S_IRWXU)
                        os.rename(entry.path, os.path.join(directory, next(names)))
                    else:
                        os.unlink(entry.path)
            os.rmdir(part.path)
        if not parts:
            os.rmdir(directory)


def _environment(directory: str) -> dict[str, str]:
    """Nothing of this process's environment, which may hold keys, but where libraries are."""
    one = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # one processor each
    kept = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH")}
    return {
        "PATH": os.defpath,
        "HOME": directory,
        "TMPDIR": directory,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLBACKEND": "Agg",
        **dict.fromkeys(one, "1"),
        **{name: value for name, value in kept.items() if value},
    }


def _end_of(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _OUTPUT_BYTES))
    return output.read().decode(errors="replace")


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
