"""The training step compiled for a TPU slice that is not there."""

import importlib.util

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.train.defaults import sft
from proxy_jax.topology import tpu_devices
from train.compile_check import architecture, batch_shapes, check, state_shapes
from train.job import (
    held_parts,
    initial_state,
    make_recipe,
    micro_batches,
    training_placement,
)
from train.start import Start

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu, the compiler, is not installed", allow_module_level=True)

LAYERS, WIDTH, INNER, VOCABULARY = 6, 512, 1408, 8192


def job(**sizes: int) -> ConfigDict:
    config = sft()
    fields = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config.architecture = ConfigDict(fields | sizes)
    config.batch_size = 16
    config.accumulate = 2
    config.max_length = 512
    config.remat = "full"
    config.mesh.fsdp = 4
    return config


def test_the_step():
    config = job()
    model = architecture(config)
    place = training_placement(config, model, tpu_devices("v5e:2x2"))
    report = check(config, make_recipe(config, model, 10, place))
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER
    parameters = LAYERS * layer + 2 * VOCABULARY * WIDTH
    # Parameters and two moments in float32, a quarter on each device; norms are on all.
    norms = (2 * LAYERS + 1) * WIDTH
    counters = 2 * 4
    assert report.state == 3 * 4 * (parameters // 4 + norms) + counters
    assert report.memory.temporary < 2 * report.state
    # With fsdp a layer's weights are gathered, forward and backward.
    assert len(report.layers) >= 2
    for found in report.layers:
        assert any("all-gather" in one.kind for one in found)
    sums = [one for one in report.transfers if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.size for one in sums) >= 4 * parameters // 4  # gradients


@pytest.mark.parametrize("rank", [0, 4])
def test_shapes_are_those_of_a_real_start(rank):
    """What is compiled is what train.sft runs: same trees, shapes, dtypes and shardings."""
    config = job(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.mesh.fsdp = 2
    config.mesh.data = 2
    config.layers = "scanned"
    config.lora.rank = rank
    config.compute_dtype = "float32"  # that of random weights
    model = architecture(config)
    place = training_placement(config, model)
    recipe = make_recipe(config, model, 10, place)
    real = initial_state(config, recipe, Start(model, None))
    shapes = state_shapes(config, recipe)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.shard_shape(x.shape)), tree)

    assert described(shapes) == described(real)
    rows = {
        name: np.zeros((config.batch_size, config.max_length), x.dtype)
        for name, x in batch_shapes(config, recipe).items()
    }
    assert described(batch_shapes(config, recipe)) == described(micro_batches(config, place, rows))


def test_a_process_holds_parts_that_do_not_lie_side_by_side():
    """Four hosts of 2 x 2 chips each in a ring of sixteen."""
    config = job()
    config.mesh.fsdp = 16
    config.batch_size = 32
    place = training_placement(config, architecture(config), tpu_devices("v5e:4x4"))
    held = [held_parts(place, host) for host in range(4)]
    assert sorted(sum(held, ())) == list(range(16))
    assert {len(parts) for parts in held} == {4}
    assert any(parts != tuple(range(parts[0], parts[0] + 4)) for parts in held)


def test_micro_batches_take_rows_of_every_part():
    config = job()  # two micro-batches of 8 rows, over four devices
    place = training_placement(config, architecture(config))
    numbers = np.arange(16, dtype=np.int32)[:, None] * np.ones(3, np.int32)
    [array] = micro_batches(config, place, {"tokens": numbers}).values()
    assert array.shape == (2, 8, 3)
    for shard in array.addressable_shards:
        part = (shard.index[1].start or 0) // 2
        assert shard.data[:, :, 0].tolist() == (4 * part + np.arange(4).reshape(2, 2)).tolist()
