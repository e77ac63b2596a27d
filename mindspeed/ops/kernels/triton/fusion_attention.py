"""Forward of `fusion_attention` for patterns that no other fused kernel knows: flex attention compiles one in Triton.

The pattern (sparse modes 2 to 6, position slopes) becomes functions of positions; blocks of scores that it hides are left out,
and nothing of size Sq x Sk is ever in memory. Backward runs on another kernel, which takes the log-sum-exp of this one.
"""

# B batch, N heads, Sq / Sk query and key positions

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable

import torch
import triton  # noqa: F401  (what flex attention compiles with; absent, these bodies are not registered)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mindspeed.ops import _attention_cuda
from mindspeed.ops._attention import key_heads, views
from mindspeed.ops._attention_choice import select
from mindspeed.ops._attention_scores import Options, Segment, band
from mindspeed.ops._registry import register_kernel
from mindspeed.ops._transfer import to_device

logger = logging.getLogger(__name__)

BLOCK = 128
Function = Callable[..., Tensor]


class Compiler:
    """Flex attention compiled at first use, and why that failed, if it did."""

    def __init__(self) -> None:
        self.failure = ""

    @functools.cached_property
    def compiled(self) -> Function:
        """fullgraph: at torch's limit of recompilations an error is raised, where it would else build all scores in eager mode."""
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor] | None:
        """`attend` with the compiled kernel; None where it cannot be had, which is said once and remembered."""
        errors = torch._dynamo.exc
        try:
            with torch.no_grad():  # the derivative is the operator's; operands may still say that they want one
                return attend(q.detach(), k.detach(), v.detach(), options, self.compiled)
        except (errors.TorchDynamoException, errors.FailOnRecompileLimitHit) as error:
            self.failure = str(error).strip().partition("\n")[0]
            logger.warning("fusion_attention: no kernel can be compiled for this pattern any more: %s", self.failure)
            return None


COMPILER = Compiler()


def _declines(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> str | None:
    if COMPILER.failure:
        return f"compiling a pattern failed: {COMPILER.failure}"
    choice = select(query, key, value, Options(*rest), _attention_cuda.machine(query.device), flex=True)
    return None if choice.kernel == "flex" else choice.reason


@register_kernel("fusion_attention", "triton", devices=("cuda",), declines=_declines, first=True)
def forward(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_max, softmax_sum) with (log-sum-exp, 1), or (-inf, 0) for rows that see nothing."""
    options = Options(*rest)
    heads = key_heads(query, key, options)
    q, k, v = views(query, options, options.head_num), views(key, options, heads), views(value, options, heads)
    found = COMPILER.run(q, k, v, options)
    if found is None:
        return _attention_cuda.forward(query, key, value, *rest)
    return _attention_cuda.arranged(found[0], options.layout), *_attention_cuda.statistics(found[1], options.layout)


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, flex: Function) -> tuple[Tensor, Tensor]:
    """(out [B, N, Sq, Dv], lse [B, N, Sq]) by `flex`, which is flex attention, compiled or not."""
    queries, keys = q.shape[2], k.shape[2]
    whole = Segment(slice(0, queries), slice(0, keys), True, True)
    out, statistics = flex(
        q, k, v, score_mod=score_mod(options, q), block_mask=block_mask(options, whole, q, keys), scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1], **asking_for_lse(),
    )  # fmt: skip
    return out, (statistics if isinstance(statistics, Tensor) else statistics.lse).float()


@functools.cache
def asking_for_lse() -> dict[str, object]:
    """The arguments by which flex attention also returns the log-sum-exp; `return_lse` goes as soon as there is `return_aux`."""
    if "return_aux" not in inspect.signature(flex_attention).parameters:
        return {"return_lse": True}
    from torch.nn.attention.flex_attention import AuxRequest

    return {"return_aux": AuxRequest(lse=True)}


def score_mod(options: Options, q: Tensor) -> Function | None:
    """What is added to a scaled score, from slopes and positions."""
    if options.pse is None:
        return None
    slopes = options.pse.detach().expand(q.shape[0], q.shape[1])
    starts = [values[0] if values else 0 for values in (options.kv_start_idx, options.q_start_idx)]
    shift = to_device([starts[0] - starts[1]], q.device)[0]  # a tensor: another value compiles nothing anew
    root = options.pse_type == 3

    def add(score: Tensor, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (j + shift - i).abs().to(torch.float32)
        return score - slopes[b, n] * (distance.sqrt() if root else distance)

    return add


def block_mask(options: Options, segment: Segment, q: Tensor, keys: int) -> BlockMask | None:
    """What may be seen, and the blocks in which anything is; None where nothing is hidden."""
    if options.atten_mask is None:
        return None
    queries, device = q.shape[2], q.device
    prefix = None
    if options.sparse_mode in (5, 6):
        low, high = None, keys - queries
        prefix = to_device(options.prefix, device)
    else:
        low, high = band(options, segment, queries, keys)
    # Limits that no pair of positions reaches stand for none, so that one function serves all bands.
    bounds = to_device([-queries if low is None else low, keys if high is None else high], device)

    def seen(b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j - i >= bounds[0]) & (j - i <= bounds[1])
        return inside if prefix is None else inside | (j < prefix[b])

    first_row, last_row = _ends(queries, device, 1)
    first_key, last_key = _ends(keys, device, 0)
    some = (last_key - first_row >= bounds[0]) & (first_key - last_row <= bounds[1])
    whole = (first_key - last_row >= bounds[0]) & (last_key - first_row <= bounds[1])
    if prefix is not None:
        some, whole = (part | (edge < prefix[:, None, None]) for part, edge in ((some, first_key), (whole, last_key)))
    some, whole = (part.reshape(-1, 1, *part.shape[-2:]) for part in (some, whole))
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(queries, keys)
    )


def _ends(size: int, device: torch.device, dim: int) -> tuple[Tensor, Tensor]:
    """First and last position of each block, along the rows (dim 1 added) or the columns of a matrix."""
    first = torch.arange(0, size, BLOCK, device=device).unsqueeze(dim)
    return first, (first + BLOCK - 1).clamp(max=size - 1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks of keys in each row of blocks, and their indices in front."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
