"""What a program says that is interrupted before it has begun.

Importing JAX and its companions takes seconds. Whoever presses Ctrl-C in them is answered as later
(launch.py), with one word, and not with the place where an import happened to be.
"""

from __future__ import annotations

import sys
from types import TracebackType


def answer_interrupts() -> None:
    """Has a KeyboardInterrupt that nobody catches end in one word; a shell sees status 130."""
    sys.excepthook = _last_words


def _last_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
