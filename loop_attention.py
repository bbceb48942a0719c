"""
Loop attention: run the same layers twice, and let the second pass look back at the first.

Pass 1 is plain causal attention; its keys and values are kept. In pass 2 every head sees
    global  all earlier tokens, through the keys and values of pass 1:   A = Attn(q2, K1, V1; causal)
    local   the last w tokens,  through the keys and values of pass 2:   B = Attn(q2, K2, V2; causal, last w, itself included)
and a learned gate, one number per head and token, mixes the two:        o = g A + (1 - g) B,   g = sigmoid(q2 . w_h + b_h)

Read loop_attention_reference() first: it is the whole idea. loop_attention() is the same thing without a T x T tensor, and
ring_loop_attention() spreads the sequence over several devices; attend() is what each of them does with a part of the keys.
Source: LoopCoder report, equations 2 to 5. The rotary embedding is already in q and k when they come here.

    python loop_attention.py            # the fast form against the equations, then 1, 2 and 4 processes: time, bytes, memory
"""
import argparse
import math
import resource
import sys
import tempfile
import time
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


# ---- the equations ---------------------------------------------------------------------------------------------------


def masked_attention(q, k, v, keep):
    """softmax(q k^T / sqrt(D)) v over the keys that `keep` (broadcast to B, H, T, T) lets through; half types compute in float32."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))         # (B, H, T, D): each KV head serves `groups` query heads
    scores = q.to(wide) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])           # (B, H, T, T)
    return (scores.masked_fill(~keep, -math.inf).softmax(-1) @ v).to(dtype)


def loop_attention_reference(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids=None):
    """
    o = g Attn(q, K1, V1; causal) + (1 - g) Attn(q, K2, V2; causal, the last `window` positions), as the report writes it.

    q (B, H, T, D) of pass 2; k_global, v_global (B, KV, T, D) of pass 1; k_local, v_local (B, KV, T, D) of pass 2
    gate_weight (H, D), gate_bias (H,); segment_ids (B, T): a token sees its own segment only
    returns (B, H, T, D) in the dtype of q. Slow, T x T masks, any dtype.
    """
    T = q.shape[2]
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)[None, :]
    keep = (j <= i)[None, None]                                                  # (1, 1, T, T)
    if segment_ids is not None:
        keep = keep & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    near = keep & (i - j < window)
    o_global = masked_attention(q, k_global, v_global, keep)
    o_local = masked_attention(q, k_local, v_local, near)
    return mix(q, o_global, o_local, gate_weight, gate_bias)


def mix(q, o_global, o_local, gate_weight, gate_bias):
    """o = g o_global + (1 - g) o_local with g = sigmoid(q . w + b): one number per head and token, computed in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    z = torch.einsum("bhtd,hd->bht", q.to(wide), gate_weight.to(wide)) + gate_bias.to(wide)[:, None]
    g = torch.sigmoid(z)[..., None]                                              # (B, H, T, 1)
    return (o_local + g * (o_global - o_local)).to(q.dtype)


# ---- the fast form ---------------------------------------------------------------------------------------------------
# On a CPU both views are calls of torch's own kernel, which makes no T x T tensor: the global view one call for each document, since
# documents are whole triangles; the local view one call for all blocks of queries, each with the two blocks of keys that it can see.


def document_starts(segment_ids):
    """First position of each token's segment: (B, T) ids, equal along a segment -> (B, T)."""
    i = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return torch.where(first, i, 0).cummax(dim=1).values


def widened(q, k, v):
    """q, k, v in float32 or wider, with as many heads each: torch's CPU kernel is slower in bfloat16, also where the products are not."""
    wide, groups = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    return q.to(wide), k.to(wide).repeat_interleave(groups, 1), v.to(wide).repeat_interleave(groups, 1)


@torch.compiler.assume_constant_result
def has_bfloat16_products():
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own, twice as fast as float32 ones or more."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fuses(q):
    """Whether FusedAttention is the faster form: a compiler fuses what lies between its products, and those are faster in bfloat16."""
    return torch.compiler.is_compiling() and q.dtype == torch.bfloat16 and has_bfloat16_products()


# opaque to torch.compile, which would otherwise compute it again inside every kernel that reads it
@torch.library.custom_op("nanoloopcoder::visibility", mutates_args=())
def visibility(first: torch.Tensor, last: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    0 where first[..., i] <= keys[..., j] <= last[..., i], -inf elsewhere, float32: (..., T, S), and the same transposed, (..., S, T).

    first and last (..., T), keys (..., S): the first and the last key that each query sees, and where the keys stand.
    """
    keys = keys[..., None, :]
    hidden = (keys < first[..., None]) | (keys > last[..., None])
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)
    return mask, mask.mT.contiguous()


@visibility.register_fake
def _(first, last, keys):
    *batch, T = torch.broadcast_shapes(first.shape, last.shape)
    return first.new_empty(*batch, T, keys.shape[-1], dtype=torch.float32), first.new_empty(*batch, keys.shape[-1], T, dtype=torch.float32)


FUSED_TILE = 256          # queries in a tile of FusedAttention; half as many in a short row, for less of what a tile computes is masked
LOG2E = 1 / math.log(2)   # scores and their lse are in base 2: exp2 costs less, and the same for every argument


class FusedAttention(torch.autograd.Function):
    """
    Attention for torch.compile, a tile of queries at a time: two products forward, five backward, and between them elementwise passes
    that a compiler fuses. With scores Z = q k^T / sqrt(D) + mask, lse = log sum exp(Z) and delta = rowsum(do o):

        P = exp(Z - lse)    O = P V    dV = P^T do    dZ = P (do V^T - delta)    dQ = dZ K / sqrt(D)    dK = dZ^T Q / sqrt(D)

    q (N, H, T, D), k and v (N, KV, S, D); mask (N, 1, T, S) and transposed (N, 1, S, T) from visibility(); without them S = T and
    attention is causal. The backward pass makes Z again and in other steps, as k q^T: a compiler would keep what it finds in both
    passes, T x T numbers.

    Scores leave the product in the dtype of q, so with bfloat16 the error grows with the largest of them: relative to float64, at
    T 512 and D 64, .0036 where it is 5 and .0084 where it is 18 (scaled_dot_product_attention: .0020 and .0018).
    """

    @staticmethod
    def tiles(T, S, causal):
        """[(queries, keys, columns of the mask)] of each tile, as slices, and the number of queries in the first."""
        if not causal:
            return [(slice(0, T), slice(0, S), slice(0, S))], T
        size = FUSED_TILE if T > 4 * FUSED_TILE else FUSED_TILE // 2
        last = (T - 1) // size * size                                            # where the last tile begins
        return [(slice(a, min(a + size, T)), slice(0, min(a + size, T)), slice(last - a, last - a + min(a + size, T)))
                for a in range(0, T, size)], size

    @staticmethod
    def forward(ctx, q, k, v, mask, transposed):
        (N, H, T, D), (KV, S) = q.shape, k.shape[1:3]
        n, group, wide = N * KV, H // KV, torch.promote_types(q.dtype, torch.float32)
        tiles, size = FusedAttention.tiles(T, S, causal=mask is None)
        q, k, v = q.reshape(n, group, T, D), k.reshape(n, S, D), v.reshape(n, S, D)
        if mask is None:                                                         # that of the last tile: an earlier one takes its right end
            at = torch.arange(tiles[-1][0].start + size, device=q.device)
            mask, transposed = (x[None] for x in visibility(torch.zeros_like(at[-size:]), at[-size:], at))
        else:
            mask, transposed = (x.expand(-1, KV, -1, -1).flatten(0, 1) for x in (mask, transposed))
        parts = []
        for queries, keys, columns in tiles:
            qt, kt, vt = q[:, :, queries].reshape(n, -1, D).contiguous(), k[:, keys].contiguous(), v[:, keys].contiguous()
            s = torch.bmm(qt, kt.mT).view(n, group, -1, keys.stop).to(wide) * (LOG2E * D**-0.5)
            s = (s + mask[:, None, : queries.stop - queries.start, columns]).flatten(1, 2)
            peak = s.amax(-1, keepdim=True)
            p = (s - peak).exp2().to(q.dtype)
            total = p.to(wide).sum(-1, keepdim=True)                             # of the weights as they are used
            o = (torch.bmm(p, vt) / total).to(q.dtype)
            parts.append([x.view(n, group, -1, x.shape[-1]) for x in (o, peak + total.log2())])
        o, lse = (torch.cat(x, dim=2) for x in zip(*parts))
        ctx.save_for_backward(q, k, v, o, lse, transposed)
        ctx.sizes, ctx.tiles = (N, H, KV, T, S, D), tiles
        return o.view(N, H, T, D)

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, transposed = ctx.saved_tensors
        N, H, KV, T, S, D = ctx.sizes
        n, group, wide = N * KV, H // KV, lse.dtype
        do = do.reshape(n, group, T, D)
        delta = (do.to(wide) * o).sum(-1, keepdim=True)
        across = lambda x, queries: x[:, :, queries].reshape(n, 1, -1)           # (n, group, T, 1) -> (n, 1, group x queries)
        qdo, kv, parts = torch.stack([q, do]), torch.stack([k, v]), []
        for queries, keys, columns in ctx.tiles:
            qt, dot = qdo[:, :, :, queries].reshape(2, n, -1, D).contiguous()
            kt, vt = kv[:, :, keys].contiguous()
            s = torch.bmm(kt, qt.mT).view(n, keys.stop, group, -1).to(wide) * (LOG2E * D**-0.5)
            s = (s + transposed[:, columns, None, : queries.stop - queries.start]).flatten(2)    # (n, keys, group x queries)
            p = (s - across(lse, queries)).exp2()
            ds = (p * (torch.bmm(vt, dot.mT) - across(delta, queries))).to(q.dtype)
            dq = torch.bmm(ds.mT, kt).view(n, group, -1, D)
            parts.append((dq, torch.bmm(ds, qt), torch.bmm(p.to(q.dtype), dot)))
        dq, dk, dv = zip(*parts)

        def total(parts):                                                        # the sum of (n, e, D), each e a tile longer than the last
            starts = range(0, S, parts[0].shape[1])
            pieces = [sum(x[:, a:a + parts[0].shape[1]].to(wide) for x in parts if x.shape[1] > a) for a in starts]
            return torch.cat(pieces, dim=1).view(N, KV, S, D)

        dq, dk, dv = torch.cat(dq, dim=2).view(N, H, T, D) * D**-0.5, total(dk) * D**-0.5, total(dv)
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None


def attend_documents(q, k, v, starts):
    """Causal attention of each document to itself: q (B, H, T, D), k and v (B, KV, T, D), starts (B, T) or None -> (B, H, T, D)."""
    if starts is None and fuses(q):
        return FusedAttention.apply(q, k, v, None, None)
    q, k, v, dtype = *widened(q, k, v), q.dtype
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True) if starts is None else each_document(q, k, v, starts)
    return o.to(dtype)


@torch.compiler.disable   # lengths differ from row to row: a compiled graph would be made anew for each
def each_document(q, k, v, starts):
    """One call a document."""
    rows = []
    for first, *row in zip(starts, *(x.split(1) for x in (q, k, v))):
        lengths = first.unique_consecutive(return_counts=True)[1].tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in row))
        rows.append(torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2))
    return torch.cat(rows)


def attend_window(q, k, v, window, starts):
    """Attention to the last `window` positions of the same document, itself included; shapes as in attend_documents()."""
    B, T, dtype = len(q), q.shape[2], q.dtype
    if window >= T:
        return attend_documents(q, k, v, starts)
    c = 64 * -(-max(window - 1, 1) // 64)                                        # a block's window ends in the block before
    n = -(-T // c)
    t = torch.arange(n * c, device=q.device).view(n, c)
    first = (t - window + 1).clamp(min=0).expand(B, n, c)                        # (B, n, c): the first key that each query sees
    if starts is not None:
        first = torch.maximum(first, F.pad(starts, (0, n * c - T)).view(B, n, c))
    keys = t[:, :1] - c + torch.arange(2 * c, device=q.device)                   # (n, 2 c): where the keys of each block stand
    masks = [x.flatten(0, 1)[:, None] for x in visibility(first, t.expand(B, n, c), keys.expand(B, n, 2 * c))]
    fused = fuses(q)
    q, k, v = (q, k, v) if fused else widened(q, k, v)

    def blocks(x, before):                                                       # (B, H, T, D) -> (B n, H, c or 2 c, D)
        x = F.pad(x, (0, 0, before, n * c - T))
        x = torch.cat([x[:, :, i:i + n * c].unflatten(2, (n, c)) for i in range(0, before + 1, c)], dim=3)
        return x.transpose(1, 2).flatten(0, 1)

    q, k, v = blocks(q, 0), blocks(k, c), blocks(v, c)
    o = FusedAttention.apply(q, k, v, *masks) if fused else F.scaled_dot_product_attention(q, k, v, attn_mask=masks[0].to(q.dtype))
    return o.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T].to(dtype)


def causal_attention(q, k, v, segment_ids=None):
    """Plain causal attention inside segments (pass 1): q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D)."""
    starts = None if segment_ids is None else document_starts(segment_ids)
    if q.is_cuda or q.is_meta:                                                   # meta: a plan for the GPU (train.py --dry-run)
        from kernels import flash_partial
        return flash_partial(q, k, v, starts=None if starts is None else starts.int(), dtype=q.dtype)[0]
    return attend_documents(q, k, v, starts)


def loop_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids=None):
    """The same value as loop_attention_reference() with memory that grows with T, not its square. On a GPU it is one kernel."""
    if q.is_cuda or q.is_meta:                                                   # meta: a plan for the GPU (train.py --dry-run)
        from kernels import fused_gated_attention
        return fused_gated_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids)
    starts = None if segment_ids is None else document_starts(segment_ids)
    o_global, o_local = attend_documents(q, k_global, v_global, starts), attend_window(q, k_local, v_local, window, starts)
    return mix(q, o_global, o_local, gate_weight, gate_bias)


# ---- one new token against what was kept -----------------------------------------------------------------------------


KEY_BLOCK = 64            # keys stored transposed, (D, slots), are read in pieces of so many positions


def weighted_rows(table, rows, starts, weights):
    """(sums, width): sum b adds up weights[i] table[rows[i]] for i from starts[b] to starts[b + 1]. No gradient."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights.reshape(-1))[0]


@lru_cache(maxsize=8)     # all layers of a step ask for the same two
def attention_rows(heads, group, S, D, slots, dtype):
    """
    What attention_step() adds up: `heads` query heads, `group` to a key head, S of `slots` positions in use.

    (1 / sqrt(D) for each piece of a row of keys, its width, rows of the keys, where each sum begins, the same two of the values)
    """
    width = KEY_BLOCK if slots % KEY_BLOCK == 0 else slots
    pieces = torch.arange(-(-S // width), dtype=torch.int32)[:, None]
    head = torch.arange(heads, dtype=torch.int32)[:, None, None] // group
    keys = (head * D + torch.arange(D, dtype=torch.int32)) * (slots // width) + pieces           # (heads, pieces, D)
    values = head[:, 0] * slots + torch.arange(S, dtype=torch.int32)                             # (heads, S)
    starts = [torch.arange(0, x.numel(), x.shape[-1], dtype=torch.int32) for x in (keys, values)]
    return torch.full(pieces.shape, D**-0.5, dtype=dtype), width, keys.flatten(), starts[0], values.flatten(), starts[1]


def attention_step(q, k, v, mask=None):
    """
    One query a row: q (B, H, D) on keys (B, KV, S, D), mask (B, 1, 1, S) or None. The heads of a group act as its queries.

    A matrix product with two rows takes a CPU as long as one with many. Where keys are stored transposed, (D, slots), both products are
    weighted sums of rows instead: scores = sum_d q_d K^T[d], o = sum_s p_s V[s]. torch has those as embedding bags, whose kernel
    reads rows in their own format and adds up in float32.
    """
    (B, H, D), (KV, S) = q.shape, k.shape[1:3]
    weights = lambda scores: (scores if mask is None else scores + mask[:, 0]).softmax(-1)       # (B, H, S)
    if k.stride(2) != 1:                                                         # keys by rows: two products of stacks of matrices
        q, k, v = q.reshape(B * KV, -1, D), k.reshape(B * KV, S, D), v.reshape(B * KV, S, D)
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=D**-0.5)             # q k^T / sqrt(D) in one call
        return torch.bmm(weights(scores.view(B, H, S)).view(B * KV, -1, S), v).view(B, H, D)
    slots = k.stride(3)
    scale, width, keys, key_starts, values, value_starts = attention_rows(B * H, H // KV, S, D, slots, q.dtype)
    table = k.as_strided((B * KV * D * slots // width, width), (width, 1))
    scores = weighted_rows(table, keys, key_starts, q[:, :, None] * scale).view(B, H, -1)        # of whole blocks
    return weighted_rows(v.as_strided((B * KV * slots, D), (D, 1)), values, value_starts, weights(scores[..., :S])).view(B, H, D)


def loop_attention_step(q, k_global, v_global, k_ring, v_ring, gate_weight, gate_bias, lengths, global_mask=None, ring_mask=None):
    """
    Loop attention of one new token a row against its caches: q (B, H, D) -> (B, H, D); no gradient.

    k_global, v_global (B, KV, S, D) hold pass 1 of all positions, the new one included; k_ring, v_ring (B, KV, W, D) hold the last W
    of this pass, in any order: rotary angles are already in the keys, and softmax does not ask for order. lengths (B,) says how many
    positions each row has; the masks (B, 1, 1, S or W), 0 or -inf, say the same and are None where all rows are full. The gate is as
    exact as that of mix() with a weight and a bias in float32.
    """
    if q.is_cuda:
        from kernels import fused_gated_decode
        return fused_gated_decode(q[:, :, None], k_global, v_global, k_ring, v_ring, gate_weight, gate_bias, lengths)[:, :, 0]
    o_global, o_local = attention_step(q, k_global, v_global, global_mask), attention_step(q, k_ring, v_ring, ring_mask)
    g = torch.sigmoid((q * gate_weight).sum(-1, keepdim=True) + gate_bias[:, None])              # (B, H, 1), in the dtype of the gate
    return torch.lerp(o_local, o_global, g.to(q.dtype))


# ---- one part of the keys, by tiles ----------------------------------------------------------------------------------
# What a rank of the ring does with the keys of another: it sees some of them, and needs the log-sum-exp to merge what it got. Keys are
# numbered 0 .. S-1, query i stands at key i + shift and sees lo[i] <= j <= i + shift, where lo is the start of its document or of its
# window. lo never falls along a row, so a tile of queries needs one stretch of keys, and only the two ends of that need a mask.

EVERYTHING = 2**30        # a window that hides nothing
TILE = 128                # queries in a tile: the scores of one tile and all heads stay in the cache of a core


@lru_cache(64)   # the layers of a step ask for the same few
def edge_mask(left, own, start, stop, dtype):
    """0 where a query sees a key of columns start .. stop - 1, -inf where not: (queries, columns). left, own: first and own key of each."""
    left, own, j = torch.tensor(left)[:, None], torch.tensor(own)[:, None], torch.arange(start, stop)
    return torch.zeros(len(left), len(j), dtype=dtype).masked_fill_((j < left) | (j > own), -math.inf)


class Tiles:
    """The walk over the tiles of one part: its shapes, and for each tile its row, its queries, its keys and its masks."""

    def __init__(self, q, k, shift, window, starts):
        (self.B, self.H, self.T, self.D), (self.KV, self.S) = q.shape, k.shape[1:3]
        self.wide, self.shift = torch.promote_types(q.dtype, torch.float32), shift
        self.blocks = -(-self.T // TILE)
        at = torch.arange(self.blocks * TILE, device=q.device) + shift
        lo = (at - window + 1).clamp(min=0).expand(self.B, -1)
        if starts is not None:
            lo = torch.maximum(lo, F.pad(starts, (0, self.blocks * TILE - self.T), value=starts[:, -1].max()))
        self.lo = torch.minimum(lo, at).tolist()

    def __iter__(self):
        """(row, block of queries, slice of keys, masks) of every tile that sees anything."""
        for b, lo in enumerate(self.lo):
            for i in range(self.blocks):
                at, wants = i * TILE + self.shift, lo[i * TILE:(i + 1) * TILE]
                first = max(wants[0], 0)
                n = min(at + TILE, self.S) - first
                if n > 0:
                    yield b, i, slice(first, first + n), self.masks(wants, at, first, n)

    def masks(self, wants, at, first, n):
        """[(columns, mask)]: the two ends of a tile's keys, which not all of its queries see."""
        left = tuple([w - first for w in wants])
        own = tuple(range(at - first, at - first + TILE))
        ends = (0, min(max(*left, 0), n)), (max(own[0] + 1, 0), n)
        return [(slice(a, e), edge_mask(left, own, a, e, self.wide)) for a, e in ends if a < e]

    def queries(self, x):
        """(B, H, T, D) -> (B, KV, blocks, heads of a group x TILE, D): a tile's queries of all heads that share a key head lie together."""
        x = F.pad(x, (0, 0, 0, self.blocks * TILE - self.T))
        x = x.reshape(self.B, self.KV, self.H // self.KV, self.blocks, TILE, -1)
        return x.transpose(2, 3).reshape(self.B, self.KV, self.blocks, -1, x.shape[-1])

    def unqueries(self, x):
        """The way back from queries()."""
        x = x.view(self.B, self.KV, self.blocks, self.H // self.KV, TILE, -1).transpose(2, 3)
        return x.reshape(self.B, self.H, self.blocks * TILE, -1)[:, :, : self.T]

    def scores(self, buffer, q, k, masks):
        """q k^T of one tile, masked: q (KV, M, D), k (KV, n, D) -> (KV, M, n), in the buffer."""
        s = torch.bmm(q, k.transpose(1, 2), out=buffer[: q.shape[0] * q.shape[1] * k.shape[1]].view(*q.shape[:2], -1))
        for columns, mask in masks:
            s.unflatten(1, (-1, TILE))[..., columns] += mask
        return s

    def buffer(self, like, dtype):
        """Room for the scores of any tile."""
        return like.new_empty(self.H * TILE * self.S, dtype=dtype)


@torch.no_grad()
def attend(q, k, v, shift, window, starts):
    """
    softmax attention of q (B, H, T, D) to k, v (B, KV, S, D): o (B, H, T, D), and lse (B, H, T), the log of the sum of exp(score).

    Query i sees the keys max(starts[b, i], i + shift - window + 1) <= j <= i + shift; one that sees none has o = 0, lse = -inf.
    Scores and sums are float32 (float64 for float64), the other products are in the dtype of q.
    """
    t = Tiles(q, k, shift, window, starts)
    qt, kt = t.queries(q.to(t.wide) * (LOG2E * t.D**-0.5)), k.to(t.wide)
    o, buffer = torch.zeros_like(qt, dtype=q.dtype), t.buffer(q, t.wide)
    peak, total = qt.new_full((*qt.shape[:4], 1), -math.inf), qt.new_zeros(*qt.shape[:4], 1)
    for b, i, keys, masks in t:
        s = t.scores(buffer, qt[b, :, i], kt[b, :, keys], masks)
        m = s.amax(-1, keepdim=True).clamp_(min=-1e30)                           # a query that sees nothing: exp2(-inf + 1e30) = 0
        l = s.sub_(m).exp2_().sum(-1, keepdim=True)
        o[b, :, i] = torch.bmm(s.to(q.dtype), v[b, :, keys]).div_(l.clamp(min=1e-30))
        peak[b, :, i], total[b, :, i] = m, l
    return t.unqueries(o), t.unqueries((peak + total.log2()) / LOG2E)[..., 0]


@torch.no_grad()
def attend_backward(do, q, k, v, lse, delta, shift, window, starts):
    """
    dq, dk, dv of attend(), one tile at a time: P = exp(s - lse), dV = P^T dO, dS = P (dO V^T - delta), dQ = dS K, dK = dS^T Q.

    delta (B, H, T) = rowsum(do o). With lse and delta of a merged attention these are one part's share of the gradients.
    """
    t = Tiles(q, k, shift, window, starts)
    narrow = q.dtype
    qt, kt = t.queries(q.to(t.wide) * (LOG2E * t.D**-0.5)), k.to(t.wide)
    dot, lse, delta = t.queries(do.to(narrow)), t.queries(lse[..., None] * LOG2E), t.queries(delta[..., None])
    dq, dk, dv = torch.zeros_like(qt), torch.zeros_like(kt), torch.zeros_like(kt)
    buffer, other = t.buffer(q, t.wide), t.buffer(q, narrow)
    for b, i, keys, masks in t:
        dob = dot[b, :, i]
        p = t.scores(buffer, qt[b, :, i], kt[b, :, keys], masks).sub_(lse[b, :, i]).exp2_()
        ds = torch.bmm(dob, v[b, :, keys].transpose(1, 2), out=other[: p.numel()].view_as(p))
        dv[b, :, keys] += torch.bmm(p.to(narrow).transpose(1, 2), dob)
        ds.sub_(delta[b, :, i]).mul_(p)
        dq[b, :, i] = torch.bmm(ds, k[b, :, keys])
        dk[b, :, keys] += torch.bmm(ds.transpose(1, 2), qt[b, :, i].to(narrow))
    return t.unqueries(dq.mul_(t.D**-0.5)).to(narrow), (dk / LOG2E).to(narrow), dv.to(narrow, copy=True)


# ---- over a ring of devices ------------------------------------------------------------------------------------------
# The sequence is cut into 2 P chunks; rank r holds chunks r and 2P - 1 - r (zigzag), so every rank has as much past to attend to. In
# step s a rank sends keys and values to rank + s and gets those of rank - s, while it computes on what came in the step before; parts
# merge by their log-sum-exp. A rank sends exactly the stretch of each chunk that the receiver's queries see, so the window's halo
# (one hop or several), documents that end before a border, and shards that nobody needs all fall out of one rule.


def place(group=None):
    """Which part of the sequence this process holds: that of its own rank, or of Ring.turn ranks after it."""
    return (dist.get_rank(group) + Ring.turn) % dist.get_world_size(group)


def in_turn(x):
    """What all_gather brought, by rank -> by part of the sequence."""
    return [*x[-Ring.turn:], *x[:-Ring.turn]] if Ring.turn else x


def shard_sequence(x, group=None, dim=1, pad=0):
    """This rank's part of a whole sequence: chunks r and 2P - 1 - r along `dim`; a length that 2P does not divide is padded first."""
    P, r = dist.get_world_size(group), place(group)
    c = -(-x.shape[dim] // (2 * P))
    shape = list(x.shape)
    shape[dim] = 2 * P * c - shape[dim]
    chunks = torch.cat([x, x.new_full(shape, pad)], dim).split(c, dim)
    return torch.cat([chunks[r], chunks[2 * P - 1 - r]], dim)


def unshard_sequence(x, group=None, dim=1, length=None):
    """The whole sequence (its first `length` positions) from all ranks' parts, on every rank; no gradient."""
    P = dist.get_world_size(group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(P)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    halves = [part.chunk(2, dim) for part in in_turn(parts)]
    whole = torch.cat([a for a, _ in halves] + [b for _, b in reversed(halves)], dim)
    return whole if length is None else whole.narrow(dim, 0, length)


def fingerprint(x) -> torch.Tensor:
    """
    Three 64-bit integers of the bit pattern of a tensor: (3,) int64 on its device.

    With the bits as 32-bit words x[row, col], 1024 to a row, and all sums modulo 2^64:
        S0 = sum x      S1 = sum (2 row + 1) x      S2 = sum (2 col + 1) x
    Integer sums do not depend on order, so the value is the same on every device. One flipped bit always changes S0; the same bit
    flipped in two words, which an exclusive-or cannot see, changes it too; swapped, rolled or repeated words change S1 or S2.
    """
    raw = x.detach().contiguous().view(-1).view(torch.uint8)
    words = (F.pad(raw, (0, -raw.numel() % 4096)) if raw.numel() % 4096 else raw).view(torch.int32).view(-1, 1024)
    rows, columns = words.sum(1, dtype=torch.int64), words.sum(0, dtype=torch.int64)
    weight = lambda sums: 2 * torch.arange(len(sums), device=x.device) + 1
    return torch.stack([rows.sum(), (rows * weight(rows)).sum(), (columns * weight(columns)).sum()])


class Ring:
    """
    Who holds what, and who needs what of whom: t positions a rank, the documents' starts, and the bytes sent so far.

    segment_ids (B, t) is this rank's shard, or None. starts (B, T) and positions (B, t), counted from each document's start, are made
    from all shards, so that rotary angles and documents run across the borders. Where Ring.inspect is set, fingerprints travel with
    all that is sent, and inspect(source rank, {name: tensor}, fingerprints) sees every tensor that arrives. While Ring.turn is n, each
    process plays the part of the n-th after it: the same numbers, computed by other devices.
    """

    inspect, turn = None, 0

    def __init__(self, t, segment_ids=None, group=None, device="cpu"):
        if t % 2:
            raise ValueError(f"a shard of {t} positions cannot hold two chunks: cut the sequence with shard_sequence(), which pads it")
        self.group, self.P, self.rank, self.c = group, dist.get_world_size(group), place(group), t // 2
        ids = torch.zeros(1, t, dtype=torch.int64, device=device) if segment_ids is None else segment_ids
        self.starts = document_starts(unshard_sequence(ids, group))               # (B or 1, T)
        self.earliest = self.starts.min(dim=0).values.cpu()                      # who sends what is decided without asking the GPU
        self.mine = self.chunks(self.rank)
        at = torch.cat([torch.arange(i * self.c, (i + 1) * self.c, device=device) for i in self.mine])
        self.positions = at - self.starts[:, at]
        self.sent = 0                                                            # bytes, keys and values and their gradients

    def chunks(self, rank):
        """The two chunks of a rank."""
        return rank, 2 * self.P - 1 - rank

    def lo(self, window):
        """First key that any row's query sees, for each position (T,)."""
        return torch.maximum(self.earliest, torch.arange(len(self.earliest)) - window + 1)

    def pieces(self, lo, src, dst):
        """[(chunk, first key)]: from there to its end, what rank dst needs of each chunk of rank src."""
        first = [(j, min(max(int(lo[i * self.c]), j * self.c) for i in self.chunks(dst) if i >= j)) for j in self.chunks(src)
                 if any(i >= j for i in self.chunks(dst))]
        return [(j, a) for j, a in first if a < (j + 1) * self.c]

    def part(self, x, j, a):
        """Keys a .. of this rank's chunk j: x (B, KV, t, D)."""
        start = self.mine.index(j) * self.c
        return x[:, :, start + a - j * self.c:start + self.c]

    def shift(self, x, positions, _before=None):
        """Each token gets the state of the one before it in its document, or zeros: x (B, t, C). Only the ends of chunks travel."""
        ends = torch.stack([x[:, self.c - 1], x[:, -1]])                         # (2, B, C): of this rank's two chunks
        every = in_turn(all_gather(ends, self.group))
        parts = []
        for half, i in enumerate(self.mine):                                     # chunk i - 1 ends where this one begins
            before = every[min(i - 1, 2 * self.P - i)][int(i > self.P)] if i else torch.zeros_like(ends[0])
            parts += [before[:, None], x[:, half * self.c:(half + 1) * self.c - 1]]
        return torch.cat(parts, dim=1) * (positions > 0)[..., None]

    def exchange(self, out, dst, pieces, src, like, what=""):
        """Send tensors to dst; those of `pieces` (chunk, first key) come from src: returns a function that waits for them."""
        names = [f"{what}{x} of chunk {j}" for j, _ in pieces for x in ("keys", "values")]
        into = [like.new_empty(*like.shape[:2], (j + 1) * self.c - a, like.shape[3]) for j, a in pieces for _ in range(2)]
        out, arriving = [x.contiguous() for x in out], list(into)
        if Ring.inspect:
            out += [torch.stack([fingerprint(x) for x in out])] if out else []
            arriving += [torch.empty(len(into), 3, dtype=torch.int64, device=like.device)] if into else []
        self.sent += sum(x.numel() * x.element_size() for x in out)
        process = lambda rank: (rank - Ring.turn) % self.P
        peer = lambda rank: process(rank) if self.group is None else dist.get_global_rank(self.group, process(rank))
        ops = [dist.P2POp(dist.isend, x, peer(dst), self.group) for x in out]
        ops += [dist.P2POp(dist.irecv, x, peer(src), self.group) for x in arriving]
        work = dist.batch_isend_irecv(ops) if ops else []

        def arrive(_alive=out):                                                  # what is sent must live until it is gone
            for w in work:
                w.wait()
            if Ring.inspect and into:
                Ring.inspect(peer(src), dict(zip(names, into)), arriving[-1])
            return into
        return arrive

    def fetch(self, k, v, lo, step):
        """Begin step `step`: own pieces go to rank + step, those of rank - step come: (pieces, a function that waits for them)."""
        dst, src = (self.rank + step) % self.P, (self.rank - step) % self.P
        out = [self.part(x, j, a) for j, a in self.pieces(lo, self.rank, dst) for x in (k, v)]
        coming = self.pieces(lo, src, self.rank)
        return coming, self.exchange(out, dst, coming, src, k)

    def steps(self, k, v, lo):
        """(step, [(chunk, first key, keys, values)]) of all ranks in turn, our own first; the next exchange runs meanwhile."""
        own = [(j, j * self.c, self.part(k, j, j * self.c), self.part(v, j, j * self.c)) for j in self.mine]
        ahead = self.fetch(k, v, lo, 1) if self.P > 1 else None
        yield 0, own
        for step in range(1, self.P):
            coming, arrive = ahead
            tensors = arrive()
            ahead = self.fetch(k, v, lo, step + 1) if step + 1 < self.P else None
            yield step, [(j, a, *tensors[2 * n:2 * n + 2]) for n, (j, a) in enumerate(coming)]

    def meetings(self, lo, j, a):
        """[(slice of own queries, shift, starts)]: the own queries that see keys a .. of chunk j, as attend() wants them."""
        found = []
        for half, i in enumerate(self.mine):
            n = int(torch.searchsorted(lo[i * self.c:(i + 1) * self.c], (j + 1) * self.c)) if i >= j else 0
            if n:
                found.append((slice(half * self.c, half * self.c + n), i * self.c - a, self.starts[:, i * self.c:i * self.c + n] - a))
        return found


def ring_bytes(T, P, rank, width, window=EVERYTHING, itemsize=2):
    """
    Bytes that a rank sends for one attention to T positions, all one document: (forward, backward). width = KV D.

    In the forward pass rank r sends its first chunk to all others and its second to the r ranks before it; in the backward pass the
    same again, and float32 gradients of what it got from them. A window that fits a chunk needs its tail at most two times.
    """
    c, borders = -(-T // (2 * P)), (rank > 0) + (rank < P - 1)
    out, back = ((P - 1 + rank) * c, (2 * (P - 1) - rank) * c) if window > c + 1 else [(window - 1) * borders] * 2
    return 2 * width * out * itemsize, 2 * width * (out * itemsize + back * 4)


def part_forward(q, k, v, shift, window, starts):
    """(o, lse) of one part, by the kernel on a GPU and by tiles on a CPU."""
    starts = starts.expand(q.shape[0], -1)
    if q.is_cuda:
        from kernels import flash_partial
        return flash_partial(q, k, v, shift, window, starts.int())
    return attend(q, k, v, shift, window, starts)


def part_backward(do, q, k, v, lse, delta, shift, window, starts):
    """(dq, dk, dv) of one part."""
    starts = starts.expand(q.shape[0], -1)
    if q.is_cuda:
        from kernels import flash_partial_backward
        return flash_partial_backward(do, q, k, v, lse, delta, shift, window, starts.int())
    return attend_backward(do, q, k, v, lse, delta, shift, window, starts)


class RingAttention(torch.autograd.Function):
    """softmax attention of this rank's queries to the keys of all ranks, to the last `window` positions, inside documents."""

    @staticmethod
    def forward(ctx, q, k, v, ring, window):
        lo = ring.lo(window)
        wide = torch.promote_types(q.dtype, torch.float32)
        o, lse = torch.zeros(q.shape, dtype=wide, device=q.device), torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
        for _, pieces in ring.steps(k, v, lo):
            for j, a, kj, vj in pieces:
                for rows, shift, starts in ring.meetings(lo, j, a):
                    part, part_lse = part_forward(q[:, :, rows], kj, vj, shift, window, starts)
                    both = torch.logaddexp(lse[:, :, rows], part_lse)
                    scale = lambda x, both=both: torch.exp(x - both.clamp(min=-1e30))[..., None]   # nothing seen yet: exp(-inf), not NaN
                    o[:, :, rows] = o[:, :, rows] * scale(lse[:, :, rows]) + part * scale(part_lse)
                    lse[:, :, rows] = both
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.ring, ctx.window = ring, window
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        ring, lo = ctx.ring, ctx.ring.lo(ctx.window)
        delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        for step, pieces in ring.steps(k, v, lo):
            grads = []
            for j, a, kj, vj in pieces:
                dkj, dvj = (torch.zeros(kj.shape, dtype=lse.dtype, device=kj.device) for _ in range(2))
                for rows, shift, starts in ring.meetings(lo, j, a):
                    shares = part_backward(do[:, :, rows].contiguous(), q[:, :, rows], kj, vj, lse[:, :, rows].contiguous(),
                                           delta[:, :, rows].contiguous(), shift, ctx.window, starts)
                    for whole, share in zip((dq[:, :, rows], dkj, dvj), shares):
                        whole += share
                grads += [dkj, dvj]
            home = [(j, j * ring.c) for j in ring.mine]
            if step:                                                             # the gradients go home, ours come home
                home = ring.pieces(lo, ring.rank, (ring.rank + step) % ring.P)
                grads = ring.exchange(grads, (ring.rank - step) % ring.P, home, (ring.rank + step) % ring.P, dk, "gradient of ")()
            for n, (j, a) in enumerate(home):
                ring.part(dk, j, a).add_(grads[2 * n])
                ring.part(dv, j, a).add_(grads[2 * n + 1])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


@torch.compiler.disable
def ring_attention(q, k, v, ring, window=EVERYTHING):
    """Causal attention over the ring: this rank's q (B, H, t, D), k and v (B, KV, t, D) -> (B, H, t, D)."""
    return RingAttention.apply(q, k, v, ring, window)


def ring_loop_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids=None, group=None, ring=None):
    """
    loop_attention() of a sequence that is spread over the ranks of `group`: all arguments but the gate are this rank's shards.

    The gate's gradients are this rank's share, as those of any parameter are; sum them over the group. A caller with many layers makes
    one Ring(t, segment_ids, group) and passes it instead of the ids.
    """
    ring = ring or Ring(q.shape[2], segment_ids, group, q.device)
    o_global = ring_attention(q, k_global, v_global, ring)
    o_local = ring_attention(q, k_local, v_local, ring, window)
    return mix(q, o_global, o_local, gate_weight, gate_bias)


# ---- command line ----------------------------------------------------------------------------------------------------


def one_rank(rank, P, rendezvous, T, queue):
    """One process of the table: a loop attention of T positions, forward and backward, over P ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=P)
    torch.manual_seed(0)
    H, KV, D, window = 4, 2, 32, 64
    for length in (2 * P, T):                                                    # the short one loads what stays loaded
        whole = [torch.randn(1, h, length, D) for h in (H, KV, KV, KV, KV)] + [torch.randn(H, D) / 6, torch.randn(H)]
        mine = [shard_sequence(x, dim=2).requires_grad_() for x in whole[:5]] + whole[5:]
        held, ring = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Ring(mine[0].shape[2])
        dist.barrier()
        start = time.perf_counter()
        o = ring_loop_attention(*mine, window, ring=ring)
        o.sum().backward()
        dist.barrier()
        seconds, used = time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    o = unshard_sequence(o, dim=2, length=T)
    if rank == 0:
        error = float((o - loop_attention(*whole, window)).abs().max())
        queue.put((P, seconds, ring.sent / 1024, used, error))
    dist.barrier()
    dist.destroy_process_group()


def main(argv=None):
    """Compare the fast form with the reference on a small packed batch, then run the ring with 1, 2 and 4 processes."""
    parser = argparse.ArgumentParser(prog="loop_attention.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=(
        "Check the fast form of loop attention against the equations, then run it over 1, 2 and 4 processes: time, bytes that rank 0 "
        "sends, and the memory that a rank takes beyond its inputs, for one forward and backward pass."))
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sequence that the processes share")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    B, H, KV, T, D, window = 2, 4, 2, 200, 16, 9
    q, (k1, v1, k2, v2) = torch.randn(B, H, T, D), torch.randn(4, B, KV, T, D)
    inputs = (q, k1, v1, k2, v2, torch.randn(H, D), torch.randn(H), window, torch.arange(T).expand(B, T) // 70)
    print(f"largest difference to the equations: {(loop_attention(*inputs) - loop_attention_reference(*inputs)).abs().max():.1e}")
    print(f"{'processes':>9} {'seconds':>8} {'sent KiB':>9} {'peak MiB':>9} {'difference':>11}   ({args.tokens} tokens)")
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for P in (1, 2, 4):
            queue = context.SimpleQueue()
            torch.multiprocessing.spawn(one_rank, (P, f"{folder}/{P}", args.tokens, queue), nprocs=P)
            print("{:>9} {:>8.2f} {:>9.0f} {:>9.1f} {:>11.1e}".format(*queue.get()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"loop_attention.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
