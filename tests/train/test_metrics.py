"""metrics.jsonl: what is recorded, and files that hold something else."""

import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from proxy_jax.errors import InputError
from train import metrics as module
from train.metrics import FILE, MetricsLog, Progress, read_metrics
from train.sft import held_out_metrics


def test_a_resumed_run_replaces_later_records(tmp_path):
    (tmp_path / FILE).write_text("".join(f'{{"step": {s}, "loss": 1.5}}\n' for s in (1, 2, 3)))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # half-written
    log = MetricsLog(tmp_path, 2)
    log.write(3, loss=0.25)
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": 1.5},
        {"step": 3, "loss": 0.25},
    ]


def events_of(file):
    """Events as TensorBoard reads them: length, check sum, content, check sum."""
    data = file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_events_for_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, 2)
    log.write(3, loss=0.25, mfu=0.5)
    log.close()
    ((file),) = (tmp_path / "tensorboard").iterdir()
    version, start, *scalars = events_of(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (3, event_pb2.SessionLog.START)
    found = [(e.step, v.tag, v.simple_value) for e in scalars for v in e.summary.value]
    assert found == [(3, "loss", 0.25), (3, "mfu", 0.5)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"3", ":2: not a JSON object"),
        (b"{", ":2: not JSON"),
        (b'{"loss": 1.0}', ":2: step is missing"),
        (b'{"step": "2"}', ":2: step must be an integer"),
        (b'{"step": -1}', ":2: step must be at least 0"),
        (b'{"step": 2, "loss": "low"}', ":2: loss must be a number"),
        (b'{"step": 2, "loss": NaN}', ":2: loss must be finite"),
        (b"\0\0\0\0", ":2: not JSON"),
        (b"\xff", ": not UTF-8"),
        (b"[" * 100_000, ":2: not JSON"),
    ],
)
def test_files_that_are_no_metrics(tmp_path, line, message):
    (tmp_path / FILE).write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        MetricsLog(tmp_path, 2)
    assert str(error.value).startswith(f"{tmp_path / FILE}{message}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_disk_is_one_line(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(InputError, match=r"cannot write \(No space left on device\); the same"):
        log.write(1, loss=1.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss", math.nan, r"step 6: the loss is nan; rows of the batch: lines \[3, 5\]"),
        ("grad_norm", math.inf, r"step 6: the norm of the gradient is inf; rows of .* \[3, 5\]"),
    ],
)
def test_what_is_not_finite_ends_the_run(tmp_path, name, value, message):
    log = MetricsLog(tmp_path, 0)
    progress = Progress(log, 6, 9, 1, lambda step: 0.0, lambda values: 1.0, 1.0)
    values = {"loss": 1.0, "grad_norm": 1.0, "tokens": 4.0, name: value}
    progress.made(7, {key: jnp.float32(x) for key, x in values.items()}, np.asarray([0, 3, 5]))
    with pytest.raises(InputError, match=message):
        progress.catch_up()
    progress.close()
    log.close()
    assert not (tmp_path / FILE).read_text()


def test_a_perplexity_that_no_number_holds_is_not_recorded():
    assert held_out_metrics(1, 2.0) == {"held_out_loss": 2.0, "held_out_perplexity": math.exp(2.0)}
    assert held_out_metrics(1, 1e4) == {"held_out_loss": 1e4}
    for loss in (math.nan, math.inf):
        with pytest.raises(InputError, match="step 3: the loss on the held-out rows is"):
            held_out_metrics(3, loss)


def test_the_plot_is_drawn_whole(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"step": 1, "loss": 1.5}) + "\n")
    module.plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
