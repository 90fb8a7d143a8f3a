"""The count of a step's operations, against the compiler's own."""

import jax
import numpy as np
import pytest

from proxy_jax.models import decoder
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import MODULES, init_adapter
from proxy_jax.sharding import Placement, make_mesh
from train.flops import step_flops
from train.optimizer import OptimizerConfig, make_optimizer
from train.step import Recipe, new_state, train_step

ROWS, LENGTH = 2, 64
MODEL = config_from_hf(
    {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    }
)


@pytest.mark.parametrize("rank", [0, 2])
def test_against_the_compiler(rank):
    place = Placement(make_mesh({"data": 1}))
    optimizer = make_optimizer(OptimizerConfig(), 1)
    recipe = Recipe(MODEL, optimizer, "float32", "none", place, 1.0 if rank else None)
    params = decoder.init(MODEL, jax.random.key(0))
    trained = init_adapter(params, tuple(MODULES), rank, jax.random.key(1)) if rank else params
    state = new_state(recipe, jax.device_put(trained, place.sharding(())), jax.random.key(2))
    shape = (1, ROWS, LENGTH)
    batch = {name: np.ones(shape, np.int32) for name in ("tokens", "targets", "segments")}
    batch["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    batch["weights"] = np.ones(shape, np.float32)
    counted = train_step.lower(recipe, state, params if rank else None, batch).cost_analysis()
    # The compiled attention computes hidden pairs, too.
    metrics = {"tokens": ROWS * LENGTH, "trained_tokens": ROWS * LENGTH, "pairs": ROWS * LENGTH**2}
    ours = step_flops(MODEL, metrics, lora=rank > 0)
    assert counted is not None
    assert ours == pytest.approx(counted["flops"], rel=0.15)
