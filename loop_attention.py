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

CHUNK = 128   # queries in a block of the global branch: long enough for the matrix units, short enough to skip most of the future


def blocked_attention(q, k, v, keep):
    """One block of queries (B, KV, G, c, D) on keys (B, KV, n, D); `keep` broadcasts to (B, KV, G, c, n). Returns (B, KV, G, c, D)."""
    B, KV, G, c, D = q.shape
    scores = (q.reshape(B, KV, G * c, D) @ k.transpose(-1, -2)).view(B, KV, G, c, -1).float() * D**-0.5
    p = scores.masked_fill(~keep, -math.inf).softmax(-1).to(v.dtype)
    return (p.view(B, KV, G * c, -1) @ v).view(B, KV, G, c, D)


def causal_attention(q, k, v, segment_ids=None):
    """Plain causal attention inside segments (pass 1, and the global branch): q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D)."""
    if segment_ids is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return window_attention(q, k, v, q.shape[2], segment_ids)


def window_attention(q, k, v, window, segment_ids=None):
    """Causal attention to the last `window` positions inside segments: blocks of queries, each on the keys it can reach."""
    B, H, T, D = q.shape
    KV, c = k.shape[1], min(T, max(16, min(window, CHUNK)))
    q = q.reshape(B, KV, H // KV, T, D)
    positions = torch.arange(T, device=q.device)
    out = []
    for a in range(0, T, c):
        lo, b = max(0, a - window + 1), min(a + c, T)
        distance = positions[a:b, None] - positions[None, lo:b]
        keep = (distance >= 0) & (distance < window)                             # (c, n)
        if segment_ids is not None:
            same = segment_ids[:, a:b, None] == segment_ids[:, None, lo:b]
            keep = (keep & same)[:, None, None]                                  # (B, 1, 1, c, n)
        out.append(blocked_attention(q[:, :, :, a:b], k[:, :, lo:b], v[:, :, lo:b], keep))
    return torch.cat(out, dim=3).view(B, H, T, D)


def loop_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids=None):
    """The same value as loop_attention_reference(), without a T x T tensor for the window; on a GPU the fused kernel takes over."""
    if q.is_cuda:
        from kernels import fused_gated_attention
        return fused_gated_attention(q, k_global, v_global, k_local, v_local, gate_weight, gate_bias, window, segment_ids)
    o_global = causal_attention(q, k_global, v_global, segment_ids)
    o_local = window_attention(q, k_local, v_local, window, segment_ids)
    return mix(q, o_global, o_local, gate_weight, gate_bias)


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
