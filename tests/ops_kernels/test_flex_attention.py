"""Patterns for flex attention: their functions in eager mode against the definition, their blocks, and what happens without a compiler."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from mindspeed.ops import backends
from mindspeed.ops._attention_choice import FLEX_SCORES, Machine, select
from mindspeed.ops._attention_scores import LIMIT, Options, Segment, excluded
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention
from mindspeed.ops.kernels.triton import fusion_attention
from tests.aten_stand_ins import stand_in

MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
PATTERNS = {
    "prefix": {"sparse_mode": 5, "prefix": [3, 170]},
    "compressed prefix": {"sparse_mode": 6, "prefix": [0, 300]},
    "triangle": {"sparse_mode": 2},
    "lower right": {"sparse_mode": 3},
    "band beside the diagonal": {"sparse_mode": 4, "pre_tokens": -2, "next_tokens": 140},
    "band below the diagonal": {"sparse_mode": 4, "pre_tokens": 190, "next_tokens": -20},
    "slopes": {"slopes": (4,), "pse_type": 2},
    "roots under a triangle": {"slopes": (2, 4), "pse_type": 3, "q_start_idx": [3], "kv_start_idx": [7], "sparse_mode": 2},
}


def arguments(name):
    """Keyword arguments of the public operator."""
    options = dict(PATTERNS[name])
    if "sparse_mode" in options:
        options["atten_mask"] = MASK
    if shape := options.pop("slopes", None):
        options["pse"] = torch.rand(shape)
    return options


def as_options(layout, **given):
    rest = {"pse": None, "atten_mask": None, "prefix": None, "sparse_mode": 0, "pse_type": 1, "q_start_idx": None}
    rest |= {"kv_start_idx": None, "pre_tokens": LIMIT, "next_tokens": LIMIT, "rng": None, "inner_precise": 0, "keep_prob": 1.0}
    lists = {"actual_seq_qlen": None, "actual_seq_kvlen": None}
    return Options(**{"head_num": 4, "layout": layout, "scale": 0.3, **rest, **lists, **given})


def operands(layout, keys=260):
    shapes = ((2, 300, 4, 16), (2, keys, 2, 16), (2, keys, 2, 16))
    made = [torch.randn(shape) for shape in shapes]
    return [t.flatten(2) for t in made] if layout == "BSH" else made


@pytest.fixture
def eager(monkeypatch):
    """The functions run in eager mode, which is the definition of flex attention."""
    torch.manual_seed(1)
    monkeypatch.setattr(fusion_attention, "COMPILER", fusion_attention.Compiler())
    fusion_attention.COMPILER.__dict__["compiled"] = flex_attention


@pytest.mark.parametrize("layout", ["BSND", "BSH"])
@pytest.mark.parametrize("name", PATTERNS)
def test_functions_of_positions_mean_the_pattern(eager, name, layout):
    given = arguments(name)
    q, k, v = (t.requires_grad_() for t in operands(layout))  # as inside of the operator's own Function
    with torch.no_grad():
        out, top, total = fusion_attention.forward(q, k, v, *as_options(layout, **given))
    truth, truth_top, truth_total, *_ = npu_fusion_attention(q.detach(), k.detach(), v.detach(), 4, layout, scale=0.3, **given)
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous() and top.shape == truth_top.shape
    torch.testing.assert_close(top + total.log(), truth_top + truth_total.log(), rtol=1e-4, atol=1e-5)
    assert fusion_attention.COMPILER.failure == ""


@pytest.mark.parametrize("keys", [128, 260, 300, 512])
@pytest.mark.parametrize("name", [name for name in PATTERNS if "sparse_mode" in PATTERNS[name]])
def test_blocks_are_exactly_those_that_hold_something(name, keys):
    options = as_options("BSND", **arguments(name))
    q, whole = torch.empty(2, 4, 300, 16), Segment(slice(0, 300), slice(0, keys), True, True)
    mask = fusion_attention.block_mask(options, whole, q, keys)
    hidden = excluded(options, whole, slice(0, 300), 300, keys, q.device).expand(2, 1, 300, keys)
    padded = torch.nn.functional.pad(hidden.float(), (0, -keys % 128, 0, -300 % 128), value=float("nan"))
    blocks = padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).transpose(3, 4).flatten(4)
    seen, all_seen = (blocks == 0).any(-1), ((blocks == 0) | blocks.isnan()).all(-1)

    def listed(count, indices):
        found = torch.zeros(*count.shape, seen.shape[3], dtype=torch.bool)
        for sample in range(count.shape[0]):
            for row in range(count.shape[2]):
                found[sample, 0, row, indices[sample, 0, row, : count[sample, 0, row]].long()] = True
        return found.expand(seen.shape)

    some = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (full & ~all_seen).any() and not (some & full).any()
    assert torch.equal(some | full, seen)


def test_a_compiler_that_fails_is_said_once_and_the_next_kernel_takes_over(eager, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nmore")

    fusion_attention.COMPILER.__dict__["compiled"] = failing
    given, (q, k, v) = arguments("prefix"), operands("BSND")
    values = tuple(as_options("BSND", **given))
    stand = next(standing := stand_in(monkeypatch))
    with caplog.at_level(logging.WARNING):
        out = fusion_attention.forward(q, k, v, *values)[0]
    assert stand.calls[0][0] == "efficient" and "no compiler here" in caplog.text
    torch.testing.assert_close(out, npu_fusion_attention(q, k, v, 4, "BSND", scale=0.3, **given)[0], rtol=1e-4, atol=1e-5)
    assert fusion_attention._declines(q, k, v, *values) == "compiling a pattern failed: no compiler here"
    next(standing, None)


def test_the_body_serves_what_the_choice_gives_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    side = int(FLEX_SCORES**0.5)
    q = torch.empty(2, side, 4, 64, dtype=torch.bfloat16, device="meta")
    slopes = as_options("BSND", pse=torch.empty(4, device="meta"), pse_type=2)
    assert select(q, q, q, slopes, Machine((9, 0), True), flex=True).kernel == "flex"
    assert fusion_attention._declines(q, q, q, *slopes) is None
    assert "expresses what is hidden" in fusion_attention._declines(q, q, q, *as_options("BSND"))


@pytest.mark.parametrize("new", [False, True])
def test_the_statistics_are_asked_for_in_the_way_of_this_torch(monkeypatch, new):
    """`return_lse` before there was `return_aux`, which takes its place."""

    def old_attention(q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_lse=False):
        return q, lse if return_lse else None

    def new_attention(q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_aux=None):
        return q, SimpleNamespace(lse=lse, max_scores=None) if return_aux.lse else None

    ours, lse = new_attention if new else old_attention, torch.ones(2, 4, 300)
    fusion_attention.asking_for_lse.cache_clear()
    monkeypatch.setattr(fusion_attention, "flex_attention", ours)
    if new:
        monkeypatch.setattr("torch.nn.attention.flex_attention.AuxRequest", lambda lse: SimpleNamespace(lse=lse), raising=False)
    q, k, v = (t.transpose(1, 2) for t in operands("BSND"))
    out, found = fusion_attention.attend(q, k, v, as_options("BSND", **arguments("triangle")), ours)
    fusion_attention.asking_for_lse.cache_clear()
    assert out is q and torch.equal(found, lse)


def test_a_compiler_that_takes_whole_graphs_only_takes_the_call():
    compiled = torch.compile(flex_attention, backend="eager", fullgraph=True)
    q, k, v = (t.transpose(1, 2) for t in operands("BSND"))
    options = as_options("BSND", **arguments("prefix"))
    for found, truth in zip(*(fusion_attention.attend(q, k, v, options, f) for f in (compiled, flex_attention)), strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.cuda
@pytest.mark.parametrize("name", PATTERNS)
def test_gpu_compiled_patterns_agree_with_the_reference(name):
    side = int(FLEX_SCORES**0.5)
    given = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in arguments(name).items()}
    q, k, v = (torch.randn(2, side, heads, 64, device="cuda").bfloat16().requires_grad_() for heads in (4, 2, 2))
    found = {}
    for body in ("auto", "ref"):
        with backends(f"fusion_attention={body}"):
            out, top, total, *_ = npu_fusion_attention(q, k, v, 4, "BSND", scale=0.125, **given)
            found[body] = [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
    assert fusion_attention.COMPILER.failure == ""
    for ours, truth in zip(found["auto"], found["ref"], strict=True):
        assert (ours.float() - truth.float()).norm() <= 2e-2 * truth.float().norm()
