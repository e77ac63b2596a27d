"""SwiGLU in one operator: `y = silu(a) * b` for the halves a, b of x; also with a bias, and with a weight per row."""

# F size of one half; "rows" are all leading dimensions flattened

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._blocks import block_rows, column_sums, fresh, row_blocks, widen
from mindspeed.ops._registry import below_autograd, define, register_kernel


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """`silu(a) * b` with `a, b = chunk(x, 2, dim)`.

    x: float, even size along `dim`; the result has half that size. Computed in float32 and rounded once; keeps x only.
    Source: Shazeer 2020. Raises TypeError, ValueError naming the argument for an integer dtype, a bad `dim` or an odd size.
    """
    return torch.ops.mindspeed.swiglu(x, _check("swiglu", x, dim))


def bias_swiglu(x: Tensor, bias: Tensor) -> Tensor:
    """`swiglu(x + bias)` over the last dimension; x: [..., 2F], bias: [2F], any float dtypes. Keeps x and bias."""
    _check("bias_swiglu", x, -1)
    _checks.tensor("bias_swiglu", "bias", bias)
    _checks.shape("bias_swiglu", "bias", bias, x.shape[-1:])
    _checks.same_device("bias_swiglu", x=x, bias=bias)
    return torch.ops.mindspeed.bias_swiglu(x, bias)


def weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    """`swiglu(x) * weights` over the last dimension; x: [..., 2F], weights: [..., 1], any float dtypes. Keeps x and weights.

    The gradient of `weights` is summed in float32 and rounded to its dtype.
    """
    _check("weighted_swiglu", x, -1)
    _checks.tensor("weighted_swiglu", "weights", weights)
    _checks.shape("weighted_swiglu", "weights", weights, (*x.shape[:-1], 1))
    _checks.same_device("weighted_swiglu", x=x, weights=weights)
    return torch.ops.mindspeed.swiglu_weighted(x, weights)


def _check(op: str, x: Tensor, dim: int) -> int:
    """Check x and return the dimension counted from the front."""
    _checks.tensor(op, "x", x)
    _checks.require(op, "dim", -x.dim() <= dim < x.dim(), f"must be a dimension of x with shape {tuple(x.shape)}", dim)
    _checks.require(op, "x", x.shape[dim] % 2 == 0, f"must have an even size along dim {dim}", f"shape {tuple(x.shape)}")
    return dim % x.dim()


def _forward(x: Tensor, dim: int) -> Tensor:
    a, b = x.to(_checks.wide_dtype(x)).chunk(2, dim)
    return torch.nn.functional.silu(a) * b


def _backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Gradient of `_forward` in the wide dtype; dy must be wide."""
    a, b = x.to(dy.dtype).chunk(2, dim)
    sigmoid = a.sigmoid()
    return torch.cat([dy * b * sigmoid * (1 + a * (1 - sigmoid)), dy * a * sigmoid], dim)


def _reference(x: Tensor, dim: int) -> Tensor:
    return _forward(x, dim).to(x.dtype).contiguous()


def _reference_backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    return _backward(dy.to(_checks.wide_dtype(x)), x, dim).to(x.dtype).contiguous()


def _reference_bias(x: Tensor, bias: Tensor) -> Tensor:
    wide = _checks.wide_dtype(x)
    return _forward(x.to(wide) + bias.to(wide), -1).to(x.dtype).contiguous()


def _reference_bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    dx = _backward(dy.to(wide), x.to(wide) + bias.to(wide), -1)
    return dx.to(x.dtype).contiguous(), column_sums(dx).to(bias.dtype)


def _reference_weighted(x: Tensor, weights: Tensor) -> Tensor:
    return (_forward(x, -1) * weights.to(_checks.wide_dtype(x))).to(x.dtype).contiguous()


def _reference_weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    wide = _checks.wide_dtype(x)
    dy_wide = dy.to(wide)
    dx = _backward(dy_wide * weights.to(wide), x, -1)
    dweights = (dy_wide * _forward(x, -1)).sum(-1, keepdim=True)
    return dx.to(x.dtype).contiguous(), dweights.to(weights.dtype)


def _half(x: Tensor, dim: int) -> Tensor:
    return x.new_empty([size // 2 if index == dim % x.dim() else size for index, size in enumerate(x.shape)])


class _Swiglu(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx, x, dim):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x)
        ctx.dim = dim
        return below_autograd("swiglu", x, dim)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        return torch.ops.mindspeed.swiglu_backward(dy, *ctx.saved_tensors, ctx.dim), None


class _BiasSwiglu(torch.autograd.Function):
    """Keeps x and bias."""

    @staticmethod
    def forward(ctx, x, bias):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, bias)
        return below_autograd("bias_swiglu", x, bias)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        return torch.ops.mindspeed.bias_swiglu_backward(dy, *ctx.saved_tensors)


class _SwigluWeighted(torch.autograd.Function):
    """Keeps x and weights."""

    @staticmethod
    def forward(ctx, x, weights):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, weights)
        return below_autograd("swiglu_weighted", x, weights)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
        return torch.ops.mindspeed.swiglu_weighted_backward(dy, *ctx.saved_tensors)


define(
    "swiglu(Tensor x, int dim) -> Tensor",
    family="swiglu",
    reference=_reference,
    fake=_half,
    autograd=_Swiglu,
)
define(
    "swiglu_backward(Tensor dy, Tensor x, int dim) -> Tensor",
    family="swiglu",
    reference=_reference_backward,
    fake=lambda dy, x, dim: x.new_empty(x.shape),
)
define(
    "bias_swiglu(Tensor x, Tensor bias) -> Tensor",
    family="swiglu",
    reference=_reference_bias,
    fake=lambda x, bias: _half(x, -1),
    autograd=_BiasSwiglu,
)
define(
    "bias_swiglu_backward(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    family="swiglu",
    reference=_reference_bias_backward,
    fake=lambda dy, x, bias: (x.new_empty(x.shape), bias.new_empty(bias.shape)),
)
define(
    "swiglu_weighted(Tensor x, Tensor weights) -> Tensor",
    family="swiglu",
    reference=_reference_weighted,
    fake=lambda x, weights: _half(x, -1),
    autograd=_SwigluWeighted,
)
define(
    "swiglu_weighted_backward(Tensor dy, Tensor x, Tensor weights) -> (Tensor dx, Tensor dweights)",
    family="swiglu",
    reference=_reference_weighted_backward,
    fake=lambda dy, x, weights: (x.new_empty(x.shape), weights.new_empty(weights.shape)),
)


def _not_last(x: Tensor, dim: int) -> str | None:
    return None if dim == x.dim() - 1 else "the halves are not in the last dimension"


@register_kernel("swiglu", "aten", devices=("cpu",), declines=_not_last)
def _blocked(x: Tensor, dim: int) -> Tensor:
    return _blocked_forward(x, None, None)


@register_kernel("swiglu_weighted", "aten", devices=("cpu",))
def _blocked_weighted(x: Tensor, weights: Tensor) -> Tensor:
    return _blocked_forward(x, None, weights)


@register_kernel("bias_swiglu", "aten", devices=("cpu",))
def _blocked_bias(x: Tensor, bias: Tensor) -> Tensor:
    return _blocked_forward(x, bias, None)


@register_kernel("swiglu_backward", "aten", devices=("cpu",), declines=lambda dy, x, dim: _not_last(x, dim))
def _blocked_backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    return _blocked_gradients(dy, x, None, None)[0]


@register_kernel("bias_swiglu_backward", "aten", devices=("cpu",))
def _blocked_bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx, sums = _blocked_gradients(dy, x, bias, None)
    return dx, sums.to(bias.dtype)


@register_kernel("swiglu_weighted_backward", "aten", devices=("cpu",))
def _blocked_weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    dx, sums = _blocked_gradients(dy, x, None, weights)
    return dx, sums.view(weights.shape).to(weights.dtype)


def _blocked_forward(x: Tensor, bias: Tensor | None, weights: Tensor | None) -> Tensor:
    wide, size = _checks.wide_dtype(x), x.shape[-1] // 2
    x_rows = x.reshape(-1, 2 * size)
    rows = x_rows.shape[0]
    y = fresh((*x.shape[:-1], size), x.dtype)
    y_rows, bias = y.view(rows, size), None if bias is None else bias.to(wide)
    weights = None if weights is None else weights.reshape(rows, 1).to(wide)
    step = block_rows(rows, size * 4)
    both, work = torch.empty(step, 2 * size, dtype=wide), torch.empty(step, size, dtype=wide)
    for block in row_blocks(rows, size * 4):
        ab, target = widen(x_rows[block], both), y_rows[block]
        if bias is not None:
            ab = torch.add(ab, bias, out=both[: ab.shape[0]])
        out = torch.ops.aten.silu.out(ab[:, :size], out=target if y.dtype == wide else work[: ab.shape[0]])
        if weights is not None:
            out.mul_(weights[block])
        out.mul_(ab[:, size:])
        if y.dtype != wide:
            target.copy_(out)
    return y


def _blocked_gradients(dy: Tensor, x: Tensor, bias: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and in float32 the one of the bias [2F] or of the weights [rows]."""
    wide, size = _checks.wide_dtype(x), x.shape[-1] // 2
    x_rows, dy_rows = x.reshape(-1, 2 * size), dy.reshape(-1, size)
    rows = x_rows.shape[0]
    dx = fresh(x.shape, x.dtype)
    dx_rows, bias = dx.view(rows, 2 * size), None if bias is None else bias.to(wide)
    weights = None if weights is None else weights.reshape(rows, 1).to(wide)
    step = block_rows(rows, size * 4)
    both, work = torch.empty(step, 2 * size, dtype=wide), torch.empty(3, step, size, dtype=wide)
    sums = torch.zeros(2 * size, dtype=wide) if bias is not None else torch.empty(rows, dtype=wide)
    for block in row_blocks(rows, size * 4):
        target = dx_rows[block]
        n = target.shape[0]
        ab = (target if dx.dtype == wide else both[:n]).copy_(x_rows[block])
        if bias is not None:
            ab.add_(bias)
        g, sigmoid, gated = work[:, :n]
        g.copy_(dy_rows[block])
        torch.sigmoid(ab[:, :size], out=sigmoid)
        if weights is not None:
            torch.mul(ab[:, :size], sigmoid, out=gated).mul_(ab[:, size:])
            torch.linalg.vecdot(gated, g, out=sums[block])
            g.mul_(weights[block])
        _gradients_in_place(ab[:, :size], ab[:, size:], g, sigmoid)
        if bias is not None:
            sums += ab.sum(0)
        if dx.dtype != wide:
            target.copy_(ab)
    return dx, sums


def _gradients_in_place(a: Tensor, b: Tensor, g: Tensor, sigmoid: Tensor) -> None:
    """Replace a by `g b s (1 + a (1 - s))` and b by `g a s`; g and the sigmoid s are used up. One exponential serves both."""
    g.mul_(sigmoid)
    b.mul_(g)
    torch.addcmul(a, a, sigmoid, value=-1, out=sigmoid)
    g.mul_(a)
    torch.addcmul(b, b, sigmoid, out=a)
    b.copy_(g)
