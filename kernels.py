"""
Gated loop attention as one GPU kernel: one query tile, two sets of keys and values, one gate, one output.

    z_i = q_i . w_h + b_h,    g_i = sigmoid(z_i)                          one gate per token and head
    A_i = softmax over          j <= i of q_i K1_j / sqrt(D), times V1    global branch: keys and values of pass 1
    B_i = softmax over  i - W < j <= i of q_i K2_j / sqrt(D), times V2    local branch: keys and values of pass 2
    o_i = g_i A_i + (1 - g_i) B_i

Written as PyTorch calls this is two attentions, a gate and a mix: the queries travel to the chip three times, A and B travel
out and in again. Here a program owns BLOCK_M query rows of one head, walks over the keys of both branches with the softmax
kept in registers (FlashAttention), computes the gate from the query tile it already holds, and writes o. That is all that
leaves the chip. Training also keeps A, the two log-sum-exp rows and z: what the backward needs, and nothing that is T x T.

Read reach(), attend_block() and attend() first: they are FlashAttention. forward_kernel() is the equation above in terms of
them. The backward has two kernels: dq_kernel() owns query rows, dkv_kernel() owns keys, so every number has one writer: no
atomics, the same bits each time. Then what falls out of the same pieces: flash_partial(), attention to one set of keys whose
results can be merged (a ring of devices, or pass 1), and fused_gated_decode(), one new token against both caches.

Conventions. B rows, H query heads, KV key/value heads, T queries, S keys, D width of a head, W window. Every softmax is in
base 2 (exp2 is one instruction): scores are multiplied by log2(e) / sqrt(D), log-sum-exps are base 2 until they leave the file.
No load is masked: a row past the end repeats the last row, and only its store, or its weight, is dropped.

Source: LoopCoder report, equations 2 to 5 and section 2.3, which names the kernel and shows no code. FlashAttention-2
(arXiv 2307.08691) for the order of the loops. Departures: none in the values; no dropout, no bias, D is 16, 32, 64 or 128.
loop_attention_reference() in loop_attention.py is the slow form that this must agree with. tests/test_kernels.py proves it, and
compiles the kernels for an H100 where there is none, to see that no register spills to memory.

    python kernels.py    # with a GPU: correctness, then one table of times. Without: a small check in Triton's interpreter
"""
import argparse
import math
import os
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from functools import lru_cache, partial

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                       # the file still imports; the wrappers say what is missing
    triton, tl = None, types.SimpleNamespace(constexpr=float)

LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")   # read by Triton when it is imported

numbers = lambda version: tuple(int(part) for part in version.split(".")[:2])
INTERPRETER_MISFIT = triton and numbers(triton.__version__) < (3, 7) and numbers(numpy.__version__) >= (2, 4) and (
    "Triton 3.6's interpreter needs numpy below 2.4 (a GPU does not): install that, or Triton 3.7 or newer")

jit = triton.jit if triton else lambda function: function
# Lengths change from call to call: compiling anew for each T that is 1 or a multiple of 16 would buy nothing.
kernel = triton.jit(do_not_specialize=["T", "S", "H", "W", "shift", "n_global", "n_local"]) if triton else lambda function: function

# ---- tiles: a head of a tensor, and its rows -------------------------------------------------------------------------
# A tensor (B, H, T, D) comes into a kernel as a tuple (address, stride of B, of H, of T), so any memory order will do as long as
# D is contiguous: q as the projection left it (B, T, H, D) and a cache as (B, KV, S, D) both work without a copy.


@jit
def head_of(x, b, h):
    """One head of one batch row: (address of its first row, step to the next row). 64-bit here, so that the rows can be 32-bit."""
    return x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2], x[3]


@jit
def load_rows(head, rows, D: tl.constexpr):
    """A tile (len(rows), D) of a head."""
    return tl.load(head[0] + rows[:, None] * head[1] + tl.arange(0, D)[None, :])


@jit
def store_rows(head, rows, tile, T, D: tl.constexpr):
    """Writes the rows of a tile that exist (row < T), in the head's own dtype."""
    address = head[0] + rows[:, None] * head[1] + tl.arange(0, D)[None, :]
    tl.store(address, tile.to(head[0].dtype.element_ty), mask=rows[:, None] < T)


# ---- what a row sees -------------------------------------------------------------------------------------------------
# Every mask in this file is an interval of keys per row: row i stands at key position i + shift and sees
#     max(start of its document, i + shift - W + 1)  <=  j  <=  i + shift.
# Causal attention is a W that hides nothing; a window is a small W; packed documents are `starts`; a batch is one more grid axis.
# Both ends grow with i, so a tile of rows sees one run of keys, only the ends of the run need a mask, and no other key is loaded.


@jit
def reach(row, starts, shift, W, S):
    """The keys lo <= j < hi that `row` (one number or a vector of them) sees, of S keys; starts may be None."""
    lo = tl.maximum(row + shift + 1 - W, 0)
    if starts is not None:
        lo = tl.maximum(lo, tl.load(starts + row))
    return lo, tl.minimum(row + shift + 1, S)


@jit
def my_tile(H, T, BLOCK_M: tl.constexpr):
    """
    The query rows of this program of a grid (H, row tiles, B), the longest (last) tiles first: head, batch row, number of the tile,
    its first and last row, its rows, the same held back to the last that exists, and where row 0 stands in a (B, H, T) array.
    """
    h, b, tile = tl.program_id(0), tl.program_id(2), tl.num_programs(1) - 1 - tl.program_id(1)
    first, last = tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, T) - 1
    row = first + tl.arange(0, BLOCK_M)
    return h, b, tile, first, last, row, tl.minimum(row, T - 1), (b.to(tl.int64) * H + h) * T


@jit
def reach_of_tile(mine, starts, shift, W, T, S, BLOCK_N: tl.constexpr):
    """
    What a tile of my_tile() sees: lo and hi of each row, and the run of keys of the tile cut in three: [begin, full) needs a
    mask, [full, edge) is blocks that every row sees whole, [edge, end) needs a mask again. Plain causal rows have begin = full.
    """
    h, b, tile, first, last, row, at, stat = mine
    if starts is not None:
        starts += b.to(tl.int64) * T
    lo, hi = reach(at, starts, shift, W, S)
    begin, shortest = reach(first, starts, shift, W, S)
    latest, end = reach(last, starts, shift, W, S)
    full = tl.minimum(begin + tl.cdiv(latest - begin, BLOCK_N) * BLOCK_N, end)
    edge = full + tl.maximum(shortest - full, 0) // BLOCK_N * BLOCK_N
    return lo, hi, begin, full, edge, end, S


@jit
def is_seen(lo, hi, keys):
    """(rows, keys): True where lo <= key < hi."""
    return (lo[:, None] <= keys[None, :]) & (keys[None, :] < hi[:, None])


# ---- the forward -----------------------------------------------------------------------------------------------------
# FlashAttention: keys come in blocks of BLOCK_N. A row carries the largest score so far (peak), the sum of exp2(score - peak)
# (total) and the same sum weighted by the values (acc). A higher peak rescales what was summed before. At the end acc / total
# is softmax(scores) V, and peak + log2(total) is the log-sum-exp from which the backward recomputes every weight.


@jit
def attend_block(acc, peak, total, q, k, v, n, seen, scale2, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """One block of keys n .. n + BLOCK_N - 1 for a tile of rows. scale2 = log2(e) / sqrt(D)."""
    lo, hi, begin, full, edge, end, S = seen
    keys = n + tl.arange(0, BLOCK_N)
    at = tl.minimum(keys, S - 1) if MASKED else keys
    s = tl.dot(q, tl.trans(load_rows(k, at, q.shape[1])), input_precision="ieee")      # (M, N)
    if MASKED:
        s = tl.where(is_seen(lo, hi, keys), s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale2)
    # a row that has seen no key yet has peak -inf, and -inf - -inf is not a number
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    p = tl.exp2(s * scale2 - origin[:, None])                                          # one fused multiply-add and one exp2
    decay = tl.exp2(peak - origin)
    v_tile = load_rows(v, at, q.shape[1])
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total * decay + tl.sum(p, 1)


@jit
def attend(q, k, v, seen, scale2, NARROW: tl.constexpr, BLOCK_N: tl.constexpr):
    """
    Attention of a query tile (M, D) to every key it sees: (M, D) in float32 and its log-sum-exp (M,). A row that sees no key
    gives 0 and -inf. NARROW: the run of keys is a few blocks (a window), so one masked loop replaces three.
    """
    lo, hi, begin, full, edge, end, S = seen
    acc = tl.zeros(q.shape, tl.float32)
    peak, total = tl.full([q.shape[0]], float("-inf"), tl.float32), tl.zeros([q.shape[0]], tl.float32)
    if NARROW:
        for n in range(begin, end, BLOCK_N):
            acc, peak, total = attend_block(acc, peak, total, q, k, v, n, seen, scale2, True, BLOCK_N)
    else:
        for n in range(begin, full, BLOCK_N):
            acc, peak, total = attend_block(acc, peak, total, q, k, v, n, seen, scale2, True, BLOCK_N)
        for n in range(full, edge, BLOCK_N):
            acc, peak, total = attend_block(acc, peak, total, q, k, v, n, seen, scale2, False, BLOCK_N)
        for n in range(edge, end, BLOCK_N):
            acc, peak, total = attend_block(acc, peak, total, q, k, v, n, seen, scale2, True, BLOCK_N)
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], peak + tl.log2(total)


@jit
def sigmoid(z):
    """1 / (1 + e^-z), and exactly 0 or 1 at the ends; sigmoid(-z) is 1 - sigmoid(z) without the cancellation."""
    return 1.0 / (1.0 + tl.exp(-z))


@kernel
def forward_kernel(q, k1, v1, k2, v2, gate_weight, gate_bias, starts, o, o1, lse1, lse2, z_out, W, scale, H, T, S,
                   GROUP: tl.constexpr, SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Grid (H, row tiles, B). SAVE: also write what the backward needs, A to o1, the log-sum-exps, and the gate's logit."""
    mine = my_tile(H, T, BLOCK_M)
    h, b, tile, first, last, row, at, stat = mine
    kv, scale2 = h // GROUP, scale * LOG2E                                             # GQA: GROUP query heads share a key/value head
    seen_global = reach_of_tile(mine, starts, 0, T, T, S, BLOCK_N)
    seen_local = reach_of_tile(mine, starts, 0, W, T, S, BLOCK_N)

    q_tile = load_rows(head_of(q, b, h), at, D)
    w = tl.load(gate_weight + h * D + tl.arange(0, D)).to(tl.float32)
    z = tl.sum(q_tile.to(tl.float32) * w[None, :], 1) + tl.load(gate_bias + h).to(tl.float32)
    o_global, lse_global = attend(q_tile, head_of(k1, b, kv), head_of(v1, b, kv), seen_global, scale2, False, BLOCK_N)
    o_local, lse_local = attend(q_tile, head_of(k2, b, kv), head_of(v2, b, kv), seen_local, scale2, True, BLOCK_N)
    store_rows(head_of(o, b, h), row, sigmoid(z)[:, None] * o_global + sigmoid(-z)[:, None] * o_local, T, D)
    if SAVE:
        store_rows(head_of(o1, b, h), row, o_global, T, D)
        tl.store(lse1 + stat + row, lse_global, mask=row < T)
        tl.store(lse2 + stat + row, lse_local, mask=row < T)
        tl.store(z_out + stat + row, z, mask=row < T)


# ---- the backward, query side ----------------------------------------------------------------------------------------
# With do = dL/do, P the softmax weights of a branch, dP = do V^T, and delta = rowsum(do * branch output):
#     dz = g (1 - g) (delta_A - delta_B)                       dw = sum over tokens of dz q,   db = sum of dz
#     P' = g P (global), (1 - g) P (local)                     dS = P' (dP - delta)
#     dq = (dS_A K1 + dS_B K2) / sqrt(D) + dz w                dV = P'^T do,   dK = dS^T q / sqrt(D)
# The gate folds into the log-sum-exp, P' = exp2(s - (lse - log2 g)), and from there on each branch is plain FlashAttention
# backward. delta_A comes from the saved A. delta_B is summed from K2, V2 again (B was not saved: the window is short). Taking it
# from o and A instead would be free, but divides a difference of rounded numbers by 1 - g.


@jit
def log2_sigmoid(z):
    """log2(sigmoid(z)), right for any z: -inf at -inf, 0 at inf."""
    return (tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))) * LOG2E


@jit
def weights(q, do, k, v, n, seen, lse, scale2, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one block of keys: softmax weights P (M, N), recomputed from the log-sum-exp, their gradient dP = do V^T, and the keys."""
    lo, hi, begin, full, edge, end, S = seen
    keys = n + tl.arange(0, BLOCK_N)
    at = tl.minimum(keys, S - 1) if MASKED else keys
    k_tile = load_rows(k, at, q.shape[1])
    s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    p = tl.exp2(s * scale2 - lse[:, None])
    if MASKED:
        p = tl.where(is_seen(lo, hi, keys), p, 0.0)
    return p, tl.dot(do, tl.trans(load_rows(v, at, q.shape[1])), input_precision="ieee"), k_tile


@jit
def dq_block(dq, q, do, k, v, n, seen, lse, delta, scale2, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds dS K of one block of keys to dq."""
    p, dp, k_tile = weights(q, do, k, v, n, seen, lse, scale2, MASKED, BLOCK_N)
    return tl.dot((p * (dp - delta[:, None])).to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@jit
def dq_branch(dq, q, do, k, v, seen, lse, delta, scale2, NARROW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds dS K over every key that the tile sees; the same walk as attend()."""
    lo, hi, begin, full, edge, end, S = seen
    if NARROW:
        for n in range(begin, end, BLOCK_N):
            dq = dq_block(dq, q, do, k, v, n, seen, lse, delta, scale2, True, BLOCK_N)
    else:
        for n in range(begin, full, BLOCK_N):
            dq = dq_block(dq, q, do, k, v, n, seen, lse, delta, scale2, True, BLOCK_N)
        for n in range(full, edge, BLOCK_N):
            dq = dq_block(dq, q, do, k, v, n, seen, lse, delta, scale2, False, BLOCK_N)
        for n in range(edge, end, BLOCK_N):
            dq = dq_block(dq, q, do, k, v, n, seen, lse, delta, scale2, True, BLOCK_N)
    return dq


@jit
def delta_branch(q, do, k, v, seen, lse, scale2, BLOCK_N: tl.constexpr):
    """rowsum(do * output) of a branch whose output was not kept: the sum over keys of P dP."""
    lo, hi, begin, full, edge, end, S = seen
    delta = tl.zeros([q.shape[0]], tl.float32)
    for n in range(begin, end, BLOCK_N):
        p, dp, _ = weights(q, do, k, v, n, seen, lse, scale2, True, BLOCK_N)
        delta += tl.sum(p * dp, 1)
    return delta


@kernel
def dq_kernel(do, q, k1, v1, k2, v2, gate_weight, starts, o1, lse1, lse2, z_in, dq, folded1, folded2, delta1, delta2, dgate,
              W, scale, H, T, S, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """
    Grid (H, row tiles, B). Writes dq, this tile's share of dw and db (dgate: one row of D + 1 per tile and head), and for
    dkv_kernel() the deltas and the log-sum-exps with the gate folded in.
    """
    mine = my_tile(H, T, BLOCK_M)
    h, b, tile, first, last, row, at, stat = mine
    kv, scale2 = h // GROUP, scale * LOG2E
    seen_global = reach_of_tile(mine, starts, 0, T, T, S, BLOCK_N)
    seen_local = reach_of_tile(mine, starts, 0, W, T, S, BLOCK_N)

    q_tile = load_rows(head_of(q, b, h), at, D)
    do_tile = load_rows(head_of(do, b, h), at, D).to(q_tile.dtype)
    k_local, v_local = head_of(k2, b, kv), head_of(v2, b, kv)
    lse_global, lse_local, z = tl.load(lse1 + stat + at), tl.load(lse2 + stat + at), tl.load(z_in + stat + at)
    d_global = tl.sum(do_tile.to(tl.float32) * load_rows(head_of(o1, b, h), at, D).to(tl.float32), 1)
    d_local = delta_branch(q_tile, do_tile, k_local, v_local, seen_local, lse_local, scale2, BLOCK_N)

    dz = sigmoid(z) * sigmoid(-z) * (d_global - d_local)
    dz = tl.where(row < T, dz, 0.0)                                                    # repeated rows must not count twice
    part = dgate + ((b * tl.num_programs(1) + tile).to(tl.int64) * H + h) * (D + 1)
    tl.store(part + tl.arange(0, D), tl.sum(dz[:, None] * q_tile.to(tl.float32), 0))
    tl.store(part + D, tl.sum(dz, 0))

    lse_global -= log2_sigmoid(z)
    lse_local -= log2_sigmoid(-z)
    tl.store(folded1 + stat + row, lse_global, mask=row < T)
    tl.store(folded2 + stat + row, lse_local, mask=row < T)
    tl.store(delta1 + stat + row, d_global, mask=row < T)
    tl.store(delta2 + stat + row, d_local, mask=row < T)

    ds_k = tl.zeros([BLOCK_M, D], tl.float32)
    ds_k = dq_branch(ds_k, q_tile, do_tile, k_local, v_local, seen_local, lse_local, d_local, scale2, True, BLOCK_N)
    k_global, v_global = head_of(k1, b, kv), head_of(v1, b, kv)
    ds_k = dq_branch(ds_k, q_tile, do_tile, k_global, v_global, seen_global, lse_global, d_global, scale2, False, BLOCK_N)
    w = tl.load(gate_weight + h * D + tl.arange(0, D)).to(tl.float32)
    store_rows(head_of(dq, b, h), row, ds_k * scale + dz[:, None] * w[None, :], T, D)


# ---- the backward, key side ------------------------------------------------------------------------------------------
# The transposed walk: a program owns BLOCK_N keys of one key/value head and visits every row that sees them, in every query head
# of the group, so the sum over the group needs no second pass. Key j is seen by the rows j - shift <= i < j - shift + W of its
# document, which ends before row `ends[j]`. The gate is in the log-sum-exp: the same kernel serves both branches, and pass 1.


@kernel
def dkv_kernel(do, q, k, v, lse, delta, ends, dk, dv, shift, W, scale, H, T, S,
               GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Grid (KV, key tiles, B); the first keys are seen by the most rows, and start first."""
    kv, b = tl.program_id(0), tl.program_id(2)
    first = tl.program_id(1) * BLOCK_N
    last = tl.minimum(first + BLOCK_N, S) - 1
    key = first + tl.arange(0, BLOCK_N)
    at = tl.minimum(key, S - 1)
    begin, end = tl.maximum(first - shift, 0), tl.minimum(last - shift + W, T)
    lo, hi = tl.maximum(key - shift, 0), tl.minimum(key - shift + W, T)
    if ends is not None:
        ends += b.to(tl.int64) * S
        end, hi = tl.minimum(end, tl.load(ends + last)), tl.minimum(hi, tl.load(ends + at))
    tiles, scale2 = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M), scale * LOG2E
    k_tile, v_tile = load_rows(head_of(k, b, kv), at, D), load_rows(head_of(v, b, kv), at, D)
    dk_tile, dv_tile = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)
    h, n = kv * GROUP, begin
    for _ in range(GROUP * tiles):                                                     # one loop over (head of the group, row tile)
        step = tl.arange(0, BLOCK_M)
        row, step = n + step, tl.minimum(step, T - 1 - n)                              # no load goes past the last row
        stat = (b.to(tl.int64) * H + h) * T + n
        q_tile = load_rows(head_of(q, b, h), n + step, D)
        do_tile = load_rows(head_of(do, b, h), n + step, D).to(q_tile.dtype)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")                   # (N, M): everything here is transposed
        p = tl.exp2(s * scale2 - tl.load(lse + stat + step)[None, :])
        p = tl.where(is_seen(lo, hi, row), p, 0.0)
        # dP before dV, though P is at hand: products end in order, and so exp2 runs beside the one and dS beside the other
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
        ds = p * (dp - tl.load(delta + stat + step)[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
        n += BLOCK_M
        done = n >= end                                                                # the next head; a branch would end the pipelining
        h, n = tl.where(done, h + 1, h), tl.where(done, begin, n)
    store_rows(head_of(dk, b, kv), key, dk_tile * scale, S, D)
    store_rows(head_of(dv, b, kv), key, dv_tile, S, D)


# ---- one set of keys: the same pieces without the gate ---------------------------------------------------------------


@kernel
def flash_forward_kernel(q, k, v, starts, o, lse, shift, W, scale, H, T, S,
                         GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Grid (H, row tiles, B)."""
    mine = my_tile(H, T, BLOCK_M)
    h, b, tile, first, last, row, at, stat = mine
    seen = reach_of_tile(mine, starts, shift, W, T, S, BLOCK_N)
    q_tile, k_head, v_head = load_rows(head_of(q, b, h), at, D), head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    o_tile, lse_row = attend(q_tile, k_head, v_head, seen, scale * LOG2E, False, BLOCK_N)
    store_rows(head_of(o, b, h), row, o_tile, T, D)
    tl.store(lse + stat + row, lse_row * LN2, mask=row < T)                            # natural, because it leaves the file


@kernel
def flash_dq_kernel(do, q, k, v, lse, delta, starts, dq, shift, W, scale, H, T, S,
                    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Grid (H, row tiles, B)."""
    mine = my_tile(H, T, BLOCK_M)
    h, b, tile, first, last, row, at, stat = mine
    seen = reach_of_tile(mine, starts, shift, W, T, S, BLOCK_N)
    q_tile, k_head, v_head = load_rows(head_of(q, b, h), at, D), head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    do_tile = load_rows(head_of(do, b, h), at, D).to(q_tile.dtype)
    ds_k = tl.zeros([BLOCK_M, D], tl.float32)
    ds_k = dq_branch(ds_k, q_tile, do_tile, k_head, v_head, seen, tl.load(lse + stat + at), tl.load(delta + stat + at), scale * LOG2E,
                     False, BLOCK_N)
    store_rows(head_of(dq, b, h), row, ds_k * scale, T, D)


# ---- decoding: one new token against both caches ---------------------------------------------------------------------
# One query row cannot fill a GPU, so the keys are cut in parts of PART and a program takes one part for all query heads of a
# key/value head: the cache is read once. A second kernel merges the parts of each branch by their log-sum-exps and gates. The ring
# of the last W keys needs no order: softmax does not ask for one, and the positions are already rotated into the keys.


@jit
def attend_part(q, k, v, b, kv, start, filled, part, parts, part_o, part_lse, scale2, H, GROUP: tl.constexpr, PADDED: tl.constexpr,
                PART: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Attention of the GROUP heads of kv (padded to PADDED rows, which the matrix units want) to PART keys of the `filled` ones."""
    stop = tl.minimum(filled, start + PART)
    row = tl.arange(0, PADDED)
    head = kv * GROUP + tl.minimum(row, GROUP - 1)
    q_tile = tl.load(q[0] + b.to(tl.int64) * q[1] + head[:, None] * q[2] + tl.arange(0, D)[None, :])
    # S = stop: what lies behind it in the cache is not loaded, whatever it is
    seen = (start + row * 0, stop + row * 0, start, stop, stop, stop, stop)
    o, lse = attend(q_tile, k, v, seen, scale2, True, BLOCK_N)
    slot = (b * H + head).to(tl.int64) * parts + part
    tl.store(part_o + slot[:, None] * D + tl.arange(0, D)[None, :], o, mask=row[:, None] < GROUP)
    tl.store(part_lse + slot, lse, mask=row < GROUP)


@kernel
def decode_kernel(q, k1, v1, k2, v2, lengths, part_o, part_lse, W, scale, H, n_global, n_local,
                  GROUP: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Grid (n_global + n_local parts, KV, B): the first n_global parts are the long cache, the rest is the ring."""
    part, kv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, parts, scale2 = tl.load(lengths + b), n_global + n_local, scale * LOG2E
    if part < n_global:
        attend_part(q, head_of(k1, b, kv), head_of(v1, b, kv), b, kv, part * PART, length, part, parts, part_o, part_lse, scale2, H,
                    GROUP, PADDED, PART, BLOCK_N, D)
    else:
        attend_part(q, head_of(k2, b, kv), head_of(v2, b, kv), b, kv, (part - n_global) * PART, tl.minimum(length, W), part, parts, part_o,
                    part_lse, scale2, H, GROUP, PADDED, PART, BLOCK_N, D)


@jit
def merge_parts(part_o, part_lse, begin, end, BLOCK_P: tl.constexpr, D: tl.constexpr):
    """Softmax attention over the union of the parts begin <= p < end of one head: (D,)."""
    acc = tl.zeros([D], tl.float32)
    peak, total = float("-inf"), 0.0
    for p in range(begin, end, BLOCK_P):
        parts = p + tl.arange(0, BLOCK_P)
        at = tl.minimum(parts, end - 1)
        lse = tl.where(parts < end, tl.load(part_lse + at), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        share, decay = tl.exp2(lse - new_peak), tl.exp2(peak - new_peak)                # part 0 has a key: the peak is finite at once
        acc = acc * decay + tl.sum(tl.load(part_o + at[:, None] * D + tl.arange(0, D)[None, :]) * share[:, None], 0)
        total = total * decay + tl.sum(share, 0)
        peak = new_peak
    return acc / total


@kernel
def merge_kernel(q, gate_weight, gate_bias, part_o, part_lse, o, H, n_global, n_local, BLOCK_P: tl.constexpr, D: tl.constexpr):
    """Grid (H, B)."""
    h, b, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    q_row, _ = head_of(q, b, h)
    o_row, _ = head_of(o, b, h)
    z = tl.sum(tl.load(q_row + d).to(tl.float32) * tl.load(gate_weight + h * D + d).to(tl.float32), 0)
    z += tl.load(gate_bias + h).to(tl.float32)
    parts = n_global + n_local
    slot = (b * H + h).to(tl.int64) * parts
    o_global = merge_parts(part_o + slot * D, part_lse + slot, 0, n_global, BLOCK_P, D)
    o_local = merge_parts(part_o + slot * D, part_lse + slot, n_global, parts, BLOCK_P, D)
    tl.store(o_row + d, (sigmoid(z) * o_global + sigmoid(-z) * o_local).to(o[0].dtype.element_ty))


# ---- launching -------------------------------------------------------------------------------------------------------
# (BLOCK_M rows, BLOCK_N keys, warps, pipeline stages) by kernel and D. A fixed table, not an autotuner: timing noise may choose
# different tiles on different ranks, and then different bits. For D 128 and 64 the Hopper rows were the fastest on an H100 of those
# that compile without a register spill (a test reads the assembler's report); `--tiles` times the candidates on a GPU.

TILES = {
    "hopper": {"forward": {128: (128, 64, 8, 3), 64: (64, 64, 4, 3), 32: (128, 64, 8, 3), 16: (128, 64, 8, 3)},
               "dq": {128: (128, 64, 8, 3), 64: (64, 64, 4, 3), 32: (128, 64, 8, 3), 16: (128, 64, 8, 3)},
               "dkv": {128: (64, 128, 8, 3), 64: (64, 64, 4, 3), 32: (64, 128, 8, 3), 16: (64, 128, 8, 3)}},
    "other": {"forward": (64, 64, 4, 2), "dq": (64, 32, 4, 2), "dkv": (32, 64, 4, 2)},      # 96 KB of shared memory and up
    "float32": {"forward": (16, 16, 4, 1), "dq": (16, 16, 4, 1), "dkv": (16, 16, 4, 1)},    # exact products, no matrix units: for checks
    "interpreter": {"forward": (64, 32, 4, 1), "dq": (64, 32, 4, 1), "dkv": (64, 32, 4, 1)},
}
CANDIDATES = {"forward": [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2)], "dq": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
              "dkv": [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 2), (32, 128, 8, 3)]}   # D = 128, for --tiles
PART = 256          # keys of the long cache per program in decoding: 4,096 keys fill 128 programs of 8 KV heads
EVERYTHING = 1 << 30                                                                        # a window that hides no key
LONGEST = 1_000_000                    # positions: a CUDA grid has at most 65,535 programs in its second and third axis, of 16 rows or more


@lru_cache
def machine(device, dtype):
    """Which rows of TILES hold for this device and dtype."""
    if device.type == "cpu":
        return "interpreter"
    if dtype == torch.float32:
        return "float32"
    return "hopper" if device.type == "meta" or torch.cuda.get_device_capability(device)[0] == 9 else "other"


def tile_for(name, q):
    """Constants of a launch: the tile of kernel `name`, D, and Triton's options. `q` gives device, dtype and D."""
    row = TILES[machine(q.device, q.dtype)][name]
    m, n, warps, stages = row[q.shape[-1]] if isinstance(row, dict) else row
    return dict(BLOCK_M=m, BLOCK_N=n, D=q.shape[-1], num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def view(x):
    """A tensor as the kernels take it: (tensor, stride of B, of H, of T). Where D is not contiguous, or T too far apart, a copy of it."""
    x = x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()
    return (x, *x.stride()[:3])


def new_like(x, dtype=None):
    """An output in the memory order of x, or another where view() would copy that."""
    y = torch.empty_like(x, dtype=dtype)
    return y if view(y)[0] is y else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def launch(launches, device):
    """Runs a list of (kernel, grid, arguments, constants) in order."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for function, grid, args, constants in launches:
            function[grid](*args, **constants)


def launch_on_queries(function, name, q, k, *args, **more):
    """A launch of a kernel that owns query rows; `name` is its row of TILES. What every kernel wants at the end comes here."""
    (B, H, T, D), constants = q.shape, tile_for(name, q)
    sizes = (D**-0.5, H, T, k.shape[2])
    return function, (H, triton.cdiv(T, constants["BLOCK_M"]), B), (*args, *sizes), dict(constants, GROUP=H // k.shape[1], **more)


def gated_forward_launch(q, k1, v1, k2, v2, gate_weight, gate_bias, starts, window, o, o1, lse1, lse2, z):
    """The one launch of the forward; o1, lse1, lse2, z are empty where nothing is kept for a backward."""
    return launch_on_queries(forward_kernel, "forward", q, k1, *map(view, (q, k1, v1, k2, v2)), gate_weight.contiguous(),
                             gate_bias.contiguous(), starts, view(o), view(o1), lse1, lse2, z, window, SAVE=z.numel() > 0)


def flash_forward_launch(q, k, v, starts, shift, window, o, lse):
    """Attention to one set of keys."""
    return launch_on_queries(flash_forward_kernel, "forward", q, k, *map(view, (q, k, v)), starts, view(o), lse, shift, window)


def flash_dq_launch(do, q, k, v, lse, delta, starts, shift, window, dq):
    """The query side of its backward."""
    return launch_on_queries(flash_dq_kernel, "dq", q, k, *map(view, (do, q, k, v)), lse, delta, starts, view(dq), shift, window)


def dkv_launch(do, q, k, v, lse, delta, ends, dk, dv, shift, window):
    """The key side of the backward of one set of keys, gated or not."""
    (B, H, T, D), (KV, S), constants = q.shape, k.shape[1:3], tile_for("dkv", q)
    args = (*map(view, (do, q, k, v)), lse, delta, ends, view(dk), view(dv), shift, window, D**-0.5, H, T, S)
    return dkv_kernel, (KV, triton.cdiv(S, constants["BLOCK_N"]), B), args, dict(constants, GROUP=H // KV)


def gated_backward_launches(do, q, k1, v1, k2, v2, gate_weight, starts, ends, o1, lse1, lse2, z, window, dq, dk1, dv1, dk2, dv2):
    """Three launches: the queries, then the keys of each branch. Also the buffer that will hold each tile's share of dw and db."""
    B, H, T, D = q.shape
    dgate = q.new_empty(B * triton.cdiv(T, tile_for("dq", q)["BLOCK_M"]), H, D + 1, dtype=torch.float32)
    folded1, folded2, delta1, delta2 = (torch.empty_like(z) for _ in range(4))
    launches = [launch_on_queries(dq_kernel, "dq", q, k1, *map(view, (do, q, k1, v1, k2, v2)), gate_weight.contiguous(), starts, view(o1),
                                  lse1, lse2, z, view(dq), folded1, folded2, delta1, delta2, dgate, window),
                dkv_launch(do, q, k1, v1, folded1, delta1, ends, dk1, dv1, 0, EVERYTHING),
                dkv_launch(do, q, k2, v2, folded2, delta2, ends, dk2, dv2, 0, window)]
    return launches, dgate


def decode_launches(q, k1, v1, k2, v2, gate_weight, gate_bias, lengths, o):
    """Two launches: the parts, then the merge. Cut by PART alone, so a row's result does not depend on the rest of the batch."""
    B, H, _, D = q.shape
    (KV, S), W = k1.shape[1:3], k2.shape[2]
    n_global, n_local = triton.cdiv(S, PART), triton.cdiv(W, PART)
    part_o = q.new_empty(B, H, n_global + n_local, D, dtype=torch.float32)
    part_lse = q.new_empty(B, H, n_global + n_local, dtype=torch.float32)
    block = 16 if q.dtype == torch.float32 else 32                                          # 64 KB of shared memory at D = 128
    constants = dict(D=D, num_warps=4, enable_fp_fusion=True)
    parts = (*map(view, (q, k1, v1, k2, v2)), lengths.contiguous(), part_o, part_lse, W, D**-0.5, H, n_global, n_local)
    merge = (view(q), gate_weight.contiguous(), gate_bias.contiguous(), part_o, part_lse, view(o), H, n_global, n_local)
    sizes = dict(GROUP=H // KV, PADDED=max(16, triton.next_power_of_2(H // KV)), PART=PART, BLOCK_N=block, num_stages=3)
    return [(decode_kernel, (n_global + n_local, KV, B), parts, constants | sizes),
            (merge_kernel, (H, B), merge, constants | dict(BLOCK_P=32))]


# ---- operators -------------------------------------------------------------------------------------------------------
# The launches become PyTorch operators: opaque to torch.compile, with a rule for their gradient. Each has a twin for shapes alone.


def gated_outputs(q, save):
    """o, and what a backward needs: A, its log-sum-exp, the local one, and the gate's logit (empty without `save`)."""
    rows = q.shape[:3] if save else (0, 0, 0)
    o1 = new_like(q) if save else q.new_empty(0, 0, 0, q.shape[-1])
    return new_like(q), o1, *(q.new_empty(rows, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("nanoloopcoder::gated_forward", mutates_args=())
def gated_forward(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate_weight: Tensor, gate_bias: Tensor,
                  starts: Tensor | None, window: int, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, o1, lse1, lse2, z) of gated_outputs(), filled."""
    out = gated_outputs(q, save)
    launch([gated_forward_launch(q, k1, v1, k2, v2, gate_weight, gate_bias, starts, window, *out)], q.device)
    return out


@torch.library.custom_op("nanoloopcoder::gated_backward", mutates_args=())
def gated_backward(do: Tensor, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate_weight: Tensor, gate_bias: Tensor,
                   starts: Tensor | None, o1: Tensor, lse1: Tensor, lse2: Tensor, z: Tensor, window: int
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The seven gradients: of q, both pairs of keys and values, gate weight and gate bias."""
    grads = [new_like(x) for x in (q, k1, v1, k2, v2)]
    ends = None if starts is None else document_ends(starts, q.shape[2])
    launches, dgate = gated_backward_launches(do, q, k1, v1, k2, v2, gate_weight, starts, ends, o1, lse1, lse2, z, window, *grads)
    launch(launches, q.device)
    dw, db = dgate[..., :-1].sum(0), dgate[..., -1].sum(0)                                  # (H, D), (H,); in a fixed order
    return *grads, dw.to(gate_weight.dtype), db.to(gate_bias.dtype)


def _save_gated(ctx, inputs, output):
    *tensors, ctx.window, _ = inputs                                                        # q .. starts
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)                                                        # only o has a gradient: no zeros for the others


gated_forward.register_autograd(lambda ctx, do, *unused: (*gated_backward(do, *ctx.saved_tensors, ctx.window), None, None, None),
                                setup_context=_save_gated)


@torch.library.custom_op("nanoloopcoder::flash_forward", mutates_args=())
def flash_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, shift: int, window: int, dtype: torch.dtype
                  ) -> tuple[Tensor, Tensor]:
    """o (B, H, T, D) in `dtype` and the natural log-sum-exp (B, H, T) of attention to one set of keys."""
    o, lse = new_like(q, dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch([flash_forward_launch(q, k, v, starts, shift, window, o, lse)], q.device)
    return o, lse


@torch.library.custom_op("nanoloopcoder::flash_backward", mutates_args=())
def flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, starts: Tensor | None, shift: int, window: int,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in `dtype`."""
    dq, dk, dv = (new_like(x, dtype) for x in (q, k, v))
    delta = delta.masked_fill(lse == -math.inf, 0.0).contiguous()                           # a row that saw nothing gives nothing
    lse = (lse * math.log2(math.e)).contiguous()
    ends = None if starts is None else document_ends(starts, k.shape[2])
    launch([flash_dq_launch(do, q, k, v, lse, delta, starts, shift, window, dq),
            dkv_launch(do, q, k, v, lse, delta, ends, dk, dv, shift, window)], q.device)
    return dq, dk, dv


def _save_flash(ctx, inputs, output):
    *tensors, ctx.shift, ctx.window, _ = inputs                                             # q, k, v, starts
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate_flash(ctx, do, dlse):
    q, k, v, starts, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    delta = (do.float() * o.float()).sum(-1)
    delta = delta if dlse is None else delta - dlse                                         # d lse / d s = P, like a delta of -dlse
    return *flash_backward(do, q, k, v, lse, delta, starts, ctx.shift, ctx.window, q.dtype), None, None, None, None


flash_forward.register_autograd(_differentiate_flash, setup_context=_save_flash)


@torch.library.custom_op("nanoloopcoder::gated_decode", mutates_args=())
def gated_decode(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate_weight: Tensor, gate_bias: Tensor, lengths: Tensor
                 ) -> Tensor:
    """o (B, H, 1, D)."""
    o = new_like(q)
    launch(decode_launches(q, k1, v1, k2, v2, gate_weight, gate_bias, lengths, o), q.device)
    return o


# the twins for shapes alone, from the same arguments
gated_forward.register_fake(lambda q, *others: gated_outputs(q, save=others[-1]))
gated_backward.register_fake(lambda do, *inputs: (*map(new_like, inputs[:5]), *(x.new_empty(x.shape) for x in inputs[5:7])))
flash_forward.register_fake(lambda q, *others: (new_like(q, others[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)))
flash_backward.register_fake(lambda do, q, k, v, *others: tuple(new_like(x, others[-1]) for x in (q, k, v)))
gated_decode.register_fake(lambda q, *caches: new_like(q))


# ---- what other files call -------------------------------------------------------------------------------------------


def document_starts(segment_ids):
    """For each position the first position of its segment: (B, T) ids, equal along a document -> (B, T) int32."""
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    is_first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return (position * is_first).cummax(1).values.int()                                     # no scalar that would come from the host


def document_ends(starts, S):
    """For each of S keys the number of rows whose document starts at or before it, so rows < ends[j] may see key j: (B, S) int32."""
    keys = torch.arange(S, device=starts.device, dtype=torch.int32).expand(len(starts), S).contiguous()
    return torch.searchsorted(starts, keys, right=True, out_int32=True)


def require(condition, message):
    """The rule of an argument, or a ValueError that says it."""
    if not condition:
        raise ValueError(message)


def check_attention(q, **keys):
    """Rules for a query (B, H, T, D) and the keys and values it meets (B, KV, S, D), by name; S may differ between pairs."""
    require(q.dim() == 4 and q.numel() > 0, f"q must be (B, H, T, D) with no empty axis, got {tuple(q.shape)}")
    B, H, T, D = q.shape
    require(D in (16, 32, 64, 128), f"q: the head size D must be 16, 32, 64 or 128 (a power of two that fits a tile), got {D}")
    require(q.dtype in (torch.float32, torch.float16, torch.bfloat16), f"q must be float32, float16 or bfloat16, got {q.dtype}")
    KV = next(iter(keys.values())).shape[1]
    for name, x in keys.items():
        require(x.dim() == 4 and x.shape[0] == B and x.shape[1] == KV and x.shape[3] == D and x.numel() > 0,
                f"{name} must be (B, KV, S, D) = ({B}, {KV}, S, {D}) to match q and the other keys, got {tuple(x.shape)}")
        require(x.dtype == q.dtype, f"{name} is {x.dtype} and q is {q.dtype}: they must have one dtype")
        require(x.device == q.device, f"{name} is on {x.device} and q on {q.device}: they must be on one device")
    longest = max(x.shape[2] for x in (q, *keys.values()))
    require(B < 2**16 and longest <= LONGEST, f"q: {B} rows, the longest of {longest}; a launch holds 65535 rows of {LONGEST}")
    require(H % KV == 0, f"q has {H} heads, which must be a multiple of the {KV} key/value heads")
    require(triton is not None, "q: this kernel needs Triton, which is not installed; call loop_attention.loop_attention_reference instead")
    require(q.is_cuda or q.is_meta or (q.device.type == "cpu" and INTERPRETED),
            f"q is on {q.device}: the kernel needs a CUDA device (or CPU tensors and TRITON_INTERPRET=1, set before Triton is imported); "
            "loop_attention.loop_attention works on any device")
    require(q.device.type != "cpu" or q.dtype != torch.bfloat16,
            "q: Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16 there")
    require(q.device.type != "cpu" or not INTERPRETER_MISFIT, f"q: {INTERPRETER_MISFIT}")


def check_gate(q, gate_weight, gate_bias):
    """Rules for the gate's parameters."""
    H, D = q.shape[1], q.shape[3]
    for name, x, shape in (("gate_weight", gate_weight, (H, D)), ("gate_bias", gate_bias, (H,))):
        require(tuple(x.shape) == shape, f"{name} must have one row per query head, {shape}, got {tuple(x.shape)}")
        require(x.is_floating_point() and x.dtype != torch.float64, f"{name} must be float32 or a half type, got {x.dtype}")
        require(x.device == q.device, f"{name} is on {x.device} and q on {q.device}: they must be on one device")


def fused_gated_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids=None):
    """
    o = g Attn(q, K1, V1; causal) + (1 - g) Attn(q, K2, V2; causal, the last `window` positions), g = sigmoid(q . w_h + b_h).

    q                    (B, H, T, D)   float32, float16 or bfloat16; any T; D 16, 32, 64 or 128; rotary already applied
    k_global, v_global   (B, KV, T, D)  of pass 1; H is a multiple of KV
    k_local, v_local     (B, KV, T, D)  of pass 2
    gate_weight, gate_bias   (H, D), (H,)
    segment_ids          (B, T)         packed documents: non-decreasing, equal inside a document
    returns              (B, H, T, D)   in the dtype and memory order of q; sums in float32

    Gradients reach the first seven. Twice the same call gives twice the same bits, backward included.
    """
    check_attention(q, k_global=k_global, v_global=v_global, k_local=k_local, v_local=v_local)
    check_gate(q, gate_weight, gate_bias)
    require(isinstance(window, int) and window >= 1, f"window must be an int of at least 1 (a row sees itself), got {window!r}")
    B, _, T, _ = q.shape
    for name, x in (("k_global", k_global), ("v_global", v_global), ("k_local", k_local), ("v_local", v_local)):
        require(x.shape[2] == T, f"{name} must have the {T} positions of q, got {x.shape[2]}")
    starts = None
    if segment_ids is not None:
        require(tuple(segment_ids.shape) == (B, T), f"segment_ids must be (B, T) = ({B}, {T}), got {tuple(segment_ids.shape)}")
        require(not segment_ids.is_floating_point(), f"segment_ids must be integers, got {segment_ids.dtype}")
        starts = document_starts(segment_ids.to(q.device))
    inputs = (q, k_global, v_global, k_local, v_local, gate_weight, gate_bias)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return gated_forward(*inputs, starts, min(window, EVERYTHING), save)[0]


def flash_partial(q, k, v, shift=0, window=None, starts=None, dtype=torch.float32):
    """
    Attention of q to one set of keys, in a form that can be merged with others: (o, lse), differentiable in both.

    q (B, H, T, D), k and v (B, KV, S, D). Row i stands at key position i + shift and sees the keys j with
        max(starts[b, i], i + shift - window + 1) <= j <= i + shift       (starts: (B, T) int32, non-decreasing; None: no limit)
    o (B, H, T, D) in `dtype`, lse (B, H, T) float32, the natural log of the sum of exp(score). A row that sees no key has o = 0,
    lse = -inf. Parts merge as o = sum_p exp(lse_p - lse) o_p with lse = log sum_p exp(lse_p).

    Plain causal attention: shift 0. A chunk of keys n positions to the left of the queries: shift n; wholly visible: shift S.
    Pass 1 on packed rows: flash_partial(q, k, v, starts=document_starts(segment_ids), dtype=q.dtype)[0].
    """
    check_attention(q, k=k, v=v)
    require(k.shape == v.shape, f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    require(isinstance(shift, int) and abs(shift) <= EVERYTHING // 2, f"shift must be an int of at most 2^29, got {shift!r}")
    require(window is None or isinstance(window, int) and window >= 1, f"window must be None or an int of at least 1, got {window!r}")
    require(starts is None or (tuple(starts.shape) == (q.shape[0], q.shape[2]) and starts.dtype == torch.int32),
            f"starts must be int32 of shape (B, T) = ({q.shape[0]}, {q.shape[2]})")
    return flash_forward(q, k, v, None if starts is None else starts.contiguous(), shift, min(window or EVERYTHING, EVERYTHING), dtype)


def flash_partial_backward(do, q, k, v, lse, delta, shift=0, window=None, starts=None, dtype=torch.float32):
    """
    dq, dk, dv of one part, for a caller that keeps its own books (a ring): `lse` (B, H, T) is the merged natural log-sum-exp over
    all parts and `delta` (B, H, T) = rowsum(do * o) of the merged output, both float32. Sums of the parts' results are the
    gradients of the whole. To put a gate in front of the branch, pass lse - log(gate).
    """
    check_attention(q, k=k, v=v)
    starts = None if starts is None else starts.contiguous()
    return flash_backward(do, q, k, v, lse, delta, starts, shift, min(window or EVERYTHING, EVERYTHING), dtype)


def fused_gated_decode(q, k_global, v_global, k_ring, v_ring, gate_weight, gate_bias, lengths):
    """
    One new token per row against its caches; no gradient.

    q (B, H, 1, D)   k_global, v_global (B, KV, S, D): positions 0 .. lengths[b] - 1 are filled, this token's own included
    k_ring, v_ring (B, KV, W, D): position p of pass 2 stands in slot p % W; W is the window      lengths (B,) integers, at least 1
    returns (B, H, 1, D). What stands in the caches behind lengths[b] is never loaded.
    """
    check_attention(q, k_global=k_global, v_global=v_global, k_ring=k_ring, v_ring=v_ring)
    check_gate(q, gate_weight, gate_bias)
    require(q.shape[2] == 1, f"q must hold one position per row, got {q.shape[2]}")
    for name, k, v in (("global", k_global, v_global), ("ring", k_ring, v_ring)):
        require(k.shape == v.shape, f"v_{name} must have the shape of k_{name}, {tuple(k.shape)}, got {tuple(v.shape)}")
    require(tuple(lengths.shape) == (q.shape[0],) and not lengths.is_floating_point(), f"lengths must be {q.shape[0]} integers")
    return gated_decode(q, k_global, v_global, k_ring, v_ring, gate_weight, gate_bias, lengths.to(q.device, torch.int32))


# ---- correctness -----------------------------------------------------------------------------------------------------

NAMES = ("o", "dq", "dk_global", "dv_global", "dk_local", "dv_local", "dgate_weight", "dgate_bias")


def random_inputs(B, H, KV, T, D, device, dtype, seed=0):
    """The seven inputs, each wanting a gradient, and a gradient of the output. Memory order (B, T, heads, D), as a projection leaves it."""
    g = torch.Generator(device).manual_seed(seed)
    draw = lambda heads: torch.randn(B, T, heads, D, generator=g, device=device).to(dtype).transpose(1, 2)
    q, k1, v1, k2, v2, do = (draw(heads) for heads in (H, KV, KV, KV, KV, H))
    gate = torch.randn(H, D, generator=g, device=device) * D**-0.5, torch.randn(H, generator=g, device=device)
    return [x.requires_grad_() for x in (q, k1, v1, k2, v2, *gate)], do


def value_and_gradients(function, inputs, do, *options):
    """[o, and the seven gradients] of an attention with the common signature."""
    o = function(*inputs, *options)
    return [o.detach(), *torch.autograd.grad(o, inputs, do.to(o.dtype))]


def check(reference, device):
    """Prints the kernel's relative errors against `reference` in float64, and whether two runs give the same bits. True if all is well."""
    gpu, fine = device.type == "cuda", True
    B, H, KV, T, D, window = (2, 10, 2, 1000, 128, 64) if gpu else (1, 4, 2, 70, 16, 9)
    segments = (torch.arange(T, device=device) // (T * 2 // 5)).expand(B, T)               # three documents, off the block grid
    print(f"kernel against the reference in float64, relative error; T {T}, window {window}, three documents")
    print(" " * 9, *(f"{name:>12}" for name in NAMES))
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)) if gpu else ((torch.float32, 1e-5), (torch.float16, 3e-3)):
        inputs, do = random_inputs(B, H, KV, T, D, device, dtype)
        exact = value_and_gradients(reference, [x.detach().double().requires_grad_() for x in inputs], do.double(), window, segments)
        first, second = (value_and_gradients(fused_gated_attention, inputs, do, window, segments) for _ in range(2))
        errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(first, exact)]
        same = all(torch.equal(a, b) for a, b in zip(first, second))
        print(f"{str(dtype)[6:]:9}", *(f"{e:12.1e}" for e in errors), f"  two runs {'equal bit for bit' if same else 'DIFFER'}")
        fine &= same and all(e <= limit for e in errors)
    return fine


# ---- times -----------------------------------------------------------------------------------------------------------
# What people would run instead, each from torch alone: FA2 chain, the FlashAttention-2 inside torch, once plain and once with a
# window, and a compiled mix; flex, two FlexAttention calls and the gate, compiled together; cuDNN chain, the same as the first with
# cuDNN for the global branch (which knows no documents, but equal ones are a batch); 2 SDPA, two calls with dense masks where a mask
# is needed, as a first version does it.

PREDICTION = """
prediction, made before any run on a GPU, from a roofline: time = products / rate + traffic / 3.0 TB/s + 5 us a launch, where a rate is
    RATES * n / (n + 300) for documents of n tokens (published H100 charts for the libraries, a guess for ours). Ours reads q once, writes
    o once and has no mix: at T 4k that is a quarter of the forward, at 32k 3 %. Its backward recomputes the weights twice (7 products for
    5) to have one writer for every gradient: the price of equal bits."""
RATES = {"ours": (465, 450), "FA2 chain": (340, 330), "flex": (380, 300), "cuDNN chain": (550, 520), "2 SDPA": (200, 150)}   # TFLOP/s


def predicted_ms(name, T, documents, backward, H=40, D=128):
    """The roofline above. A pair of a query and a key costs 4 D H operations forward and 2.5 times that backward (ours: 3.5)."""
    n, X = T / documents, T * H * D * 2                                                     # X: bytes of one query-sized tensor
    fill = n / (n + 300) * 1e12
    near = T * 192                                                                          # W 64: a tile of 128 rows meets 192 keys
    pairs = T * n / 2 + near
    if name == "2 SDPA":
        pairs = T * T * (1.5 if documents == 1 else 2)
    forward, ours = pairs * 4 * D * H, name == "ours"
    s = forward / (RATES[name][0] * fill) + (0 if ours else 4 * X / 3e12) + (1 if ours else 3) * 5e-6
    if backward:
        s += forward * (3.5 if ours else 2.5) / (RATES[name][1] * fill) + (0 if ours else 10 * X / 3e12) + (4 if ours else 8) * 5e-6
    return s * 1e3


def baselines(mix, T, documents, W, device):
    """{name: function of the seven inputs} for a row of T tokens in equal documents. Masks are made at the first call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    n, i, compiled_mix = T // documents, torch.arange(T, device=device, dtype=torch.int32), torch.compile(mix, dynamic=False)
    cuts = torch.arange(documents + 1, device=device, dtype=torch.int32) * n if documents > 1 else None
    far = (lambda b, h, i, j: (j <= i) & (i // n == j // n)) if documents > 1 else (lambda b, h, i, j: j <= i)
    near = lambda b, h, i, j: far(b, h, i, j) & (i - j < W)
    dense = lru_cache(lambda see: see(0, 0, i[:, None], i[None, :]))                        # (T, T)
    make_blocks = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    blocks = lru_cache(lambda see: make_blocks(see, None, None, T, T, device=device))

    def fa2(q, k, v, window=None):
        q, k, v = (x.transpose(1, 2) if cuts is None else x.transpose(1, 2)[0] for x in (q, k, v))
        o = torch.ops.aten._flash_attention_forward(q, k, v, cuts, cuts, n, n, 0.0, True, False, window_size_left=window and window - 1,
                                                    window_size_right=0 if window else None)[0]
        return (o if cuts is None else o[None]).transpose(1, 2)

    def cudnn_chain(q, k1, v1, k2, v2, w, b):
        batch = (x[0].unflatten(1, (documents, n)).transpose(0, 1) for x in (q, k1, v1))    # (documents, heads, n, D), no copy
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return compiled_mix(q, o.transpose(0, 1).flatten(1, 2)[None], fa2(q, k2, v2, W), w, b)

    def two_sdpa(q, k1, v1, k2, v2, w, b):
        k1, v1, k2, v2 = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k1, v1, k2, v2))
        a = F.scaled_dot_product_attention(q, k1, v1, **(dict(is_causal=True) if documents == 1 else dict(attn_mask=dense(far))))
        return mix(q, a, F.scaled_dot_product_attention(q, k2, v2, attn_mask=dense(near)), w, b)

    @partial(torch.compile, dynamic=False)
    def two_flex(q, k1, v1, k2, v2, w, b, far_blocks, near_blocks):
        return mix(q, flex_attention(q, k1, v1, block_mask=far_blocks, enable_gqa=True),
                   flex_attention(q, k2, v2, block_mask=near_blocks, enable_gqa=True), w, b)

    return {"FA2 chain": lambda q, k1, v1, k2, v2, w, b: compiled_mix(q, fa2(q, k1, v1), fa2(q, k2, v2, W), w, b),
            "flex": lambda *x: two_flex(*x, blocks(far), blocks(near)), "cuDNN chain": cudnn_chain, "2 SDPA": two_sdpa}


def milliseconds(function, inputs, do, replay=False):
    """Median time of a call, with `do` of a call and its backward; cold L2 cache. `replay`: a CUDA graph's, warm, without Python's time."""
    call = (lambda: function(*inputs)) if do is None else (lambda: torch.autograd.grad(function(*inputs), inputs, do))
    timer = triton.testing.do_bench_cudagraph if replay else partial(triton.testing.do_bench, warmup=100, rep=400)
    with torch.set_grad_enabled(do is not None):
        return timer(call, return_mode="median")


def row_of_times(ours, others, inputs, do, T, documents, replay=False):
    """One line of the table: forward or, with `do`, forward and backward. A peer that cannot do it says why in its place."""
    values = (lambda f: [torch.no_grad()(f)(*inputs)]) if do is None else (lambda f: value_and_gradients(f, inputs, do))
    (_, H, _, D), backward = inputs[0].shape, do is not None
    expected, ms, guess = values(ours), milliseconds(ours, inputs, do, replay), predicted_ms("ours", T, documents, backward)
    same = all(torch.equal(a, b) for a, b in zip(values(ours), expected))
    operations = (T * T / documents / 2 + T * 192) * 4 * D * H * (4.5 if backward else 1)
    print(f"T {T:6} documents {documents}  {'forward + backward' if backward else 'forward':18}  {'replayed' if replay else 'launched'}  "
          f"ours {ms:8.3f} ms ({guess:.3f}) {operations / ms / 1e9:4.0f} TF, {'equal' if same else 'OTHER'} bits", end="", flush=True)
    for name, other in others.items():
        try:
            wrong = any((a - e).norm() > 0.05 * e.norm() for a, e in zip(values(other), expected))
            faster = milliseconds(other, inputs, do, replay) / ms
            print(f"  {name} {faster:5.2f} x ({predicted_ms(name, T, documents, backward) / guess:.2f}){' OTHER VALUES' if wrong else ''}",
                  end="", flush=True)
        except Exception as error:                                 # whatever stops a peer is its result, and not the end of the table
            print(f"  {name} failed ({type(error).__name__}: {' '.join(str(error).split())[:80]})", end="", flush=True)
    print(flush=True)


def bench(mix, H=40, KV=8, D=128, W=64):
    """Prints the table of times. `x` is how many times faster we are, predicted in brackets; TF is executed TFLOP/s."""
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {time.strftime('%d %B %Y')}; "
          f"bfloat16, B 1, heads {H}/{KV}, D {D}, window {W}; medians\n{PREDICTION}\n")
    for T, documents, replay in ((1024, 1, False), (4096, 1, False), (32768, 1, False), (32768, 8, False), (1024, 1, True)):
        torch.compiler.reset()
        inputs, do = random_inputs(1, H, KV, T, D, device, torch.bfloat16)
        segments = (torch.arange(T, device=device) // (T // documents))[None] if documents > 1 else None
        ours = lambda *x: fused_gated_attention(*x, W, segments)                            # noqa: B023 - called in this round only
        others = baselines(mix, T, documents, W, device)
        for gradient in (None, do):
            row_of_times(ours, others, inputs, gradient, T, documents, replay)


def time_tiles(H=40, KV=8, T=4096, W=64):
    """Times the candidate tiles of each kernel at D = 128, to choose the row of TILES for a new GPU."""
    device = torch.device("cuda")
    inputs, do = random_inputs(1, H, KV, T, 128, device, torch.bfloat16)
    row = TILES[machine(device, torch.bfloat16)]
    for name, tile in ((name, tile) for name, tiles in CANDIDATES.items() for tile in tiles):
        kept, row[name] = row[name], tile
        ms = milliseconds(lambda *x: fused_gated_attention(*x, W), inputs, None if name == "forward" else do)
        row[name] = kept
        print(f"{name:8} {tile}  {ms:.3f} ms{'' if name == 'forward' else ', forward and backward'}", flush=True)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv=None):
    """The command line."""
    about = "Gated loop attention as one GPU kernel: checks it against the plain equation, then times it beside what torch offers. "
    about += "Without a GPU the check runs in Triton's interpreter and no time is printed."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="correctness only, no times (default: both)")
    parser.add_argument("--tiles", action="store_true", help="time the candidate tiles instead of the table (default: no)")
    args = parser.parse_args(argv)
    require(triton is not None, "Triton is not installed, and it is what runs these kernels: pip install triton")
    gpu = torch.cuda.is_available()
    require(gpu or not args.tiles, "--tiles times kernels, which needs a GPU")
    if not gpu and not INTERPRETED:
        print("no GPU here: the same kernels in Triton's interpreter, which runs them with numpy", flush=True)
        environment = dict(os.environ, TRITON_INTERPRET="1")                                # has to be there before Triton is imported
        status = subprocess.run([sys.executable, __file__, "--check"], env=environment).returncode
        print("times: not measured, the table needs a GPU")
        return status
    from loop_attention import loop_attention_reference, mix
    fine = check(loop_attention_reference, torch.device("cuda" if gpu else "cpu"))
    print("correct" if fine else "WRONG: an error above is over its limit, or two runs differ")
    if fine and gpu and not args.check:
        time_tiles() if args.tiles else bench(mix)
    return 0 if fine else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
