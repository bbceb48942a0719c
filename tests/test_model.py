"""The model: against float64 numpy and transformers, its caches against its forward pass, its files, and its numbers."""
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as m
from loop_attention import shard_sequence
from model import LoopCoder, LoopCoderConfig

ROOT = Path(__file__).resolve().parent.parent
KINDS = [(1, "hidden"), (2, "hidden"), (3, "hidden"), (2, "shift"), (3, "shift")]   # loop_num, loop_input


def small(seed=0, std=0.25, dtype=torch.float32, **changes):
    """A small model with weights large enough that every part matters; gates, gains and biases are random too."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                 head_dim=4, max_position_embeddings=128, loop_window_size=5, rope_theta=100.0)
    model = LoopCoder(LoopCoderConfig(**{**shape, **changes}))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=std)
    return model.to(dtype)


def tokens(*shape, seed=1):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


# ---- oracles ---------------------------------------------------------------------------------------------------------


def by_hand(model, ids):
    """Logits (T, V) of one row in numpy float64, written from the reports: loops over layers, heads and tokens, no batching."""
    c, w = model.config, {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    H, KV, D, T = c.num_attention_heads, c.num_key_value_heads, c.head_dim, len(ids)
    norm = lambda x, gain: x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * gain
    softmax = lambda s: np.exp(s - s.max()) / np.exp(s - s.max()).sum()

    def rotary(x):                                                               # (T, D): pairs (i, i + D/2) turn by t theta^(-2i/D)
        out = x.copy()
        for t in range(T):
            for i in range(D // 2):
                a, b, angle = x[t, i], x[t, i + D // 2], t * c.rope_theta ** (-2 * i / D)
                out[t, i], out[t, i + D // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        return out

    def attend(q, k, v, t, first):
        return softmax(k[first:t + 1] @ q[t] / math.sqrt(D)) @ v[first:t + 1]

    x = embedded = w["model.embed_tokens.weight"][ids]
    kept = {}
    for turn in range(c.loop_num):
        if turn and c.loop_input == "shift":
            x = embedded + np.concatenate([np.zeros((1, x.shape[1])), x[:-1]])
        for l in range(c.num_hidden_layers):
            p = f"model.layers.{l}."
            h = norm(x, w[p + "input_layernorm.weight"])
            q, k, v = (h @ w[p + f"self_attn.{n}_proj.weight"].T for n in "qkv")
            k, v = ([y[:, j * D:(j + 1) * D] for j in range(KV)] for y in (k, v))
            k = [rotary(y) for y in k]
            if turn == 0:
                kept[l] = k, v
            heads = []
            for j in range(H):
                qj, kv, out = rotary(q[:, j * D:(j + 1) * D]), j * KV // H, np.zeros((T, D))
                for t in range(T):
                    if turn == 0:
                        out[t] = attend(qj, k[kv], v[kv], t, 0)
                    else:
                        z = qj[t] @ w[f"model.gate_projections.{l}.weight"][j] + w[f"model.gate_projections.{l}.bias"][j]
                        g = 1 / (1 + math.exp(-z))
                        near = attend(qj, k[kv], v[kv], t, max(0, t - c.loop_window_size + 1))
                        out[t] = g * attend(qj, kept[l][0][kv], kept[l][1][kv], t, 0) + (1 - g) * near
                heads.append(out)
            x = x + np.concatenate(heads, axis=1) @ w[p + "self_attn.o_proj.weight"].T
            h = norm(x, w[p + "post_attention_layernorm.weight"])
            a = h @ w[p + "mlp.gate_proj.weight"].T
            x = x + (a / (1 + np.exp(-a)) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("loop_num, loop_input", KINDS)
def test_logits_equal_the_reports_equations_in_numpy_float64(loop_num, loop_input):
    model, ids = small(loop_num=loop_num, loop_input=loop_input, dtype=torch.float64), tokens(1, 17)
    np.testing.assert_allclose(model(ids)[0][0].detach(), by_hand(model, ids[0].numpy()), rtol=0, atol=2e-5)    # rotary is float32


def test_a_dense_model_is_the_llama_of_transformers_from_the_saved_files(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; the numpy oracle stands alone")
    model, ids = small(loop_num=1), tokens(2, 30)
    model.save_pretrained(tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(llama).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(model(ids)[0], llama(ids).logits, rtol=0, atol=2e-5)
    ours, theirs = model.loss(ids[:, :-1], ids[:, 1:]), llama(ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    for name, p in llama.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-3, atol=1e-5)


def test_with_a_shut_gate_and_a_wide_window_a_loop_is_a_dense_model_of_twice_the_depth():
    loop, ids = small(loop_window_size=128), tokens(2, 40)
    for gate in loop.model.gate_projections:
        gate.weight.data.zero_()
        gate.bias.data.fill_(-math.inf)
    dense = small(loop_num=1, num_hidden_layers=4)
    weights = loop.state_dict()
    for name in dense.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) % 2)
        dense.get_parameter(name).data.copy_(weights[".".join(parts)])
    torch.testing.assert_close(loop(ids)[0], dense(ids)[0], rtol=0, atol=1e-5)


# ---- causality and packing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop_num, loop_input", KINDS)
def test_a_later_token_never_changes_an_earlier_logit(loop_num, loop_input):
    model, ids = small(loop_num=loop_num, loop_input=loop_input), tokens(2, 40)
    changed = ids.clone()
    changed[:, 23:] = (changed[:, 23:] + 7) % 61
    a, b = model(ids)[0], model(changed)[0]
    assert torch.equal(a[:, :23], b[:, :23]) and (a[:, 23] != b[:, 23]).any()


@pytest.mark.parametrize("loop_num, loop_input", KINDS)
def test_a_document_inside_a_pack_gives_the_logits_it_gives_alone(loop_num, loop_input):
    model, ids = small(loop_num=loop_num, loop_input=loop_input), tokens(2, 40)
    segments = torch.tensor([[0] * 13 + [1] * 20 + [2] * 7, [0] * 2 + [1] * 38])
    packed = model(ids, segment_ids=segments)[0]
    for row, (a, b) in ((0, (0, 13)), (0, (13, 33)), (0, (33, 40)), (1, (0, 2)), (1, (2, 40))):
        torch.testing.assert_close(packed[row, a:b], model(ids[row:row + 1, a:b])[0][0], rtol=0, atol=2e-5)


# ---- the caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop_num, loop_input", KINDS)
@pytest.mark.parametrize("lengths", [[9, 9, 9], [14, 3, 8]])
def test_prefill_and_decoding_give_the_logits_of_the_full_forward(loop_num, loop_input, lengths):
    model, ids, steps = small(loop_num=loop_num, loop_input=loop_input), tokens(3, 40), 20    # far past twice the window
    full = model(ids)[0]
    cache = model.new_cache(3, 40)
    logits = model.prefill(cache, [ids[b, :n] for b, n in enumerate(lengths)])
    for step in range(steps):
        for b, n in enumerate(lengths):
            torch.testing.assert_close(logits[b], full[b, n - 1 + step], rtol=0, atol=1e-4)
        logits = model.decode(cache, torch.stack([ids[b, n + step] for b, n in enumerate(lengths)]))
    assert cache.lengths.tolist() == [n + steps for n in lengths]


@pytest.mark.parametrize("rows", [1, 3])                                         # one row alone is multiplied in another way
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_decoding_crosses_the_blocks_of_the_cache(rows, dtype, error, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)                     # a row alone is then multiplied in four pieces
    model, ids = small(dtype=dtype), tokens(rows, 128)
    full, cache = model(ids)[0], model.new_cache(rows, 128)
    logits = model.prefill(cache, list(ids[:, :60]))
    for step in range(60, 128):
        torch.testing.assert_close(logits, full[:, step - 1], rtol=0, atol=error)
        logits = model.decode(cache, ids[:, step])


@pytest.mark.parametrize("loop_num, loop_input", KINDS)
def test_forward_with_a_cache_appends_pieces_of_any_length(loop_num, loop_input):
    model, ids = small(loop_num=loop_num, loop_input=loop_input), tokens(2, 43)
    full, cache, at = model(ids)[0], model.new_cache(2, 43), [3, 0]
    model.prefill(cache, [ids[0, :3]], rows=[0])                                 # one row is ahead when the other is still empty
    for n in (1, 3, 12, 1, 1, 17, 5):
        piece = lambda x, at=at, n=n: torch.stack([x[b, t:t + n] for b, t in enumerate(at)])
        logits, _ = model(piece(ids), cache=cache)
        torch.testing.assert_close(logits, piece(full), rtol=0, atol=1e-4)
        at = [t + n for t in at]


@pytest.mark.parametrize("loop_num, loop_input", KINDS)
def test_a_slot_is_refilled_copied_and_rests_while_the_others_go_on(loop_num, loop_input):
    model, ids = small(loop_num=loop_num, loop_input=loop_input), tokens(5, 40)
    full, cache = model(ids)[0], model.new_cache(4, 40)
    model.prefill(cache, [ids[0, :10], ids[1, :25]], rows=[0, 2])
    cache.copy(0, [1])
    at = {0: (0, 10), 1: (0, 10), 2: (1, 25), 3: None}                           # row -> which sequence it holds, and how far
    for step in range(12):
        if step == 4:                                                            # row 2 takes another prompt, row 3 its first
            cache.reset(2)
            logits = model.prefill(cache, [ids[3, :7], ids[4, :2]], rows=[2, 3])
            torch.testing.assert_close(logits, torch.stack([full[3, 6], full[4, 1]]), rtol=0, atol=1e-4)
            at[2], at[3] = (3, 7), (4, 2)
        active = torch.tensor([at[b] is not None and (b != 0 or step % 3 != 1) for b in range(4)])
        fed = torch.tensor([int(ids[at[b]]) if at[b] else 0 for b in range(4)])
        logits = model.decode(cache, fed, active)
        for b in range(4):
            if active[b]:
                torch.testing.assert_close(logits[b], full[at[b]], rtol=0, atol=1e-4)
                at[b] = at[b][0], at[b][1] + 1
    model.prefill(cache, [ids[0, at[0][1]:at[0][1] + 6]], rows=[0])              # and a rested row reads on
    cache.keep([3, 0])
    logits = model.decode(cache, torch.stack([ids[at[3]], ids[0, at[0][1] + 6]]))
    torch.testing.assert_close(logits, torch.stack([full[at[3]], full[0, at[0][1] + 6]]), rtol=0, atol=1e-4)


def test_the_cache_holds_one_pass_and_a_window_and_a_step_takes_no_further_memory():
    config = LoopCoderConfig.preset("nano")
    cache = LoopCoder(config).new_cache(3, 400)
    grow, once = m.cache_bytes_per_token(config, itemsize=4)
    assert cache.nbytes() == (3 * 448 * grow, 3 * once)                          # 400, one to put padding in, and up to whole blocks of 64
    assert once == config.loop_window_size * grow
    unrolled = dataclasses.replace(config, num_hidden_layers=8, loop_num=1)
    assert grow / m.cache_bytes_per_token(unrolled, itemsize=4)[0] == 0.5
    assert m.cache_bytes_per_token(LoopCoderConfig.preset("40b-loop")) == (320 * 1024, 20 * 2**20)
    storage = [x.data_ptr() for x in cache.tensors()]
    model = LoopCoder(config)
    for _ in range(3):
        model.decode(cache, torch.zeros(3, dtype=torch.int64))
    assert [x.data_ptr() for x in cache.tensors()] == storage


def test_a_full_cache_and_a_context_beyond_the_model_are_refused():
    model = small()
    cache = model.new_cache(1, 3)
    model.prefill(cache, [[1, 2, 3]])
    with pytest.raises(ValueError, match="3 tokens"):
        model.decode(cache, torch.tensor([4]))
    with pytest.raises(ValueError, match="3 tokens"):
        model.prefill(cache, [[4]])
    with pytest.raises(ValueError, match="128"):
        model.generate(tokens(1, 100), 29)
    with pytest.raises(ValueError, match="empty"):
        model.prefill(model.new_cache(1, 3), [[]])


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop_num", [1, 2])
def test_greedy_generation_is_the_argmax_of_the_full_forward_for_rows_of_different_length(loop_num):
    model, ids, lengths = small(loop_num=loop_num), tokens(3, 12), [12, 5, 9]
    out = model.generate(ids, 15, temperature=0, lengths=lengths, pad_id=60)
    assert out.shape == (3, 27)
    for b, n in enumerate(lengths):
        row = ids[b, :n].tolist()
        for _ in range(15):
            row.append(int(model(torch.tensor([row]))[0][0, -1].argmax()))
        assert out[b].tolist() == row + [60] * (27 - len(row))


def test_a_row_ends_with_its_stop_token_and_the_rest_is_padding():
    model, ids = small(), tokens(3, 6)
    free = model.generate(ids, 20, temperature=0)
    stop = int(free[0, 8])
    out = model.generate(ids, 20, temperature=0, stop_ids=(stop,), pad_id=59)
    for row, unstopped in zip(out.tolist(), free.tolist()):
        end = unstopped.index(stop, 6) + 1 if stop in unstopped[6:] else len(unstopped)
        assert row[:end] == unstopped[:end] and set(row[end:]) <= {59}


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1])).expand(20000, 4)
    g = torch.Generator().manual_seed(0)
    share = lambda **k: torch.bincount(m.sample(logits, generator=g, **k), minlength=4) / 20000
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b), rtol=0, atol=0.015)
    close(share(), [0.5, 0.25, 0.15, 0.1])
    p = torch.tensor([0.5, 0.25, 0.15, 0.1]) ** 2
    close(share(temperature=0.5), (p / p.sum()).tolist())
    close(share(top_k=0), [0.5, 0.25, 0.15, 0.1])
    close(share(top_k=2), [2 / 3, 1 / 3, 0.0, 0.0])
    close(share(top_p=0.6), [2 / 3, 1 / 3, 0.0, 0.0])
    close(share(top_p=0.4), [1.0, 0.0, 0.0, 0.0])
    assert (m.sample(logits, temperature=0) == 0).all()
    model, ids = small(), tokens(2, 5)
    draw = lambda: model.generate(ids, 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(), draw())


def test_no_new_tokens_is_the_prompt_and_settings_that_cannot_be_drawn_by_are_refused_with_name_and_rule():
    model, ids = small(), tokens(2, 5)
    assert torch.equal(model.generate(ids, 0), ids)
    assert model.generate(ids, 0, lengths=[2, 4], pad_id=7).tolist() == [[*ids[0, :2].tolist(), 7, 7], ids[1, :4].tolist()]
    for setting, rule in (({"temperature": -0.5}, "temperature=-0.5 must not be"), ({"top_k": -1}, "top_k=-1 must not be negative"),
                          ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"), ({"top_p": 1.5}, "top_p=1.5 must be")):
        for draw in (lambda **k: model.generate(ids, 1, **k), lambda **k: m.sample(torch.zeros(1, 4), **k)):
            with pytest.raises(ValueError, match=rule):
                draw(**setting)
    with pytest.raises(ValueError, match="max_new_tokens=-1 must not be negative"):
        model.generate(ids, -1)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_chunked_loss_and_its_gradients_equal_cross_entropy_on_all_logits(temperature, monkeypatch):
    monkeypatch.setattr(m, "LOSS_CHUNK", 7)
    model, ids, targets = small(dtype=torch.float64), tokens(3, 20), tokens(3, 20, seed=2)
    targets[torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.3] = -100
    weights = torch.rand(3, 20)
    for reduction in ("mean", "sum", "none"):
        grads = []
        for ours in (True, False):
            model.zero_grad()
            if ours:
                loss = model.loss(ids, targets, reduction=reduction, temperature=temperature)
            else:
                logits = F.linear(model.hidden(ids), model.lm_head.weight) / temperature
                loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction=reduction)
            (3 * loss if reduction != "none" else loss * weights).sum().backward()
            grads.append([loss.detach().double(), *(p.grad for p in model.parameters())])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_forward_with_targets_gives_the_same_loss_and_can_leave_the_logits_out():
    model, ids, targets = small(), tokens(2, 9), tokens(2, 9, seed=2)
    logits, loss = model(ids, targets)
    none, same = model(ids, targets, want_logits=False)
    assert none is None and torch.equal(loss, same) and torch.equal(loss, model.loss(ids, targets))
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), targets))
    assert model.loss(ids, torch.full_like(targets, -100)) == 0                   # nothing to learn is zero, not NaN


def test_the_gradient_of_a_batch_is_the_sum_over_its_rows():
    model, ids, targets = small(), tokens(4, 12), tokens(4, 12, seed=2)
    model.loss(ids, targets, reduction="sum").backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for b in range(4):
        model.loss(ids[b:b + 1], targets[b:b + 1], reduction="sum").backward()
    for a, p in zip(whole, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


def test_scaling_the_gradient_at_the_loop_boundary_leaves_the_values_and_scales_what_crosses():
    results = {}
    for scale in (1.0, 0.5):
        model, ids = small(loop_grad_scale=scale), tokens(2, 20)
        for gate in model.model.gate_projections:                                # shut gates: the hidden state is the only way back
            gate.weight.data.zero_()
            gate.bias.data.fill_(-math.inf)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results[scale] = loss.detach(), model.model.embed_tokens.weight.grad
    assert torch.equal(results[1.0][0], results[0.5][0])
    torch.testing.assert_close(results[0.5][1], results[1.0][1] * 0.5)


def test_recomputed_activations_and_bfloat16_compute_change_the_memory_and_the_rounding_only():
    model, ids = small(std=0.1), tokens(2, 30)
    def gradients(recompute=False, dtype=None):
        model.zero_grad()
        model.recompute, model.compute_dtype = recompute, dtype
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        return [p.grad.clone() for p in model.parameters()]
    plain, half = gradients(), gradients(dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(recompute=True)))
    assert all(b.dtype == torch.float32 for b in half)
    total = lambda gs: sum(float(g.square().sum()) for g in gs) ** 0.5
    assert 0 < total([a - b for a, b in zip(plain, half)]) < 0.03 * total(plain)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop_num", [1, 2])
@pytest.mark.parametrize("shard_bytes", [None, 5000])
def test_a_saved_model_comes_back_bit_for_bit_under_the_released_names(loop_num, shard_bytes, tmp_path):
    model = small(loop_num=loop_num)
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if shard_bytes is None else len(list(tmp_path.glob("*.safetensors"))) > 3
    back = LoopCoder.from_pretrained(tmp_path)
    assert back.config == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == ("iquestloopcoder" if loop_num == 2 else "llama") and config["loop_num"] == loop_num
    names = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight",
             "model.layers.0.post_attention_layernorm.weight", *(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"),
             *(f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))}
    assert names <= set(model.state_dict())
    assert ("model.gate_projections.1.weight" in model.state_dict()) == (loop_num == 2)
    small(seed=5, loop_num=loop_num).save_pretrained(tmp_path)                    # written over: nothing of the old shards stays
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_gates_stored_inside_their_layers_are_read_too(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, x in load_file(tmp_path / "model.safetensors").items():
        parts = name.split(".")
        tensors[f"model.layers.{parts[2]}.gate_projection.{parts[3]}" if parts[1] == "gate_projections" else name] = x
    assert "model.layers.1.gate_projection.bias" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(LoopCoder.from_pretrained(tmp_path)(tokens(1, 9))[0], model(tokens(1, 9))[0])


def test_the_released_config_gives_the_released_model(tmp_path):
    released = {"architectures": ["IQuestLoopCoderForCausalLM"], "model_type": "iquestloopcoder", "hidden_size": 5120, "head_dim": 128,
                "intermediate_size": 27648, "num_hidden_layers": 80, "num_attention_heads": 40, "num_key_value_heads": 8, "loop_num": 2,
                "loop_window_size": 64, "vocab_size": 76800, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
                "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
                "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 75864, 75869]}
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = LoopCoderConfig.from_json(tmp_path / "config.json")
    assert dataclasses.replace(config, bos_token_id=None, eos_token_id=None) == LoopCoderConfig.preset("40b-loop")
    (tmp_path / "config.json").write_text(json.dumps({**released, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    with pytest.raises(ValueError, match="rope_scaling"):
        LoopCoderConfig.from_json(tmp_path / "config.json")


def broken_missing(folder, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def broken_shape(folder, tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    save_file(tensors, folder / "model.safetensors")


def broken_end(folder, tensors):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def broken_config(folder, tensors):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("breaking, word", [(broken_missing, "up_proj.weight is missing"), (broken_shape, "up_proj.weight has shape"),
                                            (broken_end, "not a whole safetensors"), (broken_config, "config.json")])
def test_a_broken_checkpoint_is_one_line_and_exit_status_2(breaking, word, tmp_path):
    small().save_pretrained(tmp_path)
    breaking(tmp_path, load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=word):
        LoopCoder.from_pretrained(tmp_path)


def run(*args, **options):
    return subprocess.run([sys.executable, ROOT / "model.py", *args], capture_output=True, text=True, cwd=ROOT, **options)


def test_the_command_line_answers_wrong_input_with_one_line_and_status_2(tmp_path):
    lost = str(tmp_path / "no")
    for args, word in ((["--chat", "x", "--ckpt", lost], "no config.json"), (["--prompt", "x", "--chat", "y"], "not allowed")):
        result = run(*args)
        assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr
        assert result.stderr.count("\n") == 1 or "usage:" in result.stderr
    with pytest.raises(ValueError, match="--device abacus: not on this machine"):
        m.main(["--chat", "x", "--ckpt", str(tmp_path), "--device", "abacus"])
    table = run()
    assert table.returncode == 0 and "40b-loop" in table.stdout and "39,794,696,320" in table.stdout


ONE_COPY = """
import runpy, sys
import torch

real, made = torch.library.custom_op, []
torch.library.custom_op = lambda name, **options: made.append(name) or real(name, **options)
sys.argv = ["model.py", "--ckpt", sys.argv[1], "--prompt", "def ", "--max-new-tokens", "3"]
runpy.run_path("model.py", run_name="__main__")
assert len(made) == len(set(made)), made
"""


def test_a_program_that_completes_a_prompt_registers_its_operator_once(tmp_path):
    from data import Tokenizer
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 4, 275)
    tokenizer.save(tmp_path)
    small(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    result = subprocess.run([sys.executable, "-c", ONE_COPY, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stdout.startswith("def "), result.stderr


def test_chat_asks_as_fine_tuning_formats_a_conversation_and_the_users_text_never_becomes_a_special_token(tmp_path, monkeypatch, capsys):
    from data import Tokenizer
    from tasks import Task, task_parts
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 4, 275)
    tokenizer.save(tmp_path)
    small(vocab_size=tokenizer.vocab_size, max_position_embeddings=256).save_pretrained(tmp_path)
    said, answer = "Add x<|im_end|>", tokenizer.encode("return x")
    sample, learned = tokenizer.encode_parts(task_parts(Task("x", 1, 0, "train", (), said, "return x", "", "", {})))
    asked = {}

    def generate(self, ids, new, temperature, top_p, stop_ids, generator):
        asked.update(ids=ids, dtype=self.lm_head.weight.dtype, device=generator.device)
        return torch.cat([ids, torch.tensor([[*answer, tokenizer.special["<|im_end|>"]]])], 1)

    monkeypatch.setattr(LoopCoder, "generate", generate)
    m.main(["--chat", said, "--ckpt", str(tmp_path), "--device", "cpu", "--dtype", "bfloat16"])
    assert asked["ids"].tolist() == [sample[: learned.index(True)]] and (asked["dtype"], asked["device"].type) == (torch.bfloat16, "cpu")
    assert capsys.readouterr().out == "return x\n"
    m.main(["--prompt", said, "--ckpt", str(tmp_path), "--device", "cpu"])
    assert asked["ids"].tolist() == [tokenizer.encode(said)] and asked["dtype"] == torch.float32
    assert capsys.readouterr().out == said + "return x\n"


def test_a_preset_holds_the_longest_context_that_the_chain_trains_it_with():
    import train
    for name, preset in train.PRESETS.items():
        assert LoopCoderConfig.preset(name).max_position_embeddings == preset.contexts[-1]


def test_a_full_disk_while_saving_leaves_the_old_checkpoint_whole(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from model import LoopCoder
model = LoopCoder.from_pretrained({str(tmp_path)!r})
model.lm_head.weight.data.zero_()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))                        # every file ends after 10 kB: what a full disk does
try:
    model.save_pretrained({str(tmp_path)!r})
except OSError as error:
    print("model.safetensors" in str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---- from dense to loop ----------------------------------------------------------------------------------------------


def test_folding_takes_or_averages_the_layers_its_mode_names():
    dense = small(loop_num=1, num_hidden_layers=4)
    w = lambda model, l: model.model.layers[l].mlp.up_proj.weight
    expected = {"copy": [(0,), (1,), (2,), (3,)], "mean": [(0, 2), (1, 3)], "stride": [(0,), (2,)], "pair-mean": [(0, 1), (2, 3)]}
    for mode, sources in expected.items():
        loop = m.dense_to_loop(dense, mode, window=9)
        assert (loop.config.loop_num, loop.config.num_hidden_layers, loop.config.loop_window_size) == (2, len(sources), 9)
        for l, which in enumerate(sources):
            torch.testing.assert_close(w(loop, l), torch.stack([w(dense, s) for s in which]).mean(0))
        assert torch.equal(loop.lm_head.weight, dense.lm_head.weight)
        assert all((g.weight == 0).all() and (g.bias == 0).all() for g in loop.model.gate_projections)
    for bad in ({"mode": "median"}, {"loop_num": 3}):
        with pytest.raises(ValueError):
            m.dense_to_loop(dense, **bad)


def test_a_copied_model_at_alpha_zero_is_exactly_the_dense_model():
    dense, ids = small(loop_num=1), tokens(2, 20)
    loop = m.dense_to_loop(dense, "copy")
    loop.loop_alpha = torch.tensor(0.0)
    assert torch.equal(loop(ids)[0], dense(ids)[0])
    loop.loop_alpha = torch.tensor(0.3)
    some = loop(ids)[0]
    cache = loop.new_cache(2, 20)
    loop.prefill(cache, list(ids[:, :19]))
    torch.testing.assert_close(loop.decode(cache, ids[:, 19]), some[:, 19], rtol=0, atol=1e-4)
    assert not torch.equal(some, dense(ids)[0])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_parameter_counts_equal_the_built_models_and_the_reports_sizes():
    for name, size in (("nano", None), ("small", None), ("node", None), ("7b", 7e9), ("14b", 14e9), ("40b", 40e9), ("40b-loop", 40e9)):
        config = LoopCoderConfig.preset(name)
        with torch.device("meta"):
            model = LoopCoder(config)
        total, multiplied = m.parameter_count(config)
        assert total == sum(p.numel() for p in model.parameters())
        assert multiplied == sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight") or n == "lm_head.weight")
        assert size is None or abs(total / size - 1) < 0.1
    dense, loop = LoopCoderConfig.preset("40b"), LoopCoderConfig.preset("40b-loop")
    assert m.parameter_count(loop)[0] - m.parameter_count(dense)[0] == 80 * (40 * 128 + 40)     # the gates are all a loop adds


def test_flops_equal_those_that_pytorch_counts_outside_attention_and_the_pairs_inside():
    from torch.utils.flop_counter import FlopCounterMode
    config, T = LoopCoderConfig.preset("nano"), 96
    model = LoopCoder(config)
    with FlopCounterMode(display=False) as counted:
        model(tokens(1, T))
    near = sum(min(t + 1, config.loop_window_size) for t in range(T))
    pairs = config.num_hidden_layers * (2 * T * (T + 1) // 2 + near)             # two wide views and a local one a layer
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    assert m.flops_per_token(config, T, backward=False) * T == pytest.approx(counted.get_total_flops() + attention)
    assert m.flops_per_token(config, T) == 3 * m.flops_per_token(config, T, backward=False)


def test_wrong_shapes_are_refused_with_the_values_and_a_way_out():
    for changes, word in ((dict(num_key_value_heads=3), "num_key_value_heads=1 works"), (dict(head_dim=5), "even"),
                          (dict(loop_input="both"), "shift"), (dict(loop_num=0), "loop_num=0")):
        with pytest.raises(ValueError, match=word):
            LoopCoderConfig.preset("nano", **changes)
    with pytest.raises(ValueError, match="nano, small"):
        LoopCoderConfig.preset("tiny")


def test_rotation_keeps_lengths_depends_on_distances_alone_and_its_gradient_turns_back():
    cos, sin = (x.double() for x in m.rotary_table(torch.arange(9)[None], 8, 100.0))
    x = torch.randn(1, 9, 3, 8, dtype=torch.float64, requires_grad=True)
    y = m.rotate(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[..., 0] ** 2 + y[..., 4] ** 2, x[..., 0] ** 2 + x[..., 4] ** 2)    # half-split pairs
    same = m.rotate(x[:, :1].expand(-1, 9, -1, -1), cos, sin)[0, :, 0]           # one vector at nine positions
    torch.testing.assert_close((same[2] * same[0]).sum(), (same[8] * same[6]).sum(), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(lambda x: m.rotate(x, cos, sin), x)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("loop_input", ["hidden", "shift"])
def test_in_bfloat16_prefill_a_second_prompt_and_steps_are_as_exact_as_the_full_forward(loop_input, rows):
    model = small(dtype=torch.bfloat16, loop_input=loop_input)
    ids = tokens(rows, 60)
    with torch.no_grad():
        full, cache = model(ids)[0], model.new_cache(rows, 60)
        model.prefill(cache, [ids[0, :20], *ids[1:, :40]])
        model.prefill(cache, [ids[0, 20:40]], [0])
        steps = torch.stack([model.decode(cache, ids[:, t]) for t in range(40, 60)], 1)
        exact = model.double()(ids)[0][:, 40:]
    assert (steps - exact).norm() <= 1.5 * (full[:, 40:] - exact).norm() <= 0.2 * exact.norm()


def test_decoding_keeps_the_gates_as_they_are_trained():
    model = small()
    gate, bias = model.model.gate_projections[0].parameters()
    for compute, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model.compute_dtype = compute
        layer = m.PackedWeights(model, model.new_cache(2, 9)).layers[0]
        assert torch.equal(layer.gate, gate.to(kept)) and torch.equal(layer.bias, bias.to(kept))


@pytest.mark.parametrize("documents", [False, True])
def test_compiled_the_training_path_is_the_same_and_without_documents_it_is_one_graph(documents):
    model, ids = small(), tokens(2, 30)
    segments = torch.tensor([[0] * 10 + [1] * 19] * 2) if documents else None
    loss = torch.compile(model.loss, backend="aot_eager", fullgraph=not documents)(ids[:, :-1], ids[:, 1:], segments)
    loss.backward()
    compiled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(ids[:, :-1], ids[:, 1:], segments).backward()
    for a, p in zip(compiled, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_compiled_training_path_has_the_gradients_of_the_eager_one_and_none_is_zero():
    model = small(std=0.1, hidden_size=64, head_dim=16, num_attention_heads=4).cuda()
    model.compute_dtype, ids = torch.bfloat16, tokens(2, 301).cuda()
    segments = torch.tensor([[0] * 110 + [1] * 190, [0] * 300]).cuda()
    found = []
    for loss in (model.loss, torch.compile(model.loss)):
        model.zero_grad()
        loss(ids[:, :-1], ids[:, 1:], segments).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, eager in found[0].items():
        assert 0 < eager.norm() and (found[1][name] - eager).norm() <= 2e-2 * eager.norm(), name


def ring_rank(rank, P, folder):
    """One rank: the loss over a group equals the loss of one process, and so do the summed gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{P}", rank=rank, world_size=P)
    model, ids, targets = small(), tokens(2, 40), tokens(2, 40, seed=2)
    segments = torch.tensor([[0] * 13 + [1] * 20 + [2] * 7, [0] * 2 + [1] * 38])
    group = torch.distributed.group.WORLD
    loss = model.loss(*(shard_sequence(x, group) for x in (ids, targets, segments)), reduction="sum", group=group)
    loss.backward()
    total = loss.detach().clone()
    for x in (total, *(p.grad for p in model.parameters())):
        torch.distributed.all_reduce(x)
    got = [total, *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    whole = model.loss(ids, targets, segments, reduction="sum")
    whole.backward()
    for a, b in zip(got, [whole.detach(), *(p.grad for p in model.parameters())]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_sequence_over_two_ranks_has_the_loss_and_the_gradients_of_one_process(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":                                                       # the processes of the test above
    torch.multiprocessing.start_processes(ring_rank, (2, sys.argv[1]), nprocs=2, start_method="fork")
