"""Reading compiled programs: figures counted by hand from the shapes that go in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from proxy_jax import hlo
from proxy_jax.sharding import Placement, make_mesh

LAYERS, ROWS, WIDTH = 5, 8, 64

# Two layers, each gathers its weight and cuts it out of the stack inside a nested fusion, which
# looks at the stack through another order of its bytes; the activation is on the chip, S(1).
STATE = "(s32[], f32[8,16]{1,0:S(1)}, f32[2,16,32]{2,1,0}, /*index=3*/f32[2,8,16]{2,1,0})"
TEXT = """
HloModule step, is_scheduled=true

%order (o.0: f32[2,16,32]) -> f32[2,16,32] {
  %o.0 = f32[2,16,32]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %o = f32[2,16,32]{2,1,0:T(8,128)(4,1)} copy(%o.0)
}

%cut (p.0: f32[2,16,32], p.1: s32[]) -> f32[16,32] {
  %p.0 = f32[2,16,32]{2,1,0} parameter(0)
  %other = f32[2,16,32]{2,1,0} fusion(%p.0), kind=kLoop, calls=%order
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %ds = f32[1,16,32]{2,1,0} dynamic-slice(%other, %p.1, %zero, %zero), dynamic_slice_sizes={1,16,32}
  ROOT %b = f32[16,32]{1,0} bitcast(%ds)
}

%multiply (q.0: f32[2,16,32], q.1: s32[], q.2: f32[8,16]) -> f32[8,32] {
  %q.0 = f32[2,16,32]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = f32[8,16]{1,0:T(8,128)S(1)} parameter(2)
  %w = f32[16,32]{1,0} fusion(%q.0, %q.1), kind=kLoop, calls=%cut
  ROOT %dot = f32[8,32]{1,0:T(8,128)S(1)} dot(%q.2, %w), lhs_contracting_dims={1}
}

%keep (k.0: f32[2,8,16], k.1: f32[8,16], k.2: s32[]) -> f32[2,8,16] {
  %k.0 = f32[2,8,16]{2,1,0} parameter(0)
  %k.1 = f32[8,16]{1,0:S(1)} parameter(1)
  %k.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %one = f32[1,8,16]{2,1,0} bitcast(%k.1)
  ROOT %dus = f32[2,8,16]{2,1,0} dynamic-update-slice(%k.0, %one, %k.2, %zero.2, %zero.2)
}

%body (s: STATE) -> STATE {
  %s = STATE parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,16]{1,0:S(1)} get-tuple-element(%s), index=1
  %ws = f32[2,16,32]{2,1,0} get-tuple-element(%s), index=2
  %kept = f32[2,8,16]{2,1,0} get-tuple-element(%s), index=3
  %y = f32[8,32]{1,0:T(8,128)S(1)} fusion(%ws, %i, %x), kind=kOutput, calls=%multiply
  %sum = f32[8,32]{1,0:S(1)} all-reduce(%y), to_apply=%add, metadata={op_name="jit(f)/sum"}
  %mine = f32[16,32]{1,0:S(1)} fusion(%ws, %i), kind=kLoop, calls=%cut
  %whole = f32[32,32]{1,0:S(1)} all-gather(%mine), dimensions={0}, metadata={op_name="gather"}
  %next = f32[8,16]{1,0:S(1)} slice(%sum), slice={[0:8], [0:16]}
  %new = f32[2,8,16]{2,1,0} fusion(%kept, %next, %i), kind=kLoop, calls=%keep
  %n = s32[] constant(1)
  %j = s32[]{:S(6)} add(%i, %n)
  ROOT %t = STATE tuple(%j, %next, %ws, %new)
}

%condition (c: STATE) -> pred[] {
  %c = STATE parameter(0)
  %ci = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(2)
  ROOT %less = pred[] compare(%ci, %limit), direction=LT
}

ENTRY %main (w: f32[2,16,32], x0: f32[8,16], k0: f32[2,8,16]) -> f32[8,16] {
  %w = f32[2,16,32]{2,1,0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %x0 = f32[8,16]{1,0:S(1)} parameter(1), metadata={op_name="x"}
  %k0 = f32[2,8,16]{2,1,0} parameter(2), metadata={op_name="cache"}
  %start = s32[] constant(0)
  %state = STATE tuple(%start, %x0, %w, %k0)
  %loop = STATE while(%state), condition=%condition, body=%body, OP_NAME
  ROOT %out = f32[8,16]{1,0:S(1)} get-tuple-element(%loop), index=1
}
""".replace("STATE", STATE).replace("OP_NAME", 'metadata={op_name="jit(f)/base/while"}')


def test_a_loop_of_layers():
    program = hlo.parse(TEXT, lambda name: name.startswith("params"))
    assert program.entry == "main"
    [loop] = program.loops("main")
    assert loop == hlo.Loop("body", 2, "jit(f)/base/while")
    moved = {one.kind: one for one in program.collectives("body")}
    assert moved["all-reduce"] == hlo.Collective("all-reduce", 8 * 32 * 4, "jit(f)/sum", False)
    # The gathered array is made of the weight alone: a weight that moves.
    assert moved["all-gather"] == hlo.Collective("all-gather", 32 * 32 * 4, "gather", True)
    assert hlo.by_kind(program.all_collectives("main")).startswith("2 all-gather of 0.01 MiB, 2 ")
    # Each turn reads one layer's weight twice, and writes one layer's part of what is kept.
    counters = 2 * 4  # reads of i and of a constant; j is on the chip
    turn = 2 * 16 * 32 * 4 + 8 * 16 * 4
    assert turn <= program.traffic("body") <= turn + 2 * counters + 3 * 4
    assert program.traffic("main") == 2 * program.traffic("body")


def test_a_loop_that_does_not_say_how_often_it_runs():
    text = TEXT.replace(
        "%limit = s32[] constant(2)", "%limit = s32[] get-tuple-element(%c), index=0"
    )
    once, thrice = (hlo.parse(text, assumed_trips=trips) for trips in (1, 3))
    assert once.loops("main")[0].trips is None
    assert thrice.traffic("main") == 3 * once.traffic("main") == 3 * once.traffic("body")
    assert len(thrice.all_collectives("main")) == 3 * len(once.all_collectives("main")) == 6


def test_nothing_is_marked_without_weights():
    program = hlo.parse(TEXT, lambda name: name == "cache")
    assert not any(one.marked for one in program.collectives("body"))


def compiled(place, gathered):
    """A scan over layers whose weights are split by rows; gathered or not before the product."""
    axes = (None, "embed", None)

    def run(params, x):
        def layer(x, w):
            w = place.constrain(w, (None, None)) if gathered else w
            x = place.constrain(x, (None, None) if gathered else (None, "act_embed"))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, params["w"])[0]

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = (
        {"w": shape((LAYERS, WIDTH, WIDTH), sharding=place.sharding(axes))},
        shape((ROWS, WIDTH), sharding=place.sharding(())),
    )
    return jax.jit(run).lower(*shapes).compile()


@pytest.mark.parametrize("gathered", [False, True])
def test_a_compiled_scan(gathered):
    place = Placement(make_mesh({"fsdp": 4}))
    program = hlo.read(compiled(place, gathered), lambda name: name.startswith("params"))
    [loop] = program.loops(program.entry)
    assert loop.trips == LAYERS
    marked = [one for one in program.all_collectives(program.entry) if one.marked]
    assert bool(marked) == gathered
    if gathered:
        assert sum(one.size for one in marked) == LAYERS * WIDTH * WIDTH * 4
    weights = LAYERS * WIDTH * WIDTH * 4 // 4
    assert program.traffic(program.entry) >= weights


def test_sizes_of_shapes_on_a_device():
    place = Placement(make_mesh({"data": 2, "tensor": 4}))
    put = jax.device_put(np.zeros((8, 16), np.float32), place.sharding(("batch", "vocab")))
    assert put.sharding.spec == P("data", "tensor")
    assert hlo.device_bytes({"a": put, "b": put}) == 2 * 4 * 4 * 4
