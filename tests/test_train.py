"""train.py: what each claim of the training loop rests on. A toy preset and a corpus of a few standard-library packages make it quick."""

import itertools
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
import tasks
import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A chain folder with data built from a bounded sample of the running Python."""
    out = tmp_path_factory.mktemp("chain")
    data.build(out / "data", "python", vocab_size=600, max_bytes=1_200_000, log=lambda line: None)
    return out


@pytest.fixture
def toy(monkeypatch):
    """A preset that takes seconds: two layers of width 32, run twice."""
    add_toy(monkeypatch.setitem)


def add_toy(setitem):
    setitem(model.PRESETS, "toy", model.shape(32, 64, 2, 4, 2, 600, 1024))
    setitem(train.PRESETS, "toy", train.Preset((64, 512, 1024), (28_000, 6_000, 3_000, 3_000, 25_600), 1024, 3e-3, 1.2, "seconds"))


def config(out, **changes):
    return train.TrainConfig(**{"preset": "toy", "out": str(out), "compile": "off", "dtype": "float32", "eval_bytes": 4000, **changes})


def linked(corpus, tmp_path):
    (tmp_path / "data").symlink_to(corpus / "data")
    return tmp_path


def run_chain(cfg):
    train.chain(cfg, train.start_world(cfg))


def random_checkpoint(folder, corpus, seed=0):
    """A toy model as it comes from its seed, with the corpus's tokenizer beside it."""
    torch.manual_seed(seed)
    tokenizer = data.Tokenizer.load(corpus / "data" / "tokenizer")
    tokenizer.save(folder)
    model.LoopCoder(model.LoopCoderConfig.preset("toy", vocab_size=tokenizer.vocab_size)).save_pretrained(folder)


def tensors(folder):
    return model.LoopCoder.from_pretrained(folder).state_dict()


def test_the_chain_leaves_a_loadable_checkpoint_a_stage_and_learns(corpus, toy, tmp_path):
    out = linked(corpus, tmp_path)
    run_chain(config(out))
    for name in train.STAGES:
        assert records(out / name)[-1]["bits_per_byte"]["python"] < 8
        assert not (out / name / "state.pt").exists()
        assert model.LoopCoder.from_pretrained(out / name).config.max_position_embeddings == (64, 512, 1024)[train.STAGES[name].context]
    losses = [record["loss"] for record in records(out / "pretrain")[:-1]]
    assert losses[-1] < losses[0] - 0.5


class Killed(Exception):
    pass


def killed_in_step(n, cfg, monkeypatch):
    """Run a chain that ends in its n-th step."""
    step, seen = train.Optimizer.step, []

    def dying_step(self, lr, clip):
        seen.append(lr)
        if len(seen) == n:
            raise Killed
        return step(self, lr, clip)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Optimizer, "step", dying_step)
        run_chain(cfg)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["pretrain", "sft_instruct"])
def test_a_killed_run_resumes_bit_for_bit(corpus, toy, tmp_path, monkeypatch, stage):
    """The same run, whole and killed in the middle (of the curriculum's second phase): equal weights, equal losses."""
    whole, broken = linked(corpus, tmp_path), tmp_path / "broken"
    broken.mkdir()
    linked(corpus, broken)
    if stage == "sft_instruct":
        tasks.own_evaluation()  # that of all families, for every later test
        for family in [name for name in tasks.FAMILIES if name not in ("compose", "gui", "swe")]:
            monkeypatch.delitem(tasks.FAMILIES, family)
        random_checkpoint(whole / "mid2", corpus)
        (broken / "mid2").symlink_to(whole / "mid2")
    run_chain(config(whole, stages=stage))
    killed_in_step(18, config(broken, stages=stage, save_every=5), monkeypatch)
    run_chain(config(broken, stages=stage, save_every=5, resume=True))
    a, b = (tensors(o / stage) for o in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [records(o / stage) for o in (whole, broken)]
    assert [record.get("loss") for record in logs[0]] == [record.get("loss") for record in logs[1]]
    moves, history = logs[1][-1].get("moves", []), {name: [] for name in tasks.FAMILIES}
    base = weights = {name: 1 / len(tasks.FAMILIES) for name in tasks.FAMILIES}
    assert bool(moves) == (stage == "sft_instruct") and moves == logs[0][-1].get("moves", [])
    for move in moves:  # what the log says of the dynamic mixture is enough to go through it again
        for name in history:
            history[name].append(move["loss"][name])
        weights = train.adjust(weights, base, history)
        assert move["weights"] == weights


def test_a_run_goes_on_from_its_own_snapshot_and_ends_with_its_scores_whenever_it_is_killed(corpus, toy, tmp_path, monkeypatch):
    out, whole = linked(corpus, tmp_path), tmp_path / "whole"
    whole.mkdir()
    cfg, again = (config(out, stages="pretrain", save_every=5, scale=0.5, resume=resume) for resume in (False, True))
    run_chain(config(linked(corpus, whole), stages="pretrain", scale=0.5))
    killed_in_step(8, config(out, stages="pretrain", save_every=5, scale=0.5, seed=5), monkeypatch)
    killed_in_step(3, cfg, monkeypatch)  # another run: the snapshot of the first is not its own
    killed_in_step(8, again, monkeypatch)
    with pytest.raises(ValueError, match="from a run with {'seed': 1337}, this one has {'seed': 5}"):
        run_chain(config(out, stages="pretrain", scale=0.5, resume=True, seed=5))
    killed_in_step(1, again, monkeypatch)
    assert [record["step"] for record in records(out / "pretrain")] == [1, 2, 3, 4, 5]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # after the model was written
        patch.setattr(train, "bits_per_byte", lambda *_: 1 / 0)
        run_chain(again)
    assert (out / "pretrain" / "model.safetensors").exists() and "bits_per_byte" not in records(out / "pretrain")[-1]
    run_chain(again)
    logs = [[record.get("loss", record.get("bits_per_byte")) for record in records(o / "pretrain")] for o in (whole, out)]
    assert logs[0] == logs[1] and len(logs[0]) > 10
    killed_in_step(3, cfg, monkeypatch)  # a finished stage begun anew is not finished, though its old model stays
    run_chain(again)
    assert len(records(out / "pretrain")) == len(logs[0])
    both = [config(out, stages="pretrain,anneal", save_every=5, scale=0.5, resume=resume) for resume in (False, True)]
    written = lambda name: (out / name / "log.jsonl").stat().st_mtime_ns
    kept = written("pretrain")
    run_chain(both[True])
    assert written("pretrain") == kept
    kept = written("anneal")
    killed_in_step(3, both[False], monkeypatch)  # in pretrain: what anneal left is not of this run
    assert records(out / "anneal") == []
    run_chain(both[True])
    assert written("anneal") > kept and "bits_per_byte" in records(out / "anneal")[-1]


@pytest.mark.parametrize("norm", [math.inf, math.nan, 0.0])
def test_a_gradient_that_is_not_a_number_or_nothing_at_all_ends_the_run_before_anything_is_saved(corpus, toy, tmp_path, monkeypatch, norm):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(norm))
    with pytest.raises(FloatingPointError, match=f"step 0: the loss is .*norm {norm}"):
        run_chain(config(linked(corpus, tmp_path), stages="pretrain", save_every=1))
    assert not (tmp_path / "pretrain" / "state.pt").exists()


def test_what_cannot_work_is_refused_before_any_work(corpus, toy, tmp_path):
    out = linked(corpus, tmp_path)
    for words, says in (
        (["--stages", "pretrain,mid1"], "anneal is not there to start from; run --stages anneal first"),
        (["--stages", "all,pretrain"], "no stage 'all'"), (["--written", "no/such"], "--written no/such: there is no such file"),
        (["--clip", "0"], "--clip 0.0: must be a number from 1e-06 up"),
    ):
        with pytest.raises(ValueError, match=says):
            train.main(["--out", str(out), "--dtype", "float32", *words])
    random_checkpoint(out / "mid1", corpus)
    other = data.Tokenizer.load(corpus / "data" / "tokenizer")
    data.Tokenizer(other.tokens[:-2] + other.tokens[:-3:-1]).save(out / "mid1")  # the last two tokens have changed places
    with pytest.raises(ValueError, match="mid2: .*mid1/tokenizer.json differs from .*data/tokenizer"):
        run_chain(config(out, stages="mid2"))
    assert [path.name for path in out.glob("*/log.jsonl")] == []


def test_flags_change_the_shape_and_a_dense_checkpoint_folds_into_a_loop_that_begins_as_its_first_pass(corpus, toy, tmp_path, monkeypatch):
    dense = linked(corpus, tmp_path)
    run_chain(config(dense, stages="pretrain", scale=0.1, layers=4, loop_num=1))
    assert (c := model.LoopCoder.from_pretrained(dense / "pretrain").config).loop_num == 1 and c.num_hidden_layers == 4
    (tmp_path / "loop").mkdir()
    loop, alphas = linked(corpus, tmp_path / "loop"), []
    cfg = {"stages": "pretrain", "fold": str(dense / "pretrain"), "loop_window_size": 7}
    start = train.first_weights(train.STAGES["pretrain"], config(loop, **cfg), train.start_world(config(loop)), c.vocab_size)
    expected = model.dense_to_loop(model.LoopCoder.from_pretrained(dense / "pretrain"), "mean", 2, 7)
    assert start.config.loop_window_size == 7 and start.config.num_hidden_layers == 2
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), expected.state_dict().values()))
    step = train.Optimizer.step
    monkeypatch.setattr(train.Optimizer, "step", lambda self, *a: alphas.append(float(self.model.loop_alpha)) or step(self, *a))
    run_chain(config(loop, **cfg, scale=2.5, batch_tokens=512))
    assert alphas[0] == 0 and alphas == sorted(alphas) and 0 < alphas[1] < 1 and set(alphas[3:]) == {1.0}
    with pytest.raises(ValueError, match="--fold nowhere: no checkpoint there"):
        config(loop, fold="nowhere")
    with pytest.raises(ValueError, match="makes a loop of its layers"):
        config(loop, fold=str(dense / "pretrain"), layers=3)


def test_micro_batches_do_not_change_the_gradient(toy):
    torch.manual_seed(0)
    net = model.LoopCoder(model.LoopCoderConfig.preset("toy")).double()
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 600, (2, 6, 64))
    targets[rng.random((6, 64)) < 0.6] = -100  # rows with very different numbers of learned tokens
    targets[1] = -100
    batch = (ids, targets, np.zeros((6, 64), np.int64))
    world = train.World(0, 1, torch.device("cpu"), torch.float64, False)
    grads, losses = [], []
    for rows in (6, 1, 4):
        net.zero_grad()
        losses.append(train.gradient(train.Loss(net), batch, world, rows))
        grads.append([p.grad.clone() for p in net.parameters()])
    plain = net(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(batch[2]))[1]
    assert losses == pytest.approx([plain.item()] * 3, rel=1e-6)
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_schedule_warms_up_falls_as_a_cosine_and_stays_low():
    steps, values = 1000, [train.learning_rate(t, 1000, 1.0, 0.05, hold=0.3, warmup=0.02) for t in range(1000)]
    assert values[0] == pytest.approx(1 / 20) and values[19] == pytest.approx(1.0)
    assert values[700:] == pytest.approx([0.05] * 300)
    middle = 20 + (700 - 20) // 2
    assert values[middle] == pytest.approx((1 + 0.05) / 2, abs=1e-9)
    assert all(a >= b for a, b in zip(values[20:], values[21:])) and len(values) == steps


def test_a_category_without_data_gives_its_share_to_the_others():
    shares, absent = train.share_out({"a": 6, "b": 3, "c": 1}, {"a", "c"})
    assert shares == pytest.approx({"a": 6 / 7, "c": 1 / 7}) and absent == pytest.approx({"b": 0.3})
    with pytest.raises(ValueError, match="none of the categories"):
        train.share_out({"a": 1}, set())


def test_a_table_has_intervals_and_gains_over_another_checkpoint_on_the_same_tasks(corpus, toy, tmp_path, capsys):
    out, table = linked(corpus, tmp_path), {}
    for seed in (0, 1):
        random_checkpoint(out / str(seed), corpus, seed)
    cfg = config(out)
    for seed, against in (("0", ""), ("1", str(out / "0"))):
        train.evaluate(out / seed, cfg, train.start_world(cfg), "", 1, 1, against)
        table[seed] = json.loads((out / seed / "table.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    before, after = (table[seed]["bits per byte python"] for seed in "01")
    assert before[1] == after[1] and len(before[1]) > 1  # the same documents
    gain = (sum(after[0]) - sum(before[0])) / sum(before[1])
    assert any(line.startswith("bits per byte") and " python " in line and f"gain {gain:+.3f} [" in line for line in lines) and gain
    holes = sum(len(pair[0]) for name, pair in table["1"].items() if "exact_match" in name and not name.endswith("all"))
    assert holes and len(table["1"]["fim exact_match, % all"][0]) == holes  # what is forgotten has its interval, too
    graded = [line for line in lines if line.startswith("pass@1") and "gain" in line]
    assert len(graded) == len(tasks.FAMILIES) and all("[0.000, 0.000]" in line for line in graded)  # random weights solve nothing
    assert lines[-1] == f"clearly above chance and {out / '0'}: 0 families of {len(tasks.FAMILIES)} ()"
    assert table["0"]["thinks all families"][0] == [0.0] * 2 * (len(tasks.FAMILIES) - 1)
    assert table["0"]["pass@1 compose"] == [[0.0, 0.0], [1, 1]]  # a task of each level
    with pytest.raises(ValueError, match="evaluated on .*'tasks': 1.*, not .*'tasks': 2"):
        train.evaluate(out / "1", cfg, train.start_world(cfg), "", 2, 1, str(out / "0"))
    with pytest.raises(ValueError, match="evaluated on .*'bytes': .*, not .*; run --eval"):
        train.evaluate(out / "1", config(out, eval_bytes=30_000), train.start_world(cfg), "", 1, 1, str(out / "0"))
    with pytest.raises(ValueError, match="no table.json"):
        train.evaluate(out / "1", cfg, train.start_world(cfg), "", 1, 1, str(out))


def test_the_table_reads_commits_first_and_compressors_stand_only_beside_python(corpus, toy, tmp_path):
    out = linked(corpus, tmp_path)
    random_checkpoint(out / "0", corpus)
    world, documents = train.start_world(config(out)), train.heldout_documents(out / "data" / "heldout", 4000)
    rows = lambda git: train.evaluation_table(out / "0", documents, world, git, 1, 1, 0)
    with pytest.raises(ValueError, match="not a git repository"):
        next(rows(str(tmp_path)))
    assert documents.pop("python")
    bits = [which for what, which, _ in itertools.takewhile(lambda row: row[0] == "bits per byte", rows(""))]
    assert bits and not any("python" in which for which in bits)


def test_a_gpu_that_is_not_named_is_the_first_one(toy, monkeypatch):
    """The GPU is played, but for how torch reads a device: set_device wants an index."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(torch.cuda._utils._get_device_index(device)))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    for name in ("auto", "cuda"):
        assert train.start_world(config("unused", device=name)).device == torch.device("cuda:0")
    assert seen == [0, 0]


def test_bits_per_byte_counts_every_token_once_whatever_the_context(corpus, toy):
    """A uniform model costs log2 V a token, so the sum is known exactly: tokens after the first, times log2 V, over bytes."""
    net = model.LoopCoder(model.LoopCoderConfig.preset("toy", max_position_embeddings=48))
    torch.nn.init.zeros_(net.lm_head.weight)
    tokenizer, file = data.Tokenizer.load(corpus / "data" / "tokenizer"), data.TokenFile(corpus / "data" / "heldout", "code")
    chosen, size = [], 0
    for i in range(len(file.lengths)):
        if file.language(i) == "python" and size + file.nbytes[i] <= 30_000:
            chosen.append(i)
            size += int(file.nbytes[i])
    expected = sum(int(file.lengths[i]) - 1 for i in chosen) * math.log2(600) / size
    assert train.bits_per_byte(net, tokenizer, corpus / "data" / "heldout", 30_000)["python"] == pytest.approx(expected, rel=1e-5)
    smaller = data.Tokenizer(tokenizer.tokens[:400])  # a model of other tokens reads the same text, in its own
    net = model.LoopCoder(model.LoopCoderConfig.preset("toy", max_position_embeddings=48, vocab_size=smaller.vocab_size))
    torch.nn.init.zeros_(net.lm_head.weight)
    count = sum(len(smaller.encode(tokenizer.decode(file.ids(i)[1:-1]))) + 1 for i in chosen)
    expected = count * math.log2(smaller.vocab_size) / size
    assert train.bits_per_byte(net, smaller, corpus / "data" / "heldout", 30_000)["python"] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------ command line


def command(*words, **more):
    return subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], capture_output=True, text=True, timeout=300, **more)


@pytest.mark.parametrize("words, says", [
    (["--preset", "huge"], "unknown; one of nano"),
    (["--source", "/no/such/folder"], "no such folder"),
    (["--stages", "mid1", "--source", "."], "is not there to start from"),
    (["--learning-rat", "1"], "unrecognized arguments"),
    (["--eval", "nothing/here"], "no config.json there"),
    (["--eval", "nothing/here", "--source", "/no/such/folder"], "there is no such token file; build it with"),
    (["--eval", "nothing/here", "--tasks", "0"], "--tasks 0: must be 1 or more"),
    (["--save-every", "0"], "--save-every 0: must be a number from 1 up"),
    (["--lr", "nan"], "--lr nan: must be a number from 0 up"),
    (["--device", "abacus"], "--device abacus: not on this machine"),
])
def test_bad_input_is_one_clear_line_and_status_2(words, says, tmp_path, corpus):
    out = tmp_path if "--source" in words and "/no/such/folder" in words else linked(corpus, tmp_path)
    done = command("--out", out, *words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: ")


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_whole(tmp_path, corpus):
    """A limit on the size of files stands in for the disk."""
    out = linked(corpus, tmp_path)
    words = ["--out", out, "--stages", "pretrain", "--scale", "0.001", "--batch-tokens", "512", "--compile", "off", "--eval-bytes", "3000"]
    assert command(*words).returncode == 0
    before = tensors(out / "pretrain")

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    for more in ([], ["--save-every", "1"]):
        done = command(*words, "--seed", "5", *more, preexec_fn=small_disk)
        assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("train.py: ") and "Traceback" not in done.stderr
        after = tensors(out / "pretrain")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not list((out / "pretrain").glob("*.tmp"))


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (48, 48)])
def test_a_step_of_muon_is_that_of_torchs_own_muon(shape):
    """The peer multiplies in bfloat16 and runs one matrix at a time; so do we here, and the stack changes the last bits alone."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for start in [[torch.randn(shape) for _ in range(3)]] * 2)
    a = train.Muon(ours, weight_decay=0.1, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    a.param_groups[0]["lr"] = 0.02
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


def test_muons_step_has_singular_values_near_one_and_the_directions_of_the_gradient():
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    got = u.mT @ train.orthogonalize(x) @ vt.mT  # diagonal, where the directions are the same
    values = got.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (got - torch.diag_embed(values)).abs().max() < 1e-9


# ------------------------------------------------------------------------------------------------ fine-tuning


def loss_and_gradient(net, batch):
    net.zero_grad()
    loss = net.loss(*map(torch.from_numpy, batch), reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in net.named_parameters()}


def toy_network():
    torch.manual_seed(0)
    return model.LoopCoder(model.LoopCoderConfig.preset("toy")).double()


def test_a_sample_inside_a_pack_has_the_loss_and_the_gradient_that_it_has_alone(corpus, toy):
    """Three samples in one row, of which one at a time is learned; against that sample in a row of its own."""
    tokenizer, net = data.Tokenizer.load(corpus / "data" / "tokenizer"), toy_network()
    drawn = [tasks.generate(family, 1, 5) for family in ("compose", "sql", "gui")]
    samples = [tokenizer.encode_parts(tasks.task_parts(task)) for task in drawn]
    for k in range(3):
        packed = data.pack([(ids, in_loss if i == k else [False] * len(ids)) for i, (ids, in_loss) in enumerate(samples)], 1024)
        assert len(packed[0]) == 1
        (a, one), (b, other) = loss_and_gradient(net, packed), loss_and_gradient(net, data.pack([samples[k]], 1024))
        assert a == pytest.approx(b, rel=1e-12)
        assert all((one[name] - other[name]).abs().max() <= 1e-12 * (1 + float(other[name].abs().max())) for name in other)


def test_what_an_agent_observes_is_read_and_never_learned(corpus, toy):
    """Other targets where the agent observes: the same loss and gradient, bit for bit. Other inputs there: another loss."""
    tokenizer, net = data.Tokenizer.load(corpus / "data" / "tokenizer"), toy_network()
    ids, in_loss = map(np.array, tokenizer.encode_parts(tasks.trajectory_parts(tasks.generate("swe", 1, 5))))
    assert 0 < in_loss.sum() < len(ids)
    other = np.where(in_loss, ids, (ids + 7) % 500)
    batch, changed = data.pack([(ids, in_loss)], 1024), data.pack([(other, in_loss)], 1024)
    assert np.array_equal(batch[1], changed[1]) and not np.array_equal(batch[0], changed[0])
    (a, one), (b, same), (c, _) = (loss_and_gradient(net, x) for x in (batch, (batch[0], *changed[1:]), changed))
    assert a == b != c and all(torch.equal(one[name], same[name]) for name in one)


def test_the_dynamic_mixture_helps_what_falls_back_slows_what_stands_and_stays_within_its_bounds():
    base = {"back": 0.25, "stands": 0.25, "moves": 0.25, "new": 0.25}
    history = {"back": [1.0, 1.2], "stands": [1.0, 1.0, 1.0], "moves": [1.0, 0.9, 0.8], "new": [1.0]}
    after = train.adjust(base, base, history)
    ratio = {name: after[name] / after["moves"] for name in base}
    assert ratio == pytest.approx({"back": 1.25, "stands": 0.9, "moves": 1.0, "new": 1.0}) and sum(after.values()) == pytest.approx(1)
    weights = dict(base)
    for _ in range(50):
        weights = train.adjust(weights, base, history)
    assert weights["back"] / weights["stands"] == pytest.approx(4)  # twice the base and half of it


def test_levels_are_drawn_by_what_the_model_can_do():
    nothing, half, all_of_one = (train.level_weights(rates) for rates in ([0, 0, 0, 0], [0.5, 0, 0, 0], [1, 0.5, 0, 0]))
    assert max(range(4), key=nothing.__getitem__) == 0 and nothing[0] == pytest.approx(5 * nothing[1])  # begin at the beginning
    assert max(range(4), key=half.__getitem__) == 0 and half[1] == pytest.approx(3 * half[2])  # what stands on something known comes next
    assert max(range(4), key=all_of_one.__getitem__) == 1 and min(nothing + half + all_of_one) > 0  # what is known makes room


def test_both_paths_draw_the_same_tasks_and_no_two_phases_do(corpus):
    tokenizer = data.Tokenizer.load(corpus / "data" / "tokenizer")
    drawn = lambda first, thinking: train.task_samples(tokenizer, "terminal", (1, 2), (1, 1), 20, first, thinking, False)[0]
    read = lambda samples: [tokenizer.decode(ids).split("<|im_end|>")[0] for ids, _ in samples]
    instruct, thinking, later = drawn(0, False), drawn(0, True), drawn(train.MOST_SAMPLES, False)
    assert read(instruct) == read(thinking) and not set(read(instruct)) & set(read(later)) and len(later) == 20
    assert ["<think>" in tokenizer.decode(ids) for ids, _ in instruct + thinking] == [False] * len(instruct) + [True] * len(thinking)


def test_written_answers_are_learned_from_once_they_are_judged_again(corpus, tmp_path):
    """What tasks.py --write leaves, and a wrong answer planted in it; the thinking path wants thinking."""
    tokenizer, path = data.Tokenizer.load(corpus / "data" / "tokenizer"), tmp_path / "written.jsonl"
    drawn = [tasks.generate("math", 1, seed) for seed in range(3)]
    tasks.write_samples(drawn, lambda task, n: [tasks.answer_text(task, task.seed == 1)], path)
    planted = {"id": ["math", 1, 7, "train"], "answers": [tasks.generate("math", 1, 7).wrong], "verdicts": {}}
    path.write_text(path.read_text() + json.dumps(planted) + "\n")
    found, table = train.written_samples(tokenizer, path, thinking=False, context=1024)
    assert [tokenizer.decode(ids) for _, (ids, _) in found["math"]] == [
        "".join(text for text, *_ in tasks.task_parts(task)) for task in drawn]
    assert table["written, admitted"] == 3 and sum(table.values()) == 4
    found, table = train.written_samples(tokenizer, path, thinking=False, context=20)
    assert not any(found.values()) and table["longer than the context"] == 3
    found, _ = train.written_samples(tokenizer, path, thinking=True, context=1024)
    assert [tokenizer.decode(ids) for _, (ids, _) in found["math"]] == ["".join(text for text, *_ in tasks.task_parts(drawn[1], True))]
    for line in ("{}", "not json", '{"id": ["poetry", 1, 1, "train"], "answers": []}'):
        path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
        with pytest.raises(ValueError, match=f"{path}, line 2: not a line of"):
            train.written_samples(tokenizer, path, thinking=False, context=1024)
