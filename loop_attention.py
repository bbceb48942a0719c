"""
Loop attention: run the same layers twice, and let the second pass look back at the first.

Pass 1 is plain causal attention; its keys and values are kept. In pass 2 every head sees
    global  all earlier tokens, through the keys and values of pass 1:   A = Attn(q2, K1, V1; causal)
    local   the last w tokens,  through the keys and values of pass 2:   B = Attn(q2, K2, V2; causal, last w, itself included)
and a learned gate, one number per head and token, mixes the two:        o = g A + (1 - g) B,   g = sigmoid(q2 . w_h + b_h)

Read loop_attention_reference() first: it is the whole idea. loop_attention() is the same thing without a T x T tensor.
Source: LoopCoder report, equations 2 to 5. The rotary embedding is already in q and k when they come here.

    python loop_attention.py            # the fast form against the reference, and both views of a short line
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

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


# ---- attention by tiles, on a CPU ------------------------------------------------------------------------------------
# One description covers pass 1, the global view, the local view and a part of a ring. Keys are numbered 0 .. S-1. Query i stands at
# key i + shift and sees the keys lo[i] <= j <= i + shift, where lo is the start of its document or of its window. lo never falls
# along a row, so a tile of queries needs one stretch of keys, and only the two ends of that stretch need a mask.

TILE = 128        # queries in a tile: the scores of one tile and all heads stay in the cache of a core
BLOCK = 64        # queries in a block of a narrow window, of which GROUP queries' worth lie side by side in one tile
GROUP = 512
LOG2E = 1 / math.log(2)   # scores are in base 2: exp2 costs the same for every argument, exp is slow where a mask says -inf


def document_starts(segment_ids):
    """First position of each token's segment: (B, T) ids, equal along a segment -> (B, T)."""
    i = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return torch.where(first, i, 0).cummax(dim=1).values


def edge_mask(lefts, own, columns, c, dtype):
    """0 where a query sees a key of these columns, -inf where not: (g, 1, c, columns). lefts, own: first key and own key of each query."""
    left, own = (torch.tensor(x).view(-1, 1, c, 1) for x in (lefts, own))
    j = torch.arange(columns.start, columns.stop)
    return torch.zeros(len(left), 1, c, len(j), dtype=dtype).masked_fill_((j < left) | (j > own), -math.inf)


class Tiles:
    """
    The walk over the tiles of one attention: shapes, paddings, and for each tile its row, its blocks, its keys and its masks.

    A tile is g blocks of c queries; block r meets the n keys that begin r c further. Wide views: g = 1 and any n. Narrow windows:
    n = c + the window rounded up, and many blocks a tile, since a single one would be too little work.
    """

    def __init__(self, q, k, shift, window, starts):
        (self.B, self.H, self.T, self.D), (self.KV, self.S) = q.shape, k.shape[1:3]
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.narrow_window = window <= 2 * BLOCK and shift >= 0
        self.c = BLOCK if self.narrow_window else TILE
        self.n = self.c * (1 + -(-(window - 1) // self.c))                       # keys of a block in a narrow window
        self.blocks, self.shift = -(-self.T // self.c), shift
        self.front = max(0, self.n - self.c - shift) if self.narrow_window else 0
        self.back = max(0, self.blocks * self.c + shift - self.S) if self.narrow_window else 0
        at = torch.arange(self.blocks * self.c, device=q.device) + shift
        lo = (at - window + 1).clamp(min=0).expand(self.B, -1)
        if starts is not None:
            lo = torch.maximum(lo, F.pad(starts, (0, self.blocks * self.c - self.T), value=starts[:, -1].max()))
        self.lo = torch.minimum(lo, at).tolist()
        self.masks = {}

    def __iter__(self):
        """(row, slice of blocks, slice of keys, length of each block's stretch of keys, masks) of every tile that sees anything."""
        c = self.c
        step = max(1, GROUP // c) if self.narrow_window else 1
        for b, lo in enumerate(self.lo):
            for i in range(0, self.blocks, step):
                g = min(step, self.blocks - i)
                at, wants = i * c + self.shift, lo[i * c:(i + g) * c]
                if self.narrow_window:
                    first, n = at + c - self.n + self.front, self.n              # in padded keys
                else:
                    first = max(wants[0], 0)
                    n = min(at + c, self.S) - first
                if n > 0:
                    yield b, slice(i, i + g), slice(first, first + (g - 1) * c + n), n, self.masks_of(wants, at, first - self.front, n, g)

    def masks_of(self, wants, at, first, n, g):
        """[(columns, mask)]: where this tile's keys are not seen by all of its queries. Equal tiles share their masks."""
        c = self.c
        lefts = tuple([w - first - r * c for r in range(g) for w in wants[r * c:(r + 1) * c]])
        key = lefts, at - first, n
        if key not in self.masks:
            own = [at - first + t for _ in range(g) for t in range(c)]
            ends = [slice(0, n)] if g > 1 else [slice(0, min(max(*lefts, 0), n)), slice(max(own[0] + 1, 0), n)]
            self.masks[key] = [(x, edge_mask(lefts, own, x, c, self.wide)) for x in ends if x.start < x.stop]
        return self.masks[key]

    def queries(self, x):
        """(B, H, T, D) -> (B, KV, blocks, G c, D): one block's queries of all heads that share a key head lie together."""
        x = F.pad(x, (0, 0, 0, self.blocks * self.c - self.T))
        x = x.reshape(self.B, self.KV, self.H // self.KV, self.blocks, self.c, -1)
        return x.transpose(2, 3).reshape(self.B, self.KV, self.blocks, -1, x.shape[-1])

    def unqueries(self, x):
        """The way back from queries()."""
        x = x.view(self.B, self.KV, self.blocks, self.H // self.KV, self.c, -1).transpose(2, 3)
        return x.reshape(self.B, self.H, self.blocks * self.c, -1)[:, :, : self.T]

    def keys(self, x):
        """(B, KV, S, D) with the paddings of a narrow window."""
        return F.pad(x, (0, 0, self.front, self.back)) if self.front or self.back else x.contiguous()

    def take(self, x, b, keys, n):
        """The keys of one tile, transposed: (KV g, D, n)."""
        return x[b, :, keys].unfold(1, n, self.c).flatten(0, 1)

    def add(self, x, b, keys, part):
        """Add part (KV g, n, D) to the keys it was taken from."""
        part = part.unflatten(0, (self.KV, -1))                                  # (KV, g, n, D)
        g, n = part.shape[1:3]
        step = n if g == 1 else self.c
        for r in range(0, n, step):
            start = keys.start + r
            x[b, :, start:start + g * step].unflatten(1, (g, step)).add_(part[:, :, r:r + step])

    def scores(self, buffer, q, k, masks):
        """q k^T of one tile, masked: q (KV g, M, D), k (KV g, D, n) -> (KV g, M, n), in the buffer."""
        s = torch.bmm(q, k, out=buffer[: q.shape[0] * q.shape[1] * k.shape[2]].view(*q.shape[:2], -1))
        for columns, mask in masks:
            s.view(self.KV, len(mask), -1, self.c, s.shape[-1])[..., columns] += mask
        return s

    def buffer(self, like, dtype):
        """Room for the scores of any tile."""
        rows = self.H * min(GROUP, self.blocks * self.c) if self.narrow_window else self.H * self.c
        return like.new_empty(rows * (self.n if self.narrow_window else self.S), dtype=dtype)


@torch.library.custom_op("nanoloopcoder::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, shift: int, window: int, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    softmax attention of q (B, H, T, D) to k, v (B, KV, S, D): o (B, H, T, D), and lse (B, H, T), the log of the sum of exp(score).

    Query i sees the keys max(starts[b, i], i + shift - window + 1) <= j <= i + shift; one that sees none has o = 0, lse = -inf.
    Scores and sums are float32 (float64 for float64), the other products are in the dtype of q.
    """
    t = Tiles(q, k, shift, window, starts)
    qt, kt, vt = t.queries(q.to(t.wide) * (LOG2E * t.D**-0.5)), t.keys(k.to(t.wide)), t.keys(v)
    o, buffer = torch.zeros_like(qt, dtype=q.dtype), t.buffer(q, t.wide)
    peak, total = qt.new_full((*qt.shape[:4], 1), -math.inf), qt.new_zeros(*qt.shape[:4], 1)
    for b, blocks, keys, n, masks in t:
        s = t.scores(buffer, qt[b, :, blocks].flatten(0, 1), t.take(kt, b, keys, n), masks)
        m = s.amax(-1, keepdim=True).clamp_(min=-1e30)                           # a query that sees nothing: exp2(-inf + 1e30) = 0
        l = s.sub_(m).exp2_().sum(-1, keepdim=True)
        x = torch.bmm(s.to(q.dtype), t.take(vt, b, keys, n).transpose(1, 2)).div_(l.clamp(min=1e-30))
        for whole, part in ((o, x), (peak, m), (total, l)):
            whole[b, :, blocks] = part.unflatten(0, (t.KV, -1))
    return t.unqueries(o), t.unqueries((peak + total.log2()) / LOG2E)[..., 0]


@torch.library.custom_op("nanoloopcoder::attend_backward", mutates_args=())
def attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, shift: int, window: int,
                    starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """
    dq, dk, dv of attend(), one tile at a time: P = exp(s - lse), dV = P^T dO, dS = P (dO V^T - delta), dQ = dS K, dK = dS^T Q.

    delta (B, H, T) = rowsum(do o). With lse and delta of a merged attention these are one part's share of the gradients.
    """
    t = Tiles(q, k, shift, window, starts)
    narrow = q.dtype
    qt, kt, kn, vt = t.queries(q.to(t.wide) * (LOG2E * t.D**-0.5)), t.keys(k.to(t.wide)), t.keys(k), t.keys(v)
    dot, lse, delta = t.queries(do.to(narrow)), t.queries(lse[..., None] * LOG2E), t.queries(delta[..., None])
    dq, dk, dv = torch.zeros_like(qt), torch.zeros_like(kt), torch.zeros_like(kt)
    buffer, other = t.buffer(q, t.wide), t.buffer(q, narrow)
    for b, blocks, keys, n, masks in t:
        qb, dob, lseb, deltab = (x[b, :, blocks].flatten(0, 1) for x in (qt, dot, lse, delta))
        p = t.scores(buffer, qb, t.take(kt, b, keys, n), masks).sub_(lseb).exp2_()
        ds = torch.bmm(dob, t.take(vt, b, keys, n), out=other[: p.numel()].view_as(p))
        t.add(dv, b, keys, torch.bmm(p.to(narrow).transpose(1, 2), dob))
        ds.sub_(deltab).mul_(p)
        dq[b, :, blocks] = torch.bmm(ds, t.take(kn, b, keys, n).transpose(1, 2)).unflatten(0, (t.KV, -1))
        t.add(dk, b, keys, torch.bmm(ds.transpose(1, 2), qb.to(narrow)))
    dk, dv = (x[:, :, t.front:t.front + t.S] for x in (dk, dv))
    return t.unqueries(dq.mul_(t.D**-0.5)).to(narrow), (dk / LOG2E).to(narrow), dv.to(narrow, copy=True)


@attend.register_fake
def _(q, k, v, shift, window, starts):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@attend_backward.register_fake
def _(do, q, k, v, lse, delta, shift, window, starts):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, ctx.shift, ctx.window, starts = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _differentiate(ctx, do, dlse):
    q, k, v, o, lse, starts = ctx.saved_tensors
    delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    return *attend_backward(do, q, k, v, lse, delta, ctx.shift, ctx.window, starts), None, None, None


attend.register_autograd(_differentiate, setup_context=_save)

# ---- the fast form ---------------------------------------------------------------------------------------------------

EVERYTHING = 2**30


def causal_attention(q, k, v, segment_ids=None):
    """Plain causal attention inside segments (pass 1): q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D)."""
    starts = None if segment_ids is None else document_starts(segment_ids)
    if q.is_cuda:
        from kernels import flash_partial
        return flash_partial(q, k, v, starts=None if starts is None else starts.int(), dtype=q.dtype)[0]
    return attend(q, k, v, 0, EVERYTHING, starts)[0]


def loop_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids=None):
    """The same value as loop_attention_reference() with memory that grows with T, not its square. On a GPU it is one kernel."""
    if q.is_cuda:
        from kernels import fused_gated_attention
        return fused_gated_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids)
    starts = None if segment_ids is None else document_starts(segment_ids)
    o_global = attend(q, k_global, v_global, 0, EVERYTHING, starts)[0]
    o_local = attend(q, k_local, v_local, 0, window, starts)[0]
    return mix(q, o_global, o_local, gate_weight, gate_bias)


# ---- one new token against what was kept -----------------------------------------------------------------------------


def attention_step(q, k, v, mask=None):
    """One query a row: q (B, H, D) on keys (B, KV, S, D), mask (B, 1, 1, S) or None. The heads of a group act as its queries."""
    B, H, D = q.shape
    return F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, attn_mask=mask).view(B, H, D)


def loop_attention_step(q, k_global, v_global, k_ring, v_ring, gate_weight, gate_bias, lengths, global_mask=None, ring_mask=None):
    """
    Loop attention of one new token a row against its caches: q (B, H, D) -> (B, H, D); no gradient.

    k_global, v_global (B, KV, S, D) hold pass 1 of all positions, the new one included; k_ring, v_ring (B, KV, W, D) hold the last W
    of this pass, in any order: rotary angles are already in the keys, and softmax does not ask for order. lengths (B,) says how many
    positions each row has; the masks (B, 1, 1, S or W), 0 or -inf, say the same and are None where all rows are full.
    """
    if q.is_cuda:
        from kernels import fused_gated_decode
        return fused_gated_decode(q[:, :, None], k_global, v_global, k_ring, v_ring, gate_weight, gate_bias, lengths)[:, :, 0]
    o_global, o_local = attention_step(q, k_global, v_global, global_mask), attention_step(q, k_ring, v_ring, ring_mask)
    g = torch.sigmoid((q * gate_weight).sum(-1, keepdim=True) + gate_bias[:, None])
    return torch.lerp(o_local, o_global, g)


# ---- command line ----------------------------------------------------------------------------------------------------


def main():
    """Compare the fast form with the reference on a small packed batch."""
    torch.manual_seed(0)
    B, H, KV, T, D, window = 2, 4, 2, 200, 16, 9
    q, (k1, v1, k2, v2) = torch.randn(B, H, T, D), torch.randn(4, B, KV, T, D)
    segment_ids = torch.arange(T).expand(B, T) // 70
    args = (q, k1, v1, k2, v2, torch.randn(H, D), torch.randn(H), window, segment_ids)
    print(f"largest difference to the reference: {(loop_attention(*args) - loop_attention_reference(*args)).abs().max():.1e}")


if __name__ == "__main__":
    main()
