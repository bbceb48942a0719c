"""
Reinforcement learning from answers that a program can check: GRPO, single turn and many turns.
"""

import torch

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
    average   "token": every token weighs the same (DAPO);  "sequence": every sample does, however long it is (the first GRPO)
    total     what the sum is divided by; None: the tokens (or samples) of this batch. A caller that splits one optimizer step into
              micro-batches, or over processes, gives the count of the whole step, so that the split changes nothing. Samples times
              the longest allowed length gives Dr.GRPO.

    Where p = p_old the loss is - sum A n / N: zero for samples of equal length whatever was learned. It is no progress signal; the
    gradient, - sum A grad logp / N, is. And with one update a rollout r is 1 throughout and the clip does nothing.
    """
    value, _ = surrogate(logp, old_logp, advantages, mask, clip_low, clip_high)
    if average == "token":
        return -value.sum() / (mask.sum().clamp(min=1) if total is None else total)
    if average == "sequence":
        length = mask.sum(-1)
        return -(value.sum(-1) / length.clamp(min=1)).sum() / ((length > 0).sum().clamp(min=1) if total is None else total)
    raise ValueError(f"average={average!r}: must be 'token' (DAPO) or 'sequence' (GRPO)")


# ---------------------------------------------------------------------------------------------- rewards


def overlong_penalty(length, longest, buffer):
    """DAPO's soft overlong punishment, added to the reward: 0 up to longest - buffer, then down a straight line to -1 at longest."""
    return -min(1.0, max(0.0, (length - (longest - buffer)) / buffer))


def swe_penalty(tokens, budget, redundant, unproductive):
    """
    What an episode loses for waste, 0 to 0.4: context beyond half the budget, calls repeated in an unchanged state, idle edits.

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
