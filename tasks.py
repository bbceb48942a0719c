"""
Tasks: problems whose answers a program can verify.

A family is two functions. Its generator writes a task: a prompt, a solution, a plausible wrong answer, the thinking that
leads to the solution, and tests. Its verifier takes any answer and says how much of it is right, by running it: programs in
the sandbox, SQL on sqlite, formulas in sympy, clicks and calls on a state machine. So one table serves three readers:
fine-tuning imitates the solutions, reinforcement learning is paid by the verifier, evaluation counts what verifies.

Start with `Task`, `generate` and `verify`; then read one family (`compose` is the plainest) and FAMILIES near the end.
Three rules hold everywhere:
    split   a task's template is a tuple of keys (for instance "sort>reverse"); a fifth of all keys is held out, by hash, and a
            task is a test task if one of its keys is. Every single step is seen in training, a held-out composition never.
    dial    difficulty 1 is easy for a model of a million parameters, 5 is not; prompts and answers grow with it.
    chance  chance(family) measures what answering at random would earn, so that a learned score can be told from luck.
Below the families: metrics (pass@k, Beyond), the gate that only verified and uncontaminated samples pass, the teacher (an
endpoint, a checkpoint of ours, or the program itself), and debate, for what no program can judge.

Source: sections 4.1 to 4.3 of the IQuest-Coder-V1 report (families, 20 tests, pass rate as reward, zero-error samples, debate);
SWE-smith for the list of planted bugs; Mercury for Beyond. Departures: everything is generated here, small enough for a laptop.

    python tasks.py             # one task of every family, with its verification
    python tasks.py --check 200 # on 200 seeds a family: the solution verifies, an empty and a wrong answer do not
    python tasks.py --bench     # verified tasks a minute, mutants killed by chosen and by random tests, chance by family
"""
import argparse
import ast
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import sqlite3
import stat
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np

from sandbox import Call, Io, Limits, Workspace, grade, run

LEVELS = range(1, 6)
LIMITS = Limits(wall_s=10.0, cpu_s=4.0)  # CPU time decides; the wall is a backstop on a busy machine


@dataclass(frozen=True)
class Task:
    """One problem. All of it is plain data: `dataclasses.asdict` and JSON carry it."""
    family: str
    difficulty: int
    seed: int
    split: str                # "train" or "test"
    keys: tuple               # the template, as composition keys
    prompt: str
    solution: str             # an answer that verifies
    wrong: str                # a plausible answer that does not
    trace: str                # the thinking that leads to the solution
    tests: dict               # what the verifier compares with; the model never sees it
    files: dict = field(default_factory=dict)  # {path: text} that the task starts from
    names: tuple = ()         # names that perturb() may replace everywhere
    turns: tuple = ()         # agent families: (role, text) after the prompt, one way to solve it in steps
    detour: tuple = ()        # the same with one mistake, its feedback and its repair; role "mistake" is not learned


def held_out(key: str) -> bool:
    """A fifth of all composition keys, the same fifth on every machine."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def split_of(keys) -> str:
    """A task belongs to the test split as soon as one of its keys is held out."""
    return "test" if any(map(held_out, keys)) else "train"


def generate(family: str, difficulty: int, seed: int, split: str = "train") -> Task:
    """
    The task of this family, level and seed: the same on every call.

    A family's generator first yields its keys, and builds the (dearer) rest only when asked again, so that a template of the
    other split costs little. It ends early where chance made a task that is no good (a constant answer, say): next attempt.
    """
    if family not in FAMILIES or difficulty not in LEVELS or split not in ("train", "test"):
        raise ValueError(f"no task for family={family!r}, difficulty={difficulty!r}, split={split!r}: "
                         f"take one of {', '.join(FAMILIES)}, a difficulty of 1 to 5, and train or test.")
    for attempt in range(500):
        draft = FAMILIES[family].generate(random.Random(f"{family}/{difficulty}/{seed}/{attempt}"), difficulty)
        keys = tuple(next(draft))
        if split_of(keys) == split and (rest := next(draft, None)):
            return Task(family, difficulty, seed, split, keys, **rest)
    raise AssertionError(f"{family}, difficulty {difficulty}: no {split} template in 500 attempts")


def final_answer(text: str) -> str:
    """The answer without its thinking. A thought that was never closed has no answer."""
    if text.lstrip().startswith("<think>"):
        return text.partition("</think>")[2].strip("\n ")
    return text.strip("\n ")


def verify(task: Task, answer: str) -> float:
    """
    How much of the answer is right, in [0, 1]: the share of tests passed for programs, 0 or 1 elsewhere.

    Raises RuntimeError when our own machinery broke: that says nothing about the answer, and must not be paid as 0.
    """
    answer = final_answer(answer)
    return float(FAMILIES[task.family].verify(task, answer)) if answer else 0.0


# ---- running code: ours in process, a model's in the sandbox ------------------------------------------------------------


def build(code, name: str):
    """Run source or a tree that we wrote (never a model's) and hand back one of its functions."""
    space = {}
    exec(code if isinstance(code, str) else compile(code, "<mutant>", "exec"), space)
    return space[name]


def behaviour(code, name: str, inputs) -> list[str]:
    """What our function answers to each tuple of arguments, as text, so that 1, 1.0 and True differ; an error is its name."""
    function, seen = build(code, name), []
    for args in inputs:
        try:
            seen.append(repr(function(*args)))
        except Exception as error:  # a mutant may fail in any way; how it fails is its behaviour
            seen.append(type(error).__name__)
    return seen


def graded(source: str, tests) -> list[bool]:
    """One bool a test, from the sandbox."""
    result = grade(source, tests, LIMITS)
    if result.status == "sandbox error":
        raise RuntimeError("the sandbox broke while it graded an answer")
    return list(result.passed)


def code_of(answer: str) -> str:
    """The last fenced block of the answer, or all of it where there is none."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", answer, re.S)
    return blocks[-1] if blocks else answer


def fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


# ---- mutants: programs one small mistake away -------------------------------------------------------------------------

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
             ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
CALLS = {"max": "min", "min": "max", "sum": "len", "len": "sum", "sorted": "list", "list": "sorted", "abs": "int"}


def mutations(node):
    """The mistakes one AST node allows, as (kind, {attribute: new value}). The list is SWE-smith's."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", {"op": OPERATORS[type(node.op)]()}
        if not isinstance(node.op, (ast.Add, ast.Mult)):
            yield "operand order", {"left": node.right, "right": node.left}
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield "comparison", {"ops": [OPERATORS[type(node.ops[0])]()]}
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "constant", {"value": node.value + 1}
        yield "constant", {"value": node.value - 1}
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", {"op": ast.UAdd()}
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield "call", {"func": ast.Name(CALLS[node.func.id], ast.Load())}
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield "inverted if", {"test": ast.UnaryOp(ast.Not(), node.test)}
    for i, statement in enumerate(getattr(node, "body", ()) if isinstance(node, (ast.FunctionDef, ast.If)) else ()):
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.If)) and len(node.body) > 1:
            yield "removed statement", {"body": node.body[:i] + node.body[i + 1:]}


def mutants(source: str):
    """Every program one mutation away from `source`, as (kind, tree)."""
    for i, node in enumerate(ast.walk(ast.parse(source))):
        for kind, change in mutations(node):
            tree = ast.parse(source)
            place = next(islice(ast.walk(tree), i, None))
            for attribute, value in change.items():
                setattr(place, attribute, value)
            yield kind, ast.fix_missing_locations(tree)


def kill_table(source: str, name: str, inputs, trees) -> np.ndarray:
    """(mutants, inputs) bool: this input tells this mutant from the source."""
    want = behaviour(source, name, inputs)
    return np.array([[a != b for a, b in zip(behaviour(tree, name, inputs), want)] for tree in trees]).reshape(-1, len(inputs))


def select_tests(source: str, name: str, inputs, n: int = 20) -> tuple[list[int], list]:
    """
    The n inputs (their indices) that kill the most mutants, and the trees of all mutants that any input kills.

    Greedy: each test is worth the weight of the mutants it kills, and a mutant's weight falls to a tenth with every kill; so
    first every mutant dies once, then those that few tests catch die again.
    """
    trees = [tree for _, tree in mutants(source)]
    kills = kill_table(source, name, inputs, trees)
    alive = kills.any(1)
    kills, weight, chosen = kills[alive], np.ones(alive.sum()), []
    for _ in range(min(n, len(inputs))):
        worth = weight @ kills
        worth[chosen] = -1.0
        chosen.append(int(worth.argmax()))
        weight[kills[:, chosen[-1]]] *= 0.1
    return chosen, [tree for tree, dies in zip(trees, alive) if dies]


# ---- compose, stdin: competitive programming -----------------------------------------------------------------------------
# A problem is a chain of steps on a list of integers. The steps are few, the chains are many: what is learned is to compose.

STEPS = {  # key: (words, expression); the first group gives a list, the second a number and can only come last
    "sort": ("sort", "sorted(xs)"), "down": ("sort downward", "sorted(xs, reverse=True)"), "reverse": ("reverse", "xs[::-1]"),
    "even": ("keep the even numbers", "[x for x in xs if x % 2 == 0]"), "odd": ("keep the odd numbers", "[x for x in xs if x % 2 == 1]"),
    "over": ("keep numbers over {k}", "[x for x in xs if x > {k}]"), "under": ("keep numbers under {k}", "[x for x in xs if x < {k}]"),
    "add": ("add {k} to each", "[x + {k} for x in xs]"), "times": ("multiply each by {k}", "[x * {k} for x in xs]"),
    "square": ("square each", "[x * x for x in xs]"), "negate": ("negate each", "[-x for x in xs]"),
    "abs": ("drop the signs", "[abs(x) for x in xs]"), "tail": ("drop the first {k}", "xs[{k}:]"), "init": ("drop the last {k}", "xs[:-{k}]"),
    "first": ("keep the first {k}", "xs[:{k}]"), "last": ("keep the last {k}", "xs[-{k}:]"), "second": ("take every second", "xs[::2]"),
    "unique": ("remove duplicates", "list(dict.fromkeys(xs))"), "cap": ("cap each at {k}", "[min(x, {k}) for x in xs]"),
    "sums": ("take running sums", "[sum(xs[:i + 1]) for i in range(len(xs))]"),
    "gaps": ("take the gaps", "[b - a for a, b in zip(xs, xs[1:])]"),
}
ENDS = {
    "sum": ("sum", "sum(xs)"), "count": ("count", "len(xs)"), "max": ("take the largest", "max(xs, default=0)"),
    "min": ("take the smallest", "min(xs, default=0)"), "evens": ("count the even numbers", "sum(x % 2 == 0 for x in xs)"),
    "squares": ("sum the squares", "sum(x * x for x in xs)"),
}
FRAMES = ("Write f(xs): {}.", "Define f(xs): {}.", "f(xs) should {}.", "Python f(xs): {}.", "Code f(xs) to {}.")


def chain(rng, level: int) -> tuple[list[str], list[str], list[str]]:
    """A random chain of `level` steps: its composition keys, its words, its expressions."""
    names = []
    while len(names) < level:
        name = rng.choice(sorted(STEPS) if len(names) < level - 1 or rng.random() < 0.7 else sorted(ENDS))
        names += [name] if not names or name != names[-1] else []
    ks = [rng.randint(2, 5) for _ in names]
    words, code = zip(*[(w.format(k=k), e.format(k=k)) for k, (w, e) in zip(ks, [(STEPS | ENDS)[n] for n in names])])
    return [f"{a}>{b}" for a, b in zip(names, names[1:])] or [names[0]], list(words), list(code)


def in_steps(code, head="def f(xs):", tail="return {}") -> str:
    """One statement a step; `head` opens the program and `tail` gives the last value out."""
    return "\n    ".join([head] + [f"xs = {e}" for e in code[:-1]] + [tail.format(code[-1])])


def nested(code) -> str:
    """All steps in one expression, or "" where a step needs its list more than once."""
    inner = code[0]
    for e in code[1:]:
        if len(re.findall(r"\bxs\b", e)) != 1:
            return ""
        inner = re.sub(r"\bxs\b", lambda _, inner=inner: inner, e)
    return f"def f(xs):\n    return {inner}"


def looped(code) -> str:
    """The slow style, for Beyond: every comprehension is written out as a loop."""
    lines = ["def f(xs):"]
    for e in code:
        parts = re.fullmatch(r"\[(.+) for x in xs(?: if (.+))?\]", e)
        loop = ["ys = []", "for x in xs:", f"    if {parts[2] or True}:", f"        ys.append({parts[1]})", "xs = ys"] if parts else [f"xs = {e}"]
        lines += ["    " + line for line in loop]
    return "\n".join(lines + ["    return xs"])


def lists(rng, n: int) -> list[tuple]:
    """n different argument tuples, each one list of 0 to 8 small integers."""
    found = {(): None}
    while len(found) < n:
        found[tuple(rng.randint(-9, 9) for _ in range(rng.randint(1, 8)))] = None
    return [(list(xs),) for xs in found]


def compose_core(rng, code, source=""):
    """Two examples to show, 20 tests that kill mutants, and two wrong programs; None where the chain is (nearly) constant."""
    source, inputs = source or in_steps(code), lists(rng, 200)
    if len(set(behaviour(source, "f", inputs))) < 8:
        return None
    f = build(source, "f")
    shown = [[rng.randint(0, 9) for _ in range(rng.randint(4, 5))] for _ in range(40)]
    shown = sorted(shown, key=lambda xs: (f(xs) in ([], 0, xs), shown.index(xs)))[:2]  # examples that show something
    inputs = [x for x in inputs if x[0] not in shown]
    chosen, trees = select_tests(source, "f", inputs)
    tests = [(inputs[i][0], f(inputs[i][0])) for i in chosen]
    return [(xs, f(xs)) for xs in shown], tests, [ast.unparse(tree) for tree in rng.sample(trees, min(2, len(trees)))]


def compose(rng, level):
    """Function form. Styles differ (step by step or one expression), as they do among people."""
    keys, words, code = chain(rng, level)
    frame = rng.randrange(len(FRAMES))
    yield keys if level > 1 else [f"{frame}:{keys[0]}"]
    core = compose_core(rng, code)
    if core is None:
        return
    shown, tests, wrong = core
    style = (rng.random() < 0.4 and nested(code)) or in_steps(code)
    yield dict(prompt="\n".join([FRAMES[frame].format(", then ".join(words))] + [f"f({xs}) == {y}" for xs, y in shown]),
               solution=fenced(style), wrong=fenced(wrong[0]), trace="\n".join(f"{w}: {e}" for w, e in zip(words, code)),
               tests={"calls": [("f", [xs], y) for xs, y in tests], "references": [in_steps(code), looped(code)]}, names=("f", "xs"))


def verify_calls(task, answer):
    """The share of calls that return exactly what they should."""
    passed = graded(code_of(answer), [Call(*call) for call in task.tests["calls"]])
    return sum(passed) / len(task.tests["calls"])


def stdin(rng, level):
    """Program form: one line of integers in, the result out, numbers separated by blanks."""
    keys, words, code = chain(rng, level)
    frame = rng.randrange(3)
    yield keys if level > 1 else [f"stdin {frame}:{keys[0]}"]
    core = compose_core(rng, code)
    if core is None:
        return
    shown, tests, wrong = core
    out = lambda y: " ".join(map(str, y)) if isinstance(y, list) else str(y)
    tail = "print(*{})" if isinstance(shown[0][1], list) else "print({})"
    read = "xs = list(map(int, input().split()))"
    text = ("Read integers, {}, print.", "From one line of integers: {}. Print it.", "Input: integers. {}, then print.")[frame]
    yield dict(prompt="\n".join([text.format(", then ".join(words))] + [f"{out(xs)} -> {out(y)}" for xs, y in shown]),
               solution=fenced(in_steps(code, read, tail).replace("\n    ", "\n")),
               wrong=fenced(wrong[0] + f"\n{read}\n" + tail.format("f(xs)")),
               trace="\n".join(f"{w}: {e}" for w, e in zip(words, code)),
               tests={"io": [(out(xs) + "\n", out(y) + "\n") for xs, y in tests]}, names=("xs",))


def verify_io(task, answer):
    """The share of inputs for which the program prints what it should."""
    passed = graded(code_of(answer), [Io(*io) for io in task.tests["io"]])
    return sum(passed) / len(task.tests["io"])


# ---- crux: what does this program answer, and what was it asked? -----------------------------------------------------------

MOVES = [  # (key, type in, type out, expression of v with literals k or c, first level)
    ("+", int, int, "v + k", 1), ("-", int, int, "v - k", 1), ("max", int, int, "max(v, k)", 1), ("min", int, int, "min(v, k)", 1),
    ("*", int, int, "v * k", 2), ("%", int, int, "v % k", 2), ("//", int, int, "v // k", 2), ("abs", int, int, "abs(v - k)", 3),
    ("if", int, int, "v - k if v > k else v + k", 3), ("even", int, int, "v // 2 if v % 2 == 0 else v + k", 4),
    ("push", list, list, "v + [k]", 1), ("front", list, list, "[k] + v", 1), ("tail", list, list, "v[1:]", 1), ("init", list, list, "v[:-1]", 1),
    ("back", list, list, "v[::-1]", 1), ("sort", list, list, "sorted(v)", 2), ("each", list, list, "[x + k for x in v]", 3),
    ("len", list, int, "len(v)", 1), ("first", list, int, "v[0]", 1), ("last", list, int, "v[-1]", 1), ("top", list, int, "max(v)", 2),
    ("sum", list, int, "sum(v)", 3), ("app", str, str, "v + 'c'", 1), ("pre", str, str, "'c' + v", 1), ("flip", str, str, "v[::-1]", 1),
    ("rest", str, str, "v[1:]", 1), ("most", str, str, "v[:-1]", 1), ("up", str, str, "v.upper()", 2), ("two", str, str, "v * 2", 2),
    ("size", str, int, "len(v)", 2),
]
SAMPLE = {int: lambda rng: rng.randint(0, 9), list: lambda rng: [rng.randint(0, 9) for _ in range(rng.randint(3, 4))],
          str: lambda rng: "".join(rng.choice("abcdeg") for _ in range(rng.randint(2, 4)))}


def crux_program(rng, level):
    """A straight program of `level` statements: (keys, source, argument, [(statement's right side, value)]), or None if it fails."""
    variable, shape = rng.choice("abnstvxy"), rng.randrange(3)
    kind, moves = rng.choice([int, list, str]), []
    for _ in range(level):
        pool = [m for m in MOVES if m[1] is kind and m[4] <= level and (not moves or m[0] != moves[-1][0])]
        moves.append(rng.choice(pool))
        kind = moves[-1][2]
    keys = [f"{a[0]} {b[0]}" for a, b in zip(moves, moves[1:])] or [f"{shape} {moves[0][0]} {variable}"]
    right = [m[3].replace("'c'", repr(rng.choice("abcdeg"))) for m in moves]
    right = [re.sub(r"\bk\b", str(rng.randint(2, 3 + 2 * (m[0] in "+-")) if m[1] is int else rng.randint(0, 9)), r) for m, r in zip(moves, right)]
    own = lambda r: re.sub(r"\bv\b", variable, r)
    body = [f"{variable} = {own(r)}" for r in right[:-1]]
    body += [f"return {own(right[-1])}"] if shape == 0 else [f"{'r' if shape == 1 else variable} = {own(right[-1])}",
                                                             f"return {'r' if shape == 1 else variable}"]
    return keys, moves[0][1], "\n    ".join([f"def f({variable}):"] + body), right


def values_along(right, value):
    """[(the expression with its value put in, what it gives)] from the argument on; raises where the program would."""
    seen = []
    for r in right:
        line = re.sub(r"\bv\b", lambda _, value=value: repr(value), r)
        value = eval(line, {})  # our own expression over our own literal
        seen.append((line, value))
    return seen


def crux(direction):
    """The generator of one direction: "output" asks for the value, "input" for an argument."""
    def draft(rng, level):
        keys, kind, source, right = crux_program(rng, level)
        yield [f"{direction} {key}" for key in keys]
        argument = SAMPLE[kind](rng)
        try:
            along = values_along(right, argument)
            others = [(a, values_along(right, a)[-1][1]) for a in (SAMPLE[kind](rng) for _ in range(12))]
        except (IndexError, ValueError):
            return
        result = along[-1][1]
        others = [(a, y) for a, y in others if repr(y) != repr(result)]
        if not others or max(len(repr(v)) for _, v in along) > 24:
            return
        line = "assert f({}) == {}"
        if direction == "output":
            question, wrong = line.format(repr(argument), "?"), line.format(repr(argument), repr(others[0][1]))
            trace = "\n".join(f"{expression} = {value!r}" for expression, value in along)
        else:
            question, wrong = line.format("?", repr(result)), line.format(repr(others[0][0]), repr(result))
            trace = "\n".join(f"{value!r} = {expression}" for expression, value in reversed(along))
        yield dict(prompt=f"{source}\n\n{question}", solution=line.format(repr(argument), repr(result)), wrong=wrong, trace=trace,
                   tests={"source": source, "argument": argument, "result": result}, names=("f",))
    return draft


def read_assert(answer: str):
    """(function, arguments, value) of `assert f(literals) == literal`; ValueError for anything else."""
    try:
        tree = ast.parse(code_of(answer).strip()).body
        test = tree[0].test
        if len(tree) != 1 or not isinstance(test.ops[0], ast.Eq) or test.left.keywords:
            raise ValueError("not one plain assertion")
        return test.left.func.id, [ast.literal_eval(a) for a in test.left.args], ast.literal_eval(test.comparators[0])
    except (SyntaxError, AttributeError, IndexError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not an assertion about a call: {error}") from None


def verify_crux(task, answer):
    """Output: the literal must be the value, type included. Input: any argument will do that gives the value when run."""
    try:
        _, args, value = read_assert(answer)
    except ValueError:
        return 0.0
    if repr(value) != repr(task.tests["result"]) or len(args) != 1:
        return 0.0
    if task.family == "crux_output":
        return float(repr(args[0]) == repr(task.tests["argument"]))
    name = re.match(r"def (\w+)", task.tests["source"])[1]
    return float(all(graded(task.tests["source"], [Call(name, args, task.tests["result"])])))


# ---- math: a formula is right when it equals the solution, however it is written -------------------------------------------

WHO, WHAT = ("Ann", "Bob", "Eve", "Max", "Zoe"), ("pens", "cups", "eggs", "keys", "nuts", "maps")


def formula(text: str):
    """A sympy expression from text that nobody trusts: numbers, names, + - * / ** and a few functions; ValueError otherwise."""
    import sympy  # 0.4 s, so only those who need it wait

    known = {"sin": sympy.sin, "cos": sympy.cos, "exp": sympy.exp, "log": sympy.log, "sqrt": sympy.sqrt}

    def read(node):
        if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**9:
            return sympy.Integer(node.value)
        if isinstance(node, ast.Name) and node.id.isalpha() and len(node.id) == 1:
            return sympy.Symbol(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return -read(node.operand) if isinstance(node.op, ast.USub) else read(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known and len(node.args) == 1:
            return known[node.func.id](read(node.args[0]))
        if isinstance(node, ast.BinOp):
            a, b = read(node.left), read(node.right)
            if isinstance(node.op, ast.Pow):
                if not (b.is_Integer and abs(b) < 10 and not a.has(sympy.Pow)):
                    raise ValueError("a power must be a small integer")  # 9**9**9 would never end
                return a**b
            for op, value in ((ast.Add, lambda: a + b), (ast.Sub, lambda: a - b), (ast.Mult, lambda: a * b), (ast.Div, lambda: a / b)):
                if isinstance(node.op, op):
                    return value()
        raise ValueError(f"{ast.dump(node)[:60]} is not allowed in a formula")

    try:
        return read(ast.parse(text.strip().replace("^", "**"), mode="eval").body) if len(text) < 200 else None
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a formula: {error}") from None


def is_expanded(text: str) -> bool:
    """No product or power of a sum is left to multiply out."""
    sums = lambda node: isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))
    return not any(isinstance(n, ast.BinOp) and isinstance(n.op, (ast.Mult, ast.Pow)) and (sums(n.left) or sums(n.right))
                   for n in ast.walk(ast.parse(text.strip().replace("^", "**"), mode="eval")))


def poly(coefficients) -> str:
    """[5, 0, 3] -> "3*x**2 + 5"; the lowest power comes first in the list."""
    terms = [(c, n) for n, c in reversed(list(enumerate(coefficients))) if c]
    one = lambda c, n: str(c) if n == 0 else ("" if c == 1 else f"{c}*") + ("x" if n == 1 else f"x**{n}")
    text = "".join((" - " if c < 0 else " + ") + one(abs(c), n) for c, n in terms)
    return text[3:] if text.startswith(" + ") else "-" + text[3:] if text else "0"


def word_problem(rng, level):
    """Things gained and lost: (key, question, answer, wrong, trace, form)."""
    who, what = rng.choice(WHO), rng.choice(WHAT)
    verbs = [("finds", 1), ("buys", 1), ("loses", -1), ("sells", -1), ("gets", 1), ("eats", -1)]
    total, text, trace, used = rng.randint(2, 5 + 4 * level), [], [], []
    text.append(f"{who} has {total} {what}")
    for _ in range(level):
        verb, sign = rng.choice([v for v in verbs if v[0] not in used and (v[1] > 0 or total > 2)])
        n = rng.randint(1, min(total - 1, 9) if sign < 0 else 9)
        text.append(f"{verb} {n}")
        trace.append(f"{total} {'-+'[sign > 0]} {n} = {total + sign * n}")
        used.append(verb)
        total += sign * n
    wrong = total + rng.choice([-1, 1, 2])
    keys = [f"{a} {b}" for a, b in zip(used, used[1:])] or [f"{used[0]} {what}"]
    return keys, " and ".join([", ".join(text[:-1]), text[-1]]) + ". How many now?", str(total), str(wrong), "\n".join(trace), "number"


def equation(rng, level):
    """Solve for a letter: a shift, a multiple, both sides, a quadratic."""
    x, v = rng.randint(1, 9), rng.choice("nxyz")
    a, b, c = rng.randint(2, 5), rng.randint(1, 9), 1
    if level == 1:
        kind, left, right, trace = "shift", f"{v} + {b}", x + b, f"{v} = {x + b} - {b}"
    elif level == 2:
        kind, left, right, trace = "scale", f"{a}*{v} + {b}", a * x + b, f"{a}*{v} = {a * x + b} - {b} = {a * x}\n{v} = {a * x} / {a}"
    elif level <= 4:
        c = rng.randint(1, a - 1)
        kind, left, right = "sides", f"{a}*{v} + {b}", (f"{c}*{v}" if c > 1 else v) + f" + {(a - c) * x + b}"
        trace = f"{a - c}*{v} = {(a - c) * x + b} - {b} = {(a - c) * x}\n{v} = {(a - c) * x} / {a - c}"
    else:
        y = rng.choice([n for n in range(1, 10) if n != x])
        kind, left, right, trace = "square", f"{v}**2 - {x + y}*{v} + {x * y}", 0, f"{x} + {y} = {x + y}\n{x} * {y} = {x * y}"
        return [f"{kind} {v} {b}"], f"Solve {left} = 0 for all {v}.", f"{min(x, y)}, {max(x, y)}", f"{x}, {y + 1}", trace, "set"
    return [f"{kind} {v} {b}"], f"Solve {left} = {right} for {v}.", str(x), str(x + rng.choice([1, 2, a])), trace, "number"


def calculus(rng, level):
    """Derivatives at level 1 and 2, products to multiply out at 2 and 3, antiderivatives and chains above."""
    a, b, n, m = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 4), rng.randint(1, 9)
    if level >= 4:
        inner, outer = f"{a}*x + {b}", rng.choice(["sin", "cos", "exp"])
        slope = {"sin": f"{a}*cos({inner})", "cos": f"-{a}*sin({inner})", "exp": f"{a}*exp({inner})"}[outer]
        return [f"chain {outer} {b}"], f"Derive {outer}({inner}).", slope, f"{outer}({inner})", f"the inside gives {a}", "formula"
    if level >= 2 and rng.random() < 0.5:
        p, q = ([a, 1], [b, 1]) if level == 2 else ([a, n], [b, -1])
        product = [p[0] * q[0], p[0] * q[1] + p[1] * q[0], p[1] * q[1]]
        trace = f"x**2: {product[2]}\nx: {p[0] * q[1]} + {p[1] * q[0]} = {product[1]}\n1: {product[0]}"
        return [f"expand {a} {b}"], f"Expand ({poly(p)})*({poly(q)}).", poly(product), poly([product[0] + 1] + product[1:]), trace, "expanded"
    c = [0] * n + [a] if level == 1 else [m, b] + [0] * (n - 2) + [a]
    slope = [i * x for i, x in enumerate(c)][1:]
    trace = "\n".join(f"{i} * {x} = {i * x}" for i, x in reversed(list(enumerate(c))) if x and i)
    return [f"power {n} {a}"], f"Derive {poly(c)}.", poly(slope), poly(c), trace, "formula"


def math_task(rng, level):
    """One of the three kinds; the answer is a number, a set of numbers, a formula, or one that must be multiplied out."""
    keys, question, answer, wrong, trace, form = rng.choice([word_problem, equation, calculus])(rng, level)
    yield keys
    yield dict(prompt=question, solution=answer, wrong=wrong, trace=trace, tests={"answer": answer, "form": form},
               names=tuple(n for n in WHO + WHAT if re.search(rf"\b{n}\b", question)))


def verify_math(task, answer):
    """Equal as formulas: the difference expands, or else simplifies, to zero."""
    import sympy

    form, want = task.tests["form"], task.tests["answer"]
    answer = re.sub(r"^\s*[a-z]\s*=", "", answer)
    try:
        if form == "number":
            return float(bool(re.fullmatch(r"\s*-?\d{1,9}(/\d{1,9})?\s*", answer)) and formula(answer) == formula(want))
        if form == "set":
            return float(len(answer) < 100 and {formula(t) for t in answer.split(",")} == {formula(t) for t in want.split(",")})
        if form == "expanded" and not is_expanded(answer):
            return 0.0
        difference = sympy.expand(formula(answer) - formula(want))
        probe = difference.subs({symbol: sympy.Rational(3, 7) for symbol in difference.free_symbols}).evalf()
        return float(difference == 0 or (abs(complex(probe)) < 1e-9 and sympy.simplify(difference) == 0))  # simplify is slow: rarely asked
    except (ValueError, SyntaxError, TypeError, ZeroDivisionError, RecursionError):
        return 0.0


# ---- sql: the query first, its question second -------------------------------------------------------------------------------
# The reverse pipeline: a random query, a question made from it, and a reader that must get the same query back from the question.

TABLES = {  # table: (name, category and its values, two numbers)
    "pets": ("name", "kind", ("cat", "dog", "fish"), "age", "weight"), "books": ("title", "genre", ("poem", "novel", "guide"), "pages", "price"),
    "songs": ("title", "style", ("rock", "jazz", "folk"), "length", "plays"), "towns": ("name", "country", ("Peru", "Oman", "Fiji"), "people", "area"),
    "staff": ("name", "team", ("ops", "lab", "art"), "age", "pay"), "cars": ("model", "color", ("red", "blue", "gray"), "year", "speed"),
}
TOTALS = {"number": "COUNT(*)", "highest": "MAX", "lowest": "MIN", "average": "AVG", "total": "SUM"}


def sql_of(q: dict) -> str:
    """The query that a specification means."""
    where = [f"{col} {op} {value}" for col, op, value in q["where"]]
    select = q["column"] if not q["total"] else TOTALS[q["total"]] if q["total"] == "number" else f"{TOTALS[q['total']]}({q['column']})"
    return (f"SELECT {q['group'] + ', ' if q['group'] else ''}{select} FROM {q['table']}" + (f" WHERE {' AND '.join(where)}" if where else "")
            + (f" GROUP BY {q['group']}" if q["group"] else "")
            + (f" ORDER BY {q['order'][0]}{' DESC' * q['order'][1]}" if q["order"] else "") + (f" LIMIT {q['limit']}" if q["limit"] else ""))


WHERE = {">": "{0} over {1}", "<": "{0} under {1}", "=": "{0} equal to {1}"}
AVERAGE = re.compile(r"^\(SELECT AVG\((\w+)\) FROM \w+\)$")


def question_of(q: dict) -> str:
    """The question whose answer the query is. Each part of the specification has its own words, so it can be read back."""
    what = f"Give the {q['total']} of {q['table'] if q['total'] == 'number' else q['column'] + ' in ' + q['table']}" if q["total"] else \
        f"List the {q['column']} of {q['table']}"
    where = [WHERE[op].format(col, "the average" if AVERAGE.match(value) else value) for col, op, value in q["where"]]
    return (what + (" with " + " and ".join(where) if where else "") + (f" for each {q['group']}" if q["group"] else "")
            + (f", by {q['order'][0]}{' downward' * q['order'][1]}" if q["order"] else "") + (f", first {q['limit']}" if q["limit"] else "") + ".")


def read_question(text: str) -> dict:
    """The inverse of question_of: the way back of the round trip."""
    m = re.fullmatch(r"(?:Give the (?P<total>\w+) of|List the) (?:(?P<column>\w+) (?:in|of) )?(?P<table>\w+?)(?: with (?P<where>.+?))?"
                     r"(?: for each (?P<group>\w+))?(?:, by (?P<by>\w+)(?P<down> downward)?)?(?:, first (?P<limit>\d+))?\.", text)
    where = []
    for part in (m["where"] or "").split(" and ") if m["where"] else ():
        col, word, value = re.fullmatch(r"(\w+) (over|under|equal to) (.+)", part).groups()
        value = f"(SELECT AVG({col}) FROM {m['table']})" if value == "the average" else value
        where.append((col, {"over": ">", "under": "<", "equal to": "="}[word], value))
    return dict(table=m["table"], column=m["column"] or "", total=m["total"] or "", where=where, group=m["group"] or "",
                order=(m["by"], bool(m["down"])) if m["by"] else None, limit=int(m["limit"] or 0))


def sql_spec(rng, level: int) -> tuple[str, dict]:
    """A random query of this level, with the name of its pattern."""
    table = rng.choice(sorted(TABLES))
    name, category, values, *numbers = TABLES[table]
    q = dict(table=table, column=name, total="", where=[], group="", order=None, limit=0)
    n = rng.choice(numbers)
    compare = lambda: rng.choice([(rng.choice(numbers), rng.choice("<>"), str(rng.randint(8, 22))), (category, "=", repr(rng.choice(values)))])
    pattern = rng.choice({1: ("where", "order", "total"), 2: ("where", "where order", "total where", "order limit"),
                          3: ("where where", "where order limit", "group", "total where where"),
                          4: ("group where", "where where order limit", "group order"),
                          5: ("average", "average order", "average where", "group where order")}[level])
    for word in pattern.split():
        if word == "where":
            q["where"].append(compare())
        elif word == "average":
            q["where"].append((n, rng.choice("<>"), f"(SELECT AVG({n}) FROM {table})"))
        elif word == "order":
            q["order"] = (q["group"] or n, rng.random() < 0.5)
        elif word == "limit":
            q["limit"] = rng.randint(2, 4)
        else:
            q["total"] = rng.choice(sorted(TOTALS))
            q["column"] = "" if q["total"] == "number" else n
            q["group"] = category if word == "group" else ""
    return f"{pattern} {q['total'] or q['column']}", q


def database(table: str, seed: int) -> sqlite3.Connection:
    """A small random table in memory. Numbers are distinct in a column, so that an ORDER BY has one answer."""
    name, category, values, *numbers = TABLES[table]
    rng = random.Random(f"{table} {seed}")
    rows = list(zip(rng.sample([a + b for a in "BDKLMR" for b in ("ana", "ilo", "udo")], 9), rng.choices(values, k=9),
                    rng.sample(range(3, 28), 9), rng.sample(range(3, 28), 9)))
    db = sqlite3.connect(":memory:")
    db.execute(f"CREATE TABLE {table} ({name} TEXT, {category} TEXT, {numbers[0]} INTEGER, {numbers[1]} INTEGER)")
    db.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
    return db


def ask(db: sqlite3.Connection, query: str):
    """
    The rows of a query that nobody trusts, or None where it fails.

    The authorizer lets it read and call functions, nothing else; lengths and steps are bounded, so it can neither fill memory nor run on.
    """
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    db.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
    db.set_progress_handler(lambda: 1, 200_000)  # any query of ours takes a few hundred steps
    try:
        return db.execute(query).fetchmany(1000)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None
    finally:
        db.set_authorizer(None)


def answers(query: str, schema: str, seeds, ordered: bool, name=None) -> list:
    """What the query gives on each database: rows in order, or as a sorted list where the order is free. `name`: the table's, if not its own."""
    found = []
    for seed in seeds:
        db = database(schema, seed)
        if name not in (None, schema):
            db.execute(f"ALTER TABLE {schema} RENAME TO {name}")
        rows = ask(db, query)
        db.close()
        found.append(rows if ordered or rows is None else sorted(rows, key=repr))
    return found


def sql(rng, level):
    """A query, its question, and two databases on which the query differs from its near misses."""
    pattern, q = sql_spec(rng, level)
    yield [f"{pattern} {q['table']}"]
    query, ordered = sql_of(q), bool(q["order"])
    if read_question(question_of(q)) != q or len({column for column, *_ in q["where"]}) < len(q["where"]):
        return
    near = [dict(q, where=q["where"][1:]), dict(q, where=[(c, {">": "<", "<": ">"}.get(o, o), v) for c, o, v in q["where"]]), dict(q, limit=0),
            dict(q, order=q["order"] and (q["order"][0], not q["order"][1])), dict(q, column=TABLES[q["table"]][4] if q["column"] else ""),
            dict(q, total="number" if q["total"] != "number" else "", column=q["column"] or TABLES[q["table"]][0])]
    near = [sql_of(n) for n in near if sql_of(n) != query]
    seeds = [rng.randrange(10**6) for _ in range(3)]
    want = answers(query, q["table"], seeds, ordered)
    near = [n for n in near if answers(n, q["table"], seeds, ordered) != want]
    if not near or not all(want):
        return
    name, category, values, *numbers = TABLES[q["table"]]
    yield dict(prompt=f"Table {q['table']}({name}, {category}, {', '.join(numbers)}).\n{question_of(q)}", solution=query + ";",
               wrong=rng.choice(near) + ";", trace="\n".join(part for part in re.split(r" (?=FROM|WHERE|GROUP|ORDER|LIMIT)", query)),
               tests={"query": query, "table": q["table"], "schema": list(TABLES).index(q["table"]), "seeds": seeds, "ordered": ordered}, names=(q["table"],))


def verify_sql(task, answer):
    """Execution accuracy: the same rows on every database."""
    t = task.tests
    mine, gold = (answers(query, list(TABLES)[t["schema"]], t["seeds"], t["ordered"], t["table"])
                  for query in (code_of(answer).strip().rstrip(";"), t["query"]))
    return float(mine == gold)


# ---- edits: search/replace blocks and unified diffs --------------------------------------------------------------------------


def locate(text: list[str], block: list[str], hint: int | None = None) -> int:
    """The one line index where `block` stands in `text`; `hint` (a diff's line number) decides between several."""
    places = [i for i in range(len(text) - len(block) + 1) if text[i:i + len(block)] == block]
    if hint in places:
        return hint
    if len(places) != 1 or not block:
        raise ValueError(f"{len(places)} places match the lines to replace; there must be exactly one")
    return places[0]


def apply_edit(text: str, answer: str) -> str:
    """The text after the answer's search/replace blocks or unified diff; ValueError where one does not fit."""
    lines = text.splitlines()
    answer = "\n".join(line for line in answer.splitlines() if not line.startswith("```"))
    blocks = re.findall(r"^<<<<<<< SEARCH\n(.*?)^=======\n(.*?)^>>>>>>> REPLACE$", answer, re.S | re.M)
    for search, replace in blocks:
        at = locate(lines, search.splitlines())
        lines[at:at + len(search.splitlines())] = replace.splitlines()
    shift, hunks = 0, re.split(r"^(@@.*)$", answer, flags=re.M)[1:] if not blocks else []
    for head, body in zip(hunks[::2], hunks[1::2]):
        body = [line for line in body.split("\n") if line[:1] in (" ", "-", "+")]
        old, new = ([line[1:] for line in body if line[0] in keep] for keep in (" -", " +"))
        number = re.match(r"@@ -(\d+)(,0)?", head)
        hint = int(number[1]) - (not number[2]) + shift if number else None
        at = hint if not old and hint is not None and 0 <= hint <= len(lines) else locate(lines, old, hint)
        lines[at:at + len(old)] = new
        shift += len(new) - len(old)
    if not blocks and not hunks:
        raise ValueError("the answer holds neither a search/replace block nor a diff hunk")
    return "\n".join(lines) + "\n" * text.endswith("\n")


def make_edit(old: str, new: str, form: str) -> str:
    """The shortest edit in this form ("search" or "diff") that turns old into new: context grows until it fits in one place."""
    a, b = old.splitlines(), new.splitlines()
    for context in range(len(a) + 1):
        if form == "diff":
            answer = "\n".join(line for line in difflib.unified_diff(a, b, n=context, lineterm="") if line[:3] not in ("---", "+++"))
        else:
            groups = difflib.SequenceMatcher(None, a, b, autojunk=False).get_grouped_opcodes(context)
            answer = "\n".join("\n".join(["<<<<<<< SEARCH", *a[g[0][1]:g[-1][2]], "=======", *b[g[0][3]:g[-1][4]], ">>>>>>> REPLACE"]) for g in groups)
        try:
            if apply_edit(old, answer) == new:
                return answer
        except ValueError:
            continue
    raise ValueError("no edit in this form leads from the old text to the new one (is only the last newline different?)")


SPOTS = {  # small functions with one spot: (arguments, expression, what may stand in the spot, an input that tells all of them apart)
    "operator": ("a, b", "a {} b", "+ - * // %", (7, 3)), "shift": ("x", "x + {}", "1 2 3 4 5 6 7 8 9", (0,)),
    "scale": ("x", "x * {}", "2 3 4 5 6 7 8 9", (1,)), "reduce": ("xs", "{}(xs)", "max min sum len", ([4, 9, 1],)),
    "index": ("xs", "xs[{}]", "0 1 2 3", ([7, 5, 8, 6],)), "tail": ("xs", "xs[{}:]", "0 1 2 3", ([4, 6, 8, 9],)),
    "head": ("xs", "xs[:{}]", "1 2 3 4", ([4, 6, 8, 9],)), "case": ("s", "s.{}()", "upper lower title swapcase", ("aBc",)),
    "letter": ("s", "s + '{}'", "a b c d e g", ("x",)), "filter": ("xs", "len([x for x in xs if x {} 5])", "< <= > >=", ([1, 5, 7, 8, 9],)),
    "map": ("xs", "[x {} 2 for x in xs]", "+ - * //", ([6, 3],)), "gap": ("a, b", "abs(a {} b)", "+ - *", (3, 8)),
    "rank": ("xs", "sorted(xs)[{}]", "0 1 2 3", ([9, 2, 5, 7],)), "repeat": ("s", "s * {}", "1 2 3 4 5", ("b",)),
}
FUNCTIONS = ("pick", "step", "mix", "turn", "make", "join", "form", "rate")


def like(rng, value):
    """A random value of the same type: small numbers, lists as long, words as long."""
    if isinstance(value, list):
        return [rng.randint(0, 9) for _ in value]
    return "".join(rng.choice("abcXYZ") for _ in range(3)) if isinstance(value, str) else rng.randint(1, 9)


def spot_function(rng, name: str, spot: str, inside: str, shape: int) -> str:
    """def name(...): return <expression with `inside` in the spot>, in two or three lines."""
    arguments, expression, *_ = SPOTS[spot]
    body = [f"return {expression.format(inside)}"] if shape == 0 else [f"y = {expression.format(inside)}", "return y"]
    return "\n    ".join([f"def {name}({arguments}):"] + body)


def telling_input(rng, spot: str, sources: list[str], name: str, canonical: bool):
    """Arguments on which all the given versions differ: the spot's own at level 1, else random ones."""
    for attempt in range(30):
        args = SPOTS[spot][3] if canonical or attempt == 29 else tuple(like(rng, v) for v in SPOTS[spot][3])
        seen = [behaviour(source, name, [args])[0] for source in sources]
        if len(set(seen)) == len(seen) and not any("Error" in s for s in seen):
            return args
    raise AssertionError(f"{spot}: its own input does not tell its versions apart")


def call_text(name: str, args) -> str:
    return f"{name}({', '.join(map(repr, args))})"


def spot_calls(rng, spot: str, source: str, name: str, first: tuple, n: int) -> list[tuple]:
    """Up to n different calls (name, arguments, value) of our source, `first` among them, that raise nothing."""
    function, found = build(source, name), {}
    for args in [first] + [tuple(like(rng, v) for v in SPOTS[spot][3]) for _ in range(3 * n)]:
        if "Error" not in behaviour(source, name, [args])[0]:
            found.setdefault(repr(args), (name, list(args), function(*args)))
    return list(found.values())[:n]


def spot_edit(rng, level, form, name):
    """An edit at a spot: level 1 says the expression that is wanted, levels 2 and 3 a call that fails."""
    spots = rng.sample(sorted(SPOTS), 1 + (level == 3))
    yield [f"edit {form} {spots[0]} {spots[1] if level == 3 else name}"]
    right, broken, wrong = rng.sample(SPOTS[spots[0]][2].split(), 3)
    shape = rng.randrange(2) if level > 1 else 0
    rest = spot_function(rng, rng.choice([f for f in FUNCTIONS if f != name]), spots[1], SPOTS[spots[1]][2].split()[0], 0) + "\n" if level == 3 else ""
    old, new, other = (rest + spot_function(rng, name, spots[0], inside, shape) + "\n" for inside in (broken, right, wrong))
    args = telling_input(rng, spots[0], [old, new, other], name, level == 1)
    calls = spot_calls(rng, spots[0], new, name, args, 8)
    expression = SPOTS[spots[0]][1].format
    ask_for = f"{name} should return {expression(right)}." if level == 1 else f"{call_text(name, args)} should be {calls[0][2]!r}."
    trace = f"{call_text(name, args)} is {behaviour(old, name, [args])[0]}, must be {calls[0][2]!r}\n" * (level > 1) + f"{expression(broken)} -> {expression(right)}"
    yield old, new, other, ask_for, calls, trace


def chain_edit(rng, level, form):
    """An edit in a chain of steps into which one AST mutation was planted; the docstring says what it should do."""
    keys, words, code = chain(rng, level - 2)
    yield [f"edit {form} {key}" for key in keys]
    source = ast.unparse(ast.parse(f'def f(xs):\n    """{", then ".join(words)}"""\n' + in_steps(code).split("\n", 1)[1]))
    core = compose_core(rng, code, source)
    if core and len(core[2]) == 2:
        calls = [("f", [xs], y) for xs, y in core[1]]
        first = [c for c in calls if behaviour(core[2][0], "f", [c[1]]) != [repr(c[2])]]
        changed = next((line for line in source.splitlines() if line not in core[2][0].splitlines()), "")
        if first and changed and ast.dump(ast.parse(core[2][0])) != ast.dump(ast.parse(core[2][1])):
            yield (*(text + "\n" for text in (core[2][0], source, core[2][1])), f"{call_text('f', first[0][1])} should be {first[0][2]!r}.", calls,
                   f"one line must be{changed.replace('    ', ' ', 1)}")


def edit(rng, level):
    """A short file with a fault, and what to write: a search/replace block or a unified diff."""
    form, name = rng.choice(["search", "diff"]), rng.choice(FUNCTIONS)
    draft = spot_edit(rng, level, form, name) if level <= 3 else chain_edit(rng, level, form)
    yield next(draft)
    if (parts := next(draft, None)) is None:
        return
    old, new, other, ask_for, calls, trace = parts
    wanted = {"search": "a search/replace block", "diff": "a diff"}[form]
    yield dict(prompt=f"{old}\n{ask_for} Answer with {wanted}.", solution=make_edit(old, new, form), wrong=make_edit(old, other, form),
               trace=trace, files={"file.py": old}, tests={"calls": calls}, names=(name,) if level <= 3 else ("f", "xs"))


def edit_from_commit(message: str, path: str, old: str, new: str, form: str = "search", seed: int = 0) -> Task:
    """An edit task from real history: the file before, the commit's message, and the file after as the only right result."""
    wrong = make_edit(old, old + ("" if old.endswith("\n") else "\n") + "# done\n", form)
    wanted = {"search": "search/replace blocks", "diff": "a diff"}[form]
    key = "commit " + hashlib.sha256((path + message + old).encode()).hexdigest()[:12]
    return Task("edit", 5, seed, split_of([key]), (key,), f"{path}\n{old}\n{message.strip()} Answer with {wanted}.", make_edit(old, new, form), wrong,
                trace=message.strip(), files={path: old}, tests={"text": new})


def verify_edit(task, answer):
    """The edit applies, and then every call passes (a commit's edit: the text is exactly the new one)."""
    (old,) = task.files.values()
    try:
        new = apply_edit(old, answer)
    except ValueError:
        return 0.0
    if "text" in task.tests:
        return float(new == task.tests["text"])
    return float(all(graded(new, [Call(*call) for call in task.tests["calls"]])))


# ---- swe: a repository with a planted bug, worked on with tools ----------------------------------------------------------------
# One AST node of one function is replaced by a sibling. Before the first test nothing tells which of k siblings is right, so an
# edit made blind is right once in k; the failure line `FAIL pick(7, 3)=10 want 4` tells which. Recovery is to read that line.

MODULES = ("core", "util", "shop", "text", "data", "base")
SWE_TOOLS = "Tools: view FILE, search WORD, edit FILE LINE TEXT, test, submit."


def use_tool(files: dict, call: str) -> tuple[dict, str]:
    """
    One view, search or edit call on {path: text}: (the files after it, what the agent sees).

    edit replaces one line and keeps its indentation, so TEXT is written without. A call that cannot be obeyed changes nothing.
    """
    tool, _, rest = call.strip().partition(" ")
    path, _, more = rest.partition(" ")
    if tool == "search" and rest:
        hits = [f"{p}:{n} {line.strip()}" for p, text in sorted(files.items()) for n, line in enumerate(text.splitlines(), 1) if rest in line]
        return files, "\n".join(hits[:4]) or "nothing found"
    if tool not in ("view", "edit"):
        return files, "unknown tool"
    if path not in files:
        return files, "no such file"
    lines = files[path].splitlines()
    if tool == "view":
        return files, "\n".join(f"{n} {line}" for n, line in enumerate(lines, 1))
    number, _, text = more.partition(" ")
    if not number.isdigit() or not 1 <= int(number) <= len(lines):
        return files, "no such line"
    old = lines[int(number) - 1]
    lines[int(number) - 1] = old[:len(old) - len(old.lstrip())] + text.strip()
    return {**files, path: "\n".join(lines) + "\n"}, "ok"


def failure_line(name: str, args, got: str, want) -> str:
    """What the agent sees of a failing test; `got` is the value's text, or the error's name."""
    return f"FAIL {call_text(name, args)}={got[:24]} want {want!r}"


def swe(rng, level):
    """k candidate fixes and 1 to 3 files, growing with the level; from level 3 on the failing function only calls the faulty one."""
    k, n_files = (2, 3, 3, 3, 3)[level - 1], (1, 1, 2, 2, 3)[level - 1]
    n_functions = 2 * max(1, n_files - 1)
    able = [s for s in sorted(SPOTS) if len(SPOTS[s][2].split()) > k]
    spots, names = rng.sample(able, n_functions), rng.sample(FUNCTIONS, n_functions)
    target = rng.randrange(n_functions)
    name, spot = names[target], spots[target]
    yield [f"swe {spot} {name}"] if level == 1 else [f"swe {spot} {other}" for other in spots if other != spot]
    inside = [rng.choice(SPOTS[s][2].split()[:k + 1]) for s in spots]
    broken = inside[target]
    candidates = [a for a in SPOTS[spot][2].split()[:k + 1] if a != broken]
    right = rng.choice(candidates)
    modules = [rng.choice(MODULES)] if n_files == 1 else rng.sample(MODULES, n_files - 1)
    shapes = [0 if level == 1 else rng.randrange(2) for _ in spots]
    sources = [spot_function(rng, *parts) for parts in zip(names, spots, inside, shapes)]
    files = {f"{m}.py": "\n".join(sources[2 * i:2 * i + 2]) + "\n" for i, m in enumerate(modules)}
    path = f"{modules[target // 2]}.py"
    entry, start = (name, path) if n_files == 1 else ("run", "main.py")
    if n_files > 1:
        arguments = SPOTS[spot][0]
        files["main.py"] = f"from {path[:-3]} import {name}\ndef run({arguments}):\n    return {name}({arguments})\n"
    versions = {a: spot_function(rng, name, spot, a, shapes[target]) for a in [broken] + candidates}
    args = telling_input(rng, spot, list(versions.values()), name, level == 1)
    yield swe_task(rng, level, files, path, start, entry, name, spot, versions, broken, right, args,
                   [(f"{modules[i // 2]}.py", *parts) for i, parts in enumerate(zip(names, spots, sources)) if i != target])


def swe_task(rng, level, files, path, start, entry, name, spot, versions, broken, right, args, others):
    """The tests (shown, fail-to-pass, pass-to-pass) and the two demonstrations of a planted bug."""
    was = lambda call: behaviour(versions[broken], name, [call[1]])[0]
    calls = spot_calls(rng, spot, versions[right], name, args, 14)
    shown, hidden = calls[0], [c for c in calls[1:]]
    faults = [c for c in hidden if was(c) != repr(c[2])][:5] or [shown]
    faults += [shown] * any(all(behaviour(versions[v], name, [c[1]]) == [repr(c[2])] for c in faults) for v in versions if v != right)
    keep = [(start, entry, c[1], c[2]) for c in hidden if was(c) == repr(c[2])][:3]
    keep += [(p, *c) for p, n, s, source in others for c in spot_calls(rng, s, source, n, SPOTS[s][3], 2)]
    lines = {v: [a.strip() for a, b in zip(versions[v].splitlines(), versions[broken].splitlines()) if a != b] for v in versions if v != broken}
    number = 1 + files[path].splitlines().index(next(a for a, b in zip(versions[broken].splitlines(), versions[right].splitlines()) if a != b))
    edits = {v: f"edit {path} {number} {line[0]}" for v, line in lines.items()}
    wrong = rng.choice([v for v in edits if v != right])

    def work(first):  # the demonstration whose first edit is `first`
        look = ([f"search {entry}"] if level >= 4 else []) + [f"view {p}" for p in dict.fromkeys([start, path])]
        turns = [t for call in look for t in (("assistant", call), ("tool", use_tool(files, call)[1]))]
        for v in dict.fromkeys([first, right]):
            got = behaviour(versions[v], name, [args])[0]
            turns += [("assistant" if v == right else "mistake", edits[v]), ("tool", "ok"), ("assistant", "test"),
                      ("tool", "PASS" if v == right else failure_line(entry, args, got, shown[2]))]
        return tuple(turns + [("assistant", "submit")])

    prompt = f"Fix {entry} in {start}." if level < 4 else f"Fix {entry}."
    return dict(prompt=f"{prompt}\n{SWE_TOOLS}", solution=edits[right], wrong=edits[wrong], files=files, turns=work(right), detour=work(wrong),
                trace=f"{call_text(name, args)} must be {shown[2]!r}",
                tests={"shown": [(start, entry, shown[1], shown[2])], "fail_to_pass": [(start, entry, c[1], c[2]) for c in faults],
                       "pass_to_pass": keep, "candidates": list(edits.values())}, names=(name, path[:-3]))


BUNDLE = """import importlib.abc, importlib.util, sys
FILES = {files!r}
class Files(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name + ".py" in FILES else None
    def exec_module(self, module):
        exec(compile(FILES[module.__name__ + ".py"], module.__name__ + ".py", "exec"), module.__dict__)
sys.meta_path.insert(0, Files())
def call(path, function, args):
    return getattr(importlib.import_module(path[:-3]), function)(*args)
"""


def outcomes(files: dict, calls) -> list[bool]:
    """Whether each call (path, function, arguments, value) passes on these files; the repository travels as one program."""
    return graded(BUNDLE.format(files=files), [Call("call", [path, name, list(args)], want) for path, name, args, want in calls])


def report(files: dict, calls) -> str:
    """What the `test` tool says: PASS, or the first of these calls that fails. For the agent's eyes; rewards come from outcomes()."""
    for path, name, args, want in calls:
        done = run(BUNDLE.format(files=files) + f"print(repr(call({path!r}, {name!r}, {list(args)!r})))", limits=LIMITS)
        if done.status == "sandbox error":
            raise RuntimeError("the sandbox broke while it ran a test")
        got = done.stdout.strip() if done.status == "ok" else (done.stderr.strip().rpartition("\n")[2].split(":")[0] or done.status)
        if got != repr(want):
            return failure_line(name, args, got, want)
    return "PASS"


def verify_swe(task, answer):
    """Resolved: after the answer's edit lines every fail-to-pass and every pass-to-pass test passes."""
    files = dict(task.files)
    for line in code_of(answer).splitlines():
        if line.startswith("edit "):
            files, seen = use_tool(files, line)
            if seen != "ok":
                return 0.0
    tests = task.tests["fail_to_pass"] + task.tests["pass_to_pass"]
    return float(all(outcomes(files, tests)))


# ---- terminal: commands, and what the disk holds afterwards -------------------------------------------------------------------

WORDS = ("red", "sun", "oak", "tea", "fog", "ink")
COMMANDS = {  # key: (words, command, effect on {path: text}); a, b are files, d a folder, new and w fresh names and words, k a number
    "mkdir": ("make the folder {new}", "mkdir {new}", lambda s, v: s.update({v["new"] + "/": ""})),
    "touch": ("make the empty file {new}.txt", "touch {new}.txt", lambda s, v: s.update({v["new"] + ".txt": ""})),
    "rm": ("delete {a}", "rm {a}", lambda s, v: s.pop(v["a"])),
    "rename": ("rename {a} to {new}.txt", "mv {a} {new}.txt", lambda s, v: s.update({v["new"] + ".txt": s.pop(v["a"])})),
    "copy": ("copy {a} to {new}.txt", "cp {a} {new}.txt", lambda s, v: s.update({v["new"] + ".txt": s[v["a"]]})),
    "move": ("move {a} into {d}", "mv {a} {d}", lambda s, v: s.update({f"{v['d']}/{v['a']}": s.pop(v["a"])})),
    "write": ("write {w} to {new}.txt", "echo {w} > {new}.txt", lambda s, v: s.update({v["new"] + ".txt": v["w"] + "\n"})),
    "append": ("append {w} to {a}", "echo {w} >> {a}", lambda s, v: s.update({v["a"]: s[v["a"]] + v["w"] + "\n"})),
    "sort": ("sort {a} into {new}.txt", "sort {a} > {new}.txt", lambda s, v: s.update({v["new"] + ".txt": "".join(sorted(s[v["a"]].splitlines(True)))})),
    "head": ("put the first {k} lines of {a} in {new}.txt", "head -n {k} {a} > {new}.txt",
             lambda s, v: s.update({v["new"] + ".txt": "".join(s[v["a"]].splitlines(True)[:v["k"]])})),
    "count": ("put the number of lines of {a} in {new}.txt", "wc -l < {a} > {new}.txt",
              lambda s, v: s.update({v["new"] + ".txt": f"{s[v['a']].count(chr(10))}\n"})),
    "grep": ("put the lines of {a} with {w} in {new}.txt", "grep {w} {a} > {new}.txt",
             lambda s, v: s.update({v["new"] + ".txt": "".join(t for t in s[v["a"]].splitlines(True) if v["w"] in t)})),
}


def terminal(rng, level):
    """Two files and a folder, and `level` things to do with them."""
    kinds = rng.sample(sorted(COMMANDS), level)
    names = rng.sample(("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "jay", "owl"), 3 + level)
    files = {f"{name}.txt": "".join(rng.choice(WORDS) + "\n" for _ in range(4)) for name in names[:2]} | {f"{names[2]}/keep.txt": ""}
    yield [f"{x} {y}" for x, y in zip(kinds, kinds[1:])] or [f"{kinds[0]} {names[0]}"]
    state, words, commands, wrong = dict(files), [], [], []
    for kind, new in zip(kinds, names[3:]):
        usable = sorted(path for path in state if path.endswith(".txt") and "/" not in path and state[path])
        if not usable:
            return
        v = {"a": rng.choice(usable), "d": names[2], "new": new, "k": rng.randint(1, 3)}
        v["w"] = rng.choice(sorted(set(state[v["a"]].split())) if kind == "grep" else WORDS)
        text, command, effect = COMMANDS[kind]
        words.append(text.format(**v))
        commands.append(command.format(**v))
        wrong.append(command.format(**{**v, "new": new + "s", "a": f"{names[2]}/keep.txt", "w": v["w"] + "s"}))
        effect(state, v)
    spot = rng.randrange(level)
    said = ", then ".join(words)
    yield dict(prompt=f"Files: {', '.join(sorted(files))}.\n{said[0].upper() + said[1:]}.", solution="\n".join(commands),
               wrong="\n".join(commands[:spot] + [wrong[spot]] + commands[spot + 1:]), trace="\n".join(f"{w}: {c.split()[0]}" for w, c in zip(words, commands)),
               files=files, tests={"state": state}, names=tuple(names))


def shell(files: dict, script: str) -> dict:
    """{path: text} after a shell script in a copy of the files; a folder with nothing in it counts as "name/"."""
    with Workspace(files, LIMITS) as place:
        if place.exec(script).status == "sandbox error":
            raise RuntimeError("the sandbox broke while it ran commands")
        found = {path: data.decode("utf-8", "replace") for path, (mode, data) in place.tree.items() if stat.S_ISREG(mode)}
        folders = {path + "/": "" for path, (mode, _) in place.tree.items() if stat.S_ISDIR(mode)}
    return found | {path: "" for path in folders if not any(f.startswith(path) for f in [*found, *folders] if f != path)}


def verify_terminal(task, answer):
    """The commands run in a copy of the folder; afterwards it must hold exactly the expected files and folders."""
    return float(shell(task.files, code_of(answer)) == task.tests["state"])


# ---- tools: calls as JSON against small typed interfaces ----------------------------------------------------------------------

APIS = {  # domain: {function: (parameters, words, effect on the state)}
    "stock": {"add": ({"item": "str", "count": "int"}, "add {count} {item}", lambda s, item, count: s.update({item: s[item] + count})),
              "take": ({"item": "str", "count": "int"}, "take {count} {item}", lambda s, item, count: s.update({item: s[item] - count})),
              "clear": ({"item": "str"}, "remove all {item}", lambda s, item: s.update({item: 0})),
              "stock": ({"item": "str"}, "", lambda s, item: s[item])},
    "home": {"light": ({"room": "str", "on": "bool"}, "turn the light in the {room} {on}", lambda s, room, on: s.update({room + " light": on})),
             "heat": ({"room": "str", "degrees": "int"}, "heat the {room} to {degrees}", lambda s, room, degrees: s.update({room + " heat": degrees})),
             "lock": ({"room": "str"}, "lock the {room}", lambda s, room: s.update({room + " locked": True}))},
    "plan": {"book": ({"day": "str", "hour": "int"}, "book {day} at {hour}", lambda s, day, hour: s.update({day: hour})),
             "free": ({"day": "str"}, "free {day}", lambda s, day: s.update({day: 0})),
             "invite": ({"day": "str", "who": "str"}, "invite {who} for {day}", lambda s, day, who: s.update({day + " guest": who}))},
}
VALUES = {"item": WHAT, "count": range(2, 10), "room": ("hall", "attic", "cellar", "kitchen"), "on": (True, False), "degrees": range(15, 25),
          "day": ("Monday", "Tuesday", "Friday", "Sunday"), "hour": range(8, 19), "who": WHO}
TYPES = {"str": str, "int": int, "bool": bool}


def run_calls(domain: str, state: dict, text: str) -> tuple[dict, list]:
    """The state after the calls, one JSON object a line, and what each gave back. "$2" is the result of call 2. ValueError if one is not well-typed."""
    state, results = dict(state), []
    for line in filter(str.strip, text.splitlines()):
        call = json.loads(line)
        if not isinstance(call, dict) or set(call) != {"name", "arguments"} or call["name"] not in APIS[domain] or not isinstance(call["arguments"], dict):
            raise ValueError(f"not a call of a known function: {line}")
        parameters, _, effect = APIS[domain][call["name"]]
        given = {k: results[int(v[1:]) - 1] if isinstance(v, str) and re.fullmatch(r"\$[1-9]", v) else v for k, v in call["arguments"].items()}
        if set(given) != set(parameters) or any(type(v) is not TYPES[parameters[k]] for k, v in given.items()):
            raise ValueError(f"{call['name']} takes {parameters}, got {given}")
        results.append(effect(state, **given))
    return state, results


def call_json(name: str, **arguments) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def tools(rng, level):
    """`level` calls in one domain; from level 3 on a call may need what an earlier one gave back."""
    domain = rng.choice(sorted(APIS))
    kinds = [rng.choice([f for f, (_, words, _) in APIS[domain].items() if words]) for _ in range(level)]
    given = [{k: rng.choice(VALUES[k]) for k in APIS[domain][f][0]} for f in kinds]
    first = [next(iter(g.values())) for g in given]
    yield [f"{a} {x} {b}" for a, x, b in zip(kinds, first, kinds[1:])] or [f"{kinds[0]} {first[0]}"]
    state = {item: n for n, item in enumerate(WHAT, 11)} if domain == "stock" else {}
    said = [APIS[domain][f][1].format(**{k: {True: "on", False: "off"}.get(v, v) if type(v) is bool else v for k, v in g.items()}) for f, g in zip(kinds, given)]
    calls = [call_json(f, **g) for f, g in zip(kinds, given)]
    trace = [f"{w}: {f}" for w, f in zip(said, kinds)]
    if level >= 3 and domain == "stock":  # the last thing to do becomes: as many as there are of another item
        one, other = rng.sample(WHAT, 2)
        said[-1], trace[-1] = f"add as many {one} as there are {other}", f"the {other}: stock gives ${level}\nthen add {one}"
        calls[-1:] = [call_json("stock", item=other), call_json("add", item=one, count=f"${level}")]
    goal, results = run_calls(domain, state, "\n".join(calls))
    swapped = {k: rng.choice([x for x in VALUES[k] if x != v]) for k, v in given[0].items()}
    wrong = "\n".join([call_json(kinds[0], **swapped)] + calls[1:])
    if goal == state or run_calls(domain, state, wrong)[0] == goal:
        return
    signatures = ", ".join(f"{f}({', '.join(f'{k}: {t}' for k, t in p.items())})" for f, (p, _, _) in APIS[domain].items())
    turns = [turn for c, r in zip(calls, results) for turn in (("assistant", c), ("tool", "ok" if r is None else json.dumps(r)))]
    yield dict(prompt=f"Tools: {signatures}.\n{', then '.join(said).capitalize()}." if domain != "plan" else f"Tools: {signatures}.\n{', then '.join(said)}.",
               solution="\n".join(calls), wrong=wrong, trace="\n".join(trace), tests={"domain": domain, "state": state, "goal": goal, "most": len(calls) + 1},
               turns=tuple(turns + [("assistant", "done")]))


def verify_tools(task, answer):
    """Every call is well-typed and the state at the end is the goal; the order of arguments, and of independent calls, is free."""
    t = task.tests
    try:
        state, results = run_calls(t["domain"], t["state"], code_of(answer))
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0.0
    return float(state == t["goal"] and len(results) <= t["most"])


# ---- web: a small WSGI application over SQLite ---------------------------------------------------------------------------------
# The answer is a handler (at level 5 the whole application). It runs in the sandbox behind this frame, which makes the requests and
# hands back plain statuses and documents; what they should have been is compared outside.

WEB = '''
import io, sqlite3
from html import escape
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlencode
from wsgiref.util import setup_testing_defaults
def app(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    form = dict(parse_qsl(environ["QUERY_STRING"] + "&" + environ["wsgi.input"].read(length).decode()))
    handler = globals().get(environ["REQUEST_METHOD"].lower())
    start_response("200 OK" if handler else "404 Not Found", [("Content-Type", "text/html")])
    return [handler(db, form).encode()] if handler else [b""]
def document(html):
    seen, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.append("<" + tag + ">")
    parser.handle_endtag = lambda tag: seen.append("</" + tag + ">")
    parser.handle_data = lambda text: seen.append(text)
    parser.feed(html)
    parser.close()
    return seen
def visit(tables, requests):
    global db
    db = sqlite3.connect(":memory:")
    for create, insert, rows in tables:
        db.execute(create)
        db.executemany(insert, rows)
    pages = []
    for method, form in requests:
        query, status = urlencode(form), []
        environ = {"REQUEST_METHOD": method, "QUERY_STRING": query if method == "GET" else "", "CONTENT_LENGTH": str(len(query)) if method == "POST" else "0",
                   "wsgi.input": io.BytesIO(query.encode())}
        setup_testing_defaults(environ)
        body = b"".join(app(environ, lambda line, headers: status.append(line)))
        pages.append([status[0], document(body.decode())])
    return pages
'''


def web(rng, level):
    """Level 1 a page, 2 a page for a chosen category, 3 also a form that adds a row, 4 with escaped text, 5 the application itself."""
    table, kind = rng.choice(sorted(TABLES)), rng.choice(("list", "count", "top"))
    name, category, values, *numbers = TABLES[table]
    number = rng.choice(numbers)
    kind = "list" if level >= 4 else kind
    yield [f"web {kind} {table} {number if kind == 'top' else name}" + f" {min(level, 3)}" * (kind != "top")]
    tag, what, words = {"list": ("li", name, f"a <ul> with one <li> per {name}, sorted"), "count": ("p", "COUNT(*)", "a <p> with the number of rows"),
                        "top": ("b", f"MAX({number})", f"a <b> with the highest {number}")}[kind]
    query = f'db.execute("SELECT {what} FROM {table}' + f" WHERE {category} = ?" * (level >= 2) + f" ORDER BY {name}" * (kind == "list") + '"'
    query += f', [form["{category}"]])' if level >= 2 else ")"
    cell = "{escape(r[0])}" if level >= 4 else "{r[0]}"
    if kind == "list":
        page = f'''rows = {query}\n    return "<ul>" + "".join(f"<li>{cell}</li>" for r in rows) + "</ul>"'''
    else:
        page = f'r = {query}.fetchone()\n    return f"<{tag}>{cell}</{tag}>"'
    code, said = f"def get(db, form):\n    {page}", f"get(db, form) returns {words}" + f", where {category} is form's" * (level >= 2)
    if level in (3, 4):
        code += (f'\ndef post(db, form):\n    db.execute("INSERT INTO {table} ({name}, {category}) VALUES (?, ?)", [form["{name}"], form["{category}"]])'
                 '\n    return "<p>ok</p>"')
        said += f"; post(db, form) adds {name} and {category} and returns <p>ok</p>"
    if level == 5:
        code = code.replace("def get(db, form):", 'def app(environ, start_response):\n    form = dict(parse_qsl(environ["QUERY_STRING"]))')
        code = code.replace("    return ", '    start_response("200 OK", [("Content-Type", "text/html")])\n    page = ') + "\n    return [page.encode()]"
        said = said.replace("get(db, form) returns", "app(environ, start_response) answers GET with").replace("form's", "the query's")
    rows = [[n + "<i>" * (level >= 4), rng.choice(values), *rng.sample(range(1, 30), 2)] for n in rng.sample(["Ada", "Bo", "Cy", "Di", "Ed", "Flo"], 5)]
    tables = [[f"CREATE TABLE {table} ({name}, {category}, {numbers[0]}, {numbers[1]})", f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows]]
    gets = [["GET", {category: v}] for v in (*values, "x' OR 1=1 --")] if level >= 2 else [["GET", {}]]
    requests = gets + [["POST", {name: "Zed", category: values[0]}], gets[0]] * (level in (3, 4))
    other = tag.translate(str.maketrans("lpb", "tbp"))
    broken = code.replace(f"<{tag}>", f"<{other}>") if rng.random() < 0.5 or kind != "list" else code.replace(f"ORDER BY {name}", f"ORDER BY {name} DESC")
    space = {}
    exec(WEB + code, space)  # our own solution: what it answers is what is expected
    yield dict(prompt=f"SQLite table {table}({name}, {category}, {', '.join(numbers)}).\nWrite Python: {said}.", solution=fenced(code), wrong=fenced(broken),
               trace=f"{query}\n<{tag}>", tests={"tables": tables, "requests": requests, "pages": space["visit"](tables, requests)}, names=(table,))


def verify_web(task, answer):
    """Every request gets the right status and the right document."""
    t = task.tests
    return float(all(graded(WEB + code_of(answer), [Call("visit", [t["tables"], t["requests"]], t["pages"])])))


# ---- gui: choose an element and an action; a state machine read from the page --------------------------------------------------

FIELDS = {"input": ("name", "email", "city", "phone"), "checkbox": ("news", "dark", "sound", "beta"), "select": ("color", "size", "lang")}
OPTIONS = {"color": ("red", "blue", "gray"), "size": ("small", "large"), "lang": ("en", "fr", "de")}
PAGES = ("home", "prefs", "help", "cart")


class Screen(HTMLParser):
    """
    Pages of a small application and the state that actions change: the open page, the values, and what was saved.

    <section id> is a page, the first one is open; <input id> takes text, <input type=checkbox id> toggles, <select id> takes one of
    its options, <a id href=#page> opens a page, <button id=save> stores the values of its page, <button id=clear> empties them.
    """

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.values, self.saved, self.page, here = {}, {}, {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == "section":
            self.here = a["id"]
            self.page = self.page or a["id"]
        elif tag == "option":
            self.elements[self.last]["options"].append(a["value"])
        else:
            self.last = a["id"]
            self.elements[a["id"]] = {"tag": a.get("type", tag), "page": self.here, "href": a.get("href", "")[1:], "options": []}

    def act(self, line: str) -> str:
        """One action: `click ID`, `type ID TEXT` or `select ID OPTION`. Returns what is seen; ValueError where it cannot be done."""
        verb, _, rest = line.strip().partition(" ")
        name, _, text = rest.partition(" ")
        element = self.elements.get(name)
        if element is None or element["page"] != self.page:
            raise ValueError(f"no {name!r} on this page")
        here = [n for n, e in self.elements.items() if e["page"] == self.page]
        match verb, element["tag"]:
            case "type", "input" if text:
                self.values[name] = text
            case "select", "select" if text in element["options"]:
                self.values[name] = text
            case "click", "checkbox":
                self.values[name] = not self.values.get(name, False)
            case "click", "a":
                self.page = element["href"]
            case "click", "button" if name.startswith("save"):
                self.saved.update({n: self.values[n] for n in here if n in self.values})
            case "click", "button":
                self.values = {n: v for n, v in self.values.items() if n not in here}
            case _:
                raise ValueError(f"cannot {verb} {name!r}")
        return self.page

    def state(self):
        return [self.page, dict(sorted(self.values.items())), dict(sorted(self.saved.items()))]


def gui_page(rng, page: str, fields, links) -> str:
    """One page's HTML: its fields, its links to other pages, and a save and a clear button of its own."""
    make = {"input": '<input id="{0}">', "checkbox": '<input type="checkbox" id="{0}">'}
    body = [make[kind].format(name) if kind in make else
            f'<select id="{name}">' + "".join(f'<option value="{o}">' for o in OPTIONS[name]) + "</select>" for kind, name in fields]
    body += [f'<a id="go-{link}" href="#{link}">' for link in links] + [f'<button id="save-{page}">', f'<button id="clear-{page}">']
    return f'<section id="{page}">' + "".join(body) + "</section>"


def gui(rng, level):
    """Level 1 one action, 2 and 3 fields that must be saved, 4 and 5 on another page."""
    home, other = rng.sample(PAGES, 2)
    fields = [(kind, name) for kind, names in FIELDS.items() for name in names]
    fields = rng.sample(fields, min(2 + level, 5))
    todo = fields[:(1, 1, 2, 2, 3)[level - 1]]
    told = {"input": lambda n: rng.choice(WHO), "select": lambda n: rng.choice(OPTIONS[n]), "checkbox": lambda n: ""}
    given = [(kind, name, told[kind](name)) for kind, name in todo]
    yield [f"{a[1]} {b[1]}" for a, b in zip(given, given[1:])] or [f"{level} {given[0][1]} {given[0][2] or home}"]
    target = other if level >= 4 else home
    shown = rng.sample(fields, len(fields))
    html = gui_page(rng, home, shown, [other]) if level < 4 else gui_page(rng, home, [], [other]) + gui_page(rng, other, shown, [home])
    phrase = {"input": "enter {1} as {0}", "select": "choose {1} as {0}", "checkbox": "tick {0}"}
    action = {"input": "type {0} {1}", "select": "select {0} {1}", "checkbox": "click {0}"}
    said, acts = ([table[kind].format(name, text) for kind, name, text in given] for table in (phrase, action))
    if level >= 2:
        said, acts = said + ["save"], acts + [f"click save-{target}"]
    if level >= 4:
        said, acts = [f"on {other}: " + said[0]] + said[1:], [f"click go-{other}"] + acts
    screen, turns = Screen(html), []
    for act in acts:
        turns += [("assistant", act), ("tool", f"page {screen.act(act)}")]
    wrong = acts[:-1] + [rng.choice([f"click go-{other}", f"click clear-{home}"]) if level < 4 else f"click clear-{other}"]
    yield dict(prompt=f"{html}\n{', '.join(said).capitalize() if level < 4 and given[0][0] == 'checkbox' else ', '.join(said)}.", solution="\n".join(acts),
               wrong="\n".join(wrong), trace="\n".join(f"{s}: {a}" for s, a in zip(said, acts)), files={"page.html": html},
               tests={"state": screen.state(), "most": len(acts) + 1}, turns=tuple(turns + [("assistant", "done")]), names=(home, other))


def verify_gui(task, answer):
    """All actions can be done, and leave the page, the values and what was saved as they should be."""
    screen, acts = Screen(task.files["page.html"]), code_of(answer).splitlines()
    try:
        for act in acts:
            screen.act(act)
    except ValueError:
        return 0.0
    return float(screen.state() == task.tests["state"] and len(acts) <= task.tests["most"])


# ---- the table -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    generate: object          # generator(rng, level): yields the keys, then a dict with the rest of a Task
    verify: object            # (task, answer without its thinking) -> share that is right
    guess: object = lambda task, other: other.solution  # an answer drawn at random: another task's, fitted to this one's form


def fill(task, value) -> str:
    """The assertion of a code reasoning task with a value in the place of the question mark."""
    return task.prompt.splitlines()[-1].replace("?", repr(value))


FAMILIES = {
    "compose": Family(compose, verify_calls),
    "stdin": Family(stdin, verify_io),
    "crux_output": Family(crux("output"), verify_crux, lambda task, other: fill(task, other.tests["result"])),
    "crux_input": Family(crux("input"), verify_crux, lambda task, other: fill(task, other.tests["argument"])),
    "math": Family(math_task, verify_math),
    "sql": Family(sql, verify_sql, lambda task, other: other.solution.replace(other.names[0], task.names[0])),
    "edit": Family(edit, verify_edit),
    "terminal": Family(terminal, verify_terminal),
    "tools": Family(tools, verify_tools),
    "web": Family(web, verify_web),
    "gui": Family(gui, verify_gui),
    "swe": Family(swe, verify_swe, lambda task, other: task.tests["candidates"][other.seed % len(task.tests["candidates"])]),
}


def chance(family: str, difficulty: int = 1, n: int = 100, split: str = "test") -> float:
    """
    The random-answer baseline: the share of tasks solved by an answer in the right form that knows nothing of its task.

    Such an answer is that of another random task of the family and level, fitted to the form (a value put into this task's assertion,
    a query on this task's table). For swe it is one of the k candidate fixes: what an agent gets that edits before it tests.
    """
    tasks = [generate(family, difficulty, seed, split) for seed in range(n)]
    return sum(verify(t, FAMILIES[family].guess(t, tasks[i - 1 - i % 7])) == 1.0 for i, t in enumerate(tasks)) / n


FRESH = ("alpha", "gamma", "delta", "omega", "sigma", "kappa", "theta", "zeta")
NOISE = ("", "Please help. ", "This is urgent. ", "Take care. ", "One more: ", "For a friend: ")


def perturb(task: Task, seed: int) -> Task:
    """The same problem in other clothes: its names replaced everywhere, and a remark that does not matter. The template stays."""
    rng = random.Random(f"perturb {seed} {task.prompt}")
    fresh = dict(zip(task.names, rng.sample(FRESH, len(task.names)))) if len(task.names) <= len(FRESH) else {}
    pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, fresh)) + r")(?!\w)") if fresh else None

    def renamed(value):
        if isinstance(value, str):
            return pattern.sub(lambda m: fresh[m[1]], value) if pattern else value
        if isinstance(value, dict):
            return {renamed(k): renamed(v) for k, v in value.items()}
        return type(value)(map(renamed, value)) if isinstance(value, (list, tuple)) else value

    changed = {name: renamed(getattr(task, name)) for name in ("prompt", "solution", "wrong", "trace", "tests", "files", "turns", "detour", "names")}
    return replace(task, **{**changed, "prompt": rng.choice(NOISE) + changed["prompt"]})


# ---- what a model reads and learns ------------------------------------------------------------------------------------------
# A sample in parts is [(text, is it a special token, is it in the loss)]. Only what the assistant says is learned, its end token too.


def turn_parts(role: str, text: str, learned: bool) -> list[tuple[str, bool, bool]]:
    """One turn of a chat. A "mistake" is an assistant's turn that is shown and not imitated."""
    role = "assistant" if role == "mistake" else role
    return [("<|im_start|>", True, False), (f"{role}\n", False, False), (text, False, learned), ("<|im_end|>", True, learned), ("\n", False, False)]


def prompt_parts(task: Task) -> list[tuple[str, bool, bool]]:
    """The prompt and the opening of the answer: what a model is given to complete."""
    return turn_parts("user", task.prompt, False) + [("<|im_start|>", True, False), ("assistant\n", False, False)]


def answer_text(task: Task, thinking: bool) -> str:
    return f"<think>\n{task.trace}\n</think>\n\n{task.solution}" if thinking else task.solution


def task_parts(task: Task, thinking: bool = False) -> list[tuple[str, bool, bool]]:
    """A task with its solution as one sample, with or without the thinking."""
    return turn_parts("user", task.prompt, False) + turn_parts("assistant", answer_text(task, thinking), True)


def trajectory_parts(task: Task, detour: bool = False) -> list[tuple[str, bool, bool]]:
    """An agent's whole episode. Observations, and the one mistake of a detour, are read and not learned."""
    turns = (task.detour if detour else task.turns) or (("assistant", task.solution),)
    return turn_parts("user", task.prompt, False) + [part for role, text in turns for part in turn_parts(role, text, role == "assistant")]


# ---- metrics -------------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """
    The chance that at least one of k samples is right, estimated without bias from c right ones among n >= k:

        1 - C(n - c, k) / C(n, k)      averaged over problems by the caller. Source: the Codex paper.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): need 0 <= c <= n and 1 <= k <= n; draw at least k samples a problem")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def beyond(cost: float | None, references) -> float:
    """
    Mercury's Beyond for one problem: where the cost lies between the dearest (0) and the cheapest (1) reference solution,

        (max - clip(cost, min, max)) / (max - min)      and 0 where the answer is wrong (cost None). The mean over problems is the score.
    """
    low, high = min(references), max(references)
    if cost is None:
        return 0.0
    return 1.0 if high == low else (high - min(max(cost, low), high)) / (high - low)


COUNTER = """
import sys
count = 0
def step(frame, event, arg):
    global count
    frame.f_trace_opcodes = True
    count += event == "opcode"
    return step
sys.settrace(step)
for args in {inputs!r}: {name}(*args)
sys.settrace(None)
print(count)
"""


def instructions(source: str, name: str, inputs) -> int:
    """How many bytecode instructions the function takes on these inputs: a cost that a busy machine does not change."""
    done = run(source + COUNTER.format(inputs=inputs, name=name), limits=LIMITS)
    if done.status != "ok":
        raise RuntimeError(f"counting instructions: {done.status} {done.reason} {done.stderr[-200:]}")
    return int(done.stdout.split()[-1])


def efficiency(task: Task, answer: str) -> float:
    """Beyond of an answer to a compose task, against the same chain step by step and written out in loops."""
    source = code_of(final_answer(answer))
    cost = lambda text: instructions(text, task.tests["calls"][0][0], [args for _, args, _ in task.tests["calls"]])
    return beyond(cost(source) if verify(task, answer) == 1.0 else None, [cost(text) for text in task.tests["references"]])


# ---- the gate: only samples with zero errors, and nothing that an evaluation asks -----------------------------------------------


def pieces(text: str, n: int) -> set:
    """The n-grams of words and signs of a text, as hashes that are the same on every machine."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return {zlib.crc32(" ".join(words[i:i + n]).encode()) for i in range(len(words) - n + 1)}


MULTIPLY, PLUS = np.random.default_rng(7).integers(1, 2**63, (2, 128), dtype=np.uint64) | np.uint64(1)


def minhash(shingles: set) -> np.ndarray:
    """128 minima of 128 hash functions; the share of equal ones estimates the Jaccard similarity of two sets."""
    h = np.fromiter(shingles, np.uint64)[:, None]
    return ((h * MULTIPLY + PLUS) >> np.uint64(32)).min(0) if len(h) else np.zeros(128, np.uint64)


class Contamination:
    """
    Does a text hold something of an evaluation set? By whole text, by 13-gram (GPT-3's length) and by MinHash over 5-grams.

    Pieces that three or more different evaluation texts share are a frame ("Answer with a diff."), not a problem: they do not count.
    """
    def __init__(self, evaluation_texts: dict, n: int = 13, threshold: float = 0.7):
        self.n, self.threshold = n, threshold
        texts = [(name, text) for name, many in evaluation_texts.items() for text in dict.fromkeys(many)]
        self.whole = {" ".join(text.split()): name for name, text in texts}
        often = {length: Counter(p for _, text in texts for p in pieces(text, length)) for length in (5, n)}
        self.frame = {p for p, count in often[5].items() if count >= 3}
        self.grams = {p: name for name, text in texts for p in pieces(text, n) if often[n][p] < 3}
        kept = [(name, pieces(text, 5) - self.frame) for name, text in texts]
        self.names = [name for name, shingles in kept if len(shingles) >= 8]
        self.signatures = np.array([minhash(shingles) for _, shingles in kept if len(shingles) >= 8], np.uint64).reshape(-1, 128)

    def of(self, text: str) -> str:
        """ "" for a clean text, else how it is known and from which set."""
        if (name := self.whole.get(" ".join(text.split()))) is not None:
            return f"text of {name}"
        if hit := next((p for p in pieces(text, self.n) if p in self.grams), None):
            return f"{self.n}-gram of {self.grams[hit]}"
        shingles = pieces(text, 5) - self.frame
        near = (self.signatures == minhash(shingles)).mean(1) if len(shingles) >= 8 and len(self.names) else np.zeros(1)
        return f"near {self.names[int(near.argmax())]}" if near.max() >= self.threshold else ""


def sample_text(task: Task, answer: str | None = None) -> str:
    """What counts when a sample is compared with an evaluation: the question and the answer, without the thinking."""
    return task.prompt + "\n" + final_answer(task.solution if answer is None else answer)


def admit(samples, evaluation_texts: dict) -> tuple[list, Counter]:
    """
    The samples (task, answer) that may be learned from, and the table {reason: how many were refused}, "admitted" among them.

    A sample enters if it verifies in full, is new, comes from a training template, and holds nothing of the evaluation texts
    ({set: [text, ...]}; sample_text() of the evaluation tasks). Where the sandbox broke, it stays out: nobody knows.
    """
    contaminated, kept, seen, table = Contamination(evaluation_texts), [], set(), Counter()
    for task, answer in samples:
        text = sample_text(task, answer)
        try:
            reason = "test template" if task.split == "test" else "duplicate" if text in seen else contaminated.of(text) or contaminated.of(task.prompt)
            reason = reason or ("" if verify(task, answer) == 1.0 else "does not verify")
        except RuntimeError:
            reason = "machinery broke"
        seen.add(text)
        table[reason or "admitted"] += 1
        kept += [(task, answer)] if not reason else []
    return kept, table


# ---- the teacher: an endpoint, a checkpoint of ours, or the program ----------------------------------------------------------
# An author is a function (task, n) -> up to n answers. A checkpoint's author is made where checkpoints are known; all are treated alike.


class BudgetSpent(Exception):
    """The teacher's token budget is used up. What was answered is on disk: a larger budget goes on from there."""


class Teacher:
    """
    An OpenAI-compatible endpoint. Every answer is kept on disk, so a run that is stopped asks nothing twice; the budget counts the
    tokens of all answers in the cache, earlier runs' too. 429, 5xx and lost connections are tried again, after 1, 2, 4, ... seconds
    or as long as the server says.
    """
    def __init__(self, url: str, model: str, cache, budget: int = 1_000_000, retries: int = 6, wait_s: float = 1.0, timeout_s: float = 120.0):
        self.url, self.model, self.cache, self.budget = url.rstrip("/"), model, Path(cache), budget
        self.retries, self.wait_s, self.timeout_s = retries, wait_s, timeout_s
        self.cache.mkdir(parents=True, exist_ok=True)
        self.spent = sum(json.loads(path.read_text())["tokens"] for path in self.cache.glob("*.json"))

    def ask(self, prompt: str, n: int = 1, temperature: float = 0.8) -> list[str]:
        """n answers to a prompt."""
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "n": n, "temperature": temperature}
        path = self.cache / (hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32] + ".json")
        if path.exists():
            return json.loads(path.read_text())["texts"]
        if self.spent >= self.budget:
            raise BudgetSpent(f"{self.spent} of {self.budget} tokens are spent")
        reply = self.post(request)
        texts = [choice["message"]["content"] or "" for choice in reply["choices"]]
        tokens = reply.get("usage", {}).get("total_tokens") or sum(map(len, [prompt, *texts])) // 3
        self.spent += tokens
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps({"texts": texts, "tokens": tokens}))
        os.replace(draft, path)
        return texts

    def post(self, request: dict) -> dict:
        """One request, patiently."""
        import requests

        key = os.environ.get("OPENAI_API_KEY")
        trouble = ""
        for attempt in range(self.retries):
            pause = self.wait_s * 2**attempt
            try:
                reply = requests.post(f"{self.url}/chat/completions", json=request, timeout=self.timeout_s,
                                      headers={"Authorization": f"Bearer {key}"} if key else {})
                if reply.ok:
                    return reply.json()
                trouble = f"HTTP {reply.status_code}: {reply.text[:200]}"
                if reply.status_code != 429 and reply.status_code < 500:
                    break  # our request is wrong; asking again will not mend it
                pause = float(reply.headers.get("Retry-After", pause))
            except (requests.ConnectionError, requests.Timeout) as error:
                trouble = str(error)
            time.sleep(pause)
        raise OSError(f"the teacher at {self.url} does not answer ({trouble}); check --teacher, the model's name and OPENAI_API_KEY")


def program(task: Task, n: int, thinking: bool = False) -> list[str]:
    """The offline author: the generator's own solution, with its trace where thinking is wanted."""
    return [answer_text(task, thinking)][:n]


def from_teacher(teacher: Teacher):
    """The author that asks an endpoint."""
    return lambda task, n: teacher.ask(task.prompt + "\nGive only the answer.", n)


def write_samples(tasks, author, path, n: int = 1, evaluation_texts: dict | None = None) -> Counter:
    """
    Rejection: ask the author for n answers to each task, keep what the gate admits as JSON lines in `path`; the table of verdicts.

    Resumable: the file gets one line a task, with its admitted answers, and tasks that have their line are not asked again.
    """
    path, table, done = Path(path), Counter(), {}
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a line cut by a crash is asked again
                done[tuple(json.loads(line)["id"])] = line
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text("".join(done.values()))
    os.replace(draft, path)
    with path.open("a") as out:
        for task in tasks:
            identity = (task.family, task.difficulty, task.seed, task.split)
            if identity not in done:
                kept, verdicts = admit([(task, answer) for answer in author(task, n)], evaluation_texts or {})
                table += verdicts
                out.write(json.dumps({"id": identity, "answers": [answer for _, answer in kept], "verdicts": verdicts}) + "\n")
                out.flush()
    return table


# ---- debate: for what no program can judge -----------------------------------------------------------------------------------


def scored(reply: str) -> float | None:
    """The number after "score:", from 0 to 10, as -1 to 1; None where the judge gave none."""
    found = re.search(r"score:\s*(\d+(?:\.\d+)?)", reply, re.I)
    return min(max(float(found[1]) / 5 - 1, -1.0), 1.0) if found else None


def debate(question: str, answer: str, judges, weights=None) -> tuple[float, list]:
    """
    How good is an answer that no program can judge? (value in [0, 1], the log of both rounds)

    judges are functions text -> text. First each scores alone; then each reads all reviews, unnamed, and may change its mind. The
    final scores s in [-1, 1] are added with the judges' weights, which are log odds of being right: value = sigmoid(sum w s).
    """
    brief = f"Question:\n{question}\n\nAnswer:\n{answer}\n\nGive one line `score: N` with N from 0 (useless) to 10, then a sentence why."
    first = [judge(brief) for judge in judges]
    reviews = "\n".join(f"- {reply.strip()}" for reply in sorted(first))  # sorted, so that the order gives no name away
    second = [judge(f"{brief}\n\nThe reviews so far:\n{reviews}\n\nKeep your score or change it.") for judge in judges]
    scores = [scored(b) if scored(b) is not None else scored(a) for a, b in zip(first, second)]
    total = sum(w * s for w, s in zip(weights or [1.0] * len(scores), scores) if s is not None)
    return 1 / (1 + math.exp(-total)), [first, second]


def calibrate(judges, pairs) -> list[float]:
    """
    Each judge's weight from labelled pairs (question, better answer, worse answer): the log odds of ranking a pair rightly.

    log(p / (1 - p)) is the best weight of an independent voter; p is smoothed by one right and one wrong. A judge at or below chance
    gets 0: it is not asked to be wrong the other way round.
    """
    weights = []
    for judge in judges:
        marks = [(debate(question, good, [judge])[0], debate(question, bad, [judge])[0]) for question, good, bad in pairs]
        right = sum(a > b for a, b in marks) + 0.5 * sum(a == b for a, b in marks)
        p = (right + 1) / (len(pairs) + 2)
        weights.append(max(0.0, math.log(p / (1 - p))))
    return weights


# ---- command line --------------------------------------------------------------------------------------------------------------


def show(family: str, difficulty: int, seed: int, split: str) -> None:
    """Print one task, and what the verifier says of three answers to it."""
    task = generate(family, difficulty, seed, split)
    print(f"==== {family} · difficulty {difficulty} · {split} · {' | '.join(task.keys)}\n{task.prompt}\n---- thinking\n{task.trace}\n---- solution\n{task.solution}")
    for role, text in task.detour or task.turns:
        print(f"  {role:>9} | " + text.replace("\n", "\n            | "))
    marks = [f"{name} {verify(task, text):.2f}" for name, text in (("solution", task.solution), ("wrong answer", task.wrong), ("empty answer", ""))]
    print("---- verified: " + " · ".join(marks) + "\n")


def faults(family: str, seeds) -> list[str]:
    """What is wrong with the tasks of these seeds; levels and splits take turns. An empty list is the proof."""
    found = []
    for seed in seeds:
        task = generate(family, 1 + seed % 5, seed, ("train", "test")[seed // 5 % 2])
        for what, text, good in (("solution", task.solution, True), ("solution after thinking", answer_text(task, True), True),
                                 ("empty answer", "", False), ("thought without end", "<think>\n" + task.solution, False), ("wrong answer", task.wrong, False)):
            if (verify(task, text) == 1.0) != good:
                found.append(f"{family} {task.difficulty} {task.split} seed {seed}: the {what} {'fails' if good else 'passes'}")
    return found


def produced(family: str, seeds) -> int:
    """How many of these seeds give a task whose solution verifies."""
    return sum(verify(task, task.solution) == 1.0 for task in (generate(family, 1 + seed % 5, seed) for seed in seeds))


def kill_rates(n: int) -> tuple[float, float]:
    """The share of all mutants that 20 chosen and 20 random inputs kill, over n compose tasks; mutants that no input kills do not count."""
    chosen_killed = random_killed = total = 0
    for seed in range(n):
        rng = random.Random(f"kill {seed}")
        source, inputs = in_steps(chain(rng, 1 + seed % 5)[2]), lists(rng, 200)
        chosen, trees = select_tests(source, "f", inputs)
        table = kill_table(source, "f", inputs, trees)
        chosen_killed += table[:, chosen].any(1).sum()
        random_killed += table[:, rng.sample(range(len(inputs)), 20)].any(1).sum()
        total += len(table)
    return chosen_killed / total, random_killed / total


def bench(families, processes: int = 2) -> None:
    """Speed on two processes, what the choice of tests is worth, and the random-answer baseline of every family."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(produced, families, [range(2)] * len(families)))  # warm: sympy, the sandbox
        print(f"{'family':<12} {'tasks/min':>10} {'chance, level 1':>16}")
        total, start = 0, time.perf_counter()
        rates = {}
        for family in families:
            began = time.perf_counter()
            made = sum(pool.map(produced, [family] * processes, [range(k, 60, processes) for k in range(processes)]))
            rates[family] = made / (time.perf_counter() - began) * 60
            total += made
        overall = total / (time.perf_counter() - start) * 60
        for family, luck in zip(families, pool.map(chance, families)):
            print(f"{family:<12} {rates[family]:>10.0f} {luck:>16.2f}")
    chosen, at_random = kill_rates(100)
    print(f"verified tasks a minute, all families alike: {overall:.0f} on {processes} processes")
    print(f"mutants killed by 20 tests: chosen {chosen:.1%}, random {at_random:.1%}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Print a task of each family with its verification; or check, measure or write tasks. A task is a "
                                     "prompt with a solution, a verifier that runs answers, and a dial; see the head of this file.")
    parser.add_argument("--family", choices=list(FAMILIES), help="only this family (default: all)")
    parser.add_argument("--difficulty", type=int, default=1, choices=LEVELS, help="1 to 5 (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="which task (default 0)")
    parser.add_argument("--split", default="train", choices=("train", "test"), help="templates to train on, or the held-out ones (default train)")
    parser.add_argument("--check", type=int, metavar="N", help="on N seeds a family: solutions verify, empty and wrong answers do not")
    parser.add_argument("--bench", action="store_true", help="verified tasks a minute on two processes, mutants killed, chance by family")
    parser.add_argument("--write", metavar="FILE", help="write verified samples of N seeds a family as JSON lines (see --n)")
    parser.add_argument("--n", type=int, default=100, help="seeds a family for --write (default 100)")
    parser.add_argument("--teacher", metavar="URL", help="with --write: an OpenAI-compatible endpoint answers instead of the program")
    parser.add_argument("--model", default="default", help="the teacher's model name (default: default)")
    parser.add_argument("--budget", type=int, default=1_000_000, help="tokens the teacher may use, earlier runs included (default 1,000,000)")
    args = parser.parse_args(argv)
    families = [args.family] if args.family else list(FAMILIES)
    if args.check is not None:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            found = [fault for some in pool.map(faults, families, [range(args.check)] * len(families)) for fault in some]
        print("\n".join(found) or f"{len(families)} families x {args.check} seeds: every solution verifies; no empty, unfinished or wrong answer does")
        return int(bool(found))
    if args.bench:
        bench(families)
    elif args.write:
        teacher = Teacher(args.teacher, args.model, args.write + ".cache", args.budget) if args.teacher else None
        todo = (generate(family, args.difficulty, seed, args.split) for seed in range(args.n) for family in families)
        table = write_samples(todo, from_teacher(teacher) if teacher else program, args.write)
        print("\n".join(f"{count:6d} {reason}" for reason, count in table.most_common()))
    else:
        for family in families:
            show(family, args.difficulty, args.seed, args.split)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, BudgetSpent) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
