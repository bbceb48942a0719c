"""Claims about tasks.py: verifiers that only right answers satisfy, splits that do not meet, a gate that nothing bad passes."""
import ast
import dataclasses
import gc
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from data import Tokenizer
from model import LoopCoder, LoopCoderConfig
from sandbox import Grade, Limits
from tasks import generate, verify

ROOT = Path(tasks.__file__).parent
CHEAP = [f for f in tasks.FAMILIES if f not in ("compose", "stdin")]  # whose generation runs no mutants


def some(family, n, level=1, split="train"):
    return [generate(family, level, seed, split) for seed in range(n)]


# ---- all families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_solutions_verify_and_empty_unfinished_or_wrong_answers_never_do(family):
    assert tasks.faults(family, range(10)) == []  # both splits, all levels; `python tasks.py --check 200` is the long form


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_task_is_the_same_on_every_call_and_plain_data(family):
    first, again = generate(family, 2, 5), generate(family, 2, 5)
    assert first == again and first != generate(family, 2, 6)
    read = tasks.Task(**json.loads(json.dumps(dataclasses.asdict(first))))
    assert (verify(read, read.solution), verify(read, read.wrong) == 1.0, verify(read, "")) == (1.0, False, 0.0)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_train_and_test_templates_never_meet(family):
    seen = {"train": set(), "test": set()}
    for level, seed, split in itertools.product((1, 3), range(40 if family in CHEAP else 12), seen):
        task = generate(family, level, seed, split)
        assert split == task.split == tasks.split_of(task.keys)
        seen[split].add((task.prompt, json.dumps(task.files)))
    assert not seen["train"] & seen["test"] and min(map(len, seen.values())) >= 15


def test_every_single_step_is_trained_and_only_compositions_are_held_out():
    rng = random.Random(0)
    drafts = [tasks.competitive("compose")(rng, 2) for _ in range(3000)]
    keys = [next(draft) for draft in drafts]
    trained = {step for key in keys if tasks.split_of(key) == "train" for step in key[0].split(">")}
    held = {key[0] for key in keys if tasks.split_of(key) == "test"}
    assert trained == set(tasks.STEPS | tasks.ENDS) and 0.1 < len(held) / len({k for key in keys for k in key}) < 0.3


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_perturbed_task_keeps_its_template_and_its_truth(family):
    changed = 0
    for task in some(family, 3, level=2):
        other = tasks.perturb(task, seed=1)
        assert other.keys == task.keys and other == tasks.perturb(task, seed=1)
        assert verify(other, other.solution) == 1.0 and verify(other, other.wrong) < 1.0
        changed += other.prompt != task.prompt
    assert changed >= 2


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_level_one_is_short(family):
    for task in some(family, 12):
        assert len(task.prompt) <= 200 and len(task.solution) <= 200, "a token holds about 2.5 characters"
        assert sum(len(text) for _, text in task.detour) <= 600


def test_levels_grow():
    for family in tasks.FAMILIES:
        whole = lambda t: t.prompt + t.solution + "".join(text for _, text in t.detour)
        size = [np.mean([len(whole(t)) for t in some(family, 6, level)]) for level in (1, 3, 5)]
        assert size[0] < size[1] < size[2] * 1.15, family


def test_several_threads_can_parse_at_once():
    """ast.parse alone raises SystemError in CPython 3.11 where the collector lets another thread in between."""
    let_in, threshold, source = lambda phase, info: time.sleep(0), gc.get_threshold(), generate("web", 5, 0).solution[10:-4]
    gc.callbacks.append(let_in)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: [len(tasks.parse(source).body) for _ in range(40)], range(8)))
    finally:
        gc.callbacks.remove(let_in)
        gc.set_threshold(*threshold)
    assert found == [[5] * 40] * 8


def test_unknown_families_levels_and_splits_are_refused():
    for arguments in (("poetry", 1, 0), ("sql", 6, 0), ("sql", 1, 0, "dev")):
        with pytest.raises(ValueError, match="no task for"):
            generate(*arguments)
    with pytest.raises(KeyError, match="poetry"):  # our own mistake, and not a wrong answer
        verify(dataclasses.replace(generate("sql", 1, 0), family="poetry"), "roses")


# ---- mutants and chosen tests ------------------------------------------------------------------------------------------------


def test_chosen_tests_kill_all_first_mutants_and_more_unseen_ones_than_random_tests():
    chosen_killed = few_killed = random_killed = unseen = 0
    for seed in range(12):
        rng = random.Random(seed)
        source = tasks.in_steps(tasks.chain(rng, 1 + seed % 4)[2])
        inputs = [([rng.randint(-9, 9) for _ in range(rng.randint(0, 8))],) for _ in range(200)]
        chosen, trees = tasks.select_tests(source, inputs)
        assert len(chosen) == len(set(chosen)) == 20
        assert tasks.kill_table(source, inputs, trees)[:, chosen].any(1).all()
        second = [tree for first in trees[:6] for _, tree in tasks.mutants(ast.unparse(first))]  # two mistakes, never seen by selection
        table = tasks.kill_table(source, inputs, second)
        table = table[table.any(1)]
        chosen_killed += table[:, chosen].any(1).sum()
        few_killed += table[:, chosen[:2]].any(1).sum()
        random_killed += np.mean([table[:, rng.sample(range(200), 2)].any(1).sum() for _ in range(30)])
        unseen += len(table)
    assert chosen_killed / unseen > 0.98 and few_killed > 1.05 * random_killed


def test_every_mutation_of_the_list_changes_the_program():
    source = "def f(a, b):\n    c = max(a, 3) - b\n    c = -c\n    if a < b:\n        c = c // 2\n    return [x for x in [c] if x % 2 == 0]"
    found = Counter(kind for kind, tree in tasks.mutants(source) if ast.dump(tree) != ast.dump(ast.parse(source)))
    assert set(found) == {"operator", "operand order", "comparison", "constant", "sign", "call", "inverted if", "removed statement"}
    assert sum(found.values()) == len(list(tasks.mutants(source)))


# ---- each verifier judges by what an answer does -------------------------------------------------------------------------------


def test_programs_earn_the_share_of_tests_they_pass():
    task = next(t for seed in range(60) if (t := generate("compose", 1, seed)).keys[0].endswith(" max"))
    assert verify(task, "def f(v):\n    return max(v) if v else 0") == 1.0  # another way to write it, without a fence
    empty = sum(list(args) == [[]] for _, args, _ in task.tests["calls"])
    assert verify(task, "def f(v):\n    return max(v)") == 1 - empty / 20
    assert verify(task, "import sys\nsys.exit(0)") == verify(task, "def f(v):\n    raise SystemExit(0)") == 0.0


def test_a_program_is_judged_by_fresh_runs_where_one_process_for_all_inputs_does_not_settle_it():
    task = dataclasses.replace(generate("stdin", 1, 0), tests={"io": [("1 2\n", "3\n"), ("4\n", "4\n"), ("5 5\n", "10\n")]})
    total = "print(sum(map(int, {}.split())))"
    for text in (total.format("input()"), "import sys\n" + total.format("sys.stdin.buffer.read()"), total.format("open(0).read()"),
                 total.format("input()") + "\nraise SystemExit",
                 "import os\n" + total.format("input()")[:-1] + ", flush=True)\nos._exit(0)"):
        assert verify(task, text) == 1.0, text
    once = "import sys\nif hasattr(sys, 'ran'):\n    print(0)\nelse:\n    sys.ran = " + total.format("input()")
    assert verify(task, once) == 1.0  # its second run in one process would print 0
    assert verify(task, "print(4)") == verify(task, "import sys\nprint(4)\nsys.stdin = None") == 1 / 3
    assert verify(task, "print(") == verify(task, "return 3") == 0.0


def test_an_output_must_have_the_right_type_and_any_input_that_works_is_right():
    task = dataclasses.replace(generate("crux_output", 1, 0), tests={"source": "def f(x):\n    return x", "result": 1})
    assert [verify(task, text) for text in ("1", "True", "1.0", "2", "__import__('os')")] == [1, 0, 0, 0, 0]
    task = dataclasses.replace(generate("crux_input", 1, 0), tests={"source": "def f(x):\n    return max(x, 3)", "result": 3})
    assert [verify(task, text) for text in ("3", "-7", "4", "'3'", "f(3)")] == [1, 1, 0, 0, 0]


def test_a_program_that_never_ends_is_not_waited_for_on_every_input(monkeypatch):
    monkeypatch.setattr(tasks, "LIMITS", Limits(cpu_s=0.4))
    task = dataclasses.replace(generate("stdin", 1, 0), tests={"io": [("1\n", "1\n")] + [("2\n", "3\n")] * 19})
    start = time.perf_counter()
    assert verify(task, "n = int(input())\nwhile n > 1:\n    pass\nprint(n)") == 1 / 20
    assert time.perf_counter() - start < 3.0  # in fresh processes it would take 19 times 0.4 s


def test_the_last_fenced_block_is_the_answer_whatever_its_label():
    task = generate("compose", 1, 0)
    code = tasks.code_of(task.solution)
    for label in ("", "python", "Python", "python3", "py title=f.py", "python\r"):
        assert verify(task, f"First ```{label}\nx\n``` and then\n```{label}\n{code}\n```\nDone.") == 1.0, label


def math_task(answer):
    return dataclasses.replace(generate("math", 1, 0), tests={"answer": answer})


def test_formulas_are_compared_as_formulas_and_must_be_worked_out():
    task = math_task("6*x**2 + 4*x")
    assert [verify(task, text) for text in ("4*x + 6*x^2", "2*x*(3*x + 2)", "6*x**2", "6*x**2 + 4*y", "6*x**2+4*x")] == [1, 0, 0, 0, 1]
    assert verify(math_task("2*y**2 - 12*y + 10"), "10 + -12*y + 2*y**2") == 1.0
    assert [verify(math_task("7"), text) for text in ("7", "x = 7", "```\n7\n```", "3 + 4", "8", "-7")] == [1, 1, 1, 0, 0, 0]


def test_formulas_that_are_no_formulas_or_would_never_end_are_wrong():
    for text in ("9**9**9", "(9**9)**9", "__import__('os').system('true')", "x" * 999, "(" * 999, "x.real", "f(x)", "1/0", "7 if x else 7"):
        assert verify(math_task("9*x**9"), text) == 0.0
    assert verify(math_task("7"), "7" + " " * 300 + "or 8") == 0.0  # what stands behind the first 300 characters counts as well
    with pytest.raises(ValueError, match="not allowed"):
        tasks.formula("((9**9)**9)**9")


def test_sql_is_judged_by_its_rows_and_can_only_read():
    task = next(t for seed in range(60) if " where " in (t := generate("sql", 1, seed)).solution and "count(" not in t.solution)
    query = task.tests["query"]
    assert verify(task, f"SELECT * FROM ({query})") == 1.0 and verify(task, query.replace("where", "WHERE 1 AND")) == 1.0
    table = task.tests["table"]
    for text in (f"DELETE FROM {table}", "ATTACH DATABASE '/tmp/x.db' AS y", "PRAGMA user_version = 3", f"{query}; DROP TABLE {table}",
                 "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c", "SELECT zeroblob(1000000000)",
                 "SELECT load_extension('x')", "no sql at all"):
        assert verify(task, text) == 0.0
    assert not Path("/tmp/x.db").exists()
    doubled = ", ".join(f"a{i} AS (SELECT 1 FROM a{i - 1}, a{i - 1})" for i in range(1, 20))
    with pytest.raises(ValueError, match="three SELECTs"):  # sqlite would write a19 out as 2**19 tables before the first step
        tasks.rows_of(f"WITH a0 AS (SELECT 1), {doubled} SELECT 1 FROM a19", [], True)
    assert verify(task, f"WITH a AS ({query}) SELECT * FROM a") == 1.0


@pytest.mark.parametrize("level", tasks.LEVELS)
def test_every_question_leads_back_to_its_query(level):
    for seed in range(30):
        task = generate("sql", level, seed, ("train", "test")[seed % 2])
        assert tasks.read_question(task.prompt.split("\n")[1]) == task.tests["query"]
    with pytest.raises(ValueError, match="no clause"):
        tasks.read_question("list the name of files that sing")


texts = st.lists(st.sampled_from(["a", "b", "c", "", "    x = 1", "    return x", "def f():"]), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(texts, texts, st.sampled_from(["search", "diff"]))
def test_an_edit_made_from_two_texts_leads_from_one_to_the_other(a, b, form):
    old, new = "\n".join(a) + "\n", "\n".join(b) + "\n"
    if old == new:
        with pytest.raises(ValueError):
            tasks.make_edit(old, new, form)
    else:
        try:
            answer = tasks.make_edit(old, new, form)
        except ValueError:
            assert form == "search"  # an empty search block cannot say where
        else:
            assert tasks.apply_edit(old, answer) == new and tasks.apply_edit(old, f"```\n{answer}\n```") == new


def test_an_edit_that_changes_another_function_is_wrong():
    task = generate("edit", 3, 0)
    (old,), (fixed,) = task.files.values(), {call[0] for call in task.tests["calls"]}
    new = tasks.apply_edit(old, task.solution)
    other = next(name for name in re.findall(r"def (\w+)", new) if name != fixed)
    for changed in (re.sub(rf"def {other}\(.*\n(    .*\n)+", "", new), re.sub(rf"(def {other}\(.*\n)", r"\1    return 3\n", new)):
        assert changed != new and verify(task, tasks.make_edit(old, changed, "diff")) == 0.0
    assert verify(task, tasks.make_edit(old, "import math\n" + new + "\ndef helper():\n    pass\n", "diff")) == 1.0


def git_apply(folder, text, answer):
    """What git makes of a diff without context."""
    (folder / "f").write_text(text)
    patch = "--- a/f\n+++ b/f\n" + answer + "\n"
    subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=patch, text=True, cwd=folder, check=True)
    return (folder / "f").read_text()


def test_our_diffs_do_what_git_apply_does(tmp_path):
    rng = random.Random(1)
    for n in range(12):
        old = [f"line {rng.randrange(6)}" for _ in range(12)]
        new = [line for line in old if rng.random() > 0.2] + ["more"] * (n % 3)
        new.insert(rng.randrange(len(new)), "inserted")
        answer = tasks.make_edit("\n".join(old) + "\n", "\n".join(new) + "\n", "diff")
        assert git_apply(tmp_path, "\n".join(old) + "\n", answer) == tasks.apply_edit("\n".join(old) + "\n", answer)
    twins = "@@ -1,0 +2,2 @@\n+b\n+b\n@@ -4 +6 @@\n-a\n+c"  # only the line numbers, moved by the first hunk, tell which of the twins
    assert git_apply(tmp_path, "a\n" * 6, twins) == tasks.apply_edit("a\n" * 6, twins) == "a\nb\nb\na\na\nc\na\na\n"


def test_an_ambiguous_or_foreign_edit_does_not_apply():
    block = "<<<<<<< SEARCH\n{}\n=======\nz\n>>>>>>> REPLACE"
    assert tasks.apply_edit("x\ny\n", block.format("y")) == "x\nz\n"
    for text, answer in (("x\nx\n", block.format("x")), ("x\n", block.format("y")), ("x\n", "x to z"), ("x\n", "@@ -1 +1 @@\n-y\n+z")):
        with pytest.raises(ValueError):
            tasks.apply_edit(text, answer)


def test_an_edit_from_a_commit_is_right_only_with_the_exact_new_text():
    old = "import os\n\ndef a():\n    return 1\n\ndef b():\n    return 1\n"
    new = old.replace("b():\n    return 1", "b():\n    return 2")
    for form in ("search", "diff"):
        task = tasks.edit_from_commit("Return two from b", "pkg/m.py", old, new, form)
        assert verify(task, task.solution) == 1.0 and verify(task, task.wrong) == 0.0 and old in task.prompt


@pytest.mark.parametrize("old, new", [("x = 1\n\f\ny = 1\n", "x = 1\n\f\ny = 2\n"), ("```py\nx = 1\n```\n", "```python\nx = 1\n```\n"),
                                      ("x = 1", "x = 2"), ("x = '\u2028'\n", "y = '\u2028'\n"), ("x = 1\n", "")])
def test_a_commits_text_may_hold_form_feeds_and_fences_and_lack_its_last_newline(old, new):
    for form in ("search", "diff"):
        task = tasks.edit_from_commit("Change x", "m.md", old, new, form)
        assert verify(task, task.solution) == 1.0 and verify(task, f"```\n{task.solution}\n```") == 1.0 and verify(task, task.wrong) == 0.0
    with pytest.raises(ValueError, match="CR LF"):
        tasks.edit_from_commit("Change x", "m.md", old + "\r\n", new + "\r\n")


def test_the_terminal_state_must_be_exactly_the_wanted_one():
    task = next(t for seed in range(60) if (t := generate("terminal", 2, seed)).keys[0].startswith("copy>"))
    assert verify(task, "true") == 0.0
    assert verify(task, task.solution + "\ntouch extra.txt") == 0.0
    assert verify(task, task.solution + "\nmkdir extra") == 0.0
    assert verify(task, "\n".join(task.solution.splitlines()[:1])) == 0.0
    assert verify(task, task.solution.replace("\n", " && ") + " # in one line") == 1.0


def test_a_link_whose_target_reads_like_the_wanted_text_is_no_file():
    task = dataclasses.replace(generate("terminal", 1, 0), files={}, tests={"state": {"a.txt": "one"}})
    assert verify(task, "printf one > a.txt") == 1.0 and verify(task, "ln -s one a.txt") == 0.0


def test_tool_calls_are_judged_by_type_and_by_the_state_they_leave():
    state, goal = {"pens": 1, "cups": 2}, {"pens": 4, "cups": 2}
    task = dataclasses.replace(generate("tools", 1, 0), tests={"domain": "stock", "state": state, "goal": goal, "most": 2})
    call = lambda **arguments: json.dumps({"name": "add", "arguments": arguments})
    assert verify(task, call(item="pens", count=3)) == verify(task, call(count=3, item="pens")) == 1.0
    assert verify(task, call(item="pens", count=1) + "\n" + call(item="pens", count=2)) == 1.0
    for arguments in ({"count": 3}, {"item": "pens", "count": "3"}, {"item": "pens", "count": 3.0}, {"item": "pens", "count": True},
                      {"item": "pens", "count": 3, "now": 1}, {"item": "ants", "count": 3}, {"item": "pens", "count": "$1"},
                      {"item": [], "count": 3}):
        assert verify(task, call(**arguments)) == 0.0
    for text in ("[]", "3", "{}", call(item="pens", count=1) * 2, '{"name": "sell", "arguments": {}}', '{"name": [], "arguments": {}}',
                 '{"name": "add", "arguments": 3}', "\n".join([call(item="pens", count=1)] * 3)):
        assert verify(task, text) == 0.0


def test_a_web_page_that_does_not_escape_or_bind_is_wrong():
    task = next(t for seed in range(80) if {"show", "total"} <= set((t := generate("web", 3, seed)).solution.replace("(", " ").split()))
    assert verify(task, task.solution.replace("escape(r[0])", "r[0]")) == 0.0
    spaced = re.sub("(<ul>|</li>|<i>)", r"\1 ", task.solution)
    assert spaced != task.solution and verify(task, spaced) == 1.0  # nothing more to see on the page
    unbound = task.solution.replace('= ?", cat)', "= '%s'\" % cat[0])")
    assert unbound != task.solution and verify(task, unbound) == 0.0
    assert verify(task, task.solution.replace('f"<i>{r[0]}</i>"', '"<i>" + str(r[0]) + "</i>"')) == 1.0
    task = next(t for seed in range(80) if "def add(" in (t := generate("web", 1, seed)).solution)
    assert verify(task, re.sub(r" +db.execute.*\n", "", task.solution)) == 0.0  # it says ok and inserts nothing
    counts = [t for seed in range(99) if "def count(" in (t := generate("web", 1, seed)).solution]
    assert sum(verify(t, "def count(db, form):\n    return '<p>2</p>'") for t in counts) == 0.0
    assert tasks.faults("web", [150, 160]) == []  # no form asks for a category without rows: that sum is empty, right or wrong


def test_the_gui_allows_only_what_the_open_page_offers():
    home = "<input id=name><input type=checkbox id=news><button id=save><a id=cart href=cart>"
    pages = {"home": home, "cart": "<button id=clear>"}
    acts = ["type name Ann Lee", "click news", "click save", "click news", "click cart", "click clear"]
    state, seen = tasks.run_actions(pages, "\n".join(acts))
    assert state == ["cart", {"name": "Ann Lee", "news": False}, {"name": "Ann Lee", "news": True}] and seen == ["home"] * 4 + ["cart"] * 2
    for act in ("click name", "type news x", "click save", "type name", "press x", "", "click clear now"):
        with pytest.raises(ValueError):
            tasks.run_actions(pages, "\n".join([*acts, act, ""]))
    task = generate("gui", 2, 0)
    assert verify(task, "click clear\nclick clear\n" + task.solution) == 0.0  # detours cost


# ---- swe ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", tasks.LEVELS)
def test_before_a_test_nothing_tells_the_fix_and_the_failure_line_tells_it(level):
    """Over the tasks with the same visible line and candidates the right one is uniform; over (line, failure) it is always the same."""
    chosen, told = Counter(), {}
    for seed in range(150):
        task = generate("swe", level, seed)
        candidates = sorted(task.tests["candidates"])
        chosen[len(candidates), candidates.index(task.solution)] += 1
        failure = next(text for _, text in task.detour if text.startswith("FAIL"))
        path, number = task.solution.split(" ")[1:3]
        line = task.files[path].splitlines()[int(number) - 1]
        got = told.setdefault((line, tuple(candidates), task.detour[-7][1] if level < 4 else "", failure), task.solution)
        assert got == task.solution
    k = 2 if level == 1 else 3
    assert {size for size, _ in chosen} == {k}
    assert max(chosen.values()) / 150 < 1 / k + 0.15 and min(chosen.values()) / 150 > 1 / k - 0.15


def test_each_wrong_fix_fails_a_hidden_test_and_the_demonstrations_replay():
    for seed in range(8):
        task = generate("swe", 1 + seed % 5, seed)
        t = task.tests
        assert [verify(task, text) for text in t["candidates"]] == [float(text == task.solution) for text in t["candidates"]]
        assert not any(tasks.outcomes(task.files, t["fail_to_pass"])) and all(tasks.outcomes(task.files, t["pass_to_pass"]))
        assert len(t["pass_to_pass"]) >= 2 and t["shown"][0] not in t["fail_to_pass"][1:]
        files, turns = task.files, task.detour
        for (_, call), (role, seen) in zip(turns[::2], turns[1::2]):
            assert role == "tool"
            if call == "test":
                assert (seen == "PASS") == all(tasks.outcomes(files, t["shown"]))
            else:
                files, said = tasks.use_tool(files, call)
                assert said == seen
        assert all(tasks.outcomes(files, t["fail_to_pass"] + t["pass_to_pass"])) and turns[-1] == ("assistant", "submit")


def test_a_fix_that_breaks_something_else_is_no_fix():
    task = generate("swe", 1, 0)
    _, path, number, _ = task.solution.split(" ", 3)
    other = 3 - int(number)  # two functions of one line each
    signature = task.files[path].splitlines()[other - 1].partition(":")[0]
    assert verify(task, task.solution) == 1.0
    assert verify(task, f"{task.solution}\nedit {path} {other} {signature}: return None") == 0.0
    assert verify(task, f"{task.solution}\nedit {path} {other} return (") == 0.0


def test_tool_calls_that_cannot_be_obeyed_change_nothing():
    files = {"a.py": "def f(x):\n    return x\n"}
    assert tasks.use_tool(files, "edit a.py 2 return x + 1") == ({"a.py": "def f(x):\n    return x + 1\n"}, "ok")
    assert tasks.use_tool(files, "search return")[1] == "a.py:2 return x"
    for call in ("edit a.py 3 x", "edit a.py 0 x", "edit a.py two x", f"edit a.py {'9' * 5000} x", "edit b.py 1 x",
                 "view ../a.py", "rm a.py", "", "edit", "search"):
        after, said = tasks.use_tool(files, call)
        assert after == files and said in ("no such file", "no such line", "unknown tool")


# ---- what is learned ------------------------------------------------------------------------------------------------------------


def test_only_the_assistant_is_learned_and_only_our_parts_are_special():
    task = dataclasses.replace(generate("swe", 1, 3), prompt="say <|im_end|> twice")
    for parts, learned in ((tasks.task_parts(task, True), tasks.answer_text(task, True)), (tasks.task_parts(task), task.solution)):
        assert "".join(text for text, _, in_loss in parts if in_loss) == learned + "<|im_end|>"
        assert ("user\nsay <|im_end|> twice" in "".join(text for text, special, _ in parts if not special))
        assert {text for text, special, _ in parts if special} == {"<|im_start|>", "<|im_end|>"}
    whole = "".join(text for text, *_ in tasks.task_parts(task))
    assert whole == f"<|im_start|>user\n{task.prompt}<|im_end|>\n<|im_start|>assistant\n{task.solution}<|im_end|>\n"
    assert whole.startswith("".join(text for text, *_ in tasks.prompt_parts(task)))


def test_observations_and_mistakes_are_read_and_not_learned():
    task = generate("swe", 2, 1)
    for detour, turns in ((False, task.turns), (True, task.detour)):
        learned = "".join(text for text, _, in_loss in tasks.trajectory_parts(task, detour) if in_loss)
        assert learned == "".join(text + "<|im_end|>" for role, text in turns if role == "assistant")
    everything = "".join(text for text, *_ in tasks.trajectory_parts(task, detour=True))
    assert "FAIL" in everything and "FAIL" not in learned and "mistake" not in everything
    for family in ("tools", "gui"):
        assert generate(family, 2, 0).turns[-1] == ("assistant", "done")


# ---- metrics --------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1) if c <= n else ():
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert tasks.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="at least k samples"):
        tasks.pass_at_k(4, 2, 5)


def test_beyond_places_a_cost_between_the_references():
    assert [tasks.beyond(cost, [10, 30, 20]) for cost in (10, 15, 30, 99, 1, np.inf)] == [1.0, 0.75, 0.0, 0.0, 1.0, 0.0]
    assert [tasks.beyond(cost, [10, 10]) for cost in (10, 99, np.inf)] == [1.0, 1.0, 0.0]


def test_efficiency_counts_instructions_and_a_wrong_answer_has_none():
    task = next(t for seed in range(40) if (t := generate("compose", 2, seed)).keys[0].startswith("square"))
    fast, slow = task.tests["references"]
    assert tasks.instructions(fast, "f", [[[1, 2, 3]]]) == tasks.instructions(fast, "f", [[[4, 5, 6]]]) > 0
    assert tasks.efficiency(task, fast) == 1.0 and tasks.efficiency(task, slow) == 0.0 and tasks.efficiency(task, task.wrong) == 0.0


def test_a_right_answer_with_a_main_part_or_much_output_or_an_endless_trace_has_a_cost_all_the_same():
    task = next(t for seed in range(40) if (t := generate("compose", 2, seed)).keys[0].startswith("square"))
    fast, slow = task.tests["references"]
    assert tasks.efficiency(task, fast + "\nif __name__ == '__main__':\n    print(f(input()))") == 1.0
    assert 0 < tasks.efficiency(task, fast.replace("def f(v):", "def f(v):\n    print('x' * 9000)")) < 1
    assert tasks.efficiency(task, "import atexit\natexit.register(print, 1)\n" + slow) == 0.0  # the last word is not the program's
    assert tasks.efficiency(task, fast.replace("def f(v):", "def f(v):\n    if __name__ == 'program':\n        raise SystemExit")) == 0.0


@pytest.mark.parametrize("family, level, low, high", [("swe", 1, 1.0, 1.0), ("swe", 2, 0.3, 0.7), ("gui", 1, 0.0, 0.35),
                                                      ("crux_output", 1, 0.0, 0.35), ("sql", 1, 0.0, 0.25)])
def test_the_random_answer_baseline_is_what_luck_earns(family, level, low, high):
    """After a failed fix one of two is left at the first level of swe, two of three at the second."""
    problems = [generate(family, level, seed, "test") for seed in range(40)]
    assert low <= np.mean([verify(task, guess) == 1.0 for task, (guess,) in zip(problems, tasks.guesses(problems))]) <= high


def test_a_guess_speaks_of_its_own_task_and_is_never_made_from_its_solution():
    drawn = [generate("sql", 1, seed, "test") for seed in range(12)]
    for task, some in zip(drawn, tasks.guesses(drawn, 20)):
        assert len(some) == 11 and all(re.search(r" from (\w+)", guess)[1] == task.names[0] for guess in some)
    assert tasks.guesses(drawn[:1], 5) == [[]]


def test_a_repository_agent_is_asked_for_the_fix_after_one_that_failed():
    for task in (generate("swe", level, seed, "test") for level in (1, 3) for seed in range(5)):
        parts = tasks.asked_parts(task)
        text = "".join(part for part, *_ in parts)
        before = text.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert text != before and before.splitlines()[-1].startswith("FAIL ")
        assert task.wrong in text and task.solution not in text and not any(learned for *_, learned in parts)
    task = generate("math", 1, 0)
    assert tasks.asked_parts(task) == tasks.prompt_parts(task)


# ---- the gate -------------------------------------------------------------------------------------------------------------------


def test_minhash_estimates_the_jaccard_similarity():
    rng = random.Random(0)
    for shared in (0, 20, 60, 95):
        a, b = {rng.getrandbits(32) for _ in range(100)}, {rng.getrandbits(32) for _ in range(100)}
        b = set(list(a)[:shared]) | set(list(b)[shared:])
        true = len(a & b) / len(a | b)
        assert abs((tasks.minhash(a) == tasks.minhash(b)).mean() - true) < 0.15


QUIZ = ("In a village of forty houses every second one has a blue door and every third one a red roof while those at the river have "
        "neither because the paint would not last there for more than one winter so how many houses must the mayor visit before she "
        "is sure to have seen one of each sort if she walks from the mill to the church without ever turning back or asking anybody "
        "on her way and what would change if the baker who lives in the last house had painted his own roof the week before")


def test_nothing_that_fails_repeats_or_touches_an_evaluation_gets_in():
    clean = some("sql", 30) + some("edit", 10)
    evaluation = tasks.Contamination({"held-out": [tasks.question_text(t) for f in ("sql", "edit") for t in some(f, 60, split="test")],
                                      "quiz": [QUIZ]})
    kept, table = tasks.admit([(t, t.solution) for t in clean], evaluation)
    assert len(kept) == table["admitted"] and table["admitted"] + table["duplicate"] == 40  # templates alone are no contamination
    near = " ".join(word if i % 14 else "other" for i, word in enumerate(QUIZ.split(), 1))  # no 13 words in a row are left
    asked = lambda prompt: dataclasses.replace(clean[0], prompt=prompt)
    held = generate("sql", 1, 0, "test")
    planted = [(clean[0], clean[0].wrong), (clean[1], ""), (held, held.solution), (dataclasses.replace(held, split="train"), held.solution),
               (asked("Hello! " + QUIZ), clean[0].solution), (asked(QUIZ), clean[0].solution), (asked(near), clean[0].solution),
               (asked(QUIZ[:len(QUIZ) * 2 // 3]), clean[0].solution),
               (clean[2], clean[2].solution), (clean[2], "<think>\nhm\n</think>\n\n" + clean[2].solution)]
    kept, table = tasks.admit(planted, evaluation)
    assert kept == planted[8:9]
    assert table == {"does not verify": 2, "test template": 2, "text of quiz": 2, "near quiz": 1, "13-grams of quiz": 1,
                     "duplicate": 1, "admitted": 1}


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_no_question_of_the_evaluation_gets_in_as_it_is_or_spaced_or_embedded_or_renamed(family):
    for level, k in itertools.product((1, 2), range(0, 32, 4)):
        task = generate(family, level, tasks.ASKED + k, "test")
        renamed = [tasks.perturb(task, seed) for seed in range(3)]
        around = "A riddle that my teacher gave me last week:\n{}\nI need it on Monday, thank you."
        forms = [task, dataclasses.replace(task, prompt=task.prompt.replace(" ", "  ").replace("\n", "\n\n")), *renamed,
                 *(dataclasses.replace(t, prompt=around.format(tasks.question_text(t)), files={}) for t in (task, *renamed))]
        for form in forms:
            assert tasks.refusal(form, form.solution, tasks.own_evaluation()) == "test template"
            disguised = dataclasses.replace(form, split="train", keys=("trained",))  # all that is left to tell by is the text
            assert tasks.split_of(disguised.keys) == "train"
            found = tasks.refusal(disguised, form.solution, tasks.own_evaluation())
            assert found in ("text of evaluation", "renamed of evaluation"), (found, form.prompt)


def test_of_clean_samples_the_gate_refuses_less_than_one_in_a_hundred():
    few = [tasks.question_text(generate(family, 1, tasks.ASKED + k, "test")) for family in tasks.FAMILIES for k in range(4)]
    clean = [generate(family, level, seed) for family, level in itertools.product(tasks.FAMILIES, (1, 2, 3, 4))
             for seed in range(30_000, 30_000 + (30 if family in CHEAP else 5))]
    for gate in (tasks.own_evaluation(), tasks.Contamination({"few": few})):  # few questions do not tell their frame themselves
        refused = Counter((task.family, reason) for task in clean if (reason := gate.of(tasks.sample_text(task))))
        assert refused.total() < 0.01 * len(clean), refused


def test_a_near_copy_without_a_common_13_gram_is_found_by_minhash():
    words = [f"word{i}" for i in range(400)]
    copy = [word if i % 12 else "other" for i, word in enumerate(words)]
    found = tasks.Contamination({"set": [" ".join(words)]})
    assert found.of(" ".join(copy)) == "near set" and found.of(" ".join(reversed(words))) == ""


# ---- the teacher ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """A real server on loopback: it answers with the statuses of its plan first, then with completions."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, body))
            status = server.plan.pop(0) if server.plan else 200
            data = b"busy"
            if status == 200:
                choices = [{"message": {"content": server.reply(body, i)}} for i in range(body["n"])]
                data = server.raw or json.dumps({"choices": choices, "usage": {"total_tokens": 100}}).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.plan, server.raw, server.reply = [], [], b"", lambda body, i: f"answer {i}"
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_teacher_is_patient_and_asks_nothing_twice(endpoint, tmp_path):
    endpoint.plan = [429, 503, 500]
    teacher = tasks.Teacher(endpoint.url, "big", tmp_path / "cache", wait_s=0.01)
    assert teacher.ask("two?", n=2) == ["answer 0", "answer 1"] == teacher.ask("two?", n=2)
    assert [path for path, _ in endpoint.asked] == ["/v1/chat/completions"] * 4 and teacher.spent == 100
    again = tasks.Teacher(endpoint.url, "big", tmp_path / "cache", wait_s=0.01)
    assert again.ask("two?", n=2) == ["answer 0", "answer 1"] and again.spent == 100 and len(endpoint.asked) == 4
    assert endpoint.asked[0][1]["messages"] == [{"role": "user", "content": "two?"}] and endpoint.asked[0][1]["model"] == "big"


def test_the_teacher_stops_at_its_budget_and_at_a_request_that_is_wrong(endpoint, tmp_path):
    teacher = tasks.Teacher(endpoint.url, "big", tmp_path, budget=150, wait_s=0.01, tries=2)
    teacher.ask("one"), teacher.ask("two")
    with pytest.raises(tasks.BudgetSpent, match="200 of 150"):
        teacher.ask("three")
    assert teacher.ask("one") == ["answer 0"]  # what is on disk stays free
    teacher.budget, endpoint.plan = 10**6, [400, 503, 503]
    with pytest.raises(OSError, match="HTTP 400"):
        teacher.ask("three")
    assert len(endpoint.plan) == 2  # not asked again
    with pytest.raises(OSError, match="HTTP 503"):
        teacher.ask("three")
    assert len(list(tmp_path.glob("*.json"))) == 2 and not list(tmp_path.glob("*.part"))


def test_a_reply_that_holds_no_completions_is_an_error_and_costs_nothing(endpoint, tmp_path):
    teacher = tasks.Teacher(endpoint.url, "big", tmp_path)
    for endpoint.raw in (b"<html>", b"[]", b'{"error": "no model"}', b'{"choices": [{"text": "a"}]}', b'{"choices": [3]}', b"\xff"):
        with pytest.raises(OSError, match="gives no answers"):
            teacher.ask("one?")
    assert teacher.spent == 0 and not list(tmp_path.iterdir())
    endpoint.raw = b'{"choices": [{"message": {"content": null}}], "usage": null}'
    assert teacher.ask("one?") == [""]


def test_rejection_keeps_the_right_answers_and_resumes_after_a_crash(endpoint, tmp_path):
    todo = some("sql", 4)
    by_prompt = {t.prompt: t for t in todo}
    endpoint.reply = lambda body, i: getattr(by_prompt[body["messages"][0]["content"].rsplit("\n", 1)[0]], ("solution", "wrong")[i % 2])
    path = tmp_path / "out" / "samples.jsonl"
    author = tasks.from_teacher(tasks.Teacher(endpoint.url, "big", tmp_path / "cache"))
    tasks.write_samples(todo[:2], author, path, n=2)
    with path.open("a") as file:
        file.write('{"id": ["sql", 1')  # the crash
    table = tasks.write_samples(todo, author, path, n=2)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [tuple(r["id"]) for r in records] == [(t.family, t.difficulty, t.seed, t.split) for t in todo] and len(endpoint.asked) == 4
    assert [r["answers"] for r in records] == [[t.solution] for t in todo] and table == {"admitted": 2, "does not verify": 2}


def test_a_file_that_is_not_of_ours_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes"
    for content in ("my notes\nno newline at the end", "no line", '{"a": 1}\n', "[1]\n", "\n", '{"id": 3}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match="notes holds something else"):
            tasks.write_samples(some("sql", 1), lambda task, n: [task.solution], path)
        assert path.read_text() == content


def test_a_task_whose_check_broke_is_asked_again(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(tasks, "grade", lambda *_: Grade([], 0.0, "sandbox error", [], [], []))
        table = tasks.write_samples(some("web", 1), lambda task, n: [task.solution], tmp_path / "samples.jsonl")
    assert table == {"machinery broke": 1} and (tmp_path / "samples.jsonl").read_text() == ""
    assert tasks.write_samples(some("web", 1), lambda task, n: [task.solution], tmp_path / "samples.jsonl") == {"admitted": 1}


def test_a_checkpoint_trains_itself_on_what_it_got_right(tmp_path):
    """A model that has learned one question by heart answers it and no other: rejection keeps just that answer."""
    known, *others = [t for t in some("crux_output", 12) if len(t.solution) == 1][:3]
    tokenizer = Tokenizer.train([t.prompt for t in (known, *others)] * 9, 270)
    torch.manual_seed(0)
    model = LoopCoder(LoopCoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512))
    ids, in_loss = tokenizer.encode_parts(tasks.task_parts(known))
    targets = torch.tensor([[token if learned else -100 for token, learned in zip(ids[1:], in_loss[1:])]])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(40):
        loss = model.loss(torch.tensor([ids[:-1]]), targets)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    model.save_pretrained(tmp_path / "ckpt"), tokenizer.save(tmp_path / "ckpt")
    author = tasks.from_checkpoint(model.eval(), tokenizer, longest=8)
    assert author(known, 4) == [known.solution] * 4 == author(known, 4)
    others = [t for t in others if t.solution != known.solution]
    table = tasks.write_samples([known, *others], author, tmp_path / "samples.jsonl", n=4)
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [r["answers"] for r in records] == [[known.solution]] + [[]] * len(others) and others
    assert table["admitted"] == 1 and table["duplicate"] == 3 and table["does not verify"] == 4 * len(others)
    assert tasks.main(["--write", str(tmp_path / "more.jsonl"), "--ckpt", str(tmp_path / "ckpt"), "--answers", "2", "--n", "1",
                       "--seed", str(known.seed), "--family", "crux_output"]) == 0
    assert [json.loads(line)["answers"] for line in (tmp_path / "more.jsonl").read_text().splitlines()] == [[known.solution]]


# ---- debate ---------------------------------------------------------------------------------------------------------------------


def judge(right_share, seed):
    """A judge that prefers the text with "good" in it, in this share of the cases; its mood hangs on the text alone."""
    def reply(text):
        question = text.split("\n\nAnswer:")[0]
        mood = random.Random(f"{seed} {question}").random() < right_share
        return f"score: {8 if ('good' in text.split('Answer:')[1].split('Give one')[0]) == mood else 2}\nbecause"
    return reply


def test_weights_are_log_odds_and_beat_a_majority_of_bad_judges():
    judges = [judge(0.95, 1), judge(0.55, 2), judge(0.55, 3), judge(0.1, 4)]
    labelled = [(f"question {i}", f"good {i}", f"bad {i}") for i in range(200)]
    weights = tasks.calibrate(judges, labelled)
    assert weights[0] == pytest.approx(np.log(0.95 / 0.05), abs=0.6) and abs(weights[1]) < 0.6 and weights[3] == 0.0
    fresh = [(f"other {i}", kind) for i in range(150) for kind in ("good", "bad")]
    right = lambda w: np.mean([(tasks.debate(q, kind, judges, w)[0] > 0.5) == (kind == "good") for q, kind in fresh])
    assert right(weights) > 0.9 > 0.8 > right(None)


def test_judges_see_the_reviews_without_names_and_one_without_a_score_abstains():
    seen = []
    listener = lambda text: seen.append(text) or ("score: 0 at first" if "reviews so far" not in text else "score: 10 I was convinced")
    mute = lambda text: "I would rather not say"
    value, (first, second) = tasks.debate("q", "a", [listener, mute])
    assert value == pytest.approx(1 / (1 + np.exp(-1))) and second[0].startswith("score: 10")
    assert "- score: 0 at first" in seen[1] and "- I would rather not say" in seen[1] and "reviews so far" not in seen[0]
    assert tasks.debate("q", "a", [mute])[0] == 0.5
    assert [tasks.scored(text) for text in ("Score: 7.5", "score: 99", "7")] == [0.5, 1.0, None]


# ---- command line ---------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_task_with_its_verification_and_refuses_bad_input(tmp_path):
    run = lambda *arguments: subprocess.run([sys.executable, ROOT / "tasks.py", *arguments], capture_output=True, text=True, cwd=tmp_path)
    shown = run("--family", "sql", "--difficulty", "3")
    assert shown.returncode == 0 and "solution 1.00 · wrong answer 0.00 · empty answer 0.00" in shown.stdout
    (tmp_path / "file").touch()
    bad = run("--write", "file/samples.jsonl", "--n", "1", "--family", "math")
    assert bad.returncode == 2 and bad.stderr.startswith("tasks.py: ") and bad.stderr.count("\n") == 1
    for arguments in (["--check", "0"], ["--n", "0"], ["--processes", "-1"], ["--teacher", "http://127.0.0.1:9/v1"]):
        with pytest.raises(ValueError, match=arguments[0]):
            tasks.main(arguments)


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word_and_the_help_shows_no_empty_default():
    arguments = [sys.executable, ROOT / "tasks.py", "--family", "math"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait() == 141
    told = subprocess.run([sys.executable, ROOT / "tasks.py", "--help"], capture_output=True, text=True, check=True).stdout
    told = " ".join(told.split())
    assert "(default: 1000000)" in told and "default: default" not in told and "None" not in told
