"""Attention on CUDA: which kernel is chosen, and the operator's own tests through stand-ins for aten's kernels."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed.ops import _aten_attention, _attention_choice, backends
from mindspeed.ops._aten_attention import fitting_window, flash_refuses
from mindspeed.ops._attention_choice import FLEX_SCORES, Machine, select
from mindspeed.ops._attention_scores import LIMIT, Options
from mindspeed.ops._registry import REGISTRY
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention, npu_fusion_attention_grad
from tests.aten_stand_ins import StandIns, stand_in
from tests.ops import _attention_textbook as textbook
from tests.ops import test_fusion_attention_v2 as definition
from tests.ops import test_fusion_attention_v2_contract as contract

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100, T4, RTX4090, V100 = Machine((9, 0), True), Machine((7, 5), True), Machine((8, 9), True), Machine((7, 0), False)
MASK = torch.empty(2048, 2048, dtype=torch.bool, device="meta")


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def call(dtype=BF16, sq=64, sk=64, d=64, dv=None, n=4, nkv=2, b=2, q_ends=None, k_ends=None, **options):
    """Operands and options of a call; BNSD, or TND where ends are given."""
    if q_ends:
        operands = meta(sq, n, d, dtype=dtype), meta(sk, nkv, d, dtype=dtype), meta(sk, nkv, dv or d, dtype=dtype)
    else:
        operands = (
            meta(b, n, sq, d, dtype=dtype), meta(b, nkv, sk, d, dtype=dtype), meta(b, nkv, sk, dv or d, dtype=dtype),
        )  # fmt: skip
    settings = {
        "head_num": n, "layout": "TND" if q_ends else "BNSD", "pse": None, "atten_mask": None, "scale": 0.3, "keep_prob": 1.0,
        "pre_tokens": LIMIT, "next_tokens": LIMIT, "inner_precise": 0, "prefix": None, "actual_seq_qlen": q_ends,
        "actual_seq_kvlen": k_ends, "sparse_mode": 0, "pse_type": 1, "q_start_idx": None, "kv_start_idx": None, "rng": None,
    }  # fmt: skip
    return *operands, Options(**{**settings, **options})


SIDE = math.isqrt(FLEX_SCORES)
PREFIX = {"atten_mask": MASK, "sparse_mode": 5, "prefix": [3, 9]}
CHOICES = [
    # full, causal, band
    ("flash", "a window expresses what is hidden", H100, {}),
    ("flash", "", H100, {"dtype": FP16, "d": 256, "n": 8, "nkv": 1}),
    ("flash", "", H100, {"d": 40, "dv": 24}),
    ("flash", "", H100, {"keep_prob": 0.9}),
    ("flash", "", H100, {"atten_mask": MASK, "sparse_mode": 2}),
    ("flash", "", H100, {"atten_mask": MASK, "sparse_mode": 2, "sk": 99}),
    ("flash", "", H100, {"atten_mask": MASK, "sparse_mode": 3, "sk": 99}),
    ("flash", "", H100, {"atten_mask": MASK, "sparse_mode": 4, "pre_tokens": 9, "next_tokens": -1}),
    ("efficient", "a band beside the diagonal", H100, {"atten_mask": MASK, "sparse_mode": 4, "pre_tokens": -1, "next_tokens": 5}),
    ("efficient", "cuts windows off", H100, {"atten_mask": MASK, "sparse_mode": 4, "pre_tokens": 2, "sq": 64, "sk": 8, "next_tokens": 20}),
    # packed sequences
    ("flash-packed", "", H100, {"q_ends": [20, 64], "k_ends": [20, 64]}),
    ("flash-packed", "", H100, {"q_ends": [20, 60, 0], "k_ends": [30, 64, 0], "atten_mask": MASK, "sparse_mode": 3}),
    ("flash-packed", "", H100, {"q_ends": [1, 60], "k_ends": [1, 60], "atten_mask": MASK, "sparse_mode": 2}),
    ("flash-packed", "", H100, {"q_ends": [20, 64], "k_ends": [20, 64], "atten_mask": MASK, "sparse_mode": 4, "pre_tokens": 5, "next_tokens": 0}),
    ("flash", "", H100, {"q_ends": [20, 20, 64], "k_ends": [20, 30, 64]}),
    ("flash", "", H100, {"q_ends": [64], "k_ends": [64]}),
    ("flash", "", H100, {"q_ends": [20, 64], "k_ends": [30, 64], "atten_mask": MASK, "sparse_mode": 2}),
    ("flash", "", H100, {"q_ends": [20, 64], "k_ends": [20, 64], "atten_mask": MASK, "sparse_mode": 7, "pre_tokens": 5, "next_tokens": 0}),
    # masks and biases
    ("efficient", "has no torch.float32", H100, {"dtype": FP32}),
    ("efficient", "takes no mask as in sparse mode 0", H100, {"atten_mask": meta(64, 64, dtype=torch.bool)}),
    ("efficient", "takes no mask as in sparse mode 1", H100, {"atten_mask": meta(2, 1, 64, 64, dtype=torch.bool), "sparse_mode": 1}),
    ("efficient", "takes no bias", H100, {"pse": meta(1, 4, 64, 64)}),
    ("efficient", "fewer than", H100, {"pse": meta(4, dtype=FP32), "pse_type": 2}),
    ("flex", "takes no bias; a kernel is compiled", H100, {"pse": meta(4, dtype=FP32), "pse_type": 2, "sq": SIDE, "sk": SIDE}),
    ("flex", "sparse mode 5", H100, {**PREFIX, "sq": SIDE, "sk": SIDE}),
    ("efficient", "triton is not installed", Machine((9, 0), False), {**PREFIX, "sq": SIDE, "sk": SIDE}),
    ("efficient", "head sizes 40", H100, {**PREFIX, "sq": SIDE, "sk": SIDE, "d": 40}),
    ("efficient", "no dropout", H100, {**PREFIX, "sq": SIDE, "sk": SIDE, "keep_prob": 0.5}),
    # sizes and devices
    ("efficient", "up to 256, not 264", H100, {"d": 264}),
    ("efficient", "compute capability 8.9 has no head size 200", RTX4090, {"d": 200}),
    ("flash", "", RTX4090, {"d": 256}),
    ("efficient", "no head size 256 with dropout", RTX4090, {"d": 256, "keep_prob": 0.5}),
    ("efficient", "needs compute capability 8.0", T4, {"dtype": FP16}),
    ("reference", "bfloat16 needs compute capability 8.0", T4, {}),
    ("efficient", "", V100, {"dtype": FP32}),
    ("reference", "has no torch.float64", H100, {"dtype": FP64}),
    ("reference", "samples or heads", H100, {"b": 70000, "sq": 1, "sk": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "reason", "machine", "arguments"), CHOICES)
def test_choice_is_a_function_of_shapes_options_and_device(kernel, reason, machine, arguments):
    choice = select(*call(**arguments), machine, flex=True)
    assert choice.kernel == kernel and reason in choice.reason
    backward = select(*call(**arguments), machine)  # what runs backward takes the statistics of any forward
    assert backward.kernel == ("efficient" if kernel == "flex" else kernel)
    assert select(*call(**arguments), machine, need_dpse=True).reason == "the gradient of pse is wanted"


@pytest.mark.parametrize("sizes", [[(7, 7)], [(3, 9)], [(9, 3)], [(12, 3), (2, 8)], [(1, 4), (5, 5)]], ids=str)
def test_a_window_that_fits_hides_in_the_kernel_what_it_should(sizes):
    """Every window against the definition, with what the kernel makes of its sides."""
    longest, refused = max(keys for _, keys in sizes), 0
    for left in (None, *range(-2, 14)):
        for right in (None, *range(-2, 14)):
            (kernel_left, kernel_right), refusal = fitting_window((left, right), sizes)
            if refusal:
                refused += 1
                continue
            for queries, keys in sizes:
                distance = torch.arange(keys)[None] - torch.arange(queries)[:, None] - (keys - queries)
                truth = torch.zeros(queries, keys, dtype=torch.bool)
                truth |= distance < -left if left is not None else False
                truth |= distance > right if right is not None else False
                sides = (-1 if side is None else side for side in (kernel_left, kernel_right))
                assert torch.equal(StandIns.hidden(queries, keys, *sides, longest), truth), (left, right, queries, keys)
    assert 0 < refused < 200


def test_devices_and_head_sizes_of_flash_attention():
    assert flash_refuses(BF16, (9, 0), 256, True) == flash_refuses(FP16, (8, 6), 192, True) == ""
    assert flash_refuses(FP16, (12, 0), 224, False).endswith("12.0 has no head size 224")


@pytest.fixture
def aten(monkeypatch):
    """The CUDA bodies serve CPU tensors, on stand-ins for aten's kernels."""
    for name in ("fusion_attention", "fusion_attention_backward"):
        kernels = REGISTRY.operators[name].kernels
        monkeypatch.setitem(kernels, "cpu", [kernel for kernel in kernels["cuda"] if kernel.backend == "aten"])
    monkeypatch.setattr(_aten_attention, "ROWS", 32)
    with backends(""):
        yield from stand_in(monkeypatch)
    REGISTRY.forget_routes()


def ran(stand, *names):
    assert {made[0] for made in stand.calls} == set(names)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "bnsd"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("nkv", [1, 2, 4])
def test_layouts(aten, layout, dtype, nkv):
    definition.test_layouts_values_and_gradients(layout, dtype, nkv, "auto")
    ran(aten, *(("efficient", "efficient_backward") if dtype == FP32 else ("flash", "flash_backward")))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("mode", "options"), definition.MODES)
@pytest.mark.parametrize(("sq", "sk"), [(5, 7), (7, 5), (6, 6), (40, 33)])
def test_sparse_modes(aten, monkeypatch, mode, options, sq, sk, dtype):
    made = definition.heads
    monkeypatch.setattr(definition, "heads", lambda **sizes: [t.detach().to(dtype).requires_grad_() for t in made(**sizes)])
    if dtype == BF16:  # statistics of 16-bit scores
        monkeypatch.setattr(torch.testing, "assert_close", lambda a, b: close(a, b, rtol=2e-2, atol=2e-2, check_dtype=False))
    definition.test_sparse_modes(mode, options, sq, sk, "auto")
    if dtype == BF16 and mode in (2, 3):
        ran(aten, "flash", "flash_backward")


close = torch.testing.assert_close


@pytest.mark.parametrize("mode", [None, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("lengths", [([3, 0, 5, 2], [4, 0, 3, 2]), ([6, 3, 5], [6, 3, 5]), ([4, 2], [6, 3])])
@pytest.mark.parametrize("unused", [0, 3])
def test_packed_sequences(aten, mode, lengths, unused):
    (q, q_ends), (k, k_ends) = (textbook.tnd(own, heads, 8) for own, heads in zip(lengths, (4, 2), strict=True))
    v, last = torch.randn_like(k), len(q_ends) - 1
    q, k, v = (torch.cat([t.detach(), torch.randn(unused, *t.shape[1:])]).bfloat16().requires_grad_() for t in (q, k, v))

    def form(index, q, k, v):
        own = {7: 4 if index == last else 3, 8: 4 if index == 0 else 2}.get(mode, mode)
        hidden = None if own is None else textbook.expand_mask(own, 1, 4, q.shape[2], k.shape[2], pre=1, nxt=0)
        return textbook.textbook(q, k, v, 0.3, hidden)

    def plain(q, k, v):
        out = textbook.by_sequence(form, q, k, v, q_ends, k_ends)[0]
        return torch.cat([out, out.new_zeros(unused, *out.shape[1:])])

    options = (
        {} if mode is None else {"atten_mask": textbook.CAUSAL_PATTERN, "sparse_mode": mode, "pre_tokens": 1, "next_tokens": 0}
    )
    ends = {"actual_seq_qlen": [*q_ends, 0], "actual_seq_kvlen": [*k_ends, 0]}
    run = lambda q, k, v: npu_fusion_attention(q, k, v, 4, "TND", scale=0.3, **ends, **options)  # noqa: E731
    definition.assert_operator_accurate(lambda *a: run(*a)[0], plain, q, k, v)
    ran(aten, "flash", "flash_backward")
    if mode in (None, 3, 4) or (mode == 2 and lengths[0] == lengths[1]):  # one band in all sequences
        assert len(aten.calls) == 2
    out, top, total, *_ = run(q, k, v)
    with backends("fusion_attention=ref"):
        truth, truth_top, truth_total, *_ = run(q, k, v)
    close(top + total.log(), truth_top + truth_total.log(), rtol=1e-3, atol=1e-3)
    close(out, truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_that_see_nothing(aten, dtype):
    definition.test_rows_that_see_nothing(dtype, "auto")
    ran(aten, *(("efficient", "efficient_backward") if dtype == FP32 else ("flash", "flash_backward")))


def test_masks_biases_slopes_and_other_key_sets(aten):
    for shape in ((5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7)):
        definition.test_mask_shapes(shape, torch.uint8)
    definition.test_slopes(2, True)
    definition.test_slopes(3, False)
    definition.test_compressed_bias_repeats_its_diagonals("auto")
    contract.test_backward_with_statistics_of_a_larger_key_set("auto")
    ran(aten, "efficient", "efficient_backward")


@pytest.mark.parametrize("layout", ["BNSD", "TND"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dropout_is_replayed(aten, dtype, layout):
    """v is the identity, so that the result is the weights themselves and shows the mask."""
    n, s, keep = 2, 40, 0.7
    q, k, v = torch.randn(1, n, s, 40), torch.randn(1, n, s, 40), torch.eye(s).expand(1, n, s, s)
    options = {}
    if layout == "TND":
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        options = {"actual_seq_qlen": [24, s], "actual_seq_kvlen": [24, s]}
    q, k, v = (t.to(dtype).contiguous().requires_grad_() for t in (q, k, v))
    torch.manual_seed(1)
    out, top, total, _, seed, offset, numels = npu_fusion_attention(q, k, v, n, layout, keep_prob=keep, **options)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.randint(0, 2**63 - 1, (1,)) == seed and torch.equal(torch.get_rng_state(), after)  # nothing else was drawn
    dout = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    again = npu_fusion_attention_grad(
        q, k, v, dout, n, layout, softmax_max=top, softmax_sum=total, attention_in=out, keep_prob=keep, seed=seed, offset=offset,
        numels=numels, **options,
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(again, grads, strict=False))
    heads_first = (lambda t: t.transpose(0, 1)[None]) if layout == "TND" else (lambda t: t)
    bq, bk, bv = (heads_first(t.detach().double()).requires_grad_() for t in (q, k, v))
    apart = torch.zeros(s, s, dtype=torch.bool)
    if layout == "TND":
        apart = (torch.arange(s) < 24)[:, None] != (torch.arange(s) < 24)
    kept = (heads_first(out) != 0).double()
    assert abs(kept[..., ~apart].mean().item() - keep) < 0.05
    weights = (bq @ bk.transpose(-1, -2)).masked_fill(apart, float("-inf")).softmax(-1)
    expected = (weights * kept / keep) @ bv
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
    close(heads_first(out).double(), expected, **tolerance)
    truth = torch.autograd.grad(expected, (bq, bk, bv), heads_first(dout).double())
    for ours, true in zip(grads, truth, strict=True):
        assert (heads_first(ours).double() - true).norm() <= tolerance["rtol"] * true.norm()


def test_gradient_of_a_bias_takes_the_reference(aten):
    q, k, v = definition.heads(dtype=BF16)
    pse = torch.randn(2, 4, 5, 7).bfloat16().requires_grad_()
    npu_fusion_attention(q, k, v, 4, "BNSD", pse=pse)[0].sum().backward()
    assert pse.grad.isfinite().all()
    ran(aten, "efficient")


def test_operands_that_vector_loads_cannot_read_are_copied(aten):
    q, k, v = (t.bfloat16() for t in definition.heads(d=8))
    odd = [torch.empty(t.numel() + 1, dtype=BF16)[1:].view(t.shape).copy_(t.detach()) for t in (q, k, v)]
    wide = [torch.empty(*t.shape[:-1], 9, dtype=BF16)[..., :8].copy_(t.detach()) for t in (q, k, v)]
    flipped = [t.detach().transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    plain = npu_fusion_attention(q, k, v, 4, "BNSD")[0]
    for operands in (odd, wide, flipped):
        leaves = [t.requires_grad_() for t in operands]
        out = npu_fusion_attention(*leaves, 4, "BNSD")[0]
        assert torch.equal(out, plain)
        out.backward(torch.ones(()).bfloat16().expand(out.shape))
    ran(aten, "flash", "flash_backward")


@pytest.mark.parametrize(("b", "sq", "sk"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_dimensions(aten, b, sq, sk):
    contract.test_empty_dimensions(b, sq, sk, "auto")
    assert aten.calls == []


def test_a_pattern_is_decided_once_for_all_calls_and_layers(aten, monkeypatch):
    _attention_choice._select.cache_clear()
    decided = []
    band = _attention_choice.band
    monkeypatch.setattr(_attention_choice, "band", lambda *arguments: decided.append(1) or band(*arguments))
    for length in (64, 64, 64, 72):
        q, k, v = (torch.randn(1, 2, length, 8, dtype=BF16, requires_grad=True) for _ in range(3))
        npu_fusion_attention(q, k, v, 2, "BNSD")[0].sum().backward()
    assert len(decided) == 2
    assert len(aten.calls) == 8
    q, k, v, options = call(q_ends=[20, 64], k_ends=[20, 64])
    choices = [select(q, k, v, options._replace(actual_seq_qlen=ends), H100) for ends in ([20, 64], [30, 64])]
    assert [tile.queries.stop for choice in choices for tile in choice.tiles] == [20, 64, 30, 64]


GPU_CASES = {
    "full": {},
    "causal": {"atten_mask": True, "sparse_mode": 2},
    "causal at the lower right": {"atten_mask": True, "sparse_mode": 3},
    "band": {"atten_mask": True, "sparse_mode": 4, "pre_tokens": 30, "next_tokens": 5},
    "prefix": {"atten_mask": True, "sparse_mode": 6, "prefix": [3, 40]},
    "slopes": {"pse": True, "pse_type": 2},
    "packed": {"ends": ([20, 50, 130], [30, 50, 100])},
    "packed causal": {"ends": ([20, 50, 130], [30, 50, 100]), "atten_mask": True, "sparse_mode": 3},
    "packed, own bands": {"ends": ([20, 50, 120], [30, 60, 90]), "atten_mask": True, "sparse_mode": 7, "pre_tokens": 9, "next_tokens": 0},
}  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_agrees_with_the_reference(name, dtype):
    options = dict(GPU_CASES[name])
    ends = options.pop("ends", None)
    shapes = ((130, 4, 64), (100, 2, 64), (100, 2, 64)) if ends else ((2, 130, 4, 64), (2, 100, 2, 64), (2, 100, 2, 64))
    if ends:
        options |= {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    if options.get("atten_mask"):
        options["atten_mask"] = torch.ones(2048, 2048, dtype=torch.bool, device="cuda").triu(1)
    if options.get("pse"):
        options["pse"] = torch.rand(4, device="cuda") / 8
    q, k, v = (torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes)
    dout = torch.randn_like(q)
    found = {}
    for body in ("auto", "ref"):
        with backends(f"fusion_attention={body}"):
            out, top, total, *_ = npu_fusion_attention(q, k, v, 4, "TND" if ends else "BSND", scale=0.125, **options)
            found[body] = [out, top + total.log(), *torch.autograd.grad(out, (q, k, v), dout)]
    for ours, truth in zip(found["auto"], found["ref"], strict=True):
        seen = ~torch.isinf(truth.float())
        assert torch.equal(torch.isinf(ours.float()), ~seen)
        difference = (ours.float() - truth.float())[seen].norm()
        assert difference <= {FP32: 1e-4, FP16: 3e-3, BF16: 1.5e-2}[dtype] * truth.float()[seen].norm()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_dropout_is_replayed_by_the_gradient(dtype, packed):
    """The gradient of v is the transposed weights, whose mask must be that of the result."""
    shape, options = (
        ((64, 2, 64), {"actual_seq_qlen": [24, 64], "actual_seq_kvlen": [24, 64]}) if packed else ((1, 64, 2, 64), {})
    )
    q, k = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=dtype)[:, None].expand(64, 2, 64).reshape(shape).clone().requires_grad_()
    layout = "TND" if packed else "BSND"
    out = npu_fusion_attention(q, k, v, 2, layout, keep_prob=0.7, scale=0.1, **options)[0]
    (dv,) = torch.autograd.grad(out, v, torch.eye(64, device="cuda", dtype=dtype)[:, None].expand(64, 2, 64).reshape(shape))
    weights, turned = (value.reshape(64, 2, 64).transpose(0, 1) for value in (out, dv))
    visible = (24 * 24 + 40 * 40) / 64**2 if packed else 1.0
    assert 0.65 < (weights != 0).float().mean().item() / visible < 0.75
    torch.testing.assert_close(turned.transpose(1, 2), weights, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (5, 2)])
def test_real_operators_take_packed_arguments(window):
    """Schemas and shape functions of this torch, on tensors without memory."""
    q, k, v, lengths = meta(50, 4, 20), meta(60, 2, 20), meta(60, 2, 12), ([20, 30], [25, 35])
    out, lse, state = _aten_attention.flash_packed(q, k, v, lengths, scale=0.3, window=window)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((50, 4, 12), BF16, (4, 50), FP32)
    grads = _aten_attention.flash_packed_backward(out, q, k, v, out, lse, state, lengths, scale=0.3, window=window)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
