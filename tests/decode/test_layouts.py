"""An engine whose weights and caches lie as the compiler asks draws the same tokens."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from decode import layouts, scheduler
from proxy_jax.sharding import Placement, make_mesh
from tests.trios import PROMPTS, complete, options


def reversed_axes(x):
    return Format(Layout(tuple(reversed(range(x.ndim)))), x.sharding)


@pytest.mark.parametrize(
    ("plan", "mesh"),
    [
        ("separate", {"data": 1}),
        ("stacked", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_same_tokens(llama, expected, monkeypatch, plan, mesh):
    monkeypatch.setattr(scheduler, "bind", functools.partial(layouts.bind, arranged=True))
    loaded = llama.load(plan=plan, place=Placement(make_mesh(mesh)), stacked_layers=True)
    assert complete(loaded) == expected
    assert complete(loaded, samples=2)[::2] == expected  # on the weights that were moved


def test_programs_are_kept(llama, expected, monkeypatch):
    """A second call compiles nothing, and finds its weights where another job has moved them."""
    bound = []

    def bind(*args):
        bound.append(layouts.bind(*args, arranged=True))
        return bound[-1]

    monkeypatch.setattr(scheduler, "bind", bind)
    loaded = llama.load(place=Placement(make_mesh({"data": 1})), stacked_layers=True)
    generator = scheduler.Generator(loaded, options())
    for _ in range(2):
        drawn = [list(completion.token_ids) for completion in generator.generate(PROMPTS)]
        assert drawn == expected
        layouts.move(loaded.params, jax.tree.map(reversed_axes, loaded.params))
    assert len(bound) == 1


def test_moved_weights_are_those_that_were_there(llama):
    loaded = llama.load(stacked_layers=True)
    before = jax.device_get(loaded.params)
    alone = loaded.params[:1]

    layouts.move(loaded.params, jax.tree.map(reversed_axes, loaded.params))
    for x in jax.tree.leaves(loaded.params):
        assert x.format.layout.major_to_minor == tuple(reversed(range(x.ndim)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), before)
    assert alone[0]["head"] is loaded.params[0]["head"]
