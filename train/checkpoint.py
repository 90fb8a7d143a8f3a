"""Checkpoints of a training run: parameters, optimizer, step, random state and data, as one.

And when to make one out of turn: the machine is about to be taken away.
"""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import processes
from train.step import TrainState


class Checkpoints:
    """The checkpoints in a directory. Saving goes on in the background while training does.

    A context manager, which waits in the end until everything is saved.

    Args:
      directory: created if need be.
      every: steps between two checkpoints.
      keep: how many of the last ones stay, beside the best.
    """

    def __init__(self, directory: Path, every: int, keep: int):
        self._every = every
        preserve = ocp.training.preservation_policies
        best = preserve.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=preserve.AnyPreservationPolicy([preserve.LatestN(keep), best]),
            cleanup_tmp_directories=True,  # what a killed run left half-written
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after this many steps."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, data: Any, loss: float | None) -> None:
        """Starts to save; returns when the state may change again.

        Args:
          step: updates made.
          state: what training changes.
          data: the data iterator's state, a JSON value.
          loss: held-out loss by which the best is chosen; None if there is none yet.
        """
        if self._checkpointer.latest and self._checkpointer.latest.step == step:
            return
        self._checkpointer.save_async(
            step,
            _storable(state),
            force=True,
            metrics=None if loss is None else {"loss": loss},
            custom_metadata={"data": data},
        )

    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """The latest checkpoint, on the mesh of `like`, and the data iterator's state.

        Args:
          like: a fresh state: shapes, dtypes and shardings to restore to.

        Returns:
          None if there is no checkpoint.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _storable(like)
        )
        stored = self._checkpointer.load(latest.step, abstract)
        key = jax.random.wrap_key_data(stored.pop("key"))
        metadata = self._checkpointer.metadata(latest.step).custom_metadata
        return TrainState(**stored, key=key), metadata["data"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What is left to save is not waited for if another process of the job would have to help.
        if not processes.lost(error):
            self._checkpointer.close()


def _storable(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return fields | {"key": jax.random.key_data(state.key)}


class Preemption:
    """Whether the machine is about to be taken away: SIGTERM, agreed on by all processes.

    A context manager. Among several processes JAX's coordination service catches the signal and
    chooses a step that all have yet to make; one process alone catches it here. A second signal
    ends the program at once.
    """

    def __init__(self) -> None:
        self._signalled = False

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def noticed(self, step: int) -> bool:
        """Whether to save and stop after this step; the same answer in every process."""
        if jax.process_count() == 1:
            return self._signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, *_: object) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
