"""
The fused kernel without a GPU, in three ways: its values and gradients under Triton's interpreter against the plain equation in
float64, its compilation for an H100 with the assembler's report of spilled registers, and its door, which refuses bad input.

TRITON_INTERPRET has to be set before Triton is imported, and then torch.compile no longer works in that process. So the tests
marked @interpreted run in worker processes of their own; the compiler runs in a third. Nothing here changes this process.
"""
import contextlib
import io
import math
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from loop_attention import loop_attention, loop_attention_reference, mix

ROOT = Path(kernels.__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(bool(kernels.triton is None or kernels.INTERPRETER_MISFIT),
                                  reason=kernels.INTERPRETER_MISFIT or "Triton is not installed")

# ---- processes -------------------------------------------------------------------------------------------------------

INSIDE = {}


def interpreted(test):
    """Makes a test run in a process where Triton interprets its kernels; an assertion that fails there fails here."""
    INSIDE[test.__name__] = test

    def outside(interpreter):
        interpreter.apply(inside, (test.__name__,))

    outside.__doc__ = test.__doc__
    return needs_triton(outside)


def inside(name, *args):
    """Runs one of this file's functions in a worker: fresh outputs are full of NaN, so a number that nobody wrote shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    return INSIDE[name](*args)


@contextlib.contextmanager
def workers(count, **environment):
    """Processes that start Python anew, with these variables set from the beginning."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        pool = multiprocessing.get_context("spawn").Pool(count)
    with pool:
        yield pool


@pytest.fixture(scope="module")
def interpreter():
    with workers(2, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") as pool:
        yield pool


# ---- the values ------------------------------------------------------------------------------------------------------


def poisoned(*shape, dtype=torch.float32, heads_last=False):
    """A random tensor (B, H, T, D) that is a slice of a buffer full of NaN: a load that leaves it cannot go unseen."""
    B, H, T, D = shape
    buffer = torch.full((B, T + 3, H, D) if heads_last else (B, H, T + 3, D), math.nan, dtype=dtype)
    x = buffer.transpose(1, 2)[:, :, 1:T + 1] if heads_last else buffer[:, :, 1:T + 1]
    return x.copy_(torch.randn(shape))


def gated_inputs(B, H, KV, T, D, bias=0.0, dtype=torch.float32):
    """The seven inputs of the kernel, in mixed memory orders, each wanting a gradient, and a gradient of the output."""
    q, do = poisoned(B, H, T, D, dtype=dtype, heads_last=True), poisoned(B, H, T, D, dtype=dtype)
    keys = [poisoned(B, KV, T, D, dtype=dtype, heads_last=i % 2 == 0) for i in range(4)]
    inputs = [q, *keys, torch.randn(H, D) * D**-0.5, torch.randn(H) + bias]
    return [x.requires_grad_() for x in inputs], do


def errors(function, inputs, do, *options):
    """{name: relative error against the reference in float64} of the output and the seven gradients. NaN stays NaN."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = kernels.value_and_gradients(loop_attention_reference, exact_inputs, do.double(), *options)
    found = kernels.value_and_gradients(function, inputs, do, *options)
    scale = do.double().norm() * 0.03                                            # a gradient may be exactly zero (T = 1)
    return {n: ((a.double() - e).norm() / e.norm().clamp(min=scale)).item() for n, a, e in zip(kernels.NAMES, found, exact)}


def segments(B, T, *lengths):
    """Packed documents of these lengths, one batch row shifted by one so that rows differ; the rest of the row is one more."""
    ids = torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([*lengths, T]))[:T]
    return torch.stack([ids if b % 2 == 0 else torch.cat([ids[:1], ids[:-1]]) for b in range(B)])


# B, H, KV, T, D, window, documents, bias of the gate. The interpreter's tiles are 64 rows x 32 keys.
CASES = [
    (2, 2, 2, 1, 16, 1, None, 0), (1, 10, 2, 1, 32, 64, (1,), 0), (2, 4, 2, 7, 16, 1, (3,), 0), (1, 2, 1, 7, 64, 8, None, 0),
    (1, 5, 1, 7, 16, 1000, (1, 1, 1), 8), (2, 2, 1, 64, 16, 8, None, -8), (1, 5, 1, 64, 32, 64, (31, 2), 0), (1, 2, 2, 64, 16, 1, (64,), 0),
    (1, 2, 1, 65, 128, 64, (1, 63), 0), (2, 1, 1, 65, 16, 8, (64,), 0), (1, 5, 1, 65, 16, 1000, None, 8), (1, 2, 1, 65, 16, 1, None, 0),
    (1, 2, 1, 200, 16, 64, None, 0), (1, 2, 2, 200, 16, 8, (1, 62, 70), 0), (1, 2, 1, 200, 32, 1000, (130,), -8),
    (1, 1, 1, 200, 16, 1, (33, 100), 0), (1, 2, 1, 200, 16, 64, (64, 64), 0),
]


def parity(B, H, KV, T, D, window, documents, bias, dtype=torch.float32):
    inputs, do = gated_inputs(B, H, KV, T, D, bias, dtype)
    assert torch.empty(5).isnan().all(), "the poison must be there for the test to mean anything"
    return errors(kernels.fused_gated_attention, inputs, do, window, None if documents is None else segments(B, T, *documents))


INSIDE["parity"] = parity


@pytest.fixture(scope="module")
def parities(interpreter):
    """Every case, started at once, so that both workers stay busy while other tests wait."""
    return {case: interpreter.apply_async(inside, ("parity", *case)) for case in CASES}


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{} H{}/{} T{} D{} w{} docs{} bias{}".format(*case).replace(" ", ""))
def test_the_output_and_all_seven_gradients_equal_the_reference_in_float64(parities, case):
    found = parities[case].get(1200)
    assert len(found) == 8 and all(e <= 3e-6 for e in found.values()), found


@interpreted
def test_half_precision_inputs_keep_float32_sums():
    found = parity(1, 2, 1, 130, 16, 20, (50,), 0, torch.float16)
    assert all(e <= 2e-3 for e in found.values()), found                         # one rounding to float16 is 2.4e-4 on average


@interpreted
def test_blocks_of_other_documents_are_skipped_and_not_just_masked():
    (q, k1, v1, k2, v2, w, b), do = gated_inputs(1, 2, 1, 192, 16)
    ids = segments(1, 192, 64, 64, 64)
    with torch.no_grad():
        for x in (k1, v1, k2, v2):
            x[:, :, 64:128] = math.nan                                           # a weight of 0 would not save anyone from it
        clean = [torch.where(x.isnan(), 0.0, x).detach() for x in (q, k1, v1, k2, v2)]
    inputs = [q, k1, v1, k2, v2, w, b]
    o, dq, dk1, dv1, dk2, dv2, *_ = kernels.value_and_gradients(kernels.fused_gated_attention, inputs, do, 20, ids)
    expected = loop_attention_reference(*clean, w, b, 20, ids)
    for rows in (slice(0, 64), slice(128, 192)):
        torch.testing.assert_close(o[:, :, rows], expected[:, :, rows].detach())
        assert dq[:, :, rows].isfinite().all()
    for rows in (slice(0, 32), slice(128, 192)):                                 # keys 32 .. 63 share a row tile with the next document
        assert all(g[:, :, rows].isfinite().all() for g in (dk1, dv1, dk2, dv2))


@interpreted
def test_a_later_token_and_another_document_change_no_bit():
    inputs, _ = gated_inputs(1, 2, 1, 100, 16)
    ids = segments(1, 100, 30)
    with torch.no_grad():
        before = kernels.fused_gated_attention(*inputs, 9, ids)
        for x in inputs[:5]:
            x[:, :, 60:] = torch.randn_like(x[:, :, 60:])
            x[:, :, :30] = torch.randn_like(x[:, :, :30])
        after = kernels.fused_gated_attention(*inputs, 9, ids)
    assert torch.equal(before[:, :, 30:60], after[:, :, 30:60]) and not torch.equal(before[:, :, 60:], after[:, :, 60:])


@interpreted
def test_a_row_alone_and_a_second_run_give_the_same_bits():
    inputs, do = gated_inputs(2, 2, 1, 70, 16)
    ids = segments(2, 70, 40)
    both = kernels.value_and_gradients(kernels.fused_gated_attention, inputs, do, 9, ids)
    again = kernels.value_and_gradients(kernels.fused_gated_attention, inputs, do, 9, ids)
    row = [x.detach()[1:].requires_grad_() for x in inputs[:5]] + inputs[5:]
    alone = kernels.value_and_gradients(kernels.fused_gated_attention, row, do[1:], 9, ids[1:])
    assert all(torch.equal(a, b) for a, b in zip(both, again))
    assert all(torch.equal(a[1:], b) for a, b in zip(both[:6], alone[:6]))


@interpreted
def test_an_open_gate_is_the_global_view_and_a_closed_one_the_local():
    (q, k1, v1, k2, v2, w, b), do = gated_inputs(1, 2, 1, 70, 16)
    for bias, view, mine, other in ((math.inf, (k1, v1, None), (2, 3), (4, 5)), (-math.inf, (k2, v2, 9), (4, 5), (2, 3))):
        inputs = [q, k1, v1, k2, v2, torch.zeros_like(w).requires_grad_(), torch.full_like(b, bias).requires_grad_()]
        found = kernels.value_and_gradients(kernels.fused_gated_attention, inputs, do, 9)
        k, v, window = view
        expected, _ = kernels.flash_partial(q, k, v, window=window)
        torch.testing.assert_close(found[0], expected.detach(), rtol=1e-6, atol=1e-6)
        for i, gradient in zip((1, *mine), torch.autograd.grad(expected, (q, k, v), do)):
            torch.testing.assert_close(found[i], gradient, rtol=1e-5, atol=1e-5)
        assert not any(found[i].any() for i in (*other, 6, 7)), "what the gate shuts out has no gradient, and a saturated gate none either"


@interpreted
def test_only_the_promised_tensors_are_kept_for_the_backward():
    B, H, KV, T, D = 2, 4, 2, 70, 16
    inputs, _ = gated_inputs(B, H, KV, T, D)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.fused_gated_attention(*inputs, 9)
    ours = [x for x in kept if x is not None and not any(x.data_ptr() == y.data_ptr() for y in inputs)]
    # the global output, two LSE rows, the gate logit
    assert sorted(x.numel() for x in ours) == sorted([B * H * T * D] + 3 * [B * H * T])
    with torch.no_grad():
        outputs = kernels.gated_forward(*inputs, None, 9, False)
    assert [x.numel() for x in outputs] == [B * H * T * D, 0, 0, 0, 0]


@interpreted
def test_any_memory_order_and_an_expanded_gradient_are_read_right():
    inputs, _ = gated_inputs(1, 2, 1, 40, 16)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs[:5]] + inputs[5:]          # D is the slow axis
    plain = [x.detach().contiguous().requires_grad_() for x in inputs[:5]] + inputs[5:]
    one = torch.ones(()).expand(1, 2, 40, 16)
    a, b = (kernels.value_and_gradients(kernels.fused_gated_attention, x, one, 9) for x in (turned, plain))
    assert turned[0].stride(-1) != 1 and all(torch.equal(x, y) for x, y in zip(a, b))


@interpreted
def test_the_operators_are_sound_for_torch_compile():
    inputs, do = gated_inputs(1, 2, 1, 10, 16)
    starts = kernels.document_starts(segments(1, 10, 4))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels.gated_forward, (*inputs, starts, 3, True), test_utils=checks)
    torch.library.opcheck(kernels.flash_forward, (*inputs[:3], starts, 0, 5, torch.float32), test_utils=checks)
    compiled = torch.compile(kernels.fused_gated_attention, backend="aot_eager", fullgraph=True)
    expected, found = (kernels.value_and_gradients(f, inputs, do, 3, segments(1, 10, 4)) for f in (kernels.fused_gated_attention, compiled))
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


# ---- partial attention -----------------------------------------------------------------------------------------------


def merge(parts):
    """o and lse of the union of parts [(o, lse)], as flash_partial() says."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return sum((part_lse - lse).exp()[..., None] * o for o, part_lse in parts), lse


@interpreted
def test_parts_merge_into_the_whole_with_gradients_through_both_outputs():
    """Keys in chunks of 24, 40 and 6 to the left of, under and beyond the queries, as a ring would bring them."""
    B, H, KV, T, D = 1, 4, 2, 70, 16
    (q, k, v, *_), do = gated_inputs(B, H, KV, T, D)
    starts = kernels.document_starts(segments(B, T, 30))
    for window in (None, 9):
        one_view = torch.full((H,), -math.inf).double()                          # the local view alone, as wide as asked
        inputs = (*(x.double() for x in (q, k, v, k, v)), torch.zeros(H, D).double(), one_view)
        whole = loop_attention_reference(*inputs, window or T, segments(B, T, 30))
        parts = [kernels.flash_partial(q, k[:, :, a:b], v[:, :, a:b], shift=-a, window=window, starts=(starts - a).clamp(min=0))
                 for a, b in ((0, 24), (24, 64), (64, 70))]
        assert (parts[2][1][:, :, :64] == -math.inf).all() and not parts[2][0][:, :, :64].any()     # rows that see no key
        # a row that sees nothing of any part does not exist here; keep -inf out of the merge's own gradient
        finite = [(o, torch.where(lse == -math.inf, -1e30, lse)) for o, lse in parts]
        o, _ = merge(finite)
        torch.testing.assert_close(o.double(), whole, rtol=1e-5, atol=1e-5)
        exact, found = torch.autograd.grad(whole, (q, k, v), do.double()), torch.autograd.grad(o, (q, k, v), do)
        for a, b in zip(found, exact):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
def test_a_partial_backward_with_merged_statistics_and_a_gate_is_a_share_of_the_whole():
    (q, k, v, *_), do = gated_inputs(1, 4, 2, 50, 16)
    gate = torch.rand(1, 4, 50) + 0.1
    o, lse = kernels.flash_partial(q, k, v)
    expected = torch.autograd.grad(o * gate[..., None], (q, k, v), do)
    delta = (do * o).sum(-1).detach()
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for a, b in ((0, 20), (20, 50)):
        dq, dk, dv = kernels.flash_partial_backward(do, q, k[:, :, a:b], v[:, :, a:b], lse.detach() - gate.log(), delta, shift=-a)
        found[0] += dq; found[1][:, :, a:b] += dk; found[2][:, :, a:b] += dv
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
def test_pass_one_on_packed_rows_is_the_same_partial_attention():
    (q, k, v, *_), do = gated_inputs(1, 4, 2, 100, 16, dtype=torch.float16)
    o, _ = kernels.flash_partial(q, k, v, starts=kernels.document_starts(segments(1, 100, 30, 30)), dtype=q.dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    one_view = torch.zeros(4, 16).double(), torch.full((4,), math.inf).double()
    o2 = loop_attention_reference(*wide, *wide[1:], *one_view, 1, segments(1, 100, 30, 30))
    torch.testing.assert_close(o.double(), o2, rtol=1e-3, atol=1e-3)
    for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(o2, wide, do.double())):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


# ---- decoding --------------------------------------------------------------------------------------------------------


@interpreted
def test_decoding_from_the_caches_equals_the_last_row_of_the_full_attention():
    """Ragged rows, caches whose unused slots are NaN, a ring that has gone round many times, parts that are empty for short rows."""
    B, H, KV, T, D, W = 4, 4, 2, 600, 16, 20
    (q, k1, v1, k2, v2, w, b), _ = gated_inputs(B, H, KV, T, D)
    lengths = torch.tensor([1, 600, 257, 20])
    long, ring = torch.full((2, B, KV, T + 5, D), math.nan), torch.full((2, B, KV, W, D), math.nan)
    expected, last = [], []
    with torch.no_grad():
        for row, n in enumerate(lengths.tolist()):
            for i, (far, near) in enumerate(((k1, k2), (v1, v2))):
                long[i, row, :, :n] = far[row, :, :n]
                for p in range(max(0, n - W), n):
                    ring[i, row, :, p % W] = near[row, :, p]
            one = [x[row:row + 1, :, :n] for x in (q, k1, v1, k2, v2)]
            expected.append(loop_attention(*one, w, b, W)[:, :, -1:])
            last.append(q[row:row + 1, :, n - 1:n])
        new = torch.cat(last)
        found = kernels.fused_gated_decode(new, long[0], long[1], ring[0], ring[1], w, b, lengths)
        alone = kernels.fused_gated_decode(new[2:3], long[0, 2:3], long[1, 2:3], ring[0, 2:3], ring[1, 2:3], w, b, lengths[2:3])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2:3], alone), "a row's result must not depend on the batch"


# ---- the compiler ----------------------------------------------------------------------------------------------------


class AnH100:
    """What Triton asks a driver before it compiles, answered for an H100 that need not be there."""
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("meta"))

    @staticmethod
    def get_current_target():
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)


def gpu_launches(D, H=40, KV=8, T=4096):
    """
    The launches of a training step on packed rows at the released shape, and for the released D also those of pass 1 and of decoding,
    in bfloat16 on tensors without data: exactly what a GPU would be sent.
    """
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    heads = lambda n, T=T: empty(1, T, n, D).transpose(1, 2)
    q, k, w, b, starts = heads(H), heads(KV), empty(H, D), empty(H), empty(1, T, dtype=torch.int32)
    out = kernels.gated_outputs(q, save=True)
    backward, _ = kernels.gated_backward_launches(q, q, k, k, k, k, w, starts, starts, *out[1:], 64, q, k, k, k, k)
    others = [kernels.flash_forward_launch(q, k, k, starts, 0, kernels.EVERYTHING, q, out[2]),
              kernels.flash_dq_launch(q, q, k, k, *out[2:4], starts, 0, kernels.EVERYTHING, q)]
    new, ring = heads(H, 1), heads(KV, 64)
    others += kernels.decode_launches(new, k, k, ring, ring, w, b, empty(1, dtype=torch.int32), new)
    return [kernels.gated_forward_launch(q, k, k, k, k, w, b, starts, 64, *out), *backward[:2], *(others if D == 128 else [])]


def compile_for_an_h100(D):
    """[(kernel, bytes spilled, shared memory, its PTX, the assembler's words)] for each kernel."""
    triton = kernels.triton
    triton.runtime.driver.set_active(AnH100())
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    found = []
    for function, grid, args, constants in gpu_launches(D):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compiled = function.warmup(*args, grid=grid, **constants)
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", said.getvalue())]
        found.append((function.__name__, spilled, compiled.metadata.shared, compiled.asm["ptx"], said.getvalue()))
    return found


INSIDE["compile_for_an_h100"] = compile_for_an_h100


def ptxas_is_missing():
    try:
        from triton.backends.nvidia.compiler import get_ptxas
        return not Path(get_ptxas(90).path).exists()
    except (ImportError, RuntimeError):
        return True


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Both head sizes, started at once in a process of their own."""
    if ptxas_is_missing():
        pytest.skip("Triton's CUDA assembler (ptxas) is not here")
    with workers(2, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")), TRITON_INTERPRET="0") as pool:
        yield {D: pool.apply_async(inside, ("compile_for_an_h100", D)) for D in (128, 64)}


@pytest.mark.parametrize("D", [128, 64])
def test_forward_and_backward_compile_for_an_h100_without_spilling_a_register(compiled, D):
    found = compiled[D].get(1200)
    decoding = ["decode_kernel", "merge_kernel"]
    others = ["flash_forward_kernel", "flash_dq_kernel", *decoding] if D == 128 else []
    assert [name for name, *_ in found] == ["forward_kernel", "dq_kernel", "dkv_kernel", *others]
    for name, spilled, shared, ptx, said in found:
        assert spilled == [0, 0], f"{name}: {said}"                              # stores, loads
        room = 99 if name in decoding else 227                                   # decoding has one tile for all GPUs, the smaller ones too
        assert shared <= room * 1024, f"{name} asks for more shared memory than there is: {shared}"
        assert "wgmma.mma_async" in ptx or name in decoding, f"{name} does not reach Hopper's matrix units"
        wide = re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx)
        assert wide or name == "merge_kernel", f"{name} does not copy 16 bytes at a time"


# ---- the door --------------------------------------------------------------------------------------------------------


def arguments(B=1, H=4, KV=2, T=6, D=16):
    q, k = torch.randn(B, H, T, D), torch.randn(B, KV, T, D)
    return dict(q=q, k_global=k, v_global=k, k_local=k, v_local=k, gate_weight=torch.randn(H, D), gate_bias=torch.randn(H), window=3)


WRONG = {
    "three axes": (dict(q=torch.randn(4, 6, 16)), "q must be"),
    "D 24": (arguments(D=24), "q: the head size D must be 16, 32, 64 or 128"),
    "H not a multiple": (dict(q=torch.randn(1, 5, 6, 16)), "q has 5 heads, which must be a multiple of the 2"),
    "shorter keys": (dict(k_global=torch.randn(1, 2, 5, 16)), "k_global must have the 6 positions of q"),
    "other batch": (dict(v_local=torch.randn(2, 2, 6, 16)), "v_local must be"),
    "other KV": (dict(k_local=torch.randn(1, 4, 6, 16)), "k_local must be"),
    "double": (dict(q=torch.randn(1, 4, 6, 16).double()), "q must be float32, float16 or bfloat16"),
    "mixed dtypes": (dict(v_global=torch.randn(1, 2, 6, 16).half()), "v_global is torch.float16"),
    "gate of another shape": (dict(gate_weight=torch.randn(2, 16)), "gate_weight must have one row per query head"),
    "bias of another shape": (dict(gate_bias=torch.randn(4, 1)), "gate_bias must have"),
    "no window": (dict(window=0), "window must be an int of at least 1"),
    "a window of floats": (dict(window=2.5), "window must be an int"),
    "segments of another length": (dict(segment_ids=torch.zeros(1, 5, dtype=torch.long)), "segment_ids must be (B, T) = (1, 6)"),
    "segments that are floats": (dict(segment_ids=torch.zeros(1, 6)), "segment_ids must be integers"),
    "no tokens": (arguments(T=0), "q must be (B, H, T, D) with no empty axis"),
    "a million and one tokens": (dict(k_local=torch.zeros(1).expand(1, 2, 1_000_001, 16)), "the longest of 1000001; a launch holds"),
    "more rows than a launch": ({n: torch.zeros(1).expand(65536, 2, 6, 16) for n in ("q", "k_global", "v_global", "k_local", "v_local")},
                                "q: 65536 rows, the longest of 6; a launch holds 65535"),
}


def test_wrong_arguments_raise_a_valueerror_that_names_the_argument_and_the_rule(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)                            # the rules before the device's, which is the last
    monkeypatch.setattr(kernels, "triton", object())
    for name, (change, message) in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.fused_gated_attention(**{**arguments(), **change})
            pytest.fail(f"{name} was accepted")


def test_cpu_tensors_without_the_interpreter_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "triton", object())
    with pytest.raises(ValueError, match="q is on cpu: the kernel needs a CUDA device.*TRITON_INTERPRET=1.*loop_attention"):
        kernels.fused_gated_attention(**arguments())


def test_bfloat16_is_refused_where_the_interpreter_would_get_it_wrong(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(kernels, "triton", object())
    bf16 = {n: x.bfloat16() if isinstance(x, torch.Tensor) else x for n, x in arguments().items()}
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        kernels.fused_gated_attention(**bf16)


# ---- the file --------------------------------------------------------------------------------------------------------


def python(*args, **environment):
    env = dict(os.environ, **environment)
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


def test_the_file_imports_without_triton_and_says_what_is_missing():
    code = ("import runpy, sys; sys.modules['triton'] = None\n"
            "import torch, kernels\n"
            "x = torch.randn(1, 2, 4, 16)\n"
            "try: kernels.fused_gated_attention(x, x, x, x, x, torch.randn(2, 16), torch.randn(2), 3)\n"
            "except ValueError as error: print(error)\n"
            "sys.argv[1:] = []; runpy.run_path('kernels.py', run_name='__main__')")
    ran = python("-c", code)
    assert "needs Triton, which is not installed" in ran.stdout, ran.stderr
    assert ran.returncode == 2 and re.fullmatch(r"kernels\.py: Triton is not installed, .*: pip install triton\n", ran.stderr), ran.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command prints the table of times")
def test_the_command_checks_the_kernel_without_a_gpu_and_times_nothing():
    ran = python("kernels.py")
    assert ran.returncode == 0 and "\ncorrect\n" in ran.stdout and "times: not measured" in ran.stdout, ran.stdout + ran.stderr
    with pytest.raises(ValueError, match="--tiles times kernels, which needs a GPU"):
        kernels.main(["--tiles"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_peer_that_cannot_run_says_why_and_the_others_compute_the_same_values(monkeypatch, capsys):
    """On a CPU two of the four peers of the bench can run, without being compiled; the others must not end the table."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda f: f))
    monkeypatch.setattr(kernels, "milliseconds", lambda *call: 1.0)
    T, cpu = 96, torch.device("cpu")
    inputs = [x.detach() for x in kernels.random_inputs(1, 4, 2, T, 16, cpu, torch.float32)[0]]
    for n in (1, 3):
        ids = (torch.arange(T) // (T // n))[None]
        kernels.row_of_times(lambda *x: loop_attention_reference(*x, 9, ids), kernels.baselines(mix, T, n, 9, cpu), inputs, None, T, n)     # noqa: B023
    said = capsys.readouterr().out
    assert len(re.findall(r"flex +1\.00 x", said)) == len(re.findall(r"2 SDPA +1\.00 x", said)) == 2 and "OTHER" not in said, said
    assert said.count("FA2 chain failed (NotImplementedError: Could not run") == said.count("cuDNN chain failed (") == 2, said


# ---- on a GPU --------------------------------------------------------------------------------------------------------


GPU, HALF, BACKEND = torch.device("cuda"), torch.bfloat16, "inductor"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("T, D, documents", [(1, 64, None), (200, 16, (64, 64)), (513, 32, (100, 300)), (1000, 128, None),
                                             (1000, 128, (333, 500))])
def test_on_a_gpu_values_and_gradients_equal_the_reference_and_two_runs_are_equal_bit_for_bit(T, D, documents):
    B, H, KV, window = 2, 10, 2, 64
    ids = None if documents is None else segments(B, T, *documents).to(GPU)
    torch.use_deterministic_algorithms(True, warn_only=True)                     # fresh outputs are full of NaN
    try:
        for dtype in (torch.float32, HALF):
            inputs, do = kernels.random_inputs(B, H, KV, T, D, GPU, dtype)
            found = errors(kernels.fused_gated_attention, inputs, do, window, ids)
            chain = errors(loop_attention_reference, inputs, do, window, ids)    # the plain equation in this dtype
            limit = {n: 1e-5 if dtype == torch.float32 else max(2 * chain[n], 1e-2) for n in found}
            assert all(found[n] <= limit[n] for n in found), (dtype, found, chain)
            first, second = (kernels.value_and_gradients(kernels.fused_gated_attention, inputs, do, window, ids) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("B, H, KV, T, D, W", [(2, 10, 2, 700, 128, 64)])
def test_on_a_gpu_decoding_equals_the_last_row_of_the_full_attention(B, H, KV, T, D, W):
    inputs, _ = kernels.random_inputs(B, H, KV, T, D, GPU, HALF)
    with torch.no_grad():
        q, k1, v1, k2, v2, w, b = inputs
        slots = torch.arange(T - W, T, device=q.device) % W
        ring = [torch.empty(B, KV, W, D, device=q.device, dtype=q.dtype).index_copy(2, slots, x[:, :, -W:]) for x in (k2, v2)]
        found = kernels.fused_gated_decode(q[:, :, -1:], k1, v1, *ring, w, b, torch.full((B,), T))
        torch.testing.assert_close(found, kernels.fused_gated_attention(*inputs, W)[:, :, -1:], rtol=2e-2, atol=2e-2)


def both_passes(q, k, v, k2, v2, w, b, ids):
    """What a model asks of this file in a step: pass 1 on packed rows, then the gated pass."""
    first = kernels.flash_partial(q, k, v, starts=kernels.document_starts(ids), dtype=q.dtype)[0]
    return first + kernels.fused_gated_attention(q, k, v, k2, v2, w, b, 64, ids)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("T, D", [(1000, 128), (300, 64)])
def test_on_a_gpu_both_passes_equal_the_reference_and_compiled_they_give_the_same_bits_each_time(T, D):
    inputs, do = kernels.random_inputs(2, 10, 2, T, D, GPU, HALF)
    ids = segments(2, T, T // 3, T // 2).to(GPU)

    def exact(q, k, v, k2, v2, w, b):                                            # a wide open gate is plain attention
        open_gate = torch.zeros_like(w), torch.full_like(b, math.inf)
        return loop_attention_reference(q, k, v, k2, v2, *open_gate, 64, ids) + loop_attention_reference(q, k, v, k2, v2, w, b, 64, ids)

    wide = kernels.value_and_gradients(exact, [x.detach().double().requires_grad_() for x in inputs], do.double())
    eager = kernels.value_and_gradients(both_passes, inputs, do, ids)
    for name, a, e in zip(kernels.NAMES, eager, wide):
        assert (a.double() - e).norm() <= 1e-2 * e.norm(), name
    call = torch.compile(both_passes, fullgraph=True, backend=BACKEND)
    first, second = (kernels.value_and_gradients(call, inputs, do, ids) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(first[0], eager[0])
    for name, a, b in zip(kernels.NAMES, first, eager):                          # a compiler sums do * o of pass 1 in another order
        assert (a.double() - b.double()).norm() <= 1e-4 * b.double().norm(), name


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_step_can_be_captured_in_a_cuda_graph_so_nothing_waits_for_the_host():
    inputs, do = kernels.random_inputs(1, 10, 2, 500, 128, GPU, HALF)
    ids, graph, stream = segments(1, 500, 200).to(GPU), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernels.value_and_gradients(both_passes, inputs, do, ids)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = kernels.value_and_gradients(both_passes, inputs, do, ids)
    with torch.no_grad():
        inputs[0].neg_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, kernels.value_and_gradients(both_passes, inputs, do, ids)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("B, T, H, KV, D", [(52, 8192, 40, 8, 128)])
def test_on_a_gpu_rows_beyond_2_to_the_31_elements_are_found(B, T, H, KV, D):
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    draw = lambda heads: torch.empty(B, T, heads, D, device=GPU, dtype=HALF).normal_().transpose(1, 2)
    q, k, v = draw(H), draw(KV), draw(KV)
    gate = torch.randn(H, D, device=GPU) * D**-0.5, torch.randn(H, device=GPU)
    o = kernels.fused_gated_attention(q, k, v, v, k, *gate, 64)[-1:]
    assert torch.equal(o, kernels.fused_gated_attention(q[-1:], k[-1:], v[-1:], v[-1:], k[-1:], *gate, 64))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_memory_is_the_output_and_what_the_backward_needs():
    inputs, _ = kernels.random_inputs(1, 40, 8, 4096, 128, GPU, HALF)
    X, rows = inputs[0].nbytes, 40 * 4096 * 4
    for gradients, allowed in ((False, X), (True, 2 * X + 3 * rows)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(gradients):
            o = kernels.fused_gated_attention(*inputs, 64)
        assert torch.cuda.max_memory_allocated() - before <= allowed + 2**21, f"{gradients=}"
        del o
