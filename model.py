"""
LoopCoder: a Llama whose layers run twice.

One stack of n layers is run `loop_num` times over the same tokens with the same weights. Pass 1 is an ordinary causal
transformer; each layer's keys and values stay. From pass 2 on every layer attends to two things, mixed by a learned gate: all
of pass 1 (global) and the last `loop_window_size` positions of its own pass (local). loop_attention.py has that equation.
loop_num = 1 is the dense IQuest-Coder, a Llama in every tensor.

Read LoopCoder.passes() first: it is the model. Block is one layer, Cache is what decoding keeps, the rest is files and numbers.

    x = embed(ids)
    for r in range(R):
        for i, layer in enumerate(layers):
            x, k, v = layer(x, causal if r == 0 else gated(k1[i], v1[i]))
            if r == 0: k1[i], v1[i] = k, v
    return norm(x)

Source: IQuest-Coder-V1 and LoopCoder reports; config and tensor names are those of the released checkpoints.
Where we differ: the reports' equation 1 (loop 2 reads the embedding plus the shifted state of loop 1) is the flag loop_input="shift".

    python model.py                                   # shapes of the presets: parameters, FLOPs, cache bytes a token
    python model.py --prompt "def fib(n):"            # complete a text with the newest checkpoint under out/
    python model.py --chat "..." --ckpt DIR           # ask an instruct or thinking checkpoint
    python model.py --bench                           # training and decoding speed, beside transformers where it is installed
"""
import argparse
import ctypes
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from loop_attention import (KEY_BLOCK, Ring, attention_step, causal_attention, document_starts, loop_attention, loop_attention_step, mix,
                            ring_attention, ring_loop_attention, weighted_rows)


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class LoopCoderConfig:
    """The shape of a model, under the names of the released config.json. The defaults are the `nano` preset."""

    vocab_size: int = 8192                # V
    hidden_size: int = 256                # C
    intermediate_size: int = 704          # width of the SwiGLU
    num_hidden_layers: int = 4            # L
    num_attention_heads: int = 8          # H
    num_key_value_heads: int = 4          # KV: each serves H / KV query heads
    head_dim: int = 32                    # D
    max_position_embeddings: int = 4096   # longest context, tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0          # base of the rotary wavelengths
    loop_num: int = 2                     # R: passes over the layers; 1 is the dense model
    loop_window_size: int = 64            # W: positions the local view sees, itself included
    loop_input: str = "hidden"            # what pass 2 starts from: "hidden" (released) or "shift" (equation 1: E + Shift(H, 1))
    loop_grad_scale: float = 1.0          # gradient that crosses from pass 2 back into pass 1 through the hidden state is scaled by this
    initializer_range: float = 0.02       # standard deviation of the initial weights
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        for f in dataclasses.fields(self):
            if f.type is int and getattr(self, f.name) < 1:
                raise ValueError(f"{f.name}={getattr(self, f.name)} must be at least 1")
        if heads % kv_heads != 0:
            raise ValueError(
                f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}: each key/value head serves the same "
                f"number of query heads. For example num_key_value_heads={math.gcd(heads, kv_heads)} works."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.loop_input not in ("hidden", "shift"):
            raise ValueError(f"loop_input={self.loop_input!r} must be 'hidden' or 'shift'")

    @classmethod
    def preset(cls, name, **changes):
        """A named shape, with fields changed on request: LoopCoderConfig.preset("nano", loop_num=1)."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_json(cls, path):
        """Read a released or saved config.json. A setting that this model would compute differently is refused, not ignored."""
        try:
            raw = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        refuse = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None}
        for key, only in refuse.items():
            if raw.get(key, only) not in (only, None):
                raise ValueError(f"{path}: {key}={raw[key]!r} is not supported, only {only!r}")
        raw = {**(raw.get("rope_parameters") or {}), **raw}                       # transformers 5 keeps rope_theta in there
        if raw.get("rope_type", "default") != "default":
            raise ValueError(f"{path}: rope_type={raw['rope_type']!r} is not supported, only 'default'")
        raw.setdefault("loop_num", 1)                                            # a Llama is a LoopCoder that runs once
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        raw.setdefault("head_dim", raw.get("hidden_size", 0) // (raw.get("num_attention_heads") or 1))
        names = {f.name for f in dataclasses.fields(cls)}
        missing = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"} - raw.keys()
        if missing:
            raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}")
        if isinstance(raw.get("eos_token_id"), list):
            raw["eos_token_id"] = raw["eos_token_id"][0]
        return cls(**{k: v for k, v in raw.items() if k in names and v is not None})

    def to_json(self):
        """The released config.json of this shape. A dense model calls itself a Llama, which it is, so that any program loads it."""
        loop = self.loop_num > 1
        head = {"architectures": ["IQuestLoopCoderForCausalLM" if loop else "LlamaForCausalLM"],
                "model_type": "iquestloopcoder" if loop else "llama"}
        fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None,
                 "attention_dropout": 0.0, "use_cache": True}
        return {**head, **dataclasses.asdict(self), **fixed}


def shape(hidden, ffn, layers, heads, kv_heads, vocab, positions, loops=2):
    """One preset as config fields."""
    return dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, head_dim=hidden // heads, vocab_size=vocab, max_position_embeddings=positions, loop_num=loops)


PRESETS = {
    "nano": shape(256, 704, 4, 8, 4, 8192, 4096),                  # two CPU cores, minutes
    "small": shape(768, 2048, 12, 12, 4, 32768, 32768),            # one GPU, an hour or two
    "node": shape(2048, 5632, 24, 16, 4, 65536, 131072),           # eight GPUs
    "7b": shape(5120, 27648, 14, 40, 8, 76800, 131072, loops=1),   # from here on the report's own shapes
    "14b": shape(5120, 27648, 28, 40, 8, 76800, 131072, loops=1),
    "40b": shape(5120, 27648, 80, 40, 8, 76800, 131072, loops=1),
    "40b-loop": shape(5120, 27648, 80, 40, 8, 76800, 131072),
}


# ---- small parts -----------------------------------------------------------------------------------------------------


# opaque to torch.compile, which would otherwise compute it again inside every kernel that reads it
@torch.library.custom_op("nanoloopcoder::rotary_table", mutates_args=())
def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin of position x frequency, float32, (B, T, 1, D) for positions (B, T): [c, c] and [-s, s], ready for rotate()."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@rotary_table.register_fake
def _(positions, head_dim, theta):
    return tuple(positions.new_empty(*positions.shape, 1, head_dim, dtype=torch.float32) for _ in range(2))


class Rotate(torch.autograd.Function):
    """Turn pairs by an angle; their gradient turns back by it."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        halves = x.unflatten(-1, (2, -1))
        return (x * cos + halves.flip(-2).flatten(-2) * sin).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad, cos, -sin), None, None


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + D/2}) of (B, T, heads, D) by its position's angle; half-split pairs as in the released model."""
    return Rotate.apply(x, cos, sin)


def rms_norm(x, weight, eps):
    """x / rms(x) * weight, computed in float32 or wider, returned in the dtype of x."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]       # one pass, forward and backward
    return (y * torch.rsqrt(mean_square + eps) * weight.to(y.dtype)).to(x.dtype)


def silu(x):
    """x sigmoid(x). For a compiler in these words: torch's own takes one exponential forward and another one backward."""
    return x * torch.sigmoid(x) if torch.compiler.is_compiling() else F.silu(x)


def linear(x, *layers):
    """One matrix product for several nn.Linear that read the same x; weights are cast to the dtype of x (float32 masters, bf16 compute)."""
    weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight.to(x.dtype))


def shift(x, positions, before=None):
    """Shift(H, 1): each token gets the state of the token before it; the first of a segment gets zeros (or `before`, (B, 1, C))."""
    before = torch.zeros_like(x[:, :1]) if before is None else before
    return torch.cat([before, x[:, :-1]], dim=1) * (positions > 0)[..., None]


class ScaleGradient(torch.autograd.Function):
    """The identity, bit for bit, with its gradient multiplied by `scale`."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


@lru_cache
def keep_freed_memory():
    """Tell glibc, where there is one, to give no memory back: a large tensor then reuses pages instead of having new ones cleared."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)                                                           # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)                                                   # M_TRIM_THRESHOLD: keep the end of the heap


# ---- the loss, without ever holding (B, T, V) ------------------------------------------------------------------------

LOSS_CHUNK = 512   # tokens whose logits exist at the same time


def head_logits(hidden, weight):
    """hidden (..., C) x weight (V, C) -> logits (..., V), float32 or wider."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(hidden, weight, targets):
    """-log p(target) of one chunk: hidden (n, C), weight (V, C), targets (n,) -> (n,), zero where the target is -100."""
    return F.cross_entropy(head_logits(hidden, weight), targets, ignore_index=-100, reduction="none")


class SummedLoss(torch.autograd.Function):
    """
    Sum of -log p(target) over all tokens. The forward pass already makes the gradients, one chunk of logits at a time: for a sum
    they are (softmax - onehot) times one number that is known only later, so the backward pass is a single scaling.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grads, w = [], weight.to(hidden.dtype)
        dw = torch.zeros_like(weight, dtype=wide)
        for h, t in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
            logp = F.log_softmax(head_logits(h, w), -1)                          # (n, V)
            learn, rows = t != -100, torch.arange(len(t), device=t.device)
            t = t.clamp(min=0)
            total = total - (logp[rows, t] * learn).sum()                        # not -=: compiled by torch 2.11, that loses all gradients
            d = logp.exp_()
            d[rows, t] -= 1
            d, learn = d.to(hidden.dtype), learn[:, None]                        # what is not learned is cleared in (n, C): V is wider
            grads.append((d @ w).mul_(learn))
            dw = dw.addmm_(d.T, h * learn) if d.dtype == wide else dw.add_(d.T @ (h * learn))
        ctx.save_for_backward(torch.cat(grads), dw.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return (dh * grad).to(dh.dtype), (dw * grad).to(dw.dtype), None


def head_loss(hidden, weight, targets, reduction="mean", temperature=1.0):
    """Cross entropy of softmax(hidden weight^T / temperature): hidden (B, T, C), targets (B, T) with -100 where nothing is learned."""
    if temperature != 1.0:
        hidden = hidden / temperature
    h, t = hidden.flatten(0, 1), targets.flatten()
    if reduction == "none":
        pieces = [checkpoint(token_losses, a, weight, b, use_reentrant=False) for a, b in zip(h.split(LOSS_CHUNK), t.split(LOSS_CHUNK))]
        return torch.cat(pieces).view_as(targets)
    if not (torch.compiler.is_compiling() or t.is_meta) and (t == -100).any():  # there, shapes do not depend on the data
        h, t = h[t != -100], t[t != -100]
    total = SummedLoss.apply(h, weight, t)
    if reduction == "mean":
        return total / (t != -100).sum().clamp(min=1)
    if reduction != "sum":
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
    return total


# ---- one layer -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """The four projections of grouped-query attention, under their released names."""

    def __init__(self, config):
        super().__init__()
        C, H, KV, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, KV * D, bias=False)
        self.v_proj = nn.Linear(C, KV * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Norm(nn.Module):
    """The gain of one RMSNorm."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Gate(nn.Module):
    """The gate of one layer: w (H, D) and b (H,). At zero every gate stands at one half."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads))


class Block(nn.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x). It gives its keys and values back, since the next pass wants them."""

    def __init__(self, config):
        super().__init__()
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config)
        self.post_attention_layernorm = Norm(config)

    def forward(self, x, cos, sin, attend, *kept):
        """x (B, T, C); attend(q, k, v, *kept) -> (B, H, T, D). Returns x, k, v with rotary applied, k and v (B, KV, T, D)."""
        B, T, C = x.shape
        H, KV, D = self.heads
        a, m = self.self_attn, self.mlp
        qkv = linear(self.input_layernorm(x), a.q_proj, a.k_proj, a.v_proj).view(B, T, H + 2 * KV, D)
        qk, v = qkv.split((H + KV, KV), dim=2)
        q, k, v = (y.transpose(1, 2) for y in (*rotate(qk, cos, sin).split((H, KV), dim=2), v))
        o = attend(q, k, v, *kept)                                               # (B, H, T, D)
        x = x + linear(o.transpose(1, 2).reshape(B, T, H * D), a.o_proj)
        gate, up = linear(self.post_attention_layernorm(x), m.gate_proj, m.up_proj).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, m.down_proj), k, v


# ---- the model -------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """The tensors under `model.`: embedding, layers, gates, final norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if config.loop_num > 1:
            self.gate_projections = nn.ModuleList(Gate(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)


class LoopCoder(nn.Module):
    """
    (logits, loss) = model(input_ids (B, T), targets=None, segment_ids=None, cache=None).

    compute_dtype   None: the weights' own; torch.bfloat16 with float32 weights is mixed precision (the weights are cast where used)
    loop_alpha      None, or a 0-d tensor a: H2 = H1 + a (f(H1) - H1), the gentle start of a folded model, with a from 0 to 1
    recompute       True: activations of a layer are computed again in the backward pass instead of kept
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype, self.loop_alpha, self.recompute = None, None, False
        for name, p in self.named_parameters():
            if p.dim() == 2 and "gate_projections" not in name and not p.is_meta:
                nn.init.normal_(p, std=config.initializer_range)

    def train(self, mode=True):
        """Training mode. On a CPU the allocator is told to keep what it frees: fresh pages cost a tenth of a training step."""
        if mode and self.lm_head.weight.device.type == "cpu":
            keep_freed_memory()
        return super().train(mode)

    def embed(self, input_ids):
        """Token embeddings (B, T, C) in the compute dtype."""
        x = self.model.embed_tokens(input_ids)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def passes(self, input_ids, positions, attend_first, attend_later, cache=None, rows=None, last=None, shift=shift):
        """
        The model: R passes over the same layers, then one norm. Returns (B, T, C).

        attend_first(layer, q, k, v), attend_later(turn, layer, q, k, v, k1, v1) -> (B, H, T, D).
        """
        config, kept = self.config, [()] * self.config.num_hidden_layers
        cos, sin = rotary_table(positions, config.head_dim, config.rope_theta)
        embedded = x = self.embed(input_ids)
        for turn in range(config.loop_num):
            x_before = x
            if turn and config.loop_input == "shift":
                before = None
                if cache is not None:
                    kept_state = cache.last_hidden[turn - 1]
                    before = kept_state[rows].to(x.dtype)
                    kept_state[rows] = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1])).to(kept_state.dtype)
                x = embedded + shift(x, positions, before)
            if turn and config.loop_grad_scale != 1.0:
                x = ScaleGradient.apply(x, config.loop_grad_scale)
            for i, layer in enumerate(self.model.layers):
                attend = (lambda q, k, v, i=i: attend_first(i, q, k, v)) if turn == 0 else (
                    lambda q, k, v, k1, v1, turn=turn, i=i: attend_later(turn, i, q, k, v, k1, v1))
                if self.recompute and torch.is_grad_enabled():
                    x, k, v = checkpoint(layer, x, cos, sin, attend, *kept[i], use_reentrant=False)
                else:
                    x, k, v = layer(x, cos, sin, attend, *kept[i])
                if turn == 0:
                    kept[i] = (k, v)
            if turn and self.loop_alpha is not None:
                x = x_before + self.loop_alpha.to(x.dtype) * (x - x_before)
        return self.model.norm(x)

    def hidden(self, input_ids, segment_ids=None, group=None):
        """
        Final normed hidden states (B, T, C) of whole rows; with segment_ids each segment is a row of its own.

        With a process group the arguments are this rank's shards (loop_attention.shard_sequence) of rows that the group shares:
        positions and documents run across the borders, and attention goes round the ring.
        """
        B, T = input_ids.shape
        gates, window = getattr(self.model, "gate_projections", None), self.config.loop_window_size
        if group is not None:
            ring = Ring(T, segment_ids, group, input_ids.device)
            return self.passes(
                input_ids, ring.positions.expand(B, T), lambda i, q, k, v: ring_attention(q, k, v, ring),
                lambda turn, i, q, k, v, k1, v1: ring_loop_attention(q, k1, v1, k, v, gates[i].weight, gates[i].bias, window, ring=ring),
                shift=ring.shift)
        positions = torch.arange(T, device=input_ids.device).expand(B, T)
        if segment_ids is not None:
            positions = positions - document_starts(segment_ids)                 # rotary angles restart with each document

        def later(turn, i, q, k, v, k1, v1):
            return loop_attention(q, k1, v1, k, v, gates[i].weight, gates[i].bias, window, segment_ids)

        return self.passes(input_ids, positions, lambda i, q, k, v: causal_attention(q, k, v, segment_ids), later)

    def forward(self, input_ids, targets=None, segment_ids=None, cache=None, lengths=None, reduction="mean", want_logits=True, group=None):
        """
        input_ids, targets, segment_ids (B, T) int64 -> (logits (B, T, V) or None, loss or None).

        targets are already shifted, -100 where nothing is learned. want_logits=False is the training path: no (B, T, V) anywhere.
        With a cache the T tokens are appended to its rows, row b's first lengths[b] of them (all, by default; the rest is padding).
        """
        if cache is not None:
            rows = torch.arange(cache.rows, device=input_ids.device)
            h = self.append(cache, rows, input_ids, torch.full_like(rows, input_ids.shape[1]) if lengths is None else lengths)
        else:
            h = self.hidden(input_ids, segment_ids, group)
        logits = head_logits(h, self.lm_head.weight) if want_logits else None
        loss = None if targets is None else head_loss(h, self.lm_head.weight, targets, reduction)
        return logits, loss

    def loss(self, input_ids, targets, segment_ids=None, reduction="mean", temperature=1.0, group=None):
        """
        The training path: cross entropy in chunks, "mean" or "sum" over the tokens in the loss, or "none" (B, T).

        With a group (see hidden) it is the loss of this rank's shard: take "sum", and add over the ranks.
        """
        return head_loss(self.hidden(input_ids, segment_ids, group), self.lm_head.weight, targets, reduction, temperature)

    # ---- files ----

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """Load a checkpoint folder (config.json and safetensors, one file or sharded). dtype None keeps what is stored."""
        folder = Path(path)
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder}: no config.json there; give the folder of a checkpoint")
        with torch.device("meta"):
            model = cls(LoopCoderConfig.from_json(folder / "config.json"))
        load_weights(model, folder, device, dtype)
        return model

    def save_pretrained(self, path, shard_bytes=None, weights=None):
        """
        Write config.json and the weights to a folder, as one file or as shards of at most shard_bytes. weights (name -> tensor) are
        those of a model that is spread over several processes.

        Everything goes to temporary names first and is renamed at the end, so that a full disk leaves the old checkpoint whole.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_json() | {"torch_dtype": str(self.lm_head.weight.dtype).removeprefix("torch.")}
        try:
            names = save_weights(weights or self.state_dict(), folder, shard_bytes)
            (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
            for name in [*names, "config.json"]:
                os.replace(folder / f"{name}.tmp", folder / name)
        finally:
            for left in folder.glob("*.tmp"):
                left.unlink()
        for old in [*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")]:
            if old.name not in names:
                old.unlink()                                                     # shards of the checkpoint that stood here before

    # ---- decoding ----

    def new_cache(self, rows, capacity):
        """An empty Cache for `rows` sequences of up to `capacity` tokens."""
        limit, weight = self.config.max_position_embeddings, self.lm_head.weight
        if capacity > limit:
            raise ValueError(f"a context of {capacity} tokens is longer than the model's {limit} (max_position_embeddings)")
        if weight.device.type == "cpu":
            keep_freed_memory()
        return Cache(self.config, rows, capacity, weight.device, self.compute_dtype or weight.dtype)

    @torch.no_grad()
    def append(self, cache, rows, input_ids, lengths):
        """Append the first lengths[b] tokens of input_ids[b] to row rows[b] of the cache; final hidden states (n, T, C)."""
        T = input_ids.shape[1]
        if int((cache.lengths[rows] + lengths).max()) > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens a row; {int((cache.lengths[rows] + lengths).max())} are needed")
        step = CachedAttention(cache, rows, lengths, T)
        gates = getattr(self.model, "gate_projections", None)
        h = self.passes(input_ids, step.positions, step.pass_1,
                        lambda turn, i, *qkv: step.later_pass(turn, i, gates[i], *qkv), cache, rows, lengths - 1)
        cache.lengths[rows] = cache.lengths[rows] + lengths
        return h

    @torch.no_grad()
    def prefill(self, cache, prompts, rows=None):
        """Append a list of prompts (1-d ids of any lengths) to these rows of the cache (all, by default); logits (n, V) after each."""
        device = self.lm_head.weight.device
        rows = torch.arange(len(prompts), device=device) if rows is None else torch.as_tensor(rows, device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        if int(lengths.min()) == 0:
            raise ValueError("a prompt is empty: give it at least one token")
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(p, device=device) for p in prompts], batch_first=True)
        h = self.append(cache, rows, ids, lengths)
        return head_logits(h[torch.arange(len(rows)), lengths - 1], self.lm_head.weight)

    @torch.no_grad()
    def decode(self, cache, tokens, active=None):
        """
        Append one token (B,) to every row; logits (B, V) for the next. active (B,) bool: the other rows stay as they are.

        The same as append() with one token, in as few calls as it takes: a small model's step is all overhead. Norm gains are folded
        into the weights behind them, residuals into the matrix products, and a step writes one slot of each cache and moves nothing.
        """
        cache.packed = cache.packed or PackedWeights(self, cache)
        logits = cache.packed.product(self.append_one(cache, tokens, active), cache.packed.head)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.inference_mode()   # an eighth faster than no_grad, but what it returns can never take part in a gradient: decode() ends it
    def append_one(self, cache, tokens, active):
        """The passes of decode(): final hidden states (B, C) over their root mean square."""
        config, packed, at = self.config, cache.packed, Step(cache)
        H, KV, D, B = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(tokens)
        k1v1 = [(k[:, :, : at.end], v[:, :, : at.end]) for k, v in cache.first]
        embedded = x = self.embed(tokens)                                        # (B, C)
        for turn in range(config.loop_num):
            x_before = x
            if turn and config.loop_input == "shift":
                kept = cache.last_hidden[turn - 1]
                before = kept[:, 0].to(x.dtype, copy=True)
                kept[:] = x[:, None] if active is None else torch.where(active[:, None, None], x[:, None], kept)
                x = embedded + before * (cache.lengths > 0)[:, None]
            for i, w in enumerate(packed.layers):
                qkv = packed.product(packed.unit(x), w.qkv).view(B, H + 2 * KV, D)
                qk = qkv[:, : H + KV]                                            # rotary, in place
                torch.addcmul(qk * at.cos, qk.roll(D // 2, -1), at.sin, out=qk)
                q, (k, v) = qkv[:, :H], cache.first[i] if turn == 0 else cache.later[turn - 1][i]
                at.write(k, qkv[:, H : H + KV], ring=turn > 0)
                at.write(v, qkv[:, H + KV :], ring=turn > 0)
                if turn == 0:
                    o = attention_step(q, *k1v1[i], at.mask)
                else:
                    ring = k[:, :, : at.ring_end], v[:, :, : at.ring_end]
                    o = loop_attention_step(q, *k1v1[i], *ring, w.gate, w.bias, at.total, at.mask, at.ring_mask)
                x = packed.product(o.view(B, H * D), w.o, plus=x)
                gate, up = packed.product(packed.unit(x), w.gate_up).chunk(2, dim=1)
                x = packed.product(F.silu(gate).mul_(up), w.down, plus=x)
            if turn and self.loop_alpha is not None:
                x = torch.lerp(x_before, x, self.loop_alpha.to(x.dtype))
        cache.lengths += 1 if active is None else active
        return packed.unit(x)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=(), generator=None, lengths=None,
                 pad_id=0):
        """
        Continue each row of input_ids (B, T) by up to max_new_tokens; returns (B, T + new).

        Rows of different length stand at the left: row b's prompt is input_ids[b, :lengths[b]], and its continuation follows it
        directly. A row ends with the first of stop_ids that it draws; what is left of it is pad_id. How tokens are drawn: sample().
        """
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative; 0 gives the prompt back")
        B, T = input_ids.shape
        lengths = [T] * B if lengths is None else [int(n) for n in lengths]
        cache = self.new_cache(B, max(lengths) + max_new_tokens)
        out = torch.full((B, T + max_new_tokens), pad_id, dtype=torch.int64, device=input_ids.device)
        for b, n in enumerate(lengths):
            out[b, :n] = input_ids[b, :n]
        if max_new_tokens == 0:
            return out[:, : max(lengths)]
        logits = self.prefill(cache, [input_ids[b, :n] for b, n in enumerate(lengths)])
        at = torch.tensor(lengths, device=input_ids.device)
        alive, stops = torch.arange(B, device=input_ids.device), torch.tensor(list(stop_ids), device=input_ids.device)
        for step in range(max_new_tokens):
            tokens = sample(logits, temperature, top_k, top_p, generator)
            out[alive, at + step] = tokens
            if len(stops) and not (going := ~torch.isin(tokens, stops)).all():
                alive, at, tokens = alive[going], at[going], tokens[going]
                if len(alive) == 0:
                    break
                cache.keep(going.nonzero()[:, 0])
            if step + 1 < max_new_tokens:
                logits = self.decode(cache, tokens)
        return out[:, : max(lengths) + step + 1]


def check_sampling(temperature, top_k, top_p):
    """Refuse what sample() cannot draw by."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most likely token")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative; 0 or None draws from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, which draws from all tokens")


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """
    Draw one token a row from logits (B, V): temperature (0 takes the most likely token), then the top_k best (0 and None: all), then
    the smallest set with top_p of the mass.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.max(-1).indices                                            # argmax() takes twice as long on a CPU
    logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        cut = p.cumsum(-1) - p >= top_p                                          # the mass before this token already suffices
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---- what decoding keeps ---------------------------------------------------------------------------------------------


class Cache:
    """
    Keys and values of the tokens so far, for `rows` independent sequences that may have different lengths.

    A layer keeps pass 1 for every position (`capacity` of them), and each later pass for the last W only: position p lies in slot
    p mod W, so a step writes one slot and moves nothing. Memory is taken once, here. lengths (rows,) says how far each row is.
    A row is a slot that can be emptied (reset) and filled again while the others go on; copy() doubles a row, keep() drops rows for
    good. A cache belongs to the weights it was made with: after an optimizer step make a new one.
    """

    def __init__(self, config, rows, capacity, device="cpu", dtype=torch.float32):
        L, KV, D, W = config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.loop_window_size
        self.config, self.rows, self.capacity = config, rows, capacity
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        transposed = torch.device(device).type == "cpu"                          # keys as (D, slots), see attention_step()
        slots = -(-(capacity + 1) // KEY_BLOCK) * KEY_BLOCK if transposed else capacity + 1      # one at least to write padding to

        def room(slots):                                                         # [K, V], (rows, KV, slots, D) each
            keys = (D, slots) if transposed else (slots, D)
            k, v = (torch.zeros(rows, KV, *size, device=device, dtype=dtype) for size in (keys, (slots, D)))
            return [k.mT if transposed else k, v]

        self.first = [room(slots) for _ in range(L)]
        self.later = [[room(W) for _ in range(L)] for _ in range(config.loop_num - 1)]
        shifted = config.loop_num - 1 if config.loop_input == "shift" else 0
        self.last_hidden = [torch.zeros(rows, 1, config.hidden_size, device=device, dtype=dtype) for _ in range(shifted)]
        positions = torch.arange(capacity, device=device)[None]
        self.rotary = [x[0].to(dtype) for x in rotary_table(positions, D, config.rope_theta)]    # (capacity, 1, D) each
        self.packed = None                                                       # weights as decode() wants them, from its first step

    def tensors(self):
        """All keys and values."""
        return [x for layers in (self.first, *self.later) for kv in layers for x in kv]

    def reset(self, row):
        """Empty one row (or a list of rows). What it held is overwritten by the next prompt; only its length counts."""
        self.lengths[row] = 0

    def copy(self, row, others):
        """Give other rows what this one holds: one prompt, several answers."""
        for x in [self.lengths, *self.tensors(), *self.last_hidden]:
            x[others] = x[row].clone()

    def keep(self, rows):
        """Keep these rows only, in this order."""
        index = torch.as_tensor(rows, device=self.lengths.device)
        self.rows, self.lengths = len(index), self.lengths[index]
        self.first = [[k[index], v[index]] for k, v in self.first]               # indexing keeps the order in memory
        self.later = [[[k[index], v[index]] for k, v in layers] for layers in self.later]
        self.last_hidden = [x[index] for x in self.last_hidden]

    def nbytes(self):
        """Bytes held: (growing with every token of capacity, fixed for each row's window)."""
        return tuple(sum(x.nbytes for kv in layers for x in kv) for layers in (self.first, sum(self.later, [])))


def cache_bytes_per_token(config, itemsize=2):
    """(bytes a further token costs: one pass, bytes a row costs once: the windows of the later passes), at `itemsize` bytes a number."""
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    return kv, kv * config.loop_window_size * (config.loop_num - 1)


def attend_masked(q, k, v, keep):
    """q (n, H, T, D) on keys (n, KV, S, D); keep (n, T, S). Returns (n, H, T, D) in the dtype of q."""
    (n, H, T, D), dtype = q.shape, q.dtype
    groups = H // k.shape[1]
    keep = keep[:, None].expand(n, groups, T, -1).reshape(n, 1, groups * T, -1)
    wide = k.dtype if k.is_cuda else torch.promote_types(k.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q.reshape(n, k.shape[1], groups * T, D), k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).to(dtype).view(n, H, T, D)


class CachedAttention:
    """
    The attention of one call that appends T new tokens to rows of a cache: new[b] of row b's T tokens are real, the rest is padding.

    Rows that were empty see their own tokens only, as in training; padding comes last, so that no real token sees it. For the others
    every mask depends on lengths alone, so it is made once here and serves all layers.
    """

    def __init__(self, cache, rows, new, T):
        self.cache, self.rows, W = cache, rows, cache.config.loop_window_size
        device = new.device
        self.old = cache.lengths[rows]                                           # (n,)
        self.empty = not self.old.any()
        self.positions = self.old[:, None] + torch.arange(T, device=device)      # (n, T)
        self.end = min(int((self.old + T).max()), cache.capacity)
        p, real = self.positions, torch.arange(T, device=device)[None] < new[:, None]
        self.write_at = torch.where(real, p, cache.capacity)
        self.keep_first = torch.arange(self.end, device=device)[None, None] <= p[..., None]
        slot = torch.arange(W, device=device)
        held = self.old[:, None] - 1 - (self.old[:, None] - 1 - slot) % W         # (n, W) position in each slot; negative: empty
        seen = (held >= 0)[:, None] & (p[..., None] - held[:, None] < W)          # (n, T, W)
        distance = p[0][:, None] - p[0][None, :]
        own = ((distance >= 0) & (distance < W)).expand(len(new), T, T)
        self.keep_later = torch.cat([seen, own], dim=-1)                          # (n, T, W + T)
        total = self.old + new
        source = total[:, None] - 1 - (total[:, None] - 1 - slot) % W - self.old[:, None]
        self.renewed, self.source = (source >= 0)[..., None], source.clamp(min=0)  # which new token each slot takes, if any

    def pass_1(self, layer, q, k, v):
        """Write K1, V1 at their positions, attend to all of the row so far."""
        for x, new in zip(self.cache.first[layer], (k, v)):
            x[self.rows[:, None], :, self.write_at] = new.transpose(1, 2).to(x.dtype)
        if self.empty:
            return causal_attention(q, k, v)
        return attend_masked(q, *(x[self.rows, :, : self.end] for x in self.cache.first[layer]), self.keep_first)

    def later_pass(self, turn, layer, gate, q, k, v, k1, v1):
        """The gated pair: K1, V1 of the whole row, and the window of this pass, whose slots are then renewed."""
        window = []
        for x, new in zip(self.cache.later[turn - 1][layer], (k, v)):
            held, new = x[self.rows], new.to(x.dtype)                            # (n, KV, W, D), (n, KV, T, D)
            window.append(torch.cat([held, new], dim=2))
            x[self.rows] = torch.where(self.renewed[:, None], new.gather(2, self.source[:, None, :, None].expand_as(held)), held)
        if self.empty:
            return loop_attention(q, k1, v1, k, v, gate.weight, gate.bias, self.cache.config.loop_window_size)
        o_global = attend_masked(q, *(x[self.rows, :, : self.end] for x in self.cache.first[layer]), self.keep_first)
        o_local = attend_masked(q, *window, self.keep_later)
        return mix(q, o_global, o_local, gate.weight, gate.bias)


class PackedWeights:
    """
    The weights of a model for one-token steps: q, k, v in one matrix, gate and up in one, each times the gain of the norm before it.

    A product with few rows takes a CPU as long as it takes to bring the weights into the order that its kernel reads: torch.mm does that
    in every call. Where oneDNN is there, it is done once, here, by what torch.compile calls for it. One row alone is fastest multiplied
    as attention_step() does it: the rows of (in, out), each times a number, are added up.
    """

    def __init__(self, model, cache):
        weight, C, eps = model.lm_head.weight, model.config.hidden_size, model.config.rms_norm_eps
        dtype, loop = model.compute_dtype or weight.dtype, model.config.loop_num > 1
        wide = torch.promote_types(dtype, torch.float32)                         # of the gates and of the root mean square
        self.eps, self.root = eps, None
        self.alone = cache.rows == 1 and not weight.is_cuda
        self.packs = not self.alone and not weight.is_cuda and torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if not weight.is_cuda:
            self.root = torch.tensor(math.sqrt(C * eps), dtype=wide)

        def packed(*linears, norm=None):
            w = torch.cat([x.weight for x in linears]) if len(linears) > 1 else linears[0].weight                # (out, in)
            if norm is not None:
                w = w * norm.weight * (1 if self.root is None else math.sqrt(C))
            if self.packs:
                return torch.ops.mkldnn._reorder_linear_weight(w.to(dtype), cache.rows)
            return row_pieces(w.to(dtype).T) if self.alone else w.to(dtype).T

        self.layers = []
        for i, layer in enumerate(model.model.layers):
            a, m, gate = layer.self_attn, layer.mlp, model.model.gate_projections[i] if loop else None
            self.layers.append(SimpleNamespace(
                qkv=packed(a.q_proj, a.k_proj, a.v_proj, norm=layer.input_layernorm), o=packed(a.o_proj),
                gate_up=packed(m.gate_proj, m.up_proj, norm=layer.post_attention_layernorm), down=packed(m.down_proj),
                gate=gate.weight.to(wide) if loop else None, bias=gate.bias.to(wide) if loop else None))
        self.head = packed(model.lm_head, norm=model.model.norm)

    def product(self, x, w, plus=None):
        """x W, or plus + x W, for packed weights: x (B, in), plus (B, out) -> (B, out)."""
        if self.alone:
            table, rows, starts = w
            y = weighted_rows(table, rows, starts, x.expand(len(starts), -1)).view(1, -1)
            return y if plus is None else plus + y
        if self.packs:
            linear = torch.ops.mkldnn._linear_pointwise
            return linear(x, w, None, "none", [], "") if plus is None else linear.binary(x, plus, w, None, "add")
        return torch.mm(x, w) if plus is None else torch.addmm(plus, x, w)

    def unit(self, x):
        """x / rms(x): sqrt(sum x^2 + C eps) in three calls, where torch's own norm is ten on a CPU; sqrt(C) is in the weights."""
        if self.root is None:
            return F.rms_norm(x, x.shape[-1:], eps=self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.root.dtype)
        return (x / torch.hypot(length, self.root)).to(x.dtype)


def row_pieces(w):
    """W (in, out) for weighted_rows(), its rows cut in pieces, one or more a thread: (pieces, those of each sum, where it begins)."""
    n, width = w.shape
    pieces = next(p for p in range(max(torch.get_num_threads(), width // 512), 0, -1) if width % p == 0)
    rows = torch.arange(n, dtype=torch.int32) * pieces + torch.arange(pieces, dtype=torch.int32)[:, None]
    return w.reshape(-1, width // pieces), rows.flatten(), torch.arange(0, pieces * n, n, dtype=torch.int32)


class Step:
    """Where the next token of each row goes and what it sees: made once a step, read by all layers and passes."""

    def __init__(self, cache):
        lengths, W = cache.lengths, cache.config.loop_window_size
        have = lengths.tolist()
        if max(have) >= cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens a row, and row {have.index(max(have))} is full")
        dtype, device = cache.rotary[0].dtype, lengths.device
        self.cos, self.sin = (x[lengths] for x in cache.rotary)                  # (B, 1, D)
        self.total, self.end = lengths + 1, max(have) + 1
        self.ring_end = W if device.type == "cuda" else min(self.end, W)         # the fused kernel takes W from the shape
        self.position, self.rows = lengths, torch.arange(len(have), device=device)
        self.slot = have[0] if min(have) == max(have) else None                  # all rows stand at the same place
        self.mask = self.ring_mask = None
        if self.slot is None:
            empty = lambda n: torch.zeros(len(have), 1, 1, n, device=device, dtype=dtype)
            late = torch.arange(self.end, device=device) > lengths[:, None]
            self.mask = empty(self.end).masked_fill_(late[:, None, None], -math.inf)
            if min(have) + 1 < W:
                self.ring_mask = empty(self.ring_end).masked_fill_(late[:, None, None, : self.ring_end], -math.inf)
        self.W = W

    def write(self, x, new, ring):
        """Put new (B, KV, D) into its slot of x (B, KV, slots, D)."""
        if self.slot is not None:
            x.select(2, self.slot % self.W if ring else self.slot).copy_(new)
        else:
            x[self.rows, :, self.position % self.W if ring else self.position] = new


# ---- files: the released layout --------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def checkpoint_files(folder):
    """The safetensors files of a checkpoint folder, from its index where it has one."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        lost = [n for n in names if not (folder / n).exists()]
        if lost:
            raise ValueError(f"{folder}: the index names {lost[0]}, which is not there")
        return [folder / n for n in names]
    if not single.exists():
        raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json; is this a checkpoint folder?")
    return [single]


def load_weights(model, folder, device, dtype):
    """Fill a model on the meta device from a checkpoint folder, one tensor at a time; every tensor must be there and fit."""
    from safetensors import SafetensorError, safe_open
    expected, seen = dict(model.named_parameters()), set()
    for path in checkpoint_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                for key in f.keys():
                    # some copies keep the gate inside its layer: model.layers.3.gate_projection.weight
                    parts = key.split(".")
                    name = f"model.gate_projections.{parts[2]}.{parts[4]}" if parts[3:4] == ["gate_projection"] else key
                    if name not in expected:
                        if name.endswith("rotary_emb.inv_freq"):
                            continue                                             # old checkpoints store a constant
                        raise ValueError(f"{path}: tensor {key} has no place in this model")
                    tensor = f.get_tensor(key)
                    if tensor.shape != expected[name].shape:
                        have, want = tuple(tensor.shape), tuple(expected[name].shape)
                        raise ValueError(f"{path}: tensor {key} has shape {have}, config.json asks for {want}")
                    owner = model.get_submodule(name.rpartition(".")[0])
                    setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor.to(dtype or tensor.dtype)))
                    seen.add(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if missing := sorted(expected.keys() - seen):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))


def save_weights(tensors, folder, shard_bytes):
    """Write tensors (name -> tensor) as one file or as shards with an index, all to temporary names first; then put them in place."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and shard_bytes is not None and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += nbytes
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for name, shard in zip(names, shards):
        try:
            save_file(shard, folder / f"{name}.tmp", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / name}: could not be written ({error})") from error
    if n > 1:
        index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
                 "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        names.append("model.safetensors.index.json")
        (folder / f"{names[-1]}.tmp").write_text(json.dumps(index, indent=1))
    return names


# ---- from dense to loop ----------------------------------------------------------------------------------------------


@torch.no_grad()
def dense_to_loop(dense, mode="mean", loop_num=2, window=64):
    """
    Fold a dense model into a loop model, so that a loop starts from what a dense run has learned (LoopCoder report, 2.2).

    copy        n layers -> n: every layer as it is, now run twice
    mean        2n -> n: layer l is the mean of layers l and n + l, the two depths at which the loop will run it
    stride      2n -> n: layers 0, 2, 4, ...
    pair-mean   2n -> n: the mean of layers 2l and 2l + 1
    (with loop_num = R: R n -> n in the same manner.) Gates start at one half: weight and bias are zero.
    """
    config, R = dense.config, loop_num
    if config.loop_num != 1:
        raise ValueError(f"dense_to_loop wants a dense model, this one has loop_num={config.loop_num}")
    deep = config.num_hidden_layers
    if mode != "copy" and deep % R:
        raise ValueError(f"mode {mode!r} folds {R} layers into one: num_hidden_layers={deep} must be a multiple of {R}")
    n = deep if mode == "copy" else deep // R
    sources = {
        "copy": lambda l: [l],
        "mean": lambda l: [t * n + l for t in range(R)],
        "stride": lambda l: [R * l],
        "pair-mean": lambda l: [R * l + t for t in range(R)],
    }
    if mode not in sources:
        raise ValueError(f"mode {mode!r} is unknown; there are {', '.join(sources)}")
    weight = dense.lm_head.weight
    with torch.device("meta"):
        loop = LoopCoder(dataclasses.replace(config, num_hidden_layers=n, loop_num=R, loop_window_size=window))
    loop.to_empty(device=weight.device).to(weight.dtype)
    for gate in loop.model.gate_projections:
        gate.weight.zero_()
        gate.bias.zero_()
    loop.model.embed_tokens.load_state_dict(dense.model.embed_tokens.state_dict())
    loop.model.norm.load_state_dict(dense.model.norm.state_dict())
    loop.lm_head.load_state_dict(dense.lm_head.state_dict())
    for l, layer in enumerate(loop.model.layers):
        folded = [dense.model.layers[s].state_dict() for s in sources[mode](l)]
        layer.load_state_dict({key: torch.stack([f[key].double() for f in folded]).mean(0) for key in folded[0]})
    return loop


# ---- numbers ---------------------------------------------------------------------------------------------------------


def parameter_count(config):
    """(all parameters, those that are multiplied with: without the embedding table, each layer once)."""
    C, D, H, KV = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    layer = 2 * C * H * D + 2 * C * KV * D + 3 * C * config.intermediate_size
    gates = config.num_hidden_layers * (H * D + H) if config.loop_num > 1 else 0
    norms = (2 * config.num_hidden_layers + 1) * C
    matrices = config.num_hidden_layers * layer + config.vocab_size * C
    return matrices + config.vocab_size * C + norms + gates, matrices


def flops_per_token(config, context, backward=True):
    """
    Floating point operations for one token of a row of `context` tokens, forward alone or forward and backward (three times as much).

    Two for each weight each time it is used, and for attention 4 D for each key and head: on average context / 2 keys in pass 1 and
    in the global view, at most W in the local one. What an implementation spends beyond that (masked keys, recomputation) is not counted.
    """
    C, D, H, KV = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    L, R, W = config.num_hidden_layers, config.loop_num, min(config.loop_window_size, context)
    layer = 2 * (2 * C * H * D + 2 * C * KV * D + 3 * C * config.intermediate_size)
    keys = (context + 1) / 2
    near = W - W * (W - 1) / (2 * context)                                       # mean number of keys in the window
    attention = 4 * H * D * (keys * R + near * (R - 1))
    gates = 2 * H * D * (R - 1)
    forward = L * (R * layer + attention + gates) + 2 * C * config.vocab_size
    return forward * (3 if backward else 1)


def matmul_peak(device="cpu", dtype=torch.float32, size=2048, repeats=5):
    """FLOP/s of a square matrix product, the best of a few: the ceiling that MFU is measured against."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# ---- command line ----------------------------------------------------------------------------------------------------


def newest_checkpoint(out=Path("out")):
    """The checkpoint folder under out/ whose weights were written last."""
    found = [p.parent for p in out.glob("*/model.safetensors")] + [p.parent for p in out.glob("*/model.safetensors.index.json")]
    if not found:
        raise ValueError(f"{out}/: no checkpoint there yet; run python train.py first, or give one with --ckpt DIR")
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)


def usable_device(name):
    """The device of this name; "auto" is a GPU where there is one."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def complete(model, tokenizer, parts, max_new_tokens, temperature, top_p, seed):
    """The continuation of a prompt in parts, (text, is it a special token, -): plain text in it never becomes a special token."""
    ids, device = tokenizer.encode_parts(parts)[0], model.lm_head.weight.device
    room = model.config.max_position_embeddings - len(ids)
    if not ids or room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, but the context holds 1 to {model.config.max_position_embeddings - 1}")
    stops = [tokenizer.special[name] for name in ("<|endoftext|>", "<|im_end|>")]
    out = model.generate(torch.tensor([ids], device=device), min(max_new_tokens, room), temperature, top_p=top_p, stop_ids=stops,
                         generator=torch.Generator(device).manual_seed(seed))
    return tokenizer.decode([i for i in out[0, len(ids):].tolist() if i not in stops])


def show_presets():
    """One line for each preset: parameters, training FLOPs a token at its full context, cache bytes a token."""
    print(f"{'preset':10} {'layers':>8} {'parameters':>14} {'context':>8} {'train FLOP/token':>17} {'cache a token':>14} {'and a row':>13}")
    for name in PRESETS:
        c = LoopCoderConfig.preset(name)
        (grow, once), context = cache_bytes_per_token(c), c.max_position_embeddings
        print(f"{name:10} {c.num_hidden_layers:>4} x {c.loop_num} {parameter_count(c)[0]:>14,} {context:>8} "
              f"{flops_per_token(c, context):>17.3e} {grow / 1024:>10.1f} KiB {once / 1024:>9.0f} KiB")
    print("FLOPs at the full context; the cache in bf16: one pass for every token, a window for every further pass")


def median_seconds(step, repeats=3):
    """Median time of `step` after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def by_turns(steps, rounds=7):
    """Median time of each of several steps (a dict), taken in turns, since the machine's speed moves; after two warm-ups each."""
    seconds = {which: [] for which in steps}
    for step in steps.values():
        step(), step()                                                           # compiled, and its memory taken
    for _ in range(rounds):
        for which, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[which].append(time.perf_counter() - start)
    return {which: sorted(times)[rounds // 2] for which, times in seconds.items()}


def training_step(loss_of, parameters):
    """Forward, backward and fused AdamW as one call."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def peer_llama():
    """transformers' Llama of the unrolled nano shape (loop_num times as many layers), or None where transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    c = LoopCoderConfig.preset("nano")
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, head_dim=c.head_dim,
        num_hidden_layers=c.num_hidden_layers * c.loop_num, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=4096, tie_word_embeddings=False))


def training_limits(B, T):
    """Seconds that a step of our nano model takes for matrix products alone and for attention alone, forward and backward, float32."""
    c = LoopCoderConfig.preset("nano")
    C, I, V, H, KV, D = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def products(rows, k, n):
        x, w, d = torch.randn(rows, k), torch.randn(n, k), torch.randn(rows, n)
        return median_seconds(lambda: (x @ w.T, d @ w, d.T @ x))

    layer = sum(products(B * T, k, n) for k, n in ((C, (H + 2 * KV) * D), (H * D, C), (C, 2 * I), (I, C)))
    head = products(LOSS_CHUNK, C, V) * B * T / LOSS_CHUNK
    q, *kv = inputs = [torch.randn(B, heads, T, D, requires_grad=True) for heads in (H, KV, KV, KV, KV)]
    gate = torch.zeros(H, D), torch.zeros(H)
    first = median_seconds(lambda: torch.autograd.grad(causal_attention(*inputs[:3]).sum(), inputs[:3]))
    later = median_seconds(lambda: torch.autograd.grad(loop_attention(q, *kv, *gate, c.loop_window_size).sum(), inputs))
    return c.num_hidden_layers * c.loop_num * layer + head, c.num_hidden_layers * (first + (c.loop_num - 1) * later)


def bench_training(B=8, T=512):
    """Training tokens/s of the peer and of ours, eager and compiled, float32 and bfloat16, by turns; the best of each is compared."""
    ids, best = torch.randint(0, 8192, (B, T + 1)), {}
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    peaks = {dtype: matmul_peak(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    print("matmul peak: " + ", ".join(f"{str(d)[6:]} {p / 1e9:.0f} GFLOP/s" for d, p in peaks.items()))
    products, attention = training_limits(B, T)
    print(f"training  our step in float32 holds {products * 1e3:.0f} ms of matrix products and {attention * 1e3:.0f} ms of attention: "
          f"with all else free, {B * T / (products + attention):.0f} tok/s")
    steps = {}
    for who in ("transformers", "ours"):
        for dtype in peaks:
            for compiled in (False, True):
                model = peer_llama() if who == "transformers" else LoopCoder(LoopCoderConfig.preset("nano")).train()
                if model is None:
                    continue
                if who == "transformers":
                    call = torch.compile(model.to(dtype)) if compiled else model.to(dtype)
                    step = training_step(lambda call=call: call(input_ids=x, labels=x, use_cache=False).loss, model.parameters())
                else:
                    model.compute_dtype = dtype
                    call = torch.compile(model.loss) if compiled else model.loss
                    step = training_step(lambda call=call: call(x, y), model.parameters())
                steps[who, dtype, compiled] = step
    for (who, dtype, compiled), median in by_turns(steps).items():
        speed = B * T / median
        mfu = speed * flops_per_token(LoopCoderConfig.preset("nano"), T) / max(peaks.values())
        best[who] = max(best.get(who, 0), speed)
        print(f"training  {who:12} {str(dtype)[6:]:8} {'compiled' if compiled else 'eager':8} {speed:7.0f} tok/s"
              + (f"  MFU {mfu:.0%}" if who == "ours" else ""), flush=True)
    if len(best) == 2:
        print(f"training  ratio {best['ours'] / best['transformers']:.2f}")


def bench_decoding(prompt=128, new=256):
    """Greedy decoding with the cache at batch 1 and 32, tokens/s, by turns."""
    makers = {"ours": lambda: LoopCoder(LoopCoderConfig.preset("nano")), "transformers": peer_llama}
    models = {(who, dtype): make() for who, make in makers.items() for dtype in (torch.float32, torch.bfloat16)}
    models = {(who, dtype): model.to(dtype).eval() for (who, dtype), model in models.items() if model is not None}
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    calls = {"ours": lambda model, ids: model.generate(ids, new, temperature=0),
             "transformers": lambda model, ids: model.generate(ids, attention_mask=torch.ones_like(ids), **options)}
    for B in (1, 32):
        ids, steps = torch.randint(0, 8192, (B, prompt)), {}
        for (who, dtype), model in models.items():
            steps[f"{who} {str(dtype)[6:]}"] = lambda ids=ids, model=model, call=calls[who]: call(model, ids)
        speed = {name: B * new / seconds for name, seconds in by_turns(steps, rounds=3).items()}
        print(f"decoding  batch {B:2}: " + ", ".join(f"{who} {s:.0f} tok/s" for who, s in speed.items()), flush=True)
        if len(speed) > 2:
            best = {who: max(s for name, s in speed.items() if name.startswith(who)) for who in makers}
            print(f"decoding  batch {B:2}: ratio {best['ours'] / best['transformers']:.2f}, the best of each")


def bench_attention(B=1, H=8, T=2048, D=64, window=64):
    """Loop attention forward and backward in bfloat16 against what one writes first: causal SDPA, SDPA with a dense mask, a gate."""
    inputs = [torch.randn(B, H, T, D).bfloat16().requires_grad_() for _ in range(5)]
    inputs += [torch.randn(H, D).bfloat16().requires_grad_(), torch.zeros(H).bfloat16().requires_grad_()]
    i = torch.arange(T)
    dense = (i[:, None] >= i) & (i[:, None] - i < window)

    def plain(q, k1, v1, k2, v2, w, b, window):
        sdpa = F.scaled_dot_product_attention
        return mix(q, sdpa(q, k1, v1, is_causal=True), sdpa(q, k2, v2, attn_mask=dense), w, b)

    calls = {(who, how): call for who, form in (("SDPA + dense mask + gate", plain), ("loop_attention", loop_attention))
             for how, call in (("eager", form), ("compiled", torch.compile(form)))}
    best, seconds = {}, by_turns({which: lambda call=call: torch.autograd.grad(call(*inputs, window).sum(), inputs)
                                  for which, call in calls.items()})
    for (who, how), median in seconds.items():
        best[who] = min(best.get(who, math.inf), median)
        print(f"attention {who:24} {how:8} {median * 1e3:4.0f} ms", flush=True)
    print(f"attention ratio {best['loop_attention'] / best['SDPA + dense mask + gate']:.2f}, the best of each")


def main(argv=None):
    """Read the options, then complete a prompt, answer a question, or print the presets."""
    parser = argparse.ArgumentParser(prog="model.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=(
        "Complete a prompt, or answer a question, with a checkpoint of the chain; with neither, print the shapes of the presets: "
        "parameters, FLOPs, and the bytes that decoding keeps for a token."))
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="text to continue")
    text.add_argument("--chat", metavar="TEXT", help="what the user says to an instruct or thinking checkpoint; the answer is printed")
    parser.add_argument("--ckpt", type=Path, help="checkpoint folder (default: the newest under out/)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the smallest set of tokens with this share of the mass")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; auto: as they are stored")
    parser.add_argument("--bench", action="store_true", help="measure attention, decoding and training at the nano shape (minutes)")
    args = parser.parse_args(argv)
    if args.bench:
        keep_freed_memory()                                                      # for both sides
        bench_attention()
        bench_decoding()
        bench_training()
    elif args.prompt is None and args.chat is None:
        show_presets()
    else:
        from data import Tokenizer
        from tasks import OPENING, turn_parts                                    # a conversation as the samples of fine-tuning have it
        parts = [(args.prompt, False, False)] if args.chat is None else turn_parts("user", args.chat, False) + OPENING
        folder, device = args.ckpt or newest_checkpoint(), usable_device(args.device)
        model, tokenizer = LoopCoder.from_pretrained(folder, device, DTYPES.get(args.dtype)), Tokenizer.load(folder)
        print((args.prompt or "") + complete(model, tokenizer, parts, args.max_new_tokens, args.temperature, args.top_p, args.seed))


if __name__ == "__main__":
    sys.modules["model"] = sys.modules[__name__]   # data.py imports it: a second copy would register the operator anew and free this one's
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
