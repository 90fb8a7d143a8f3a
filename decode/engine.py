"""The compiled engine: three models and the logit arithmetic as one program.

Letters: B slots, P rows of one prefill, T new tokens, R roles of a pass, V vocabulary.

    prefill   runs a pass over new prompts and writes their keys and values into free slots;
              compiled once per prompt-length bucket
    copy      gives a prompt that is in the caches to other slots: the samples of a prompt
    admit     sets the slots' rows to new requests
    step      three forwards -> combine -> processors -> draw -> append; a trace, if asked for
    chunk     a compiled loop of steps; between two chunks the host looks at what came out

A pass (proxy_jax.trio) is one parameter tree, which serves one role, or two by vmap. Nothing
here knows about text, files or queues: decode/scheduler.py drives these five functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from decode.processors import Processors, advance, process
from decode.sampling import Sampling, Truncation, draw, keep, row_keys
from decode.state import DecodeState, Rows
from decode.trace import Trace, distributions, measure
from proxy_jax.combine import combine
from proxy_jax.models.cache import KVCache, insert, take
from proxy_jax.models.decoder import Params, apply
from proxy_jax.sharding import Axes, Placement
from proxy_jax.trio import LoadedTrio, Pass


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiled functions are specialised to; hashable, static under jit.

    Attributes:
      passes, place, stacked_layers: of the loaded trio.
      trace: whether steps are recorded (decode.trace).
    """

    passes: tuple[Pass, ...]
    place: Placement
    stacked_layers: bool
    trace: bool = False

    @classmethod
    def of(cls, loaded: LoadedTrio, *, trace: bool = False) -> Program:
        """The program of a loaded trio."""
        return cls(loaded.passes, loaded.place, loaded.stacked_layers, trace)

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles present, in the order of Rows.last."""
        return tuple(role for one in self.passes for role in one.roles)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """The traced values of a job: a new value does not recompile, None leaves a feature out.

    Attributes:
      sampling: how tokens are drawn.
      processors: what may not be generated.
      base_filter: tokens that M itself must keep for them to be generated at all (DExperts'
        top-p, contrastive decoding's min-p).
      beta: scalar; adds (beta - 1) (s_M - s_-), see proxy_jax.combine.
      key: random key of the job.
      shared: [V] bool, ids that get the offset.
      valid: [V] bool, ids that may be generated.
    """

    sampling: Sampling
    processors: Processors
    base_filter: Truncation | None
    beta: jax.Array | None
    key: jax.Array
    shared: jax.Array
    valid: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def new_state(program: Program, slots: tuple[int, ...], batch: int, row: Rows) -> DecodeState:
    """An empty batch.

    Args:
      program: static.
      slots: per pass, cache slots a row; static.
      batch: B; static.
      row: one idle row, [1, ...] arrays.
    """
    caches = tuple(
        _empty_cache(program, one, batch, size)
        for one, size in zip(program.passes, slots, strict=True)
    )
    rows = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), row)
    return _pin(program, DecodeState(caches, rows))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    program: Program,
    index: int,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
) -> KVCache:
    """Runs new prompts through one pass and copies their keys and values into the batch's cache.

    Args:
      program, index: which pass; static.
      params, cache: the pass's; the cache is donated.
      tokens: [R, P, T] int32, right-padded prompts less their last token.
      lengths: [R, P] int32, how many of them are real.
      slots: [P] int32, where each row goes; B for padding rows, which go nowhere.
    """
    one = program.passes[index]
    rows = _empty_cache(program, one, tokens.shape[1], tokens.shape[2])
    with jax.named_scope("prefill"):
        _, rows = _forward(program, one, params, rows, tokens)
    if len(one.roles) == 1:
        rows = _with_lengths(rows, lengths[0])
        return _pin_cache(program, insert(cache, rows, slots, program.place))
    rows = _with_lengths(rows, lengths)
    return _pin_cache(program, _insert_both(program, cache, rows, slots))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def copy(
    program: Program,
    cache: KVCache,
    lengths: jax.Array,
    sources: jax.Array,
    slots: jax.Array,
) -> KVCache:
    """Copies prompts that the cache of a pass holds to other slots.

    Args:
      program: static.
      cache: a pass's; donated.
      lengths: [R, P] int32, of the prompts less their last token.
      sources, slots: [P] int32, from where to where; B drops the copy.
    """
    if len(lengths) == 1:
        rows = take(cache, sources, lengths[0])
        return _pin_cache(program, insert(cache, rows, slots, program.place))
    by_role = _by_role(program)
    rows = jax.vmap(take, (by_role, None, 0), by_role)(cache, sources, lengths)
    return _pin_cache(program, _insert_both(program, cache, rows, slots))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def admit(program: Program, rows: Rows, new: Rows, slots: jax.Array) -> Rows:
    """Sets slots to new requests, or to idle rows; slots [n] of B or more are dropped."""
    put = lambda whole, new: whole.at[slots].set(new, mode="drop")  # noqa: E731
    return jax.tree.map(lambda x: _replicate(program, x), jax.tree.map(put, rows, new))


def step(
    program: Program, params: Sequence[Params], state: DecodeState, settings: Settings
) -> tuple[DecodeState, tuple[jax.Array, Trace | None]]:
    """Draws one token in every active slot.

    Returns:
      The state with the tokens appended; the tokens [B], -1 in idle slots, and their trace, None
      unless the program has one.
    """
    rows = state.rows
    logits, caches = _all_logits(program, params, state)
    with jax.named_scope("combine"):
        combined = _combined(logits, rows, settings)
        allowed = process(
            combined, settings.processors, rows.ban_states, rows.recent, rows.seen, rows.generated
        )
        failures = [~jnp.all(jnp.isfinite(s), axis=-1) for s in logits.values()]
        failures.append(~jnp.isfinite(jnp.max(allowed, axis=-1)))
    with jax.named_scope("draw"):
        # The position, in M's context, of the token to be drawn.
        positions = state.caches[0].lengths + 1
        keys = row_keys(settings.key, rows.row, positions)
        token = draw(allowed, settings.sampling, keys)
    trace = None
    if program.trace:
        with jax.named_scope("trace"):
            trace = measure(combined, logits, token, settings.shared, settings.valid)
            trace = _split_rows(program, trace)

    broken = jnp.stack(failures, axis=-1)
    state, new = _append(program, state, caches, token, broken, settings.processors)
    return state, (new, trace)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def chunk(
    program: Program,
    params: Sequence[Params],
    state: DecodeState,
    settings: Settings,
    steps: int,
) -> tuple[DecodeState, dict[str, Any]]:
    """Up to `steps` steps in one compiled loop; ends early when no slot is active.

    Returns:
      The state (the old one is donated), and what the host looks at: "tokens" [B, steps], -1
      where a slot was idle, "active" [B], "broken" [B, R + 1] (see Rows), and "trace", a Trace
      [B, steps], undefined where a slot was idle, or None.
    """

    def more(carry):
        n, state, _ = carry
        return (n < steps) & jnp.any(state.rows.active)

    def body(carry):
        n, state, record = carry
        state, new = step(program, params, state, settings)

        def put(whole: jax.Array, one: jax.Array) -> jax.Array:
            at = (0, n, *[0] * (one.ndim - 1))
            return jax.lax.dynamic_update_slice(whole, one[:, None], at)

        return n + 1, state, jax.tree.map(put, record, new)

    shape = (state.rows.active.shape[0], steps)
    tokens, trace = jnp.full(shape, -1, jnp.int32), None
    if program.trace:
        trace = _split_rows(program, Trace.empty(distributions(program.roles), shape))
    _, state, (tokens, trace) = jax.lax.while_loop(more, body, (0, state, (tokens, trace)))
    rows = state.rows
    seen = {"tokens": tokens, "active": rows.active, "broken": rows.broken, "trace": trace}
    return _pin(program, state), jax.tree.map(lambda x: _replicate(program, x), seen)


def _all_logits(
    program: Program, params: Sequence[Params], state: DecodeState
) -> tuple[dict[str, jax.Array], tuple[KVCache, ...]]:
    """Every role's next-token logits [B, V], and the caches with the last tokens written."""
    logits: dict[str, jax.Array] = {}
    caches, first = [], 0
    for one, tree, cache in zip(program.passes, params, state.caches, strict=True):
        last = state.rows.last[:, first : first + len(one.roles)].T[..., None]  # [R, B, 1]
        with jax.named_scope("_".join(one.roles)):
            out, cache = _forward(program, one, tree, cache, last)
        logits |= {role: out[i, :, 0] for i, role in enumerate(one.roles)}
        caches.append(cache)
        first += len(one.roles)
    return logits, tuple(caches)


def _forward(
    program: Program, one: Pass, params: Params, cache: KVCache, tokens: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Feeds tokens [R, B, T] after what the cache holds; logits [R, B, T, V]."""

    def run(params, cache, tokens):
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
        return apply(one.config, params, tokens, positions, cache, program.place)

    if len(one.roles) == 1:
        logits, cache = run(params, cache, tokens[0])
        return logits[None], cache
    axes, by_role = None if one.shared else 0, _by_role(program)
    return jax.vmap(run, (axes, by_role, 0), (0, by_role))(params, cache, tokens)


def _combined(logits: Mapping[str, jax.Array], rows: Rows, settings: Settings) -> jax.Array:
    """softmax of this [B, V] is the distribution to draw from, up to processors and truncation."""
    base = logits["base"]
    expert, anti = logits.get("expert", base), logits.get("antiexpert", base)
    offsets = [(expert, anti, _alpha(rows))] if len(logits) > 1 else []
    if settings.beta is not None:
        offsets.append((base, anti, jnp.broadcast_to(settings.beta - 1.0, base.shape[:1])))
    combined = combine(base, offsets, settings.shared)
    allowed = jnp.broadcast_to(settings.valid, base.shape)
    if settings.base_filter is not None:
        allowed = allowed & keep(jnp.where(allowed, base, -jnp.inf), settings.base_filter)
    return jnp.where(allowed, combined, -jnp.inf)


def _alpha(rows: Rows) -> jax.Array:
    """Each row's coefficient at its current step, [B]."""
    piece = jnp.sum(rows.alpha_starts <= rows.generated[:, None], axis=-1) - 1
    return jnp.take_along_axis(rows.alpha_values, piece[:, None], axis=-1)[:, 0]


def _append(
    program: Program,
    state: DecodeState,
    caches: tuple[KVCache, ...],
    token: jax.Array,
    broken: jax.Array,
    processors: Processors,
) -> tuple[DecodeState, jax.Array]:
    """Appends the drawn tokens to every role's context, and ends the rows that are done."""
    rows, active = state.rows, state.rows.active
    generated = rows.generated + active
    ended = jnp.any(token[:, None] == processors.eos[None], axis=-1)
    ended = ended | (generated >= rows.limit)
    ban_states = advance(processors, rows.ban_states, token)
    recent = jnp.concatenate([rows.recent, token[:, None]], axis=1)[:, 1:]
    seen = rows.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(active)
    rows = dataclasses.replace(
        rows,
        active=active & ~ended,
        last=jnp.where(active[:, None], token[:, None], rows.last),
        generated=generated,
        ban_states=jnp.where(active[:, None], ban_states, rows.ban_states),
        recent=jnp.where(active[:, None], recent, rows.recent),
        seen=seen,
        broken=rows.broken | (broken & active[:, None]),
    )
    # What was fed at this step is now in the caches; an idle slot's stays beyond its length.
    caches = tuple(
        _with_lengths(cache, cache.lengths + jnp.broadcast_to(active, cache.lengths.shape))
        for cache in caches
    )
    state = _pin(program, DecodeState(caches, rows))
    return state, jnp.where(active, token, -1)


def _with_lengths(cache: KVCache, lengths: jax.Array) -> KVCache:
    return dataclasses.replace(cache, lengths=lengths)


def _empty_cache(program: Program, one: Pass, batch: int, slots: int) -> KVCache:
    cache = KVCache.zeros(
        one.config, batch, slots, jnp.dtype(one.dtype), stacked=program.stacked_layers
    )
    if len(one.roles) > 1:
        both = lambda cache: cache  # noqa: E731
        cache = jax.vmap(both, None, _by_role(program), axis_size=len(one.roles))(cache)
    return _pin_cache(program, cache)


def _by_role(program: Program) -> KVCache:
    """Which axis of a pass's cache is the role's: a loop over layers wants the layers first."""
    axis: Any = 1 if program.stacked_layers else 0
    return KVCache(axis, axis, 0)  # type: ignore[arg-type]


def _insert_both(program: Program, cache: KVCache, rows: KVCache, slots: jax.Array) -> KVCache:
    """`insert` for the roles of a pass."""
    by_role = _by_role(program)
    put = functools.partial(insert, place=program.place)
    return jax.vmap(put, (by_role, by_role, None), by_role)(cache, rows, slots)


def _pin_cache(program: Program, cache: KVCache) -> KVCache:
    """Keeps a cache where it lies, so that every call meets the same compiled program."""

    return jax.tree.map(lambda x: program.place.constrain(x, _cache_axes(program.place, x)), cache)


def _cache_axes(place: Placement, x: jax.Array) -> Axes:
    """Logical axes of an array of a KVCache: keys or values [..., B, K, S, H], or lengths."""
    if x.ndim < 4:
        return (None,) * x.ndim
    rows = place.attention_rows(x.shape[-4])
    return (*(None,) * (x.ndim - 4), rows, "kv_heads", None, None)


def _split_rows(program: Program, trace: Trace) -> Trace:
    """Each figure stays with its row of the batch until the host wants them all."""
    return jax.tree.map(
        lambda x: program.place.constrain(x, ("batch", *[None] * (x.ndim - 1))), trace
    )


def state_shardings(program: Program, state: DecodeState) -> DecodeState:
    """Where each array of a state lies on the mesh."""
    place = program.place
    caches = jax.tree.map(lambda x: place.sharding(_cache_axes(place, x)), state.caches)
    return DecodeState(caches, jax.tree.map(lambda x: place.sharding(()), state.rows))


def _pin(program: Program, state: DecodeState) -> DecodeState:
    caches = tuple(_pin_cache(program, cache) for cache in state.caches)
    return DecodeState(caches, jax.tree.map(lambda x: _replicate(program, x), state.rows))


def _replicate(program: Program, x: jax.Array) -> jax.Array:
    return program.place.constrain(x, (None,) * x.ndim)
