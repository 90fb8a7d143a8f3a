"""One stage of the check, in a process of its own: python -m device_check.stage NAME SIZES DIR."""

from __future__ import annotations

import os
import sys

if sys.argv[1:2] != ["torch"]:
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would spend seconds on it

from collections.abc import Callable
from pathlib import Path

import jax

from device_check import decoding, eager, figures, kernels, machine, parity, training
from device_check.figures import Record
from device_check.plan import FIGURES
from device_check.sizes import SIZES, Sizes
from proxy_jax.errors import InputError
from proxy_jax.jobs.exits import one_line_errors

RUNS: dict[str, Callable[[Sizes, Record, Path], None]] = {
    "machine": lambda sizes, record, _: machine.run(sizes, record),
    "parity": lambda sizes, record, _: parity.run(sizes, record),
    "decode": lambda sizes, record, _: decoding.run(sizes, record),
    "torch": lambda sizes, record, _: eager.run(sizes, record),
    "prefill": lambda sizes, record, _: training.prefill(sizes, record),
    "lora": lambda sizes, record, _: training.lora(sizes, record),
    "full": lambda sizes, record, _: training.full(sizes, record),
    "kernels": kernels.run,
}


def main(name: str, sizes: str, directory: Path) -> None:
    """Runs a stage; its figures are added to those in the directory."""
    if sizes == "full" and jax.default_backend() == "cpu":
        raise InputError("no accelerator is here: --sizes=tiny rehearses the check on a CPU")
    RUNS[name](SIZES[sizes], figures.recorder(directory / FIGURES, name), directory)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and freeing a device's memory can take seconds
