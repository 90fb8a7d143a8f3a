"""How examples become batches: order, packing, shares and resumption."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from proxy_jax.errors import InputError
from train.data import Batches, Batching
from train.examples import Example

T = 24
TYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segments": np.int32,
    "positions": np.int32,
    "lines": np.int32,
}


def make(count, longest=T, seed=0):
    """Examples of 1 to `longest` places, told apart by their lines and, mostly, their tokens."""
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(1, 1000, n + 1).astype(np.int32), rng.integers(0, 2, n + 1) > 0, line)
        for line, n in enumerate(rng.integers(1, longest + 1, count), 100)
    ]


def rows(batches):
    """The rows of all batches, as dicts of [T] arrays."""
    for batch in batches:
        for i in range(len(batch["tokens"])):
            yield {name: array[i] for name, array in batch.items()}


def lines(batches):
    """The examples' lines in the order in which they are seen."""
    return [
        int(row["lines"][row["segments"] == segment][0])
        for row in rows(batches)
        for segment in range(1, row["segments"].max() + 1)
    ]


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in TYPES
    )


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_whole_and_seen_once_an_epoch(packing, epochs):
    examples = make(300)
    by_line = {example.line: example for example in examples}
    batches = Batches(examples, Batching(8, T, seed=3, epochs=epochs, packing=packing))
    seen: Counter[int] = Counter()
    for row in rows(batches):
        segments = row["segments"]
        used = np.flatnonzero(segments)
        np.testing.assert_array_equal(used, np.arange(len(used)))  # empty places are the last ones
        np.testing.assert_array_equal(np.sort(segments[used]), segments[used])
        numbers = np.unique(segments[used])
        np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
        assert packing or len(numbers) <= 1
        for number in numbers:
            at = segments == number
            (line,) = set(row["lines"][at].tolist())
            example = by_line[line]
            np.testing.assert_array_equal(row["tokens"][at], example.tokens[:-1])
            np.testing.assert_array_equal(row["targets"][at], example.tokens[1:])
            np.testing.assert_array_equal(row["weights"][at], example.trained[1:])
            np.testing.assert_array_equal(row["positions"][at], np.arange(at.sum()))
            seen[line] += 1
        assert not any(row[name][segments == 0].any() for name in TYPES)
    assert seen == dict.fromkeys(by_line, epochs)


@pytest.mark.parametrize("packing", [True, False])
def test_shapes_and_types_are_fixed(packing):
    batches = Batches(make(45), Batching(16, T, packing=packing))
    found = list(batches)
    assert len(found) == len(batches)
    for batch in found:
        assert {name: array.dtype for name, array in batch.items()} == TYPES
        assert {array.shape for array in batch.values()} == {(16, T)}
    last = found[-1]["segments"].max(axis=1) > 0
    assert last.any()
    assert not last.all()  # filled with empty rows
    if not packing:
        assert len(found) == 3
        np.testing.assert_array_equal(last, np.arange(16) < 45 - 32)


def test_packing_by_hand():
    """Places 4, 3 and 1 in rows of 5: whichever comes first, 4 + 1 and 3, or 4 and 3 + 1."""
    examples = [
        Example(np.arange(10, 15, dtype=np.int32), np.array([0, 0, 1, 1, 1], bool), 1),
        Example(np.arange(20, 24, dtype=np.int32), np.array([0, 1, 0, 1], bool), 2),
        Example(np.arange(30, 32, dtype=np.int32), np.array([0, 1], bool), 3),
    ]
    (batch,) = Batches(examples, Batching(2, 5))
    (first,) = np.flatnonzero((batch["lines"] == 1).any(axis=1))
    np.testing.assert_array_equal(batch["tokens"][first, :4], [10, 11, 12, 13])
    np.testing.assert_array_equal(batch["targets"][first, :4], [11, 12, 13, 14])
    np.testing.assert_array_equal(batch["weights"][first, :4], [0, 1, 1, 1])
    assert sorted(np.count_nonzero(batch["segments"], axis=1)) in ([3, 5], [4, 4])
    np.testing.assert_array_equal(batch["positions"][batch["lines"] == 3], [0])
    np.testing.assert_array_equal(batch["targets"][batch["lines"] == 3], [31])


@pytest.mark.parametrize("packing", [True, False])
def test_offsets_follow_the_trained_tokens_of_a_row(packing):
    rng = np.random.default_rng(1)
    examples = [
        dataclasses.replace(
            example,
            offsets=rng.standard_normal((example.trained[1:].sum(), 5)).astype(np.float16),
        )
        for example in make(60)
    ]
    by_line = {example.line: example.offsets for example in examples}
    batches = list(Batches(examples, Batching(8, T, packing=packing)))
    most = max(int(batch["weights"].sum(axis=1).max()) for batch in batches)
    assert {batch["offsets"].shape for batch in batches} == {(8, most, 5)}
    assert {batch["offsets"].dtype for batch in batches} == {np.dtype(np.float16)}
    for row in rows(batches):
        used = {line: iter(offsets) for line, offsets in by_line.items()}
        wanted = [next(used[line]) for line in row["lines"][row["weights"] > 0]]
        np.testing.assert_array_equal(row["offsets"], [*wanted, *np.zeros((most - len(wanted), 5))])
    plain = Batches(make(60), Batching(8, T, packing=packing))
    assert same(plain, batches)
    assert all("offsets" not in batch for batch in plain)


def test_packing_fills_rows():
    examples = make(600)
    places = sum(len(example.tokens) - 1 for example in examples)
    batches = Batches(examples, Batching(1, T))
    assert 0.9 < places / (T * len(batches)) <= 1.0
    assert len(Batches(examples, Batching(1, T, packing=False))) == 600


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_depends_on_the_seed_alone(packing):
    examples = make(200)
    batching = Batching(8, T, seed=1, epochs=2, packing=packing)
    batches = list(Batches(examples, batching))
    np.random.seed(99)
    assert same(batches, Batches(examples, batching))
    order = lines(batches)
    wider = Batching(16, T, seed=1, epochs=2, packing=packing)
    assert lines(Batches(examples, wider)) == order
    other = Batching(8, T, seed=2, epochs=2, packing=packing)
    assert lines(Batches(examples, other)) != order
    first, second = order[:200], order[200:]
    assert sorted(first) == sorted(second) == [example.line for example in examples]
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("packing", [True, False])
def test_resuming_anywhere_gives_the_remaining_batches(packing):
    batches = Batches(make(150), Batching(8, T, seed=5, epochs=2, packing=packing))
    whole = list(batches)
    iterator = iter(batches)
    states = [json.dumps(iterator.get_state())]
    for _ in whole:
        next(iterator)
        states.append(json.dumps(iterator.get_state()))
    for done, state in enumerate(states):
        fresh = iter(Batches(make(150), Batching(8, T, seed=5, epochs=2, packing=packing)))
        fresh.set_state(json.loads(state))
        assert same(fresh, whole[done:])
    iterator.set_state(json.loads(states[2]))  # one that was used before
    assert same(iterator, whole[2:])


@pytest.mark.parametrize("packing", [True, False])
def test_each_batch_is_shared_out(packing):
    examples = make(157)
    whole = list(Batches(examples, Batching(8, T, seed=7, packing=packing)))
    shares = [
        list(Batches(examples, Batching(8, T, seed=7, packing=packing, parts=(i,), part_count=4)))
        for i in range(4)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    assert shares[0][0]["tokens"].shape == (2, T)
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in TYPES}
        for parts in zip(*shares, strict=True)
    ]
    assert same(joined, whole)
    assert sorted(line for share in shares for line in lines(share)) == [
        example.line for example in examples
    ]
    # The parts of one process need not lie side by side.
    split = Batching(8, T, seed=7, packing=packing, parts=(0, 3), part_count=4)
    for got, *parts in zip(Batches(examples, split), shares[0], shares[3], strict=True):
        assert same([got], [{k: np.concatenate([part[k] for part in parts]) for k in TYPES}])


def test_what_cannot_be_batched():
    def fails(message, function):
        with pytest.raises(InputError) as error:
            function()
        assert str(error.value) == message

    for field in ("batch_size", "length", "epochs", "part_count"):
        sizes = {"batch_size": 4, "length": T, field: 0}
        fails(f"{field} must be at least 1, not 0", lambda sizes=sizes: Batching(**sizes))
    fails("seed must be between 0 and 2**32 - 1, not -1", lambda: Batching(4, T, seed=-1))
    fails("parts (0, 2) of 2: no such ones", lambda: Batching(4, T, parts=(0, 2), part_count=2))
    fails("batch_size 4 does not divide into 3 parts", lambda: Batching(4, T, part_count=3))
    fails("no examples to make batches of", lambda: Batches([], Batching(4, T)))
    long = Example(np.ones(T + 2, np.int32), np.ones(T + 2, bool), 17)
    fails(
        f"line 17: {T + 2} tokens do not fit in a row of {T} places",
        lambda: Batches([*make(3), long], Batching(4, T)),
    )
