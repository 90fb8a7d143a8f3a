"""train.benchmark: figures of a step, of models that are there and of architectures alone."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from configs.architectures import ARCHITECTURES
from configs.train.defaults import sft
from proxy_jax.errors import InputError
from train import benchmark
from train.timing import random_batch


def config_for(directory, **fields):
    config = sft()
    config.base = "tiny"
    config.output_dir = str(directory)
    config.batch_size, config.max_length, config.compute_dtype = 2, 8, "float32"
    config.benchmark.steps = 2
    config.benchmark.remat = ()
    for name, value in fields.items():
        *parents, last = name.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    return config


def rows_of(directory):
    return json.loads((Path(directory) / "benchmark.json").read_text())["rows"]


def test_an_architecture_alone(tmp_path, capsys, monkeypatch):
    """Nothing is read, and the step is the one that torch's model of that shape would need."""
    monkeypatch.setattr(benchmark, "peak_flops", lambda dtype: 1.0)
    config = config_for(tmp_path, benchmark__ranks=(0, 4), benchmark__remat=("none", "full"))
    benchmark.main(config)
    full, lora = rows_of(tmp_path)
    assert (full["rank"], lora["rank"]) == (0, 4)
    assert len(full["seconds"]) == 2
    assert full["tokens_per_second"] == pytest.approx(16 / statistics.median(full["seconds"]))
    assert set(full["temporary_bytes"]) == {"none", "full"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES["tiny"]))
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "embed" not in name
    )
    assert "16 tokens" in capsys.readouterr().out
    # A weight and token take 6 operations, 4 if it is frozen; a pair of tokens and head 4 x 16 x 3.
    norms = 2 * 2 * 64
    attention = 3 * 4 * 4 * 16 * 2 * (2 * 8 * 9 // 2)
    for row, times in ((full, 6), (lora, 4)):
        flops = row["mfu"] * statistics.median(row["seconds"])
        assert flops == pytest.approx(times * (matrices + norms) * 16 + attention)


def test_an_architecture_that_the_config_states(tmp_path):
    config = config_for(tmp_path, base="")
    config.architecture = ARCHITECTURES["tiny"] | {"hidden_size": 32}
    benchmark.main(config)
    assert [row["by"] for row in rows_of(tmp_path)] == ["proxy_jax"]


def test_rows_are_full():
    batch = random_batch(3, 5, 11)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (3, 5))
    np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
    assert batch["tokens"].max() < 11
    assert (batch["weights"] == 1).all()
    assert (batch["segments"] == 1).all()
    np.testing.assert_array_equal(batch["positions"], [range(5)] * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__path": "rows.jsonl"}, "data.path is set, but tiny is an architecture"),
        ({"output_dir": ""}, "output_dir is empty: where do the figures go"),
        ({"architecture": ARCHITECTURES["tiny"]}, "both are set"),
        ({"base": ""}, "neither is set"),
    ],
)
def test_what_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        benchmark.main(config_for(tmp_path, **fields))
