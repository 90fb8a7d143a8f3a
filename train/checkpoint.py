"""Checkpoints of a training run: parameters, optimizer, step, random state and data, as one.

And when to make one out of turn: the machine is about to be taken away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import processes
from proxy_jax.errors import InputError
from proxy_jax.reading import reason as reason_of
from train.step import TrainState

_CANNOT_WRITE = "cannot write; the same command goes on from the last checkpoint that is whole"


class Checkpoints:
    """The checkpoints in a directory. Saving goes on in the background while training does.

    A context manager, which waits in the end until everything is saved.

    Args:
      directory: created if need be.
      every: steps between two checkpoints.
      keep: how many of the last ones stay, beside the best.

    Raises:
      InputError: the directory cannot be read; on leaving, too: what was saved last could not be
        written.
    """

    def __init__(self, directory: Path, every: int, keep: int):
        self._every = every
        self._directory = directory.absolute()
        preserve = ocp.training.preservation_policies
        best = preserve.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        with self._failing("cannot be read"):
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
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

        Raises:
          InputError: the disk is full or fails.
        """
        if self._checkpointer.latest and self._checkpointer.latest.step == step:
            return
        with self._failing(_CANNOT_WRITE):
            self._checkpointer.save_async(
                step,
                _storable(state),
                force=True,
                metrics=None if loss is None else {"loss": loss},
                custom_metadata={"data": data},
            )

    def restore(self, like: TrainState, data: Any) -> tuple[TrainState, str]:
        """Restores the latest checkpoint that is whole, on the mesh of `like`.

        Later ones, which are damaged, are renamed: their steps will be saved again.

        Args:
          like: a fresh state: shapes, dtypes and shardings to restore to.
          data: a data iterator, which is set to where it was.

        Returns:
          The state, `like` if there is no checkpoint; and what is wrong with later checkpoints.

        Raises:
          InputError: there are checkpoints, and none is whole.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _storable(like)
        )
        damaged: dict[int, str] = {}
        for step in sorted((c.step for c in self._checkpointer.checkpoints), reverse=True):
            state, reason = self._load(step, abstract, data)
            if state is None:
                damaged[step] = reason
                continue
            moved = [
                f"checkpoint {self._directory / str(later)} is damaged ({reason}), renamed to "
                f"{self._set_aside(later)}"
                for later, reason in damaged.items()
            ]
            if moved:
                self._checkpointer.reload()
            return state, "; ".join(moved)
        if damaged:
            steps = ", ".join(map(str, damaged))
            raise InputError(
                f"{self._directory}: no checkpoint is whole, of {steps} ({damaged[max(damaged)]})"
            )
        return like, ""

    def _load(self, step: int, abstract: Any, data: Any) -> tuple[TrainState | None, str]:
        """The state after a step, or none and why; the same answer in every process."""
        state, reason = None, ""
        try:
            stored = self._checkpointer.load(step, abstract)
            metadata = self._checkpointer.metadata(step).custom_metadata
            data.set_state(metadata["data"])
            key = jax.random.wrap_key_data(stored.pop("key"))
            restored = TrainState(**stored, key=key)
            if int(restored.step) == step:
                state = restored
            else:  # what is lost may be read as zeros
                reason = f"it has step {int(restored.step)}"
        except Exception as error:  # of Orbax, TensorStore, or what is made of their files
            if processes.lost(error):
                raise
            reason = reason_of(error)
        if jax.process_count() > 1:
            whole = multihost_utils.process_allgather(np.bool_(state is not None))
            if state is not None and not whole.all():
                state, reason = None, "another process cannot read it"
        return state, reason

    def _set_aside(self, step: int) -> str:
        """Renames a damaged checkpoint; its new name."""
        path = self._directory / str(step)
        names = (f"{step}.damaged{count or ''}" for count in itertools.count())
        name = next(name for name in names if not path.with_name(name).exists())
        if jax.process_index() == 0:
            with self._failing(_CANNOT_WRITE):
                path.rename(path.with_name(name))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        return name

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turns what Orbax raises into an InputError, except the loss of another process."""
        try:
            yield
        except Exception as error:
            if processes.lost(error):
                raise
            raise InputError(f"{self._directory}: {what} ({reason_of(error)})") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What is left to save is not waited for if another process of the job would have to help.
        if not processes.lost(error):
            with self._failing(_CANNOT_WRITE):
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
