"""
The code-flow pipeline: one loop that runs every stage of the report's Figure 2, and the table that says how the stages differ.

    pretrain -> anneal -> mid1 (32k) -> mid2 (128k) -> sft_instruct
                                                    -> sft_thinking

A stage is a row of STAGES: where it starts from, how long its rows are, what it reads and in which shares, and the shape of its
learning rate. A *preset* scales the whole chain to a machine: `nano` takes minutes on two CPU cores, `7b` to `40b-loop` are the report's
own shapes. Read STAGES first, then train_stage(), the one loop of all stages; evaluation_table() judges what it leaves.

Source: LoopCoder report, Figure 2 and Table 2 (token shares of the mid-training stages); schedules: the report gives words only, the
numbers are ours. Where we differ: one node; a category of the mixture that has no data is reported, and its share goes to the others.

    python train.py                         # the whole nano chain, data included: minutes on two cores
    python train.py --stages pretrain       # one stage
    python train.py --resume                # go on where a killed run stopped, bit for bit on the CPU
    python train.py --eval out/mid2         # one table for one checkpoint
    python train.py --preset 40b-loop --dry-run
    torchrun --nproc_per_node 8 train.py --preset node --cp 8
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import gzip
import json
import lzma
import math
import os
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as whole_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import commits
import data
import fim
import tasks
from loop_attention import EVERYTHING, Ring, fingerprint, ring_bytes, shard_sequence
from model import LoopCoder, LoopCoderConfig, dense_to_loop, flops_per_token, matmul_peak, parameter_count


# ---- the stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: what a stage starts from, reads, and how its learning rate moves."""

    name: str
    start: str | None  # the stage whose checkpoint this one starts from; None: random weights
    context: int  # 0, 1, 2: which of the preset's three row lengths
    tokens: int  # 0 .. 4: which of the preset's five token budgets
    peak: float  # learning rate after warm-up, as a share of the preset's
    end: float  # learning rate at the end, likewise
    hold: float  # share of the steps spent at `end`: the extended low-rate phase
    mixture: dict[str, float]  # category of data.py -> share of the tokens
    sft: str | None = None  # "instruct" or "thinking": the samples come from tasks.py by the curriculum, the mixture is the replay


# The report's Table 2 in billions of tokens, by category of data.py: reasoning QA, agent trajectories, commits, file-level and
# repository-level code (half of it fill-in-the-middle), and a down-sampled share of the first stage.
MID1 = {"reasoning": 175, "agent": 10, "commit": 5, "file": 35, "repo": 5, "code": 70}
MID2 = {"reasoning": 65, "agent": 110, "commit": 35, "file": 5, "repo": 35, "code": 50}

# Fine-tuning replays a little of what came before, some of it fill-in-the-middle (every second `file` sample), so that neither is
# forgotten. These are shares of all tokens; of those in the loss, where prompts do not count, it is more.
REPLAY = {"quality": 0.01, "file": 0.01}

STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", None, 0, 0, peak=1.0, end=0.5, hold=0.0, mixture={"code": 0.97, "text": 0.03}),
        Stage("anneal", "pretrain", 0, 1, peak=0.5, end=0.05, hold=0.1, mixture={"quality": 0.5, "code": 0.5}),
        Stage("mid1", "anneal", 1, 2, peak=0.3, end=0.03, hold=0.1, mixture=MID1),
        Stage("mid2", "mid1", 2, 3, peak=0.3, end=0.03, hold=0.1, mixture=MID2),
        Stage("sft_instruct", "mid2", 1, 4, peak=1.4, end=0.07, hold=0.1, mixture=REPLAY, sft="instruct"),
        Stage("sft_thinking", "mid2", 1, 4, peak=1.4, end=0.07, hold=0.1, mixture=REPLAY, sft="thinking"),
    )
}


@dataclass(frozen=True)
class Preset:
    """The size of a chain."""

    contexts: tuple[int, int, int]  # row lengths of pre-training, mid1, mid2
    tokens: tuple[float, float, float, float, float]  # of pretrain, anneal, mid1, mid2, and of each path of fine-tuning
    batch_tokens: int  # tokens of one optimizer step
    lr: float  # peak learning rate of pre-training
    max_mb: float  # corpus size, MB of text; 0: everything
    minutes: str  # what to expect, in words


REPORT = (11.4e12, 0.6e12, 0.3e12, 0.3e12, 2e9)  # the report's tokens; it gives none for fine-tuning: 2e9 is ours
PRESETS = {
    "nano": Preset((512, 1024, 4096), (385e3, 82.5e3, 41.25e3, 41.25e3, 352e3), 1024, 3e-3, 24, "minutes on two CPU cores"),
    "small": Preset((2048, 8192, 32768), (1.05e9, 225e6, 112.5e6, 112.5e6, 20e6), 262_144, 1.5e-3, 0, "an hour or two on one GPU"),
    "node": Preset((4096, 32768, 131072), (14e9, 3e9, 1.5e9, 1.5e9, 100e6), 1_048_576, 1e-3, 0, "days on eight GPUs"),
    "7b": Preset((8192, 32768, 131072), REPORT, 8_388_608, 3e-4, 0, "the report's run"),
    "14b": Preset((8192, 32768, 131072), REPORT, 8_388_608, 3e-4, 0, "the report's run"),
    "40b": Preset((8192, 32768, 131072), REPORT, 8_388_608, 2e-4, 0, "the report's run"),
    "40b-loop": Preset((8192, 32768, 131072), REPORT, 8_388_608, 2e-4, 0, "the report's run"),
}


def flag(default, help, choices=(), least=0):
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


SWITCH = ("auto", "on", "off")


@dataclass
class TrainConfig:
    """Every knob of a run; the command line is made from these fields."""

    preset: str = flag("nano", "scale of the whole chain: " + ", ".join(PRESETS), PRESETS)
    stages: str = flag("all", "comma-separated stages to run, or all")
    out: str = flag("out", "folder of the chain: one folder a stage")
    source: str = flag("python", "corpus, where out/data is not built yet: python, a folder, a git repository")
    scale: float = flag(1.0, "multiplies the token budget and the corpus size; 0.02 is a rehearsal", least=1e-6)
    seed: int = flag(1337, "seed of the weights and of the data order")
    layers: int = flag(0, "layers of the model; 0: the preset's")
    loop_num: int = flag(0, "passes over the layers; 1: a dense model; 0: the preset's")
    loop_window_size: int = flag(0, "positions that the local view of a later pass sees; 0: the preset's")
    loop_input: str = flag("hidden", "what a later pass starts from: hidden, the state before it, or shift, the report's equation 1",
                           ("hidden", "shift"))
    fold: str = flag("", "pre-training starts from this dense checkpoint, 2 layers folded into each one of a loop (LoopCoder report, 2.2)")
    resume: bool = flag(False, "keep finished stages and go on in the unfinished one")
    batch_tokens: int = flag(0, "tokens of one optimizer step; 0: the preset's")
    lr: float = flag(0.0, "peak learning rate; 0: the preset's")
    optimizer: str = flag("muon", "muon (for the matrices, AdamW for the rest) or adamw", ("muon", "adamw"))
    weight_decay: float = flag(0.1, "decoupled weight decay of the matrices")
    clip: float = flag(1.0, "largest gradient norm", least=1e-6)
    micro_batch_tokens: int = flag(0, "tokens of one forward and backward; 0: chosen by device")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "bfloat16 or float32 for the forward and backward; master weights are float32 always",
                      ("auto", "bfloat16", "float32"))
    compile: str = flag("auto", "torch.compile: on, off; auto: on a GPU; on a CPU half a minute a stage pays late", SWITCH)
    cp: int = flag(1, "ranks that share a row of tokens: context parallelism over a ring")
    fsdp: str = flag("auto", "weights, gradients, optimizer in shards over all ranks: on, off; auto: what would fill half a device", SWITCH)
    replay: float = flag(1.0, "multiplies what fine-tuning replays of earlier stages; 0 shows what it would forget")
    written: str = flag("", "fine-tuning learns from this file too: verified answers that python tasks.py --write FILE left")
    recompute: bool = flag(False, "compute activations again in the backward instead of keeping them")
    timeout: float = flag(1800.0, "seconds that a rank waits for the others before the run ends; one that dies is noticed at once", least=1)
    threads: int = flag(0, "CPU threads; 0: torch's choice")
    check: str = flag("auto", "fingerprints against silent errors: on, off; auto: on where there are replicas", SWITCH)
    recheck_every: int = flag(100, "steps between two re-computations of a micro-batch (with --check); 0: never")
    inject: str = flag("", "a fault to be found, such as site=weight,step=3,rank=1,tensor=norm,element=5,bit=30,fault=flip")
    save_every: int = flag(100, "steps between snapshots that --resume goes on from", least=1)
    eval_bytes: int = flag(200_000, "held-out bytes a language for the bits per byte at the end of each stage", least=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            name, value, choices, least = "--" + f.name.replace("_", "-"), getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if choices and value not in choices:
                raise ValueError(f"{name} {value}: unknown; one of {', '.join(choices)}")
            if not isinstance(value, str) and not least <= value < math.inf:
                raise ValueError(f"{name} {value}: must be a number from {least} up")
        unknown = [name for name in self.wanted if name not in STAGES]
        if unknown:
            raise ValueError(f"--stages {self.stages}: no stage {unknown[0]!r}; all, or some of {','.join(STAGES)}")
        if self.written and not Path(self.written).is_file():
            raise ValueError(f"--written {self.written}: there is no such file; python tasks.py --write {self.written} makes one")
        if self.fold and (self.layers or self.loop_num == 1 or shards_weights(self)):
            raise ValueError(f"--fold {self.fold}: makes a loop of its layers, whole on each rank; without --layers, --loop-num 1, --fsdp")
        if self.fold and not Path(self.fold, "config.json").is_file():
            raise ValueError(f"--fold {self.fold}: no checkpoint there (no config.json); --loop-num 1 trains a dense one")
        if self.inject:
            Inject.parse(self.inject)

    @property
    def wanted(self):
        return list(STAGES) if self.stages == "all" else self.stages.split(",")


# ---- schedule and optimizer ------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, end, hold=0.0, warmup=0.02):
    """Linear warm-up, cosine from peak to end, then `hold` of the steps at end: the report's "extended low-rate phase" (section 4.2)."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    u = min(1.0, (step - warm) / max(1, (1 - hold) * steps - warm))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * u))


def orthogonalize(x):
    """
    U V^T of each matrix of a stack (n, a, b), roughly: a fifth-order polynomial in X X^T drives all singular values into about [0.7, 1.2].

    Newton-Schulz, which takes matrix products alone. Source: Muon (Jordan et al., 2024).
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT.contiguous()).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def orthogonalize_shards(updates, dtype):
    """Yields orthogonalize() of matrices of one shape that lie in shards: each rank does a whole one, a shard would give something else."""
    mesh, shape = updates[0].device_mesh, updates[0].shape
    for start in range(0, len(updates), mesh.size()):
        some, done = updates[start : start + mesh.size()], torch.zeros(shape, dtype=dtype, device=updates[0].device)
        for k, u in enumerate(some):
            whole = u.full_tensor()  # all ranks take part in each
            done = whole if k == mesh.get_local_rank() else done
        done = orthogonalize(done[None].to(dtype))[0].contiguous()
        yield from (distribute_tensor(done, mesh, u.placements, src_data_rank=k) for k, u in enumerate(some))


class Muon(torch.optim.Optimizer):
    """
    Momentum whose step is made orthogonal: every direction of a matrix learns at the same pace. For matrices alone.

        M = 0.95 M + 0.05 G,   W = (1 - lr decay) W - lr 0.2 sqrt(max(a, b)) orthogonalize(0.05 G + 0.95 M)

    The root gives the step the size of one of AdamW's (Moonlight), so one rate serves both.
    dtype is that of the products: torch.optim.Muon always takes bfloat16, which some CPUs multiply at half the speed of float32.
    """

    def __init__(self, matrices, weight_decay=0.1, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(matrices, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            stacks, lr, momentum = defaultdict(list), group["lr"], group["momentum"]
            for p in group["params"]:
                stacks[p.shape].append(p)
            for shape, params in stacks.items():
                past = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(past, [p.grad for p in params], 1 - momentum)
                ahead = torch._foreach_lerp([p.grad for p in params], past, momentum)
                sharded = isinstance(params[0], DTensor)
                done = orthogonalize_shards(ahead, self.dtype) if sharded else orthogonalize(torch.stack(ahead).to(self.dtype))
                for p, u in zip(params, done):
                    p.mul_(1 - lr * group["weight_decay"]).add_(u.to(p.dtype), alpha=-lr * 0.2 * math.sqrt(max(shape)))


WHOLE = whole_state.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and gates, all float32: small updates are not lost."""

    def __init__(self, model, kind="muon", weight_decay=0.1):
        self.model, named = model, {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.params, matrices = list(named), {p for p, n in named.items() if ".layers." in n and n.endswith("proj.weight")}
        inside, rest = ([p for p in named if (p in matrices) == there] for there in (True, False))
        muon = [Muon(inside, weight_decay, dtype=model.compute_dtype or torch.float32)] if kind == "muon" else []
        groups = [] if muon else [{"params": inside, "weight_decay": weight_decay}]
        self.parts = [*muon, torch.optim.AdamW([*groups, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)]

    def step(self, lr, clip):
        """One update from the gradients of the weights, which are dropped; returns their norm before clipping (float)."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self):
        """What the optimizer remembers, whole and under the names of the weights: the same for any number of processes."""
        return whole_state.get_optimizer_state_dict(self.model, self.parts, options=WHOLE)

    def load_state_dict(self, state):
        whole_state.set_optimizer_state_dict(self.model, self.parts, optim_state_dict=state, options=WHOLE)


# ---- processes, device, model ----------------------------------------------------------------------------------------


@dataclass
class World:
    """This process among the others: its rank, device and number format, and who shares its rows."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    cp: int = 1  # ranks that share one row of tokens (context parallelism)
    group: object = None  # the process group of those ranks; None where cp is 1
    mesh: object = None  # the ranks over which weights are sharded (FSDP2: all of them); None: each rank has all weights
    door: object = None  # a socket that listens as long as this process lives, see open_door()
    doors: tuple = ()  # the addresses of all ranks' sockets

    @property
    def main(self):
        return self.rank == 0

    @property
    def replicas(self):  # data-parallel copies, each of cp ranks
        return self.size // self.cp


def open_door(size):
    """
    (a listening socket, the addresses of all ranks' sockets). The kernel answers there for a process however busy it is, and stops
    when it dies: so the others learn who it was, when a collective fails and says nothing but that a connection is closed.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing: asks which of our addresses the others reach
        door = socket.create_server((s.getsockname()[0], 0))
    addresses = [None] * size
    dist.all_gather_object(addresses, door.getsockname())
    return door, tuple(addresses)


class LostRank(RuntimeError):
    """A process of the run has died."""


@contextlib.contextmanager
def watch(world: World):
    """Where a collective fails because a rank has died, say which."""
    try:
        yield
    except RuntimeError as error:
        for rank, address in enumerate(() if isinstance(error, SilentError) else world.doors):
            try:
                socket.create_connection(address, timeout=5).close()
            except OSError:
                dist.destroy_process_group()  # whoever waits for this rank learns that it need not,
                time.sleep(3)  # and still finds it at its door
                advice = "--resume goes on from the last snapshot, with any N"
                raise LostRank(f"rank {rank} is gone, so rank {world.rank} stops; {advice}") from error
        raise


def by_rank_0(find):
    """find() of rank 0, on all ranks: what a clock decides may come out otherwise on each, and they must all do the same."""
    found = [find() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def shards_weights(cfg: TrainConfig) -> bool:
    """Whether --fsdp shards: "auto" where float32 weights, gradients and two moments, 16 bytes a parameter, take 40 GB or more."""
    return cfg.fsdp == "on" or cfg.fsdp == "auto" and 16 * parameter_count(shape_of(cfg))[0] > 40e9


@functools.cache
def device_peak(device, dtype) -> float:
    """Matmul FLOP/s that this device reaches: what MFU is a share of. Measured, not read from a datasheet."""
    return matmul_peak(device, dtype, size=1024 if device.type == "cpu" else 8192)


def start_world(cfg: TrainConfig) -> World:
    """The process group (when under torchrun), the device and the number format of this process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from None
    if cfg.cp < 1 or size % cfg.cp:
        raise ValueError(f"--cp {cfg.cp}: must divide the number of processes, {size}; start them with torchrun --nproc_per_node")
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(seconds=cfg.timeout))
    group = mesh = None
    if cfg.cp > 1:
        grid = dist.device_mesh.init_device_mesh(device.type, (size // cfg.cp, cfg.cp), mesh_dim_names=("replica", "context"))
        group = grid["context"].get_group()
    if size > 1 and shards_weights(cfg):
        mesh = dist.device_mesh.init_device_mesh(device.type, (size,))
    if cfg.dtype != "auto":
        dtype = getattr(torch, cfg.dtype)
    else:  # on a CPU what a matrix product measures as faster: some have bfloat16 instructions that run at half speed
        fast = gpu or by_rank_0(lambda: device_peak(device, torch.bfloat16) > 1.25 * device_peak(device, torch.float32))
        dtype = torch.bfloat16 if fast else torch.float32
    compiled = cfg.compile == "on" or cfg.compile == "auto" and gpu and cfg.cp == 1  # the ring is not to be traced
    return World(rank, size, device, dtype, compiled, cfg.cp, group, mesh, *(open_door(size) if size > 1 else (None, ())))


def end_world() -> None:
    """Leave the process group. DDP goes first: gloo's destructor waits for ever where DDP's reducer is the last to hold the group."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


class Loss(torch.nn.Module):
    """The training path of the model as a module of its own, so that DistributedDataParallel can wrap it."""

    def __init__(self, model, group=None):
        super().__init__()
        self.model, self.group = model, group

    def forward(self, input_ids, targets, segment_ids):
        return self.model.loss(input_ids, targets, segment_ids, reduction="sum", group=self.group)


def shape_of(cfg: TrainConfig, **changes) -> LoopCoderConfig:
    """The model that pre-training begins: the preset's, with what the flags change."""
    flags = {"num_hidden_layers": cfg.layers, "loop_num": cfg.loop_num, "loop_window_size": cfg.loop_window_size}
    return LoopCoderConfig.preset(cfg.preset, loop_input=cfg.loop_input, **{k: v for k, v in flags.items() if v}, **changes)


def folded(cfg: TrainConfig, vocab_size: int) -> LoopCoder:
    """The dense checkpoint --fold as a loop model, which LoopCoder.loop_alpha lets in by degrees (see train_stage)."""
    dense = LoopCoder.from_pretrained(cfg.fold, dtype=torch.float32)
    if dense.config.vocab_size != vocab_size:
        theirs = dense.config.vocab_size
        raise ValueError(f"--fold {cfg.fold}: it knows {theirs} tokens, the corpus has {vocab_size}; train both on one corpus")
    wanted = shape_of(cfg)
    return dense_to_loop(dense, "mean", wanted.loop_num, wanted.loop_window_size)


def first_weights(stage: Stage, cfg: TrainConfig, world: World, vocab_size: int) -> LoopCoder:
    """Random weights, or those of the stage before. Where weights are sharded, rank 0 alone has any (loss_function deals them out)."""
    before = Path(cfg.out) / str(stage.start)
    config = LoopCoderConfig.from_json(before / "config.json") if stage.start else shape_of(cfg, vocab_size=vocab_size)
    torch.manual_seed(cfg.seed)
    if cfg.fold and not stage.start:
        return folded(cfg, vocab_size).to(world.device)
    if world.mesh is not None and not world.main:
        with torch.device("meta"):
            return LoopCoder(config)
    device = world.device if world.mesh is None else "cpu"
    return LoopCoder.from_pretrained(before, device=device, dtype=torch.float32) if stage.start else LoopCoder(config).to(device)


def loss_function(model, world: World):
    """The loss as a module to call: on several ranks with the weights in shards (FSDP2) or each rank with all of them (DDP)."""
    loss = Loss(model, world.group)
    if world.mesh is not None:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # v is one, and nothing writes to it
        weights = model.state_dict() if world.main else {}
        model.to("meta")
        policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=world.mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "loss")
        model.to_empty(device=world.device)
        model.recompute = True  # a layer keeps its weights for the backward pass otherwise, and they are not in shards then
        deal = whole_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        whole_state.set_model_state_dict(model, weights, options=deal)
    if world.compiled:
        loss.compile()
    return torch.nn.parallel.DistributedDataParallel(loss) if world.size > 1 and world.mesh is None else loss


def whole_copy(model, world: World):
    """The model with all its weights on this rank, to generate from: sharded weights are gathered in the compute dtype, one by one."""
    if world.mesh is None:
        return model
    with torch.device("meta"):
        copy = LoopCoder(model.config).to(world.dtype)
    copy.to_empty(device=world.device)
    for (_, whole), (_, shards) in zip(copy.named_parameters(), model.named_parameters()):
        whole.data.copy_(shards.full_tensor())
    return copy.eval()


# ---- silent errors ---------------------------------------------------------------------------------------------------


class SilentError(RuntimeError):
    """The hardware computed wrong without saying so. report: kind, step, tensor, ranks (those it can have been), rank (if that is one)."""

    def __init__(self, kind, step, tensor, ranks):
        self.report = {"kind": kind, "step": step, "tensor": tensor, "ranks": ranks, "rank": ranks[0] if len(ranks) == 1 else None}
        where = ("one of the ranks " if len(ranks) > 1 else "rank ") + ", ".join(map(str, ranks))
        super().__init__(f"silent error at step {step}: {kind}, tensor {tensor}, {where}")


def local(x):
    """What this rank holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def fingerprints(tensors: dict) -> torch.Tensor:
    """{name: tensor} -> (N, 3), of what this rank holds."""
    return torch.stack([fingerprint(local(x)) for x in tensors.values()])


class Guard:
    """
    Five checks, each for a fault that the others cannot see. All ranks raise together, before anything wrong is written.

    at rest      weights and optimizer state have, before the forward, the fingerprint they had after the last update
    received     keys, values and their gradients come round the ring with the fingerprint they were sent with
    reduction    gradients are equal on all ranks after the all-reduce
    update       weights and optimizer state are equal on all ranks before the first forward and after each update
    recompute    every recheck_every steps the last micro-batch is run again, here and by the neighbour: a wrong *local* gradient
                 reaches all replicas alike, so only this sees it; the neighbour sees what is wrong here every time (a stuck bit).
                 Neighbours are the ranks with the same part of other rows or, where all share one row, the ranks with its next part

    A rank is named by its own memory (at rest, received), by the majority of three or more, or by the neighbours that disagree. Where
    weights are sharded there are no replicas: "at rest" and "received" hold for each shard, but "reduction" and "update" have nothing
    to compare, and gradients come home as sums over all ranks. What a rank alone computes there is its loss: a forward that is wrong
    once or always is seen by that, a backward that is wrong once by the sums, on an unknown rank, one that always is not at all.
    """

    def __init__(self, model, optimizer, world, recheck_every=0, inject=None):
        self.world, self.optimizer, self.recheck_every, self.inject = world, optimizer, recheck_every, inject
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if inject:
            named = inject.site in ("optimizer", "activation", "received") or any(inject.tensor in name for name in self.params)
            there = {"received": world.cp > 1, "gradient": world.mesh is None}.get(inject.site, True)  # shards have no gradient of one rank
            if not named or not there or inject.rank >= world.size:
                where = f"site={inject.site},rank={inject.rank},tensor={inject.tensor}"
                raise ValueError(f"--inject {where}: there is no such thing in this run of {world.size} rank(s) with --cp {world.cp}")
        self.remembered, self.local, self.before, self.step, self.last, self.arrived = None, {}, {}, 0, False, []
        Ring.inspect = self._received
        for n, p in self.params.items() if world.mesh is None else ():
            p.register_post_accumulate_grad_hook(functools.partial(self._local_gradient, n))
            if inject:
                p.register_hook(functools.partial(self._damaged, "gradient", n))
        for i, layer in enumerate(model.model.layers if inject else ()):
            name = f"layers.{i}"
            layer.register_forward_hook(lambda _layer, _args, out, name=name: (self._damaged("activation", name, out[0]), *out[1:]))

    def _state(self):
        """{name: tensor} of all weights and of everything that the optimizer remembers."""
        state = {p: s for part in self.optimizer.parts for p, s in part.state.items()}
        moments = {f"{n} {key}": x for n, p in self.params.items() for key, x in sorted(state.get(p, {}).items()) if torch.is_tensor(x)}
        return self.params | moments

    def _gradients(self):
        return {n: p.grad for n, p in self.params.items()}

    def _fault(self, site, tensors):
        if self.inject:
            self.inject.strike(site, self.step, self.world.rank, {n: local(x) for n, x in tensors.items()})

    def _damaged(self, site, name, x):
        """A gradient, or what a layer gives to the next, as --inject damages it: in the last micro-batch, each time it is computed."""
        if self.last:
            x = x.clone(memory_format=torch.contiguous_format)
            self._fault(site, {name: x})
        return x

    def _gather(self, table):
        """(N, k) of this rank -> (ranks, N, k) of all."""
        if self.world.size == 1:
            return table[None]
        every = [torch.empty_like(table) for _ in range(self.world.size)]
        dist.all_gather(every, table)
        return torch.stack(every)

    def _fail(self, kind, names, bad, ranks=None):
        """bad (ranks, N) bool, the same on all ranks: report the first tensor that is wrong, and on which ranks (bool) it can be."""
        tensor = int(bad.any(0).nonzero()[0])
        ranks = bad[:, tensor] if ranks is None else ranks
        raise SilentError(kind, self.step, list(names)[tensor], ranks.nonzero()[:, 0].tolist())

    def _equal(self, kind, names, table):
        """All ranks hold the same fingerprints; with three or more, the majority names the one that does not."""
        if self.world.mesh is None:
            every = self._gather(table)
            agree = (every[:, None] == every[None]).all(-1)  # (ranks, ranks, N)
            if not agree.all():
                self._fail(kind, names, agree.sum(0) * 2 <= self.world.size)

    def _received(self, source, tensors, sent):
        """Ring calls this with everything that arrives; nothing waits here, all_arrived() judges."""
        self._fault("received", tensors)
        bad = (fingerprints(tensors) != sent).any(-1)
        self.arrived += [(f"{name}, exchange {len(self.arrived)}, from rank {source}", b) for name, b in zip(tensors, bad)]

    def all_arrived(self):
        """What came round the ring in this step came as it was sent."""
        arrived, self.arrived = self.arrived, []
        if self.world.cp > 1:
            bad = torch.stack([b for _, b in arrived]) if arrived else torch.zeros(1, dtype=torch.bool, device=self.world.device)
            if ranks := self._gather(bad.any()[None])[:, 0].nonzero()[:, 0].tolist():
                found = [None] * self.world.size
                dist.all_gather_object(found, arrived[int(bad.nonzero()[0])][0] if bad.any() else "")
                raise SilentError("received otherwise than sent", self.step, found[ranks[0]], ranks)

    def before_forward(self, step):
        self.step, self.last = step, False
        state = self._state()
        self._fault("weight", self.params)
        self._fault("optimizer", {n: x for n, x in state.items() if n not in self.params})
        table = fingerprints(state)
        if self.remembered is None:
            return self._equal("replicas differ before the forward", state, table)
        bad = self._gather((table != self.remembered).any(-1))
        if bad.any():
            self._fail("changed at rest", state, bad)

    def rechecks(self):
        return bool(self.recheck_every) and self.step % self.recheck_every == 0

    def last_micro_batch(self):
        """Call before it: remembers the gradient so far; the hooks then take the fingerprint of what the backward makes of it."""
        self.last = True
        self.before = {n: p.grad.clone() for n, p in self.params.items() if p.grad is not None} if self.rechecks() else {}

    def _local_gradient(self, name, p):
        """Runs inside the backward, after p.grad has taken in a micro-batch and before DDP reduces it."""
        if self.last and self.rechecks():
            self.local[name] = fingerprint(p.grad)

    def _computes(self, loss_of, piece):
        """{what: value} of all that this rank alone computes of a micro-batch: gradients and loss; where weights are sharded, the loss."""
        with torch.set_grad_enabled(self.world.mesh is None):
            loss = loss_of(piece)
        grads = torch.autograd.grad(loss, list(self.params.values())) if self.world.mesh is None else ()
        return dict(zip(self.params, grads)) | {"loss": loss.detach()}

    def recompute(self, loss_of, loss, own, neighbours):
        """
        The neighbour's last micro-batch, then this rank's own once more: it must all be what it was, bit for bit.

        loss_of(micro-batch) -> the loss that is differentiated; loss: what `own` came to; neighbours(): that of the rank `apart` after us.
        """
        self.all_arrived()
        world, names, theirs = self.world, [*self.params, "loss"], None
        apart = world.cp if world.replicas > 1 else 1
        if world.size > 1:  # before our own: a forward with no backward leaves FSDP holding weights that the update makes old
            Ring.turn = apart % world.cp
            try:
                theirs = fingerprints(self._computes(loss_of, neighbours()))
            finally:
                Ring.turn = 0
        if world.mesh is None:
            was, alone = torch.stack([*(self.local[n] for n in self.params), fingerprint(loss)]), self._computes(loss_of, own)
            mine = fingerprints(alone)
            again = fingerprints({n: self.before[n].add_(x) if n in self.before else x for n, x in alone.items()})
        else:
            was = fingerprints(self._gradients() | {"loss": loss})
            for n, p in self.params.items():
                p.grad = self.before.get(n)
            loss = loss_of(own)
            loss.backward()
            again = fingerprints(self._gradients() | {"loss": loss})
            mine = again[-1:]
        self.before, known = {}, world.mesh is None or world.cp == 1  # what is wrong also reaches the losses of others in a ring
        bad = self._gather((was != again).any(-1))
        if bad.any():
            ranks = bad.any(1) if world.mesh is None else bad[:, -1]
            self._fail("computed twice, it differs", names, bad, ranks if known and ranks.any() else ranks | True)
        if theirs is not None:
            bad = (self._gather(mine).roll(-apart, 0) != self._gather(theirs)).any(-1)  # row r: how rank r sees rank r + apart
            if bad.any():
                seen = bad.any(1)
                both = seen & seen.roll(apart, 0)  # differs from the one that it sees, and from the one that sees it
                ranks = both if world.size // apart > 2 and both.any() else seen | seen.roll(apart, 0)
                self._fail("two ranks compute it differently", names[-bad.shape[1] :], bad, ranks if known else ranks | True)

    def after_reduction(self):
        self.all_arrived()
        grads = self._gradients()
        self._fault("reduced", grads)
        if self.world.mesh is None:
            self._equal("gradients differ after the reduction", grads, fingerprints(grads))

    def after_update(self):
        state = self._state()
        self._fault("update", state)
        self.remembered = fingerprints(state)
        self._equal("replicas differ after the update", state, self.remembered)


SITES = ("weight", "optimizer", "activation", "gradient", "received", "reduced", "update")
FAULTS = ("flip", "pair", "swap", "zero", "roll", "stuck")


@dataclass
class Inject:
    """A fault for tests and readers: --inject site=weight,step=3,rank=1,tensor=model.norm.weight,element=5,bit=30,fault=flip"""

    site: str = "weight"  # weight, optimizer (at rest); activation, gradient (local); received (ring); reduced (all-reduced); update
    step: int = 1  # 0-based
    rank: int = 0
    tensor: str = ""  # part of its name; the first that matches
    element: int = 0  # index of the first element hit
    bit: int = 30
    fault: str = "flip"  # flip; pair: the same bit of two elements; swap: two elements; zero, roll, stuck: over a run of elements
    persistent: int = 0  # 1: every time from `step` on
    fired: bool = False  # it has come
    struck: bool = False  # and has changed something

    @classmethod
    def parse(cls, text):
        values = dict(part.partition("=")[::2] for part in text.split(","))
        kinds = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in ("fired", "struck")}
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"--inject {text}: no field {name!r}; there are {', '.join(kinds)}")
            if value not in (allowed := {"site": SITES, "fault": FAULTS}.get(name, (value,))):
                raise ValueError(f"--inject {text}: {name} must be one of {', '.join(allowed)}")
            if kinds[name] is int and not value.isdecimal():
                raise ValueError(f"--inject {text}: {name} must be a whole number")
        return cls(**{name: kinds[name](value) for name, value in values.items()})

    @torch.no_grad()
    def strike(self, site, step, rank, tensors):
        due = step >= self.step if self.persistent else step == self.step and not self.fired
        hit = [x for name, x in tensors.items() if self.tensor in name and x.numel()]
        if site == self.site and due and rank == self.rank and hit:
            self.fired = True
            self.struck |= corrupt(hit[0], self.fault, self.element, self.bit)


def corrupt(x, fault, element, bit) -> bool:
    """Damage a float32 tensor in place, as faulty hardware would; True when that changed a bit."""
    words = x.view(-1).view(torch.int32)
    was, n, element = words.clone(), words.numel(), element % words.numel()
    pair, run = [element, (element + max(1, n // 2)) % n], list(range(element, min(element + 64, n)))
    at = {"flip": [element], "pair": pair, "swap": pair}.get(fault, run)
    hit, mask = words[at], torch.tensor(1 << bit % 32, dtype=torch.int64).to(torch.int32)
    words[at] = {"swap": hit.flip(0), "zero": 0 * hit, "roll": hit.roll(1), "stuck": hit | mask}.get(fault, hit ^ mask)
    return not torch.equal(words, was)


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------

# (share of the steps, levels, perturbed): format and basics; knowledge, sampled by measured difficulty; frontier and adversarial.
PHASES = ((0.4, (1,), False), (0.4, (1, 2, 3), False), (0.2, (1, 2, 3, 4), True))

MOST_SAMPLES = 2000  # of a family and phase


@functools.cache  # the two fine-tuning stages share most of their tasks
def judged_task(family, level, number, perturbed):
    """(task, why it may not be learned from): "" where its own solution passes and it holds nothing of the evaluation."""
    task = tasks.generate(family, level, number)
    task = tasks.perturb(task, number) if perturbed and number % 2 else task
    return task, tasks.refusal(task, task.solution, tasks.own_evaluation())


def task_samples(tokenizer, family, levels, weights, n, first, thinking, perturbed):
    """(n samples of a family less those refused, the gate's table): levels drawn by weight, a level's tasks numbered from `first` on."""
    drawn_levels = np.random.default_rng([first, *family.encode()]).choice(levels, n, p=np.array(weights) / sum(weights))
    drawn = [(family, level, first + k, perturbed) for level, count in Counter(drawn_levels.tolist()).items() for k in range(count)]
    tasks.own_evaluation()  # once, before the threads ask for it
    with ThreadPoolExecutor(4) as pool:  # the programs of the samples run in the sandbox's processes
        judged, refusals = zip(*pool.map(judged_task, *zip(*drawn)))
    kept, table = tasks.admit([(task, task.solution) for task in judged], refusals=list(refusals))
    if family == "swe":  # the only family whose answer is a conversation
        return [tokenizer.encode_parts(tasks.trajectory_parts(task, detour=task.seed % 4 == 0)) for task, _ in kept], table
    return [tokenizer.encode_parts(tasks.task_parts(task, thinking)) for task, _ in kept], table


def written_samples(tokenizer, path, thinking, context):
    """
    ({family: [(level, sample)]}, the gate's table) of a file of `tasks.py --write`. All are judged again. The thinking path takes the
    answers that think, the instruct path the part behind the thinking.
    """
    found, table = defaultdict(list), Counter()
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            task, answers = tasks.generate(*record["id"]), record["answers"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--written {path}, line {number}: not a line of python tasks.py --write ({error})") from None
        for answer in answers:
            final = tasks.final_answer(answer)
            if thinking and answer == final:
                continue
            told = dataclasses.replace(task, solution=answer if thinking else final)
            sample = tokenizer.encode_parts(tasks.task_parts(told))
            refused = tasks.refusal(task, answer, tasks.own_evaluation()) or "longer than the context" * (len(sample[0]) > context)
            refused = refused or "harder than any phase" * (task.difficulty not in PHASES[-1][1])
            table[refused or "written, admitted"] += 1
            found[task.family] += [] if refused else [(task.difficulty, sample)]
    return found, table


@torch.no_grad()
def sample_answers(model, tokenizer, problems, n_samples, thinking=False, seed=0, opening="") -> list[list[str]]:
    """n_samples answers to each problem, behind this opening: a single one is the likeliest, several are drawn at temperature 0.6."""
    prompts = [tokenizer.encode_parts(tasks.asked_parts(task))[0] + tokenizer.encode(opening) for task in problems]
    limit, stop, device = model.config.max_position_embeddings, tokenizer.special["<|im_end|>"], model.lm_head.weight.device
    room, temperature = 224 if thinking else 160, 0.6 if n_samples > 1 else 0.0
    generator, texts = torch.Generator(device=device).manual_seed(seed), []
    rows = [prompt[-(limit - room) :] for prompt in prompts for _ in range(n_samples)]
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)
        lengths = [len(row) for row in batch]
        out = model.generate(ids, room, temperature=temperature, stop_ids=(stop,), generator=generator, lengths=lengths)
        for row, length in zip(out.tolist(), lengths):
            new = row[length : length + room]
            texts.append(tokenizer.decode(new[: new.index(stop)] if stop in new else new))
    return [texts[i : i + n_samples] for i in range(0, len(texts), n_samples)]


def mark(problems, answers, judge=lambda task, answer: float(tasks.verify(task, answer) == 1.0)) -> list[tuple[float, int]]:
    """(sum of the marks, answers that could be marked) of each problem; where the sandbox itself broke, nothing is known."""

    def judged(task, answer):
        try:
            return judge(task, answer)
        except RuntimeError:
            return None

    with ThreadPoolExecutor(2) as pool:
        marks = [pool.map(judged, [task] * len(some), some) for task, some in zip(problems, answers)]
        known = [[m for m in some if m is not None] for some in marks]
    return [(sum(some), len(some)) for some in known]


def solve_rates(model, tokenizer, levels, thinking) -> dict[str, float]:
    """{"family/level": pass rate of likeliest answers to four training tasks}; harder levels only for families that know something yet."""
    rates, families = {}, list(tasks.FAMILIES)
    for level in levels:
        problems = [tasks.generate(family, level, tasks.ASKED + k) for family in families for k in range(4)]
        marks = mark(problems, sample_answers(model, tokenizer, problems, 1, thinking))
        for i, family in enumerate(families):
            right, known = map(sum, zip(*marks[4 * i : 4 * i + 4]))
            rates |= {f"{family}/{level}": right / known} if known else {}
        families = [family for family in families if rates.get(f"{family}/{level}")]
    return rates


def adjust(weights: dict, base: dict, history: dict) -> dict:
    """
    One move of the dynamic mixture: a family whose held-out loss stands more than 1 % above its best gets 1.25 times its weight, one that
    moved less than 0.1 % an evaluation over the last three 0.9 times; between half and twice the base. history: {family: [loss, ...]}.
    """
    moved = {}
    for name, weight in weights.items():
        losses = history[name]
        if losses[-1] > 1.01 * min(losses):
            weight *= 1.25
        elif len(losses) >= 3 and abs(losses[-1] - losses[-3]) / 2 < 0.001 * losses[-3]:
            weight *= 0.9
        moved[name] = min(max(weight, 0.5 * base[name]), 2 * base[name])
    total = sum(moved.values())
    return {name: weight / total for name, weight in moved.items()}


def level_weights(rates: list) -> list:
    """How often each level is drawn, from pass rates, the easiest first: half known teaches most, then what stands on something known."""
    return [p * (1 - p) + below / 5 + 0.05 for p, below in zip(rates, [1.0, *rates])]


def in_memory(samples):
    """Token sequences with the face of a TokenFile, so that Mixture reads them; they are never cut."""
    ids, in_loss = ([np.asarray(part) for part in parts] for parts in zip(*samples))
    return SimpleNamespace(cut=False, lengths=np.array([len(x) for x in ids]), ids=ids.__getitem__, in_loss=in_loss.__getitem__)


def say(line: str, end="\n") -> None:
    """Print a line; on a terminal in place of one that ended without a line feed, which is what progress looks like there."""
    print(("\r\033[K" if sys.stdout.isatty() else "") + line, end=end, flush=True)


def listed(shares: dict, digits=1) -> str:
    return ", ".join(f"{name} {100 * share:.{digits}f}%" for name, share in shares.items())


class Curriculum:
    """
    The data of a fine-tuning stage, with the face of data.Mixture: three phases by *measured* difficulty, replay, dynamic shares.

    Phase 1 shows every family at level 1. Before each later one the model's own pass rates set how often a level is drawn, and the last
    perturbs what is solved. All of it depends on the seed and on the recorded rates alone.
    """

    STATE = ("step", "phase", "measured", "weights", "rates", "moves")  # measured: the phase before which the rates were taken last

    def __init__(self, model, tokenizer, stage, replay, shares, context, rows, steps, seed, world, written=""):
        self.model, self.tokenizer, self.name, self.context, self.rows, self.seed = model, tokenizer, stage.name, context, rows, seed
        self.replay, self.replay_shares, self.world, self.steps, self.thinking = replay, shares, world, steps, stage.sft == "thinking"
        self.ends, self.every = [round(end * steps) for end in np.cumsum([share for share, _, _ in PHASES])], max(1, steps // 8)
        self.base = {family: 1 / len(tasks.FAMILIES) for family in tasks.FAMILIES}
        self.step, self.phase, self.measured, self.weights, self.rates, self.moves = 0, -1, 0, self.base, {}, []
        self.written, self.gate = defaultdict(list), Counter()
        if written:
            self.written, self.gate = by_rank_0(lambda: written_samples(tokenizer, written, self.thinking, context))
        self.mixture, self.heldout = None, {family: self.samples(family, (1, 2), (1, 1), 6, 99, False) for family in self.base}

    def samples(self, family, levels, weights, n, phase, perturbed):
        """Samples that fit the context; there must be some, or the family cannot be taught here. No task is drawn in two phases."""
        first = (self.seed * 100 + phase) * MOST_SAMPLES
        made, table = by_rank_0(lambda: task_samples(self.tokenizer, family, levels, weights, n, first, self.thinking, perturbed))
        kept = [sample for sample in made if len(sample[0]) <= self.context]
        self.gate.update({**table, "longer than the context": len(made) - len(kept)})
        if not kept:
            raise ValueError(f"{self.name}: no sample of {family} fits a context of {self.context} tokens; use a longer one")
        return kept

    def shares(self):
        left = 1 - sum(self.replay_shares.values())
        return {**self.replay_shares, **{family: left * weight for family, weight in self.weights.items()}}

    def enter(self, phase):
        """Make the samples of a phase and the mixture that deals them."""
        share, levels, perturbed = PHASES[phase]
        if phase > self.measured:
            self.model.eval()
            whole = whole_copy(self.model, self.world)
            self.rates = by_rank_0(lambda: solve_rates(whole, self.tokenizer, levels, self.thinking))
            self.model.train()
            self.measured = phase
            found = {family: self.rates.get(f"{family}/1", 0) for family in self.base}
            if self.world.main:
                say(f"{self.name}: measured pass rates at level 1: {listed(found, 0)}")
        tokens, files = share * self.steps * self.rows * self.context / len(self.base), dict(self.replay)
        for family in self.base:
            rates = [self.rates.get(f"{family}/{level}", 0.0) for level in levels]
            length = np.mean([len(ids) for ids, _ in self.heldout[family]])
            n = min(4 + int(tokens / length), MOST_SAMPLES)  # each is seen about once; what is solved is asked in other words
            made = self.samples(family, levels, level_weights(rates), n, phase, perturbed and rates[0] >= 0.5)
            told = [sample for level, sample in self.written[family] if level in levels]
            files[family] = in_memory(made + told)
        before, piece = self.mixture, self.context // 8  # what is replayed shares its row with samples: no step forgets them for a document
        self.phase, self.mixture = phase, data.Mixture(files, self.shares(), self.context, self.rows, seed=self.seed + phase, piece=piece)
        if before:  # what a category lacks at the end of a phase it gets in the next
            self.mixture.given, self.mixture.due = before.given, before.due

    def next(self):
        phase = sum(self.step >= end for end in self.ends[:-1])
        if phase != self.phase:
            self.enter(phase)
            if self.world.main:
                say(f"{self.name}: samples so far: " + ", ".join(f"{n} {what}" for what, n in self.gate.most_common() if n))
        elif self.step % self.every == 0:
            self.reweigh()
        self.step += 1
        return self.mixture.next()

    @torch.no_grad()
    def reweigh(self):
        """Held-out loss by family, then one move of the shares."""
        losses = {}
        for family, samples in self.heldout.items():
            ids, targets, segments = (torch.from_numpy(part).to(self.world.device) for part in data.pack(samples, self.context))
            losses[family] = float(self.model.loss(ids, targets, segments))
        losses = by_rank_0(lambda: losses)
        history = {family: [move["loss"][family] for move in self.moves] + [loss] for family, loss in losses.items()}
        self.weights = adjust(self.weights, self.base, history)
        self.moves.append({"step": self.step, "loss": losses, "weights": self.weights})
        self.mixture.shares = self.shares()

    def state(self):
        return {name: getattr(self, name) for name in self.STATE} | {"gate": dict(self.gate), "mixture": self.mixture.state()}

    def load_state(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])
        self.enter(self.phase)
        self.gate = Counter(state["gate"])
        self.mixture.load_state(state["mixture"])


# ---- the loop --------------------------------------------------------------------------------------------------------


def micro_batches(batch, world: World, micro_rows: int, ahead: int = 0):
    """
    This replica's rows of the global batch (or those of a replica `ahead` of it) as tensors, in pieces of micro_rows; under context
    parallelism this rank's chunks of them. The loss shift was made before the cut, so it crosses the borders of the chunks.
    """
    short = -len(batch[0]) % world.replicas  # rows that teach nothing fill up what the replicas do not share evenly
    batch = [np.pad(part, ((0, short), (0, 0)), constant_values=value) for part, value in zip(batch, (0, -100, 0))] if short else batch
    replica = (world.rank // world.cp + ahead) % world.replicas
    mine = [torch.from_numpy(part[replica :: world.replicas]).to(world.device) for part in batch]
    if world.group is not None:
        padding = (0, -100, 1 << 30)  # tokens, targets, a segment of its own
        mine = [shard_sequence(part, world.group, pad=pad) for part, pad in zip(mine, padding)]
    return list(zip(*(part.split(micro_rows) for part in mine)))


def gradient(loss_fn, batch, world: World, micro_rows: int, guard: Guard | None = None) -> float:
    """
    Accumulate the gradient of the mean loss per learned token of the whole global batch; returns that mean (float, nats).

    A micro-batch contributes its *sum* divided by the tokens of the global batch, so no split, over ranks or not, changes the gradient.
    """
    scale = world.size / int((batch[1] != -100).sum())  # DDP averages over ranks: times world.size undoes it
    total = torch.zeros((), device=world.device)
    pieces = micro_batches(batch, world, micro_rows)
    for left, piece in zip(reversed(range(len(pieces))), pieces):
        if guard and not left:  # none is left after this one
            guard.last_micro_batch()
        waits = left and world.size > 1 and world.mesh is None  # DDP reduces once, at the end; FSDP adds up in shards
        with loss_fn.no_sync() if waits else contextlib.nullcontext():
            loss = loss_fn(*piece)
            (loss * scale).backward()
        total += loss.detach()
    if guard and guard.rechecks():
        plain = loss_fn if isinstance(loss_fn, Loss) else loss_fn.module
        neighbours = lambda: micro_batches(batch, world, micro_rows, ahead=1)[-1]
        guard.recompute(lambda piece: plain(*piece) * scale, loss.detach() * scale, piece, neighbours)
    if world.size > 1:
        dist.all_reduce(total)
    return float(total) * scale / world.size


def write_atomically(path: Path, write):
    """write(temporary path), then rename: a killed process or a full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's word for a disk that is full
        raise OSError(f"{path}: could not be written ({str(error).splitlines()[0]})") from error
    finally:
        temporary.unlink(missing_ok=True)


class Log:
    """One line that rewrites itself on a terminal, a line every few seconds elsewhere, and every record in log.jsonl."""

    def __init__(self, path: Path, world: World, keep: int):
        self.main, self.shown, self.terminal = world.main, 0.0, sys.stdout.isatty()
        if self.main:
            self.file = open(path, "a+")
            self.file.seek(0)
            for _ in range(keep):  # a resumed run writes its later steps again
                self.file.readline()
            self.file.truncate(self.file.tell())

    def __call__(self, record: dict, line: str, last=False):
        if not self.main:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.terminal or last or time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            say(line, end="" if self.terminal and not last else "\n")


def share_out(mixture: dict[str, float], present) -> tuple[dict[str, float], dict[str, float]]:
    """(shares of the categories that have data, normalised to 1; shares of the absent ones)."""
    total = sum(mixture.values())
    shares, absent = ({n: s / total for n, s in mixture.items() if (n in present) == there} for there in (True, False))
    if not shares:
        raise ValueError(f"none of the categories {', '.join(mixture)} has data; run python data.py first")
    left = sum(shares.values())
    return {n: s / left for n, s in shares.items()}, absent


def stage_data(stage, cfg, model, tokenizer, context, rows, steps, world):
    """(mixture, shares, absent shares) of a stage: fixed shares of the data folder, or the curriculum of fine-tuning and its replay."""
    files = {path.stem: data.TokenFile(path.parent, path.stem) for path in sorted((Path(cfg.out) / "data" / "train").glob("*.tokens"))}
    if stage.sft:
        shares = {name: cfg.replay * share for name, share in stage.mixture.items() if name in files and cfg.replay > 0}
        replay = {name: files[name] for name in shares}
        mixture = Curriculum(model, tokenizer, stage, replay, shares, context, rows, steps, cfg.seed, world, cfg.written)
        return mixture, mixture.shares(), {name: share for name, share in stage.mixture.items() if name not in files}
    shares, absent = share_out(stage.mixture, files)
    return data.Mixture(files, shares, context, rows, seed=cfg.seed + list(STAGES).index(stage.name)), shares, absent


CPU_MICRO_BATCH, GPU_MICRO_BATCH = 4096, 32768  # tokens of one forward and backward, where --micro-batch-tokens does not say


def sizes(stage: Stage, cfg: TrainConfig) -> tuple[int, int, int]:
    """(tokens of a row, rows of a step, steps) of a stage."""
    preset = PRESETS[cfg.preset]
    context = preset.contexts[stage.context]
    rows = max(1, round((cfg.batch_tokens or preset.batch_tokens) / context))
    return context, rows, max(2, round(preset.tokens[stage.tokens] * cfg.scale / (rows * context)))


def is_finished(folder: Path) -> bool:
    """Whether a stage came to its end: the model, no snapshot, and the scores in the log (there is no log where others made the model)."""
    model, snapshot, log = (folder / name for name in ("model.safetensors", "state.pt", "log.jsonl"))
    return model.exists() and not snapshot.exists() and (not log.exists() or "bits_per_byte" in log.read_text())


def train_stage(stage: Stage, cfg: TrainConfig, world: World) -> Path:
    """
    Train one stage and leave its checkpoint in out/<stage>/; returns that folder.

    The folder holds the released layout, log.jsonl, and while the stage runs state.pt, from which --resume goes on.
    """
    folder, name = Path(cfg.out) / stage.name, stage.name
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = (Path(cfg.out) / place / "tokenizer.json" for place in ("data/tokenizer", str(stage.start)))
    tokenizer = data.Tokenizer.load(ours.parent)
    if theirs.exists() and theirs.read_bytes() != ours.read_bytes():
        raise ValueError(f"{name}: {theirs} differs from {ours}: what {stage.start} learned are other tokens; train it again")
    context, rows, steps = sizes(stage, cfg)
    tokens, peak = rows * context, cfg.lr or PRESETS[cfg.preset].lr
    micro_rows = max(1, (cfg.micro_batch_tokens or (CPU_MICRO_BATCH if world.device.type == "cpu" else GPU_MICRO_BATCH)) // context)

    model = first_weights(stage, cfg, world, tokenizer.vocab_size)
    model.compute_dtype, model.recompute = world.dtype, cfg.recompute
    model.config.max_position_embeddings = context
    if cfg.fold and not stage.start:
        model.loop_alpha = torch.zeros((), device=world.device)
    model.train()
    loss_fn = loss_function(model, world)
    optimizer = Optimizer(model, cfg.optimizer, cfg.weight_decay)
    mixture, shares, absent = stage_data(stage, cfg, model, tokenizer, context, rows, steps, world)
    first, seconds, snapshot = 0, 0.0, folder / "state.pt"
    names = ("preset", "optimizer", "seed", "layers", "loop_num", "loop_window_size", "loop_input", "fold")
    identity = {name: getattr(cfg, name) for name in names}  # what a run that goes on has of the one before
    if cfg.resume and snapshot.exists():
        saved = torch.load(snapshot, map_location="cpu", weights_only=False, mmap=True)
        if other := {name: value for name, value in saved["identity"].items() if identity[name] != value}:
            ours = {name: identity[name] for name in other}
            raise ValueError(f"--resume: {snapshot} is from a run with {other}, this one has {ours}; give the same")
        whole_state.set_model_state_dict(model, saved["model"], options=WHOLE)
        optimizer.load_state_dict(saved["optimizer"])
        mixture.load_state(saved["mixture"])
        first, seconds = saved["step"], saved["seconds"]
        del saved
    if world.main:
        size, rest = parameter_count(model.config)[0] / 1e6, f" from step {first}" * bool(first)
        print(f"{name}: {size:.2f}M parameters, rows of {context} tokens, {tokens} tokens a step, {steps} steps{rest}")
        print(f"{name}: {listed(shares)}" + f"; absent: {listed(absent)}" * bool(absent), flush=True)
    checked = cfg.check == "on" or cfg.check == "auto" and world.size > 1 or cfg.inject
    guard = Guard(model, optimizer, world, cfg.recheck_every, Inject.parse(cfg.inject) if cfg.inject else None) if checked else None
    log = Log(folder / "log.jsonl", world, keep=first)
    full_speed = device_peak(world.device, world.dtype) * world.size / flops_per_token(model.config, context)  # tokens a second

    for step in range(first, steps):
        start = time.perf_counter()
        lr = peak * learning_rate(step, steps, stage.peak, stage.end, stage.hold)
        if model.loop_alpha is not None:
            model.loop_alpha.fill_(min(1.0, step / max(1, 0.02 * steps)))  # the second pass comes in over the warm-up
        if guard:
            guard.before_forward(step)
        loss = gradient(loss_fn, mixture.next(), world, micro_rows, guard)
        if guard:
            guard.after_reduction()
        norm = optimizer.step(lr, cfg.clip)
        if guard:
            guard.after_update()
        if not math.isfinite(loss + norm) or norm == 0:  # 0: a compiler or a kernel that loses the gradient, say
            raise FloatingPointError(f"{name}, step {step}: the loss is {loss}, its gradient's norm {norm}; --resume, with a lower --lr, "
                                     f"goes on from the last snapshot")
        took, done = time.perf_counter() - start, step + 1
        seconds += took
        speed, mfu, eta = tokens / took, tokens / took / full_speed, (steps - done) * seconds / done
        line = f"{name} {done:5d}/{steps} | loss {loss:.3f} | lr {lr:.1e} | grad {norm:.2f} | {speed / 1e3:.2f}k tok/s"
        line += f" | MFU {100 * mfu:.0f}% | eta {eta // 60:.0f}m{eta % 60:02.0f}s"
        log({"step": done, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": done * tokens, "tokens_per_s": speed, "mfu": mfu,
             "seconds": seconds}, line, last=done == steps)
        if done % cfg.save_every == 0 and done < steps:
            state = {"identity": identity, "step": done, "seconds": seconds, "mixture": mixture.state()}
            state |= {"optimizer": optimizer.state_dict(), "model": whole_state.get_model_state_dict(model, options=WHOLE)}
            if world.main:  # all ranks have sent their shards
                write_atomically(snapshot, functools.partial(torch.save, state))
            del state  # a copy of all weights

    weights = whole_state.get_model_state_dict(model, options=WHOLE)  # whole on rank 0
    if world.main:
        tokenizer.save(folder)
        model.save_pretrained(folder, weights=weights)
    if world.main or world.mesh is not None:  # a sharded model answers only where all ranks ask
        scores = bits_per_byte(model.eval(), tokenizer, Path(cfg.out) / "data" / "heldout", cfg.eval_bytes)
    if world.main:
        dealt = mixture.mixture if stage.sft else mixture
        filled, realised = sum(dealt.given.values()) / (steps * tokens), dealt.realised()
        line = f"{name}: held-out bits per byte " + ", ".join(f"{n} {s:.3f}" for n, s in scores.items())
        record = {"bits_per_byte": scores, "filled": filled, "realised": realised, "asked": shares}
        if stage.sft:  # samples: admitted, and refused for which reason
            record |= {"samples": mixture.gate, "rates": mixture.rates, "moves": mixture.moves}
        log(record, f"{line} | rows filled {100 * filled:.1f}% | shares {listed(realised, 2)}", last=True)
        snapshot.unlink(missing_ok=True)
    if world.size > 1:
        dist.barrier()
    return folder


# ---- how good is a checkpoint? ---------------------------------------------------------------------------------------


def heldout_documents(heldout: Path, max_bytes: int) -> dict[str, list]:
    """
    {language: the first held-out documents of data.py's `code`, at most max_bytes together}, the languages with most bytes first.

    A document has a name, its project, its text and nbytes, the length of that in UTF-8.
    """
    file, tokenizer = data.TokenFile(heldout, "code"), data.Tokenizer.load(heldout.parent / "tokenizer")
    chosen, size = defaultdict(list), Counter()
    for i, nbytes in enumerate(file.nbytes.tolist()):
        language = file.language(i)
        if size[language] + nbytes <= max_bytes:
            text = tokenizer.decode(file.ids(i)[1:-1])  # without the two ends of text
            chosen[language].append(SimpleNamespace(name=f"file_{i}", project=file.project(i), text=text, nbytes=nbytes))
            size[language] += nbytes
    return {name: chosen[name] for name in sorted(chosen, key=lambda name: -size[name])}


@torch.no_grad()
def heldout_bits(model, tokenizer, documents: dict[str, list]) -> dict[str, tuple[list, list]]:
    """
    {language: (bits of each document, its bytes)}, where the model reads the documents in its own tokens.

    bits = sum of -log2 p over all tokens but the first, the start token; the closing end of text included. A document that is longer than
    the context is cut into windows that overlap by one token, so that each token is predicted exactly once. bytes = its UTF-8 length.
    """
    context, device, found = model.config.max_position_embeddings, model.lm_head.weight.device, {}
    size = max(1, 4096 // context)  # rows of a batch
    for language, some in documents.items():
        nats = torch.zeros(len(some), dtype=torch.float64)
        tokens = [torch.tensor(tokenizer.encode_parts(data.plain_parts(document.text))[0]) for document in some]
        windows = [(i, ids[a : a + context + 1]) for i, ids in enumerate(tokens) for a in range(0, len(ids) - 1, context)]
        windows.sort(key=lambda window: len(window[1]))  # rows of like length together: little padding
        for start in range(0, len(windows), size):
            owners, batch = zip(*[(i, window.to(device)) for i, window in windows[start : start + size]])
            inputs = torch.nn.utils.rnn.pad_sequence([w[:-1] for w in batch], batch_first=True)
            targets = torch.nn.utils.rnn.pad_sequence([w[1:] for w in batch], batch_first=True, padding_value=-100)
            nats.index_add_(0, torch.tensor(owners), model.loss(inputs, targets, reduction="none").sum(1).double().cpu())
        found[language] = (nats / math.log(2)).tolist(), [document.nbytes for document in some]
    return found


def bits_per_byte(model, tokenizer, heldout: Path, max_bytes: int) -> dict[str, float]:
    """{language: bits per byte}. Lower is better, and any two models can be compared, whatever their vocabularies."""
    found = heldout_bits(model, tokenizer, heldout_documents(heldout, max_bytes))
    return {name: sum(bits) / sum(size) for name, (bits, size) in found.items()}


def evaluation_table(checkpoint: Path, documents: dict[str, list], world: World, git: str, n_tasks: int, n_samples: int, seed: int):
    """
    Yields rows (metric, of what, value) for one checkpoint, as they are measured. A value is a number, or (numerators, denominators) by
    document, hole or task, so that interval() can say how sure it is.

    bits per byte    of held-out projects by language; beside it what gzip and xz need for the same Python files
    fim              exact match, edit similarity and parse rate by level, with and without similar files of the same project
    commits          patch bits per byte and the file guessed right, on triplets of --git REPO
    chance           what an answer at random solves, by family of tasks.py at levels 1 and 2, on held-out templates
    no trace         pass@1 of a thinking model whose thought is closed before it begins
    pass@k           unbiased, on the same tasks
    thinks           answers that open and close a thought
    beyond           how cheap the solutions of compose are among the references, by instructions (0 where wrong)
    """
    model = LoopCoder.from_pretrained(checkpoint, device=world.device, dtype=torch.float32).eval()
    tokenizer, changes = data.Tokenizer.load(checkpoint), list(commits.triplets(git)) if git else []
    for language, pair in heldout_bits(model, tokenizer, documents).items():
        yield "bits per byte", language, pair
    projects, everywhere = defaultdict(dict), defaultdict(list)
    for document in documents.get("python", ()):
        projects[document.project][f"{document.name}.py"] = document.text
    texts = [text.encode() for files in projects.values() for text in files.values()]
    if texts:
        packed = {"gzip -9, one by one": sum(len(gzip.compress(text, 9)) for text in texts)}
        packed["xz -9, all together"] = len(lzma.compress(b"".join(texts), preset=9))
        for name, size in packed.items():
            yield "bits per byte", f"python by {name}", 8 * size / sum(map(len, texts))
    for row in fim.evaluate(model, tokenizer, projects, count=n_tasks, context=min(1024, model.config.max_position_embeddings)):
        for metric, values in row["marks"].items():
            yield f"fim {metric}, %", f"{row['level']}, {row['context']} context", (values, [1] * len(values))
            everywhere[metric] += values
    for metric, values in everywhere.items():
        yield f"fim {metric}, %", "all", (values, [1] * len(values))
    if git:
        for name, value in commits.evaluate(model, tokenizer, changes).items():
            yield "commits", name, value
    thinking, thoughts = "thinking" in checkpoint.absolute().name, []
    for family in tasks.FAMILIES:
        levels = [[tasks.generate(family, level, tasks.ASKED + k, "test") for k in range(n_tasks)] for level in (1, 2)]
        problems, guesses = sum(levels, []), sum((tasks.guesses(level, n_samples) for level in levels), [])
        yield "chance", family, tuple(zip(*mark(problems, guesses)))
        if thinking and family != "swe":  # an agent acts, and thinks nothing aloud
            silent = sample_answers(model, tokenizer, problems, n_samples, False, seed, opening="<think>\n</think>\n\n")
            yield "no trace", family, tuple(zip(*mark(problems, silent)))
        answers = sample_answers(model, tokenizer, problems, n_samples, thinking, seed)
        marks = mark(problems, answers)
        for k in sorted({1, n_samples}):
            yield f"pass@{k}", family, tuple(zip(*[(tasks.pass_at_k(n, int(c), k), 1) if n >= k else (0, 0) for c, n in marks]))
        if family != "swe":
            thoughts += [(sum(text.startswith("<think>") and "</think>" in text for text in some), len(some)) for some in answers]
        if family == "compose":
            yield "beyond", family, tuple(zip(*mark(problems, answers, tasks.efficiency)))
    yield "thinks", "all families", tuple(zip(*thoughts))


def interval(a, b=None):
    """
    (value, low, high): the metric a, or its paired difference a - b, with the 95 % bootstrap interval over the same N tasks, 4,000 draws.

    a, b: (numerators (N,), denominators (N,)); sum / sum serves means and conditional shares alike. nan where there are no cases at all.
    """
    a, b = (pair and tuple(np.asarray(x, dtype=float) for x in pair) for pair in (a, b))
    if not len(a[0]):
        return (math.nan,) * 3
    index = np.random.default_rng(0).integers(0, len(a[0]), (4000, len(a[0])))

    def ratio(pair, at=None):
        above, below = (x.sum() if at is None else x[at].sum(1) for x in pair)
        return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)

    value, spread = ratio(a), ratio(a, index)
    if b is not None:
        value, spread = value - ratio(b), spread - ratio(b, index)
    spread = spread[~np.isnan(spread)]
    low, high = np.quantile(spread, [0.025, 0.975]) if len(spread) else (math.nan, math.nan)
    return float(value), float(low), float(high)


def evaluate(checkpoint: Path, cfg: TrainConfig, world: World, git: str, n_tasks: int, n_samples: int, against: str) -> None:
    """Print the table of a checkpoint, beside it the gain over that of `against`, and leave it as table.json beside the weights."""
    documents = heldout_documents(Path(cfg.out) / "data" / "heldout", cfg.eval_bytes)
    before, cases = {}, {"tasks": n_tasks, "bytes": {language: sum(d.nbytes for d in some) for language, some in documents.items()}}
    if against:
        path = Path(against) / "table.json"
        if not path.exists():
            raise ValueError(f"--against {against}: no table.json there; run --eval {against} with the same --tasks and --samples first")
        before = json.loads(path.read_text())
        if before.get("cases") != cases:
            raise ValueError(f"--against {against}: evaluated on {before.get('cases')}, not {cases}; run --eval {against} alike")
    table, clear = {"cases": cases}, []
    for what, which, value in evaluation_table(checkpoint, documents, world, git, n_tasks, n_samples, cfg.seed):
        table[f"{what} {which}"], old = value, before.get(f"{what} {which}")
        if isinstance(value, tuple):
            beside = {"gain": old} | {f"over {word}": table.get(f"{word} {which}") for word in ("chance", "no trace") if what == "pass@1"}
            gains = {word: interval(value, other) for word, other in beside.items() if other}
            line = "{:8.4f} [{:.3f}, {:.3f}]".format(*interval(value))
            line += "".join("   {} {:+.3f} [{:+.3f}, {:+.3f}]".format(word, *gain) for word, gain in gains.items())
            if what == "pass@1" and all(gains[word][1] > 0 for word in ("gain", "over chance") if word in gains):
                clear.append(which)
        else:
            line = f"{value:8.4f}" + (f"   gain {value - old:+8.4f}" if isinstance(old, float) else "")
        print(f"{what:<22} {which:<34} {line}", flush=True)
    print(f"clearly above chance{f' and {against}' * bool(against)}: {len(clear)} families of {len(tasks.FAMILIES)} ({', '.join(clear)})")
    write_atomically(checkpoint / "table.json", lambda at: at.write_text(json.dumps(table) + "\n"))


# ---- the chain and its pictures --------------------------------------------------------------------------------------


def chain(cfg: TrainConfig, world: World) -> None:
    """Build the data when there is none, then run the stages in order; with --resume, finished stages are kept."""
    preset, out = PRESETS[cfg.preset], Path(cfg.out)
    for start in (STAGES[name].start for name in cfg.wanted):
        if start and start not in cfg.wanted and not (out / start / "config.json").exists():
            raise ValueError(f"--stages {cfg.stages}: {out / start} is not there to start from; run --stages {start} first")
    if world.main and not (out / "data" / "manifest.json").exists():
        megabytes = preset.max_mb and max(6, preset.max_mb * cfg.scale)  # less could not fill the vocabulary; 0 is everything
        data.build(out / "data", cfg.source, shape_of(cfg).vocab_size, max_bytes=int(megabytes * 1e6))
    if world.main and not cfg.resume:  # no later --resume may take for this run's own what an earlier one left
        for name in cfg.wanted:
            (out / name / "state.pt").unlink(missing_ok=True)
            if (out / name / "log.jsonl").exists():
                (out / name / "log.jsonl").write_text("")  # see is_finished
    if world.size > 1:
        dist.barrier()
    for name, stage in STAGES.items():
        if name in cfg.wanted and cfg.resume and is_finished(out / name):
            if world.main:
                print(f"{name}: complete, kept")
        elif name in cfg.wanted:
            train_stage(stage, cfg, world)


def plot(out: Path) -> Path:
    """Draw the loss of every stage, one after the other, and the held-out bits per byte at their ends, to chain.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), gridspec_kw={"width_ratios": [2, 1]}, layout="tight")
    tokens, scores = 0, {}
    for name in STAGES:
        path = out / name / "log.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        steps = [r for r in records if "loss" in r]
        if steps:
            left.plot([(tokens + r["tokens"]) / 1e6 for r in steps], [r["loss"] for r in steps], label=name, lw=1)
            tokens += steps[-1]["tokens"]
        scores.update((name, r["bits_per_byte"]) for r in records if "bits_per_byte" in r)
    if not scores:
        raise ValueError(f"{out}: no finished stage to draw; run python train.py first")
    left.set(xlabel="million tokens", ylabel="loss, nats a token", title="training")
    left.legend()
    for language in next(iter(scores.values())):
        right.plot(list(scores), [s.get(language, math.nan) for s in scores.values()], "o-", label=language)
    right.set(ylabel="bits per byte", title="held-out projects")
    right.legend(fontsize=7)
    figure.savefig(out / "chain.png", dpi=120)
    return out / "chain.png"


# ---- what a run is going to need -------------------------------------------------------------------------------------

DEVICE_FLOPS, LINK_BYTES, MEMORY_BYTES = 400e12, 350e9, 3e12  # assumed a second: sustained bfloat16, NVLink one way, HBM of one GPU


def kept_bytes(config, tokens, dtype):
    """
    Bytes that autograd keeps of a row for the backward pass, with weights of a dtype: runs of one and two layers on the meta device, which
    computes nothing.
    """
    if config.num_hidden_layers > 2:
        one, two = (kept_bytes(dataclasses.replace(config, num_hidden_layers=n), tokens, dtype) for n in (1, 2))
        return one + (config.num_hidden_layers - 1) * (two - one)
    with torch.device("meta"):
        model, ids = LoopCoder(config).to(dtype), torch.zeros(1, tokens, dtype=torch.int64)
    model.compute_dtype, kept = torch.bfloat16, {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    keep = lambda x: kept.setdefault(x.untyped_storage()._cdata, x)  # one entry a storage, however many tensors look into it
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _loss = model.loss(ids, ids, reduction="sum")
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


def layer_parameters(config) -> int:
    """Parameters of the matrices inside the layers, which Muon updates; AdamW has the rest."""
    return parameter_count(config)[1] - config.vocab_size * config.hidden_size  # the head is counted with the matrices there


def state_bytes(config, optimizer: str) -> tuple[int, int]:
    """Bytes of (the weights, what the optimizer remembers), float32: one moment of the layers' matrices with muon, two of all else."""
    P = parameter_count(config)[0]
    return 4 * P, 8 * P - (4 * layer_parameters(config) if optimizer == "muon" else 0)


def weight_traffic(config, ranks, sharded, micro_batches, optimizer):
    """Bytes of weights and gradients that a rank sends in a step."""
    layers, R = layer_parameters(config), config.loop_num
    rest = parameter_count(config)[0] - layers
    if not sharded:
        return 2 * (ranks - 1) / ranks * 4 * (layers + rest)  # one all-reduce of float32 gradients
    gathered, scattered = 2 * (2 * R * layers + rest), 4 * (R * layers + rest)  # bfloat16 weights for every pass, float32 sums
    return (ranks - 1) / ranks * (micro_batches * (gathered + scattered) + 6 * layers * (optimizer == "muon"))


def busiest(context, cp, width, window):
    """Bytes (forward, backward) that the busiest rank sends for one attention over a ring."""
    return np.max([ring_bytes(context, cp, rank, width, window) for rank in range(cp)], axis=0)


def ring_traffic(config, context, cp, again):
    """Bytes of keys and values that the busiest rank sends for a row; again: the backward pass computes the forward once more."""
    if cp == 1:
        return 0
    width, R = config.num_key_value_heads * config.head_dim, config.loop_num
    views = ((EVERYTHING, R), (config.loop_window_size, R - 1))  # those of pass 1 travel in every pass, the window's in the later ones
    sent = [(passes, *busiest(context, cp, width, window)) for window, passes in views]
    return config.num_hidden_layers * sum(passes * (forward * (1 + again) + backward) for passes, forward, backward in sent)


def ring_plan(config, context, cp) -> None:
    """Print the paper calculation: what one step of the ring sends and computes, and whether the one hides behind the other."""
    width, c = config.num_key_value_heads * config.head_dim, context // (2 * cp)
    flops = 8 * c * c * config.num_attention_heads * config.head_dim  # two blocks of c queries by c keys, two products each
    assumed = f"{LINK_BYTES / 1e9:.0f} GB/s and {DEVICE_FLOPS / 1e12:.0f} TFLOP/s assumed"
    print(f"{context} tokens on a ring of {cp}, one layer and pass, busiest rank, {assumed}:")
    for name, size, work in (("forward", 2 * 2 * 2 * c * width, flops), ("backward", 2 * 2 * c * width * (2 + 4), 2.5 * flops)):
        sends, computes = size / LINK_BYTES, work / DEVICE_FLOPS
        print(f"  {name:8} step: {size / 1e6:6.1f} MB in {1e3 * sends:.2f} ms behind {work / 1e12:.2f} TFLOP in {1e3 * computes:.1f} ms "
              f"({computes / sends:.0f} times as long)")
    (forward, backward), halo = (busiest(context, cp, width, window) / 1e6 for window in (EVERYTHING, config.loop_window_size))
    print(f"  a rank sends {forward:.0f} MB forward and {backward:.0f} MB backward; the window's halo {halo[0]:.2f} and {halo[1]:.2f} MB")


def dry_run(cfg: TrainConfig, ranks: int = 0) -> None:
    """Print what the preset is going to need, without doing it: everything is counted on the meta device."""
    preset, config = PRESETS[cfg.preset], shape_of(cfg)
    batch, micro = cfg.batch_tokens or preset.batch_tokens, cfg.micro_batch_tokens or GPU_MICRO_BATCH
    P, (weights, moments) = parameter_count(config)[0], state_bytes(config, cfg.optimizer)
    ranks = ranks or max(cfg.cp, 1 if P < 5e8 else 8 if P < 5e9 else 64)
    if ranks < 1 or cfg.cp < 1 or ranks % cfg.cp:
        raise ValueError(f"--ranks {ranks}: must be a multiple of --cp {cfg.cp}, and both 1 or more")
    sharded = ranks > 1 and shards_weights(cfg)
    shards = ranks if sharded else 1
    cps = {context: cfg.cp if cfg.cp > 1 else min(ranks, max(1, context // 16384)) for context in preset.contexts}
    where = "in shards" if sharded else "whole on each rank"
    print(f"{cfg.preset} on {ranks} rank(s): {P / 1e9:.3f}B parameters, {where}; {preset.minutes}")
    print(f"ring, weights: GB that a rank sends in a step; days: at {DEVICE_FLOPS / 1e12:.0f} TFLOP/s a rank (assumed)")
    print("       stage context  cp   tokens   steps FLOP/token     FLOP    ring weights    days")
    hashed, checks = (2 * (weights + moments) + weights) / shards, {}  # before and after each update; the gradients
    for stage in STAGES.values():
        (context, rows, steps), tokens = sizes(stage, cfg), preset.tokens[stage.tokens] * cfg.scale
        cp, flops = cps[context], flops_per_token(config, context)
        ring = ring_traffic(config, context, cp, cfg.recompute or sharded) * math.ceil(rows / (ranks // cp))
        micro_batches = math.ceil(math.ceil(rows * cp / ranks) / max(1, micro // context))
        traffic = weight_traffic(config, ranks, sharded, micro_batches, cfg.optimizer)
        seconds = rows * context * flops / DEVICE_FLOPS / ranks
        checks[stage.name] = 2 * (hashed + 2 * ring) / MEMORY_BYTES / seconds  # all is read twice; the ring's bytes at both ends
        print(f"{stage.name:>12} {context:7d} {cp:3d} {tokens:8.3g} {steps:7d} {flops:10.3g} {tokens * flops:8.3g} "
              f"{ring / 1e9:7.1f} {traffic / 1e9:7.1f} {tokens * flops / DEVICE_FLOPS / ranks / 86400:7.3g}")
    print("memory a rank, GiB; activations kept, or recomputed layer by layer (--recompute; always with shards)")
    held = {context: max(1, micro // context) * context // cp for context, cp in cps.items()}
    L, R, C, width = config.num_hidden_layers, config.loop_num, config.hidden_size, config.num_key_value_heads * config.head_dim
    dtype, layers = torch.bfloat16 if sharded else torch.float32, layer_parameters(config)
    state = {
        "weights": weights / shards,
        "gradients": weights / shards * (2 if shards == 1 < ranks else 1),  # DDP reduces from a second copy
        "optimizer": moments / shards,
        "gathered": 2 * (2 * (P - layers + 2 * layers / L)) * sharded,  # bfloat16 weights and gradients: ends, this layer, the next
    }
    for tokens in sorted(set(held.values())):
        one = kept_bytes(dataclasses.replace(config, num_hidden_layers=1), tokens, dtype)
        inputs = 2 * tokens * L * (C * R + 2 * width * (R > 1))
        plan = state | {"kept": kept_bytes(config, tokens, dtype), "recomputed": inputs + one}
        parts = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in plan.items())
        rows = ", ".join(str(context) for context in held if held[context] == tokens)
        total = [(sum(state.values()) + plan[what]) / 2**30 for what in ("kept", "recomputed")]
        print(f"  {tokens} tokens at a time (rows of {rows}): {parts}; all {total[0]:.1f} or {total[1]:.1f}")
    again = (1 + (ranks > 1)) / cfg.recheck_every / max(1, batch // ranks // micro) if cfg.recheck_every else 0
    most = max(checks, key=checks.get)
    print(f"silent errors: fingerprints of {hashed / 1e9:.2f} GB a step and of all that goes round the ring (read by rows and by "
          f"columns, at {MEMORY_BYTES / 1e12:.0f} TB/s) take {checks[most]:.2%} of a step in {most}, the most; re-computation {again:.2%}")
    if ranks >= 8:
        ring_plan(config, preset.contexts[-1], 8)


def bench(cfg: TrainConfig, world: World) -> None:
    """Muon beside AdamW: a quarter of pre-training each, same weights, data and rate; tokens/s, MFU, and held-out bits per byte."""
    data.Tokenizer.load(Path(cfg.out) / "data" / "tokenizer")  # says so where there is no data
    print(f"matrix product {device_peak(world.device, world.dtype) / 1e9:.0f} GFLOP/s, {world.dtype}, batches of the preset {cfg.preset}")
    rows = []
    for kind in ("muon", "adamw"):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "data").symlink_to((Path(cfg.out) / "data").resolve())
            run = dataclasses.replace(cfg, out=folder, optimizer=kind, scale=0.25 * cfg.scale)
            log = (train_stage(STAGES["pretrain"], run, world) / "log.jsonl").read_text().splitlines()
        *steps, last = map(json.loads, log)
        speed, mfu = (float(np.median([step[name] for step in steps])) for name in ("tokens_per_s", "mfu"))
        bits = ", ".join(f"{language} {value:.3f}" for language, value in last["bits_per_byte"].items())
        rows.append(f"{kind:>6}: {speed:6.0f} tokens/s, MFU {100 * mfu:.0f}%, bits per byte {bits}")
    print("\n".join(rows))


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv=None):
    """Read the options, then draw, plan, evaluate or train."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=f"Train the chain of checkpoints ({', '.join(STAGES)}) on real code and verified tasks, one folder a stage under "
        "--out; build the corpus first if it is not there. With --eval, print one table for a checkpoint instead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in dataclasses.fields(TrainConfig):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    parser.add_argument("--eval", metavar="CKPT", help="print one table for this checkpoint and leave")
    parser.add_argument("--against", default="", metavar="CKPT", help="with --eval: gains over this one, evaluated before, task by task")
    parser.add_argument("--git", default="", metavar="REPO", help="with --eval: also how well the commits of this repository are foreseen")
    parser.add_argument("--tasks", type=int, default=8, help="with --eval: problems a family and level, and holes a level")
    parser.add_argument("--samples", type=int, default=8, help="with --eval: answers a problem; 1 is the likeliest one")
    parser.add_argument("--bench", action="store_true", help="Muon beside AdamW on a quarter of pre-training (needs OUT/data), and leave")
    parser.add_argument("--plot", action="store_true", help="draw the chain's curves to OUT/chain.png and leave (needs matplotlib)")
    parser.add_argument("--dry-run", action="store_true", help="print what the preset needs of memory, time and traffic, and leave")
    parser.add_argument("--ranks", type=int, default=0, help="with --dry-run: processes to plan for; 0: 1, 8 or 64, by size")
    args = parser.parse_args(argv)
    cfg = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})
    for name in ("tasks", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if args.dry_run:
        return dry_run(cfg, args.ranks)
    if args.plot:
        return print(plot(Path(cfg.out)))
    world = start_world(cfg)
    if (args.eval or args.bench) and world.size > 1:
        raise ValueError("--eval and --bench run in one process; start them without torchrun")
    if args.eval:
        return evaluate(Path(args.eval), cfg, world, args.git, args.tasks, args.samples, args.against)
    if args.bench:
        return bench(cfg, world)
    if world.main:
        print(f"train.py: {json.dumps(dataclasses.asdict(cfg))}\n{world.device}, {world.dtype}, {world.size} process(es)")
    with watch(world):
        chain(cfg, world)
    end_world()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, SilentError, LostRank) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit({SilentError: 3, LostRank: 4}.get(type(error), 2))
    except KeyboardInterrupt:
        sys.exit(130)
