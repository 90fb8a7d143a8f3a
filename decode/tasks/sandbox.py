"""Runs one program under limits. Started by execution.py as a process of its own.

Only the standard library: nothing of ours is on its path. Reads the program and its limits from
standard input, says on a pipe which isolation it has, and then how the program ended. Against
accidents and careless code; it is not meant to hold somebody who wants to get out.

What refuses, where Linux offers it: namespaces (a network without interfaces, a directory of its
own in memory, everything else read-only, an end for all that was started), Landlock (which files
are read and written), a filter of system calls (processes and UNIX sockets; without namespaces also
changes of owner, mode, times and attributes, in the directory too), for root another user, who owns
nothing, and limits of resources. A hook in Python stands in for what is missing; native code goes
past it, and it does not see which directory os.open's dir_fd is. What a file is called, and that it
is there, is no secret anywhere.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import signal
import stat
import struct
import sys

# linux/sched.h, linux/prctl.h, linux/mount.h, linux/capability.h
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_THREAD = 1 << 16
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_CAPABILITY_VERSION, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 0x20080522, 1 << 1, 1 << 2
# linux/landlock.h: system calls, and rights over files by the ABI that brought them
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_TCP, _SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals of others
# linux/filter.h, linux/seccomp.h: operations, answers, and where a call's data are
_LOAD, _AND, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_FILTER = 2
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF
_EPERM, _ENOSYS = 1, 38
# By machine: its name in the kernel, and the numbers of its system calls.
_CALLS = {
    "x86_64": (0xC000003E, {
        "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "fchownat": 260,
        "futimesat": 261, "fchmodat": 268, "utimensat": 280, "socket": 41, "socketpair": 53,
        "clone": 56, "fork": 57, "vfork": 58, "unshare": 272, "setns": 308,
    }),
    "aarch64": (0xC00000B7, {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
        "fremovexattr": 16, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "utimensat": 88, "unshare": 97, "socket": 198, "socketpair": 199, "clone": 220,
        "setns": 268,
    }),
}  # fmt: skip
_CALLS_EVERYWHERE = {"io_uring_setup": 425, "clone3": 435, "fchmodat2": 452, "setxattrat": 463,
                     "removexattrat": 466, "file_setattr": 469}  # fmt: skip
_LAST_CALL = 0x3FFFFFFF  # on x86_64 the same calls have a second number above it
_ANSWERED = ("socket", "socketpair", "clone", "clone3")  # each in its own way
# Refused in any case: processes, other namespaces, and a queue of calls that no filter sees.
_REFUSED = ("fork", "vfork", "unshare", "setns", "io_uring_setup")

# What Python, its packages and the C library read. Of /etc and /proc what tells nothing of a user.
_READABLE = (
    "/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/System", "/Library/Fonts",
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom",
    "/etc/alternatives", "/etc/apache2/mime.types", "/etc/fonts", "/etc/group", "/etc/hosts",
    "/etc/httpd/conf/mime.types", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/locale.alias", "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf",
    "/etc/os-release", "/etc/passwd", "/etc/pki/tls/certs", "/etc/pki/tls/openssl.cnf",
    "/etc/protocols", "/etc/services", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/timezone",
    "/proc/self", "/proc/cpuinfo", "/proc/filesystems", "/proc/loadavg", "/proc/meminfo",
    "/proc/stat", "/proc/sys", "/proc/uptime", "/proc/version",
    "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm",
)  # fmt: skip

_MAX_PROCESSES = 512  # threads among them
_MAX_FILES = 1 << 16  # in the directory
_FULL_FILES = 4  # as large as one may be that it holds
_STARTUP_SECONDS = 10
_FIRST_USER = 1 << 30  # of those that nobody is
# What Python reports before it does it (sys.addaudithook).
_PROCESSES = ("os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn",
              "os.spawn", "os.system", "pty.spawn", "subprocess.Popen")  # fmt: skip
# Events by what they change: which arguments are paths, and which the directories they begin at.
_METADATA = {"os.chflags": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
             "os.removexattr": ((0, None),), "os.setxattr": ((0, None),),
             "os.utime": ((0, 3),)}  # fmt: skip
_CHANGES = {"os.link": ((0, 2), (1, 3)), "os.mkdir": ((0, 2),), "os.remove": ((0, 1),),
            "os.rename": ((0, 2), (1, 3)), "os.rmdir": ((0, 1),), "os.symlink": ((1, 2),),
            "os.truncate": ((0, None),)}  # fmt: skip
_LISTS = ("os.listdir", "os.scandir")
_SENDS = ("socket.connect", "socket.sendmsg", "socket.sendto")
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
            text = f"failed: {type(error).__name__}: {error}"[:300]
            return text.encode(errors="backslashreplace").decode()  # what no file can hold
        return f"failed: {type(error).__name__}"
    return "passed"


def _say(pipe, message):
    os.write(pipe, json.dumps(message).encode() + b"\n")


def _isolate(directory, job):
    """Gives up what the program must not have. Returns what keeps it from files and network."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    readable = [directory, *_READABLE, sys.prefix, sys.base_prefix, sys.exec_prefix]
    readable += filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    namespace, abi, filtered, user = False, 0, False, os.getuid()
    if libc:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        other = _FIRST_USER + os.getpid() if user == 0 else None
        namespace = _enter_namespaces(libc, other)
        # Without a name in there a user can own no files.
        own_files = namespace and os.getuid() == user and _mount(libc, directory, job)
        _drop_privileges(libc, directory, other)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # which ends with the user that asked for it
    owns_nothing = os.getuid() != user
    memory = _limit(job, counted=namespace or owns_nothing)
    if libc:
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # which Landlock and the filter ask for
        abi = _restrict_files(libc, directory, readable)
        filtered = _restrict_calls(libc, metadata=not (own_files or owns_nothing))
    network = "namespace" if namespace else "landlock" if abi >= 4 else "audit hook"
    _install_hook(directory, readable, hook_files=not abi, hook_network=network != "namespace")
    return {
        "files": "landlock" if abi else "audit hook",
        "network": network,
        "processes": "seccomp" if filtered else "audit hook",
        "memory": "rlimit" if memory else "none",
    }


def _limit(job, counted):
    cpu = math.ceil(2 * job["seconds"]) + _STARTUP_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if counted:  # elsewhere it counts the processes of the user, not those of the program
        resource.setrlimit(resource.RLIMIT_NPROC, (_MAX_PROCESSES, _MAX_PROCESSES))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (job["memory_bytes"], job["memory_bytes"]))
    except (ValueError, OSError):  # macOS
        return False
    return True


def _enter_namespaces(libc, user):
    """Moves to a network without interfaces, and where all processes end with the first.

    Goes on in a child, that first process; this one waits for it and ends as it does. There is no
    user in there but the own one and, for root, the one that it becomes.
    """
    first, (reading, writing) = os.getpid(), os.pipe()
    if not (helper := os.fork()):  # only from outside can a second user be let in
        os.close(writing)
        if os.read(reading, 1):
            _map_users(first, user)
        os._exit(0)
    entered = libc.unshare(_NEWUSER | _NEWPID | _NEWNET | _NEWNS | _NEWIPC) == 0
    if entered:
        os.write(writing, b"x")
    os.close(writing)
    os.close(reading)
    os.waitpid(helper, 0)
    if not entered:
        return False
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            os.kill(os.getpid(), -status)
        os._exit(abs(status))
    return True


def _map_users(process, user):
    """Says who is who in the user namespace of a process."""
    own = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    second = {name: f"{user} {user} 1\n" if user else "" for name in own}
    for name, identity in own.items():
        line = f"{identity} {identity} 1\n"
        with contextlib.suppress(OSError):
            _write(f"/proc/{process}/{name}", line + second[name])
            continue
        with contextlib.suppress(OSError):  # for a group of one's own alone, that comes first
            _write(f"/proc/{process}/setgroups", "deny")
        with contextlib.suppress(OSError):
            _write(f"/proc/{process}/{name}", line)


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def _mount(libc, directory, job):
    """Makes all files read-only, and the directory a file system in memory that ends with us.

    Returns whether the kernel does that; nothing has changed otherwise.
    """
    size = _FULL_FILES * job["file_bytes"]
    options = f"size={size},nr_inodes={_MAX_FILES},mode=700".encode()
    if libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options):
        return False
    if _set_mount(libc, "/", _AT_RECURSIVE, read_only=True):
        libc.umount(os.fsencode(directory))
        return False
    if _set_mount(libc, directory, 0, read_only=False):
        raise OSError(ctypes.get_errno(), "the directory cannot be written")
    os.chdir(directory)  # which was beneath the mount until now
    return True


def _set_mount(libc, path, flags, read_only):
    bits = (_MOUNT_ATTR_RDONLY, 0) if read_only else (0, _MOUNT_ATTR_RDONLY)
    attributes = struct.pack("4Q", *bits, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    return libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, size)


def _drop_privileges(libc, directory, user):
    """Leaves of root's rights that of reading, for an interpreter in root's home.

    Root becomes a user that nobody else is: it owns nothing, and limits of processes hold for it.
    """
    if user:
        try:
            os.chown(directory, user, user)
            os.setgroups([])
            libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:  # a container that has no such user, or that lacks the right
            os.chown(directory, os.getuid(), os.getgid())
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    for capabilities in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE, 0):  # the first that we have
        if libc.capset(header, struct.pack("6I", capabilities, capabilities, 0, 0, 0, 0)) == 0:
            break


def _restrict_files(libc, directory, readable):
    """Landlock: nothing is written outside a directory, nothing read but what is readable.

    Nor is a program started or a signal sent out. Returns the ABI; 0 without Landlock.
    """
    abi = libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if abi < 1:
        return 0
    writing = _WRITE_FILE | (_TRUNCATE if abi >= 3 else 0)
    inside = writing | _MAKE_AND_REMOVE | (_REFER if abi >= 2 else 0)
    handled = inside | _READ_FILE | _READ_DIR | _EXECUTE
    fields = [handled] + [_TCP] * (abi >= 4) + [_SCOPES] * (abi >= 6)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return 0
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(directory, inside), (os.devnull, writing)]
    allowed = all([_allow(libc, ruleset, path, rights) for path, rights in rules])
    restricted = allowed and libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return abi if restricted else 0


def _allow(libc, ruleset, path, rights):
    """Adds rights below a path to a ruleset; what does not exist needs none."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):  # which has fewer rights
        rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
    rule = struct.pack("=Qi", rights, descriptor)
    added = libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) == 0
    os.close(descriptor)
    return added


def _restrict_calls(libc, metadata):
    """Has the kernel refuse system calls; returns whether it does and we know their numbers.

    Args:
      metadata: those that change owner, mode, times and attributes, too.
    """
    if platform.machine() not in _CALLS:
        return False
    architecture, calls = _CALLS[platform.machine()]
    calls = {**calls, **_CALLS_EVERYWHERE}
    refused = [
        number
        for name, number in calls.items()
        if name in _REFUSED or (metadata and name not in _ANSWERED)
    ]
    no, yes, unknown = (
        _step(_RETURN, answer) for answer in (_FAIL | _EPERM, _ALLOW, _FAIL | _ENOSYS)
    )
    # A step jumps over so many of the next, depending on its comparison.
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0), no,
        _step(_LOAD, _NUMBER),
        _step(_ABOVE, _LAST_CALL, 0, 1), no,
    ]  # fmt: skip
    for number in refused:
        steps += [_step(_EQUAL, number, 0, 1), no]
    steps += [
        # The C library starts threads without it, and then says what it starts in plain sight.
        _step(_EQUAL, calls["clone3"], 0, 1), unknown,
        _step(_EQUAL, calls["clone"], 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _THREAD, 0, 1), yes, no,
        _step(_EQUAL, calls["socket"], 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_EQUAL, _AF_UNIX, 0, 1), no, yes,
        # Two that are connected to each other for good, as event loops have them.
        _step(_EQUAL, calls["socketpair"], 0, 5),
        _step(_LOAD, _SECOND_ARGUMENT),
        _step(_AND, _SOCK_TYPE),
        _step(_EQUAL, _SOCK_STREAM, 0, 1), yes, no,
        yes,
    ]  # fmt: skip
    program = ctypes.create_string_buffer(b"".join(steps))
    described = struct.pack("HP", len(steps), ctypes.addressof(program))
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, described, 0, 0) == 0


def _step(code, value, if_true=0, if_false=0):
    return struct.pack("HBBI", code, if_true, if_false, value)


def _install_hook(directory, readable, hook_files, hook_network):
    """Refuses in Python what the kernel does not; processes and metadata in any case."""
    inside = (os.path.realpath(directory) + os.sep,)
    readable = tuple(os.path.realpath(path) + os.sep for path in readable)

    def refuse_outside(path, start=-1, places=inside, doing="writing"):
        name = _resolved(path, start)
        if not (name + os.sep).startswith(places) and name != os.devnull:
            raise PermissionError(f"{doing} outside of the working directory: {name}")

    def hook(event, arguments):
        if event in _PROCESSES:
            raise PermissionError(f"{event} is not allowed here")
        if hook_network and event.startswith("socket.") and event != "socket.gethostname":
            raise PermissionError("there is no network here")
        if event in _SENDS and isinstance(arguments[1], (str, bytes)):
            raise PermissionError("there are no other processes to connect to")
        for path, start in _METADATA.get(event) or (hook_files and _CHANGES.get(event)) or ():
            refuse_outside(arguments[path], -1 if start is None else arguments[start])
        if hook_files and (event == "open" or event in _LISTS):
            if event == "open" and arguments[2] & _WRITING:
                refuse_outside(arguments[0])
            elif not isinstance(arguments[0], int):  # which is open already
                refuse_outside(arguments[0], places=readable, doing="reading")

    sys.addaudithook(hook)


def _resolved(path, start):
    """The real name of a path, which may begin at a directory's descriptor or be one itself."""
    if path is None:
        return os.getcwd()
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    name = os.fsdecode(path)
    if start >= 0 and not os.path.isabs(name):
        name = os.path.join(os.readlink(f"/proc/self/fd/{start}"), name)
    return os.path.realpath(name)


if __name__ == "__main__":
    main()
