"""
How does raw text become training tokens?

    find     files of the running Python, of folders and git repositories, records of JSON lines and of Common Crawl;
             of more than is wanted, a sample that is fair to every project
    clean    bytes become text, a table of edits and a table of rules decide, a syntax tree and benchmarks veto; all is counted
    dedup    exact copies, near copies (MinHash), renamed copies (embeddings): one of each stays
    split    whole projects are held out, never single files: the files of a project are too much alike
    tokens   byte-level BPE, trained here, run by tiktoken; one memory-mapped token file a category
    mix      exact shares of the categories, best-fit packed into rows of one context length

Read build() first, it is the table of contents; then EDITS and RULES, train_bpe(), signature(), Mixture. Everything that compares
code looks at the same vectorised tokens, lex().

Source: IQuest-Coder-V1 report 3.1 and 3.2; thresholds of StarCoder, OpenCoder, Gopher and FineWeb, as marked. Where we differ: the
corpus is by default a bounded sample of what lies on this machine.

    python data.py                       # out/data from the running Python's library and packages, under a minute
    python data.py --source DIR REPO     # folders, git repositories, FILE.jsonl(.gz), FILE.warc(.gz), "cc:INDEX?url=PATTERN"
    python data.py --explain "long line" # what a rule removed in the last build, three examples
    python data.py --bench               # tokenizer, near duplicates and parsing beside their peers
"""
import argparse
import ast
import base64
import bisect
import contextlib
import copy
import errno
import fcntl
import functools
import gzip
import hashlib
import heapq
import http.client
import importlib
import inspect
import io
import itertools
import json
import keyword
import math
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import warnings
import zlib
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken, and understands the same patterns
import requests
import tiktoken
import torch
import urllib3

import commits
import fim
import tasks
from model import Block, LoopCoder, LoopCoderConfig, Norm, rotary_table

LANGUAGES = {  # language: the extensions it is found by; those that fim.py has a grammar for, and some that stay unparsed
    **{language: " ".join(extensions) for language, (_, _, extensions) in fim.LANGUAGES.items()},
    "c++": ".cpp .cc .cxx .hpp .hh .hxx .cu .cuh", "shell": ".sh", "css": ".css", "sql": ".sql", "json": ".json", "yaml": ".yaml .yml",
    "toml": ".toml", "html": ".html .htm", "markdown": ".md", "text": ".txt .rst",
}
BY_EXTENSION = {extension: language for language, row in LANGUAGES.items() for extension in row.split()}
TEXT = {"html", "markdown", "text"}      # these make the category `text`; every other language is `code`
MARKUP = {"json", "yaml", "toml"}
CODE = set(LANGUAGES) - TEXT - MARKUP
SPECIAL = fim.SPECIAL


class Document(NamedTuple):
    text: str
    language: str
    project: str       # the unit of the held-out split: a package, a repository, a web site
    path: str


def digest(*parts):
    """A number that looks random and depends on nothing but the strings."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def write_json(path, value):
    """Write under a temporary name, then rename: a reader sees the old file or the new one, whole."""
    Path(f"{path}.tmp").write_bytes(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    os.replace(f"{path}.tmp", path)


# ---- sources: files --------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One file or record that a source offers: where its bytes are, and what is known before reading it."""
    project: str
    path: str          # inside the project, for people and for rules
    language: str
    size: int
    place: str         # FILE, or "FILE\0OFFSET" of a part, or "git\0REPOSITORY\0OBJECT"


SKIP_DIRECTORIES = re.compile(r"__pycache__|\..*|.*\.dist-info|.*\.egg-info|node_modules|_?vendor(ed)?|third[-_]?party|externals?", re.I)
GENERATED_NAMES = re.compile(r".*(_pb2(_grpc)?\.pyi?|[.-]min\.(js|css)|[.-]lock\.json|[._]generated\.\w+)", re.I)
LARGEST_FILE = 1_000_000  # bytes; larger ones are data, whatever their extension says
WRITTEN = ("tokenizer", "train", "heldout", "drops.json", "manifest.json", "work", "fetched", "teacher")  # in the folder of a build


def wanted(path):
    """The language of a path, or None: an unknown extension, a vendored copy, a generated file."""
    *folders, name = path.split("/")
    if not any(map(SKIP_DIRECTORIES.fullmatch, folders)) and not GENERATED_NAMES.fullmatch(name):
        return BY_EXTENSION.get(os.path.splitext(name)[1].lower())


shown = lambda path: os.fsencode(path).decode("utf-8", "replace")  # the name of a file can be any bytes


def walk(root, project_of, skip=()):
    """Entries of a folder; project_of(parts of the relative path) names the project."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not SKIP_DIRECTORIES.fullmatch(f) and f not in skip]
        for place in (os.path.join(folder, name) for name in names):
            path = shown(os.path.relpath(place, root)).replace(os.sep, "/")
            if (language := wanted(path)) and os.path.isfile(place) and not os.path.islink(place):
                yield Entry(project_of(path.split("/")), path, language, os.path.getsize(place), place)


def running_python():
    """The standard library and the installed packages of this interpreter: a project is a module or package of the top level."""
    paths = sysconfig.get_paths()
    named = lambda group: lambda parts: f"{group}/{parts[0].split('.')[0]}"
    yield from walk(paths["stdlib"], named("stdlib"), skip=("site-packages", "dist-packages"))
    for packages in sorted({os.path.realpath(paths[kind]) for kind in ("purelib", "platlib")}):  # lib64 may be a link to lib
        yield from walk(packages, named("packages"))


is_repository = lambda root: (root / ".git").exists() or (root / "HEAD").is_file() and (root / "objects").is_dir()


def repository_of(source):
    """The git repository that a source is or lies in, or None: its history gives the category `commit`."""
    root = Path(source).resolve()
    if source != "python" and root.is_dir():
        return next((str(folder) for folder in (root, *root.parents) if is_repository(folder)), None)


def git_files(repo, project_of):
    """Entries of a git repository's HEAD, bare or not: what is committed, not what lies around."""
    listing = subprocess.run(["git", "-C", repo, "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD"], capture_output=True)
    if listing.returncode:
        raise ValueError(f"{repo}: git cannot list HEAD ({' '.join(listing.stderr.decode(errors='replace').split())}); is there a commit?")
    for row in listing.stdout.decode("utf-8", "replace").split("\0")[:-1]:
        about, path = row.split("\t", 1)
        mode, kind, oid, size = about.split()
        if kind == "blob" and mode != "120000" and (language := wanted(path)):  # 120000: a symbolic link
            yield Entry(project_of(path.split("/")), path, language, int(size), f"git\0{os.path.abspath(repo)}\0{oid}")


def find(sources, folder, counts):
    """{entry: its source}, sorted. One source alone is split into projects by its folders; of several, a repository is one."""
    found = {}
    for source in sources:
        root, name = Path(source), shown(Path(source).resolve().name)
        inside = lambda parts, name=name: f"{name}/{parts[0] if len(parts) > 1 else '.'}"
        if source == "python":
            entries = running_python()
        elif source.startswith("cc:") or STREAM.search(source):
            entries = spooled(source, Path(folder), counts)
        elif not root.is_dir():
            raise ValueError(f"source {source}: there is no such folder; give `python`, a folder, a git repository, a .jsonl, .warc or "
                             f".wet file or URL (gzipped or not), or cc:INDEX?url=PATTERN")
        elif is_repository(root):
            entries = git_files(str(root), inside if len(sources) == 1 else lambda parts, name=name: name)
        else:  # where the folder written lies in a source, its contents are none
            within = lambda place: os.path.relpath(place, Path(folder).parent).split(os.sep)[0]
            entries = (entry for entry in walk(str(root), inside) if within(entry.place) not in WRITTEN)
        found |= dict.fromkeys(entries, source)
    return dict(sorted(found.items()))


def read_all(entries):
    """The bytes of each entry, in order; None for a file that cannot be read. One `git cat-file` a repository, plain reads for the rest."""
    with contextlib.ExitStack() as stack:
        git = functools.cache(lambda repo: stack.enter_context(subprocess.Popen(
            ["git", "-C", repo, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
        for entry in entries:
            place, *where = entry.place.split("\0")
            if place == "git":
                reader = git(where[0])
                reader.stdin.write(f"{where[1]}\n".encode())
                reader.stdin.flush()
                header = reader.stdout.readline().split()
                if len(header) != 3:
                    raise ValueError(f"{where[0]}: git cannot read {entry.path} (object {where[1]}); `git fsck` there says what is broken")
                yield reader.stdout.read(int(header[2]) + 1)[:-1]  # the object is followed by a newline
            else:
                try:
                    with open(place, "rb") as file:
                        file.seek(int(where[0]) if where else 0)
                        raw = file.read(entry.size if where else -1)
                except (FileNotFoundError, PermissionError):
                    if where:  # a part of a file of ours
                        raise
                    raw = None  # it has gone since it was found, or is another user's
                yield raw


def fair_cap(sizes, budget, weights=None):
    """The cap for which sum(min(size, cap * weight)) is the budget: small ones come whole, large ones share what is left."""
    weights = [1] * len(sizes) if weights is None else weights
    rest = sum(weights)
    for size, weight in sorted(zip(sizes, weights), key=lambda row: row[0] / row[1]):
        if size / weight * rest >= budget:
            return budget / rest
        budget, rest = budget - size, rest - weight
    return math.inf


def draw_sample(entries, max_bytes):
    """At most max_bytes: 8 % text, 25 % markup and languages without a law, the rest by language_mixture(); projects to a fair cap."""
    if not max_bytes:
        return entries
    groups, chosen, by_chance = defaultdict(list), [], lambda entry: digest(entry.project, entry.path)
    for entry in entries:
        groups["text" if entry.language in TEXT else entry.language if entry.language in LAW["languages"] else "other"].append(entry)
    size = {name: sum(e.size for e in group) for name, group in groups.items()}
    budget = {name: min(size.get(name, 0), max_bytes * share) for name, share in (("text", 0.08), ("other", 0.25))}
    budget |= language_mixture({name: size[name] for name in groups if name in LAW["languages"]}, max_bytes - sum(budget.values()))
    for name, group in groups.items():
        of_project, used = Counter(), Counter()
        for entry in group:
            of_project[entry.project] += entry.size
        cap = fair_cap(of_project.values(), budget[name])
        for entry in sorted(group, key=by_chance):
            if used[entry.project] + entry.size <= cap:
                used[entry.project] += entry.size
                chosen.append(entry)
    rest, taken = max_bytes - sum(entry.size for entry in chosen), set(chosen)
    if rest > max_bytes / 2:  # the parts of the projects are smaller than their files, or the sources are text or C alone: chance decides
        for entry in sorted(entries, key=by_chance):
            if entry.size <= rest and entry not in taken:
                chosen.append(entry)
                rest -= entry.size
    return sorted(chosen)


def held_out_projects(entries, share):
    """By the order of a hash: each project that adds to a language still short of its share, and brings none over twice its share."""
    size = defaultdict(Counter)
    for entry in entries:
        size[entry.project][entry.language] += entry.size
    if len(size) < 2:
        raise ValueError(f"only one project ({''.join(size)}) in the sources: nothing can be held out; give more sources, or a folder "
                         f"with several folders in it: each is a project")
    total, held, chosen = sum(size.values(), Counter()), Counter(), set()
    for project in sorted(size, key=lambda project: digest("held out", project)):
        row = size[project]
        if any(held[x] < share * total[x] for x in row) and all(held[x] + row[x] <= 2 * share * total[x] for x in row):
            chosen.add(project)
            held.update(row)
    return chosen or {min(size, key=lambda project: (sum(size[project].values()), project))}  # of a handful, the smallest


# ---- sources: the web ------------------------------------------------------------------------------------------------

AGENT = {"User-Agent": "nanoLoopCoder/0.1 (reads Common Crawl's archives, never the sites themselves)", "Accept-Encoding": "identity"}
LARGEST_RECORD, LARGEST_DOWNLOAD = 16_000_000, 2_000_000_000  # bytes
TRIES, PASSING = 6, (408, 429, 500, 502, 503, 504)  # what may be otherwise at the next try


def request(url, headers=()):
    """One request, patiently: what may pass is tried again at once, then after 2, 4, 8, ... seconds or as long as the server says."""
    again = urllib3.Retry(TRIES - 1, backoff_factor=1, status_forcelist=PASSING, raise_on_status=False)
    session = requests.Session()
    session.adapters = dict.fromkeys(session.adapters, requests.adapters.HTTPAdapter(max_retries=again))
    try:
        reply = session.get(url, headers={**AGENT, **dict(headers)}, timeout=60, stream=True)
    except requests.ConnectionError as error:
        raise OSError(f"{url}: no connection after {TRIES} tries; run the same command later, it goes on where it stopped") from error
    if reply.status_code in PASSING:
        raise OSError(f"{url}: HTTP {reply.status_code} after {TRIES} tries; run the same command later, it goes on where it stopped")
    if not reply.ok and reply.status_code != 416:  # 416: the range that we ask for begins at the end of the file
        raise ValueError(f"{url}: HTTP {reply.status_code}; the server does not give it")
    return reply


def download(url, path, first=0, size=None):
    """Stream a URL, or `size` bytes of it from `first` on, into a file; PATH.part is what a cut connection or a killed run has left."""
    path, part, stalled = Path(path), Path(f"{path}.part"), 0
    if part.exists() and part.stat().st_size == size:  # a run was killed before it could give its range the name
        os.replace(part, path)
    while not path.exists():
        have = part.stat().st_size if part.exists() else 0
        reply = request(url, headers={"Range": f"bytes={first + have}-{first + size - 1 if size else ''}"} if have or size else {})
        start = have if reply.status_code == 206 else 0  # a server without ranges begins again
        declared = start + int(reply.headers.get("Content-Length", 0))
        if declared > LARGEST_DOWNLOAD or size and reply.status_code != 206:
            raise ValueError(f"{url}: {declared} bytes; more than {LARGEST_DOWNLOAD} are not fetched, nor a whole file for a range of it")
        whole = reply.status_code == 416
        if not whole:
            with open(part, "ab" if start else "wb") as file, contextlib.suppress(urllib3.exceptions.HTTPError):
                shutil.copyfileobj(reply.raw, file)
                whole = True
        stalled = 0 if part.stat().st_size > have else stalled + 1
        if whole and size and part.stat().st_size != size:
            raise ValueError(f"{url}: the server does not give the {size} bytes from {first} on")
        if whole:
            os.replace(part, path)
        elif stalled == TRIES:
            raise OSError(f"{url}: the connection ends after {have} of {declared} bytes; run the same command again")
        else:
            time.sleep(1)
    return path


def crawl(query, folder, counts):
    """Files with the WARC records that INDEX?url=PATTERN of Common Crawl finds: one byte range each, kept, so never fetched twice."""
    data_url = "https://data.commoncrawl.org/" if urllib.parse.urlsplit(query).hostname == "index.commoncrawl.org" else query
    for line in list(request(query + "&output=json").iter_lines()):  # all at once: it would not stay open while the ranges are fetched
        problem = "index line not understood"
        try:
            row = json.loads(line)
            first, size, name, problem = int(row["offset"]), int(row["length"]), row["filename"], "range not given"
            if not 0 < size <= LARGEST_RECORD:
                raise ValueError(f"{name}: a record of {size} bytes")
            yield download(urllib.parse.urljoin(data_url, "/" + name), folder / f"{digest(name, str(first)):016x}.warc.gz", first, size)
        except (ValueError, KeyError, TypeError):
            counts[problem] += 1


def members(path):
    """The gzip members of a file, each inflated; None for one that is broken, cut or too large, and the search goes on behind it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        at = 0
        while 0 <= at < len(raw):
            inflate, pieces, size, end = zlib.decompressobj(31), [], 0, at
            with contextlib.suppress(zlib.error):
                while not inflate.eof and end < len(raw) and size <= LARGEST_RECORD:
                    pieces.append(inflate.decompress(raw[end:end + 65536]))
                    size, end = size + len(pieces[-1]), end + 65536
            whole = inflate.eof
            yield io.BytesIO(b"".join(pieces)) if whole else None
            at = min(end, len(raw)) - len(inflate.unused_data) if whole else raw.find(b"\x1f\x8b\x08", at + 1)


def warc_pages(path, counts):
    """Documents of a WARC or WET file. What cannot be read is counted under its reason and skipped."""
    with open(path, "rb") as file:
        for stream in members(path) if str(path).endswith(".gz") and os.path.getsize(path) else [file]:
            if stream is None:
                counts["gzip member broken"] += 1
            while stream and (line := stream.readline(65536)):
                if line.startswith(b"WARC/"):
                    try:
                        yield page(stream)
                    except Unreadable as error:
                        counts[str(error)] += 1
                    except (ValueError, http.client.HTTPException):  # a length, an address or headers that are none
                        counts["record not understood"] += 1


class Unreadable(Exception):
    """Why a record gives no document."""


def dechunked(body):
    """A chunked HTTP body without the lengths between its parts."""
    parts, stream = [], io.BytesIO(body)
    while size := int(stream.readline().split(b";")[0], 16):
        parts.append(stream.read(size))
        stream.readline()
    return b"".join(parts)


def page(stream):
    """The document of a WARC record behind its first line: a `conversion` (WET) is text, a `response` has HTTP headers."""
    head = http.client.parse_headers(stream)
    size = int(head["Content-Length"] or -1)
    if not 0 <= size <= LARGEST_RECORD:
        raise Unreadable("record without a length" if size < 0 else "record too large")
    block = stream.read(size)
    if len(block) < size:
        raise Unreadable("record cut short")
    inside, good, about = io.BytesIO(block), head["WARC-Type"] == "conversion", {"Content-Type": "text/plain; charset=utf-8"}
    if head["WARC-Type"] == "response":
        good, about = inside.readline().split()[1:2] == [b"200"], http.client.parse_headers(inside)
    content = about.get("Content-Type", "")
    if not good or not re.match("text/(html|plain)", content):
        raise Unreadable("record is no page")
    body = inside.read()
    for name, data in (("WARC-Payload-Digest", body), ("WARC-Block-Digest", block)):
        if (head[name] or "").startswith("sha1:") and head[name][5:] != base64.b32encode(hashlib.sha1(data).digest()).decode():
            raise Unreadable("record with a wrong digest")
    if "chunked" in about.get("Transfer-Encoding", "").lower() and re.match(rb"[0-9a-fA-F]+\s*(;[^\n]*)?\r\n", body):
        body = dechunked(body)  # as wget stores it; Common Crawl stores it joined
    declared = re.search(rb"charset\s*=\s*[\"']?([-\w.]+)", content.encode() + b"\n" + body[:1024], re.I)
    if (text := decode(body, declared and declared[1].decode())) is None:
        raise Unreadable("record is binary")
    text = html_text(text) if content.startswith("text/html") else text
    url = head["WARC-Target-URI"] or ""
    return Document(text, "text", urllib.parse.urlsplit(url).hostname or "unknown site", url)


def json_lines(path, counts):
    """Documents of a JSON lines file: `text`, `content` or `code`, and what else is known under the usual names."""
    first = lambda row, *names: next((row[name] for name in names if isinstance(row.get(name), str)), "")
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as lines:
            for number, line in enumerate(lines):
                try:
                    row = json.loads(line)
                    text, name = first(row, "text", "content", "code"), first(row, "path", "max_stars_repo_path", "url") or str(number)
                except (ValueError, AttributeError, RecursionError):
                    counts["JSON line not understood"] += 1
                    continue
                language = first(row, "language", "lang").lower()
                language = language if language in LANGUAGES else BY_EXTENSION.get(os.path.splitext(name)[1].lower(), "text")
                project = first(row, "project", "repo_name", "repo", "max_stars_repo_name") or f"line {number}"
                yield Document(text, language, project, name)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        counts["gzip file cut short"] += 1


STREAM = re.compile(r"\.(jsonl|warc|wet)(\.gz)?(?=\?|$)")  # how the names of what is no folder end


def spooled(source, folder, counts):
    """Entries of a stream. Its texts first go to a local file, end to end; several processes can sample and read it."""
    local, remote = Path(source), source.startswith("cc:") or re.match("https?://", source)
    if not remote and not local.is_file():
        raise ValueError(f"source {source}: there is no such file")
    version = () if remote else (str(local.stat().st_size), str(local.stat().st_mtime_ns))  # a file that has changed is read anew
    raw = folder / f"{digest(source, *version):016x}"
    spool, index, skipped, entries = raw.with_suffix(".spool"), raw.with_suffix(".json"), Counter(), []
    if not index.exists():
        raw.mkdir(parents=True, exist_ok=True)
        one = lambda: download(source, raw / f"whole{STREAM.search(source)[0]}") if remote else local
        with open(spool, "wb") as out:
            for path in crawl(source[3:], raw, skipped) if source.startswith("cc:") else [one()]:
                for doc in json_lines(path, skipped) if ".jsonl" in path.name else warc_pages(path, skipped):
                    at = out.tell()
                    entries.append((doc.project, doc.path, doc.language, out.write(doc.text.encode("utf-8", "replace")), at))
        write_json(index, [entries, skipped])
    entries, skipped = json.loads(index.read_bytes())
    counts.update(skipped)
    return [Entry(*row, f"{spool.resolve()}\0{at}") for *row, at in entries]


# ---- bytes and pages to text -----------------------------------------------------------------------------------------


def decode(raw, declared=None):
    """Bytes to text, or None for what is not text. UTF-8, else the declared coding, else Latin-1; line ends become \\n."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = raw.decode("utf-16", "replace")
    elif b"\0" in raw:
        return None
    else:
        found = re.search(rb"coding[:=]\s*([-\w.]+)", raw[:200])
        for encoding in ("utf-8-sig", declared or found and found[1].decode() or "latin-1", "latin-1"):
            with contextlib.suppress(ValueError, LookupError):
                text = raw.decode(encoding)
                break
    control = sum(map(text.count, "\x00\x01\x02\x03\x04\x05\x06\x0e\x0f\x10\x11\x12\ufffd"))
    return fim.normalise(text) if control <= 0.001 * len(text) else None


class Page(HTMLParser):
    """HTML to text: blocks become lines, what is no content disappears, and <pre> becomes a fenced block, byte for byte."""
    SILENT = set("script style nav footer aside form noscript template svg button select iframe title".split())
    BLOCK = set("p div section article main header h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table caption tr blockquote figure figcaption "
                "details summary address br hr".split())

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.out, self.line, self.pre, self.silent = [], [], None, []

    def end_line(self):
        text = " ".join("".join(self.line).split())
        self.out += [text] if text else []
        self.line = []

    def handle_starttag(self, tag, attributes):
        if tag in self.SILENT:
            self.silent.append(tag)
        elif tag == "pre" and self.pre is None and not self.silent:
            self.end_line()
            self.pre = []
        elif tag == "br" and self.pre is not None:
            self.pre.append("\n")
        elif tag in self.BLOCK and self.pre is None:
            self.end_line()
            self.line += ["- "] if tag == "li" else ["#" * int(tag[1]) + " "] if re.fullmatch("h[1-6]", tag) else []
        elif tag in ("td", "th") and self.pre is None:
            self.line.append(" ")  # cells of a row stand apart

    def handle_endtag(self, tag):
        if tag in self.silent:
            del self.silent[self.silent.index(tag):]  # whatever was left open inside is closed with it
        elif tag == "pre" and self.pre is not None:
            code = re.sub(r"\A\n", "", "".join(self.pre))  # HTML ignores a newline right behind <pre>
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
            self.out.append(f"{fence}\n{code}{'' if code.endswith(chr(10)) else chr(10)}{fence}")
            self.pre = None
        elif tag in self.BLOCK and self.pre is None:
            self.end_line()

    def parse_marked_section(self, i, report=1):
        return self.parse_bogus_comment(i)  # <![...]> is a comment to a browser; the library stops at one that it does not know

    def handle_data(self, data):
        if not self.silent:
            (self.line if self.pre is None else self.pre).append(data)


def html_text(html):
    parser = Page()
    parser.feed(html + "\n")  # without it an & near the end would wait for more
    parser.handle_endtag("pre")
    parser.end_line()
    return "\n".join(parser.out) + "\n"


# ---- cleaning: edits, then rules -------------------------------------------------------------------------------------

WEB, EVERY, PYTHON = {"text"}, set(LANGUAGES), {"python"}
KEY_MARKS = "AKIA ASIA ghp_ gho_ ghu_ ghs_ ghr_ xox sk- AIza -----BEGIN".split()
SECRET = re.compile(r"(?:password|passwd|secret|api_?key|access_?key|auth_?token|access_?token)", re.I)
DOTTED, AT = re.compile(r"\.\d{1,3}\.\d"), re.compile(r"@(?<=[\w.+%-]@)[\w-]+\.[\w-]")
EDITS = {  # name: (languages, a quick look without which the pattern cannot match, pattern, replacement)
    "key redacted": (EVERY, lambda text: any(map(text.__contains__, KEY_MARKS)), re.compile(
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}|\bxox[baprs]-[A-Za-z0-9-]{10,}|\bsk-[A-Za-z0-9_-]{32,}|\bAIza[\w-]{35}"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{1,20000}?-----END [A-Z ]*PRIVATE KEY-----"), "<KEY>"),
    "secret redacted": (EVERY, SECRET.search, re.compile(  # a value of mixed letters and digits behind a telling name
        rf"((?i:{SECRET.pattern})\w{{0,30}}[\"']?[ \t]{{0,4}}[:=]{{1,2}}[ \t]{{0,4}})([\"'])(?=[^\"'\n]{{0,200}}\d[A-Za-z])"
        r"(?=[^\"'\n]{0,200}[a-z])(?=[^\"'\n]{0,200}[A-Z])[\w+/=.!@#^&*~-]{12,200}\2"), r"\1\2<KEY>\2"),
    "e-mail redacted": (EVERY, AT.search, re.compile(
        r"(?<![\w.+%-])[\w.+%-]{1,64}@(?!example\.|localhost)[\w-]{1,63}(?:\.[\w-]{2,63})*\.[A-Za-z]{2,10}\b"), "<EMAIL>"),
    "address redacted": (EVERY, DOTTED.search, re.compile(  # an IPv4 address of the open Internet; no version number
        r"(?<![\w.-])(?!(?:0|10|127|169\.254|172\.(?:1[6-9]|2\d|3[01])|192\.(?:168|0\.2)|198\.51\.100|203\.0\.113|22[4-9]|2[3-5]\d)\.)"
        r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?![\w.-]|\.\d)"), "<IP>"),
    "cookie line": (WEB, lambda text: "cookie" in text.lower(), re.compile(
        r"^.*\b(?:accept (?:all )?cookies|(?:use[sd]?|about|these|our) cookies|cookie (?:policy|settings|consent))\b.*\n?",
        re.I | re.M), ""),
    "boilerplate line": (WEB, bool, re.compile(
        r"^.{0,80}\b(?:all rights reserved|terms of (?:service|use)|privacy policy|powered by|subscribe to our|sign (?:in|up)|log ?in|"
        r"javascript is (?:disabled|required)|skip to (?:main )?content|share (?:this|on)|follow us|back to top|read more|"
        r"click here)\b.{0,80}(?:\n|\Z)", re.I | re.M), ""),
    "navigation line": (WEB, bool, re.compile(r"^(?:[- ]*[\w' ]{1,24}(?: [|»›>·•/] )){2,}[\w' ]{1,24}\n?", re.M), ""),
    "encoded blob": (TEXT, bool, re.compile(
        r"(?:data:[\w/+.-]+;base64,)?(?<![A-Za-z0-9+/=])(?=\S{0,200}\d)(?:[A-Za-z0-9+/]{120,}={0,2}|[0-9a-fA-F]{96,})"), "<BLOB>"),
}
FENCED = re.compile(r"(^(`{3,}+).*?^\2[ \t]*$)", re.M | re.S)  # code in prose: it stays as it is, byte for byte

CLASSES = np.zeros((256, 4), np.int64)  # byte -> (alphabetic, digit, white space, any); bytes of other scripts count as letters
CLASSES[[*range(65, 91), *range(97, 123), *range(128, 256)], 0] = 1
CLASSES[48:58, 1] = CLASSES[[9, 10, 11, 12, 13, 32], 2] = CLASSES[:, 3] = 1
LINE_KINDS = re.compile(r"^[ \t]*(?:(?P<passes>pass\b)|(?P<imports>import\b|from\b.*\bimport\b)|(?P<asserts>assert|self\.assert)|"
                        r"(?P<prints>print\()|(?P<comments>#|//|/?\*)|(?P<bullets>[-*•] ))", re.M)
GENERATED = re.compile(r"@generated|auto-?generated|generated (?:by|from|automatically)|do not (?:edit|modify)", re.I)
STRINGS = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'')
HEX = re.compile(r"\b(?:0[xX][0-9a-fA-F]+|(?=[a-fA-F]*\d)[0-9a-fA-F]{8,})\b")
LONGEST_LINE = 1000


def measure(text, prose=True):
    """The numbers that the rules bound: sizes, shares of characters, shares of lines; some are asked for in prose alone."""
    alphabet, digits, space, size = (np.bincount(np.frombuffer(fim.to_bytes(text), np.uint8), minlength=256) @ CLASSES).tolist()
    lines, words = text.split("\n"), text.split()
    filled = list(filter(None, map(str.strip, lines)))
    kinds = Counter(match.lastgroup for match in LINE_KINDS.finditer(text))
    size, n, w, longest = max(size, 1), max(len(filled), 1), max(len(words), 1), max(map(len, lines))
    phrases = list(zip(words[::3], words[1::3], words[2::3])) if len(words) < 20_000 else []
    return {
        "chars": len(text), "lines": len(lines), "words": len(words),
        "longest line": longest, "mean line": len(text) / len(lines),
        "alphabet": alphabet / size, "alphanumeric": (alphabet + digits) / size, "digits": digits / size, "space": space / size,
        "repeated lines": 1 - len(set(filled)) / n,
        "hex words": len(HEX.findall(text)) / w,  # a long line is out by itself, and looking for strings could take its length squared
        "strings": sum(map(len, STRINGS.findall(text))) / max(len(text), 1) if longest <= LONGEST_LINE else 0.0,
        "generated": len(GENERATED.findall(text[:600])),
        **{kind: kinds[kind] / n for kind in ("passes", "imports", "asserts", "prints", "comments", "bullets")},
    } | ({} if not prose else {
        "mean word": sum(map(len, words)) / w, "symbols": (text.count("#") + text.count("…") + text.count("...")) / w,
        "sentences": sum(line[-1] in ".!?\"'”:;)" for line in filled) / n, "short lines": sum(len(line) <= 30 for line in filled) / n,
        "ellipses": sum(line.endswith(("...", "…")) for line in filled) / n,
        "repeated phrases": 1 - len(set(phrases)) / max(len(phrases), 1),
    })


RULES = {  # name: (languages, what is measured, least, most). Sources: s StarCoder, o OpenCoder, d DeepSeek-Coder, g Gopher, f FineWeb
    "too short": (EVERY, "chars", 50, None),                         # o
    "too few words": (EVERY, "words", 15, None),                     # o has 30; small modules are whole here
    "too many lines": (EVERY, "lines", None, 100_000),               # o
    "long line": (CODE, "longest line", None, LONGEST_LINE),         # s
    "mean line": (CODE, "mean line", 5, 100),                        # s o
    "little alphabet": (CODE, "alphabet", 0.4, None),                # o has 0.5
    "few letters or digits": (EVERY, "alphanumeric", 0.25, None),    # s
    "mostly digits": (EVERY, "digits", None, 0.2),                   # o
    "mostly white space": (CODE, "space", None, 0.6),                # o has 0.5, which deep indentation reaches
    "repeated lines": (CODE, "repeated lines", None, 0.7),           # o
    "hexadecimal": (CODE, "hex words", None, 0.4),                   # o
    "mostly strings": (CODE, "strings", None, 0.6),                  # o
    "mostly comments": (CODE, "comments", None, 0.8),                # o
    "generated": (CODE, "generated", None, 0),                       # s
    "data in markup": (MARKUP, "chars", 50, 5000),                   # d
    "only pass": (PYTHON, "passes", None, 0.05),                     # o
    "only imports": (PYTHON, "imports", None, 0.4),                  # o has 0.3
    "only asserts": (PYTHON, "asserts", None, 0.4),                  # o
    "only prints": (PYTHON, "prints", None, 0.4),                    # o
    "word length": (TEXT, "mean word", 3, 12),                       # g has 10; paths and names are long
    "symbols": (TEXT, "symbols", None, 0.1),                         # g
    "bullets": (WEB, "bullets", None, 0.9),                          # g
    "ellipses": (TEXT, "ellipses", None, 0.3),                       # g
    "repeated text lines": (TEXT, "repeated lines", None, 0.3),      # g
    "repeated phrases": (TEXT, "repeated phrases", None, 0.4),       # g bounds the top n-grams; this is the share of repeated ones
    "no sentences": (WEB, "sentences", 0.12, None),                  # f
    "short lines": (WEB, "short lines", None, 0.67),                 # f
}


def clean(text, language="text"):
    """(text after EDITS, or None where a rule dropped it; the names of the edits and rules that fired)."""
    pieces, fired = FENCED.split(text) if language in TEXT else [text], []  # prose, block, its fence, prose, block, its fence, ..., prose
    for i in range(0, len(pieces), 3):
        for name, (languages, possible, pattern, replacement) in EDITS.items():
            if language in languages and possible(pieces[i]):
                pieces[i], times = pattern.subn(replacement, pieces[i])
                fired += [name] if times and name not in fired else []
    del pieces[2::3]
    text = "".join(pieces)
    numbers = measure(text, language in TEXT)
    broken = [name for name, (languages, what, least, most) in RULES.items() if language in languages
              and (least is not None and numbers[what] < least or most is not None and numbers[what] > most)]
    return (None if broken else text), fired + broken


# ---- syntax ----------------------------------------------------------------------------------------------------------

MACROS, TOLERATED = {"c", "c++"}, 0.05  # share of bytes in faulty nodes; macros are no syntax, elsewhere every fault counts
DEEPEST, SLOWEST_S = 200, 5.0         # nesting of brackets; seconds for one file


def parses(code, language):
    """Does a file have the syntax of its language? True without a grammar; False where it is too deep, too slow, or cut off at its end."""
    if language not in fim.LANGUAGES:
        return True
    data, began = fim.to_bytes(code), time.monotonic()
    if np.cumsum(fim.OPENS.take(np.frombuffer(data, np.uint8)), dtype=np.int32).max(initial=0) > DEEPEST:
        return False
    parser, late = fim.parser(language), lambda *_: time.monotonic() - began > SLOWEST_S
    try:
        root = parser.parse(lambda offset, point: data[offset:offset + 65536], progress_callback=late).root_node
    except (ValueError, AttributeError):  # it was late: some versions raise, some give no tree
        parser.reset()
        return False
    if not root.has_error or language not in MACROS:
        return not root.has_error
    faults, end = fim.matches(root, language, fim.FAULTS), len(data.rstrip())
    return all(node.end_byte < end for node in faults) and sum(node.end_byte - node.start_byte for node in faults) <= TOLERATED * len(data)


# ---- tokens of code, vectorised --------------------------------------------------------------------------------------

U64, U32 = np.uint64, np.uint32
SEEDS = np.random.default_rng(20260101)
BYTE = SEEDS.integers(1, 2**64, 256, dtype=U64)      # a random number a byte; white space is 0, so that it adds nothing
BASE = U64(0x9E3779B97F4A7C15)
KIND = np.full(256, 2, np.uint8)                     # 0 white space, 1 part of a word, 2 a sign, which is a token by itself
KIND[[*range(48, 58), *range(65, 91), 95, *range(97, 123), *range(128, 256)]] = 1
KIND[[9, 10, 11, 12, 13, 32]] = BYTE[[9, 10, 11, 12, 13, 32]] = 0


@functools.cache
def powers(n):
    """BASE^i and BASE^-i modulo 2^64 for i < n."""
    i = np.arange(n, dtype=U64)
    return BASE**i, U64(pow(int(BASE), -1, 2**64))**i


def mix(h):
    h = (h ^ (h >> U64(32))) * U64(0xD6E8FEB86659FD93)
    return h ^ (h >> U64(32))


def lex(text):
    """Words and single signs of a text as numbers: (hash of each token (n,) uint64, its first byte (n,), where that stands (n,))."""
    raw = np.frombuffer(fim.to_bytes(text), np.uint8)
    kind = KIND.take(raw)
    in_word, first = kind == 1, kind > 0
    first[1:] &= ~(in_word[1:] & in_word[:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.empty(0, U64), raw[:0], starts
    # a word's hash is the polynomial sum BYTE[c_k] BASE^-k: all come from one weighted sum over the bytes, cut at the starts
    up, down = powers(1 << max(16, (len(raw) - 1).bit_length()))
    return mix(np.add.reduceat(BYTE.take(raw) * down[:len(raw)], starts) * up[starts]), raw[starts], starts


KEYWORDS = np.unique(lex(" ".join(keyword.kwlist + """abstract boolean byte case catch char const default delete do double enum export
    extends extern final float fn func function goto impl implements include int interface let long match mod mut namespace new override
    package private protected pub public self short signed static string struct super switch template this throw throws trait type typedef
    typename union unsigned use using var virtual void volatile""".split()))[0])


def shapes(text, *sizes):
    """Every window of so many tokens, names and numbers by how far back in it they stood before: renaming changes none (Baker 1993)."""
    token, first, _ = lex(text)
    order = np.argsort(token, kind="stable")
    back, h, found = np.full(len(token), len(token)), np.zeros(len(token), U64), [token[:0]]
    same = np.flatnonzero(token[order[1:]] == token[order[:-1]]) + 1
    back[order[same]] = order[same] - order[same - 1]
    free = (KIND.take(first) == 1) & (KEYWORDS.take(np.searchsorted(KEYWORDS, token), mode="clip") != token)
    for j in range(min(max(sizes), len(token))):  # h: the windows of j + 1 tokens, one for each place where they fit
        near = np.where(back[j:] <= j, back[j:], 0).astype(U64)
        h = h[:len(token) - j] * BASE + np.where(free[j:], near, token[j:])
        found += [mix(h)] * (j + 1 in sizes)
    return np.concatenate(found)


def distinct(h):
    """np.unique, several times as fast."""
    h = np.sort(h)
    return h[np.append(True, h[1:] != h[:-1])] if len(h) else h


def grams(token, n):
    """The hash of every n tokens in a row."""
    return mix(sum(token[i:len(token) - n + 1 + i] * BASE**U64(i) for i in range(n))) if len(token) >= n else token[:0]


def shingles(text):
    """The set of the 5-grams of tokens, as sorted 32-bit hashes. A text of fewer tokens is one shingle."""
    token = lex(text)[0]
    return distinct((grams(token, max(1, min(5, len(token)))) >> U64(32)).astype(U32))


# ---- duplicates: exact, near, renamed --------------------------------------------------------------------------------

# what exact duplicates agree in: the lines, without blank ones and trailing white space
normal = lambda text: "\n".join(filter(None, map(str.rstrip, text.split("\n"))))


def survivors(pairs, rank):
    """Union-find: of each connected group the one of lowest rank is kept. -> for each its survivor's index."""
    parent = list(range(len(rank)))
    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i
    for i, j in pairs:
        a, b = sorted((root(i), root(j)), key=rank.__getitem__)
        parent[b] = a
    return list(map(root, parent))


def equal_pairs(keys):
    """Each index behind the first one that has the same key."""
    first = {}
    return [(first.setdefault(key, i), i) for i, key in enumerate(keys)]


def exact_duplicates(docs):
    """For each text the index of the one kept in its place. The smallest of the equal ones stays, whatever the order."""
    return survivors(equal_pairs(map(normal, docs)), docs)


PERMUTATIONS = SEEDS.integers(0, 2**31, 128, dtype=U32) * U32(2) + U32(1)  # odd: h -> p h mod 2^32 permutes the 32-bit numbers


def signature(shingle_set):
    """MinHash: the smallest shingle under each of 128 permutations. Two sets agree in a place with probability J, their Jaccard."""
    if not len(shingle_set):
        return np.full(len(PERMUTATIONS), 2**32 - 1, U32)
    return np.concatenate([(p[:, None] * shingle_set).min(1) for p in PERMUTATIONS.reshape(-1, 8)])  # 8 at a time: they fit the cache


@functools.cache
def bands(threshold):
    """(b, r): a pair of Jaccard s meets with probability 1 - (1 - s^r)^b. The r with fewest errors, a miss counting double."""
    s, n = np.linspace(0.005, 0.995, 100), len(PERMUTATIONS)
    missed = lambda r: (1 - s**r) ** (n // r)
    r = min(range(1, 33), key=lambda r: np.where(s < threshold, 1 - missed(r), 2 * missed(r)).sum())
    return n // r, r


def meetings(signatures, b, r):
    """Pairs (i, j), i < j, whose signatures agree in all r places of a band. In a crowd of equals: 8 neighbours and the first."""
    pairs = [np.empty((0, 2), np.int64)]
    for band in range(b):
        key = np.zeros(len(signatures), U64)
        for column in signatures[:, band * r:(band + 1) * r].T:
            key = mix(key * BASE + column)
        order = np.argsort(key, kind="stable")
        key, place = key[order], np.arange(len(key))
        start = np.searchsorted(key, key)
        for step in range(1, 9):
            at = np.flatnonzero(key[step:] == key[:-step])
            pairs.append(np.stack([order[at], order[at + step]], 1))
        at = np.flatnonzero(place - start > 8)
        pairs.append(np.stack([order[start[at]], order[at]], 1))
    return np.unique(np.sort(np.concatenate(pairs), 1), axis=0)


def jaccard(a, b):
    """|a & b| / |a | b| of two sorted sets."""
    common = len(a) + len(b) - len(distinct(np.concatenate([a, b])))
    return common / max(len(a) + len(b) - common, 1)


def near_pairs(signatures, read, threshold):
    """Pairs of a Jaccard of at least `threshold`: MinHash finds the candidates, their sets of shingles, read(i), decide."""
    return [(i, j) for i, j in meetings(signatures, *bands(threshold)).tolist() if jaccard(read(i), read(j)) >= threshold]


def near_duplicates(docs, threshold=0.7):
    """Texts whose 5-grams of tokens are that alike. Groups are transitive; the longest text of each stays, whatever their order."""
    sets, rank = list(map(shingles, docs)), [(-len(text), text) for text in docs]
    signatures = np.array(list(map(signature, sets)), U32).reshape(len(docs), len(PERMUTATIONS))
    return survivors(near_pairs(signatures, sets.__getitem__, threshold), rank)


EMBEDDING, SHAPE_SHARE = 256, 0.7


def project(h, weight, salt):
    """A bag of hashes as a unit vector: each adds +-sqrt(its count) to four of the places, by hash (a sparse random projection)."""
    v = np.zeros(EMBEDDING)
    h, count = np.unique(h, return_counts=True)
    for i in range(4):
        g = mix(h ^ U64(salt * 8191 + i * 131071 + 1))
        v += np.bincount((g >> U64(40)).astype(np.int64) % EMBEDDING, np.where(g & U64(1), 1, -1) * np.sqrt(count), EMBEDDING)
    return v * (weight**0.5 / max(np.linalg.norm(v), 1e-9))


def embed(texts, model=None, tokenizer=None, teacher=None):
    """
    Unit vectors (n, width), whose cosine says how alike two texts are. Without a model: 70 % shapes of 4 and 10 tokens, which survive
    renaming, and 30 % words, which keep two import lists apart. With one: its mean hidden state. With a teacher: its /v1/embeddings.
    """
    if teacher:
        reply = teacher.session.post(f"{teacher.url}/embeddings", json={"model": teacher.model, "input": list(texts)}, timeout=120)
        reply.raise_for_status()
        rows = np.array([row["embedding"] for row in sorted(reply.json()["data"], key=lambda row: row["index"])], np.float32)
    elif model is not None:
        with torch.no_grad():
            ids = (torch.tensor([tokenizer.encode(text)[:512] or [0]]) for text in texts)
            rows = np.stack([model.hidden(row)[0].float().mean(0).numpy() for row in ids])
        rows = rows - rows.mean(0)  # what all hidden states share says nothing
    else:
        rows = np.zeros((len(texts), 2 * EMBEDDING), np.float32)
        for row, text in zip(rows, texts):
            text = re.sub(r"(?:#|//).*", "", text)  # a copy that was renamed was commented anew, too
            token, first, _ = lex(text)
            row[:EMBEDDING] = project(shapes(text, 4, 10), SHAPE_SHARE, 1)
            row[EMBEDDING:] = project(token[KIND.take(first) == 1], 1 - SHAPE_SHARE, 2)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def embedding_duplicates(vectors, threshold=0.8, block=1024):
    """Of unit vectors each goes that has a cosine of `threshold` to one that stays: no chains, which in this space lead anywhere."""
    vectors = np.ascontiguousarray(vectors, np.float32)  # they are judged in the order of their bytes, not of the input
    order = np.array(sorted(range(len(vectors)), key=lambda i: vectors[i].tobytes()), int)
    vectors, kept, stays = vectors[order], np.arange(len(vectors)), np.ones(len(vectors), bool)
    for start in range(0, len(vectors), block):            # block by block: memory stays bounded
        for other in range(0, start + 1, block):
            close = vectors[start:start + block] @ vectors[other:other + block].T >= threshold
            for i in (start + np.flatnonzero(close.any(1) & stays[start:start + block])).tolist():
                first = other + np.argmax(close[i - start] & stays[other:other + block])  # it stays, if there is one that does
                if stays[first] and close[i - start, first - other] and first < i:
                    kept[i], stays[i] = first, False
    found = np.empty(len(order), int)
    found[order] = order[kept]
    return found.tolist()


# ---- decontamination -------------------------------------------------------------------------------------------------


def words_in_a_row(text):
    token, first, _ = lex(text.lower())
    return distinct(grams(token[KIND.take(first) == 1], 10))


class Decontaminator:
    """
    Does a text touch a benchmark? Three looks at each item's texts: any 10 words in a row that are an item's too (Seed-Coder's length);
    60 % of an item's shingles; 70 % of its shapes of 12 tokens, which finds a solution inside a larger file with everything renamed.
    What stands in more than two items proves nothing and does not count; an item with fewer than 8 left is seen by its words alone.
    """
    def __init__(self, benchmarks):
        items = [(name, text) for name, texts in sorted(benchmarks.items()) for text in texts]
        self.names, self.looks = [name for name, _ in items], []  # (look, sorted hashes, item of each, how many an item must share)
        for look, share in ((words_in_a_row, 0.0), (shingles, 0.6), (lambda text: distinct(shapes(text, 12)), 0.7)):
            found = [look(text) for _, text in items]
            hashes, item = np.concatenate([*found, np.empty(0, U64)]), np.repeat(np.arange(len(found)), list(map(len, found)))
            order = np.argsort(hashes, kind="stable")
            hashes, item = hashes[order], item[order]
            rare = np.searchsorted(hashes, hashes, "right") - np.searchsorted(hashes, hashes) <= 2
            size = np.bincount(item[rare], minlength=len(found))
            self.looks.append((look, hashes[rare], item[rare], np.where((size < 8) & (share > 0), np.inf, np.maximum(share * size, 1))))

    def overlaps(self, text):
        """The names of the benchmarks that a text touches, sorted."""
        touched = set()
        for look, hashes, item, needed in self.looks:
            if len(mine := look(text)):
                hit = mine.take(np.searchsorted(mine, hashes), mode="clip") == hashes
                touched |= {self.names[i] for i in np.flatnonzero(np.bincount(item[hit], minlength=len(self.names)) >= needed)}
        return sorted(touched)


# ---- quality: an oracle, and proxies of it ---------------------------------------------------------------------------


def code_rubric(text):
    """Readability, modularity, clarity, reusability of Python as ten shares, from the syntax tree; None where the text does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the corpus' own oddities
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes, lines = list(ast.walk(tree)), text.count("\n") + 1
    of = lambda *kinds: [n for n in nodes if isinstance(n, kinds)]
    functions, public = of(ast.FunctionDef, ast.AsyncFunctionDef), [n for n in of(ast.FunctionDef, ast.ClassDef) if n.name[0] != "_"]
    names = [n.id for n in of(ast.Name) if isinstance(n.ctx, ast.Store)] + [n.arg for n in of(ast.arg)]
    share = lambda good, among, empty=0.5: sum(map(bool, map(good, among))) / len(among) if among else empty
    return [
        share(ast.get_docstring, public), ast.get_docstring(tree) is not None,
        share(lambda n: n.end_lineno - n.lineno <= 40, functions), share(lambda n: len(n.args.args) <= 5, functions),
        min(1, len(functions) / max(lines / 40, 1)), share(lambda name: 3 <= len(name) <= 24, names),
        share(lambda n: n.type, of(ast.ExceptHandler), 1), min(1, 10 * len(re.findall(r"^\s*#", text, re.M)) / lines),
        share(lambda n: n.returns or any(a.annotation for a in n.args.args), functions),
        not of(ast.Global) and not any(n.names[0].name == "*" for n in of(ast.ImportFrom))]


def text_rubric(text):
    """Prose that explains, as shares: whole sentences of a readable length, varied words, few marks, examples beside the words."""
    sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", text) if len(s.split()) > 2]
    words = re.findall(r"[^\W\d_]{2,}", text.lower())
    if not words or not sentences:
        return [0.0] * 7
    return [
        np.mean([8 <= len(s) <= 30 for s in sentences]), np.mean([s[0][0].isupper() and s[-1][-1] in ".!?:" for s in sentences]),
        min(1, len(set(words[:200])) / min(len(words), 200) / 0.6), min(1, len(words) / 150), sum(map(len, words)) / len(text) > 0.6,
        bool(re.search(r"because|so that|therefore|for example|note that|in order to|which means|if the", text, re.I)),
        ">>>" in text or "::" in text]


def maths_rubric(text):
    """Mathematics that can be followed, as shares: its equations hold where they can be computed, steps are linked, terms are defined."""
    held = []
    for left, right in re.findall(r"([-+*/^() \d.]{3,60})=\s*(-?\d+(?:\.\d+)?)(?![\d*/^+-])", text):
        with contextlib.suppress(ValueError, ArithmeticError, TypeError):  # TypeError: 1/0 has a value there, which is no float
            held.append(abs(float(tasks.formula(left.strip().replace("^", "**"))) - float(right)) < 1e-6)
    words = max(len(text.split()), 1)
    linked = re.findall(r"\b(?:let|then|hence|since|thus|where|if|suppose|returns?|given|equals?)\b", text, re.I)
    return [
        np.mean(held) if held else 0.3, min(1, 40 * text.count("=") / words), min(1, 25 * len(linked) / words),
        bool(re.search(r"theorem|lemma|proof|defin|formula|matrix|polynomial|integral", text, re.I)),
        bool(re.search(r">>>|example|\\frac|\$", text, re.I)), min(1, words / 120)]


RUBRICS = {"code": code_rubric, "text": text_rubric, "maths": maths_rubric}
MATHS = re.compile(r"\b(?:matri|polynom|equation|theorem|integral|derivative|algebra|prime|eigen|vector|coefficient|"
                   r"probabilit|distribution)", re.I)
DOCSTRING = re.compile(r'"""((?:[^"\\]|\\.|"(?!""))*)"""', re.S)


def samples_of(doc):
    """(kind, text) of a document: code itself, and the longer docstrings of Python as text, or as maths where they speak of it."""
    yield ("text" if doc.language in TEXT else "code"), doc.text
    if doc.language == "python":
        for found in DOCSTRING.finditer(doc.text):  # all of them, also the short ones: else a match could begin at an end
            if len(found[1]) >= 300:
                text = inspect.cleandoc(found[1])
                yield ("maths" if len(MATHS.findall(text)) >= 3 else "text"), text


PLACE = 256 + len(KEYWORDS) + 100    # kinds of token: signs, keywords, names and numbers by their length
first_lines = lambda text: "\n".join([line for line in text.split("\n") if line.strip()][:256])  # what both scorers read


class NgramScorer:
    """The baseline, fastText's idea: counts of hashed 1- to 3-grams of tokens (square roots, unit length), and a ridge regression."""
    PLACES = 1 << 13

    def __init__(self, texts, goals, tokenizer):
        scores = np.sum(goals, 1)
        self.tokenizer, self.mean = tokenizer, np.mean(scores)
        x = self.features(texts)
        self.weight = x.T @ np.linalg.solve(x @ x.T + np.eye(len(x), dtype=np.float32), (scores - self.mean).astype(np.float32))

    def features(self, texts):
        x = np.zeros((len(texts), self.PLACES), np.float32)
        for out, text in zip(x, texts):
            ids = np.asarray(self.tokenizer.encode(first_lines(text)), U64) + U64(1)  # 0 would add nothing
            found = np.concatenate([grams(ids, n) for n in (1, 2, 3)])
            out[:] = np.sqrt(np.bincount((found % U64(self.PLACES)).astype(np.int64), minlength=self.PLACES))
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    def __call__(self, texts):
        return self.features(texts) @ self.weight + self.mean


def line_marks(text, width=16):
    """A text as a proxy reads it, (lines, width): of each line the indentation, the length, then the first tokens by kind and place."""
    raw, (token, first, at) = np.frombuffer(fim.to_bytes(first_lines(text)), np.uint8), lex(first_lines(text))
    if not len(at):
        return np.zeros((1, width), np.int64)
    begins = np.append(0, np.flatnonzero(raw == 10) + 1)
    line = np.searchsorted(begins, at, side="right") - 1
    place = np.arange(len(at)) - np.searchsorted(line, line)                      # 0 for the first token of a line, 1, 2, ...
    key = np.searchsorted(KEYWORDS, token)
    kind = (first // 32 == 2) + 2 * (first // 16 == 3)                            # a capital (or _), a digit
    # of a name or number only length and kind: what names mean, a few hundred documents cannot teach
    name = 256 + len(KEYWORDS) + np.minimum(np.diff(at, append=len(raw)), 24) + 25 * kind
    mark = np.where(KEYWORDS.take(key, mode="clip") == token, 256 + key, np.where(KIND.take(first) == 2, first, name))
    marks, shown = np.zeros((len(begins), width), np.int64), place < width - 2
    marks[line[shown], 2 + place[shown]] = 1 + mark[shown] + PLACE * np.minimum(place[shown], 2)
    marks[:, 0] = 1 + 3 * PLACE + np.minimum(at[np.searchsorted(at, begins)] - begins, 31)
    marks[:, 1] = 33 + 3 * PLACE + np.minimum(np.diff(begins, append=len(raw)) // 8, 15)
    return marks


@contextlib.contextmanager
def one_thread():
    """So small a model waits for its threads longer than it computes; and its sums come out the same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Proxy:
    """A small transformer of model.py's blocks over lines; their mean and maximum say the oracle's shares, whose sum is the score."""
    @one_thread()
    @torch.random.fork_rng(devices=())
    def __init__(self, texts, goals, width=64, epochs=10, batch=32, crop=64):
        goals, rng = np.asarray(goals, float), np.random.default_rng(0)
        torch.manual_seed(0)
        self.config = LoopCoderConfig(vocab_size=8, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
                                      num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4, loop_num=1)
        self.marks = torch.nn.EmbeddingBag(1 + 3 * PLACE + 48, width, mode="mean", padding_idx=0)
        self.block, self.norm, self.head = Block(self.config), Norm(self.config), torch.nn.Linear(2 * width, goals.shape[1])
        parameters = [p for part in (self.marks, self.block, self.norm, self.head) for p in part.parameters()]
        torch.nn.init.normal_(self.marks.weight, std=0.1)
        self.mean, self.spread = goals.mean(0), np.maximum(goals.std(0), 1e-6)
        wanted = torch.tensor((goals - self.mean) / self.spread, dtype=torch.float32)
        weight = torch.tensor(self.spread / self.spread.sum(), dtype=torch.float32)   # a share that varies decides more of the sum
        optimizer = torch.optim.AdamW(parameters, 4e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * math.ceil(len(texts) / batch) + 1)
        rows = [line_marks(text) for text in texts]
        for _ in range(epochs):
            for chosen in np.split(rng.permutation(len(rows)), range(batch, len(rows), batch)):
                pieces = []
                for row in (rows[i] for i in chosen):                                 # half of the time the beginning, else another part
                    start = rng.integers(max(len(row) - crop, 0) + 1) * (rng.random() < 0.5)
                    pieces.append(row[start:start + crop] * (rng.random(row[start:start + crop].shape) > 0.1))
                loss = ((self.forward(pieces) - wanted[chosen])**2 * weight).sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()

    def forward(self, rows):
        """rows of marks (lines, width) -> (B, shares), each in its own spread around its own mean."""
        marks = torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, rows)), batch_first=True)              # (B, T, width)
        lines = torch.arange(marks.shape[1]).expand(marks.shape[:2])
        counts = lines < torch.tensor(list(map(len, rows)))[:, None]
        h = self.marks(marks.flatten(0, 1)).view(*marks.shape[:2], -1)                                            # (B, T, C)
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=counts[:, None, None])
        h = self.norm(self.block(h, *rotary_table(lines, self.config.head_dim, self.config.rope_theta), attend)[0])
        counts = counts[..., None].float()
        return self.head(torch.cat([(h * counts).sum(1) / counts.sum(1), (h + (counts - 1) * 1e4).amax(1)], 1))

    @one_thread()
    @torch.no_grad()
    def __call__(self, texts):
        rows, shares = [line_marks(text) for text in texts], np.zeros((len(texts), len(self.mean)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for at in range(0, len(rows), 64):
            shares[order[at:at + 64]] = self.forward([rows[i] for i in order[at:at + 64]]).numpy()
        return (shares * self.spread + self.mean).sum(1)


def ranks(values):
    """Ranks from 0, ties sharing their mean."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[inverse]


spearman = lambda a, b: float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def auc(scores, good):
    """The probability that a good one scores above a bad one."""
    good = np.asarray(good, bool)
    return float((ranks(scores)[good].sum() - good.sum() * (good.sum() - 1) / 2) / max(good.sum() * (~good).sum(), 1))


def ask(teacher, prompt, n=1):
    """The teacher's n answers; an empty one where it gives none or its budget is spent."""
    try:
        return teacher.ask(prompt, n) or [""]
    except tasks.BudgetSpent:
        return [""]


def teacher_score(teacher, kind, text):
    """A larger model's opinion, as the one share of a rubric; None where it gave no number."""
    number = re.search(r"\d+(?:\.\d+)?", ask(teacher, f"Rate this {kind} for readability, clarity and usefulness as training text. "
                                                      f"Answer with a number from 0 to 10.\n\n{text[:6000]}")[0])
    return [min(float(number[0]) / 10, 1.0)] if number else None


def quality_table(docs, tokenizer, teacher=None, kinds=tuple(RUBRICS), most=1500, log=print):
    """Train proxies and their baselines on some projects, print AUC and Spearman on others -> {kind: the scorer that was better there}."""
    found, better = defaultdict(dict), {}
    for doc in docs:
        for kind, text in samples_of(doc):
            if kind in kinds and (kind != "code" or doc.language == "python") and len(found[kind]) < most:
                found[kind][digest(text)] = doc.project, text
    for kind in kinds:
        rows = {True: [], False: []}  # by whether the source is held out: the texts with their shares
        for _, (project, text) in sorted(found[kind].items()):
            if shares := teacher_score(teacher, kind, text) if teacher else RUBRICS[kind](text):  # the oracle
                rows[digest(project) % 4 == 0].append((text, np.array(shares, float) * 10 / len(shares)))
        size = f"{len(rows[False])} documents, held-out sources {len(rows[True])}"
        if len(rows[False]) < 64 or len(rows[True]) < 16:
            log(f"proxy   {kind}: {size}: too few; left out")
            continue
        (texts, goals), (unseen, truth), marks = zip(*rows[False]), zip(*rows[True]), {}
        truth = np.sum(truth, 1)
        for name, scorer in (("proxy", Proxy(texts, goals)), ("n-grams", NgramScorer(texts, goals, tokenizer))):
            scores = scorer(unseen)
            marks[name] = auc(scores, truth > np.median(truth)), spearman(scores, truth), scorer
            log(f"{name:8s}{kind}: {size}: AUC {marks[name][0]:.3f}, Spearman {marks[name][1]:.3f}")
        best = max(marks, key=lambda name: marks[name][:2])
        better[kind] = marks[best][2]
        log(f"chosen  {kind}: {best}, the better one on sources not seen")
    return better


# ---- how much of which language --------------------------------------------------------------------------------------

LAW = {  # IQuest-Coder-V1 report and arXiv 2512.13472; tokens in billions. The optimised shares are the report's allocation of 350.
    "languages": ["python", "java", "javascript", "typescript", "c#", "go", "rust"],
    "optimised": np.array([76.77, 55.60, 44.19, 41.17, 36.51, 45.76, 50.00]),
    "alpha_N": np.array([0.221, 0.447, 0.692, 0.439, 0.321, 0.845, 0.643]),
    "alpha_D": np.array([1.217, 1.129, 1.247, 1.303, 1.350, 1.149, 1.297]),
    "floor": np.array([0.566, 0.397, 0.554, 0.518, 0.288, 0.414, 0.397]),
    "synergy": np.array([  # tau: row = the language that gains, column = the one that helps; shares, not percent
        [0, 1.36, -1.12, -0.95, -1.69, -2.13, -2.72], [6.02, 0, 12.62, 12.08, 20.58, 10.68, 12.41], [5.49, 2.98, 0, 4.69, 2.44, 1.34, 2.56],
        [4.17, 2.29, 3.34, 0, 1.68, 1.39, 1.18], [3.84, 1.93, 3.10, 3.71, 0, 1.87, 1.98], [4.77, 2.95, 2.70, 4.41, 2.95, 0, 2.86],
        [3.87, 2.89, 4.20, 4.05, 2.81, 2.80, 0]]) / 100,
}
LAW["B"] = LAW["optimised"] ** (LAW["alpha_D"] + 1) / LAW["alpha_D"]  # the data terms for which that allocation is the optimum
LAW["B"] /= LAW["B"].mean()


def printed_law(n_params, tokens, shares, A=1.0, B=1.0, gamma=1.0):
    """The report's law, A N^-alpha_N(p) + B (D (1 + gamma p tau p))^-alpha_D(p) + floor(p); minimised over p it goes to one language."""
    p = np.asarray(shares, float) / np.sum(shares)
    effective = tokens * (1 + gamma * p @ LAW["synergy"] @ p)
    return float(A * n_params ** -(p @ LAW["alpha_N"]) + B * effective ** -(p @ LAW["alpha_D"]) + p @ LAW["floor"])


def solve_mixture(budget, B, alpha, tau=0.0, gamma=0.0, available=np.inf):
    """
    Tokens D of each language that minimise the mean loss over *all* languages, the question that has an answer:
        sum_k B_k (D_k + gamma sum_j tau_kj D_j)^-alpha_k    with sum_k D_k = budget, D_k <= available_k
    At the optimum one more token is worth the same everywhere; the steps move log D towards that, and full languages stay full.
    """
    available = np.clip(np.broadcast_to(available, np.shape(B)), 1e-9 * budget, budget)
    share, D = np.eye(len(B)) + gamma * np.asarray(tau), np.minimum(budget / len(B), available)
    for _ in range(2000):
        worth = share.T @ (B * alpha * np.maximum(share @ D, 1e-12 * budget) ** (-alpha - 1))  # - d loss / d D_j
        D = D * np.maximum(worth / worth.mean(), 1e-9) ** 0.3
        D = np.minimum(available, D * min(fair_cap(available, budget, D), 1e9))
    return D


def language_mixture(available, budget):
    """{language: tokens available} -> {language: tokens to take}: the report's shares; what one lacks goes to the others in proportion."""
    weight = dict(zip(LAW["languages"], LAW["optimised"].tolist()))
    if unknown := set(available) - set(weight):
        raise ValueError(f"no law for {', '.join(sorted(unknown))}: it knows {', '.join(LAW['languages'])}")
    cap = fair_cap(available.values(), budget, [weight[name] for name in available])
    return {name: min(size, cap * weight[name]) for name, size in available.items()}


EXPONENTS = np.geomspace(0.02, 3, 150)  # 3 % apart; a smaller power looks like a logarithm, a larger one like a step


def refit(points):
    """
    Fit L = A N^-a + B D^-b + floor with A, B, floor >= 0 to [(parameters, tokens, loss)] by least squares. For each pair of exponents of
    a grid the rest is linear: of the normal equations of every choice of terms the best solution without a negative one is taken.
    `N_range` and `D_range` hold the exponents that fit as well, by an F test at 95 %; one that ends where EXPONENTS does is open.
    """
    n, d, loss = np.array(points, float).T
    a, b = map(np.ravel, np.meshgrid(EXPONENTS, EXPONENTS, indexing="ij"))
    design = np.stack([(n / n.max()) ** -a[:, None], (d / d.max()) ** -b[:, None], np.ones((len(a), len(n)))], 2)  # (pairs, points, 3)
    weight, error = np.zeros((len(a), 3)), np.full(len(a), np.inf)
    for terms in ([2], [0], [1], [0, 2], [1, 2], [0, 1], [0, 1, 2]):
        x = design[..., terms]
        found = np.linalg.solve(x.mT @ x + 1e-12 * np.eye(len(terms)), (x.mT @ loss)[..., None])[..., 0]
        off = (((x @ found[..., None])[..., 0] - loss) ** 2).sum(1)
        better = (found >= 0).all(1) & (off < 0.999 * error)  # a further term must earn its place
        weight[better], error[better] = 0, off[better]
        weight[np.ix_(better, terms)] = found[better]
    best, free = error.argmin(), len(loss) - 5
    (A, B, floor), a, b = weight[best].tolist(), a[best] * (weight[best, 0] > 0), b[best]
    if A == B == 0:
        raise ValueError(f"no falling law fits these {len(points)} losses: {points[:3]}...; train longer or on more sizes")
    t = 1.96 + 2.372 / max(free, 1) + 2.823 / max(free, 1) ** 2  # Student's at 95 %, by its expansion (Abramowitz and Stegun 26.7.5)
    fits = (error <= error[best] * (1 + t**2 / free) if free > 0 else error < np.inf).reshape(len(EXPONENTS), -1)
    # a step more on both sides: the truth lies between those of the grid
    n_range, d_range = (EXPONENTS[np.convolve(fits.any(axis), [1, 1, 1], "same") > 0][[0, -1]].tolist() for axis in (1, 0))
    return {"rms": (error[best] / len(loss)) ** 0.5, "A": A * n.max()**a, "B": B * d.max()**b, "floor": floor, "alpha_N": a, "alpha_D": b,
            "N_range": n_range, "D_range": d_range}


def show_law(language, points):
    """The fitted law in one line, and one for each exponent: how sure it is, or that these runs do not determine it."""
    law = refit(points)
    print("{}: loss = {A:.4g} N^-{alpha_N:.3f} + {B:.4g} D^-{alpha_D:.3f} + {floor:.3f}; error {rms:.4f} (rms) over {} losses".format(
        language, len(points), **law))
    for name in "ND":
        low, high = law[f"{name}_range"]
        print(f"  alpha_{name} " + (f"lies between {low:.3f} and {high:.3f} (95 %)" if EXPONENTS[0] < low <= high < EXPONENTS[-1] else
              f"is not determined by these runs: all from {low:.3f} to {high:.3f} fit as well (95 %); train more sizes, and longer"))


def small_runs(folder, widths=(16, 32, 64, 128), steps=120, batch=8, context=256, tests=48):
    """[(language, parameters, tokens, loss)]: dense models on each large language; all sizes see the same batches and test rows."""
    file, tokenizer, rows = TokenFile(Path(folder) / "train", "code"), Tokenizer.load(Path(folder) / "tokenizer"), []
    taken, size, needed = defaultdict(list), Counter(), int(1.05 * (steps * batch + tests) * context)
    for i in np.random.default_rng(0).permutation(len(file.lengths)).tolist():
        if size[language := file.language(i)] < needed:
            taken[language].append(file.ids(i))
            size[language] += len(taken[language][-1])
    if not (large := sorted(language for language in size if size[language] >= needed)):
        raise ValueError(f"{folder}: no language has {needed} tokens to train on; build a larger corpus")
    for language, width in itertools.product(large, widths):
        torch.manual_seed(0)
        model = LoopCoder(LoopCoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=3 * width, loop_num=1,
                                          num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=width // 2))
        parameters = sum(p.numel() for p in model.model.layers.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        packed = list(map(torch.from_numpy, pack(taken[language], context)))
        order = torch.randperm(len(packed[0]), generator=torch.Generator().manual_seed(0))
        test, training = order[:tests], order[tests:tests + steps * batch]
        for step, chosen in enumerate(training.split(batch), 1):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 10)  # then constant: every length is a run of its own
            loss = model.loss(*(x[chosen] for x in packed))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % (steps // 4) == 0:
                with torch.no_grad():
                    rows.append((language, parameters, step * batch * context, model.loss(*(x[test] for x in packed)).item()))
        print("refit   {:12s}{:8d} parameters {:8d} tokens: loss {:.3f}".format(*rows[-1]), flush=True)
    return rows


# ---- facts with one answer -------------------------------------------------------------------------------------------

FACT_MODULES = """argparse ast base64 bisect calendar collections contextlib copy csv dataclasses datetime decimal difflib enum fractions
    functools gzip hashlib heapq html inspect io itertools json logging math operator pathlib pickle queue random re sched secrets shlex
    shutil socket sqlite3 statistics string struct subprocess tempfile textwrap threading time timeit tokenize traceback types typing
    unittest urllib.parse uuid weakref zipfile""".split()
CHANGING = re.compile(r"versionadded|versionchanged|\bversions? \d|python \d|deprecat|platform|windows|unix|linux|today|changed in|new in|"
                      r"locale", re.I)


class Fact(NamedTuple):
    question: str
    answer: str
    check: tuple       # what introspection looks up again: (form, module, name, parameter)


ASK = {
    "module": "Which module of Python's standard library defines `{name}`?",
    "default": "In Python, what is the default value of the parameter `{parameter}` of `{module}.{name}`?",
    "base": "In Python, what is the direct base class of `{module}.{name}`?",
    "required": "In Python, how many positional arguments does `{module}.{name}` require?",
}


def look_up(form, module, name, parameter=""):
    """The answer that the running Python gives, or None: what is not there, or has no answer of one short line."""
    thing = getattr(importlib.import_module(module), name, None)
    with contextlib.suppress(ValueError, TypeError):
        if form == "module":
            return module if getattr(thing, "__module__", None) in (module, f"_{module}") else None
        if form == "base":
            bases = [b.__name__ for b in thing.__bases__ if b is not object] if inspect.isclass(thing) else []
            return bases[0] if len(bases) == 1 else None
        parameters = inspect.signature(thing).parameters
        if form == "required":
            return str(sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values()))
        default = parameters[parameter].default
        return repr(default) if isinstance(default, (int, float, str, type(None))) and len(repr(default)) < 30 else None


def objective(fact, owners):
    """One answer, for all time: the name belongs to one module, and neither question, answer nor documentation speaks of change."""
    form, module, name, _ = fact.check
    doc = inspect.getdoc(getattr(importlib.import_module(module), name, None)) or ""
    one, plain = form != "module" or owners[name] == 1, not re.search(r"0x|/|\\", fact.answer)
    return one and plain and not CHANGING.search(doc) and look_up(*fact.check) == fact.answer


def code_facts(count=500, teacher=None):
    """CodeSimpleQA-like questions from signatures, checked by introspection; clusters of like ones take turns. A teacher rephrases."""
    if count < 0:
        raise ValueError(f"{count} facts: ask for a positive number")
    owners, checks = Counter(), []
    for module, known in ((module, importlib.import_module(module)) for module in FACT_MODULES):
        for name in getattr(known, "__all__", None) or [name for name in vars(known) if not name.startswith("_")]:
            if callable(thing := getattr(known, name, None)) and look_up("module", module, name):
                owners[name] += 1
                checks += [(form, module, name, "") for form in ("module", "base", "required")[:2 if inspect.isclass(thing) else 3]]
                with contextlib.suppress(ValueError, TypeError):
                    checks += [("default", module, name, parameter) for parameter in inspect.signature(thing).parameters]
    facts = [Fact(ASK[form].format(module=module, name=name, parameter=parameter), answer, (form, module, name, parameter))
             for form, module, name, parameter in checks if (answer := look_up(form, module, name, parameter)) is not None]
    facts = sorted((fact for fact in facts if objective(fact, owners)), key=lambda fact: digest(fact.question))
    vectors = embed([f"{fact.check[0]} {fact.check[1]} {fact.question}" for fact in facts])
    centres, clusters = vectors[:32], defaultdict(list)
    for _ in range(5):
        nearest = (vectors @ centres.T).argmax(1)
        centres = np.stack([vectors[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(len(centres))])
    for fact, cluster in zip(facts, nearest.tolist()):
        clusters[cluster].append(fact)
    chosen = [fact for turn in itertools.zip_longest(*clusters.values()) for fact in turn if fact][:count]
    return [rephrased(teacher, fact) for fact in chosen] if teacher else chosen


def rephrased(teacher, fact):
    """The teacher's wording where, asked without the answer, it gives that answer; else ours."""
    question = ask(teacher, f"Rephrase this question, keeping its one answer. Reply with the question alone.\n{fact.question}")[0].strip()
    answers = ask(teacher, f"{question}\nReply with the answer alone.", 2) if question else [""]
    return fact._replace(question=question) if all(a.strip().strip("`") == fact.answer for a in answers) else fact


# ---- tokenizer -------------------------------------------------------------------------------------------------------

# A word with the one character before it, a single digit, a run of signs, a line end with the indentation that follows, white
# space. Repeats of white space are bounded: an unbounded run would overflow the stack of tiktoken's backtracking.
SPLIT = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|"
         r"\s{0,255}[\r\n][^\S\r\n]{0,255}|\s{1,255}(?!\S)|\s{1,255}")


def count_words(texts):
    """How often each piece of SPLIT occurs: all that BPE needs to know of a corpus."""
    return Counter(itertools.chain.from_iterable(map(regex.compile(SPLIT).findall, texts)))


def train_bpe(counts, merges):
    """
    Count all neighbouring pairs of symbols, join the most frequent one everywhere (of equals the smaller ids), repeat: -> the list of
    (left id, right id). All words lie end to end in one array of symbols, linked to the next and the previous living one. Joining a pair
    only ever destroys older pairs, so a pair's count is right when it is made and too high later: it waits in a heap under that old count
    with the places where it stood, and is counted again when it comes to the top.
    """
    encoded = [word.encode() for word in counts]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1
    symbol = np.frombuffer(b"\0".join(encoded) + b"\0\0", np.uint8).astype(np.int32)  # the last one stands for "no neighbour"
    symbol[np.cumsum(lengths) - 1] = symbol[-1] = -1                                  # -1 ends a word, -2 is joined to its left
    weight = np.append(np.repeat(np.fromiter(counts.values(), np.int64, len(encoded)), lengths), 0)
    following = np.minimum(np.arange(1, len(symbol) + 1), len(symbol) - 1)
    before = np.arange(-1, len(symbol) - 1)
    places, heap = {}, []                              # pair -> positions of its left symbol; (-count, pair)

    def note(left, first, second):
        """Enter the pairs (first[i], second[i]), whose left symbols stand at left[i]."""
        pair = first.astype(np.int64) << 32 | second
        order = np.argsort(pair, kind="stable")
        pair, left = pair[order], left[order]
        starts = np.flatnonzero(np.diff(pair, prepend=-1))
        totals = np.add.reduceat(weight[left], starts).tolist() if len(starts) else []
        for key, start, stop, total in zip(pair[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), len(pair)], totals):
            if total > 1:
                places[key] = left[start:stop]
                heapq.heappush(heap, (-total, key))

    left = np.flatnonzero((symbol[:-1] >= 0) & (symbol[1:] >= 0))
    note(left, symbol[left], symbol[left + 1])
    found = []
    while len(found) < merges and heap:
        _, pair = heapq.heappop(heap)
        a, b = pair >> 32, pair & 0xFFFFFFFF
        here = places.pop(pair)
        here = here[(symbol[here] == a) & (symbol[following[here]] == b)]
        total = int(weight[here].sum())
        if total < 2:
            continue
        if heap and (-total, pair) > heap[0]:          # others have overtaken it: back with the true count
            places[pair] = here
            heapq.heappush(heap, (-total, pair))
            continue
        if a == b:                                     # in a run "aaaa" every second one is a left symbol
            here = np.sort(here)
            in_run = np.append(False, following[here[:-1]] == here[1:])
            rank = np.arange(len(here))
            here = here[(rank - np.maximum.accumulate(np.where(in_run, 0, rank))) % 2 == 0]
        new = 256 + len(found)
        found.append((a, b))
        gone, after = following[here], following[following[here]]
        symbol[here], symbol[gone] = new, -2
        following[here], before[after] = after, here
        left, right = symbol[before[here]], symbol[after]
        has_right, has_left = right >= 0, (left >= 0) & (left != new)   # (new, new) is entered once, from its left
        note(np.concatenate([here[has_right], before[here][has_left]]),
             np.concatenate([np.full(has_right.sum(), new), left[has_left]]),
             np.concatenate([right[has_right], np.full(has_left.sum(), new)]))
    return found


# Hugging Face's stand-in for each byte: itself where it prints, else a character from 256 up
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_NAMES = dict(zip([*PRINTABLE, *sorted(set(range(256)) - set(PRINTABLE))], map(chr, [*PRINTABLE, *range(256, 324)])))
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Tokenizer:
    """Byte-level BPE: 256 bytes, the merges, then the special tokens, which no text ever becomes: they enter as parts that say so."""
    def __init__(self, tokens):
        self.tokens, self.vocab_size = tokens, len(tokens) + len(SPECIAL)
        self.special = {name: len(tokens) + i for i, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding("nanoloopcoder", pat_str=SPLIT, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                                          special_tokens=self.special)

    @classmethod
    def train(cls, texts, vocab_size):
        wanted = vocab_size - 256 - len(SPECIAL)
        if wanted < 0:
            raise ValueError(f"vocab_size={vocab_size} is below {256 + len(SPECIAL)}: 256 bytes and {len(SPECIAL)} special tokens")
        tokens, merges = [bytes([b]) for b in range(256)], train_bpe(count_words(texts), wanted)
        if len(merges) < wanted:
            raise ValueError(f"vocab_size={vocab_size} is more than the corpus can fill: it gives {256 + len(merges) + len(SPECIAL)}; "
                             f"ask for less, or give more text")
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        return cls(tokens)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def length(self, text):
        return len(self.encode(text))

    def encode_parts(self, parts):
        """[(text, is_special, in_loss)] -> (ids, in_loss of each id)."""
        ids, in_loss = [], []
        for text, is_special, counts in parts:
            new = [self.special[text]] if is_special else self.encode(text)
            ids += new
            in_loss += [counts] * len(new)
        return ids, in_loss

    def decode(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids]).decode("utf-8", "replace")

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json, which `tokenizers` and `transformers` read too."""
        folder, shown = Path(folder), ["".join(map(BYTE_NAMES.get, token)) for token in self.tokens]
        folder.mkdir(parents=True, exist_ok=True)
        ids, merges = {token: i for i, token in enumerate(self.tokens)}, []
        for token in self.tokens[256:]:  # tiktoken joins any two neighbours that make a token: so every such pair is a merge
            pairs = [(ids.get(token[:i]), ids.get(token[i:])) for i in range(1, len(token))]
            merges += sorted(pair for pair in pairs if None not in pair)
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        write_json(folder / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": bytes_only,
            "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                              "special": True} for token, i in self.special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, bytes_only]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(shown)}, "merges": [[shown[a], shown[b]] for a, b in merges]}})
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "model_max_length": 131072, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE})

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: there is no tokenizer; build one with `python data.py`, or name a checkpoint's folder")
        try:
            stored, byte_of = json.loads(path.read_bytes()), {name: b for b, name in BYTE_NAMES.items()}
            vocabulary = stored["model"]["vocab"]
            tokens = [bytes(byte_of[c] for c in token) for token in sorted(vocabulary, key=vocabulary.get)]
            special = {row["content"]: row["id"] for row in stored["added_tokens"]}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a byte-level BPE tokenizer ({type(error).__name__} {error}); build it again") from error
        tokenizer = cls(tokens)
        if tokenizer.special != special:
            raise ValueError(f"{path}: its special tokens are {special}, ours would be {tokenizer.special}; not one of our tokenizers")
        return tokenizer


# ---- token files -----------------------------------------------------------------------------------------------------

INDEX = np.dtype([("length", "<u4"), ("nbytes", "<u4"), ("language", "<u2"), ("project", "<u4")])


class TokenWriter:
    """One category of one split: NAME.tokens, NAME.index (a row a document), NAME.loss (where some tokens are masked), last NAME.json."""
    def __init__(self, folder, name, vocab_size, cut=True):  # cut: may a document be cut to fit a context?
        self.path, self.dtype, self.cut = Path(folder) / name, np.dtype("<u2" if vocab_size <= 65536 else "<u4"), cut
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.files = {kind: open(f"{self.path}.{kind}", "wb") for kind in ("tokens", "index", "loss")}
        self.hash, self.counts, self.masked, self.tokens = hashlib.sha256(), defaultdict(Counter), False, 0
        self.languages, self.projects = {}, {}

    def add(self, ids, nbytes, language, in_loss=None, project=""):
        ids, in_loss = np.asarray(ids, self.dtype), np.asarray(np.ones(len(ids)) if in_loss is None else in_loss, np.uint8)
        numbers = self.languages.setdefault(language, len(self.languages)), self.projects.setdefault(project, len(self.projects))
        for kind, row in (("tokens", ids), ("index", np.array([(len(ids), nbytes, *numbers)], INDEX)), ("loss", in_loss)):
            self.files[kind].write(row.tobytes())
        self.hash.update(ids.tobytes())
        self.masked |= not in_loss.all()
        self.tokens += len(ids)
        self.counts[language].update(documents=1, tokens=len(ids), bytes=nbytes)

    def close(self):
        """Returns the summary that also stands in NAME.json. No documents: no files, None."""
        total = sum(self.counts.values(), Counter())
        for kind, file in self.files.items():
            file.close()
            if not total or kind == "loss" and not self.masked:
                os.remove(file.name)
        if total:
            summary = {**total, "sha256": self.hash.hexdigest(), "dtype": self.dtype.str, "cut": self.cut, "masked": self.masked,
                       "languages": list(self.languages), "projects": list(self.projects),
                       "by_language": {name: dict(row) for name, row in sorted(self.counts.items())}}
            write_json(f"{self.path}.json", summary)
            return summary


class TokenFile:
    """One category of one split, memory-mapped. Plain documents are stored as <|endoftext|> text <|endoftext|>."""
    def __init__(self, folder, name):
        path = Path(folder) / name
        if not Path(f"{path}.json").is_file():
            raise ValueError(f"{path}.json: there is no such token file; build it with `python data.py`")
        about = json.loads(Path(f"{path}.json").read_bytes())
        expected = {"tokens": about["tokens"] * np.dtype(about["dtype"]).itemsize, "index": about["documents"] * INDEX.itemsize}
        for kind, size in (expected | ({"loss": about["tokens"]} if about["masked"] else {})).items():
            found = os.path.getsize(f"{path}.{kind}") if os.path.exists(f"{path}.{kind}") else 0
            if found != size:
                raise ValueError(f"{path}.{kind}: {found} bytes, {path}.json promises {size}; it is truncated, build it again")
        self.name, self.cut, self.languages, self.projects = name, about["cut"], about["languages"], about["projects"]
        index = np.fromfile(f"{path}.index", INDEX)
        self.lengths, self.nbytes = index["length"].astype(np.int64), index["nbytes"].astype(np.int64)
        self._language, self._project = index["language"], index["project"]
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._tokens = np.memmap(f"{path}.tokens", about["dtype"], "r")
        self._loss = np.memmap(f"{path}.loss", np.bool_, "r") if about["masked"] else None

    def language(self, i):
        return self.languages[self._language[i]]

    def project(self, i):
        """The package, repository or site of a document; "" for what was generated."""
        return self.projects[self._project[i]]

    def ids(self, i):
        return self._tokens[self.starts[i]:self.starts[i] + self.lengths[i]]

    def in_loss(self, i):
        return None if self._loss is None else self._loss[self.starts[i]:self.starts[i] + self.lengths[i]]


# ---- packing and mixing ----------------------------------------------------------------------------------------------


def cut_pieces(length, context):
    """(start, n) of a document's pieces: each feeds tokens start .. start+n-1 and learns start+1 .. start+n."""
    return [(start, min(context, length - 1 - start)) for start in range(0, length - 1, context)]


def lay_out(rows, context):
    """rows of (ids fed (n,), targets (n,)) -> input_ids, targets, segment_ids, each (rows, context); padding is its own segment."""
    input_ids, segment_ids = np.zeros((2, len(rows), context), np.int64)
    targets = np.full((len(rows), context), -100, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, (fed, learned) in enumerate(row):
            input_ids[r, at:at + len(fed)], targets[r, at:at + len(fed)] = fed, learned
            segment_ids[r, at:at + len(fed)] = number
            at += len(fed)
        segment_ids[r, at:] = len(row)
    return input_ids, targets, segment_ids


def shifted(ids, in_loss, start, n):
    """What a piece feeds and what it learns: the next token, or -100 where that token is not in the loss."""
    ids = np.asarray(ids[start:start + n + 1]).astype(np.int64)
    learned = ids[1:] if in_loss is None else np.where(np.asarray(in_loss[start + 1:start + n + 1], bool), ids[1:], -100)
    return ids[:-1], learned


def pack(samples, context):
    """Samples (ids, or pairs (ids, in_loss)) -> input_ids, targets, segment_ids, each (rows, context). Only what fits no row is cut."""
    samples = (sample if isinstance(sample, tuple) else (sample, None) for sample in samples)
    pieces = [shifted(ids, in_loss, start, n) for ids, in_loss in samples for start, n in cut_pieces(len(ids), context)]
    pieces = sorted(pieces[::-1], key=lambda piece: len(piece[0]))
    rows, free = [], 0
    while pieces:  # a row takes the largest piece that still fits, again and again
        if not (at := bisect.bisect_right(pieces, free, key=lambda piece: len(piece[0]))):
            rows.append([])
            at, free = len(pieces), context
        rows[-1].append(pieces.pop(at - 1))
        free -= len(rows[-1][-1][0])
    return lay_out(rows, context)


class Mixture:
    """
    Batches from several token files at exact shares of tokens. Every row owes each category its share of tokens, and what it was given
    too little before; who is owed most sends the oldest of its waiting pieces that is no longer than that. A long document waits; once it
    was passed over often, its category saves up for it. The order of an epoch depends on its number alone, so the state is small.
    """
    STATE = ("opened", "given", "due", "waiting")          # by category: pieces drawn; tokens in rows, tokens asked for; pieces that wait
    waits = 128                                            # pieces of a category to choose from

    def __init__(self, files, shares, context, rows, seed=0, piece=None):
        total = sum(shares.values())
        if set(shares) - set(files) or not total > 0 or min(shares.values()) < 0:
            raise ValueError(f"mixture shares {shares}: shares must be positive and each name one of the files {sorted(files)}")
        self.names = [name for name in shares if shares[name] > 0]
        self.shares = {name: shares[name] / total for name in self.names}
        self.files, self.context, self.rows, self.seed, self.pieces = files, context, rows, seed, {}
        for name, file in ((name, files[name]) for name in self.names):
            pieces = [(i, start, n) for i, length in enumerate(file.lengths.tolist()) if file.cut or length - 1 <= context
                      for start, n in cut_pieces(length, piece or context if file.cut else context)]
            if not pieces:
                raise ValueError(f"category {name}: no document fits the context of {context} tokens, and it must not cut them; "
                                 f"leave it out or use a longer context")
            self.pieces[name] = np.array(pieces, np.int64)  # (document, start, tokens)
        self.order = {}                                    # name -> the order of the pieces in the epoch that is under way
        self.opened, self.given, self.due = (dict.fromkeys(self.names, 0) for _ in range(3))
        self.waiting = {name: [] for name in self.names}   # (number, document, start, tokens), oldest first

    def _ready(self, name):
        """The pieces of a category that may come next: all that wait; the oldest alone when it was passed over too often."""
        waiting, pieces = self.waiting[name], self.pieces[name]
        while len(waiting) < self.waits:
            epoch, at = divmod(self.opened[name], len(pieces))
            if at == 0 or name not in self.order:
                self.order[name] = np.random.default_rng(digest(str(self.seed), name, str(epoch))).permutation(len(pieces))
            self.opened[name] += 1
            waiting.append((self.opened[name], *pieces[self.order[name][at]].tolist()))
        return waiting[:1] if self.opened[name] - waiting[0][0] > 2 * self.waits else waiting

    def _choose(self, owed, free):
        """(category, piece) that goes into a row with this much room left, and waits no longer; None where none fits."""
        slack, fits = self.context // 16, []               # a category may get so many tokens more than it is owed
        for name in sorted(self.names, key=lambda name: -owed[name]):
            ready = self._ready(name)
            if piece := next((piece for piece in ready if piece[3] <= min(free, owed[name] + slack)), None):
                fits = [(name, piece)]
                break
            if self.files[name].cut and 16 <= free <= owed[name] + slack:  # all that wait here are longer than the room: it takes a part
                number, document, start, n = ready[0]
                self.waiting[name][0] = number, document, start + free, n - free
                return name, (number, document, start, free)
            fits += [(name, piece) for piece in ready if piece[3] <= free]
        chosen = max(fits, key=lambda fit: owed[fit[0]] - fit[1][3], default=None)  # too much for each category; least too much
        if chosen:
            self.waiting[chosen[0]].remove(chosen[1])
        return chosen

    def next(self):
        """(input_ids, targets, segment_ids), each int64 (rows, context)."""
        rows = []
        for _ in range(self.rows):
            owed, free = {name: self.due[name] + self.shares[name] * self.context - self.given[name] for name in self.names}, self.context
            rows.append([])
            while chosen := self._choose(owed, free):
                name, (_, document, start, n) = chosen
                rows[-1].append(shifted(self.files[name].ids(document), self.files[name].in_loss(document), start, n))
                self.given[name] += n
                owed[name] -= n
                free -= n
            for name in self.names:
                self.due[name] += self.shares[name] * (self.context - free)
        return lay_out(rows, self.context)

    def realised(self):
        """{category: its share of the tokens given so far}."""
        return {name: count / max(sum(self.given.values()), 1) for name, count in self.given.items()}

    def state(self):
        return copy.deepcopy({part: getattr(self, part) for part in self.STATE})

    def load_state(self, state):
        if set(state["opened"]) != set(self.names):
            raise ValueError(f"mixture state of {sorted(state['opened'])} does not belong to a mixture of {sorted(self.names)}")
        vars(self).update(copy.deepcopy({part: state[part] for part in self.STATE}), order={})


# ---- samples of the later stages -------------------------------------------------------------------------------------

END = [("<|endoftext|>", True, True)]
plain_parts = lambda text: [*END, (text, False, True), *END]


suffix_first = lambda doc: digest("suffix first", doc.project, doc.path) % 1000 < 1000 * fim.SPM_RATE  # the holes do not depend on it


def file_samples(docs, tokenizer, context, rng):
    """A fifth of the files, half of them with a hole; at most `context` tokens, each second one a quarter of that."""
    docs = [doc for doc in docs if doc.language in CODE and digest(doc.project, doc.path) % 5 == 0]
    for i, (doc, level) in enumerate(zip(docs, fim.plan(len(docs), rng))):
        limit = context // (4 if i % 2 else 1) - fim.FILE_SPECIALS - 2  # pieces of a text may measure a token more than the whole
        if level is None:
            yield doc.language, doc.project, plain_parts(tokenizer.decode(tokenizer.encode(doc.text)[:limit]).rstrip("\ufffd"))
        else:
            split = fim.split(doc.text, doc.language if doc.language in fim.LANGUAGES else None, level, rng, max_middle=limit)
            with contextlib.suppress(ValueError):  # a middle of rare characters alone can be longer than the limit
                yield doc.language, doc.project, fim.file_parts(fim.trim(split, limit, tokenizer.length), suffix_first(doc))


PER_PROJECT = 6  # whole contexts, and as many files with a hole, that the part of a project in one shard gives


def repo_samples(docs, tokenizer, context, rng):
    """A project's files in dependency order, what is imported before its users; and files with a hole behind similar snippets."""
    for project, group in itertools.groupby(docs, key=lambda doc: doc.project):  # they come sorted
        files = {doc.path: doc for doc in group if doc.language in CODE}
        if len(files) < 2:
            continue
        texts = {path: doc.text for path, doc in files.items()}
        contexts, room = [], 0
        for path in fim.dependency_order(texts):
            size = 1 + tokenizer.length(f"{path}\n{texts[path]}\n")
            if size > room:
                contexts, room = [*contexts, {}], context - 4 - tokenizer.length(project)
            if size <= room:                                             # a file that no context holds is left out
                contexts[-1][path] = texts[path]
                room -= size
        contexts = [(files[next(iter(held))].language, project, fim.context_parts(project, held) + END) for held in contexts if held]
        whole, index = rng.sample(contexts, min(PER_PROJECT, len(contexts))), fim.Index(texts)
        paths = rng.sample(sorted(files), min(PER_PROJECT, len(files), max(len(contexts), 1)))  # at least as many, for they come by turns
        for i, (path, level) in enumerate(zip(paths, fim.plan(len(paths), rng, rate=1.0))):
            yield from whole[i : i + 1]
            limit, language = context // (4 if i % 2 else 1) - 8, files[path].language
            split = fim.split(texts[path], language if language in fim.LANGUAGES else None, level, rng, max_middle=limit)
            with contextlib.suppress(ValueError):
                near, split = fim.trim_repo(project, fim.similar_files(index, path, split), path, split, limit, tokenizer.length)
                yield language, project, fim.repo_parts(project, near, path, split, suffix_first(files[path]))


def split_of(repository, default, paths, held_out):
    """A change that touches a held-out project belongs to the held-out split, under any name by which the sources may know the project."""
    known = {name := shown(Path(repository).resolve().name)}
    for parts in ([name, *shown(path).split("/")] for path in paths):
        known |= {f"{parts[-2]}/.", *map("/".join, itertools.pairwise(parts))}
    return default if known.isdisjoint(held_out) else "heldout"


def commit_samples(repository, default, held_out, tokenizer, context, log, decontaminator=None):
    """Triplets of a git history: message and patch whole, the context around them cut to fit. A benchmark or a key leaves one out."""
    try:
        for i, triplet in enumerate(commits.triplets(repository)):
            parts = commits.triplet_parts(triplet, budget=context // (4 if i % 2 else 1), length=tokenizer.length)
            text = "".join(text for text, _, _ in parts)
            found = [f"benchmark {name}" for name in decontaminator.overlaps(text)] if decontaminator else []
            for name in ("key", "secret"):
                _, possible, pattern, _ = EDITS[f"{name} redacted"]
                found += [name] if possible(text) and pattern.search(text) else []
            if found:
                log(f"left out commit {triplet.new_commit[:12]} of {repository}: {', '.join(found)}")
                continue
            split = split_of(repository, default, {*triplet.old_files, *triplet.new_files}, held_out)
            yield split, "commit", "diff", shown(Path(repository).resolve().name), parts
    except ValueError as error:  # a shallow clone, a history that is too short: the files of such a repository are good all the same
        log(f"absent  commit    {error}")


AGENT_FAMILIES = ("terminal", "tools", "web", "gui", "swe")
FAMILIES = {"reasoning": tuple(name for name in tasks.FAMILIES if name not in AGENT_FAMILIES), "agent": AGENT_FAMILIES}


def task_samples(split, name, seeds):
    """Verified tasks, family by family, easy levels more often; agent families as whole episodes, observations not learned."""
    for seed in seeds:
        family, rng = FAMILIES[name][seed % len(FAMILIES[name])], random.Random(f"{split} {name} {seed}")
        with contextlib.suppress(ValueError):  # chance made a template that has no answer: the next seed has one
            task = tasks.generate(family, rng.choice((1, 1, 2, 2, 3)), seed, "train" if split == "train" else "test")
            episode = name == "agent" and task.turns
            yield split, name, family, "", (tasks.trajectory_parts(task, bool(task.detour) and seed % 3 == 0) if episode else
                                            tasks.task_parts(task, thinking=True))


def shard_samples(path, fates, tokenizer, context):
    """All that a cleaned shard gives to both splits: its documents, files with a hole, parts of projects; fates: the split of each."""
    for split in ("train", "heldout"):
        docs, rng = list(documents({path: fates}, split)), random.Random(f"{split} {Path(path).name}")
        yield from ((split, "text" if doc.language in TEXT else "code", doc.language, doc.project, plain_parts(doc.text)) for doc in docs)
        yield from ((split, "file", *sample) for sample in file_samples(docs, tokenizer, context, rng))
        yield from ((split, "repo", *sample) for sample in repo_samples(docs, tokenizer, context, rng))


# ---- the whole way ---------------------------------------------------------------------------------------------------

SHARD = 2_000_000  # bytes: the unit of work, of parallelism and of resuming
FINGERPRINT = np.dtype([("exact", U64), ("size", int), ("shingles", int), ("offset", int), ("signature", U32, len(PERMUTATIONS)),
                        ("vector", np.float16, 2 * EMBEDDING)])


def strings(value):
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def read_benchmarks(paths):
    """{name: texts} of benchmark files: every longer string in JSON lines or JSON (.gz or not), any other file as one text."""
    texts = defaultdict(list)
    for path in map(Path, paths):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            try:
                rows = map(json.loads, filter(str.strip, file)) if ".jsonl" in path.name else [file.read()]
                rows = map(json.loads, rows) if path.name.removesuffix(".gz").endswith(".json") else rows
                found = [text for row in rows for text in strings(row) if len(text) > 40]
            except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: cannot be read ({error}); mend it, what is not read would not be kept out") from error
        if not found:
            raise ValueError(f"{path}: there is no text of more than 40 characters in it to keep out")
        texts[path.name.split(".")[0]] += found
    return texts


def clean_shard(job):
    """Read, clean, judge and fingerprint one shard. PATH (names and drops) is written last: a killed build finds whole shards or none."""
    entries, path, decontaminator = job
    if Path(path).exists():
        return
    kept, drops, prints, sets, offset = [], defaultdict(list), [], [np.empty(0, U32)], 0
    for entry, raw in zip(entries, read_all(entries)):
        language, found = entry.language, None if raw is None else decode(raw)
        text, fired = (None, ["unreadable" if raw is None else "binary"]) if found is None else clean(found, language)
        if text is not None:
            languages = ("c", "c++") if language == "c" else (language,)  # a header of either language ends in .h
            language = next((name for name in languages if parses(text, name)), None)
            vetoes = [f"benchmark {name}" for name in decontaminator.overlaps(text)] if language and decontaminator else []
            vetoes += [] if language else ["does not parse"]
            text, fired = None if vetoes else text, fired + vetoes
        for rule in fired:
            drops[rule].append((entry.project, entry.path, entry.size, (found or "")[:300] if len(drops[rule]) < 3 else ""))
        if text is not None:
            kept.append((text, language, entry.project, entry.path))
            sets.append(shingles(text))
            prints.append((digest(normal(text)), len(text), len(sets[-1]), offset, signature(sets[-1]), embed([text])[0]))
            offset += sets[-1].nbytes
    Path(f"{path}.prints").write_bytes(np.array(prints, FINGERPRINT).tobytes())
    Path(f"{path}.shingles").write_bytes(np.concatenate(sets).tobytes())
    write_json(f"{path}.documents", kept)
    write_json(path, {"about": [(project, name, len(fim.to_bytes(text))) for text, _, project, name in kept], "drops": drops})


def documents(fates, split):
    """The documents of a split, one shard in memory at a time. fates: {path of a shard: the split of each document, None for a copy}."""
    for path, where in fates.items():
        rows = json.loads(Path(f"{path}.documents").read_bytes())
        yield from (Document(*row) for row, fate in zip(rows, where) if fate == split)


class Answers:
    """work(job) as a DataLoader asks for it. Its processes are forked, so work may be a closure; a refusal is an answer, too."""
    def __init__(self, work):
        self.work = work

    def __getitem__(self, job):
        try:
            return self.work(job), None
        except (ValueError, OSError) as error:
            return None, error


def parallel(work, jobs, workers):
    """Yields work(job) for each job, in order, from so many processes. Few jobs are under way at a time: there may be endlessly many."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # how many processes a machine can bear is the user's to say
    forked = {"num_workers": workers, "multiprocessing_context": "fork"} if workers > 1 else {}
    loader = torch.utils.data.DataLoader(Answers(work), None, sampler=jobs, collate_fn=tuple, generator=torch.Generator(), **forked)
    try:
        for answer, error in loader:
            if error:
                raise error
            yield answer
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise OSError("a process was killed, perhaps for want of memory; the same command with --workers 1 goes on") from error


def deduplicate(paths, near=0.7, alike=0.8):
    """{rule: [(number of a document that goes, of the one kept)]}: exact, near, renamed copies. The shingles stay on disk."""
    parts, gone = [np.fromfile(f"{path}.prints", FINGERPRINT) for path in paths], {}
    docs, place = np.concatenate(parts), np.repeat([f"{path}.shingles" for path in paths], list(map(len, parts)))
    rank = np.argsort(np.lexsort((docs["exact"], -docs["size"])))

    def keep(rule, numbers, kept):
        gone[rule] = [(i, k) for i, k in zip(numbers.tolist(), numbers[kept].tolist()) if i != k]
        return np.setdiff1d(numbers, [i for i, _ in gone[rule]])

    left = keep("exact duplicate", np.arange(len(docs)), survivors(equal_pairs(docs["exact"].tolist()), rank.tolist()))
    read = lambda i: np.fromfile(place[left[i]], U32, docs["shingles"][left[i]], offset=docs["offset"][left[i]])
    left = keep("near duplicate", left, survivors(near_pairs(docs["signature"][left], read, near), rank[left].tolist()))
    rich = left[docs["shingles"][left] >= 100]  # a short table of constants has the shape of any other
    keep("renamed duplicate", rich, embedding_duplicates(docs["vector"][rich], alike))
    return gone


def clean_all(work, sample, held_out, benchmarks, workers):
    """Clean all shards -> their paths. Shards that an earlier, interrupted build of the same recipe left are kept, any others go."""
    code = [Path(path).read_text("utf-8") for path in (__file__, fim.__file__)]
    recipe = hashlib.sha256(json.dumps([sample, sorted(held_out), benchmarks, code]).encode()).hexdigest()
    if work.exists() and not (work / recipe).exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / recipe).touch()
    for split in ("train", "heldout"):
        shutil.rmtree(work / split, ignore_errors=True)
    decontaminator = Decontaminator(benchmarks) if benchmarks else None
    number = dict(zip(sample, (np.cumsum([entry.size for entry in sample]) // SHARD).tolist()))
    jobs = [(list(shard), str(work / f"{i:06d}"), decontaminator) for i, (_, shard) in enumerate(itertools.groupby(sample, number.get))]
    for _ in parallel(lambda i: clean_shard(jobs[i]), range(len(jobs)), workers):  # a job is inherited: not all of it can be pickled
        pass
    return [path for _, path, _ in jobs]


def drop_table(paths, counts):
    """{edit or rule: how many documents it touched, their bytes, three examples}, over all shards; and what the sources skipped."""
    drops = defaultdict(list)
    for path in paths:
        for rule, rows in json.loads(Path(path).read_bytes())["drops"].items():
            drops[rule] += rows
    table = {reason: {"documents": number, "bytes": 0, "examples": []} for reason, number in counts.items()}
    for rule, rows in drops.items():
        examples = [[f"{project}: {name}", text] for project, name, _, text in rows if text][:3]
        table[rule] = {"documents": len(rows), "bytes": sum(size for _, _, size, _ in rows), "examples": examples}
    return dict(sorted(table.items()))


def decide(paths, held_out, drops):
    """{shard: the split of each of its documents}; None for copies, which are entered into the drop table. And the bytes to train on."""
    about = [json.loads(Path(path).read_bytes())["about"] for path in paths]
    rows = list(itertools.chain(*about))
    if not rows:
        raise ValueError(f"no document of the sources passed the rules ({', '.join(drops)}); give other sources")
    fates = ["heldout" if project in held_out else "train" for project, _, _ in rows]
    name = lambda i: "{}: {}".format(*rows[i])
    for rule, gone in deduplicate(paths).items():
        drops[rule] = {"documents": len(gone), "bytes": sum(rows[i][2] for i, _ in gone),
                       "examples": [[name(i), f"kept: {name(k)}"] for i, k in gone[:3]]}
        for i, _ in gone:
            fates[i] = None
    size = {split: sum(row[2] for row, fate in zip(rows, fates) if fate == split) for split in ("train", "heldout")}
    if not all(size.values()):
        raise ValueError(f"cleaning left nothing {'held out' if size['train'] else 'to train on'}; give more sources")
    fates = iter(fates)
    return {path: list(itertools.islice(fates, len(part))) for path, part in zip(paths, about)}, size["train"]


def histories(sources, git):
    """{repository: split}: those that the sources lie in, and of the others one in five is held out."""
    others = sorted({str(Path(place).resolve()) for place in git}, key=digest)
    held = max(len(others) // 5, len(others) > 1)
    rows = {repository: "heldout" if i < held else "train" for i, repository in enumerate(others)}
    return rows | dict.fromkeys(filter(None, map(repository_of, sources)), "train")


CATEGORIES = ("code", "text", "quality", "file", "repo", "commit", "reasoning", "agent")
SHARES = {"file": 0.2, "repo": 0.2, "reasoning": 0.05, "agent": 0.03}  # at most so many tokens for each token of code so far
BPE_BYTES = 16_000_000  # of training text are enough for BPE; `--bench tokenizer` prints what twice as much would save
MOST = dict.fromkeys(FAMILIES, 1_000_000)  # tokens of a category of generated tasks: there is no end to them
BEST = 0.25             # of each language, the share of code that the scorer puts first: the set to anneal on


def write_splits(out, fates, scorer, tokenizer, repositories, held_out, benchmarks, context, workers, log, teacher=None):
    """All categories of both splits -> {split: {category: summary}}. Processes make the samples, this one writes, in the jobs' order."""
    writers = {(split, name): TokenWriter(out / split, name, tokenizer.vocab_size, cut=name in ("code", "text", "quality"))
               for split in ("train", "heldout") for name in CATEGORIES}
    makers = [functools.partial(shard_samples, path, where, tokenizer, context) for path, where in fates.items()]
    makers.append(lambda: (("train", "text", "facts", "", plain_parts(f"Question: {fact.question}\nAnswer: {fact.answer}\n"))
                           for fact in code_facts(teacher=teacher)))
    guard = Decontaminator(benchmarks) if benchmarks else None
    makers += [functools.partial(commit_samples, *row, held_out, tokenizer, context, log, guard) for row in repositories.items()]

    def make(samples):
        rows, code = [], []
        for split, name, language, project, parts in samples:
            ids, in_loss = tokenizer.encode_parts(parts)
            nbytes = sum(len(fim.to_bytes(text)) for text, special, _ in parts if not special)
            rows.append((split, name, np.array(ids, np.uint32), nbytes, language, None if all(in_loss) else in_loss, project))
            code += [parts[1][0]] * ((split, name) == ("train", "code"))
        return rows, scorer(code) if code and scorer else []

    def write(rows):
        """Add what there is room for, and say whether that was all."""
        fits = []
        for split, name, ids, *rest in rows:
            room = min(SHARES[name] * writers[split, "code"].tokens if name in SHARES else math.inf, MOST.get(name, math.inf))
            fits.append(writers[split, name].tokens + len(ids) <= room)
            if fits[-1]:
                writers[split, name].add(ids, *rest)
        return all(fits)

    scores = []
    for rows, found in parallel(lambda i: make(makers[i]()), range(len(makers)), workers):
        write(rows)
        scores += list(found)
    for split, name in itertools.product(("train", "heldout"), FAMILIES):
        jobs = ((split, name, range(at, at + 16)) for at in itertools.count(0, 16))
        for rows, _ in parallel(lambda job: make(task_samples(*job)), jobs, workers):
            if not write(rows):
                break
    splits = {"train": {}, "heldout": {}}
    for (split, name), writer in writers.items():
        if (split, name) == ("train", "quality") and scores:
            copy_best(TokenFile(out / "train", "code"), np.array(scores), writer)
        splits[split].update({name: summary} if (summary := writer.close()) else {})
    return splits


def copy_best(code, scores, writer):
    """The documents of BEST: they are tokenised already."""
    of_language = defaultdict(list)
    for i in np.argsort(-scores, kind="stable").tolist():
        of_language[code.language(i)].append(i)
    for i in sorted(i for name, row in of_language.items() if name in CODE for i in row[:math.ceil(BEST * len(row))]):
        writer.add(code.ids(i), int(code.nbytes[i]), code.language(i), None, code.project(i))


def build(out="out/data", source=("python",), vocab_size=8192, max_bytes=24_000_000, heldout=0.05, context=4096, git=(), benchmarks=(),
          teacher=None, workers=None, log=functools.partial(print, flush=True)):
    """
    Sources to tokens: out/tokenizer, out/train, out/heldout, out/drops.json, and out/manifest.json, written last. A build that was killed
    goes on from out/work and ends with the same bytes; until then what an earlier build left stays whole. One build at a time writes a
    folder. max_bytes=0: everything.
    """
    began, out, counts, workers = time.time(), Path(out), Counter(), os.cpu_count() if workers is None else workers
    stamp = lambda name, text: log(f"{name:8s}{text} | {time.time() - began:.1f} s")
    megabytes = lambda rows: f"{len(rows)} documents, {sum(e.size for e in rows) / 1e6:.1f} MB"
    sources = [source] if isinstance(source, str) else list(source)
    for name, value, least, most in (
            ("max_bytes", max_bytes, 0, math.inf), ("heldout", heldout, 0.001, 0.9), ("context", context, 64, math.inf),
            ("workers", workers, 1, 1024), ("vocab_size", vocab_size, 256 + len(SPECIAL), math.inf)):
        if not least <= value <= most:
            raise ValueError(f"{name}={value} must lie between {least} and {most}")
    for place in git:
        if not is_repository(Path(place)):
            raise ValueError(f"{place}: there is no such git repository")
    texts = read_benchmarks(benchmarks)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # the system takes it away with the process
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{out}: another process is building there; let it end, or name another folder with --out") from error

    found = find(sources, out / "fetched", counts)
    counts.update(f"larger than {LARGEST_FILE // 10**6} MB" for entry in found if entry.size > LARGEST_FILE)
    offered = {entry: source for entry, source in found.items() if 0 < entry.size <= LARGEST_FILE}
    sample = draw_sample(list(offered), max_bytes)
    if not sample:
        skipped = "".join(f"{reason} {number}, " for reason, number in counts.items())
        raise ValueError(f"source {' '.join(sources)}: nothing to train on; {skipped}known extensions are {' '.join(sorted(BY_EXTENSION))}")
    held_out = held_out_projects(sample, heldout)
    stamp("find", f"{megabytes(offered)}; sample {megabytes(sample)}; projects held out {len(held_out)}")

    work = out / "work"
    paths = clean_all(work, sample, held_out, texts, workers)
    drops = drop_table(paths, counts)
    fates, size = decide(paths, held_out, drops)
    stamp("clean", ", ".join(f"{rule} {row['documents']}" for rule, row in drops.items()))

    portion = 1000 * BPE_BYTES / size
    tokenizer = Tokenizer.train((doc.text for doc in documents(fates, "train") if digest(doc.path) % 1000 < portion), vocab_size)
    tokenizer.save(work / "tokenizer")
    stamp("tokens", f"vocabulary of {tokenizer.vocab_size}")
    python = (doc for doc in documents(fates, "train") if doc.language == "python")
    lessons = heapq.nsmallest(1200, python, key=lambda doc: digest(doc.path))
    scorer = quality_table(lessons, tokenizer, teacher, ("code",), log=log).get("code")  # None: too few, and no category `quality`
    stamp("quality", "of code learned")
    splits = write_splits(work, fates, scorer, tokenizer, histories(sources, git), held_out, texts, context, workers, log, teacher)

    used = {source: Counter() for source in sources}
    for entry in sample:
        used[offered[entry]].update(files=1, bytes=entry.size)
    manifest = {"sources": used, "vocab_size": vocab_size, "context": context, "heldout_projects": sorted(held_out), "splits": splits,
                "tokenizer_sha256": hashlib.sha256((work / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
                "drops": {rule: {"documents": row["documents"], "bytes": row["bytes"]} for rule, row in drops.items()}}
    (out / "manifest.json").unlink(missing_ok=True)
    for name in WRITTEN[:3]:
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(work / name, out / name)
    write_json(out / "drops.json", drops)
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(work)
    for split, name, row in ((split, name, row) for split, rows in splits.items() for name, row in rows.items()):
        languages = ", ".join(f"{language} {r['bytes'] / 1e6:.2f}" for language, r in row["by_language"].items())
        sizes = f"{row['tokens'] / 1e6:8.2f} M tokens {row['bytes'] / 1e6:8.2f} MB"
        log(f"{split:8s}{name:10s}{row['documents']:7d} documents {sizes}: {languages}")
    if "commit" not in splits["train"]:
        log("absent  commit    the sources have no history that gives a triplet; --git REPOSITORY ... adds some")
    stamp("done", f"{out}/manifest.json")
    return manifest


# ---- speed, beside the peers -----------------------------------------------------------------------------------------


def timed(work):
    """(median seconds, result) of three calls."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        result = work()
        took.append(time.perf_counter() - began)
    return sorted(took)[1], result


def train_theirs(texts, vocab_size):
    """The same as Tokenizer.train, by the `tokenizers` package."""
    import tokenizers

    theirs, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    theirs.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(SPLIT), "isolated"), pre.ByteLevel(False, use_regex=False)])
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()))
    return theirs


def bench_tokenizer(texts):
    """Training to 8192 on 32 MB of the texts beside the `tokenizers` package, and on what a build takes; the last 300 are held out."""
    heldout, sizes = texts[-300:], np.cumsum(list(map(len, texts[:-300])))
    training, enough = (texts[:np.searchsorted(sizes, size)] for size in (32e6, BPE_BYTES))
    seconds, ours = timed(lambda: Tokenizer.train(training, 8192))
    tokens, of_less = (sum(map(one.length, heldout)) for one in (ours, Tokenizer.train(enough, 8192)))
    print(f"BPE to 8192 on {sizes[len(training) - 1] / 1e6:.0f} MB: {seconds:.2f} s, {sum(map(len, heldout)) / tokens:.3f} characters "
          f"a held-out token; on {BPE_BYTES / 1e6:.0f} MB {of_less / tokens - 1:+.2%} tokens")
    their_seconds, theirs = timed(lambda: train_theirs(training, 8192))
    more = tokens / sum(len(row.ids) for row in theirs.encode_batch(heldout)) - 1
    print(f"  tokenizers: {their_seconds:.2f} s; ours takes {seconds / their_seconds:.2f} of it and {more:+.2%} tokens")


def bench_duplicates(texts):
    """Near duplicates from text to groups, beside datasketch and rensa with the same 5-grams of tokens, permutations and threshold."""
    docs, token = texts[:3000], re.compile(r"\w+|[^\w\s]")
    seconds, kept = timed(lambda: near_duplicates(docs, 0.7))
    sets = list(map(shingles, docs))
    loose = meetings(np.array(list(map(signature, sets))), 64, 2)  # so loose that it misses nothing that matters: the ground truth
    true = [(i, j) for i, j in loose.tolist() if jaccard(sets[i], sets[j]) >= 0.7]
    recall = lambda group: sum(group[i] == group[j] for i, j in true) / max(len(true), 1)
    print(f"near duplicates of {len(docs)} files, {sum(map(len, docs)) / 1e6:.0f} MB, one process: {len(docs) / seconds:.0f} files/s, "
          f"recall {recall(kept):.3f} of {len(true)} pairs, {sum(k != i for i, k in enumerate(kept))} go")
    import datasketch
    import rensa

    def theirs(index, new, update, code):
        pairs, index = [], index()
        for i, text in enumerate(docs):
            words, sketch = token.findall(text), new()
            update(sketch, list(map(code, {" ".join(gram) for gram in zip(*(words[i:] for i in range(5)))} or {text})))
            pairs += [(j, i) for j in index.query(sketch)]
            index.insert(i, sketch)
        return survivors(pairs, range(len(docs)))

    for name, *how in (
            ("datasketch", lambda: datasketch.MinHashLSH(0.7), datasketch.MinHash, datasketch.MinHash.update_batch, str.encode),
            ("rensa", lambda: rensa.RMinHashLSH(0.7, 128, 16), lambda: rensa.RMinHash(128, 1), rensa.RMinHash.update, str)):
        took, found = timed(functools.partial(theirs, *how))
        print(f"  {name}: {len(docs) / took:.0f} files/s, recall {recall(found):.3f}; ours is {took / seconds:.1f} times as fast")


def renamed(text, rng):
    """A copy that hides itself: every name that the module binds becomes another, lines of comment go."""
    names = {n.arg if isinstance(n, ast.arg) else n.id if isinstance(n, ast.Name) else n.name for n in ast.walk(ast.parse(text))
             if isinstance(n, (ast.arg, ast.FunctionDef, ast.ClassDef)) or isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = sorted(names - {"self", "cls"})
    fresh = {name: f"{rng.choice('abcdefgh')}{rng.choice(('oo', 'ar', 'ex'))}_{i}" for i, name in enumerate(names)}
    return re.sub(r"[A-Za-z_]\w*", lambda word: fresh.get(word[0], word[0]), re.sub(r"(?m)^\s*#.*\n", "", text))


def renamed_study(texts):
    """(copies, those that MinHash misses, of these found, all joined wrongly), beside hard negatives: halves of two copies joined."""
    n, copies = len(texts), [renamed(text, random.Random(i)) for i, text in enumerate(sorted(texts, key=len))]
    half = lambda text, part: "\n".join(np.array_split(np.array(text.split("\n"), object), 2)[part])
    docs = sorted(texts, key=len) + copies + [half(copies[i], 0) + "\n" + half(copies[i - 1], 1) for i in range(n)]
    by_words, by_shape = near_duplicates(docs[:2 * n]), embedding_duplicates(embed(docs))
    missed = [i for i in range(n) if by_words[i] != by_words[n + i]]
    wrong = sum(k != i and (i >= 2 * n or k >= 2 * n or i % n != k % n) for i, k in enumerate(by_shape))
    return n, len(missed), sum(by_shape[i] == by_shape[n + i] for i in missed), wrong


def bench_renamed(texts):
    """Renamed copies of files that are not alike."""
    texts = [text for text in texts[:2000] if 2000 < len(text) < 40_000 and code_rubric(text) and len(shingles(text)) >= 100]
    texts = [texts[k] for k in sorted(set(near_duplicates(texts, 0.4)))]
    n, missed, found, wrong = renamed_study(texts)
    print(f"renamed copies of {n} files: MinHash misses {missed}, embeddings find {found} of them ({found / missed:.1%}); "
          f"among as many hard negatives and all other pairs {wrong} are wrong: precision {1 - wrong / (found + wrong):.1%}")


def bench_syntax(texts):
    """Verification beside nothing but the parse."""
    raw, size = [text.encode() for text in texts[:2000]], sum(map(len, texts[:2000])) / 1e6
    bare, _ = timed(lambda: [fim.parser("python").parse(one).root_node.has_error for one in raw])
    seconds, _ = timed(lambda: [parses(text, "python") for text in texts[:2000]])
    print(f"syntax of {size:.0f} MB: {size / seconds:.1f} MB/s, {bare / seconds:.1%} of bare tree-sitter")


BENCHES = {"tokenizer": bench_tokenizer, "duplicates": bench_duplicates, "renamed": bench_renamed, "syntax": bench_syntax}


def own_modules():
    """What the running Python can import, in the order of a hash."""
    entries = sorted((e for e in running_python() if e.language == "python" and 200 < e.size < LARGEST_FILE), key=lambda e: digest(e.path))
    for entry, raw in zip(entries, read_all(entries)):
        if raw and (text := decode(raw)):
            yield Document(text, entry.language, entry.project, entry.path)


# ---- command line ----------------------------------------------------------------------------------------------------


def explain(rule, out):
    """What a rule removed in the last build, and three examples."""
    path = Path(out) / "drops.json"
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; name the folder of a finished build with --out")
    drops = json.loads(path.read_bytes())
    if rule not in drops:
        raise ValueError(f"--explain {rule}: the last build in {out} dropped nothing by that name; it has {', '.join(drops)}")
    if rule in RULES:
        languages, what, least, most = RULES[rule]
        bounds = " and ".join(f"{word} {bound}" for word, bound in (("at least", least), ("at most", most)) if bound is not None)
        print(f"{rule}: {what} must be {bounds} ({', '.join(sorted(languages))})")
    print(f"{drops[rule]['documents']} documents, {drops[rule]['bytes']} bytes; for example")
    for name, text in drops[rule]["examples"]:
        print(f"\n== {name}\n{text}")


def main(argv=None):
    """Read the options, then build the corpus, or explain, measure or fit one part of it."""
    def refuse(message):
        raise ValueError(f"{message}; --help lists the options")

    parser = argparse.ArgumentParser(description="Build training tokens, held-out tokens and their tokenizer. Only a source that is a URL "
                                     "uses the network.")
    add, parser.error = parser.add_argument, refuse
    add("--source", nargs="+", default=["python"], help="`python` (the running one), folders, git repositories, FILE.jsonl(.gz), "
        "FILE.warc(.gz), FILE.wet(.gz), their URLs, cc:INDEX?url=PATTERN (default: python)")
    add("--git", nargs="+", default=[], help="git repositories whose histories make the category commit (those among --source do too)")
    add("--benchmark", nargs="+", default=[], help="benchmark files (.jsonl, .json, text; gzipped or not); what touches them is dropped")
    add("--out", default="out/data", help="folder to write (default: %(default)s)")
    add("--vocab-size", type=int, default=8192, help="tokens, the special ones included (default: %(default)s)")
    add("--max-mb", type=float, default=24, help="size of the sample in MB; 0 takes everything (default: %(default)s)")
    add("--heldout", type=float, default=0.05, help="share of each language's bytes to hold out, in whole projects (default: %(default)s)")
    add("--context", type=int, default=4096, help="longest sample of the categories that are never cut, in tokens (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    add("--teacher", default="", help="URL#MODEL of an OpenAI-compatible server: it scores quality and rephrases facts")
    add("--explain", metavar="RULE", help="show what a rule removed in the last build")
    add("--proxies", action="store_true", help="train the quality proxies for code, text and maths on the running "
        "Python's files and judge them beside n-grams")
    add("--facts", type=int, metavar="N", help="print N facts")
    add("--mixture", action="store_true", help="print the allocation of tokens to languages: the report's, and the solver's")
    add("--refit", action="store_true", help="fit the scaling law to small runs on the built corpus")
    add("--bench", nargs="?", const="all", choices=["all", *BENCHES], help="speed beside tokenizers, datasketch and rensa, tree-sitter")
    args = parser.parse_args(argv)
    url, _, model = args.teacher.partition("#")
    teacher = tasks.Teacher(url, model or "default", Path(args.out) / "teacher") if url else None
    if args.explain is not None:
        explain(args.explain, args.out)
    elif args.bench:  # on the running Python's own files: our figure and the peer's in one run
        texts = [doc.text for doc in own_modules() if len(doc.text) < 200_000]
        for work in BENCHES.values() if args.bench == "all" else [BENCHES[args.bench]]:
            try:
                work(texts)
            except ImportError as error:
                print(f"  {error}: our figure stands alone")
    elif args.facts is not None:
        for fact in code_facts(args.facts, teacher):
            print(f"{fact.question}  {fact.answer}")
    elif args.mixture:
        solved = solve_mixture(350, LAW["B"], LAW["alpha_D"])
        helped = solve_mixture(350, LAW["B"], LAW["alpha_D"], LAW["synergy"], gamma=1.0)
        print("billions of tokens of 350   report  solver  solver with synergy")
        for row in zip(LAW["languages"], LAW["optimised"], solved, helped):
            print("{:28s}{:6.2f}  {:6.2f}  {:6.2f}".format(*row))
    elif args.refit:
        rows = small_runs(args.out)
        for language in sorted({row[0] for row in rows}):
            show_law(language, [row[1:] for row in rows if row[0] == language])
    elif args.proxies:
        tokenizer = Tokenizer.train((doc.text for doc in itertools.islice(own_modules(), 600)), args.vocab_size)
        quality_table(own_modules(), tokenizer, teacher)
    else:
        try:
            build(args.out, args.source, args.vocab_size, args.max_mb * 1e6, args.heldout, args.context, args.git, args.benchmark,
                  teacher, args.workers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(f"{args.out}: {error.strerror}; make room, and the same command goes on") from error


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
