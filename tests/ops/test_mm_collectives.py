"""Products with an all-reduce: `npu_mm_all_reduce_add_rms_norm`, its in-place form and the grouped form."""

import pytest
import torch
import torch.distributed as dist

from mindspeed.ops.npu_grouped_mat_mul_all_reduce import npu_grouped_mat_mul_all_reduce as grouped
from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm as fused
from mindspeed.ops.npu_mm_all_reduce_add_rms_norm_ import npu_mm_all_reduce_add_rms_norm_ as fused_
from mindspeed.testing import ranks
from mindspeed.testing.operators import assert_compiles, check_operator, counted_collectives

SLACK = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(y, gamma, eps=1e-6):
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * gamma


def operands(world, dtype, k=8, n=6):
    """This rank's x1, x2, bias, and the whole ones in float64."""
    x1, x2, bias = draw(2, 3, k * world.size), draw(k * world.size, n, seed=1), draw(world.size, n, seed=2)
    mine = slice(world.rank * k, (world.rank + 1) * k)
    return (x1[..., mine].to(dtype), x2[mine].to(dtype), bias[world.rank].to(dtype)), (x1, x2, bias)


def all_forms(world, dtype):
    (x1, x2, bias), (whole1, whole2, biases) = operands(world, dtype)
    residual, gamma = draw(2, 3, 6, seed=3).to(dtype), draw(6, seed=4).to(dtype)
    y_exact = whole1.to(dtype).double() @ whole2.to(dtype).double() + biases.to(dtype).double().sum(0) + residual.double()
    tolerance = {"rtol": SLACK[dtype], "atol": SLACK[dtype]}
    for x, w, r in ((x1, x2, residual), (x1.flatten(0, 1), x2.t().contiguous().t(), residual)):
        with counted_collectives() as counted:
            y, out = fused(x, w, r, gamma, world.group, bias=bias)
        assert counted == ["all_reduce"]
        assert y.dtype == out.dtype == dtype and y.shape == out.shape == residual.shape
        torch.testing.assert_close(y.double(), y_exact, **tolerance)
        torch.testing.assert_close(out.double(), norm(y.double(), gamma.double()), **tolerance)
    kept = residual.clone()
    y_inplace, out_inplace = fused_(x1, x2, kept, gamma, world.group.group_name, bias=bias)
    assert y_inplace is kept
    torch.testing.assert_close((y_inplace, out_inplace), (y, out))
    kept = residual.clone()
    torch.testing.assert_close(
        torch.ops.mindspeed.npu_mm_all_reduce_add_rms_norm_(x1, x2, kept, gamma, world.group.group_name, bias=bias), (y, out)
    )
    torch.testing.assert_close(
        torch.ops.mindspeed.npu_mm_all_reduce_add_rms_norm(x1, x2, residual, gamma, world.group.group_name, bias=bias), (y, out)
    )


def all_dtypes(world):
    for dtype in SLACK:
        all_forms(world, dtype)


@ranks(1)
def test_fused_world_1(world):
    all_dtypes(world)


@ranks(2)
def test_fused_world_2(world):
    all_dtypes(world)


@ranks(4)
def test_fused_world_4(world):
    all_dtypes(world)


@ranks(2)
def test_integer_operands(world):
    generator = torch.Generator().manual_seed(7)
    x1 = torch.randint(-128, 128, (world.size, 5, 8), generator=generator, dtype=torch.int8)
    x2 = torch.randint(-128, 128, (world.size, 8, 6), generator=generator, dtype=torch.int8)
    bias = torch.randint(-9, 9, (world.size, 6), generator=generator, dtype=torch.int32)
    scale = torch.rand(6, generator=generator) / 1000
    exact = sum((x1[r].double() @ x2[r].double() + bias[r]) * scale.double() for r in range(world.size))
    for dtype, given in (
        (torch.bfloat16, scale.bfloat16()),
        (torch.float16, scale.view(torch.int32).to(torch.int64)),
        (torch.bfloat16, scale),
    ):
        y, _ = fused(
            x1[world.rank], x2[world.rank], torch.zeros(5, 6, dtype=dtype), torch.ones(6, dtype=dtype), world.group,
            bias=bias[world.rank], dequant_scale=given,
        )  # fmt: skip
        torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


@ranks(2)
def test_integer_weights(world):
    x1, residual = draw(5, 96).bfloat16(), torch.zeros(5, 6, dtype=torch.bfloat16)
    x2 = torch.randint(-128, 128, (96, 6), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    for scale, offset, group_size in (
        (torch.rand(1), torch.rand(1), 0),
        (torch.rand(6), None, 0),
        (torch.rand(1, 6), torch.rand(1, 6), 0),
        (torch.rand(3, 6), torch.rand(3, 6), 32),
        (torch.rand(2, 6), None, 64),
    ):
        torch.manual_seed(3)
        scale, offset = (scale / 100).bfloat16(), None if offset is None else offset.bfloat16()
        dist.broadcast(scale, 0)
        if offset is not None:
            dist.broadcast(offset, 0)
        rows = [
            value if value is None or value.dim() < 2 or value.shape[0] == 1 else value.repeat_interleave(group_size, 0)[:96]
            for value in (scale, offset)
        ]
        weight = (x2.double() + (0 if offset is None else rows[1].double())) * rows[0].double()
        exact = world.size * (x1.double() @ weight)
        y, _ = fused(
            x1, x2, residual, torch.ones(6).bfloat16(), world.group,
            antiquant_scale=scale, antiquant_offset=offset, antiquant_group_size=group_size,
        )  # fmt: skip
        torch.testing.assert_close(y.double(), exact, rtol=3e-2, atol=0.3)


@ranks(2)
def test_grouped_products(world):
    for dtype, bias_dtype in ((torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)):
        shapes = [(2, 3, 4), (5, 4), (0, 4)]
        xs = [[draw(*shape, seed=10 * r + i).to(dtype) for i, shape in enumerate(shapes)] for r in range(world.size)]
        ws = [[draw(4, 6, seed=20 * r + i + 5).to(dtype) for i in range(3)] for r in range(world.size)]
        bs = [[draw(6, seed=30 * r + i + 9).to(bias_dtype) for i in range(3)] for r in range(world.size)]
        exact = []
        for i in range(3):
            products = sum(xs[r][i].double() @ ws[r][i].double() for r in range(world.size))
            exact.append(products + sum(bs[r][i].double() for r in range(world.size)) / world.size)
        x, w, b = xs[world.rank], ws[world.rank], bs[world.rank]
        tolerance = {"rtol": SLACK[dtype], "atol": SLACK[dtype]}
        with counted_collectives() as counted:
            y = grouped(x, w, world.group, bias=b)
        assert counted == ["all_reduce"]
        for value, expected in zip(y, exact, strict=True):
            torch.testing.assert_close(value.double(), expected, **tolerance)
        joined = torch.cat([value.flatten(0, -2) for value in exact])
        flat = torch.cat([value.flatten(0, -2) for value in x])
        (one,) = grouped([value.flatten(0, -2) for value in x], torch.stack(w), world.group, bias=b, split_item=2)
        torch.testing.assert_close(one.double(), joined, **tolerance)
        (one,) = grouped(flat, torch.cat(w), world.group, bias=b, group_list=[6, 11, 11], split_item=3)
        torch.testing.assert_close(one.double(), joined, **tolerance)
        many = grouped([flat], w, world.group, bias=b, group_list=[6, 11, 11], split_item=1)
        torch.testing.assert_close(torch.cat(many).double(), joined, **tolerance)


@ranks(2)
def test_no_rows_and_no_inner_size(world):
    for rows, inner in ((0, 4), (3, 0)):
        x1, x2, residual, gamma = draw(rows, inner), draw(inner, 6), draw(rows, 6, seed=1), torch.ones(6)
        y, out = fused(x1, x2, residual, gamma, world.group)
        torch.testing.assert_close((y, out), (residual, norm(residual, gamma)))
        (product,) = grouped([x1], [x2], world.group)
        torch.testing.assert_close(product, torch.zeros(rows, 6))


@ranks(1)
def test_traces_in_one_graph(world):
    x1, x2, residual, gamma, name = draw(2, 3, 4), draw(4, 6), draw(2, 3, 6), draw(6), world.group.group_name

    def in_place(x1, x2, residual, gamma):
        residual = residual.clone()
        return fused_(x1, x2, residual, gamma, name)

    assert_compiles(lambda *tensors: fused(*tensors, name), x1, x2, residual, gamma)
    assert_compiles(in_place, x1, x2, residual, gamma)
    assert_compiles(lambda x, w: grouped([x[0], x[1]], [w, w], name), x1, x2)


@ranks(1)
def test_operators_are_well_formed(world):
    x1, x2, residual, gamma = draw(2, 3, 4), draw(4, 6), draw(2, 3, 6), draw(6)
    name = world.group.group_name
    rest = (gamma, name, 1e-6, None, None, None, None, 0)
    check_operator(
        torch.ops.mindspeed.mm_all_reduce_add_rms_norm.default,
        (x1, x2, residual, *rest),
        (x1.bfloat16(), x2.bfloat16(), residual.bfloat16(), gamma.bfloat16(), *rest[1:]),
    )
    check_operator(torch.ops.mindspeed.mm_all_reduce_add_rms_norm_.default, (x1, x2, residual, *rest))
    check_operator(torch.ops.mindspeed.grouped_mat_mul_all_reduce.default, ([x1[0], x1[1]], [x2, x2.clone()], name, None))


@ranks(2)
def test_errors(world):
    x1, x2, residual, gamma = draw(3, 4), draw(4, 6), draw(3, 6), draw(6)
    with pytest.raises(ValueError, match="hcom must name a process group, got 'nowhere'; known groups: .*0"):
        fused(x1, x2, residual, gamma, "nowhere")
    with pytest.raises(ValueError, match="reduce_op must be one of 'sum', got 'max'"):
        fused(x1, x2, residual, gamma, world.group, "max")
    with pytest.raises(ValueError, match="x2 must have 4 rows"):
        fused(x1, draw(5, 6), residual, gamma, world.group)
    with pytest.raises(ValueError, match="dequant_scale is for int8 x1 and x2"):
        fused(x1, x2, residual, gamma, world.group, dequant_scale=torch.ones(1))
    with pytest.raises(ValueError, match="antiquant_scale is for float x1 and int8 x2, got None"):
        fused(x1, x2.to(torch.int8), residual, gamma, world.group)
    with pytest.raises(RuntimeError, match="has no derivative, got an input that requires grad; use the MC2 linear layers"):
        fused(x1.requires_grad_(), x2, residual, gamma, world.group)
    with pytest.raises(ValueError, match="antiquant_group_size must be 0 or a multiple of 32"):
        fused(
            x1.detach(), x2.to(torch.int8), residual, gamma, world.group, antiquant_scale=torch.ones(6), antiquant_group_size=16
        )
    x1, int8 = x1.detach(), x2.to(torch.int8)
    for options, error, text in (
        (
            {"antiquant_scale": torch.ones(5)},
            ValueError,
            r"antiquant_scale must have shape \(1,\) or \(6,\) or \(1, 6\), got \(5,\)",
        ),
        ({"antiquant_scale": torch.ones(6).half()}, TypeError, "antiquant_scale must have dtype float32, got float16"),
        ({"antiquant_scale": torch.ones(6), "antiquant_offset": torch.ones(2)}, ValueError, "antiquant_offset must have shape"),
    ):
        with pytest.raises(error, match=f"npu_mm_all_reduce_add_rms_norm: {text}"):
            fused(x1, int8, residual, gamma, world.group, **options)
    with pytest.raises(TypeError, match="dequant_scale must have dtype bfloat16 or float32 or int64 or uint64, got float16"):
        fused(x1.to(torch.int8), int8, residual, gamma, world.group, dequant_scale=torch.ones(1).half())
    with pytest.raises(ValueError, match=r"dequant_scale must have shape \(1,\) or \(6,\) or \(1, 6\), got \(2,\)"):
        fused(x1.to(torch.int8), int8, residual, gamma, world.group, dequant_scale=torch.ones(2))
    with pytest.raises(RuntimeError, match="x2 must be on cpu like x1, got meta"):
        fused(x1, x2.to("meta"), residual, gamma, world.group)


@ranks(2)
def test_errors_of_grouped_products(world):
    x, x2 = draw(3, 4), draw(4, 6)
    for arguments, options, error, text in (
        (([x, x2.t()], [x2, x2.clone()]), {"split_item": 2, "bias": [draw(6)]}, ValueError, "bias must give 2 vectors, got 1"),
        (([draw(2, 3, 4)], [x2]), {"split_item": 2}, ValueError, r"x\[0\] must have 2 dimensions for split_item 1 to 3"),
        (([x, x.half()], [x2, x2.half()]), {}, TypeError, r"x\[1\] must have dtype float32, got float16"),
        (([], [x2]), {}, ValueError, "x must give 1 to 64 products, got 0"),
        ((x, draw(5, 6)), {"split_item": 3, "group_list": [1, 3]}, ValueError, "weight must have rows for 2 matrices"),
        (([x], [x2.to("meta")]), {}, RuntimeError, r"weight\[0\] must be on cpu like x\[0\], got meta"),
        (([x], [x2]), {"reduce_op": "max"}, ValueError, "reduce_op must be one of 'sum'"),
    ):
        with pytest.raises(error, match=f"npu_grouped_mat_mul_all_reduce: {text}"):
            grouped(*arguments, world.group, **options)
    with pytest.raises(ValueError, match="hcomm must name a process group, got 'nowhere'"):
        grouped([x], [x2], "nowhere")
    with pytest.raises(ValueError, match="group_list is for split_item 1 and 3, got None"):
        grouped(x, x2, world.group, split_item=3)
    with pytest.raises(ValueError, match="group_list must end with 3"):
        grouped(x, [x2], world.group, group_list=[2], split_item=1)
    with pytest.raises(ValueError, match="must give 1 to 64 products"):
        grouped([x] * 65, [x2] * 65, world.group)
