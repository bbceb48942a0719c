"""
Tasks: problems whose answers a program can verify.

A family is two functions: its generator writes a task (prompt, solution, a plausible wrong answer, the thinking, tests), its verifier
says how much of any answer is right, by running it. Fine-tuning imitates the solutions, reinforcement learning is paid by the verifier,
evaluation counts what verifies. Start with `Task`, `generate` and `verify`, then read one family (`competitive` is typical).
    split   A task's template is a tuple of keys (say "sort>reverse"). A fifth of all keys is held out, by hash; a task with a held-out
            key is a test task. Every single step is seen in training, a held-out composition never.
    dial    Difficulty 1 is easy for a model of a million parameters, 5 is not; prompts and answers grow with it.
    chance  guesses() are answers that know the form and not the question: what they solve is luck, what is solved beyond it is skill.

Source: sections 4.1 to 4.3 of the IQuest-Coder-V1 report; SWE-smith for the list of planted bugs; Mercury for Beyond.
Departure: the report's tasks come from the web and from frontier models; ours are generated, and small enough for a laptop.

    python tasks.py              # one task of every family, with its verification
    python tasks.py --check 200  # on 200 seeds a family: the solution verifies, an empty and a wrong answer do not
    python tasks.py --bench      # verified tasks a minute, mutants killed by chosen and by random tests
"""
import argparse
import ast
import difflib
import functools
import hashlib
import json
import logging
import math
import multiprocessing
import operator
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

from sandbox import Call, Grade, Io, Limits, Workspace, grade, parse, run

LEVELS = range(1, 6)
LIMITS = Limits(wall_s=10.0, cpu_s=4.0)
FENCED = "```python\n{}\n```"  # how an answer shows a program


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
    turns: tuple = ()         # agent families: (role, text) after the prompt, one way to solve the task in steps
    detour: tuple = ()        # the same with one mistake, its feedback and its repair; role "mistake" is not learned


def split_of(keys) -> str:
    """A fifth of all keys, the same on every machine, is held out; a task with one of them belongs to the test split."""
    return "test" if any(hashlib.sha256(key.encode()).digest()[0] % 5 == 0 for key in keys) else "train"


def generate(family: str, difficulty: int, seed: int, split: str = "train") -> Task:
    """The task of this family, level and seed: the same on every call."""
    if family not in FAMILIES or difficulty not in LEVELS or split not in ("train", "test"):
        raise ValueError(f"no task for family={family!r}, difficulty={difficulty!r}, split={split!r}: "
                         f"take one of {', '.join(FAMILIES)}, a difficulty of 1 to 5, and train or test.")
    for attempt in range(500):  # a generator yields the keys, then the dearer rest; it ends early where chance made a bad task
        draft = FAMILIES[family].generate(random.Random(f"{family}/{difficulty}/{seed}/{attempt}"), difficulty)
        keys = tuple(next(draft))
        if split_of(keys) == split and (rest := next(draft, None)):
            return Task(family, difficulty, seed, split, keys, **rest)
    raise AssertionError(f"{family}, difficulty {difficulty}: no {split} template in 500 attempts")


def final_answer(text: str) -> str:
    """The answer without its thinking. A thought that was never closed has no answer."""
    return (text.partition("</think>")[2] if text.lstrip().startswith("<think>") else text).strip("\n ")


# What is raised by an answer that cannot be read or obeyed; our own machinery, when it breaks, raises RuntimeError or OSError.
UNREADABLE = (ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError, sqlite3.Error,
              sqlite3.Warning)


def verify(task: Task, answer: str) -> float:
    """How much of the answer is right, in [0, 1]. RuntimeError where our own machinery broke: that must not be paid as 0."""
    judge, text = FAMILIES[task.family].verify, final_answer(answer)
    try:
        return float(judge(task, text)) if text else 0.0
    except UNREADABLE:
        return 0.0


# ---- running code: ours in process, a model's in the sandbox ---------------------------------------------------------


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


def graded(source: str, tests) -> Grade:
    """The sandbox's grade; SyntaxError where the source need not even go there."""
    parse(source)
    result = grade(source, tests, LIMITS)
    if result.status == "sandbox error":
        raise RuntimeError("the sandbox broke while it graded an answer")
    return result


def code_of(answer: str) -> str:
    """The last fenced block of the answer, or all of it where there is none."""
    return (re.findall(r"```[^\n`]*\n(.*?)```", answer, re.S) or [answer])[-1]


def pairs(names, alone: str) -> list[str]:
    """The composition keys of a chain: its pairs of neighbours, or `alone` where it has one link only."""
    return [f"{a}>{b}" for a, b in zip(names, names[1:])] or [alone]


def lines(form: str, *columns) -> str:
    """One line a row of the columns."""
    return "\n".join(form.format(*row) for row in zip(*columns))


# ---- mutants: programs one small mistake away ------------------------------------------------------------------------

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
             ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
CALLS = {"max": "min", "min": "max", "sum": "len", "len": "sum", "sorted": "list", "list": "sorted", "abs": "int"}


def mutations(node):
    """The mistakes one AST node allows, as (kind, {attribute: new value}). The list is SWE-smith's."""
    match node:
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield "operator", {"op": OPERATORS[type(op)]()}
            if not isinstance(op, (ast.Add, ast.Mult)):
                yield "operand order", {"left": node.right, "right": node.left}
        case ast.Compare(ops=[op, *_]) if type(op) in OPERATORS:
            yield "comparison", {"ops": [OPERATORS[type(op)]()]}
        case ast.Constant(value=value) if type(value) is int:
            yield "constant", {"value": value + 1}
            yield "constant", {"value": value - 1}
        case ast.UnaryOp(op=ast.USub()):
            yield "sign", {"op": ast.UAdd()}
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield "call", {"func": ast.Name(CALLS[name], ast.Load())}
        case ast.If() | ast.IfExp():
            yield "inverted if", {"test": ast.UnaryOp(ast.Not(), node.test)}
    body = node.body if isinstance(node, (ast.FunctionDef, ast.If)) else []
    for i, statement in enumerate(body):
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.If)) and len(body) > 1:
            yield "removed statement", {"body": body[:i] + body[i + 1:]}


def mutants(source: str):
    """Every program one mutation away from `source`, as (kind, tree)."""
    for i, node in enumerate(ast.walk(parse(source))):
        for kind, change in mutations(node):
            tree = parse(source)
            vars(next(islice(ast.walk(tree), i, None))).update(change)
            yield kind, ast.fix_missing_locations(tree)


def kill_table(source: str, inputs, trees) -> np.ndarray:
    """(mutants, inputs) bool: this input tells this mutant of f from the source."""
    want = behaviour(source, "f", inputs)
    return np.array([[a != b for a, b in zip(behaviour(tree, "f", inputs), want)] for tree in trees]).reshape(-1, len(inputs))


def select_tests(source: str, inputs) -> tuple[list[int], list]:
    """The 20 inputs (their indices) that together kill the most mutants, and the trees of all mutants that any input kills."""
    trees = [tree for _, tree in mutants(source)]
    kills = kill_table(source, inputs, trees)
    alive = kills.any(1)
    kills, weight, chosen = kills[alive], np.ones(alive.sum()), []
    for _ in range(20):
        worth = weight @ kills
        worth[chosen] = -1.0
        chosen.append(int(worth.argmax()))
        weight[kills[:, chosen[-1]]] *= 0.1  # so first every mutant dies once, then those that few tests catch die again
    return chosen, [tree for tree, dies in zip(trees, alive) if dies]


# ---- compose, stdin: competitive programming -------------------------------------------------------------------------
# A problem is a chain of steps on a list of integers. The steps are few, the chains are many: what is learned is to compose.

STEPS = {  # key: (words, expression of the list v, k a small number); each gives a list
    "sort": ("sort", "sorted(v)"), "down": ("sort down", "sorted(v, reverse=True)"), "reverse": ("reverse", "v[::-1]"),
    "even": ("keep the even numbers", "[x for x in v if x % 2 == 0]"), "odd": ("keep the odd numbers", "[x for x in v if x % 2 == 1]"),
    "over": ("keep numbers over {k}", "[x for x in v if x > {k}]"), "under": ("keep numbers under {k}", "[x for x in v if x < {k}]"),
    "add": ("add {k} to each", "[x + {k} for x in v]"), "times": ("multiply each by {k}", "[x * {k} for x in v]"),
    "square": ("square each", "[x * x for x in v]"), "negate": ("negate each", "[-x for x in v]"),
    "abs": ("remove signs", "[abs(x) for x in v]"), "cap": ("limit each to {k}", "[min(x, {k}) for x in v]"),
    "tail": ("skip the first {k}", "v[{k}:]"), "init": ("skip the last {k}", "v[:-{k}]"), "first": ("keep the first {k}", "v[:{k}]"),
    "last": ("keep the last {k}", "v[-{k}:]"), "second": ("take every second", "v[::2]"),
    "unique": ("keep the unique", "list(dict.fromkeys(v))"), "gaps": ("take the gaps", "[b - a for a, b in zip(v, v[1:])]"),
    "sums": ("take running sums", "[sum(v[:i + 1]) for i in range(len(v))]"),
}
ENDS = {  # a number; only at the end of a chain
    "sum": ("sum", "sum(v)"), "count": ("count", "len(v)"), "max": ("take the maximum", "max(v, default=0)"),
    "min": ("take the minimum", "min(v, default=0)"), "evens": ("count the even numbers", "sum(x % 2 == 0 for x in v)"),
    "squares": ("sum the squares", "sum(x * x for x in v)"),
}
FRAMES = {"compose": ("Write f(v): {}", "Code f(v): {}", "f(v) should {}", "Python f(v): {}", "Return f(v): {}"),
          "stdin": ("Read integers, {}, print", "Line of integers: {}, print", "Given integers, {}, print")}


def chain(rng, length: int) -> tuple[list, list, list]:
    """A random chain of steps: their keys, words and expressions."""
    names = []
    while len(names) < length:
        name = rng.choice(list(STEPS if len(names) < length - 1 or rng.random() < 0.7 else ENDS))
        names += [name] if name not in names[-1:] else []
    ks = [rng.randint(2, 5) for _ in names]
    return names, *([(STEPS | ENDS)[name][part].format(k=k) for name, k in zip(names, ks)] for part in (0, 1))


def in_steps(code, last: str = "") -> str:
    """One statement a step; the value may get a name at last."""
    end = [f"{last} = {code[-1]}", f"return {last}"] if last else [f"return {code[-1]}"]
    return "\n    ".join(["def f(v):"] + [f"v = {e}" for e in code[:-1]] + end)


def nested(code) -> str:
    """All steps in one expression, or "" where a step needs its list more than once."""
    if any(len(re.findall(r"\bv\b", e)) != 1 for e in code[1:]):
        return ""
    return "def f(v):\n    return " + functools.reduce(lambda inner, e: re.sub(r"\bv\b", lambda _: inner, e), code)


def looped(code) -> str:
    """The slow style, for Beyond: every comprehension is written out as a loop."""
    text = "def f(v):\n"
    for e in code:
        parts = re.fullmatch(r"\[(.+) for x in v(?: if (.+))?\]", e)
        text += (f"    w = []\n    for x in v:\n        if {parts[2] or True}:\n            w.append({parts[1]})\n    v = w\n"
                 if parts else f"    v = {e}\n")
    return text + "    return v"


def competitive(family: str):
    """The generator of one form: "compose" wants a function, "stdin" a program that reads and prints."""
    def draft(rng, level):
        names, words, code = chain(rng, level)
        frame, source = rng.choice(FRAMES[family]), in_steps(code)
        yield pairs(names, f"{frame} {names[0]}")
        shown = [[rng.randint(0, 9) for _ in range(rng.randint(3, 4))] for _ in range(40)]
        inputs = dict.fromkeys([(), *(tuple(rng.choices(range(-9, 10), k=rng.randint(1, 8))) for _ in range(200))])
        inputs = [(list(xs),) for xs in inputs if list(xs) not in shown]
        if len(set(behaviour(source, "f", inputs))) < 8:
            return  # nearly constant: tests could not tell right from wrong
        f = build(source, "f")
        shown = sorted(shown, key=lambda xs: f(xs) in ([], 0, xs))[:2]  # examples that show something
        chosen, trees = select_tests(source, inputs)
        calls = [("f", list(inputs[i]), f(*inputs[i])) for i in chosen]
        wrong, style = ast.unparse(rng.choice(trees)), (rng.random() < 0.4 and nested(code)) or source
        examples, tests = [f"f({xs}) == {f(xs)}".replace(", ", ",") for xs in shown], {"calls": calls, "references": [source, looped(code)]}
        if family == "stdin":
            read = "v = list(map(int, input().split()))"
            end = "print(*{})" if isinstance(calls[0][2], list) else "print({})"
            printed = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
            style = "\n".join([read] + [f"v = {e}" for e in code[:-1]] + [end.format(code[-1])])
            wrong = "\n".join([wrong, read, end.format("f(v)")])
            examples = [f"{printed(xs)} -> {printed(f(xs))}" for xs in shown]
            tests = {"io": [(printed(xs) + "\n", printed(y) + "\n") for _, (xs,), y in calls]}
        yield dict(prompt="\n".join([frame.format(", then ".join(words)), *examples]), solution=FENCED.format(style),
                   wrong=FENCED.format(wrong), trace=lines("{}: {}", words, code), tests=tests, names=("f", "v"))
    return draft


PRINTED = """
import contextlib, io, sys
def printed(inputs):
    texts = []
    for sys.stdin in map(io.StringIO, inputs):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(program, "main.py", "exec"), {"__name__": "__main__"})
        texts.append(out.getvalue().rstrip())
    return texts
"""


def verify_tests(task, answer):
    """The share of calls that return, or of inputs for which the program prints (in a process for each), exactly what they should."""
    code, calls, io = code_of(answer), task.tests.get("calls", ()), task.tests.get("io", ())
    if io:
        ask = lambda some: Call("printed", [[stdin for stdin, _ in some]], [stdout.rstrip() for _, stdout in some])
        in_one_process = lambda calls: graded(f"program = {code!r}" + PRINTED, calls)
        together = in_one_process([ask(io)])  # so a right program is known in a tenth of the time
        if together.status == "passed":
            return 1.0
        if together.status == "timeout":  # what never ends must not run out of time once for every input
            return in_one_process([ask([each]) for each in io]).pass_rate
    return graded(code, [Call(*call) for call in calls] + [Io(*each) for each in io]).pass_rate


# ---- crux_output, crux_input: what does this program answer, and what was it asked? ----------------------------------

MOVES = [  # (key, type in, type out, expression of v with a number k or a letter c, first level)
    ("+", int, int, "v + k", 1), ("-", int, int, "v - k", 1), ("max", int, int, "max(v, k)", 1), ("min", int, int, "min(v, k)", 1),
    ("first", list, int, "v[0]", 1), ("last", list, int, "v[-1]", 1), ("*", int, int, "v * k", 2), ("%", int, int, "v % k", 2),
    ("//", int, int, "v // k", 2), ("len", list, int, "len(v)", 2), ("tail", list, list, "v[1:]", 2), ("init", list, list, "v[:-1]", 2),
    ("push", list, list, "v + [k]", 2), ("front", list, list, "[k] + v", 2), ("app", str, str, "v + 'c'", 2),
    ("pre", str, str, "'c' + v", 2), ("rest", str, str, "v[1:]", 2), ("most", str, str, "v[:-1]", 2), ("back", list, list, "v[::-1]", 3),
    ("top", list, int, "max(v)", 3), ("sort", list, list, "sorted(v)", 3), ("flip", str, str, "v[::-1]", 3),
    ("up", str, str, "v.upper()", 3), ("two", str, str, "v * 2", 3), ("size", str, int, "len(v)", 3),
    ("if", int, int, "v - k if v > k else v + k", 3), ("abs", int, int, "abs(v - k)", 4), ("sum", list, int, "sum(v)", 4),
    ("each", list, list, "[x + k for x in v]", 4), ("even", int, int, "v // 2 if v % 2 == 0 else v + k", 5),
]
SAMPLE = {int: lambda rng: rng.randint(0, 9), list: lambda rng: [rng.randint(0, 9) for _ in range(rng.randint(2, 4))],
          str: lambda rng: "".join(rng.choice("abcdeg") for _ in range(rng.randint(2, 4)))}


def values_along(code, value) -> list[tuple]:
    """[(the expression with its value put in, what it gives)] from the argument on; raises where the program would."""
    seen = []
    for expression in code:
        text = re.sub(r"\bv\b", lambda _, value=value: repr(value), expression)
        seen.append((text, value := eval(text, {})))  # our own expression over our own literal
    return seen


def crux(direction: str):
    """The generator of one direction: "output" asks for the value, "input" for an argument; the answer is the literal alone."""
    def draft(rng, level):
        kind, moves, v, last = rng.choice([int, list, str][:2 + (level > 1)]), [], rng.choice("abnstvxy"), rng.choice(["", "r", "v"])
        sample = SAMPLE[kind]
        for _ in range(level):
            moves.append(rng.choice([m for m in MOVES if m[1] is kind and m[4] <= level and m not in moves[-1:]]))
            kind = moves[-1][2]
        yield [f"{direction} {key}" for key in pairs([m[0] for m in moves], f"{last} {moves[0][0]} {v}")]
        code = [re.sub(r"\bk\b", str(rng.randint(2, 5)), m[3].replace("'c'", repr(rng.choice("abcdeg")))) for m in moves]
        source = re.sub(r"\bv\b", v, in_steps(code, last))
        argument, *others = (sample(rng) for _ in range(12))
        try:
            along = values_along(code, argument)
            others = [(a, y) for a in others if repr(y := values_along(code, a)[-1][1]) != repr(along[-1][1])]
        except (IndexError, ValueError):  # of an empty list: no first, no largest
            return
        if not others or max(len(repr(y)) for _, y in along) > 24:
            return
        result = along[-1][1]
        if direction == "output":
            asked, solution, wrong, trace = f"f({argument!r}) == ?", result, others[0][1], [f"{e} = {y!r}" for e, y in along]
        else:
            asked, solution, wrong, trace = f"f(?) == {result!r}", argument, others[0][0], [f"{y!r} = {e}" for e, y in along[::-1]]
        yield dict(prompt=f"{source}\n\nassert {asked}", solution=repr(solution), wrong=repr(wrong), trace="\n".join(trace),
                   tests={"source": source, "result": result}, names=("f",))
    return draft


def verify_crux(task, answer):
    """Output: the literal is the value, type included. Input: any literal that gives the value when our own program runs, here."""
    source, value = task.tests["source"], ast.literal_eval(parse(code_of(answer).strip(), "eval"))
    name = re.match(r"def (\w+)", source)[1]
    found = repr(value) if task.family == "crux_output" else behaviour(source, name, [(value,)])[0]
    return found == repr(task.tests["result"])


# ---- math: a formula is right when it equals the solution, however it is written -------------------------------------

# Words are those that code is full of: to a tokenizer of code each is one token.
WHO, WHAT = ("user", "host", "client", "worker", "reader"), ("keys", "maps", "files", "bits", "names", "lines")
GAIN, LOSE = ("gets", "adds", "makes"), ("uses", "returns", "loses")
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def formula(text: str):
    """A sympy expression from text that nobody trusts: integers, one-letter names, + - * / and small powers; ValueError otherwise."""
    import sympy  # takes 0.4 s, so only those who need it wait

    def read(node):
        match node:
            case ast.Constant(value=int(n)) if type(n) is int and abs(n) < 10**9:
                return sympy.Integer(n)
            case ast.Name(id=name) if len(name) == 1 and name.isalpha():
                return sympy.Symbol(name)
            case ast.UnaryOp(op=ast.USub(), operand=a):
                return -read(a)
            case ast.BinOp(left=a, op=ast.Pow(), right=ast.Constant(value=int(n))) if 0 <= n < 10 and len(str(base := read(a))) < 20:
                return base**n  # 9**9**9 and ((9**9)**9)**9 would never end
            case ast.BinOp(left=a, op=op, right=b) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](read(a), read(b))
        raise ValueError(f"{type(node).__name__} is not allowed in a formula")

    if len(text) > 300:
        raise ValueError(f"{len(text)} characters are too many for a formula; 300 at most")
    try:
        return read(parse(text.strip().replace("^", "**"), "eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a formula: {error}") from None


def poly(coefficients, x: str) -> str:
    """[5, 0, 3] -> "3*x**2 + 5"; the lowest power comes first in the list."""
    text = ""
    for n, c in reversed(list(enumerate(coefficients))):
        power = ("", x, f"{x}**{n}")[min(n, 2)]
        text += (" - " if c < 0 else " + ") + (power if abs(c) == 1 and n else f"{abs(c)}*{power}" if n else str(abs(c))) if c else ""
    return "-" + text[3:] if text.startswith(" - ") else text[3:] or "0"


def word_problem(rng, level):
    """Things gained and lost, `level` times."""
    who, what, total = rng.choice(WHO), rng.choice(WHAT), rng.randint(2, 2 + 4 * level)
    verbs, said, trace = [], [f"{who} has {total} {what}"], []
    for _ in range(level):
        verbs.append(rng.choice([v for v in GAIN + LOSE if v not in verbs and (v in GAIN or total > 1)]))
        n = rng.randint(1, 2 + 2 * level) if verbs[-1] in GAIN else -rng.randint(1, min(2 + 2 * level, total - 1))
        said.append(f"{verbs[-1]} {abs(n)}")
        trace.append(f"{total} {'-+'[n > 0]} {abs(n)} = {total + n}")
        total += n
    question = ", ".join(said[:-1]) + f" and {said[-1]}, how many now?"
    return pairs(verbs, f"{verbs[0]} {what}"), question, str(total), str(total + rng.choice([-1, 1, 2])), "\n".join(trace)


def equation(rng, level):
    """Solve a*x + b = c*x + d: at level 1 a shift, at level 2 a multiple too, from level 3 on x stands on both sides."""
    x, v, b, a = rng.randint(1, 5 + level), rng.choice("nxyz"), rng.randint(1, 4 + level), rng.randint(2, 3 + level) if level > 1 else 1
    c = rng.randint(1, a - 1) if level > 2 else 0
    term = lambda k: v if k == 1 else f"{k}*{v}"
    d = (a - c) * x + b
    trace = [f"{term(a - c)} = {d} - {b} = {d - b}"] + [f"{v} = {d - b} / {a - c} = {x}"] * (a - c > 1)
    question = f"solve {term(a)} + {b} = {term(c) + ' + ' if c else ''}{d}."
    return [f"solve {v} {b} {min(level, 3)}"], question, str(x), str(x + rng.choice([1, 2])), "\n".join(trace)


def polynomial(rng, level):
    """Derive a polynomial; from level 2 on, or multiply two out."""
    x = rng.choice("xyztu")
    if level == 1 or rng.random() < 0.5:
        n, a = rng.randint(2, 4), rng.randint(2, 5)
        c = [0] * n + [a] if level == 1 else [rng.randint(1, 9) for _ in range(level)] + [0] * n + [a]
        slope = [i * k for i, k in enumerate(c)][1:]
        trace = lines("{} * {} = {}", *zip(*[(i, k, i * k) for i, k in reversed(list(enumerate(c))) if k and i]))
        return [f"derive {n} {x}"], f"derive {poly(c, x)}.", poly(slope, x), poly(c, x), trace
    p, q = ([rng.randint(1, 5) * (rng.choice([-1, 1]) if level > 2 else 1), rng.randint(1, level - 1)] for _ in range(2))
    c = [p[0] * q[0], p[0] * q[1] + p[1] * q[0], p[1] * q[1]]
    trace = f"{x}**2: {p[1]} * {q[1]} = {c[2]}\n{x}: {p[0] * q[1]} + {p[1] * q[0]} = {c[1]}\n1: {p[0]} * {q[0]} = {c[0]}"
    return [f"expand {p[0]} {x}"], f"expand ({poly(p, x)})*({poly(q, x)}).", poly(c, x), poly([c[0] + 1, *c[1:]], x), trace


def mathematics(rng, level):
    """A word problem, an equation or a polynomial. The answer is written out: no sum is left to multiply, no number to work out."""
    keys, question, answer, wrong, trace = rng.choice([word_problem, equation, polynomial])(rng, level)
    yield keys
    yield dict(prompt=question, solution=answer, wrong=wrong, trace=trace, tests={"answer": answer},
               names=tuple(name for name in WHO + WHAT if re.search(rf"\b{name}\b", question)))


def verify_math(task, answer):
    """Equal as formulas: the difference expands to zero. Worked out: no parentheses, and no more signs than the solution has."""
    answer, right = re.sub(r"^\s*[a-z]\s*=", "", code_of(answer)), task.tests["answer"]
    signs = lambda text: len(re.findall(r"[-+*/^]+", re.sub(r"\s", "", text).lstrip("-"))) + 99 * ("(" in text)
    return signs(answer) <= signs(right) and (formula(answer) - formula(right)).expand() == 0


# ---- sql: the query first, its question second -----------------------------------------------------------------------
# Each clause has words and an SQL form: a question is the words of a query's clauses. The way back, from the question to the query, reads
# the same table, and a task enters only if the round trip gives the same query.

TABLES = {  # table: name, category, the category's values, two numbers
    "files": ("name", "type", ("text", "code", "image"), "size", "lines"),
    "tests": ("name", "status", ("pass", "fail", "skip"), "line", "time"),
    "modules": ("path", "kind", ("local", "remote", "global"), "depth", "version"),
    "frames": ("title", "format", ("float", "int", "bool"), "width", "height"),
    "packages": ("name", "platform", ("mac", "win", "posix"), "month", "year"),
    "items": ("title", "state", ("new", "old", "open"), "count", "rank"),
}
CLAUSES = {  # key: (words, SQL), read back in this order; slots: name, cat, word, num, n, and t for the table
    "list": ("list the {name} of {t}", "select {name} from {t}"), "count": ("count {t}", "select count(*) from {t}"),
    "highest": ("max {num} of {t}", "select max({num}) from {t}"), "lowest": ("min {num} of {t}", "select min({num}) from {t}"),
    "average": ("average {num} of {t}", "select avg({num}) from {t}"),
    "each": ("for each {cat} count {t}", "select {cat}, count(*) from {t}"),
    "most": ("for each {cat} max {num} of {t}", "select {cat}, max({num}) from {t}"),
    "over": (" with {num} over {n}", " where {num} > {n}"), "under": (" with {num} under {n}", " where {num} < {n}"),
    "is": (" with {cat} '{word}'", " where {cat} = '{word}'"),
    "mean": (" with {num} over the average of {t}", " where {num} > (select avg({num}) from {t})"),
    "and-over": (" and {num} over {n}", " and {num} > {n}"), "and-under": (" and {num} under {n}", " and {num} < {n}"),
    "or-is": (" or {cat} '{word}'", " or {cat} = '{word}'"), "group": (" by {cat}", " group by {cat}"),
    "up": (" sorted by {num}", " order by {num}"), "down": (" sorted down by {num}", " order by {num} desc"),
    "limit": (" only {n}", " limit {n}"),
}
NEAR = {"over": "under", "under": "over", "up": "down", "down": "up", "highest": "lowest", "lowest": "highest", "average": "lowest",
        "count": "list", "list": "count", "mean": "under", "and-over": "and-under", "and-under": "and-over", "or-is": "and-over"}
QUERIES = {1: "list over|list under|list is|list up|list down|count over|count is|highest|lowest|average",
           2: "list over up|list is down|list under down|highest is|average is|lowest over|count under|list is up|list over down",
           3: "list over and-under|list is and-over|each group|list is up limit|count is and-over|most group|list over down limit",
           4: "each over group|most is group|list over or-is up|list under and-over down limit|count over or-is|most under group",
           5: "list mean up|list mean and-under|count mean or-is|list mean or-is down limit|most mean group|each mean group"}


def read_question(question: str) -> str:
    """The query a question asks for, clause by clause; ValueError where it says something else."""
    rest, query = question.removesuffix("."), ""
    while rest:
        for words, sql in CLAUSES.values():
            pattern = words.replace("{n}", r"(?P<n>\d+)\b").replace("{", "(?P<").replace("}", r">\w+)")
            if found := re.match(pattern, rest):
                rest, query = rest[found.end():], query + sql.format(**found.groupdict())
                break
        else:
            raise ValueError(f"no clause begins with {rest!r}")
    return query


def database(table: str, seed: int, name: str) -> sqlite3.Connection:
    """A small random table in memory, called `name`. Numbers are distinct in a column, so that an ORDER BY has one answer."""
    columns, rng = TABLES[table], random.Random(f"{table} {seed}")
    rows = zip(rng.sample([a + b for a in "BDKLMR" for b in ("ana", "ilo", "udo")], 9), rng.choices(columns[2], k=9),
               rng.sample(range(3, 28), 9), rng.sample(range(3, 28), 9))
    db = sqlite3.connect(":memory:")
    db.execute(f"CREATE TABLE {name} ({columns[0]} TEXT, {columns[1]} TEXT, {columns[3]} INTEGER, {columns[4]} INTEGER)")
    db.executemany(f"INSERT INTO {name} VALUES (?, ?, ?, ?)", rows)
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    db.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)  # from here on it only reads
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)  # so that no query can fill the memory
    return db


def rows_of(query: str, databases, ordered: bool) -> list:
    """What a query that nobody trusts gives on each database: rows in order, or sorted where the order is free."""
    if len(query) > 1000 or query.lower().count("select") > 3:  # tables that name each other twice grow without end while it is compiled
        raise ValueError("a query has at most 1000 characters and three SELECTs; ours have two")
    found = []
    for db in databases:
        db.set_progress_handler(lambda: 1, 200_000)  # steps, then it is stopped; a query of ours takes a few hundred
        rows = db.execute(query).fetchmany(1000)
        found.append(rows if ordered else sorted(rows, key=repr))
    return found


def sql(rng, level):
    """A query, its question, and three databases on which the query differs from a near miss."""
    table, plan = rng.choice(list(TABLES)), rng.choice(QUERIES[level].split("|"))
    name, cat, values, *numbers = TABLES[table]
    keys = plan.split()
    slots = [dict(name=name, cat=cat, t=table, num=rng.choice(numbers), word=rng.choice(values), n=rng.randint(8, 22)) for _ in keys]
    slots[-1] |= {"n": rng.randint(2, 4)} if keys[-1] == "limit" else {}
    choice = "num" if "{num}" in CLAUSES[keys[-1]][0] else "word"
    yield [f"{plan} {table} {slots[-1][choice]}" if level == 1 else f"{plan} {table}"]
    said, code = ([CLAUSES[key][part].format(**s) for key, s in zip(keys, slots)] for part in (0, 1))
    question, query, ordered = "".join(said) + ".", "".join(code), bool({"up", "down"} & set(keys))
    near = [code[:i] + [CLAUSES[NEAR[key]][1].format(**slots[i])] + code[i + 1:] for i, key in enumerate(keys) if key in NEAR]
    seeds = [rng.randrange(10**6) for _ in range(3)]
    databases = [database(table, seed, table) for seed in seeds]
    want = rows_of(query, databases, ordered)
    near = [other for other in map("".join, near + [code[:-1]] * (level > 1)) if rows_of(other, databases, ordered) != want]
    if read_question(question) != query or not near or not all(want):
        return
    yield dict(prompt=f"{table}({name}, {cat}, {', '.join(numbers)})\n{question}", solution=query + ";",
               wrong=rng.choice(near) + ";", trace=lines("{}: {}", [t.strip(" ,") for t in said], [t.strip() for t in code]),
               tests=dict(query=query, table=table, schema=list(TABLES).index(table), seeds=seeds, ordered=ordered), names=(table,))


def verify_sql(task, answer):
    """Execution accuracy: the same rows on every database."""
    t = task.tests
    databases = [database(list(TABLES)[t["schema"]], seed, t["table"]) for seed in t["seeds"]]
    return rows_of(code_of(answer).strip().rstrip(";"), databases, t["ordered"]) == rows_of(t["query"], databases, t["ordered"])


# ---- edit: search/replace blocks and unified diffs -------------------------------------------------------------------


def text_lines(text: str) -> list[str]:
    """The lines of a text as git counts them: a form feed ends none, as it would for splitlines()."""
    return text.removesuffix("\n").split("\n") if text else []


def hunks(diff: str) -> list[tuple]:
    """[(lines before, lines after, the index of the first one or None)] of a unified diff."""
    found, parts = [], re.split(r"^(@@.*)$", diff, flags=re.M)[1:]
    for head, body in zip(parts[::2], parts[1::2]):
        old, new = ([line[1:] for line in body.split("\n") if line[:1] and line[0] in signs] for signs in (" -", " +"))
        number = re.match(r"@@ -(\d+)", head)
        found.append((old, new, int(number[1]) - bool(old) if number else None))
    return found


def apply_edit(text: str, answer: str) -> str:
    """The text after the answer's search/replace blocks or unified diff; ValueError where one does not fit."""
    now, answer = text_lines(text), answer.replace("\r\n", "\n")
    blocks = re.findall(r"^<<<<<<< SEARCH\n(.*?)^=======\n(.*?)^>>>>>>> REPLACE$", answer, re.S | re.M)
    edits, shift = [(text_lines(search), text_lines(new), None) for search, new in blocks] or hunks(answer), 0
    if not edits:
        raise ValueError("the answer holds neither a search/replace block nor a diff hunk")
    for old, new, hint in edits:
        places = [i for i in range(len(now) - len(old) + 1) if now[i:i + len(old)] == old]
        if hint is not None and hint + shift in places:  # a diff's line number decides between several
            places = [hint + shift]
        elif len(places) != 1 or not old:
            raise ValueError(f"{len(places)} places match the lines to replace; there must be exactly one")
        now[places[0]:places[0] + len(old)] = new
        shift += len(new) - len(old)
    new = "".join(line + "\n" for line in now)
    return new if text.endswith("\n") or not text else new.removesuffix("\n")


def make_edit(old: str, new: str, form: str) -> str:
    """The shortest edit in this form ("search" or "diff") that turns old into new: context grows until it fits in one place."""
    for context in range(old.count("\n") + 2):
        answer = "\n".join([*difflib.unified_diff(text_lines(old), text_lines(new), n=context, lineterm="")][2:])  # without file names
        if form == "search":
            blocks = [["<<<<<<< SEARCH", *before, "=======", *after, ">>>>>>> REPLACE"] for before, after, _ in hunks(answer)]
            answer = "\n".join("\n".join(block) for block in blocks)
        try:
            if apply_edit(old, answer) == new:
                return answer
        except ValueError:
            continue
    raise ValueError("no edit in this form leads from the old text to the new one; do lines end in CR LF, or is only the last newline new?")


SPOTS = {  # small functions with one spot: arguments, expression, what may stand in the spot, an input that tells all of them apart
    "operator": ("a, b", "a {} b", "+ - * // %", (7, 3)), "shift": ("x", "x + {}", "1 2 3 4 5 6 7 8 9", (0,)),
    "scale": ("x", "x * {}", "2 3 4 5 6 7 8 9", (1,)), "reduce": ("xs", "{}(xs)", "max min sum len", ([4, 9, 1],)),
    "index": ("xs", "xs[{}]", "0 1 2 3", ([7, 5, 8, 6],)), "tail": ("xs", "xs[{}:]", "0 1 2 3", ([4, 6, 8, 9],)),
    "head": ("xs", "xs[:{}]", "1 2 3 4", ([4, 6, 8, 9],)), "case": ("s", "s.{}()", "upper lower title swapcase", ("aBc",)),
    "letter": ("s", "s + '{}'", "a b c d e g", ("x",)), "filter": ("xs", "len([x for x in xs if x {} 5])", "< <= > >=", ([1, 5, 7, 8, 9],)),
    "map": ("xs", "[x {} 2 for x in xs]", "+ - * //", ([6, 3],)), "gap": ("a, b", "abs(a {} b)", "+ - *", (3, 8)),
    "rank": ("xs", "sorted(xs)[{}]", "0 1 2 3", ([9, 2, 5, 7],)), "repeat": ("s", "s * {}", "1 2 3 4 5", ("b",)),
}
WANTED = {"search": "search/replace", "diff": "diff"}  # how a prompt names the form of the answer
FUNCTIONS = ("pick", "step", "mix", "turn", "make", "join", "form", "rate")


class Spot:
    """A function `name` with one spot; `shape`: the lines of its body; 0: it stands behind the signature."""
    def __init__(self, name: str, kind: str, shape: int):
        self.name, self.kind, self.shape = name, kind, shape
        self.arguments, self.expression, options, self.own = SPOTS[kind]
        self.options = options.split()

    def source(self, inside: str) -> str:
        body = (" return {}", "\n    return {}", "\n    y = {}\n    return y")[self.shape]
        return f"def {self.name}({self.arguments}):" + body.format(self.expression.format(inside)) + "\n"

    def answers(self, inside: str, inputs) -> list[str]:
        return behaviour(self.source(inside), self.name, inputs)

    def inputs(self, rng, n: int) -> list[tuple]:
        """Its own input, then up to n random ones like it."""
        like = {list: lambda v: [rng.randint(0, 9) for _ in v], str: lambda v: "".join(rng.choice("abcXYZ") for _ in range(3)),
                int: lambda v: rng.randint(1, 9)}
        return [self.own, *{repr(x): x for x in (tuple(like[type(v)](v) for v in self.own) for _ in range(n))}.values()]

    def telling(self, rng, options, canonical: bool) -> tuple:
        """Arguments on which all the given versions differ: its own at the first level, else random ones."""
        own, *others = self.inputs(rng, 30)
        differ = lambda args: len({a for o in options for a in self.answers(o, [args]) if "Error" not in a}) == len(options)
        return own if canonical else next(filter(differ, others), own)

    def calls(self, rng, inside: str, first: tuple, n: int) -> list[tuple]:
        """Up to n different calls (name, arguments, value), `first` among them, that raise nothing."""
        inputs = [first] + [x for x in self.inputs(rng, 2 * n) if x != first]
        answers = zip(inputs, self.answers(inside, inputs))
        return [(self.name, list(x), ast.literal_eval(parse(a, "eval"))) for x, a in answers if "Error" not in a][:n]


def call_text(name: str, args) -> str:
    return f"{name}({', '.join(map(repr, args))})"


def edit(rng, level):
    """One to three functions, one (at level 5 two) with a fault. Level 1 says what is wanted, then a failing call must do."""
    n, form = (1, 1, 2, 3, 3)[level - 1], rng.choice(["search", "diff"])
    kinds = rng.sample(list(SPOTS)[:8 if level < 3 else None], n)
    spots = [Spot(name, kind, 1 + rng.randrange(2) if level > 1 else 1) for name, kind in zip(rng.sample(FUNCTIONS, n), kinds)]
    yield pairs([f"{form} {kind}" for kind in kinds], f"{form} {kinds[0]} {spots[0].name}")
    faulty, order = spots[:1 + (level == 5)], rng.sample(spots, n)
    chosen = {s.name: rng.sample(s.options, 3) for s in spots}  # right, broken, another fault
    old, new, other = ("".join(s.source(chosen[s.name][which if s in faulty else 0]) for s in order) for which in (1, 0, 2))
    said, calls, trace = [], [], []
    for s in faulty:
        args = s.telling(rng, chosen[s.name], level == 1)
        calls += (mine := s.calls(rng, chosen[s.name][0], args, 8))
        right, broken, _ = map(s.expression.format, chosen[s.name])
        said.append(f"{s.name} should return {right}" if level == 1 else f"{call_text(s.name, args)} should be {mine[0][2]!r}")
        trace += [f"{call_text(s.name, args)} is {s.answers(chosen[s.name][1], [args])[0]}"] * (level > 1) + [f"{broken} -> {right}"]
    yield dict(prompt=f"{old}\n{WANTED[form]}: {' and '.join(said)}.", solution=make_edit(old, new, form),
               wrong=make_edit(old, other, form), trace="\n".join(trace), files={"file.py": old}, tests={"calls": calls},
               names=tuple(s.name for s in spots))


def edit_from_commit(message: str, path: str, old: str, new: str, form: str = "search") -> Task:
    """An edit task from real history: the file before, the commit's message, and the file after as the only right result."""
    key = "commit " + hashlib.sha256((path + message + old).encode()).hexdigest()[:12]
    prompt, right = f"{path}\n{old}\n{WANTED[form]}: {message.strip()}", make_edit(old, new, form)
    wrong = make_edit(old, old.removesuffix("\n") + "\n# done" + "\n" * old.endswith("\n"), form)
    return Task("edit", 5, 0, split_of([key]), (key,), prompt, right, wrong, message.strip(), {"text": new}, {path: old})


def verify_edit(task, answer):
    """The edit applies, every call then passes, and no other function has changed (a commit's edit: the text is exactly the new one)."""
    (old,) = task.files.values()
    new = apply_edit(old, answer)
    if "text" in task.tests:
        return new == task.tests["text"]
    called = {name for name, *_ in task.tests["calls"]}
    others = lambda text: {f.name: ast.dump(f) for f in parse(text).body if isinstance(f, ast.FunctionDef) and f.name not in called}
    return others(old).items() <= others(new).items() and all(graded(new, [Call(*call) for call in task.tests["calls"]]).passed)


# ---- swe: a repository with a planted bug, worked on with tools ------------------------------------------------------
# One AST node of one function is replaced by a sibling. Before the first test nothing tells which of k siblings is right, so an edit made
# blind is right once in k; the failure line `FAIL pick(7, 3)=10 want 4` tells which. To recover from an error is to read that line.

MODULES = ("core", "util", "shop", "text", "data", "base")
BUNDLE = """import sys, types
for path, text in {files!r}.items():
    module = sys.modules[path[:-3]] = types.ModuleType(path[:-3])
    exec(compile(text, path, "exec"), module.__dict__)
def call(path, function, args):
    return getattr(sys.modules[path[:-3]], function)(*args)
"""


def use_tool(files: dict, call: str) -> tuple[dict, str]:
    """One view, search or edit call on {path: text}: (the files after it, what the agent sees). An edit keeps the line's indentation."""
    tool, _, rest = call.strip().partition(" ")
    path, number, text = (rest.split(" ", 2) + ["", ""])[:3]
    if tool == "search" and rest:
        hits = [f"{p}:{n} {line.strip()}" for p in sorted(files) for n, line in enumerate(files[p].splitlines(), 1) if rest in line]
        return files, "\n".join(hits[:4]) or "nothing found"
    if tool not in ("view", "edit"):
        return files, "unknown tool"
    if path not in files:
        return files, "no such file"
    now = files[path].splitlines()
    if tool == "view":
        return files, "\n".join(f"{n} {line}" for n, line in enumerate(now, 1))
    if not re.fullmatch(r"\d{1,6}", number) or not 1 <= int(number) <= len(now):
        return files, "no such line"
    old = now[int(number) - 1]
    now[int(number) - 1] = old[:len(old) - len(old.lstrip())] + text.strip()
    return {**files, path: "\n".join(now) + "\n"}, "ok"


def failure_line(name: str, args, got: str, want) -> str:
    """What the agent sees of a failing test; `got` is the value's text, or the error's name."""
    return f"FAIL {call_text(name, args)}={got[:24]} want {want!r}"


def outcomes(files: dict, calls) -> list[bool]:
    """Whether each call (path, function, arguments, value) passes; the files travel as one program, main.py, which imports, the last."""
    files = dict(sorted(files.items(), key=lambda file: file[0] == "main.py"))
    return graded(BUNDLE.format(files=files), [Call("call", [path, name, list(args)], want) for path, name, args, want in calls]).passed


def swe(rng, level):
    """k candidate fixes in one to three files, growing with the level; from level 3 on the failing function only calls the faulty one."""
    k, n_files = (2, 3, 3, 3, 3)[level - 1], (1, 1, 2, 2, 3)[level - 1]
    kinds = rng.sample([kind for kind in SPOTS if len(SPOTS[kind][2].split()) > k], 2 * max(1, n_files - 1))
    spots = [Spot(name, kind, rng.randint(1, 2) if level > 2 else 0) for name, kind in zip(rng.sample(FUNCTIONS, len(kinds)), kinds)]
    bug = rng.choice(spots)
    yield [f"swe {bug.kind} {bug.name}"] if level == 1 else [f"swe {bug.kind} {s.kind}" for s in spots if s is not bug]
    inside = {s: rng.choice(s.options[:k + 1]) for s in spots}
    broken = inside[bug]
    fixes = [option for option in bug.options[:k + 1] if option != broken]
    right, wrong = rng.sample(fixes, 2)
    modules = [f"{module}.py" for module in rng.sample(MODULES, max(1, n_files - 1))]
    home = {s: modules[i // 2] for i, s in enumerate(spots)}
    files = {module: "".join(s.source(inside[s]) for s in spots if home[s] == module) for module in modules}
    path, (start, entry) = home[bug], ("main.py", "run") if n_files > 1 else (home[bug], bug.name)
    if n_files > 1:
        files[start] = "from {0} import {1}\ndef run({2}):\n    return {1}({2})\n".format(path[:-3], bug.name, bug.arguments)
    below = int(level > 2)  # the spot's line, from the signature's
    number = next(n for n, line in enumerate(files[path].splitlines(), 1) if line.startswith(f"def {bug.name}(")) + below
    edits = {option: f"edit {path} {number} {bug.source(option).splitlines()[below].strip()}" for option in fixes}

    args = bug.telling(rng, [broken] + fixes, level <= 2)
    shown, *calls = bug.calls(rng, right, args, 16)
    report = lambda option: failure_line(entry, args, bug.answers(option, [args])[0], shown[2])
    answers = {option: bug.answers(option, [args for _, args, _ in calls]) for option in [broken, *fixes]}
    told = [{option for option in answers if answers[option][i] != answers[right][i]} for i in range(len(calls))]  # who fails which call
    failing = [i for i, options in enumerate(told) if broken in options][:5]
    hidden = [calls[i] for i in failing] + [shown] * (len(set().union(*(told[i] for i in failing))) < len(fixes))
    keep = [call for call, options in zip(calls, told) if broken not in options][:3]
    others = [(home[s], *call) for s in spots if s is not bug for call in s.calls(rng, inside[s], s.own, 2)]
    at_start = lambda found: [(start, entry, *call[1:]) for call in found]
    tests = {"shown": at_start([shown]), "fail_to_pass": at_start(hidden), "pass_to_pass": at_start(keep) + others,
             "candidates": list(edits.values()), "report": report(broken)}  # the report: what a test says before any edit

    def work(*tried):  # a demonstration: look, try these fixes, submit
        looks = [f"search {entry}("] * (level != 3) + [f"view {p}" for p in dict.fromkeys([start, path])] * (level > 2)
        steps = [("assistant", look, use_tool(files, look)[1]) for look in looks]
        for option in tried:
            role, said = ("assistant", "PASS") if option == right else ("mistake", report(option))
            steps += [(role, edits[option], "ok"), ("assistant", "test", said)]
        return episode(steps, "submit")

    where, offered = f" in {start}" * (level == 3), "Tools: view FILE, search WORD, edit FILE LINE TEXT, test, submit."
    yield dict(prompt=f"Fix {entry}{where}.\n{offered}", solution=edits[right], wrong=edits[wrong], files=files, tests=tests,
               trace=f"{call_text(entry, args)} must be {shown[2]!r}", turns=work(right), detour=work(wrong, right),
               names=(bug.name, path[:-3]))


def episode(steps, end: str) -> tuple:
    """The turns of an agent that says these things (role, text, what it sees then), and this at the end."""
    return *(turn for role, text, seen in steps for turn in ((role, text), ("tool", seen))), ("assistant", end)


def verify_swe(task, answer):
    """Resolved: after the answer's edit lines every fail-to-pass and every pass-to-pass test passes."""
    files = task.files
    for line in code_of(answer).splitlines():
        files = use_tool(files, line)[0] if line.startswith("edit ") else files
    return all(outcomes(files, task.tests["fail_to_pass"] + task.tests["pass_to_pass"]))


# ---- terminal: commands, and what the disk holds afterwards ----------------------------------------------------------

WORDS, STEMS = ("one", "old", "new", "top", "low", "end"), ("log", "map", "tag", "key", "node", "cell", "task", "path", "unit", "model")
COMMANDS = {  # key: (words, command, the file it writes, what it writes of the lines of {a}); {a} a file, {d} a folder, {b} a new name
    "mkdir": ("make the folder {b}", "mkdir {b}", "{b}/", lambda rows, v: []),
    "touch": ("make the empty file {b}.txt", "touch {b}.txt", "{b}.txt", lambda rows, v: []),
    "rm": ("delete {a}", "rm {a}", "", None),
    "rename": ("rename {a} to {b}.txt", "mv {a} {b}.txt", "{b}.txt", lambda rows, v: rows),
    "copy": ("copy {a} to {b}.txt", "cp {a} {b}.txt", "{b}.txt", lambda rows, v: rows),
    "move": ("move {a} into {d}", "mv {a} {d}", "{d}/{a}", lambda rows, v: rows),
    "write": ("write {w} to {b}.txt", "echo {w} > {b}.txt", "{b}.txt", lambda rows, v: [v["w"]]),
    "append": ("append {w} to {a}", "echo {w} >> {a}", "{a}", lambda rows, v: [*rows, v["w"]]),
    "sort": ("sort {a} into {b}.txt", "sort {a} > {b}.txt", "{b}.txt", lambda rows, v: sorted(rows)),
    "head": ("put the first {k} lines of {a} in {b}.txt", "head -n {k} {a} > {b}.txt", "{b}.txt", lambda rows, v: rows[:v["k"]]),
    "count": ("count the lines of {a} in {b}.txt", "wc -l < {a} > {b}.txt", "{b}.txt", lambda rows, v: [len(rows)]),
    "grep": ("put the lines of {a} with {w} in {b}.txt", "grep {w} {a} > {b}.txt", "{b}.txt",
             lambda rows, v: [row for row in rows if v["w"] in row]),
}


def terminal(rng, level):
    """`level` things to do with two files and a folder, listed from level 3 on; the wanted state is computed here, not by a shell."""
    kinds, names = rng.sample(list(COMMANDS), level), rng.sample(STEMS, 3 + level)
    files = {f"{name}.txt": "".join(rng.choice(WORDS) + "\n" for _ in range(4)) for name in names[:2]} | {f"{names[2]}/keep.txt": ""}
    yield pairs(kinds, f"{kinds[0]} {names[0]}")
    state, said, commands, wrong = dict(files), [], [], []
    for kind, b in zip(kinds, names[3:]):
        usable = sorted(path for path in state if path.endswith(".txt") and "/" not in path and state[path])
        if not usable:
            return
        v = {"a": rng.choice(usable), "b": b, "d": names[2], "k": rng.randint(1, 3)}
        v["w"] = rng.choice(sorted(set(state[v["a"]].split())) if kind == "grep" else WORDS)
        words, command, path, effect = COMMANDS[kind]
        said.append(words.format(**v))
        commands.append(command.format(**v))
        wrong.append(command.format(**v | {"a": f"{names[2]}/keep.txt", "b": b + "s", "w": v["w"] + "s"}))
        text = state.pop(v["a"]) if command[:2] in ("rm", "mv") else state[v["a"]]
        state |= {path.format(**v): "".join(f"{row}\n" for row in effect(text.splitlines(), v))} if path else {}
    spot, listing = rng.randrange(level), f"{names[0]}.txt {names[1]}.txt {names[2]}/\n" if level > 2 else ""
    yield dict(prompt=f"{listing}{', then '.join(said)}.", solution="\n".join(commands), files=files,
               wrong="\n".join([*commands[:spot], wrong[spot], *commands[spot + 1:]]), trace=lines("{}: {}", said, kinds),
               tests={"state": state}, names=tuple(names))


def verify_terminal(task, answer):
    """The commands run in a copy of the folder; afterwards it must hold exactly the right files, and folders where they are empty."""
    with Workspace(task.files, LIMITS) as place:
        if place.exec(code_of(answer)).status == "sandbox error":
            raise RuntimeError("the sandbox broke while it ran commands")
        kind = lambda mode: "/" * stat.S_ISDIR(mode) + "@" * stat.S_ISLNK(mode)  # a link's data would be the path that it names
        found = {path + kind(mode): data.decode("utf-8", "replace") for path, (mode, data) in place.tree.items()}
    empty = lambda path: not any(other.startswith(path) and other != path for other in found)
    return {path: text for path, text in found.items() if path[-1] != "/" or empty(path)} == task.tests["state"]


# ---- tools: calls as JSON against small typed interfaces -------------------------------------------------------------

APIS = {  # domain: {function: (parameters, words, effect on the state)}
    "stock": {"add": ("item count", "add {count} {item}", lambda s, item, count: s.update({item: s[item] + count})),
              "remove": ("item count", "remove {count} {item}", lambda s, item, count: s.update({item: s[item] - count})),
              "clear": ("item", "clear {item}", lambda s, item: s.update({item: 0})),
              "get": ("item", "", lambda s, item: s[item])},
    "page": {"show": ("part on", "turn {part} {on}", lambda s, part, on: s.update({part + " on": on})),
             "scale": ("part level", "scale {part} to {level}", lambda s, part, level: s.update({part: level})),
             "lock": ("part", "lock {part}", lambda s, part: s.update({part + " locked": True}))},
    "plan": {"start": ("task hour", "start {task} at {hour}", lambda s, task, hour: s.update({task: hour})),
             "stop": ("task", "stop {task}", lambda s, task: s.update({task: 0})),
             "send": ("task who", "send {task} to {who}", lambda s, task, who: s.update({task + " to": who}))},
}
VALUES = {"item": WHAT, "count": range(2, 10), "part": ("image", "table", "header", "graph"), "on": (True, False),
          "level": range(15, 25), "task": ("test", "install", "update", "check"), "hour": range(8, 19), "who": WHO}
TYPES = {name: type(values[0]).__name__ for name, values in VALUES.items()}


def run_calls(domain: str, state: dict, text: str) -> tuple[dict, list]:
    """The state after the calls, one JSON object a line, and what each gave back, "$2" in a later one. ValueError: not well-typed."""
    state, results = dict(state), []
    for line in filter(str.strip, text.splitlines()):
        call = json.loads(line)
        if set(call) != {"name", "arguments"}:
            raise ValueError(f"not a call: {line}")
        parameters, _, effect = APIS[domain][call["name"]]
        given = {k: results[int(v[1:]) - 1] if re.fullmatch(r"\$[1-9]", str(v)) else v for k, v in call["arguments"].items()}
        if {k: type(v).__name__ for k, v in given.items()} != {k: TYPES[k] for k in parameters.split()}:
            raise ValueError(f"{call['name']} takes {parameters}, got {given}")
        results.append(effect(state, **given))
    return state, results


def tools(rng, level):
    """`level` calls in one domain, names in quotes; from level 3 on the last may need what another call gives back."""
    domain = rng.choice(list(APIS))
    api = APIS[domain]
    kinds = rng.choices([f for f, (_, words, _) in api.items() if words], k=level)
    given = [{k: rng.choice(VALUES[k]) for k in api[f][0].split()} for f in kinds]
    firsts = [f"{f} {next(iter(g.values()))}" for f, g in zip(kinds, given)]
    yield pairs(firsts, firsts[0])
    write = lambda name, **arguments: json.dumps({"name": name, "arguments": arguments})
    spoken = [{k: ("off", "on")[v] if type(v) is bool else f'"{v}"' if type(v) is str else v for k, v in g.items()} for g in given]
    said, calls = [api[f][1].format(**g) for f, g in zip(kinds, spoken)], [write(f, **g) for f, g in zip(kinds, given)]
    if level >= 3 and domain == "stock":
        one, other = rng.sample(WHAT, 2)
        said[-1], kinds[-1] = f'add as many "{one}" as there are "{other}"', f"get gives ${level}, add"
        calls[-1:] = [write("get", item=other), write("add", item=one, count=f"${level}")]
    state = {item: n for n, item in enumerate(WHAT, 11)} if domain == "stock" else {}
    goal, results = run_calls(domain, state, "\n".join(calls))
    wrong = "\n".join([write(kinds[0], **{k: rng.choice([x for x in VALUES[k] if x != v]) for k, v in given[0].items()}), *calls[1:]])
    if goal == state or run_calls(domain, state, wrong)[0] == goal:
        return
    needed = {json.loads(call)["name"] for call in calls}
    shown = needed | {rng.choice([f for f in api if f not in needed] or [*needed])}  # one that is not needed, where there is one
    signatures = ", ".join(f"{f}({', '.join(f'{k}: {TYPES[k]}' for k in api[f][0].split())})" for f in api if f in shown)
    steps = [("assistant", call, "ok" if result is None else json.dumps(result)) for call, result in zip(calls, results)]
    yield dict(prompt=f"{signatures}\n{', then '.join(said)}.", solution="\n".join(calls), wrong=wrong,
               trace=lines("{}: {}", said, kinds), turns=episode(steps, "done"),
               tests={"domain": domain, "state": state, "goal": goal, "most": len(calls) + 1})


# ---- web: a small WSGI application over SQLite -----------------------------------------------------------------------
# The answer is an application's handlers. They run in the sandbox behind this frame, which hands back plain statuses and
# documents, and what the table holds in the end.

WEB = '''
import io, sqlite3
from html import escape
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlencode
from wsgiref.util import setup_testing_defaults
def app(environ, start_response):
    form = dict(parse_qsl(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()))
    handler = globals().get(environ["PATH_INFO"][1:])
    start_response("200 OK" if handler else "404 Not Found", [("Content-Type", "text/html")])
    return [handler(db, form).encode()] if handler else [b""]
def document(html):
    seen, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append("<" + tag + ">")
    parser.handle_endtag = lambda tag: seen.append("</" + tag + ">")
    parser.handle_data = seen.append
    parser.feed(html)
    parser.close()
    return [part for part in map(str.strip, seen) if part]
def visit(create, insert, rows, requests):
    global db
    pages = []
    for some in (rows, rows[:1]):  # two tables, so that no constant is right
        db = sqlite3.connect(":memory:")
        db.execute(create)
        db.executemany(insert, some)
        for path, form in requests:
            sent, status = urlencode(form).encode(), []
            environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/" + path, "CONTENT_LENGTH": str(len(sent)), "wsgi.input": io.BytesIO(sent)}
            setup_testing_defaults(environ)
            body = b"".join(app(environ, lambda line, headers: status.append(line)))
            pages.append([status[0], document(body.decode())])
        pages.append(list(db.iterdump()))
    return pages
'''
HANDLERS = {  # function: (what it returns, its body)
    "show": ("<ul> of an escaped <li> per {name}, by {num}", """rows = db.execute("select {name} from {t} order by {num}")
    return "<ul>" + "".join(f"<li>{{escape(r[0])}}</li>" for r in rows) + "</ul>\""""),
    "count": ("<p>count of {t} with {num} over {n}</p>", """r = db.execute("select count(*) from {t} where {num} > {n}").fetchone()
    return f"<p>{{r[0]}}</p>\""""),
    "top": ("<b>max {num}</b>", """r = db.execute("select max({num}) from {t}").fetchone()
    return f"<b>{{r[0]}}</b>\""""),
    "total": ("<i>sum of {num} where {cat} is form's</i>", """cat = [form["{cat}"]]
    r = db.execute("select sum({num}) from {t} where {cat} = ?", cat).fetchone()
    return f"<i>{{r[0]}}</i>\""""),
    "add": ("<p>ok</p>, inserts form's {name} and {num}", """row = [form["{name}"], form["{num}"]]
    db.execute("insert into {t} ({name}, {num}) values (?, ?)", row)
    return "<p>ok</p>\""""),
}


def web(rng, level):
    """`level` handlers over one table. Names hold markup and the requests an SQL injection, so what is not escaped or bound fails."""
    t, kinds = rng.choice(list(TABLES)), rng.sample(list(HANDLERS), level)
    name, cat, values, *numbers = TABLES[t]
    v = {"t": t, "name": name, "cat": cat, "num": rng.choice(numbers), "n": rng.randint(5, 20)}
    yield pairs([f"{kind} {t}" for kind in kinds], f"{kinds[0]} {t} {v['num']}")
    said = [f"{kind}(db, form) -> " + HANDLERS[kind][0].format(**v) for kind in kinds]
    code = "\n".join(f"def {kind}(db, form):\n    " + HANDLERS[kind][1].format(**v) for kind in kinds)
    rows = [[n, rng.choice(values), *rng.sample(range(1, 30), 2)] for n in rng.sample(["Ada", "Bo", "Cy", "<i>Di", "Ed", "Flo & Co"], 5)]
    forms = [{name: "<b>Zed", cat: rows[0][1], v["num"]: "7"}, {name: "x", cat: "x' OR 1=1 --", v["num"]: "8"}]
    visit = [f"CREATE TABLE {t} ({name}, {cat}, {numbers[0]} INTEGER, {numbers[1]} INTEGER)", f"INSERT INTO {t} VALUES (?, ?, ?, ?)", rows,
             [[kind, form] for form in forms for kind in kinds] + [["nothing", {}]]]
    spoiled = [re.sub("<(p|b|i|li)>", "<td>", code), code.replace("select ", "select 1+")]
    yield dict(prompt=f"{t}({name}, {cat}, {', '.join(numbers)})\nPython: {'; '.join(said)}.", solution=FENCED.format(code),
               wrong=FENCED.format(spoiled[rng.random() < 0.5 and "select " in code]),
               trace=lines("{}: {}", kinds, re.findall('"((?:select|insert) [^"]*)"', code)),  # first the queries
               tests={"visit": visit, "pages": build(WEB + code, "visit")(*visit)}, names=(t,))


def verify_web(task, answer):
    """Every request gets the right status and the right document, and the tables are left as they should be."""
    return graded(WEB + code_of(answer), [Call("visit", task.tests["visit"], task.tests["pages"])]).pass_rate


# ---- gui: choose an element and an action; a state machine read from the pages ---------------------------------------

FIELDS = {"input": ("name", "title", "path", "color"), "checkbox": ("debug", "hidden", "strict", "safe")}
PLACES = ("main", "index", "help", "log")
HTML = {"input": "<input id={}>", "checkbox": "<input type=checkbox id={}>", "a": "<a href={}>", "button": "<button id={}>"}
ACTS = {"input": ("set {0} to {1}", "type {0} {1}"), "checkbox": ("check {0}", "click {0}")}


def run_actions(pages: dict, text: str) -> tuple[list, list]:
    """
    ([the open page, the fields, what was saved], the page after each action) of actions, one a line: `click ID` or `type ID TEXT`.
    <a href> opens a page, <button id=save> stores the fields of its page, any other button empties them; else ValueError.
    """
    page, values, saved, seen, there, parser = next(iter(pages)), {}, {}, [], {}, HTMLParser()
    parser.handle_starttag = lambda tag, a: there[page].update({dict(a).get("id") or dict(a)["href"]: dict(a).get("type", tag)})
    for line in text.splitlines():
        if page not in there:
            there[page] = {}  # {id or href: kind} of what stands on it
            parser.feed(pages[page])
        verb, name, typed = (line.split(" ", 2) + ["", ""])[:3]
        here = {n: v for n, v in values.items() if n in there[page]}
        match verb, there[page].get(name), bool(typed):
            case "type", "input", True:
                values[name] = typed
            case "click", "checkbox", False:
                values[name] = not values.get(name, False)
            case "click", "a", False:
                page = name
            case "click", "button", False:
                saved |= here if name == "save" else {}
                values = {n: v for n, v in values.items() if name == "save" or n not in here}
            case _:
                raise ValueError(f"cannot {line!r} on page {page}")
        seen.append(page)
    return [page, values, saved], seen


def gui(rng, level):
    """Level 1 one action, 2 and 3 fields that must be saved, 4 and 5 the same on another page."""
    home, other = rng.sample(PLACES, 2)
    fields = rng.sample([(kind, name) for kind, names in FIELDS.items() for name in names], min(1 + level, 4))
    given = [(kind, name, rng.choice(WHO) if kind == "input" else "") for kind, name in fields[:(1, 1, 2, 2, 3)[level - 1]]]
    yield pairs([name for _, name, _ in given], f"{given[0][1]} {given[0][2] or home} {min(level, 2)}")
    elements = rng.sample(fields, len(fields)) + [("button", "save"), ("button", "clear")] * (level > 1)
    page = lambda parts: "".join(HTML[kind].format(name) for kind, name in parts)
    here, there = (elements, []) if level < 4 else ([], elements)
    pages = {home: page([*here, ("a", other)]), other: page([*there, ("a", home)])}
    said, acts = ([ACTS[kind][part].format(name, text) for kind, name, text in given] for part in (0, 1))
    said = [f"open {other}"] * (level >= 4) + said + ["save"] * (level >= 2)
    acts = [f"click {other}"] * (level >= 4) + acts + ["click save"] * (level >= 2)
    goal, seen = run_actions(pages, "\n".join(acts))
    wrong = [*acts[:-1], rng.choice(["click clear", f"click {other if level < 4 else home}"])]
    html = lines("{}: {}", *zip(*list(pages.items())[:1 + (level >= 4)]))
    yield dict(prompt=f"{html}\n{', then '.join(said)}.", solution="\n".join(acts), wrong="\n".join(wrong), files=pages,
               trace=lines("{}: {}", said, acts), tests={"goal": goal, "most": len(acts) + 1}, names=(home, other),
               turns=episode([("assistant", act, f"page {page}") for act, page in zip(acts, seen)], "done"))


def verify_steps(task, answer):
    """All steps can be done, they end in the state that is wanted, and they are few more than needed."""
    t, text = task.tests, code_of(answer)
    state, done = run_calls(t["domain"], t["state"], text) if task.family == "tools" else run_actions(task.files, text)
    return state == t["goal"] and len(done) <= t["most"]


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    generate: object          # generator(rng, level): yields the keys, then a dict with the rest of a Task
    verify: object            # (task, answer without its thinking) -> share that is right


FAMILIES = {
    "compose": Family(competitive("compose"), verify_tests),
    "stdin": Family(competitive("stdin"), verify_tests),
    "crux_output": Family(crux("output"), verify_crux),
    "crux_input": Family(crux("input"), verify_crux),
    "math": Family(mathematics, verify_math),
    "sql": Family(sql, verify_sql),
    "edit": Family(edit, verify_edit),
    "swe": Family(swe, verify_swe),
    "terminal": Family(terminal, verify_terminal),
    "tools": Family(tools, verify_steps),
    "web": Family(web, verify_web),
    "gui": Family(gui, verify_steps),
}


def renamed(value, names: dict):
    """The value, plain data, with these names replaced wherever they stand as whole words."""
    if isinstance(value, str) and names:
        return re.sub(r"(?<![\w.])(" + "|".join(map(re.escape, names)) + r")(?!\w)", lambda m: names[m[1]], value)
    if isinstance(value, dict):
        return {renamed(k, names): renamed(v, names) for k, v in value.items()}
    return type(value)(renamed(v, names) for v in value) if isinstance(value, (list, tuple)) else value


def guesses(problems, n: int = 1) -> list[list[str]]:
    """Up to n answers to each task of one family and level that know its form and not its question, made from the next tasks."""
    def guess(task, other):  # its solution under this one's names; of a repository agent, whose first fix has failed, one not tried
        left = [fix for fix in task.tests.get("candidates", ()) if fix != task.wrong]
        return left[other.seed % len(left)] if left else renamed(other.solution, dict(zip(other.names, task.names)))

    next_ones = lambda i: [problems[(i + 1 + j) % len(problems)] for j in range(min(n, len(problems) - 1))]
    return [[guess(task, other) for other in next_ones(i)] for i, task in enumerate(problems)]


FRESH = ("alpha", "gamma", "delta", "omega", "sigma", "kappa", "theta", "zeta")
NOISE = ("", "Please help. ", "This is urgent. ", "Take care. ", "One more: ", "For a friend: ")


def perturb(task: Task, seed: int) -> Task:
    """The same problem in other clothes: its names replaced everywhere, and a remark that does not matter. The template stays."""
    rng = random.Random(f"perturb {seed} {task.prompt}")
    fresh = dict(zip(task.names, rng.sample(FRESH, len(task.names))))
    changed = {name: renamed(value, fresh) for name, value in vars(task).items() if name not in ("family", "split", "keys")}
    return replace(task, **changed | {"prompt": rng.choice(NOISE) + changed["prompt"]})


# ---- what a model reads and learns -----------------------------------------------------------------------------------
# A sample in parts is [(text, is it a special token, is it in the loss)]. Only what the assistant says is learned, its end token too.

OPENING = [("<|im_start|>", True, False), ("assistant\n", False, False)]  # of an answer


def turn_parts(role: str, text: str, learned: bool) -> list[tuple[str, bool, bool]]:
    """One turn of a chat. A "mistake" is an assistant's turn that is shown and not imitated."""
    role = "assistant" if role == "mistake" else role
    return [("<|im_start|>", True, False), (f"{role}\n", False, False), (text, False, learned), ("<|im_end|>", True, learned),
            ("\n", False, False)]


def chat_parts(task: Task, turns, learning: bool = True) -> list[tuple[str, bool, bool]]:
    """The prompt and these turns, of which the assistant's are learned."""
    return [part for role, text in (("user", task.prompt), *turns) for part in turn_parts(role, text, learning and role == "assistant")]


def prompt_parts(task: Task) -> list[tuple[str, bool, bool]]:
    """The prompt and the opening of the answer: what a model is given to complete."""
    return chat_parts(task, ()) + OPENING


def asked_parts(task: Task) -> list[tuple[str, bool, bool]]:
    """The same for an evaluation: of a repository agent's episode all before the repair, the failed fix and its test included."""
    mistake = next((i for i, (role, _) in enumerate(task.detour) if role == "mistake"), -4)
    return chat_parts(task, task.detour[:mistake + 4], learning=False) + OPENING  # 4: the edit, "ok", the test, how it fails


def answer_text(task: Task, thinking: bool) -> str:
    return f"<think>\n{task.trace}\n</think>\n\n{task.solution}" if thinking else task.solution


def task_parts(task: Task, thinking: bool = False) -> list[tuple[str, bool, bool]]:
    """A task with its solution as one sample, with or without the thinking."""
    return chat_parts(task, [("assistant", answer_text(task, thinking))])


def trajectory_parts(task: Task, detour: bool = False) -> list[tuple[str, bool, bool]]:
    """An agent's whole episode. Observations, and the one mistake of a detour, are read and not learned."""
    return chat_parts(task, (task.detour if detour else task.turns) or [("assistant", task.solution)])


# ---- metrics ---------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples is right, without bias from c right ones among n >= k: 1 - C(n - c, k) / C(n, k) (Codex paper)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): need 0 <= c <= n and 1 <= k <= n; draw at least k samples a problem")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def beyond(cost: float, references) -> float:
    """Mercury's Beyond: from 0, as dear as the dearest reference, to 1, as cheap as the cheapest; a wrong answer costs inf."""
    low, high = min(references), max(references)
    if high == low:
        return float(cost < math.inf)
    return (high - min(max(cost, low), high)) / (high - low)


COUNTER = """
import io, sys
count, program = [0], dict(__name__="program")
def step(frame, event, arg):
    frame.f_trace_opcodes = True
    count[0] += event == "opcode"
    return step
out, sys.stdout = sys.stdout, io.StringIO()
exec({source!r}, program)
sys.settrace(step)
for args in {inputs!r}: program[{name!r}](*args)
sys.settrace(None)
print(*count, file=out, flush=True)
"""


def instructions(source: str, name: str, inputs) -> float:
    """How many bytecode instructions the function takes on these inputs: a cost that a busy machine does not change; inf: too many."""
    done = run(COUNTER.format(source=source, inputs=inputs, name=name), limits=LIMITS)
    if done.status == "sandbox error":
        raise RuntimeError("the sandbox broke while it counted instructions")
    count = re.fullmatch(r"(\d{1,15})\n", done.stdout)
    return int(count[1]) if done.status == "ok" and count else math.inf


def efficiency(task: Task, answer: str) -> float:
    """Beyond of an answer to a compose task, against the same chain step by step and written out in loops."""
    name, inputs = task.tests["calls"][0][0], [args for _, args, _ in task.tests["calls"]]
    cost = instructions(code_of(final_answer(answer)), name, inputs) if verify(task, answer) == 1.0 else math.inf
    return beyond(cost, [instructions(source, name, inputs) for source in task.tests["references"]])


# ---- the gate: only samples with zero errors, and nothing that an evaluation asks ------------------------------------

MULTIPLY, PLUS = np.random.default_rng(7).integers(1, 2**63, (2, 128), dtype=np.uint64) | np.uint64(1)
NAMES = frozenset(name.lower() for name in (*WHO, *WHAT, *FUNCTIONS, *MODULES, *STEMS, *PLACES, *TABLES, "f", "v"))


def symbols(text: str) -> list[str]:
    """Words and signs, in lower case; how they are spaced does not count."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def question_text(task: Task) -> str:
    """What a task asks: its prompt and the files that the prompt does not show."""
    shown = " ".join(symbols(task.prompt))
    return "\n".join([task.prompt, *(text for text in task.files.values() if " ".join(symbols(text)) not in shown)])


def sample_text(task: Task, answer: str | None = None) -> str:
    """What counts when a sample is compared with an evaluation: the question, and the answer without the thinking."""
    return question_text(task) + "\n" + final_answer(task.solution if answer is None else answer)


def pieces(text: str, n: int) -> set:
    """The n-grams of a text's words, as hashes that are the same on every machine."""
    words = re.findall(r"\w+", text.lower())
    return {zlib.crc32(" ".join(words[i:i + n]).encode()) for i in range(len(words) - n + 1)}


def minhash(shingles: set) -> np.ndarray:
    """128 minima of 128 hash functions; the share of equal ones estimates the Jaccard similarity of two sets."""
    return ((np.fromiter(shingles, np.uint64)[:, None] * MULTIPLY + PLUS) >> np.uint64(32)).min(0)


def shared(texts) -> set:
    """The 5-grams and 13-grams that three or more texts share: a frame ("Answer with a diff."), not a problem."""
    counts = Counter(piece for text in texts for n in (5, 13) for piece in pieces(text, n))
    return {piece for piece, count in counts.items() if count >= 3}


@functools.cache
def generator_language() -> tuple[set, set]:
    """(the pieces that training tasks of a family share, all words of those tasks): what a clean sample is made of."""
    texts = [[sample_text(generate(family, level, seed)) for level in LEVELS for seed in range(20)] for family in FAMILIES]
    return set().union(*map(shared, texts)), set(symbols(" ".join(map(" ".join, texts))))


class Contamination:
    """
    Does a text hold an evaluation problem? Four questions, the sharpest first; for the last two a frame is no evidence.
        text      a whole problem of six words or more stands in it, word for word (a question ends with a full stop: no other begins so)
        renamed   it does where names are left out: the pools' own, and words that neither the evaluation nor the generator knows
        13-grams  half of a problem's 13-grams (GPT-3's length), and 13 of them
        near      MinHash says that 40 % of the 5-grams are the same, where there are more than 13
    """
    def __init__(self, evaluation_texts: dict):
        texts = {text: name for name, many in evaluation_texts.items() for text in many}
        common, known = generator_language()
        self.known, self.frame = known.union(*map(symbols, texts)), common | shared(texts)
        self.names, self.starts, self.grams, near = [*texts.values()], {}, [], []  # starts: a problem's first words -> all of it, its set
        for text, name in texts.items():
            for kind, form in (("text", symbols(text)), ("renamed", self.nameless(symbols(text)))):
                self.starts.setdefault((kind, *form[:6]), []).append((form, name))
            grams, shingles = (pieces(text, n) - self.frame for n in (13, 5))
            self.grams += [(grams, name)] if len(grams) >= 13 else []
            near.append(minhash(shingles if len(shingles) > 13 else {0}))
        self.signatures = np.array(near)

    def nameless(self, words: list[str]) -> list[str]:
        return ["_" if word in NAMES or word.isidentifier() and word not in self.known else word for word in words]

    def of(self, text: str) -> str:
        """ "" for a clean text, else how it is known and from which set."""
        words = symbols(text)
        strange = any(word.isidentifier() and word not in self.known and word not in NAMES for word in words)
        for kind, form in (("text", words), ("renamed", self.nameless(words) if strange else [])):
            for at in range(len(form) - 5):
                for problem, name in self.starts.get((kind, *form[at:at + 6]), ()):
                    if form[at:at + len(problem)] == problem:
                        return f"{kind} of {name}"
        held = pieces(text, 13)
        for grams, name in self.grams:
            if len(grams & held) >= max(13, len(grams) / 2):
                return f"13-grams of {name}"
        if self.names and len(shingles := pieces(text, 5) - self.frame) > 13:
            alike = (self.signatures == minhash(shingles)).mean(1)
            return f"near {self.names[alike.argmax()]}" if alike.max() >= 0.4 else ""
        return ""


ASKED = 10_000  # the seeds from here on are the evaluation's


@functools.cache
def own_evaluation() -> Contamination:
    """The gate against our own evaluation: the first 32 questions of every family at the two levels that `train.py --eval` asks."""
    asked = [generate(family, level, ASKED + k, "test") for family in FAMILIES for level in (1, 2) for k in range(32)]
    return Contamination({"evaluation": map(question_text, asked)})


def refusal(task: Task, answer: str, contaminated: Contamination) -> str:
    """Why a sample may not be learned from; "" if it verifies, comes from a training template and holds no evaluation problem."""
    if "test" in (task.split, split_of(task.keys)):
        return "test template"
    try:
        return contaminated.of(sample_text(task, answer)) or ("" if verify(task, answer) == 1.0 else "does not verify")
    except RuntimeError:
        return "machinery broke"  # nobody knows, so it stays out


def admit(samples, contaminated: Contamination | None = None, refusals=None) -> tuple[list, Counter]:
    """(The samples (task, answer) that may be learned from, {reason or "admitted": how many}); refusals: what refusal() said before."""
    samples, contaminated = list(samples), contaminated or own_evaluation()
    kept, seen, table = [], set(), Counter()
    for (task, answer), reason in zip(samples, refusals or [refusal(*sample, contaminated) for sample in samples]):
        text = sample_text(task, answer)
        reason = reason or "duplicate" * (text in seen)
        seen.add(text)
        table[reason or "admitted"] += 1
        kept += [] if reason else [(task, answer)]
    return kept, table


# ---- the teacher: an endpoint, a checkpoint of ours, or the program --------------------------------------------------
# An author is a function (task, n) -> up to n answers. What it writes is judged alike, whoever it is.


class BudgetSpent(Exception):
    """The teacher's token budget is used up. What was answered is on disk: a larger budget goes on from there."""


class Teacher:
    """
    An OpenAI-compatible endpoint. Every answer is kept on disk, so a run that is stopped asks nothing twice; the budget counts the
    tokens of all answers in the cache. What may pass is tried again, after longer and longer pauses or when the server says.
    """
    def __init__(self, url: str, model: str, cache, budget: int = 1_000_000, tries: int = 7, wait_s: float = 0.5):
        import requests
        from requests.adapters import HTTPAdapter, Retry

        self.url, self.model, self.cache, self.budget, self.session = url.rstrip("/"), model, Path(cache), budget, requests.Session()
        passing = [429, *range(500, 600)]  # a request that is refused otherwise is wrong; asking again will not mend it
        again = Retry(tries - 1, backoff_factor=wait_s, status_forcelist=passing, allowed_methods=None, raise_on_status=False)
        self.session.mount(self.url, HTTPAdapter(max_retries=again))
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would warn of every pause
        if key := os.environ.get("OPENAI_API_KEY"):
            self.session.headers["Authorization"] = f"Bearer {key}"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.spent = sum(json.loads(path.read_text())["tokens"] for path in self.cache.glob("*.json"))

    def ask(self, prompt: str, n: int = 1) -> list[str]:
        """n answers to a prompt."""
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "n": n, "temperature": 0.8}
        path = self.cache / (hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32] + ".json")
        if path.exists():
            return json.loads(path.read_text())["texts"]
        if self.spent >= self.budget:
            raise BudgetSpent(f"{self.spent} of {self.budget} tokens are spent; --budget sets another limit")
        try:
            reply = self.session.post(f"{self.url}/chat/completions", json=request, timeout=120)
            if not reply.ok:
                raise OSError(f"HTTP {reply.status_code}: {reply.text[:200]}")
            told = reply.json()
            texts = [choice["message"]["content"] or "" for choice in told["choices"]]
            tokens = int((told.get("usage") or {}).get("total_tokens") or sum(map(len, [prompt, *texts])) // 3)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # it refuses, or what comes are no chat completions
            raise OSError(f"the teacher at {self.url} gives no answers ({error!r}); check --teacher, --model and OPENAI_API_KEY") from None
        self.spent += tokens
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps({"texts": texts, "tokens": tokens}))
        draft.replace(path)
        return texts


def from_teacher(teacher: Teacher):
    """The author that asks an endpoint."""
    return lambda task, n: teacher.ask(task.prompt + "\nGive only the answer.", n)


def from_checkpoint(model, tokenizer, longest: int = 160):
    """The author that is a checkpoint of ours: what it draws and execution accepts, it may learn from (self-training by rejection)."""
    import torch

    device = model.lm_head.weight.device
    stop, rng = tokenizer.special["<|im_end|>"], torch.Generator(device=device)

    def author(task, n):
        prompt = tokenizer.encode_parts(prompt_parts(task))[0]
        rows = torch.tensor([prompt] * n, device=device)
        drawn = model.generate(rows, longest, stop_ids=(stop,), generator=rng.manual_seed(task.seed))[:, len(prompt):].tolist()
        return [tokenizer.decode(row[:row.index(stop)] if stop in row else row) for row in drawn]
    return author


def write_samples(tasks, author, path, n: int = 1) -> Counter:
    """A line in `path` for each task that has none: those of the author's n answers that the gate admits. Gives the table of verdicts."""
    path, table = Path(path), Counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as out:
        out.seek(0)
        *whole, cut = out.read().split(b"\n")
        try:
            done = {tuple(json.loads(line)["id"]) for line in whole}
            if cut[:6] != b'{"id":'[:len(cut)]:
                raise ValueError("not the beginning of a line of ours")
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} holds something else than the lines of an earlier --write; name another file") from None
        out.truncate(out.tell() - len(cut))  # a line cut by a crash is gone, its task is asked again
        for task in tasks:
            identity = (task.family, task.difficulty, task.seed, task.split)
            if identity not in done:
                kept, verdicts = admit([(task, answer) for answer in author(task, n)])
                table += verdicts
                line = json.dumps({"id": identity, "answers": [answer for _, answer in kept], "verdicts": verdicts})
                out.write(b"" if verdicts["machinery broke"] else line.encode() + b"\n")  # what nobody knows is asked again
                out.flush()
    return table


# ---- debate: for what no program can judge ---------------------------------------------------------------------------


def scored(reply: str) -> float | None:
    """The number after "score:", from 0 to 10, as -1 to 1; None where the judge gave none."""
    found = re.search(r"score:\s*(\d+(?:\.\d+)?)", reply, re.I)
    return min(max(float(found[1]) / 5 - 1, -1.0), 1.0) if found else None


def debate(question: str, answer: str, judges, weights=None) -> tuple[float, list]:
    """
    (How good an answer is that no program can judge, in [0, 1]; the replies of both rounds). Judges are functions text -> text: each scores
    alone, then reads all reviews, unnamed, and may change its mind. value = sigmoid(sum w s), s in [-1, 1], w log odds of being right.
    """
    brief = f"Question:\n{question}\n\nAnswer:\n{answer}\n\nGive one line `score: N` with N from 0 (useless) to 10, then a sentence why."
    first = [judge(brief) for judge in judges]
    reviews = "\n".join(f"- {reply.strip()}" for reply in sorted(first))  # sorted, so that the order gives no name away
    second = [judge(f"{brief}\n\nThe reviews so far:\n{reviews}\n\nKeep your score or change it.") for judge in judges]
    scores = [scored(a) if scored(b) is None else scored(b) for a, b in zip(first, second)]
    total = sum(w * s for w, s in zip(weights or [1.0] * len(scores), scores) if s is not None)
    return 1 / (1 + math.exp(-total)), [first, second]


def calibrate(judges, labelled) -> list[float]:
    """Each judge's weight from labelled (question, better answer, worse answer): the log odds of ranking a pair rightly, at least 0."""
    weights = []
    for judge in judges:
        marks = [[debate(question, answer, [judge])[0] for answer in (good, bad)] for question, good, bad in labelled]
        # one right and one wrong are added, so that nobody is certain
        p = (sum(a > b for a, b in marks) + sum(a == b for a, b in marks) / 2 + 1) / (len(labelled) + 2)
        weights.append(max(0.0, math.log(p / (1 - p))))
    return weights


# ---- command line ----------------------------------------------------------------------------------------------------


def show(task: Task) -> None:
    """Print one task, and what the verifier says of three answers to it."""
    print(f"==== {task.family} · difficulty {task.difficulty} · {task.split} · {' | '.join(task.keys)}\n{task.prompt}")
    print(f"---- thinking\n{task.trace}\n---- solution\n{task.solution}")
    for role, text in task.detour or task.turns:
        print(f"  {role:>9} | " + text.replace("\n", "\n            | "))
    answers = {"solution": task.solution, "wrong answer": task.wrong, "empty answer": ""}
    print("---- verified: " + " · ".join(f"{name} {verify(task, text):.2f}" for name, text in answers.items()) + "\n")


def faults(family: str, seeds) -> list[str]:
    """What is wrong with the tasks of these seeds; levels and splits take turns. An empty list is the proof."""
    found = []
    for seed in seeds:
        task = generate(family, 1 + seed % 5, seed, ("train", "test")[seed // 5 % 2])
        good = {"solution": task.solution, "solution after thinking": answer_text(task, True)}
        bad = {"empty answer": "", "wrong answer": task.wrong, "thought without end": "<think>\n" + task.solution}
        found += [f"{family} {task.difficulty} {task.split} seed {seed}: the {what} is judged wrongly"
                  for what, answer in (good | bad).items() if (verify(task, answer) == 1.0) != (what in good)]
    return found


def made(family: str, seeds) -> int:
    """How many of these seeds give a task whose solution verifies."""
    return sum(verify(task, task.solution) == 1.0 for task in (generate(family, 1 + seed % 5, seed) for seed in seeds))


def bench(pool, families, processes: int) -> None:
    """Speed on all processes, and what the choice of tests is worth."""
    list(pool.map(made, families, [range(2)] * len(families)))  # warm: sympy, the sandbox
    begun = time.perf_counter()
    for family in families:
        start = time.perf_counter()
        assert sum(pool.map(made, [family] * processes, [range(k, 60, processes) for k in range(processes)])) == 60
        print(f"{family:<12} {3600 / (time.perf_counter() - start):6.0f} tasks a minute")
    speed = 3600 * len(families) / (time.perf_counter() - begun)
    print(f"verified tasks a minute, all families alike: {speed:.0f} on {processes} processes")
    killed, total = np.zeros(2), 0  # of 100 chains' mutants, those that none of 200 inputs kills aside
    for seed in range(100):
        rng = random.Random(f"kill {seed}")
        source = in_steps(chain(rng, 1 + seed % 5)[2])
        inputs = [([rng.randint(-9, 9) for _ in range(rng.randint(0, 8))],) for _ in range(200)]
        chosen, trees = select_tests(source, inputs)
        table = kill_table(source, inputs, trees)
        killed += table[:, chosen].any(1).sum(), table[:, rng.sample(range(200), 20)].any(1).sum()
        total += len(table)
    print("mutants killed by 20 tests: chosen {:.1%}, random {:.1%}".format(*killed / total))


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Print a task of each family with its verification; or check, measure or write tasks. "
                                     "A task is a prompt with a solution, a verifier that runs answers, and a dial for its difficulty.")
    parser.add_argument("--family", choices=list(FAMILIES), help="only this family (default: all)")
    parser.add_argument("--difficulty", type=int, default=1, choices=LEVELS, help="1 to 5 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which task (default: %(default)s)")
    parser.add_argument("--split", default="train", choices=("train", "test"),
                        help="templates to learn, or held-out ones (default: %(default)s)")
    parser.add_argument("--check", type=int, metavar="N", help="on N seeds a family: solutions verify, empty and wrong answers do not")
    parser.add_argument("--bench", action="store_true", help="verified tasks a minute, mutants killed by chosen tests")
    parser.add_argument("--processes", type=int, default=2, help="for --check and --bench (default: %(default)s)")
    parser.add_argument("--write", metavar="FILE", help="write verified samples of N seeds a family as JSON lines (see --n)")
    parser.add_argument("--n", type=int, default=100, help="seeds a family for --write (default: %(default)s)")
    parser.add_argument("--ckpt", metavar="DIR", help="with --write: a checkpoint of ours answers instead of the program")
    parser.add_argument("--teacher", metavar="URL", help="with --write: an OpenAI-compatible endpoint answers instead of the program")
    parser.add_argument("--model", default="default", help="the teacher's model, where its server has several")
    parser.add_argument("--answers", type=int, default=1,
                        help="answers asked of a checkpoint or an endpoint for each task (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=1_000_000, help="tokens of the teacher, earlier runs included (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("check", "processes", "n", "budget", "answers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give a positive number")
    if bool(args.teacher) + bool(args.ckpt) > bool(args.write):
        raise ValueError("--teacher or --ckpt, not both, answers the tasks to be written: say where with --write FILE")
    families = [args.family] if args.family else list(FAMILIES)
    if args.bench or args.check is not None:
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            if args.bench:
                return bench(pool, families, args.processes) or 0
            found = [fault for some in pool.map(faults, families, [range(args.check)] * len(families)) for fault in some]
        print("\n".join(found) or f"{len(families)} families x {args.check} seeds: solutions verify; empty, cut, wrong answers do not")
        return int(bool(found))
    if not args.write:
        for family in families:
            show(generate(family, args.difficulty, args.seed, args.split))
        return 0
    author = lambda task, n: [task.solution]
    if args.ckpt:
        from data import Tokenizer
        from model import LoopCoder

        author = from_checkpoint(LoopCoder.from_pretrained(args.ckpt).eval(), Tokenizer.load(args.ckpt))
    elif args.teacher:
        author = from_teacher(Teacher(args.teacher, args.model, args.write + ".cache", args.budget))
    tasks = (generate(family, args.difficulty, seed, args.split) for family in families for seed in range(args.seed, args.seed + args.n))
    print("\n".join(f"{count:6d} {reason}" for reason, count in write_samples(tasks, author, args.write, args.answers).most_common()))
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, BudgetSpent) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
