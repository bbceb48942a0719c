"""
Fill in the middle: how a source file becomes examples in which the middle is missing, and how such a hole is filled again.

A file is cut in three, and the model reads both ends before it writes the middle:
    <|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}<|im_end|>
Where to cut decides what is learned. Five levels, from blind to structural:
    char        any two places, mid-word too: what a cursor does
    line        one line without its indentation
    expression  a call, an operator, a comprehension: one node of the syntax tree that has a value
    statement   one node that does something
    function    one whole function or method
A repository example puts similar snippets of the same repository in front of the hole; never a text that holds the answer.

Read split() and file_parts() first: they are the idea. Then similar_files() and dependency_order() (which files stand in front),
complete() (the same at a cursor, with token healing), and evaluate() (exact match, edit similarity, parse rate).

Source: the report's figures 4 and 5 give the two strings and the three levels of the syntax tree; shares, size limits and the retrieval
are ours, for the report gives none. BM25: Robertson and Zaragoza 2009. File order: DeepSeek-Coder 2024, algorithm 1.
Where we differ from common practice: text is cut before it is tokenised, line ends are normalised first, and a file that is too long
loses the head of its prefix and the tail of its suffix, never a part of its middle.

    python fim.py FILE                # one example of each level
    python fim.py FILE --repo DIR     # the same with similar snippets of DIR in front
    python fim.py --bench             # examples per second and level on the standard library
"""

import argparse
import functools
import heapq
import importlib
import os
import posixpath
import random
import re
import sys
import sysconfig
import time
import tokenize
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tree_sitter import Language, Parser, Query, QueryCursor


# ---- the numbers, as data --------------------------------------------------------------------------------------------

LEVELS = ("char", "line", "expression", "statement", "function")  # each falls back to the one before it
SHARES = {"char": 0.30, "line": 0.20, "expression": 0.15, "statement": 0.20, "function": 0.15}  # ours
FIM_RATE = 0.5        # of the file-level and of the repository-level documents: the report
SPM_RATE = 0.0        # of the FIM examples written suffix first; the report shows prefix first only. 0.1 is a common choice
LARGEST_SHARE = 0.30  # a middle above the char level is at most this share of its file: what is left must say what is missing
TRIES = {"expression": 100, "statement": 100}  # random nodes to look at before all are listed; a function is too rare among them
HUGE = 500_000        # characters; longer files are not parsed (generated tables, bundles): their levels fall back to lines
DEEPEST = 400         # open brackets, or columns of indentation; error recovery takes minutes on what nests deeper
WRONG = 0.2           # nor are the levels of the tree used where errors cover more of the file; C with macros has a few nearly always
FAULTS = ("(ERROR)", "(MISSING)")  # the nodes of what the parser could not read, and of what it made up
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
           "<|repo_name|>", "<|file_sep|>")
FILE_SPECIALS = 4     # special tokens that file_parts() adds to the three texts

# language -> (grammar wheel, its function, file endings)
LANGUAGES = {
    "python": ("tree_sitter_python", "language", (".py", ".pyi")),
    "java": ("tree_sitter_java", "language", (".java",)),
    "javascript": ("tree_sitter_javascript", "language", (".js", ".jsx", ".mjs", ".cjs")),
    "typescript": ("tree_sitter_typescript", "language_typescript", (".ts", ".mts", ".cts")),
    "c#": ("tree_sitter_c_sharp", "language", (".cs",)),
    "go": ("tree_sitter_go", "language", (".go",)),
    "rust": ("tree_sitter_rust", "language", (".rs",)),
    "c": ("tree_sitter_c", "language", (".c", ".h")),
    "c++": ("tree_sitter_cpp", "language", (".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx")),
}

# language -> level -> node types of its grammar; "if-" at the level statement stands for if_statement. Names, literals and plain attribute
# access are not among the expressions: they would be most of the nodes, and guessing `self.x` teaches little. Anonymous functions count
# as functions only where they are the usual way to write one.
NODES = {
    "python": {
        "expression": """call binary_operator unary_operator boolean_operator not_operator comparison_operator conditional- lambda subscript
            list tuple set dictionary list_comprehension set_comprehension dictionary_comprehension generator- await""",
        "statement": """expression- if- for- while- with- try- match- return- raise- assert- delete- import- import_from- future_import-
            global- nonlocal- pass- break- continue-""",
        "function": "function_definition",
    },
    "java": {
        "expression": """method_invocation method_reference array_access object_creation- array_creation- binary- unary- update- ternary-
            assignment- cast- instanceof- lambda- switch-""",
        "statement": """local_variable_declaration expression- if- for- enhanced_for- while- do- try- try_with_resources- synchronized-
            labeled- return- throw- assert- break- continue- yield-""",
        "function": "method_declaration constructor_declaration compact_constructor_declaration",
    },
    "javascript": {
        "expression": """call- new- binary- unary- update- ternary- assignment- augmented_assignment- await- yield- subscript- array object
            template_string""",
        "statement": """expression- lexical_declaration variable_declaration if- for- for_in- while- do- switch- try- return- throw- break-
            continue- import-""",
        "function": """function_declaration function_expression generator_function_declaration generator_function method_definition
            arrow_function""",
    },
    "c#": {
        "expression": """invocation- object_creation- implicit_object_creation- array_creation- binary- prefix_unary- postfix_unary-
            conditional- assignment- cast- as- is- is_pattern- await- lambda- element_access- conditional_access- switch- query-
            interpolated_string-""",
        "statement": """local_declaration- expression- if- for- foreach- while- do- switch- try- using- lock- return- throw- yield- break-
            continue- goto-""",
        "function": "method_declaration constructor_declaration destructor_declaration operator_declaration local_function_statement",
    },
    "go": {
        "expression": "call- binary- unary- composite_literal index- slice- type_assertion- type_conversion-",
        "statement": """short_var_declaration var_declaration const_declaration assignment- inc- dec- expression- send- if- for-
            expression_switch- type_switch- select- return- go- defer- break- continue- goto- labeled-""",
        "function": "function_declaration method_declaration func_literal",
    },
    "rust": {
        "expression": """call- macro_invocation binary- unary- reference- index- type_cast- try- await- closure- struct- array- tuple-
            range- if- match- assignment- compound_assignment_expr""",
        "statement": "let_declaration expression- use_declaration",
        "function": "function_item",
    },
    "c": {
        "expression": "call- binary- unary- update- conditional- assignment- subscript- pointer- cast- sizeof- compound_literal-",
        "statement": "declaration expression- if- for- while- do- switch- return- break- continue- goto- labeled-",
        "function": "function_definition",
    },
}
KEYWORD = {  # a word that every function of the language has once: the smallest named node around it is that function
    "python": re.compile(rb"def\b"), "go": re.compile(rb"func\b"), "rust": re.compile(rb"fn\b"),
}
NODES["typescript"] = NODES["javascript"] | {"expression": NODES["javascript"]["expression"] + " as- satisfies- non_null-"}
NODES["c++"] = NODES["c"] | {
    "expression": NODES["c"]["expression"] + " new- delete- lambda- fold-",
    "statement": NODES["c"]["statement"] + " for_range_loop try- throw- co_return- static_assert_declaration",
}


# ---- parsers ---------------------------------------------------------------------------------------------------------


def language_of(path) -> str | None:
    """The language of a path by its ending, or None. A header .h counts as C."""
    ending = posixpath.splitext(str(path))[1].lower()
    return next((name for name, (_, _, endings) in LANGUAGES.items() if ending in endings), None)


@functools.cache
def grammar(language: str) -> Language:
    """The tree-sitter grammar of one of LANGUAGES."""
    if language not in LANGUAGES:
        raise ValueError(f"no grammar for language {language!r}: choose one of {', '.join(LANGUAGES)}")
    wheel, function, _ = LANGUAGES[language]
    return Language(getattr(importlib.import_module(wheel), function)())


@functools.cache
def parser(language: str) -> Parser:
    """The parser of a language, made once a process. parser("go").parse(data: bytes) -> Tree; offsets in it are bytes."""
    return Parser(grammar(language))


@functools.cache
def kinds(language: str, level: str) -> frozenset[str]:
    """The node types of a level, in full."""
    return frozenset(NODES[language][level].replace("-", f"_{level}").split())


@functools.cache
def query(language: str, patterns: tuple[str, ...]) -> Query:
    return Query(grammar(language), f"[{' '.join(patterns)}] @node")


def matches(root, language: str, patterns) -> list:
    """Every node below root that is one of the patterns, in order: the walk over the tree happens inside tree-sitter."""
    found = QueryCursor(query(language, tuple(sorted(patterns)))).captures(root).get("node", [])
    return sorted(found, key=lambda node: (node.byte_range, node.kind_id))  # captures come in an order that changes from call to call


def parses(code: str, language: str) -> bool:
    """True where the syntax tree has no error and nothing had to be made up."""
    return not parser(language).parse(to_bytes(code)).root_node.has_error


def faults(code: str, language: str) -> int:
    """In how many places the syntax tree is wrong or made up."""
    root = parser(language).parse(to_bytes(code)).root_node
    return len(matches(root, language, FAULTS)) if root.has_error else 0


# ---- one file, cut in three ------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """prefix + middle + suffix is the whole (normalised) file."""
    prefix: str
    middle: str
    suffix: str
    node: str        # what the middle is: a node type of the grammar, or "line", "char"
    level: str = ""  # the level that was found
    asked: str = ""  # the level that was asked for; count where the two differ


def normalise(code: str) -> str:
    r"""Every line ends in \n. A suffix that starts with \r\n is a classic way to confuse a completion model."""
    return code.replace("\r\n", "\n").replace("\r", "\n") if "\r" in code else code


def to_bytes(code: str) -> bytes:
    """UTF-8; a lone surrogate (from a JSON escape, say) passes through instead of failing."""
    return code.encode("utf-8", "surrogatepass")


SPELLED = re.compile("|".join(map(re.escape, SPECIAL)))  # file text that looks like a special token: it stays text, and it stays whole
REACH = max(map(len, SPECIAL))


class Source:
    """
    A file that is normalised once and parsed at most once, however many splits are taken from it. language=None is text
    without a grammar: the three levels of the syntax tree fall back to lines, as they do where the file does not parse, is too long to
    parse, or has no node of a fitting size.
    """

    def __init__(self, code: str, language: str | None = None):
        self.code = normalise(code)
        self.language = language
        self.listed = {}  # level -> all its nodes, where they had to be listed
        if language is not None:
            grammar(language)  # an unknown language is an error here, not a silent fall-back
        if not self.code:
            raise ValueError("cannot split an empty file: leave it out")

    @functools.cached_property
    def root(self):
        """The root of the syntax tree, or None where there is none to trust."""
        if self.language is None or len(self.code) > HUGE or nesting(self.code) > DEEPEST:
            return None
        root = parser(self.language).parse(to_bytes(self.code)).root_node
        self.wrong = [node.byte_range for node in matches(root, self.language, FAULTS)] if root.has_error else []
        return root if sum(end - start for start, end in self.wrong) <= WRONG * root.end_byte else None

    @functools.cached_property
    def char_at(self):
        """Byte offset, which tree-sitter speaks, -> character offset."""
        if self.code.isascii():
            return range(len(self.code) + 1)
        first_bytes = np.frombuffer(to_bytes(self.code), np.uint8) & 0xC0 != 0x80
        return [0, *np.cumsum(first_bytes).tolist()]

    def split(self, level: str, rng: random.Random, max_middle: int | None = None) -> Split:
        """One random split at this level, or at the next lower level that has one. max_middle: longest middle, in characters."""
        if level not in LEVELS:
            raise ValueError(f"no level {level!r}: choose one of {', '.join(LEVELS)}")
        code, longest = self.code, min(len(self.code), max_middle or len(self.code))
        for lower in LEVELS[LEVELS.index(level) :: -1]:
            limit = longest if lower == "char" else min(longest, int(LARGEST_SHARE * len(code)))
            for start, end, node in self.places(lower, rng, limit):
                if 0 < end - start <= limit and not self.torn(start) and not self.torn(end):
                    return Split(code[:start], code[start:end], code[end:], node, lower, level)
        raise ValueError(f"no place to cut {len(code)} characters into a middle of at most {longest} without cutting a special string")

    def torn(self, cut: int) -> bool:
        """True where a cut here runs through a text that spells a special token."""
        return any(found.start() < cut < found.end() for found in SPELLED.finditer(self.code, max(0, cut - REACH), cut + REACH))

    def places(self, level: str, rng, limit: int):
        """(start, end, what it is) of the places of a level in random order, in characters; only "char" heeds the limit."""
        if level == "char":  # two different places, every pair at most `limit` apart equally likely
            for _ in range(1000):
                start, length = rng.randrange(len(self.code)), rng.randint(1, limit)
                if start + length <= len(self.code):
                    yield start, start + length, "char"
            yield 0, len(self.code), "char"  # a file that is one special string, say
        elif level == "line":  # one that is not blank, from its first visible character to before its newline
            for found in shuffled(list(re.finditer(r"\S[^\n]*", self.code)), rng):
                yield *found.span(), "line"
        elif self.root is not None:
            for node in self.nodes(level, rng):
                if not any(start <= node.end_byte and node.start_byte <= end for start, end in self.wrong):
                    yield self.char_at[node.start_byte], self.char_at[node.end_byte], node.type

    def nodes(self, level: str, rng):
        """
        The nodes of a level in random order. To list them all costs a walk over the tree. For the common levels it is cheaper to look
        at random nodes of any type until one fits: uniform over the nodes of the level, as the list is, which follows where none was met.
        Functions are found by their keyword where there is one.
        """
        wanted = kinds(self.language, level)
        if level == "function" and self.language in KEYWORD:
            for found in shuffled(KEYWORD[self.language].finditer(to_bytes(self.code)), rng):
                node = self.root.named_descendant_for_byte_range(*found.span())
                if node.type in wanted:
                    yield node
            return
        if level not in self.listed:
            cursor, count = self.root.walk(), self.root.descendant_count
            for _ in range(TRIES.get(level, 0)):
                cursor.goto_descendant(rng.randrange(count))
                if cursor.node.type in wanted and cursor.node.is_named:  # the keyword `lambda` is of type "lambda" too
                    yield cursor.node
            self.listed[level] = matches(self.root, self.language, [f"({kind})" for kind in wanted])
        yield from shuffled(self.listed[level], rng)


NO_BRACKET = bytes(set(range(256)) - set(b"([{)]}"))
OPENS = np.zeros(256, np.int8)
OPENS[list(b"([{")], OPENS[list(b")]}")] = 1, -1


def nesting(code: str) -> int:
    """The most brackets open at once, or a longer run of blanks than DEEPEST: a bound on the depth of the tree, strings included."""
    brackets = to_bytes(code).translate(None, NO_BRACKET)
    opened = np.cumsum(OPENS[np.frombuffer(brackets, np.uint8)], dtype=np.int32).max(initial=0)
    return max(int(opened), DEEPEST + 1 if " " * (DEEPEST + 1) in code.replace("\t", " ") else 0)


def shuffled(items: list, rng):
    """The items in random order, drawn one by one: whoever needs only the first pays only for that."""
    left = list(items)
    while left:
        i = rng.randrange(len(left))
        left[i], left[-1] = left[-1], left[i]
        yield left.pop()


def split(code: str, language: str | None, level: str, rng: random.Random, max_middle: int | None = None) -> Split:
    """
    Cut a file in three at a random place of a level ("char", "line", "expression", "statement", "function").

    The result's `level` is the one that was found and `asked` the one asked for: a file that has no such place (it does not parse, it
    is one line, its only function is most of the file) falls back to the next lower level. Many splits of one file: keep a Source.
    """
    return Source(code, language).split(level, rng, max_middle)


def plan(count: int, rng: random.Random, rate: float = FIM_RATE, shares: dict = SHARES) -> list[str | None]:
    """
    For `count` documents, in random order: the level each is to be split at, or None where it stays left to right.
    The quotas are exact, not drawn: round(count * rate) documents are split, and each level gets its share of those to within one
    (largest remainder), so a small corpus has the mixture too.
    """
    split_count = round(count * rate)
    exact = {level: split_count * share / sum(shares.values()) for level, share in shares.items()}
    quota = {level: int(value) for level, value in exact.items()}
    for level in sorted(exact, key=lambda level: quota[level] - exact[level])[: split_count - sum(quota.values())]:
        quota[level] += 1
    levels = [level for level in shares for _ in range(quota[level])] + [None] * (count - split_count)
    rng.shuffle(levels)
    return levels


# ---- the report's strings --------------------------------------------------------------------------------------------
# A part is (text, is_special, in_loss). Only a part of its own can be a special token: text from a file never is, whatever it spells.
# Every part is in the loss, as in the FIM paper: the prefix and the suffix are code too.

special = lambda token: (token, True, True)
plain = lambda text: (text, False, True)


def prompt_parts(prefix: str, suffix: str) -> list[tuple[str, bool, bool]]:
    """What the model reads before it writes the middle (prefix first, "PSM")."""
    return [special("<|fim_prefix|>"), plain(prefix), special("<|fim_suffix|>"), plain(suffix), special("<|fim_middle|>")]


def file_parts(split: Split, spm: bool = False) -> list[tuple[str, bool, bool]]:
    """The report's figure 4. With spm the suffix stands first, and prefix and middle follow as one run of text."""
    if spm:
        head = [special("<|fim_prefix|>"), special("<|fim_suffix|>"), plain(split.suffix), special("<|fim_middle|>"), plain(split.prefix)]
    else:
        head = prompt_parts(split.prefix, split.suffix)
    return head + [plain(split.middle), special("<|im_end|>")]


def context_parts(repo_name: str, context_files) -> list[tuple[str, bool, bool]]:
    """The repository's name, then each file under its path. context_files: {path: text}, or pairs (a path may come twice)."""
    parts = [special("<|repo_name|>"), plain(f"{repo_name}\n")]
    for path, content in context_files.items() if isinstance(context_files, dict) else context_files:
        parts += [special("<|file_sep|>"), plain(f"{path}\n{content}\n")]
    return parts


def repo_parts(repo_name: str, context_files, path: str, split: Split, spm: bool = False) -> list[tuple[str, bool, bool]]:
    """The report's figure 5: the context files, then the file with the hole."""
    return context_parts(repo_name, context_files) + [special("<|file_sep|>"), plain(f"{path}\n")] + file_parts(split, spm)


join = lambda parts: "".join(text for text, _, _ in parts)


def file_example(split: Split, spm: bool = False) -> str:
    """The training string of one file: <|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}<|im_end|>"""
    return join(file_parts(split, spm))


def repo_example(repo_name: str, context_files, path: str, split: Split, spm: bool = False) -> str:
    """The training string of one file with others of its repository in front."""
    return join(repo_parts(repo_name, context_files, path, split, spm))


# ---- too long: trim the far ends, never the middle -------------------------------------------------------------------
# `measure` says how long a text is: len for characters, or lambda text: len(tokenizer.encode(text)) for tokens.

def shorten(text: str, room: int, measure=len, end: bool = False) -> str:
    """The longest start (or end) of a text that measures at most `room`; nearly the longest where the measure is not len."""
    piece = lambda size: text[len(text) - size :] if end else text[:size]
    room = max(room, 0)
    text = piece(min(len(text), 16 * room))  # no tokenizer averages 16 characters a token: no need to measure more than that
    while text and (size := measure(text)) > room:
        text = piece(min(len(text) - 1, len(text) * room // size))
    return text


def trim(split: Split, limit: int, measure=len) -> Split:
    """
    Shorten a split until its three texts measure at most `limit` together: the prefix loses its head, the suffix its tail.
    The room that the middle leaves is halved; a side that needs less than its half leaves the rest to the other.
    """
    room = limit - measure(split.middle)
    if room < 0:
        raise ValueError(f"a middle of length {limit - room} does not fit in {limit}: allow more, or split with a smaller max_middle")
    prefix, suffix = shorten(split.prefix, room, measure, end=True), shorten(split.suffix, room, measure)
    before, after = measure(prefix), measure(suffix)
    if before + after > room:
        prefix = shorten(prefix, max(room // 2, room - after), measure, end=True)
        suffix = shorten(suffix, max(room - room // 2, room - before), measure)
    return split._replace(prefix=prefix, suffix=suffix)


def trim_repo(repo_name: str, context_files, path: str, split: Split, limit: int, measure=len):
    """
    (context_files, split) so that repo_parts() of them measures at most `limit`, each special token counting 1. The context gets
    at most half of the room; it loses its first files first (similar_files() puts the most similar last).
    """
    size = lambda parts: sum(1 if is_special else measure(content) for content, is_special, _ in parts)
    pairs = list(context_files.items() if isinstance(context_files, dict) else context_files)
    costs = [1 + measure(f"{name}\n{content}\n") for name, content in pairs]
    room = limit - size(repo_parts(repo_name, [], path, Split("", "", "", "")))
    split = trim(split, max(room - min(sum(costs), room // 2), min(room, measure(split.middle))), measure)
    left = room - sum(map(measure, split[:3]))
    kept = []
    for (name, content), cost in zip(reversed(pairs), reversed(costs)):
        if cost > left:
            content = shorten(content, left - measure(f"{name}\n\n") - 2, measure)  # 2: <|file_sep|>, and one where pieces do not add up
            cost = 1 + measure(f"{name}\n{content}\n")
        if cost > left or not content:
            break
        kept.append((name, content))
        left -= cost
    return kept[::-1], split


# ---- which files stand in front: similar ones ------------------------------------------------------------------------

IDENTIFIER = re.compile(r"[^\W\d]\w+")


def bm25(query: str, documents: list[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """
    How much each document has to do with the query, by the identifiers they share. The slow form, which reads like the equation:
        score(d) = sum over t in query of  idf(t) * tf(t, d) (k1 + 1) / (tf(t, d) + k1 (1 - b + b |d| / mean |d|))
        idf(t)   = ln(1 + (N - df(t) + 0.5) / (df(t) + 0.5))
    Index.scores() is the fast form.
    """
    bags = [Counter(IDENTIFIER.findall(document)) for document in documents]
    mean = sum(bag.total() for bag in bags) / len(bags) or 1
    scores = [0.0] * len(bags)
    for term in set(IDENTIFIER.findall(query)):
        df = sum(term in bag for bag in bags)
        idf = np.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
        for d, bag in enumerate(bags):
            scores[d] += idf * bag[term] * (k1 + 1) / (bag[term] + k1 * (1 - b + b * bag.total() / mean))
    return scores


class Index:
    """
    BM25 over the snippets of a repository {path: text}: built once, asked for every file. A snippet is a window of `lines` lines. The
    weight that a term gives to a snippet does not depend on the query: all are computed here, sorted by term; a query adds slices.
    """

    def __init__(self, files: dict[str, str], lines: int = 40, k1: float = 1.2, b: float = 0.75):
        self.files = {path: normalise(content) for path, content in files.items()}
        self.snippets = [(path, piece) for path, content in self.files.items() for piece in windows(content, lines)]
        self.term_ids, terms, documents, tf = {}, [], [], []
        lengths = np.zeros(len(self.snippets))
        for d, (_, piece) in enumerate(self.snippets):
            bag = Counter(IDENTIFIER.findall(piece))
            lengths[d] = bag.total()
            terms += [self.term_ids.setdefault(term, len(self.term_ids)) for term in bag]
            documents += [d] * len(bag)
            tf += bag.values()
        terms, documents, tf = np.array(terms, np.int64), np.array(documents, np.int64), np.array(tf, np.float64)
        order = np.argsort(terms, kind="stable")
        df = np.bincount(terms, minlength=len(self.term_ids))  # a term is counted once a document
        idf = np.log(1 + (len(self.snippets) - df + 0.5) / (df + 0.5))
        shrink = k1 * (1 - b + b * lengths / (lengths.mean() if len(lengths) and lengths.any() else 1))
        self.weights = (idf[terms] * tf * (k1 + 1) / (tf + shrink[documents]))[order]
        self.documents = documents[order]
        self.starts = np.concatenate([[0], np.cumsum(df)])

    def scores(self, query: str) -> np.ndarray:
        """BM25 of every snippet against the identifiers of the query."""
        scores = np.zeros(len(self.snippets))
        for term in sorted({self.term_ids[t] for t in IDENTIFIER.findall(query) if t in self.term_ids}):
            rows = slice(self.starts[term], self.starts[term + 1])
            scores[self.documents[rows]] += self.weights[rows]
        return scores


def windows(text: str, lines: int) -> list[str]:
    """A text in consecutive pieces of so many lines, without the blank ones."""
    rows = text.splitlines(keepends=True)
    pieces = ("".join(rows[i : i + lines]).rstrip("\n") for i in range(0, len(rows), lines))
    return [piece for piece in pieces if piece.strip()]


def leaks(content: str, split: Split) -> bool:
    """Does a file give the answer away? It has the middle in its own surroundings, or more than half of the middle's longer lines."""
    if split.prefix[-20:] + split.middle + split.suffix[:20] in content:
        return True
    telling = [line for line in map(str.strip, split.middle.split("\n")) if len(line) >= 20]
    return 2 * sum(line in content for line in telling) > len(telling)


def similar_files(index: Index, path: str, split: Split, k: int = 4, near: int = 2000) -> list[tuple[str, str]]:
    """
    The k snippets (path, text) of the repository most similar to what stands around the hole, the most similar last, next to the hole.
    The query is the last `near` characters of the prefix and the first of the suffix: what a cursor knows. Files that hold the target's
    text are left out: the target itself, its copies, and whatever leaks() finds.
    """
    scores = index.scores(split.prefix[-near:] + "\n" + split.suffix[:near])
    chosen, leaking = [], {path: True}
    for d in np.argsort(-scores, kind="stable"):
        if len(chosen) == k or scores[d] <= 0:
            break
        name, snippet = index.snippets[d]
        if name not in leaking:
            leaking[name] = leaks(index.files[name], split)
        if not leaking[name]:
            chosen.append((name, snippet))
    return chosen[::-1]


# ---- which files stand in front: what a file imports -----------------------------------------------------------------
# A file provides names and needs names. A need is a list of alternatives, the first that some file provides wins.

NEEDS = {
    "python": re.compile(r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#;]*)|import[ \t]+([^\n#;]*))", re.M),
    "java": re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)(\.\*)?[ \t]*;", re.M),
    "javascript": re.compile(r"""(?:\bfrom|\bimport|\brequire\s*\(|\bimport\s*\()\s*["'](\.[^"'\n]*)["']"""),
    "c#": re.compile(r"^[ \t]*(?:global[ \t]+)?using[ \t]+(?:static[ \t]+)?([\w.]+)[ \t]*;", re.M),
    "go": re.compile(r'^[ \t]*(?:import[ \t]+)?(?:[\w.]+[ \t]+)?"([^"\n]+)"[ \t]*$', re.M),
    "rust": re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?(?:(mod)[ \t]+(\w+)[ \t]*;|use[ \t]+((?:crate|self|super)(?:::\w+)*))", re.M),
    "c": re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.M),
}
NEEDS |= {"typescript": NEEDS["javascript"], "c++": NEEDS["c"]}
PACKAGE = {"java": re.compile(r"^[ \t]*package[ \t]+([\w.]+)", re.M), "c#": re.compile(r"^[ \t]*namespace[ \t]+([\w.]+)", re.M)}


def endings(path: str) -> list[str]:
    """"a/b/c" -> ["a/b/c", "b/c", "c"]"""
    pieces = path.split("/")
    return ["/".join(pieces[i:]) for i in range(len(pieces))]


def rust_module(path: str) -> str:
    """The module that a Rust file is: src/a/b.rs and src/a/b/mod.rs are both src/a/b; lib.rs and main.rs are their folder."""
    stem = posixpath.splitext(path)[0]
    return posixpath.dirname(stem) if posixpath.basename(stem) in ("mod", "lib", "main") else stem


def provides(path: str, content: str, language: str, paths) -> list[str]:
    """The names under which other files of the repository may import this one."""
    folder, name = posixpath.split(posixpath.splitext(path)[0])
    stem = posixpath.join(folder, name)
    if language == "python":
        stem, root = folder if name == "__init__" else stem, folder
        while root and f"{root}/__init__.py" in paths:  # the importable name starts below the first folder that is no package
            root = posixpath.dirname(root)
        return [stem.replace("/", "."), stem[len(root) :].strip("/").replace("/", ".")]
    if language in PACKAGE:
        return [full for package in PACKAGE[language].findall(content) for full in (package, f"{package}.{name}")]
    if language in ("javascript", "typescript"):
        return [path, stem, folder] if name == "index" else [path, stem]
    return [folder] if language == "go" else [rust_module(path)] if language == "rust" else endings(path)


def needs(path: str, content: str, language: str) -> list[list[str]]:
    """What a file imports: for each import the names it may mean, the best first."""
    found, beside = NEEDS[language].findall(content), functools.partial(posixpath.join, posixpath.dirname(path))
    if language == "python":
        return [need for match in found for need in python_needs(posixpath.dirname(path), *match)]
    if language == "java":
        return [[name] if star else [name, name.rpartition(".")[0]] for name, star in found]
    if language in ("javascript", "typescript"):
        return [[at, posixpath.splitext(at)[0]] for at in map(posixpath.normpath, map(beside, found))]
    if language in ("c", "c++"):
        return [[posixpath.normpath(beside(name)), posixpath.normpath(name)] for name in found]
    if language == "rust":
        return [rust_need(path, *match) for match in found]
    return [endings(name) if language == "go" else [name] for name in found]


def python_needs(folder: str, source: str, names: str, modules: str) -> list[list[str]]:
    """`import a.b, c` and `from .a import b, c`: b may be a module of its own or a name in a."""
    first_words = lambda listing: [item.split()[0] for item in listing.strip("() \t\n").split(",") if item.split()]
    if modules:
        return [[name] for name in first_words(modules)]
    module = source.lstrip(".")
    if dots := len(source) - len(module):
        above = folder.split("/")[: folder.count("/") + 2 - dots] if folder else []
        source = ".".join([*above, module]).strip(".")
    return [[f"{source}.{name}".strip("."), source] for name in first_words(re.sub(r"#[^\n]*", "", names))]


def rust_need(path: str, mod: str, child: str, use: str) -> list[str]:
    """`mod x;` is a file below this module; `use crate::a::B` is the longest of a/B and a that is a file."""
    at, words = rust_module(path), [child] if mod else use.split("::")
    if words[0] == "crate":
        at = path[: path.rfind("src/") + 3] if "src/" in path else ""
    while words and words[0] in ("crate", "self", "super"):
        at = posixpath.dirname(at) if words[0] == "super" else at
        words = words[1:]
    return ["/".join(filter(None, [at, *words[:n]])) for n in range(len(words), 0, -1)]


def imports(files: dict[str, str]) -> dict[str, set[str]]:
    """{path: the other files of the repository that it imports}"""
    family = {"c++": "c", "typescript": "javascript"}  # they share their headers, their modules
    languages = {path: language for path in sorted(files) if (language := language_of(path))}
    provided = {}
    for path, language in languages.items():
        for name in set(provides(path, files[path], language, files)):
            provided.setdefault((family.get(language, language), name), []).append(path)
    edges = {path: set() for path in files}
    for path, language in languages.items():
        for names in needs(path, files[path], language):
            keys = [(family.get(language, language), name) for name in names]
            edges[path].update(next((provided[key] for key in keys if key in provided), ()))
        edges[path].discard(path)
    return edges


def dependency_order(files: dict[str, str]) -> list[str]:
    """
    The paths of a repository in an order in which a file comes after the files that it imports.
    Files that have nothing to do with each other stay apart (connected components, by their first path). Inside a component, again and
    again the file with the fewest imports that are not placed yet comes next, by path among equals. Without cycles that number is
    always 0, so every dependency precedes its user; a cycle is entered where it is weakest.
    """
    edges = imports(files)
    users = {path: [] for path in files}
    for user, targets in edges.items():
        for path in targets:
            users[path].append(user)
    component = {}
    for first in sorted(files):
        stack = [first] if first not in component else []
        while stack:
            path = stack.pop()
            if path not in component:
                component[path] = first
                stack += [*edges[path], *users[path]]
    missing = {path: len(edges[path]) for path in files}
    heap = [(component[path], missing[path], path) for path in files]
    heapq.heapify(heap)
    order = []
    while heap:
        _, count, path = heapq.heappop(heap)
        if missing.get(path) != count:
            continue  # it is placed, or this entry is from before its count went down
        del missing[path]
        order.append(path)
        for user in users[path]:
            if user in missing:
                missing[user] -= 1
                heapq.heappush(heap, (component[user], missing[user], user))
    return order


# ---- filling a hole: token healing, stop, repeated suffix ------------------------------------------------------------


class Vocabulary:
    """The ordinary tokens of a tokenizer as text. Tokens that are a part of a character have none, and are never forced."""

    def __init__(self, tokenizer):
        special_ids = set(tokenizer.special.values())
        self.word = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i not in special_ids}
        self.word = {i: word for i, word in self.word.items() if word and "\ufffd" not in word}
        self.pairs = sorted((word, i) for i, word in self.word.items())
        self.id = {word: i for word, i in reversed(self.pairs)}

    def starting_with(self, text: str) -> list[tuple[str, int]]:
        first = bisect_left(self.pairs, (text,))
        return self.pairs[first : bisect_left(self.pairs, (text + chr(sys.maxunicode),))]

    def forced(self, must: str) -> list[int]:
        """The tokens that may come next where the text has to go on with `must`: they start with it, or it starts with them."""
        shorter = [self.id[must[:n]] for n in range(1, len(must)) if must[:n] in self.id and must[n:].isascii()]  # ASCII has tokens
        return [i for _, i in self.starting_with(must)] + shorter

    def tail(self, ids: list[int]) -> int:
        """
        How many tokens at the end of a prompt to take back: the most whose joined text could be the start of one longer token.
        "ht" + "tp" may have been about to become "http", or "https://": both tokens go back, and the model chooses again.
        """
        longest = max(map(len, self.word.values()), default=0)
        back, joined = 0, ""
        for n, i in enumerate(reversed(ids), 1):
            joined = self.word.get(i, "\ufffd") + joined
            if len(joined) >= longest or "\ufffd" in joined:
                break
            if any(word != joined for word, _ in self.starting_with(joined)):
                back = n
        return back


vocabulary_of = functools.lru_cache(maxsize=2)(Vocabulary)  # decoding every token takes a while: once a tokenizer


def choose(logits, temperature: float, generator=None) -> int:
    """Sample an id from logits (V,); temperature 0 takes the most likely."""
    return int(logits.argmax() if temperature == 0 else (logits.float() / temperature).softmax(-1).multinomial(1, generator=generator))


def force(model, row, ids: list[int], must: str, vocabulary: Vocabulary, temperature: float, generator=None) -> list[int]:
    """New ids that write the text `must`, and perhaps go on: the model chooses among the tokens that do not contradict it."""
    new = []
    while must:
        allowed = vocabulary.forced(must)
        logits, _ = model(row(ids + new))  # (1, T, V), or (1, 1, V)
        new.append(allowed[choose(logits[0, -1][allowed], temperature, generator)])
        must = must[len(vocabulary.word[new[-1]]) :]  # empty where the token goes beyond it
    return new


def extend(model, row, ids: list[int], count: int, stops: set[int], temperature: float, generator=None) -> list[int]:
    """At most `count` new ids, up to the first stop, with the model's own generate() where it has one."""
    if count > 0 and hasattr(model, "generate"):
        return model.generate(row(ids), count, temperature, stop_ids=tuple(stops), generator=generator)[0, len(ids) :].tolist()
    new = []
    while len(new) < count and not (new and new[-1] in stops):
        new.append(choose(model(row(ids + new))[0][0, -1], temperature, generator))
    return new


def complete(model, prefix: str, suffix: str, tokenizer, *, repo_name: str | None = None, context_files=(), path: str = "",
             language: str | None = None, context: int = 1024, max_new_tokens: int = 64, temperature: float = 0.0, heal: bool = True,
             generator=None) -> str:
    """
    What belongs between prefix and suffix, as a model trained on file_parts() or repo_parts() says it.

    model       model(input_ids (1, T)) -> (logits (1, T or 1, V), loss); its generate() is used where it has one
    tokenizer   .encode(text), .decode(ids), .encode_parts(parts), .special {token: id}, .vocab_size
    repo_name   with context_files and path: the repository form
    context     tokens, the new ones included; what does not fit is trimmed
    heal        take back the last tokens of the prefix and let the model write them again: a cursor is rarely where a token ends

    It stops at <|im_end|> (or any special token); drop_repeat() looks at its end, with the parser of `language` where it is given.
    """
    import torch  # here and not above: cutting files needs none of it, and starts ten times faster without

    device = next(model.parameters()).device if hasattr(model, "parameters") else "cpu"
    row = lambda ids: torch.tensor([ids], device=device)
    measure = lambda text: len(tokenizer.encode(text))
    prefix, suffix = normalise(prefix), normalise(suffix)
    hole, room, before = Split(prefix, "", suffix, "cursor"), context - max_new_tokens, []
    if repo_name is None:
        hole = trim(hole, room - FILE_SPECIALS, measure)
    else:
        context_files, hole = trim_repo(repo_name, context_files, path, hole, room, measure)
        before = [*context_parts(repo_name, context_files), special("<|file_sep|>"), plain(f"{path}\n")]
    vocabulary, stops, prefix_ids = vocabulary_of(tokenizer), set(tokenizer.special.values()), tokenizer.encode(hole.prefix)
    kept = len(prefix_ids) - (vocabulary.tail(prefix_ids) if heal else 0)
    tail = tokenizer.decode(prefix_ids[kept:])
    start, _, *rest = prompt_parts(hole.prefix, hole.suffix)
    ids = tokenizer.encode_parts([*before, start])[0] + prefix_ids[:kept] + tokenizer.encode_parts(rest)[0]
    with torch.no_grad():
        new = force(model, row, ids, tail, vocabulary, temperature, generator)
        new += extend(model, row, ids + new, max_new_tokens - len(new), stops, temperature, generator)
    end = next((n for n, i in enumerate(new) if i in stops), len(new))
    completion = tokenizer.decode(new[:end]).rstrip("\ufffd")[len(tail) :]
    return drop_repeat(prefix, completion, suffix, language)


def imbalance(text: str) -> int:
    """A stand-in for a parser where the language is not known: brackets and quotes without a partner."""
    brackets = sum(abs(text.count(a) - text.count(b)) for a, b in ("()", "[]", "{}"))
    return brackets + sum(text.count(quote) % 2 for quote in "\"'`")


def drop_repeat(prefix: str, completion: str, suffix: str, language: str | None = None) -> str:
    """
    A completion without its repetition of the rest of the line, which already stands behind the cursor:  f(x|)  completed by  y)  ->  y
    Only a parser can tell repetition from need ( f(g(x|)  wants the same  ) ), so it is dropped where the text has fewer faults without
    it. Where neither is better a long repetition (8 characters up) goes and a short one stays.
    """
    line, written = suffix.split("\n", 1)[0], completion.rstrip()
    rest = line.strip()
    if not rest or not written.endswith(rest):
        return completion
    shorter = written[: len(written) - len(rest)]
    shorter = shorter.rstrip(" \t") if line[0].isspace() else shorter
    count = functools.partial(faults, language=language) if language else imbalance
    with_it, without = count(prefix + completion + suffix), count(prefix + shorter + suffix)
    return shorter if without < with_it or (without == with_it and len(rest) >= 8) else completion


# ---- the metrics -----------------------------------------------------------------------------------------------------


def levenshtein_table(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of a character that turn a into b: the textbook table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def levenshtein(a: str, b: str) -> int:
    """
    The same number, a whole row of the table at once (Myers 1999, Hyyro 2003).
    Neighbours in a row differ by -1, 0 or 1, so two bit vectors hold it: `up` where the next is larger, `down` where it is smaller. One
    addition carries through a run of matches. Python's integers are the bit vectors, of any length.
    """
    if not a or not b:
        return len(a) + len(b)
    match = {}
    for i, x in enumerate(a):
        match[x] = match.get(x, 0) | 1 << i
    mask, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = mask, 0, len(a)
    for y in b:
        equal = match.get(y, 0)
        diagonal = equal | down
        carried = (((equal & up) + up) ^ up) | equal
        rises, falls = down | ~(carried | up) & mask, up & carried
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = rises << 1 | 1, falls << 1
        up, down = (falls | ~(diagonal | rises)) & mask, rises & diagonal & mask
    return distance


def edit_similarity(prediction: str, target: str) -> float:
    """100 * (1 - Levenshtein distance / length of the longer one); two empty texts are equal."""
    return 100 * (1 - levenshtein(prediction, target) / max(len(prediction), len(target), 1))


STRINGS = r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
COMMENT = {"python": re.compile(STRINGS + r"|(#[^\n]*)"), "other": re.compile(STRINGS + r"|(//[^\n]*|/\*[\s\S]*?\*/)")}


def exact_match(prediction: str, target: str, language: str | None = None) -> bool:
    """Equal line by line: stripped, without blank lines, and without comments where the language is known."""
    if language is not None:
        comment = COMMENT["python" if language == "python" else "other"]
        prediction, target = (comment.sub(lambda found: "" if found[1] else found[0], code) for code in (prediction, target))
    lines = lambda code: [line.strip() for line in code.splitlines() if line.strip()]
    return lines(prediction) == lines(target)


def holes(files: dict[str, dict[str, str]], level: str, count: int, rng, max_middle: int):
    """(repository, path, split) of exactly this level, from `count` files that parse, one each; fewer where there are fewer."""
    for repo, path in shuffled(sorted((name, path) for name in files for path in files[name] if language_of(path)), rng):
        code, language = normalise(files[repo][path]), language_of(path)
        if count > 0 and code.strip() and parses(code, language):
            found = split(code, language, level, rng, max_middle)
            if found.level == level and found.middle.strip():
                count -= 1
                yield repo, path, found


def evaluate(model, tokenizer, files: dict[str, dict[str, str]], *, count: int = 20, levels=LEVELS, context: int = 1024,
             max_new_tokens: int = 64, max_middle: int = 160, seed: int = 0, heal: bool = True) -> list[dict]:
    """
    How well a model fills holes in files it has not seen: one row a level and arm, the same holes in both arms, greedy.

    files    {repository: {path: text}} of held-out projects
    returns  [{"level", "context": "file" or "repository", "count", "exact_match", "edit_similarity", "parse_rate", "marks"}], all in
             per cent; marks are the three by hole: {"exact_match": [...], ...}

    The parse rate is that of the whole file with the completion in the hole; every file here parses with its own middle.
    """
    indexes, rows = {repo: Index(files[repo]) for repo in files}, []
    for level in levels:
        scores = {"file": [], "repository": []}
        for repo, path, hole in holes(files, level, count, random.Random(f"{seed} {level}"), max_middle):
            language = language_of(path)
            settings = {"language": language, "context": context, "max_new_tokens": max_new_tokens, "heal": heal}
            around = {"repo_name": repo, "path": path, "context_files": similar_files(indexes[repo], path, hole)}
            for arm, more in (("file", {}), ("repository", around)):
                got = complete(model, hole.prefix, hole.suffix, tokenizer, **settings, **more)
                whole = parses(hole.prefix + got + hole.suffix, language)
                scores[arm].append((100 * exact_match(got, hole.middle, language), edit_similarity(got, hole.middle), 100 * whole))
        for arm, found in scores.items():
            marks = {metric: [hole[i] for hole in found] for i, metric in enumerate(("exact_match", "edit_similarity", "parse_rate"))}
            means = {metric: float(np.mean(values or [np.nan])) for metric, values in marks.items()}
            rows.append({"level": level, "context": arm, "count": len(found), **means, "marks": marks})
    return rows


def table(rows: list[dict]) -> str:
    """The rows of evaluate(), aligned."""
    line = "{level:<12}{context:<12}{count:>6}{exact_match:>15.1f}{edit_similarity:>17.1f}{parse_rate:>14.1f}"
    head = f"{'level':<12}{'context':<12}{'holes':>6}{'exact match %':>15}{'edit similarity':>17}{'parse rate %':>14}"
    return "\n".join([head, *(line.format(**row) for row in rows)])


# ---- command line ----------------------------------------------------------------------------------------------------


def read_source(path: Path) -> str:
    """A source file as text: UTF-8, or what a Python file says of itself."""
    try:
        if language_of(path) == "python":
            with tokenize.open(path) as file:
                return file.read()
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(f"{path} is not readable as text ({error}): convert it to UTF-8") from None


def read_repository(folder: Path) -> dict[str, str]:
    """{path: text} of the source files below a folder; hidden folders, files of no known language and unreadable ones are left out."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: --repo wants the root of a repository")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if language_of(name) and not re.search(r"(^|/)\.", name) and path.is_file() and path.stat().st_size <= HUGE:
            try:
                files[name] = read_source(path)
            except ValueError:
                continue
    return files


def show(split: Split, around: int = 3) -> str:
    """The last lines of the prefix, the middle between marks, the first lines of the suffix."""
    above, below = "\n".join(split.prefix.split("\n")[-around:]), "\n".join(split.suffix.split("\n")[:around])
    note = "" if split.level == split.asked else f", for want of a {split.asked} that fits"
    title = f"-- {split.level} ({split.node}){note}: {len(split.prefix):,} + {len(split.middle):,} + {len(split.suffix):,} characters "
    return f"{title:-<100}\n{above}\u27e6{split.middle}\u27e7{below}\n"


def bench(seconds: float) -> None:
    """Examples per second on one core: the files of the standard library without its tests, in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(p.parts) and p.stat().st_size]
    random.Random(0).shuffle(paths)
    files = {path.relative_to(root).as_posix(): read_source(path) for path in paths}
    size = sum(len(to_bytes(code)) for code in files.values()) / len(files)
    print(f"{len(files)} files, {size / 1e3:.1f} kB each, one process, one example a file")

    names, index = list(files), Index(files)
    works = {"tree-sitter alone": lambda path, code, rng: parser("python").parse(to_bytes(code))}
    works |= {level: lambda path, code, rng, level=level: file_example(split(code, "python", level, rng)) for level in LEVELS}
    works["line, similar files"] = lambda path, code, rng: similar_files(index, path, split(code, "python", "line", rng))
    rates = {name: [] for name in works}
    for name, work in [*works.items()] * 3:  # by turns, and the middle one of three: the machine may not be ours alone
        rng, done, start = random.Random(len(rates[name])), 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            path = names[(done + len(rates[name]) * len(names) // 3) % len(names)]
            work(path, files[path], rng)
            done += 1
        rates[name].append(done / (time.perf_counter() - start))
    for name, found in rates.items():
        speed, bare = sorted(found)[1], sorted(rates["tree-sitter alone"])[1]
        print(f"{name:<22}{speed:>9,.0f} files/s {speed * size / 1e6:>8.1f} MB/s {speed / bare:>8.2f} x tree-sitter alone")


def main(argv=None) -> None:
    """Shows fill-in-the-middle examples of a source file, cut at five levels; what was cut out stands between \u27e6 and \u27e7."""
    parser = argparse.ArgumentParser(prog="fim.py", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__), help="the source file (default: this one)")
    parser.add_argument("--language", help=f"one of {', '.join(LANGUAGES)}, or none; by the file's ending where not given")
    parser.add_argument("--levels", default=",".join(LEVELS), help="which levels, with commas (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1, help="examples a level (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for the random places (default: %(default)s)")
    parser.add_argument("--max-middle", type=int, default=1000, help="longest middle, in characters (default: %(default)s)")
    parser.add_argument("--repo", type=Path, help="folder whose similar snippets stand in front")
    parser.add_argument("--string", action="store_true", help="print the training strings themselves")
    parser.add_argument("--spm", action="store_true", help="with --string: suffix first, instead of prefix first")
    parser.add_argument("--bench", action="store_true", help="time the levels on the standard library instead")
    parser.add_argument("--seconds", type=float, default=3.0, help="with --bench: time for each line (default: %(default)s)")
    args = parser.parse_args(argv)
    if wrong := [name for name in ("n", "max_middle", "seconds") if getattr(args, name) <= 0]:
        raise ValueError(f"--{wrong[0].replace('_', '-')} {getattr(args, wrong[0])}: give a positive number")
    if args.bench:
        return bench(args.seconds)
    path, language, rng = args.file, args.language or language_of(args.file), random.Random(args.seed)
    source, levels, fell_back = Source(read_source(path), None if language == "none" else language), args.levels.split(","), 0
    index, repo, target = None, "", path.name
    if args.repo:
        root, index = args.repo.resolve(), Index(read_repository(args.repo))
        repo, target = root.name, os.path.relpath(path.resolve(), root)
    for level in (level for level in levels for _ in range(args.n)):
        hole = source.split(level, rng, args.max_middle)
        fell_back += hole.level != hole.asked
        context = similar_files(index, target, hole) if index else []
        if args.string:
            print(repo_example(repo, context, target, hole, args.spm) if index else file_example(hole, args.spm))
        else:
            print(show(hole), *[f"   in front: {name}, {len(snippet):,} characters\n" for name, snippet in context], sep="")
    print(f"{len(levels) * args.n} examples of {path} ({language}), {fell_back} fell back to a lower level", file=sys.stderr)


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
        print(f"fim.py: {error}", file=sys.stderr)
        sys.exit(2)
