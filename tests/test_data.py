"""data.py: what goes in is what the rules say, what comes out is what went in, and every share is exact."""
import json
import random
import shutil
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
from data import Mixture, TokenFile, TokenWriter, Tokenizer, pack


PROJECTS = "asyncio concurrent email html http importlib json logging unittest urllib wsgiref xml".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A dozen packages of the standard library, each a project, and a note in each."""
    root, library = tmp_path_factory.mktemp("corpus"), Path(sysconfig.get_paths()["stdlib"])
    for name in PROJECTS:
        shutil.copytree(library / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "test*"))
        (root / name / "notes.md").write_text(f"# The package {name}\n\nThese notes are about {name}, which is part of the standard library.\n" * 3)
    return root


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
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


def test_the_manifest_counts_what_the_files_hold(built):
    manifest = json.loads((built / "manifest.json").read_text())
    for split, rows in manifest["splits"].items():
        for name, row in rows.items():
            file = TokenFile(built / split, name)
            assert row["tokens"] == file.lengths.sum() and row["bytes"] == file.nbytes.sum() and row["documents"] == len(file.lengths)
            assert sum(r["bytes"] for r in row["by_language"].values()) == row["bytes"]


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
