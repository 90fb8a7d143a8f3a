"""Decoding: the compiled engine, what keeps it busy, and the programs that use it."""

import sys

import last_words

if sys.argv[:1] == ["-m"]:  # python -m decode.PROGRAM, which is about to be imported
    last_words.answer_interrupts()

from decode.requests import Completion, Options
from decode.sampling import Sampling, Truncation
from decode.scheduler import Generator

__all__ = ["Completion", "Generator", "Options", "Sampling", "Truncation"]
