"""Checkpoints of a training run: parameters, optimizer, step, random state and data, as one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from train.step import TrainState


class Checkpoints:
    """The checkpoints in a directory. Saving goes on in the background while training does.

    Args:
      directory: created if need be.
      every: steps between two checkpoints; one is also made when the machine is about to be taken.
      keep: how many of the last ones stay, beside the best.
    """

    def __init__(self, directory: Path, every: int, keep: int):
        policies = ocp.training.save_decision_policies
        preserve = ocp.training.preservation_policies
        best = preserve.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
            ),
            preservation_policy=preserve.AnyPreservationPolicy([preserve.LatestN(keep), best]),
            cleanup_tmp_directories=True,  # what a killed run left half-written
        )

    def save(
        self, state: TrainState, data: Any, loss: float | None, *, force: bool = False
    ) -> None:
        """Saves if a checkpoint is due, or if forced.

        Args:
          state: what training changes.
          data: the data iterator's state, a JSON value.
          loss: held-out loss by which the best is chosen; None if there is none yet.
          force: save now.
        """
        step = int(state.step)
        if not force and not self._checkpointer.should_save(step):
            return
        if self._checkpointer.latest and self._checkpointer.latest.step == step:
            return
        self._checkpointer.save_async(
            step,
            _storable(state),
            force=force,
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

    def close(self) -> None:
        """Waits until everything is saved."""
        self._checkpointer.close()


def _storable(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return fields | {"key": jax.random.key_data(state.key)}
