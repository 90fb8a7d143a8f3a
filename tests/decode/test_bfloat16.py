"""Decoding in bfloat16, against torch in float32 with the same rounded weights."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from proxy_jax.models.turned import Turned
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import load_trio
from tests.decode.test_shared import lora  # noqa: F401  the fixture
from tests.trios import PROMPTS, complete

# Logits are of the order of 10, and their differences; of 8 bits, rounded at every layer.
CLOSE = 0.5


def rounded(model):
    """A copy of a torch model with weights that bfloat16 can hold."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    return model


def check(reference, drawn):
    """Every token is the best one after those before it, or too close to it to tell."""
    combine = reference.shifted(1.0)
    best = total = 0
    for prompt, tokens in zip(PROMPTS, drawn, strict=True):
        ids = reference.ids(prompt)
        for step, token in enumerate(tokens):
            scores = {role: reference.fitted(role, [*ids[role], *tokens[:step]]) for role in ids}
            combined = np.where(reference.valid, combine(scores, step), -np.inf)
            assert combined[token] > combined.max() - CLOSE
            best += int(combined.argmax() == token)
            total += 1
    assert best >= 0.95 * total
    assert total > 50


def specs(trio, lora):  # noqa: F811
    """The trio's specs in bfloat16, with M+ = M- and an adapter; and the same in torch."""
    adapter, _, expert = lora
    small = trio.spec("antiexpert")
    tuned = dataclasses.replace(small, template=trio.templates["expert"], adapter=adapter)
    given = {"base": trio.spec("base"), "expert": tuned, "antiexpert": small}
    models = {role: rounded(model) for role, model in (trio.models | {"expert": expert}).items()}
    return (
        {role: dataclasses.replace(spec, dtype="bfloat16") for role, spec in given.items()},
        dataclasses.replace(trio, models=models),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("plan", ["separate", "shared"])
def test_as_torch(llama, lora, plan, batch_size):  # noqa: F811
    members, reference = specs(llama, lora)
    loaded = load_trio(**members, plan=plan, place=Placement(make_mesh({"data": 1})))
    assert isinstance(loaded.params[0]["layers"][0]["mlp"]["down"], Turned)
    check(reference, complete(loaded, batch_size=batch_size))


def test_on_eight_devices(llama, lora):  # noqa: F811
    members, reference = specs(llama, lora)
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    loaded = load_trio(**members, plan="shared", place=place)
    check(reference, complete(loaded))
    loaded = load_trio(**members, plan="separate", place=place, stacked_layers=True)
    check(reference, complete(loaded))


def test_a_tied_head(mixed):
    members = {
        role: dataclasses.replace(mixed.spec(role), dtype="bfloat16") for role in mixed.models
    }
    models = {role: rounded(model) for role, model in mixed.models.items()}
    check(dataclasses.replace(mixed, models=models), complete(load_trio(**members)))
