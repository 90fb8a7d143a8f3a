"""Times the compiled training step, on rows of random tokens if there are no others."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from train.step import Batch, TrainState


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Makes rows without a place that is empty or not trained, [B, T] arrays as train.data's."""
    tokens = np.random.default_rng(0).integers(vocabulary, size=(rows, length + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def time_steps(
    step: Any, state: TrainState, frozen: Any, batch: Batch, repeats: int
) -> tuple[list[float], dict[str, float]]:
    """Runs a step over and over on one batch.

    Args:
      step: train_step compiled for a recipe: (state, frozen, batch) -> state, metrics.
      state: donated.
      frozen, batch: as in train_step.
      repeats: measured steps, after one that touches memory first.

    Returns:
      Seconds of each, and the metrics of the last.
    """
    seconds = []
    for i in tqdm(range(repeats + 1), unit="step", leave=False):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        if i:
            seconds.append(time.perf_counter() - started)
    return seconds, {name: float(value) for name, value in metrics.items()}
