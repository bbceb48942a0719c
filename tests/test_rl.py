"""rl.py: the objective against exact enumeration, rollouts against the training forward, rewards that cannot be bought."""

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl
import tasks
import train
from data import Tokenizer
from model import LoopCoder, LoopCoderConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where another program wants it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------- advantages


def random_rewards(seed, prompts=5, samples=7):
    return torch.rand(prompts, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("std", [False, True])
def test_advantages_sum_to_zero_in_a_group_and_ignore_an_added_constant(std):
    rewards = random_rewards(0)
    adv = rl.advantages(rewards, std=std)
    torch.testing.assert_close(adv.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(rl.advantages(rewards + 3.5, std=std), adv, rtol=0, atol=1e-6)


def test_advantages_are_zero_when_all_samples_earn_the_same():
    for std in (False, True):
        assert rl.advantages(torch.full((3, 4), 0.7), std=std).abs().max() < 1e-6


def test_advantages_scale_with_the_reward_unless_divided_by_its_spread():
    rewards = random_rewards(1)
    torch.testing.assert_close(rl.advantages(10 * rewards), 10 * rl.advantages(rewards))
    torch.testing.assert_close(rl.advantages(10 * rewards, std=True), rl.advantages(rewards, std=True), rtol=0, atol=1e-4)


def test_a_group_does_not_see_another_group():
    rewards, order = random_rewards(2), torch.tensor([3, 0, 4, 1, 2])
    for std in (False, True):
        torch.testing.assert_close(rl.advantages(rewards[order], std=std), rl.advantages(rewards, std=std)[order], rtol=0, atol=0)
    alone = torch.cat([rl.advantages(row[None]) for row in rewards])
    torch.testing.assert_close(rl.advantages(rewards), alone, rtol=0, atol=0)


def test_a_broken_sandbox_is_left_out_of_the_group_not_scored_zero():
    rewards = torch.tensor([[1.0, 0.0, 1.0, math.nan]])
    valid = torch.tensor([[True, True, True, False]])
    adv = rl.advantages(rewards, valid)
    torch.testing.assert_close(adv[:, :3], rl.advantages(rewards[:, :3]))
    assert adv[0, 3] == 0
    assert torch.isfinite(rl.advantages(rewards, valid, std=True)).all()


def test_groups_without_a_difference_in_the_verdict_are_not_trained_on():
    primary = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.35, 0.35, 0.35], [0.0, 1.0, 1.0], [0.3, 0.35, 0.3], [1.0, 1.0, 0.9]])
    assert rl.informative(primary).tolist() == [False, False, False, True, True, True]
    assert rl.informative(primary, low=0.1, high=0.875).tolist() == [False, False, False, True, True, False]
    only_error_differs = torch.tensor([[1.0, 1.0, 0.0]])
    assert rl.informative(only_error_differs, torch.tensor([[True, True, False]])).tolist() == [False]


# ---------------------------------------------------------------------------------------------- the loss


def ragged(seed=0, B=4, T=9, dtype=torch.float64):
    """Log-probs of a small differentiable policy over ragged rows, with masks and advantages."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(B, T, 6, generator=g, dtype=dtype, requires_grad=True)
    tokens = torch.randint(6, (B, T), generator=g)
    lengths = torch.tensor([9, 1, 4, 6])[:B]
    mask = torch.arange(T) < lengths[:, None]
    return theta, lambda th: th.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], mask, torch.randn(B, generator=g, dtype=dtype)


def test_on_policy_the_gradient_is_that_of_reinforce_and_the_value_says_nothing():
    theta, logp, mask, adv = ragged()
    lp = logp(theta)
    loss = rl.grpo_loss(lp, lp.detach(), adv, mask)
    (grad,) = torch.autograd.grad(loss, theta)
    (expected,) = torch.autograd.grad(-(adv[:, None] * logp(theta) * mask).sum() / mask.sum(), theta)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.detach(), -(adv * mask.sum(1)).sum() / mask.sum())
    equal = torch.ones_like(mask)
    zero_sum = rl.advantages(adv[None])[0]
    assert abs(float(rl.grpo_loss(lp, lp.detach(), zero_sum, equal).detach())) < 1e-12


@pytest.mark.parametrize(
    "ratio, adv, high, alive",
    [
        (1.25, +1, 0.28, True), (1.25, +1, 0.20, False), (1.30, +1, 0.28, False), (0.50, +1, 0.28, True),
        (0.85, -1, 0.28, True), (0.75, -1, 0.28, False), (1.90, -1, 0.28, True), (1.00, +1, 0.28, True),
    ],
)  # fmt: skip
def test_the_clip_table(ratio, adv, high, alive):
    old = torch.tensor([[-1.5]], dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    advantage = torch.tensor([float(adv)], dtype=torch.float64)
    rl.grpo_loss(logp, old, advantage, mask, clip_low=0.2, clip_high=high).backward()
    _, cut = rl.surrogate(logp.detach(), old, advantage, mask, clip_low=0.2, clip_high=high)
    assert (logp.grad.item() != 0) == alive
    assert cut.item() == (not alive)
    if alive:
        assert logp.grad.item() == pytest.approx(-adv * ratio)


def test_the_clip_is_dead_in_the_first_update_and_alive_in_later_ones():
    theta, logp, mask, adv = ragged(3)
    old, shares = logp(theta).detach(), []
    for _ in range(4):
        lp = logp(theta)
        shares.append(float(rl.surrogate(lp.detach(), old, adv, mask)[1].sum() / mask.sum()))
        (grad,) = torch.autograd.grad(rl.grpo_loss(lp, old, adv, mask), theta)
        theta = (theta - 5.0 * grad).detach().requires_grad_()
    assert shares[0] == 0 and max(shares[1:]) > 0


def test_a_long_sample_weighs_by_its_tokens_or_as_much_as_a_short_one():
    mask = torch.arange(9) < torch.tensor([1, 9])[:, None]
    adv = torch.ones(2, dtype=torch.float64)
    for average, expected in (("token", [0.1, 0.9]), ("sequence", [0.5, 0.5])):
        logp = torch.full((2, 9), -1.0, dtype=torch.float64, requires_grad=True)
        rl.grpo_loss(logp, logp.detach(), adv, mask, average=average).backward()
        assert (-logp.grad).sum(1).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="token"):
        rl.grpo_loss(logp, logp, adv, mask, average="words")


def test_with_dr_grpo_a_long_wrong_answer_is_not_punished_less_per_token_than_a_short_one(tokenizer, start):
    mask = torch.arange(9) < torch.tensor([3, 9])[:, None]

    def per_token(average, lengths=slice(0, 2), total=None):
        logp, kept = torch.full((2, 9), -1.0, dtype=torch.float64, requires_grad=True), mask[lengths]
        rl.grpo_loss(logp[lengths], logp[lengths].detach(), -torch.ones(len(kept)), kept, average=average, total=total).backward()
        return logp.grad[:, 0].tolist()

    assert per_token("sequence") == pytest.approx([1 / 6, 1 / 18])  # the fault: to go on about it makes it cheaper
    assert per_token("dr_grpo", total=2 * 32) == pytest.approx([1 / 64, 1 / 64])
    assert per_token("token", slice(0, 1))[0] != per_token("token")[0]  # and there the other answers set the price
    with pytest.raises(ValueError, match="total"):
        per_token("dr_grpo")
    model, cfg = small_model(tokenizer), config(start, "x", average="dr_grpo", micro_tokens=12)  # a sample a micro-batch
    samples = []
    for n, advantage in ((4, 1.0), (9, -1.0), (11, 0.5)):
        ids, action = torch.arange(n) + 5, torch.arange(n) > 0
        one = rl.Trajectory(ids, action, torch.zeros(n), True, None)
        one.logp[1:] = rl.token_logp(model, *(x for i, x in enumerate(rl.pad([one])) if i != 2), cfg.temperature)[0].detach()
        samples.append((one, advantage))
    done = rl.update(model, rl.pipeline.Optimizer(model, kind="adamw", weight_decay=0.0), samples, cfg, 0.0, world())
    assert done["loss"] == pytest.approx(-(3 * 1.0 - 8 * 1.0 + 10 * 0.5) / (3 * cfg.room), abs=1e-6) and cfg.room == 8


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_any_split_into_micro_batches_gives_the_same_gradient(average):
    theta, logp, mask, adv = ragged(5)
    old = logp(theta).detach() + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (whole,) = torch.autograd.grad(rl.grpo_loss(logp(theta), old, adv, mask, average=average), theta)
    total = mask.sum() if average == "token" else len(mask)
    for split in ([1, 3], [2, 2], [1, 1, 1, 1]):
        lp, parts, start = logp(theta), 0, 0
        for n in split:
            rows = slice(start, start + n)
            parts = parts + rl.grpo_loss(lp[rows], old[rows], adv[rows], mask[rows], average=average, total=total)
            start += n
        (grad,) = torch.autograd.grad(parts, theta)
        torch.testing.assert_close(grad, whole, rtol=0, atol=1e-12)


def test_what_lies_outside_the_mask_changes_nothing_not_even_nan():
    theta, logp, mask, adv = ragged(7)
    old = logp(theta).detach() - 0.1
    (clean,) = torch.autograd.grad(rl.grpo_loss(logp(theta), old, adv, mask), theta)
    for junk in (5.0, -1e9, math.inf, math.nan):
        dirty = torch.where(mask, old, junk)
        (grad,) = torch.autograd.grad(rl.grpo_loss(logp(theta), dirty, adv, mask), theta)
        torch.testing.assert_close(grad, clean, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- the expected gradient, exactly


def policy():
    """Vocabulary 3, length 2: nine sequences, with their log-probs as functions of one parameter vector."""
    theta = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))

    def logp(theta):
        first, second = theta[:3].log_softmax(0), theta[3:].view(3, 3).log_softmax(1)
        return torch.stack([first[sequences[:, 0]], second[sequences[:, 0], sequences[:, 1]]], 1)  # (9, 2)

    return theta, logp


def expected_gradient(theta, logp, rewards, G, std=False, leave_one_out=False):
    """- E[gradient of grpo_loss] over every possible group of G samples, each weighted with its probability."""
    groups = torch.tensor(list(itertools.product(range(9), repeat=G)))  # (M, G)
    lp = logp(theta)
    chance = lp.detach().sum(1)[groups].sum(1).exp()  # (M,)
    adv = rl.advantages(rewards[groups], std=std) * (G / (G - 1) if leave_one_out else 1)
    rows = groups.flatten()
    # At p = p_old the loss is linear in the advantages, so the probability of a group can ride on them.
    loss = rl.grpo_loss(lp[rows], lp[rows].detach(), (adv * chance[:, None]).flatten(), torch.ones(len(rows), 2, dtype=torch.bool), total=G)
    return -torch.autograd.grad(loss, theta)[0]


def true_gradient(theta, logp, rewards):
    return torch.autograd.grad((logp(theta).sum(1).exp() * rewards).sum(), theta)[0]


@pytest.mark.parametrize("G", [2, 3, 4])
def test_the_expected_gradient_is_that_of_the_mean_reward_by_enumeration(G):
    theta, logp = policy()
    rewards = torch.rand(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    true = true_gradient(theta, logp, rewards)
    torch.testing.assert_close(expected_gradient(theta, logp, rewards, G), true * (G - 1) / G, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(theta, logp, rewards, G, leave_one_out=True), true, rtol=0, atol=1e-12)


def test_dividing_by_the_spread_turns_the_gradient_unless_rewards_are_zero_or_one():
    theta, logp = policy()
    cosine = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    binary = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0], dtype=torch.float64)
    rates = torch.tensor([0.05, 1, 0.3, 0, 0.55, 0.2, 1, 0.1, 0.9], dtype=torch.float64)
    assert cosine(expected_gradient(theta, logp, binary, 3, std=True), true_gradient(theta, logp, binary)) == pytest.approx(1, abs=1e-5)
    assert cosine(expected_gradient(theta, logp, rates, 3, std=True), true_gradient(theta, logp, rates)) < 0.999
    # Two prompts of different difficulty, each with 0/1 rewards: parallel one by one, not in sum. (With G = 3 every group that
    # teaches has the same spread; from G = 4 on the spread depends on the difficulty.)
    hard = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    true = true_gradient(theta, logp, binary) + true_gradient(theta, logp, hard)
    both = lambda std: expected_gradient(theta, logp, binary, 5, std) + expected_gradient(theta, logp, hard, 5, std)
    assert 1 - cosine(both(False), true) < 1e-12
    assert 1 - cosine(both(True), true) > 1e-4


# ---------------------------------------------------------------------------------------------- rewards


def test_overlong_punishment_is_the_piecewise_line_of_dapo():
    values = [rl.overlong_penalty(n, 20480, 4096) for n in (0, 16384, 16385, 18432, 20480, 30000)]
    assert values == pytest.approx([0, 0, -1 / 4096, -0.5, -1, -1])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=5), st.lists(st.booleans(), max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5), st.lists(st.booleans(), max_size=5),
    st.lists(st.integers(0, 50), min_size=6, max_size=6),
)  # fmt: skip
def test_no_waste_ever_puts_a_solved_run_below_an_unsolved_one(f2p_a, p2p_a, f2p_b, p2p_b, n):
    def score(f2p, p2p, tokens, redundant, unproductive):
        return rl.swe_reward(f2p, p2p) - rl.swe_penalty(20 * tokens, 400, redundant, unproductive)

    a, b = score(f2p_a, p2p_a, *n[:3]), score(f2p_b, p2p_b, *n[3:])
    solved_a, solved_b = all(f2p_a) and all(p2p_a), all(f2p_b) and all(p2p_b)
    assert (a >= 0.6 - 1e-9) == solved_a and (b >= 0.6 - 1e-9) == solved_b
    if solved_a and not solved_b:
        assert a > b + 0.29


def test_a_repair_that_breaks_something_else_earns_nothing():
    assert rl.swe_reward([True, True], [True, False]) == 0
    assert rl.swe_reward([True, True], []) == 1
    assert rl.swe_reward([True, False], [True]) == pytest.approx(0.15)


# ---------------------------------------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for n in range(40) for t in [tasks.generate("swe", 2, n)] for text in (t.prompt, *(text for _, text in t.detour))]
    return Tokenizer.train(texts, 340)


def small_model(tokenizer, seed=0, **changes):
    """Random weights, spread enough that its choices are neither uniform nor certain; a window shorter than the episodes."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, max_position_embeddings=512, loop_window_size=16, initializer_range=0.2)  # fmt: skip
    return LoopCoder(LoopCoderConfig(**{**shape, **changes})).eval()


def chatter(tokenizer, turns, room, seen):
    """An episode of some turns with prompts and observations of varying length, which notes everything that passes by."""
    text = "Fix pick in core.py. " * (1 + turns)
    for turn in range(turns):
        ids = tokenizer.encode(text)
        seen += ids
        answer, ended = yield rl.Ask(ids, room)
        seen += answer + [tokenizer.special["<|im_end|>"]] * ended
        text = f"observation {turn} of {len(answer)}"
        value = yield lambda turn=turn: turn + 1
        assert value == turn + 1
    return lambda: {"reward": float(len(seen)), "primary": 1.0, "solved": True}


def converse(model, tokenizer, temperature=1.0, n=23, **options):
    notes = [[] for _ in range(n)]
    roller = rl.Rollout(model, tokenizer.special["<|im_end|>"], context=200, temperature=temperature, **options)
    lived = roller.run([chatter(tokenizer, 1 + i % 4, 5 + i % 7, notes[i]) for i in range(n)], seed=[7])
    return lived, notes


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("changes", [{"loop_num": 1}, {}, {"loop_num": 3}, {"loop_input": "shift"}], ids=["1", "2", "3", "shift"])
def test_log_probs_stored_while_sampling_are_those_of_the_training_forward(tokenizer, changes, temperature):
    model = small_model(tokenizer, **changes)
    lived, _ = converse(model, tokenizer, temperature, slots=6)
    ids, targets, old_logp, mask = rl.pad(lived)
    with torch.no_grad():
        logp = rl.token_logp(model, ids, targets, mask, temperature)
        alone = [rl.token_logp(model, ids, targets, mask, temperature)[mask] for t in lived for ids, targets, _, mask in [rl.pad([t])]]
    assert mask.sum() == sum(int(t.action.sum()) for t in lived) > 300
    torch.testing.assert_close(logp[mask], old_logp[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(logp[mask], torch.cat(alone), rtol=0, atol=1e-4)
    assert (logp[~mask] == 0).all()
    if temperature != 1:
        assert (rl.token_logp(model, ids, targets, mask, 1.0)[mask] - old_logp[mask]).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{"loop_num": 1}, {}, {"loop_input": "shift"}], ids=["1", "2", "shift"])
def test_sharing_what_rows_begin_with_changes_neither_log_probs_nor_gradients(tokenizer, changes):
    model, g = small_model(tokenizer, **changes), torch.Generator().manual_seed(2)
    T, lengths = 90, [70, 90, 41, 90, 3, 66]  # longer than the window
    ids, mask = torch.randint(4, (6, T), generator=g), torch.zeros(6, T, dtype=torch.bool)
    ids[1:3, :40] = ids[0, :40]  # three rows of one prompt; the others part at once or after a few tokens
    for row, n in enumerate(lengths):
        mask[row, n // 2 : n] = True
        ids[row, n:] = 0
    targets, weight = torch.randint(4, (6, T), generator=g), torch.randn(6, T, generator=g)
    plain = model(ids)[0].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    shared = rl.token_logp(model, ids, targets, mask, 1.0)
    torch.testing.assert_close(shared[mask], plain[mask], rtol=0, atol=1e-5)
    want, got = (torch.autograd.grad((x * weight)[mask].sum(), list(model.parameters())) for x in (plain, shared))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_each_distinct_beginning_of_a_row_goes_through_the_matrix_products_once(tokenizer):
    model, seen = small_model(tokenizer), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    ids, mask = torch.arange(60).expand(8, 60).clone(), torch.zeros(8, 60, dtype=torch.bool)
    ids[:, 50:], mask[:, 50:58] = torch.arange(80).view(8, 10), True  # 50 tokens that all share, 8 of their own, 2 of padding
    rl.token_logp(model, ids, ids, mask, 1.0)
    assert seen == [50 + 8 * 8] * model.config.loop_num


def test_what_is_trained_is_what_was_seen_and_said_id_for_id(tokenizer):
    lived, notes = converse(small_model(tokenizer), tokenizer, slots=5)
    for trajectory, seen in zip(lived, notes):
        assert trajectory.ids.tolist() == seen
        assert trajectory.outcome["reward"] == len(seen)
    # Sampled ids are not what encoding their text would give: a round trip through text would have changed what is trained.
    said = [t.ids[t.action].tolist() for t in lived]
    assert any(tokenizer.encode(tokenizer.decode(ids)) != ids for ids in said)


def test_an_episode_does_not_depend_on_slots_neighbours_or_the_speed_of_the_sandbox(tokenizer):
    model = small_model(tokenizer)
    one, _ = converse(model, tokenizer, slots=23, workers=8)
    for options in ({"slots": 4}, {"slots": 1, "workers": 1}, {"slots": 9, "every": 1}, {"slots": 23, "every": 7}):
        other, _ = converse(model, tokenizer, **options)
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(one, other))
        assert all(torch.allclose(a.logp, b.logp, atol=1e-5) for a, b in zip(one, other))


def test_the_end_token_is_an_action_and_prompt_and_observations_are_not(tokenizer):
    lived, notes = converse(small_model(tokenizer), tokenizer, n=60, slots=30)
    end = tokenizer.special["<|im_end|>"]
    ends = [t for t in lived if t.ended]
    assert ends and len(ends) < len(lived)
    for t in lived:
        assert bool(t.action[-1]) and t.ended == (int(t.ids[-1]) == end)
        first = int(t.action.nonzero()[0])
        assert tokenizer.decode(t.ids[:first].tolist()).startswith("Fix pick")
        assert not t.action[:first].any() and (t.logp[~t.action] == 0).all() and (t.logp[t.action] < 0).all()


def test_sampling_follows_the_distribution_and_greedy_takes_the_best():
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -1.0])
    for temperature in (1.0, 0.5):
        n = 20000
        uniform = (torch.arange(n) + 0.5) / n  # every quantile once, so the shares are exact
        token, logp = rl.draw(logits.expand(n, -1), uniform, temperature)
        p = torch.softmax(logits / temperature, -1)
        torch.testing.assert_close(torch.bincount(token, minlength=5) / n, p, rtol=0, atol=2e-4)
        torch.testing.assert_close(logp, p.log()[token], rtol=0, atol=1e-5)
    edge, _ = rl.draw(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1), torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert set(edge.tolist()) <= {1, 2}  # not even the ends of the unit interval draw what has no probability
    assert rl.draw(logits[None], torch.zeros(1), 0)[0].item() == 0


def broken(tokenizer, when):
    """An episode whose sandbox breaks during it, while it is judged, or not at all."""
    yield rl.Ask(tokenizer.encode("Fix"), 3)

    def fails():
        raise RuntimeError("the sandbox broke")

    if when == "during":
        yield fails
    return fails if when == "judge" else lambda: {"reward": 1.0}


def test_a_sandbox_that_breaks_costs_its_episode_the_reward_and_no_other(tokenizer):
    episodes = [broken(tokenizer, when) for when in ("", "during", "", "judge", "")]
    lived = rl.Rollout(small_model(tokenizer), 0, 50, slots=2).run(episodes, [1])
    assert [t.outcome is None for t in lived] == [False, True, False, True, False]
    for found, judged in ((lived, True), ([lived[1], lived[3]], False)):
        roller = SimpleNamespace(run=lambda episodes, seed, found=found: found)
        with contextlib.nullcontext() if judged else pytest.raises(OSError, match="no verdict on any of 2"):
            assert sum(rl.trajectories(roller, tokenizer, None, None, [], [], 2, [1]), []) == lived
    assert all(t.action.sum() == 3 for t in lived)


@pytest.mark.parametrize("where", ["here", "on a server"])
def test_a_prompt_that_does_not_fit_is_an_error_and_an_observation_that_does_not_cuts_the_episode(tokenizer, where):
    def long(first, second, answers):
        answers.append((yield rl.Ask([65] * first, 4)))
        answers.append((yield rl.Ask([66] * second, 4)))
        return lambda: {"reward": 0.0}

    model, end, answers = small_model(tokenizer), tokenizer.special["<|im_end|>"], []
    with torch.no_grad():
        model.lm_head.weight[end] *= 100  # some first answers come to their end, so it is the context that cuts those episodes
    if where == "here":
        roller = rl.Rollout(model, end, context=40, slots=2)
    else:
        roller = rl.RemoteRollout("http://nowhere", model, tokenizer, context=40)
        roller.complete = lambda ids, room, seed: ([70, 71], True)
    for t in roller.run([long(10, 30, answers) for _ in range(8)], [1]):
        assert not t.ended and 10 < len(t.ids) <= 14 and t.outcome is not None
    assert answers.count(([], False)) == 8 and any(ended for _, ended in answers)
    with pytest.raises(ValueError, match="--context"):
        roller.run([long(41, 1, [])], [1])
    if where == "on a server":
        roller.complete = lambda ids, room, seed: ([], False)
        (t,) = roller.run([long(10, 20, [])], [1])
        assert len(t.ids) == 30 and not t.action.any()


def test_the_same_question_goes_to_the_sandbox_once_even_from_many_threads():
    verdicts, calls = rl.Verdicts(), []

    def work():
        calls.append(1)
        time.sleep(0.05)
        return 0.5

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: verdicts(n % 2, work), range(16))) == [0.5] * 16
    assert len(calls) == verdicts.runs == 2

    def fails():
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            verdicts("x", fails)
    assert verdicts("x", lambda: 1.0) == 1.0  # a failure of the machinery is not remembered as a verdict


# ---------------------------------------------------------------------------------------------- the repository agent


def play(task, tokenizer, calls, verdicts, **options):
    """Drive one swe_episode by hand with a list of calls: (what it was shown after each, outcome)."""
    return finish(rl.swe_episode(task, tokenizer, verdicts, 64, 768, **options), tokenizer, calls)


def finish(episode, tokenizer, calls):
    seen, answer = [], None
    try:
        for call in [None, *calls]:
            answer = episode.send(answer if call is None else (tokenizer.encode(call), True))
            while not isinstance(answer, rl.Ask):
                answer = episode.send(answer())
            seen.append(tokenizer.decode(answer.ids))
            answer = None
    except StopIteration as end:
        return seen, end.value()
    raise AssertionError("the episode did not end")


@pytest.mark.parametrize("level", [1, 2, 3, 5])
def test_the_demonstrations_solve_their_task_and_read_what_was_demonstrated(tokenizer, level):
    verdicts = rl.Verdicts()
    for seed in (0, 1):
        task = tasks.generate("swe", level, seed)
        for turns, failed in ((task.turns, False), (task.detour, True)):
            seen, outcome = play(task, tokenizer, [text for role, text in turns if role != "tool"], verdicts)
            assert outcome["solved"] and outcome["primary"] == 1.0 and outcome["first_failed"] is failed and outcome["stop"] == "submit"
            assert outcome["reward"] == 1.0 - outcome["penalty"] and outcome["redundant"] == 0
            told = [text for role, text in turns if role == "tool"]
            assert len(seen) == len(told) + 1
            for text, shown in zip(told, seen[1:]):
                assert f"tool\n{text}" in shown


def test_wrong_edits_stay_unsolved_and_the_budget_ends_blind_trying(tokenizer):
    task, verdicts = tasks.generate("swe", 2, 3), rl.Verdicts()
    view = next(text for role, text in task.turns if role == "assistant")
    wrong = [edit for edit in task.tests["candidates"] if edit != task.solution]
    assert play(task, tokenizer, ["submit"], verdicts)[1]["primary"] < 0.31
    _, outcome = play(task, tokenizer, [view, wrong[0], "test", wrong[1], "test", task.solution], verdicts)
    assert not outcome["solved"] and outcome["stop"] == "calls" and outcome["first_failed"]
    _, outcome = play(task, tokenizer, [view, view, wrong[0], wrong[0], "submit"], verdicts)
    assert outcome["redundant"] == 2 - 1 + 0 and outcome["penalty"] == pytest.approx(0.05 + 0.05)  # one repeated call, one idle edit
    lines = play(task, tokenizer, [view, "edit nowhere.py 1 x = 1", "test", "submit"], verdicts)
    assert "no such file" in lines[0][2] and "FAIL" in lines[0][3]


def test_a_repeated_call_is_redundant_only_where_no_edit_took_effect_in_between(tokenizer):
    task = tasks.generate("swe", 2, 3)
    view, wrong = (next(text for role, text in task.detour if role == kind) for kind in ("assistant", "mistake"))
    path, line = wrong.split()[1:3]
    back = f"edit {path} {line} {task.files[path].splitlines()[int(line) - 1].strip()}"
    for calls, redundant in (
        ([view, view], 1), ([view, "test", view, "test"], 2), ([view, wrong, view], 0), ([view, "edit nowhere.py 1 x = 1", view], 1),
        ([view, "test", wrong, back, view, "test"], 0),  # the files are as they were, and the edits did happen
        ([wrong, wrong], 0), ([wrong, wrong, wrong], 1),  # the second is idle, which has a price of its own
    ):  # fmt: skip
        state = rl.SweState(task.files)
        for call in calls:
            state.act(call)
        assert state.redundant == redundant, calls
    assert state.files != task.files


def test_without_penalties_waste_is_counted_and_costs_nothing(tokenizer, start):
    task, verdicts = tasks.generate("swe", 2, 3), rl.Verdicts()
    calls = [next(text for role, text in task.turns if role == "assistant")] * 2 + [task.solution, "submit"]
    for penalties, reward in (("on", 0.95), ("off", 1.0)):
        cfg = config(start, "x", path="swe", families="swe", penalties=penalties, room=64, context=768)
        _, outcome = finish(rl.episode_of(task, tokenizer, verdicts, cfg), tokenizer, calls)
        assert outcome["reward"] == pytest.approx(reward) and outcome["redundant"] == 1 and outcome["penalty"] == pytest.approx(0.05)
        lived = rl.Trajectory(torch.zeros(0), torch.zeros(0), torch.zeros(0), True, outcome)
        assert rl.counts_of([(task, [lived, lived])])["redundant"] == 2


def test_an_edit_that_no_parser_survives_is_an_unproductive_edit(tokenizer):
    task = tasks.generate("swe", 1, 5)
    state = rl.SweState(task.files)
    assert state.act(f"edit {next(iter(task.files))} 1 {'-' * 20000}1") == "ok" and state.unproductive == 1


def test_nothing_an_agent_writes_reaches_the_tests_that_pay_it(tokenizer):
    task, verdicts = tasks.generate("swe", 1, 5), rl.Verdicts()
    path, cheats = next(iter(task.files)), [
        "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "class A(int): __eq__ = lambda s, o: True",
        "import builtins; builtins.repr = lambda x: 'PASS'", "open('test_hidden.py', 'w').write('')", "print('1 passed')",
    ]  # fmt: skip
    assert not any("test" in name for name in task.files)
    for cheat in cheats:
        _, outcome = play(task, tokenizer, [f"edit {path} 1 {cheat}", "submit"], verdicts)
        assert outcome["primary"] < 0.31 and not outcome["solved"], cheat


def test_shuffled_feedback_shows_another_tasks_failure_and_a_planted_start_stands_behind_a_failed_test(tokenizer):
    task, verdicts = tasks.generate("swe", 2, 4), rl.Verdicts()
    view, wrong = task.turns[0][1], next(text for role, text in task.detour if role == "mistake")
    true, _ = play(task, tokenizer, [view, wrong, "test", "submit"], verdicts)
    false, _ = play(task, tokenizer, [view, wrong, "test", "submit"], verdicts, shuffled=True)
    assert "FAIL" in true[-1] and "FAIL" in false[-1] and true[-1] != false[-1]
    seen, outcome = play(task, tokenizer, [task.solution, "test", "submit"], verdicts, planted=True)
    assert "FAIL" in seen[0] and wrong in seen[0] and outcome["solved"] and outcome["first_failed"]
    assert not play(task, tokenizer, ["submit"], verdicts, planted=True)[1]["solved"]
    (foreign,), _ = play(task, tokenizer, ["submit"], verdicts, planted=True, shuffled=True)
    assert "FAIL" in foreign and foreign != seen[0] and foreign.split("FAIL")[0] == seen[0].split("FAIL")[0]


def test_what_a_study_starts_from_repairs_what_a_user_reports_and_tries_blind_after_its_own_failure():
    plan = rl.STUDY["swe"] | {"demonstrations": 120}
    parts = rl.demonstrations(plan, rl.RLConfig(**plan["cfg"]))
    learned = lambda sample: [text for text, special, in_loss in sample if in_loss and not special]
    for sample in parts["reported"]:
        told = "".join(text for text, *_ in sample)
        edits = [text for text in learned(sample) if text.startswith("edit")]
        assert len(edits) == 1 and "want" in told.split(edits[0])[0] and told.rsplit("tool\n", 1)[1].startswith("PASS")
        assert "tool\nFAIL" not in told and learned(sample).count("submit") == 1
    both = ["<|im_start|>user\nFAIL" in "".join(text for text, *_ in sample) for sample in parts["reported"]]
    assert 40 < sum(both) < 80
    after = [learned(sample)[-1:] + learned(sample)[-2:-1] for sample in parts["all"] if "tool\nFAIL" in "".join(t for t, *_ in sample)]
    assert 30 < len(after) < 70 and all(last == "submit" for last, _ in after)
    assert 0 < sum(call.startswith("edit") for _, call in after) < 20


def test_512_trajectories_are_in_flight_at_once_and_each_is_what_it_would_be_alone(tokenizer):
    """Every one of them runs tests of its own in the sandbox, and all are begun before the first one ends."""
    model, verdicts, at_once, most = small_model(tokenizer, hidden_size=16, head_dim=8, num_hidden_layers=1), rl.Verdicts(), set(), []

    def watched(n, task):
        at_once.add(n)
        judge = yield from rl.swe_episode(task, tokenizer, verdicts, 4, 400, planted=True)
        most.append(len(at_once))
        at_once.remove(n)
        return judge

    drawn = [tasks.generate("swe", 1, n // 8) for n in range(512)]  # 64 tasks, 8 trajectories of each
    roller = rl.Rollout(model, tokenizer.special["<|im_end|>"], context=400, slots=512)
    lived = roller.run([watched(n, task) for n, task in enumerate(drawn)], [5])
    assert max(most) == 512 and all(t.outcome is not None and t.action.any() for t in lived)
    few = [rl.swe_episode(task, tokenizer, verdicts, 4, 400, planted=True) for task in drawn[:5]]
    for one, alone in zip(lived, rl.Rollout(model, tokenizer.special["<|im_end|>"], context=400, slots=1).run(few, [5])):
        assert torch.equal(one.ids, alone.ids) and one.outcome == alone.outcome


def test_a_sandbox_that_is_killed_costs_some_verdicts_and_the_next_ones_come(tokenizer):
    task, verdicts = tasks.generate("swe", 1, 5), rl.Verdicts()
    assert play(task, tokenizer, [task.solution, "submit"], verdicts)[1]["solved"]

    def killed_under_it(n):
        yield rl.Ask(tokenizer.encode("Fix"), 2)

        def judge():
            if n == 2:
                for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            return {"reward": float(all(ok for ok, _ in rl.run_tests(task.files, task.tests["pass_to_pass"])))}

        return judge

    lived = rl.Rollout(small_model(tokenizer), 0, 50, slots=1, workers=1).run([killed_under_it(n) for n in range(6)], [1])
    assert all(t.outcome in (None, {"reward": 1.0}) for t in lived) and sum(t.outcome is None for t in lived) < 3
    assert play(task, tokenizer, [task.solution, "submit"], rl.Verdicts())[1]["solved"]


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tokenizer.save(folder)
    model = small_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.special["<|im_end|>"]] *= 8  # it ends some answers and not others: for form alone there is a reward
    model.save_pretrained(folder)
    return folder


def config(start, out, **changes):
    base = dict(path="instruct", families="math", levels="1,2", ckpt=str(start), out=str(out), steps=3, prompts=4, samples=4, updates=2,
                rounds=1, room=8, overlong=4, context=220, slots=8, eval_tasks=3, eval_samples=2, device="cpu",
                dtype="float32")  # fmt: skip
    return rl.RLConfig(**{**base, **changes})


def world():
    return rl.pipeline.start_world(rl.pipeline.TrainConfig(device="cpu", dtype="float32"))


def weights(folder):
    return LoopCoder.from_pretrained(folder).state_dict()


def command(cfg):
    """The command line that makes this configuration."""
    flags = []
    for name, value in rl.dataclasses.asdict(cfg).items():
        flags += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])] if value not in (False, "") else []
    return [sys.executable, "rl.py", *flags]


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit_and_a_finished_one_is_kept(start, tmp_path, capsys):
    whole = rl.train(config(start, tmp_path / "whole"), world())
    assert "nothing was learned" not in capsys.readouterr().out
    cfg = config(start, tmp_path / "cut", threads=1)
    run = subprocess.Popen(command(rl.dataclasses.replace(cfg, steps=500)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines = [run.stdout.readline()]
    while "step    1/" not in lines[-1]:
        lines.append(run.stdout.readline())
        assert lines[-1], "the run ended before its first step"
    run.kill()
    run.communicate()
    assert lines[0].startswith("sandbox: ") and "protection" in lines[0]  # what stands between the machine and the model's code comes first
    folder = rl.result_folder(cfg)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 99, "rew')  # as a kill in the middle of a write leaves it
    done = len(torch.load(folder / "state.pt")["records"])
    rl.train(rl.dataclasses.replace(cfg, resume=True, steps=max(3, done)), world())
    records = rl.read_log(folder)
    assert [r["step"] for r in records] == list(range(1, max(3, done) + 1)) and not (folder / "state.pt").exists()
    for one, other in zip(records, rl.read_log(whole)):
        assert all(one[name] == other[name] for name in ("reward", "pass", "loss", "grad", "entropy", "tokens", "clip"))
    a, b, first = weights(whole), weights(folder), weights(start)
    if done <= 3:
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], first[name]) for name in a)
    for record in rl.read_log(whole):
        assert record["groups"] == 4 and record["errors"] == 0 and record["informative"] > 0 and record["grad"] > 0
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert rl.train(rl.dataclasses.replace(cfg, resume=True), world()) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_full_disk_ends_the_run_in_one_line_and_costs_one_step(start, tmp_path):
    cfg = config(start, tmp_path, threads=1, eval_tasks=0)
    size = 2 * (start / "model.safetensors").stat().st_size  # a snapshot holds the weights and two moments: it does not fit
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run = subprocess.run(command(cfg), capture_output=True, text=True, cwd=ROOT, preexec_fn=full)
    folder = rl.result_folder(cfg)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "state.pt" in run.stderr, run.stderr
    assert not (folder / "state.pt").exists() and not list(folder.glob("*.tmp")) and not (folder / "model.safetensors").exists()
    rl.train(rl.dataclasses.replace(cfg, resume=True, steps=1), world())
    assert [r["step"] for r in rl.read_log(folder)] == [1] and (folder / "model.safetensors").exists()


def test_a_run_that_ends_in_its_first_step_leaves_what_a_former_one_made_and_a_new_checkpoint_has_no_old_evaluation(
    start, tmp_path, monkeypatch
):
    cfg = config(start, tmp_path, steps=1)
    folder = rl.train(cfg, world())
    for name in ("eval.json", "table.json"):
        (folder / name).write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(rl, "rl_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rl.train(rl.dataclasses.replace(cfg, steps=2), world())
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    rl.train(rl.dataclasses.replace(cfg, steps=2), world())
    assert len(rl.read_log(folder)) == 2 and not (folder / "eval.json").exists() and not (folder / "table.json").exists()


def test_a_run_is_refused_that_would_learn_nothing_or_write_over_its_start(start, tmp_path):
    folder = rl.train(config(start, tmp_path, steps=1), world())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    for changes, size, says in (
        ({"ckpt": str(folder)}, 1, "--name"), ({"temperature": 0.0}, 1, "--temperature 0"), ({"prompts": 1}, 2, "--prompts 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            rl.train(config(start, tmp_path, **changes), rl.dataclasses.replace(world(), size=size))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_weights_that_are_no_numbers_any_more_end_the_run_before_they_are_kept(start, tmp_path):
    with pytest.raises(FloatingPointError, match="--resume and a lower --lr"):
        rl.train(config(start, tmp_path, lr=1e38, updates=4), world())
    folder = tmp_path / "rl_instruct"
    assert not (folder / "model.safetensors").exists() and len(rl.read_log(folder)) < 3
    if (folder / "state.pt").exists():
        assert all(x.isfinite().all() for x in torch.load(folder / "state.pt")["model"].values())


def test_groups_without_signal_leave_the_weights_alone_and_the_run_says_so(start, tmp_path, capsys):
    folder = rl.train(config(start, tmp_path, families="gui", room=1, overlong=0, steps=1), world())
    (record,) = rl.read_log(folder)
    assert record["informative"] == 0 and record["grad"] == 0
    assert "nothing was learned" in capsys.readouterr().out
    a, b = weights(folder), weights(start)
    assert all(torch.equal(a[name], b[name]) for name in a)
    model = LoopCoder.from_pretrained(start)
    optimizer = rl.pipeline.Optimizer(model, kind="adamw", weight_decay=0.0)
    sample = rl.Trajectory(torch.tensor([1, 2, 3]), torch.tensor([False, True, True]), torch.full((3,), -5.0), True, None)
    for samples, moves in (([(sample, 1.0)], True), ([], False)):  # nor does the momentum of the step before
        before = model.lm_head.weight.detach().clone()
        rl.update(model, optimizer, samples, config(start, tmp_path), 1e-3, world())
        assert torch.equal(model.lm_head.weight, before) != moves


def test_drift_is_how_far_log_probs_are_from_those_of_the_rollout_before_the_first_update(tokenizer, start, tmp_path):
    (record,) = rl.read_log(rl.train(config(start, tmp_path, steps=1, updates=2, lr=1e-2), world()))
    assert 0 < record["drift"] < 1e-5  # float32: rounding alone, and not what the second update makes of it
    assert "drift 0.0000 " in rl.line_of(record, 1)
    model, optimizer = small_model(tokenizer), SimpleNamespace(params=[], step=lambda lr, clip: 0.0)
    lived, _ = converse(model, tokenizer, slots=6)
    for t in lived:
        t.logp = t.logp - 0.25 * (torch.arange(len(t.ids)) % 2)
    share = sum(int((t.action & (torch.arange(len(t.ids)) % 2 == 1)).sum()) for t in lived) / sum(int(t.action.sum()) for t in lived)
    done = rl.update(model, optimizer, [(t, 1.0) for t in lived], config(start, tmp_path, micro_tokens=300), 0.0, world())
    assert done["drift"] == pytest.approx(0.25 * share, abs=1e-4)
    assert rl.update(model, optimizer, [], config(start, tmp_path), 0.0, world())["drift"] == 0


def test_a_run_that_the_clock_ended_says_how_many_steps_repeat_it_bit_for_bit(start, tmp_path, monkeypatch, capsys):
    step = rl.rl_step
    monkeypatch.setattr(rl, "rl_step", lambda *args: step(*args) | {"seconds": 30.0})
    clock = rl.train(config(start, tmp_path / "clock", steps=9, minutes=0.75), world())
    assert "2 of 9 steps, ended by --minutes; --steps 2 --minutes 0 repeats it" in capsys.readouterr().out
    count = rl.train(config(start, tmp_path / "count", steps=2, minutes=0), world())
    assert "2 of 2 steps, ended by --steps; " in capsys.readouterr().out
    assert [[r.get("ended_by") for r in rl.read_log(folder)] for folder in (clock, count)] == [[None, "minutes"], [None, "steps"]]
    a, b = weights(clock), weights(count)
    assert all(torch.equal(a[name], b[name]) for name in a)
    help = {f.name: f.metadata["help"] for f in rl.dataclasses.fields(rl.RLConfig)}
    assert "--steps N --minutes 0" in help["minutes"]


def test_shuffled_rewards_keep_each_groups_rewards_and_lose_whose_they_are(start):
    rewards = [[1.0, 0.0, 0.0, 0.0, 0.5, 0.0], [0.0] * 6]
    blank = torch.zeros(0)
    lived = [[rl.Trajectory(blank, blank, blank, True, {"reward": r, "primary": r, "n": i}) for i, r in enumerate(row)] for row in rewards]
    groups = [(None, row) for row in lived]
    plain, kept = rl.credit(groups, config(start, "x"), rl.random.Random(0))
    assert kept == 1 and [a for _, a in plain] == pytest.approx([0.75, -0.25, -0.25, -0.25, 0.25, -0.25])
    seen = set()
    for seed in range(20):
        mixed, _ = rl.credit(groups, config(start, "x", shuffle_rewards=True), rl.random.Random(seed))
        assert sorted(a for _, a in mixed) == pytest.approx(sorted(a for _, a in plain))
        seen.add(tuple(a for _, a in mixed))
    assert len(seen) > 5
    lived[0][0].outcome, lived[0][1].ended = None, False
    assert len(rl.credit(groups, config(start, "x"), rl.random.Random(0))[0]) == 5
    assert len(rl.credit(groups, config(start, "x", mask_cut=True), rl.random.Random(0))[0]) == 4


def test_levels_open_one_after_the_other_and_none_closes():
    curriculum, rng, opened = rl.Curriculum([1, 2, 3]), rl.random.Random(0), []
    for step in range(40):
        skill = {1: 0.9, 2: min(0.9, step / 20), 3: 0.1}
        drawn = [curriculum.draw(rng) for _ in range(16)]
        curriculum.record([(level, skill[level]) for level in drawn])
        opened.append(curriculum.open)
        again = rl.Curriculum([1, 2, 3])
        again.load_state(rl.json.loads(rl.json.dumps(curriculum.state())))
        assert again.state() == curriculum.state()
    assert opened == sorted(opened) and opened[0] == 1 and opened[-1] == 3
    assert set(drawn) == {1, 2, 3}


# ---------------------------------------------------------------------------------------------- evaluation and report


def test_the_paired_interval_sees_a_gain_that_two_separate_intervals_hide():
    rng = np.random.default_rng(0)
    before = rng.random(200)
    after, ones = np.clip(before + 0.03 + 0.02 * rng.standard_normal(200), 0, 1), np.ones(200)
    gain, low, high = train.interval((after, ones), (before, ones))
    assert low > 0 and low < gain < high and gain == pytest.approx((after - before).mean())
    assert train.interval((after, ones))[1] < train.interval((before, ones))[2]  # the two intervals overlap
    value, low, high = train.interval((np.array([1.0, 0, 3]), np.array([1.0, 0, 4])))  # a share of shares: an empty task counts for nothing
    assert value == pytest.approx(0.8) and low <= value <= high
    assert math.isnan(train.interval((np.zeros(3), np.zeros(3)))[0])


def test_evaluation_finds_no_difference_between_a_checkpoint_and_itself_and_the_report_is_made_of_its_files(start, tmp_path):
    cfg = config(start, tmp_path, families="math,swe", levels="1,2", steps=1, room=6)
    folder = rl.train(cfg, world())
    one, two = rl.evaluate_checkpoint(folder, cfg, world()), rl.evaluate_checkpoint(folder, cfg, world())
    assert {"math pass@1", "math pass@2", "swe pass@1", "swe recovery", "swe planted recovery"} <= one.keys()
    for name in one:
        assert all(np.array_equal(a, b) for a, b in zip(one[name], two[name]))
    assert any("gain +0.000" in line for line in rl.comparison(one, two))
    assert rl.plot(tmp_path) == [tmp_path / "rl.png"]
    text = rl.report(tmp_path).read_text()
    (head,), (row,) = ([line for line in text.splitlines() if line.startswith(name)] for name in ("| stage", "| rl_instruct"))
    assert f"{rl.read_log(folder)[0]['reward']:.3f}" in row and row.count("|") == head.count("|") and "![rl.png](rl.png)" in text
    assert rl.in_words(one["math pass@1"]) in row
    with pytest.raises(ValueError, match="train.py"):
        rl.report(tmp_path / "empty")


@pytest.mark.parametrize(
    "changes, says",
    [({"path": "chat"}, "--path"), ({"families": "magic"}, "magic"), ({"levels": "9"}, "--levels"), ({"samples": 1}, "--samples"),
     ({"average": "mean"}, "--average"), ({"prompts": 0}, "--prompts"), ({"lr": math.nan}, "--lr"), ({"temperature": -1.0}, "--temp"),
     ({"average": "dr_grpo", "std": True}, "--std"),
     ({"micro_tokens": 0}, "--micro-tokens"), ({"eval_samples": 0}, "--eval-samples"), ({"levels": "²"}, "--levels")],
)  # fmt: skip
def test_wrong_settings_are_named_before_any_work_starts(start, changes, says):
    with pytest.raises(ValueError, match=says):
        config(start, "x", **changes)


def test_the_command_line_says_what_is_missing_in_one_line_and_exits_with_2(tmp_path):
    run = subprocess.run([sys.executable, "rl.py", "--out", str(tmp_path / "nowhere")], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "sft_thinking" in run.stderr and "train.py" in run.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_checkpoint_and_a_context_beyond_the_models_are_named_before_anything_is_written(start, tmp_path):
    nowhere = tmp_path / "nowhere"
    for flags, says in (
        (["--eval", nowhere], "nowhere: no checkpoint"),
        (["--eval", start, "--against", nowhere], "nowhere: no checkpoint"),
        (["--eval", start, "--context", "9999"], "--context 9999.* 512 positions"),
        (["--ckpt", start, "--context", "9999", "--out", nowhere], "--context 9999.* 512 positions"),
        (["--eval", start, "--eval-tasks", "0"], "--eval-tasks 0"),
        (["--study", "--seeds", "0", "--out", nowhere], "--seeds 0"),
        (["--study", "swe", "--lr", "1e-4", "--mask-cut", "--out", nowhere], "--study does not hear --lr, --mask-cut.*STUDY"),
        (["--report", "--path", "swe", "--out", nowhere], "--report does not hear --path"),
    ):
        with pytest.raises(ValueError, match=says):
            rl.main([str(flag) for flag in flags])
        assert not nowhere.exists()


def test_a_result_with_a_name_of_its_own_is_compared_and_an_evaluation_asks_the_agent_too(start, tmp_path, capsys):
    small = "--path instruct --families math --prompts 2 --samples 2 --steps 1 --room 4 --context 300 --eval-tasks 1".split()
    rl.main([*small, "--ckpt", str(start), "--out", str(tmp_path), "--name", "mine"])
    assert "math pass@1" in capsys.readouterr().out and (tmp_path / "mine" / "eval.json").exists()
    assert not (tmp_path / "report.md").exists()  # it is no stage of a chain
    rl.main(["--eval", str(tmp_path / "mine"), *small[:2], *small[-6:]])
    told = capsys.readouterr().out
    assert all(f"{metric} " in told for metric in ("math pass@1", "sql pass@1", "swe pass@1", "swe recovery", "swe planted recovery"))


def test_an_evaluation_whose_folder_cannot_be_written_is_shown_all_the_same(start, tmp_path, capsys):
    shutil.copytree(start, folder := tmp_path / "model")
    (folder / "eval.json").unlink(missing_ok=True)
    (folder / "eval.json.tmp").mkdir()  # no file can be written there, not even by root
    small = "--path instruct --families math --room 4 --context 300 --eval-tasks 1 --eval-samples 1".split()
    rl.main(["--eval", str(folder), *small])
    said = capsys.readouterr()
    assert "math pass@1" in said.out and not (folder / "eval.json").exists()
    assert said.err.count("\n") == 1 and f"{folder}: eval.json is not kept" in said.err
    with pytest.raises(OSError):  # a study goes by what it kept
        rl.evaluate_checkpoint(folder, config(start, tmp_path, eval_tasks=1), world(), must_keep=True)


def test_what_works_in_one_process_is_refused_under_torchrun(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flags in (["--eval", str(start)], ["--study"], ["--bench"], ["--report"]):
        with pytest.raises(ValueError, match=f"{flags[0]} works in one process: .* python"):
            rl.arguments(flags)
    rl.arguments([])


def say(rng, level):
    """The smallest family there is: write the digit that was asked for. Held out are pairs of a wording and a digit."""
    frame, n = rng.choice(["Say {}", "Give {}", "Now {}", "Type {}"]), rng.randrange(10)
    yield [f"{frame} {n}"]
    wrong = str(rng.choice([m for m in range(10) if m != n]))
    yield dict(prompt=frame.format(n), solution=str(n), wrong=wrong, trace="", tests={"n": str(n)})


def test_grpo_raises_held_out_pass_at_1_and_neither_shuffled_rewards_nor_more_imitation_do(tmp_path, monkeypatch):
    """
    Half of the demonstrations are wrong, so imitation stays near one half; only a reward can tell which half to believe.

    It is the study itself, on a family and a model small enough for seconds: three seeds, its controls, resumption and report.
    """
    monkeypatch.setitem(tasks.FAMILIES, "say", tasks.Family(say, lambda task, answer: answer == task.tests["n"]))
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    cfg = dict(path="instruct", families="say", levels="1", room=4, context=60, overlong=0, prompts=12, samples=8, lr=2e-3, steps=8,
               eval_tasks=60)  # fmt: skip
    plan = {"shape": shape, "vocab": 275, "demonstrations": 400, "levels": (1,), "wrong": 0.5, "phases": [("all", 4.5e4, 3e-3)],
            "rows": 8, "cfg": cfg, "arms": {"grpo": {}, "shuffled_rewards": {"shuffle_rewards": True}, "more_sft": None},
            "metrics": ("say pass@1",)}  # fmt: skip
    monkeypatch.setattr(rl, "STUDY", {"say": plan})
    for seed in range(3):
        rl.study_seed(tmp_path, "say", seed)
    home = tmp_path / "study" / "say"
    start = rl.evaluated(home / "start")["say pass@1"]
    gains = {arm: [train.interval(rl.evaluated(home / f"{arm}-{seed}")["say pass@1"], start) for seed in range(3)] for arm in plan["arms"]}
    assert all(gain > 0.15 and low > 0.1 for gain, low, _ in gains["grpo"]), gains
    assert all(low < 0 for _, low, _ in gains["shuffled_rewards"]), gains
    assert all(high < gains["grpo"][seed][1] for seed, (_, _, high) in enumerate(gains["more_sft"])), gains
    stamps = {path: path.stat().st_mtime_ns for path in home.glob("*/model.safetensors")}
    rl.study_seed(tmp_path, "say", 0)
    assert len(stamps) == 10 and all(path.stat().st_mtime_ns == then for path, then in stamps.items())  # finished arms are kept
    assert rl.plot(tmp_path) == [tmp_path / "study.png"]
    table = [line.split(" | ") for line in rl.report(tmp_path).read_text().splitlines() if line.startswith("| say")]
    assert [row[1] for row in table] == ["grpo", "shuffled rewards", "more sft"]
    assert ", ".join(f"{gain:+.3f}" for gain, _, _ in gains["grpo"]) in table[0]


def test_a_study_whose_process_is_killed_ends_with_a_word_on_how_to_go_on(tmp_path):
    def kill():
        while not (workers := rl.multiprocessing.active_children()):
            time.sleep(0.01)
        workers[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(OSError, match="the same command goes on"):
        rl.study(tmp_path, ["compose"], 1, 1)
    killer.join()
    assert not rl.multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------- servers and processes


def test_a_server_that_answers_in_our_place_gives_the_same_kind_of_trajectories(tokenizer, start, tmp_path):
    model, end = small_model(tokenizer), tokenizer.special["<|im_end|>"]

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            out = model.generate(torch.tensor([body["prompt"]]), body["max_tokens"], body["temperature"], stop_ids=body["stop_token_ids"],
                                 generator=torch.Generator().manual_seed(body["seed"]))[0, len(body["prompt"]):].tolist()  # fmt: skip
            done = end in out
            text = tokenizer.decode([i for i in out if i != end])
            choice = {"token_ids": out, "text": text, "finish_reason": "stop" if done else "length"}
            reply = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    queue = type("Queue", (HTTPServer,), {"request_queue_size": 64})  # all episodes ask at once, and one thread answers
    server = queue(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        notes = [[] for _ in range(6)]
        roller = rl.RemoteRollout(f"http://127.0.0.1:{server.server_port}", model, tokenizer, 200, 0.8)
        lived = roller.run([chatter(tokenizer, 1 + i % 3, 6, notes[i]) for i in range(6)], [3])
        (unjudged,) = roller.run([broken(tokenizer, "during")], [4])
        (record,) = rl.read_log(rl.train(config(start, tmp_path, steps=1, rollout_url=f"http://127.0.0.1:{server.server_port}"), world()))
    finally:
        server.shutdown()
    assert unjudged.outcome is None and unjudged.action.any()
    assert record["groups"] == 4 and record["errors"] == 0 and record["tokens"] > 16
    for t, seen in zip(lived, notes):
        assert t.ids.tolist() == seen and t.outcome["reward"] == len(seen) and t.ended == (seen[-1] == end)
        ids, targets, old, mask = rl.pad([t])
        with torch.no_grad():
            torch.testing.assert_close(rl.token_logp(model, ids, targets, mask, 0.8)[mask], old[mask], rtol=0, atol=1e-5)
        assert (old[mask] < 0).all() and t.action.sum() > 0


@pytest.mark.parametrize("reply", ['{"error": "no such\\nmodel"}', '{"choices": []}', "<html>busy</html>", '{"choices": [{}]}', "[]"])
def test_a_server_that_answers_with_no_completion_is_quoted_in_one_line(tokenizer, reply, monkeypatch):
    import requests

    answer = SimpleNamespace(status_code=503, text=reply, json=lambda: json.loads(reply))
    monkeypatch.setattr(requests, "post", lambda *args, **options: answer)
    with pytest.raises(OSError, match="http://there/v1/completions: .*status 503") as error:
        rl.RemoteRollout("http://there", None, tokenizer, 100).complete([1], 4, 0)
    assert repr(reply) in str(error.value) and "\n" not in str(error.value)


def test_two_processes_learn_from_the_tokens_of_both_and_open_levels_together(start, tmp_path):
    (tmp_path / "told.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rl; sys.stdout.reconfigure(line_buffering=False)\n"
        "class Told(rl.Curriculum):\n"
        "    def record(self, results):\n"
        "        sys.stdout.write(f'recorded {len(results)} {sorted(results)}\\n')\n"
        "        super().record(results)\n"
        "rl.Curriculum = Told\nrl.main()\n"
    )
    command = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2 --master_port 29517".split(), str(tmp_path / "told.py")]
    command += ["--ckpt", str(start), "--out", str(tmp_path), *"--path instruct --families math --steps 2 --prompts 4 --samples 4".split()]
    command += "--room 8 --overlong 4 --context 220 --eval-tasks 0 --rounds 1 --device cpu --threads 1".split()
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    records = rl.read_log(tmp_path / "rl_instruct")
    assert [r["step"] for r in records] == [1, 2] and all(r["groups"] == 4 and r["informative"] > 0 and r["grad"] > 0 for r in records)
    assert run.stdout.count("step ") == 2  # one process speaks
    recorded = sorted(line for line in run.stdout.splitlines() if line.startswith("recorded"))
    assert len(recorded) == 4 and recorded[0::2] == recorded[1::2] and all(line.startswith("recorded 4 ") for line in recorded)


def test_when_a_process_dies_the_others_say_which_and_leave_a_snapshot(start, tmp_path):
    flags = ["--ckpt", str(start), "--out", str(tmp_path), *"--path instruct --families math --steps 10000 --prompts 4 --samples 4".split()]
    flags += "--room 8 --overlong 4 --context 220 --rounds 1 --minutes 0 --device cpu --threads 1".split()
    place, pipe = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519", "WORLD_SIZE": "2"}, subprocess.PIPE
    first, second = (
        subprocess.Popen([sys.executable, "rl.py", *flags], env=place | {"RANK": rank}, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
        for rank in "01"
    )
    try:
        while "step    1/" not in (line := first.stdout.readline()):
            assert line, "the run ended before its first step"
    finally:
        second.kill()
        second.communicate()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 4 and "rl.py: rank 1 is gone" in said.splitlines()[-1] and "Traceback" not in said
    assert (tmp_path / "rl_instruct" / "state.pt").exists()
