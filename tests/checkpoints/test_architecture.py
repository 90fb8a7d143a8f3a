"""Models of an architecture alone: laid out as loaded ones are, and as large as is published."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architectures import ARCHITECTURES
from decode.memory import parameters
from proxy_jax.checkpoints.architecture import Architecture, random_adapter, random_params
from proxy_jax.checkpoints.loading import load_params
from proxy_jax.errors import InputError
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import MODULES
from proxy_jax.models.quantized import Quantized
from proxy_jax.models.turned import Turned
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import ModelSpec, describe_trio, load_trio

ONE = Placement(make_mesh({"data": 1}))
EIGHT = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))

# Parameters in millions, as the models' cards and papers give them.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6738,
    "meta-llama/Llama-2-13b-hf": 13016,
    "meta-llama/Llama-2-70b-hf": 68977,
    "meta-llama/Llama-3.1-8B": 8030,
    "meta-llama/Llama-3.1-70B": 70554,
    "meta-llama/Llama-3.2-1B": 1236,
    "mistralai/Mistral-7B-v0.1": 7242,
    "Qwen/Qwen2.5-0.5B": 494,
    "Qwen/Qwen2.5-1.5B": 1544,
    "Qwen/Qwen2.5-7B": 7616,
    "Qwen/Qwen3-0.6B": 596,
    "Qwen/Qwen3-8B": 8191,
    "google/gemma-2-2b": 2614,
    "google/gemma-3-1b-pt": 1000,
    "allenai/OLMo-2-1124-7B": 7299,
    "HuggingFaceTB/SmolLM2-135M": 135,
    "HuggingFaceTB/SmolLM2-360M": 362,
    "HuggingFaceTB/SmolLM2-1.7B": 1711,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name):
    config = config_from_hf(ARCHITECTURES[name], name)
    assert round(parameters(config) / 1e6) == PUBLISHED[name]


def described(tree):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding.shard_shape(x.shape), x.committed), tree
    )


@pytest.mark.parametrize(
    ("place", "copies", "stacked", "stored"),
    [
        (ONE, 1, False, {}),
        (EIGHT, 1, True, {"turned": True}),
        (EIGHT, 1, False, {"quantize": "int8"}),
        (EIGHT, 2, True, {"quantize": "int8"}),
        (ONE, 2, False, {"turned": True}),
    ],
)
def test_laid_out_as_loaded(build, place, copies, stacked, stored):
    model = build("qwen2")
    how: Any = {"stacked": stacked, **stored}
    checkpoints = [model.checkpoint] * copies
    loaded = load_params(checkpoints, model.config, "bfloat16", place, **how)
    drawn = random_params(model.config, "bfloat16", place, copies=copies, **how)
    assert described(drawn) == described(loaded)


def test_every_weight_is_another_and_of_a_usual_size(build):
    model = build("qwen2")
    drawn = random_params(model.config, "float32", ONE, stacked=True, copies=2)
    layers = drawn["layers"]
    for part, name, inputs in MODULES.values():
        weight = np.asarray(layers[part][name])
        scale = 1 / math.sqrt(math.prod(weight.shape[2 : 2 + inputs]))
        of_each = weight.reshape(2 * model.config.num_layers, -1)
        np.testing.assert_allclose(of_each.std(axis=1), scale, rtol=0.1)
        likeness = np.corrcoef(of_each) - np.eye(len(of_each))
        assert np.abs(likeness).max() < 0.15  # no two are the same numbers
    assert set(np.unique(layers["mlp_norm"])) == {1.0}
    again = random_params(model.config, "float32", ONE, stacked=True, copies=2)
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    other = random_params(model.config, "float32", ONE, stacked=True, copies=2, seed=1)
    assert not np.array_equal(other["embedding"], drawn["embedding"])


def test_stored_otherwise_they_are_the_same_numbers(build):
    config = build("qwen2").config
    plain, turned, int8 = (
        random_params(config, "float32", ONE, stacked=True, **stored)["layers"]["attention"]["o"]
        for stored in ({}, {"turned": True}, {"quantize": "int8"})
    )
    assert isinstance(turned, Turned)
    assert isinstance(int8, Quantized)
    outputs_first = np.moveaxis(np.asarray(plain), -1, 1)  # [L, N, H, D] -> [L, D, N, H]
    np.testing.assert_array_equal(turned.values, outputs_first)
    values = np.asarray(int8.values, np.float32) * np.asarray(int8.scales)[..., None, None]
    step = np.abs(outputs_first).max(axis=(2, 3), keepdims=True) / 127
    assert (np.abs(values - outputs_first) <= step / 2 * 1.001).all()


def specs(**adapters):
    return {
        role: ModelSpec("tiny", "bfloat16", adapter=adapters.get(role, ""))
        for role in ("base", "expert", "antiexpert")
    }


def test_a_trio_with_an_adapter():
    trio = describe_trio(specs(expert="rank=3"), ARCHITECTURES)
    assert trio.is_random
    assert trio.eos_ids() == ()
    trio.check_weights()
    loaded = load_trio(trio, plan="shared", stacked_layers=True)
    adapted = loaded.params[1]["layers"]["mlp"]["down"]
    a, b = jax.tree.leaves(adapted.a) + jax.tree.leaves(adapted.b)
    assert a.size == 2 * 128 * 3
    assert b.size == 2 * 3 * 64
    assert a.dtype == jnp.bfloat16
    assert adapted.first_only
    [layer] = random_adapter(trio.members["base"].config.of_one_layer(), 3)
    change = np.tensordot(layer["mlp"]["down"].a, layer["mlp"]["down"].b, 1)
    assert change.std() == pytest.approx(1 / math.sqrt(128), rel=0.2)


@pytest.mark.parametrize("adapter", ["runs/gsm", "rank=0", "rank=x", "rank=-1", "16"])
def test_an_adapter_that_is_no_rank(adapter):
    trio = describe_trio(specs(expert=adapter), ARCHITECTURES)
    with pytest.raises(InputError, match=f"expert: adapter is '{adapter}', and tiny an archit"):
        trio.check_weights()


def test_what_a_trio_refuses():
    wrong = specs() | {"expert": ModelSpec("tiny", "float8")}
    with pytest.raises(InputError, match="expert: dtype 'float8' is unknown"):
        describe_trio(wrong, ARCHITECTURES)
    with pytest.raises(InputError, match=r"\./no: no such file or directory"):
        describe_trio(specs() | {"expert": ModelSpec("./no")}, ARCHITECTURES)


def test_there_is_nothing_to_read():
    architecture = describe_trio(specs(), ARCHITECTURES).members["base"].checkpoint
    assert isinstance(architecture, Architecture)
    assert architecture.shape("lm_head.weight") == (512, 64)
    with pytest.raises(InputError, match="tiny: an architecture, which has no weights"):
        architecture.read("lm_head.weight", (slice(None), slice(None)))
    with pytest.raises(InputError, match="tiny: an architecture, which has no tokenizer"):
        architecture.tokenizer()
