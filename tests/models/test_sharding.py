"""The mesh and the rules: what they give, and the errors of those that do not fit."""

from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig, Rope
from proxy_jax.sharding import LOCAL, Placement, ShardingRules, make_mesh

SIZES: dict[str, Any] = {
    "vocab_size": 10,
    "model_dim": 6,
    "mlp_dim": 14,
    "num_heads": 4,
    "num_kv_heads": 2,
}


def config(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=1,
        head_dim=2,
        max_positions=8,
        norm_eps=1e-6,
        ropes=(Rope(),),
        layer_ropes=(0,),
        layer_windows=(None,),
        query_scale=1.0,
        **(SIZES | sizes),
    )


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({}, (1, 1, 1)),
        ({"tensor": 8}, (1, 1, 8)),
        ({"data": -1, "tensor": 2}, (4, 1, 2)),
        ({"data": 2, "fsdp": 2}, (2, 2, 1)),  # half of the devices
    ],
)
def test_mesh_sizes(shape, sizes):
    mesh = make_mesh(shape)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert set(mesh.devices.flat) <= set(jax.devices())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 2}, "mesh axis 'model' is unknown"),
        ({"data": 4, "tensor": 4}, "data=4 x fsdp=1 x tensor=4 does not fit the 8 cpu devices"),
        ({"data": -1, "tensor": 3}, "data=-1 x fsdp=1 x tensor=3 does not fit"),
        ({"data": -1, "tensor": -1}, "data=-1 x fsdp=1 x tensor=-1 does not fit"),
        ({"data": 0}, "data=0 x"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(InputError, match=message):
        make_mesh(shape)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model_dim": 7}, r"expert: model width \(7\) .* 2 devices of mesh axis 'fsdp'"),
        ({"num_heads": 9}, r"expert: query heads \(9\) .* 2 devices of mesh axis 'tensor'"),
        ({"num_kv_heads": 1}, r"expert: kv heads \(1\) .* replicate .kv_heads."),
        ({"mlp_dim": 15}, r"expert: mlp width \(15\)"),
        ({"vocab_size": 11}, r"expert: vocabulary \(11\)"),
    ],
)
def test_sizes_that_the_mesh_does_not_divide_are_refused(sizes, message):
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    place.check(config(), "expert")
    with pytest.raises(InputError, match=message):
        place.check(config(**sizes), "expert")
    replicated = {"embed": None, "act_embed": None, "heads": None, "kv_heads": None}
    rules = ShardingRules(**replicated, mlp=None, vocab=None)
    Placement(place.mesh, rules).check(config(**sizes), "expert")
    LOCAL.check(config(**sizes), "expert")


def test_rules_give_mesh_axes():
    rules = ShardingRules(vocab=("fsdp", "tensor"), embed=None)
    assert rules.spec(("vocab", "embed")) == PartitionSpec(("fsdp", "tensor"), None)
    assert rules.spec((None, "heads")) == PartitionSpec(None, "tensor")
    place = Placement(make_mesh({"fsdp": 2, "tensor": 4}), rules)
    assert (place.split("vocab"), place.split("heads"), place.split("embed")) == (8, 4, 1)
    with pytest.raises(InputError, match="two dimensions of"):
        rules.spec(("vocab", "heads"))
