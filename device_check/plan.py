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
      title: of its table.
    """

    name: str
    seconds: int
    title: str


# What is worth most comes first: a lease can end at any time.
STAGES = (
    Stage("machine", 40, "The machine"),
    Stage("parity", 80, "Parity with the CPU"),
    Stage("decode", 160, "Decode steps"),
    Stage("torch", 60, "The same trio in an eager torch loop"),
    Stage("prefill", 30, "Prefill and training"),
    Stage("lora", 30, "Prefill and training"),
    Stage("full", 40, "Prefill and training"),
    Stage("kernels", 35, "Where a step's time goes"),
)
