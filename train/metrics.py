"""What a run measures: the bar, metrics.jsonl, TensorBoard events, and a plot of the losses."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm import tqdm

from proxy_jax.errors import InputError
from proxy_jax.jobs import files, processes
from proxy_jax.reading import Fields, parse_json, read_text

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends metrics, one JSON object a step. Steps that a resumed run makes again are replaced.

    Of several processes the first writes.

    Args:
      directory: of the run.
      first: steps already made; later records are dropped.
    """

    def __init__(self, directory: Path, first: int):
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._path = directory / FILE
        kept = [record for record in read_metrics(directory) if record["step"] <= first]
        files.replace(self._path, "".join(map(_line, kept)).encode())
        # Not a SummaryWriter: its thread ends at the first error, and what it is given then waits.
        with self._writing():
            self._file = self._path.open("ab", buffering=0)
            events = directory / "tensorboard"
            events.mkdir(exist_ok=True)
            self._events = EventsWriter(str(events / "events"))
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add_event(first + 1, session_log=log)  # hides what was logged of later steps

    def write(self, step: int, **values: float) -> None:
        """Records values of a step, finite numbers.

        Raises:
          InputError: the disk is full or fails.
        """
        if not self._writes:
            return
        with self._writing():
            self._file.write(_line({"step": step, **values}).encode())
            for name, value in values.items():
                one = summary_pb2.Summary.Value(tag=name, simple_value=value)
                self._add_event(step, summary=summary_pb2.Summary(value=[one]))

    def close(self) -> None:
        """Writes what is left.

        Raises:
          InputError: the disk is full or fails.
        """
        if self._writes:
            with self._writing():
                self._file.close()
                self._events.close()

    def _add_event(self, step: int, **content: Any) -> None:
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._path.parent)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns a disk that is full or fails into an InputError.

    Args:
      directory: of the run.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{directory}: cannot write ({error.strerror}); the same command goes on from the last "
            "checkpoint"
        ) from error


class Progress:
    """Reports the steps of a run one behind: the host reads a step's loss while the next computes.

    Args:
      log: where metrics go.
      first, steps: made already, and in all.
      log_every: steps between two records.
      learning_rate: by step.
      flops: of a step, from its metrics.
      peak: operations a second that the devices can do, for the MFU (model FLOPs utilisation).
    """

    def __init__(
        self,
        log: MetricsLog,
        first: int,
        steps: int,
        log_every: int,
        learning_rate: Callable[[int], float],
        flops: Callable[[dict[str, float]], float],
        peak: float,
    ):
        self._log, self._steps, self._log_every = log, steps, log_every
        self._learning_rate, self._flops, self._peak = learning_rate, flops, peak
        self._waiting: tuple[int, dict[str, jax.Array], np.ndarray] | None = None
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=steps, initial=first, unit="step", disable=not processes.is_first(), smoothing=0.1
        )

    def made(self, step: int, metrics: dict[str, jax.Array], lines: np.ndarray) -> None:
        """Takes the metrics of a step that was started, and reports the step before it.

        Args:
          step: updates made, this one included.
          metrics: of train_step, perhaps not yet computed.
          lines: of the data that the batch was made of.

        Raises:
          InputError: the loss or gradient of the step before is not finite; names that step and its
        lines.
        """
        self.catch_up()
        self._waiting = step, metrics, lines

    def catch_up(self) -> None:
        """Reports the last step, too: before its parameters are saved or measured.

        Raises:
          InputError: its loss or gradient is not finite.
        """
        if self._waiting is None:
            return
        step, metrics, lines = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in metrics.items()}
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            if not math.isfinite(values[name]):
                raise InputError(
                    f"step {step - 1}: {what} is {values[name]}; "
                    f"rows of the batch: lines {lines[lines > 0].tolist()}"
                )
        seconds = time.perf_counter() - self._since
        self._since += seconds
        speed, mfu = values["tokens"] / seconds, self._flops(values) / seconds / self._peak
        if step == self._steps or step % self._log_every == 0:
            values |= {
                "learning_rate": float(self._learning_rate(step - 1)),
                "seconds": seconds,
                "tokens_per_second": speed,
                "mfu": mfu,
            }
            self._log.write(step, **values)
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.0f} tokens/s, MFU {mfu:.0%}")
        self._bar.update()

    def restart_clock(self) -> None:
        """Leaves out of the speed what has been done since the last report."""
        self._since = time.perf_counter()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The records of a run; a half-written last line is left out.

    Raises:
      InputError: names the line that is no record.
    """
    path = directory / FILE
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
        where = f"{path}:{number}"
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise InputError(f"{where}: not a JSON object")
        fields = Fields(where, record)
        fields.integer("step", 0)
        for name in record:
            fields.real(name)
        records.append(record)
    return records


def _line(record: dict[str, float]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def plot_losses(directory: Path) -> None:
    """Draws loss.png: training loss by step, and the held-out loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(directory)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=150)
    files.replace(directory / "loss.png", drawing.getvalue())
    pyplot.close(figure)
