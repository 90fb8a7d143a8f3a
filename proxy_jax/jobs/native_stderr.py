"""Passes on what native code writes to stderr; how JAX ends a job becomes one line.

When a process of a job is lost, or does not come, JAX's coordination service aborts every other
one, with log lines and a C++ stack trace that say it at length. processes.join puts this filter, a
process of its own that outlives the abort, behind file descriptor 2. All else passes unchanged.
"""

from __future__ import annotations

import re
import signal
import sys

LOST = "error: another process of the job is gone"
AGAIN = "its own output may say why; run the same command on all of them again to go on"
_APART = (
    "error: the processes of the job did not meet in time: were all of them started, and do they "
    "reach process 0 at the address they were given?"
)

# Log lines of the coordination service, its clients, and the watch for preemptions.
_NOTICE = re.compile(
    rb"[WEF]\d{4} [\d:.]+ +\d+ "
    rb"(coordination_service\w*|preemption_sync_manager|client)\.(cc|h):\d+\] "
)
_DEATH = b"Terminating process because the JAX distributed service detected fatal errors"
_NOT_MET = b"CoordinationService/RegisterTask"
_SILENT = re.compile(rb"unhealthy \(stopped sending heartbeats\):\s*(\d+(?:\s+\d+)*)\s")
_FIRST = b"Failed to send RPC to coordination service"


def main() -> None:
    """Copies stdin to stderr until it ends."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)  # it ends with the process that writes
    for line in sys.stdin.buffer:
        if _NOTICE.match(line) or line.startswith(LOST.encode()):
            words = line + sys.stdin.buffer.read()
            last = _in_one_line(words)
            # On a line of its own: whoever was ended could not end that of its progress bar.
            sys.stderr.buffer.write(words if last is None else b"\n" + last)
            return
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def _in_one_line(words: bytes) -> bytes | None:
    """What the last words of a process mean; None if it was not JAX that ended it."""
    ended = _DEATH in words
    if ended and _NOT_MET in words:
        return f"{_APART}\n".encode()
    if ended and (silent := _SILENT.search(words)):
        numbers = ", ".join(silent[1].decode().split())
        return f"{LOST} (process {numbers} stopped answering); {AGAIN}\n".encode()
    if ended and _FIRST in words:
        return f"{LOST} (process 0, through which all of them meet); {AGAIN}\n".encode()
    for line in words.splitlines(keepends=True):
        if line.startswith(LOST.encode()):
            return line
    return f"{LOST}; {AGAIN}\n".encode() if ended else None


if __name__ == "__main__":
    main()
