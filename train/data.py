"""Batches of training examples: shuffled, packed and shared out by Grain.

B rows of a batch over all processes, T places of a row, P processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from proxy_jax.errors import InputError
from train.examples import Example

Batch = dict[str, np.ndarray]

# Rows that are packed together. More of them leave fewer places empty: lengths as in GSM8K fill 83 %
# of the places with 8 rows at a time, 93 % with 128 and 95 % with 256.
_PACKED_TOGETHER = 128
_TOKEN, _TARGET, _TRAINED, _LINE = range(4)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples become batches.

    Attributes:
      batch_size: B, rows of a batch over all processes.
      length: T, places of a row.
      seed: of the order.
      epochs: how often each example is seen.
      packing: several examples share a row; otherwise each has its own.
      process_index, process_count: this process reads rows [index * B / P, (index + 1) * B / P) of
        every batch. What a batch holds does not depend on P.

    Raises:
      InputError: a value out of range, or a batch that does not divide among the processes.
    """

    batch_size: int
    length: int
    seed: int = 0
    epochs: int = 1
    packing: bool = True
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        for field in ("batch_size", "length", "epochs", "process_count"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and 2**32 - 1, not {self.seed}")
        if not 0 <= self.process_index < self.process_count:
            raise InputError(f"process {self.process_index} of {self.process_count}: no such one")
        if self.batch_size % self.process_count:
            raise InputError(
                f"batch_size {self.batch_size} does not divide among {self.process_count} processes"
            )


def batches(examples: Sequence[Example], batching: Batching) -> grain.IterDataset:
    """The batches of all epochs, in an order that depends on the seed alone.

    iter() of it yields dicts of [B / P, T] arrays: "tokens", int32; "targets", int32, the next
    token of the same example; "weights", float32, 1 where the target is trained; "segments",
    int32, the example's number in its row from 1, 0 where the row is empty; "positions", int32,
    from 0 in every example; "lines", int32, the example's line in its file. All are 0 in empty
    places. The last batch is filled with empty rows. An epoch's last examples may share a row with
    the next one's first.

    The iterator's get_state() is a small dict that JSON can hold; set_state() of a new iterator
    over the same examples and batching goes on from there exactly.

    Raises:
      InputError: no examples, or one that is longer than a row.
    """
    rows = _rows(examples, batching, [_places(example) for example in examples])
    whole = rows.batch(batching.batch_size, drop_remainder=False)
    return whole.map(lambda packed: _batch(packed, batching))


def num_batches(examples: Sequence[Example], batching: Batching) -> int:
    """How many batches the epochs make, found by packing the examples' lengths.

    Raises:
      InputError: as batches().
    """
    # Without columns: packing looks at the number of places only, and copies nothing.
    empty = [np.zeros((len(example.tokens) - 1, 0), np.int32) for example in examples]
    rows = sum(1 for _ in _rows(examples, batching, empty))
    return -(-rows // batching.batch_size)


def _rows(
    examples: Sequence[Example], batching: Batching, places: list[np.ndarray]
) -> grain.IterDataset:
    """Rows of [T, columns], made of one [n, columns] array an example."""
    if not examples:
        raise InputError("no examples to make batches of")
    for example in examples:
        if len(example.tokens) - 1 > batching.length:
            raise InputError(
                f"line {example.line}: {len(example.tokens)} tokens do not fit in a row of "
                f"{batching.length} places"
            )
    shuffled = grain.MapDataset.source([{"places": array} for array in places])
    shuffled = shuffled.seed(batching.seed).shuffle().repeat(batching.epochs)
    return grain.experimental.FirstFitPackIterDataset(
        # The examples are in memory: threads that read ahead would only cost.
        shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"places": batching.length},
        num_packing_bins=_PACKED_TOGETHER,
        max_sequences_per_bin=None if batching.packing else 1,
        seed=batching.seed,
    )


def _places(example: Example) -> np.ndarray:
    """[n, 4] int32: what stands in each place that an example takes."""
    places = np.empty((len(example.tokens) - 1, 4), np.int32)
    places[:, _TOKEN] = example.tokens[:-1]
    places[:, _TARGET] = example.tokens[1:]
    places[:, _TRAINED] = example.trained[1:]
    places[:, _LINE] = example.line
    return places


def _batch(packed: dict[str, Any], batching: Batching) -> Batch:
    """This process's rows; packed holds at most B of them."""
    share = batching.batch_size // batching.process_count
    mine = slice(batching.process_index * share, (batching.process_index + 1) * share)

    def filled(rows: np.ndarray) -> np.ndarray:
        missing = batching.batch_size - len(rows)
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))[mine]

    places = filled(packed["places"])  # [B / P, T, 4]
    return {
        "tokens": places[..., _TOKEN],
        "targets": places[..., _TARGET],
        "weights": places[..., _TRAINED].astype(np.float32),
        "segments": filled(packed["places_segment_ids"]),
        "positions": filled(packed["places_positions"]),
        "lines": places[..., _LINE],
    }
