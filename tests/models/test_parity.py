"""The Decoder computes what transformers computes, in every way of running it.

Everything is compared with the logits and layer outputs of torch. Letters as in the library:
B batch, T tokens, S cache slots, H head size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from proxy_jax.cpu import products
from proxy_jax.models import cache as kv
from proxy_jax.models.decoder import Params, apply, stack_layers
from proxy_jax.models.layers import Block
from proxy_jax.sharding import LOCAL, Placement, make_mesh
from tests.models.families import FAMILIES, LENGTH, ROWS, Reference, torch_model

pytestmark = pytest.mark.usefixtures("quick_compiles")

forward = jax.jit(apply, static_argnames=("config", "place"))
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
insert = jax.jit(kv.insert)

# Scanned where layers differ; the test on eight devices scans the layers of every family.
UNROLLED_AND_SCANNED = [pytest.param(name, False, id=name) for name in FAMILIES] + [
    pytest.param(name, True, id=f"{name}-scanned")
    for name in ("qwen2_upper_windows", "gemma2", "gemma3", "smollm3")
]


def parameters(reference: Reference, *, stacked: bool, dtype=np.float32) -> Params:
    """Made in numpy, which compiles nothing."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), reference.params)
    return jax.device_put(stack_layers(params) if stacked else params)


def empty_cache(reference: Reference, batch: int, slots: int, *, stacked: bool) -> kv.KVCache:
    return kv.KVCache.zeros(reference.config, batch, slots, jnp.float32, stacked=stacked)


@pytest.mark.parametrize(("name", "stacked"), UNROLLED_AND_SCANNED)
def test_logits(build, name, stacked):
    reference = build(name)
    params = parameters(reference, stacked=stacked)
    logits, cache = forward(reference.config, params, reference.tokens, POSITIONS)
    assert logits.dtype == jnp.float32
    assert cache is None
    assert_close(logits, reference.logits)


def test_each_block(reference):
    """Each layer alone, on what torch gave to it: errors cannot cancel or hide in later layers."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Block(reference.config, rngs=nnx.Rngs(0))))
    half = reference.config.head_dim // 2

    @jax.jit
    def run(params, x, cos, sin, visible):
        block = nnx.merge(graph, params)
        return block(x, (cos, sin), visible, None, None, None, LOCAL)[0]

    for params, layer in zip(reference.params["layers"], reference.layers, strict=True):
        cos, sin = layer.cos[..., :half], layer.sin[..., :half]
        assert_close(run(params, layer.inputs, cos, sin, layer.visible), layer.outputs)


@pytest.mark.parametrize(("name", "stacked"), UNROLLED_AND_SCANNED)
def test_step_by_step_decoding(build, name, stacked):
    """Ragged prompts, inserted into a used cache and continued a token at a time."""
    reference = build(name)
    config, params = reference.config, parameters(reference, stacked=stacked)
    lengths, padded = np.array([5, 9, 2]), 9
    slots = np.array([2, 0, 3])  # the row of the running cache that each prompt takes

    fresh = empty_cache(reference, ROWS + 1, padded, stacked=stacked)
    real = np.arange(padded) < lengths[:, None]
    prompts = np.where(real, reference.tokens[:, :padded], 7)
    prompts = np.vstack([prompts, np.full((1, padded), 8)])  # and a row that only fills the batch
    positions = np.broadcast_to(np.arange(padded), prompts.shape)
    logits, fresh = forward(config, params, prompts, positions, fresh)
    assert_close(np.asarray(logits)[:-1][real], reference.logits[:, :padded][real])

    fresh = dataclasses.replace(fresh, lengths=jnp.asarray([*lengths, 4], jnp.int32))
    used = empty_cache(reference, 4, LENGTH, stacked=stacked)
    used = jax.tree.map(lambda leaf: np.full_like(leaf, 9), used)  # stale entries of other rows
    cache = insert(used, fresh, np.array([*slots, 4]))
    np.testing.assert_array_equal(cache.lengths, [9, 9, 5, 2])  # row 1 was not touched

    for step in range(LENGTH - padded):
        position = np.zeros((4, 1), np.int32)
        position[slots, 0] = lengths + step
        token = np.zeros_like(position)
        token[slots, 0] = reference.tokens[np.arange(ROWS), lengths + step]
        logits, cache = forward(config, params, token, position, cache)
        expected = reference.logits[np.arange(ROWS), lengths + step]
        assert_close(np.asarray(logits)[slots, 0], expected)


def test_several_tokens_at_once_at_ragged_positions(build):
    """As a verifier of drafted tokens does: T > 1 after a prompt, each row at its own position."""
    reference = build("gemma3")
    start, chunk = np.array([0, 4, 11]), 6
    cache = empty_cache(reference, ROWS, LENGTH, stacked=False)
    _, cache = forward(reference.config, reference.params, reference.tokens, POSITIONS, cache)
    positions = start[:, None] + np.arange(chunk)
    tokens = np.take_along_axis(reference.tokens, positions, axis=1)
    logits, _ = forward(reference.config, reference.params, tokens, positions, cache)
    assert_close(logits, np.take_along_axis(reference.logits, positions[..., None], axis=1))


@pytest.mark.parametrize(
    ("name", "stacked"), [(name, True) for name in FAMILIES] + [("gemma3", False), ("olmo2", False)]
)
def test_sharded_on_eight_devices(build, name, stacked):
    reference = build(name)
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    place.check(reference.config, name)
    params = reference.load(place, stacked=stacked)
    query = params["layers"]["attention"]["q"] if stacked else params["layers"][0]["attention"]["q"]
    *_, width, heads, head_dim = query.shape
    part = (width // 2, heads // 2, head_dim)
    assert {shard.data.shape[-3:] for shard in query.addressable_shards} == {part}
    assert len(query.sharding.device_set) == 8

    tokens, positions = (np.vstack([a, a[:1]]) for a in (reference.tokens, POSITIONS))  # 4 rows
    logits, _ = forward(reference.config, params, tokens, positions, place=place)
    assert logits.sharding.is_equivalent_to(place.sharding(("batch", None, "vocab")), 3)
    assert_close(logits[:ROWS], reference.logits)


def test_sharded_decoding_with_a_cache(build):
    reference = build("smollm3")
    place = Placement(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    params = reference.load(place, stacked=True)
    cache = empty_cache(reference, 4, LENGTH, stacked=True)
    tokens, positions = (np.vstack([a, a[:1]]) for a in (reference.tokens, POSITIONS))
    _, cache = forward(reference.config, params, tokens[:, :-1], positions[:, :-1], cache, place)
    logits, _ = forward(reference.config, params, tokens[:, -1:], positions[:, -1:], cache, place)
    assert_close(logits[:ROWS, 0], reference.logits[:, -1])


def test_later_tokens_change_nothing_before_them(reference):
    changed = 13
    tokens = reference.tokens.copy()
    tokens[:, changed] = (tokens[:, changed] + 1) % reference.config.vocab_size
    before, _ = forward(reference.config, reference.params, reference.tokens, POSITIONS)
    after, _ = forward(reference.config, reference.params, tokens, POSITIONS)
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    assert (np.abs(after - before).max(axis=(0, 2))[changed:] > 1e-3).all()


@pytest.mark.parametrize("name", ["llama_yarn_biases", "qwen3", "gemma2", "olmo2"])
def test_bfloat16_errs_no_more_than_torch(build, name):
    import torch

    reference = build(name)
    tokens = torch.from_numpy(reference.tokens)
    with torch.no_grad():
        theirs = torch_model(name).bfloat16()(tokens).logits.float().numpy()
    params = parameters(reference, stacked=False, dtype=jnp.bfloat16)
    ours, _ = forward(reference.config, params, reference.tokens, POSITIONS)
    assert ours.dtype == jnp.float32

    def error(logits):
        return np.sqrt(np.mean((logits - reference.logits) ** 2))

    assert 0 < error(np.asarray(ours)) < 1.2 * error(theirs)


def test_products_of_bfloat16_are_float32(reference, monkeypatch):
    monkeypatch.setattr(products, "available", lambda: False)
    config = reference.config
    params = parameters(reference, stacked=False, dtype=jnp.bfloat16)
    cache = kv.KVCache.zeros(config, ROWS, LENGTH, jnp.bfloat16, stacked=False)
    jaxpr = jax.make_jaxpr(functools.partial(apply, config))(
        params, reference.tokens, POSITIONS, cache
    )
    dots = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    # q k v scores values o gate up down; the head, if it is tied in one of two ways, by backend.
    assert len(dots) == 9 * config.num_layers + (2 if config.tied_head else 1)
    for dot in dots:
        assert {operand.aval.dtype for operand in dot.invars} == {jnp.dtype(jnp.bfloat16)}, dot
        assert dot.outvars[0].aval.dtype == jnp.float32, dot


def _equations(jaxpr):
    """All equations of a jaxpr, and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):  # a ClosedJaxpr has them too
                yield from _equations(value)
