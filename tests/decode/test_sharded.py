"""The fused step on eight devices draws the tokens of the torch loop, for every family group."""

from typing import Any

import pytest

from proxy_jax.errors import InputError
from proxy_jax.sharding import Placement, ShardingRules, make_mesh
from tests import trios
from tests.models.families import FAMILIES
from tests.trios import PROMPTS, complete, make_model, write_trio

STEPS = 6
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def family_trio(directory, name):
    """M, and M+ and M- of one smaller shape, with the settings of tests.models.families."""
    model_type, fields = FAMILIES[name]
    small = fields | {"num_hidden_layers": 2}
    if "layer_types" in fields:
        small["layer_types"] = fields["layer_types"][:2]
    return write_trio(
        directory,
        {
            "base": make_model(model_type, 320, 0, hidden_size=48, **small),
            "expert": make_model(model_type, 320, 1, **small),
            "antiexpert": make_model(model_type, 320, 2, **small),
        },
        templates={"expert": "[INST] {prompt} [/INST]"},
    )


@pytest.mark.parametrize(
    ("name", "plan", "stacked_layers"),
    [
        ("llama", "separate", False),
        ("qwen2", "stacked", True),
        ("gemma2", "stacked", False),
        ("gemma3", "separate", True),
        ("olmo2", "stacked", True),
    ],
)
def test_eight_devices(tmp_path, name, plan, stacked_layers):
    trio = family_trio(tmp_path, name)
    place = Placement(make_mesh(MESH))
    loaded = trio.load(plan=plan, place=place, stacked_layers=stacked_layers)
    embedding = loaded.params[0]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(160, 24)}
    answers = [trio.greedy(trio.ids(prompt), STEPS) for prompt in PROMPTS]
    assert complete(loaded, max_new_tokens=STEPS) == answers


def test_sampling_on_eight_devices(llama, loaded):
    fields: dict[str, Any] = {"sampling": trios.sampling(1.2, top_p=0.9), "seed": 4}
    place = Placement(make_mesh({"data": 4, "fsdp": 1, "tensor": 2}))
    assert complete(llama.load(place=place), **fields) == complete(loaded, **fields)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 8}, None),
        (
            {"tensor": 4},
            "base: kv heads (2) does not divide by the 4 devices of mesh axis 'tensor'",
        ),
        ({"data": 8}, "batch_size (4) does not divide by the 8 devices of mesh axis 'data'"),
        (
            {"data": 3, "tensor": 3},
            "mesh data=3 x fsdp=1 x tensor=3 does not fit the 8 cpu devices",
        ),
        ({"model": 2}, "mesh axis 'model' is unknown"),
    ],
)
def test_mesh_that_does_not_divide(llama, mesh, message):
    def run():
        loaded = llama.load(place=Placement(make_mesh(mesh)))
        return complete(loaded, PROMPTS[:1], max_new_tokens=1)

    if message is None:
        assert run() == [llama.greedy(llama.ids(PROMPTS[0]), 1)]
        return
    with pytest.raises(InputError) as error:
        run()
    assert str(error.value).startswith(message)


def test_heads_that_stay_whole(llama, expected):
    """What the message proposes: kv heads are not split over the axis that does not divide them."""
    place = Placement(make_mesh({"tensor": 4}), ShardingRules(kv_heads=None))
    assert complete(llama.load(place=place), PROMPTS[:2]) == expected[:2]
