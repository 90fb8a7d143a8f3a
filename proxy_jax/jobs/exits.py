"""How a program ends for what its user got wrong: one line, and an exit status that says so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax

from proxy_jax.errors import InputError
from proxy_jax.jobs import processes

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; the second is a shell's for SIGINT


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program for an InputError: one line on stderr, status 2, no traceback."""
    try:
        yield
    except InputError as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Ends the program: the error in one line, whatever a library put into its message."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if jax.distributed.is_initialized():
        processes.leave(BAD_INPUT)
    sys.exit(BAD_INPUT)
