"""Programs that end well, badly and not at all, and what they must not reach."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decode.tasks import execution
from decode.tasks.execution import Limits, run_program, run_programs

LIMITS = Limits(seconds=20.0, memory_bytes=1 << 30, file_bytes=1 << 20)
SHORT = Limits(seconds=0.3)


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("def f(x): return x + 1\nassert f(1) == 2", "passed"),
        ("assert False, 'no'", "failed: AssertionError: no"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("import os; os._exit(0)", "failed: it ended with status 0"),
        ("import ctypes; ctypes.string_at(0)", "failed: it ended with status -11"),
        ("def f(", "failed: SyntaxError"),
        ("x = '\0'", "failed: SyntaxError"),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
        ("input()", "failed: EOFError"),
        ("bytearray(4 << 30)", "failed: MemoryError"),
        ("open('f', 'wb').write(bytes(9 << 20))", "failed: OSError"),
        ("if __name__ == '__main__': raise ValueError", "passed"),
        # A program cannot by accident report on itself.
        ("import os\nfor i in range(3, 20):\n  try: os.write(i, b'{\"result\": \"passed\"}\\n')\n"
         "  except OSError: pass\nassert False", "failed: "),
    ],
)  # fmt: skip
def test_results(program, result):
    assert run_program(program, LIMITS).result.startswith(result)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntry: time.sleep(60)\nfinally: time.sleep(60)",
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    ],
)
def test_programs_that_do_not_end(program):
    start = time.monotonic()
    assert run_program(program, SHORT).result == "timed out"
    assert time.monotonic() - start < 30


def test_order_and_own_limits():
    programs = ["import time; time.sleep(0.5)", "assert 0, 'two'", "import time; time.sleep(60)"]
    limits = [LIMITS, LIMITS, SHORT]
    results = [outcome.result for outcome in run_programs(programs, limits, workers=3)]
    assert results == ["passed", "failed: AssertionError: two", "timed out"]


def test_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "12345")
    outcome = run_program("import os; print(sorted(os.environ), os.listdir())", LIMITS)
    assert outcome.passed
    assert "SECRET_KEY" not in outcome.output
    assert outcome.output.strip().endswith("[]")  # an empty directory


def test_end_of_the_output_is_kept():
    outcome = run_program("print('x' * 9000); print('the end')", LIMITS)
    assert outcome.output.endswith("xxx\nthe end\n")
    assert len(outcome.output) == 4096


# Each is tried in turn by one program, which says how many were refused.
FILES = [
    "open({path!r}, 'w').write('changed')",
    "os.remove({path!r})",
    "os.rename({path!r}, 'mine')",
    "os.truncate({path!r}, 0)",
    "os.open({path!r}, os.O_WRONLY | os.O_TRUNC)",
    "open({path!r} + '.new', 'w')",
    "os.mkdir({path!r} + '.d')",
]
PROCESSES = [
    "os.fork()",
    "subprocess.run(['true'])",
    "os.system('true') == 0 or none",
    "os.kill(os.getppid(), 0)",
]


def attempts(programs, path=""):
    lines = ["import os, socket, subprocess", "refused = []"]
    for program in programs:
        text = program.format(path=str(path))
        lines += [f"try: {text}", f"except PermissionError: refused.append({program!r})"]
    return "\n".join([*lines, "print(len(refused), refused)"])


def test_files_outside_are_out_of_reach(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    outcome = run_program(attempts(FILES, path), LIMITS)
    assert outcome.output.startswith(f"{len(FILES)} "), outcome
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_files_in_its_directory_are_its_own():
    program = (
        "import os\nopen('f', 'w').write('x')\nos.mkdir('d')\nos.rename('f', 'd/g')\n"
        "assert open('d/g').read() == 'x'\nos.remove('d/g')\nopen(os.devnull, 'w').write('x')"
    )
    assert run_program(program, LIMITS).result == "passed"


def test_other_processes_are_out_of_reach():
    outcome = run_program(attempts(PROCESSES), LIMITS)
    assert outcome.output.startswith(f"{len(PROCESSES)} "), outcome


def test_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        program = f"import socket; socket.create_connection({address!r}, timeout=1)"
        assert run_program(program, LIMITS).result.startswith("failed: ")
        with pytest.raises(TimeoutError):
            server.accept()


def test_native_code_is_held_by_the_kernel(tmp_path):
    """Past Python, where a hook sees nothing."""
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:  # landlock_create_ruleset's version
        pytest.skip("no Landlock here")
    assert execution.isolation().files == "landlock"
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        f"assert libc.creat({str(tmp_path / 'new').encode()!r}, 0o600) == -1\n"
        "assert libc.creat(b'own', 0o600) >= 0\n"
        "assert libc.system(b'touch own2') != 0 and not os.path.exists('own2')"
    )
    assert run_program(program, LIMITS).result == "passed"
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind():
    """A process that leaves the group, started where Python does not see it."""
    if execution.isolation().network != "namespace":
        pytest.skip("no process namespaces here")
    program = (
        "import ctypes, os, time\nlibc = ctypes.CDLL(None)\nprint(os.getcwd(), flush=True)\n"
        "if libc.fork() == 0:\n  libc.setsid()\n  time.sleep(60)\ntime.sleep(0.5)"
    )
    outcome = run_program(program, LIMITS)
    assert outcome.passed
    home = f"HOME={outcome.output.strip()}\0"
    deadline = time.monotonic() + 30
    while _any_process_with(home) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _any_process_with(home)


def _any_process_with(variable: str) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (entry / "environ").read_text(errors="replace"):
                return True
        except OSError:  # it has ended, or is another user's
            pass
    return False


def test_hook_alone(tmp_path):
    """What refuses where the kernel offers nothing."""
    path, inside = tmp_path / "file", tmp_path / "inside"
    path.write_text("mine")
    inside.mkdir()
    programs = [*FILES, *PROCESSES, "socket.socket()"]
    code = (
        f"import os, runpy; hook = runpy.run_path({str(execution._SANDBOX)!r})['_install_hook']\n"
        "hook(os.getcwd(), True, True)\n"
        "open('own', 'w').write('x'); os.rename('own', 'other'); os.remove('other')\n"
        f"{attempts(programs, path)}"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=inside, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(f"{len(programs)} "), found.stdout
    assert path.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "inside"]
