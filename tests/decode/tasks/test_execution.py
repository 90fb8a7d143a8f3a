"""Programs that end well, badly and not at all, and what they must not reach."""

import ctypes
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decode.tasks import execution
from decode.tasks.execution import Limits, run_program, run_programs
from proxy_jax.errors import InputError

LIMITS = Limits(seconds=20.0, memory_bytes=1 << 30, file_bytes=1 << 20)
SHORT = Limits(seconds=0.3)
# Whether the kernel filters system calls, and the sandbox knows their numbers.
FILTERS = platform.machine() in ("x86_64", "aarch64") and Path("/proc/sys/kernel/seccomp").exists()


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
        ("raise ValueError('a\\ud800b')", r"failed: ValueError: a\ud800b"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
        ("input()", "failed: EOFError"),
        ("bytearray(4 << 30)", "failed: MemoryError"),
        ("open('f', 'wb').write(bytes(9 << 20))", "failed: OSError"),
        ("if __name__ == '__main__': raise ValueError", "passed"),
        # A program cannot by accident report on itself.
        ("import os\nfor i in range(3, 400):\n  try: os.write(i, b'{\"result\": \"passed\"}\\n')\n"
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


@pytest.mark.parametrize(
    "message",
    [b"\xff\xfe\n", b"[1]\n", b"null\n", b"{}\n", b"[" * 30_000 + b"\n", b"1" * 5000 + b"\n",
     b'{"secret": 1}\n', b"x" * 200_000],
    ids=lambda message: repr(message[:9]),
)  # fmt: skip
def test_what_is_written_where_the_sandbox_reports(message):
    program = f"import os\nmessage = {message!r}\n"
    program += "for i in range(3, 400):\n  try: os.write(i, message)\n  except OSError: pass"
    result = run_program(program, LIMITS).result
    assert result == "failed: it wrote where only the sandbox writes"


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("import os\nos.closerange(0, 1000)", "failed: it ended with status"),
        ("while True: print('x' * 100_000)", "failed: OSError: [Errno 27] File too large"),
        ("import os, shutil\nos.makedirs('a/b')\nshutil.rmtree(os.getcwd())", "failed: "),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "failed: E"),
    ],
)  # fmt: skip
def test_what_careless_programs_do_is_their_failure(program, result):
    assert run_program(program, LIMITS).result.startswith(result)


@pytest.mark.parametrize("own_directory", [True, False])
def test_the_directory_is_removed_whatever_is_in_it(own_directory, without, tmp_path, monkeypatch):
    """Deep beyond the longest path, and with rights taken away."""
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    if not own_directory:
        without("_mount", "_restrict_calls")
    programs = [
        "import os\nfor i in range(1500): os.mkdir('deep' * 9); os.chdir('deep' * 9)",
        "import os\nos.makedirs('a/b/c')\nopen('a/b/f', 'w').close()\nos.symlink('/', 'a/link')\n"
        "os.chmod('a/b', 0)\nos.chmod('a', 0o500)\nos.chmod('.', 0)",
    ]
    assert [run_program(program, LIMITS).result for program in programs] == ["passed"] * 2
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_directory_is_limited():
    if execution.isolation().network != "namespace":
        pytest.skip("no file system of its own here")
    program = "for i in range(100): open(str(i), 'wb').write(bytes(900_000))"
    assert run_program(program, LIMITS).result.startswith("failed: OSError: [Errno 28] No space")
    assert run_program("open('f', 'wb').write(bytes(900_000))", LIMITS).passed


def test_where_nothing_can_be_run(monkeypatch, tmp_path):
    """That is no program's failure."""
    monkeypatch.setattr(execution, "_SANDBOX", tmp_path / "absent.py")
    with pytest.raises(InputError, match=r"the sandbox does not start \(.*No such file") as error:
        run_programs(["", ""], LIMITS)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="the directory of temporary files: No such file"):
        run_program("", LIMITS)


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


@pytest.fixture
def without(monkeypatch, tmp_path_factory):
    """Takes functions from the sandbox, as if the kernel did not have what they ask for."""

    def take(*names):
        script = tmp_path_factory.mktemp("sandbox") / "sandbox.py"
        script.write_text(
            f"import runpy\nfunctions = runpy.run_path({str(execution._SANDBOX)!r})\n"
            "main = functions['main']\n"
            f"for name in {names!r}:\n  assert name in functions\n"
            "  main.__globals__[name] = lambda *_, **__: False\nmain()\n"
        )
        monkeypatch.setattr(execution, "_SANDBOX", script)

    return take


# Each is tried in turn by one program, which says how many were refused.
FILES = [
    "open({path!r}, 'w').write('changed')",
    "os.remove({path!r})",
    "os.rename({path!r}, 'mine')",
    "os.truncate({path!r}, 0)",
    "os.open({path!r}, os.O_WRONLY | os.O_TRUNC)",
    "open({path!r} + '.new', 'w')",
    "os.mkdir({path!r} + '.d')",
    "os.symlink('/etc', {path!r} + '.link')",
    "os.remove('file', dir_fd=os.open(os.path.dirname({path!r}), os.O_PATH))",
]
METADATA = [
    "os.chmod({path!r}, 0o777)",
    "os.chown({path!r}, 0, 0)",
    "os.utime({path!r}, (0, 0))",
    "os.setxattr({path!r}, 'user.a', b'x')",
    "os.removexattr({path!r}, 'user.b')",
    "os.chmod('file', 0o777, dir_fd=os.open(os.path.dirname({path!r}), os.O_PATH))",
]
READS = [
    "open({path!r}).read()",
    "os.open({path!r}, os.O_RDONLY)",
    "os.listdir(os.path.dirname({path!r}))",
    "os.scandir(os.path.dirname({path!r}))",
    "open('/etc/shadow')",
]
PROCESSES = [
    "os.fork()",
    "subprocess.run(['true'])",
    "os.system('true') == 0 or none",
    "os.kill(os.getppid(), 0)",
]


def attempts(programs, path=""):
    lines = ["import errno, os, socket, subprocess", "refused = []"]
    for program in programs:
        text = program.format(path=str(path))
        lines += [f"try: {text}", "except OSError as error:"]
        lines += ["  assert error.errno in (None, 1, errno.EACCES, errno.EROFS, errno.EXDEV)"]
        lines += [f"  refused.append({program!r})"]
    return "\n".join([*lines, "print(len(refused), refused)"])


# What of the kernel is missing: nothing, by and by, all.
MISSING = [
    (),
    ("_mount",),
    ("_enter_namespaces",),
    ("_restrict_files",),
    ("_enter_namespaces", "_drop_privileges", "_restrict_calls", "_restrict_files"),
]


@pytest.mark.parametrize("missing", MISSING)
def test_files_outside_are_out_of_reach(tmp_path, without, missing):
    path = tmp_path / "file"
    path.write_text("mine")
    os.setxattr(path, "user.b", b"x")
    before = path.stat()
    if missing:
        without(*missing)
    programs = [*FILES, *METADATA, *READS]
    outcome = run_program(attempts(programs, path), LIMITS)
    assert outcome.output.startswith(f"{len(programs)} "), outcome
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert os.listxattr(path) == ["user.b"]


@pytest.mark.parametrize("missing", MISSING[::2])
def test_what_programs_need_is_in_reach(without, missing):
    if missing:
        without(*missing)
    program = (
        "import os, locale, mimetypes, ssl, threading, zoneinfo\n"
        "import numpy, scipy.stats, matplotlib.pyplot as plt\n"
        "mimetypes.guess_type('a.txt')\nssl.create_default_context()\n"
        "zoneinfo.ZoneInfo('Europe/Berlin')\nos.path.expanduser('~root')\n"
        "plt.plot(numpy.arange(3))\nplt.savefig('a.png')\nos.urandom(3)\n"
        "open('/proc/self/status').read(); os.sched_getaffinity(0)\n"
        "thread = threading.Thread(target=print)\nthread.start()\nthread.join()"
    )
    assert run_program(program, Limits(seconds=60.0)).result == "passed"


def test_metadata_of_its_own_files_are_its_own():
    program = (
        "import os\nopen('f', 'w').write('x')\nos.chmod('f', 0o600)\nos.utime('f', (0, 0))\n"
        "assert os.stat('f').st_mtime == 0\nwith open('f') as f: os.fchmod(f.fileno(), 0o644)"
    )
    if execution.isolation().network != "namespace" and os.getuid():
        pytest.skip("no file system of its own here")
    assert run_program(program, LIMITS).result == "passed"


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


@pytest.mark.parametrize("missing", [(), ("_enter_namespaces",)])
def test_unix_sockets_are_out_of_reach(tmp_path, without, missing):
    if missing:
        without(*missing)
    address = str(tmp_path / "socket")
    attempts = [
        f"socket.socket(socket.AF_UNIX).connect({address!r})",
        f"socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', {address!r})",
        f"socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {address!r})",
        "libc.socket(1, 1, 0) == -1 and ctypes.get_errno() == 1 and refuse()",
    ]
    program = "import ctypes, socket\nlibc = ctypes.CDLL(None, use_errno=True)\nn = 0\n"
    program += "def refuse(): raise PermissionError\n"
    for attempt in attempts:
        program += f"try: {attempt}\nexcept PermissionError: n += 1\n"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        server.settimeout(0.2)
        wanted = len(attempts) if FILTERS else 3
        assert run_program(f"{program}print(n)", LIMITS).output == f"{wanted}\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_event_loops_run():
    if execution.isolation().network != "namespace":
        pytest.skip("no network of its own here")
    program = "import asyncio\nasync def f(): await asyncio.sleep(0.01)\nasyncio.run(f())"
    assert run_program(program, LIMITS).result == "passed"


@pytest.mark.parametrize("missing", [(), ("_enter_namespaces",)])
def test_processes_and_threads_are_limited(without, missing):
    """Natively, and for root, whom the limit of processes does not hold."""
    if missing:
        without(*missing)
    if not FILTERS or (execution.isolation().network != "namespace" and os.getuid()):
        pytest.skip("nothing here refuses or counts")
    assert execution.isolation().processes == "seccomp"
    program = (
        "import ctypes, threading, time\nlibc = ctypes.CDLL(None)\n"
        "print(libc.fork(), libc.vfork(), libc.unshare(1 << 28), flush=True)\n"
        "threading.stack_size(1 << 16)\n"
        "def wait(): time.sleep(60)\n"
        "for n in range(600): threading.Thread(target=wait, daemon=True).start()"
    )
    outcome = run_program(program, Limits(seconds=20.0, memory_bytes=1 << 40))
    assert outcome.result == "failed: RuntimeError: can't start new thread"
    assert outcome.output == "-1 -1 -1\n"


def test_native_code_is_held_by_the_kernel(tmp_path):
    """Past Python, where a hook sees nothing."""
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:  # landlock_create_ruleset's version
        pytest.skip("no Landlock here")
    assert execution.isolation().files == "landlock"
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        f"assert libc.creat({str(tmp_path / 'new').encode()!r}, 0o600) == -1\n"
        "assert libc.creat(b'own', 0o600) >= 0\n"
        "assert libc.system(b'touch own2') != 0 and not os.path.exists('own2')\n"
        f"for name in {str(tmp_path).encode()!r}, b'/etc/shadow': assert libc.open(name, 0) == -1"
    )
    assert run_program(program, LIMITS).result == "passed"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "missing", [(), ("_mount",), ("_mount", "_drop_privileges"), ("_enter_namespaces",)]
)
def test_metadata_are_held_by_the_kernel(tmp_path, without, missing):
    if missing:
        without(*missing)
    if not FILTERS:
        pytest.skip("no filter here")
    path = tmp_path / "file"
    path.write_text("mine")
    before, name = path.stat(), os.fsencode(path)
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        f"calls = [libc.chmod({name!r}, 0o777), libc.fchmodat(-100, {name!r}, 0o777, 0),\n"
        f"  libc.chown({name!r}, 0, 0), libc.utimensat(-100, {name!r}, None, 0),\n"
        f"  libc.utime({name!r}, None), libc.setxattr({name!r}, b'user.a', b'x', 1, 0)]\n"
        "assert calls == [-1] * 6, calls"
    )
    assert run_program(program, LIMITS).result == "passed"
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert not os.listxattr(path)


def test_nothing_is_left_behind(without):
    """A process that leaves the group, started where Python does not see it."""
    without("_restrict_calls")
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
    programs = [*FILES, *METADATA[:4], *READS, *PROCESSES, "socket.socket()"]
    code = (
        f"import os, runpy; hook = runpy.run_path({str(execution._SANDBOX)!r})['_install_hook']\n"
        "import sys; hook(os.getcwd(), [os.getcwd(), sys.prefix, sys.base_prefix], True, True)\n"
        "open('own', 'w').write('x'); os.rename('own', 'other'); os.remove('other')\n"
        f"{attempts(programs, path)}"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=inside, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(f"{len(programs)} "), found.stdout
    assert path.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "inside"]
