"""Second expert product and return of the tokens: batched product, reduce-scatter over tensor ranks, all-to-all over experts."""

# E experts, C tokens per expert, H hidden, M inner size; ep, tp sizes of the two groups

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._registry import define
from mindspeed.ops.comm import comm_name
from mindspeed.ops.npu_all_to_all_all_gather_bmm import HINT, check_worldsizes, sized_group

OP = "npu_bmm_reducescatter_alltoall"


def npu_bmm_reducescatter_alltoall(
    x: Tensor,
    weight: Tensor,
    group_ep: str | dist.ProcessGroup,
    group_ep_worldsize: int,
    group_tp: str | dist.ProcessGroup,
    group_tp_worldsize: int,
    *,
    bias: Tensor | None = None,
    shard_type: int = 0,
) -> Tensor:
    """Expert outputs back at the ranks that own their tokens; the way back of `npu_alltoall_allgather_bmm`.

    x: [E/ep, ep*C, M/tp]; weight: [E/ep, M/tp, H]. Returns [E, C, H/tp] (shard_type 0) or [E, C/tp, H] (1). bias: [E/ep, 1, H/tp]
    or [E/ep, 1, H], added after the reduction. Inference only.
    """
    _checks.tensor(OP, "x", x, ndim=3)
    _checks.tensor(OP, "weight", weight, (x.dtype,), ndim=3)
    _checks.option(OP, "shard_type", shard_type, (0, 1))
    check_worldsizes(OP, group_ep_worldsize, group_tp_worldsize)
    _checks.shape(OP, "weight", weight, (x.shape[0], x.shape[2], weight.shape[2]))
    unit = group_ep_worldsize * (group_tp_worldsize if shard_type == 1 else 1)
    _checks.require(OP, "x", x.shape[1] % unit == 0, f"must hold a multiple of {unit} tokens", tuple(x.shape))
    hidden, rest = divmod(weight.shape[2], group_tp_worldsize if shard_type == 0 else 1)
    _checks.require(OP, "weight", rest == 0, f"must have a last size divisible by {group_tp_worldsize}", tuple(weight.shape))
    if bias is not None:
        _checks.tensor(OP, "bias", bias, (x.dtype, torch.float32))
        _checks.shape(OP, "bias", bias, (x.shape[0], 1, hidden), (x.shape[0], hidden))
    _checks.same_device(OP, x=x, weight=weight, bias=bias)
    _checks.forward_only(OP, HINT, x, weight, bias)
    names = comm_name(group_ep), comm_name(group_tp)
    return torch.ops.mindspeed.npu_bmm_reducescatter_alltoall(
        x, weight, names[0], group_ep_worldsize, names[1], group_tp_worldsize, bias=bias, shard_type=shard_type
    )


def composition(
    x: Tensor,
    weight: Tensor,
    group_ep: str,
    group_ep_worldsize: int,
    group_tp: str,
    group_tp_worldsize: int,
    *,
    bias: Tensor | None = None,
    shard_type: int = 0,
) -> Tensor:
    """One product, one reduce-scatter, one all-to-all: the definition, and what an NPU runs."""
    ep = sized_group(OP, "group_ep", group_ep, group_ep_worldsize)
    tp = sized_group(OP, "group_tp", group_tp, group_tp_worldsize)
    experts, tokens, hidden = x.shape[0], x.shape[1] // group_ep_worldsize, weight.shape[2]
    product = torch.bmm(x, weight)
    if shard_type == 0:  # each tensor rank keeps a part of the hidden size
        parts = product.view(experts, group_ep_worldsize, tokens, group_tp_worldsize, hidden // group_tp_worldsize)
        parts = parts.permute(3, 0, 1, 2, 4).contiguous()
    else:  # each tensor rank keeps a part of the tokens
        parts = product.view(experts, group_ep_worldsize, group_tp_worldsize, tokens // group_tp_worldsize, hidden)
        parts = parts.permute(2, 0, 1, 3, 4).contiguous()
    own = torch.empty(parts.shape[1:], dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(own.view(-1), parts.view(-1), group=tp)
    if bias is not None:
        own = (own + bias.reshape(experts, 1, 1, -1)).to(x.dtype)
    sent = own.transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ep)
    return received.flatten(0, 1)


def _fake(x, weight, group_ep, group_ep_worldsize, group_tp, group_tp_worldsize, *, bias=None, shard_type=0):  # noqa: ANN001, ANN202
    tokens, hidden = x.shape[1] // group_ep_worldsize, weight.shape[2]
    if shard_type == 0:
        return x.new_empty(x.shape[0] * group_ep_worldsize, tokens, hidden // group_tp_worldsize)
    return x.new_empty(x.shape[0] * group_ep_worldsize, tokens // group_tp_worldsize, hidden)


define(
    "npu_bmm_reducescatter_alltoall(Tensor x, Tensor weight, str group_ep, int group_ep_worldsize, str group_tp,"
    " int group_tp_worldsize, *, Tensor? bias=None, int shard_type=0) -> Tensor",
    family="bmm_reducescatter_alltoall",
    reference=composition,
    fake=_fake,
)
