"""Checkpoints of a training run: parameters, optimizer, step, random state and data, as one.

And when to make one out of turn: the machine is about to be taken away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from proxy_jax.errors import InputError
from proxy_jax.jobs import processes
from proxy_jax.reading import reason
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
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(f"{self._directory}: not a directory")
        preserve = ocp.training.preservation_policies
        best = preserve.BestN(
            get_metric_fn=lambda metrics: -metrics["loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._quiet = _Quiet()
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
                custom_metadata={"data": data, "sums": _sums(state)},
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
            state, problem = self._load(step, abstract, data)
            if state is None:
                damaged[step] = problem
                continue
            moved = [
                f"checkpoint {self._directory / str(later)} is damaged ({why}), renamed to "
                f"{self._set_aside(later)}"
                for later, why in damaged.items()
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
        state, problem = None, ""
        try:
            stored = self._checkpointer.load(step, abstract)
            metadata = self._checkpointer.metadata(step).custom_metadata
            data.set_state(metadata["data"])
            key = jax.random.wrap_key_data(stored.pop("key"))
            restored = TrainState(**stored, key=key)
            if changed := _differs(metadata["sums"], _sums(restored)):
                raise ValueError(f"{changed} is not what was saved")
            state = restored
        except Exception as error:  # of Orbax, TensorStore, or what is made of their files
            if processes.lost(error):
                raise
            problem = _cause(error)
        if jax.process_count() > 1:
            whole = multihost_utils.process_allgather(np.bool_(state is not None))
            if state is not None and not whole.all():
                state, problem = None, "another process cannot read it"
        return state, problem

    def _set_aside(self, step: int) -> str:
        """Renames a damaged checkpoint; its new name."""
        path = self._directory / str(step)
        names = (f"{step}.damaged{count or ''}" for count in itertools.count())
        name = next(name for name in names if not path.with_name(name).exists())
        if processes.is_first():
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
            raise InputError(f"{self._directory}: {what} ({_cause(error)})") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What is left to save is not waited for if another process of the job would have to help.
        if not processes.lost(error):
            with self._failing(_CANNOT_WRITE):
                self._checkpointer.close()
        if error is None:
            self._quiet.end()


def _storable(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return fields | {"key": jax.random.key_data(state.key)}


def _sums(state: TrainState) -> dict[str, int]:
    """Check sums of the arrays by name; they do not depend on the mesh."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_storable(state))
    sums = jax.device_get(_sum_bits([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(total)
        for (path, _), total in zip(leaves, sums, strict=True)
    }


@jax.jit
def _sum_bits(arrays: list[jax.Array]) -> list[jax.Array]:
    """Each array's bits as 32-bit integers, summed modulo 2^32: any one that flips shows."""
    return [jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32), dtype=jnp.uint32) for x in arrays]


def _differs(saved: dict[str, int], restored: dict[str, int]) -> str | None:
    return next((name for name in restored if restored[name] != saved.get(name)), None)


def _cause(error: BaseException) -> str:
    """What went wrong first, without the settings that TensorStore appends."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {reason(error)}".split(" [")[0]


class _Quiet:
    """Keeps Orbax's threads and tasks from printing errors, which are raised besides.

    They do so late: after an error it must not end.
    """

    def __init__(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        self._disabled = [logger.disabled for logger in self._loggers]
        for logger in self._loggers:
            logger.disabled = True
        self._hook, sys.unraisablehook = sys.unraisablehook, self._print_others
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def end(self) -> None:
        """Lets them print again."""
        for logger, disabled in zip(self._loggers, self._disabled, strict=True):
            logger.disabled = disabled
        sys.unraisablehook = self._hook
        self._warnings.__exit__(None, None, None)

    def _print_others(self, unraisable: sys.UnraisableHookArgs) -> None:
        # What TensorStore still reads when a load has failed finds its loop closed.
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not (closed or inspect.iscoroutine(unraisable.object)):
            self._hook(unraisable)


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
