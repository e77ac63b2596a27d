"""The documented meaning of torch_npu's operators, in plain torch on CPU tensors.

The contract test (`npu_contract`) sees which kernels run and with which arguments; their values mean nothing there. This module is
the other half: it stands in for torch_npu with operators of the same schemas that compute what the vendor documents, so that
the bodies in `mindspeed.ops.kernels.npu` can be compared with the definitions. It says nothing about a device's rounding.

    @npu_semantics()
    def test_rms_norm():
        body("rms_norm")(x, weight, 1e-6)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mindspeed.testing.shipped import Place, Process, shared_process, shipped

_OPTIONAL_LISTS = (
    "Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None,"
    " Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None"
)


def npu_semantics(*, seconds: float = 60.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test so that its body runs in a process where `import torch_npu` gives this stand-in."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        return shipped(function, _process, lambda: None, set(), seconds=seconds)

    return decorate


def place() -> Place:
    """The process with the stand-in."""
    return Place("semantics", f"{__name__}:prepare", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


def _process() -> Process:
    return shared_process("semantics", place)


def prepare() -> dict[str, object]:
    """Define the operators of the namespace `npu` and put the module `torch_npu` in place."""
    library = torch.library.Library("npu", "DEF")
    for schema, function in OPERATORS.items():
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
    module = ModuleType("torch_npu")
    module.__getattr__ = lambda name: getattr(torch.ops.npu, name)  # type: ignore[method-assign]
    module.library = library  # type: ignore[attr-defined]  # operators live as long as their library
    sys.modules["torch_npu"] = module
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    return {}


def body(name: str, index: int = 0) -> Callable[..., Any]:
    """The NPU body of operator `name`; `index` counts the bodies that are tried one after the other."""
    from mindspeed.ops._registry import REGISTRY

    operator = REGISTRY.operators[name]
    REGISTRY.load(operator.family, "npu")
    return [kernel.body for kernel in operator.kernels["npu"] if kernel.backend == "npu"][index]


# ---- norms and activations --------------------------------------------------------------------------------------------------


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype
    wide = input.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def _gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [value.detach().float().requires_grad_() for value in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, dy.float())


def _rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    epsilon = (rstd.pow(-2) - input.float().pow(2).mean(-1, keepdim=True)).mean().item()
    dx, dgamma = _gradients(lambda x, g: _rms_norm(x, g, epsilon)[0], dy, input, gamma)
    return dx.to(input.dtype), dgamma


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return *_rms_norm(total, gamma, epsilon), total


def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def _swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    return _gradients(lambda x: _swiglu(x, dim), grad_output, input)[0].to(input.dtype)


def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    assert input.dtype == r1.dtype == r2.dtype and input.dim() == r1.dim() == 4
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-input[..., 1::2], input[..., ::2]], -1).flatten(-2)
    return (input.float() * r1.float() + turned.float() * r2.float()).to(input.dtype)


def _rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    parts = _gradients(lambda x, cos, sin: _rotary_mul(x, cos, sin, rotary_mode), grad, input, r1, r2)
    return tuple(part.to(input.dtype) for part in parts)


def _scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    assert x.dim() == mask.dim() == 4 and not fixed_triu_mask
    return torch.softmax((x.float() * scale).masked_fill(mask, -10000.0), -1).to(x.dtype)


def _scaled_masked_softmax_backward(y_grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool) -> Tensor:
    wide, grad = y.float(), y_grad.float()
    return (scale * wide * (grad - (grad * wide).sum(-1, keepdim=True))).masked_fill(mask, 0.0).to(y.dtype)


def _fast_gelu(self: Tensor) -> Tensor:
    wide = self.float()
    return (wide * torch.exp(0.851 * (wide - wide.abs())) / (1 + torch.exp(-1.702 * wide.abs()))).to(self.dtype)


# ---- dropout: one mask per random state, here a byte and not a bit per element ------------------------------------------------


def _gen_mask(
    input: Tensor, size: list[int], p: float, seed: int, offset: int, parallel: bool = True, sync: bool | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 31 + offset)
    return (torch.rand(size, generator=generator) >= p).to(torch.uint8)


def _dropout_backward(grad_output: Tensor, mask: Tensor, p: float) -> Tensor:
    return grad_output * mask / (1 - p)


# ---- grouped products ---------------------------------------------------------------------------------------------------------


def _bounds(group_list: Tensor, list_type: int) -> list[tuple[int, int]]:
    ends = (group_list.cumsum(0) if list_type == 1 else group_list).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _grouped_matmul(  # noqa: PLR0913 - the vendor's signature
    x: list[Tensor], weight: list[Tensor], *, bias: list[Tensor] | None = None, scale: list[Tensor] | None = None,
    offset: None = None, antiquant_scale: list[Tensor] | None = None, antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None, group_list: Tensor | None = None, split_item: int = 0,
    group_type: int | None = None, group_list_type: int = 0, act_type: int = 0, output_dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    if group_type == -1:
        return [(a.float() @ b.float()).to(a.dtype) for a, b in zip(x, weight, strict=True)]
    (left,), (right,) = x, weight
    dtype = output_dtype or left.dtype
    if group_type == 2:
        parts = [left[:, i:j].float() @ right[i:j].float() for i, j in _bounds(group_list, group_list_type)]
        return [torch.stack(parts).to(dtype)]
    y = torch.full((left.shape[0], right.shape[2]), 77, dtype=dtype)  # rows after the last group are not written
    for g, (i, j) in enumerate(_bounds(group_list, group_list_type)):
        matrix = right[g].float()
        if antiquant_scale is not None:
            matrix = ((matrix + antiquant_offset[0][g].float()) * antiquant_scale[0][g].float()).to(left.dtype).float()
        part = left[i:j].float() @ matrix
        part = part if bias is None else part + bias[0][g].float()
        if scale is not None:
            factor = scale[0][g]
            part = part * (factor.to(torch.int32).view(torch.float32) if factor.dtype == torch.int64 else factor.float())
        part = part if per_token_scale is None else part * per_token_scale[0][i:j, None]
        part = torch.relu(part) if act_type == 1 else part
        y[i:j] = part.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else part.to(dtype)
    return [y]


def _grouped_matmul_add_(
    input: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, *, transpose_x: bool = True, transpose_weight: bool = False,
    group_type: int = 2, group_list_type: int = 0,
) -> Tensor:  # fmt: skip
    for g, (i, j) in enumerate(_bounds(group_list, group_list_type)):
        input[g] += x[i:j].float().t() @ weight[i:j].float()
    return input


# ---- token permutation ----------------------------------------------------------------------------------------------------------


def _permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    order = indices.flatten().sort(stable=True).indices
    copies = indices.numel() // tokens.shape[0]
    return tokens[order[: num_out_tokens or order.numel()] // copies], order.argsort().to(torch.int32)


def _unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:  # fmt: skip
    copies = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens[sorted_indices.long()].float().unflatten(0, (-1, copies))
    return (rows if probs is None else rows * probs.float().unsqueeze(2)).sum(1).to(permuted_tokens.dtype)


def _permute_grad(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: torch.dtype, num_topK: int,
    padded_mode: bool = False,
) -> Tensor:  # fmt: skip
    rows = grad_permuted_tokens[sorted_indices.long()].float()
    return rows.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


def _unpermute_grad(
    permuted_tokens: Tensor, grad_unpermuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None,
    padded_mode: bool = False, restore_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights = torch.ones(sorted_indices.numel(), 1) if probs is None else probs
    parts = _gradients(lambda x, p: _unpermute(x, sorted_indices, p), grad_unpermuted_tokens, permuted_tokens, weights)
    return parts[0].to(permuted_tokens.dtype), parts[1].to(weights.dtype)


def _ring_update(
    prev_attn_out: Tensor, prev_softmax_max: Tensor, prev_softmax_sum: Tensor, cur_attn_out: Tensor, cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor, *, actual_seq_qlen: Tensor | None = None, input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Statistics by token, or of one sequence; sequence blocks of several sequences are not modelled."""
    top = torch.maximum(prev_softmax_max, cur_softmax_max)
    parts = [total * torch.exp(maximum - top) for maximum, total in
             ((prev_softmax_max, prev_softmax_sum), (cur_softmax_max, cur_softmax_sum))]  # fmt: skip
    total = parts[0] + parts[1]
    weights = [(part / total)[..., :1] for part in parts]
    out = torch.zeros(prev_attn_out.shape)
    for value, weight in zip((prev_attn_out, cur_attn_out), weights, strict=True):
        if input_layout == "SBH":  # [B, N, S, 1] -> [S, B, N, 1]
            weight = weight.permute(2, 0, 1, 3)
            out += (value.float().unflatten(2, (weight.shape[2], -1)) * weight).flatten(2)
        else:
            out += value.float() * weight
    return out.to(prev_attn_out.dtype), top, total


OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)": _rms_norm,
    "npu_rms_norm_backward(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)": _rms_norm_backward,
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)": _add_rms_norm,
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor": _swiglu,
    "npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor": _swiglu_backward,
    "npu_fast_gelu(Tensor self) -> Tensor": _fast_gelu,
    'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor': _rotary_mul,
    'npu_rotary_mul_backward(Tensor grad, Tensor input, Tensor r1, Tensor r2, str rotary_mode="half")'
    " -> (Tensor, Tensor, Tensor)": _rotary_mul_backward,
    "npu_scaled_masked_softmax(Tensor x, Tensor mask, Scalar scale=1, bool fixed_triu_mask=False) -> Tensor": (
        _scaled_masked_softmax
    ),
    "npu_scaled_masked_softmax_backward(Tensor y_grad, Tensor y, Tensor mask, Scalar scale, bool fixed_triu_mask) -> Tensor": (
        _scaled_masked_softmax_backward
    ),
    "_npu_dropout_gen_mask.Tensor(Tensor input, int[] size, float p, int seed, int offset, *, bool? parallel=True,"
    " bool? sync=None) -> Tensor": _gen_mask,
    "npu_dropout_backward(Tensor grad_output, Tensor mask, float p) -> Tensor": _dropout_backward,
    f"npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, {_OPTIONAL_LISTS}, Tensor? group_list=None, int? split_item=0,"
    " int? group_type=None, int? group_list_type=0, int? act_type=0, ScalarType? output_dtype=None) -> Tensor[]": _grouped_matmul,
    "npu_grouped_matmul_add_(Tensor(a!) input, Tensor x, Tensor weight, Tensor group_list, *, bool transpose_x=True,"
    " bool transpose_weight=False, int group_type=2, int? group_list_type=0) -> Tensor(a!)": _grouped_matmul_add_,
    "npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False)"
    " -> (Tensor, Tensor)": _permute,
    "npu_moe_token_permute_grad_v2(Tensor grad_permuted_tokens, Tensor sorted_indices, SymInt tokens_size_0,"
    " ScalarType tokens_dtype, SymInt num_topK, bool padded_mode=False) -> Tensor": _permute_grad,
    "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, bool padded_mode=False,"
    " int[]? restore_shape=None) -> Tensor": _unpermute,
    "npu_moe_token_unpermute_grad(Tensor permuted_tokens, Tensor grad_unpermuted_tokens, Tensor sorted_indices,"
    " Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None) -> (Tensor, Tensor)": _unpermute_grad,
    "npu_ring_attention_update(Tensor prev_attn_out, Tensor prev_softmax_max, Tensor prev_softmax_sum, Tensor cur_attn_out,"
    " Tensor cur_softmax_max, Tensor cur_softmax_sum, *, Tensor? actual_seq_qlen=None, str input_layout='SBH',"
    " str input_softmax_layout='') -> (Tensor, Tensor, Tensor)": _ring_update,
}
"""Schemas of torch_npu 2.13 (arguments that we never pass are left out) and what they compute."""
