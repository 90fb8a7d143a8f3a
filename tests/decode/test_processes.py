"""The same command in two processes of four devices each makes one result."""

import contextlib
import socket

from tests.decode import jobs


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_of_four_devices(llama, expected, tmp_path):
    config = jobs.config_of(
        llama,
        tmp_path,
        distributed=True,
        save_token_ids=True,
        mesh__data=2,
        mesh__fsdp=2,
        mesh__tensor=2,
    )
    join = f"JAX_COORDINATOR_ADDRESS=localhost:{free_port()} JAX_NUM_PROCESSES=2"
    devices = "XLA_FLAGS=--xla_force_host_platform_device_count=4"
    processes = [
        jobs.start(config, before=f"export {join} {devices} JAX_PROCESS_ID={index}; ")
        for index in range(2)
    ]
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert ["8 rows in" in output for output, _ in ends] == [True, False]
    assert [row["token_ids"] for row in jobs.outputs(config)] == expected


def test_who_takes_part_must_be_said(llama, tmp_path):
    process = jobs.start(jobs.config_of(llama, tmp_path, distributed=True))
    assert jobs.ends_in_one_line(process).startswith("distributed: ")
