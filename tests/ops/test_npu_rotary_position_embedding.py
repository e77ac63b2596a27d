import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding as rotary
from mindspeed.testing.operators import (
    assert_compiles,
    assert_operator_accurate,
    check_operator,
    kept_bytes,
    layouts,
    operator_calls,
)

# x and the broadcast shapes of cos and sin, for the layouts SBND, BNSD and BSND
SHAPES = [
    ((6, 2, 3, 8), (6, 1, 1, 8)),
    ((6, 2, 3, 8), (6, 2, 1, 8)),
    ((6, 2, 3, 8), (6, 2, 3, 8)),
    ((2, 3, 7, 40), (1, 1, 7, 40)),
    ((2, 3, 7, 40), (2, 1, 7, 40)),
    ((2, 7, 3, 4), (1, 7, 1, 4)),
    ((1, 1, 1, 2), (1, 1, 1, 2)),
    ((6, 2, 3, 10), (6, 1, 1, 4)),
]


def textbook(mode):
    def form(x, cos, sin):
        size = cos.shape[-1]
        head, tail = x[..., :size], x[..., size:]
        if mode == 0:
            turned = torch.cat([-head[..., size // 2 :], head[..., : size // 2]], -1)
        else:
            turned = torch.stack([-head[..., 1::2], head[..., ::2]], -1).reshape(head.shape)
        return torch.cat([head * cos + turned * sin, tail], -1)

    return form


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "table"), SHAPES)
def test_values_and_gradients(shape, table, dtype, mode, body):
    cos, sin = torch.randn(table).to(dtype), torch.randn(table).to(dtype)
    for _, x in layouts(torch.randn(shape).to(dtype)):
        with backends(f"rotary={body}"):
            run = lambda x, c, s: rotary(x, c, s, mode)  # noqa: E731
            assert_operator_accurate(run, textbook(mode), x.requires_grad_(), cos, sin)
            assert_operator_accurate(run, textbook(mode), x, cos.requires_grad_(), sin)
            assert_operator_accurate(run, textbook(mode), x, cos, sin.requires_grad_())


@pytest.mark.parametrize("positions", [3000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_blocks_equal_one(positions, dtype):
    x, table = torch.randn(3000, 2, 4, 32).to(dtype), torch.randn(positions, 1, 1, 32).to(dtype)
    with backends("rotary=ref"):
        expected = rotary(x, table, table)
    torch.testing.assert_close(rotary(x, table, table), expected)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_packed_queries_and_keys(dtype, mode, paired):
    """Views into a packed tensor that begin anywhere, a part of the head, and a last block that is shorter."""
    packed = torch.randn(3001, 1, 4, 2 * 33).to(dtype)
    cos, sin = torch.randn(3001, 1, 1, 16).to(dtype), torch.randn(3001, 1, 1, 16).to(dtype)
    if paired:  # as tables of angles are: one angle a pair
        cos, sin = (half.repeat_interleave(2, -1) if mode else half.repeat(1, 1, 1, 2) for half in (cos, sin))
    size = cos.shape[-1]
    for start, width in ((0, 33), (33, 33), (34, 32), (1, 32)):
        x = packed[..., start : start + width].detach().requires_grad_()
        dy = packed[..., 66 - width :]
        values = []
        for body in ("auto", "ref"):
            with backends(f"rotary={body}"):
                y = rotary(x, cos, sin, mode)
                values.append((y, *torch.autograd.grad(y, x, dy)))
        for ours, reference in zip(*values, strict=True):
            torch.testing.assert_close(ours, reference)
            assert torch.equal(ours[..., size:], reference[..., size:])


def test_float32_tables_with_16_bit_input():
    x, cos, sin = torch.randn(4, 1, 2, 8).bfloat16(), torch.randn(4, 1, 1, 8), torch.randn(4, 1, 1, 8)
    y = rotary(x, cos, sin)
    assert torch.equal(y, textbook(0)(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize("mode", [0, 1])
def test_gradcheck_and_inverse(mode):
    x = torch.randn(3, 1, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, 1, 1, 6, dtype=torch.float64)
    torch.autograd.gradcheck(rotary, (x, angle.cos().requires_grad_(), angle.sin().requires_grad_(), mode))
    angle = torch.randn(3, 1, 1, 3, dtype=torch.float64)
    angle = torch.cat([angle, angle], -1) if mode == 0 else angle.repeat_interleave(2, -1)
    turned = rotary(x, angle.cos(), angle.sin(), mode)
    torch.testing.assert_close(rotary(turned, angle.cos(), -angle.sin(), mode), x)


def test_operators_are_well_formed_and_trace():
    ops = torch.ops.mindspeed
    for dtype in (torch.float32, torch.bfloat16):
        x, cos = torch.randn(4, 2, 3, 6).to(dtype), torch.randn(4, 1, 1, 6).to(dtype)
        check_operator(
            ops.rotary.default,
            (x, cos, cos.clone(), 0),
            (x.clone().requires_grad_(), cos.clone().requires_grad_(), cos, 1),
            (x.transpose(0, 1), cos.transpose(0, 1), cos.transpose(0, 1).clone(), 0),
            (x[:0], cos[:0], cos[:0], 0),
        )
    check_operator(ops.rotary_backward.default, (x, x.clone(), cos, cos.clone(), 0), (x, None, cos, cos.clone(), 1))
    assert_compiles(rotary, x.requires_grad_(), cos, cos)


def test_keeps_no_activation_unless_a_table_wants_a_gradient():
    x, cos, sin = torch.randn(8, 2, 3, 16, requires_grad=True), torch.randn(8, 1, 1, 16), torch.randn(8, 1, 1, 16)
    tables = 2 * cos.numel() * 4
    assert kept_bytes(lambda: rotary(x, cos, sin)) == tables
    assert kept_bytes(lambda: rotary(x, cos.requires_grad_(), sin)) == tables + x.numel() * 4


def test_one_call_each_way():
    x, cos = torch.randn(4, 2, 3, 6, requires_grad=True), torch.randn(4, 1, 1, 6)
    assert operator_calls(lambda: rotary(x, cos, cos).sum().backward()) == {"rotary": 1, "rotary_backward": 1}


def test_no_tokens():
    x, cos = torch.randn(0, 2, 3, 6, requires_grad=True), torch.randn(0, 1, 1, 6)
    rotary(x, cos, cos).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("x", "cos", "sin", "mode", "error", "text"),
    [
        (
            torch.ones(2, 3, 4),
            torch.ones(1, 1, 1, 4),
            torch.ones(1, 1, 1, 4),
            0,
            ValueError,
            "x must have 4 dimensions, got shape",
        ),
        (torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 3), 0, ValueError, "must have an even last size"),
        (torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), torch.ones(1, 1, 1, 4), 0, ValueError, "sin must have shape"),
        (torch.ones(2, 1, 1, 4), torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 4), 0, ValueError, "must broadcast to x of shape"),
        (torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 6), torch.ones(2, 1, 1, 6), 0, ValueError, "must broadcast to x of shape"),
        (
            torch.ones(2, 1, 1, 4),
            torch.ones(2, 1, 1, 4),
            torch.ones(2, 1, 1, 4),
            2,
            ValueError,
            "mode must be one of 0, 1, got 2",
        ),
        (torch.ones(2, 1, 1, 4).int(), torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 0, TypeError, "got int32"),
    ],
)
def test_errors(x, cos, sin, mode, error, text):
    with pytest.raises(error, match=text):
        rotary(x, cos, sin, mode)
