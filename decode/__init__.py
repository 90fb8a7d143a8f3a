"""Decoding: the compiled engine, what keeps it busy, and the programs that use it."""

import proxy_jax as proxy_jax  # from here on Ctrl-C is answered in one word
from decode.requests import Completion, Options
from decode.sampling import Sampling, Truncation
from decode.scheduler import Generator

__all__ = ["Completion", "Generator", "Options", "Sampling", "Truncation"]
