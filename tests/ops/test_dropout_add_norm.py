import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mindspeed.ops._registry import backends
from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm
from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm
from mindspeed.testing import ranks
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator, kept_bytes
from tests.platform._activated import cpu_activated

FORMS = {"layer": npu_dropout_add_layer_norm, "rms": npu_dropout_add_rms_norm}


def textbook(kind, x0, residual, weight, bias, rowscale, layerscale, keep, p):
    u = x0
    if rowscale is not None:
        u = u * rowscale.unsqueeze(-1)
    if layerscale is not None:
        u = u * layerscale
    if keep is not None:
        u = torch.where(keep, u / (1 - p), torch.zeros_like(u))
    if residual is not None:
        u = u + residual
    centred = u - u.mean(-1, keepdim=True) if kind == "layer" else u
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight
    return (y if bias is None else y + bias), u


def seeded(kind, p, **options):
    """The operator with a fixed random state, in the argument order of the textbook form."""

    def run(x0, residual, weight, bias, rowscale, layerscale):
        torch.manual_seed(7)
        return FORMS[kind](x0, residual, weight, bias, p, 1e-5, rowscale, layerscale, prenorm=True, **options)

    return run


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_values_and_gradients(kind, p, dtype, scales, extras, body):
    shape = (3, 5, 20)
    x0 = torch.randn(shape).to(dtype).requires_grad_()
    residual = torch.randn(shape).to(dtype).requires_grad_() if extras else None
    weight = torch.randn(20).to(dtype).requires_grad_()
    bias = torch.randn(20).to(dtype).requires_grad_() if extras else None
    rowscale = torch.rand(shape[:2]).to(dtype).requires_grad_(extras) if scales else None
    layerscale = torch.rand(20).to(dtype).requires_grad_() if scales else None
    keep = None
    with backends(f"dropout_add_norm={body}"):
        if p:
            *_, keep = seeded(kind, p, return_dropout_mask=True)(x0, residual, weight, bias, rowscale, layerscale)
        assert_operator_accurate(
            seeded(kind, p),
            lambda *args: textbook(kind, *args, keep, p),
            *(x0, residual, weight, bias, rowscale, layerscale),
        )


def test_block_body_and_reference_give_the_same_dropout():
    x0, weight = torch.randn(40, 16), torch.ones(16)
    results = []
    for body in ("auto", "ref"):
        with backends(f"dropout_add_norm={body}"):
            results.append(seeded("layer", 0.5)(x0, None, weight, None, None, None)[1])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", FORMS)
def test_gradcheck(kind):
    x0, residual = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias, layerscale = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rowscale = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(seeded(kind, 0.4), (x0, residual, weight, bias, rowscale, layerscale))
    torch.autograd.gradcheck(seeded(kind, 0.4), (x0, residual, weight, bias, None, None))


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "in_fp32", "pre_dtype"),
    [
        (torch.bfloat16, None, False, torch.bfloat16),
        (torch.bfloat16, None, True, torch.float32),
        (torch.bfloat16, torch.bfloat16, True, torch.bfloat16),
        (torch.float16, torch.float32, False, torch.float32),
    ],
)
def test_dtype_of_the_sum(x_dtype, residual_dtype, in_fp32, pre_dtype):
    x0 = torch.randn(2, 3, 8).to(x_dtype).requires_grad_()
    residual = None if residual_dtype is None else torch.randn(2, 3, 8).to(residual_dtype).requires_grad_()
    y, pre = npu_dropout_add_rms_norm(x0, residual, torch.ones(8), None, 0.0, 1e-6, prenorm=True, residual_in_fp32=in_fp32)
    assert (y.dtype, pre.dtype) == (x_dtype, pre_dtype)
    (y.sum().float() + pre.sum().float()).backward()
    assert x0.grad.dtype == x_dtype
    assert residual is None or residual.grad.dtype == residual_dtype


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_returned(kind):
    x0, weight = torch.randn(2, 3, 8), torch.ones(8)
    assert isinstance(FORMS[kind](x0, None, weight, None, 0.0, 1e-6), torch.Tensor)
    y, mask = FORMS[kind](x0, None, weight, None, 0.0, 1e-6, return_dropout_mask=True)
    assert mask.dtype == torch.bool and mask.shape == x0.shape and mask.all()
    y, pre, mask = FORMS[kind](x0, x0, weight, None, 1.0, 1e-6, prenorm=True, return_dropout_mask=True)
    assert not mask.any()
    assert torch.equal(pre, x0)


def test_bias_of_the_rms_form_is_added():
    x0, bias = torch.randn(2, 8), torch.randn(8)
    plain = npu_dropout_add_rms_norm(x0, None, torch.ones(8), None, 0.0, 1e-6)
    torch.testing.assert_close(npu_dropout_add_rms_norm(x0, None, torch.ones(8), bias, 0.0, 1e-6), plain + bias)


def test_keep_rate_and_replay_in_backward():
    p, n = 0.3, 64 * 512
    x0, weight = torch.randn(64, 512, requires_grad=True), torch.ones(512)
    y, pre, mask = npu_dropout_add_layer_norm(x0, None, weight, None, p, 1e-5, prenorm=True, return_dropout_mask=True)
    assert abs(mask.float().mean().item() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(pre, torch.where(mask, x0 / (1 - p), 0.0))
    pre.sum().backward()
    torch.testing.assert_close(x0.grad, mask / (1 - p))


def test_recomputation_and_trackers_govern_the_mask():
    x0, weight = torch.randn(8, 16), torch.ones(16)

    def mask():
        return npu_dropout_add_layer_norm(x0, None, weight, None, 0.5, 1e-5, return_dropout_mask=True)[1]

    state = torch.get_rng_state()
    first, second = mask(), mask()
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(mask(), first)


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("kind", FORMS)
def test_everything_dropped(kind, body):
    x0, residual = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    weight = torch.ones(6, requires_grad=True)
    scale = torch.ones(4, requires_grad=True)
    with backends(f"dropout_add_norm={body}"):
        y, pre = FORMS[kind](x0, residual, weight, None, 1.0, 1e-5, scale, prenorm=True)
        (y.square().sum() + pre.sum()).backward()
    expected = textbook(kind, torch.zeros(4, 6), residual, weight, None, None, None, None, 0.0)[0]
    torch.testing.assert_close(y, expected)
    assert torch.equal(x0.grad, torch.zeros(4, 6)) and torch.equal(scale.grad, torch.zeros(4))
    assert residual.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", FORMS)
def test_recomputation_in_backward_drops_the_same(kind):
    x0, weight = torch.randn(8, 16, requires_grad=True), torch.ones(16)
    masks = []

    def layer(x0):
        y, mask = FORMS[kind](x0, None, weight, None, 0.5, 1e-5, return_dropout_mask=True)
        masks.append(mask)
        return y

    checkpoint(layer, x0, use_reentrant=True).square().sum().backward()
    assert len(masks) == 2 and torch.equal(*masks) and not masks[0].all()


@ranks(2)
def test_ranks_drop_differently_under_the_tracker_and_alike_outside(world):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with cpu_activated():
        torch.manual_seed(3)
        tracker = CudaRNGStatesTracker()
        tracker.add("model-parallel-rng", 7 + world.rank)

        def mask():
            x0, weight = torch.ones(64, 32), torch.ones(32)
            return npu_dropout_add_layer_norm(x0, None, weight, None, 0.5, 1e-5, return_dropout_mask=True)[1].int()

        alike = world.gather(mask()).chunk(2)
        with tracker.fork():
            different = world.gather(mask()).chunk(2)
    assert torch.equal(*alike)
    assert not torch.equal(*different)
    assert abs(different[0].float().mean().item() - 0.5) < 0.05


def test_keeps_the_sum_and_statistics_but_no_mask():
    x0 = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(128, dtype=torch.bfloat16)
    run = lambda: npu_dropout_add_rms_norm(x0, x0, weight, None, 0.1, 1e-5)  # noqa: E731
    assert kept_bytes(run) == 64 * 128 * 2 + 128 * 2 + 64 * 4 + 16


def test_operators_are_well_formed_and_trace():
    ops = torch.ops.mindspeed
    x0, weight, rng = torch.randn(4, 6), torch.randn(6), torch.tensor([5, 0])
    rows = torch.rand(4)
    for rms in (True, False):
        check_operator(
            ops.dropout_add_norm.default,
            (x0, None, weight, None, None, None, None, 0.0, 1e-5, rms, torch.float32),
            (x0.clone().requires_grad_(), x0.clone(), weight, weight.clone(), rows, weight, rng, 0.5, 1e-5, rms, torch.float32),
            (x0[:0], None, weight, None, None, None, rng, 0.5, 1e-5, rms, torch.float32),
        )
    stats = torch.rand(4, 1)
    check_operator(
        ops.dropout_add_norm_backward.default,
        (x0, x0, x0, x0, weight, rows, weight, stats, stats, rng, 0.5, torch.float32, torch.float32),
        (x0, None, None, x0, weight, None, None, torch.empty(0), stats, None, 0.0, None, None),
    )
    check_operator(ops.dropout_mask.default, (x0, rng, 0.5), (x0, None, 0.0))
    assert_compiles(lambda x, w: npu_dropout_add_layer_norm(x, x, w, w, 0.0, 1e-5), x0.requires_grad_(), weight)


def test_any_leading_dimensions_and_no_rows():
    assert npu_dropout_add_layer_norm(torch.randn(8), None, torch.ones(8), None, 0.0, 1e-5).shape == (8,)
    x0 = torch.randn(0, 3, 8, requires_grad=True)
    npu_dropout_add_rms_norm(x0, None, torch.ones(8), None, 0.5, 1e-5).sum().backward()
    assert x0.grad.shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dropout_p": 1.5}, ValueError, r"npu_dropout_add_rms_norm: dropout_p must lie in \[0, 1\], got 1.5"),
        ({"epsilon": -1.0}, ValueError, "epsilon must not be negative"),
        ({"weight": torch.ones(4).half()}, TypeError, "weight must have dtype bfloat16 or float32, got float16"),
        ({"residual": torch.ones(2, 5)}, ValueError, r"residual must have shape \(2, 4\), got \(2, 5\)"),
        ({"rowscale": torch.ones(2, 4).bfloat16()}, ValueError, r"rowscale must have shape \(2,\)"),
        ({"layerscale": torch.ones(4)}, TypeError, "layerscale must have dtype bfloat16, got float32"),
    ],
)
def test_errors(change, error, text):
    arguments = {
        "x0": torch.ones(2, 4).bfloat16(),
        "residual": None,
        "weight": torch.ones(4).bfloat16(),
        "bias": None,
        "dropout_p": 0.1,
        "epsilon": 1e-5,
    } | change
    with pytest.raises(error, match=text):
        npu_dropout_add_rms_norm(**arguments)
