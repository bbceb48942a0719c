"""
Every line of the lists of attacks: getting out (PROBES), using the machine up (BOMBS), cheating for a reward (CHEATS, repositories).
Each attack is harmless where it succeeds. They run in batches, once for the whole file; each has its own test that names it.

    pytest tests/test_sandbox.py
"""
# ruff: noqa: E501  an attack is one line of a table
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import trace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sandbox
from sandbox import Call, Check, Io, Limits, Workspace, grade, run

SMALL = sandbox.SMALL
HERE = Path(sandbox.__file__).parent


def at_once(work, items):
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, items))


def grade_many(jobs, limits=Limits()):
    return at_once(lambda job: grade(*job, limits), jobs)


def footprint():
    """What could be left behind; programs are whoever below us is no keeper, zygote or waiting warden; memory is ours, in MB."""
    pids, waiting = sandbox.below(os.getpid()), 2 + len(sandbox.Machinery.current.idle) if sandbox.Machinery.current else 0
    count = lambda folder: len(os.listdir(folder)) if os.access(folder, os.R_OK) else 0
    return {"programs": len(pids) - waiting, "mounts": Path("/proc/self/mounts").read_text().count("\n"), "descriptors": count("/proc/self/fd"),
            "zygote descriptors": max((count(f"/proc/{pid}/fd") for pid in pids), default=0), "files in /tmp": count(tempfile.gettempdir()),
            "memory": round(sandbox.usage_of(os.getpid())[2] / 2**20)}  # fmt: skip


def settled():
    """What is left when the last helper has had time to go."""
    deadline = time.monotonic() + 10
    while footprint()["programs"] and time.monotonic() < deadline:
        time.sleep(0.05)
    return footprint()


# ---- getting out ---------------------------------------------------------------------------------------------------------------

PROBES = {
    **sandbox.PROBES,
    "the home of root": "import os, sys; [name for name in os.listdir('/root') if not sys.base_prefix.startswith('/root/' + name)][0]",
    "the homes of all": "import os; os.listdir('/home')",
    "etc/shadow": "open('/etc/shadow')",
    "our source": f"open({str(HERE / 'sandbox.py')!r})",
    "installed packages": "import numpy",
    "tasks of this project": "import tasks",
    "packages on disk": "import os, glob, sys\n[p for d in (sys.base_prefix, '/usr') for p in glob.glob(d + '/lib/python3*/*-packages/*')][0]",
    "environment of pid 1": "open('/proc/1/environ').read()",
    "memory of pid 1": "open('/proc/1/mem', 'rb')",
    "descriptors of pid 1": "import os; os.listdir('/proc/1/fd')",
    "root of pid 1": "import os; os.listdir('/proc/1/root/')",
    "kernel settings": "open('/proc/sys/kernel/core_pattern').read()",
    "sysrq": "open('/proc/sysrq-trigger', 'w')",
    "rename out": "import os; open('a', 'w'); os.rename('a', '/etc/a')",
    "rename over a tool": "import os; open('a', 'w'); os.rename('a', '/usr/bin/python3')",
    "dot dot": "import os; open('../../../etc/planted', 'w')",
    "dot dot by chdir": "import os; os.chdir('/'); open('planted', 'w')",
    "remove a tool": "import os; os.remove('/usr/bin/env')",
    "change a tool": "import os; os.chmod('/usr/bin/env', 0o777)",
    "change the owner": "import os; open('o', 'w'); os.chown('o', 0, 0)",
    "disk device": "import glob; open(glob.glob('/dev/[hsv]d[a-z]*')[0], 'rb')",
    "kernel memory": "open('/dev/mem', 'rb')",
    "terminal": "open('/dev/tty')",
    "type into a terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "kill the supervisor": "import os; os.kill(there['pid'], 9)",
    "kill pid 1 and see it gone": "import os, time; os.kill(1, 9); time.sleep(0.05); os.kill(1, 0); raise OSError('it lives')",
    "kill its own parent": "import os; os.kill(os.getppid(), 9); os.kill(os.getppid(), 0); raise OSError('it lives')",
    "setgroups": "import os; os.setgroups([0])",
    "chroot": "import os; os.chroot('.')",
    "setns": "c('setns', os.open('/proc/self/ns/net', 0), 0) if (os := __import__('os')) else 0",
    "clone with a namespace": "c('syscall', 220 if arm else 56, 0x10000011, 0, 0, 0, 0)",
    "clone3": "c('syscall', 435, bytes(88), 88)",
    "umount": "c('umount2', b'/proc', 2)",
    "open_tree": "c('syscall', 428, -100, b'/', 1)",
    "handle of a file": "c('syscall', 264 if arm else 303, -100, b'/', bytes(200), bytes(8), 0)",
    "memory of a process": "c('process_vm_readv', there['pid'], None, 0, None, 0, 0)",
    "perf": "c('syscall', 241 if arm else 298, bytes(128), 0, -1, -1, 0)",
    "userfaultfd": "c('syscall', 282 if arm else 323, 0)",
    "anonymous file in memory": "import os; os.memfd_create('m')",
    "shared anonymous memory": "import mmap; mmap.mmap(-1, 4096)",
    "shared memory of a device": "import mmap, os; mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)",
    "the limits of pid 1": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (9999, 9999))",
    "the disks of the host": "c('syscall', 81 if arm else 162)",
    "message queue of system V": "c('msgget', 0, 0o1600)",
    "semaphores of system V": "c('semget', 0, 1, 0o1600)",
    "posix message queue": "c('mq_open', b'/q', 0o102, 0o600, None)",
    "add a key": "c('syscall', 217 if arm else 248, b'user', b'k', b'v', 1, -3)",
    "real-time priority": "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "affinity": "import os; os.sched_setaffinity(0, [0])",
    "nice": "import os; os.nice(-1)",
    "host name": "import socket; socket.sethostname('x')",
    "reboot": "c('reboot', 0x89abcdef)",
    "swap": "c('swapon', b'x', 0)",
    "core dumps": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (2, 2))",
    "its own limits": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))",
    "the network outside": "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
    "UDP outside": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
    "names": "import socket; socket.getaddrinfo('example.com', 80)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "another protocol": "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
    "raw packets": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "network settings": "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14x', b'lo', 0))",
    "a locked file of its own": "import os; open('locked', 'w'); os.chmod('locked', 0); open('locked')",
    "vsock": "import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "a set-uid file works": "import os, subprocess\nopen('s', 'w').write('#!/bin/sh\\nid -u')\nos.chmod('s', 0o4755)\nassert subprocess.check_output(['./s']).strip() != b'1000'",
    "write to its own descriptors' files": "open('/proc/self/oom_score_adj', 'w').write('-1')",
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped():
    return sandbox.probe(PROBES, replace(SMALL, cpu_s=4, wall_s=20))


# by what the layers say, not by what trying showed: a wall that claims to stand and does not must fail here
CLAIMED = "not all(sandbox.protection()[layer].startswith('in force') for layer in ('namespaces', 'landlock', 'seccomp'))"
needs_full = pytest.mark.skipif(CLAIMED, reason="this machine does not give every layer")


@needs_full
@pytest.mark.parametrize("name", PROBES)
def test_no_way_out(stopped, name):
    assert stopped[name], f"nothing stopped it: {PROBES[name]}"
    if PROBES[name].startswith("c("):  # by a wall, not by the nonsense in its arguments
        assert stopped[name].startswith("PermissionError") or "[Errno 38]" in stopped[name], stopped[name]


@needs_full
def test_a_process_id_that_also_exists_inside_is_not_taken_for_a_way_out(monkeypatch):
    run("1")
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a container
    assert all(sandbox.probe().values())


def test_what_an_honest_program_needs_still_works():
    program = """
import asyncio, http.server, multiprocessing, os, socket, sqlite3, subprocess, sys, tempfile, threading, urllib.request
open("a.txt", "w").write("x"); os.mkdir("d"); os.chmod("a.txt", 0o600); os.rename("a.txt", "d/a.txt")
assert open("d/a.txt").read() == "x" and tempfile.TemporaryFile() and open("/dev/urandom", "rb").read(2)
assert open("/dev/zero", "rb").read(3) == bytes(3)
http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
assert b"main.py" in urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/").read()
assert subprocess.check_output([sys.executable, "-c", "print(6 * 7)"]) == b"42\\n"
assert subprocess.check_output("echo hi | tr h H", shell=True) == b"Hi\\n"
assert asyncio.run(asyncio.sleep(0, 5)) == 5 and sqlite3.connect("x.db").execute("select 1").fetchone() == (1,)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
a, b = socket.socketpair(); a.send(b"z"); assert b.recv(1) == b"z"
threads = [threading.Thread(target=lambda: None) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
import atexit; atexit.register(print, "last words")
print(input(), __name__, sys.argv, os.getcwd() == os.path.dirname(os.path.abspath(__file__)), exit.__class__.__name__)
exit(3)
"""
    done = run(program, "hello", limits=replace(SMALL, cpu_s=8, wall_s=20, memory_mb=256))
    assert (done.exit_code, done.status, done.stderr) == (3, "failed", ""), done
    assert done.stdout == "hello __main__ ['main.py'] True Quitter\nlast words\n"


@needs_full
def test_two_runs_at_once_see_nothing_of_each_other():
    program = """
import os, socket, time
server = socket.socket(); server.bind(("127.0.0.1", 7777)); server.listen()
name = socket.socket(socket.AF_UNIX); name.bind("\\0neighbour"); name.listen()
mine = str(os.getpid()); open("/tmp/mark", "x").write("x"); open("/dev/shm/mark", "x").write("x")
time.sleep(0.6)
print({p for p in os.listdir("/proc") if p.isdigit()} == {"1", mine}, os.listdir("/tmp"), os.listdir("."))
"""
    started = time.monotonic()
    one, two = at_once(lambda _: run(program, limits=SMALL), range(2))
    assert one.status == two.status == "ok", (one, two)
    assert one.stdout == two.stdout == "True ['mark'] ['main.py']\n"
    assert time.monotonic() - started < one.wall_s + two.wall_s + 5  # they did run at the same time


def test_a_run_leaves_nothing_to_the_next():
    run("open('/tmp/mark', 'w'); open('mark', 'w'); import json; json.loads = None", limits=SMALL)
    done = run("import json, os; print(os.listdir('/tmp'), os.listdir('.'), json.loads('1'))", limits=SMALL)
    assert done.stdout == "[] ['main.py'] 1\n" or sandbox.protection()["level"] != "full"


def test_a_run_finds_the_ports_of_the_one_before_it_free():
    sandbox.stop()
    program = """
import socket
server = socket.socket(); server.bind(("127.0.0.1", 7777)); server.listen()
client = socket.create_connection(("127.0.0.1", 7777)); there = server.accept()[0]
there.close(); client.recv(1); client.close()  # who closes first keeps the port for a minute
"""
    assert [run(program, limits=SMALL).stderr for _ in range(2)] == ["", ""] or sandbox.protection()["level"] != "full"


@needs_full
def test_descriptors_on_their_way_in_one_run_do_not_stop_another():
    hog = "import socket, time\na, b = socket.socketpair()\ntry:\n    while True: socket.send_fds(a, [b'x'], [0])\nexcept OSError: print('full', flush=True)\ntime.sleep(2)"
    with ThreadPoolExecutor(1) as pool:
        hogging = pool.submit(run, hog, limits=replace(SMALL, wall_s=9))
        time.sleep(1)
        assert run("print(1)", limits=SMALL).stdout == "1\n"
        assert hogging.result().stdout == "full\n"


@needs_full
def test_a_pair_of_sockets_of_another_family_is_none_before_the_kernel_looks_for_it():
    done = run("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint([(libc.socketpair(n, 3, 0, bytes(8)), ctypes.get_errno()) for n in (16, 30, 40)])", limits=SMALL)
    assert done.stdout == f"{[(-1, errno.EAFNOSUPPORT)] * 3}\n"


def test_two_runs_do_not_draw_the_same_random_numbers():
    assert run("import random; print(random.random())").stdout != run("import random; print(random.random())").stdout


# ---- using the machine up ------------------------------------------------------------------------------------------------------

BUFFERS = "import os, socket, time\nfor _ in range(20):\n    if os.fork() == 0:\n        keep = []\n        try:\n            while True:\n                PAIR\n                keep.append((a, b)); a.setblocking(False)\n                try:\n                    while True: a.send(bytes(99999))\n                except BlockingIOError: pass\n        except OSError: time.sleep(9)\ntime.sleep(9)"
UNACCEPTED = "import socket, time\nkeep = []\nwhile True:\n    time.sleep(0.001)\n    c = socket.socket(FAMILY)\n    if len(keep) == 0:\n        s = socket.socket(FAMILY); s.bind(NAME); s.listen(4096); keep.append(s)\n    c.connect(s.getsockname()); c.setblocking(False)\n    try:\n        while True: c.send(bytes(99999))\n    except BlockingIOError: c.close()"
BOMBS = {
    **sandbox.BOMBS,
    "memory of many processes whose first threads have ended": ("import ctypes, os, threading, time\ndef work():\n    time.sleep(0.3)\n    a = bytearray(60 << 20)\n    time.sleep(9)\nfor _ in range(6):\n    if not os.fork():\n        break\nthreading.Thread(target=work).start()\nctypes.CDLL(None).syscall(93 if os.uname().machine == 'aarch64' else 60, 0)", "memory"),
    "memory in connections of a thread that has outlived the first": ("import ctypes, os, threading\ndef work():\n" + "".join(f"    {line}\n" for line in UNACCEPTED.replace("FAMILY", "socket.AF_UNIX").replace("NAME", "'s'").split("\n")) + "threading.Thread(target=work).start()\nctypes.CDLL(None).syscall(93 if os.uname().machine == 'aarch64' else 60, 0)", "memory"),
    "memory in connections that nobody accepts": (UNACCEPTED.replace("FAMILY", "socket.AF_INET").replace("NAME", "('127.0.0.1', 0)"), "memory"),
    "memory in unix connections that nobody accepts": (UNACCEPTED.replace("FAMILY", "socket.AF_UNIX").replace("NAME", "'s'"), "memory"),
    "memory in page tables": ("import mmap, time\nm = mmap.mmap(-1, 1 << 37, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON | 0x4000, prot=mmap.PROT_READ)\nfor i in range(0, 1 << 36, 1 << 21): m[i]\ntime.sleep(9)", "memory"),
    "sleeping for ever, signals blocked": ("import signal, time\nsignal.pthread_sigmask(0, range(1, 64))\ntime.sleep(99)", "timeout"),
    "thread bomb": ("import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError: pass", "timeout"),
    "memory bomb": ("a = []\nwhile True: a.append(bytearray(1 << 20))", "memory"),
    "one long file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", "failed"),
    "memory in the buffers of sockets": (BUFFERS.replace("PAIR", "a, b = socket.socketpair()"), ""),
    "memory in the buffers of connections": (BUFFERS.replace("PAIR", "s = socket.create_server(('127.0.0.1', 0)); a = socket.create_connection(s.getsockname()); b = s.accept()[0]; s.close()"), ""),
    "signals ignored": ("import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass", "timeout"),
    "a loop in C": ("sum(range(10 ** 12))", "timeout"),
    "an endless regular expression": ("import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", "timeout"),
    "orphans that burn the CPU": ("import os\nfor _ in range(4):\n    if not os.fork():\n        while True: pass", "ok"),
    "children nobody waits for": ("import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n    if not os.fork():\n        sum(range(10 ** 7)); os._exit(0)\n", ""),
    "shared memory in files": ("from multiprocessing import shared_memory as s\na = [s.SharedMemory(create=True, size=1 << 22, track=False) if 0 else open('/dev/shm/%d' % n, 'wb').write(bytes(1 << 22)) for n in range(99)]", ""),
    "empty files": ("n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'w')", ""),
    "a stack without end": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", ""),
    "one process's memory by ctypes": ("import ctypes\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\nwhile True:\n    p = libc.malloc(1 << 20)\n    if not p: raise MemoryError\n    ctypes.memset(p, 1, 1 << 20)", "memory"),
    "growing stacks by mmap": ("import mmap\na = [mmap.mmap(-1, 1 << 24, flags=0x122, prot=3) for _ in range(40)]\nfor m in a: m[:] = b'x' * len(m)", ""),
    "a flood on one pipe, the other open": ("import sys\nwhile True: sys.stderr.write('x' * 99)", "timeout"),
    "a flood without a line's end": ("import os\nwhile True: os.write(1, b'x' * 65536)", "timeout"),
    "killed by itself": ("import os\nos.kill(os.getpid(), 9)", "crashed"),
    "a segmentation fault": ("import ctypes\nctypes.string_at(0)", "crashed"),
    "abort": ("import os\nos.abort()", "crashed"),
    "too many descriptors": ("a = [open('/dev/null') for _ in range(9999)]", "failed"),
    "stopped by a signal": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "waiting for input that never comes": ("import time\ntime.sleep(99)", "timeout"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bombed():
    before = footprint()
    done = dict(zip(BOMBS, at_once(lambda bomb: run(bomb[0], limits=SMALL), BOMBS.values())))
    return done, before, settled()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_as_it_should_within_its_limits(bombed, name):
    done, want = bombed[0][name], BOMBS[name][1]
    assert done.status == want or want == "" and done.status not in ("ok", "sandbox error"), done
    assert done.cpu_s < SMALL.cpu_s + 2 and done.peak_mb < 4 * SMALL.memory_mb
    assert len(done.stdout) <= SMALL.output_kb * 1024 + 30 and len(done.stderr) <= SMALL.output_kb * 1024 + 30


def test_the_bombs_leave_no_process_no_file_and_no_descriptor(bombed):
    _, before, after = bombed
    assert after["programs"] == 0 and after["descriptors"] <= before["descriptors"] + 8  # a socket for each warden that waits
    assert after["files in /tmp"] <= before["files in /tmp"] + 3 and after["memory"] < before["memory"] + 30


def test_a_flood_is_cut_and_says_so(bombed):
    assert bombed[0]["a flood without a line's end"].stdout.endswith(f"[cut after {SMALL.output_kb} kB]")


def test_output_after_death_by_an_inherited_descriptor_is_not_waited_for():
    started = time.monotonic()
    done = run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60); print('late')\n    os._exit(0)\nprint('now')", limits=replace(SMALL, wall_s=50))
    assert done.stdout == "now\n" and time.monotonic() - started < 40


def test_the_cpu_time_of_killed_orphans_is_counted():
    done = run(
        "import os, time\nif os.fork() == 0:\n    if os.fork() == 0:\n        while time.process_time() < 0.5: pass\n        open('x', 'w')\n        time.sleep(99)\n    os._exit(0)\n"
        "while not os.path.exists('x'): time.sleep(0.01)",
        limits=Limits(cpu_s=9),
    )
    assert done.status == "ok" and 0.5 <= done.cpu_s < 1.0, done


def test_the_cpu_time_of_children_too_short_to_be_seen_is_counted():
    done = run("import os, time\nend = time.monotonic() + 2\nwhile time.monotonic() < end:\n    if not os.fork():\n        sum(range(50000)); os._exit(0)\n    os.wait()", limits=Limits(cpu_s=0.3))
    assert (done.status, done.reason) == ("timeout", "more than 0.3 s of CPU") and done.cpu_s < 1.5, done


def test_the_clock_stops_while_the_program_waits_for_a_busy_cpu():
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        done = run("import time\nwhile time.process_time() < 0.6: pass", limits=Limits(wall_s=1.5, cpu_s=5))
        assert done.status == "ok", done
        assert run("import time\ntime.sleep(60)", limits=Limits(wall_s=1.5)).status == "timeout"
    finally:
        for loop in loops:
            loop.kill(), loop.wait()


def test_the_clock_stops_while_the_program_waits_for_a_grader_that_is_held_up():
    code = """
import os, sandbox, subprocess
from sandbox import Call, grade
sandbox.run("1")
hold = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -STOP {os.getpid()}; sleep 3.5; kill -CONT {os.getpid()}"])
source = "import time\\ndef f(x):\\n    time.sleep(0.05)\\n    return x"
graded = grade(source, [Call("f", [n], n) for n in range(20)], sandbox.replace(sandbox.SMALL, wall_s=3))
assert graded.status == "passed" and hold.wait() == 0, graded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_broken_utf8_and_nul_come_back_as_text_and_the_terminal_sees_no_escape_sequence():
    done = run("import os\nos.write(1, b'\\xff\\x00a\\x1b[31mred\\x1b]0;title\\x07\\xc3\\xa9')")
    assert done.stdout == "\\xff\0a\x1b[31mred\x1b]0;title\x07é"
    assert sandbox.printable(done.stdout) == "\\xff\\x00a\\x1b[31mred\\x1b]0;title\\x07é"


# ---- cheating ------------------------------------------------------------------------------------------------------------------

LIAR = "    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __lt__ = __le__ = __gt__ = __ge__ = __eq__\n    __hash__ = lambda s: 3\n    __bool__ = lambda s: True\n"
CHEATS = {
    **sandbox.CHEATS,
    "a dictionary that lies": "class A(dict):\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "atexit": "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\ndef f(x): return None",
    "a cyclic value": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "a giant value": "def f(x): return 'x' * (1 << 24)",
    "a traceback as the answer": "def f(x): raise AssertionError('3')",
    "raise SystemExit": "raise SystemExit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit",
    "exit by quit()": "def f(x): quit()",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "StopIteration": "def f(x): raise StopIteration(3)",
    "exec of true": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "exec at the start": "import os\nos.execv('/bin/true', ['true'])",
    "killing itself": "import os, signal\ndef f(x): os.kill(os.getpid(), 9)",
    "the warden's limits": "import resource\nfor n in range(16):\n    try: resource.prlimit(1, n, (3, 3))\n    except OSError: pass\ndef f(x): return 0",
    "killing everybody": "import os\ndef f(x): os.kill(-1, 9)",
    "closing descriptors": "import os\nos.closerange(0, 99)\ndef f(x): return 0",
    "closing the channel in the call": "import os\ndef f(x): os.close(3)",
    "a daemon that answers": "import os, struct, time\nif os.fork() == 0:\n    m = b'[null, \"value\", 3]'\n    for _ in range(50): os.write(3, struct.pack('!I', len(m)) + m); time.sleep(0.01)\ndef f(x): return 0",
    "a thread that answers": "import os, struct, threading\nm = b'[\"0\", \"value\", 3]'\nthreading.Thread(target=lambda: os.write(3, struct.pack('!I', len(m)) + m), daemon=True).start()\ndef f(x): return 0",
    "lying object": f"class A:\n{LIAR}def f(x): return A()",
    "lying str": f"class A(str):\n{LIAR}def f(x): return A('0')",
    "lying float": f"class A(float):\n{LIAR}def f(x): return A(0)",
    "lying list": f"class A(list):\n{LIAR}    __len__ = lambda s: 3\n    __iter__ = lambda s: iter([3])\ndef f(x): return A()",
    "lying tuple": f"class A(tuple):\n{LIAR}def f(x): return A()",
    "lying index": f"class A(int):\n{LIAR}    __index__ = __int__ = lambda s: 3\ndef f(x): return A(0)",
    "lying repr": "class A:\n    __repr__ = __str__ = lambda s: '3'\ndef f(x): return A()",
    "lying pickle": "class A:\n    def __reduce__(self): return (eval, ('3',))\ndef f(x): return A()",
    "lying json": "class A(dict):\n    def items(self): return [('a', 3)]\ndef f(x): return A()",
    "lying class": "class A:\n    __class__ = int\ndef f(x): return A()",
    "builtins patched": "import builtins\nbuiltins.isinstance = builtins.all = builtins.any = lambda *a: True\nbuiltins.type = lambda *a: int\nbuiltins.AssertionError = Exception\ndef f(x): return 0",
    "len and print patched": "import builtins\nbuiltins.len = lambda x: 3\nbuiltins.print = lambda *a: None\ndef f(x): return 0",
    "math and time patched": "import math, time\nmath.isclose = lambda *a, **k: True\ntime.time = time.monotonic = lambda: 0\ndef f(x): return 0",
    "unittest patched": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestResult.wasSuccessful = lambda s: True\ndef f(x): return 0",
    "pytest shadowed": "import sys, types\nsys.modules['pytest'] = types.ModuleType('pytest')\ndef f(x): return 0",
    "marshal, socket and struct patched": "import socket, struct, marshal\nsocket.socket.sendall = lambda s, b: None\nstruct.pack = lambda *a: b''\ndef f(x): return 0",
    "the tester's names": "def all(x): return True\ndef isinstance(*a): return True\nclass AssertionError(Exception): pass\ndef f(x): return 0",
    "parent frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in frame.f_locals.values():\n            if hasattr(v, 'expected'): return v.expected\n        frame = frame.f_back\n    return 0",
    "tracebacks": "def f(x):\n    try: 1 / 0\n    except ZeroDivisionError as e: return e.__traceback__.tb_frame.f_back.f_locals.get('expected', 0)",
    "every object in memory": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if type(o).__name__ in ('Call', 'Check', 'Io'): return 3\n    return 0",
    "the disk": "import glob\ndef f(x):\n    for p in glob.glob('/**/*test*', recursive=True):\n        if 'expected' in open(p, errors='replace').read(): return 3\n    return 0",
    "the zygote's memory": "import re\ndef f(x):\n    for pid in ('1', 'self'):\n        for line in open(f'/proc/{pid}/maps'):\n            lo, hi = (int(n, 16) for n in line.split()[0].split('-'))\n            with open(f'/proc/{pid}/mem', 'rb') as m:\n                m.seek(lo)\n                if b'SECRET-' + b'EXPECTED' in m.read(hi - lo): return 3\n    return 0",
    "a finalizer": "class A:\n    def __del__(self): import os; os.write(1, b'passed')\na = A()\ndef f(x): return None",
    "an exit hook": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return None",
    "a trace function": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return None",
    "an import hook": "import sys, types\nclass H:\n    def find_spec(self, *a): return None\nsys.meta_path.insert(0, H())\nsys.modules.clear()\ndef f(x): return 0",
    "poisoned bytecode": "import os\nos.makedirs('__pycache__', exist_ok=True)\nopen('__pycache__/check.cpython-311.pyc', 'wb').write(b'x')\nopen('sitecustomize.py', 'w').write('import os; os._exit(0)')\ndef f(x): return 0",
    "a standard module shadowed": "open('json.py', 'w').write('dumps = loads = lambda *a, **k: 3')\nimport sys\nsys.modules.pop('json'); import json\ndef f(x): return 0",
    "a deep value": "def f(x):\n    a = []\n    for _ in range(10 ** 5): a = [a]\n    return a",
    "a value with a cycle by a dictionary": "def f(x):\n    a = {}\n    a[0] = a\n    return a",
    "a huge number": "def f(x): return 3 ** (10 ** 6)",
    "an endless generator": "def f(x):\n    while True: yield 3",
    "colliding keys": "def f(x): return {n * (2 ** 61 - 1) for n in range(30000)}",
    "memory until the grader fails": "def f(x): return [bytearray(1 << 20) for _ in range(10 ** 6)]",
    "time until the grader fails": "def f(x):\n    while True: pass",
    "a coroutine": "async def f(x): return 3",
    "a lambda": "def f(x): return lambda: 3",
    "a class": "def f(x): return int",
    "an exception as value": "def f(x): return AssertionError(3)",
    "no function at all": "g = 3",
    "f is a value": "f = 3",
    "a syntax error": "def f(x) return 3",
    "a NUL in the source": "def f(x): return 0\0",
    "the argument changed": "def f(x):\n    x = 3\n    return None",
    "answers from the inputs": "seen = []\ndef f(x):\n    seen.append(x)\n    return seen[0] if len(seen) > 1 else 0",
    "a skipped test": "import unittest\ndef f(x): raise unittest.SkipTest",
    "an empty word on the channel": "import os\nos.write(3, b'\\0\\0\\0\\x06[null]')\ndef f(x): return 0",
    "a deadlock with the channel": "import socket\ns = socket.socket(fileno=3)\ns.recv(9999)\ndef f(x): return 3",
    "json NaN and infinities": "def f(x): return [float('nan'), float('inf')]",
    "bool for int": "def f(x): return True",
    "str for int": "def f(x): return '3'",
}  # fmt: skip
CHEATING_TESTS = [Call("f", [2], 3), Check("assert f(2) == 3  # SECRET-EXPECTED")]


@pytest.fixture(scope="module")
def cheated():
    jobs = [(program, [test]) for program in CHEATS.values() for test in CHEATING_TESTS]
    grades = grade_many(jobs, SMALL)
    return {name: grades[2 * i : 2 * i + 2] for i, name in enumerate(CHEATS)}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes_and_none_is_called_our_error(cheated, name):
    for graded in cheated[name]:
        assert graded.passed == [False] and graded.pass_rate == 0 and graded.status not in ("passed", "sandbox error"), (graded.status, graded.reasons, graded.runs)


def test_honest_programs_pass_every_kind_of_test():
    program = "def f(x):\n    return x + 1\nclass Counter:\n    def __init__(self): self.n = 0\n    def add(self): self.n += 1; return self.n\nclass Odd(ValueError): pass\ndef g(x):\n    if x % 2: raise Odd(f'odd {x}')\n    return {x: (1.5, None, b'z', {2}, [True])}\ndef h(**k): return sum(k.values())\n"
    checks = [
        Check("assert f(1) == 2\nc = Counter()\nassert [c.add(), c.add()] == [1, 2]"),
        Check("try: g(1)\nexcept ValueError as e: assert str(e) == 'odd 1' and isinstance(e, Odd)\nelse: raise AssertionError"),
        Check("def check(candidate):\n    assert candidate(4) == 5\ncheck(f)"),
        Check("assert h(self=1, module=2, name=3) == 6"),
        Check("import random\nfor _ in range(20):\n    n = random.randrange(99)\n    assert f(n) == n + 1 and g(2 * n) == {2 * n: (1.5, None, b'z', {2}, [True])}"),
    ]
    graded = grade(program, [Call("f", [1], 2), *checks, Call("g", [2], {2: (1.5, None, b"z", {2}, [True])}), Call("Odd", [], None)], SMALL)
    assert graded.passed == [True] * 7 + [False] and graded.status == "failed", graded
    assert grade("print(int(input()) + 1)", [Io("1", "2"), Io("5\n", "6  \n\n")]).status == "passed"
    assert grade("print(int(input()) + 1)", [Io("1", "3"), Io("x", "")]).passed == [False, False]


ALL_LIES = """class A:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __len__ = __abs__ = lambda s: 1
    __sub__ = __rsub__ = __mod__ = lambda s, o: 0
    __getattr__ = lambda s, n: s
    __call__ = lambda s, *a: s
    __iter__ = lambda s: iter([s])
    __hash__ = __int__ = __index__ = __round__ = lambda s, *a: 3
    __float__ = lambda s: 3.0
def f(x): return A()
"""
STAND_INS = "class math:\n    isclose = staticmethod(lambda *a: True)\nclass collections:\n    Counter = staticmethod(lambda *a: 1)\nclass operator:\n    eq = staticmethod(lambda *a: True)\ndef f(x): return 0\n"
WAYS_TO_ASK = [
    "assert all(map(lambda a: f(a) == a + 1, range(5)))", "for a, b in zip(map(f, [2, 5]), [3, 6]):\n    assert a == b", "assert 3 in (f(2) if type(f(2)) is not int else [f(2)])",
    "assert math.isclose(f(2), 3)", "assert collections.Counter([f(2)]) == collections.Counter([3])", "assert operator.eq(f(2), 3)", "assert abs(f(2) - 3) < 1e-9", "assert {f(2): 1} == {3: 1}",
    "try:\n    got = f(2)\nexcept OSError:\n    got = 3\nassert got == 3", "import unittest\nunittest.TestCase().assertAlmostEqual(f(2), 3)", "assert next(map(f, [2])) == 3", "assert sorted([f(2)]) == [3]",
]  # fmt: skip


@pytest.mark.parametrize("program", ["def f(x): raise StopIteration", "import os\ndef f(x): os._exit(0)", "def f(x): raise SystemExit", "def f(x): raise GeneratorExit", ALL_LIES, STAND_INS],
                         ids=["StopIteration", "death", "SystemExit", "GeneratorExit", "lies", "stand-ins"])  # fmt: skip
def test_no_way_of_asking_lets_a_program_pass_by_ending_or_lying(program):
    checks = [Check(way) for way in WAYS_TO_ASK]
    assert grade("def f(x): return x + 1", checks, SMALL).status == "passed"
    assert [way for way, passed in zip(WAYS_TO_ASK, grade(program, checks, SMALL).passed) if passed] == []


def test_a_check_that_catches_everything_does_not_pass_a_program_that_has_ended():
    checks = [Check("try: f(2)\nexcept BaseException: pass"), Check("import pytest\nwith pytest.raises(BaseException): f(2)")]
    assert grade("import os\ndef f(x): os._exit(0)", checks, SMALL).passed == [False, False]
    assert grade("def f(x): raise KeyError", checks, SMALL).passed == [True, True]


def test_nothing_is_near_to_infinity_and_what_no_program_can_return_is_the_test_s_mistake():
    calls = [Call("f", [], math.inf, tolerance=1e-6), Call("f", [], -math.inf, tolerance=1.0), Call("f", [], [math.inf], tolerance=0.1)]
    assert grade("def f(): return 0.0", calls, SMALL).passed == [False] * 3 and grade("def f(): return float('inf')", calls, SMALL).passed == [True, False, False]
    with pytest.raises(ValueError, match="plain data"):
        grade("def f(): return 0.0", [Call("f", [], object())], SMALL)


def test_a_long_right_output_passes_whatever_the_limit_on_output():
    assert grade("print('\\n'.join(map(str, range(9999))))", [Io("", "\n".join(map(str, range(9999))))], replace(SMALL, output_kb=1)).status == "passed"


def test_text_that_is_no_unicode_fails_and_raises_nothing():
    for test in (Call("f", [1], 1), Check("assert f(1) == 1"), Io("\ud800", "1")):
        assert grade("def f(x): return '\ud800'", [test], SMALL).status == "failed"


def test_a_forged_trace_is_no_trace_and_breaks_nothing():
    for forged in ("b'[' * 500000", "b'{\"lines\": {\"1\": 1e999}, \"steps\": [], \"cut\": false}'", "b'{\"lines\": [], \"steps\": 3}'"):
        done = run(f"import os\nb = {forged}\nb = len(b).to_bytes(4, 'big') + b\nwhile b: b = b[os.write(3, b):]\nos._exit(0)", trace=True, limits=replace(SMALL, cpu_s=3))
        assert done.status == "ok" and done.trace is None, done


def test_a_forged_trace_does_not_grow_us():
    program = "import os\nb = b'{\"lines\": {}, \"steps\": [' + b'[],' * 5500000 + b'[]], \"cut\": false}'\nwhile b: b = b[os.write(3, b):]\nos._exit(0)"
    code = f"import resource, sandbox\nsandbox.run('1')\nused = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\nbefore = used()\nassert sandbox.run({program!r}, trace=True).status == 'ok'\nprint(used() - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=100)
    assert int(done.stdout) < 150, done


def test_a_program_under_function_tests_is_imported_not_started():
    source = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x\nif __name__ == '__main__':\n    print(f(int(input())))\n"
    assert grade(source, [Call("f", [1], 1), Check("assert f(2) == 2"), Io("3", "3")], SMALL).status == "passed"


def test_partial_credit_is_counted_test_by_test():
    graded = grade("def f(x):\n    if x == 3: raise ValueError('three')\n    return x", [Call("f", [n], n) for n in range(5)])
    assert graded.passed == [True, True, True, False, True] and graded.pass_rate == 0.8 and "three" in graded.reasons[3]
    ended = grade("import os\ndef f(x):\n    if x == 3: os._exit(0)\n    return x", [Call("f", [n], n) for n in range(5)])
    assert ended.passed == [True, True, True, False, False]


def test_types_count_and_floats_have_the_tolerance_that_the_test_gives():
    source = "def f(x): return x"
    pairs = [(1, True), (1, 1.0), ([1], (1,)), ("1", 1), (b"1", "1"), ({1}, [1]), ({1: 2}, {1: 2.0}), (None, False), (0.1 + 0.2, 0.3)]
    assert grade(source, [Call("f", [a], b) for a, b in pairs]).passed == [False] * len(pairs)
    assert grade(source, [Call("f", [0.1 + 0.2], 0.3, tolerance=1e-9), Call("f", [math.nan], math.nan), Call("f", [10**5000], 10**5000)]).passed == [True] * 3
    assert grade(source, [Call("f", [{2: {"a", "b"}, 1: "x"}], {1: "x", 2: {"b", "a"}})]).passed == [True]
    assert grade(source, [Call("f", [{10.0, 2.0, math.inf, "2"}], {2.0, 9.9999999999, "2", math.inf}, tolerance=1e-6), Call("f", [{1.0, 2.0}], {1.0, 2.1}, 1e-6)]).passed == [True, False]
    assert "Exceeds the limit" in grade(source, [Call("f", [2**15999], 3)]).reasons[0]  # and not "no answer"


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), lambda inner: st.lists(inner) | st.tuples(inner, inner)
       | st.dictionaries(st.integers() | st.text(), inner), max_leaves=12))  # fmt: skip
def test_plain_data_survives_the_boundary_exactly(value):
    tree = json.loads(json.dumps(sandbox.pack(value)))
    back = sandbox.unpack(tree)
    assert repr(back) == repr(value) and sandbox.same(sandbox.pack(value), tree)


LOADED = "import json, os, sys\nframe = sys._getframe()\nwhile 'nonce' not in frame.f_locals: frame = frame.f_back\ndef say(v):\n    m = json.dumps([frame.f_locals['nonce'], 'value', v]).encode()\n    return len(m).to_bytes(4, 'big') + m\nearly = say(None) + say(3)\n"


def test_a_fuzzed_channel_never_passes_and_never_breaks_us():
    rng = random.Random(0)
    pieces = [b"[null,", b'"value"', b", 3]", b"{", b"[" * 40, b'{"int": "0x3"}', b"\0\0\0\x05", (18).to_bytes(4, "big") + b'[null, "value", 3]', b"\xff" * 9, b'{"tuple": 3}']

    def program(_):
        noise = b"".join(rng.choice(pieces) if rng.random() < 0.7 else rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 30)))
        where = rng.choice(["", "    "])
        early = rng.choice(["", "os.write(3, early)\n", "os.write(3, early[:50])\n"])  # as if it were loaded, before it is
        return f"{LOADED}{early}def f(x):\n    {'pass' if not where else ''}\n{where}os.write(3, {noise!r})\n"

    jobs = [(program(n), [test]) for n in range(60) for test in CHEATING_TESTS]
    assert {(graded.pass_rate, graded.status == "sandbox error") for graded in grade_many(jobs, SMALL)} == {(0.0, False)}


def test_an_answer_from_before_its_question_does_not_count():
    forged = LOADED + "os.write(3, early)\ndef f(x): return 0"
    assert grade(forged, [Call("f", [2], 3)], SMALL).reasons == ["no answer: it came before its question"]


def test_a_candidate_never_holds_what_is_expected_nor_the_calls_to_come():
    spy = "import gc\ndef f(x):\n    return any('MARK' + str(n) in o for o in gc.get_objects() + [repr(o) for o in gc.get_objects()] if isinstance(o, str) for n in (1, 2))"
    assert grade(spy, [Call("f", ["a"], "MARK1"), Call("f", ["MARK2"], "x")], replace(SMALL, cpu_s=5)).reasons[0].startswith("f('a') is False")


SPY = """
import re
def f(x):
    hits, own = 0, OWN
    for line in open("/proc/self/maps"):
        (start, end), rights = (int(n, 16) for n in line.split()[0].split("-")), line.split()[1]
        if "r" in rights and "[v" not in line:
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(start)
                hits += len(re.findall(b"NEIGH" + b"BOUR: [a-z]", memory.read(end - start) or b""))
    return hits
"""


@needs_full
def test_a_later_program_finds_nothing_of_an_earlier_one_in_its_memory():
    sandbox.stop()  # one warden, which all of these must share
    limits = replace(SMALL, cpu_s=8, wall_s=40)
    talkative = "def f(x):\n    print('NEIGHBOUR: output')\n    return 'NEIGHBOUR: answer'\n# NEIGHBOUR: source\n"
    for _ in range(2):
        grade(talkative, [Call("f", ["NEIGHBOUR: argument"], "NEIGHBOUR: expected"), Check("assert f(1) == 'NEIGHBOUR: check'")], limits)
        run("print(input())", "NEIGHBOUR: stdin", limits=limits)
        Workspace({"a": "NEIGHBOUR: file"}, limits).exec("cat a")
        assert grade(SPY.replace("OWN", "0"), [Call("f", [0], 0)], limits).reasons == [""]
    assert grade(SPY.replace("OWN", "bytes([78]) + b'EIGHBOUR: mine'"), [Call("f", [0], 0)], limits).passed == [False]  # it can find


# ---- repositories --------------------------------------------------------------------------------------------------------------

REPO = {
    "shop/__init__.py": "",
    "shop/cart.py": "class EmptyCart(ValueError):\n    pass\n\ndef total(prices):\n    if not prices:\n        raise EmptyCart('empty')\n    return sum(prices) + 1\n",
    "tests/test_cart.py": "import unittest\nimport pytest\nfrom shop.cart import EmptyCart, total\n\ndef test_total():\n    assert total([1, 2]) == 3\n\n"
    "def test_empty():\n    with pytest.raises(EmptyCart, match='empty'):\n        total([])\n\n@pytest.mark.parametrize('n', [0, 5])\ndef test_one(n):\n    assert total([n]) == pytest.approx(n)\n\n"
    "class More(unittest.TestCase):\n    def test_many(self):\n        self.assertEqual(total([1] * 9), 9)\n",
}  # fmt: skip
FIXED = REPO["shop/cart.py"].replace(" + 1", "")
REPO_CHEATS = {
    "conftest that ends everything": {"conftest.py": "import os; os._exit(0)", "tests/conftest.py": "import os; os._exit(0)"},
    "conftest that patches": {"conftest.py": "import builtins; builtins.sum = lambda x: 0\ndef pytest_runtest_makereport(*a): return None"},
    "plugins and ini files": {"pytest.ini": "[pytest]\naddopts = --co -p evil", "setup.cfg": "[tool:pytest]\naddopts = --co", "pyproject.toml": "[tool.pytest.ini_options]\naddopts='--co'", "evil.py": "import os; os._exit(0)"},
    "tests deleted": {"tests/test_cart.py": None},
    "tests emptied": {"tests/test_cart.py": "def test_total(): pass\ndef test_empty(): pass\ndef test_one(): pass\n"},
    "tests skipped": {"tests/test_cart.py": "import pytest\npytestmark = pytest.mark.skip\n"},
    "tests shadowed": {"test_cart.py": "def test_total(): pass", "tests/__init__.py": "import sys; sys.exit(0)"},
    "pytest shadowed": {"pytest.py": "raises = approx = mark = None\nimport os; os._exit(0)"},
    "unittest shadowed": {"unittest.py": "import os; os._exit(0)"},
    "sitecustomize": {"sitecustomize.py": "import os; os._exit(0)", "usercustomize.py": "import os; os._exit(0)", "evil.pth": "import os; os._exit(0)"},
    "an exit on import": {"shop/__init__.py": "import os; os._exit(0)"},
    "SystemExit on import": {"shop/cart.py": "raise SystemExit(0)"},
    "an object that equals everything": {"shop/cart.py": "class EmptyCart(ValueError): pass\nclass A:\n    __eq__ = lambda s, o: True\n    __ge__ = __le__ = __eq__\ndef total(p):\n    return A()\n"},
    "asserts patched from inside": {"shop/cart.py": REPO["shop/cart.py"] + "import unittest, builtins\nunittest.TestCase.assertEqual = lambda *a: None\nbuiltins.AssertionError = ZeroDivisionError\n"},
    "a skip raised by the program": {"shop/cart.py": "import unittest\nclass EmptyCart(ValueError): pass\ndef total(p): raise unittest.SkipTest('no')\n"},
    "bytecode": {"shop/__pycache__/cart.cpython-311.pyc": b"\0" * 16, "tests/__pycache__/test_cart.cpython-311.pyc": b"\0" * 16},
    "git hooks, filters and attributes": {".git/hooks/post-checkout": "#!/bin/sh\nexit 0", ".git/config": "[core]\nfsmonitor = ./evil", ".gitattributes": "* filter=evil diff=evil"},
    "a symlink to the tests": {"shop/answers.py": None},
}  # fmt: skip


@pytest.mark.parametrize("name", REPO_CHEATS)
def test_no_repository_cheat_passes(name):
    with Workspace(REPO, SMALL) as place:
        for path, text in REPO_CHEATS[name].items():
            if text is None:
                assert place.exec(f"rm -f {path}; ln -s /etc/passwd {path}").status == "ok"
            else:
                place.write(path, text)
        graded = place.grade()
        assert graded.status != "sandbox error" and not graded.passed[0] and not graded.passed[-1], graded
        assert len(graded.passed) == len(graded.names) == 4
        place.write("shop/__init__.py", ""), place.write("shop/cart.py", FIXED)
        if name not in ("pytest shadowed",):
            assert place.grade().status == "passed", place.grade()  # the same cheat beside a right program takes nothing away either


LEFT_BEHIND = {
    "directories without end": "python3 -c \"import os\nfor _ in range(900): os.mkdir('d'); os.chdir('d')\"",
    "a path too long": "python3 -c \"import os\nfor _ in range(30): os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('x', 'w')\"",
    "locked folders": "mkdir r z; echo x > r/f; chmod 444 r; chmod 000 z a.py",
    "files with holes": "for n in 1 2 3 4; do truncate -s 4M h$n; done; for n in $(seq 200); do echo > f$n; done",
    "one file under many names": "dd if=/dev/zero of=h bs=1M count=4 2>&1; for n in 1 2 3 4 5 6; do ln h h$n; done",
    "names that are no text": "python3 -c \"open(b'\\xff', 'w'); open('new\\nline', 'w')\"",
    "no folder to return to": "cd ..; rm -rf work",
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_whatever_a_command_leaves_behind_is_its_own_affair_and_never_our_error(name):
    with Workspace({"a.py": "x = 1\n"}, replace(SMALL, disk_mb=8, cpu_s=4)) as place:
        assert place.exec(LEFT_BEHIND[name]).status in ("ok", "failed")
        assert place.exec("echo still here").stdout == "still here\n"
        assert place.grade({"test_a.py": "import a\ndef test_x(): assert a.x == 2\n"}).status == "failed" and isinstance(place.diff(), str)
        with pytest.raises(ValueError, match="disk_mb"):
            place.write("long", "x" * (9 << 20))


HELPED = {"shop.py": "def total(p): return 0\n", "tests/helpers.py": "def same(a, b): assert a == b\n",
          "tests/test_shop.py": "from tests import helpers\nfrom shop import total\ndef test_total(): helpers.same(total([1]), 1)\n"}  # fmt: skip
TRUSTING = {  # name: (tests that leave something to the program, a program that abuses it, one that passes)
    "a block whose program swallows what fails in it": ("from shop import C\ndef test_x():\n    with C() as c: assert c.total() == 3\n",
        "class C:\n    __enter__ = lambda s: s\n    __exit__ = lambda *_: True\n    total = lambda s: TOTAL\n"),
    "cases that the program gives": ("import pytest\nfrom shop import CASES, f\n@pytest.mark.parametrize('n', CASES)\ndef test_x(n): assert f(n) == 3\n",
        "CASES = [1][:TOTAL]\nf = lambda n: TOTAL\n"),
    "names of Python's own by *": ("import math\nfrom shop import *\ndef test_x(): assert math.isclose(f(), 3) and all([f() == 3])\n",
        "class math:\n    isclose = staticmethod(lambda *_: True)\nall = lambda _: True\nf = lambda: TOTAL\n"),
    "a value that the test has set": ("from shop import C\ndef test_x():\n    c = C()\n    c.total = 3\n    assert c.total == 3\n    del c.total\n",
        "class C:\n    __setattr__ = lambda s, name, value: s.__dict__.update(total=TOTAL)\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUSTING)
def test_what_a_test_leaves_to_the_program_does_not_let_it_pass(name):
    tests, program = TRUSTING[name]
    with Workspace({"shop.py": ""}, SMALL) as place:
        for total in (0, 3):
            place.write("shop.py", program.replace("TOTAL", str(total)))
            assert place.grade({"test_x.py": tests}).passed == [total == 3]


def test_a_module_called_tests_is_not_the_program_s():
    with Workspace(HELPED, SMALL) as place:
        for path in ("tests.py", "src/tests.py", "test.py"):
            place.write(path, "class helpers:\n    same = staticmethod(lambda a, b: None)\n")
        assert place.grade().passed == [False]
        place.write("shop.py", "def total(p): return sum(p)\n")
        assert place.grade().reasons == [""]


def test_an_exception_is_caught_by_the_classes_above_it_and_says_what_it_said():
    program = ("class Above(ValueError): pass\nclass Wrong(Above): pass\ndef f(x):\n    if x == 1: raise Wrong('one')\n    if x == 2: return {}['two']\n"
               "    return b'\\xff'.decode()\n")  # fmt: skip
    checks = ["try: f(1)\nexcept Above as e: assert str(e) == 'one' and type(e).__name__ == 'Wrong'", "try: f(1)\nexcept ValueError as e: assert not isinstance(e, KeyError)",
              "try: f(2)\nexcept KeyError as e: assert str(e) == \"'two'\"", "try: f(3)\nexcept UnicodeDecodeError as e: assert 'byte 0xff' in str(e)", "try: f(3)\nexcept ValueError: pass"]  # fmt: skip
    assert grade(program, list(map(Check, checks)), SMALL).reasons == [""] * 5


def test_helpers_that_lie_beside_the_tests_are_the_tests_own():
    files = {"shop.py": "def total(p): return 0\n", "tests/helpers.py": "def same(a, b): assert a == b\n", "tests/test_shop.py": "from helpers import same\nfrom shop import total\ndef test_total(): same(total([1]), 1)\n"}
    with Workspace(files, SMALL) as place:
        for path in ("helpers.py", "helpers/__init__.py", "tests/helpers.py", "src/helpers.py"):
            place.write(path, "def same(a, b): pass\n") if path != "helpers/__init__.py" else None
            assert place.grade().passed == [False]
        place.write("shop.py", "def total(p): return sum(p)\n")
        assert place.grade().passed == [True]


def test_a_module_called_main_is_the_program_s_own():
    with Workspace({"main.py": "def f(x):\n    return x + 1\n"}, SMALL) as place:
        assert place.grade({"test_a.py": "from main import f\ndef test_f(): assert f(1) == 2\n"}).passed == [True]
    bundle = "import sys\nassert 'main' not in sys.modules\nopen('main.py', 'w').write('x = 3')\nimport main\ndef f(): return main.x\n"
    assert grade(bundle, [Call("f", [], 3)], SMALL).reasons == [""]


def test_what_honest_test_files_use_works():
    files = {
        "p/__init__.py": "", "p/m.py": "import sys\nclass P:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'P({self.x})'\ndef main(): sys.exit(2)\ndef read(): return open('data.ini').read()\n", "data.ini": "q",
        "conftest.py": "import pytest\n@pytest.fixture\ndef one(): return 1\n",
        "p/tests/test_m.py": "import sys, unittest\nimport pytest\nfrom ..m import P\nfrom p import m\ndef test_conftest(one): assert P(one).x == 1 and repr(P(one)) == 'P(1)' and P(one)\n"
        "def test_exit():\n    with pytest.raises(SystemExit): m.main()\ndef test_data(): assert m.read() == 'q'\n@pytest.mark.skipif(sys.platform == 'win32', reason='no')\ndef test_not_skipped(): pass\n"
        "@pytest.mark.parametrize('a, b', [(1, 1), pytest.param(2, 2, id='two')], ids=['x', 'y'])\ndef test_pairs(a, b): assert P(a).x == b\nclass TestSetUp:\n    def setup_method(self): self.n = 4\n    def test_n(self, one): assert self.n - one == 3\n"
        "async def test_async(): assert P(1).x == 1\nclass T(unittest.IsolatedAsyncioTestCase):\n    async def test_t(self): self.assertEqual(P(2).x, 2)\n",
    }  # fmt: skip
    with Workspace(files, SMALL) as place:
        assert place.grade().status == "passed", place.grade()


def test_a_test_that_never_ran_has_not_passed():
    source = "import unittest\nasync def test_async(): assert 0\ndef test_generator():\n    yield\nclass T(unittest.TestCase):\n    async def test_t(self): pass\n"
    with Workspace({"a.py": ""}, SMALL) as place:
        assert place.grade({"test_a.py": source}).passed == [False] * 3


def test_fixtures_that_return_and_yield_reach_the_tests():
    source = ("import pytest\nimport a\n@pytest.fixture\ndef one(): return a.x\n@pytest.fixture()\ndef two(one):\n    yield one + 1\n"
              "def test_two(two, tmp_path):\n    (tmp_path / 'f').write_text('z')\n    assert two == 2\ndef test_bad(two): assert two == 3\n")  # fmt: skip
    with Workspace({"a.py": "x = 1\n"}, SMALL) as place:
        assert place.grade({"test_a.py": source}).passed == [True, False]


def test_only_what_ran_and_passed_counts():
    with Workspace({"a.py": "x = 1\n"}, SMALL) as place:
        graded = place.grade({"test_a.py": "import pytest, unittest\nimport a\n@pytest.mark.skip\ndef test_s(): pass\n@pytest.mark.xfail\ndef test_x(): assert 0\ndef test_y(): pytest.skip('later')\n"
                              "class T(unittest.TestCase):\n    @unittest.skip('no')\n    def test_u(self): pass\n    @unittest.expectedFailure\n    def test_e(self): assert 0\n"
                              "class TestPlain:\n    def test_m(self): assert a.x == 1\ndef test_good(): assert a.x == 1\n"})  # fmt: skip
        assert dict(zip((n.split("::")[-1] for n in graded.names), graded.passed)) == {
            "test_s": False, "test_x": False, "test_y": False, "test_u": False, "test_e": False, "test_m": True, "test_good": True}  # fmt: skip
        with pytest.raises(ValueError, match="no test"):
            place.grade({"test_none.py": "x = 1\n"})


def git(folder, *args, **more):
    return subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *args], cwd=folder, check=True, capture_output=True, text=True, **more).stdout


def test_no_history_is_reachable_and_no_link_leads_out(tmp_path):
    repo = tmp_path / "repo"
    (repo / "sub").mkdir(parents=True)
    (repo / "a.py").write_text("old\n")
    git(repo, "init", "-q"), git(repo, "add", "."), git(repo, "commit", "-qm", "old")
    (repo / "a.py").write_text("FUTURE-FIX\n")
    git(repo, "commit", "-qam", "fix"), git(repo, "tag", "v2"), git(repo, "reset", "-q", "--hard", "HEAD~1")
    git(tmp_path, "clone", "-q", "--bare", str(repo), str(repo / "vendor"))
    git(repo, "worktree", "add", "-q", str(repo / "sub" / "tree"))
    (tmp_path / "secret").write_text("SECRET")
    (repo / "out").symlink_to(tmp_path / "secret"), (repo / "up").symlink_to("../secret"), (repo / "in").symlink_to("a.py")
    with Workspace(repo, replace(SMALL, cpu_s=10, wall_s=40)) as place:
        assert b"FUTURE-FIX" not in b"".join(data for _, data in place.tree.values())
        assert {"out", "up", ".git", "sub/tree/.git", "vendor/HEAD"}.isdisjoint(place.tree) and place.read("in") == "old\n"
        done = place.exec("git log --all --oneline 2>&1; ls -a; cat out up; find / -name '*.pack' 2>/dev/null; grep -r FUTURE . ; grep -r SECRET . ; true")
        assert done.status == "ok" and "a.py" in done.stdout and not re.search(r"fix|FUTURE|SECRET$|\.pack|\.git$", done.stdout), done.stdout
    assert (repo / "a.py").read_text() == "old\n" and (tmp_path / "secret").read_text() == "SECRET"


def test_commands_change_the_copy_and_only_the_copy():
    with Workspace({"a.py": "x = 1\n", "d/b.txt": "b\n"}, SMALL) as place:
        done = place.exec("sed -i s/1/2/ a.py && rm d/b.txt && mkdir -p e && cp a.py e/c.py && chmod +x e/c.py && mkfifo pipe && ln -s ../../etc out && ln -s a.py in; cat", "typed")
        assert done.status == "ok" and done.stdout == "typed"
        assert sorted(place.tree) == ["a.py", "d", "e", "e/c.py", "in"] and place.read("in") == "x = 2\n" and "pipe" not in place.tree and "out" not in place.tree
        assert place.exec("(sleep 50; echo late > a.py) & echo x > /box/run/escape; cd /; touch planted; exit 3").exit_code == 3
        assert place.exec("cat a.py; ls /box/run/escape").stdout == "x = 2\n"
        assert place.exec(["python", "-c", "print(6 * 7)"]).stdout == "42\n"

        with pytest.raises(ValueError, match="relative"):
            place.write("../x", "")
        with pytest.raises(ValueError, match="folder of the workspace"):
            place.write("in/x", "")
        with pytest.raises(FileNotFoundError):
            place.read("out")


def test_a_diff_is_a_patch_that_git_applies(tmp_path):
    before = {"a.py": "one\ntwo\nthree\n", "gone.txt": "x", "sub/same.txt": "same\n", "tail.txt": "no end", "page.txt": "a\x0cb\r\nc\n"}
    for path, text in before.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(text.encode())
    git(tmp_path, "init", "-q"), git(tmp_path, "add", "."), git(tmp_path, "commit", "-qm", "x")
    with Workspace(tmp_path, SMALL) as place:
        assert place.diff() == ""
        place.exec("sed -i s/two/2/ a.py; rm gone.txt; printf 'new\\n' > sub/new.txt; printf 'no end\\nmore' > tail.txt; printf 'a\\fb\\r\\nC\\n' > page.txt; chmod +x a.py; : > empty")
        (tmp_path / "p.diff").write_bytes(place.diff().encode())
        git(tmp_path, "apply", "--whitespace=nowarn", "p.diff")
        (tmp_path / "p.diff").unlink()
        after = {path: data for path, (mode, data) in sandbox.read_tree(tmp_path).items()}
        assert after == {path: data for path, (mode, data) in place.tree.items()} and os.access(tmp_path / "a.py", os.X_OK)


def test_many_workspaces_stay_open_without_descriptors_or_processes():
    run("1")
    before = footprint()
    places = [Workspace({"a.py": f"x = {n}\n"}, SMALL) for n in range(512)]
    done = at_once(lambda place: place.exec("echo y >> a.py").status, places[:24])
    after = settled()
    assert set(done) == {"ok"} and places[3].read("a.py") == "x = 3\ny\n" and places[30].read("a.py") == "x = 30\n"
    assert after["descriptors"] <= before["descriptors"] + 8 and after["programs"] == 0 and after["memory"] < before["memory"] + 20


# ---- traces and languages ------------------------------------------------------------------------------------------------------

TRACED = "def add(a, b):\n    c = a + b\n    return c\n\ntotal = 0\nfor i in range(3):\n    total = add(total, i)\nif total > 5:\n    print('never')\nprint(total)\n"


def test_a_trace_counts_lines_as_the_standard_library_does_and_tells_every_change(tmp_path):
    done = run(TRACED, trace=True)
    (tmp_path / "main.py").write_text(TRACED)
    counter = trace.Trace(count=True, trace=False)
    counter.runctx(compile(TRACED, str(tmp_path / "main.py"), "exec"), {"print": lambda *_: None, "__file__": str(tmp_path / "main.py")})
    want = {line: times for (path, line), times in counter.results().counts.items() if path.endswith("main.py")}
    assert done.trace["lines"] == want and 9 not in done.trace["lines"] and done.stdout == "3\n"
    text = done.trace["text"]
    assert all(line in text for line in ("call add(a = 1, b = 2)", "c = 3", "return 3", "total = 3", "   7: total = add(total, i)"))


def test_a_trace_shows_an_object_that_cannot_be_shown_yet():
    done = run("class P:\n    def __new__(cls, x): return object.__new__(cls)\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'P({self.x})'\nprint(P(3))\n", trace=True)
    assert done.stdout == "P(3)\n" and "return <AttributeError>" in done.trace["text"], done


def test_a_trace_is_bounded_and_survives_an_error():
    done = run("for i in range(10 ** 5):\n    x = 'y' * i\n1 / 0", trace=True, limits=Limits(cpu_s=60, wall_s=200))
    assert done.trace["cut"] and len(done.trace["steps"]) == sandbox.Tracer.MOST and len(done.trace["text"]) < 400_000
    assert done.trace["lines"][2] == 10**5 and "ZeroDivisionError" in done.stderr and run("1").trace is None


LANGUAGES = {
    "python": "print(int(input()) * 2)",
    "c": "#include <stdio.h>\nint main(){int n; scanf(\"%d\", &n); printf(\"%d\\n\", n * 2);}",
    "cpp": "#include <iostream>\nint main(){int n; std::cin >> n; std::cout << n * 2 << std::endl;}",
    "javascript": "console.log(Number(require('fs').readFileSync(0, 'utf8')) * 2)",
    "shell": "read n; echo $((n * 2))",
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_program_of_another_language_reads_and_prints(language):
    tools = {command.split()[0] for command in sandbox.LANGUAGES[language][1:] if command} - {"./main"}
    if not all(map(shutil.which, tools)):
        pytest.skip(f"{tools} not on this machine")
    limits = Limits(cpu_s=20, wall_s=60)
    graded = grade(LANGUAGES[language], [Io("21", "42"), Io("5", "10"), Io("1", "3")], limits, language)
    assert graded.passed == [True, True, False] and graded.runs[-1].stdout == "2\n", graded


@needs_full
def test_without_namespaces_the_other_languages_work_too():
    tools = {language: [command.split()[0] for command in sandbox.LANGUAGES[language][1:] if command and command[:2] != "./"] for language in LANGUAGES}
    have = {language: program for language, program in LANGUAGES.items() if all(map(shutil.which, tools[language]))}
    code = f"import sandbox\nfor language, program in {have}.items(): print(sandbox.run(program, '21', None, sandbox.Limits(cpu_s=20, wall_s=60), language).stdout.strip())"
    assert under("namespaces", "-c", code).stdout.split() == ["42"] * len(have)


def test_sql_runs_on_the_database_that_it_is_given():
    done = run("create table t(a, b);\ninsert into t values (1, 'x'), (2, null);\nselect b, a from t order by a desc;\nselect count(*) from t", language="sql")
    assert done.stdout == "|2\nx|1\n2\n" and run("select * from nothing", language="sql").status == "failed"


def test_a_program_that_does_not_compile_fails_and_says_why():
    if shutil.which("gcc"):
        graded = grade("int main({", [Io("", "")], language="c")
        assert graded.passed == [False] and "error" in graded.reasons[0]


# ---- our own failures, and less than every layer -------------------------------------------------------------------------------


def zygote_pid():
    (keeper,) = [pid for pid in sandbox.below(os.getpid()) if b"--zygote" in Path(f"/proc/{pid}/cmdline").read_bytes() and int(Path(f"/proc/{pid}/stat").read_text().split()[3]) == os.getpid()]
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0]), keeper


def test_a_killed_zygote_loses_its_run_and_nothing_else():
    run("1")
    lost, before = [], len(sandbox.below(zygote_pid()[0]))
    thread = threading.Thread(target=lambda: lost.append(run("import time; time.sleep(30)", limits=replace(SMALL, wall_s=40))))
    thread.start()
    while len(sandbox.below(zygote_pid()[0])) <= before:
        time.sleep(0.01)
    os.kill(zygote_pid()[0], signal.SIGKILL)
    thread.join(20)
    assert [done.status for done in lost] == ["sandbox error"]
    assert grade("def f(x): return x", [Call("f", [1], 1)]).status == "passed"


def test_a_killed_place_that_has_nothing_to_do_costs_no_run():
    sandbox.stop()
    run("1")
    (idle,) = sandbox.below(zygote_pid()[0])
    with ThreadPoolExecutor(1) as pool:
        sandbox.Machinery.current.idle, kept = [], sandbox.Machinery.current.idle
        other = pool.submit(run, "import time; time.sleep(1); print('done')", limits=SMALL)
        while len(sandbox.below(zygote_pid()[0])) < 3:
            time.sleep(0.01)
        sandbox.Machinery.current.idle += kept
        os.kill(idle, signal.SIGKILL)
        while os.path.exists(f"/proc/{idle}"):
            time.sleep(0.01)
        assert run("print(1)").stdout == "1\n"
        assert other.result().stdout == "done\n"


def test_everything_goes_with_the_process_that_started_it():
    code = "import sandbox, os, sys\nsandbox.run('1')\nprint(*sandbox.below(os.getpid()), flush=True)\nsandbox.run('import time; time.sleep(60)', limits=sandbox.Limits(wall_s=60))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in child.stdout.readline().split()]
    assert len(pids) >= 2
    child.kill(), child.wait(), child.stdout.close()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_fork_of_a_process_with_a_sandbox_has_one_of_its_own():
    run("1")
    code = "import sandbox, os\nsandbox.run('1')\npid = os.fork()\nr = sandbox.run('print(7)').stdout\nif not pid: sandbox.stop(); os._exit(0 if r == '7\\n' else 1)\nassert os.waitpid(pid, 0)[1] == 0 and sandbox.run('print(8)').stdout == '8\\n'"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, timeout=60)


HARDSHIP = """
import ctypes, errno, os, struct, sys
def install(*steps):
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(header), 0, 0) == 0
load, give, EPERM = (0x20, 0, 0, 0), lambda k: (6, 0, 0, k), 0x50001
arm = os.uname().machine == "aarch64"
for what in sys.argv[1].split("+"):
    if what == "nobody":
        os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
    if what == "namespaces":
        install(load, (0x15, 0, 4, 220 if arm else 56), (0x20, 0, 0, 16), (0x45, 0, 1, 0x7E020000), give(EPERM), give(0x7FFF0000), (0x15, 0, 1, 97 if arm else 272), give(EPERM), give(0x7FFF0000))
    if what == "landlock":
        install(load, (0x15, 0, 1, 444), give(0x50000 | errno.ENOSYS), give(0x7FFF0000))
    if what == "seccomp":
        install(load, (0x15, 0, 3, 167 if arm else 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22), give(0x50016), give(0x7FFF0000))
os.execv(sys.argv[2], sys.argv[2:])
"""
REPORT = """
import json, sandbox, sys
from sandbox import Call, Check, grade, Workspace
sandbox.PORTABLE = "portable" in sys.argv[1]
limits, hurried = sandbox.SMALL, sandbox.replace(sandbox.SMALL, cpu_s=0.25)
cheats = [grade(p, [Call("f", [2], 3), Check("assert f(2) == 3")], limits) for p in sandbox.CHEATS.values()]
honest = grade("def f(x): return x + 1", [Call("f", [2], 3), Check("assert f(2) == 3")], limits)
# not at once: a fork bomb may starve others; hurried where the clock is what ends it, since filling memory takes a slow machine time too
bombs = {name: sandbox.run(bomb, limits=hurried if end in ("timeout", "") else limits).status for name, (bomb, end) in sandbox.BOMBS.items()}
with Workspace({"a.py": "x = 1\\n"}, limits) as place:
    place.exec("echo y = 2 >> a.py; mkdir -m 000 locked; mkdir d; chmod 000 d . 2>/dev/null; true")
    text = place.read("a.py")
print(json.dumps({"facts": sandbox.protection(), "fooled": sum(g.pass_rate for g in cheats), "errors": [g.status for g in cheats].count("sandbox error"),
                  "honest": honest.status, "bombs": bombs, "text": text}))
"""


def under(hardship, *command):
    """Run Python with a hardship; as nobody with an interpreter and a copy of the file that nobody can read, where there is one."""
    interpreter, place = sys.executable, HERE
    if "nobody" in hardship:
        if os.getuid() != 0:
            pytest.skip("only root can become somebody else")
        good = 'exec "$0" -c "import sys, ctypes, unittest; assert sys.version_info >= (3, 11)"'
        can = lambda path: subprocess.run(["sh", "-c", good, path], user=65534, group=65534, extra_groups=[], capture_output=True, cwd="/").returncode == 0
        readable = [path for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3") if can(path)]
        if not readable:
            pytest.skip("no Python 3.11 that nobody can read")
        interpreter = readable[0]
    return subprocess.run([sys.executable, "-c", HARDSHIP, hardship, interpreter, *command], cwd=place, capture_output=True, text=True, timeout=300)


LEVELS = {"nobody": "full", "namespaces": "reduced", "nobody+namespaces": "reduced", "landlock": "reduced", "seccomp": "minimal",
          "nobody+namespaces+landlock+seccomp": "minimal", "nobody+portable": "minimal"}  # fmt: skip


@needs_full
@pytest.mark.parametrize("hardship", LEVELS)
def test_a_missing_layer_changes_the_report_and_never_a_verdict(hardship):
    done = under(hardship, "-c", REPORT, hardship)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["facts"]["level"] == LEVELS[hardship]
    layers = {"namespaces", "landlock", "seccomp"}
    for layer in layers if "portable" in hardship else layers & set(hardship.split("+")):
        assert found["facts"][layer].startswith("missing: "), found["facts"]
    assert found["fooled"] == 0 and found["errors"] == 0 and found["honest"] == "passed" and found["text"] == "x = 1\ny = 2\n"
    for name, (_, want) in sandbox.BOMBS.items():
        status = found["bombs"][name]
        assert status == want or want == "" and status not in ("ok", "sandbox error"), (name, status)


@needs_full
def test_less_than_what_is_required_is_refused_in_one_line():
    done = under("namespaces", "sandbox.py", "--require", "full")
    assert done.returncode == 2 and done.stderr.startswith("sandbox.py: protection 'full' is required") and done.stderr.count("\n") == 1, done.stderr
    assert under("none", "sandbox.py", "--require", "full", "--require", "landlock").returncode == 0


HIDING = """
import json, sandbox
limits, fill = sandbox.replace(sandbox.SMALL, cpu_s=5, wall_s=9), "\\nfor n in range(40): open(str(n), 'wb').write(bytes(1 << 20)); time.sleep(0.01)"
for way in ("os.mkdir('d', 0o300); os.chdir('d')", "[(os.mkdir('d' * 200), os.chdir('d' * 200)) for _ in range(30)]"):
    done = sandbox.run("import os, time\\n" + way + fill, limits=limits)
    print(done.status, done.reason)
"""


@needs_full
def test_without_a_disk_of_its_own_a_program_cannot_hide_what_it_writes():
    done = under("namespaces", "-c", HIDING)
    assert done.stdout == "failed files where they cannot be counted: Permission denied\nfailed files where they cannot be counted: File name too long\n", done


@needs_full
def test_a_killed_keeper_s_cgroup_goes_when_the_next_one_comes():
    run("1")
    killed, code = zygote_pid()[1], "import sandbox\nsandbox.run('1')"
    groups = lambda: list(Path("/sys/fs/cgroup").rglob(f"sandbox-{zygote}"))
    zygote = zygote_pid()[0]
    if not groups():
        pytest.skip("no cgroup is ours to make here")
    os.kill(killed, signal.SIGKILL)
    sandbox.stop()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{zygote}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert groups() and subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0 and groups() == []


WITHOUT_A_NETWORK_OF_ITS_OWN = """
import os, sandbox, socket, sys, tempfile
with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
    there.bind(folder + "/there"), os.chmod(folder, 0o777), os.chmod(folder + "/there", 0o777), there.setblocking(False)
    program = "import socket, sys\\nfor kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):\\n    try: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b'x', sys.stdin.read())\\n    except OSError: print('held')"
    print(sandbox.run(program, there.getsockname()).stdout, sandbox.run("import socket\\nsocket.socketpair()").stderr)
    print("got", there.recv(9))
"""


@needs_full
def test_without_a_network_of_its_own_a_program_sends_nothing_to_sockets_of_the_host():
    done = under("namespaces", "-c", WITHOUT_A_NETWORK_OF_ITS_OWN)
    assert done.stdout == "held\nheld\n \n" and "BlockingIOError" in done.stderr, done


PORTABLE = "import sandbox\nsandbox.PORTABLE = True\nprint(sandbox.protection()['end'])\nsandbox.require('user', 'limits')\nsandbox.require(LAYER)"


def test_other_systems_get_what_every_unix_has_and_can_be_told_that_it_is_not_enough():
    for layer in ("'reduced'", "'end'", "'seccomp'"):
        done = under("nobody", "-c", PORTABLE.replace("LAYER", layer))
        assert done.stdout == "missing: the process group is killed; a process that has left it stays\n" and "is required" in done.stderr, done


def test_without_a_wall_against_signals_root_is_refused():
    done = under("none", "-c", "import sandbox\nsandbox.PORTABLE = True\nprint(sandbox.protection()['user'])")
    assert done.stdout.startswith("in force: user ") or "another user than root" in done.stderr, done


def test_the_numbers_of_the_system_calls_are_the_kernel_s_own():
    headers = [Path(path) for path in ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")]
    if not all(path.exists() for path in headers):
        pytest.skip("no kernel headers here")
    x86, generic = (dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())) for path in headers)
    for name, (ours_x86, ours_arm) in {**sandbox.REFUSED, **sandbox.REFUSED_BARE}.items():
        for ours, table in ((ours_x86, x86), (ours_arm, generic)):
            assert name not in table or int(table[name]) == ours, name
    assert sum(name in x86 for name in sandbox.REFUSED) > 70


# ---- steady ones ---------------------------------------------------------------------------------------------------------------


def test_verdicts_are_the_same_beside_busy_loops():
    programs = [(f"def f(x):\n    s = 0\n    for i in range({1000 * n}): s += i\n    return s + {n % 3 == 0}", [Call("f", [0], sum(range(1000 * n)))]) for n in range(200)]
    idle = [graded.passed for graded in grade_many(programs)]
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    busy = [graded.passed for graded in grade_many(programs)]
    for loop in loops:
        loop.kill(), loop.wait()
    assert idle == busy == [[n % 3 != 0] for n in range(200)]


RUNS = int(os.environ.get("SANDBOX_RUNS", 300))  # 100,000 is the long version


def test_hundreds_of_runs_leave_nothing_behind():
    grade_many([sandbox.TEN_CALLS] * 20)
    before = footprint()
    attacks = list(sandbox.CHEATS.values())
    programs = [(attacks[i % len(attacks)], [Call("f", [2], 3)]) if i % 10 == 0 else sandbox.TEN_CALLS for i in range(RUNS)]
    passed = 0
    for i in range(0, RUNS, 500):  # the grades are not kept: they would be the memory that is looked for
        passed += sum(graded.status == "passed" for graded in grade_many(programs[i : i + 500], SMALL))
    after = settled()
    assert passed == RUNS - len(range(0, RUNS, 10))
    assert after["programs"] == 0
    for what in ("mounts", "descriptors", "zygote descriptors"):
        assert after[what] <= before[what] + 8, (before, after)  # a socket for each warden that waits
    assert after["memory"] <= before["memory"] + 10


# ---- the door ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("work", "words"), [
    (lambda: grade("", []), "at least one"),
    (lambda: grade("", [3]), "Call, Io or Check"),
    (lambda: grade("", [Check("assert (")]), "not Python"),
    (lambda: Check("# nothing\n"), "asserts nothing"),
    (lambda: Check("'''A text.'''\nimport math\ndef test_f():\n    assert f(1) == 2\nif __name__ == '__main__':\n    test_f()\n"), "asserts nothing"),
    (lambda: grade("", [Call("f", [], 1)], language="c"), "of Io"),
    (lambda: grade("", [Call("f", [object()], 1)]), "not plain data"),
    (lambda: Call("f", 1, 2), "list of arguments"),
    (lambda: Io(1, "2"), "must be text"),
    (lambda: run("", files={"../x": ""}), "plain relative path"),
    (lambda: run("", files={"/etc/x": ""}), "plain relative path"),
    (lambda: run("", files={"x" * 256: ""}), "plain relative path"),
    (lambda: run("", files={"d/" * 2000 + "x": ""}), "plain relative path"),
    (lambda: run("", files={"\ud800": ""}), "plain relative path"),
    (lambda: run("", files={"a": "", "a/b": ""}), "both a file and a folder"),
    (lambda: run("", files={"a": 5}), "text or bytes, not int"),
    (lambda: run(None), "text or bytes, not NoneType"),
    (lambda: run("", files={"a": bytes(9 << 20)}, limits=Limits(disk_mb=8)), "disk_mb"),
    (lambda: run("", stdin="x" * (9 << 20), limits=Limits(disk_mb=8)), "disk_mb"),
    (lambda: run("", files={f"{n}/a": "" for n in range(200)}, limits=Limits(disk_mb=1)), "disk_mb"),
    (lambda: Workspace({"a/b": ""}).write("a", ""), "file in a folder"),
    (lambda: Workspace({"a": ""}).write("a/b", ""), "file in a folder"),
    (lambda: Limits(memory_mb=0.5), "memory_mb = 0.5"),
    (lambda: Limits(wall_s="3"), "positive float"),
    (lambda: run("", limits=Limits(cpu_s=0)), "cpu_s"),
    (lambda: run("", language="cobol"), "one of python"),
    (lambda: Workspace("/nowhere/at/all"), "not a folder"),
    (lambda: Workspace({"a": bytes(9 << 20)}, Limits(disk_mb=8)), "disk_mb"),
    (lambda: sandbox.require("moat"), "one of reduced"),
])  # fmt: skip
def test_what_is_wrong_at_the_door_is_said_there(work, words):
    with pytest.raises(ValueError, match=words):
        work()


def command_line(*args):
    return subprocess.run([sys.executable, HERE / "sandbox.py", *map(str, args)], capture_output=True, text=True, timeout=120)


def test_the_command_line_runs_grades_traces_and_refuses(tmp_path):
    (tmp_path / "p.py").write_text("def f(x):\n    return x + 1\nprint(f(1), '\\x1b[31m')\n")
    (tmp_path / "t.json").write_text(json.dumps([{"function": "f", "args": [1], "expected": 2}, {"stdin": "", "stdout": "2 \x1b[31m"}, {"source": "assert f(2) == 3"}]))
    (tmp_path / "t.py").write_text("assert f(1) == 3\n")
    (tmp_path / "bad.json").write_text("[1]"), (tmp_path / "bin.py").write_bytes(b"\xff"), (tmp_path / "args.json").write_text('[{"function": "f", "args": 1, "expected": 2}]')
    done = command_line(tmp_path / "p.py", "--trace")
    assert done.returncode == 0 and done.stdout.startswith("2 \\x1b[31m\n") and "call f(x = 1)" in done.stdout and "ok; " in done.stderr
    assert command_line(tmp_path / "p.py", "--tests", tmp_path / "t.json").stdout.endswith("passed: 3 of 3\n")
    wrong = command_line(tmp_path / "p.py", "--tests", tmp_path / "t.py")
    assert wrong.returncode == 1 and "failed: 0 of 1" in wrong.stdout
    for bad in ([tmp_path / "none.py"], [tmp_path / "bin.py"], [tmp_path / "p.py", "--tests", tmp_path / "args.json"], [tmp_path / "p.py", "--tests", tmp_path / "bad.json"], ["--tests", tmp_path / "t.py"], [tmp_path / "p.py", "--trace", "--tests", tmp_path / "t.py"], ["--require", "moat"], [tmp_path / "p.py", "--cpu-s", "0"], [tmp_path / "p.py", "--trace", "--language", "c"]):
        done = command_line(*bad)
        assert done.returncode == 2 and done.stderr.startswith("sandbox.py: ") and done.stderr.count("\n") == 1 and not done.stdout, done
    assert "level" in command_line().stdout


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word_and_the_help_shows_no_empty_default():
    with subprocess.Popen([sys.executable, sandbox.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait() == 141
    told = subprocess.run([sys.executable, sandbox.__file__, "--help"], capture_output=True, text=True, check=True).stdout
    told = " ".join(told.split())
    assert "--wall-s" in told and "--wall_s" not in told and "(default: 5.0)" in told and "None" not in told and "[]" not in told
