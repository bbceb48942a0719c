"""
How does raw text become training tokens?

    find     sources are listed (the running Python, folders, git repositories), a fair sample is drawn by project
    clean    bytes are decoded; a table of rules says what goes, and every rule counts what it removed
    dedup    one copy of every document stays
    split    whole projects are held out, never single files: a project's files are too much alike
    tokens   byte-level BPE, trained here, run by tiktoken; one memory-mapped token file a category
    mix      exact shares of the categories, best-fit packed into rows of one context length

Start with build(): it is the table of contents. Then RULES, train_bpe(), Mixture.
Source: IQuest-Coder-V1 report, 3.1 and 3.2. Where we differ: the corpus is what lies on this machine, and a bounded
sample of it by default.

    python data.py                      # build out/data from the running Python's library and packages
    python data.py --source DIR REPO    # from folders and git repositories
"""
import argparse
import bisect
import hashlib
import heapq
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken, and understands the same patterns
import tiktoken

LANGUAGES = {  # language: the extensions it is found by
    "python": ".py .pyi", "c": ".c .h", "cpp": ".cpp .cc .cxx .hpp .hh .cuh .cu", "java": ".java", "javascript": ".js .mjs .cjs",
    "typescript": ".ts .tsx", "csharp": ".cs", "go": ".go", "rust": ".rs", "shell": ".sh", "css": ".css", "sql": ".sql",
    "json": ".json", "yaml": ".yaml .yml", "toml": ".toml", "html": ".html .htm", "markdown": ".md", "text": ".txt .rst",
}
BY_EXTENSION = {extension: language for language, row in LANGUAGES.items() for extension in row.split()}
TEXT = {"html", "markdown", "text"}      # these make the category `text`; every other language is `code`
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
           "<|repo_name|>", "<|file_sep|>")


class Document(NamedTuple):
    text: str
    language: str
    project: str
    path: str


def digest(*parts):
    """A number that looks random and depends on nothing but the strings."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()[:8], "big")


def write_atomic(path, data):
    """Write bytes, text or a JSON value under a temporary name, then rename: a reader sees the old file or the new one, whole."""
    if not isinstance(data, (bytes, str)):
        data = json.dumps(data, indent=1, ensure_ascii=False)
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(data if isinstance(data, bytes) else data.encode())
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------ sources

class Entry(NamedTuple):
    """One file that a source offers: where its bytes are, and what is known before reading it."""
    project: str
    path: str          # inside the project, for people and for rules
    language: str
    size: int
    place: str         # a path on disk, or "REPO\0OBJECT" in a git repository


SKIP_DIRECTORIES = re.compile(r"__pycache__|\..*|.*\.dist-info|.*\.egg-info|node_modules|_?vendor(ed)?|third[-_]?party|externals?", re.I)
GENERATED_NAMES = re.compile(r".*(_pb2(_grpc)?\.pyi?|[.-]min\.(js|css)|[.-]lock\.json|\.generated\.\w+|_generated\.\w+)", re.I)
LARGEST_FILE = 1_000_000  # bytes; larger ones are data, whatever their extension says


def wanted(path):
    """The language of a path, or None: an unknown extension, a vendored copy, a generated file."""
    *folders, name = path.split("/")
    if any(SKIP_DIRECTORIES.fullmatch(folder) for folder in folders) or GENERATED_NAMES.fullmatch(name):
        return None
    return BY_EXTENSION.get(os.path.splitext(name)[1].lower())


def walk(root, project_of, skip=()):
    """Entries of a folder, in sorted order; project_of(parts of the relative path) names the project."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not SKIP_DIRECTORIES.fullmatch(f) and f not in skip)
        for name in sorted(names):
            place = os.path.join(folder, name)
            path = os.path.relpath(place, root).replace(os.sep, "/")
            language = wanted(path)
            if language and not os.path.islink(place):
                yield Entry(project_of(path.split("/")), path, language, os.path.getsize(place), place)


def running_python():
    """The standard library and the installed packages of this interpreter: a project is a module or package of the top level."""
    paths = sysconfig.get_paths()
    named = lambda group: lambda parts: f"{group}/{parts[0].split('.')[0]}"
    yield from walk(paths["stdlib"], named("stdlib"), skip=("site-packages", "dist-packages"))
    for packages in sorted({paths["purelib"], paths["platlib"]}):
        yield from walk(packages, named("packages"))


def git_files(repo, project_of):
    """Entries of a git repository's HEAD, bare or not: what is committed, not what lies around."""
    listing = subprocess.run(["git", "-C", repo, "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD"], capture_output=True)
    if listing.returncode:
        raise ValueError(f"{repo}: git cannot list HEAD ({listing.stderr.decode(errors='replace').strip()}); is there a commit?")
    for row in listing.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        (mode, kind, oid, size), path = row.split("\t", 1)[0].split(), row.split("\t", 1)[1]
        language = wanted(path)
        if kind == "blob" and language and mode != "120000":  # 120000: a symbolic link
            yield Entry(project_of(path.split("/")), path, language, int(size), f"{os.path.abspath(repo)}\0{oid}")


def find(sources):
    """All entries of the sources, sorted. One source alone is split into projects by its folders; of several, a repository is one."""
    entries = []
    for source in sources:
        if source == "python":
            entries += running_python()
            continue
        root = Path(source)
        if not root.is_dir():
            raise ValueError(f"source {source}: there is no such folder; give `python`, a folder or a git repository")
        name = root.resolve().name
        is_repository = (root / ".git").exists() or (root / "HEAD").is_file() and (root / "objects").is_dir()
        inside = lambda parts, name=name: f"{name}/{parts[0] if len(parts) > 1 else '.'}"
        if is_repository:
            entries += git_files(str(root), inside if len(sources) == 1 else lambda parts, name=name: name)
        else:
            entries += walk(str(root), inside)
    return sorted(set(entries))


def read_all(entries):
    """The bytes of each entry, in order; one `git cat-file` a repository, plain reads for the rest."""
    pipes = {}
    try:
        for entry in entries:
            if "\0" not in entry.place:
                yield Path(entry.place).read_bytes()
                continue
            repo, oid = entry.place.split("\0")
            if repo not in pipes:
                pipes[repo] = subprocess.Popen(["git", "-C", repo, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            pipe = pipes[repo]
            pipe.stdin.write(oid.encode() + b"\n")
            pipe.stdin.flush()
            size = int(pipe.stdout.readline().split()[2])
            yield pipe.stdout.read(size + 1)[:-1]  # the object is followed by a newline
    finally:
        for pipe in pipes.values():
            pipe.stdin.close()
            pipe.stdout.close()
            pipe.wait()


def fair_cap(sizes, budget):
    """The cap for which sum(min(size, cap)) is the budget: small projects come whole, large ones share what is left."""
    sizes = sorted(sizes)
    for i, size in enumerate(sizes):
        if size * (len(sizes) - i) >= budget:
            return budget / (len(sizes) - i)
        budget -= size
    return float("inf")


def draw_sample(entries, max_bytes):
    """At most max_bytes: two thirds Python where there is so much, no project more than its fair cap, files in the order of a hash."""
    if not max_bytes:
        return entries
    groups = defaultdict(list)
    for entry in entries:
        groups["text" if entry.language in TEXT else "python" if entry.language == "python" else "code"].append(entry)
    have = {name: sum(e.size for e in group) for name, group in groups.items()}
    budget = {name: min(have.get(name, 0), max_bytes * share) for name, share in (("text", 0.08), ("code", 0.25))}
    budget["python"] = max_bytes - sum(budget.values())
    chosen = []
    for name, group in groups.items():
        size = Counter()
        for entry in group:
            size[entry.project] += entry.size
        cap, used = fair_cap(size.values(), budget[name]), Counter()
        for entry in sorted(group, key=lambda e: digest(e.project, e.path)):
            if used[entry.project] + entry.size <= cap:
                used[entry.project] += entry.size
                chosen.append(entry)
    return sorted(chosen)


def held_out_projects(entries, share):
    """
    Which projects are held out: in the order of a hash, each that gives some language bytes it still lacks, and that takes
    more than twice its share of no language. So every language with several small projects is measured, and no language
    loses its only large one.
    """
    size = defaultdict(Counter)
    for entry in entries:
        size[entry.project][entry.language] += entry.size
    total, held, chosen = Counter(), Counter(), set()
    for row in size.values():
        total.update(row)
    order = sorted(size, key=lambda project: digest("held out", project))
    for project in order:
        row = size[project]
        lacking = any(held[language] < share * total[language] for language in row)
        if lacking and all(held[language] + row[language] <= 2 * share * total[language] for language in row):
            chosen.add(project)
            held.update(row)
    if not chosen:  # a handful of projects: the smallest one
        if len(order) < 2:
            raise ValueError(f"only one project ({''.join(order)}) in the sources: nothing can be held out; give more sources")
        chosen.add(min(order, key=lambda project: (sum(size[project].values()), project)))
    return chosen


# ------------------------------------------------------------------------------------------------ decoding and cleaning

def decode(raw):
    """Bytes to text, or None for what is not text. UTF-8, else the declared coding, else Latin-1; line ends become \\n."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = raw.decode("utf-16", "replace")
    elif b"\0" in raw:
        return None
    else:
        declared = re.search(rb"coding[:=]\s*([-\w.]+)", raw[:200])
        for encoding in ("utf-8-sig", declared[1].decode() if declared else "latin-1", "latin-1"):
            try:
                text = raw.decode(encoding)
                break
            except (UnicodeDecodeError, LookupError):
                continue
    control = sum(map(text.count, "\x00\x01\x02\x03\x04\x05\x06\x0e\x0f\x10\x11\x12\ufffd"))
    if control > 0.001 * len(text):
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


CLASSES = np.zeros((256, 4), np.int64)  # byte -> (alphabetic, digit, white space, any); bytes of other scripts count as letters
CLASSES[[*range(65, 91), *range(97, 123), *range(128, 256)], 0] = 1
CLASSES[48:58, 1] = 1
CLASSES[[9, 10, 11, 12, 13, 32], 2] = 1
CLASSES[:, 3] = 1
LINE_KINDS = re.compile(r"^[ \t]*(?:(?P<pass>pass\b)|(?P<imports>import\b|from\b.*\bimport\b)|(?P<asserts>assert|self\.assert)|"
                        r"(?P<prints>print\())", re.M)
GENERATED = re.compile(r"@generated|auto-?generated|generated (by|from|automatically)|do not (edit|modify)", re.I)


def measure(text):
    """The numbers that the rules bound: sizes, shares of characters, shares of lines."""
    raw = text.encode("utf-8", "replace")
    alphabet, digits, space, size = (np.bincount(np.frombuffer(raw, np.uint8), minlength=256) @ CLASSES).tolist()
    lines = text.split("\n")
    filled = [line.strip() for line in lines if line.strip()]
    words = text.split()
    kinds = Counter(match.lastgroup for match in LINE_KINDS.finditer(text))
    size, n = max(size, 1), max(len(filled), 1)
    return {
        "chars": len(text), "lines": len(lines), "words": len(words), "longest line": max(map(len, lines)),
        "mean line": len(text) / len(lines), "alphabet": alphabet / size, "alphanumeric": (alphabet + digits) / size,
        "digits": digits / size, "space": space / size, "repeated lines": 1 - len(set(filled)) / n,
        "hex words": len(re.findall(r"\b(?:0[xX])?[0-9a-fA-F]{8,}\b|\b0[xX][0-9a-fA-F]+\b", text)) / max(len(words), 1),
        "generated": len(GENERATED.findall(text[:600])), "mean word": sum(map(len, words)) / max(len(words), 1),
        "pass": kinds["pass"] / n, "imports": kinds["imports"] / n, "asserts": kinds["asserts"] / n, "prints": kinds["prints"] / n,
    }


EVERY, CODE, PYTHON = set(LANGUAGES), set(LANGUAGES) - TEXT - {"json", "yaml", "toml"}, {"python"}
RULES = {  # name: (languages, what is measured, least, most); StarCoder's and OpenCoder's thresholds, Gopher's for text
    "too short": (EVERY, "chars", 50, None),
    "too few words": (EVERY, "words", 15, None),
    "too many lines": (EVERY, "lines", None, 100_000),
    "long line": (CODE, "longest line", None, 1000),
    "mean line": (CODE, "mean line", 5, 100),
    "little alphabet": (CODE, "alphabet", 0.4, None),
    "few letters or digits": (EVERY, "alphanumeric", 0.25, None),
    "mostly digits": (EVERY, "digits", None, 0.2),
    "mostly white space": (CODE, "space", None, 0.6),
    "repeated lines": (CODE, "repeated lines", None, 0.7),
    "hexadecimal": (CODE, "hex words", None, 0.4),
    "generated": (CODE, "generated", None, 0),
    "data in markup": ({"json", "yaml", "toml"}, "chars", 50, 5000),
    "word length": (TEXT, "mean word", 3, 12),
    "only pass": (PYTHON, "pass", None, 0.05),
    "only imports": (PYTHON, "imports", None, 0.4),
    "only asserts": (PYTHON, "asserts", None, 0.4),
    "only prints": (PYTHON, "prints", None, 0.4),
}


def clean(text, language="text"):
    """(text or None where a rule dropped it, the names of the rules that fired)."""
    numbers, fired = measure(text), []
    for name, (languages, what, least, most) in RULES.items():
        if language in languages and (least is not None and numbers[what] < least or most is not None and numbers[what] > most):
            fired.append(name)
    return (None if fired else text), fired


# ------------------------------------------------------------------------------------------------ duplicates

def normal(text):
    """What exact duplicates agree in: the lines, without blank ones and trailing white space."""
    return "\n".join(line.rstrip() for line in text.split("\n") if line.strip())


def exact_duplicates(docs):
    """For each text the index of the one kept in its place. The smallest of the equal ones stays, whatever the order."""
    kept, keys = {}, [hashlib.sha256(normal(text).encode("utf-8", "replace")).digest() for text in docs]
    for i, key in enumerate(keys):
        if key not in kept or docs[i] < docs[kept[key]]:
            kept[key] = i
    return [kept[key] for key in keys]


# ------------------------------------------------------------------------------------------------ tokenizer

# A word with the one character before it, a single digit, a run of signs, a line end with the indentation that follows, white
# space. Repeats of white space are bounded: an unbounded run would overflow the stack of tiktoken's backtracking.
SPLIT = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|"
         r"\s{0,255}[\r\n][^\S\r\n]{0,255}|\s{1,255}(?!\S)|\s{1,255}")


def count_words(texts):
    """How often each piece of SPLIT occurs: all that BPE needs to know of a corpus."""
    split, counts = regex.compile(SPLIT).findall, Counter()
    for text in texts:
        counts.update(split(text))
    return counts


def train_bpe_slowly(counts, merges):
    """The idea, as one would say it: count all neighbouring pairs, join the most frequent one everywhere, repeat."""
    words = {tuple(word.encode()): count for word, count in counts.items()}
    found = []
    for new in range(256, 256 + merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # of equally frequent ones, the smaller ids
        found.append(best)
        joined = Counter()
        for word, count in words.items():
            out = []
            for symbol in word:
                if out and out[-1] is not None and (out[-1], symbol) == best:
                    out[-1] = new
                else:
                    out.append(symbol)
            joined[tuple(out)] += count
        words = joined
    return found


def train_bpe(counts, merges):
    """
    The same list of (left id, right id), fast. All words lie end to end in one array of symbols, with links to the next and
    the previous living symbol; for each pair we know the places where it stood when it was last counted.

    Joining a pair only ever destroys older pairs, and only the joined symbol makes new ones. So a pair's count is right when it
    is made and too high later: it waits in a heap under that old count, and is counted again when it comes to the top.
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


def byte_names():
    """Hugging Face's printable stand-in for each byte: itself where it prints, else a character from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Tokenizer:
    """
    Byte-level BPE. `tokens` are the byte strings in the order of their ids: the 256 bytes, then each merge. The special tokens
    have the last ids, and no text ever becomes one of them: they only enter as parts that say so (encode_parts).
    """
    def __init__(self, tokens):
        self.tokens = tokens
        self.special = {name: len(tokens) + i for i, name in enumerate(SPECIAL)}
        self.vocab_size = len(tokens) + len(SPECIAL)
        ranks = {token: i for i, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding("nanoloopcoder", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.special)

    @classmethod
    def train(cls, texts, vocab_size):
        """texts: strings, or the Counter of count_words()."""
        wanted = vocab_size - 256 - len(SPECIAL)
        if wanted < 0:
            raise ValueError(f"vocab_size={vocab_size} is below {256 + len(SPECIAL)}: 256 bytes and {len(SPECIAL)} special tokens")
        counts = texts if isinstance(texts, Counter) else count_words(texts)
        tokens, merges = [bytes([b]) for b in range(256)], train_bpe(counts, wanted)
        if len(merges) < wanted:
            raise ValueError(f"vocab_size={vocab_size} is more than the corpus can fill: it gives {256 + len(merges) + len(SPECIAL)}; "
                             f"ask for less, or give more text")
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        return cls(tokens)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_parts(self, parts):
        """[(text, is_special, in_loss)] -> (ids, in_loss of each id)."""
        ids, in_loss = [], []
        for text, is_special, counts in parts:
            new = [self.special[text]] if is_special else self.encode(text)
            ids += new
            in_loss += [counts] * len(new)
        return ids, in_loss

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json, which `tokenizers` and `transformers` read too."""
        folder, name = Path(folder), byte_names()
        folder.mkdir(parents=True, exist_ok=True)
        shown = ["".join(name[b] for b in token) for token in self.tokens]
        ids, merges = {token: i for i, token in enumerate(self.tokens)}, []
        for token in self.tokens[256:]:  # tiktoken joins any two neighbours that make a token: so every such pair is a merge
            pairs = [(ids.get(token[:i]), ids.get(token[i:])) for i in range(1, len(token))]
            merges += sorted(pair for pair in pairs if None not in pair)
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        write_atomic(folder / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": bytes_only,
            "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                              "special": True} for token, i in self.special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, bytes_only]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(shown)}, "merges": [[shown[a], shown[b]] for a, b in merges]}})
        write_atomic(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "model_max_length": 131072, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE})

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: there is no tokenizer; build one with `python data.py`, or name a checkpoint's folder")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            byte_of = {name: b for b, name in byte_names().items()}
            vocabulary = sorted(stored["model"]["vocab"].items(), key=lambda item: item[1])
            tokens = [bytes(byte_of[c] for c in token) for token, _ in vocabulary]
            special = {row["content"]: row["id"] for row in stored["added_tokens"]}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a byte-level BPE tokenizer ({type(error).__name__} {error}); build it again") from error
        tokenizer = cls(tokens)
        if tokenizer.special != special:
            raise ValueError(f"{path}: its special tokens are {special}, ours would be {tokenizer.special}; not one of our tokenizers")
        return tokenizer


# ------------------------------------------------------------------------------------------------ token files

INDEX = np.dtype([("length", "<u4"), ("nbytes", "<u4"), ("language", "<u2")])


class TokenWriter:
    """
    Writes one category of one split: NAME.tokens (all ids, end to end), NAME.index (length, bytes and language of each document),
    NAME.loss (one byte a token, where a category masks some) and NAME.json, which comes last and says how long the others are.
    cut=False: a document means something only as a whole (a FIM example, a dialogue), so it is never cut to fit a context.
    """
    def __init__(self, folder, name, vocab_size, cut=True):
        self.path, self.dtype, self.cut = Path(folder) / name, np.dtype("<u2" if vocab_size <= 65536 else "<u4"), cut
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.files = {kind: open(f"{self.path}.{kind}.tmp", "wb") for kind in ("tokens", "index", "loss")}
        self.hash, self.counts, self.languages, self.masked = hashlib.sha256(), defaultdict(Counter), {}, False

    def add(self, ids, nbytes, language, in_loss=None):
        ids = np.asarray(ids, self.dtype)
        in_loss = np.ones(len(ids), np.uint8) if in_loss is None else np.asarray(in_loss, np.uint8)
        number = self.languages.setdefault(language, len(self.languages))
        self.files["tokens"].write(ids.tobytes())
        self.files["index"].write(np.array([(len(ids), nbytes, number)], INDEX).tobytes())
        self.files["loss"].write(in_loss.tobytes())
        self.hash.update(ids.tobytes())
        self.masked |= not in_loss.all()
        self.counts[language].update(documents=1, tokens=len(ids), bytes=nbytes)

    def close(self):
        """Rename everything into place; returns the summary that also stands in NAME.json. No documents: no files, None."""
        for file in self.files.values():
            file.close()
        total = sum(self.counts.values(), Counter())
        for kind in self.files:
            if total and (kind != "loss" or self.masked):
                os.replace(f"{self.path}.{kind}.tmp", f"{self.path}.{kind}")
            else:
                os.remove(f"{self.path}.{kind}.tmp")
        if not total:
            return None
        summary = {**total, "sha256": self.hash.hexdigest(), "dtype": self.dtype.str, "cut": self.cut, "masked": self.masked,
                   "languages": list(self.languages), "by_language": {name: dict(row) for name, row in sorted(self.counts.items())}}
        write_atomic(f"{self.path}.json", summary)
        return summary


class TokenFile:
    """One category of one split, memory-mapped. Plain documents are stored as <|endoftext|> text <|endoftext|>."""
    def __init__(self, folder, name):
        path = Path(folder) / name
        if not Path(f"{path}.json").is_file():
            raise ValueError(f"{path}.json: there is no such token file; build it with `python data.py`")
        about = json.loads(Path(f"{path}.json").read_text())
        expected = {"tokens": about["tokens"] * np.dtype(about["dtype"]).itemsize, "index": about["documents"] * INDEX.itemsize}
        if about["masked"]:
            expected["loss"] = about["tokens"]
        for kind, size in expected.items():
            found = os.path.getsize(f"{path}.{kind}") if os.path.exists(f"{path}.{kind}") else 0
            if found != size:
                raise ValueError(f"{path}.{kind}: {found} bytes, {path}.json promises {size}; it is truncated, build it again")
        self.name, self.cut, self.languages = name, about["cut"], about["languages"]
        index = np.fromfile(f"{path}.index", INDEX)
        self.lengths, self.nbytes, self._language = index["length"].astype(np.int64), index["nbytes"].astype(np.int64), index["language"]
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._tokens = np.memmap(f"{path}.tokens", about["dtype"], "r")
        self._loss = np.memmap(f"{path}.loss", np.bool_, "r") if about["masked"] else None

    def language(self, i):
        return self.languages[self._language[i]]

    def ids(self, i):
        return self._tokens[self.starts[i]:self.starts[i] + self.lengths[i]]

    def in_loss(self, i):
        return None if self._loss is None else self._loss[self.starts[i]:self.starts[i] + self.lengths[i]]


# ------------------------------------------------------------------------------------------------ packing and mixing

def cut_pieces(length, context):
    """
    (start, tokens fed) of the pieces of a document of so many tokens. Every token but the first is a target exactly once: a piece
    feeds tokens start .. start+n-1 and learns start+1 .. start+n.
    """
    return [(start, min(context, length - 1 - start)) for start in range(0, length - 1, context)]


def best_fit(lengths, context, rows):
    """
    Fill rows: each opens with the oldest piece that waits (so none waits for ever), then takes the largest that still fits.
    lengths in order of age -> a list of rows of indices.
    """
    waiting = sorted((length, -i) for i, length in enumerate(lengths))  # of equal lengths the older one stands last
    age, used, filled = iter(range(len(lengths))), [False] * len(lengths), []
    while len(filled) < rows and waiting:
        oldest = next(i for i in age if not used[i])
        row, free, take = [], context, (lengths[oldest], -oldest)
        while take is not None:
            waiting.pop(bisect.bisect_left(waiting, take))
            row.append(-take[1])
            used[-take[1]] = True
            free -= take[0]
            at = bisect.bisect_right(waiting, (free, 0))
            take = waiting[at - 1] if at else None
        filled.append(row)
    return filled


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
    """
    Samples (a list of ids, or a pair (ids, in_loss)) -> input_ids, targets, segment_ids, each (rows, context).
    Best fit, longest first; a sample that fits is never cut, a longer one is cut into pieces.
    """
    pieces = []
    for sample in samples:
        ids, in_loss = sample if isinstance(sample, tuple) else (sample, None)
        pieces += [shifted(ids, in_loss, start, n) for start, n in cut_pieces(len(ids), context)]
    pieces.sort(key=lambda piece: -len(piece[0]))
    filled = best_fit([len(fed) for fed, _ in pieces], context, rows=len(pieces))
    return lay_out([[pieces[i] for i in row] for row in filled], context)


class Mixture:
    """
    Batches from several token files at exact shares of tokens. The next piece comes from the category that is furthest behind
    its share; pieces wait in a pool from which best_fit fills the rows. An epoch of a category visits each piece once, in
    an order that depends on the seed, the category and the epoch alone, so the state is a few numbers.
    """
    def __init__(self, files, shares, context, rows, seed=0):
        missing = [name for name in shares if name not in files]
        total = sum(shares.values())
        if missing or not total > 0 or min(shares.values()) < 0:
            raise ValueError(f"mixture shares {shares}: shares must be positive and each name one of the files {sorted(files)}")
        self.names = [name for name in shares if shares[name] > 0]
        self.shares = {name: shares[name] / total for name in self.names}
        self.files, self.context, self.rows, self.seed = files, context, rows, seed
        self.pieces = {name: self._pieces(files[name]) for name in self.names}
        self.epoch, self.cursor, self.order = dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0), {}
        self.drawn, self.given = dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0)
        self.pool = []                                     # (category, document, start, tokens), oldest first

    def _pieces(self, file):
        """All (document, start, tokens) of a category at this context length."""
        rows = [(i, start, n) for i, length in enumerate(file.lengths.tolist()) if file.cut or length - 1 <= self.context
                for start, n in cut_pieces(length, self.context)]
        if not rows:
            raise ValueError(f"category {file.name}: no document fits the context of {self.context} tokens, and it must not cut them; "
                             f"leave it out or use a longer context")
        return np.array(rows, np.int64)

    def _draw(self, name):
        if name not in self.order:
            key = digest(str(self.seed), name, str(self.epoch[name]))
            self.order[name] = np.random.default_rng(key).permutation(len(self.pieces[name]))
        document, start, n = self.pieces[name][self.order[name][self.cursor[name]]].tolist()
        self.cursor[name] += 1
        if self.cursor[name] == len(self.order[name]):
            self.cursor[name], self.epoch[name] = 0, self.epoch[name] + 1
            del self.order[name]
        self.drawn[name] += n
        self.pool.append((name, document, start, n))

    def next(self):
        """(input_ids, targets, segment_ids), each int64 (rows, context)."""
        waiting = sum(piece[3] for piece in self.pool)
        while waiting < (self.rows + 16) * self.context:   # 16 rows' worth to choose from
            total = sum(self.drawn.values())
            self._draw(max(self.names, key=lambda name: self.shares[name] * (total + self.context) - self.drawn[name]))
            waiting += self.pool[-1][3]
        filled = best_fit([piece[3] for piece in self.pool], self.context, self.rows)
        rows = []
        for row in filled:
            rows.append([])
            for name, document, start, n in (self.pool[i] for i in row):
                rows[-1].append(shifted(self.files[name].ids(document), self.files[name].in_loss(document), start, n))
                self.given[name] += n
        used = {i for row in filled for i in row}
        self.pool = [piece for i, piece in enumerate(self.pool) if i not in used]
        return lay_out(rows, self.context)

    def realised(self):
        """{category: its share of the tokens given so far}."""
        total = max(sum(self.given.values()), 1)
        return {name: count / total for name, count in self.given.items()}

    def state(self):
        return {"epoch": dict(self.epoch), "cursor": dict(self.cursor), "drawn": dict(self.drawn), "given": dict(self.given),
                "pool": [list(piece) for piece in self.pool]}

    def load_state(self, state):
        if set(state["epoch"]) != set(self.names):
            raise ValueError(f"mixture state of {sorted(state['epoch'])} does not belong to a mixture of {sorted(self.names)}")
        self.epoch, self.cursor, self.drawn, self.given = (dict(state[key]) for key in ("epoch", "cursor", "drawn", "given"))
        self.pool, self.order = [tuple(piece) for piece in state["pool"]], {}


# ------------------------------------------------------------------------------------------------ the whole way

SHARD = 2_000_000  # bytes: the unit of work, of parallelism and of resuming


def shards_of(entries):
    """Cut the sorted list of entries into runs of about SHARD bytes."""
    shard, size = [], 0
    for entry in entries:
        shard.append(entry)
        size += entry.size
        if size >= SHARD:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def clean_shard(job):
    """Read, decode and clean one shard; leaves PATH (one JSON document a line) and PATH.drops, and nothing where it is killed."""
    entries, path = job
    if Path(path).exists():
        return
    lines, drops = [], defaultdict(list)
    for entry, raw in zip(entries, read_all(entries)):
        text = None if len(raw) > LARGEST_FILE else decode(raw)
        text, fired = clean(text, entry.language) if text is not None else (None, ["too large" if len(raw) > LARGEST_FILE else "binary"])
        for rule in fired:
            drops[rule].append((entry.project, entry.path, len(raw)))
        if text is not None:
            lines.append(json.dumps([text, entry.language, entry.project, entry.path]))
    write_atomic(f"{path}.drops", drops)
    write_atomic(path, "\n".join(lines))


def documents(paths):
    """The documents of cleaned shards, one shard in memory at a time."""
    for path in paths:
        for line in Path(path).read_text().split("\n"):
            if line:
                yield Document(*json.loads(line))


def parallel(work, jobs, workers):
    """work(job) for each job, in order, in so many processes."""
    jobs = list(jobs)
    if min(workers, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("fork").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap(work, jobs)


def write_tokens(out, paths, dropped, held_out, tokenizer, manifest):
    """The categories `code` and `text` of both splits, as <|endoftext|> text <|endoftext|>."""
    end = tokenizer.special["<|endoftext|>"]
    writers = {(split, name): TokenWriter(out / split, name, tokenizer.vocab_size)
               for split in ("train", "heldout") for name in ("code", "text")}
    for i, doc in enumerate(documents(paths)):
        if i in dropped:
            continue
        writer = writers["heldout" if doc.project in held_out else "train", "text" if doc.language in TEXT else "code"]
        writer.add([end, *tokenizer.encode(doc.text), end], len(doc.text.encode("utf-8", "replace")), doc.language)
    for (split, name), writer in writers.items():
        summary = writer.close()
        if summary:
            manifest["splits"][split][name] = summary


def build(out="out/data", source=("python",), vocab_size=8192, max_bytes=24_000_000, heldout=0.05, workers=None, log=print):
    """
    Sources to tokens: out/tokenizer, out/train, out/heldout, out/manifest.json (written last). Work in progress lies in
    out/work by shard; a build that was killed goes on from there, and ends with the same bytes. max_bytes=0: everything.
    """
    began, out, workers = time.time(), Path(out), workers or os.cpu_count()
    entries = [e for e in find([source] if isinstance(source, str) else source) if 0 < e.size <= LARGEST_FILE]
    sample = draw_sample(entries, max_bytes)
    if not sample:
        raise ValueError(f"source {source}: no file with a known extension ({' '.join(sorted(BY_EXTENSION))}); nothing to train on")
    held_out = held_out_projects(sample, heldout)
    log(f"find    {len(entries)} files, {sum(e.size for e in entries) / 1e6:.1f} MB; sample {len(sample)} files, "
        f"{sum(e.size for e in sample) / 1e6:.1f} MB, {len({e.project for e in sample})} projects, {len(held_out)} held out")

    recipe = hashlib.sha256(json.dumps([sample, sorted(held_out), vocab_size]).encode()).hexdigest()
    work = out / "work"
    if work.exists() and not (work / recipe).exists():
        shutil.rmtree(work)                                    # the leftovers of another build
    work.mkdir(parents=True, exist_ok=True)
    (work / recipe).touch()
    (out / "manifest.json").unlink(missing_ok=True)
    jobs = [(shard, str(work / f"clean-{i:05d}")) for i, shard in enumerate(shards_of(sample))]
    for _ in parallel(clean_shard, jobs, workers):
        pass
    paths = [path for _, path in jobs]
    drops = defaultdict(list)
    for path in paths:
        for rule, rows in json.loads(Path(f"{path}.drops").read_text()).items():
            drops[rule] += rows

    keys, dropped = {}, set()
    for i, doc in enumerate(documents(paths)):
        first = keys.setdefault(hashlib.sha256(normal(doc.text).encode("utf-8", "replace")).digest()[:16], i)
        if first != i:
            dropped.add(i)
            drops["exact duplicate"].append((doc.project, doc.path, len(doc.text)))
    log(f"clean   {sum(map(len, drops.values()))} drops: " + ", ".join(f"{rule} {len(drops[rule])}" for rule in sorted(drops)))

    training = (doc.text for i, doc in enumerate(documents(paths)) if i not in dropped and doc.project not in held_out)
    tokenizer = Tokenizer.train(training, vocab_size)
    tokenizer.save(out / "tokenizer")
    log(f"tokens  vocabulary of {tokenizer.vocab_size}")
    manifest = {"source": [source] if isinstance(source, str) else list(source), "recipe": recipe, "vocab_size": vocab_size,
                "tokenizer_sha256": hashlib.sha256((out / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
                "heldout_projects": sorted(held_out), "splits": {"train": {}, "heldout": {}},
                "drops": {rule: {"documents": len(rows), "bytes": sum(size for *_, size in rows)} for rule, rows in sorted(drops.items())}}
    write_tokens(out, paths, dropped, held_out, tokenizer, manifest)
    if "code" not in manifest["splits"]["heldout"] and "text" not in manifest["splits"]["heldout"]:
        raise ValueError(f"source {source}: cleaning left nothing of the held-out projects {sorted(held_out)}; give more sources")
    write_atomic(out / "manifest.json", manifest)
    shutil.rmtree(work)
    for split, rows in manifest["splits"].items():
        for name, row in rows.items():
            languages = ", ".join(f"{language} {r['bytes'] / 1e6:.2f}" for language, r in row["by_language"].items())
            log(f"{split:8s}{name:8s}{row['documents']:7d} documents {row['tokens'] / 1e6:8.2f} M tokens {row['bytes'] / 1e6:8.2f} MB: "
                f"{languages}")
    log(f"done    {time.time() - began:.1f} s, {out}/manifest.json")
    return manifest


def main(argv=None):
    parser = argparse.ArgumentParser(description="Build training tokens from source trees: find, clean, deduplicate, hold projects out, "
                                     "train a tokenizer, write memory-mapped token files and a manifest.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", nargs="+", default=["python"], help="`python` (the running one), folders, git repositories")
    parser.add_argument("--out", default="out/data", help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens, the special ones included")
    parser.add_argument("--max-mb", type=float, default=24, help="size of the sample in MB; 0 takes everything")
    parser.add_argument("--heldout", type=float, default=0.05, help="share of each language's bytes to hold out, in whole projects")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    build(args.out, args.source, args.vocab_size, int(args.max_mb * 1e6), args.heldout, args.workers)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
