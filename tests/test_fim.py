"""
The claims of fim.py: every cut gives back its file, the middles are what they say by an independent parser, the strings are the
report's to the letter, no context holds the answer, and a hole is filled where a cursor stands.
"""

import ast
import random
import re
import subprocess
import sys
import sysconfig
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fim

AST_LEVELS = ("expression", "statement", "function")
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def library(every: int = 1, tests: bool = False) -> dict[str, str]:
    """{path: text} of the standard library's readable files that are not empty, in a fixed random order."""
    unwanted = {"site-packages"} | (set() if tests else {"test", "tests", "idle_test"})
    paths = [path for path in sorted(STDLIB.rglob("*.py")) if not unwanted & set(path.parts)]
    random.Random(0).shuffle(paths)
    files = {}
    for path in paths[::every]:
        try:
            files[path.relative_to(STDLIB).as_posix()] = fim.normalise(fim.read_source(path))
        except ValueError:  # a few test files are broken on purpose
            continue
    return {path: code for path, code in files.items() if code}


# ---------------------------------------------------------------------- cutting


def test_every_cut_of_the_whole_standard_library_gives_back_its_file_at_every_level():
    rng, levels = random.Random(0), Counter()
    for code in library(tests=True).values():
        source = fim.Source(code, "python")
        for level in fim.LEVELS:
            cut = source.split(level, rng)
            assert cut.prefix + cut.middle + cut.suffix == code and cut.middle
            assert cut.asked == level and fim.LEVELS.index(cut.level) <= fim.LEVELS.index(level)
            levels[cut.asked, cut.level] += 1
    for level in fim.LEVELS:  # falling back is the exception; a fifth of the files have no function that is small enough
        assert levels[level, level] > (0.75 if level == "function" else 0.85) * sum(n for (asked, _), n in levels.items() if asked == level)


def spans(code: str):
    """{level: byte spans of what Python's own parser calls an expression, a statement, a function}, and the spans of f-strings."""
    starts = [0, *np.cumsum([len(line) + 1 for line in code.encode().split(b"\n")]).tolist()]
    found, formatted = {level: {} for level in AST_LEVELS}, []
    for node in ast.walk(ast.parse(code)):
        level = ("expression" if isinstance(node, ast.expr) else
                 "function" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else
                 "statement" if isinstance(node, ast.stmt) else None)
        if level:
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            found[level].setdefault(start, set()).add(end)
            formatted += [(start, end)] if isinstance(node, ast.JoinedStr) else []
    return found, formatted


def test_python_middles_are_nodes_of_their_level_by_the_parser_of_python_itself():
    rng, checked = random.Random(1), Counter()
    for code in library(every=8, tests=True).values():
        try:
            with warnings.catch_warnings(action="ignore"):
                found, formatted = spans(code)
        except (SyntaxError, ValueError):
            continue
        source = fim.Source(code, "python")
        for cut in [source.split(level, rng) for level in AST_LEVELS for _ in range(5)]:
            start = len(cut.prefix.encode())
            end = start + len(cut.middle.encode())
            if cut.level not in AST_LEVELS or any(a <= start and end <= b for a, b in formatted):  # 3.11 misplaces nodes of f-strings
                continue
            ends = found[cut.level].get(start, set())
            # tree-sitter counts a comment behind the last line of a block as part of it, and nests `a or b or c`
            comments = any(re.fullmatch(rb"(\s*#[^\n]*)*\s*", code.encode()[e:end]) for e in ends if e <= end)
            nested = cut.node == "boolean_operator" and isinstance(ast.parse(f"({cut.middle})", mode="eval").body, ast.BoolOp)
            assert end in ends or comments or nested, (cut.node, cut.middle)
            checked[cut.level] += 1
    assert min(checked[level] for level in AST_LEVELS) > 500


BODY = "{{\n  {0} = w * h;\n  if (total < 0) {{ throw {1}; }}\n  return total;\n}}\n"
SNIPPETS = {
    "python": "def area(w, h):\n    total = w * h\n    if total < 0:\n        raise ValueError(total)\n    return total\n" * 4,
    "java": ("class A {\nint area(int w, int h) " + BODY.format("int total", "new Error(total)") + "}\n") * 4,
    "javascript": ("function area(w, h) " + BODY.format("const total", "new Error(total)")) * 4,
    "typescript": ("function area(w: number, h: number): number " + BODY.format("const total", "new Error(total)")) * 4,
    "c#": ("class A {\nint Area(int w, int h) " + BODY.format("var total", "new Error(total)") + "}\n") * 4,
    "go": "package a\n" + "func Area(w int, h int) int {\n\ttotal := w * h\n\tif total < 0 {\n\t\tpanic(h)\n\t}\n\treturn total\n}\n" * 4,
    "rust": "fn area(w: i64, h: i64) -> i64 {\n    let total = w * h;\n    if total < 0 { panic!(); }\n    return total;\n}\n" * 4,
    "c": ("int area(int w, int h) " + BODY.format("int total", "1").replace("throw 1", "fail(h)")) * 4,
    "c++": ("int area(int w, int h) " + BODY.format("auto total", "Error(total)")) * 4,
}


@pytest.mark.parametrize("language", fim.LANGUAGES)
def test_every_language_has_all_levels_and_its_functions_still_parse_alone(language):
    code, rng = SNIPPETS[language], random.Random(0)
    assert fim.parses(code, language)
    for level in AST_LEVELS:
        seen = set()
        for _ in range(40):
            cut = fim.split(code, language, level, rng)
            assert cut.level == level and cut.prefix + cut.middle + cut.suffix == code
            seen.add(cut.middle)
        assert {"expression": "w * h", "statement": "return total", "function": "area"}[level].lower() in " ".join(seen).lower()
    alone = cut.middle if language not in ("java", "c#") else f"class A {{ {cut.middle} }}"
    assert fim.parses(alone if language != "go" else f"package a\n{alone}", language)


@pytest.mark.parametrize("language", fim.LANGUAGES)
def test_every_node_type_of_the_table_exists_in_its_grammar(language):
    for level in AST_LEVELS:
        for kind in fim.kinds(language, level):
            assert fim.grammar(language).id_for_node_kind(kind, True) is not None, kind


NESTED = {  # functions inside functions and classes, and the keyword where it names no function
    "python": "async def g():\n    f = 'def x'\n    # def\n    class A:\n        def b(self): pass\n",
    "go": "func (a A) M(f func(int) int) {\n\tg := func() int { return 1 }\n\tg()\n}\n",
    "rust": "impl A { pub(crate) unsafe fn m(f: fn(i32)) { fn inner() {} } }\ntrait T { fn named(&self); fn given(&self) { } }\n",
}


@pytest.mark.parametrize("language", fim.KEYWORD)
def test_the_keyword_finds_every_function_once_and_nothing_else(language):
    for code in [SNIPPETS[language] + NESTED[language], *(library(every=20).values() if language == "python" else ())]:
        source = fim.Source(code, language)
        if source.root is not None:
            listed = fim.matches(source.root, language, [f"({kind})" for kind in fim.kinds(language, "function")])
            found = sorted(node.byte_range for node in source.nodes("function", random.Random(0)))
            assert found == [node.byte_range for node in listed]


def test_random_nodes_are_as_uniform_as_the_list_of_all_nodes():
    code = "a = f(1)\nif a:\n    b = g(2)\n    c = h(3, k(4))\nd = 5 + 6\n" * 4
    drawn = Counter(fim.split(code, "python", "expression", random.Random(seed))[0] for seed in range(4000))
    places = len(fim.matches(fim.Source(code, "python").root, "python", [f"({k})" for k in fim.kinds("python", "expression")]))
    assert len(drawn) == places == 20
    expected = 4000 / places
    assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 43.8  # chi-square with 19 degrees of freedom, p = 0.001


def test_a_line_is_cut_without_its_indentation_and_without_its_newline():
    rng = random.Random(0)
    for code in library(every=20).values():
        cut = fim.split(code, None, "line", rng)
        if cut.level == "line":
            assert cut.prefix.rsplit("\n", 1)[-1].strip() == "" and not cut.middle[0].isspace() and "\n" not in cut.middle
            assert cut.suffix == "" or cut.suffix[0] == "\n"


def test_char_cuts_fall_inside_words_as_often_as_chance_says_and_all_pairs_are_equally_likely():
    code, rng = "ab cd ef gh ij kl mn op qr st uv wx yz\n" * 5, random.Random(0)
    cuts = [fim.split(code, None, "char", rng) for _ in range(3000)]
    inside = np.mean([cut.prefix[-1:].isalpha() and cut.middle[0].isalpha() for cut in cuts])
    assert abs(inside - 1 / 3) < 0.04
    pairs = Counter((len(cut.prefix), len(cut.middle)) for cut in (fim.split("abcd", None, "char", rng) for _ in range(5000)))
    assert len(pairs) == 10 and min(pairs.values()) > 400 and max(pairs.values()) < 600
    short = Counter((len(cut.prefix), len(cut.middle)) for cut in (fim.split("abcd", None, "char", rng, max_middle=2) for _ in range(3500)))
    assert len(short) == 7 and min(short.values()) > 400 and max(short.values()) < 600


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300), st.sampled_from(fim.LEVELS), st.sampled_from([None, *fim.LANGUAGES]), st.integers(0, 99))
def test_any_text_at_all_is_cut_in_three_and_comes_back(text, level, language, seed):
    if not text:
        with pytest.raises(ValueError, match="empty"):
            fim.split(text, language, level, random.Random(seed))
        return
    cut = fim.split(text, language, level, random.Random(seed))
    assert cut.prefix + cut.middle + cut.suffix == text.replace("\r\n", "\n").replace("\r", "\n") and cut.middle


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["é = f('ü', 2)\n", "if 漢:\n    g(字)\n", "def 𝒻(x):\n    return x + '🙂'\n"]), min_size=5))
def test_non_ascii_middles_are_whole_nodes(pieces):
    code = "".join(pieces)
    for level in AST_LEVELS:
        cut = fim.split(code, "python", level, random.Random(len(pieces)))
        assert cut.prefix + cut.middle + cut.suffix == code
        if cut.level in AST_LEVELS:
            ast.parse(textwrap.dedent(cut.middle))


def test_windows_and_old_mac_line_ends_become_newlines_before_the_cut():
    cut = fim.split("a = 1\r\nb = 2\rc = 3\r\n" * 5, "python", "line", random.Random(0))
    assert "\r" not in cut.prefix + cut.middle + cut.suffix and cut.suffix.startswith("\n")


FALLS_BACK = {
    "one long line": ("x = [" + ", ".join(map(str, range(500))) + "]", "char"),
    "a file of prose": ("Once upon a time, there was a file (which was none).\nIt did [not parse, and so it was cut.\n" * 9, "line"),
    "a torn file": ("def f(x):\n    return (x +\n" * 20, "line"),
    "deeper than any parser likes": ("(" * 5000 + "\n", "char"),
    "too long to parse": ("x = f(1)\n" * 60_000, "line"),
    "only comments": ("# one\n# two\n# three\n# four\n", "line"),
}


@pytest.mark.parametrize("what", FALLS_BACK)
def test_a_file_without_a_fitting_node_falls_back_and_says_so(what):
    code, level = FALLS_BACK[what]
    cut = fim.split(code, "python", "function", random.Random(0))
    assert (cut.level, cut.asked, cut.prefix + cut.middle + cut.suffix) == (level, "function", code)


def test_what_nests_too_deep_for_error_recovery_is_not_parsed():
    assert fim.nesting("f(a[{'(':1}])") == 4 and fim.nesting("") == 0 and fim.nesting(")") == 0
    assert fim.nesting("x\n" + " \t" * 201 + "y") > fim.DEEPEST and fim.nesting("é(" * 401) > fim.DEEPEST
    deep = lambda n: fim.Source("x = " + "(" * n + "1" + ")" * n, "python").root
    assert deep(401) is None and deep(400) is not None and not deep(400).has_error


def test_middles_above_the_char_level_leave_most_of_the_file_and_heed_the_limit():
    rng = random.Random(0)
    for code in library(every=40).values():
        for level in fim.LEVELS[1:]:
            cut = fim.split(code, "python", level, rng, max_middle=50)
            assert len(cut.middle) <= 50 and (cut.level == "char" or len(cut.middle) <= fim.LARGEST_SHARE * len(code))


def test_no_node_with_an_error_in_or_around_it_is_ever_cut_out():
    code = "def good(a):\n    b = a + 1\n    return b\n\n" * 6 + "x = = f(3) 4 5\n\n" + "def fine(c):\n    return g(c)\n" * 6
    assert not fim.parses(code, "python")
    for seed in range(300):
        cut = fim.split(code, "python", AST_LEVELS[seed % 3], random.Random(seed))
        assert cut.level in AST_LEVELS
        ast.parse(textwrap.dedent(cut.middle))


def test_the_spelling_of_a_special_token_is_never_cut_and_stays_text():
    code = "tokens = ['<|fim_prefix|>', '<|im_end|>']\nf('<|endoftext|>')\n" * 3
    for seed in range(500):
        cut = fim.split(code, "python", fim.LEVELS[seed % 5], random.Random(seed))
        assert sum(piece.count("<|") for piece in cut[:3]) == 9 == sum(len(fim.SPELLED.findall(piece)) for piece in cut[:3])
    assert [text for text, is_special, _ in fim.file_parts(cut) if is_special] == [
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|im_end|>"]
    whole = fim.split("<|fim_prefix|>", "python", "char", random.Random(0))
    assert whole.middle == "<|fim_prefix|>"


def test_one_seed_gives_one_cut_and_a_wrong_name_is_an_error():
    for language, code in SNIPPETS.items():
        for level in fim.LEVELS:
            assert len({fim.split(code, language, level, random.Random(7)) for _ in range(12)}) == 1
    with pytest.raises(ValueError, match="no grammar for language 'cobol'"):
        fim.split(code, "cobol", "line", random.Random(0))
    with pytest.raises(ValueError, match="no level 'word'"):
        fim.split(code, "java", "word", random.Random(0))


@given(st.integers(0, 500), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_a_plan_meets_its_rate_and_its_shares_exactly(count, rate):
    levels = Counter(fim.plan(count, random.Random(count), rate))
    assert levels.total() == count and count - levels[None] == round(count * rate)
    for level, share in fim.SHARES.items():
        assert abs(levels[level] - share * (count - levels[None])) < 1


# ---------------------------------------------------------------------- strings

CUT = fim.Split("PRE", "MID", "SUF", "line", "line", "line")


def test_the_strings_are_the_reports_to_the_letter():
    assert fim.file_example(CUT) == "<|fim_prefix|>PRE<|fim_suffix|>SUF<|fim_middle|>MID<|im_end|>"
    assert fim.file_example(CUT, spm=True) == "<|fim_prefix|><|fim_suffix|>SUF<|fim_middle|>PREMID<|im_end|>"
    assert fim.repo_example("me/it", {"a.py": "A", "b/c.py": "B"}, "d.py", CUT) == (
        "<|repo_name|>me/it\n<|file_sep|>a.py\nA\n<|file_sep|>b/c.py\nB\n<|file_sep|>d.py\n"
        "<|fim_prefix|>PRE<|fim_suffix|>SUF<|fim_middle|>MID<|im_end|>"
    )
    for parts in (fim.file_parts(CUT), fim.file_parts(CUT, spm=True), fim.repo_parts("r", [("a", "x"), ("a", "y")], "b", CUT)):
        assert all(in_loss for _, _, in_loss in parts)
        assert all(is_special == (text in fim.SPECIAL) for text, is_special, _ in parts)


def test_text_that_spells_a_special_token_is_a_plain_part():
    cut = CUT._replace(middle="<|im_end|>")
    assert ("<|im_end|>", False, True) in fim.file_parts(cut)
    assert all(not is_special for text, is_special, _ in fim.context_parts("<|endoftext|>", {"<|file_sep|>": "<|repo_name|>"})
               if "\n" in text)


# ---------------------------------------------------------------------- trimming

pieces = st.text("ab \n", max_size=120)


@given(pieces, st.text("xy", min_size=1, max_size=20), pieces, st.integers(0, 200))
def test_trimming_keeps_the_middle_and_as_much_around_it_as_fits(prefix, middle, suffix, limit):
    cut = fim.Split(prefix, middle, suffix, "line")
    if limit < len(middle):
        with pytest.raises(ValueError, match="does not fit"):
            fim.trim(cut, limit)
        return
    short = fim.trim(cut, limit)
    assert short.middle == middle and prefix.endswith(short.prefix) and suffix.startswith(short.suffix)
    assert sum(map(len, short[:3])) == min(limit, len(prefix + middle + suffix))
    half = (limit - len(middle)) // 2
    assert len(short.prefix) >= min(half, len(prefix)) and len(short.suffix) >= min(half, len(suffix))


def test_trimming_by_tokens_fits_and_wastes_little():
    words = lambda text: len(re.findall(r"\w+|\s+|[^\w\s]", text))
    rng, fill = random.Random(0), []
    for code in library(every=25).values():
        cut = fim.split(code, "python", "line", rng, max_middle=200)
        short = fim.trim(cut, 300, words)
        size = sum(map(words, short[:3]))
        assert size <= 300 and short.middle == cut.middle
        assert cut.prefix.endswith(short.prefix) and cut.suffix.startswith(short.suffix)
        fill += [size / 300] if words(code) > 400 else []
    assert np.mean(fill) > 0.9


def test_a_repository_example_gives_up_context_first_files_first_and_never_the_middle():
    words = lambda text: len(text.split(" "))
    target = fim.Split("p " * 300, "the middle", "s " * 300, "line")
    context = [("far.py", "f " * 100), ("near.py", "n " * 100)]
    for limit in (60, 100, 200, 300, 700, 2000):
        kept, cut = fim.trim_repo("repo", context, "t.py", target, limit, words)
        size = sum(1 if is_special else words(text) for text, is_special, _ in fim.repo_parts("repo", kept, "t.py", cut))
        assert cut.middle == "the middle" and size <= limit
        assert [path for path, _ in kept] in ([], ["near.py"], ["far.py", "near.py"])
        assert all(dict(context)[path].startswith(text) for path, text in kept)
    assert kept == context and cut == target
    kept, cut = fim.trim_repo("repo", context, "t.py", target, 300, words)
    assert 90 < words(kept[-1][1]) and words(cut.prefix) > 60


# ---------------------------------------------------------------------- similar files


def test_the_index_scores_as_the_equation_says():
    files = dict(list(library(every=30).items())[:20])
    index = fim.Index(files, lines=10**9)
    query = next(iter(files.values()))[:3000]
    np.testing.assert_allclose(index.scores(query), fim.bm25(query, [text for _, text in index.snippets]), rtol=1e-10)
    assert index.snippets == [(path, code.rstrip("\n")) for path, code in files.items()]


def test_the_most_similar_snippet_stands_last_and_the_least_similar_first():
    files = {
        "shop/cart.py": "class Cart:\n    def total_price(self, currency):\n        return sum(item.price for item in self.items)\n",
        "shop/tax.py": "def add_tax(cart, currency):\n    return cart.total_price(currency) * 1.2\n",
        "zoo.py": "def feed(lion):\n    lion.roar()\n",
        "shop/pay.py": "from shop.cart import Cart\n\n\ndef pay(cart: Cart, currency):\n    amount = cart.total_price(currency)\n"
                       "    return amount\n",
    }
    start = files["shop/pay.py"].index("    return amount")
    cut = fim.Split(files["shop/pay.py"][:start], "    return amount", "\n", "line")
    names = [path for path, _ in fim.similar_files(fim.Index(files), "shop/pay.py", cut)]
    assert names == ["zoo.py", "shop/cart.py", "shop/tax.py"]  # zoo.py shares `def` alone
    assert [path for path, _ in fim.similar_files(fim.Index(files), "shop/pay.py", cut, k=1)] == ["shop/tax.py"]


def test_the_targets_text_is_never_in_its_context_even_where_the_repository_holds_a_copy():
    files = {path: code for path, code in library(every=8).items() if len(code) > 500}
    copies = {f"vendor/{path}": code for path, code in files.items()}
    edited = {f"old/{path}": re.sub(r"\bself\b", "this", code) for path, code in files.items()}
    index, rng, found = fim.Index(files | copies | edited), random.Random(0), 0
    for n, (path, code) in enumerate(files.items()):
        cut = fim.split(code, "python", fim.LEVELS[n % 5], rng)
        context = fim.similar_files(index, path, cut)
        found += bool(context)
        names = {name for name, _ in context}
        assert path not in names and f"vendor/{path}" not in names
        telling = [line for line in map(str.strip, cut.middle.split("\n")) if len(line) >= 20]
        for _, snippet in context:
            assert cut.prefix[-20:] + cut.middle + cut.suffix[:20] not in snippet
            assert not telling or 2 * sum(line in snippet for line in telling) <= len(telling)
    assert found > 0.8 * len(files)


def test_similarity_knows_nothing_of_the_middle():
    files = library(every=60)
    path, code = max(files.items(), key=lambda item: len(item[1]))
    cut, index = fim.split(code, "python", "function", random.Random(0)), fim.Index(files)
    assert fim.similar_files(index, path, cut) == fim.similar_files(index, path, cut._replace(middle="zzz = 1"))


# ---------------------------------------------------------------------- dependency order


def check_order(files, edges):
    order = fim.dependency_order(files)
    assert sorted(order) == sorted(files)
    for user, dependency in edges:
        assert dependency in fim.imports(files)[user], (user, dependency)
        assert order.index(dependency) < order.index(user)


def test_python_files_come_after_what_they_import():
    check_order({
        "src/app/__init__.py": "", "src/app/a.py": "from . import b\nfrom .sub.c import thing\n", "src/app/b.py": "import app.d as d, os\n",
        "src/app/sub/__init__.py": "", "src/app/sub/c.py": "from ..b import (\n    x,  # why\n    y,\n)\n", "src/app/d.py": "import json\n",
        "run.py": "from app.a import main\n",
    }, [("src/app/a.py", "src/app/b.py"), ("src/app/a.py", "src/app/sub/c.py"), ("src/app/b.py", "src/app/d.py"),
        ("src/app/sub/c.py", "src/app/b.py"), ("run.py", "src/app/a.py")])


def test_files_of_the_other_languages_come_after_what_they_import():
    check_order({"z/List.java": "package a.util;", "A.java": "package a;\nimport a.util.List;\nimport java.io.File;"},
                [("A.java", "z/List.java")])
    check_order({"src/a.ts": "import {x} from './z';", "src/z.ts": "", "m.js": "const q = require('./src/a')"},
                [("src/a.ts", "src/z.ts"), ("m.js", "src/a.ts")])
    check_order({"A.cs": "using Zoo.Cage;", "Z.cs": "namespace Zoo.Cage { class B {} }"}, [("A.cs", "Z.cs")])
    check_order({"a.go": 'import (\n\t"fmt"\n\tz "x.org/me/zoo/cage"\n)', "zoo/cage/b.go": "package cage"}, [("a.go", "zoo/cage/b.go")])
    check_order({"src/main.rs": "mod zoo;\nuse crate::zoo::cage::Lion;", "src/zoo/mod.rs": "pub mod cage;", "src/top.rs": "",
                 "src/zoo/cage.rs": "use super::super::top;"},
                [("src/main.rs", "src/zoo/mod.rs"), ("src/zoo/mod.rs", "src/zoo/cage.rs"), ("src/zoo/cage.rs", "src/top.rs")])
    check_order({"a.cpp": '#include "lib/z.h"\n#include <vector>', "inc/lib/z.h": '#include "y.h"', "inc/lib/y.h": ""},
                [("a.cpp", "inc/lib/z.h"), ("inc/lib/z.h", "inc/lib/y.h")])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_without_cycles_every_dependency_precedes_its_user_and_with_cycles_every_file_comes_once(size, seed):
    rng = random.Random(seed)
    ranks = rng.sample(range(size), size)
    names = [f"m{i}" for i in range(size)]
    below = {i: [j for j in range(size) if ranks[j] < ranks[i] and rng.random() < 0.3] for i in range(size)}
    files = {f"{names[i]}.py": "".join(f"import {names[j]}\n" for j in below[i]) for i in range(size)}
    order = fim.dependency_order(files)
    assert all(order.index(f"m{j}.py") < order.index(f"m{i}.py") for i in below for j in below[i]) and sorted(order) == sorted(files)
    cyclic = {path: text + f"import {rng.choice(names)}\n" for path, text in files.items()}
    assert sorted(fim.dependency_order(cyclic)) == sorted(files)


def test_a_cycle_is_entered_where_the_fewest_imports_are_missing_and_strangers_stay_together():
    files = {"a.py": "import b, c", "b.py": "import c, a", "c.py": "import a", "x.py": "import y", "y.py": ""}
    assert fim.dependency_order(files) == ["c.py", "a.py", "b.py", "y.py", "x.py"]


def test_the_standard_library_is_ordered_with_few_dependencies_after_their_users():
    files = library()
    order = {path: i for i, path in enumerate(fim.dependency_order(files))}
    edges = [(user, other) for user, others in fim.imports(files).items() for other in others]
    assert len(edges) > 2000 and np.mean([order[other] < order[user] for user, other in edges]) > 0.8


# ---------------------------------------------------------------------- completing


class Words:
    """A byte-level BPE over a few given words, with the project's special tokens: tiktoken does the work."""

    def __init__(self, words):
        self.tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
        ranks = {token: i for i, token in enumerate(self.tokens)}
        self.special = {name: len(self.tokens) + i for i, name in enumerate(fim.SPECIAL)}
        self.vocab_size = len(self.tokens) + len(self.special)
        self.encoding = tiktoken.Encoding("words", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens=self.special)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def encode_parts(self, parts):
        ids = [i for text, special, _ in parts for i in ([self.special[text]] if special else self.encode(text))]
        return ids, [True] * len(ids)


WORDS = Words(["ht", "tp", "http", "https", "//", "://", "https://", "re", "tu", "rn", "return", " (", "  ", "    ", "        ", "))"])


class KnowsTheFile:
    """A model that has learned one file by heart: it goes on with the tokens of what belongs into the hole, then stops."""

    def __init__(self, code, tokenizer=WORDS):
        self.code, self.tokenizer, self.calls = code, tokenizer, 0

    def __call__(self, input_ids):
        self.calls += 1
        ids, special = input_ids[0].tolist(), self.tokenizer.special
        ids = ids[len(ids) - ids[::-1].index(special["<|fim_prefix|>"]) :]
        s, m = ids.index(special["<|fim_suffix|>"]), ids.index(special["<|fim_middle|>"])
        prefix, suffix, middle = (self.tokenizer.encoding.decode_bytes(part) for part in (ids[:s], ids[s + 1 : m], ids[m + 1 :]))
        code = self.code.encode()
        left = code[code.index(prefix) + len(prefix) + len(middle) : len(code) - len(suffix)]
        go_on = self.tokenizer.encoding._encode_bytes(left)[0] if left else special["<|im_end|>"]
        logits = torch.full((1, 1, self.tokenizer.vocab_size), -10.0)
        logits[0, 0, go_on] = 10.0
        return logits, None


LINE = "def f(url, tail):\n    return head(join(url, 'https://ü.org'), (tail))\n"


@pytest.mark.parametrize("language", [None, "python"])
def test_at_every_cursor_position_of_a_line_the_completion_restores_the_file(language):
    model, start = KnowsTheFile(LINE), LINE.index("    return")
    for cursor in range(start, len(LINE)):
        for end in range(cursor, len(LINE)):
            got = fim.complete(model, LINE[:cursor], LINE[end:], WORDS, language=language)
            whole = LINE[:cursor] + got + LINE[end:]
            assert whole == LINE or language == "python" and fim.parses(whole, "python"), (LINE[:cursor], got, LINE[end:])


class KnowsWholeWords:
    """A model that has seen text only in the tokenizer's own cut: it knows which token follows which, and nothing of halves."""

    def __init__(self, text, tokenizer=WORDS):
        ids = [*tokenizer.encode(text), tokenizer.special["<|im_end|>"]]
        self.follows, self.first, self.tokenizer = dict(zip(ids, ids[1:])), ids[0], tokenizer

    def __call__(self, input_ids):
        ids, special = input_ids[0].tolist(), self.tokenizer.special
        last = ids[-1] if ids[-1] != special["<|fim_middle|>"] else ids[ids.index(special["<|fim_suffix|>"]) - 1]
        logits = torch.zeros(1, 1, self.tokenizer.vocab_size)
        logits[0, 0, self.follows.get(last, self.first if last == special["<|fim_prefix|>"] else special["<|im_end|>"])] = 10.0
        return logits, None


def test_healing_takes_back_as_many_tokens_as_one_longer_token_could_swallow():
    model, text = KnowsWholeWords("https://x.org"), "https://x.org"
    assert WORDS.decode([WORDS.encode(text)[0]]) == "https://"
    for cursor in range(len(text) + 1):
        assert text[:cursor] + fim.complete(model, text[:cursor], "", WORDS) == text
    assert len(WORDS.encode("https:/")) == 3  # "https" ":" "/": all three go back
    assert fim.Vocabulary(WORDS).tail(WORDS.encode("https:/")) == 3
    assert fim.complete(model, "https:/", "", WORDS, heal=False) == ""


def test_forced_tokens_can_always_spell_the_text_even_where_characters_have_no_token():
    words = Words([" é", " éx", "ab", "abc漢"])  # "é" itself has none
    vocabulary, rng = fim.Vocabulary(words), random.Random(0)
    anything = lambda input_ids: (torch.tensor([[[rng.random() for _ in range(words.vocab_size)]]]), None)
    row = lambda ids: torch.tensor([ids])
    for must in ("ab", " é", "a", " "):
        for _ in range(50):
            new = fim.force(anything, row, [0], must, vocabulary, 1.0)
            assert words.decode(new).startswith(must)


def test_completion_stops_at_the_end_token_and_never_prints_a_special_token_or_half_a_character():
    code = "x = 'üüüüüüüüüüüüüüüü'\n"
    assert fim.complete(KnowsTheFile(code), "x = '", "'\n", WORDS, max_new_tokens=5, heal=False) == "üü"
    model = KnowsTheFile(code)
    assert fim.complete(model, "x = '", "'\n", WORDS, max_new_tokens=100) == "ü" * 16
    assert model.calls < 40


def test_a_long_prompt_is_trimmed_to_the_context_and_one_without_room_is_an_error():
    class Watch(KnowsTheFile):
        def __call__(self, input_ids):
            assert input_ids.shape[1] <= 100
            logits = torch.zeros(1, 1, WORDS.vocab_size)
            logits[..., WORDS.special["<|im_end|>"]] = 1
            return logits, None

    for extra in ({}, {"repo_name": "r", "path": "a.py", "context_files": [("b.py", "def g(x)\n" * 50)]}):
        assert fim.complete(Watch(""), "a b c\n" * 500, "d e f\n" * 500, WORDS, context=100, max_new_tokens=20, heal=False, **extra) == ""
        with pytest.raises(ValueError, match="does not fit"):
            fim.complete(Watch(""), "a", "b", WORDS, context=20, max_new_tokens=20, **extra)


@pytest.mark.parametrize("prefix, completion, suffix, language, kept", [
    ("f(x", "y)", ")\n", "python", "y"),
    ("f(g(x", ")", ")\n", "python", ")"),
    ("f(", "g(x)", ")\n", "python", "g(x)"),
    ("f(x", "y)", ")\n", None, "y"),
    ("f(", "g(x)", ")\n", None, "g(x)"),
    ("if ", "x == 1:", ":\n    pass\n", "python", "x == 1"),
    ("x = ", "1  # the answer", "  # the answer\n", "python", "1"),
    ("pa", "s", "s\n", "python", "s"),
    ("a = 'b", "c'", "'\n", None, "c"),
    ("int x = f(", "1);", ");\n", "c", "1"),
    ("x = 1", "", "\n", None, ""),
])
def test_a_repetition_of_the_rest_of_the_line_is_dropped_and_a_needed_bracket_is_not(prefix, completion, suffix, language, kept):
    assert fim.drop_repeat(prefix, completion, suffix, language) == kept


# ---------------------------------------------------------------------- metrics


@given(st.text("abc\u6f22", max_size=40), st.text("abc\u6f22", max_size=40))
def test_the_fast_edit_distance_is_the_textbook_one(a, b):
    assert fim.levenshtein(a, b) == fim.levenshtein_table(a, b) == fim.levenshtein(b, a)


def test_the_fast_edit_distance_holds_beyond_a_machine_word():
    rng = random.Random(0)
    a, b = ("".join(rng.choice("ab") for _ in range(n)) for n in (300, 257))
    assert fim.levenshtein(a, b) == fim.levenshtein_table(a, b)


def test_edit_similarity_and_exact_match_are_as_defined():
    assert fim.edit_similarity("kitten", "sitting") == pytest.approx(100 * (1 - 3 / 7))
    assert fim.edit_similarity("", "") == 100 and fim.edit_similarity("abc", "") == 0
    assert fim.exact_match("  x = 1 \n\n", "x = 1") and not fim.exact_match("x = 1", "x = 2")
    assert fim.exact_match("x = '#1'  # one\n# two\ny", "x = '#1'\ny", "python") and not fim.exact_match("x = '#1'", "x = '", "python")
    assert fim.exact_match('s = "//"; /* a\nb */ t(); // c', 's = "//"; t();', "c") is False  # a blank inside a line counts
    assert fim.exact_match('s = "//"; // c\n/* d */', 's = "//";', "java") and not fim.exact_match("a # b", "a", None)


CART = """class Cart:
    def total(self, rate):
        found = sum(self.items)
        return found * rate

    def clear(self):
        self.items = []
        self.log('cleared the cart')
        return self
"""
PAY = """from shop.cart import Cart


def pay(items, rate):
    cart = Cart(items)
    amount = cart.total(rate)
    cart.clear()
    return amount


def refund(items):
    return pay(items, -1)
"""
PROJECT = {"shop": {"shop/cart.py": CART, "shop/pay.py": PAY, "notes.txt": "not code"}}


def test_a_model_that_knows_the_files_scores_full_marks_and_one_that_knows_nothing_does_not():
    class KnowsAll:
        def __call__(self, input_ids):
            text = WORDS.decode(input_ids[0].tolist())
            prefix, suffix = re.search(r"<\|fim_prefix\|>([\s\S]*)<\|fim_suffix\|>([\s\S]*)<\|fim_middle\|>", text).groups()
            code = next(c for c in PROJECT["shop"].values() if c.startswith(prefix) and c.endswith(suffix))
            return KnowsTheFile(code)(input_ids)

    rows = fim.evaluate(KnowsAll(), WORDS, PROJECT, count=2, context=4096, max_new_tokens=400)
    assert [(row["level"], row["context"]) for row in rows] == [(level, arm) for level in fim.LEVELS for arm in ("file", "repository")]
    assert all(row["exact_match"] == row["edit_similarity"] == row["parse_rate"] == 100 and row["count"] >= 1 for row in rows)
    says_nothing = lambda ids: (torch.zeros(1, 1, WORDS.vocab_size), None)
    nothing = fim.evaluate(says_nothing, WORDS, PROJECT, count=2, levels=["line"], max_new_tokens=8)
    assert all(row["exact_match"] == 0 and row["edit_similarity"] < 50 for row in nothing)
    assert len(fim.table(rows).splitlines()) == 11


def test_the_loop_coder_and_the_projects_tokenizer_complete_and_are_evaluated():
    data, model = pytest.importorskip("data"), pytest.importorskip("model")
    tokenizer = data.Tokenizer.train([code for files in PROJECT.values() for code in files.values()] * 5, 320)
    torch.manual_seed(0)
    config = model.LoopCoderConfig.preset("nano")
    config.vocab_size = tokenizer.vocab_size
    coder = model.LoopCoder(config).eval()
    text = fim.complete(coder, "def f(x):\n    ret", "\n", tokenizer, max_new_tokens=8, context=128)
    assert isinstance(text, str) and not any(token in text for token in fim.SPECIAL)
    rows = fim.evaluate(coder, tokenizer, PROJECT, count=1, levels=["line", "statement"], context=256, max_new_tokens=8)
    assert len(rows) == 4 and all(0 <= row["edit_similarity"] <= 100 for row in rows)
    _, in_loss = tokenizer.encode_parts(fim.repo_parts("r", {"a": "b"}, "p", CUT))
    assert all(in_loss)


# ---------------------------------------------------------------------- command line


def command(*arguments):
    return subprocess.run([sys.executable, fim.__file__, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_command_line_shows_every_level_and_the_training_string(tmp_path):
    file = tmp_path / "shop" / "pay.py"
    for path, code in PROJECT["shop"].items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code)
    shown = command(file)
    assert shown.returncode == 0 and all(f"-- {level} (" in shown.stdout for level in fim.LEVELS) and "5 examples" in shown.stderr
    exact = command(file, "--repo", tmp_path, "--string", "--levels", "line").stdout
    assert exact.startswith(f"<|repo_name|>{tmp_path.name}\n<|file_sep|>shop/cart.py\n") and exact.endswith("<|im_end|>\n")
    assert "\n<|file_sep|>shop/pay.py\n<|fim_prefix|>from shop.cart" in exact


def test_wrong_input_gets_one_line_and_status_2(tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.py").write_text("")
    for arguments, word in [((tmp_path / "none.py",), "none.py"), ((tmp_path / "binary.py",), "UTF-8"), ((tmp_path / "empty.py",), "empty"),
                            ((fim.__file__, "--language", "cobol"), "cobol"), ((fim.__file__, "--levels", "word"), "word"),
                            ((fim.__file__, "--repo", tmp_path / "nowhere"), "nowhere")]:
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == "" and word in done.stderr
        assert done.stderr.startswith("fim.py: ") and done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word_and_no_default_is_a_path_or_nothing():
    with subprocess.Popen([sys.executable, fim.__file__, "--string"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        shown.stdout.close()
        assert shown.stderr.read().count("\n") <= 1 and shown.wait() == 141  # the line that counts the examples
    told = command("--help").stdout
    assert "(default: this one)" in told and "(default: 1000)" in told and not re.search(r"default:\s*(None|False|/|\))", told)
