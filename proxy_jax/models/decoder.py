"""The Decoder: declared with Flax NNX, run as one pure function over a plain dict of arrays.

Letters: B batch, T new tokens, S cache slots, H head size, D model width, V vocabulary, L layers.

`params` is {"embedding", "layers", "final_norm", "head"?}. "layers" is either a tuple of L dicts,
run one after the other, or one dict whose leaves have a leading axis L, run by a scan. Scanning
compiles faster and is right on TPU and GPU; on CPU a scan copies each layer's weights out of the
stack at every step, so there layers are unrolled. It is a property of the run: `stack_layers`
turns the one into the other, and the model is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from proxy_jax.models import lora
from proxy_jax.models.attention import softcap
from proxy_jax.models.cache import KVCache, write_layers
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.layers import NO_WINDOW, Block, norm_weight, param, rms_norm
from proxy_jax.models.moving import move
from proxy_jax.sharding import LOCAL, Placement

Params = dict[str, Any]

# What is kept of each layer for the backward pass: everything, products with weights, or only the
# layer's input.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": jax.checkpoint,
}


class Decoder(nnx.Module):
    """Declares the parameters of a model of any family."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.model_dim
        self.embedding = param(rngs, (V, D), ("vocab", "embed"), D)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = norm_weight(config, rngs, (D,), (None,))
        if not config.tied_head:
            self.head = param(rngs, (D, V), ("embed", "vocab"), D)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters, layers unrolled."""
    return _pure(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init`, without allocating."""
    one_layer = jax.eval_shape(lambda: init(config.of_one_layer(), jax.random.key(0)))
    return {**one_layer, "layers": one_layer["layers"] * config.num_layers}


@functools.cache
def logical_axes(config: ModelConfig) -> Params:
    """The name of each axis of each parameter; same structure as `init`."""
    model = nnx.eval_shape(lambda: Decoder(config.of_one_layer(), rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda v: v.get_metadata("logical_axes"), state, is_leaf=is_variable)
    one_layer = _pure(axes)
    return {**one_layer, "layers": one_layer["layers"] * config.num_layers}


def stack_layers(params: Params) -> Params:
    """Turns a tuple of layers into one dict of arrays with a leading axis L."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    return {**params, "layers": stacked}


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: KVCache | None = None,
    place: Placement = LOCAL,
) -> tuple[jax.Array, KVCache | None]:
    """Runs T new tokens of every row through the model.

    With a cache, the tokens' keys and values are written at slots positions[b, 0], ... and each
    token sees the slots up to its own; `cache.lengths` is left to the caller, who knows how many
    of the tokens are real. Without one, the tokens see each other, causally.

    Args:
      config: the architecture; static under jit.
      params: the nested dict that `init` or a checkpoint gives.
      tokens: [B, T] int32.
      positions: [B, T] int32, consecutive along T.
      cache: keys and values of the tokens before, or None.
      place: where activations lie on the mesh; static under jit.

    Returns:
      Next-token logits [B, T, V] float32, and the cache with the new tokens written.
    """
    x, cache = hidden_states(config, params, tokens, positions, cache, place)
    return unembed(config, params, x, place), cache


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: KVCache | None = None,
    place: Placement = LOCAL,
    segments: jax.Array | None = None,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """`apply` up to the last layer.

    Args:
      config, params, tokens, positions, cache, place: as in `apply`.
      segments: [B, T] int32; tokens see only those of their own segment. Without a cache only.
      remat: key of REMAT, what the backward pass computes again; static under jit.

    Returns:
      [B, T, D], for `unembed`, and the cache.
    """
    with jax.named_scope("embed"):
        embedding = params["embedding"]
        if cache is None:
            x = embedding[tokens]
        else:  # and so not differentiated
            x = move(lambda tokens, embedding: embedding[tokens], tokens, embedding)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        x = place.constrain(x, ("batch", None, "act_embed"))
    return _run_layers(config, params["layers"], x, positions, cache, place, segments, REMAT[remat])


def unembed(
    config: ModelConfig, params: Params, x: jax.Array, place: Placement = LOCAL
) -> jax.Array:
    """Logits [B, T, V] float32 of hidden states [B, T, D]."""
    with jax.named_scope("head"):
        x = rms_norm(x, params["final_norm"], config)
        if config.tied_head:
            head, spec = params["embedding"], "BTD,VD->BTV"
        else:
            head, spec = params["head"], "BTD,DV->BTV"
        logits = lora.product(spec, x, head)
        logits = softcap(logits, config.final_softcap)
        return place.constrain(logits, ("batch", None, "vocab"))


def _run_layers(
    config: ModelConfig,
    layers: Any,
    x: jax.Array,
    positions: jax.Array,
    cache: KVCache | None,
    place: Placement,
    segments: jax.Array | None,
    remat: Callable[[Callable], Callable],
) -> tuple[jax.Array, KVCache | None]:
    length = x.shape[1]
    slots = length if cache is None else jax.tree.leaves(cache.keys)[0].shape[-2]
    # A cache with as many slots as there are tokens holds nothing before them.
    held = None if slots == length else cache
    written = held is not None and isinstance(layers, tuple)
    index = jnp.arange(length)[None] if held is None else positions
    if held is None:
        places = index
    else:
        places = jnp.arange(slots)[None]
        if not written:  # stale slots lie ahead of every token
            places = jnp.where(places < positions[:, :1], places, NO_WINDOW)
            places = jnp.concatenate([places, positions], axis=1)
    # How many positions back each key lies: [B or 1, T, S].
    distance = index[:, :, None] - places[:, None, :]
    visible = distance >= 0
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    if cache is None:
        cos, sin = _rope_angles(config, positions)
    else:
        cos, sin = _rope_angles_of_slots(config, positions, slots)
    block = _block_graph(config)
    start = positions[:, 0] if written else None

    @remat
    def run(layer, x, kv, window, angles):
        mask = visible & (distance < window)
        x, kv = nnx.merge(block, layer)(x, angles, mask, segments, kv, start, place)
        return x, None if cache is None else kv

    if isinstance(layers, tuple):
        kept = []
        for i, layer in enumerate(layers):
            kv = None if held is None else (held.keys[i], held.values[i])
            window, kind = config.layer_windows[i] or NO_WINDOW, config.layer_ropes[i]
            x, kv = run(layer, x, kv, window, (cos[kind], sin[kind]))
            kept.append(kv)
        if cache is None:
            return x, None
        keys, values = zip(*kept, strict=True)
        return x, KVCache(keys, values, cache.lengths)

    windows = jnp.asarray([w or NO_WINDOW for w in config.layer_windows], jnp.int32)
    kinds = jnp.asarray(config.layer_ropes, jnp.int32)

    def body(x, scanned):
        layer, kv, window, kind = scanned
        return run(layer, x, kv, window, (cos[kind], sin[kind]))

    # The loop only reads the cache, and what is new is written when it is over: a loop that wrote
    # would copy every layer's part out of the stack and back.
    old: Any = None if held is None else (held.keys, held.values)
    x, new = jax.lax.scan(body, x, (layers, old, windows, kinds))
    if cache is None or new is None:
        return x, None
    if old is not None:
        first = positions[:, 0]
        new = [write_layers(*both, first, place) for both in zip(old, new, strict=True)]
    return x, KVCache(new[0], new[1], cache.lengths)


def _rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin for every kind of layer, [kinds, B, T, H / 2] float32; 1 and 0 without RoPE."""
    cos, sin = [], []
    for rope in config.ropes:
        frequencies = (
            np.zeros(config.head_dim // 2, np.float32)
            if rope is None
            else rope.frequencies(config.head_dim)
        )
        angle = positions[..., None].astype(jnp.float32) * frequencies[None, None]
        scale = 1.0 if rope is None else rope.attention_factor
        cos.append(jnp.cos(angle) * scale)
        sin.append(jnp.sin(angle) * scale)
    return jnp.stack(cos), jnp.stack(sin)


def _rope_angles_of_slots(
    config: ModelConfig, positions: jax.Array, slots: int
) -> tuple[jax.Array, jax.Array]:
    """`_rope_angles` of positions below `slots`; on CPU looked up.

    XLA's CPU compiler would compute cosines and sines anew for every head of every layer, barriers
    notwithstanding.
    """
    with jax.ensure_compile_time_eval():
        table = _rope_angles(config, jnp.arange(slots)[None])

    def look_up(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        cos, sin = (of_slots[:, 0].at[:, positions].get(mode="clip") for of_slots in table)
        return cos, sin

    compute = functools.partial(_rope_angles, config)
    return jax.lax.platform_dependent(positions, cpu=look_up, default=compute)


@functools.cache
def _block_graph(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))[0]


def _pure(state: Any) -> Params:
    """A plain nested dict, with layers as a tuple."""
    params = nnx.to_pure_dict(state)
    layers = params["layers"]
    return {**params, "layers": tuple(layers[i] for i in range(len(layers)))}
