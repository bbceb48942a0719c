"""rl.py: the objective against exact enumeration, rollouts against the training forward, rewards that cannot be bought."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl

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
