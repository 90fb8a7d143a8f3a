"""Several processes as one job: how they join, tell each other something, and end together.

Every process runs the same program on the same prompts or rows; jax.distributed makes one mesh of
their devices, and what each holds and computes follows from the mesh. The first one writes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from proxy_jax.errors import InputError
from proxy_jax.jobs import manifest, native_stderr

# Process 0 may have results to score and draw long after the others have nothing left to do. They
# wait for it in the end; the heartbeats, 100 seconds by default, say whether it is still there.
_WAIT_AT_THE_END = 7 * 24 * 3600
_PATIENCE = 10  # seconds in which a process that fails lets the others say why they fail
# How collectives and the coordination service report a process that does not answer.
_NO_ANSWER = re.compile(
    r"gloo|nccl.*(remote|timed out|timeout)|unavailable|deadline_exceeded|aborted|barrier"
    r"|coordination",
    re.IGNORECASE | re.DOTALL,
)


def join(*, catches_sigterm: bool) -> None:
    """Joins the job's other processes.

    TPU pods, Slurm and Open MPI say themselves who takes part. Elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    If they do not all come within five minutes JAX ends this one; native_stderr says so.

    Args:
      catches_sigterm: JAX takes the signal and tells all processes of it, which is then theirs to
        obey (multihost_utils.reached_preemption_sync_point); otherwise it ends this one.

    Raises:
      InputError: nothing says who takes part.
    """
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    _filter_native_stderr()
    jax.config.update("jax_enable_preemption_service", catches_sigterm)
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            shutdown_timeout_seconds=_WAIT_AT_THE_END,
        )
    except ValueError as error:
        raise InputError(
            f"distributed: {error} TPU slices and Slurm say who takes part; elsewhere set "
            "JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        ) from error
    except RuntimeError as error:
        raise InputError(f"distributed: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """The first process's value, a JSON value, in every process. All of them must call it."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = data
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def check_same(content: dict[str, Any]) -> None:
    """Refuses to do another job than the first process: the two would wait for each other forever.

    Args:
      content: of this process's manifest, see manifest.new.

    Raises:
      InputError: names the field that differs.
    """
    if changed := manifest.changed(from_first(content), content, free=("output_dir",)):
        raise InputError(f"this process was given another job than process 0 ({changed})")


def lost(error: BaseException | None) -> BaseException | None:
    """Of an error and those that led to it, the one that says that another process is lost."""
    while error is not None:
        # Orbax turns what JAX raises at its barriers into timeouts.
        of_others = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError)
        if of_others and _NO_ANSWER.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def fail(error: BaseException) -> NoReturn:
    """Ends this process for an error that is not the user's input: a lost process, or a bug."""
    if cause := lost(error):
        reason = " ".join(str(cause).split("\n")[0].split())
        # Through the filter: JAX may be about to say the same.
        os.write(2, f"{native_stderr.LOST} ({reason}); {native_stderr.AGAIN}\n".encode())
        _end(1)
    traceback.print_exception(error)
    leave(1)


def leave(status: int) -> NoReturn:
    """Ends this process with a status, soon: the others may wait for it in a collective.

    Where all fail alike they meet and end together; otherwise its end tells the others.
    """
    meeting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    meeting.start()
    meeting.join(_PATIENCE)
    _end(status)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without JAX's own wait for the others


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdigit():
        raise InputError(f"distributed: {variable} must be a number, not {text!r}")
    return int(text)


def _filter_native_stderr() -> None:
    """Puts native_stderr.py behind file descriptor 2; Python's own stderr stays where it is."""
    ours = os.dup(2)
    sys.stderr = os.fdopen(ours, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    program = Path(native_stderr.__file__)
    filter_ = subprocess.Popen([sys.executable, "-S", program], stdin=subprocess.PIPE, stderr=ours)
    assert filter_.stdin is not None
    os.dup2(filter_.stdin.fileno(), 2)
    filter_.stdin.close()
