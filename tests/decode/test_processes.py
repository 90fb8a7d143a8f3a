"""The same command in several processes makes one result, or ends in all of them and goes on."""

import contextlib
import socket
import time
from pathlib import Path

import jax
import pytest

from proxy_jax.jobs import processes
from tests.decode import jobs

# Few rows at a time and a look of the host at every step: there is time to kill something.
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
FIELDS = {"distributed": True, "save_token_ids": True, "batch_size": 2, "chunk_steps": 1, **MESH}


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(config, index, port, *more):
    join = f"JAX_COORDINATOR_ADDRESS=localhost:{port} JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index}"
    devices = "XLA_FLAGS=--xla_force_host_platform_device_count=4"
    return jobs.start(config, "generate", *more, before=f"export {join} {devices}; ")


def start_both(config, *more_of_second):
    port = free_port()
    return start(config, 0, port), start(config, 1, port, *more_of_second)


def last_line(process, status):
    """Waits for a process that fails, and has one line to say about it."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert "stack trace" not in errors
    lines = errors.strip().split("\n")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], errors
    return lines[-1]


@pytest.fixture(scope="module")
def together(llama, tmp_path_factory):
    """A job of two processes of four devices, and their outputs on the terminal."""
    directory = tmp_path_factory.mktemp("together")
    config = jobs.config_of(llama, directory, **FIELDS)
    # The second sees another file system.
    processes = start_both(config, f"--config.output_dir={directory / 'elsewhere'}")
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert not (directory / "elsewhere").exists()
    return config, ends


def test_two_processes_of_four_devices(together, expected):
    config, ends = together
    assert ["8 rows in" in output for output, _ in ends] == [True, False]
    assert [row["token_ids"] for row in jobs.outputs(config)] == expected


def test_a_lost_process_ends_the_job_which_goes_on(together, llama, tmp_path):
    config = jobs.config_of(llama, tmp_path, **FIELDS)
    output = Path(config.output_dir) / "outputs.jsonl"
    done = 0
    for lost in (1, 0):
        processes = start_both(config)
        while all(process.poll() is None for process in processes):
            if output.exists() and output.read_bytes().count(b"\n") > done:
                break
            time.sleep(0.005)
        processes[lost].kill()
        killed = time.monotonic()
        _, errors = processes[1 - lost].communicate(timeout=300)
        assert time.monotonic() - killed < 30
        assert processes[1 - lost].returncode not in (0, 2), errors
        processes[lost].communicate()
        assert "Traceback" not in errors
        assert "stack trace" not in errors
        lines = [line for line in errors.strip().split("\n") if line.startswith("error: ")]
        assert lines == errors.strip().split("\n")[-1:], errors
        assert lines[0].startswith("error: another process of the job is gone")
        done = output.read_bytes().count(b"\n")
        assert 0 < done < 8
    ends = [process.communicate(timeout=600) for process in start_both(config)]
    assert "8 rows in" in ends[0][0], ends
    whole = Path(together[0].output_dir) / "outputs.jsonl"
    assert output.read_bytes() == whole.read_bytes()


def test_processes_that_were_given_different_jobs(llama, tmp_path):
    first, second = start_both(jobs.config_of(llama, tmp_path, **FIELDS), "--config.alpha=0.5")
    assert "another job than process 0 (alpha: 1.0, now 0.5)" in last_line(second, 2)
    assert "another process of the job is gone" in last_line(first, 1)


def test_a_mesh_without_some_process(llama, tmp_path):
    config = jobs.config_of(llama, tmp_path, distributed=True)
    for process in start_both(config):
        assert last_line(process, 2) == (
            "error: mesh data=1 x fsdp=1 x tensor=1 takes 1 of the 8 devices, and of some of the "
            "2 processes none; one axis may be -1, for all that are left"
        )


def test_who_takes_part_must_be_said(llama, tmp_path):
    config = jobs.config_of(llama, tmp_path, distributed=True)
    alone = jobs.start(config)
    unclear = jobs.start(config, before="export JAX_PROCESS_ID=first; ")
    assert "JAX_COORDINATOR_ADDRESS" in last_line(alone, 2)
    assert last_line(unclear, 2).endswith("JAX_PROCESS_ID must be a number, not 'first'")


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("NCCL operation failed: remote process exited or there was a network error", True),
        ("UNAVAILABLE: Connection closed by peer", True),
        ("NCCL operation ncclCommInitRank failed: invalid usage", False),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_which_errors_mean_a_lost_process(message, lost):
    error = jax.errors.JaxRuntimeError(message)
    assert processes.lost(error) is (error if lost else None)
    assert processes.lost(ValueError(message)) is None


def test_a_lost_process_behind_another_error():
    """As Orbax reports a process that died while a checkpoint was written."""
    barrier = TimeoutError("Timeout waiting at barrier 'x'. The original error raised was: ...")
    later = TimeoutError("ChainedFuture completed 3/4 futures but timed out after 84.40 seconds.")
    later.__cause__ = barrier
    assert processes.lost(later) is barrier
    assert processes.lost(TimeoutError("a web server's")) is None
