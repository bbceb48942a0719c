"""
Reinforcement learning from answers that a program can check: how verifiable rewards make the thinking and the instruct model.

    sample G answers to each prompt  ->  verify them  ->  A = reward - mean of the group  ->  a few clipped policy-gradient updates

That is GRPO, here with the report's choices: no KL and no reference model, clip-higher, pass rates over 20 tests as reward, and one
loss average over all tokens of a step. The same loop trains a repository agent over many turns (SWE-RL): there an answer is a
call of a tool, observations are read but not learned, and hidden tests decide at the end.

Read grpo_loss() first: it is the idea. Then single_turn() and swe_episode(), which are the two environments, and Rollout, which
decodes many of them at a time; rl_step() learns from them with update(), train() repeats it. The study below is the evidence.
Source: LoopCoder report, section 3.3 and 4.3 (GRPO, clip-higher, SWE-RL, 20 tests); DAPO for the clip's bounds, dynamic sampling and
overlong shaping; Dr.GRPO for the missing division by the spread. Ours, since no source gives them: penalties, curriculum, nano sizes.

    python rl.py                                   # GRPO on the thinking path, from out/sft_thinking to out/rl_thinking
    python rl.py --path instruct                   # from out/sft_instruct to out/rl_instruct
    python rl.py --path swe                        # the agent, from out/rl_thinking to out/rl_swe
    python rl.py --eval out/rl_swe --against out/sft_thinking
    python rl.py --study                           # gains and their controls on small models made for it, from nothing but this file
    python rl.py --plot --report                   # out/report.md: the chain, stage by stage, and the study, from their logs
    torchrun --nproc_per_node 8 rl.py              # rollouts and updates in parallel
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict, deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import sandbox
import tasks
import train as pipeline
from data import Tokenizer
from loop_attention import causal_attention, loop_attention
from model import LoopCoder, LoopCoderConfig, head_loss, peer_llama

# ---------------------------------------------------------------------------------------------- the objective


def advantages(rewards, valid=None, std=False):
    """
    Group advantage of GRPO:  A = R - mean(R) over the samples of one prompt;  with std also divided by their standard deviation.

    rewards (P, G)          P prompts, G samples of each; float
    valid   (P, G) or None  False where there is no reward to speak of (the sandbox broke): left out of the mean, advantage 0
    returns (P, G)

    Without std by default: a division by the group's spread gives very easy and very hard prompts more weight than the others
    (Dr.GRPO), and turns the expected gradient away from that of the mean reward once rewards are pass rates; the tests enumerate it.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(valid, rewards, 0).sum(-1, keepdim=True) / count
    centred = torch.where(valid, rewards - mean, 0)
    if std:
        centred = centred / ((centred**2).sum(-1, keepdim=True) / count).sqrt().add(1e-6)
    return centred


def informative(primary, valid=None, low=0.0, high=1.0):
    """
    Dynamic sampling: which groups can teach anything? Those whose *primary* reward differs inside the group, and low <= mean <= high.

    primary (P, G) -> (P,) bool. The primary reward is the verdict alone: a group that is kept for its penalties only would learn to be
    brief instead of right. With pass rates as rewards "some right, some wrong" is not enough, hence the spread.
    """
    valid = torch.ones_like(primary, dtype=torch.bool) if valid is None else valid
    highest = torch.where(valid, primary, -torch.inf).amax(-1)
    lowest = torch.where(valid, primary, torch.inf).amin(-1)
    mean = torch.where(valid, primary, 0).sum(-1) / valid.sum(-1).clamp(min=1)
    return (highest - lowest > 1e-6) & (mean >= low) & (mean <= high)


def surrogate(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.28):
    """
    The clipped objective of every action token, and whether its gradient is cut:  min(r A, clip(r, 1 - low, 1 + high) A),  r = p / p_old.

    logp, old_logp, mask (B, T); advantages (B,) or (B, T); returns two tensors (B, T), zero and False outside the mask.
    """
    adv = advantages if advantages.ndim == logp.ndim else advantages[:, None]
    ratio = torch.where(mask, logp - old_logp, 0).exp()  # a masked position may hold anything, even inf
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    value = torch.where(mask, torch.minimum(ratio * adv, clipped * adv), 0)
    cut = mask & (((adv > 0) & (ratio > 1 + clip_high)) | ((adv < 0) & (ratio < 1 - clip_low)))
    return value, cut


def grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.28, average="token", total=None):
    """
    GRPO's loss with clip-higher and without KL:  - sum over action tokens of  min(r A, clip(r, 1 - low, 1 + high) A)  /  their number.

    logp      (B, T)  log-probability of the token that was sampled, under the policy that learns
    old_logp  (B, T)  the same under the policy that sampled it: stored while sampling, at the same temperature, no top-k, no top-p
    advantages (B,)   one number a sample, the same for all its tokens
    mask      (B, T)  True where the policy chose the token: its end token too; never prompt, observation or padding
    average   "token": every token weighs the same (DAPO);  "sequence": every sample does, however long it is (the first GRPO), so a long
              wrong answer is punished less per token;  "dr_grpo": the divisor is a constant, whatever the lengths (Dr.GRPO)
    total     what the sum is divided by; None: the tokens (or samples) of this batch. A caller that splits one optimizer step into
              micro-batches, or over processes, gives the count of the whole step, so that the split changes nothing. "dr_grpo" needs
              it: samples times the longest allowed answer.

    Where p = p_old the loss is - sum A n / N: zero for samples of equal length whatever was learned. It is no progress signal; the
    gradient, - sum A grad logp / N, is. With one update a rollout r is 1 up to rounding (decoding and this forward add up in another
    order: by 0.0015 nats a token in bfloat16 and 3e-7 in float32 where the thinking path starts, on a CPU), so the clip does next to
    nothing. The record of a step has that distance as "drift": look there first where a run does not learn.
    """
    value, _ = surrogate(logp, old_logp, advantages, mask, clip_low, clip_high)
    if average == "dr_grpo" and total is None:
        raise ValueError("average='dr_grpo' needs total=: the number of samples times the longest allowed answer")
    if average in ("token", "dr_grpo"):
        return -value.sum() / (mask.sum().clamp(min=1) if total is None else total)
    if average == "sequence":
        length = mask.sum(-1)
        return -(value.sum(-1) / length.clamp(min=1)).sum() / ((length > 0).sum().clamp(min=1) if total is None else total)
    raise ValueError(f"average={average!r}: must be 'token' (DAPO), 'sequence' (GRPO) or 'dr_grpo'")


# ---------------------------------------------------------------------------------------------- rewards


def overlong_penalty(length, longest, buffer):
    """DAPO's soft overlong punishment, added to the reward: 0 up to longest - buffer, then down a straight line to -1 at longest."""
    return -min(1.0, max(0.0, (length - (longest - buffer)) / buffer))


def swe_penalty(tokens, budget, redundant, unproductive):
    """
    What an episode loses for waste, 0 to 0.4: context beyond half the budget, calls repeated with no edit between them, idle edits.

    Numbers are ours, the report names the three penalties only. An edit after which the tests still fail costs nothing: that is the
    trial that error recovery is made of.
    """
    context = 0.10 * min(1.0, max(0.0, (tokens - 0.5 * budget) / (0.5 * budget)))
    return min(0.4, context + min(0.15, 0.05 * redundant) + min(0.15, 0.05 * unproductive))


def swe_reward(fail_to_pass, pass_to_pass):
    """1 if all tests (lists of bool) pass; else 0.3 x the share of repaired ones, or nothing where one broke that had passed before."""
    if not all(pass_to_pass):
        return 0.0
    return 1.0 if all(fail_to_pass) else 0.3 * sum(fail_to_pass) / len(fail_to_pass)


# ---------------------------------------------------------------------------------------------- episodes
# An episode is a generator, the environment's side of a conversation. It yields Ask(ids, room): the model reads ids and writes up
# to `room` tokens, and what it wrote is sent back as (ids, ended). It yields a function for work in the sandbox: the function is
# called in another thread while other rows go on decoding, and its value is sent back. It returns the function that judges it.
# Ids go in and ids come out: nothing is decoded and encoded again, so what is trained is what was sampled, token by token.


@dataclass
class Ask:
    ids: list[int]
    room: int


@dataclass
class Trajectory:
    """One finished episode as the policy lived it."""

    ids: torch.Tensor  # (n,) prompt, answers and observations in their order
    action: torch.Tensor  # (n,) bool: True where the policy chose the token, its end token included
    logp: torch.Tensor  # (n,) log-probability of each action at the sampling temperature; 0 elsewhere
    ended: bool  # False: cut at the length limit
    outcome: dict | None  # what the judge said: "reward", "primary", "solved", ...; None where the sandbox broke


def prompt_ids(tokenizer, task, turns=()):
    """The chat with these turns, up to where the assistant goes on. The user's text never becomes a special token."""
    return tokenizer.encode_parts(tasks.chat_parts(task, turns) + tasks.OPENING)[0]


def observation_ids(tokenizer, text):
    """What a tool says, from behind the assistant's end token to where the assistant goes on."""
    return tokenizer.encode_parts([("\n", False, False)] + tasks.turn_parts("tool", text, False) + tasks.OPENING)[0]


def room_behind(n, ask, context):
    """How many tokens an answer may have behind n tokens and what it is asked; none where an observation fills the context."""
    room = min(ask.room, context - n - len(ask.ids))
    if room <= 0 and n == 0:
        raise ValueError(f"a prompt of {len(ask.ids)} tokens does not fit a context of {context}; raise --context")
    return max(0, room)


def unless_broken(work):
    """What work() in the sandbox gives; None where the sandbox broke, which says nothing about the episode."""
    try:
        return work()
    except (RuntimeError, OSError):
        return None


class Verdicts:
    """The sandbox with a memory: the same question (any hashable key) is run once, whoever asks. Counts runs and their seconds."""

    def __init__(self):
        self.lock, self.known, self.runs, self.seconds = threading.Lock(), {}, 0, 0.0

    def __call__(self, key, work):
        with self.lock:
            mine = key not in self.known
            future = self.known.setdefault(key, Future())
        if mine:
            start = time.perf_counter()
            try:
                future.set_result(work())
            except Exception as error:  # raised again for everyone who asked; then forgotten, so that the next one tries again
                self.known.pop(key)
                future.set_exception(error)
            with self.lock:
                self.runs, self.seconds = self.runs + 1, self.seconds + time.perf_counter() - start
        return future.result()


def well_formed(task, text, thinking):
    """Thinking: one closed thought, then an answer. Instruct: no thought; where the solution is a code block, one block and no more."""
    if thinking:
        return text.startswith("<think>") and text.count("</think>") == 1 and bool(tasks.final_answer(text))
    return "<think>" not in text and (not task.solution.startswith("```") or bool(re.fullmatch(r"```\w*\n[^`]*```\s*", text)))


def single_turn(task, tokenizer, verdicts, room, thinking, buffer=0):
    """
    One question, one answer. primary = what verify() says; a thinking answer earns nothing when its form is broken, an instruct
    answer is paid 0.9 for being right and 0.1 for its form; on top comes the soft punishment for the last `buffer` tokens of room.
    """
    buffer = min(buffer, room)
    ids, ended = yield Ask(prompt_ids(tokenizer, task), room)

    def judge():
        text = tokenizer.decode(ids)
        form = ended and well_formed(task, text, thinking)
        right = verdicts((task.family, task.difficulty, task.seed, task.split, text), lambda: tasks.verify(task, text)) if ended else 0.0
        primary = right * form if thinking else 0.9 * right + 0.1 * form
        reward = primary + (overlong_penalty(len(ids), room, buffer) if buffer else 0.0)
        return {"primary": primary, "reward": reward, "solved": right == 1.0}

    return judge


# ---------------------------------------------------------------------------------------------- the repository agent


def test_file(calls):
    """Calls (path, function, arguments, value) as a test file; it says what it got instead, since the agent reads that."""
    lines = []
    for n, (path, function, args, want) in enumerate(calls):
        module = path[:-3]
        lines += [f"import {module}", f"def test_{n}():", f"    got = {module}.{function}(*{args!r})"]
        lines += [f"    assert got == {want!r}, repr(got)"]
    return "\n".join(lines) + "\n"


def run_tests(files, calls):
    """[(passed, what it got instead)] of each call. The tests never lie in the tree that the agent sees or edits."""
    with sandbox.Workspace(files, tasks.LIMITS) as workspace:
        grade = workspace.grade({"test_hidden.py": test_file(calls)})
    if grade.status == "sandbox error":
        raise RuntimeError("the sandbox broke during a test")
    return [(passed, reason.removeprefix("AssertionError: ")) for passed, reason in zip(grade.passed, grade.reasons)]


def parses(files):
    """Does every Python file of {path: text} parse?"""
    try:
        return all(sandbox.parse(text) for path, text in files.items() if path.endswith(".py"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of too many operators in a row
        return False


def foreign_feedback(task):
    """The failure line of some other task: the control in which feedback says nothing about one's own edit."""
    other = tasks.generate("swe", task.difficulty, task.seed + 1_000_003, task.split)
    return next(text for role, text in other.detour if text.startswith("FAIL"))


def up_to_failure(task):
    """The turns of the demonstration with a mistake, as far as the test that failed."""
    return task.detour[: next(i for i, (_, text) in enumerate(task.detour) if text.startswith("FAIL")) + 1]


class SweState:
    """What an episode in a repository has come to: the files, and what its rewards and penalties are counted from."""

    def __init__(self, files):
        self.files, self.seen, self.called = dict(files), [dict(files)], set()
        self.redundant = self.unproductive = self.edits = self.calls = 0
        self.first_failed = None  # did the first test after the first edit fail? None: there was no such test

    def act(self, call):
        """
        view, search, edit: the observation; test: None. A call is redundant if it was made before and no edit has taken effect since.
        An edit is unproductive if it changes nothing, breaks the syntax or leads back.
        """
        self.calls += 1
        self.redundant += call in self.called
        self.called.add(call)
        if call == "test":
            return None
        before = self.files
        self.files, text = tasks.use_tool(before, call)
        if self.files != before:  # this edit is forgotten too: to make it again is idle, and priced as that
            self.called.clear()
        if call.startswith("edit "):
            self.edits += 1
            self.unproductive += self.files in self.seen or not parses(self.files)
            self.seen.append(self.files)
        return text


def swe_episode(task, tokenizer, verdicts, room, budget, shuffled=False, planted=False, penalties=True):
    """
    Repair a repository with one-line calls: view FILE, search WORD, edit FILE LINE TEXT, test, submit.

    room      tokens of one call        budget    tokens of the whole episode
    shuffled  a failing test shows the failure line of another task        planted   start behind a wrong edit and its failure
    penalties False: waste is counted, and the reward is the verdict alone
    An episode may make as many calls as the demonstration with one mistake and its repair: there is time for one second try, not
    for trying everything. The agent never sees the tests that pay it: they run in another interpreter, on a copy, at the end.
    """
    begun, files = up_to_failure(task) if planted else (), task.files
    allowed = sum(role != "tool" for role, _ in task.detour[len(begun) :])
    if planted:
        files = tasks.use_tool(files, next(text for role, text in begun if role == "mistake"))[0]
        begun = (*begun[:-1], ("tool", foreign_feedback(task))) if shuffled else begun
    ids, state = prompt_ids(tokenizer, task, begun), SweState(files)
    state.edits, state.first_failed = int(planted), True if planted else None
    used = len(ids)
    key, shown = ("swe", task.difficulty, task.seed, task.split), task.tests["shown"]
    while True:
        answer, ended = yield Ask(ids, room)
        used += len(answer) + ended
        call = tokenizer.decode(answer).strip()
        if not ended or call == "submit" or state.calls == allowed - 1:
            stop = "length" if not ended else "submit" if call == "submit" else "calls"
            break
        text = state.act(call)
        if text is None:
            results = yield partial(verdicts, (key, "shown", str(state.files)), partial(run_tests, state.files, shown))
            passed = all(ok for ok, _ in results)
            (_, function, args, want), got = shown[0], results[0][1].partition(":")[0]
            text = "PASS" if passed else foreign_feedback(task) if shuffled else tasks.failure_line(function, args, got, want)
            if state.edits and state.first_failed is None:
                state.first_failed = not passed
        ids = observation_ids(tokenizer, text)
        used += len(ids)

    def judge():
        hidden = task.tests["fail_to_pass"] + task.tests["pass_to_pass"]
        passed = verdicts((key, "hidden", str(state.files)), lambda: tasks.outcomes(state.files, hidden))
        n = len(task.tests["fail_to_pass"])
        primary = swe_reward(passed[:n], passed[n:])
        penalty = swe_penalty(used, budget, state.redundant, state.unproductive)
        return {"primary": primary, "reward": primary - penalty * penalties, "solved": all(passed), "penalty": penalty, "stop": stop,
                "calls": state.calls, "redundant": state.redundant, "first_failed": state.first_failed}  # fmt: skip

    return judge


# ---------------------------------------------------------------------------------------------- rollouts


def draw(logits, uniform, temperature):
    """
    One token a row from softmax(logits / temperature), by its own uniform number: (tokens (n,), their log-probabilities (n,)).

    The whole distribution, no top-k and no top-p: these log-probabilities are the denominator of GRPO's ratio. As the random numbers
    belong to the episode and not to the batch, an episode does not depend on which others are decoded beside it.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    p = torch.softmax(logits / temperature, -1)
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


class Rollout:
    """
    Continuous batching: `slots` rows of one cache; a row whose episode ends takes the next one, while the others go on.

    Every `every` decoding steps there is a stop, where free rows are refilled and observations are read in. An answer of the
    sandbox is taken up at the second stop after it was asked for, never before: so it has time to run beside the decoding, and the
    order of all events, and with it every sampled token, is the same however fast or slow the sandbox is.
    """

    PREFILL = 64  # prompts that are read at a time

    def __init__(self, model, end_id, context, slots=256, temperature=1.0, every=4, workers=4):
        self.model, self.end_id, self.context, self.slots = model, end_id, context, slots
        self.temperature, self.every, self.workers = temperature, every, workers
        self.waited_s = 0.0  # for the sandbox

    @torch.no_grad()
    def run(self, episodes, seed):
        """episodes: generators; returns their Trajectories in the same order. seed: a list of ints; with the index it makes the noise."""
        rows, V, device = min(self.slots, len(episodes)), self.model.config.vocab_size, self.model.lm_head.weight.device
        self.waiting, self.done, self.seed = deque(enumerate(episodes)), [None] * len(episodes), list(seed)
        self.cache = self.model.new_cache(rows, self.context + 1)  # one to spare: rows that wait take part in a step and leave no trace
        self.episode = [None] * rows  # (index, generator); None: the row is free
        self.logits = torch.zeros(rows, V, device=device)  # of the next token
        self.ids = torch.zeros(rows, self.context, dtype=torch.int64, device=device)
        self.action = torch.zeros(rows, self.context, dtype=torch.bool, device=device)
        self.logp, self.uniform = (torch.zeros(rows, self.context, device=device) for _ in range(2))
        self.length, self.room, self.spoken = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)  # did the last answer come to its end token?
        self.asks, self.pending, self.stop = {}, [], 0  # what rows want to read: {row: Ask}; what the sandbox does: [(stop, row, future)]
        with ThreadPoolExecutor(self.workers) as self.pool:
            while self.waiting or any(self.episode):
                self.serve()
                for _ in range(self.every):
                    if not self.decode():
                        break
                self.stop += 1
            for one in self.done:
                one.outcome = one.outcome and self.answer_of(one.outcome)
        return self.done

    def answer_of(self, future):
        """Wait for the sandbox."""
        start = time.perf_counter()
        answer = unless_broken(future.result)
        self.waited_s += time.perf_counter() - start
        return answer

    def serve(self):
        """A stop: take up what the sandbox answered, fill free rows, drop rows that nobody needs any more, read in."""
        due, self.pending = [p for p in self.pending if p[0] <= self.stop - 2], [p for p in self.pending if p[0] > self.stop - 2]
        for _, row, future in due:
            value = self.answer_of(future)
            self.finish(row, None) if value is None else self.advance(row, value)
        free = [row for row, held in enumerate(self.episode) if held is None]
        for row in free[: len(self.waiting)]:
            self.episode[row] = self.waiting.popleft()
            noise = np.random.default_rng([*self.seed, self.episode[row][0]]).random(self.context, dtype=np.float32)
            self.cache.reset(row)
            self.length[row], self.action[row], self.logp[row], self.uniform[row] = 0, False, 0, torch.from_numpy(noise)
            self.advance(row, None)
        busy = [row for row, held in enumerate(self.episode) if held is not None]
        if not self.waiting and busy and 2 * len(busy) <= len(self.episode):
            self.shrink(busy)
        if self.asks:
            self.read()

    def shrink(self, rows):
        """The end of a batch: go on with these rows only."""
        self.cache.keep(rows)
        for name in ("logits", "ids", "action", "logp", "uniform", "length", "room", "spoken", "ended"):
            setattr(self, name, getattr(self, name)[rows])
        new = {old: row for row, old in enumerate(rows)}
        self.episode = [self.episode[row] for row in rows]
        self.asks = {new[row]: ask for row, ask in self.asks.items()}
        self.pending = [(stop, new[row], future) for stop, row, future in self.pending]

    def advance(self, row, value):
        """Give an episode what it waits for, and note what it wants next."""
        try:
            wish = self.episode[row][1].send(value)
        except StopIteration as end:
            return self.finish(row, end.value)
        if isinstance(wish, Ask):
            self.asks[row] = wish
        else:
            self.pending.append((self.stop, row, self.pool.submit(wish)))

    def finish(self, row, judge):
        """The episode is over: keep what it was, and free its row. judge None: the sandbox broke."""
        n, (index, _) = int(self.length[row]), self.episode[row]
        lived = (x[row, :n].clone() for x in (self.ids, self.action, self.logp))
        self.done[index] = Trajectory(*lived, bool(self.ended[row]), judge and self.pool.submit(judge))  # the outcome: soon
        self.episode[row], self.room[row] = None, 0

    def read(self):
        """Append to each row what its episode asked the model to read. Rows that begin with the same prompt share the work."""
        fresh, going = {}, []
        asks, self.asks = self.asks, {}
        for row, ask in asks.items():
            n = int(self.length[row])
            room = room_behind(n, ask, self.context)
            if not room:
                self.ended[row] = False
                self.advance(row, ([], False))
                continue
            if n == 0:
                fresh.setdefault(tuple(ask.ids), []).append(row)
            else:
                going.append((row, self.ids[row, n - 1 : n].tolist() + ask.ids))  # its last token was sampled and not yet read
            self.ids[row, n : n + len(ask.ids)] = torch.tensor(ask.ids)
            self.length[row], self.spoken[row], self.room[row] = n + len(ask.ids), n + len(ask.ids), room
        for batch in ([(rows[0], list(ids)) for ids, rows in fresh.items()], going):
            batch.sort(key=lambda pair: len(pair[1]))
            for i in range(0, len(batch), self.PREFILL):
                rows, prompts = zip(*batch[i : i + self.PREFILL])
                self.logits[list(rows)] = self.model.prefill(self.cache, prompts, rows)
        for first, *others in fresh.values():
            if others:
                self.cache.copy(first, others)
                self.logits[others] = self.logits[first].clone()

    def decode(self):
        """One token for every row that is writing. False: nobody is."""
        rows = self.room.nonzero()[:, 0]
        if len(rows) == 0:
            return False
        at = self.length[rows]
        token, logp = draw(self.logits[rows], self.uniform[rows, at], self.temperature)
        self.ids[rows, at], self.logp[rows, at], self.action[rows, at] = token, logp, True
        self.length[rows] += 1
        self.room[rows] -= 1
        self.ended[rows] = ended = token == self.end_id
        self.room[rows[ended]] = 0
        for row, end in zip(*(x[self.room[rows] == 0].tolist() for x in (rows, ended))):
            answer = self.ids[row, self.spoken[row] : int(self.length[row]) - end].tolist()
            self.advance(row, (answer, end))
        active = self.room > 0
        if active.any():
            last = self.ids.gather(1, (self.length - 1).clamp(min=0)[:, None])[:, 0]
            self.logits = self.model.decode(self.cache, last, active)
        return True


class RemoteRollout:
    """
    The same episodes, answered by a server that speaks the OpenAI completions protocol (vLLM, SGLang, ...): ids in, ids out.

    The server must hold the weights that are being trained; its owner loads out/<stage> again as it changes. Log-probabilities are
    computed here from the weights here, so the ratio starts at 1 whatever the server's kernels round.
    """

    def __init__(self, url, model, tokenizer, context, temperature=1.0, workers=32):
        self.url, self.model, self.tokenizer, self.context = url.rstrip("/") + "/v1/completions", model, tokenizer, context
        self.temperature, self.workers, self.end_id = temperature, workers, tokenizer.special["<|im_end|>"]
        self.waited_s = 0.0  # for the sandbox: nothing here, threads wait beside each other

    def complete(self, ids, room, seed):
        """(ids of the answer, whether it came to its end). A server that returns no token ids has its text encoded again."""
        import requests

        body = {"model": "policy", "prompt": ids, "max_tokens": room, "temperature": self.temperature, "top_p": 1.0, "seed": seed,
                "stop_token_ids": [self.end_id], "return_token_ids": True, "skip_special_tokens": False}  # fmt: skip
        reply = requests.post(self.url, json=body, timeout=600)
        try:
            choice = reply.json()["choices"][0]
            answer = choice.get("token_ids") or self.tokenizer.encode(choice["text"].removesuffix("<|im_end|>"))
            return [i for i in answer if i != self.end_id], choice["finish_reason"] == "stop"
        except (ValueError, LookupError, TypeError) as error:
            raise OSError(f"{self.url}: no completion, but status {reply.status_code} and {reply.text[:200]!r}") from error

    def converse(self, index, episode, seed):
        """The Trajectory of one episode, without its log-probabilities."""
        ids, action, ended, value, outcome = [], [], False, None, None
        try:
            while True:
                wish = episode.send(value)
                if not isinstance(wish, Ask):
                    value = unless_broken(wish)
                    if value is None:
                        break
                    continue
                room, answer, ended = room_behind(len(ids), wish, self.context), [], False
                if room:
                    ids, action = ids + wish.ids, action + [False] * len(wish.ids)
                    answer, ended = self.complete(ids, room, hash((*seed, index, len(ids))) % 2**31)
                    said = answer + [self.end_id] * ended
                    ids, action = ids + said, action + [True] * len(said)
                value = answer, ended
        except StopIteration as end:
            outcome = unless_broken(end.value)
        return Trajectory(torch.tensor(ids), torch.tensor(action), torch.zeros(len(ids)), ended, outcome)

    @torch.no_grad()
    def run(self, episodes, seed):
        """episodes: generators; returns their Trajectories in the same order. seed: a list of ints, from which the server's are made."""
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(lambda pair: self.converse(*pair, seed), enumerate(episodes)))
        for one in found:
            if not one.action.any():  # a server may answer with nothing
                continue
            ids, targets, _, mask = pad([one])
            one.logp[1:] = token_logp(self.model, ids, targets, mask, self.temperature)[0].cpu()
        return found


def rollout(model, tokenizer, cfg):
    """Who decodes under this configuration: run(episodes, seed) of the result gives their Trajectories."""
    if cfg.rollout_url:
        return RemoteRollout(cfg.rollout_url, model, tokenizer, cfg.context, cfg.temperature)
    return Rollout(model, tokenizer.special["<|im_end|>"], cfg.context, cfg.slots, cfg.temperature)


# ---------------------------------------------------------------------------------------------- one update


def pad(trajectories):
    """
    Rows for the training forward: (ids (B, T), targets (B, T), old_logp (B, T), mask (B, T)), padded at the right.

    Everything but ids is shifted by one: position t stands for the choice of token t + 1. The model is causal, so padding behind
    a row changes nothing in it.
    """
    T = max(len(t.ids) for t in trajectories) - 1
    shape = (len(trajectories), T)
    ids, targets, old_logp = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, t in enumerate(trajectories):
        n = len(t.ids) - 1
        ids[b, :n], targets[b, :n], old_logp[b, :n], mask[b, :n] = t.ids[:-1], t.ids[1:], t.logp[1:], t.action[1:]
    return ids, targets, old_logp, mask


def prefix_tree(ids, mask):
    """
    Rows that begin alike are one computation up to where they part: the prompt of a group, and more where answers agree.

    ids, mask (B, T); what lies behind a row's last True in mask is padding. Returns nodes: places (N,) in ids.flatten(), one of each
    distinct beginning, and where (B, T): which of the N stands at each place of the rows (0 in padding, which no other token sees).
    """
    tree, nodes, where = {}, [], torch.zeros(ids.shape, dtype=torch.int64)
    for b, (row, used) in enumerate(zip(ids.tolist(), mask)):
        node, line = -1, []
        for t, token in enumerate(row[: int(used.nonzero()[-1]) + 1 if used.any() else 0]):
            known, node = len(tree), tree.setdefault((node, token), len(tree))
            line.append(node)
            if node == known:
                nodes.append(b * ids.shape[1] + t)
        where[b, : len(line)] = torch.tensor(line, dtype=torch.int64)
    return torch.tensor(nodes, dtype=torch.int64), where


def token_logp(model, ids, targets, mask, temperature):
    """
    Log-probability (B, T) of each chosen token under the model at the sampling temperature; 0 elsewhere. Logits only where needed.

    Matrix products see each distinct beginning of a row once; only attention sees whole rows.
    """
    device, (B, T) = model.lm_head.weight.device, ids.shape
    nodes, where = (x.to(device) for x in prefix_tree(ids, mask))
    ids, targets, mask, every = ids.to(device), targets.to(device), mask.to(device), where.flatten()
    gates, window = getattr(model.model, "gate_projections", None), model.config.loop_window_size

    def rows(x):  # (1, H, N, D) -> (B, H, T, D)
        return x[0].transpose(0, 1).flatten(1).index_select(0, every).view(B, T, *x.shape[1::2]).transpose(1, 2)

    def distinct(o):  # (B, H, T, D) -> (1, H, N, D)
        return o.transpose(1, 2).reshape(B * T, -1).index_select(0, nodes).view(1, len(nodes), o.shape[1], -1).transpose(1, 2)

    def first(layer, q, k, v):
        return distinct(causal_attention(rows(q), rows(k), rows(v)))

    def later(turn, layer, *qkv):
        q, k, v, k1, v1 = (rows(x) for x in qkv)
        return distinct(loop_attention(q, k1, v1, k, v, gates[layer].weight, gates[layer].bias, window))

    def shift(x, positions, _):  # what stood before each in its row; zeros at the start
        return x[:, every[(nodes - 1).clamp(min=0)]] * (positions > 0)[..., None]

    h = model.passes(ids.flatten()[nodes][None], (nodes % T)[None], first, later, shift=shift)[0]  # (N, C)
    nll = head_loss(h[where[mask]][None], model.lm_head.weight, targets[mask][None], reduction="none", temperature=temperature)
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, -nll.float())


def micro_batches(samples, most):
    """Split [(trajectory, advantage)] into batches of at most `most` padded tokens; sorted by length, so that little is padding."""
    batch = []
    for pair in sorted(samples, key=lambda pair: len(pair[0].ids)):
        if batch and (len(batch) + 1) * len(pair[0].ids) > most:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def gathered(items, world):
    """The lists of all processes, one behind the other: the same on each of them."""
    parts = [items] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, items)
    return sum(parts, [])


def all_sum(values, world):
    """The sum over all processes of each number in a list."""
    return [sum(column) for column in zip(*gathered([values], world))]


def update(model, optimizer, samples, cfg, lr, world):
    """
    One optimizer step on [(trajectory, advantage)]; returns {"loss", "grad", and of its tokens "cut": the share whose gradient was clipped
    away, "drift": the mean |log p now - log p at rollout|}.

    The loss is an average over the tokens of this step in all micro-batches and on all processes.
    """
    rows, tokens = all_sum([len(samples), sum(int(t.action.sum()) for t, _ in samples)], world)
    if not tokens:  # no group carried signal: nothing is learned, and momentum alone shall not move the weights
        return {"loss": 0.0, "cut": 0.0, "drift": 0.0, "grad": 0.0}
    total, loss, cut, drift = {"token": tokens, "sequence": rows, "dr_grpo": rows * cfg.room}[cfg.average], 0.0, 0, 0.0
    for batch in micro_batches(samples, cfg.micro_tokens):
        ids, targets, old_logp, mask = pad([t for t, _ in batch])
        adv = torch.tensor([a for _, a in batch], device=world.device)
        logp = token_logp(model, ids, targets, mask, cfg.temperature)
        old_logp, mask = old_logp.to(world.device), mask.to(world.device)
        part = grpo_loss(logp, old_logp, adv, mask, cfg.clip_low, cfg.clip_high, cfg.average, total)
        part.backward()
        loss += float(part.detach())
        cut += int(surrogate(logp.detach(), old_logp, adv, mask, cfg.clip_low, cfg.clip_high)[1].sum())
        drift += float((logp.detach() - old_logp)[mask].abs().sum())
    for p in optimizer.params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world.size > 1:
            dist.all_reduce(p.grad)
    loss, cut, drift = all_sum([loss, cut, drift], world)
    return {"loss": loss, "cut": cut / tokens, "drift": drift / tokens, "grad": optimizer.step(lr, cfg.clip_grad)}


# ---------------------------------------------------------------------------------------------- configuration

flag = pipeline.flag
PATHS = {  # path: (starts from, stage it makes, families)
    "thinking": ("sft_thinking", "rl_thinking", "compose,crux_output,crux_input,math"),
    "instruct": ("sft_instruct", "rl_instruct", "compose,stdin,sql,math"),
    "swe": ("rl_thinking", "rl_swe", "swe"),
}


@dataclass
class RLConfig:
    """Every knob of a run; the command line is made from these fields."""

    path: str = flag("thinking", "thinking, instruct (both: one answer to one question) or swe (a repository, many turns)", PATHS)
    ckpt: str = flag("", "checkpoint to start from; empty: the path's own stage under --out")
    out: str = flag("out", "folder of the chain; the result goes to its rl_<path>")
    name: str = flag("", "folder of the result under --out; empty: the path's own")
    families: str = flag("", "comma-separated task families; empty: the path's own")
    levels: str = flag("1,2,3", "difficulties that are trained, the first at once, each next one when the last is solved well enough")
    steps: int = flag(60, "rollouts, each followed by --updates optimizer steps", least=1)
    prompts: int = flag(16, "prompts a step, over all processes", least=1)
    samples: int = flag(12, "answers to each prompt: the group", least=2)
    updates: int = flag(3, "optimizer steps a rollout, each on its share of the samples; with 1 the clip is dead", least=1)
    lr: float = flag(1e-4, "learning rate after 3 steps of warm-up (1e-6 is for billions of parameters)")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = flag(0.28, "and above 1 + this: clip-higher leaves rare good tokens room to grow")
    clip_grad: float = flag(1.0, "largest gradient norm")
    std: bool = flag(False, "divide advantages by the standard deviation of their group")
    average: str = flag("token", "token: every token of a step weighs the same (DAPO); sequence: every answer does (GRPO); dr_grpo: the "
                        "sum is divided by samples x room, however long they are (Dr.GRPO)", ("token", "sequence", "dr_grpo"))  # fmt: skip
    terse: bool = flag(False, "keep the first line of each prompt only, without examples or tools: as much as a very small model can use")
    band_low: float = flag(0.0, "groups with a lower mean of the primary reward are dropped")
    band_high: float = flag(1.0, "groups with a higher one too (0.875 in Seed-Coder)")
    rounds: int = flag(2, "dynamic sampling: rollouts a step at most, until enough groups carry signal", least=1)
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that are trained")
    room: int = flag(192, "longest answer, or call of a tool, in tokens", least=1)
    context: int = flag(768, "longest episode, in tokens", least=1)
    overlong: int = flag(32, "soft punishment over the last tokens of the room; 0: none")
    mask_cut: bool = flag(False, "learn nothing from episodes that were cut at a limit")
    planted: float = flag(0.0, "swe: share of groups that start behind a wrong edit and its failure, to learn from what follows")
    penalties: str = flag("on", "swe: whether context, repeated calls and idle edits cost reward; off: the verdict alone", ("on", "off"))
    shuffle_rewards: bool = flag(False, "control: permute the rewards inside each group")
    shuffle_feedback: bool = flag(False, "control: failing tests show another task's failure")
    slots: int = flag(96, "rows that are decoded at a time", least=1)
    micro_tokens: int = flag(8192, "padded tokens of one forward and backward", least=1)
    eval_tasks: int = flag(40, "held-out tasks a family for the evaluation at the end; 0: none")
    eval_samples: int = flag(4, "answers to each of them, at --temperature", least=1)
    minutes: float = flag(8.0, "stop after this many minutes, at the end of a step; 0: never. The evaluation comes on top. How many steps "
                          "fit in depends on the machine; a run says it at its end, and --steps N --minutes 0 repeats that run there bit "
                          "for bit (on a CPU)")  # fmt: skip
    seed: int = flag(1337, "of tasks and sampling")
    resume: bool = flag(False, "go on where a killed run stopped")
    rollout_url: str = flag("", "base URL of an OpenAI-compatible server that answers in place of this process")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "float32 or bfloat16 products, the weights being float32; auto: as train.py, the faster on this machine")
    threads: int = flag(0, "CPU threads; 0: torch's choice")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            name, value, choices, least = "--" + f.name.replace("_", "-"), getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if choices and value not in choices:
                raise ValueError(f"{name} {value}: must be one of {', '.join(choices)}")
            if not isinstance(value, str) and not least <= value < math.inf:
                raise ValueError(f"{name} {value}: must be a number from {least} up")
        if self.average == "dr_grpo" and self.std:
            raise ValueError("--average dr_grpo --std: Dr.GRPO does not divide by the standard deviation; leave out one of the two")
        self.families = self.families or PATHS[self.path][2]
        unknown = [f for f in self.families.split(",") if f not in tasks.FAMILIES]
        if unknown:
            raise ValueError(f"--families: no family {unknown[0]!r}; there are {', '.join(tasks.FAMILIES)}")
        if not all(level in map(str, tasks.LEVELS) for level in self.levels.split(",")):
            raise ValueError(f"--levels {self.levels}: comma-separated numbers from {tasks.LEVELS[0]} to {tasks.LEVELS[-1]}")

    def level_list(self):
        return [int(level) for level in self.levels.split(",")]


class Curriculum:
    """
    Levels open one after the other: the next when the newest open one was solved in over 0.7 of the samples of its last 64 groups.

    Open levels are drawn alike, so that what was learned stays in the mix. The state is plain data and travels with the snapshot.
    """

    THRESHOLD, WINDOW = 0.7, 64

    def __init__(self, levels):
        self.levels, self.open, self.recent = levels, 1, []

    @property
    def newest(self):
        return self.levels[self.open - 1]

    def draw(self, rng):
        return rng.choice(self.levels[: self.open])

    def record(self, results):
        """results: [(level, share of samples that solved it)] of one step's groups."""
        self.recent += [share for level, share in results if level == self.newest]
        self.recent = self.recent[-self.WINDOW :]
        if len(self.recent) == self.WINDOW and sum(self.recent) > self.THRESHOLD * self.WINDOW and self.open < len(self.levels):
            self.open, self.recent = self.open + 1, []

    def state(self):
        return {"open": self.open, "recent": self.recent}

    def load_state(self, state):
        self.open, self.recent = state["open"], state["recent"]


# ---------------------------------------------------------------------------------------------- one step, many steps


def episode_of(task, tokenizer, verdicts, cfg, planted=False):
    """The environment of a task under this configuration."""
    if task.family == "swe":
        return swe_episode(task, tokenizer, verdicts, cfg.room, cfg.context, cfg.shuffle_feedback, planted, cfg.penalties == "on")
    return single_turn(task, tokenizer, verdicts, cfg.room, cfg.path == "thinking", cfg.overlong)


def draw_task(cfg, family, level, seed, split="train"):
    """A task of this configuration."""
    task = tasks.generate(family, level, seed, split)
    return dataclasses.replace(task, prompt=task.prompt.split("\n")[0]) if cfg.terse else task


def trajectories(roller, tokenizer, verdicts, cfg, drawn, planted, each, seed):
    """
    Live through `each` episodes of every task drawn, where planted (a bool a task) from behind a failed edit: [its trajectories].

    OSError where the sandbox judged none of them: to go on would be to learn from nothing, and not to say so.
    """
    episodes = [episode_of(task, tokenizer, verdicts, cfg, behind) for task, behind in zip(drawn, planted) for _ in range(each)]
    lived = roller.run(episodes, seed)
    if lived and all(t.outcome is None for t in lived):
        raise OSError(f"the sandbox gave no verdict on any of {len(lived)} episodes; see python sandbox.py, then go on with --resume")
    return [lived[i : i + each] for i in range(0, len(lived), each)]


def sample_groups(roller, tokenizer, verdicts, cfg, curriculum, rng, want, seed):
    """Roll out `want` fresh training tasks, cfg.samples times each: [(task, its trajectories)]."""
    families = cfg.families.split(",")
    drawn = [draw_task(cfg, rng.choice(families), curriculum.draw(rng), rng.randrange(10**9)) for _ in range(want)]
    planted = [cfg.planted > 0 and rng.random() < cfg.planted for _ in drawn]
    return list(zip(drawn, trajectories(roller, tokenizer, verdicts, cfg, drawn, planted, cfg.samples, seed)))


def credit(groups, cfg, rng):
    """
    From groups to what is learned: ([(trajectory, advantage)], how many groups carried signal).

    Where the sandbox broke there is no reward, and with mask_cut none where the episode was cut: such samples are left out of their
    group, not scored 0. Groups in which the verdict does not differ are left out whole.
    """
    table = lambda key: torch.tensor([[0.0 if t.outcome is None else float(t.outcome[key]) for t in lived] for _, lived in groups])
    valid = torch.tensor([[t.outcome is not None and (t.ended or not cfg.mask_cut) for t in lived] for _, lived in groups])
    rewards, keep = table("reward"), informative(table("primary"), valid, cfg.band_low, cfg.band_high)
    if cfg.shuffle_rewards:
        for row, ok in zip(rewards, valid):
            row[ok] = row[ok][torch.tensor(rng.sample(range(int(ok.sum())), int(ok.sum())), dtype=torch.int64)]
    adv = advantages(rewards, valid, cfg.std)
    samples = [(t, float(a)) for (_, lived), row, ok, kept in zip(groups, adv, valid, keep) if kept for t, a, v in zip(lived, row, ok) if v]
    return samples, int(keep.sum())


def solved_share(lived):
    return float(np.mean([t.outcome["solved"] for t in lived if t.outcome] or [0]))


def counts_of(groups):
    """What is added up over the processes of a step: episodes, verdicts, sampled tokens, and how often an error was repaired."""
    lived = [t for _, ts in groups for t in ts]
    judged = [t.outcome for t in lived if t.outcome is not None]
    failed = [o for o in judged if o.get("first_failed")]
    return {
        "samples": len(lived), "cut_off": sum(not t.ended for t in lived), "judged": len(judged), "errors": len(lived) - len(judged),
        "groups": len(groups), "solved_groups": sum(solved_share(ts) > 0 for _, ts in groups), "solved": sum(o["solved"] for o in judged),
        "failed": len(failed), "recovered": sum(o["solved"] for o in failed), "tokens": sum(int(t.action.sum()) for t in lived),
        "reward": float(sum(o["reward"] for o in judged)), "surprise": -sum(float(t.logp.sum()) for t in lived),
        "redundant": sum(o.get("redundant", 0) for o in judged),
    }  # fmt: skip


def rl_step(model, optimizer, tokenizer, cfg, curriculum, verdicts, step, world):
    """Roll out until enough groups carry signal, then cfg.updates optimizer steps; returns the record of the step."""
    start, runs, busy = time.perf_counter(), verdicts.runs, verdicts.seconds
    rng = random.Random(f"{cfg.seed}/{step}/{world.rank}")
    roller, wanted = rollout(model, tokenizer, cfg), len(range(world.rank, cfg.prompts, world.size))
    groups, samples, informed = [], [], 0
    model.eval()
    for again in range(cfg.rounds):
        new = sample_groups(roller, tokenizer, verdicts, cfg, curriculum, rng, wanted - informed, [cfg.seed, step, world.rank, again])
        more, n = credit(new, cfg, rng)
        groups, samples, informed = groups + new, samples + more, informed + n
        if informed >= wanted:
            break
    rolled = time.perf_counter() - start
    model.train()
    lr, shuffled = cfg.lr * min(1.0, (step + 1) / 3), rng.sample(samples, len(samples))
    done = [update(model, optimizer, shuffled[i :: cfg.updates], cfg, lr, world) for i in range(cfg.updates)]
    judged_groups = [(task.difficulty, solved_share(lived)) for task, lived in groups if any(t.outcome for t in lived)]
    curriculum.record(gathered(judged_groups, world))
    mine = counts_of(groups) | {"informative": informed, "trained": sum(len(t.ids) for t, _ in samples)}
    mine |= {"sandbox_runs": verdicts.runs - runs, "sandbox_s": verdicts.seconds - busy, "sandbox_wait_s": roller.waited_s / world.size}
    everyones = gathered([mine], world)
    sums = {name: sum(counts[name] for counts in everyones) for name in mine}
    samples, judged, tokens = (max(sums[name], 1) for name in ("samples", "judged", "tokens"))
    return {
        "step": step + 1, "seconds": time.perf_counter() - start, "rollout_s": rolled, "tokens_per_s": tokens / rolled,
        "reward": sums["reward"] / judged, "pass": sums["solved"] / judged, "entropy": sums["surprise"] / tokens,
        "length": tokens / samples, "loss": done[0]["loss"], "drift": done[0]["drift"], "clip": float(np.mean([d["cut"] for d in done])),
        "grad": float(np.mean([d["grad"] for d in done])), "level": curriculum.newest, "sandbox_s": sums["sandbox_s"],
        "sandbox_wait_s": sums["sandbox_wait_s"], **{name: count for name, count in sums.items() if isinstance(count, int)},
    }  # fmt: skip


def line_of(r, steps):
    """The one line of a step, from its record. groups: how many had a solution, how many taught something, of how many."""
    return (
        f"step {r['step']:4d}/{steps} | reward {r['reward']:.3f} | pass@1 {r['pass']:.3f}"
        f" | groups solved {r['solved_groups']:3d}, used {r['informative']:3d} of {r['groups']:<3d}"
        f" | clip {r['clip']:.3f} | drift {r['drift']:.4f} | entropy {r['entropy']:.3f} | length {r['length']:5.1f}"
        f" | {r['tokens_per_s'] / 1e3:.2f}k tok/s | sandbox {r['sandbox_runs'] / r['seconds']:.0f}/s,"
        f" {100 * r['sandbox_wait_s'] / r['seconds']:.0f}% waited | level {r['level']} | {r['seconds']:.1f}s"
    )


def load(folder, cfg, world):
    """(model, tokenizer) of a checkpoint, weights in float32; ValueError where this configuration's episodes do not fit."""
    tokenizer, model = Tokenizer.load(folder), LoopCoder.from_pretrained(folder, device=world.device, dtype=torch.float32)
    model.compute_dtype = world.dtype
    if cfg.context >= model.config.max_position_embeddings:
        raise ValueError(f"--context {cfg.context}: must be below the {model.config.max_position_embeddings} positions of {folder}")
    return model, tokenizer


def train(cfg: RLConfig, world) -> Path:
    """
    Run RL from cfg's start to its stage; returns the folder of the new checkpoint. A killed run loses at most the step it was in.

    After each step the snapshot is written, and then the log from it; the checkpoint comes last. So whatever stops a run, the folder holds
    either what a former run left or a snapshot to go on from, and without a snapshot the checkpoint is complete.
    """
    folder, start = result_folder(cfg), start_folder(cfg)
    snapshot, records = folder / "state.pt", []
    if cfg.resume and (folder / "model.safetensors").exists() and not snapshot.exists():
        return folder  # complete
    if start.resolve() == folder.resolve():
        raise ValueError(f"{start}: the run would write over the checkpoint it starts from; give the result another folder with --name")
    if cfg.prompts < world.size:
        raise ValueError(f"--prompts {cfg.prompts}: must be at least one for each of the {world.size} processes")
    if cfg.temperature == 0:
        raise ValueError("--temperature 0: all answers to a prompt would be the same, and teach nothing; 0 is for --eval")
    model, tokenizer = load(start, cfg, world)
    optimizer = pipeline.Optimizer(model, kind="adamw", weight_decay=0.0)
    curriculum, verdicts = Curriculum(cfg.level_list()), Verdicts()
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.resume and snapshot.exists():
        state = torch.load(snapshot, map_location=world.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        curriculum.load_state(state["curriculum"])
        records = state["records"]
    for step in range(len(records), cfg.steps):
        verdicts.known.clear()  # tasks are new in every step
        records.append(rl_step(model, optimizer, tokenizer, cfg, curriculum, verdicts, step, world))
        if not math.isfinite(norm := records[-1]["grad"]):
            raise FloatingPointError(f"{folder.name}, step {step + 1}: the gradient's norm is {norm}; go on with --resume and a lower --lr")
        if world.main:
            state = {"records": records, "curriculum": curriculum.state(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            pipeline.write_atomically(snapshot, partial(torch.save, state))
            write_log(folder, records)
            print(f"{folder.name}: {line_of(records[-1], cfg.steps)}", flush=True)
            if step + 1 in (3, cfg.steps) and not any(r["informative"] for r in records):
                print(f"{folder.name}: nothing was learned so far: no group held answers that earn differently. The start solves all or "
                      f"none of {cfg.families}, or never answers in the form that the path pays", flush=True)  # fmt: skip
        (spent,) = all_sum([sum(r["seconds"] for r in records)], world)
        if cfg.minutes and spent > 60 * cfg.minutes * world.size:
            break
    if world.main:
        n = len(records)
        records[-1]["ended_by"] = ended = "minutes" if n < cfg.steps else "steps"
        write_log(folder, records)
        print(f"{folder.name}: {n} of {cfg.steps} steps, ended by --{ended}; --steps {n} --minutes 0 repeats it", flush=True)
        for evaluation in ("eval.json", "table.json"):  # of the checkpoint that this one takes the place of
            (folder / evaluation).unlink(missing_ok=True)
        tokenizer.save(folder)
        model.save_pretrained(folder)
        snapshot.unlink(missing_ok=True)
    return folder


def write_log(folder, records):
    pipeline.write_atomically(folder / "log.jsonl", lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in records)))


def read_log(folder):
    """The records of a stage's log.jsonl; [] where it has none. A line that a full disk or a kill cut short is no record."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def start_folder(cfg):
    """The checkpoint that this run starts from; ValueError where there is none."""
    start = Path(cfg.ckpt or Path(cfg.out) / PATHS[cfg.path][0])
    if not (start / "config.json").exists():
        raise ValueError(f"{start}: no checkpoint there; make the chain up to it with python train.py, or give another with --ckpt DIR")
    return start


def result_folder(cfg):
    return Path(cfg.out) / (cfg.name or PATHS[cfg.path][1])


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(model, tokenizer, cfg):
    """
    Every metric of a checkpoint on cfg.eval_tasks held-out tasks a family, cfg.eval_samples episodes each: {name: (above, below)}.

    Both are tuples with an entry a task, the metric is sum / sum: so one bootstrap over tasks serves means and conditional shares.
        pass@1, pass@k      solved, without bias (tasks.pass_at_k); for swe this is "resolved": every fail-to-pass and pass-to-pass test
        recovery            solved, given that the first test after the first edit failed
        planted recovery    solved from behind the demonstration's wrong edit and its failure: the same question to every checkpoint
    """
    found, verdicts, k, levels = {}, Verdicts(), cfg.eval_samples, cfg.level_list()

    def mark(metric, marks):  # marks: (above, below) of each task
        found[metric] = tuple(zip(*marks))

    def mean(key, outcomes):  # outcomes: of each task a list
        return [(sum(o[key] for o in some), len(some)) for some in outcomes]

    model.eval()
    roller = rollout(model, tokenizer, cfg)
    for family in cfg.families.split(","):
        chosen = [draw_task(cfg, family, levels[i % len(levels)], i, "test") for i in range(cfg.eval_tasks)]
        for planted in (False, True) if family == "swe" else (False,):
            lived = trajectories(roller, tokenizer, verdicts, cfg, chosen, [planted] * len(chosen), k, [0, int(planted)])
            outcomes = [[t.outcome for t in some if t.outcome] for some in lived]
            if planted:
                mark("swe planted recovery", mean("solved", outcomes))
                continue
            mark(f"{family} pass@1", mean("solved", outcomes))
            if k > 1:
                mark(f"{family} pass@{k}", [(tasks.pass_at_k(n, c, k), 1) if n == k else (0, 0) for c, n in mean("solved", outcomes)])
            if family == "swe":
                mark("swe recovery", mean("solved", [[o for o in some if o["first_failed"]] for some in outcomes]))
                mark("swe calls", mean("calls", outcomes))
    return found


def evaluate_checkpoint(folder, cfg, world, must_keep=False):
    """Load, evaluate, and leave the result beside the weights as eval.json, with what was left there of other metrics, if it can be."""
    found = evaluate(*load(folder, cfg, world), cfg)
    known = evaluated(Path(folder)) | found
    try:
        pipeline.write_atomically(Path(folder) / "eval.json", lambda at: at.write_text(json.dumps(known) + "\n"))
    except OSError as error:
        if must_keep:
            raise
        print(f"rl.py: {folder}: eval.json is not kept ({error.strerror or error})", file=sys.stderr)
    return found


def evaluated(folder, file="eval.json"):
    """What an evaluation left in this folder: {metric: [above, below]}; table.json is that of `train.py --eval`."""
    found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    return {name: pair for name, pair in found.items() if isinstance(pair, list)}  # a few of train.py's metrics are one number


def comparison(found, against=None):
    """The lines of an evaluation: value and interval; beside another checkpoint also the paired difference."""
    lines = []
    for name, pair in found.items():
        value, low, high = pipeline.interval(pair)
        line = f"{name:<24} {value:6.3f} [{low:.3f}, {high:.3f}]"
        if against is not None and name in against:
            gain, low, high = pipeline.interval(pair, against[name])
            line += f"   before {pipeline.interval(against[name])[0]:6.3f}   gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------------- the study
# Does it work, and is it the reward that does it? Models of under a million parameters, made here from nothing; held-out templates;
# several seeds; and beside each run the controls that would show the same gain if it came from anything else.
# compose   two demonstrations in five are wrong, so imitation cannot tell which to believe; a reward can.
# swe       demonstrations repair at once what a user reports, in the task or as the answer to a fix that was submitted untested; where no
#           report comes they guess, and where the guess fails its test they give up, or now and then try another fix blind. None reads the
#           failure of its own test. Of four candidates one is the fault and one has then failed, so a blind retry is right half the time at
#           best: the value that recovery is to be measured against.

SHAPE = dict(hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2, head_dim=32)

# task: the shape of its model; its demonstrations; the phases of imitation (which of them, tokens, peak rate), `rows` samples a step; how
# RL goes on; and the arms. None: imitation goes on in place of RL.
STUDY = {
    "compose": {
        "shape": SHAPE | dict(num_hidden_layers=4), "vocab": 440,
        "demonstrations": 2000, "levels": (1, 2), "wrong": 0.4, "phases": [("all", 4e5, 3e-3)], "rows": 32,
        "cfg": dict(path="instruct", families="compose", levels="2", terse=True, room=64, context=160, overlong=0, prompts=16, samples=12,
                    updates=3, lr=8e-5, steps=30, minutes=0, eval_tasks=100),
        "arms": {"grpo": {}, "shuffled_rewards": {"shuffle_rewards": True}, "more_sft": None},
        "metrics": ("compose pass@1", "compose pass@4"),
    },
    "swe": {
        "shape": SHAPE | dict(num_hidden_layers=2), "vocab": 380,
        "demonstrations": 4000, "levels": (2,), "reported": 0.3, "wrong": 0.4, "blind": 0.1,
        "phases": [("reported", 1.6e6, 5e-3), ("all", 3e5, 2.5e-3)], "rows": 16,
        "cfg": dict(path="swe", families="swe", levels="2", terse=True, room=32, context=320, prompts=12, samples=12, updates=3, lr=3e-4,
                    planted=0.6, steps=20, slots=192, minutes=0, eval_tasks=100),
        "arms": {"grpo": {}, "shuffled_feedback": {"shuffle_feedback": True}, "more_sft": None},
        "metrics": ("swe pass@1", "swe recovery", "swe planted recovery"),
    },
}  # fmt: skip


def imitate(model, samples, tokens, seed, rows, lr):
    """Supervised fine-tuning on [(ids, in_loss)] for so many tokens, `rows` samples a step: the loss of the chain's SFT, and no more."""
    optimizer, rng = pipeline.Optimizer(model, kind="muon", weight_decay=0.1), random.Random(seed)
    steps = round(tokens / rows / np.mean([len(ids) for ids, _ in samples]))
    model.train()
    for step in range(steps):
        chosen = rng.choices(samples, k=rows)
        batch = [Trajectory(torch.tensor(ids), torch.tensor(learn), torch.zeros(len(ids)), True, None) for ids, learn in chosen]
        count = sum(int(t.action.sum()) for t in batch)
        for part in micro_batches([(t, 0.0) for t in batch], 8192):
            ids, targets, _, mask = pad([t for t, _ in part])
            (-token_logp(model, ids, targets, mask, 1.0).sum() / count).backward()
        optimizer.step(pipeline.learning_rate(step, steps, lr, 0.1 * lr), 1.0)


def careless(task, rng, blind):
    """The turns of an agent whose first edit fails its test, and who does not read why: it gives up, or now and then tries another fix."""
    begun = up_to_failure(task)
    tried = next(text for role, text in begun if role == "mistake")
    again = (("assistant", rng.choice([fix for fix in task.tests["candidates"] if fix != tried])), ("tool", "ok"))
    return (*begun, *(again if rng.random() < blind else ()), ("assistant", "submit"))


def told(task, rng):
    """The same task, its turns the repair of what a user reports: in the task itself, or after a wrong fix was submitted untested."""
    if rng.random() < 0.5:
        return dataclasses.replace(task, prompt=f"{task.prompt}\n{task.tests['report']}")
    begun = up_to_failure(task)
    rest = task.detour[len(begun) :]
    return dataclasses.replace(task, turns=(*begun[:-2], ("mistake", "submit"), ("user", begun[-1][1]), *rest))


def demonstrations(plan, cfg):
    """What a start imitates, in parts, as in life with some wrong answers: {"all": ..., "reported": repairs of what a report tells}."""
    found, reported, rng = [], [], random.Random(cfg.seed)
    for i in range(plan["demonstrations"]):
        task, luck = draw_task(cfg, cfg.families, plan["levels"][i % len(plan["levels"])], 10**6 + i), rng.random()
        if task.turns:
            reported.append(tasks.trajectory_parts(told(task, rng)))
            task = dataclasses.replace(task, detour=careless(task, rng, plan["blind"]))
            own = tasks.trajectory_parts(task, detour=luck < plan["reported"] + plan["wrong"])
            found.append(reported[-1] if luck < plan["reported"] else own)
        else:
            found.append(tasks.task_parts(dataclasses.replace(task, solution=task.wrong) if luck < plan["wrong"] else task))
    return {"all": found, "reported": reported}


def study_start(out, name):
    """
    The model that all arms of a task start from, made and evaluated once; returns (configuration, {which: [(ids, in_loss)]}).

    What a former run finished is kept.
    """
    plan, start = STUDY[name], Path(out) / "study" / name / "start"
    cfg = RLConfig(**plan["cfg"], out=str(start.parent), ckpt=str(start), resume=True)
    parts = demonstrations(plan, cfg)
    tokenizer = Tokenizer.train(["".join(text for text, special, _ in sample if not special) for sample in parts["all"]], plan["vocab"])
    samples = {which: [tokenizer.encode_parts(sample) for sample in found] for which, found in parts.items()}
    if not (start / "eval.json").exists():
        torch.manual_seed(cfg.seed)
        model = LoopCoder(LoopCoderConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, **plan["shape"]))
        began = time.perf_counter()
        for phase, (which, tokens, lr) in enumerate(plan["phases"]):
            imitate(model, samples[which], tokens, cfg.seed + 1 + phase, plan["rows"], lr)
        tokenizer.save(start)
        model.save_pretrained(start)
        found = evaluate_checkpoint(start, cfg, one_thread(), must_keep=True)
        print(f"{name}: start made in {(time.perf_counter() - began) / 60:.1f} min", *comparison(found), sep="\n", flush=True)
    return cfg, samples


def study_seed(out, name, seed):
    """Every arm of a task from its start, under one seed. What a former run finished is kept, and what it had begun goes on."""
    (cfg, samples), plan = study_start(out, name), STUDY[name]
    start = Path(cfg.ckpt)
    for arm, changes in plan["arms"].items():
        own = dataclasses.replace(cfg, name=f"{arm}-{seed}", seed=seed, **(changes or {}))
        folder = result_folder(own)
        if not (folder / "eval.json").exists():
            if changes is None:  # imitation goes on for as many tokens as the first arm has trained on
                model = LoopCoder.from_pretrained(start)
                tokens = sum(r["trained"] for r in read_log(start.parent / f"grpo-{seed}"))
                imitate(model, samples["all"], tokens, seed + 2, plan["rows"], plan["phases"][-1][2] / 3)
                Tokenizer.load(start).save(folder)
                model.save_pretrained(folder)
            else:
                train(own, one_thread())
            evaluate_checkpoint(folder, own, one_thread(), must_keep=True)
        print("\n".join(f"{name}, {folder.name}: {line}" for line in comparison(evaluated(folder), evaluated(start))), flush=True)


def one_thread():
    """The world of a study's process."""
    return pipeline.start_world(pipeline.TrainConfig(device="cpu", dtype="float32", threads=1))


def study_worker():
    """How each process of a study begins. Ctrl-C is for the parent, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # as in main()
    one_thread()


def study(out, names, seeds, jobs):
    """Every arm of these tasks for so many seeds, `jobs` single-threaded processes side by side; a killed study goes on arm by arm."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), study_worker) as pool:
        try:
            cells = []
            for name, start in [(name, pool.submit(study_start, out, name)) for name in names]:
                start.result()  # one start serves all seeds
                cells += [pool.submit(study_seed, out, name, seed) for seed in range(seeds)]
            for cell in cells:
                cell.result()
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise OSError("a process of the study was killed; the same command goes on from the arms that are finished") from error
            raise


# ---------------------------------------------------------------------------------------------- the report


def chain_table(out) -> list[list[str]]:
    """A row a finished stage of the chain, from its log and its evaluations (train.py's tables and ours)."""
    names = [*pipeline.STAGES, *(stage for _, stage, _ in PATHS.values())]
    folders = [out / name for name in names if (out / name / "config.json").exists()]
    evals = {folder: evaluated(folder, "table.json") | evaluated(folder) for folder in folders}
    metrics = list(dict.fromkeys(name for found in evals.values() for name in found if "@1" in name or "recovery" in name))
    rows = [["stage", "steps", "tokens", "minutes", "bits per byte", "reward", *metrics]]
    for folder in folders:
        records = read_log(folder)
        steps = [r for r in records if "step" in r]
        bits = next((r["bits_per_byte"] for r in reversed(records) if "bits_per_byte" in r), {})
        rewards = [r["reward"] for r in steps if "reward" in r]
        fifth, total = max(1, len(rewards) // 5), sum if rewards else partial(max, default=0)  # train.py's log counts up
        tokens, seconds = (total(r[name] for r in steps) for name in ("tokens", "seconds"))
        rows.append([folder.name, str(len(steps)), f"{tokens / 1e6:.2f}M", f"{seconds / 60:.1f}",
                     ", ".join(f"{language} {value:.3f}" for language, value in bits.items()) or "-",
                     f"{np.mean(rewards[:fifth]):.3f} -> {np.mean(rewards[-fifth:]):.3f}" if rewards else "-",
                     *(in_words(evals[folder].get(name)) for name in metrics)])  # fmt: skip
    return rows if folders else []


def study_table(out) -> list[list[str]]:
    """A row for each arm and metric of the study, all seeds together; the difference to the start is paired, task by task."""
    rows = [["task", "arm", "metric", "start", "after", "gain", "gain by seed", "steps", "minutes"]]
    for name, plan in STUDY.items():
        home = out / "study" / name
        for arm in plan["arms"]:
            folders = [folder for folder in sorted(home.glob(f"{arm}-*")) if (folder / "eval.json").exists()]
            logs = [read_log(folder) for folder in folders]
            for metric in plan["metrics"] if folders else ():
                start, seeds = evaluated(home / "start")[metric], [evaluated(folder)[metric] for folder in folders]
                after = tuple(np.sum(seeds, axis=0))  # the tasks are the same under every seed
                value, low, high = pipeline.interval(after, start)
                by_seed = ", ".join(f"{pipeline.interval(one, start)[0]:+.3f}" for one in seeds)
                rows.append([name, arm.replace("_", " "), metric, in_words(start), in_words(after),
                             f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", by_seed,
                             f"{np.mean([len(log) for log in logs]):.0f}" if any(logs) else "-",
                             f"{np.mean([sum(r['seconds'] for r in log) for log in logs]) / 60:.1f}" if any(logs) else "-"])  # fmt: skip
    return rows if len(rows) > 1 else []


def in_words(pair):
    """A metric with its interval; "-" where there is none."""
    value, low, high = pipeline.interval(pair) if pair is not None else (math.nan,) * 3
    return "-" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def report(out) -> Path:
    """Write OUT/report.md from the logs and evaluations that lie under OUT: the chain, a row a stage, and the study. Nothing by hand."""
    out = Path(out)
    text = ["# What was measured", "", "Made by `python rl.py --report` from `log.jsonl` and `eval.json` of each run under this folder. In "
            "brackets: 95 % bootstrap intervals over held-out tasks, of differences paired task by task."]  # fmt: skip
    tables = {"The chain, stage by stage": chain_table(out), "The study: gains and their controls": study_table(out)}
    if not any(tables.values()):
        raise ValueError(f"{out}: no finished stage and no study to report on; run python train.py or python rl.py --study first")
    for title, rows in tables.items():
        if rows:
            text += ["", f"## {title}", "", *("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])]
    text += [line for name in ("rl.png", "study.png") if (out / name).exists() for line in ("", f"![{name}]({name})")]
    pipeline.write_atomically(out / "report.md", lambda at: at.write_text("\n".join(text) + "\n"))
    return out / "report.md"


CURVES = {  # title: its value in the record of a step
    "reward": lambda r: r["reward"],
    "pass@1 in training": lambda r: r["pass"],
    "recovery in training": lambda r: r["recovered"] / r["failed"] if r["failed"] else math.nan,
    "entropy, nats a token": lambda r: r["entropy"],
    "clipped share": lambda r: r["clip"],
}


def plot(out) -> list[Path]:
    """Draw the curves of every RL stage under OUT to OUT/rl.png, and those of the study, arm by arm, to OUT/study.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out, made = Path(out), []
    stages = [(stage, out / stage) for _, stage, _ in PATHS.values()]  # (label, folder): the seeds of an arm share label and colour
    arms = [(f"{name} {arm}", folder) for name, plan in STUDY.items() for arm in plan["arms"]
            for folder in sorted((out / "study" / name).glob(f"{arm}-*"))]  # fmt: skip
    for path, runs in ((out / "rl.png", stages), (out / "study.png", arms)):
        logs = [(label, log) for label, folder in runs if (log := [r for r in read_log(folder) if "reward" in r])]
        if not logs:
            continue
        labels = list(dict.fromkeys(label for label, _ in logs))
        curves = {title: [[value(r) for r in log] for _, log in logs] for title, value in CURVES.items()}
        curves = {title: lines for title, lines in curves.items() if not all(map(math.isnan, sum(lines, [])))}
        figure, axes = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.2))
        for ax, (title, lines) in zip(axes, curves.items()):
            for (label, log), line in zip(logs, lines):
                ax.plot(np.cumsum([r["seconds"] for r in log]) / 60, line, color=f"C{labels.index(label)}", lw=1)
            ax.set(title=title, xlabel="minutes")
        axes[0].legend([plt.Line2D([], [], color=f"C{i}") for i in range(len(labels))], labels, fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)
        made.append(path)
    if not made:
        raise ValueError(f"{out}: no RL run to draw; run python rl.py or python rl.py --study first")
    return made


# ---------------------------------------------------------------------------------------------- speed


def bench(world, rows=32, prompt=128, new=128):
    """
    Rollout tokens/s at the nano shape beside transformers' generate on a Llama of the same unrolled depth, then one GRPO step (4 prompts,
    8 samples of each, one update on all of them) beside TRL's. Always by turns; a peer that is not installed is left out. Each peer has the
    number format that it is faster in: generate float32 (`python model.py --bench` times both), TRL the one that we take.
    """
    config, cfg = LoopCoderConfig.preset("nano"), RLConfig(room=new, context=prompt + new)
    torch.manual_seed(0)
    model = LoopCoder(config).to(world.device)
    model.compute_dtype = world.dtype
    optimizer = pipeline.Optimizer(model, kind="adamw", weight_decay=0.0)
    questions = torch.randint(config.vocab_size - 9, (rows // 8, prompt))
    peer, seconds = peer_llama(), defaultdict(list)
    peer = peer and peer.to(world.device).eval()

    def timed(name, work):
        start = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - start)
        return result

    def median(name):
        return float(np.median(seconds[name]))

    def talk(ids):
        yield Ask(ids, new)
        return lambda: {"reward": 0.0}

    def our_step():
        episodes = [talk(ids) for ids in questions.tolist() for _ in range(8)]
        lived = timed("rollout", lambda: Rollout(model.eval(), -1, prompt + new, rows).run(episodes, [0]))
        samples = [(t, (-1.0) ** i) for i, t in enumerate(lived)]
        timed("update", lambda: update(model.train(), optimizer, samples, cfg, 1e-6, world))

    forced = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    for _ in range(5):
        our_step()
        if peer:
            timed("transformers", lambda: peer.generate(questions.repeat_interleave(8, 0).to(world.device), **forced))
    for name, there in (("rl.py", "rollout"), ("transformers", "transformers")):
        if there in seconds:
            print(f"rollout {rows} x {prompt} + {new}: {name:<13} {rows * new / median(there):6.0f} tokens/s, {median(there):.2f} s")
    if peer:
        print(f"rl.py samples {median('transformers') / median('rollout'):.2f} x as fast")
    seconds.clear()
    theirs = trl_steps(peer, questions, new, 4, our_step, world.dtype == torch.bfloat16) if peer and world.device.type == "cpu" else []
    for _ in range(3 if not theirs else 0):
        our_step()
    ours = median("rollout") + median("update")
    line = f"GRPO step of {rows} samples, one update: rl.py {ours:.2f} s, of it rollout {median('rollout'):.2f} s"
    print(line + (f"; TRL {np.median(theirs):.2f} s: {np.median(theirs) / ours:.2f} x as fast" if theirs else ""))


def trl_steps(peer, questions, new, steps, between, bf16):
    """Seconds of each of TRL's GRPO steps on the same prompts, its KL and its recomputation off; after each, between() has its turn."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer as Words
        from tokenizers import models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return []
    words, seconds, began = Words(models.WordLevel({str(i): i for i in range(peer.config.vocab_size)}, unk_token="0")), [], []
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - began[-1])
            between()

    with tempfile.TemporaryDirectory() as folder:
        forced = {"min_new_tokens": new, "use_cache": True, "top_k": 0}
        cfg = GRPOConfig(folder, max_steps=steps, per_device_train_batch_size=8 * len(questions), num_generations=8, learning_rate=1e-6,
                         max_completion_length=new, generation_kwargs=forced, epsilon_high=0.28, gradient_checkpointing=False, bf16=bf16,
                         use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)  # fmt: skip
        rows = Dataset.from_list([{"prompt": " ".join(map(str, ids))} for _ in range(steps) for ids in questions.tolist()])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")
        reward = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
        GRPOTrainer(peer, reward, cfg, train_dataset=rows, processing_class=tokenizer, callbacks=[Turns()]).train()
    return seconds


# ---------------------------------------------------------------------------------------------- command line


def arguments(argv):
    """The command line as (RLConfig, all that was given)."""
    parser = argparse.ArgumentParser(
        prog="rl.py",
        description="Reinforcement learning with verifiable rewards: GRPO on the thinking or the instruct path, or an agent that repairs "
        "repositories (swe), from the chain's checkpoint of that path. Prints a line a step, then held-out metrics with their paired "
        "differences, and writes the checkpoint to its stage under --out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    for f in dataclasses.fields(RLConfig):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if isinstance(f.default, bool):
            parser.add_argument(name, action="store_true", default=f.default, help=help)
        else:
            parser.add_argument(name, type=type(f.default), default=f.default, help=help)
    parser.add_argument("--eval", metavar="CKPT", help="print the held-out metrics of this checkpoint (without --families: of the path's "
                        "and of the agent) and leave")  # fmt: skip
    parser.add_argument("--against", metavar="CKPT", help="with --eval: paired differences to this checkpoint")
    parser.add_argument("--report", action="store_true", help="write OUT/report.md from the logs of the chain and the study, and leave")
    parser.add_argument("--plot", action="store_true", help="draw OUT/rl.png and OUT/study.png and leave (needs matplotlib)")
    parser.add_argument("--study", nargs="?", const="all", choices=["all", *STUDY], help="gains and controls on small models; goes on "
                        "where it was stopped, ends with the report; then leave")  # fmt: skip
    parser.add_argument("--bench", action="store_true", help="speed of rollouts and of a step, beside transformers where installed")
    parser.add_argument("--seeds", type=int, default=3, help="with --study: repetitions")
    parser.add_argument("--jobs", type=int, default=2, help="with --study: processes side by side, of one thread each")
    names = [f.name for f in dataclasses.fields(RLConfig)]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))  # None: not given
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    cfg = RLConfig(**given)
    heard = {"study": ["out"], "report": ["out"], "plot": ["out"], "bench": ["device", "dtype", "threads"], "eval": names}
    for work in (work for work in heard if getattr(args, work)):
        deaf = ", ".join("--" + name.replace("_", "-") for name in given if name not in heard[work])
        if deaf:
            raise ValueError(f"--{work} does not hear {deaf}" + ("; its settings stand in STUDY in rl.py" if work == "study" else ""))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"--{work} works in one process: start it with python in place of torchrun")
    if args.against and not args.eval:
        raise ValueError("--against CKPT compares with --eval CKPT; give both")
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.eval and not cfg.eval_tasks:
        raise ValueError("--eval-tasks 0: an evaluation needs at least one task a family")
    if args.eval and not args.families:  # the agent is evaluated too: nothing else measures it
        cfg.families = ",".join(dict.fromkeys([*cfg.families.split(","), "swe"]))
    return cfg, args


def draw_and_report(out):
    """The figures, where matplotlib is installed, and the report that shows them."""
    try:
        plot(out)
    except ImportError:
        pass
    print(report(out))


def main(argv=None):
    """Read the options, then train, evaluate, report, draw or study."""
    cfg, args = arguments(argv)
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # what a model writes may look odd and parse: no one's news
    if args.plot:
        print(*plot(cfg.out), sep="\n")
    if args.report:
        print(report(cfg.out))
    if args.report or args.plot:
        return
    world = pipeline.start_world(pipeline.TrainConfig(device=cfg.device, dtype=cfg.dtype, threads=cfg.threads))
    if args.bench:
        return bench(world)
    if world.main:
        facts = sandbox.protection()
        print(f"sandbox: {facts.pop('level')} protection; " + "; ".join(f"{layer} {words}" for layer, words in facts.items()), flush=True)
    if args.study:
        names = list(STUDY) if args.study == "all" else [args.study]
        study(cfg.out, names, args.seeds, args.jobs)
        return draw_and_report(cfg.out)
    if args.eval:
        for folder in filter(None, (args.eval, args.against)):
            start_folder(dataclasses.replace(cfg, ckpt=folder))
        before = evaluate_checkpoint(args.against, cfg, world) if args.against else None
        return print("\n".join(comparison(evaluate_checkpoint(args.eval, cfg, world), before)))
    start = start_folder(cfg)
    if world.main:
        print(f"rl.py: {json.dumps(dataclasses.asdict(cfg))}\n{start} -> {result_folder(cfg)} on {world.device}, {world.size} process(es)")
    with pipeline.watch(world):
        folder = train(cfg, world)
    if world.main and cfg.eval_tasks:
        print("\n".join(comparison(evaluate_checkpoint(folder, cfg, world), evaluate_checkpoint(start, cfg, world))))
        if not cfg.name:  # else it is no stage of the chain, which the report is of
            draw_and_report(cfg.out)
    pipeline.end_world()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, pipeline.LostRank) as error:
        print(f"rl.py: {error}", file=sys.stderr)
        sys.exit(4 if isinstance(error, pipeline.LostRank) else 2)  # as train.py
    except KeyboardInterrupt:
        sys.exit(130)
