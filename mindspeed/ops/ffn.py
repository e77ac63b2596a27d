"""A two-layer feed-forward network, for one or several experts, in float, int8, or with int8 weights (inference)."""

# M rows, E experts, K1 -> N1 first product, K2 -> N2 second

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._activations import BY_NAME
from mindspeed.ops._groups import ENDS, SIZES, host_sizes, spans
from mindspeed.ops._quantised import float_scale, integer_product, to_int8, widened_weight
from mindspeed.ops._registry import alias, define

OP = "npu_ffn"
GATED = {"geglu": "gelu", "swiglu": "silu", "reglu": "relu"}
PLAIN = ("fastgelu", "gelu", "relu", "silu")
MOST_EXPERTS = 256
SCALES = (torch.float32, torch.bfloat16, torch.int64, torch.uint64)
"""Dtypes of a dequantisation scale; an integer holds the bits of a float32."""


def npu_ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    expert_tokens: Sequence[int] | Tensor | None = None,
    expert_tokens_index: Sequence[int] | Tensor | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    deq_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    antiquant_scale1: Tensor | None = None,
    antiquant_scale2: Tensor | None = None,
    antiquant_offset1: Tensor | None = None,
    antiquant_offset2: Tensor | None = None,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`act(x @ W1 + b1) @ W2 + b2`; the page docs/ops/ffn.md has the quantised forms.

    x: [..., K1], 2 to 8 dimensions; weights: [K1, N1], [K2, N2], or [E, K1, N1], [E, K2, N2] with the tokens of each expert in
    `expert_tokens` (counts) or `expert_tokens_index` (cumulative). activation: fastgelu, gelu, relu, silu (N1 = K2), or geglu,
    swiglu, reglu (N1 = 2 * K2, no experts). bias: [N] or [E, N], float32 for bfloat16.
    """
    tensors = {
        "bias1": bias1,
        "bias2": bias2,
        "scale": scale,
        "offset": offset,
        "deq_scale1": deq_scale1,
        "deq_scale2": deq_scale2,
        "antiquant_scale1": antiquant_scale1,
        "antiquant_scale2": antiquant_scale2,
        "antiquant_offset1": antiquant_offset1,
        "antiquant_offset2": antiquant_offset2,
    }
    _checks.tensor(OP, "x", x, (torch.float16, torch.bfloat16, torch.float32, torch.int8))
    _checks.require(OP, "x", 2 <= x.dim() <= 8, "must have 2 to 8 dimensions", tuple(x.shape))
    activation = _checks.word(OP, "activation", activation, (*PLAIN, *GATED))
    _checks.option(OP, "inner_precise", inner_precise, (None, 0, 1))
    experts = _check_weights(x, weight1, weight2, activation)
    _check_tensors(x, weight1, weight2, experts, tensors)
    _checks.same_device(OP, x=x, weight1=weight1, weight2=weight2, **tensors)
    result = _result_dtype(x, output_dtype)
    sizes = _expert_sizes(expert_tokens, expert_tokens_index, experts, x.shape[:-1].numel())
    _checks.forward_only(OP, "compose two products for training", x, weight1, weight2, *tensors.values())
    return torch.ops.mindspeed.ffn(
        x, weight1, weight2, activation, expert_tokens=sizes, inner_precise=inner_precise, output_dtype=result, **tensors
    )


def _result_dtype(x: Tensor, output_dtype: torch.dtype | None) -> torch.dtype:
    """float16 or bfloat16 of int8 x, else the dtype of x."""
    allowed = (torch.float16, torch.bfloat16) if x.dtype == torch.int8 else (x.dtype,)
    _checks.option(OP, "output_dtype", output_dtype, (None, *allowed))
    return output_dtype or allowed[0]


def _check_weights(x: Tensor, weight1: Tensor, weight2: Tensor, activation: str) -> int | None:
    """Check both weights; returns the number of experts, None for a single network without them."""
    dtypes = (torch.int8,) if x.dtype == torch.int8 else (x.dtype, torch.int8)
    _checks.tensor(OP, "weight1", weight1, dtypes, ndim=(2, 3))
    _checks.tensor(OP, "weight2", weight2, (weight1.dtype,), ndim=weight1.dim())
    _checks.require(
        OP, "weight1", weight1.shape[-2] == x.shape[-1], f"must have inner size {x.shape[-1]}", tuple(weight1.shape)
    )
    inner = weight1.shape[-1] // 2 if activation in GATED else weight1.shape[-1]
    _checks.require(OP, "weight2", weight2.shape[-2] == inner, f"must have inner size {inner}", tuple(weight2.shape))
    if weight1.dim() == 2:
        return None
    _checks.require(OP, "activation", activation not in GATED, f"must be one of {', '.join(PLAIN)} with experts", activation)
    count = weight1.shape[0]
    _checks.require(OP, "weight2", weight2.shape[0] == count, f"must have {count} experts", tuple(weight2.shape))
    _checks.require(OP, "weight1", count <= MOST_EXPERTS, f"must have at most {MOST_EXPERTS} experts", count)
    return count


def _check_tensors(x: Tensor, weight1: Tensor, weight2: Tensor, experts: int | None, tensors: dict[str, Tensor | None]) -> None:
    """Check biases and scales: which form of the operator takes them, dtype and shape."""
    integers = x.dtype == torch.int8
    bias_dtype = torch.int32 if integers else torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    lead = () if experts is None else (experts,)
    for number, weight in (("1", weight1), ("2", weight2)):
        columns = (*lead, weight.shape[-1])
        _check_tensor(f"bias{number}", tensors, (bias_dtype,), columns)
        _need(f"deq_scale{number}", tensors, integers, "is for int8 x")
        _check_tensor(f"deq_scale{number}", tensors, SCALES, columns)
        _check_antiquant(number, x, weight, columns, tensors)
    _need("scale", tensors, integers, "is for int8 x")
    if not integers:
        _need("offset", tensors, False, "is for int8 x")
    for name in ("scale", "offset"):
        _check_tensor(name, tensors, (torch.float32, torch.float16, torch.bfloat16), lead or (1,), (*lead, weight2.shape[-2]))


def _check_antiquant(
    number: str, x: Tensor, weight: Tensor, columns: tuple[int, ...], tensors: dict[str, Tensor | None]
) -> None:
    """Check scale and offset of one weight: per column, or per group of rows with up to one group per row."""
    wanted, name, offset = weight.dtype == torch.int8 != x.dtype, f"antiquant_scale{number}", f"antiquant_offset{number}"
    _need(name, tensors, wanted, "is for float x and int8 weights")
    if not wanted:
        _need(offset, tensors, False, "is for float x and int8 weights")
        return
    groups = tensors[name].shape[-2] if tensors[name].dim() > len(columns) else 1
    _checks.require(OP, name, groups <= weight.shape[-2], f"must have at most {weight.shape[-2]} groups", groups)
    _check_tensor(name, tensors, (x.dtype,), columns, (*columns[:-1], groups, columns[-1]))
    _check_tensor(offset, tensors, (x.dtype,), tensors[name].shape)


def _need(name: str, tensors: dict[str, Tensor | None], wanted: bool, rule: str) -> None:
    given = tensors[name] is not None
    _checks.require(OP, name, given == wanted, rule, "a tensor" if given else "None")


def _check_tensor(name: str, tensors: dict[str, Tensor | None], dtypes: Sequence[torch.dtype], *shapes: Sequence[int]) -> None:
    if (value := tensors[name]) is not None:
        _checks.tensor(OP, name, value, dtypes)
        _checks.shape(OP, name, value, *shapes)


def _expert_sizes(
    counts: Sequence[int] | Tensor | None, ends: Sequence[int] | Tensor | None, experts: int | None, rows: int
) -> list[int] | None:
    _checks.require(OP, "expert_tokens", counts is None or ends is None, "excludes expert_tokens_index", "both")
    given, kind, name = (counts, SIZES, "expert_tokens") if ends is None else (ends, ENDS, "expert_tokens_index")
    if experts is None:
        _checks.require(OP, name, given is None, "needs weights with experts", given)
        return None
    _checks.require(OP, name, given is not None or experts == 1, "must be given with experts", None)
    if isinstance(given, Tensor):
        _checks.tensor(OP, name, given, _checks.INDICES, ndim=1)
    values = [rows] if given is None else given.tolist() if isinstance(given, Tensor) else list(given)
    _checks.require(OP, name, len(values) == experts, f"must have {experts} entries", len(values))
    sizes = host_sizes(OP, name, values, rows, SIZES if given is None else kind)
    _checks.require(OP, name, sum(sizes) == rows, f"must count all {rows} rows", values)
    return sizes


def _one(value: Tensor | None, index: int | None) -> Tensor | None:
    return value if value is None or index is None else value[index]


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        first, second = hidden.chunk(2, -1)
        return BY_NAME[GATED[activation]](first) * second
    return BY_NAME[activation](hidden)


def _network(
    x: Tensor, index: int | None, activation: str, tensors: dict[str, Tensor | None], output_dtype: torch.dtype
) -> Tensor:
    """One expert on its rows [M, K1]."""
    part = {name: _one(value, index) for name, value in tensors.items()}
    if x.dtype == torch.int8:
        hidden = integer_product(x, part["weight1"])
        hidden = hidden if part["bias1"] is None else hidden + part["bias1"]
        hidden = _activate(hidden.to(torch.float32) * float_scale(part["deq_scale1"]), activation)
        hidden = hidden * part["scale"].to(torch.float32)
        hidden = to_int8(hidden if part["offset"] is None else hidden + part["offset"].to(torch.float32))
        out = integer_product(hidden, part["weight2"])
        out = out if part["bias2"] is None else out + part["bias2"]
        return (out.to(torch.float32) * float_scale(part["deq_scale2"])).to(output_dtype)
    weights = []
    for number in "12":
        weight, scale = part[f"weight{number}"], part[f"antiquant_scale{number}"]
        weights.append(weight if scale is None else widened_weight(weight, scale, part[f"antiquant_offset{number}"], x.dtype))
    hidden = x.to(torch.float32) @ weights[0].to(torch.float32)
    hidden = hidden if part["bias1"] is None else hidden + part["bias1"].to(torch.float32)
    hidden = _activate(hidden, activation).to(x.dtype)  # the kernels round here, before the second product
    out = hidden.to(torch.float32) @ weights[1].to(torch.float32)
    return (out if part["bias2"] is None else out + part["bias2"].to(torch.float32)).to(output_dtype)


def _reference(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    expert_tokens: Sequence[int] | None = None,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
    **tensors: Tensor | None,
) -> Tensor:
    names = ("bias1", "bias2", "scale", "offset", "deq_scale1", "deq_scale2")
    names += tuple(f"antiquant_{kind}{number}" for kind in ("scale", "offset") for number in "12")
    tensors = {name: tensors.get(name) for name in names} | {"weight1": weight1, "weight2": weight2}
    output_dtype = output_dtype or (torch.float16 if x.dtype == torch.int8 else x.dtype)
    rows = x.flatten(0, -2)
    if expert_tokens is None:
        out = _network(rows, None, activation, tensors, output_dtype)
    else:
        out = rows.new_empty(rows.shape[0], weight2.shape[-1], dtype=output_dtype)
        for index, span in enumerate(spans(expert_tokens)):
            out[span] = _network(rows[span], index, activation, tensors, output_dtype)
    return out.view(*x.shape[:-1], weight2.shape[-1])


def _fake(x, weight1, weight2, activation, *, output_dtype=None, **_):  # noqa: ANN001, ANN003, ANN202
    dtype = output_dtype or (torch.float16 if x.dtype == torch.int8 else x.dtype)
    return x.new_empty((*x.shape[:-1], weight2.shape[-1]), dtype=dtype)


_TENSORS = (
    "Tensor? bias1=None, Tensor? bias2=None, Tensor? scale=None, Tensor? offset=None, Tensor? deq_scale1=None,"
    " Tensor? deq_scale2=None, Tensor? antiquant_scale1=None, Tensor? antiquant_scale2=None, Tensor? antiquant_offset1=None,"
    " Tensor? antiquant_offset2=None, int? inner_precise=None, ScalarType? output_dtype=None) -> Tensor"
)
define(
    f"ffn(Tensor x, Tensor weight1, Tensor weight2, str activation, *, int[]? expert_tokens=None, {_TENSORS}",
    family="ffn",
    reference=_reference,
    fake=_fake,
)
alias(
    "npu_ffn(Tensor x, Tensor weight1, Tensor weight2, str activation, *, int[]? expert_tokens=None,"
    f" int[]? expert_tokens_index=None, {_TENSORS}",
    npu_ffn,
)
