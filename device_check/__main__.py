"""Runs the check: `python -m device_check`. docs/device_check.md says what it measures."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from device_check import figures, report
from device_check.plan import FIGURES, STAGES, Stage
from proxy_jax.errors import InputError
from proxy_jax.jobs import files
from proxy_jax.jobs.exits import BAD_INPUT, one_line_errors
from proxy_jax.reading import reading

_LOOK = 0.5  # seconds between two looks at a stage
_PATIENCE = 10  # times the seconds, in a rehearsal: it is to end, on however slow a CPU
_ROOT = Path(__file__).parents[1]
JSON, TABLE = "device_check.json", "device_check.md"


def main() -> int:
    """Runs one stage after another; the tables are there after each figure."""
    parser = argparse.ArgumentParser(
        prog="python -m device_check",
        description="Measures what this machine does with random weights, the most valuable "
        f"first: {', '.join(stage.name for stage in STAGES)}. Figures and tables are written as "
        "they are made. Uses one device.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/device_check"),
        help=f"where {JSON}, {TABLE} and a trace go (%(default)s); what it had is replaced",
    )
    parser.add_argument(
        "--sizes",
        choices=("full", "tiny"),
        default="full",
        help="full: Llama-2 13B with two 7B, for a GPU of 80 GB or more; tiny: a rehearsal in a "
        "minute, anywhere (%(default)s)",
    )
    parser.add_argument(
        "--stages",
        default=",".join(stage.name for stage in STAGES),
        help="those to run, with commas between (all)",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        help="a folder of wheels for packages that this machine lacks; installed beside the "
        "output, for this run alone",
    )
    chosen = parser.parse_args()
    names = chosen.stages.split(",")
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--stages: {unknown[0]!r} is not one of {', '.join(known)}")
    directory = chosen.output_dir.expanduser().resolve()
    with reading(f"--output_dir {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    (directory / FIGURES).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        environment = stage_environment(Path(scratch), chosen.wheels)
        deadline = time.monotonic()
        for stage in STAGES:
            if stage.name not in names:
                continue
            deadline += stage.seconds * (_PATIENCE if chosen.sizes == "tiny" else 1)
            status = run(stage, chosen.sizes, directory, deadline, environment)
            if status == BAD_INPUT and stage.name == "machine":
                return status
    print(f"{directory / TABLE}\n{directory / JSON}")
    return 0 if all("ended" not in figure for figure in figures.read(directory / FIGURES)) else 1


def stage_environment(scratch: Path, wheels: Path | None) -> dict[str, str]:
    """What the stages' processes find in their environment."""
    path = [str(_ROOT)]
    if wheels is not None:
        site = scratch / "site"
        found = sorted(str(file) for file in wheels.expanduser().glob("*.whl"))
        if not found:
            raise InputError(f"--wheels: no .whl in {wheels}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        if subprocess.run([*pip, "--target", str(site), *found]).returncode:
            raise InputError(f"--wheels: pip cannot install those in {wheels}, as it says above")
        path.append(str(site))
    given = dict(os.environ)
    defaults = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),  # stages share programs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "HF_HUB_OFFLINE": "1",
    }
    path.append(given.get("PYTHONPATH", ""))
    return {**defaults, **given, "PYTHONPATH": os.pathsep.join(path).strip(os.pathsep)}


def run(
    stage: Stage, sizes: str, directory: Path, deadline: float, environment: Mapping[str, str]
) -> int:
    """Runs a stage until its deadline, and keeps the tables up to date.

    Returns:
      Its exit status.
    """
    path = directory / FIGURES
    print(f"{stage.name}: {max(0.0, deadline - time.monotonic()):.0f} s at most", flush=True)
    started, shown = time.monotonic(), len(figures.read(path))
    command = [sys.executable, "-m", "device_check.stage", stage.name, sizes, str(directory)]
    log = directory / f"{stage.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(_LOOK)
                shown = _show(path, directory, shown)
        finally:
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - started
    ended = ""
    if late:
        ended = f"stopped after {seconds:.0f} s, its time"
    elif process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        ended = lines[-1] if lines else f"exit status {process.returncode}"
        print(f"  {ended} ({log})", file=sys.stderr)
    if ended:
        figures.recorder(path, stage.name)({"ended": ended})
    _show(path, directory, shown)
    print(f"  {seconds:.0f} s", flush=True)
    return process.returncode


def _show(path: Path, directory: Path, shown: int) -> int:
    """Prints the figures that are new, and writes the tables if there are any."""
    done = figures.read(path)
    if len(done) == shown:
        return shown
    for figure in done[shown:]:
        words = [f"{name}={_short(value)}" for name, value in figure.items() if name != "stage"]
        print("  " + " ".join(words), flush=True)
    files.replace(directory / JSON, json.dumps({"figures": done}, indent=1).encode())
    files.replace(directory / TABLE, report.markdown(done).encode())
    return len(done)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
