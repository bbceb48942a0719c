"""Commit triplets: git itself is the oracle wherever it can be one; histories are written with git fast-import."""
import collections
import contextlib
import hashlib
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import commits
from commits import Sample, Triplet

ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
ROOM = Path(commits.__file__).parent


def git(folder, *args, stdin=b"", check=True):
    done = subprocess.run(["git", "-C", str(folder), *args], input=stdin, capture_output=True, env=ENVIRONMENT, check=check)
    return done.stdout


def build(folder, steps, kind="sha1") -> str:
    """
    A bare repository. Each step is (message, {path: content or (mode, content) or None}) on main; a third item is a list of
    such steps that a branch makes from the commit before, which this step then merges.
    """
    stream, clock, count = [], 1_600_000_000, 0

    def commit(ref, message, files, parent, merged=None):
        nonlocal count
        count += 1
        message = message.encode()
        stream.append(b"commit %s\nmark :%d\ncommitter A <a@example.org> %d +0000\ndata %d\n%s\n"
                      % (ref, count, clock + 3600 * count, len(message), message))
        stream.append(b"from :%d\n" % parent if parent else b"")
        stream.append(b"merge :%d\n" % merged if merged else b"")
        for path, content in files.items():
            path = path.encode() if isinstance(path, str) else path
            path = b'"' + b"".join(b"\\%03o" % byte for byte in path) + b'"'
            mode, content = content if isinstance(content, tuple) else ("100644", content)
            content = content.encode() if isinstance(content, str) else content
            if content is None:
                stream.append(b"D %s\n" % path)
            elif mode == "160000":
                stream.append(b"M 160000 %s %s\n" % (content, path))
            else:
                stream.append(b"M %s inline %s\ndata %d\n%s\n" % (mode.encode(), path, len(content), content))
        return count

    last = 0
    for message, files, *branch in steps:
        side = last
        for step in branch[0] if branch else []:
            side = commit(b"refs/heads/side", *step, side)
        last = commit(b"refs/heads/main", message, files, last, side if side != last else None)
    Path(folder).mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "--bare", "--template=", f"--object-format={kind}", "--initial-branch=main", ".")
    git(folder, "fast-import", "--quiet", stdin=b"".join(stream))
    return str(folder)


def source(seed: int, functions: int = 3) -> str:
    """A small Python file that no other seed gives."""
    return "".join(f"def work_{seed}_{i}(value):\n    total_{seed} = value + {seed * 7 + i}\n    return total_{seed} * {i}\n\n\n"
                   for i in range(functions))


def plain_steps(n: int) -> list:
    """n commits that each would make a triplet: a module and its test change under a fair message."""
    name = lambda i: f"mod{i % 3}.py"
    return [(f"Rewrite work_{i}_0 in the module of step {i}", {f"pkg/{name(i)}": source(i), f"tests/test_{name(i)}": source(1000 + i)})
            for i in range(n)]


def apply_in_folder(folder, triplet: Triplet) -> dict:
    """R_old as real files, the patch applied to them by plain `git apply`, everything read back: shares nothing with commits.py."""
    folder = os.fsencode(folder)
    for path, data in triplet.old_files.items():
        full = os.path.join(folder, os.fsencode(path))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        Path(os.fsdecode(full)).write_bytes(data)
    git(os.fsdecode(folder), "apply", "--whitespace=nowarn", "-", stdin=triplet.patch)
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            full = os.path.join(place, name)
            found[os.fsdecode(os.path.relpath(full, folder))] = Path(os.fsdecode(full)).read_bytes()
    return found


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("shop") / "shop.git")
    commits.scripted_history(folder, seed=1, commits=120)
    return folder


@pytest.fixture(scope="module")
def shop_triplets(shop):
    return list(commits.triplets(shop))


# ------------------------------------------------------------------------------------------------ what changed


def random_history(rng, n, paths=8):
    """Random edits: lines in and out, files that come, go, come back, change mode, lose their last newline, turn to CRLF or Latin-1."""
    tree, steps = {}, []
    odd_lines = [b"x = 1", b"", b"y = 2\r", b"\xff\xfe", b"-- a", b"+++ b", b"index 12..34", b"\\ no"]
    for i in range(n):
        files = {}
        for _ in range(rng.randrange(1, 4)):
            path = f"{'ab'[rng.randrange(2)]}/file{rng.randrange(paths)}.py".encode() + rng.choice([b"", b"", b"\xe9", b' "\t'])
            if path in tree and rng.random() < 0.2:
                files[path] = None
                tree.pop(path)
                continue
            lines = tree.get(path, b"").split(b"\n")
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(lines) + 1)
                lines[at:at + rng.randrange(3)] = [rng.choice(odd_lines)] * rng.randrange(3)
            tree[path] = b"\n".join(lines)
            files[path] = (rng.choice(["100644", "100644", "100755"]), tree[path])
        steps.append((f"Random edit number {i} of many", files))
    return steps


def test_composed_steps_are_what_git_says_lies_between_any_two_commits(tmp_path):
    repo_dir = build(tmp_path / "r", random_history(random.Random(3), 40))
    with contextlib.closing(commits.Repository(repo_dir)) as repo:
        history = commits.History(repo)
        pairs = [(s, e) for s in range(0, 39, 3) for e in range(s + 1, 40, 4)]
        asked = "".join(f"{history.chain[e]} {history.chain[s]}\n" for s, e in pairs)
        truth = repo.git("diff-tree", "--stdin", "-r", "-z", "--raw", "--no-renames", "--always", stdin=asked.encode())
        truth = [changes for _, changes in commits.raw_changes(truth)]
        assert len(truth) == len(pairs)
        for (s, e), expected in zip(pairs, truth):
            net = {}
            for i in range(s + 1, e + 1):
                commits.compose(net, history.step(i)[1])
            assert sorted(net.values()) == sorted(expected)


def test_patches_of_random_edits_are_proven_and_say_as_many_lines_as_we_count(tmp_path):
    repo_dir = build(tmp_path / "r", random_history(random.Random(5), 50))
    with contextlib.closing(commits.Repository(repo_dir)) as repo:
        history, facts = commits.History(repo), commits.Facts(repo)
        for s in range(0, 48, 6):
            net = {}
            for e in range(s + 1, s + 3):
                commits.compose(net, history.step(e)[1])
            if net:
                patch = proven(repo, sorted(net.values()))
                old, new = commits.write_trees(repo, net.values())
                assert commits.apply_patch(repo, old, patch) == new
                stat = repo.git("diff-tree", "-r", "-z", "--numstat", "--minimal", "--no-renames", old, new).split(b"\0")[:-1]
                counted = {path: int(a) + int(b) for a, b, path in (row.split(b"\t", 2) for row in stat)}
                assert {c.path: facts.delta(*c[1:])[0] for c in net.values()} == counted


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=14), st.lists(st.integers(0, 3), max_size=14))
def test_edit_distance_is_the_longest_common_subsequence_turned_round(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    truth = len(a) + len(b) - 2 * table[-1][-1]
    assert commits.edit_distance(a, b, 99) == truth
    assert commits.edit_distance(a, b, truth) == truth
    assert truth == 0 or commits.edit_distance(a, b, truth - 1) is None


def proven(repo, changes):
    """make_patch raises unless git apply gives R_new"""
    return commits.make_patch(repo, changes, [repo.read(c.old) for c in changes if c.old_mode not in (commits.ABSENT, "160000")])


def hard_case():
    """(before, after): every kind of change that a patch can get wrong, in one step."""
    text = b"".join(b"line %d\n" % i for i in range(30))
    accented = "naïve.py".encode()
    before = {
        b"moved.py": text, b"mode.sh": b"#!/bin/sh\necho\n", b"no_newline.py": b"a = 1\nb = 2", b"gains_newline.py": b"a = 1",
        b"crlf.txt": b"one\r\ntwo\r\nthree\r\n", b"mixed.txt": b"one\r\ntwo\nlone\rcr\n", b"image.png": bytes(range(256)) * 4,
        b"gone.py": b"x = 1\n", b"caf\xe9.py": b"n = 1\n", accented: b"n = 1\n", b'tab\tquote".py': b"n = 1\n", b"empties.py": b"x\n",
        b"link": ("120000", b"mode.sh"), b"sub": ("160000", b"1" * 40), b"becomes_link.py": b"z = 1\n", b"node": b"a file\n",
        b"latin.txt": b"caf\xe9\n", b"spaces": b"a \t\n \n",
    }
    after = {
        b"moved.py": None, b"deep/er/moved.py": text.replace(b"line 7\n", b"line seven\n"), b"mode.sh": ("100755", b"#!/bin/sh\necho\n"),
        b"no_newline.py": b"a = 1\nb = 3", b"gains_newline.py": b"a = 1\n", b"crlf.txt": b"one\r\nTWO\r\nthree",
        b"mixed.txt": b"one\ntwo\r\nlone\rCR\n", b"image.png": bytes(range(256)) * 3, b"gone.py": None, b"caf\xe9.py": b"n = 2\n",
        accented: b"n = 2\n", b'tab\tquote".py': b"n = 2\n", b"empties.py": b"", b"empty_new.py": b"", b"link": ("120000", b"crlf.txt"),
        b"sub": ("160000", b"2" * 40), b"becomes_link.py": ("120000", b"mode.sh"), b"node": None, b"node/inside.py": b"b = 1\n",
        b"latin.txt": b"caff\xe8\n", b"spaces": b"a\n\t\n", b"new.bin": b"\0\1\2" * 50,
    }
    return before, after


def test_a_patch_with_every_hard_kind_of_change_gives_the_new_tree_to_the_bit(tmp_path):
    before, after = hard_case()
    repo_dir = build(tmp_path / "r", plain_steps(20) + [("Set the scene for it", before), ("Change everything at once now", after)])
    with contextlib.closing(commits.Repository(repo_dir)) as repo:
        history = commits.History(repo)
        changes = history.step(21)[1]
        assert {c.path for c in changes} == set(after)
        patch = proven(repo, changes)
        assert b"rename from moved.py\nrename to deep/er/moved.py" in patch and b"old mode 100644\nnew mode 100755" in patch
        assert b"GIT binary patch" in patch and b"Subproject commit " + b"2" * 40 in patch and b"\\ No newline at end of file" in patch
        assert patch.count(b"\nindex ") == 2  # only the two binary files need theirs
        # the same patch, applied by git to a real checkout that knows nothing of us
        git(tmp_path, "clone", "-q", "--no-local", repo_dir, "work")
        git(tmp_path / "work", "checkout", "-q", "HEAD~1")
        git(tmp_path / "work", "apply", "--index", "--whitespace=nowarn", "-", stdin=patch)
        assert git(tmp_path / "work", "write-tree") == git(repo_dir, "rev-parse", "HEAD^{tree}")


def test_paths_that_git_would_not_check_out_are_refused(tmp_path):
    with contextlib.closing(commits.Repository(build(tmp_path / "r", plain_steps(20)))) as repo:
        blobs = [repo.keep(text) for text in (b"a = 1\n", b"a = 2\n")]
        before = {True: ("100644", blobs[0]), False: (commits.ABSENT, "0" * 40)}
        change = lambda path, old=True: commits.Change(path, *before[old], "100644", blobs[1])
        assert b"+a = 2" in proven(repo, [change(b"pkg/a.py")])
        for path in (b"../a.py", b".git/hooks/pre-commit", b"pkg//a.py", b"pkg/./a.py", b"/a.py"):
            for bad in (change(path), change(path, old=False)):
                with pytest.raises(commits.Refused):
                    proven(repo, [bad])


def test_the_proof_fails_when_a_single_byte_of_the_patch_is_wrong(tmp_path, monkeypatch):
    repo_dir = build(tmp_path / "r", plain_steps(22))
    true_apply = commits.apply_patch
    with contextlib.closing(commits.Repository(repo_dir)) as repo:
        changes = commits.History(repo).step(21)[1]
        for wrong in (lambda p: p.replace(b"+    total_21", b"+    total_22", 1), lambda p: p.replace(b"-    return", b"-    Return", 1),
                      lambda p: p[:-1], lambda p: p[:len(p) // 2]):
            monkeypatch.setattr(commits, "apply_patch", lambda repo, tree, patch, wrong=wrong: true_apply(repo, tree, wrong(patch)))
            with pytest.raises(commits.Refused):
                proven(repo, changes)


def test_triplets_beside_hard_neighbours_hold_only_source_and_apply_outside(tmp_path):
    before, after = hard_case()
    one, two, three, four = (source(i).encode() for i in range(1, 5))
    code = {b"pkg/caf\xe9.py": one, b"pkg/win.py": two.replace(b"\n", b"\r\n"), b"pkg/old.py": three, b"pkg/open.py": four.rstrip(b"\n"),
            b"package-lock.json": b"{}\n" * 5, b"vendor/lib.py": b"y = 1\n"}
    later = {b"pkg/caf\xe9.py": one.replace(b"total", b"amount"), b"pkg/win.py": two.replace(b"total", b"sum").replace(b"\n", b"\r\n"),
             b"pkg/old.py": None, b"pkg/new.py": three.replace(b"return", b"return 1 +", 1),
             b"pkg/open.py": four.rstrip(b"\n").replace(b"def", b"async def"),
             b"package-lock.json": b"[]\n" * 5, b"vendor/lib.py": b"x = 1\n"}
    quiet = [("", {"notes.txt": f"{i}\n"}) for i in range(14)]  # an empty message ends every stretch
    keep = {path: content for path, content in after.items() if path in (b"image.png", b"sub", b"link", b"new.bin")}
    repo_dir = build(tmp_path / "r", quiet[:10] + [("", before | code), ("Rename total to amount in the package", keep | later)] + quiet)
    (triplet,) = commits.triplets(repo_dir)
    assert set(triplet.old_files) == {"pkg/caf\udce9.py", "pkg/win.py", "pkg/old.py", "pkg/open.py"}
    assert set(triplet.new_files) == {"pkg/caf\udce9.py", "pkg/win.py", "pkg/new.py", "pkg/open.py"}
    assert triplet.old_files["pkg/win.py"] == code[b"pkg/win.py"] and triplet.new_files["pkg/open.py"] == later[b"pkg/open.py"]
    assert b"rename from pkg/old.py" in triplet.patch
    assert '"pkg/caf\\351.py"' in triplet.context.tree and "pkg/win.py" in triplet.context.tree
    assert apply_in_folder(tmp_path / "files", triplet) == triplet.new_files
    parts = commits.triplet_parts(triplet, new_state=True)
    assert commits.format_sample(commits.parse_sample(parts)) == parts
    "".join(text for text, _, _ in parts).encode("utf-8")  # a name that is not UTF-8 is quoted, so the text is


# ------------------------------------------------------------------------------------------- the search and its rules


def test_every_patch_of_a_history_applies_outside_and_touches_what_it_says(shop_triplets, tmp_path):
    assert len(shop_triplets) >= 5
    for i, triplet in enumerate(shop_triplets):
        assert apply_in_folder(tmp_path / str(i), triplet) == triplet.new_files


def test_stretches_start_in_the_band_never_overlap_and_are_the_same_every_time(shop, shop_triplets):
    chain = git(shop, "rev-list", "--first-parent", "--reverse", "main").decode().split()
    spans = [(chain.index(t.old_commit), chain.index(t.new_commit)) for t in shop_triplets]
    assert all(0.40 <= s / (len(chain) - 1) <= 0.80 and 0 < e - s <= 32 for s, e in spans)
    assert all(later[0] > earlier[1] for earlier, later in zip(spans, spans[1:]))
    program = "import commits, sys; print(*[(t.old_commit, t.new_commit, t.score) for t in commits.triplets(sys.argv[1])])"
    again = subprocess.run([sys.executable, "-c", program, shop], capture_output=True, text=True, cwd=ROOM, check=True,
                           env=os.environ | {"PYTHONHASHSEED": "7"})
    assert again.stdout.strip() == " ".join(str((t.old_commit, t.new_commit, t.score)) for t in shop_triplets)


@given(st.integers(2, 400))
def test_the_band_is_exactly_the_positions_between_40_and_80_percent(n):
    assert commits.band(list(range(n))) == [s for s in range(n - 1) if 0.4 * (n - 1) <= s + 1e-9 and s - 1e-9 <= 0.8 * (n - 1)]


def test_by_time_the_band_follows_the_clock_and_not_the_count():
    times = [0, 1, 2, 3, 4, 5, 6, 7, 8, 50, 60, 70, 100]  # a slow start in commits, a busy one in time
    assert commits.band(times, by_time=True) == [9, 10, 11]
    assert commits.band(times) == [5, 6, 7, 8, 9]


def test_the_chosen_end_is_the_best_of_all_ends_and_better_than_a_random_one(shop, shop_triplets):
    rng, lucky, chosen = random.Random(0), [], []
    with contextlib.closing(commits.Repository(shop)) as repo:
        history, facts = commits.History(repo), commits.Facts(repo)
        taken = []
        for triplet in shop_triplets:
            s = history.chain.index(triplet.old_commit)
            found = {c.end: c for c in commits.candidates(history, facts, s, collections.Counter())}
            scores = {e: commits.score(commits.score_parts(c, taken)) for e, c in found.items()}
            end = history.chain.index(triplet.new_commit)
            assert triplet.score == scores[end] == max(scores.values())
            lucky.append(scores[rng.choice(sorted(scores))])
            chosen.append(triplet.score)
            taken.append(found[end].touched)
    assert sum(chosen) / len(chosen) > sum(lucky) / len(lucky) + 0.02


@pytest.mark.parametrize("message, reason", [
    ("Merge branch 'topic' into main", "merge"), ('Revert "Add the new parser"', "revert"), ("Undo\n\nThis reverts commit abc.", "revert"),
    ("Bump version to 1.2.0 for release", "version bump"), ("Release 2.0 of the library", "version bump"), ("v1.2.3", "version bump"),
    ("See https://example.org for the reasons", "link"), ("Fix the crash of #123 at last", "issue number"),
    ("Fix PROJ-12 in the new parser", "issue number"), ("wip on the new parser today", "work in progress"),
    ("fixup! Add the new parser", "work in progress"), ("Copied from " + "0123456789" * 4 + " by hand", "object id"),
    ("Fix the parser", "message under 4 words"), ("", "message under 4 words"), ("Read the file as UTF-8 text", ""),
    ("Stop the release of a lock twice", ""),
])
def test_a_message_is_turned_down_for_the_right_reason(message, reason):
    assert commits.unfit_message(commits.clean_message(message)) == reason


def test_what_tools_append_to_a_message_is_cut_off():
    squashed = "Add a parser for dates (#512)\n\nIt reads ISO dates.\n\nCo-authored-by: A <a@x.org>\nSigned-off-by: B <b@x.org>\n"
    assert commits.clean_message(squashed) == "Add a parser for dates\n\nIt reads ISO dates."


def stretch(tmp_path, before: dict, after: dict, message="Rework the total of the module"):
    """The reasons for which a history with this one speaking step gives no triplet; {} if it gives one."""
    quiet = [("", {"notes.txt": f"{i}\n"}) for i in range(12)]
    counts = collections.Counter()
    found = list(commits.triplets(build(tmp_path, quiet[:9] + [("", before), (message, after)] + quiet), counts=counts))
    return {} if found else {reason for reason in counts if reason not in ("starts", "message under 4 words")}


def test_a_stretch_is_turned_down_for_its_files_for_the_right_reason(tmp_path):
    a, b = source(1), source(1).replace("total", "sum")
    cases = {
        "ok": ({"m.py": a}, {"m.py": b}, {}),
        "few lines": ({"m.py": a}, {"m.py": a + "x = 1\n"}, {"under 5 lines"}),
        "many lines": ({"m.py": a}, {"m.py": a + "x = 1\n" * 401}, {"more than 400 lines"}),
        "just fits, but who would read it": ({"m.py": a}, {"m.py": a + "x = 1\n" * 400}, {"score under 0.45"}),
        "long": ({"m.py": a}, {"m.py": a + "x = 1\n" * 200}, {}),
        "many files": ({}, {f"m{i}.py": a for i in range(11)}, {"more than 10 files"}),
        "prose": ({"m.py": a, "m.rst": "a\n"}, {"m.py": b, "m.rst": "text\n" * 40}, {"under half code"}),
        "does not parse after": ({"m.py": a}, {"m.py": b + "def (:\n"}, {"does not parse"}),
        "does not parse before": ({"m.py": "def (:\n" + a}, {"m.py": b}, {"does not parse"}),
        "whitespace": ({"m.py": a}, {"m.py": a.replace("    ", "  ")}, {"only whitespace or moves"}),
        "rename": ({"m.py": a}, {"m.py": None, "n.py": a}, {"under 5 lines"}),
        "rename and edit": ({"m.py": a}, {"m.py": None, "n.py": b}, {}),
        "large": ({"m.py": a * 300}, {"m.py": b + a * 300}, {"file too large"}),
        "large change log": ({"m.py": a, "CHANGES.md": "x\n" * 30000}, {"m.py": b, "CHANGES.md": "y\n" + "x\n" * 30000}, {}),
        "latin": ({"m.py": a}, {"m.py": b.encode() + b"# caf\xe9\n"}, {"not UTF-8"}),
        "vendored": ({"vendor/m.py": a}, {"vendor/m.py": b}, {"under 5 lines"}),
        "generated": ({"m.py": "# Code generated by make.\n" + a}, {"m.py": "# Code generated by make.\n" + b}, {"under 5 lines"}),
        "minified": ({"m.js": "var a;" * 400}, {"m.js": "var b;" * 400 + "\na\nb\nc\nd\ne\nf\n"}, {"under 5 lines"}),
        "binary": ({"m.py": b"\0" + a.encode()}, {"m.py": b"\0" + b.encode()}, {"under 5 lines"}),
    }
    got = {name: stretch(tmp_path / name, before, after) for name, (before, after, _) in cases.items()}
    assert got == {name: reasons or {} for name, (_, _, reasons) in cases.items()}


def test_a_merge_on_the_chain_speaks_with_the_messages_of_its_branch(tmp_path):
    quiet = [("", {"notes.txt": f"{i}\n"}) for i in range(12)]
    branch = [("Rename total to sum in the module", {"m.py": source(1).replace("total", "sum")}),
              ("Add a second module beside it", {"n.py": source(2)})]
    merge = ("Merge branch 'side' into main", branch[0][1] | branch[1][1], branch)
    repo_dir = build(tmp_path / "r", quiet[:9] + [("", {"m.py": source(1)}), merge] + quiet)
    (triplet,) = commits.triplets(repo_dir)
    assert triplet.messages == [branch[0][0], branch[1][0]]
    assert set(triplet.new_files) == {"m.py", "n.py"}
    chain = git(repo_dir, "rev-list", "--first-parent", "main").decode().split()
    assert triplet.old_commit in chain and triplet.new_commit in chain


def test_the_triplets_of_a_long_history_are_spread_over_its_band(tmp_path):
    silent = [("", {"notes.txt": f"{i}\n"}) for i in range(60)]
    repo_dir = build(tmp_path / "r", [step for pair in zip(plain_steps(60), silent) for step in pair])
    chain = git(repo_dir, "rev-list", "--first-parent", "--reverse", "main").decode().split()
    everything = [chain.index(t.old_commit) for t in commits.triplets(repo_dir)]
    few = [chain.index(t.old_commit) for t in commits.triplets(repo_dir, limit=4)]
    assert len(everything) > 20 and len(few) == 4
    quarters = [int((s / (len(chain) - 1) - 0.4) / 0.1) for s in few]
    assert quarters == [0, 1, 2, 3]


def test_the_same_patch_again_is_worth_less_and_the_size_curve_peaks_in_the_middle():
    lines = frozenset(f"line {i}".encode() for i in range(40))
    candidate = commits.Candidate(1, ["Add lines to the module"], [], [], {b"m.py": 40}, lines)
    assert commits.score_parts(candidate, [])["novelty"] == 1.0
    assert commits.score_parts(candidate, [frozenset(list(lines)[:20])])["novelty"] == 0.5
    assert commits.score_parts(candidate, [lines])["novelty"] == 0.0
    assert [commits.size_score(n) for n in (5, 10, 20, 120, 400)] == pytest.approx([0, 0.5, 1, 1, 0], abs=1e-12)
    assert sum(commits.WEIGHTS.values()) == pytest.approx(1)


# ------------------------------------------------------------------------------------ repositories that nobody trusts


def test_no_program_of_a_hostile_repository_runs_and_nothing_in_it_changes(tmp_path):
    mark = tmp_path / "ran"
    program = tmp_path / "evil.sh"
    program.write_text(f"#!/bin/sh\necho \"$0 $*\" >> {mark}\ncat\n")
    program.chmod(0o755)
    attributes = {".gitattributes": "*.py diff=evil filter=evil merge=evil\n*.md diff=evil\n"}
    steps = [(message, files | attributes) for message, files in plain_steps(24)]
    bare = build(tmp_path / "clean.git", steps)
    git(tmp_path, "clone", "-q", "--no-local", bare, "hostile")
    inside = tmp_path / "hostile" / ".git"
    config = f"""
[core]\n\tfsmonitor = {program}\n\thooksPath = {inside}/hooks\n\tpager = {program}\n\tsshCommand = {program}\n\tgitProxy = {program}
[diff]\n\texternal = {program}
[diff "evil"]\n\ttextconv = {program}\n\tcommand = {program}
[filter "evil"]\n\tclean = {program}\n\tsmudge = {program}\n\tprocess = {program}\n\trequired = true
[gpg]\n\tprogram = {program}\n[log]\n\tshowSignature = true\n[pager]\n\tlog = {program}\n\tdiff-tree = {program}
[alias]\n\tcat-file = !{program}
[apply]\n\twhitespace = error-all\n[diff]\n\tnoprefix = true\n\trenames = false\n\torderFile = /dev/null
[extensions]\n\tpartialClone = origin\n[remote "origin"]\n\turl = ext::{program} %S\n\tpromisor = true\n\tuploadpack = {program}
"""
    (inside / "config").write_text((inside / "config").read_text() + config)
    (inside / "info").mkdir(exist_ok=True)
    (inside / "info" / "attributes").write_text("* diff=evil filter=evil\n")
    (inside / "hooks").mkdir(exist_ok=True)
    for hook in ("post-checkout", "pre-commit", "post-index-change", "reference-transaction", "fsmonitor-watchman"):
        (inside / "hooks" / hook).write_text(program.read_text())
        (inside / "hooks" / hook).chmod(0o755)
    git(tmp_path / "hostile", "diff", "HEAD~1", check=False)
    assert mark.exists(), "the trap is not armed, so the test would prove nothing"
    mark.unlink()
    everything = lambda: {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted((tmp_path / "hostile").rglob("*")) if p.is_file()}
    before = everything()
    from_hostile = list(commits.triplets(str(tmp_path / "hostile"), name="same"))
    assert from_hostile and from_hostile == list(commits.triplets(bare, name="same"))
    assert everything() == before and not mark.exists()
    # and with an object missing, which a partial clone would fetch through the program named as its remote
    for pack in list((inside / "objects" / "pack").glob("*")):
        pack.rename(tmp_path / pack.name)
    victim = git(bare, "rev-parse", "HEAD~6:pkg/mod2.py").decode().strip()
    for pack in tmp_path.glob("*.pack"):
        git(tmp_path / "hostile", "-c", "core.fsmonitor=false", "unpack-objects", "-q", stdin=pack.read_bytes(), check=False)
    mark.unlink(missing_ok=True)
    (inside / "objects" / victim[:2] / victim[2:]).unlink()
    counts = collections.Counter()
    fewer = list(commits.triplets(str(tmp_path / "hostile"), counts=counts))
    assert counts["refused by git"] > 0 and fewer and not mark.exists()


def test_linked_worktrees_borrowed_objects_and_sha256_are_read_like_any_other(tmp_path):
    bare = build(tmp_path / "r.git", plain_steps(24))
    expected = list(commits.triplets(bare, name="x"))
    assert expected
    git(tmp_path, "clone", "-q", "--shared", bare, "shared")
    git(tmp_path / "shared", "worktree", "add", "-q", "--detach", str(tmp_path / "linked"))
    (tmp_path / "shared" / ".git" / "objects" / "info" / "alternates").write_text("../../../r.git/objects\n")
    assert list(commits.triplets(str(tmp_path / "shared"), name="x")) == expected
    assert list(commits.triplets(str(tmp_path / "linked"), name="x")) == expected
    odd = tmp_path / 'odd "name"\té: #'
    git(tmp_path, "clone", "-q", "--bare", bare, str(odd))
    assert list(commits.triplets(str(odd), name="x")) == expected
    longer = list(commits.triplets(build(tmp_path / "sha256.git", plain_steps(24), "sha256"), name="x"))
    assert [t.patch for t in longer] == [t.patch for t in expected] and len(longer[0].new_commit) == 64


def test_a_history_without_triplets_to_give_says_why_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    build(tmp_path / "short", plain_steps(19))
    git(tmp_path, "init", "-q", "--bare", "empty")
    full = build(tmp_path / "full", plain_steps(30))
    git(tmp_path, "clone", "-q", "--depth", "25", "file://" + full, "shallow")
    build(tmp_path / "broken", plain_steps(30))
    for pack in (tmp_path / "broken" / "objects" / "pack").glob("*.pack"):
        pack.chmod(0o644)
        pack.write_bytes(b"PACK" + bytes(200))
    no_git = "not a git repository"
    for name, word in [("folder", no_git), ("file", no_git), ("missing", no_git), ("short", "19 commits"), ("empty", "no commits"),
                       ("shallow", "a shallow clone"), ("broken", "git: ")]:
        with pytest.raises(ValueError, match=word) as error:
            list(commits.triplets(str(tmp_path / name)))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_corrupt_blobs_are_counted_skips_and_leave_the_other_triplets(tmp_path):
    folder = build(tmp_path / "r.git", plain_steps(40))
    expected = list(commits.triplets(folder))
    for pack in list((tmp_path / "r.git" / "objects" / "pack").glob("*.pack")):
        pack = pack.rename(tmp_path / pack.name)
        for rest in (tmp_path / "r.git" / "objects" / "pack").glob("*"):
            rest.unlink()
        git(folder, "unpack-objects", "-q", stdin=pack.read_bytes())
    victim = git(folder, "rev-parse", f"{expected[0].new_commit}:pkg/mod0.py").decode().strip()
    loose = tmp_path / "r.git" / "objects" / victim[:2] / victim[2:]
    loose.chmod(0o644)
    loose.write_bytes(loose.read_bytes()[:20] + b"garbage")
    counts = collections.Counter()
    found = list(commits.triplets(folder, counts=counts))
    assert counts["refused by git"] > 0 and found
    for i, triplet in enumerate(found):
        assert apply_in_folder(tmp_path / f"t{i}", triplet) == triplet.new_files


def test_a_reader_that_died_of_a_corrupt_object_is_replaced(tmp_path):
    folder = Path(build(tmp_path / "r.git", plain_steps(20)))
    good = git(folder, "hash-object", "-w", "--stdin", stdin=b"fine\n").decode().strip()
    large = b"".join(b"%d\n" % (i * i * 7919 % 99991) for i in range(6000))
    bad = git(folder, "hash-object", "-w", "--stdin", stdin=large).decode().strip()
    loose = folder / "objects" / bad[:2] / bad[2:]
    loose.chmod(0o644)
    loose.write_bytes(loose.read_bytes()[:loose.stat().st_size // 2])
    with contextlib.closing(commits.Repository(str(folder))) as repo:
        for oid in (bad, "0" * 40, bad):
            with pytest.raises(commits.Refused, match=oid):
                repo.ask("--batch", [good, oid, good])
            assert repo.read(good) == b"fine\n"


# -------------------------------------------------------------------------------------------------- context and sample


def test_bm25_is_its_formula():
    rng = random.Random(0)
    documents = [collections.Counter(rng.choices("abcdefgh", k=rng.randrange(1, 30))) for _ in range(12)]
    lengths, query, k1, b = [d.total() for d in documents], {"a", "c", "z"}, 1.2, 0.75
    expected = []
    for document, length in zip(documents, lengths):
        total = 0.0
        for word in query:
            holding = sum(word in d for d in documents)
            idf = math.log(1 + (12 - holding + 0.5) / (holding + 0.5))
            total += idf * document[word] * (k1 + 1) / (document[word] + k1 * (1 - b + b * length / (sum(lengths) / 12)))
        expected.append(total)
    assert commits.bm25(documents, lengths, query) == pytest.approx(expected, rel=1e-12)
    assert commits.terms("parse_URL getHTTPHeader x2 héllo".encode()) == collections.Counter(b"parse url get http header x h llo".split())


def test_the_context_is_of_r_old_and_the_best_file_is_the_one_the_message_speaks_of(tmp_path):
    steps = plain_steps(30)
    steps[0][1].update({"README.md": "# The project\n" + "more\n" * 100, "data.bin": b"\0stripe",
                        "zebra/stripes.py": "def stripe_width():\n    return 3\n"})
    steps = [("Measure the stripe width of a zebra" if i else m, f | {f"gone{i}.py": "x = 1\n"}) for i, (m, f) in enumerate(steps)]
    for triplet in commits.triplets(build(tmp_path / "r", steps)):
        assert triplet.context.files[0][0] == "zebra/stripes.py" and len(triplet.context.files) <= 5
        assert triplet.context.readme.startswith("# The project\nmore\n") and len(triplet.context.readme) <= 2000
        tree = git(tmp_path / "r", "ls-tree", "-r", "--name-only", triplet.old_commit).decode().split()
        assert sorted(triplet.context.tree) == sorted(tree)
        for path, text in triplet.context.files:
            assert git(tmp_path / "r", "show", f"{triplet.old_commit}:{path}").decode() == text


SPECIAL = ["<|endoftext|>", "<|repo_name|>", "<|file_sep|>", "<|im_end|>", ".git/patch\n", "\n", "\r", "é", "x"]
TEXT = st.lists(st.sampled_from(SPECIAL), max_size=6).map("".join)
PATH = st.lists(st.sampled_from(["a", "/", "<|file_sep|>", ".py", " "]), min_size=1, max_size=5).map("".join)
FILES = st.lists(st.tuples(PATH, TEXT), max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(PATH, TEXT, st.lists(PATH, max_size=3).map(tuple), FILES, TEXT, TEXT, FILES, st.booleans())
def test_parse_is_the_inverse_of_format_whatever_the_texts_spell(repo, readme, tree, files, message, patch, new_files, loss):
    sample = Sample(repo, readme, tree, files, message, patch + "\n", new_files)
    parts = commits.format_sample(sample, loss)
    assert commits.parse_sample(parts) == sample
    assert {text for text, special, _ in parts if special} == {"<|repo_name|>", "<|file_sep|>", "<|im_end|>"}
    merged = []  # as it comes back from tokens: neighbouring text runs together
    for text, special, _ in parts:
        if merged and not special and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + text, False, False)
        else:
            merged.append((text, special, False))
    assert commits.parse_sample(merged) == sample


@pytest.mark.parametrize("parts", [[], [("text", False, True)],
                                   [("<|repo_name|>", True, False), ("a\n", False, False), ("<|im_end|>", True, True)]])
def test_parts_that_are_no_sample_are_an_error(parts):
    with pytest.raises(ValueError, match="not a commit sample"):
        commits.parse_sample(parts)


def test_only_patch_new_files_and_end_are_learned_unless_all_is(shop_triplets):
    triplet = shop_triplets[0]
    parts = commits.triplet_parts(triplet, new_state=True)
    learned = "".join(text for text, _, learn in parts if learn)
    after = "".join(f"<|file_sep|>{path}\n{data.decode()}\n" for path, data in triplet.new_files.items())
    assert learned == triplet.patch.decode() + after + "<|im_end|>"
    assert all(learn for *_, learn in commits.triplet_parts(triplet, loss_on_context=True))


def test_the_new_state_follows_in_about_three_samples_of_ten():
    base = Triplet("r", "0" * 40, "", ["Change the file a little"], {"a.py": b"a\n"}, b"diff --git a/a.py b/a.py\n", {"a.py": b"b\n"}, 1.0)
    ids = [hashlib.sha1(str(i).encode()).hexdigest() for i in range(1000)]
    shown = [bool(commits.parse_sample(commits.triplet_parts(Triplet(**vars(base) | {"new_commit": i}))).new_files) for i in ids]
    assert 0.25 < sum(shown) / 1000 < 0.35


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())])
def test_a_small_budget_drops_context_and_never_the_patch(shop_triplets, length):
    measure = lambda parts: sum(1 if special else length(text) for text, special, _ in parts)
    for triplet in shop_triplets[:4]:
        whole = commits.parse_sample(commits.triplet_parts(triplet, new_state=True))
        bare = measure(commits.triplet_parts(triplet, new_state=True, budget=0, length=length))
        most = measure(commits.triplet_parts(triplet, new_state=True, length=length))
        shown = []
        for budget in [0, *range(bare, most + 200, max((most - bare) // 40, 1))]:
            parts = commits.triplet_parts(triplet, new_state=True, budget=budget, length=length)
            sample = commits.parse_sample(parts)
            assert sample.patch == triplet.patch.decode() and sample.message == whole.message
            assert measure(parts) <= max(budget, bare)
            assert set(sample.files) <= set(whole.files) and sample.new_files in ((), whole.new_files)
            assert whole.tree[:len(sample.tree)] == sample.tree and whole.readme.startswith(sample.readme)
            shown.append(len(sample.files) + len(sample.tree))
        assert shown[0] == 0 and shown[-1] > shown[1]
        assert {path for path, _ in whole.files} >= set(triplet.old_files)


# ----------------------------------------------------------------------------------------------------------- the metric


class ByteTokenizer:
    """One token a byte; the special tokens have the last ids."""
    special = {"<|repo_name|>": 256, "<|file_sep|>": 257, "<|im_end|>": 258}

    def encode(self, text):
        return list(text.encode())

    def encode_parts(self, parts):
        rows = [([self.special[text]] if special else self.encode(text), learn) for text, special, learn in parts]
        return [i for ids, _ in rows for i in ids], [learn for ids, learn in rows for _ in ids]


class Believer(torch.nn.Module):
    """A language model that is uniform, except that it believes in one byte string: after its first k bytes, it expects the next."""

    def __init__(self, belief: bytes = b"", strength: float = 9.0):
        super().__init__()
        self.logits, self.belief = torch.nn.Parameter(torch.zeros(259)), belief
        self.strength = strength

    def loss(self, input_ids, targets, segment_ids=None, reduction="mean"):
        logits = self.logits.expand(*input_ids.shape, 259).clone()
        for r, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                for k in range(len(self.belief) - 1, 0, -1):
                    if row[max(0, t + 1 - k):t + 1] == list(self.belief[:k]):
                        logits[r, t, self.belief[k]] += self.strength
                        break
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@pytest.mark.parametrize("context", [100, 4000])
def test_a_uniform_model_needs_exactly_the_logarithm_of_its_vocabulary(shop_triplets, context):
    result = commits.evaluate(Believer(), ByteTokenizer(), shop_triplets[:3], context=context)
    assert result["patch_bits_per_byte"] == pytest.approx(math.log2(259), rel=1e-5)
    assert result["triplets"] == 3 and 0 < result["file_chance"] < 1


def test_file_choice_is_right_for_a_model_that_knows_and_wrong_for_one_that_errs(shop_triplets):
    triplet = shop_triplets[0]
    files, changed = commits.rival_files(triplet, 6)
    assert changed == set(triplet.old_files) & set(files) and len(files) > len(changed)
    line = lambda path: f"diff --git a/{path} b/{path}\n".encode()
    right, wrong = line(sorted(changed)[-1]), line(next(f for f in files if f not in changed))
    knows = commits.evaluate(Believer(right), ByteTokenizer(), [triplet], context=600, shortlist=6)
    errs = commits.evaluate(Believer(wrong), ByteTokenizer(), [triplet], context=600, shortlist=6)
    assert knows["file_top1"] == 1.0 and errs["file_top1"] == 0.0
    assert knows["file_chance"] == pytest.approx(len(changed) / len(files))


def test_the_metric_of_a_real_model_is_the_sum_over_its_forward_pass(shop_triplets):
    from data import Tokenizer
    from model import LoopCoder, LoopCoderConfig
    torch.manual_seed(0)
    texts = ["".join(text for text, _, _ in commits.triplet_parts(t)) for t in shop_triplets]
    tokenizer = Tokenizer.train(texts, 400)
    config = LoopCoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096)
    model = LoopCoder(config).train()
    triplet = shop_triplets[0]
    result = commits.evaluate(model, tokenizer, [triplet], context=4000)
    assert model.training
    ids, _ = tokenizer.encode_parts(commits.triplet_parts(triplet, new_state=False))
    patch = tokenizer.encode(triplet.patch.decode().removesuffix("\n") + "\n")
    first = len(ids) - 1 - len(patch)
    assert ids[first:-1] == patch
    with torch.no_grad():
        logp = model.eval()(torch.tensor([ids]))[0][0].double().log_softmax(-1)
    bits = -sum(logp[first + i - 1, token].item() for i, token in enumerate(patch)) / math.log(2)
    assert result["patch_bits_per_byte"] == pytest.approx(bits / len(triplet.patch), rel=1e-4)
    assert result["file_top1"] in (0.0, 1.0)


def test_nothing_to_evaluate_gives_nan_and_not_a_score():
    result = commits.evaluate(Believer(), ByteTokenizer(), [], context=64)
    assert math.isnan(result["patch_bits_per_byte"]) and math.isnan(result["file_top1"]) and result["triplets"] == 0


# --------------------------------------------------------------------------------------------------- command line, bench


def command(*args, cwd=None):
    return subprocess.run([sys.executable, str(ROOM / "commits.py"), *args], capture_output=True, text=True, cwd=cwd)


def test_the_command_shows_triplets_of_paths_and_urls_and_counts_the_skips(tmp_path):
    repo = build(tmp_path / "r.git", plain_steps(24))
    done = command(repo, "file://" + repo, str(tmp_path / "nothing"), "--limit", "2")
    assert done.returncode == 0 and done.stdout.count("=== r ") == 4 and "2 triplets from 2 starts" in done.stdout
    assert done.stderr.splitlines()[-1] == "commits.py: 1 of 3 repositories skipped"


def test_the_scripted_project_is_shown_without_arguments_and_bad_input_ends_with_status_2(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 0 and "=== shop" in done.stdout and "diff --git a/" in done.stdout
    for bad in (["missing"], ["ext::touch ran"], ["--limit", "0"], ["--no-such-flag"], ["file:///nowhere/at/all"]):
        done = command(*bad, cwd=tmp_path)
        assert done.returncode == 2 and "commits.py" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_the_bench_prints_our_figures_where_the_peer_cannot_read_the_folder(tmp_path):
    repo = build(tmp_path / "mirror.git", plain_steps(24))
    git(repo, "config", "diff.renameLimit", "many")  # git, and so the peer, refuses to compare; we read the objects alone
    done = command("--bench", repo)
    assert done.returncode == 0 and done.stdout.count("reading  | ours") == 3 and "triplets | 5 in" in done.stdout
    assert "PyDriller could not read it: " in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_reading_everything_gives_gits_own_messages_texts_and_diffs(tmp_path):
    repo_dir = build(tmp_path / "r", random_history(random.Random(9), 30))
    with contextlib.closing(commits.Repository(repo_dir)) as repo:
        ids = repo.git("rev-list", repo.tip).decode().split()
        read = list(commits.read_everything(repo, ids))
        assert [message.split("\n")[0] for message, _, _ in read] == ids
        for message, changes, diff in read[::5]:
            commit = message.split("\n")[0]
            assert message.split("\n", 1)[1].strip() == repo.git("log", "-1", "--format=%B", commit).decode().strip()
            assert diff.strip() == repo.git("diff-tree", "--root", "--no-commit-id", "-p", "--no-renames", "--no-abbrev", commit).strip()
            for change, old, new in changes:
                for mode, oid, text in ((change.old_mode, change.old, old), (change.new_mode, change.new, new)):
                    assert text == (b"" if mode == commits.ABSENT else repo.git("cat-file", "blob", oid))


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word_and_the_help_shows_no_empty_default():
    with subprocess.Popen([sys.executable, ROOM / "commits.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait() == 141
    told = subprocess.run([sys.executable, ROOM / "commits.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert "(default: 32)" in " ".join(told.split()) and "None" not in told and "False" not in told
