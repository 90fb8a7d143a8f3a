"""The table from logical axes to mesh axes, and its errors."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from proxy_jax.errors import InputError
from proxy_jax.models.config import ModelConfig, Rope
from proxy_jax.sharding import LOCAL, Placement, ShardingRules, make_mesh

CONFIG = ModelConfig(
    family="llama",
    vocab_size=96,
    num_layers=2,
    model_dim=32,
    mlp_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    norm_eps=1e-5,
    ropes=(Rope(),),
    layer_ropes=(0, 0),
    layer_windows=(None, None),
    query_scale=0.35,
)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"tensor": -1}, (1, 1, 8)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 1}, (1, 1, 1)),
        ({"tensor": 3}, (1, 1, 3)),  # fewer than all devices
    ],
)
def test_mesh(shape, sizes):
    mesh = make_mesh(shape)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert mesh.devices.flatten().tolist() == jax.devices()[: mesh.size]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 2}, "mesh axis 'model' is unknown"),
        ({"data": 16}, "mesh data=16 x fsdp=1 x tensor=1 does not fit the 8 cpu devices"),
        ({"data": 3, "fsdp": -1}, "mesh data=3 x fsdp=-1 x tensor=1 does not fit"),
        ({"data": -1, "fsdp": -1}, "does not fit"),
        ({"data": 0}, "does not fit"),
    ],
)
def test_mesh_errors(shape, message):
    with pytest.raises(InputError, match=message):
        make_mesh(shape)


def test_specs_and_parts():
    place = Placement(make_mesh({"data": 2, "fsdp": 4}), ShardingRules(mlp=("data", "fsdp")))
    assert place.rules.spec(("batch", None, "vocab")) == P("data", None, "tensor")
    assert place.rules.spec(("embed", "heads", None)) == P("fsdp", "tensor", None)
    assert [place.split(axis) for axis in ("batch", "embed", "mlp", "heads")] == [2, 4, 8, 1]
    assert LOCAL.split("batch") == 1
    with pytest.raises(InputError, match="two dimensions of"):
        place.rules.spec(("embed", "mlp"))


def test_arrays_lie_where_the_table_says():
    place = Placement(make_mesh({"data": 2, "tensor": 4}))
    put = jax.jit(lambda x: place.constrain(x, ("batch", "vocab")))
    made = put(jax.numpy.ones((4, 16)))
    assert {shard.data.shape for shard in made.addressable_shards} == {(2, 4)}
    x = jax.numpy.ones(3)
    assert LOCAL.constrain(x, ("vocab",)) is x


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ({"fsdp": 5}, {}, r"M: model width \(32\) does not divide by the 5 devices of mesh axis"),
        (
            {"tensor": 4},
            {},
            r"M: kv heads \(2\) .* 4 devices of mesh axis 'tensor'; .*replicate 'kv_h",
        ),
        ({"tensor": 8}, {"kv_heads": None}, r"M: query heads \(4\) .* 'tensor'"),
        ({"tensor": 5}, {"kv_heads": None, "heads": None}, r"M: mlp width \(48\)"),
        ({"data": 7}, {"vocab": "data"}, r"M: vocabulary \(96\) .* 7 devices of mesh axis 'data'"),
    ],
)
def test_sizes_that_do_not_divide(mesh, rules, message):
    with pytest.raises(InputError, match=message):
        Placement(make_mesh(mesh), ShardingRules(**rules)).check(CONFIG, "M")


def test_sizes_that_divide():
    Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})).check(CONFIG, "M")
    Placement(make_mesh({"tensor": 4}), ShardingRules(kv_heads=None)).check(CONFIG, "M")
    LOCAL.check(CONFIG, "M")
