"""What a run measures: metrics.jsonl, TensorBoard events, and a plot of the losses."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends metrics, one JSON object a step. Steps that a resumed run makes again are replaced.

    Args:
      directory: of the run.
      first: steps already made; later records are dropped.
    """

    def __init__(self, directory: Path, first: int):
        path = directory / FILE
        kept = [record for record in read_metrics(directory) if record["step"] <= first]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1)

    def write(self, step: int, **values: float) -> None:
        """Records values of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
        self._events.close()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The records of a run; a half-written last line is left out."""
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
    figure.savefig(directory / "loss.png", dpi=150)
    pyplot.close(figure)
