"""data.py: what goes in is what the rules say, what comes out is what went in, and every share is exact."""
import ast
import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import keyword
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Mixture, TokenFile, TokenWriter, Tokenizer, pack


PROJECTS = "asyncio concurrent email html http importlib json logging unittest urllib wsgiref xml".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A dozen packages of the standard library, each a project, and a note in each."""
    root, library = tmp_path_factory.mktemp("corpus"), Path(sysconfig.get_paths()["stdlib"])
    for name in PROJECTS:
        shutil.copytree(library / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "test*"))
        notes = f"# The package {name}\n\nThese notes are about {name}, which is part of the standard library.\n"
        (root / name / "notes.md").write_text(notes * 3)
    return root


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 200_000)
        data.build(out, [str(corpus)], vocab_size=800, max_bytes=0, workers=1, log=lambda line: None)
    return out


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


def test_the_fast_bpe_trainer_finds_the_merges_of_the_slow_one():
    rng = random.Random(1)
    texts = ["".join(rng.choices("aab \n_(é1", k=2000)) for _ in range(5)]
    counts = data.count_words(texts)
    assert data.train_bpe(counts, 200) == train_bpe_slowly(counts, 200)


def test_every_document_of_the_token_files_decodes_to_a_file_of_the_corpus(corpus, built):
    tokenizer = Tokenizer.load(built / "tokenizer")
    sources = {data.decode(path.read_bytes()) for path in corpus.rglob("*.*")}
    sources |= {data.clean(text, "python")[0] for text in sources}  # e-mail addresses are redacted
    end, seen = tokenizer.special["<|endoftext|>"], 0
    for split in ("train", "heldout"):
        file = TokenFile(built / split, "code")
        for i in range(len(file.lengths)):
            ids = file.ids(i)
            text = tokenizer.decode(ids[1:-1])
            assert text in sources and len(text.encode()) == file.nbytes[i] and ids[0] == ids[-1] == end
            seen += 1
    assert seen > 100


def test_the_manifest_counts_what_the_files_hold_and_what_each_source_gave(corpus, built):
    manifest = json.loads((built / "manifest.json").read_text())
    for split, rows in manifest["splits"].items():
        for name, row in rows.items():
            file = TokenFile(built / split, name)
            assert row["tokens"] == file.lengths.sum() and row["bytes"] == file.nbytes.sum() and row["documents"] == len(file.lengths)
            assert sum(r["bytes"] for r in row["by_language"].values()) == row["bytes"]
            assert hashlib.sha256((built / split / f"{name}.tokens").read_bytes()).hexdigest() == row["sha256"]
    files = [path for path in corpus.rglob("*.*") if data.wanted(path.name) and path.stat().st_size]
    assert manifest["sources"] == {str(corpus): {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}}


def test_a_truncated_token_file_is_refused(tmp_path):
    writer = TokenWriter(tmp_path, "code", 300)
    writer.add([1, 2, 3], 3, "python")
    writer.close()
    with open(tmp_path / "code.tokens", "r+b") as file:
        file.truncate(4)
    with pytest.raises(ValueError, match="truncated"):
        TokenFile(tmp_path, "code")


def test_packing_keeps_each_sample_whole_and_learns_every_token_but_the_first():
    rng = random.Random(0)
    samples = [[rng.randrange(1, 1000) for _ in range(rng.randrange(2, 80))] for _ in range(300)]
    input_ids, targets, segment_ids = pack(samples, 64)
    found = []
    for row in range(len(input_ids)):
        for segment in np.unique(segment_ids[row]):
            at = segment_ids[row] == segment
            if (targets[row][at] >= 0).any():
                found.append([int(input_ids[row][at][0]), *targets[row][at].tolist()])
    pieces = [sample[start:start + n + 1] for sample in samples for start, n in data.cut_pieces(len(sample), 64)]
    assert sorted(found) == sorted(pieces)
    assert (np.diff(segment_ids) >= 0).all()
    assert sum(len(piece) - 1 for piece in pieces) / input_ids.size > 0.97


def test_a_mixture_gives_the_shares_and_resumes_to_the_same_batches(tmp_path):
    rng = np.random.default_rng(0)
    files = {}
    for name, documents in (("a", 400), ("b", 30), ("c", 100)):
        writer = TokenWriter(tmp_path, name, 1000)
        for _ in range(documents):
            writer.add(rng.integers(0, 1000, rng.integers(2, 300)), 10, "python")
        writer.close()
        files[name] = TokenFile(tmp_path, name)
    shares = {"a": 0.7, "b": 0.05, "c": 0.25}
    one = Mixture(files, shares, context=64, rows=4, seed=3)
    batches = [one.next() for _ in range(300)]
    for name, share in one.realised().items():
        assert share == pytest.approx(shares[name], abs=0.005)
    two = Mixture(files, shares, context=64, rows=4, seed=3)
    for _ in range(120):
        two.next()
    three = Mixture(files, shares, context=64, rows=4, seed=3)
    three.load_state(json.loads(json.dumps(two.state())))
    for batch in batches[120:140]:
        for x, y in zip(batch, three.next()):
            np.testing.assert_array_equal(x, y)


def test_ten_long_rows_already_hold_the_shares_to_a_percent_and_every_document_comes(tmp_path):
    """A mid2 in little: short samples and long ones that are never cut, and documents that are, in ten rows of 4,096 tokens."""
    rng, files = np.random.default_rng(0), {}
    kinds = (("short", 900, 43, 212, False), ("long", 150, 68, 4088, False), ("code", 300, 23, 20_000, True))
    for name, documents, shortest, longest, cut in kinds:
        writer = TokenWriter(tmp_path, name, 1000, cut=cut)
        for _ in range(documents):
            writer.add(rng.integers(0, 1000, rng.integers(shortest, longest)), 10, "python")
        writer.close()
        files[name] = TokenFile(tmp_path, name)
    shares, off = {"short": 0.6, "long": 0.15, "code": 0.25}, []
    for seed in range(8):
        mixture = Mixture(files, shares, context=4096, rows=1, seed=seed)
        rows = [mixture.next() for _ in range(10)]
        off += [abs(share - shares[name]) for name, share in mixture.realised().items()]
        assert sum(mixture.given.values()) == sum(int((targets != -100).sum()) for _, targets, _ in rows) > 0.99 * 10 * 4096
    assert np.mean(off) < 0.005 and max(off) < 0.02
    dealt, ids = set(), files["long"].ids
    files["long"].ids = lambda i: dealt.add(i) or ids(i)
    while mixture.opened["long"] < 900:
        mixture.next()
    assert len(dealt) == 150  # the longest, too, that one row's share would never hold


# ------------------------------------------------------------------------------------------------ tokenizer

@pytest.fixture(scope="module")
def library():
    """(path, text) of the modules of the standard library's top level."""
    return [(path.name, data.decode(path.read_bytes())) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


@pytest.fixture(scope="module")
def tokenizer(library):
    return Tokenizer.train([text for _, text in library[:40]], 2000)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_decoding_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_special_token_that_a_text_spells_stays_text_and_a_special_part_is_one_id(tokenizer):
    text = "".join(data.SPECIAL)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values()) and tokenizer.decode(ids) == text
    ids, in_loss = tokenizer.encode_parts([("<|im_start|>", True, False), ("<|im_end|>", False, True), ("<|im_end|>", True, True)])
    assert ids[0] == tokenizer.special["<|im_start|>"] and ids[-1] == tokenizer.special["<|im_end|>"] == tokenizer.vocab_size - 7
    assert ids.count(ids[-1]) == 1 and in_loss == [False] + [True] * (len(ids) - 1)


def test_a_million_blanks_and_other_long_runs_are_encoded_and_come_back(tokenizer):
    for text in (" " * 1_000_000 + "x", "\n" * 300_000, "a" * 300_000, " \n" * 200_000, "=" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizers_package_reads_our_file_and_gives_the_same_ids(tokenizer, library, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True  # as ours: what a text spells stays text
    for text in [text for _, text in library] + ["é中文🙂 \u00a0x\r\n\t\x0b1½²", " " * 700 + "end"]:
        assert theirs.encode(text).ids == tokenizer.encode(text)
    assert theirs.token_to_id("<|fim_middle|>") == tokenizer.special["<|fim_middle|>"] and theirs.get_vocab_size() == tokenizer.vocab_size


def test_our_merges_compress_held_out_files_as_well_as_those_of_the_tokenizers_package(library):
    pytest.importorskip("tokenizers")
    training, heldout = [text for _, text in library[:60]], [text for _, text in library[60:90]]
    theirs = data.train_theirs(training, 3000)
    ours = Tokenizer.train(training, 3000)
    assert sum(len(ours.encode(text)) for text in heldout) <= 1.01 * sum(len(theirs.encode(text).ids) for text in heldout)


def test_a_saved_tokenizer_is_the_same_and_a_broken_file_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).tokens == tokenizer.tokens
    for broken in (b'{"model": {}}', b'{"model": {"vocab": []}}', b"[]", b"\xff\xfe{"):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(ValueError, match="not a byte-level BPE"):
            Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="more than the corpus can fill"):
        Tokenizer.train(["aaa"], 4000)


# ------------------------------------------------------------------------------------------------ bytes to text, rules, edits

@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_decoding_never_fails_on_bytes(raw):
    text = data.decode(raw)
    assert text is None or isinstance(text, str) and "\r" not in text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("< ! [ ] > </ -- pre a = ' \" & &# x41 ; CDATA[ DOCTYPE if foo ? \n".split(" "))).map("".join))
def test_no_page_is_so_broken_that_reading_it_fails(html):
    assert data.html_text("<p>before</p>" + html).startswith("before")


def test_declared_codings_marks_and_line_ends_are_understood():
    assert data.decode(b"# -*- coding: cp1251 -*-\r\nx = '\xcf'\r\n") == "# -*- coding: cp1251 -*-\nx = 'П'\n"
    assert data.decode("\ufeffx = 1\n".encode()) == "x = 1\n" == data.decode("x = 1\n".encode("utf-16"))
    assert data.decode(b"ab\0cd") is None


GOOD = """import math


def area(radius):
    \"\"\"The area of a circle, for instance on host 127.0.0.1 or 192.168.1.7, version 1.2.3.4-rc.\"\"\"
    if radius < 0:
        raise ValueError(f"a radius is never negative, this one is {radius}")
    return math.pi * radius ** 2  # 3f786850e387550fdab836ed7e6dc881de23001b


class Circle:
    @property
    def size(self):
        return area(self.radius) @ self.scale
"""


def test_good_code_passes_the_edits_and_rules_byte_for_byte(library):
    assert data.clean(GOOD, "python") == (GOOD, [])
    untouched = sum(data.clean(text, "python")[0] == text for _, text in library)
    assert untouched > 0.6 * len(library)


@pytest.mark.parametrize("junk, language, rule", [
    ("x = 1\n", "python", "too short"), (GOOD + "y = '" + "ab " * 400 + "'\n", "python", "long line"),
    (GOOD.replace("import math", "# Code generated by protoc. DO NOT EDIT.\nimport math"), "python", "generated"),
    ("".join(f"from package.module{i} import name{i}\n" for i in range(40)), "python", "only imports"),
    ("".join(f"print({i}, 'hello there')\n" for i in range(40)), "python", "only prints"),
    ("data = [\n" + "    12345, 67890, 98765, 43210,\n" * 40 + "]\n", "python", "mostly digits"),
    (GOOD + "x = compute(everything)\n" * 80, "python", "repeated lines"),
    ("#\n" * 60 + "# a licence and nothing else at all\n" * 8, "python", "mostly comments"),
    ("{" + ",\n".join(f'"key{i}": "some value"' for i in range(400)) + "}", "json", "data in markup"),
    ("Home\nAbout\nContact\nPrices\nJobs\nPress\n" * 8, "text", "no sentences"), ("buy now! " * 60, "text", "repeated phrases"),
    ("\n".join("- item %d of the long list here" % i for i in range(40)), "text", "bullets"),
    ("a b c d e f g h " * 20, "text", "word length"),
])
def test_planted_junk_is_dropped_by_its_rule(junk, language, rule):
    text, fired = data.clean(junk, language)
    assert text is None and rule in fired


def test_every_rule_bounds_something_that_is_measured_in_languages_that_exist():
    numbers = data.measure(GOOD)
    for languages, what, least, most in data.RULES.values():
        assert what in numbers and languages <= set(data.LANGUAGES)
        assert (least is None) != (most is None) or what in ("mean line", "chars", "mean word")


def test_addresses_and_keys_are_redacted_and_what_only_looks_like_them_is_not():
    key = "AKIA" + "IOSFODNN7EXAMPLE"
    text = f"write to jane.doe+x@mail.company.org from 8.8.4.4 with {key}; not 10.0.0.1, v1.2.3.4.5, @decorator.name, user@example.com"
    found, fired = data.clean(text + " and read the sentences that follow in this text.", "text")
    assert "<EMAIL> from <IP> with <KEY>; not 10.0.0.1, v1.2.3.4.5, @decorator.name, user@example.com" in found
    assert {"e-mail redacted", "address redacted", "key redacted"} == set(fired)


def test_a_random_value_behind_a_telling_name_is_redacted_and_words_names_and_calls_are_not():
    code = """password = "q8Zr4tLm0Xw2"\nconf = {'api_key_2': 'Zk3x9PqLmN7v+/='}\nif secret=="aB3dE5gH7jK9": ...\n"""
    text, fired = data.clean(GOOD + code, "python")
    assert fired == ["secret redacted"] and text.count("<KEY>") == 3 and not re.search("q8Zr|Zk3x|aB3d", text)
    assert "password = \"<KEY>\"\nconf = {'api_key_2': '<KEY>'}" in text
    plain = """password = "correct horse 4Battery"\nsecret = "your-secret-goes-here"\napi_key = read("A1b2C3d4E5f6.txt")\n"""
    assert data.clean(f"{GOOD}{plain}api_key = 'MyOldPassword123'\n", "python")[1] == []


PAGE = """<html><head><title>T</title><style>p {}</style></head><body><nav><a>Home</a> <a>Blog</a></nav><h1>Sorting &amp; more</h1>
<p>This page explains how a list is sorted, step by step, with an <code>example()</code> of it.</p>
<pre class="code"><span>def f(x):</span>
\tif x &lt; 3:   # two  blanks

        return [x]  </pre>
<p>We use cookies on this site. Accept all cookies to go on.</p><script>var a = "<p>no</p>";</script>
<p>It is called once for every element, so that the time it takes grows with the length of the list.</p>
<p>The function returns a list that holds its argument, and nothing at all where it is too large.</p>
<footer>All rights reserved</footer></body></html>"""
CODE = "def f(x):\n\tif x < 3:   # two  blanks\n\n        return [x]  "


def test_html_becomes_text_and_its_code_blocks_stay_byte_for_byte():
    text = data.html_text(PAGE)
    assert f"```\n{CODE}\n```" in text and "Blog" not in text and "var a" not in text and "rights" not in text
    cleaned, fired = data.clean(text, "text")
    assert f"```\n{CODE}\n```" in cleaned and "cookies" not in cleaned and "cookie line" in fired and "# Sorting & more" in cleaned


def test_a_page_keeps_its_text_where_an_end_tag_is_left_out_a_block_stands_in_a_block_or_the_end_has_an_ampersand():
    assert data.html_text("<html><head><title>T</title><meta charset=utf-8><body><p>all of it") == "all of it\n"
    assert data.html_text("<pre>a\n<pre>b\n</pre></pre>c") == "```\na\nb\n```\nc\n"
    assert data.html_text("<p>telephones of AT&T") == "telephones of AT&T\n"


def test_cells_and_captions_of_a_page_stand_apart():
    html = "<table><caption>C</caption><tr><th>a<th>b<tr><td>1</td><td>2</td></table><figure><img><figcaption>F</figcaption></figure>end"
    assert data.html_text(html) == "C\na b\n1 2\nF\nend\n"


def test_an_edit_never_leaves_half_of_a_long_line_and_no_quick_look_hides_what_its_pattern_finds(library):
    long = "You can sign in with a token that is made for this purpose, and from then on the server answers whatever you may ask it.\n"
    other = "Another sentence stands here, and it says a number of different things about life to you and me.\n"
    assert data.clean(long + other, "text") == (long + other, []) and data.clean("Sign in to your account\n" + other, "text")[0] == other
    texts = ["ACCEPT ALL COOKIES", "8.8.4.4", "a@b.org", "ghs_" + "a" * 36, "SECRET: 'q8Zr4tLm0Xw2'"]
    texts += [part for _, text in library[:50] for part in (text, text.upper())]
    for name, (_, possible, pattern, _) in data.EDITS.items():
        assert any(map(pattern.search, texts)) or name == "encoded blob"
        assert all(possible(text) for text in texts if pattern.search(text)), name


def test_quotes_and_fences_without_an_end_take_no_time_to_speak_of():
    began = time.monotonic()
    for language, text in (("python", '"\\' * 50_000), ("text", "\n".join("`" * length for length in range(3, 300)))):
        data.clean(text, language)
    assert time.monotonic() - began < 5  # the square of their length would be a minute


VALID = {
    "python": "def f(a):\n    if a:\n        return [a, 'é中🙂']\n    return {}\n",
    "java": "class A { int f(int a) { if (a > 1) { return a; } return 0; } }\n",
    "javascript": "function f(a) { return a.map((x) => { return x + 1; }); }\n",
    "typescript": "function f(a: number[]): number { return a.reduce((x, y) => { return x + y; }); }\n",
    "c#": "class A { int F(int a) { foreach (var x in y) { a += x; } return a; } }\n",
    "go": "package a\nfunc f(a int) int { if a > 1 { return a }; return 0 }\n",
    "rust": "fn f(a: i32) -> i32 { if a > 1 { return a; } match a { 0 => 1, _ => { 2 } } }\n",
    "c": "int f(int a) { if (a > 1) { return a; } return 0; }\n",
    "c++": "template <class T> T f(T a) { if (a > 1) { return a; } return T{}; }\n",
}


@pytest.mark.parametrize("language", VALID)
def test_a_valid_file_parses_and_none_of_its_truncations_inside_a_bracket_does(language):
    code = VALID[language]
    assert data.parses(code * 3, language)
    inside = lambda cut: sum(code[:cut].count(c) for c in "([{") > sum(code[:cut].count(c) for c in ")]}")
    cuts = [cut for cut in range(1, len(code)) if inside(cut)]
    assert len(cuts) > 10 and not any(data.parses(code * 3 + code[:cut], language) for cut in cuts)


def test_a_macro_of_c_is_tolerated_and_a_cut_file_is_not_also_behind_text_of_other_scripts():
    for before in ("", "/* " + "é中🙂" * 400 + " */\n"):
        code = before + "FOO(int, *) bar;\n" + VALID["c"] * 30
        assert data.fim.parser("c").parse(code.encode()).root_node.has_error
        assert data.parses(code, "c") and not data.parses(code + "int z(int a) { return (a", "c")


def test_syntax_agrees_with_pythons_own_parser_on_the_library(library):
    for name, text in library:
        ast.parse(text)
        assert data.parses(text, "python"), name
        assert not data.parses(text + "\ndef f(:\n", "python")


def test_files_too_deep_or_too_slow_to_parse_are_refused(monkeypatch):
    assert data.parses("x = " + "[" * 100 + "]" * 100 + "\n", "python") and not data.parses("x = " + "[" * 201 + "]" * 201 + "\n", "python")
    monkeypatch.setattr(data, "SLOWEST_S", 0.0)
    assert not data.parses("a b c d !! ?? " * 20_000, "python")


# ------------------------------------------------------------------------------------------------ duplicates

def words_of(text):
    return re.findall(r"[\w\u0080-\U0010ffff]+|[^\w\s]", text)


def test_the_vectorised_tokens_are_those_of_a_regular_expression(library):
    for _, text in library[:30]:
        found, words = data.lex(text)[0], words_of(text)
        assert len(found) == len(words)
        assert len(set(found.tolist())) == len(set(words)) == len(set(zip(found.tolist(), words)))


def test_jaccard_of_shingles_is_that_of_sets_of_token_5_grams(library):
    grams = lambda text: set(zip(*(words_of(text)[i:] for i in range(5))))
    for (_, a), (_, b) in itertools.pairwise(library[:12]):
        a, b = a + b[:3000], b
        expected = len(grams(a) & grams(b)) / len(grams(a) | grams(b))
        assert data.jaccard(data.shingles(a), data.shingles(b)) == pytest.approx(expected, abs=1e-4)


def test_planted_pairs_meet_as_often_as_the_formula_says():
    rng, (b, r) = np.random.default_rng(0), (16, 8)
    for s in (0.4, 0.6, 0.7, 0.8):
        shared, alone, trials = round(600 * s), (600 - round(600 * s)) // 2, 300
        signatures = []
        for _ in range(trials):
            pool = rng.choice(2**32, shared + 2 * alone, replace=False).astype(np.uint32)
            signatures += [data.signature(pool[:shared + alone]), data.signature(np.concatenate([pool[:shared], pool[shared + alone:]]))]
        met = {(i, j) for i, j in data.meetings(np.array(signatures), b, r).tolist() if j == i + 1 and i % 2 == 0}
        expected = 1 - (1 - (shared / (shared + 2 * alone))**r)**b
        assert abs(len(met) / trials - expected) < 4 * (expected * (1 - expected) / trials)**0.5 + 0.01


def test_the_bands_follow_the_threshold():
    for threshold in (0.5, 0.7, 0.9):
        b, r = data.bands(threshold)
        assert b * r <= 128 and abs((1 / b)**(1 / r) - threshold) < 0.15


def variant(text, share, rng):
    """The same text with that share of its lines replaced."""
    lines = text.split("\n")
    for i in rng.sample(range(len(lines)), int(share * len(lines))):
        lines[i] = f"    changed_{rng.randrange(10**6)} = other_{rng.randrange(10**6)}"
    return "\n".join(lines)


def test_near_copies_go_others_stay_and_the_survivors_do_not_depend_on_the_order(library):
    rng = random.Random(0)
    originals = [text for _, text in library if 3000 < len(text) < 30_000][:40]
    docs = originals + [variant(text, 0.03, rng) for text in originals[:20]] + [variant(text, 0.6, rng) for text in originals[20:]]
    kept = data.near_duplicates(docs, 0.7)
    assert all(kept[i] == kept[40 + i] for i in range(20))
    assert all(kept[i] == i for i in range(20, 40)) and all(kept[i] == i for i in range(60, 80))
    survivors = {docs[k] for k in kept}
    order = rng.sample(range(len(docs)), len(docs))
    shuffled = [docs[i] for i in order]
    assert {shuffled[k] for k in data.near_duplicates(shuffled, 0.7)} == survivors


def test_exact_copies_differ_in_blank_lines_only_and_the_survivor_does_not_depend_on_the_order():
    docs = ["a\nb\n", "a  \n\nb", "a\n b", "c"]
    for order in itertools.permutations(range(4)):
        kept = data.exact_duplicates([docs[i] for i in order])
        assert {docs[order[k]] for k in kept} == {"a\n b", "c", min(docs[:2])}


def test_embeddings_find_renamed_copies_that_minhash_misses_and_take_no_hard_negative_for_one(library):
    """Stated: of the copies that MinHash misses 95 % are found, at a precision of 1 among spliced halves and all other pairs."""
    texts = [text for _, text in library if 2000 < len(text) < 40_000 and len(data.shingles(text)) >= 100][:60]
    copies, missed, found, wrong = data.renamed_study([texts[k] for k in sorted(set(data.near_duplicates(texts, 0.4)))])
    assert missed > 0.9 * copies and found >= 0.95 * missed and wrong == 0


def test_no_documents_have_no_duplicates():
    assert data.exact_duplicates([]) == data.near_duplicates([]) == data.embedding_duplicates(data.embed([])) == []


def test_a_crowd_of_equal_vectors_takes_no_more_memory_than_its_blocks():
    tracemalloc.start()
    kept = data.embedding_duplicates(np.ones((3000, 4)) / 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(kept)) == 1 and peak < 20e6


def test_embedding_groups_do_not_depend_on_block_size_or_order():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 16)).astype(np.float32)
    vectors[100:150] = vectors[:50] + 0.01 * rng.normal(size=(50, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = data.embedding_duplicates(vectors, 0.95, block=7)
    assert kept == data.embedding_duplicates(vectors, 0.95) and sum(k != i for i, k in enumerate(kept)) == 50
    order = rng.permutation(200)
    again = data.embedding_duplicates(vectors[order], 0.95)
    assert {order[k] for k in again} == set(kept)


SOLUTION = """def has_close_elements(numbers, threshold):
    for idx, elem in enumerate(numbers):
        for idx2, elem2 in enumerate(numbers):
            if idx != idx2:
                distance = abs(elem - elem2)
                if distance < threshold:
                    return True
    return False
"""
PROMPT = "Check if in given list of numbers, are any two numbers closer to each other than given threshold."


def test_a_benchmarks_solution_with_renamed_arguments_inside_a_larger_file_is_seen(library):
    guard = data.Decontaminator({"bench": [SOLUTION, PROMPT], "other": ["def mean_of(values):\n    total = 0\n    for value in values:\n"
                                 "        total = total + value\n    count = len(values)\n    if count == 0:\n        return None\n"
                                 "    return total / count\n"]})
    hidden = SOLUTION
    for old, new in (("has_close_elements", "any_near"), ("numbers", "xs"), ("threshold", "eps"), ("idx2", "j"),
                     ("idx", "i"), ("elem2", "w"), ("elem", "v"), ("distance", "gap")):
        hidden = re.sub(rf"\b{old}\b", new, hidden)
    whole = library[3][1]
    assert guard.overlaps(whole + "\n\n" + hidden) == ["bench"] and guard.overlaps(whole + "\n# " + PROMPT.upper()) == ["bench"]
    assert [name for name, text in library if guard.overlaps(text)] == []


def shapes_slowly(text, n=12):
    """The windows of n tokens: keywords and signs as they stand, of any other word only how far back in the window it stood before."""
    words, keywords = words_of(text), set(data.KEYWORDS.tolist())
    names = [bool(re.match(r"\w", word)) and int(data.lex(word)[0][0]) not in keywords for word in words]
    for start in range(len(words) - n + 1):
        last, window = {}, []
        for i in range(start, start + n):
            window.append(i - last.get(words[i], i) if names[i] else words[i])
            last[words[i]] = i
        yield tuple(window)


def test_a_renamed_solution_is_seen_from_70_percent_of_its_shapes_on_and_not_below(library):
    """Functions of the library, every word but keywords renamed, more and more of their lines gone; how many shapes are left is counted."""
    rng, inside, below = random.Random(0), 0, 0
    lines = [(text.split("\n"), node) for _, text in library[:60] for node in ast.parse(text).body
             if isinstance(node, ast.FunctionDef) and 14 <= node.end_lineno - node.lineno <= 30]
    for whole, node in lines[:40]:
        item = whole[node.lineno - 1:node.end_lineno]
        count = Counter(shapes_slowly("\n".join(item)))
        rare, guard = {window: times for window, times in count.items() if times <= 2}, data.Decontaminator({"bench": ["\n".join(item)]})
        for gone in (0, 1, 2, 3, 4, 6, 8):
            left = "\n".join(item[i] for i in sorted(rng.sample(range(len(item)), len(item) - gone)))
            other = re.sub(r"[A-Za-z_]\w*", lambda word: word[0] if keyword.iskeyword(word[0]) else f"a_{word[0]}_b", left)
            found = set(shapes_slowly(other))
            share = sum(times for window, times in rare.items() if window in found) / sum(rare.values())
            if abs(share - 0.7) > 0.01:
                assert guard.overlaps(other) == ["bench"] * (share > 0.7), (node.name, share)
            inside, below = inside + (0.71 < share < 0.94), below + (0.5 < share < 0.69)
    assert inside >= 20 and below >= 20


def test_every_longer_string_of_a_benchmark_is_kept_out_however_deep_it_stands_and_a_file_without_one_is_refused(tmp_path):
    texts = [f"the solution number {i}, which is longer than forty characters" for i in range(3)]
    row = {"task": 1, "prompt": texts[0], "solutions": [{"code": texts[1]}, [texts[2], "short"]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps([row], indent=1))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    found = data.read_benchmarks([tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.txt.gz"])
    assert found == {"a": texts, "b": texts, "c": ["\n".join(texts)]}
    for name, text in (("d.jsonl", ""), ("d.jsonl", "{broken"), ("d.json", "[" * 200_000), ("d.jsonl.gz", "plain")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}: "):
            data.read_benchmarks([tmp_path / name])


def test_a_commit_that_touches_a_benchmark_or_shows_a_key_is_no_sample_and_is_said_so(tmp_path, tokenizer, monkeypatch):
    keys, said = (f"AKIA{'Q7' * 8}", "password = 'q8Zr4tLm0Xw2'"), []
    texts = {"a.py": SOLUTION, "b.py": GOOD, **{f"{i}.py": f"{GOOD}{key}\n" for i, key in enumerate(keys)}}
    changes = [data.commits.Triplet("lib", "0" * 40, f"{i}" * 40, ["Add a function to it"], {}, b"", {name: text.encode()}, 1.0,
                                    data.commits.Context("", [], [(name, text)])) for i, (name, text) in enumerate(texts.items())]
    monkeypatch.setattr(data.commits, "triplets", lambda repository: changes)
    guard = data.Decontaminator({"bench": [SOLUTION]})
    found = list(data.commit_samples(str(tmp_path / "lib"), "train", set(), tokenizer, 1024, said.append, guard))
    assert len(found) == 1 and "radius" in str(found[0]) and len(said) == 3
    assert all(number * 12 in line and why in line for line, number, why in zip(said, "023", ("bench", "key", "secret")))


# ------------------------------------------------------------------------------------------------ the web

def warc(records):
    """A gzipped WARC, one member a record; records are (url, HTML, fault)."""
    out, offsets = [], []
    for url, html, fault in records:
        body = html.encode()
        payload = base64.b32encode(hashlib.sha1(b"x" if fault == "digest" else body).digest()).decode()
        block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
        length = 1_000_000_000 if fault == "length" else len(block)
        head = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Payload-Digest: sha1:{payload}\r\n"
                f"Content-Length: {length}\r\n\r\n")
        member = gzip.compress(head.encode() + block + b"\r\n\r\n")
        offsets.append((sum(map(len, out)), len(member)))
        out.append(member[:len(member) // 2] if fault == "cut" else member)
    return b"".join(out), offsets


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` with ranges; `trouble` holds what goes wrong with the next requests of a path."""
    files, trouble, log = {}, {}, []

    def do_GET(self):
        path, fault = self.path.split("?")[0], (self.trouble.get(self.path.split("?")[0]) or [None]).pop(0)
        self.log.append((self.path, self.headers.get("Range")))
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After" if fault in (429, 503) else "Location", "0" if fault in (429, 503) else "/moved" + path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, wanted = self.files[path.removeprefix("/moved")], re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        part = body[int(wanted[1]):int(wanted[2] or len(body)) + 1] if wanted else body
        self.send_response(206 if wanted else 200)
        if fault == "chunk":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(10**10 if fault == "huge" else len(part)))
        self.end_headers()
        self.wfile.write(b"%x\r\n" % len(part) if fault == "chunk" else b"")
        self.wfile.write(part[:len(part) // 2] if fault in ("cut", "chunk") else part)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.log.append((self.path, self.headers.get("Authorization")))
        if self.path.endswith("/embeddings"):
            answer = {"data": [{"index": i, "embedding": [len(text), 1.0]} for i, text in reversed(list(enumerate(asked["input"])))]}
        else:
            said = next((said for part, said in self.files.items() if part in asked["messages"][0]["content"]), "no idea")
            answer = {"choices": [{"message": {"content": said}}] * asked["n"]}
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    Server.files, Server.trouble, Server.log = {}, {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_warc_over_a_bad_connection_gives_its_pages_and_counts_what_cannot_be_read(web, tmp_path, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    records = [(f"http://site{i}.org/page", PAGE.replace("Sorting", f"Sorting {i}"), fault)
               for i, fault in enumerate((None, "digest", None, "length", "cut", None, None))]
    Server.files["/a.warc.gz"] = warc(records)[0]
    Server.trouble["/a.warc.gz"] = [429, "chunk", "cut", 503, 302]
    counts = Counter()
    entries = list(data.spooled(f"{web}/a.warc.gz", tmp_path, counts))
    assert [entry.project for entry in entries] == ["site0.org", "site2.org", "site5.org", "site6.org"]
    assert counts == {"record with a wrong digest": 1, "record too large": 1, "gzip member broken": 1}
    texts = [raw.decode() for raw in data.read_all(entries)]
    assert all(f"```\n{CODE}\n```" in text and f"Sorting {i}" in text for i, text in zip((0, 2, 5, 6), texts))
    assert any(wanted for _, wanted in Server.log)  # it went on where the connection broke, and did not begin again
    before, again = len(Server.log), Counter(other=1)
    assert list(data.spooled(f"{web}/a.warc.gz", tmp_path, again)) == entries and len(Server.log) == before
    assert again == counts + Counter(other=1)  # a stored source brings its counts, also behind another one


def test_a_common_crawl_query_fetches_only_the_ranges_it_is_told_of_and_none_twice(web, tmp_path, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    body, offsets = warc([(f"http://site{i}.org/", PAGE, None) for i in range(4)])
    rows = [json.dumps({"filename": f"crawl/{name}.warc.gz", "offset": str(start), "length": str(size)})
            for name, start, size in [("gone", 0, 9), *(("x", *row) for row in offsets[1:3]), ("x", 0, 10**9), ("x", offsets[3][0], 10**6)]]
    Server.files |= {"/crawl/x.warc.gz": body, "/index": "\n".join(rows + ["not json"]).encode()}
    Server.trouble |= {"/crawl/gone.warc.gz": [404], "/crawl/x.warc.gz": ["cut"]}
    counts = Counter()
    entries = list(data.spooled(f"cc:{web}/index?url=site*", tmp_path, counts))
    assert [entry.project for entry in entries] == ["site1.org", "site2.org"]
    assert counts == {"index line not understood": 1, "range not given": 3}
    (first, size), (second, next_size), (third, _) = offsets[1:]
    assert [wanted for path, wanted in Server.log if path.startswith("/crawl/x")] == [
        f"bytes={first}-{first + size - 1}", f"bytes={first + size // 2}-{first + size - 1}", f"bytes={second}-{second + next_size - 1}",
        f"bytes={third}-{third + 10**6 - 1}"]


def test_a_range_whose_run_was_killed_before_it_had_its_name_is_not_fetched_again(web, tmp_path):
    (tmp_path / "a.part").write_bytes(b"12345")
    assert data.download(f"{web}/a", tmp_path / "a", 7, 5).read_bytes() == b"12345" and Server.log == []


def test_what_a_stream_is_may_stand_anywhere_in_its_address_and_its_folder_may_be_moved(web, tmp_path):
    Server.files["/get"] = json.dumps({"text": GOOD}).encode()
    data.spooled(f"{web}/get?name=a.jsonl", tmp_path / "one", Counter())
    (tmp_path / "one").rename(tmp_path / "two")
    entries = data.spooled(f"{web}/get?name=a.jsonl", tmp_path / "two", Counter())
    assert [raw.decode() for raw in data.read_all(entries)] == [GOOD] and len(Server.log) == 1
    next((tmp_path / "two").glob("*.spool")).unlink()  # what we stored ourselves is never merely missing
    with pytest.raises(FileNotFoundError):
        list(data.read_all(entries))


def test_a_stored_page_is_read_in_its_coding_and_without_the_lengths_of_its_chunks_and_one_of_no_sense_is_counted(tmp_path):
    """As wget stores what a server sends; the coding stands in a header, or in the page."""
    said = "<p>Каждая страница говорит, в какой она кодировке.</p>"
    half = len(said) // 2
    parts = "".join(f"{len(part):x}\r\n{part}\r\n" for part in (said[:half], said[half:], ""))
    out = b""
    for headers, body, address in (
            ("; charset=windows-1251", said, "http://a.org/"), ("", "<meta charset='windows-1251'>" + said, "http://b.org/"),
            ("; charset=windows-1251\r\nTransfer-Encoding: chunked", parts, "http://c.org/"), ("", said, "http://[d/")):
        block = f"HTTP/1.1 200 OK\r\nContent-Type: text/html{headers}\r\n\r\n{body}".encode("cp1251")
        out += f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Length: {len(block)}\r\n\r\n".encode() + block
    (tmp_path / "a.warc").write_bytes(out + b"WARC/1.0\r\nContent-Length: many\r\n\r\n")
    counts = Counter()
    found = [(doc.project, doc.text) for doc in data.warc_pages(tmp_path / "a.warc", counts)]
    assert found == [(f"{name}.org", said[3:-4] + "\n") for name in "abc"] and counts == {"record not understood": 2}


def test_a_server_that_promises_too_much_or_never_recovers_is_an_error_and_leaves_no_file(web, tmp_path, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    Server.files |= {"/a.jsonl": b"{}", "/b.jsonl": b"{}"}
    Server.trouble |= {"/a.jsonl": ["huge"], "/b.jsonl": [503] * 50}
    with pytest.raises(ValueError, match="more than"):
        data.download(f"{web}/a.jsonl", tmp_path / "a")
    with pytest.raises(OSError, match="HTTP 503 after 6 tries"):
        data.download(f"{web}/b.jsonl", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_json_lines_are_read_whatever_their_field_names_and_bad_lines_and_cut_files_are_counted(tmp_path):
    rows = [{"text": "x = 1", "language": "Python", "repo_name": "a/b", "path": "x.py"},
            {"content": "# T", "path": "r.md"}, {"code": "y = 2"}]
    lines = "\n".join([*map(json.dumps, rows), "{broken", "[1, 2]", "[" * 200_000]) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-12])
    counts = Counter()
    found = list(data.json_lines(tmp_path / "a.jsonl", counts))
    assert [(doc.text, doc.language) for doc in found] == [("x = 1", "python"), ("# T", "markdown"), ("y = 2", "text")]
    assert counts["JSON line not understood"] == 3 and found[0].project == "a/b"
    list(data.json_lines(tmp_path / "b.jsonl.gz", counts))
    assert counts["gzip file cut short"] == 1


def test_a_local_file_that_has_changed_is_read_anew(tmp_path):
    for text in ("one", "three"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
        assert [raw.decode() for raw in data.read_all(data.spooled(str(tmp_path / "a.jsonl"), tmp_path, Counter()))] == [text]


def test_a_plain_wet_file_is_text_by_site(tmp_path):
    block = "Some text. It was converted.\n".encode()
    head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: https://a.org/b\r\nContent-Length: {len(block)}\r\n\r\n".encode()
    (tmp_path / "x.wet").write_bytes((head + block + b"\r\n\r\n") * 2 + b"WARC/1.0\r\nContent-Length: 99\r\n\r\nshort")
    counts = Counter()
    assert list(data.warc_pages(tmp_path / "x.wet", counts)) == [data.Document(block.decode(), "text", "a.org", "https://a.org/b")] * 2
    assert counts == {"record cut short": 1}


def test_a_teachers_embeddings_are_put_in_order_and_to_unit_length(web, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    vectors = data.embed(["aaa", "b"], teacher=data.tasks.Teacher(f"{web}/v1", "model", tmp_path))
    np.testing.assert_allclose(vectors, np.array([[3, 1], [1, 1]]) / np.sqrt([[10], [2]]), rtol=1e-6)
    assert Server.log == [("/v1/embeddings", "Bearer secret")]


def test_a_teachers_score_is_its_number_and_its_wording_is_taken_only_where_it_leads_to_the_same_answer(web, tmp_path):
    teacher = data.tasks.Teacher(f"{web}/v1", "big", tmp_path)
    Server.files |= {"def good": "Score: 7.5 out of 10", "def best": "a 95!", "Rephrase": "Where does dumps live?", "Where does": "`json`"}
    assert [data.teacher_score(teacher, "code", f"def {name}(): ...") for name in ("good", "best", "odd")] == [[0.75], [1.0], None]
    fact = data.Fact("Which module defines `dumps`?", "json", ("module", "json", "dumps", ""))
    assert data.rephrased(teacher, fact) == fact._replace(question="Where does dumps live?")
    assert data.rephrased(teacher, fact._replace(answer="pickle")).question == fact.question
    teacher.budget = 0
    new = fact._replace(question="New?")
    assert data.teacher_score(teacher, "code", "def new(): ...") is None and data.rephrased(teacher, new) == new


def test_a_build_asks_its_teacher_to_rephrase_the_facts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "code_facts", lambda count=500, teacher=None: [data.Fact(f"In words of {teacher}?", "json", ())])
    data.write_splits(tmp_path, {}, None, tokenizer, {}, set(), {}, 512, 1, print, "a teacher")
    assert "In words of a teacher?" in tokenizer.decode(TokenFile(tmp_path / "train", "text").ids(0))


def test_embeddings_from_a_model_of_ours_are_unit_vectors_that_tell_texts_apart(library, tokenizer):
    torch.manual_seed(0)
    model = data.LoopCoder(data.LoopCoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                num_attention_heads=2, num_key_value_heads=2, head_dim=16))
    texts = [text for _, text in library[:6]]
    vectors = data.embed(texts + texts, model, tokenizer)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1) and vectors.shape == (12, 32)
    assert data.embedding_duplicates(vectors, 0.999) == [0, 1, 2, 3, 4, 5] * 2


# ------------------------------------------------------------------------------------------------ proxies, mixture law, facts

def test_auc_and_spearman_are_what_counting_pairs_says():
    rng = np.random.default_rng(0)
    scores, good = rng.integers(0, 6, 60), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[good] for b in scores[~good]]
    assert data.auc(scores, good) == pytest.approx(np.mean(pairs))
    assert data.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1) and data.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_the_rubric_prefers_documented_code_and_both_scorers_learn_a_visible_mark(tokenizer):
    bare = "def f(a,b):\n    x=a\n    y=b\n    try:\n        return x/y\n    except:\n        pass\n"
    fine = ('DOC = 1\n\n\ndef divide(number: float, other: float) -> float:\n    """The quotient of both."""\n'
            '    # zero is the caller\'s\n    return number / other\n')
    assert sum(data.code_rubric(fine)) > sum(data.code_rubric(bare)) + 2 and data.code_rubric("def (") is None
    rng, names = random.Random(0), ["alpha", "beta", "gamma", "delta", "total", "count"]
    texts = [[f"{rng.choice(names)} = {rng.choice(names)} + {rng.randrange(90)}" for _ in range(20)] for _ in range(240)]
    for i, lines in enumerate(texts):
        lines[rng.randrange(20)] = "assert alpha" if i % 2 else "global alpha"
    texts, goals = ["\n".join(lines) for lines in texts], np.array([[i % 2, 0.5] for i in range(240)])
    for scorer in (data.NgramScorer(texts[:200], goals[:200], tokenizer), data.Proxy(texts[:200], goals[:200], epochs=6)):
        assert data.auc(scorer(texts[200:]), goals[200:, 0] > 0.5) > 0.95


def test_a_docstring_with_a_continued_line_is_read_as_one_and_an_equation_without_a_value_is_no_error():
    text = "First, a line that goes on\\\nhere. " + "Then the words of a long description. " * 10
    code = f'def f():\n    """{text}"""\n    x = 1\n\n\ndef g():\n    """Short."""\n'
    assert [sample for kind, sample in data.samples_of(data.Document(code, "python", "p", "a.py")) if kind == "text"] == [text]
    assert data.maths_rubric("1 / 0 = 3, and 2 * 3 = 6")[0] == 1.0


def test_odd_code_of_a_corpus_is_rated_without_a_word_about_it(recwarn):
    assert data.code_rubric('pattern = "\\d"\n') and not recwarn.list


def test_a_proxy_reads_layout_signs_and_keywords_and_of_a_name_its_length():
    marks = data.line_marks("def area(x):\n\n    return x\n")
    same, other = data.line_marks("def size(y):\n    return y"), data.line_marks("class area(x):\n  return x")
    assert marks.shape[0] == 2 and (marks == same).all() and (marks[0, 2] != other[0, 2]) and (marks[1, 0] != other[1, 0])
    assert data.line_marks("").shape[0] == 1 and not data.line_marks("\n \n").any()


@pytest.mark.parametrize("informative", ["layout", "names"])
def test_the_scorer_that_wins_on_sources_not_seen_is_the_one_that_decides(tokenizer, monkeypatch, informative):
    """Quality is made to hang on layout, which n-grams of tokens barely see, or on a name, which the proxy does not read."""
    rng, log = random.Random(0), []
    def text(good):
        name, deep = ("alpha" if good else "gamma", 1) if informative == "names" else (rng.choice(("alpha", "gamma")), 5 if good else 1)
        return "\n".join(" " * rng.choice((0, deep)) + f"{name} = {rng.randrange(90)}" for _ in range(12))
    docs = [data.Document(text(i % 2), "python", f"p{i % 40}", f"{i}.py") for i in range(400)]
    goods = {doc.text: i % 2 for i, doc in enumerate(docs)}
    monkeypatch.setitem(data.RUBRICS, "code", lambda text: [goods[text], 0.5])
    chosen = data.quality_table(docs, tokenizer, kinds=("code",), log=log.append)["code"]
    figures = {line.split()[0]: float(re.search(r"AUC ([\d.]+)", line)[1]) for line in log if "AUC" in line}
    assert isinstance(chosen, data.Proxy) == (figures["proxy"] >= figures["n-grams"])
    if informative == "names":
        assert isinstance(chosen, data.NgramScorer) and figures["n-grams"] > 0.95


def test_the_solver_gives_the_reports_allocation_and_the_printed_law_a_single_language():
    law = data.LAW
    solved = data.solve_mixture(350, law["B"], law["alpha_D"])
    np.testing.assert_allclose(solved, law["optimised"], atol=0.01)
    equal = data.solve_mixture(350, np.ones(7), law["alpha_D"])
    np.testing.assert_allclose(equal, [51.3, 58.3, 49.2, 45.6, 42.9, 56.6, 46.0], atol=0.06)
    mixed = data.printed_law(1e9, 350.0, np.full(7, 1 / 7))
    assert min(data.printed_law(1e9, 350.0, np.eye(7)[k]) for k in range(7)) < mixed  # scored on itself, one language beats a mixture


def test_no_small_move_improves_the_solvers_mixture_with_synergy():
    law, rng = data.LAW, np.random.default_rng(0)
    share = np.eye(7) + 0.5 * law["synergy"]
    loss = lambda D: (law["B"] * (share @ D) ** -law["alpha_D"]).sum()
    D = data.solve_mixture(350, law["B"], law["alpha_D"], law["synergy"], gamma=0.5, available=[40, *[1e9] * 6])
    assert D.sum() == pytest.approx(350) and D[0] == pytest.approx(40)
    for _ in range(200):
        i, j = rng.choice(np.arange(1, 7), 2, replace=False)
        moved = D.copy()
        moved[i], moved[j] = D[i] + 0.5, D[j] - 0.5
        assert loss(moved) >= loss(D) - 1e-12


def test_a_language_that_runs_out_leaves_its_share_to_the_others():
    taken = data.language_mixture({"python": 10.0, "java": 1e9, "rust": 1e9}, 100.0)
    assert taken["python"] == pytest.approx(10) and sum(taken.values()) == pytest.approx(100)
    assert taken["java"] / taken["rust"] == pytest.approx(55.60 / 50.00)
    with pytest.raises(ValueError, match="no law for cobol"):
        data.language_mixture({"cobol": 1.0}, 1.0)


def planted(sizes, tokens, noise=0.0, A=400, B=2000, a=0.35, b=0.45, floor=1.7, seed=0):
    rng = np.random.default_rng(seed)
    return [(n, d, A * n**-a + B * d**-b + floor + noise * rng.normal()) for n in sizes for d in tokens]


SIZES, TOKENS = (1e4, 3e4, 1e5, 3e5), (1e5, 3e5, 1e6, 3e6)


@pytest.mark.parametrize("a, b", [(0.35, 0.45), (0.1, 0.8), (1.1, 0.2)])
def test_refit_recovers_planted_exponents_and_its_ranges_hold_them_also_under_noise(a, b, capsys):
    A, B = 2 * 1e4**a, 4 * 1e5**b
    found = data.refit(planted(SIZES, TOKENS, A=A, B=B, a=a, b=b))
    assert found["alpha_N"] == pytest.approx(a, rel=0.05) and found["alpha_D"] == pytest.approx(b, rel=0.05) and found["rms"] < 1e-2
    assert found["floor"] == pytest.approx(1.7, abs=0.25)
    noisy = data.refit(planted(SIZES, TOKENS, 0.01, A=A, B=B, a=a, b=b))
    for law in (found, noisy):
        assert law["N_range"][0] <= a <= law["N_range"][1] and law["D_range"][0] <= b <= law["D_range"][1]
    assert noisy["N_range"][1] - noisy["N_range"][0] >= found["N_range"][1] - found["N_range"][0]
    data.show_law("python", planted(SIZES, TOKENS, A=A, B=B, a=a, b=b))
    assert capsys.readouterr().out.count("lies between") == 2


@pytest.mark.parametrize("points, open_one", [
    (planted((1e4,), (*TOKENS, 1e7, 3e7)), "N"),                                              # one size
    (planted((1e4, 1e5), TOKENS), "N"),                                                       # two: a line goes through any two points
    (planted(SIZES, (1e5,)) + planted(SIZES, (1e5,), 0.001), "D"),                            # one length
    ([(n, d, loss + n / 1e6) for n, d, loss in planted((1e4, 1e5), TOKENS, A=0)], "N"),       # size has not helped
    (planted(SIZES, TOKENS, 0.3, A=2, seed=1), "N"),                                                  # what size gives drowns in noise
])
def test_points_that_leave_an_exponent_open_are_said_to_do_so(points, open_one, capsys):
    data.show_law("python", points)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.strip().split("\n")}
    assert "is not determined by these runs" in lines[f"alpha_{open_one}"]
    assert all(data.refit(planted((n,), TOKENS, seed=seed, noise=0.01))["A"] == 0 for n in (1e3, 1e5) for seed in range(4))
    worse = data.refit([(n, d, loss + n / 1e6) for n, d, loss in planted((1e4, 1e5), TOKENS, A=0)])
    assert worse["A"] == worse["alpha_N"] == 0 and worse["alpha_D"] == pytest.approx(0.45, abs=0.05)


def test_every_fact_is_what_the_running_python_says_and_changing_or_ambiguous_ones_are_refused():
    facts = data.code_facts(120)
    assert len(facts) == 120 == len({fact.question for fact in facts}) and len({fact.check[1] for fact in facts}) > 20
    for fact in facts:
        assert data.look_up(*fact.check) == fact.answer
    one = data.Fact("?", "json", ("module", "json", "dumps", ""))
    assert data.objective(one, Counter(dumps=1)) and not data.objective(one, Counter(dumps=2))  # pickle has one too
    assert not data.objective(one._replace(answer="marshal"), Counter(dumps=1))
    assert not data.objective(data.Fact("?", "/tmp", ("default", "tempfile", "mkdtemp", "dir")), Counter())


# ------------------------------------------------------------------------------------------------ sources, split, build

def test_whole_projects_are_held_out_and_every_language_with_several_is_measured():
    entry = lambda project, language, size: data.Entry(project, f"{project}/x{size}.{language}", language, size, "")
    entries = [entry(f"p{i}", "python", 1000 + i) for i in range(100)] + [entry(f"c{i}", "c", 1000 + i) for i in range(60)]
    entries.append(entry("big", "python", 10**6))
    held = data.held_out_projects(entries, 0.05)
    size = lambda language, inside: sum(e.size for e in entries if e.language == language and (e.project in held) == inside)
    assert "big" not in held and size("c", True) >= 0.05 * (size("c", True) + size("c", False))
    assert held == data.held_out_projects(entries[::-1], 0.05)
    with pytest.raises(ValueError, match="only one project"):
        data.held_out_projects([entry("a", "python", 9)], 0.05)


def test_a_sample_keeps_to_its_size_and_no_project_takes_more_than_its_fair_part():
    entries = [data.Entry(f"p{i}", f"f{k}.py", "python", 1000, "") for i in range(30) for k in range(1 + 200 * (i == 0))]
    sample = data.draw_sample(entries, 50_000)
    size = Counter(entry.project for entry in sample)
    assert sum(size.values()) * 1000 <= 50_000 and len(size) == 30 and size["p0"] == 21
    assert data.draw_sample(entries[::-1], 50_000) == sample


def test_of_small_projects_and_of_one_kind_alone_a_sample_is_as_large_as_asked():
    for language, size in (("c", 1000), ("text", 1000), ("python", 1000)):
        entries = [data.Entry(f"p{i}", f"f.{language}", language, size, str(i)) for i in range(300)]
        assert 99_000 < sum(entry.size for entry in data.draw_sample(entries, 100_000)) <= 100_000


def test_what_a_build_writes_inside_a_source_is_no_part_of_the_source(tmp_path):
    for name in ("src/a.py", "out/train/code.json", "out/drops.json", "out/own.py", "train/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    entries = data.find([str(tmp_path)], tmp_path / "out" / "fetched", Counter())
    assert [entry.path for entry in entries] == ["out/own.py", "src/a.py", "train/b.py"]


def test_a_name_that_is_no_utf_8_is_the_same_before_and_after_its_shard(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "x.py").write_text(GOOD)
    entries = list(data.find([str(tmp_path)], tmp_path / "fetched", Counter()))
    data.clean_shard((entries, tmp_path / "shard", None))
    assert [entry.project for entry in entries] == [row[0] for row in json.loads((tmp_path / "shard").read_bytes())["about"]]
    assert data.split_of(tmp_path, "train", [os.fsdecode(b"caf\xe9/x.py")], {entry.project for entry in entries}) == "heldout"


def test_the_manifest_names_held_out_projects_and_no_document_of_theirs_is_trained_on(corpus, built):
    manifest = json.loads((built / "manifest.json").read_text())
    tokenizer, held = Tokenizer.load(built / "tokenizer"), {name.split("/")[1] for name in manifest["heldout_projects"]}
    texts = {data.clean(data.decode(path.read_bytes()), "python")[0]: path.relative_to(corpus).parts[0] for path in corpus.rglob("*.py")}
    for split in ("train", "heldout"):
        file = TokenFile(built / split, "code")
        for i in range(len(file.lengths)):
            project = texts[tokenizer.decode(file.ids(i)[1:-1])]
            assert file.project(i) == f"{corpus.name}/{project}" and (project in held) == (split == "heldout")


def test_files_are_half_holes_and_tasks_hide_what_the_model_did_not_say(built):
    tokenizer = Tokenizer.load(built / "tokenizer")
    for name in ("file", "repo"):
        file, middle = TokenFile(built / "train", name), tokenizer.special["<|fim_middle|>"]
        holes = [middle in file.ids(i) for i in range(len(file.lengths))]
        assert 0.3 < np.mean(holes) < 0.7 and file.lengths.max() <= 4096 and not file.cut
        assert all(file.ids(i)[-1] == tokenizer.special["<|im_end|>"] for i in range(len(holes)) if holes[i])
    file = TokenFile(built / "train", "agent")
    for i in range(20):
        ids, in_loss = file.ids(i), file.in_loss(i)
        learned = tokenizer.decode([t for t, keep in zip(ids, in_loss) if keep])
        assert ids[0] == tokenizer.special["<|im_start|>"] and not in_loss[0] and "user\n" not in learned and "<|im_end|>" in learned


def test_the_quality_set_is_the_quarter_of_each_languages_code_that_the_scorer_puts_first(tmp_path):
    rng, writers = random.Random(0), {name: TokenWriter(tmp_path, name, 300) for name in ("code", "quality")}
    scores = np.array([rng.random() for _ in range(60)])
    for i in range(60):
        writers["code"].add([i, i], 2, "python" if i % 3 else "c")
    writers["code"].close()
    data.copy_best(TokenFile(tmp_path, "code"), scores, writers["quality"])
    assert writers["quality"].close()["by_language"].keys() == {"python", "c"}
    best = TokenFile(tmp_path, "quality")
    for language, rows in (("python", [i for i in range(60) if i % 3]), ("c", range(0, 60, 3))):
        chosen = {int(best.ids(i)[0]) for i in range(len(best.lengths)) if best.language(i) == language}
        assert len(chosen) == len(rows) // 4 and min(scores[i] for i in chosen) > max(scores[i] for i in rows if i not in chosen)


def test_as_many_holes_as_the_rate_says_have_the_suffix_first_and_nothing_else_changes(tokenizer, library, monkeypatch):
    docs = [data.Document(text, "python", f"p{i // 9}", path) for i, (path, text) in enumerate(library)]
    for sampler in (data.file_samples, data.repo_samples):
        made = {}
        for rate in (0.0, 0.3, 1.0):
            monkeypatch.setattr(data.fim, "SPM_RATE", rate)
            made[rate] = [parts for *_, parts in sampler(docs, tokenizer, 512, random.Random(0))]
        holes = [i for i, parts in enumerate(made[0.0]) if parts[-1][0] == "<|im_end|>"]
        for i, parts in enumerate(made[0.0]):
            prefix, suffix, middle = (parts[-k] for k in (6, 4, 2)) if i in holes else ("",) * 3
            turned = [*parts[:-6], parts[-5], suffix, parts[-3], prefix, middle, parts[-1]] if i in holes else parts
            assert made[1.0][i] == turned and made[0.3][i] in (parts, turned)
        share = np.mean([made[0.3][i] == made[1.0][i] for i in holes])
        assert len(holes) > 12 and 0.05 < share < 0.6


def test_a_project_is_laid_out_with_what_is_imported_before_its_users(tokenizer):
    docs = [data.Document("import b\n\n\ndef run_a():\n    return b.value * 0\n", "python", "p", "a.py"),
            data.Document("value = 1\n", "python", "p", "b.py")]
    parts = [parts for *_, parts in data.repo_samples(docs, tokenizer, 1024, random.Random(0)) if parts[-1][0] == "<|endoftext|>"]
    text = "".join(text for text, *_ in parts[0])
    assert text.startswith("<|repo_name|>p\n<|file_sep|>b.py\n") and text.index("b.py") < text.index("a.py")


def test_wherever_the_samples_of_a_project_are_cut_off_half_of_them_have_a_hole(tokenizer, library):
    docs = [data.Document(text, "python", f"p{i // 20}", path) for i, (path, text) in enumerate(library)]
    holes = [parts[-1][0] == "<|im_end|>" for *_, parts in data.repo_samples(docs, tokenizer, 1024, random.Random(0))]
    assert len(holes) > 20 and all(abs(sum(holes[:n]) - n / 2) <= 2 for n in range(len(holes) + 1))


def test_a_file_too_large_for_any_context_gives_none_its_language(tokenizer):
    huge = data.Document("int x = 1;\n" * 3000, "c", "p", "a.c")
    docs = [huge, *(data.Document(f"value = {i}\n", "python", "p", f"b{i}.py") for i in range(3))]
    found = [(language, parts) for language, _, parts in data.repo_samples(docs, tokenizer, 256, random.Random(0))
             if parts[-1][0] == "<|endoftext|>"]
    assert found and all(language == "python" and "int x" not in str(parts) for language, parts in found)


def folder_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_build_ends_with_the_same_bytes_and_so_does_one_of_two_processes(corpus, built, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 200_000)
    work, done = data.clean_shard, []

    def stumble(job):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        work(job)

    monkeypatch.setattr(data, "clean_shard", stumble)
    with pytest.raises(KeyboardInterrupt):
        data.build(tmp_path, [str(corpus)], 800, 0, workers=1, log=lambda line: None)
    assert not (tmp_path / "manifest.json").exists() and len(list((tmp_path / "work").glob("*.prints"))) == 4
    monkeypatch.setattr(data, "clean_shard", work)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.prints")}
    real = data.deduplicate
    same = lambda: [stamps.pop(path) for path in list(stamps) if path.stat().st_mtime_ns == stamps[path]]
    monkeypatch.setattr(data, "deduplicate", lambda paths: same() and real(paths))
    data.build(tmp_path, [str(corpus)], 800, 0, workers=2, log=lambda line: None)
    assert not stamps and folder_bytes(tmp_path) == folder_bytes(built)  # the four shards were not made again


def test_a_build_that_fails_leaves_the_earlier_one_whole_and_a_full_disk_is_one_line(corpus, built, tmp_path):
    shutil.copytree(built, tmp_path / "out")
    with pytest.raises(ValueError, match="more than the corpus"):
        data.build(tmp_path / "out", [str(corpus / "json"), str(corpus / "html")], 60_000, 0, workers=1, log=lambda line: None)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))  # of the ways in which a disk is full the one that a test can have
    try:
        with pytest.raises(OSError, match="out: File too large; make room"):
            data.main(["--source", str(corpus), "--out", str(tmp_path / "out"), "--max-mb", "0", "--workers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    shutil.rmtree(tmp_path / "out" / "work")
    assert folder_bytes(tmp_path / "out") == folder_bytes(built)


def test_what_survives_of_the_shards_does_not_depend_on_their_order(library, tmp_path):
    rng, texts = random.Random(0), [text for _, text in library if 3000 < len(text) < 20_000][:12]
    texts += [variant(text, 0.03, rng) for text in texts[:8]] + [data.renamed(text, rng) for text in texts[4:]]
    paths = []
    for start in range(0, len(texts), 4):
        entries = [data.Entry("p", f"{start + i}.py", "python", 1, str(tmp_path / f"{start + i}.py")) for i in range(4)]
        for entry, text in zip(entries, texts[start:start + 4]):
            Path(entry.place).write_text(text)
        paths.append(tmp_path / f"shard{start}")
        data.clean_shard((entries, paths[-1], None))
    survivors = []
    for order in (paths, paths[::-1], paths[::2] + paths[1::2]):
        names = [name for path in order for _, name, _ in json.loads(path.read_text())["about"]]
        gone = data.deduplicate(order)
        assert all(len(gone[rule]) >= 5 for rule in ("near duplicate", "renamed duplicate"))
        survivors.append(set(names) - {names[i] for rows in gone.values() for i, _ in rows})
    assert survivors[0] == survivors[1] == survivors[2]


def test_processes_give_results_in_order_take_endless_jobs_a_few_at_a_time_and_may_fail(tmp_path):
    started, jobs = [], itertools.count()
    noted = lambda: (started.append(i) or i for i in jobs)
    assert list(itertools.islice(data.parallel(lambda i: i * i, noted(), 2), 20)) == [i * i for i in range(20)] and len(started) <= 26
    with pytest.raises(ValueError, match="job 3"):
        list(data.parallel(lambda i: i if i < 3 else exec(f"raise ValueError('job {i}')"), range(6), 2))
    with pytest.raises(OSError, match="was killed"):
        list(data.parallel(lambda i: os.kill(os.getpid(), signal.SIGKILL), range(3), 2))


def test_a_change_that_touches_a_held_out_project_is_held_out_with_it(tmp_path):
    held, repo = {"lib/json", "src/.", "other"}, tmp_path / "lib"
    assert data.split_of(repo, "train", ["html/a.py"], held) == "train"
    assert data.split_of(repo, "train", ["html/a.py", "json/b.py"], held) == "heldout"
    assert data.split_of(repo, "train", ["src/c.py"], held) == "heldout" == data.split_of(tmp_path / "other", "train", ["x.py"], held)
    assert data.split_of(repo, "heldout", ["html/a.py"], held) == "heldout"


def test_a_repository_is_in_one_split_however_it_is_spelled(tmp_path, monkeypatch):
    for name in ("one", "two"):
        subprocess.run(["git", "init", "-q", tmp_path / name], check=True)
    monkeypatch.chdir(tmp_path)
    rows = data.histories([str(tmp_path / "one")], ["one", "two/../one", "two", str(tmp_path / "two")])
    assert rows == {str(tmp_path / "one"): "train", str(tmp_path / "two"): rows[str(tmp_path / "two")]}


def test_a_second_build_in_the_same_folder_is_refused_while_the_first_one_runs(corpus, tmp_path):
    holds = "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holds, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with pytest.raises(ValueError, match="another process is building there"):
            data.build(tmp_path, [str(corpus)], 800, 0, workers=1, log=lambda line: None)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        first.stdin.close()


def test_a_source_inside_a_repository_gives_the_repositorys_history(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path / "repo"], check=True)
    (tmp_path / "repo" / "src").mkdir()
    assert data.repository_of(str(tmp_path / "repo" / "src")) == str(tmp_path / "repo") == data.repository_of(str(tmp_path / "repo"))
    assert data.repository_of("python") is None is data.repository_of(str(tmp_path))


def test_a_shard_that_loses_all_its_documents_does_not_stop_the_others(tmp_path):
    entries = []
    for name, text in (("junk", "x\n"), ("good", GOOD), ("copy", GOOD + "\n"), ("gone", "")):
        (tmp_path / f"{name}.py").write_text(text)
        entries.append(data.Entry("p", f"{name}.py", "python", len(text), str(tmp_path / f"{name}.py")))
    (tmp_path / "gone.py").unlink()
    paths = [tmp_path / "0", tmp_path / "1"]
    data.clean_shard((entries[:1], paths[0], None))
    data.clean_shard((entries[1:], paths[1], None))
    assert [len(rows) for rows in data.deduplicate(paths).values()] == [1, 0, 0]
    assert [doc.path for doc in data.documents({paths[0]: [], paths[1]: ["train", None]}, "train")] == ["good.py"]
    data.clean_shard((entries, tmp_path / "2", data.Decontaminator({"bench": [GOOD]})))
    drops = data.drop_table([tmp_path / "2"], {"index line not understood": 7})
    assert {rule: row["documents"] for rule, row in drops.items()} == {
        "benchmark bench": 2, "index line not understood": 7, "mean line": 1, "too few words": 1, "too short": 1, "unreadable": 1}


def test_each_of_several_processes_keeps_benchmarks_out(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 100)
    (tmp_path / "x.py").write_text(GOOD)
    entries = [data.Entry("p", f"{i}.py", "python", len(GOOD), str(tmp_path / "x.py")) for i in range(4)]
    paths = data.clean_all(tmp_path / "work", entries, set(), {"bench": [GOOD]}, workers=2)
    assert len(paths) == 4 and data.drop_table(paths, {})["benchmark bench"]["documents"] == 4


def test_git_repositories_are_sources_and_their_histories_become_commits(tmp_path):
    for name in ("one", "two"):
        repo = tmp_path / name
        head = ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@example.com"]
        git = lambda *args, head=head: subprocess.run([*head, *args], check=True, capture_output=True)
        repo.mkdir()
        git("init", "-q")
        library = Path(sysconfig.get_paths()["stdlib"]) / ("json" if name == "one" else "html")
        shutil.copytree(library, repo / "src", ignore=shutil.ignore_patterns("__pycache__"))
        (repo / "untracked.py").write_text("x = 1\n" * 30)
        git("add", "src")
        git("commit", "-qm", "Add the package")
    entries = data.find([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path, Counter())
    assert {(e.project, Path(source).name) for e, source in entries.items()} == {("one", "one"), ("two", "two")}
    assert not any("untracked" in e.path for e in entries)
    assert list(entries) == list(data.find([str(tmp_path / "two"), str(tmp_path / "one")], tmp_path, Counter()))
    for entry, raw in zip(entries, data.read_all(entries)):
        assert raw == (tmp_path / entry.project / entry.path).read_bytes() and len(raw) == entry.size
    oid = list(entries)[0].place.split("\0")[2]
    (tmp_path / "one" / ".git" / "objects" / oid[:2] / oid[2:]).unlink()
    with pytest.raises(ValueError, match="one: git cannot read src/"):
        list(data.read_all(entries))
    said = []  # of one commit there is no history; that is said, and is no reason to stop
    assert list(data.commit_samples(str(tmp_path / "one"), "train", set(), None, 512, said.append)) == []
    assert said[0].startswith("absent  commit") and str(tmp_path / "one") in said[0]


@pytest.mark.parametrize("arguments, words", [
    (["--source", "/nowhere/at/all"], "no such folder"), (["--source", "EMPTY"], "nothing to train on"),
    (["--explain", "no rule", "--out", "EMPTY"], "finished build"), (["--explain", "", "--out", "EMPTY"], "finished build"),
    (["--max-mb", "-1"], "max_bytes=-1000000"), (["--max-mb", "nan"], "max_bytes=nan"),
    (["--workers", "0"], "workers=0"), (["--context", "3"], "context=3"),
    (["--git", "/nowhere"], "no such git repository"), (["--heldout", "2"], "heldout=2.0"),
    (["--source", "CORPUS", "--vocab-size", "100"], "vocab_size=100"),
    (["--source", "CORPUS", "--vocab-size", "60000", "--max-mb", "0.3"], "more than the corpus"),
    (["--source", "missing.jsonl"], "no such file"), (["--facts", "-3"], "-3 facts"), (["--benchmark", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--benchmark", "BROKEN"], "no text of more than 40 characters"), (["--refit", "--out", "EMPTY"], "no such token file"),
    (["--nope"], "unrecognized arguments: --nope"), (["--max-mb", "many"], "invalid float value"), (["--bench", "no"], "invalid choice"),
    (["--source", "BROKEN"], "JSON line not understood 1"), (["--source", "CUT"], "gzip file cut short 1"),
    (["--source", "LARGE"], "larger than 1 MB 1"),
])
def test_wrong_input_is_one_line_and_status_2(corpus, tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jsonl").write_text("[1, 2]\n")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x = 1"}\n')[:-12])
    (tmp_path / "z.jsonl").write_text(json.dumps({"text": "x = 1\n" * 200_000}))
    places = {"EMPTY": tmp_path / "empty", "CORPUS": corpus, "BROKEN": tmp_path / "x.jsonl", "CUT": tmp_path / "y.jsonl.gz",
              "LARGE": tmp_path / "z.jsonl"}
    arguments = [str(places.get(a, a)) for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [data.__file__, *arguments, *out])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(data.__file__, run_name="__main__")
    last = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and len(last) == 1 and last[0].startswith("data.py: ") and words in last[0]
    assert not any((tmp_path / "out" / name).exists() for name in ("manifest.json", "tokenizer", "train"))


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word_and_the_help_shows_no_empty_default():
    with subprocess.Popen([sys.executable, data.__file__, "--mixture"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait() == 141
    told = subprocess.run([sys.executable, data.__file__, "--help"], capture_output=True, text=True, check=True).stdout
    assert "(default: 8192)" in told and not re.search(r"default:\s*(None|False|\[|\))", told)


def test_explain_shows_what_a_rule_removed(built):
    out = io.StringIO()
    rule = next(rule for rule in json.loads((built / "drops.json").read_text()) if rule in data.RULES)
    with contextlib.redirect_stdout(out):
        data.explain(rule, built)
    assert rule in out.getvalue() and "documents" in out.getvalue() and "==" in out.getvalue()
