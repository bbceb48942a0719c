"""
The code-flow pipeline: one loop that runs every stage of the report's Figure 2, and the table that says how the stages differ.

    pretrain -> anneal -> mid1 (32k) -> mid2 (128k)

A stage is a row of STAGES: where it starts from, how long its rows are, what it reads and in which shares, and the shape of its
learning rate. A *preset* scales the whole chain to a machine: `nano` takes minutes on two CPU cores, with contexts at the ratios of the
report; `7b` to `40b-loop` are the report's own shapes. Nothing else changes between stages, so there is one loop, train_stage().

Read STAGES first, then train_stage(); what comes between them is the optimizer (AdamW for vectors and embeddings, Muon for the
matrices) and the one number that judges a language model without asking which tokenizer it has: bits per byte of held-out projects.

Source: LoopCoder report, Figure 2 and Table 2 (token shares of the mid-training stages); schedules: the report gives words only, the
numbers are ours. Where we differ: one node; a category of the mixture that has no data is reported, and its share goes to the others.

    python train.py                         # the whole nano chain, data included: minutes on two cores
    python train.py --stages pretrain       # one stage
    python train.py --resume                # go on where a killed run stopped, bit for bit on the CPU
    python train.py --eval out/mid2         # one table for one checkpoint
    python train.py --preset 40b-loop --dry-run
    torchrun --nproc_per_node 8 train.py --preset small
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import lzma
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from model import LoopCoder, LoopCoderConfig, flops_per_token, matmul_peak, parameter_count

# ---------------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Stage:
    name: str
    start: str | None  # the stage whose checkpoint this one starts from; None: random weights
    context: int  # 0, 1, 2: which of the preset's three row lengths
    tokens: float  # share of the preset's token budget
    peak: float  # learning rate after warm-up, as a share of the preset's
    end: float  # learning rate at the end, likewise
    hold: float  # share of the steps spent at `end`: the extended low-rate phase
    mixture: dict[str, float]  # category of data.py -> share of the tokens
    rope_theta: float | None = None  # the base of the rotary embedding from this stage on


# The report's Table 2 in billions of tokens, by category of data.py: reasoning QA, agent trajectories, commits, file-level and
# repository-level code (half of it fill-in-the-middle), and a down-sampled share of the first stage.
MID1 = {"reasoning": 175, "agent": 10, "commit": 5, "file": 35, "repo": 5, "code": 70}
MID2 = {"reasoning": 65, "agent": 110, "commit": 35, "file": 5, "repo": 35, "code": 50}

STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", None, 0, 0.70, peak=1.0, end=0.5, hold=0.0, mixture={"code": 0.97, "text": 0.03}),
        Stage("anneal", "pretrain", 0, 0.15, peak=0.5, end=0.05, hold=0.1, mixture={"quality": 0.5, "code": 0.5}),
        Stage("mid1", "anneal", 1, 0.075, peak=0.3, end=0.03, hold=0.1, mixture=MID1),
        Stage("mid2", "mid1", 2, 0.075, peak=0.3, end=0.03, hold=0.1, mixture=MID2, rope_theta=500_000.0),
    )
}


@dataclass(frozen=True)
class Preset:
    contexts: tuple[int, int, int]  # row lengths of pre-training, mid1, mid2
    tokens: float  # token budget of the chain up to mid2
    batch_tokens: int  # tokens of one optimizer step
    lr: float  # peak learning rate of pre-training
    vocab_size: int
    max_mb: float  # corpus size, MB of text; 0: everything
    minutes: str  # what to expect, in words


PRESETS = {
    "nano": Preset((512, 1024, 4096), 1.3e6, 4096, 3e-3, 8192, 24, "minutes on two CPU cores"),
    "small": Preset((2048, 8192, 32768), 1.5e9, 262_144, 1.5e-3, 32768, 0, "an hour or two on one GPU"),
    "node": Preset((4096, 32768, 131072), 20e9, 1_048_576, 1e-3, 65536, 0, "days on eight GPUs"),
    "7b": Preset((8192, 32768, 131072), 12.6e12, 8_388_608, 3e-4, 76800, 0, "the report's run"),
    "14b": Preset((8192, 32768, 131072), 12.6e12, 8_388_608, 3e-4, 76800, 0, "the report's run"),
    "40b": Preset((8192, 32768, 131072), 12.6e12, 8_388_608, 2e-4, 76800, 0, "the report's run"),
    "40b-loop": Preset((8192, 32768, 131072), 12.6e12, 8_388_608, 2e-4, 76800, 0, "the report's run"),
}


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    preset: str = flag("nano", "scale of the whole chain: " + ", ".join(PRESETS))
    stages: str = flag("all", "comma-separated stages to run, or all")
    out: str = flag("out", "folder of the chain: one folder a stage")
    source: str = flag("python", "corpus, where out/data is not built yet: python, a folder, a git repository")
    scale: float = flag(1.0, "multiplies the token budget and the corpus size; 0.02 is a rehearsal")
    seed: int = flag(1337, "seed of the weights and of the data order")
    resume: bool = flag(False, "keep finished stages and go on in the unfinished one")
    lr: float = flag(0.0, "peak learning rate; 0: the preset's")
    optimizer: str = flag("muon", "muon (for the matrices, AdamW for the rest) or adamw")
    weight_decay: float = flag(0.1, "decoupled weight decay of the matrices")
    clip: float = flag(1.0, "largest gradient norm")
    micro_batch_tokens: int = flag(0, "tokens of one forward and backward; 0: chosen by device")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "bfloat16 or float32 for the forward and backward; master weights are float32 always")
    compile: str = flag("auto", "on, off; auto: where it wins")
    threads: int = flag(0, "CPU threads; 0: torch's choice")
    save_every: int = flag(100, "steps between snapshots that --resume goes on from")
    eval_bytes: int = flag(200_000, "held-out bytes a language for the bits per byte at the end of each stage")

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset}: unknown; one of {', '.join(PRESETS)}")
        unknown = [name for name in self.stages.split(",") if name not in STAGES and name != "all"]
        if unknown:
            raise ValueError(f"--stages {self.stages}: no stage {unknown[0]!r}; one of all, {', '.join(STAGES)}")
        choices = {"optimizer": ("muon", "adamw"), "dtype": ("auto", "bfloat16", "float32"), "compile": ("auto", "on", "off")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(allowed)}")
        if self.scale <= 0:
            raise ValueError(f"--scale {self.scale}: must be above 0")


# ---------------------------------------------------------------------------------------------- schedule and optimizer


def learning_rate(step, steps, peak, end, hold=0.0, warmup=0.02):
    """
    Learning rate of step (0-based) of a stage of `steps`: linear warm-up, cosine from peak to end, then `hold` of the steps at end.

        lr(t) = end + (peak - end) * (1 + cos(pi u)) / 2,   u = min(1, (t - warm) / ((1 - hold) T - warm))

    The flat tail is the report's "extended low-rate phase" (section 4.2).
    """
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    u = min(1.0, (step - warm) / max(1, (1 - hold) * steps - warm))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * u))


class Optimizer:
    """
    Muon for the matrices inside the layers, AdamW for embeddings, head, norms and gates.

    The weights are float32 (the model casts them where it computes in bfloat16), so that small updates are not lost to rounding.
    Muon's rate is scaled to AdamW's update size (match_rms_adamw), so one rate serves both.
    """

    def __init__(self, model, kind="muon", weight_decay=0.1):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        matrices = [p for n, p in named if ".layers." in n and n.endswith("proj.weight")]
        inside = {id(p) for p in matrices}
        rest = [p for p in self.params if id(p) not in inside]
        if kind == "muon":
            muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts = [muon, torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]
        else:
            groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
            self.parts = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]

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
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state):
            part.load_state_dict(saved)


# ---------------------------------------------------------------------------------------------- processes, device, model


@dataclass
class World:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    compiled: bool

    @property
    def main(self):
        return self.rank == 0


def start_world(cfg: TrainConfig) -> World:
    """The process group (when under torchrun), the device and the number format of this process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and size > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    fast_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32, "auto": torch.bfloat16 if fast_bf16 else torch.float32}[cfg.dtype]
    return World(rank, size, device, dtype, compiled=cfg.compile != "off")


class Loss(torch.nn.Module):
    """The training path of the model as a module of its own, so that DistributedDataParallel can wrap it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, targets, segment_ids):
        return self.model.loss(input_ids, targets, segment_ids, reduction="sum")


def loss_function(model, world: World):
    loss = Loss(model)
    if world.compiled:
        loss.compile()
    return torch.nn.parallel.DistributedDataParallel(loss) if world.size > 1 else loss


# ---------------------------------------------------------------------------------------------- the loop


def micro_batches(batch, world: World, micro_rows: int):
    """This rank's rows of the global batch as tensors, in pieces of micro_rows: every rank gets the same number of pieces."""
    mine = [torch.from_numpy(part[world.rank :: world.size]).to(world.device) for part in batch]
    return list(zip(*(part.split(micro_rows) for part in mine)))


def gradient(loss_fn, batch, world: World, micro_rows: int) -> float:
    """
    Accumulate the gradient of the mean loss per learned token of the whole global batch; returns that mean (float, nats).

    Every micro-batch contributes its *sum* over tokens divided by the token count of the global batch, so neither the split into
    micro-batches nor the split over ranks changes the gradient. DDP averages over ranks; times world.size undoes it.
    """
    learned = int((batch[1] != -100).sum())
    total = torch.zeros((), device=world.device)
    pieces = micro_batches(batch, world, micro_rows)
    for n, (input_ids, targets, segment_ids) in enumerate(pieces):
        last = n == len(pieces) - 1
        with contextlib.nullcontext() if last or world.size == 1 else loss_fn.no_sync():
            loss = loss_fn(input_ids, targets, segment_ids)
            (loss * (world.size / learned)).backward()
        total += loss.detach().float()
    if world.size > 1:
        dist.all_reduce(total)
    return float(total) / learned


def write_atomically(path: Path, write):
    """write(temporary path), then rename: a killed process or a full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Log:
    """One line that rewrites itself on a terminal, a line every few seconds elsewhere, and every record in log.jsonl."""

    def __init__(self, path: Path, world: World, append: bool):
        self.main, self.shown = world.main, 0.0
        self.terminal = sys.stdout.isatty()
        self.file = open(path, "a" if append else "w") if self.main else None

    def __call__(self, record: dict, line: str, last=False):
        if not self.main:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.terminal:
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
        elif last or time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            print(line, flush=True)


def share_out(mixture: dict[str, float], present) -> tuple[dict[str, float], dict[str, float]]:
    """(shares of the categories that have data, normalised to 1; shares of the absent ones)."""
    total = sum(mixture.values())
    shares = {name: share / total for name, share in mixture.items() if name in present}
    if not shares:
        raise ValueError(f"none of the categories {', '.join(mixture)} has data; run python data.py first")
    left = sum(shares.values())
    return {n: s / left for n, s in shares.items()}, {n: s / total for n, s in mixture.items() if n not in present}


def token_files(folder: Path) -> dict:
    """{category: TokenFile} of one split."""
    return {path.stem: data.TokenFile(folder, path.stem) for path in sorted(folder.glob("*.tokens"))}


def train_stage(stage: Stage, cfg: TrainConfig, world: World) -> Path:
    """
    Train one stage and leave its checkpoint in out/<stage>/; returns that folder.

    The folder holds the released layout (config.json, model.safetensors, tokenizer files), log.jsonl, and while the stage runs
    state.pt: everything that --resume needs (weights, optimizer, data position, step). The model is written last, so its presence means
    that the stage is complete.
    """
    preset, folder = PRESETS[cfg.preset], Path(cfg.out) / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = data.Tokenizer.load(Path(cfg.out) / "data" / "tokenizer")
    context = preset.contexts[stage.context]
    rows = max(world.size, round(preset.batch_tokens / context))
    rows += -rows % world.size
    steps = max(2, round(stage.tokens * preset.tokens * cfg.scale / (rows * context)))
    micro_rows = max(1, (cfg.micro_batch_tokens or (4096 if world.device.type == "cpu" else 32768)) // context)

    torch.manual_seed(cfg.seed)
    if stage.start is None:
        config = LoopCoderConfig.preset(cfg.preset)
        config.vocab_size = tokenizer.vocab_size
        model = LoopCoder(config).to(world.device)
    else:
        model = LoopCoder.from_pretrained(Path(cfg.out) / stage.start, device=world.device, dtype=torch.float32)
    model.compute_dtype = world.dtype
    model.config.max_position_embeddings = context
    model.config.rope_theta = stage.rope_theta or model.config.rope_theta
    model.train()
    peak = cfg.lr or preset.lr
    optimizer = Optimizer(model, cfg.optimizer, cfg.weight_decay)
    files = token_files(Path(cfg.out) / "data" / "train")
    shares, absent = share_out(stage.mixture, files)
    mixture = data.Mixture({n: files[n] for n in shares}, shares, context, rows, seed=cfg.seed + list(STAGES).index(stage.name))

    first, seconds, snapshot = 0, 0.0, folder / "state.pt"
    if cfg.resume and snapshot.exists():
        saved = torch.load(snapshot, map_location=world.device, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        mixture.load_state(saved["mixture"])
        first, seconds = saved["step"], saved["seconds"]
    flops_token = flops_per_token(model.config, context)
    ceiling = matmul_peak(world.device, world.dtype)
    if world.main:
        parts = ", ".join(f"{n} {100 * s:.1f}%" for n, s in shares.items())
        missing = "; absent: " + ", ".join(f"{n} {100 * s:.1f}%" for n, s in absent.items()) if absent else ""
        print(
            f"{stage.name}: {parameter_count(model.config)[0] / 1e6:.2f}M parameters, rows of {context} tokens, {rows * context} tokens a step, "
            f"{steps} steps{f' from step {first}' if first else ''}\n{stage.name}: {parts}{missing}"
        )
    loss_fn = loss_function(model, world)
    log = Log(folder / "log.jsonl", world, append=first > 0)
    for step in range(first, steps):
        start = time.perf_counter()
        lr = peak * learning_rate(step, steps, stage.peak, stage.end, stage.hold)
        loss = gradient(loss_fn, mixture.next(), world, micro_rows)
        norm = optimizer.step(lr, cfg.clip)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{stage.name}, step {step}: the loss is {loss}; the last snapshot is {snapshot}")
        took = time.perf_counter() - start
        seconds += took
        speed = rows * context / took
        eta = (steps - step - 1) * seconds / (step + 1 - min(first, 0))
        record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": (step + 1) * rows * context}
        record |= {"tokens_per_s": speed, "mfu": speed * flops_token / ceiling / world.size, "seconds": seconds}
        line = f"{stage.name} {step + 1:5d}/{steps} | loss {loss:.3f} | lr {lr:.1e} | grad {norm:.2f} | {speed / 1e3:.2f}k tok/s"
        line += f" | MFU {100 * record['mfu']:.0f}% | eta {eta // 60:.0f}m{eta % 60:02.0f}s"
        log(record, line, last=step == steps - 1)
        if world.main and (step + 1) % cfg.save_every == 0 and step + 1 < steps:
            state = {"step": step + 1, "seconds": seconds, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state["mixture"] = mixture.state()
            write_atomically(snapshot, lambda path, state=state: torch.save(state, path))
    finish_stage(model, tokenizer, folder, mixture, shares, log, cfg, world)
    return folder


def finish_stage(model, tokenizer, folder, mixture, shares, log, cfg, world):
    """Write the checkpoint, then judge it: bits per byte of the held-out projects, by language."""
    if world.main:
        tokenizer.save(folder)
        model.save_pretrained(folder)
        (folder / "state.pt").unlink(missing_ok=True)
        model.eval()
        scores = bits_per_byte(model, Path(cfg.out) / "data" / "heldout", cfg.eval_bytes, world)
        realised = ", ".join(f"{n} {100 * s:.2f}%" for n, s in mixture.realised().items())
        line = f"{folder.name}: held-out bits per byte " + ", ".join(f"{n} {s:.3f}" for n, s in scores.items()) + f" | shares {realised}"
        log({"bits_per_byte": scores, "realised": mixture.realised(), "asked": shares}, line, last=True)
    if world.size > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------- how good is a checkpoint?


@torch.no_grad()
def bits_per_byte(model, heldout: Path, max_bytes: int, world: World, languages=None) -> dict[str, float]:
    """
    {language: bits per byte} of the held-out documents of data.py's `code`, at most max_bytes a language.

    bits = sum of -log2 p(token) over every token of the document, the first (after the start token) and the closing end of text
    included; bytes = its UTF-8 length. Documents longer than the context are cut into rows that overlap by one token, so that
    each token is predicted exactly once. Lower is better, and any two models can be compared, whatever their vocabularies.
    """
    file = data.TokenFile(heldout, "code")
    context = model.config.max_position_embeddings
    totals: dict[str, list[float]] = {}
    for i in range(len(file.lengths)):
        language = file.language(i)
        bits, seen = totals.setdefault(language, [0.0, 0])
        if seen + file.nbytes[i] > max_bytes or (languages and language not in languages):
            continue
        totals[language] = [bits + document_bits(model, file.ids(i), context, world), seen + int(file.nbytes[i])]
    return {language: bits / seen for language, (bits, seen) in sorted(totals.items(), key=lambda item: -item[1][1]) if seen}


def document_bits(model, ids, context, world) -> float:
    """-log2 p(ids[1:] | ids[0]) in windows of `context` that overlap by one token."""
    nats = 0.0
    for start in range(0, len(ids) - 1, context):
        window = torch.from_numpy(np.asarray(ids[start : start + context + 1], dtype=np.int64)).to(world.device)[None]
        nats += float(model.loss(window[:, :-1].contiguous(), window[:, 1:].contiguous(), reduction="sum"))
    return nats / math.log(2)


def compressors(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` on each text by itself and of `xz -9` on all of them together: the bars for a language model."""
    size = max(1, sum(map(len, texts)))
    alone = sum(len(gzip.compress(text, 9)) for text in texts)
    return {"gzip -9, one by one": 8 * alone / size, "xz -9, all together": 8 * len(lzma.compress(b"".join(texts), preset=9)) / size}


def evaluation_table(checkpoint: Path, cfg: TrainConfig, world: World) -> list[tuple[str, str, float]]:
    """Rows (what, of which, value) for one checkpoint: every metric that its data allows."""
    model = LoopCoder.from_pretrained(checkpoint, device=world.device, dtype=torch.float32).eval()
    heldout = Path(cfg.out) / "data" / "heldout"
    rows = [("bits per byte", language, value) for language, value in bits_per_byte(model, heldout, cfg.eval_bytes, world).items()]
    tokenizer = data.Tokenizer.load(checkpoint)
    file, size, texts = data.TokenFile(heldout, "code"), 0, []
    for i in range(len(file.lengths)):
        if file.language(i) == "python" and size + file.nbytes[i] <= cfg.eval_bytes:
            texts.append(tokenizer.decode([t for t in file.ids(i).tolist() if t not in tokenizer.special.values()]).encode())
            size += int(file.nbytes[i])
    rows += [("bits per byte", f"python by {name}", value) for name, value in compressors(texts).items()]
    return rows


# ---------------------------------------------------------------------------------------------- the chain and its pictures


def chain(cfg: TrainConfig, world: World) -> None:
    """Build the data when there is none, then run the stages in order; with --resume, finished stages are kept."""
    preset = PRESETS[cfg.preset]
    folder = Path(cfg.out) / "data"
    if world.main and not (folder / "manifest.json").exists():
        data.build(folder, cfg.source, preset.vocab_size, max_bytes=int(preset.max_mb * cfg.scale * 1e6))
    if world.size > 1:
        dist.barrier()
    wanted = list(STAGES) if cfg.stages == "all" else cfg.stages.split(",")
    for stage in (STAGES[name] for name in STAGES if name in wanted):
        done = (Path(cfg.out) / stage.name / "model.safetensors").exists() and not (Path(cfg.out) / stage.name / "state.pt").exists()
        if cfg.resume and done:
            if world.main:
                print(f"{stage.name}: complete, kept")
            continue
        if stage.start and not (Path(cfg.out) / stage.start / "config.json").exists():
            raise ValueError(f"{stage.name} starts from {cfg.out}/{stage.start}, which is not there; run --stages {stage.start} first")
        train_stage(stage, cfg, world)


def plot(out: Path) -> Path:
    """Draw loss and learning rate of every stage, one after the other, and the held-out bits per byte at their ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), gridspec_kw={"width_ratios": [2, 1]})
    tokens, scores = 0, {}
    for name in STAGES:
        path = out / name / "log.jsonl"
        if not path.exists():
            continue
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [r for r in records if "loss" in r]
        left.plot([(tokens + r["tokens"]) / 1e6 for r in steps], [r["loss"] for r in steps], label=name, lw=1)
        tokens += steps[-1]["tokens"] if steps else 0
        for score in (r["bits_per_byte"] for r in records if "bits_per_byte" in r):
            scores[name] = score
    if not scores:
        raise ValueError(f"{out}: no finished stage to draw; run python train.py first")
    left.set(xlabel="million tokens", ylabel="loss, nats a token", title="training")
    left.legend()
    for language in next(iter(scores.values())):
        right.plot(list(scores), [s.get(language, math.nan) for s in scores.values()], "o-", label=language)
    right.set(ylabel="bits per byte", title="held-out projects")
    right.legend(fontsize=7)
    figure.tight_layout()
    path = out / "chain.png"
    figure.savefig(path, dpi=120)
    return path


def dry_run(cfg: TrainConfig) -> None:
    """Print what the preset is going to need, without doing it: the model is built on the meta device."""
    preset = PRESETS[cfg.preset]
    with torch.device("meta"):
        model = LoopCoder(LoopCoderConfig.preset(cfg.preset))
    n = parameter_count(model.config)[0]
    print(f"{cfg.preset}: {n / 1e9:.3f}B parameters; weights, gradients and two moments {16 * n / 2**30:.2f} GiB; {preset.minutes}")
    for stage in STAGES.values():
        context, tokens = preset.contexts[stage.context], stage.tokens * preset.tokens * cfg.scale
        flops = tokens * flops_per_token(model.config, context)
        print(f"{stage.name:>9}: rows of {context:6d}, {tokens:.3g} tokens, {tokens / preset.batch_tokens:.0f} steps, {flops:.3g} FLOP")


# ---------------------------------------------------------------------------------------------- command line


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train the chain of checkpoints (pretrain, anneal, mid1, mid2) on real code, one folder a stage under --out; "
        "build the corpus first if it is not there. With --eval, print one table for a checkpoint instead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in dataclasses.fields(TrainConfig):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type in (bool, "bool"):
            parser.add_argument(name, action="store_true", default=f.default, help=help)
        else:
            parser.add_argument(name, type=type(f.default), default=f.default, help=help)
    parser.add_argument("--eval", metavar="CKPT", help="print one table for this checkpoint and leave")
    parser.add_argument("--plot", action="store_true", help="draw the chain's curves to OUT/chain.png and leave (needs matplotlib)")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory, tokens and FLOPs of the preset and leave")
    given = vars(parser.parse_args(argv))
    extra = {name: given.pop(name) for name in ("eval", "plot", "dry_run")}
    return TrainConfig(**given), extra


def main(argv=None):
    cfg, extra = arguments(argv)
    if extra["dry_run"]:
        return dry_run(cfg)
    if extra["plot"]:
        return print(plot(Path(cfg.out)))
    world = start_world(cfg)
    if extra["eval"]:
        for what, which, value in evaluation_table(Path(extra["eval"]), cfg, world):
            print(f"{what:<16} {which:<32} {value:.4f}")
        return None
    if world.main:
        print(f"train.py: {json.dumps(dataclasses.asdict(cfg))}\n{world.device}, {world.dtype}, {world.size} process(es)")
    chain(cfg, world)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
