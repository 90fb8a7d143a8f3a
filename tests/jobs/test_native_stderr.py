"""What JAX's coordination service says when it ends a process, and the one line that is left."""

import subprocess
import sys

import pytest

from proxy_jax.jobs import native_stderr

# As jaxlib 0.10 writes them, abridged.
POLLED = "E1122 23:57:04.790482   22736 coordination_service_agent.cc:289] Polled an error from\n"
PREEMPTION = (
    "W1122 23:56:19.404210   22446 preemption_sync_manager.cc:147] Failed to retrieve preemption "
    "notice from coordination service: UNAVAILABLE: Socket closed\n"
    "Additional GRPC error information from remote target coordination_service:\n"
)
DEATH = (
    "F1122 23:57:04.795658   22736 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. This most likely indicates that another task died; Status"
)
SILENT = ": UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe"
FIRST = ": UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was\n"
NOT_MET = ": DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n"
TRACE = "\n*** Check failure stack trace: ***\n    @     0x7fe556c40634  LogMessage::Flush()\n"
OURS = "error: another process of the job is gone (Gloo AllReduce failed: closed by peer); again\n"
OTHER = "W1122 23:56:19.404210   22446 cuda_driver.cc:10] a driver's own words\n\x1b[1mand \xff\n"


def passed(text: str) -> str:
    command = [sys.executable, native_stderr.__file__]
    return subprocess.run(
        command, input=text, stderr=subprocess.PIPE, encoding="latin-1", check=True
    ).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (POLLED + DEATH + SILENT + TRACE, "gone (process 1 stopped answering); "),
        (PREEMPTION + POLLED + DEATH + FIRST + TRACE, "gone (process 0, through which all of them"),
        (DEATH + NOT_MET + TRACE, "error: the processes of the job did not meet in time: "),
        (DEATH + ": INTERNAL: something new\n" + TRACE, "is gone; its own output may say why; "),
        (OURS + POLLED + DEATH + ": INTERNAL\n" + TRACE, OURS),
        (OURS, OURS),
    ],
)
def test_the_end_of_a_job_is_one_line(words, said):
    output = passed(OTHER + words)
    begun, _, last = output.rpartition("\nerror: ")
    assert begun == OTHER
    assert said in "error: " + last
    assert last.count("\n") == 1


def test_all_else_is_unchanged():
    for words in ("", OTHER, OTHER + PREEMPTION + OTHER, "no newline at the end"):
        assert passed(words) == words
