"""
Code flow: a repository's history as triplets (R_old, patch, R_new), so that a model sees projects move, not only stand.

A project's first-parent chain is the line along which it grew: c_0, c_1, ... c_{n-1}, each step one commit or one landed branch.
A triplet is a stretch s -> e of that line. It starts between 40 % and 80 % of the project's life, when there is a structure
to work in and still a future to learn from; the end is searched forward, up to 32 steps, and scored: a patch of a size one can
follow, mostly code, with its tests, under a message that says what was done. Stretches never overlap.

    R_old   the files of c_s that the patch touches, and what a reader of c_s would look at: README, tree, five fitting files
    patch   a git patch; `git apply` turned R_old into R_new byte for byte before the triplet was handed out, or it was not
    R_new   the same files in c_e

Two ideas carry the file. (1) What changed from s to e is what changed step by step, composed (compose()): one raw log of the
window replaces thousands of tree comparisons, and file contents are read, by one `git cat-file`, only where a stretch is still
in the running. (2) git runs behind a git directory of our own that merely borrows the repository's objects (Repository): no config,
hook, filter, attribute, textconv, monitor or remote of a repository that nobody trusts is ever in reach, and nothing is checked out.

Start with compose(), candidates() and score(); then triplet_parts(), the sample a model reads.
Source: IQuest-Coder-V1 report 3.2 (triplets, 40-80 %), LoopCoder paper 2.4; it gives no scoring, so filters and weights are ours,
with CommitPackFT's message rules and Seed-Coder's context (README, tree, BM25). Where we differ, or chose:
  - a merge on the chain counts as the step that lands a branch; its messages are those of the branch's own commits
  - vendored, locked, generated, minified and binary files, links and submodules stay out of the patch; R_new is R_old patched
  - R_old's touched files are shown among the five that BM25 finds: a patch of files that nobody has seen teaches guessing
  - the at most 32 triplets of a repository are spread over the band (one more each 1/32 of it), not the first 32
  - novelty compares sets of changed lines exactly: there are at most 32 patches to compare with, no MinHash is needed
  - "index 1a2b..3c4d" lines are cut from the patch: git apply does not need them, and a model cannot know them

    python commits.py                  # a scripted project's history and its triplets, a few seconds
    python commits.py REPO [REPO ...]  # the same for local repositories or URLs that git can clone
    python commits.py --bench REPO     # commits/s with sources and diffs beside PyDriller's; seconds and memory for triplets
"""
import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------- the rules

BAND = (0.40, 0.80)  # of the project's life; a start lies inside, an end may lie beyond
MIN_STEPS = 20       # a chain shorter than this has no life to speak of
HORIZON = 32         # an end is at most so many steps after its start
LIMIT = 32           # triplets of one repository
MIN_LINES, MAX_LINES, MAX_FILES = 5, 400, 10
MAX_BYTES = 50_000   # of one changed file
MIN_SCORE = 0.45
SHELF = 2000         # files of a tree that BM25 opens
ABSENT = "000000"    # the mode git gives a path that is not there

GRAMMARS = {  # a tree-sitter package and its language function -> the extensions that it reads
    "python.language": "py pyi", "java.language": "java", "javascript.language": "js jsx mjs cjs", "typescript.language_typescript": "ts",
    "typescript.language_tsx": "tsx", "c_sharp.language": "cs", "go.language": "go", "rust.language": "rs", "c.language": "c h",
    "cpp.language": "cc cpp cxx hpp hh h",
}
CODE = frozenset(" ".join(GRAMMARS.values()).split())
NOT_SOURCE = re.compile(  # by name: vendored, lock files, minified, generated, binary
    rb"(^|/)(vendor|vendored|third[-_]party|external|node_modules|bower_components|site-packages|dist|build|deps)/"
    rb"|(^|/)([^/]*[-.]lock(\.json|file)?|package-lock\.json|npm-shrinkwrap\.json|pnpm-lock\.yaml|go\.sum|gradlew(\.bat)?)$"
    rb"|[-.]min\.(js|css|mjs)$|\.(map|snap|pb\.go|pb\.cc|pb\.h|g\.dart|designer\.cs)$|_pb2(_grpc)?\.pyi?$"
    rb"|\.(png|jpe?g|gif|ico|icns|bmp|webp|svg|pdf|zip|gz|bz2|xz|tar|jar|war|class|so|a|o|dll|exe|dylib|pyc|whl|egg|bin|dat|db"
    rb"|sqlite|woff2?|ttf|otf|eot|mp[34]|mov|avi|wav|ogg|ipynb|csv|tsv|parquet|npy|npz|pkl|pt|onnx|safetensors|rdb|aof|po|mo)$", re.I)
GENERATED = re.compile(rb"@generated|do not edit|code generated by|autogenerated|automatically generated|generated by the protocol", re.I)
IS_PROSE = re.compile(rb"(^|/)[^/.]*$|\.(md|rst|txt|adoc)$", re.I)  # a long change log is left out, long code throws its stretch out
IS_TEST = re.compile(rb"(^|/)(tests?|testsuite|testing|specs?|__tests__)/|(^|/)(test_[^/]*|conftest\.py)$"
                     rb"|[-_.](tests?|spec)\.\w+$|Tests?\.(java|cs)$")

TRAILER = re.compile(r"^\s*([A-Za-z]+(-[A-Za-z]+)*-by|change-id|cc|git-svn-id|cherry picked from.*)\s*:.*$", re.I | re.M)
LANDED = re.compile(r"\s*\((#|GH-)\d+\)(?=\s*(\n|$))")  # what a forge appends to the first line of a squashed pull request
BAD_MESSAGES = [  # the first that matches names the reason
    ("merge", re.compile(r"^\s*merge\b", re.I)),
    ("revert", re.compile(r"^\s*revert\b|this reverts commit", re.I)),
    ("version bump", re.compile(r"^\W*((prepare|tag|start|begin)\b.*(version|release|v?\d+\.\d|dev)|v?\d+\.\d[\w.]*\s*$)"
                                r"|^\W*(bump|release)\b|version (bump|number)|back to dev", re.I)),
    ("link", re.compile(r"https?://|www\.", re.I)),
    ("issue number", re.compile(r"(^|\W)#\d+|\bgh-\d+|\b(?!(UTF|SHA|PEP|ISO|RFC|HTTP)-)[A-Z][A-Z0-9]+-\d+\b"
                                r"|\b(issue|ticket|bug|pull request|pr) \d+")),
    ("work in progress", re.compile(r"\bwip\b|work in progress|\bfixup!|\bsquash!", re.I)),
    ("object id", re.compile(r"\b[0-9a-f]{40}\b")),
]
IMPERATIVE = frozenset("""
    add adjust allow apply avoid bump cache call change check clarify clean clear close collect convert copy correct create deprecate detect
    disable document drop enable ensure escape exclude expand expose extend extract factor fix format generate handle hide ignore implement
    import improve include increase inline introduce keep limit load log make mark merge move name normalize open optimize parse pass pin
    prefer prevent print propagate protect provide raise read reduce refactor reject remove rename reorder replace report require reset
    resolve respect restore return reuse rewrite run save send set show simplify skip sort split stop store strip support swap switch test
    tidy treat trim tune turn tweak unify update upgrade use validate verify warn wrap write""".split())
COMMON = IMPERATIVE | frozenset("""
    about after all also and any are been before but can class code def does else file files for from function has have import into its
    just like method more not now one only other out self should some tests than that the them then there these this true false none null
    used uses using value was when where which while will with work works would you""".split())

# ---------------------------------------------------------------------------- git, behind a directory of our own


class Refused(ValueError):
    """git cannot read an object that the history names, or will not take a path or a patch: the stretch is skipped and counted."""


class Change(NamedTuple):
    """One path of two trees; an absent side has the mode ABSENT."""
    path: bytes
    old_mode: str
    old: str  # object ids
    new_mode: str
    new: str


def find_git_dir(path: str) -> Path:
    """The git directory of a work tree, a bare repository, or a linked work tree or submodule (whose `.git` is a file)."""
    folder = Path(path)
    for place in (folder / ".git", folder):
        if place.is_file() and place.name == ".git":
            text = place.read_text(errors="replace")
            if text.startswith("gitdir:"):
                place = folder / text[len("gitdir:"):].strip()
        if (place / "HEAD").is_file() and ((place / "objects").is_dir() or (place / "commondir").is_file()):
            return place.resolve()
    raise ValueError(f"{path}: not a git repository (no .git directory here); give the folder of a clone, a bare repository or a URL")


def clean_environment(room: str) -> dict:
    """What git gets to see: no configuration of the user or the system, no transport, nobody to ask."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": room, "XDG_CONFIG_HOME": room, "LC_ALL": "C", "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull, "GIT_ATTR_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true",
            "GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0"}


class Repository:
    """
    The objects of a repository, read-only, and nothing else of it.

    A temporary git directory with a config of our own, which borrows the object store for reading. Every git command but one runs there;
    the one reads where HEAD points. The proof runs with LONELY set: it sees only the bytes that we put into the temporary store.
    """

    LONELY = {"GIT_ALTERNATE_OBJECT_DIRECTORIES": ""}

    def __init__(self, path: str):
        git_dir = find_git_dir(path)
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small files that live for seconds: better no disk
        self.path, self._room, self._readers = path, tempfile.TemporaryDirectory(prefix="commits-", dir=memory), {}
        self.room = Path(self._room.name)
        self.environment = clean_environment(str(self.room))
        try:
            there = ("--git-dir", str(git_dir), "rev-parse")
            where = self.git(*there, "--show-object-format", "--git-path", "objects", "--git-path", "shallow")
            kind, objects, shallow = where.decode(errors="surrogateescape").split("\n")[:3]
            if (git_dir / shallow).exists():
                raise ValueError(f"{path}: a shallow clone, so its life cannot be measured; run `git fetch --unshallow` there first")
            self.tip = self.git(*there, "--quiet", "--verify", "HEAD", ok=(0, 1)).decode().strip()
            if not self.tip:
                raise ValueError(f"{path}: no commits yet (HEAD points to nothing)")
            self._borrow(kind, os.path.join(git_dir, objects))
        except (ValueError, OSError):
            self.close()
            raise

    def _borrow(self, kind: str, objects: str):
        """Our git directory: written by hand, so that no template of the machine finds its way in."""
        own = self.room / "git"
        (own / "objects").mkdir(parents=True)
        (own / "refs").mkdir()
        (own / "HEAD").write_text("ref: refs/heads/none\n")
        (own / "config").write_text("[core]\n\trepositoryformatversion = 1\n\tbare = true\n[extensions]\n"
                                    f"\tobjectformat = {kind}\n[diff]\n\trenameLimit = 400\n")
        self.hash, borrowed = functools.partial(hashlib.new, kind), quote(os.fsencode(objects))
        self.environment |= {"GIT_DIR": str(own), "GIT_LITERAL_PATHSPECS": "1",
                             "GIT_ALTERNATE_OBJECT_DIRECTORIES": borrowed if borrowed[0] == '"' else f'"{borrowed}"'}

    def git(self, *args: str, stdin: bytes = b"", ok=(0,), **environment) -> bytes:
        """One git command in the clean environment -> its output; Refused, with git's first line, where it fails."""
        try:
            done = subprocess.run(["git", "--no-pager", *args], input=stdin, capture_output=True, cwd=self.room,
                                  env=self.environment | environment)
        except FileNotFoundError:
            raise ValueError("git: not found on the PATH; install git 2.29 or later") from None
        if done.returncode not in ok:
            raise Refused(f"{self.path}: git: {done.stderr.decode(errors='replace').strip().split(chr(10))[0]}")
        return done.stdout

    def ask(self, kind: str, oids: list[str]) -> list:
        """Contents ("--batch") or sizes ("--batch-check") from a git cat-file that stays; what fits into a pipe is asked in one go."""
        if kind not in self._readers:
            self._readers[kind] = subprocess.Popen(["git", "cat-file", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                   stderr=subprocess.DEVNULL, cwd=self.room, env=self.environment)
        reader, answers = self._readers[kind], []
        for i in range(0, len(oids), 500):
            try:
                reader.stdin.write("".join(oid + "\n" for oid in oids[i:i + 500]).encode())
                reader.stdin.flush()
            except BrokenPipeError:  # it ended at a corrupt object; the next line finds no header
                pass
            for oid in oids[i:i + 500]:
                header = reader.stdout.readline().split()  # id, type, size; or "<id> missing"
                data = reader.stdout.read(int(header[2]) + 1) if len(header) == 3 and kind == "--batch" else b"\n"
                if len(header) != 3 or (kind == "--batch" and len(data) != int(header[2]) + 1):
                    self._stop(kind)
                    raise Refused(f"{self.path}: object {oid} is missing or corrupt")
                answers.append(data[:-1] if kind == "--batch" else int(header[2]))
        return answers

    def read(self, oid: str) -> bytes:
        """The content of a blob."""
        return self.ask("--batch", [oid])[0]

    def keep(self, data: bytes, kind: bytes = b"blob") -> str:
        """Write an object to our own store -> its id."""
        whole = b"%s %d\0" % (kind, len(data)) + data
        oid = self.hash(whole).hexdigest()
        place = self.room / "git" / "objects" / oid[:2] / oid[2:]
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(zlib.compress(whole, 1))
        return oid

    def _stop(self, kind: str):
        reader = self._readers.pop(kind)
        reader.kill()
        reader.communicate()  # closes the pipes, whatever is left in them

    def close(self):
        for kind in list(self._readers):
            self._stop(kind)
        self._room.cleanup()


def quote(path: bytes) -> str:
    """A path as git writes it in a patch: as it is, or "in quotes" with C escapes where a byte is not plain ASCII. Never has a newline."""
    if all(32 <= byte < 127 and byte not in b'"\\' for byte in path):
        return path.decode("ascii")
    named = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
    return '"' + "".join(named.get(b) or (chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in path) + '"'


def text_path(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 survive as lone surrogates, as in os.fsdecode


# ------------------------------------------------------------------------------------- the chain and its steps


class Step(NamedTuple):
    """What one step of the chain brought: the messages of its commits, oldest first, and what it changed."""
    messages: list[str]
    changes: list[Change]


def band(times: list[int], by_time: bool = False) -> list[int]:
    """The positions where a stretch may start: 0.40 <= s / (n - 1) <= 0.80, or the same shares of the time between first and last."""
    clock = times if by_time else range(len(times))
    first, span = min(clock), max(max(clock) - min(clock), 1)
    return [s for s in range(len(times) - 1) if BAND[0] <= (clock[s] - first) / span <= BAND[1]]


def raw_changes(output: bytes) -> Iterator[tuple[str, list[Change]]]:
    """Read `git diff-tree --stdin -r -z` -> (commit, its changes)."""
    commit, changes, fields = None, [], iter(output.split(b"\0"))
    for field in fields:
        if field.startswith(b":"):
            old_mode, new_mode, old, new, _ = field[1:].decode().split(" ")
            changes.append(Change(next(fields), old_mode, old, new_mode, new))
        else:  # a commit's id, or the empty end
            if commit:
                yield commit, changes
            commit, changes = field.decode(), []


class History:
    """The chain, with its steps read in blocks as the search comes by (128 of them cost two git processes)."""
    BLOCK = 128

    def __init__(self, repo: Repository):
        self.repo = repo
        rows = [row.split() for row in repo.git("log", "--first-parent", "--format=%H %ct", repo.tip).decode().splitlines()][::-1]
        self.chain, self.times = [row[0] for row in rows], [int(row[1]) for row in rows]  # oldest first
        if len(self.chain) < MIN_STEPS:
            raise ValueError(f"{repo.path}: only {len(self.chain)} commits on the first-parent chain; a life needs at least {MIN_STEPS}")
        self._blocks = functools.lru_cache(maxsize=2)(self._read_block)

    def step(self, i: int) -> Step:
        """The step from c_{i-1} to c_i, i >= 1."""
        return self._blocks(i // self.BLOCK)[i % self.BLOCK]

    def _read_block(self, block: int) -> list[Step]:
        lo, hi = max(block * self.BLOCK, 1), min((block + 1) * self.BLOCK, len(self.chain))
        pairs = "".join(f"{self.chain[i]} {self.chain[i - 1]}\n" for i in range(lo, hi))
        raw = dict(raw_changes(self.repo.git("diff-tree", "--stdin", "-r", "-z", "--raw", "--no-renames", stdin=pairs.encode())))
        messages = self._messages(lo, hi)
        steps = [Step(messages[i], raw.get(self.chain[i], [])) for i in range(lo, hi)]
        return [Step([], [])] * (lo - block * self.BLOCK) + steps  # c_0 comes from nowhere

    def _messages(self, lo: int, hi: int) -> dict[int, list[str]]:
        """For each step, the messages of the commits that it is the first to reach; a merge itself says nothing."""
        span = f"{self.chain[lo - 1]}..{self.chain[hi - 1]}"
        log = self.repo.git("log", "-z", "--topo-order", "--encoding=UTF-8", "--format=%H %P%n%B", span)
        parents, said, order = {}, {}, {}
        for entry in filter(None, log.decode("utf-8", "replace").split("\0")):
            ids, _, body = entry.partition("\n")
            commit, *parents_of = ids.split()
            parents[commit], said[commit], order[commit] = parents_of, clean_message(body), len(order)
        messages, seen = {}, set()
        for i in range(lo, hi):
            fresh, ahead = [], [self.chain[i]]
            while ahead:
                commit = ahead.pop()
                if commit in parents and commit not in seen:
                    seen.add(commit)
                    fresh.append(commit)
                    ahead += parents[commit]
            messages[i] = [said[c] for c in sorted(fresh, key=order.get, reverse=True) if len(parents[c]) < 2]
        return messages


def compose(net: dict[bytes, Change], changes: list[Change]) -> None:
    """
    Add one step to what changed since the start, in place: first old side, last new side, nothing where they are equal.

        diff(s, e) = diff(s, s+1) ; diff(s+1, s+2) ; ... ; diff(e-1, e)
    """
    for change in changes:
        first = net.pop(change.path, change)
        if (first.old_mode, first.old) != (change.new_mode, change.new):
            net[change.path] = Change(change.path, first.old_mode, first.old, change.new_mode, change.new)


# ------------------------------------------------------------------------------------------- what a change is worth


def edit_distance(a: list, b: list, limit: int) -> int | None:
    """
    The fewest lines to take out of a and put into it to get b: the - and + lines of `git diff --minimal`. None beyond the limit.

    Myers' greedy walk: reach[k] is the furthest x on diagonal k = x - y that d edits can come to. O((len + d) d).
    """
    start = 0
    while start < len(a) and start < len(b) and a[start] == b[start]:
        start += 1
    stop = 0
    while stop < min(len(a), len(b)) - start and a[-1 - stop] == b[-1 - stop]:
        stop += 1
    a, b = a[start:len(a) - stop], b[start:len(b) - stop]
    if not a or not b:
        return len(a) + len(b) if len(a) + len(b) <= limit else None
    reach = {1: 0}
    for d in range(limit + 1):
        for k in range(-d, d + 1, 2):
            x = reach[k + 1] if k == -d or (k != d and reach[k - 1] < reach[k + 1]) else reach[k - 1] + 1
            y = x - k
            while x < len(a) and y < len(b) and a[x] == b[y]:
                x, y = x + 1, y + 1
            reach[k] = x
            if x >= len(a) and y >= len(b):
                return d
    return None


class Delta(NamedTuple):
    """Two versions of a file compared: how many lines change (None: more than MAX_LINES), and which lines are only on one side."""
    lines: int | None
    removed: list[bytes]
    added: list[bytes]


def delta(old: bytes, new: bytes) -> Delta:
    a, b = io.BytesIO(old).readlines(), io.BytesIO(new).readlines()  # only "\n" ends a line: "\r" and a missing final newline belong to it
    removed, added = collections.Counter(a), collections.Counter(b)
    removed, added = list((removed - added).elements()), list((added - removed).elements())
    if len(removed) + len(added) > MAX_LINES:  # a lower bound of the distance
        return Delta(None, [], [])
    return Delta(edit_distance(a, b, MAX_LINES), removed, added)


@functools.cache
def parsers(extension: str) -> list:
    """The tree-sitter parsers that may read a file of this extension."""
    import tree_sitter
    names = [name.split(".") for name, extensions in GRAMMARS.items() if extension in extensions.split()]
    languages = [getattr(import_module(f"tree_sitter_{package}"), function)() for package, function in names]
    return [tree_sitter.Parser(tree_sitter.Language(language)) for language in languages]


def extension(path: bytes) -> str:
    name = text_path(path).rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_code(path: bytes) -> bool:
    return extension(path) in CODE


def unfit_content(data: bytes) -> str:
    """Why a file's content keeps it out of a patch ("" if it does not)."""
    if b"\0" in data[:8000]:
        return "binary"
    if GENERATED.search(data[:1000]):
        return "generated"
    if max(map(len, data.split(b"\n"))) > 1000:
        return "minified"
    if len(data) > MAX_BYTES:
        return "file too large"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def clean_message(message: str) -> str:
    """The message without what a tool appended: sign-offs, review trailers, the "(#123)" of a squashed pull request."""
    return LANDED.sub("", TRAILER.sub("", message.replace("\r\n", "\n"))).strip()


def unfit_message(message: str) -> str:
    """Why a message keeps its step out ("" if it does not)."""
    for reason, pattern in BAD_MESSAGES:
        if pattern.search(message):
            return reason
    return "" if len(message.split()) >= 4 else "message under 4 words"


class Facts:
    """What the search wants to know about blobs and pairs of blobs; each is read and computed once, while it is of use."""

    def __init__(self, repo: Repository):
        self.repo, self.reasons, self.texts = repo, {}, {}  # blob -> why it is unfit, or ""; the last blobs that were read
        self.terms = functools.lru_cache(SHELF)(lambda mode, oid: terms(self.text(mode, oid)))
        self.delta = functools.lru_cache(2048)(lambda *sides: delta(self.text(*sides[:2]), self.text(*sides[2:])))
        self.parses = functools.cache(self._parses)
        self.renames = functools.lru_cache(64)(self._renames)

    def load(self, sides) -> None:
        """Read the blobs among these (mode, id) that are new, with two questions to git instead of two for each."""
        fresh = list({oid: None for mode, oid in sides if mode.startswith("100") and oid not in self.reasons})
        sizes = dict(zip(fresh, self.repo.ask("--batch-check", fresh)))
        small = [oid for oid in fresh if sizes[oid] <= MAX_BYTES]
        self.texts |= zip(small, self.repo.ask("--batch", small))
        for oid in fresh:  # twenty times too large is as good as binary
            self.reasons[oid] = unfit_content(self.text("", oid)) if sizes[oid] < 20 * MAX_BYTES else "binary"
        while len(self.texts) > SHELF // 4:
            del self.texts[next(iter(self.texts))]  # the oldest

    def text(self, mode: str, oid: str) -> bytes:
        return b"" if mode == ABSENT else self.texts[oid] if oid in self.texts else self.repo.read(oid)

    def unfit(self, mode: str, oid: str) -> str:
        """Why one side of a change keeps it out of a patch ("" if it does not). Load it first."""
        return self.reasons[oid] if mode.startswith("100") else "" if mode == ABSENT else "link or submodule"

    def _parses(self, extension: str, mode: str, oid: str) -> bool:
        return mode == ABSENT or any(not p.parse(self.text(mode, oid)).root_node.has_error for p in parsers(extension))

    def _renames(self, changes: tuple[Change, ...]) -> dict[bytes, bytes]:
        """{new path: old path} among whole files that went and came, as git sees it in the patch."""
        old, new = write_trees(self.repo, changes)
        fields = self.repo.git("diff-tree", "-r", "-z", "-M", "--diff-filter=R", "--name-status", old, new).split(b"\0")
        return dict(zip(fields[2::3], fields[1::3]))


@dataclass
class Candidate:
    """A stretch s -> e that passed the cheap filters; what score() looks at."""
    end: int
    messages: list[str]
    changes: list[Change]
    files_of_steps: list[frozenset]        # the source files of each step, for cohesion
    lines: dict[bytes, int]                # changed lines by (new) path
    touched: frozenset                     # the changed lines themselves, stripped

    @property
    def total(self) -> int:
        return sum(self.lines.values())


def measure(changes: list[Change], facts: Facts) -> tuple[str, Candidate | None]:
    """A stretch's changes -> (why it is out, None) or ("", a candidate without its messages yet)."""
    changes = [c for c in changes if not NOT_SOURCE.search(c.path)]
    if len(changes) > 4 * MAX_FILES:
        return "more than 10 files", None
    facts.load(side for c in changes for side in (c[1:3], c[3:5]))
    kept = []
    for change in changes:
        reasons = {facts.unfit(change.old_mode, change.old), facts.unfit(change.new_mode, change.new)}
        for reason in ("file too large", "not UTF-8"):
            if reason in reasons and not IS_PROSE.search(change.path):
                return reason, None
        if reasons == {""}:
            kept.append(change)
    whole = tuple(c for c in kept if ABSENT in (c.old_mode, c.new_mode))
    renames = facts.renames(whole) if len({c.old_mode == ABSENT for c in whole}) == 2 else {}
    if len(kept) - len(renames) > MAX_FILES:
        return "more than 10 files", None
    before = {c.path: (c.old_mode, c.old) for c in kept}
    lines, removed, added = {}, [], []
    for change in kept:
        if change.path in renames.values():
            continue
        part = facts.delta(*before[renames.get(change.path, change.path)], change.new_mode, change.new)
        if part.lines is None or sum(lines.values()) + part.lines > MAX_LINES:
            return "more than 400 lines", None
        lines[change.path] = part.lines
        removed, added = removed + part.removed, added + part.added
    total = sum(lines.values())
    if total < MIN_LINES:
        return "under 5 lines", None
    if sum(n for path, n in lines.items() if is_code(path)) < total / 2:
        return "under half code", None
    squeeze = lambda side: collections.Counter(filter(None, (re.sub(rb"\s+", b"", line) for line in side)))
    if squeeze(removed) == squeeze(added):
        return "only whitespace or moves", None
    touched = frozenset(filter(None, (line.strip() for line in removed + added)))
    return "", Candidate(0, [], kept, [], lines, touched)


def candidates(history: History, facts: Facts, s: int, counts: collections.Counter) -> Iterator[Candidate]:
    """
    Walk forward from c_s and give every end that passes the filters, except parsing, which is left for the winners.

    A message that will not do ends the walk, since every longer stretch contains it.
    """
    net, messages, files_of_steps = {}, [], []
    for e in range(s + 1, min(s + HORIZON, len(history.chain) - 1) + 1):
        step = history.step(e)
        reason = next(filter(None, map(unfit_message, step.messages)), "") or ("more than 32 commits" if len(messages) > HORIZON else "")
        if reason:
            counts[reason] += 1
            return
        compose(net, step.changes)
        messages += step.messages
        files_of_steps.append(frozenset(c.path for c in step.changes if not NOT_SOURCE.search(c.path)))
        try:
            reason, found = measure(sorted(net.values()), facts) if messages else ("no message", None)
        except Refused:
            reason, found = "refused by git", None
        if found is None:
            counts[reason] += 1
        else:
            found.end, found.messages, found.files_of_steps = e, list(messages), [f for f in files_of_steps if f]
            yield found


# ------------------------------------------------------------------------------------------------------ the score


def size_score(lines: int) -> float:
    """1 from 20 to 120 changed lines, falling with the logarithm to 0 at the limits."""
    if lines < 20:
        return max(0.0, math.log(lines / MIN_LINES) / math.log(20 / MIN_LINES))
    return min(1.0, math.log(MAX_LINES / lines) / math.log(MAX_LINES / 120))


def words(text: str) -> set[str]:
    """Identifiers of four letters or more, without those that any text contains."""
    return {w for w in re.findall(r"[A-Za-z_]\w{3,}", text) if w.lower() not in COMMON}


def message_score(messages: list[str], touched: frozenset) -> float:
    """Half for starting with an imperative verb, half for naming something that stands on a changed line; mean over the messages."""
    symbols = words(b"\n".join(touched).decode("utf-8", "replace"))
    starts = [re.match(r"\W*(?:[\w./-]+:\s+)?(\w+)", m) for m in messages]  # "parser: fix ..." starts with fix
    verbs = [bool(m) and m[1].lower() in IMPERATIVE for m in starts]
    return sum(0.5 * verb + 0.5 * bool(words(m) & symbols) for verb, m in zip(verbs, messages)) / len(messages)


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / (len(a | b) or 1)


def score_parts(candidate: Candidate, taken: list[frozenset]) -> dict[str, float]:
    """The six parts of the score, each in [0, 1]."""
    code = [path for path in candidate.lines if is_code(path)]
    steps = candidate.files_of_steps
    pairs = [jaccard(a, b) for i, a in enumerate(steps) for b in steps[:i]]
    return {
        "size": size_score(candidate.total),
        "code": sum(candidate.lines[path] for path in code) / candidate.total,
        "tests": float(len({bool(IS_TEST.search(path)) for path in code}) == 2),
        "message": message_score(candidate.messages, candidate.touched),
        "cohesion": sum(pairs) / len(pairs) if pairs else 1.0,
        "novelty": 1 - max((jaccard(candidate.touched, other) for other in taken), default=0.0),
    }


WEIGHTS = {"size": 0.25, "code": 0.20, "tests": 0.20, "message": 0.15, "cohesion": 0.10, "novelty": 0.10}


def score(parts: dict[str, float]) -> float:
    return sum(WEIGHTS[name] * value for name, value in parts.items())


# ----------------------------------------------------------------------------------------------- patch and proof


def write_tree(repo: Repository, files: dict[bytes, tuple[str, str]]) -> str:
    """Write the tree of these {path: (mode, id)} to our own store, folder by folder -> its id. git looks at the names when it reads it."""
    rows, folders = [], {}
    for path, (mode, oid) in files.items():
        name, slash, rest = path.partition(b"/")
        if slash:
            folders.setdefault(name, {})[rest] = mode, oid
        else:
            rows.append((name, name, mode, oid))
    rows += [(name + b"/", name, "40000", write_tree(repo, inside)) for name, inside in folders.items()]  # sorted as if it ended in "/"
    return repo.keep(b"".join(b"%s %s\0%s" % (mode.encode(), name, bytes.fromhex(oid)) for _, name, mode, oid in sorted(rows)), b"tree")


def write_trees(repo: Repository, changes) -> tuple[str, str]:
    """Two trees that hold only the changed paths, old and new: what lies between them is the change and nothing else."""
    return tuple(write_tree(repo, {c.path: c[side:side + 2] for c in changes if c[side] != ABSENT}) for side in (1, 3))


def apply_patch(repo: Repository, tree: str, patch: bytes) -> str:
    """`git apply` to a tree of our own store, in an index of its own -> the tree that comes out."""
    index = {"GIT_INDEX_FILE": str(repo.room / "index")} | repo.LONELY
    repo.git("read-tree", tree, **index)
    repo.git("apply", "--cached", "--whitespace=nowarn", "-", stdin=patch, **index)
    return repo.git("write-tree", "--missing-ok", **index).decode().strip()


def make_patch(repo: Repository, changes, old_texts: list[bytes]) -> bytes:
    """
    The git patch of these changes, and its proof: `git apply` must turn a tree made of the old texts into the new tree.

    A tree's id is the hash of every name, mode and content in it, so equal ids are equal bytes. The proof sees neither the
    repository nor the new texts, and runs no program but git.
    """
    old, new = write_trees(repo, changes)
    patch = repo.git("diff-tree", "-r", "-p", "-M", "--binary", "--full-index", "--minimal", "--no-ext-diff", "--no-textconv", old, new)
    patch = re.sub(rb"(?m)^index [0-9a-f]+\.\.[0-9a-f]+( \d+)?\n(?!GIT binary patch)", b"", patch)  # only binary patches need it
    for text in old_texts:
        repo.keep(text)
    if apply_patch(repo, old, patch) != new:
        raise Refused(f"{repo.path}: the patch from {old} does not give {new}")
    return patch


# ------------------------------------------------------------------- the context: what a reader of R_old would look at


class Context(NamedTuple):
    """README's head, all paths (shallow ones first), and the files that fit the messages best, best first. Paths as git quotes them."""
    readme: str
    tree: list[str]
    files: list[tuple[str, str]]


LETTERS = bytes(byte if chr(byte).isalpha() and byte < 128 else 32 for byte in range(256))
CAMEL = re.compile(rb"[A-Z]?[a-z]{2,}|[A-Z]{3,}(?![a-z])")


def terms(text: bytes) -> collections.Counter:
    """The words of a text and the parts of its identifiers, counted in lower case: parse_URL getHTTPHeader -> parse url get http header."""
    counts = collections.Counter(text.translate(LETTERS).split())
    for word in [word for word in counts if not word.islower()]:
        times = counts.pop(word)
        for part in CAMEL.findall(word):
            counts[part.lower()] += times
    return counts


terms_of_path = functools.lru_cache(1 << 16)(terms)


def bm25(documents: list[dict[bytes, int]], lengths: list[int], query: set[bytes], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """
    How well each document answers the query: sum over its words of  idf(w) n (k1 + 1) / (n + k1 (1 - b + b length / mean length)).

    n = how often w is in the document, idf(w) = log(1 + (N - N_w + 1/2) / (N_w + 1/2)) with N_w of the N documents holding w.
    """
    scores, mean = [0.0] * len(documents), sum(lengths) / max(len(documents), 1) or 1
    for word in sorted(query):  # a fixed order of the sum: the same bits every time
        holding = [(i, counts[word]) for i, counts in enumerate(documents) if word in counts]
        idf = math.log(1 + (len(documents) - len(holding) + 0.5) / (len(holding) + 0.5))
        for i, n in holding:
            scores[i] += idf * n * (k1 + 1) / (n + k1 * (1 - b + b * lengths[i] / mean))
    return scores


def look_around(repo: Repository, facts: Facts, commit: str, messages: list[str]) -> Context:
    """The context of a stretch that starts at this commit. Only the messages ask: the patch is what the model is to find."""
    rows = [row.split(b"\t", 1) for row in repo.git("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0") if row]
    files = [(path, *meta.decode().split(" ")[::2]) for meta, path in rows]  # (path, mode, oid)
    files.sort(key=lambda f: (f[0].count(b"/"), f[0]))
    heads = [f for f in files if re.fullmatch(rb"readme(\.\w+)?", f[0], re.I)]
    facts.load(f[1:] for f in heads)
    heads = [f for f in heads if not facts.unfit(*f[1:])]
    readme = "\n".join(facts.text(*heads[0][1:]).decode().split("\n")[:40])[:2000] if heads else ""
    query = {word for word in terms("\n".join(messages).encode()) if len(word) > 1 and word.decode() not in COMMON}
    sources = [f for f in files if f[1].startswith("100") and not NOT_SOURCE.search(f[0])]
    if len(sources) > SHELF:  # in a large tree only the files whose paths fit best are opened
        sources = sorted(sources, key=lambda f: -len(query & terms_of_path(f[0]).keys()))[:SHELF]
    shelf, counts, lengths = [], [], []
    for i in range(0, len(sources), SHELF // 8):
        facts.load(f[1:] for f in sources[i:i + SHELF // 8])
        for f in sources[i:i + SHELF // 8]:
            if not facts.unfit(*f[1:]):
                in_path, in_text = terms_of_path(f[0]), facts.terms(*f[1:])
                shelf.append(f)
                counts.append({w: in_path[w] + in_text[w] for w in query if w in in_path or w in in_text})
                lengths.append(in_text.total())
    scores = bm25(counts, lengths, query)
    best = sorted((i for i in range(len(shelf)) if scores[i] > 0), key=lambda i: (-scores[i], shelf[i][0]))[:5]
    fitting = [(quote(shelf[i][0]), facts.text(*shelf[i][1:]).decode()) for i in best]
    return Context(readme, [quote(f[0]) for f in files[:2000]], fitting)


# ------------------------------------------------------------------------------------------------------ triplets


@dataclass(frozen=True)
class Triplet:
    """One stretch of a project's life; messages, texts and patch are what git holds, names as the file system would give them."""
    repo: str
    old_commit: str
    new_commit: str
    messages: list[str]                 # of the commits in between, oldest first
    old_files: dict[str, bytes]         # R_old, the files that the patch touches; bytes of a name that are not UTF-8 are surrogates
    patch: bytes
    new_files: dict[str, bytes]         # R_new
    score: float
    context: Context = Context("", [], [])
    parts: tuple[tuple[str, float], ...] = ()  # what the score is made of


def triplets(repo_dir: str, name: str | None = None, limit: int = LIMIT, by_time: bool = False,
             counts: collections.Counter | None = None) -> Iterator[Triplet]:
    """
    The triplets of a local repository, in the order of its life; the same ones every time.

    counts  is filled with what became of the starts and why stretches were turned down
    ValueError where there is nothing to be had: no repository, no commits, a shallow clone, fewer than 20 steps, a broken chain.
    """
    counts = collections.Counter() if counts is None else counts
    name = name or Path(repo_dir).resolve().name.removesuffix(".git")
    with contextlib.closing(Repository(str(repo_dir))) as repo:
        history, facts = History(repo), Facts(repo)
        taken, free, starts = [], 0, band(history.times, by_time)
        for i, s in enumerate(starts):
            if s < free or len(taken) > i * limit // len(starts) or len(taken) >= limit:  # the share of the limit that is open by now
                continue
            counts["starts"] += 1
            choice = choose(history, facts, s, taken, counts)
            if choice is not None:
                candidate, patch, parts = choice
                try:
                    around = look_around(repo, facts, history.chain[s], candidate.messages)
                except Refused:
                    around = Context("", [], [])
                taken.append(candidate.touched)
                free = candidate.end + 1
                counts["triplets"] += 1
                yield Triplet(name, history.chain[s], history.chain[candidate.end], candidate.messages,
                              {text_path(c.path): facts.text(c.old_mode, c.old) for c in candidate.changes if c.old_mode != ABSENT}, patch,
                              {text_path(c.path): facts.text(c.new_mode, c.new) for c in candidate.changes if c.new_mode != ABSENT},
                              score(parts), around, tuple(parts.items()))


def choose(history: History, facts: Facts, s: int, taken: list[frozenset], counts: collections.Counter):
    """The best end for this start that also parses and whose patch is proven -> (candidate, patch, parts of the score), or None."""
    found = [(score_parts(c, taken), c) for c in candidates(history, facts, s, counts)]
    for parts, candidate in sorted(found, key=lambda f: (-score(f[0]), f[1].end)):
        if score(parts) < MIN_SCORE:
            counts["score under 0.45"] += 1
            break
        sides = [(extension(c.path), *side) for c in candidate.changes if is_code(c.path) for side in (c[1:3], c[3:5])]
        try:
            if all(facts.parses(*side) for side in sides):
                old_texts = [facts.text(c.old_mode, c.old) for c in candidate.changes]
                return candidate, make_patch(history.repo, candidate.changes, old_texts), parts
            counts["does not parse"] += 1
        except Refused:
            counts["refused by git"] += 1
    return None


# ------------------------------------------------------------------------------- the sample: what a model gets to read

DESCRIPTION, INDEX, MESSAGE, PATCH = ".git/description", ".git/index", ".git/COMMIT_EDITMSG", ".git/patch"  # no tracked path starts so


@dataclass(frozen=True)
class Sample:
    """A triplet as text, its context cut to size. Paths are quoted as in the patch, so none contains a newline."""
    repo: str
    readme: str
    tree: tuple[str, ...]
    files: tuple[tuple[str, str], ...]      # R_old: (path, text), by path
    message: str
    patch: str
    new_files: tuple[tuple[str, str], ...]  # R_new, in the samples that show it


def format_sample(sample: Sample, loss_on_context: bool = False) -> list[tuple[str, bool, bool]]:
    """
    Sample -> parts (text, is a special token, counts in the loss). Only the patch, the new files and the end are learned.

        <|repo_name|>NAME <|file_sep|>.git/description README's head <|file_sep|>.git/index TREE <|file_sep|>PATH FILE ...
        <|file_sep|>.git/COMMIT_EDITMSG MESSAGE <|file_sep|>.git/patch PATCH [<|file_sep|>PATH NEW FILE ...] <|im_end|>
    """
    given = loss_on_context
    parts = [("<|repo_name|>", True, given), (sample.repo + "\n", False, given)]

    def segment(path: str, text: str, learn_name: bool, learn: bool):
        parts.extend([("<|file_sep|>", True, learn_name), (path + "\n", False, learn_name), (text + "\n", False, learn)])

    if sample.readme:
        segment(DESCRIPTION, sample.readme, given, given)
    if sample.tree:
        segment(INDEX, "\n".join(sample.tree), given, given)
    for path, text in sample.files:
        segment(path, text, given, given)
    segment(MESSAGE, sample.message, given, given)
    segment(PATCH, sample.patch.removesuffix("\n"), given, True)  # a patch ends with the newline that every segment ends with
    for path, text in sample.new_files:
        segment(path, text, True, True)
    return parts + [("<|im_end|>", True, True)]


def parse_sample(parts: list[tuple[str, bool, bool]]) -> Sample:
    """The inverse of format_sample. ValueError for parts that are no sample."""
    segments = []
    for text, special, *_ in parts:
        if special:
            segments.append([text, ""])
        elif segments:
            segments[-1][1] += text
    marks = [mark for mark, _ in segments]
    if marks != ["<|repo_name|>"] + ["<|file_sep|>"] * (len(marks) - 2) + ["<|im_end|>"]:
        raise ValueError(f"not a commit sample: special tokens {marks[:3]}..{marks[-1:]}, not <|repo_name|> <|file_sep|>.. <|im_end|>")
    body = [(path, text[:-1]) for path, _, text in (text.partition("\n") for _, text in segments[1:-1])]
    named = {path: i for i, (path, _) in enumerate(body) if path in (DESCRIPTION, INDEX, MESSAGE, PATCH)}
    if MESSAGE not in named or PATCH not in named:
        raise ValueError(f"not a commit sample: no {MESSAGE} or no {PATCH} segment")
    at = lambda name: body[named[name]][1] if name in named else ""
    files = [row for row in body[:named[MESSAGE]] if row[0] not in named]
    return Sample(segments[0][1][:-1], at(DESCRIPTION), tuple(at(INDEX).split("\n")) if INDEX in named else (), tuple(files), at(MESSAGE),
                  at(PATCH) + "\n", tuple(body[named[PATCH] + 1:]))


def first_lines(text: str, room: float, length: Callable[[str], int]) -> str:
    """As many whole lines from the top as fit into the room, without the last newline."""
    lines, low = text.split("\n"), 0
    high = len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        fits = length("\n".join(lines[:middle]) + "\n") <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return "\n".join(lines[:low])


def fit(triplet: Triplet, new_state: bool, budget: float, length: Callable[[str], int]) -> Sample:
    """
    The sample of at most `budget`. Message and patch always stay, whole, even where they alone are over the budget.

    Then, as far as the room goes: the tree (up to a quarter of it), README (an eighth), R_old's touched files, the new files, and the
    files that BM25 found. Files come whole or not at all, and stand by path: nothing but the message tells which ones change.
    """
    as_text = lambda files: [(quote(p.encode("utf-8", "surrogateescape")), data.decode()) for p, data in files.items()]
    sample = Sample(triplet.repo, "", (), (), "\n\n".join(triplet.messages), triplet.patch.decode(), ())
    room = budget - sum(1 if special else length(text) for text, special, _ in format_sample(sample))
    cost = lambda path, text: 1 + length(path + "\n") + length(text + "\n")
    tree = first_lines("\n".join(triplet.context.tree), room / 4 - cost(INDEX, ""), length) if triplet.context.tree else ""
    readme = first_lines(triplet.context.readme, room / 8 - cost(DESCRIPTION, ""), length) if triplet.context.readme else ""
    room -= (cost(INDEX, tree) if tree else 0) + (cost(DESCRIPTION, readme) if readme else 0)
    files, new_files = [], []
    touched = as_text(triplet.old_files)
    after = as_text(triplet.new_files)
    if new_state and (size := sum(cost(*row) for row in after)) <= room - sum(cost(*row) for row in touched):
        new_files, room = after, room - size
    for row in touched + [row for row in triplet.context.files if row not in touched]:
        if cost(*row) <= room:
            files, room = files + [row], room - cost(*row)
    tree = tuple(tree.split("\n")) if tree else ()
    return Sample(sample.repo, readme, tree, tuple(sorted(files)), sample.message, sample.patch, tuple(new_files))


def triplet_parts(triplet: Triplet, new_state: bool | None = None, budget: float = math.inf, length: Callable[[str], int] = len,
                  loss_on_context: bool = False) -> list[tuple[str, bool, bool]]:
    """
    A triplet as training text in parts (text, is a special token, counts in the loss).

    new_state  whether the new files follow the patch; by default in 30 % of the triplets, decided by the new commit's id
    budget     in units of length(text), a special token counting 1; give length=lambda text: len(tokenizer.encode(text)) for tokens
    """
    if new_state is None:
        new_state = int(triplet.new_commit[:8], 16) % 10 < 3
    return format_sample(fit(triplet, new_state, budget, length), loss_on_context)


# --------------------------------------------------------------------------------- metric: does a model see what comes


def nats(model, rows: list[tuple[list[int], list[bool]]], batch: int = 8) -> list[float]:
    """Rows of (ids, which of them count) -> -log p of the tokens that count, summed over each row. The first id is only given."""
    import torch
    device, total = next(model.parameters()).device, []
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        T = max(len(ids) for ids, _ in part) - 1
        inputs, targets = torch.zeros(len(part), T, dtype=torch.long), torch.full((len(part), T), -100)
        for r, (ids, counts) in enumerate(part):
            ids = torch.tensor(ids)
            inputs[r, :len(ids) - 1] = ids[:-1]
            targets[r, :len(ids) - 1] = ids[1:].where(torch.tensor(counts)[1:], -100)
        loss = model.loss(inputs.to(device), targets.to(device), reduction="none")
        total += loss.view(len(part), T).double().sum(1).tolist()
    return total


def rival_files(triplet: Triplet, shortlist: int) -> tuple[list[str], set[str]]:
    """The files of R_old to choose from, by path, and those among them that change; the others are drawn by the new commit's id."""
    changed = {quote(path.encode("utf-8", "surrogateescape")) for path in triplet.old_files}
    others = [path for path in triplet.context.tree if path not in changed]
    drawn = random.Random(triplet.new_commit).sample(others, max(0, min(len(others), shortlist - len(changed))))
    return sorted(changed | set(drawn)), changed


def patch_bits(model, tokenizer, triplet: Triplet, context: int) -> float:
    """Bits of the patch, given context and message; a patch beyond one row continues in further rows, seen from their own start."""
    parts = triplet_parts(triplet, new_state=False, budget=context, length=lambda text: len(tokenizer.encode(text)))
    ids, counts = tokenizer.encode_parts([(text, special, learn and not special) for text, special, learn in parts])
    rows = [(ids[i:i + context + 1], counts[i:i + context + 1]) for i in range(0, len(ids) - 1, context)]
    return sum(nats(model, rows)) / math.log(2)


def guess_file(model, tokenizer, triplet: Triplet, files: list[str], context: int) -> str:
    """Which file changes first: the most likely line "diff --git a/FILE b/FILE", given the message and these files as the tree."""
    asked = Sample(triplet.repo, "", tuple(files), (), "\n\n".join(triplet.messages), "", ())
    head = [(text, special, False) for text, special, _ in format_sample(asked)[:-2]]  # up to ".git/patch\n"
    name = lambda side, path: f'"{side}/{path[1:]}' if path[0] == '"' else f"{side}/{path}"
    rows = [tokenizer.encode_parts(head + [(f"diff --git {name('a', path)} {name('b', path)}\n", False, True)]) for path in files]
    costs = nats(model, [(ids[-context - 1:], counts[-context - 1:]) for ids, counts in rows])
    return files[costs.index(min(costs))]


def evaluate(model, tokenizer, triplets: list[Triplet], context: int | None = None, shortlist: int = 16) -> dict[str, float]:
    """
    How well a model foresees changes; rows of the table of `train.py --eval`.

    patch_bits_per_byte  of the patches, in rows of `context` tokens (at most 1024, if not said)
    file_top1            share of the triplets where the file guessed from message and tree, among `shortlist` files of R_old, does change;
                         file_chance is what guessing blindly gives. Triplets that only add files are left out of these two.
    """
    import torch
    bits, size, right, chance = 0.0, 0, [], []
    context = context or min(1024, model.config.max_position_embeddings)
    training = model.training
    model.eval()
    with torch.no_grad():
        for triplet in triplets:
            bits += patch_bits(model, tokenizer, triplet, context)
            size += len(triplet.patch)
            files, changed = rival_files(triplet, shortlist)
            if changed and len(files) > len(changed):
                right.append(guess_file(model, tokenizer, triplet, files, context) in changed)
                chance.append(len(changed) / len(files))
    model.train(training)
    mean = lambda values: sum(values) / len(values) if values else math.nan
    return {"patch_bits_per_byte": bits / size if size else math.nan, "file_top1": mean(right), "file_chance": mean(chance),
            "triplets": len(triplets)}


# ----------------------------------------------------------------------- a scripted project, to look at and to experiment with


def scripted_history(folder: str, seed: int = 0, commits: int = 80) -> None:
    """
    Write a bare repository of a small Python project that evolves as projects do: functions come with a test and a caller, are renamed
    in all three places, are corrected together with their test. Message and tree say which files change. One seed, one history.
    """
    rng, functions, stream = random.Random(seed), {}, []  # name -> [module, factor]
    names = [f"{verb}_{noun}" for verb in ("scale", "shift", "price", "count") for noun in ("order", "total", "stock", "route", "label")]
    for i in range(commits):
        name, fresh = rng.choice(sorted(functions) or [""]), rng.choice([n for n in names if n not in functions])
        act = rng.choice(["add", "rename", "correct"]) if 3 < len(functions) < 16 else "rename" if functions and i > 3 else "add"
        if act == "add":
            functions[fresh] = [rng.choice(["cart", "store", "ledger", "parcel"]), rng.randrange(2, 30)]
            name, message = fresh, f"Add {fresh} to {functions[fresh][0]} with a test and a report"
        elif act == "rename":
            functions = {fresh if n == name else n: f for n, f in functions.items()}
            name, message = fresh, f"Rename {name} to {fresh} and update its callers"
        else:
            functions[name][1] += 1
            message = f"Correct the factor of {name} and its test"
        module = functions[name][0]
        own = [(n, factor) for n, (where, factor) in functions.items() if where == module]
        head = f"from shop.{module} import {', '.join(n for n, _ in own)}\n"
        body = [f"def {n}(x):\n    factor = {factor}\n    return x * factor\n" for n, factor in own]
        test = [f"def test_{n}():\n    assert {n}(2) == {2 * factor}\n    assert {n}(-1) == {-factor}\n" for n, factor in own]
        call = [f"def report_{n}(rows):\n    return sum({n}(row) for row in rows)\n" for n, _ in own]
        files = {f"shop/{module}.py": body, f"tests/test_{module}.py": [head] + test, f"shop/{module}_report.py": [head] + call}
        stream.append(f"commit refs/heads/main\ncommitter Script <script@example.org> {1_600_000_000 + 3600 * i} +0000\n")
        stream.append(f"data {len(message)}\n{message}\n")
        stream += [f"M 100644 inline {path}\ndata {len(text)}\n{text}\n" for path, rows in files.items() for text in ["\n\n".join(rows)]]
    for command in (["init", "--bare", "--template=", "--initial-branch=main", folder], ["-C", folder, "fast-import"]):
        subprocess.run(["git", *command], input="".join(stream).encode(), check=True, capture_output=True, env=clean_environment(folder))


# -------------------------------------------------------------------------------------------------- bench, command line


def is_url(text: str) -> bool:
    return not Path(text).exists() and re.match(r"\w+://|[\w.-]+@[\w.-]+:", text) is not None


def clone(url: str, folder: str) -> str:
    """A bare clone, by git's own transports only (no ext::, no prompt, no template). The user's configuration holds: proxies, keys."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "https:http:git:ssh:file"}
    done = subprocess.run(["git", "clone", "--quiet", "--bare", "--single-branch", "--no-tags", "--template=", "--", url, folder],
                          capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{url}: git clone: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return folder


def read_everything(repo: Repository, commits: list[str]) -> Iterator[tuple[str, list[tuple[Change, bytes, bytes]], bytes]]:
    """What PyDriller's traversal gives, for the bench: each commit's id and message, changed files with old and new text, diff."""
    border = os.urandom(8).hex()  # before and after a message: nothing that a history contains
    form = f"--format={border}%H%n%B{border}"
    command = ["log", "--stdin", "--no-walk=unsorted", "-z", "--raw", "-p", "--no-abbrev", "--no-renames", form]
    blocks = ["\n".join(commits[i:i + 300]).encode() for i in range(0, len(commits), 300)]
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:  # git log writes the next block while we read this one
        logs = collections.deque([ahead.submit(repo.git, *command, stdin=blocks[0])])
        for block in blocks[1:] + [None]:
            if block:
                logs.append(ahead.submit(repo.git, *command, stdin=block))
            _, *pieces = logs.popleft().result().split(border.encode())
            for message, entry in zip(pieces[::2], pieces[1::2]):
                raw, _, diff = entry.lstrip(b"\0\n").partition(b"\0\0")
                changes = next(raw_changes(b"commit\0" + raw + b"\0"))[1]
                blobs = [oid for c in changes for mode, oid in (c[1:3], c[3:5]) if mode not in (ABSENT, "160000")]
                texts = dict(zip(blobs, repo.ask("--batch", blobs)))
                yield message.decode("utf-8", "replace"), [(c, texts.get(c.old, b""), texts.get(c.new, b"")) for c in changes], diff


def bench(path: str, rounds: int = 3, slice_of: int = 150) -> None:
    """By turns: the same commits with sources and diffs through us and through PyDriller; then all triplets, with time and memory."""
    try:
        import pydriller
    except ImportError:
        pydriller = None
    with contextlib.closing(Repository(path)) as repo:
        commits = repo.git("rev-list", "--no-merges", "--reverse", repo.tip).decode().split()
        print(f"{path}: {len(commits)} commits that are no merges; messages, old and new texts, diffs")
        ours, theirs = [], []
        for k in range(rounds):
            began, read = time.perf_counter(), sum(1 for _ in read_everything(repo, commits))
            ours.append(read / (time.perf_counter() - began))
            line = f"round {k + 1} | ours {ours[-1]:8,.0f} commits/s"
            if pydriller:
                some = commits[len(commits) * k // rounds:][:slice_of]
                began = time.perf_counter()
                for commit in pydriller.Repository(path, only_commits=some).traverse_commits():
                    for file in commit.modified_files:
                        file.source_code, file.source_code_before, file.diff  # noqa: B018  the properties do the work
                theirs.append(len(some) / (time.perf_counter() - began))
                line += f" | PyDriller {theirs[-1]:8,.0f} (on {len(some)} of them)"
            print(line)
    began, counts = time.perf_counter(), collections.Counter()
    found = sum(1 for _ in triplets(path, counts=counts))
    seconds = time.perf_counter() - began
    memory = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"triplets | {found} in {seconds:.1f} s | {len(commits) / seconds:,.0f} commits/s of the history"
          f" | peak {memory[0]:.0f} MB, git {memory[1]:.0f} MB")
    if theirs:
        ours, theirs = statistics.median(ours), statistics.median(theirs)
        print(f"medians  | reading {ours / theirs:.1f} x PyDriller | triplets {len(commits) / seconds / theirs:.1f} x")


def show(triplet: Triplet, lines: int) -> None:
    """One triplet, readably: which stretch, what was said, the head of the patch."""
    parts = " ".join(f"{name} {value:.2f}" for name, value in triplet.parts)
    print(f"\n=== {triplet.repo} {triplet.old_commit[:10]} -> {triplet.new_commit[:10]} | score {triplet.score:.2f} | {parts}")
    print("\n".join("  " + message.split("\n")[0] for message in triplet.messages))
    patch = triplet.patch.decode("utf-8", "replace").splitlines()
    more = [f"... {len(patch) - lines} more lines"] if len(patch) > lines else []
    print("\n".join("    " + row for row in patch[:lines] + more))


def main(argv=None) -> int:
    """-> exit status: 0, or 2 where no repository could be read."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="""
        Print the (R_old, patch, R_new) triplets of git repositories: stretches of the first-parent chain that start between 40 and 80
        percent of a project's life, scored, non-overlapping, each patch proven by git apply. No program of a repository runs and nothing
        is checked out. Without a repository, a scripted project is shown.""")
    parser.add_argument("repos", nargs="*", metavar="REPO", help="local repositories (work tree or bare), or URLs that git can clone")
    parser.add_argument("--limit", type=int, default=LIMIT, help="triplets of one repository, at most")
    parser.add_argument("--by-time", action="store_true", help="measure the 40-80 percent in time and not in commits")
    parser.add_argument("--lines", type=int, default=24, help="lines of each patch to print")
    parser.add_argument("--bench", action="store_true", help="time reading against PyDriller, and the triplets")
    args = parser.parse_args(argv)
    if min(args.limit, args.lines) < 1:
        raise ValueError(f"--limit {args.limit} --lines {args.lines}: give positive numbers")
    skipped = 0
    with tempfile.TemporaryDirectory(prefix="commits-") as room:
        if not args.repos:
            args.repos = [os.path.join(room, "shop.git")]
            scripted_history(args.repos[0])
        for i, repo in enumerate(args.repos):
            counts = collections.Counter()
            try:
                path = clone(repo, os.path.join(room, str(i))) if is_url(repo) else repo
                if args.bench:
                    bench(path)
                    continue
                for triplet in triplets(path, name=Path(repo).name.removesuffix(".git") if is_url(repo) else None, limit=args.limit,
                                        by_time=args.by_time, counts=counts):
                    show(triplet, args.lines)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                skipped += 1
                print(f"commits.py: {error}", file=sys.stderr)
                continue
            print(f"\n{repo}: {counts.pop('triplets', 0)} triplets from {counts.pop('starts', 0)} starts; stretches turned down: "
                  + (", ".join(f"{reason} {n}" for reason, n in counts.most_common()) or "none"))
    if skipped and len(args.repos) > 1:
        print(f"commits.py: {skipped} of {len(args.repos)} repositories skipped", file=sys.stderr)
    return 2 if skipped == len(args.repos) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"commits.py: {error}", file=sys.stderr)
        sys.exit(2)
