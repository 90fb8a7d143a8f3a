"""Reads the text of a compiled program: its loops, what they move, and what they touch.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here loops are told
apart. All figures are of one device. Only buffers in main memory (HBM) count as touched: those that
the TPU compiler keeps on the chip carry a memory space, S(1) and up.

    program = read(compiled)
    step = program.loops(program.entry)[0]             # the outermost loop
    layers = program.loops(step.body)                  # loops inside it
    program.traffic(step.body), program.collectives(layers[0].body)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# What moves no data of its own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all",
    "partition-id", "replica-id", "while", "conditional", "call",
}  # fmt: skip
_VIEWS = ("bitcast", "reshape", "convert", "copy", "transpose")
_CUTS = ("dynamic-slice", "slice", "gather")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a shape.

    Attributes:
      size: bytes, without padding.
      on_chip: whether it is outside main memory.
    """

    size: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as printed; the start of an asynchronous operation has the opcode "X-start".
      arrays: of its result, flattened.
      operands: names.
      calls: the computations it runs, by role: "calls", "to_apply", "body", "condition", ...
      index: of a get-tuple-element or parameter.
      op_name: the JAX operation it comes from.
      literal: what stands in the parentheses; the value of a constant.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: Mapping[str, str]
    index: int
    op_name: str
    literal: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: one of COLLECTIVES.
      size: bytes of its result, or of its operands if these are larger.
      op_name: the JAX operation it comes from.
      marked: whether something that moves is made of marked parameters alone.
    """

    kind: str
    size: int
    op_name: str
    marked: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
      body: name of the computation that is repeated.
      trips: how often; None if the text does not say.
      op_name: the JAX operation it comes from.
    """

    body: str
    trips: int | None
    op_name: str


Computation = dict[str, Instruction]
# What a value depends on: marked parameters (True), others (False); of a tuple, by element.
_Sources = frozenset[bool] | tuple[frozenset[bool], ...]


def read(
    compiled: jax.stages.Compiled,
    marked: Callable[[str], bool] = lambda op_name: False,
    *,
    assumed_trips: int = 1,
) -> Program:
    """Reads a compiled program; see `parse`."""
    text = compiled.as_text()
    assert text is not None  # every backend of jaxlib has one
    return parse(text, marked, assumed_trips=assumed_trips)


def parse(
    text: str,
    marked: Callable[[str], bool] = lambda op_name: False,
    *,
    assumed_trips: int = 1,
) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: `compiled.as_text()`.
      marked: which of the program's parameters, by the name JAX gives them ("params[0]['head']"),
        are marked: see Collective.
      assumed_trips: of loops that do not say how often they run.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], found[3], is_root=bool(found[1]))
            if instruction:
                current[found[2]] = instruction
    return Program(computations, entry, marked, assumed_trips)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: instructions by name, in the order they run; by the computation's name.
      entry: the computation that is the program.
      marked, assumed_trips: see `parse`.
    """

    computations: Mapping[str, Computation]
    entry: str
    marked: Callable[[str], bool]
    assumed_trips: int

    def loops(self, computation: str) -> list[Loop]:
        """The loops of a computation, not those inside them."""
        return [
            Loop(one.calls["body"], self._trips(one), one.op_name)
            for one in self.computations[computation].values()
            if one.opcode == "while"
        ]

    def collectives(self, computation: str) -> list[Collective]:
        """The transfers of one run of a computation, without those of loops inside."""
        sources = self._sources.get(computation, {})
        found = []
        for one in self.computations[computation].values():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                inputs = [self.computations[computation][name] for name in one.operands]
                size = max(_size(one.arrays), sum(_size(i.arrays) for i in inputs))
                if one.opcode.endswith("-start"):  # its result holds the operands, too
                    size -= min(size, sum(_size(i.arrays) for i in inputs))
                    size = max(size, sum(_size(i.arrays) for i in inputs))
                moved = [_flat(sources.get(name, frozenset())) for name in one.operands]
                marked = any(s == {True} for s in moved)
                found.append(Collective(kind, size, one.op_name, marked))
            for role, name in one.calls.items():
                if role in ("calls", "called_computations") and name in self.computations:
                    found += self.collectives(name)
        return found

    def nested(self, computation: str) -> list[Loop]:
        """The loops of a computation and those inside them."""
        found = []
        for loop in self.loops(computation):
            found += [loop, *self.nested(loop.body)]
        return found

    def all_collectives(self, computation: str) -> list[Collective]:
        """The transfers of one run of a computation, those of its loops as often as they run."""
        found = self.collectives(computation)
        for loop in self.loops(computation):
            found += self.all_collectives(loop.body) * (loop.trips or self.assumed_trips)
        return found

    def traffic(self, computation: str) -> int:
        """Bytes of main memory that one run of a computation reads and writes, loops included."""
        instructions = self.computations[computation]
        total = 0
        for one in instructions.values():
            if one.opcode == "while":
                trips = self._trips(one) or self.assumed_trips
                total += trips * self.traffic(one.calls["body"])
            elif one.opcode == "conditional":
                total += max((self.traffic(name) for name in one.calls.values()), default=0)
            elif one.opcode == "call":
                total += self.traffic(one.calls["to_apply"])
            elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
                total += self._touched(instructions, one)
        return total

    def _touched(self, instructions: Computation, one: Instruction) -> int:
        """Bytes that an instruction reads and writes."""
        inputs = [_in_memory(instructions[name].arrays) for name in one.operands]
        written = _in_memory(one.arrays)
        if one.opcode == "copy-start":  # (destination, source, token)
            read = 0 if instructions[one.operands[0]].arrays[0].on_chip else one.arrays[1].size
            return read + (0 if one.arrays[0].on_chip else one.arrays[0].size)
        if one.opcode.endswith("-start"):
            # Its result holds the operands first; what is made of them is read from memory.
            held = sum(len(instructions[name].arrays) for name in one.operands)
            made = one.arrays[held:] or one.arrays
            return sum(array.size * (1 if array.on_chip else 2) for array in made)
        if one.opcode in _CUTS:
            return (min(inputs[0], _size(one.arrays)) if inputs else 0) + written
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = instructions[one.operands[-1 if one.opcode == "scatter" else 1]]
            return _in_memory(update.arrays) + (_size(update.arrays) if written else 0)
        if one.opcode == "fusion":
            return self._touched_by_fusion(instructions, one)
        return sum(inputs) + written

    def _touched_by_fusion(self, instructions: Computation, one: Instruction) -> int:
        inside = self.computations[one.calls["calls"]]
        parameters = {i.index: i.name for i in inside.values() if i.opcode == "parameter"}
        root = next(i for i in inside.values() if i.is_root)
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        updated: set[str] = set()
        total = 0
        for result, array in zip(results, one.arrays, strict=False):
            target = _through_views(inside, result)
            if target.opcode == "dynamic-update-slice":  # in place: the rest stays where it is
                updated.add(_through_views(inside, inside[target.operands[0]]).name)
                size = _size(inside[target.operands[1]].arrays)
                total += 0 if array.on_chip else size
            else:
                total += 0 if array.on_chip else array.size
        for index, name in enumerate(one.operands):
            size = _in_memory(instructions[name].arrays)
            if size and index in parameters and parameters[index] not in updated:
                total += min(size, self._used(inside, parameters[index]))
        return total

    def _used(self, inside: Computation, name: str) -> int:
        """Bytes that a fusion reads of a parameter: what is cut out of it, if all uses are cuts."""
        total = 0
        for one in inside.values():
            if name not in one.operands:
                continue
            if one.opcode in _CUTS:
                total += _size(one.arrays) if one.operands[0] == name else 0  # else it is an index
            elif one.opcode == "bitcast":
                total += self._used(inside, one.name)
            elif one.opcode == "fusion":
                nested = self.computations[one.calls["calls"]]
                place = one.operands.index(name)
                parameter = next(
                    i.name for i in nested.values() if i.opcode == "parameter" and i.index == place
                )
                root = next(i for i in nested.values() if i.is_root)
                if _through_views(nested, root).name == parameter:  # the same, seen otherwise
                    total += self._used(inside, one.name)
                else:
                    total += self._used(nested, parameter)
            else:
                return _size(inside[name].arrays)
        return total

    def _trips(self, loop: Instruction) -> int | None:
        """The n of a condition "counter < n", or of several where one is."""
        condition = self.computations[loop.calls["condition"]]
        constants = {
            one.name: int(one.literal)
            for one in condition.values()
            if one.opcode == "constant" and re.fullmatch(r"\d+", one.literal)
        }
        for one in condition.values():
            if one.opcode == "compare" and (known := [n for n in one.operands if n in constants]):
                return constants[known[0]]
        return constants.popitem()[1] if len(constants) == 1 else None

    @functools.cached_property
    def _sources(self) -> dict[str, dict[str, _Sources]]:
        """What each value of the program and of its loops depends on."""
        entry = self.computations[self.entry]
        found: dict[str, dict[str, _Sources]] = {}
        inputs = {
            one.index: frozenset({self.marked(one.op_name)})
            for one in entry.values()
            if one.opcode == "parameter"
        }
        self._follow(self.entry, [inputs[i] for i in sorted(inputs)], found)
        return found

    def _follow(
        self, computation: str, inputs: Sequence[_Sources], found: dict[str, dict[str, _Sources]]
    ) -> _Sources:
        """Fills in the sources of a computation's values; returns those of its result."""
        values = found.setdefault(computation, {})
        result: _Sources = frozenset()
        for one in self.computations[computation].values():
            operands = [values.get(name, frozenset()) for name in one.operands]
            value: _Sources
            if one.opcode == "parameter":
                value = inputs[one.index]
            elif one.opcode == "tuple":
                value = tuple(_flat(operand) for operand in operands)
            elif one.opcode == "get-tuple-element":
                whole = operands[0]
                value = whole[one.index] if isinstance(whole, tuple) else whole
            elif one.opcode in ("opt-barrier", "copy") and len(operands) == 1:
                value = operands[0]
            elif one.opcode == "while":
                value = self._follow_loop(one, operands[0], found)
            elif one.opcode == "call" and one.calls["to_apply"] in self.computations:
                value = self._follow(one.calls["to_apply"], operands, found)
            else:
                value = frozenset().union(*map(_flat, operands))
                if one.opcode not in ("fusion", "conditional"):
                    for name in one.calls.values():  # asynchronous wrappers
                        if one.opcode.endswith("-start") and name in self.computations:
                            self._follow(name, operands, found)
            values[one.name] = value
            result = value if one.is_root else result
        return result

    def _follow_loop(
        self, one: Instruction, start: _Sources, found: dict[str, dict[str, _Sources]]
    ) -> _Sources:
        state = start
        while True:
            end = self._follow(one.calls["body"], [state], found)
            if isinstance(state, tuple) and isinstance(end, tuple):
                merged: _Sources = tuple(a | b for a, b in zip(state, end, strict=True))
            else:
                merged = _flat(state) | _flat(end)
            if merged == state:
                return state
            state = merged


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device that a compiled program takes.

    Attributes:
      arguments: of its inputs.
      temporary: besides inputs and outputs.
      peak: the most at any time.
    """

    arguments: int
    temporary: int
    peak: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says."""
    found = compiled.memory_analysis()
    assert found is not None  # every backend of jaxlib has one
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    whole = found.argument_size_in_bytes + found.temp_size_in_bytes + made
    return Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        max(whole, getattr(found, "peak_memory_in_bytes", 0)),
    )


def device_bytes(shapes: object) -> int:
    """Bytes that one device holds of a tree of arrays or shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def by_kind(collectives: Sequence[Collective]) -> str:
    """How many there are of each kind, and their bytes: "6 all-reduce of 0.51 MiB"."""
    lines = []
    for kind in sorted({one.kind for one in collectives}):
        sizes = [one.size for one in collectives if one.kind == kind]
        lines.append(f"{len(sizes)} {kind} of {sum(sizes) / 2**20:.2f} MiB")
    return ", ".join(lines) or "none"


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction | None:
    """Reads "type opcode(operands), attributes"."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.find("(")
    if end <= 0 or opening < 0:
        return None
    opcode = rest[:opening]
    closing = _closing(rest, opening)
    inside, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', attributes)
    index = re.search(r"\bindex=(\d+)", attributes) if opcode == "get-tuple-element" else None
    if opcode == "parameter":
        index = re.match(r"(\d+)", inside)
    calls = dict(re.findall(r"\b(calls|to_apply|body|condition|true_computation|"
                            r"false_computation)=%?([\w.\-]+)", attributes))  # fmt: skip
    if branches := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        calls |= {f"branch {i}": n for i, n in enumerate(_NAME.findall(branches[1]))}
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_arrays(shape)),
        operands=() if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside)),
        calls=calls,
        index=int(index[1]) if index else 0,
        op_name=op_name[1].replace("\\'", "'") if op_name else "",
        literal=inside,
        is_root=is_root,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text)


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 32)
        count = math.prod(int(n.lstrip("<=")) for n in sizes.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(count * bits // 8, bool(space and int(space[1])))


def _size(arrays: Sequence[Array]) -> int:
    return sum(array.size for array in arrays)


def _in_memory(arrays: Sequence[Array]) -> int:
    return sum(array.size for array in arrays if not array.on_chip)


def _flat(sources: _Sources) -> frozenset[bool]:
    return frozenset().union(*sources) if isinstance(sources, tuple) else sources


def _through_views(inside: Computation, one: Instruction) -> Instruction:
    """The instruction that a chain of views and conversions starts from."""
    while one.opcode in _VIEWS and one.operands:
        one = inside[one.operands[0]]
    return one
