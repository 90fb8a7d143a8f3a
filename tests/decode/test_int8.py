"""Decoding with 8-bit weights, against torch models whose linear layers multiply integers."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch

from decode import memory
from proxy_jax.errors import InputError
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import load_trio
from tests.decode.test_shared import lora  # noqa: F401  the fixture
from tests.trios import PROMPTS, STEPS, complete


class Linear8(torch.nn.Module):
    """A linear layer of integers: a scale for each output, and one for each token."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.abs().amax(dim=1) / 127
        self.whole = torch.round(layer.weight / self.scale[:, None]).to(torch.int64)
        self.bias = layer.bias

    def forward(self, x):
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        total = torch.round(x / scale).to(torch.int64) @ self.whole.T
        out = total.to(torch.float32) * (scale * self.scale)
        return out if self.bias is None else out + self.bias


def with_integers(model):
    """A copy of a torch model; adapters keep their matrices, and a tied head its weight."""
    model = copy.deepcopy(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, layer in list(model.named_modules()):
        kept = "lora_" in name or (tied and layer is model.get_output_embeddings())
        if isinstance(layer, torch.nn.Linear) and not kept:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Linear8(layer))
    return model


def integers(trio, **models):
    models = {role: with_integers(model) for role, model in (trio.models | models).items()}
    return dataclasses.replace(trio, models=models)


def specs(trio, **adapters):
    return {
        role: dataclasses.replace(trio.spec(role), quantize="int8", **adapters.get(role, {}))
        for role in trio.models
    }


@pytest.fixture(scope="module")
def answers(llama):
    reference = integers(llama)
    return [reference.greedy(reference.ids(prompt), STEPS) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("plan", "stacked_layers"), [("separate", False), ("stacked", True)], ids=str
)
def test_plans_and_scanned_layers(llama, expected, answers, plan, stacked_layers):
    loaded = load_trio(**specs(llama), plan=plan, stacked_layers=stacked_layers)
    for name in ("q", "o"):
        layers = loaded.params[0]["layers"]
        leaf = (layers if stacked_layers else layers[0])["attention"][name]
        assert leaf.values.dtype == np.int8
    assert complete(loaded) == answers
    assert answers != expected, "rounding is seen"


def test_on_eight_devices(llama, answers):
    """Each device has whole scales, and its part of the integers."""
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    loaded = load_trio(**specs(llama), place=place)
    alone = load_trio(**specs(llama))
    for ours, whole in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(alone.params), strict=True
    ):
        np.testing.assert_array_equal(ours, whole)
    down = loaded.params[0]["layers"][0]["mlp"]["down"].values
    assert {part.data.size * 4 for part in down.addressable_shards} == {down.size}
    assert complete(loaded) == answers


@pytest.mark.parametrize("plan", ["separate", "shared"])
def test_an_adapter_on_integers(llama, lora, plan):  # noqa: F811
    adapter, _, expert = lora
    reference = integers(llama, expert=expert)
    answers = [reference.greedy(reference.ids(prompt), STEPS) for prompt in PROMPTS]
    both = specs(llama)
    tuned = dataclasses.replace(
        both["antiexpert"], template=llama.templates["expert"], adapter=adapter
    )
    assert complete(load_trio(**(both | {"expert": tuned}), plan=plan)) == answers


def test_other_families_and_a_tied_head(mixed):
    reference = integers(mixed)
    answers = [reference.greedy(reference.ids(prompt), STEPS) for prompt in PROMPTS]
    assert complete(load_trio(**specs(mixed)), alpha=1.0) == answers


def test_identities(llama):
    """alpha = 0 is M, and so is M- = M+; by the recorded logits' differences, bit for bit."""
    both = specs(llama)
    base = complete(load_trio(both["base"]))
    assert complete(load_trio(**both), alpha=0.0) == base
    same = both | {"expert": both["antiexpert"]}
    assert complete(load_trio(**same), alpha=3.0) == base


def test_memory(llama):
    """What the estimate says is what the weights take."""
    loaded = load_trio(**specs(llama))
    for one, params in zip(loaded.passes, loaded.params, strict=True):
        assert memory.weight_bytes(one, loaded.place) == sum(
            leaf.nbytes for leaf in jax.tree.leaves(params)
        )
    whole = memory.weight_bytes(dataclasses.replace(loaded.passes[0], quantize=""), loaded.place)
    assert memory.weight_bytes(loaded.passes[0], loaded.place) < whole


def test_what_is_refused(llama):
    with pytest.raises(InputError, match="base: quantize 'int4' is unknown"):
        load_trio(dataclasses.replace(llama.spec("base"), quantize="int4"))
    mixed = specs(llama) | {"expert": llama.spec("expert")}
    with pytest.raises(InputError, match="of one shape and dtype"):
        load_trio(**mixed, plan="stacked")
