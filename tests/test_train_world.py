"""train.py on several processes: shards and rings and replicas, silent errors, ranks that die, and what a dry run foresees.

The tests start this file again as a program, which imports once and forks its ranks.
"""

import collections
import dataclasses
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import data
import model
import train

ROOT = Path(__file__).resolve().parent.parent


def toy_config(out, **changes):
    model.PRESETS["toy"] = model.shape(32, 64, 2, 4, 2, 600, 1024)
    train.PRESETS["toy"] = train.Preset((64, 512, 1024), (28_000, 6_000, 3_000, 3_000, 25_600), 1024, 3e-3, 1.2, "seconds")
    return train.TrainConfig(**{"preset": "toy", "out": str(out), "compile": "off", "dtype": "float32", "eval_bytes": 4000, **changes})


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def rank_of(rank, job, size, port, args):
    """One process: run a job of this file in a world of `size`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    globals()[job](*args)
    gc.collect()
    train.end_world()


def ranks(job, size, *args):
    """Run job(*args) on `size` forked processes (in this one, where that is all)."""
    if size == 1:
        return globals()[job](*args)
    return mp.start_processes(rank_of, (job, size, free_port(), args), nprocs=size, start_method="fork")


def program(job, *args, timeout=500):
    """Run job(*args) in a new interpreter, which may fork."""
    done = subprocess.run([sys.executable, __file__, job, json.dumps(args)], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A chain folder with data built from a bounded sample of the running Python."""
    out = tmp_path_factory.mktemp("chain")
    data.build(out / "data", "python", vocab_size=600, max_bytes=1_200_000, log=lambda line: None)
    return out


def run_chain(out, changes):
    cfg = toy_config(out, **changes)
    train.chain(cfg, train.start_world(cfg))


def losses(out, stage="pretrain"):
    return [json.loads(line)["loss"] for line in (Path(out) / stage / "log.jsonl").read_text().splitlines()[:-1]]


WORLDS = [(1, 1, "off"), (2, 2, "off"), (4, 2, "on")]  # processes, ranks that share a row, shards


def all_worlds(folder):
    changes = {"stages": "pretrain", "recheck_every": 3, "check": "on", "scale": 0.04, "batch_tokens": 256}
    # Adam divides a gradient by its size: at its usual eps, 1e-8, one that is rounding alone would be a whole step, in either direction
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-5)
    for size, cp, fsdp in WORLDS:
        ranks("run_chain", size, f"{folder}/{size}-{cp}-{fsdp}", {**changes, "cp": cp, "fsdp": fsdp})


def test_rings_replicas_and_shards_follow_the_loss_of_one_process(corpus, tmp_path):
    """The checks for silent errors stay quiet all the while, and every world leaves the same whole checkpoint."""
    for size, cp, fsdp in WORLDS:
        (tmp_path / f"{size}-{cp}-{fsdp}").mkdir()
        (tmp_path / f"{size}-{cp}-{fsdp}" / "data").symlink_to(corpus / "data")
    program("all_worlds", str(tmp_path))
    first = tmp_path / "1-1-off"
    assert len(losses(first)) > 3
    weights = model.LoopCoder.from_pretrained(first / "pretrain").state_dict()
    for size, cp, fsdp in WORLDS[1:]:
        out = tmp_path / f"{size}-{cp}-{fsdp}"
        assert losses(out) == pytest.approx(losses(first), rel=2e-4)
        for name, x in model.LoopCoder.from_pretrained(out / "pretrain").state_dict().items():
            torch.testing.assert_close(x, weights[name], rtol=0, atol=5e-6)


SPLITS = [(1, 1, 5), (3, 1, 1), (2, 2, 2)]  # processes, ranks that share a row, rows of a micro-batch; 5 rows fit none of them


def gradient_of_a_batch(cp, micro_rows, path):
    """The gradient of one global batch in float64, of both kinds of loop: rank 0 writes {name: gradient}."""
    world = dataclasses.replace(train.start_world(toy_config("unused", cp=cp)), compiled=False)
    rng, found = np.random.default_rng(0), {}
    ids, targets = rng.integers(0, 60, (2, 5, 22))  # 22 tokens: four chunks are padded
    targets[rng.random(ids.shape) < 0.6] = -100
    targets[1] = -100
    segments = np.sort(rng.integers(0, 3, ids.shape), axis=1)
    for loop_input in ("hidden", "shift"):
        torch.manual_seed(0)
        net = model.LoopCoder(model.LoopCoderConfig(**model.shape(16, 32, 2, 4, 2, 60, 64), loop_input=loop_input)).double()
        found[loop_input] = train.gradient(train.loss_function(net, world), (ids, targets, segments), world, micro_rows)
        found |= {f"{loop_input} {name}": p.grad for name, p in net.named_parameters()}
    if world.main:
        torch.save(found, path)


def gradients(folder):
    for size, cp, micro_rows in SPLITS:
        ranks("gradient_of_a_batch", size, cp, micro_rows, f"{folder}/{size}.pt")


def test_the_gradient_is_the_same_however_ranks_and_micro_batches_split_the_batch(tmp_path):
    """Rows with few learned tokens, none, and rows that no rank is given; also where each token reads the state of the one before it."""
    program("gradients", str(tmp_path))
    whole, *others = (torch.load(tmp_path / f"{size}.pt") for size, *_ in SPLITS)
    for split in others:
        for name, x in whole.items():
            if isinstance(x, float):
                assert split[name] == pytest.approx(x, rel=1e-6), name  # the loss is summed in float32
            else:
                assert (split[name] - x).abs().max() <= 1e-12 * max(1, float(x.abs().max())), name


def measured_apart(path):
    """Each rank measures another speed, other pass rates, other samples and other losses; rank 0 writes what each goes by."""
    rank = int(os.environ["RANK"])
    train.device_peak = lambda device, dtype: 1 + 2 * (rank == 0) * (dtype == torch.bfloat16)
    train.solve_rates = lambda *_: {f"{family}/1": (1 + rank) / 4 for family in train.tasks.FAMILIES}
    sample = (range(8 + rank), [True] * (8 + rank))
    train.task_samples = lambda _tokenizer, _family, _levels, _weights, n, *_: ([sample] * n, {"admitted": n})
    world = train.start_world(toy_config("unused", dtype="auto"))
    torch.manual_seed(rank)
    net = model.LoopCoder(model.LoopCoderConfig(**model.shape(16, 32, 1, 4, 2, 60, 64)))
    curriculum = train.Curriculum(net, None, train.STAGES["sft_instruct"], {}, {}, 64, 4, 24, 0, world)
    batches = [[part.tolist() for part in curriculum.next()] for _ in range(24)]
    with pytest.raises(ValueError, match="run in one process"):
        train.main(["--eval", "unused", "--dtype", "float32"])
    found = [None] * world.size
    dist.all_gather_object(found, [str(world.dtype), {**curriculum.state(), "mixture": None}, batches])
    if world.main:
        Path(path).write_text(json.dumps(found))


def measured(path):
    ranks("measured_apart", 2, path)


def test_what_ranks_would_measure_differently_is_that_of_rank_0_for_all(tmp_path):
    program("measured", str(tmp_path / "found.json"))
    first, second = json.loads((tmp_path / "found.json").read_text())
    assert first[0] == "torch.bfloat16" and first[1]["rates"]["compose/1"] == 1 / 4 and len(first[1]["moves"]) > 1
    assert first == second


# ------------------------------------------------------------------------------------------------ silent errors


def test_the_fingerprint_sees_what_an_exclusive_or_cannot():
    torch.manual_seed(0)
    for fault in train.FAULTS:
        for trial in range(40):
            x = torch.randn(5000)
            damaged = x.clone()
            if train.corrupt(damaged, fault, trial * 97, trial % 32):
                assert not torch.equal(train.fingerprint(x), train.fingerprint(damaged)), (fault, trial)
    x = torch.randn(5000)
    twice = x.clone()
    train.corrupt(twice, "pair", 3, 7)
    xor = lambda t: np.bitwise_xor.reduce(t.numpy().view(np.int32))
    assert xor(x) == xor(twice) and not torch.equal(train.fingerprint(x), train.fingerprint(twice))


def test_the_fingerprint_is_the_sums_of_its_docstring_modulo_2_to_the_64():
    x = torch.randn(3000, dtype=torch.float32)
    words = np.zeros(3072, np.int64)
    words[:3000] = x.numpy().view(np.int32)
    words = [[int(w) for w in row] for row in words.reshape(3, 1024)]
    sums = [sum(w * f(r, c) for r, row in enumerate(words) for c, w in enumerate(row)) % 2**64
            for f in (lambda r, c: 1, lambda r, c: 2 * r + 1, lambda r, c: 2 * c + 1)]
    assert [int(v) % 2**64 for v in train.fingerprint(x)] == sums


class Lab:
    """This process of a small run after its first step, put back there before each trial."""

    def __init__(self, cp=1, fsdp="off"):
        self.world = dataclasses.replace(train.start_world(toy_config("unused", cp=cp, fsdp=fsdp)), compiled=False)
        shape = dataclasses.replace(model.LoopCoderConfig.preset("toy"), vocab_size=64, num_hidden_layers=1)
        torch.manual_seed(0)
        net = model.LoopCoder(shape)
        self.loss_fn = train.loss_function(net, self.world)
        self.optimizer = train.Optimizer(net)
        self.guard = train.Guard(net, self.optimizer, self.world, 1, train.Inject(step=-1))
        ids = np.random.default_rng(0).integers(0, 64, (2 * self.world.replicas, 16))
        self.batch = (ids, np.roll(ids, -1, 1), np.zeros_like(ids))
        self.step(0)
        self.first, self.remembered = {n: train.local(x).detach().clone() for n, x in self.guard._state().items()}, self.guard.remembered
        self.names = list(self.guard.params)
        self.step(1)
        self.second = self.guard.remembered

    def step(self, step):
        self.guard.before_forward(step)
        train.gradient(self.loss_fn, self.batch, self.world, 1, self.guard)
        self.guard.after_reduction()
        self.optimizer.step(1e-3, 1.0)
        self.guard.after_update()

    @torch.no_grad()
    def back(self):
        for name, x in self.guard._state().items():
            train.local(x).copy_(self.first[name])
        for p in self.guard.params.values():
            p.grad = None
        self.guard.remembered, self.guard.arrived = self.remembered, []

    def trial(self, inject, without="", first=False):
        """
        Step 1 with a fault, as the first of a run where asked; returns the report, "harmless" where all weights came out bit for bit as
        without it, or "missed".
        """
        self.back()
        guard, equal = self.guard, train.Guard._equal
        guard.inject, guard.recheck_every = inject, 0 if without in ("recompute", "received") or first else 1
        guard.remembered = None if first or without == "at rest" else guard.remembered
        guard.all_arrived = (lambda: None) if without == "received" else lambda: train.Guard.all_arrived(guard)
        guard._equal = lambda kind, *more: None if kind == without else equal(guard, kind, *more)
        try:
            self.step(1)
        except train.SilentError as error:
            return error.report
        same = torch.tensor(int(torch.equal(guard.remembered, self.second)))
        if self.world.size > 1:
            dist.all_reduce(same, dist.ReduceOp.MIN)
        return "harmless" if same else "missed"


def hunt(size, cp, trials, clean, path):
    """Every process runs the same trials; rank 0 writes what was found, and whether the fault had changed anything at all."""
    lab, rng, found = Lab(cp), np.random.default_rng(10 * size + cp), []
    sites = [site for site in train.SITES if cp > 1 or site != "received"]
    moments = list(lab.first)[len(lab.names):]
    for t in range(trials):
        site = sites[t % len(sites)]
        names = {"optimizer": moments, "activation": [""], "received": ["keys", "values", "gradient of"]}.get(site, lab.names)
        spec = {"site": site, "step": 1, "rank": int(rng.integers(size)), "fault": train.FAULTS[t // len(sites) % len(train.FAULTS)]}
        spec |= {"tensor": names[rng.integers(len(names))], "element": int(rng.integers(1 << 20)), "bit": int(rng.integers(32))}
        spec |= {"persistent": int(rng.integers(2))}
        report = lab.trial(inject := train.Inject(**spec))
        struck = torch.tensor(int(inject.struck))
        dist.all_reduce(struck)
        if struck:
            found.append([spec, report])
    lab.back()
    lab.guard.inject, alarms = None, 0
    for step in range(clean):
        try:
            lab.step(step)
        except train.SilentError:
            alarms += 1
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"found": found, "clean": clean, "alarms": alarms}))


def nameable(spec, size, cp):
    """Whether three replicas, the rank's own memory or the recomputation can tell one rank from the others."""
    if spec["site"] in ("weight", "optimizer", "received"):
        return True
    if spec["site"] in ("reduced", "update"):
        return size > 2
    if spec["site"] == "activation" and cp > 1:  # what a rank computes wrong travels round the ring
        return False
    return not spec["persistent"] or (size // cp if size > cp else cp) > 2


def hunts(plan, path):
    for n, (size, cp, trials, clean) in enumerate(plan):
        ranks("hunt", size, size, cp, trials, clean, f"{path}/{n}.json")


def test_injected_faults_are_found_in_their_step_and_their_rank_is_named(tmp_path):
    """STUDY=2000 injects that many faults and runs a thousand clean steps (minutes); without it a sample of them."""
    study = int(os.environ.get("STUDY", 0))
    worlds = ((2, 1), (3, 1), (2, 2), (4, 2), (3, 3)) if study else ((3, 1), (2, 2))
    plan = [(size, cp, -(-study // len(worlds)) or 42, 200 if study else 5) for size, cp in worlds]
    program("hunts", plan, str(tmp_path), timeout=3000)
    table = collections.Counter()
    for n, (size, cp, trials, clean) in enumerate(plan):
        result = json.loads((tmp_path / f"{n}.json").read_text())
        assert result["alarms"] == 0 and result["clean"] == clean
        assert len(result["found"]) > trials / 2
        for spec, report in result["found"]:
            table["struck"] += 1
            assert report != "missed", (size, cp, spec)
            if report == "harmless":  # an activation whose lost bits rounding would have dropped anyway
                assert spec["site"] in ("activation", "gradient"), (size, cp, spec)
                table["harmless"] += 1
                continue
            assert report["step"] == 1 and spec["rank"] in report["ranks"], (size, cp, spec, report)
            table["found"] += 1
            table["named"] += report["rank"] == spec["rank"]
            table["nameable"] += nameable(spec, size, cp)
            assert report["rank"] == spec["rank"] or not nameable(spec, size, cp), (size, cp, spec, report)
    print(dict(table), "clean steps", sum(clean for *_, clean in plan))


def blind(path, cp, fsdp):
    """What each fault is called with all checks, and with the one that is meant for it taken away."""
    lab, seen = Lab(cp, fsdp), {}
    many = lab.world.size > 1
    spec = {"step": 1, "rank": int(many), "tensor": "", "element": 40, "bit": 22}
    cases = {"at rest": ("weight", 0), "recompute, alone": ("activation", 0)} if not many else {
        "received": ("received", 0), "recompute, round the ring": ("gradient", 1)} if cp > 1 else {
        "at rest, in shards": ("weight", 0), "recompute, in shards": ("activation", 0),
        "recompute, stuck in shards": ("activation", 1)} if fsdp == "on" else {
        "recompute": ("gradient", 0), "recompute, stuck": ("gradient", 1), "gradients differ after the reduction": ("reduced", 0),
        "replicas differ before the forward": ("weight", 0), "replicas differ after the update": ("update", 0)}
    for check, (site, persistent) in cases.items():
        first = "before" in check
        inject = lambda site=site, persistent=persistent: train.Inject(**spec, site=site, persistent=persistent)
        reports = lab.trial(inject(), first=first), lab.trial(inject(), without=check.partition(",")[0], first=first)
        seen[check] = [report if isinstance(report, str) else report["kind"] for report in reports]
    if not many:
        real, wrong = lab.loss_fn.forward, [torch.tensor(2.0)]
        lab.loss_fn.forward = lambda *batch: real(*batch) + (wrong.pop() if lab.guard.last and wrong else 0)
        seen["a loss that is wrong, not its gradient"] = lab.trial(None)["tensor"]
    if lab.world.main:
        Path(path).write_text(json.dumps(seen))


def blinds(folder):
    ranks("blind", 1, f"{folder}/one.json", 1, "off")
    ranks("blind", 2, f"{folder}/two.json", 1, "off")
    ranks("blind", 2, f"{folder}/ring.json", 2, "off")
    ranks("blind", 2, f"{folder}/shards.json", 1, "on")


def test_for_each_check_there_is_a_fault_that_nothing_else_sees_in_its_step(tmp_path):
    """
    Each fault with all checks, then without the one it is meant for. Where gradients, or the weights that a run starts from, differ
    from rank to rank, "update" sees it in the end; the latter and what arrives wrong over the ring are not rechecked here, as in most
    steps of a run.
    """
    program("blinds", str(tmp_path))
    seen = {}
    for name in ("one", "two", "ring", "shards"):
        seen |= json.loads((tmp_path / f"{name}.json").read_text())
    assert seen == {
        "at rest": ["changed at rest", "missed"],
        "recompute, alone": ["computed twice, it differs", "missed"],
        "a loss that is wrong, not its gradient": "loss",
        "at rest, in shards": ["changed at rest", "missed"],
        "recompute, in shards": ["computed twice, it differs", "missed"],
        "recompute, stuck in shards": ["two ranks compute it differently", "missed"],
        "received": ["received otherwise than sent", "missed"],
        "recompute, round the ring": ["two ranks compute it differently", "missed"],
        "recompute": ["computed twice, it differs", "missed"],
        "recompute, stuck": ["two ranks compute it differently", "missed"],
        "replicas differ before the forward": ["replicas differ before the forward", "replicas differ after the update"],
        "gradients differ after the reduction": ["gradients differ after the reduction", "replicas differ after the update"],
        "replicas differ after the update": ["replicas differ after the update", "missed"],
    }


# ------------------------------------------------------------------------------------------------ ranks that die

WORDS = """--stages pretrain --scale 0.025 --batch-tokens 512 --compile off --dtype float32 --eval-bytes 3000 --save-every 1
 --threads 1""".split()


def start(rank, size, port, folder, *more):
    """train.py itself as one rank, in a fork of this interpreter; its last words go to FOLDER/stderr-RANK. Returns its process id."""
    pid = os.fork()
    if pid == 0:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        os.dup2(os.open(f"{folder}/stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["train.py", "--out", folder, *WORDS, *more]
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(0)
    return pid


def end(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def last_words(folder, size):
    return [Path(f"{folder}/stderr-{rank}").read_text().strip().splitlines()[-1:] for rank in range(size)]


def stopped(folder):
    """
    whole: one process, to the end. stops: three ranks with their weights in shards, of which one is killed after its third step; two go
    on from the snapshot, over a ring, until one receives other keys than were sent; one goes on to the end.
    """
    model.PRESETS["nano"] = model.shape(32, 64, 2, 4, 2, 600, 1024)  # in this interpreter and its forks
    whole, stops, port = f"{folder}/whole", f"{folder}/stops", free_port()
    codes = end([start(0, 1, port, whole)])
    log = Path(stops) / "pretrain" / "log.jsonl"
    pids = [start(rank, 3, port, stops, "--fsdp", "on") for rank in range(3)]
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.02)
        assert os.waitpid(pids[0], os.WNOHANG) == (0, 0), "the run ended before it could be killed"
    os.kill(pids[1], signal.SIGKILL)
    codes, words, port = codes + end(pids), last_words(stops, 3), free_port()
    fault = "--resume --cp 2 --fsdp off --inject site=received,step=12,rank=1,tensor=keys".split()
    codes, words = codes + end([start(rank, 2, port, stops, *fault) for rank in range(2)]), words + last_words(stops, 2)
    kept = torch.load(f"{stops}/pretrain/state.pt", weights_only=False)["step"]
    codes += end([start(0, 1, port, stops, "--resume")])
    Path(folder, "report.json").write_text(json.dumps([codes, words, kept]))


def test_a_killed_rank_or_a_silent_error_ends_the_run_with_its_name_and_any_number_of_ranks_goes_on_from_the_snapshot(corpus, tmp_path):
    for name in ("whole", "stops"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(corpus / "data")
    said = program("stopped", str(tmp_path))
    codes, words, kept = json.loads((tmp_path / "report.json").read_text())
    assert codes == [0, 4, -signal.SIGKILL, 4, 3, 3, 0], (codes, words)
    for rank in (0, 2):
        assert words[rank] == [f"train.py: rank 1 is gone, so rank {rank} stops; --resume goes on from the last snapshot, with any N"]
    for rank in (0, 1):
        says = "silent error at step 12: received otherwise than sent, tensor keys of chunk 0, exchange 0, from rank 0, rank 1"
        assert words[3 + rank] == [f"train.py: {says}"]
    assert kept == 12  # --save-every 1
    assert said.count("steps from step") == 2  # who went on did not begin again
    assert losses(tmp_path / "stops") == pytest.approx(losses(tmp_path / "whole"), rel=2e-4)


def test_a_wrong_count_of_ranks_or_a_fault_that_does_not_exist_is_one_line(capsys):
    for words, says in (
        (["--cp", "0"], "--cp 0: must divide the number of processes"), (["--cp", "3"], "--cp 3: must divide"),
        (["--dry-run", "--preset", "node", "--cp", "3"], "--ranks 8: must be a multiple of --cp 3"),
        (["--dry-run", "--ranks", "-3"], "--ranks -3: must be"), (["--inject", "site=head"], "site must be one of weight, optimizer"),
        (["--inject", "fault=burn"], "fault must be one of flip"), (["--inject", "step=x"], "step must be a whole number"),
    ):
        with pytest.raises(ValueError, match=says):
            train.main(words)
    net, world = model.LoopCoder(model.LoopCoderConfig(**model.shape(16, 32, 1, 4, 2, 60, 64))), train.start_world(toy_config("unused"))
    for nowhere in ({"rank": 1}, {"tensor": "no.such"}, {"site": "received"}):
        with pytest.raises(ValueError, match="no such thing in this run of 1 rank"):
            train.Guard(net, train.Optimizer(net), world, 1, train.Inject(**nowhere))


# ------------------------------------------------------------------------------------------------ dry run


REAL_RUN = """
import torch, kernels, model
model.causal_attention = lambda q, k, v, segment_ids: kernels.flash_partial(q, k, v, dtype=q.dtype)[0]  # as on a GPU
model.loop_attention = kernels.fused_gated_attention
torch.set_num_threads(1)
real, kept = model.LoopCoder(model.LoopCoderConfig(**model.shape(64, 160, 3, 4, 2, 300, 128))), {}
real.compute_dtype = torch.float16  # as many bytes as bfloat16, which the interpreter does not multiply
own = {p.data_ptr() for p in real.parameters()}

def keep(x):
    kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
    return x

ids = torch.zeros(1, 128, dtype=torch.int64)
with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
    loss = real.loss(ids, ids, reduction="sum")
assert loss.isfinite()
print(sum(storage.nbytes() for at, storage in kept.items() if at not in own))
"""


def test_the_memory_of_the_dry_run_is_what_autograd_keeps_in_a_real_run_with_the_kernels():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", REAL_RUN], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    config = model.LoopCoderConfig(**model.shape(64, 160, 3, 4, 2, 300, 128))
    assert train.kept_bytes(config, 128, torch.float32) == pytest.approx(int(run.stdout), rel=0.001)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_state_of_the_dry_run_is_that_of_a_real_run(kind):
    net = model.LoopCoder(config := model.LoopCoderConfig(**model.shape(64, 160, 3, 4, 2, 300, 128)))
    net.loss(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    (optimizer := train.Optimizer(net, kind)).step(1e-3, 1.0)
    moments = [x for part in optimizer.parts for state in part.state.values() for name, x in state.items() if name != "step"]
    assert train.state_bytes(config, kind) == tuple(sum(x.nbytes for x in some) for some in (net.parameters(), moments))


def test_a_dry_run_of_the_large_presets_says_what_they_need(capsys):
    for preset in ("small", "node", "40b-loop"):
        train.main(["--preset", preset, "--dry-run"])
        said = capsys.readouterr().out
        assert all(stage in said for stage in train.STAGES) and "memory a rank" in said and "fingerprints" in said
    assert "in shards" in said and "39.795B" in said
    assert "131072 tokens on a ring of 8" in said and "67.1 MB" in said  # two chunks of 8192 keys and values, 8 x 128 of two bytes


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
