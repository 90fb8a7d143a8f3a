"""The stages: in which order, within how many seconds, and which files they leave."""

from __future__ import annotations

import dataclasses

FIGURES = "figures.jsonl"  # a line as soon as a figure is there


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process of the check.

    Attributes:
      name: of the figures it writes.
      seconds: it may take; what it leaves over is the next ones'.
    """

    name: str
    seconds: int


# What is worth most comes first: a lease can end at any time.
STAGES = (
    Stage("machine", 40),
    Stage("parity", 80),
    Stage("decode", 160),
    Stage("torch", 60),
    Stage("prefill", 30),
    Stage("lora", 30),
    Stage("full", 40),
    Stage("kernels", 35),
)
