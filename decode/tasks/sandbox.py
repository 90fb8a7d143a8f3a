"""Runs one program under limits. Started by execution.py as a process of its own.

Only the standard library: nothing of ours is on its path. Reads the program and its limits from
standard input, says on a pipe which isolation it has, and then how the program ended. Against
accidents and careless code; it is not meant to hold somebody who wants to get out.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys

# linux/sched.h, linux/prctl.h
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# linux/landlock.h: system calls, and rights over files by the ABI that brought them
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _REFER, _TRUNCATE = 1 << 0, 1 << 1, 1 << 13, 1 << 14
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_TCP, _SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals of others

_MAX_PROCESSES = 512
_STARTUP_SECONDS = 10
# What Python reports before it does it (sys.addaudithook).
_PROCESSES = ("os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn",
              "os.spawn", "os.system", "pty.spawn", "subprocess.Popen")  # fmt: skip
_CHANGES = ("os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename",
            "os.rmdir", "os.symlink", "os.truncate", "os.utime")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main():
    """The whole run; leaves by os._exit, so that nothing of the program runs afterwards."""
    pipe = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    isolation = _isolate(os.getcwd(), job)
    _say(pipe, isolation)
    result = _execute(job["program"])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _say(pipe, {"secret": job["secret"], "result": result})
    os._exit(0)


def _execute(program):
    """Runs a program as the published code does: in an empty namespace, not as __main__."""
    try:
        exec(compile(program, "program", "exec"), {})
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no pass either
        with contextlib.suppress(BaseException):
            return f"failed: {type(error).__name__}: {error}"[:300]
        return f"failed: {type(error).__name__}"
    return "passed"


def _say(pipe, message):
    os.write(pipe, json.dumps(message).encode() + b"\n")


def _isolate(directory, job):
    """Gives up what the program must not have. Returns what keeps it from files and network."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    namespace = libc is not None and _enter_namespaces(libc)
    abi = _restrict_files(libc, directory) if libc else 0
    memory = _limit(job, namespace)
    network = "namespace" if namespace else "landlock" if abi >= 4 else "audit hook"
    _install_hook(directory, hook_files=not abi, hook_network=network != "namespace")
    return {
        "files": "landlock" if abi else "audit hook",
        "network": network,
        "memory": "rlimit" if memory else "none",
    }


def _limit(job, namespace):
    cpu = math.ceil(2 * job["seconds"]) + _STARTUP_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if namespace:  # elsewhere it counts the processes of the user, not those of the program
        resource.setrlimit(resource.RLIMIT_NPROC, (_MAX_PROCESSES, _MAX_PROCESSES))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (job["memory_bytes"], job["memory_bytes"]))
    except (ValueError, OSError):  # macOS
        return False
    return True


def _enter_namespaces(libc):
    """Moves to a network without interfaces, and where all processes end with the first.

    Goes on in a child, that first process; this one waits for it and ends as it does.
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWUSER | _NEWPID | _NEWNET):
        return False
    lines = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, line in lines.items():
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            os.kill(os.getpid(), -status)
        os._exit(abs(status))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def _restrict_files(libc, directory):
    """Landlock: nothing is written outside a directory, no program started, no signal sent out.

    Returns the ABI; 0 where the kernel has no Landlock.
    """
    abi = libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if abi < 1:
        return 0
    rights = _WRITE_FILE | _MAKE_AND_REMOVE
    rights |= (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    fields = [rights | _EXECUTE] + [_TCP] * (abi >= 4) + [_SCOPES] * (abi >= 6)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # which it asks for
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return 0
    # A right that only directories have may not be asked for on a file.
    on_file = _WRITE_FILE | (_TRUNCATE if abi >= 3 else 0)
    allowed = True
    for path, access in ((directory, rights), (os.devnull, on_file)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, descriptor)
        allowed &= libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) == 0
        os.close(descriptor)
    restricted = allowed and libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return abi if restricted else 0


def _install_hook(directory, hook_files, hook_network):
    """Refuses in Python what the kernel does not; processes in any case."""
    inside = os.path.realpath(directory) + os.sep

    def refuse_outside(path):
        if isinstance(path, int) or path is None:
            return
        name = os.path.realpath(os.fsdecode(path))
        if not (name + os.sep).startswith(inside) and name != os.devnull:
            raise PermissionError(f"writing outside of the working directory: {name}")

    def hook(event, arguments):
        if event in _PROCESSES:
            raise PermissionError(f"{event} is not allowed here")
        if hook_network and event.startswith("socket.") and event != "socket.gethostname":
            raise PermissionError("there is no network here")
        if hook_files and event == "open" and arguments[2] & _WRITING:
            refuse_outside(arguments[0])
        if hook_files and event in _CHANGES:
            for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
                refuse_outside(path)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
