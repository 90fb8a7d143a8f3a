"""The engine's functions bound to one job, its weights and caches laid out as they ask for.

The order of an array's dimensions in memory is the compiler's choice. On TPU the decode step wants
most weights and all caches in another order than the row-major default, and would copy them at
every chunk: so it is compiled first, with the order left open; then the weights are moved to what
it chose, and the caches are made and handed on in it. Elsewhere the default is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from decode import engine
from decode.state import DecodeState, Rows
from proxy_jax.models.cache import KVCache
from proxy_jax.models.decoder import Params
from proxy_jax.trio import LoadedTrio

Shapes = Any  # a tree of jax.ShapeDtypeStruct with shardings
Formats = Any  # a tree of jax Formats: where an array lies, and in which order


@dataclasses.dataclass(frozen=True)
class Bound:
    """The engine for one job: the arguments that do not change are in place.

    Attributes:
      new_state: (idle row) -> an empty batch.
      admit: (rows, new rows, slots) -> rows.
      prefill: (index of the pass, cache, tokens, lengths, slots) -> cache.
      copy: (index of the pass, cache, lengths, sources, slots) -> cache.
      chunk: (state) -> state, and what the host looks at.
    """

    new_state: Callable[[Rows], DecodeState]
    admit: Callable[..., Rows]
    prefill: Callable[..., KVCache]
    copy: Callable[..., KVCache]
    chunk: Callable[[DecodeState], tuple[DecodeState, dict[str, Any]]]


def bind(
    program: engine.Program,
    loaded: LoadedTrio,
    settings: engine.Settings,
    slots: tuple[int, ...],
    batch: int,
    row: Rows,
    steps: int,
    *,
    arranged: bool | None = None,
) -> Bound:
    """The engine for a job.

    Args:
      program: of the trio.
      loaded: the weights; if they are moved, they lie in the new order from then on.
      settings, steps: of the chunks.
      slots: per pass, cache slots a row.
      batch: rows.
      row: one idle row.
      arranged: in the compiler's order; by default on TPU.
    """
    if arranged is None:
        arranged = program.place.platform == "tpu"
    new_state = functools.partial(engine.new_state, program, slots, batch)
    if not arranged:
        return Bound(
            new_state,
            functools.partial(engine.admit, program),
            lambda index, *rest: engine.prefill(program, index, loaded.params[index], *rest),
            lambda index, *rest: engine.copy(program, *rest),
            lambda state: engine.chunk(program, loaded.params, state, settings, steps),
        )
    state = state_shapes(program, slots, batch, row)
    compiled = compile_chunk(program, shapes(loaded.params), state, settings, steps)
    weights, states = input_formats(compiled)
    make = jax.jit(new_state, out_shardings=states)

    def on_moved_weights(row: Rows) -> DecodeState:
        move(loaded.params, weights)  # at every start: another job may have moved them since
        return make(row)

    def keeping(function: Callable[..., KVCache], index: int, cache: int) -> Callable[..., KVCache]:
        """Compiled to leave a pass's cache, the argument at `cache`, in its order."""
        return jax.jit(function, donate_argnums=cache, out_shardings=states.caches[index])

    passes = range(len(program.passes))
    prefills = [keeping(functools.partial(engine.prefill, program, i), i, 1) for i in passes]
    copies = [keeping(functools.partial(engine.copy, program), i, 0) for i in passes]
    return Bound(
        on_moved_weights,
        jax.jit(
            functools.partial(engine.admit, program), donate_argnums=0, out_shardings=states.rows
        ),
        lambda index, *rest: prefills[index](loaded.params[index], *rest),
        lambda index, *rest: copies[index](*rest),
        lambda state: compiled(loaded.params, state, settings),
    )


def compile_chunk(
    program: engine.Program, params: Shapes, state: Shapes, settings: engine.Settings, steps: int
) -> jax.stages.Compiled:
    """Compiles engine.chunk, the order of the weights and of the state left to the compiler."""
    here = program.place.sharding(())
    ordered = jax.tree.map(_any_order, (params, state))
    run = jax.jit(
        lambda params, state, settings: engine.chunk(program, params, state, settings, steps),
        donate_argnums=1,
        in_shardings=(*ordered, here),
        out_shardings=(ordered[1], here),
    )
    # JAX takes an open order for arrays without a format only.
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
    return run.lower(*plain, jax.eval_shape(lambda x: x, settings)).compile()


def compile_prefill(
    program: engine.Program, index: int, params: Shapes, cache: Shapes, tokens: tuple[int, int]
) -> jax.stages.Compiled:
    """Compiles engine.prefill.

    Args:
      program, index: which pass.
      params, cache: the pass's, in the formats that `input_formats` gives.
      tokens: prompts and their padded length, P and T.
    """
    here = program.place.sharding(())
    roles = len(program.passes[index].roles)
    run = jax.jit(
        functools.partial(engine.prefill, program, index),
        donate_argnums=1,
        out_shardings=jax.tree.map(lambda x: x.format, cache),
    )
    ids = [
        jax.ShapeDtypeStruct(shape, "int32", sharding=here)
        for shape in ((roles, *tokens), (roles, tokens[0]), tokens[:1])
    ]
    return run.lower(params, cache, *ids).compile()


def input_formats(compiled: jax.stages.Compiled) -> tuple[Formats, Formats]:
    """Of the weights and of the state that a chunk takes."""
    (weights, state, _), _ = compiled.input_formats
    assert compiled.output_formats[0] == state  # the next chunk takes what this one gives
    return weights, state


def shapes(tree: Any, formats: Formats = None) -> Shapes:
    """Shapes of arrays or shapes: in new formats, or those that they have."""
    if formats is None:
        formats = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(
        lambda x, f: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=f), tree, formats
    )


def state_shapes(program: engine.Program, slots: tuple[int, ...], batch: int, row: Rows) -> Shapes:
    """Shapes of an empty batch; arguments as in `bind`."""
    state = jax.eval_shape(functools.partial(engine.new_state, program, slots, batch), row)
    return shapes(state, engine.state_shardings(program, state))


def move(params: Sequence[Params], formats: Formats) -> None:
    """Puts weights into other formats, in place and one array after the other.

    Whoever holds the same dicts sees the same weights as before, in the new order.
    """
    done: dict[int, tuple[jax.Array, jax.Array]] = {}  # passes may share arrays

    def put(x: jax.Array, to: Format) -> jax.Array:
        if id(x) in done:
            return jax.device_put(done[id(x)][1], to)
        there = x.format == to  # type: ignore[attr-defined]
        new = x if there else jax.device_put(x, to, donate=True)
        done[id(x)] = x, new
        return new

    def walk(tree: Any, formats: Any) -> None:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(value, (dict, tuple)):
                walk(value, formats[key])
            else:  # an array, or several that are one weight
                tree[key] = jax.tree.map(put, value, formats[key])

    walk(tuple(params), formats)


def _any_order(x: jax.ShapeDtypeStruct) -> Format:
    return Format(Layout.AUTO, x.sharding)
