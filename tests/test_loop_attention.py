"""Loop attention: the equations against numpy, the fast form against the equations, and the ring against one process."""
import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import loop_attention as la

ROOT = Path(__file__).resolve().parent.parent


def inputs(B=2, H=4, KV=2, T=70, D=16, docs=0, dtype=torch.float64, seed=0):
    """q, k1, v1, k2, v2, gate weight, gate bias that want gradients, and segment ids (or None)."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D)] + [(B, KV, T, D)] * 4 + [(H, D), (H,)]
    x = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    ids = torch.randint(0, docs, (B, T), generator=g).sort(dim=1).values if docs else None
    return x, ids


def softmax_rows(q, k, v, allowed):
    """Attention of one head by the definition, one query at a time: q (T, D), k and v (T, D), allowed(i) -> list of keys."""
    out = np.zeros_like(q)
    for i in range(len(q)):
        js = allowed(i)
        e = np.exp(k[js] @ q[i] / math.sqrt(q.shape[1]))
        out[i] = (e / e.sum()) @ v[js]
    return out


def by_hand(q, k1, v1, k2, v2, w, b, window, ids):
    """Equations 2 to 5 of the report in numpy float64, head by head and token by token."""
    B, H, T, _ = q.shape
    out = np.zeros_like(q)
    for row in range(B):
        for h in range(H):
            kv = h * k1.shape[1] // H
            mine = lambda i, near, row=row: [j for j in range(i + 1) if ids[row, j] == ids[row, i] and (not near or i - j < window)]
            a = softmax_rows(q[row, h], k1[row, kv], v1[row, kv], lambda i, mine=mine: mine(i, False))
            c = softmax_rows(q[row, h], k2[row, kv], v2[row, kv], lambda i, mine=mine: mine(i, True))
            g = 1 / (1 + np.exp(-(q[row, h] @ w[h] + b[h])))[:, None]
            out[row, h] = g * a + (1 - g) * c
    return out


@pytest.mark.parametrize("window, docs", [(1, 0), (5, 0), (5, 3), (40, 2)])
def test_the_reference_is_the_reports_equations_written_out_in_numpy(window, docs):
    x, ids = inputs(T=23, D=6, docs=docs)
    expected = by_hand(*(t.detach().numpy() for t in x), window, np.zeros((2, 23)) if ids is None else ids.numpy())
    np.testing.assert_allclose(la.loop_attention_reference(*x, window, ids).detach(), expected, rtol=0, atol=1e-13)


SHAPES = [  # B, H, KV, T, D, window, documents: odd lengths, one token, tiles and blocks that end anywhere, windows of every size
    (2, 4, 2, 200, 16, 9, 3), (1, 4, 4, 333, 8, 64, 0), (2, 6, 2, 130, 16, 2, 2), (1, 2, 1, 300, 16, 100, 4), (2, 4, 2, 257, 16, 300, 5),
    (1, 4, 2, 64, 16, 128, 0), (1, 4, 2, 5, 16, 64, 0), (3, 4, 2, 600, 16, 129, 6), (2, 4, 2, 1, 8, 3, 0), (1, 5, 1, 129, 8, 128, 1),
    (1, 2, 2, 1100, 8, 17, 2),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_the_fast_form_and_all_its_gradients_equal_the_reference(dtype, tolerance):
    for B, H, KV, T, D, window, docs in SHAPES:
        x, ids = inputs(B, H, KV, T, D, docs, dtype, seed=T)
        do = torch.randn(B, H, T, D, dtype=dtype)
        out = la.loop_attention(*x, window, ids)
        exact = [t.detach().double().requires_grad_() for t in x]
        expected = la.loop_attention_reference(*exact, window, ids)
        pairs = zip((out, *torch.autograd.grad(out, x, do)), (expected, *torch.autograd.grad(expected, exact, do.double())))
        for name, (a, b) in zip("o q k1 v1 k2 v2 w b".split(), pairs):
            assert (a - b).abs().max() <= tolerance * max(1, float(b.abs().max())), (name, B, H, KV, T, D, window, docs)


@pytest.mark.parametrize("T, tile", [(300, 128), (128, 64), (50, 128), (65, 16)])
@pytest.mark.parametrize("form", ["causal", "mask"])
def test_the_form_for_a_compiler_and_its_gradients_equal_the_equation(T, tile, form, monkeypatch):
    monkeypatch.setattr(la, "FUSED_TILE", tile)
    B, H, KV, D = 2, 6, 3, 8
    q, k, v = (torch.randn(B, heads, T, D, dtype=torch.float64, requires_grad=True) for heads in (H, KV, KV))
    i = torch.arange(T)
    window = torch.tensor([9, 30])[:, None]                                      # another one in each row
    keep = (i <= i[:, None]) & (i > i[:, None] - (window[..., None, None] if form == "mask" else T))
    masks = [x[:, None] for x in la.visibility(i - window + 1, i.expand(B, T), i.expand(B, T))] if form == "mask" else (None, None)
    do = torch.randn(B, H, T, D, dtype=q.dtype)
    o, expected = la.FusedAttention.apply(q, k, v, *masks), la.masked_attention(q, k, v, keep)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)
    for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(expected, (q, k, v), do)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_compiled_in_bfloat16_that_form_is_taken_and_as_exact_as_rounding_allows(monkeypatch):
    monkeypatch.setattr(la, "has_bfloat16_products", lambda: True)               # the choice of a CPU with AMX, on any
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    x, _ = inputs(T=300, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in x]
    do = torch.randn(2, 4, 300, 16).bfloat16()
    out, expected = torch.compile(la.loop_attention, backend=backend)(*x, 9, None), la.loop_attention_reference(*exact, 9)
    assert len(graphs) == 1 and graphs[0].count("higher_order.autograd_function_apply(") == 2            # one for each view
    assert (out - expected).norm() <= 0.01 * expected.norm()
    for a, b in zip(torch.autograd.grad(out, x, do), torch.autograd.grad(expected, exact, do.double())):
        assert (a - b).norm() <= 0.02 * b.norm()


def test_what_a_compiler_keeps_for_the_backward_grows_with_the_row_and_not_with_its_square():
    def kept(T):
        sizes = []
        q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
        causal = lambda q, k, v: la.FusedAttention.apply(q, k, v, None, None)
        form = torch.compile(causal, backend="aot_eager_decomp_partition", dynamic=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            form(q, k, v)
        return sum(sizes)

    assert kept(1024) <= 2.1 * kept(512)


@pytest.mark.parametrize("slots, S", [(128, 1), (128, 63), (128, 64), (128, 65), (128, 128), (5, 5), (70, 69)])
@pytest.mark.parametrize("H, KV", [(4, 4), (6, 3), (5, 1)])
def test_one_query_attends_alike_to_keys_by_rows_and_transposed_and_slots_not_in_use_are_never_read(H, KV, slots, S):
    g = torch.Generator().manual_seed(slots + S)
    q, (k, v) = torch.randn(3, H, 8, generator=g), torch.randn(2, 3, KV, slots, 8, generator=g)
    k[:, :, S:], v[:, :, S:] = math.nan, math.inf
    keep = torch.arange(S) < torch.tensor([1, S, (S + 1) // 2])[:, None, None, None]                # (B, 1, 1, S): rows of different length
    transposed = k.mT.contiguous().mT
    for mask in (None, torch.zeros(3, 1, 1, S).masked_fill(~keep, -math.inf)):
        seen = torch.ones_like(keep) if mask is None else keep
        exact = la.masked_attention(q[:, :, None].double(), k[:, :, :S].double(), v[:, :, :S].double(), seen)[:, :, 0].float()
        for keys in (k, transposed):
            torch.testing.assert_close(la.attention_step(q, keys[:, :, :S], v[:, :, :S], mask), exact, rtol=0, atol=1e-5)


def test_in_bfloat16_the_gate_of_a_step_is_as_exact_as_that_of_mix():
    g = torch.Generator().manual_seed(0)
    B, H, D = 50, 6, 32
    q, w, b = torch.randn(B, H, D, generator=g).bfloat16(), torch.randn(H, D, generator=g), torch.randn(H, generator=g)
    one, none = torch.ones(B, H, 1, D).bfloat16(), torch.zeros(B, H, 1, D).bfloat16()                # what comes out is the gate
    step = la.loop_attention_step(q, one, one, none, none, w, b, torch.ones(B, dtype=torch.int64))
    mixed = la.mix(q[:, :, None], one, none, w, b)[:, :, 0]
    exact = la.mix(q[:, :, None].double(), one.double(), none.double(), w.double(), b.double())[:, :, 0]
    assert ((step - exact) / exact).abs().max() <= ((mixed - exact) / exact).abs().max() < 2**-8


def test_plain_causal_attention_equals_pytorchs_own():
    (q, k, v, *_), _ = inputs(T=300, dtype=torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(la.causal_attention(q, k, v), expected, rtol=0, atol=2e-6)


def test_bfloat16_is_as_exact_as_rounding_its_inputs_allows():
    x, ids = inputs(T=200, docs=2, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in x]
    do = torch.randn(2, 4, 200, 16).bfloat16()
    out, expected = la.loop_attention(*x, 9, ids), la.loop_attention_reference(*exact, 9, ids)
    unfused = la.loop_attention_reference(*x, 9, ids)
    error, allowed = (out - expected).abs().max(), (unfused - expected).abs().max()
    assert error <= 2 * allowed
    for a, b in zip(torch.autograd.grad(out, x, do), torch.autograd.grad(expected, exact, do.double())):
        assert (a - b).norm() <= 0.02 * b.norm()


def test_an_open_gate_is_the_global_view_and_a_shut_one_the_local_view():
    x, ids = inputs(docs=2)
    q, k1, v1, k2, v2, w, _ = x
    for sign, k, v, window in ((1, k1, v1, 70), (-1, k2, v2, 5)):
        b = torch.full((4,), sign * math.inf, dtype=q.dtype)
        alone, _ = la.attend(q, k, v, 0, window, la.document_starts(ids))
        for form in (la.loop_attention, la.loop_attention_reference):
            torch.testing.assert_close(form(q, k1, v1, k2, v2, w, b, 5, ids), alone, rtol=0, atol=1e-13)


def test_the_local_view_is_the_last_w_positions_with_itself_included():
    x, _ = inputs(T=200)
    b = torch.full((4,), -math.inf, dtype=torch.float64)                         # local view only
    for window in (1, 7, 64, 130):
        out = la.loop_attention(*x[:6], b, window)
        assert out.isfinite().all()
        grads = torch.autograd.grad(out[:, :, 150].sum(), x[4])[0].abs().sum((0, 1, 3))     # v2: who is seen by token 150
        assert grads.nonzero()[:, 0].tolist() == list(range(max(0, 151 - window), 151))


def test_a_later_token_never_changes_an_earlier_output_bit_for_bit():
    x, _ = inputs(T=300, dtype=torch.float32)
    before = la.loop_attention(*x, 9)
    changed = [t.detach().clone() for t in x]
    for t in changed[:5]:
        t[:, :, 137:] = 1e4 * torch.randn_like(t[:, :, 137:])
    after = la.loop_attention(*changed, 9)
    assert torch.equal(before[:, :, :137], after[:, :, :137]) and not torch.equal(before, after)


def test_a_document_inside_a_pack_is_what_it_is_alone():
    x, _ = inputs(T=300)
    ids = torch.tensor([0] * 90 + [1] * 47 + [2] * 163).expand(2, -1)
    packed = la.loop_attention(*x, 64, ids)
    alone = la.loop_attention(*(t[:, :, 90:137] for t in x[:5]), *x[5:], 64)
    torch.testing.assert_close(packed[:, :, 90:137], alone, rtol=0, atol=1e-13)


def test_a_query_that_sees_no_key_gives_zero_and_minus_infinity_and_parts_merge_to_the_whole():
    (q, k, v, *_), _ = inputs(T=200)
    whole, lse = la.attend(q, k, v, 0, la.EVERYTHING, None)
    parts = [la.attend(q, k[:, :, a:b], v[:, :, a:b], -a, la.EVERYTHING, None) for a, b in ((0, 60), (60, 200))]
    assert (parts[1][0][:, :, :60] == 0).all() and (parts[1][1][:, :, :60] == -math.inf).all()
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse, rtol=0, atol=1e-12)
    merged = sum(torch.exp(l - lse)[..., None] * o for o, l in parts)
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-12)


def test_memory_grows_with_the_context_and_not_with_its_square():
    code = """
import resource, torch, loop_attention as la
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(T):
    x = [torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(5)] + [torch.zeros(1, 8), torch.zeros(1)]
    la.loop_attention(*x, 64).sum().backward()
run(1024); before = peak(); run(10000); print(peak() - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert grown < 120                                                           # MB; one 10000 x 10000 float32 tensor would be 400


@pytest.mark.parametrize("docs", [0, 2])
def test_compiled_it_gives_the_same_and_without_documents_it_is_one_graph(docs):
    x, ids = inputs(dtype=torch.float32, docs=docs)
    compiled = torch.compile(la.loop_attention, backend="aot_eager", fullgraph=docs == 0)
    a, b = compiled(*x, 9, ids), la.loop_attention(*x, 9, ids)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for g, h in zip(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x)):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-5)


# ---- the ring --------------------------------------------------------------------------------------------------------

RING_CASES = [  # T, window, documents, dtype: windows in a chunk, over several shards, wider than all; a length that 2 P does not divide
    (96, 9, 0, torch.float64), (96, 40, 3, torch.float64), (90, 1, 4, torch.float64), (96, 200, 2, torch.float64),
    (96, 7, 5, torch.float32), (90, 40, 3, torch.float32),
]


def ring_case(T, window, docs, dtype):
    """One case on this rank: largest error of the output and of every gradient against one process, relative to its largest value."""
    x, ids = inputs(T=T, D=8, docs=docs, dtype=dtype, seed=T + window)
    shards = [la.shard_sequence(t.detach(), dim=2).requires_grad_() for t in x[:5]] + [t.detach().requires_grad_() for t in x[5:]]
    my_ids = None if ids is None else la.shard_sequence(ids, pad=docs)
    do = torch.randn(2, 4, T, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = la.ring_loop_attention(*shards, window, my_ids)
    out.backward(la.shard_sequence(do, dim=2))
    expected = la.loop_attention_reference(*x, window, ids)
    expected.backward(do)
    for t in shards[5:]:
        torch.distributed.all_reduce(t.grad)
    got = [la.unshard_sequence(t, dim=2, length=T) for t in (out, *(t.grad for t in shards[:5]))] + [t.grad for t in shards[5:]]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, [expected.detach(), *(t.grad for t in x)]))


def ring_bytes(P, rank):
    """(bytes this rank sent, the formula's) for plain causal loop attention, and bytes sent where every chunk is a document."""
    H, KV, c, D, window = 2, 1, 8, 4, 5
    shards = [torch.randn(1, h, 2 * c, D, requires_grad=True) for h in (H, KV, KV, KV, KV)]
    gate = torch.zeros(H, D), torch.zeros(H)
    ring = la.Ring(2 * c)
    la.ring_loop_attention(*shards, *gate, window, ring=ring).sum().backward()
    formula = sum(sum(la.ring_bytes(2 * c * P, P, rank, KV * D, w, itemsize=4)) for w in (la.EVERYTHING, window))
    alone = la.Ring(2 * c, torch.tensor([[rank] * c + [2 * P - 1 - rank] * c]))
    la.ring_loop_attention(*shards, *gate, window, ring=alone).sum().backward()
    return ring.sent, formula, alone.sent


def ring_turned():
    """Output and gradients of this rank's part, and of the next one's part where all ranks have moved on by one: (fingerprints) x 2."""
    found = []
    for la.Ring.turn in (0, 1):
        x, ids = inputs(T=90, D=8, docs=3, dtype=torch.float32)
        shards = [la.shard_sequence(t.detach(), dim=2).requires_grad_() for t in x[:5]] + x[5:]
        ring = la.Ring(shards[0].shape[2], la.shard_sequence(ids, pad=3))
        q = ring.shift(shards[0].transpose(1, 2).flatten(2), ring.positions).unflatten(2, (4, 8)).transpose(1, 2)
        out = la.ring_loop_attention(q, *shards[1:], 40, ring=ring)
        found.append(torch.stack([la.fingerprint(t) for t in (out, *torch.autograd.grad(out.square().sum(), shards))]).tolist())
    la.Ring.turn = 0
    return found


def ring_rank(rank, P, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{P}", rank=rank, world_size=P)
    errors, sent, turned = [ring_case(*case) for case in RING_CASES], [None] * P, [None] * P
    torch.distributed.all_gather_object(sent, ring_bytes(P, rank))
    torch.distributed.all_gather_object(turned, ring_turned())
    if rank == 0:
        print(repr((P, errors, sent, turned)), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """(reports of 2, 4 and 8 ranks; lines of the table of 1, 2 and 4)."""
    result = subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("ring")], capture_output=True, text=True, timeout=300,
                            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = [ast.literal_eval(line) for line in result.stdout.splitlines() if line.startswith("(")]
    assert [P for P, *_ in lines] == [2, 4, 8, 1, 2, 4], result.stderr
    return lines[:3], lines[3:]


def test_the_ring_equals_one_process_with_2_4_and_8_ranks_and_sends_what_the_formula_says(ring):
    for P, errors, sent, _ in ring[0]:
        for case, error in zip(RING_CASES, errors):
            assert error < (1e-12 if case[3] == torch.float64 else 1e-5), (P, case)
        for rank, (measured, formula, alone) in enumerate(sent):
            assert measured == formula, (P, rank)
            assert alone == 0, (P, rank)                                         # nothing to attend to elsewhere: nothing sent


def test_a_rank_that_takes_the_part_of_the_next_one_computes_the_same_bits(ring):
    for P, _, _, turned in ring[0]:
        for rank in range(P):
            assert turned[rank][1] == turned[(rank + 1) % P][0] != turned[rank][0]


def test_the_memory_of_a_rank_falls_as_the_number_of_ranks_grows(ring):
    """The table of python loop_attention.py --tokens 8192: of fewer tokens, what the allocator keeps weighs too much."""
    (_, _, none, whole, error), *others = ring[1]
    assert none == 0 and error < 1e-5
    for P, _, sent, memory, error in others:
        assert memory < 1.4 * whole / P and error < 1e-5 and sent > 0, (P, memory, whole)


if __name__ == "__main__":                                                       # the processes of the tests above
    start = torch.multiprocessing.start_processes
    for size in (2, 4, 8):
        start(ring_rank, (size, sys.argv[1]), nprocs=size, start_method="fork")
    for size in (1, 2, 4):
        queue = torch.multiprocessing.get_context("fork").SimpleQueue()
        start(la.one_rank, (size, f"{sys.argv[1]}/table{size}", 8192, queue), nprocs=size, start_method="fork")
        print(repr(queue.get()), flush=True)
