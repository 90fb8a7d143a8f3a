"""Batches of training examples: shuffled, packed and shared out by Grain.

B rows of a batch over all processes, T places of a row, P equal parts of a batch, M those of this
process, N trained tokens of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from proxy_jax.errors import InputError
from train.examples import Example

# Rows that are packed together. More leave fewer places empty: of GSM8K in rows of 512, 8 rows at a
# time fill 89 % of the places, 128 fill 93.5 % and 1,024 fill 94.4 %.
_PACKED_TOGETHER = 1024
# The examples are in memory: threads that read ahead would only cost.
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples become batches.

    Attributes:
      batch_size: B, rows of a batch over all processes.
      length: T, places of a row.
      seed: of the order.
      epochs: how often each example is seen.
      packing: several examples share a row; otherwise each has its own.
      parts, part_count: of every batch this process reads the parts k in `parts`, rows
        [k * B / P, (k + 1) * B / P), in order. What a batch holds does not depend on P.

    Raises:
      InputError: a value out of range, or a batch that does not divide into the parts.
    """

    batch_size: int
    length: int
    seed: int = 0
    epochs: int = 1
    packing: bool = True
    parts: tuple[int, ...] = (0,)
    part_count: int = 1

    def __post_init__(self):
        for field in ("batch_size", "length", "epochs", "part_count"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and 2**32 - 1, not {self.seed}")
        if not self.parts or not set(self.parts) <= set(range(self.part_count)):
            raise InputError(f"parts {self.parts} of {self.part_count}: no such ones")
        if self.batch_size % self.part_count:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into {self.part_count} parts"
            )


class Batches:
    """The batches of all epochs, in an order that depends on the seed alone.

    Every epoch has another order, and its own rows. len() is the number of batches. iter() yields
    dicts of [M * B / P, T] arrays: "tokens", int32; "targets", int32, the next token of the same
    example; "weights", float32, 1 where the target is trained; "segments", int32, the example's
    number in its row, from 1; "positions", int32, from 0 in every example; "lines", int32, the
    example's line in its file. All are 0 in empty places, and the last batch is filled with empty
    rows.

    Examples with offsets add "offsets", [M * B / P, N, V] float16: a row's k-th trained token has
    its offsets at k. N is the most that any row has; what is not trained takes no memory.

    The iterator's get_state() is a small dict that JSON can hold; set_state() of an iterator over
    the same examples and batching goes on from there exactly.

    Raises:
      InputError: no examples, or one that is longer than a row.
    """

    def __init__(self, examples: Sequence[Example], batching: Batching):
        if not examples:
            raise InputError("no examples to make batches of")
        for example in examples:
            if len(example.tokens) - 1 > batching.length:
                raise InputError(
                    f"line {example.line}: {len(example.tokens)} tokens do not fit in a row of "
                    f"{batching.length} places"
                )
        rows = list(_rows(examples, batching))
        trained = [int(np.count_nonzero(example.trained[1:])) for example in examples]
        most = max(sum(trained[i] for i in row) for row in rows)
        offsets = examples[0].offsets
        shape = None if offsets is None else (most, offsets.shape[1])
        rows += [()] * (-len(rows) % batching.batch_size)
        part = batching.batch_size // batching.part_count
        mine = [
            row for i, row in enumerate(rows) if i % batching.batch_size // part in batching.parts
        ]
        self._dataset = (
            grain.MapDataset.source(mine)
            .map(lambda row: _arrays([examples[i] for i in row], batching.length, shape))
            .batch(part * len(batching.parts))
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return iter(self._dataset.to_iter_dataset(_READ))


def _rows(examples: Sequence[Example], batching: Batching) -> Iterator[Sequence[int]]:
    """Which examples stand in each row, epoch after epoch."""
    order = grain.MapDataset.range(len(examples)).seed(batching.seed).shuffle()
    order = order.repeat(batching.epochs)  # shuffles each epoch anew
    for epoch in range(batching.epochs):
        this = order[epoch * len(examples) : (epoch + 1) * len(examples)]
        if not batching.packing:
            yield from ((int(i),) for i in this.to_iter_dataset(_READ))
            continue
        packed = grain.experimental.FirstFitPackIterDataset(
            this.map(lambda i: _length_only(int(i), examples[i])).to_iter_dataset(_READ),
            length_struct={"places": batching.length},
            num_packing_bins=_PACKED_TOGETHER,
            meta_features=("example",),
            seed=batching.seed,
        )
        yield from (row["example"] for row in packed)


def _length_only(i: int, example: Example) -> dict[str, Any]:
    """What the packing needs of an example: as many places, with nothing in them."""
    return {"places": np.zeros((len(example.tokens) - 1, 0)), "example": i}


def _arrays(
    examples: Sequence[Example], length: int, offsets: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """One row: [T] arrays, and offsets of a shape [N, V]."""
    names = ("tokens", "targets", "segments", "positions", "lines")
    row = {name: np.zeros(length, np.int32) for name in names}
    row["weights"] = np.zeros(length, np.float32)
    start = 0
    for segment, example in enumerate(examples, 1):
        places = slice(start, start + len(example.tokens) - 1)
        row["tokens"][places] = example.tokens[:-1]
        row["targets"][places] = example.tokens[1:]
        row["weights"][places] = example.trained[1:]
        row["segments"][places] = segment
        row["positions"][places] = np.arange(len(example.tokens) - 1)
        row["lines"][places] = example.line
        start = places.stop
    if offsets is not None:
        row["offsets"] = np.zeros(offsets, np.float16)
        found = [example.offsets for example in examples if example.offsets is not None]
        if found:
            whole = np.concatenate(found)
            row["offsets"][: len(whole)] = whole
    return row
