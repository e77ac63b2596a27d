"""aten's two fused attention families on CUDA, called one way by the operator `fusion_attention` and by `mindspeed.core.attention`.

`aten::_flash_attention_*` (fp16, bf16) works on [B, S, heads, D] or on packed [T, heads, D] with cumulative lengths from 0 on, shares
key heads and takes bands as windows. Facts that this file guards against: windows and the causal triangle are aligned at the
lower right corner; a negative side has no limit, and so has a right side of at least the number of keys; a left side alone gets
the number of keys as right side, which hides keys where there are more queries; a row that sees nothing has log-sum-exp +inf;
head sizes are equal multiples of 8; rows start at multiples of 16 bytes.

`aten::_scaled_dot_product_efficient_attention*` (also fp32, additive bias): the causal triangle is aligned at the upper left
corner; statistics are padded to a multiple of 32 rows; heads are not shared; rows of the bias are aligned; what it reports for
rows that see nothing is not relied on.

Dropout masks come from the device's generator, set to a seed for the call. Backward wants the random state that forward
returned; `flash_state` and `efficient_state` make the same one again from the seed.
"""

# B batch, N query heads, G key heads, Sq / Sk positions, T tokens of a packed batch, D and Dv head sizes

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed.ops._transfer import to_device

HALF = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
FLASH_HEAD_SIZE = 256
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Devices whose flash backward lacks head sizes 193 to 224, and above 224 those with dropout."""

HEAD_UNIT = 8  # head sizes are padded with zeros to a multiple of it, which changes no score
LSE_UNIT = 32
BIAS_UNIT = 16  # elements; rows of a bias start at multiples of it
ALIGNMENT = 16  # bytes
ROWS = 2048
BIAS_ELEMENTS = 1 << 26
"""Limits of one chunk of rows where a bias has to be built: 128 MiB of it in 16 bits."""

Window = tuple[int | None, int | None]
"""Keys to the left and right of the diagonal that ends in the lower right corner; None is no limit."""

State = tuple[Tensor, Tensor]

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward


def flash_refuses(dtype: torch.dtype, capability: tuple[int, int], head_size: int, dropout: bool) -> str:
    """Why flash attention, forward and backward, does not serve a dtype, a device or a head size (the larger one); "" if it does."""
    if dtype not in HALF:
        return f"flash attention has no {dtype}"
    if head_size > FLASH_HEAD_SIZE:
        return f"flash attention takes head sizes up to {FLASH_HEAD_SIZE}, not {head_size}"
    if capability < FLASH_CAPABILITY:
        return f"flash attention needs compute capability {'.'.join(map(str, FLASH_CAPABILITY))}"
    if capability in SMALL_SHARED_MEMORY and (192 < head_size <= 224 or (head_size > 224 and dropout)):
        with_dropout = " with dropout" if head_size > 224 else ""
        return (
            f"flash attention on compute capability {capability[0]}.{capability[1]} has no head size {head_size}{with_dropout}"
        )
    return ""


def fitting_window(window: Window, sizes: Sequence[tuple[int, int]]) -> tuple[Window, str]:
    """The window without sides that hide nothing in any (queries, keys) of `sizes`, and why flash attention cannot express it."""
    left, right = window
    longest = max(keys for _, keys in sizes)
    left = None if left is None or left >= longest - 1 else left
    right = None if right is None or right >= max(queries for queries, _ in sizes) - 1 else right
    if any(side is not None and side < 0 for side in (left, right)):
        return (left, right), "a band beside the diagonal is no window of flash attention"
    drops_right = right is not None and right >= longest
    adds_right = left is not None and right is None and any(queries - 1 > longest for queries, _ in sizes)
    if drops_right or adds_right:
        return (left, right), "flash attention cuts windows off at the number of keys"
    return (left, right), ""


def flash(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: Window = (None, None), probability: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, State]:
    """(out [B, N, Sq, Dv], lse [B, N, Sq] fp32, random state) for q [B, N, Sq, D], k [B, G, Sk, D], v [B, G, Sk, Dv].

    The window must come from `fitting_window`. Rows that see nothing give 0 and -inf. `seed` fixes the dropout mask.
    """
    size, causal = _common_size(q, v), _square(window, q, k)
    with _drawing_from(q.device, seed if probability else None):
        out, lse, *state, _ = _flash(
            *(_ready(tensor, size).transpose(1, 2) for tensor in (q, k, v)),
            None, None, q.shape[2], k.shape[2], probability, causal, False, scale=scale, **_sides(window, causal),
        )  # fmt: skip
    return out.transpose(1, 2)[..., : v.shape[-1]], _lowest_where_blind(lse), tuple(state)


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: State, *,
    scale: float, window: Window = (None, None), probability: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from `out` and `lse` of the whole rows, which may have seen more keys than these."""
    size, causal = _common_size(q, v), _square(window, q, k)
    operands = (_ready(tensor.to(q.dtype), size).transpose(1, 2) for tensor in (grad_out, q, k, v, out))
    gradients = _flash_backward(
        *operands, _finite(lse), None, None, q.shape[2], k.shape[2], probability, causal, *state,
        scale=scale, **_sides(window, causal),
    )  # fmt: skip
    return tuple(  # type: ignore[return-value]
        gradient.transpose(1, 2)[..., : like.shape[-1]] for gradient, like in zip(gradients, (q, k, v), strict=True)
    )


def flash_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Sequence[int], Sequence[int]], *,
    scale: float, window: Window = (None, None), probability: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """`flash` for packed sequences in one launch: q [T, N, D], k and v [T, G, *]; lse [N, T]; no sequence may be empty."""
    size, causal = _common_size(q, v), window == (None, 0)
    with _drawing_from(q.device, seed if probability else None):
        out, lse, *state, _ = _flash(
            *(_ready(tensor, size) for tensor in (q, k, v)), *_packing(lengths, q.device), probability, causal, False,
            scale=scale, **_sides(window, causal),
        )  # fmt: skip
    return out[..., : v.shape[-1]], _lowest_where_blind(lse), tuple(state)


def flash_packed_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: State,
    lengths: tuple[Sequence[int], Sequence[int]], *, scale: float, window: Window = (None, None), probability: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`flash_backward` for packed sequences."""
    size, causal = _common_size(q, v), window == (None, 0)
    gradients = _flash_backward(
        *(_ready(tensor.to(q.dtype), size) for tensor in (grad_out, q, k, v, out)), _finite(lse), *_packing(lengths, q.device),
        probability, causal, *state, scale=scale, **_sides(window, causal),
    )  # fmt: skip
    return tuple(gradient[..., : like.shape[-1]] for gradient, like in zip(gradients, (q, k, v), strict=True))  # type: ignore[return-value]


Part = tuple[range, range, Tensor | None]
"""Query rows, the keys they may see, and the additive mask of both: [rows, keys] or [1 or B, 1 or N, rows, keys], -inf hides."""


def efficient(
    q: Tensor, k: Tensor, v: Tensor, parts: Iterable[Part], *,
    scale: float, causal: bool = False, probability: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, list[State]]:  # fmt: skip
    """(out, lse, random states) as `flash`, part by part; rows in no part see nothing. `causal` is for parts without a mask."""
    query, key, value = _expanded(q, k, v)
    out = q.new_zeros((*q.shape[:-1], value.shape[-1]))
    lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    states = []
    for rows, keys, bias in parts:
        part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        with _drawing_from(q.device, mixed(seed, rows.start) if probability else None):
            out_part, lse_part, *state = _efficient(
                query[:, :, part], key[:, :, span], value[:, :, span], _aligned(bias, query, rows, keys), True, probability,
                causal, scale=scale,
            )  # fmt: skip
        lse_part = lse_part[..., : len(rows)]
        if bias is not None:
            blind = (bias == float("-inf")).all(-1)
            lse_part, out_part = lse_part.masked_fill(blind, float("-inf")), out_part.masked_fill(blind[..., None], 0.0)
        out[:, :, part], lse[:, :, part] = out_part, lse_part
        states.append(tuple(state))
    return out[..., : v.shape[-1]], lse, states


def efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, parts: Iterable[Part],
    states: list[State] | None, *, scale: float, causal: bool = False, probability: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv); gradients of repeated heads and of parts are summed in fp32. Without `states` the seed replays them."""
    query, key, value = _expanded(q, k, v)
    grad_out, out = (_ready(tensor.to(q.dtype), value.shape[-1]) for tensor in (grad_out, out))
    lse = _finite(lse)
    dq = torch.zeros_like(query)
    dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
    for index, (rows, keys, bias) in enumerate(parts):
        part, span = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        state = states[index] if states else efficient_state(q.device, q.dtype, probability, mixed(seed, rows.start))
        statistics = F.pad(lse[:, :, part], (0, -len(rows) % LSE_UNIT))
        dq_part, dk_part, dv_part, _ = _efficient_backward(
            grad_out[:, :, part], query[:, :, part], key[:, :, span], value[:, :, span],
            _aligned(bias, query, rows, keys), out[:, :, part], statistics, *state, probability,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        dq[:, :, part] = dq_part
        dk[:, :, span] += dk_part
        dv[:, :, span] += dv_part
    dk, dv = (gradient.unflatten(1, (k.shape[1], -1)).sum(2) for gradient in (dk, dv))
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def rows_per_part(biases: int, keys: int) -> int:
    """Query rows of one part whose mask has `biases` (samples times heads) planes of rows x keys; a multiple of 32."""
    fitting = BIAS_ELEMENTS // max(1, biases * keys)
    return max(LSE_UNIT, min(ROWS, fitting // LSE_UNIT * LSE_UNIT))


def mixed(seed: int, index: int) -> int:
    """A seed of 63 bits for part `index` of the work; that of part 0 is `seed`."""
    return (seed + 0x9E3779B97F4A7C15 * index) & (2**63 - 1)


def flash_state(device: torch.device, dtype: torch.dtype, probability: float, seed: int) -> State:
    """The random state that `flash` returns for this seed; it depends on nothing else, so a call on one number finds it."""
    return (
        flash(*_one_number(device, dtype), scale=1.0, probability=probability, seed=seed)[2]
        if probability
        else _no_flash_state(device)
    )


def efficient_state(device: torch.device, dtype: torch.dtype, probability: float, seed: int) -> State:
    """As `flash_state`, of one part of `efficient`."""
    if not probability:
        return _no_efficient_state(device)
    return efficient(*_one_number(device, dtype), [(range(1), range(1), None)], scale=1.0, probability=probability, seed=seed)[
        2
    ][0]


@functools.cache
def _no_flash_state(device: torch.device) -> State:
    return flash(*_one_number(device, torch.float16), scale=1.0)[2]


@functools.cache
def _no_efficient_state(device: torch.device) -> State:
    return efficient(*_one_number(device, torch.float16), [(range(1), range(1), None)], scale=1.0)[2][0]


def _one_number(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.zeros(1, 1, 1, HEAD_UNIT, dtype=dtype, device=device),) * 3


def _square(window: Window, q: Tensor, k: Tensor) -> bool:
    """Whether this is the causal square, where both corners agree."""
    return window == (None, 0) and q.shape[2] == k.shape[2]


def _sides(window: Window, causal: bool) -> dict[str, int]:
    """Window arguments; none for full and causal, which say it otherwise."""
    left, right = (-1 if side is None else side for side in window)
    return {} if causal or window == (None, None) else {"window_size_left": left, "window_size_right": right}


def _packing(lengths: tuple[Sequence[int], Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative lengths of queries and keys from 0 on, int32, and the longest of each."""
    ends = (to_device([0, *itertools.accumulate(own)], device, torch.int32) for own in lengths)
    return *ends, max(lengths[0]), max(lengths[1])  # type: ignore[return-value]


def _common_size(q: Tensor, v: Tensor) -> int:
    size = max(q.shape[-1], v.shape[-1])
    return size + -size % HEAD_UNIT


def _ready(tensor: Tensor, size: int) -> Tensor:
    """Zero-pad the last dimension to `size`, and copy what vector loads cannot read. Padded columns add nothing to scores."""
    if tensor.shape[-1] < size:
        return F.pad(tensor, (0, size - tensor.shape[-1]))
    unit = ALIGNMENT // tensor.element_size()
    steps = [step for step, extent in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if extent > 1]
    aligned = tensor.stride(-1) == 1 and all(step % unit == 0 for step in (*steps, tensor.storage_offset()))
    return tensor if aligned else tensor.contiguous().clone() if tensor.is_contiguous() else tensor.contiguous()


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes padded to the unit, key heads repeated to the number of query heads."""
    repeats = q.shape[1] // k.shape[1]
    padded = [_ready(tensor, tensor.shape[-1] + -tensor.shape[-1] % HEAD_UNIT) for tensor in (q, k, v)]
    if repeats > 1:
        padded[1:] = [tensor.repeat_interleave(repeats, 1) for tensor in padded[1:]]
    return tuple(padded)  # type: ignore[return-value]


def _aligned(bias: Tensor | None, q: Tensor, rows: range, keys: range) -> Tensor | None:
    """A bias [B, N, rows, keys] in the dtype of q whose rows start at aligned places; samples and heads stay shared."""
    if bias is None:
        return None
    bias = bias if bias.dim() == 4 else bias[None, None]
    room = q.new_empty((*bias.shape[:2], len(rows), len(keys) + -len(keys) % BIAS_UNIT))
    return room[..., : len(keys)].copy_(bias).expand(q.shape[0], q.shape[1], -1, -1)


def _lowest_where_blind(lse: Tensor) -> Tensor:
    return lse.masked_fill(torch.isinf(lse), float("-inf"))


def _finite(lse: Tensor) -> Tensor:
    """Statistics for backward: rows that saw nothing have no finite score, so that with 0 their weights are exp(-inf)."""
    return torch.where(torch.isinf(lse), 0.0, lse.float()).contiguous()


@contextlib.contextmanager
def _drawing_from(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draw with this seed inside the block; the device's generator goes on afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
