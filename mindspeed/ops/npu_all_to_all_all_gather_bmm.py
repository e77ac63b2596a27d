"""Expert dispatch and first product: all-to-all over experts, all-gather over tensor ranks, batched product, activation."""

# E experts, C tokens per expert, H hidden, M inner size; ep, tp sizes of the two groups

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops import _checks
from mindspeed.ops._activations import BY_NAME
from mindspeed.ops._registry import define
from mindspeed.ops.comm import comm_name, resolve

OP = "npu_alltoall_allgather_bmm"
ACTIVATIONS = ("None", "GeLU", "SiLU", "ReLU", "FastGeLU")
HINT = "it is an inference operator; compose the collectives and torch.bmm for training"


def npu_alltoall_allgather_bmm(
    x: Tensor,
    weight: Tensor,
    group_ep: str | dist.ProcessGroup,
    group_ep_worldsize: int,
    group_tp: str | dist.ProcessGroup,
    group_tp_worldsize: int,
    *,
    bias: Tensor | None = None,
    shard_type: int = 0,
    act_type: str = "None",
    need_allgather_out: bool = False,
    need_activation_feature: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y1, y2, y3)`: activation, gathered tokens and product before the activation; y2, y3 are empty unless asked for.

    x: [E, C, H/tp] (shard_type 0) or [E, C/tp, H] (1); weight: [E/ep, H, M/tp]; bias: [E/ep, M/tp] or [E/ep, 1, M/tp]. y1, y3:
    [E/ep, ep*C, M/tp]; y2: [E/ep, ep*C, H]. act_type, in any case: None, GeLU, SiLU, ReLU, FastGeLU. Inference only.
    """
    _checks.tensor(OP, "x", x, ndim=3)
    _checks.tensor(OP, "weight", weight, (x.dtype,), ndim=3)
    _checks.option(OP, "shard_type", shard_type, (0, 1))
    act_type = _checks.word(OP, "act_type", act_type, ACTIVATIONS)
    check_worldsizes(OP, group_ep_worldsize, group_tp_worldsize)
    experts, rest = divmod(x.shape[0], group_ep_worldsize)
    _checks.require(OP, "x", rest == 0, f"must hold a multiple of {group_ep_worldsize} experts", tuple(x.shape))
    hidden = x.shape[2] * (group_tp_worldsize if shard_type == 0 else 1)
    _checks.shape(OP, "weight", weight, (experts, hidden, weight.shape[2]))
    if bias is not None:
        _checks.tensor(OP, "bias", bias, (x.dtype, torch.float32))
        _checks.shape(OP, "bias", bias, (experts, weight.shape[2]), (experts, 1, weight.shape[2]))
        bias = bias.reshape(experts, 1, weight.shape[2])
    _checks.same_device(OP, x=x, weight=weight, bias=bias)
    _checks.forward_only(OP, HINT, x, weight, bias)
    return torch.ops.mindspeed.npu_alltoall_allgather_bmm(
        x,
        weight,
        comm_name(group_ep),
        group_ep_worldsize,
        comm_name(group_tp),
        group_tp_worldsize,
        bias=bias,
        shard_type=shard_type,
        act_type=act_type,
        need_allgather_out=need_allgather_out,
        need_activation_feature=need_activation_feature,
    )


def check_worldsizes(op: str, ep: int, tp: int) -> None:
    """Require positive group sizes; whether they are those of the groups is known where the groups are looked up."""
    for name, size in (("group_ep_worldsize", ep), ("group_tp_worldsize", tp)):
        _checks.require(op, name, size >= 1, "must be at least 1", size)


def sized_group(op: str, name: str, group: str, size: int) -> dist.ProcessGroup:
    """The group of that name, whose size must be the one given."""
    found = resolve(op, name, group)
    actual = dist.get_world_size(found)
    _checks.require(op, f"{name}_worldsize", actual == size, f"must be the size of the group, {actual}", size)
    return found


def gathered_tokens(
    x: Tensor, group_ep: str, group_ep_worldsize: int, group_tp: str, group_tp_worldsize: int, shard_type: int
) -> Tensor:
    """The tokens of this rank's experts [E/ep, ep*C, H], contiguous; one all-to-all and one all-gather."""
    ep = sized_group(OP, "group_ep", group_ep, group_ep_worldsize)
    tp = sized_group(OP, "group_tp", group_tp, group_tp_worldsize)
    experts, tokens, width = x.shape[0] // group_ep_worldsize, x.shape[1], x.shape[2]
    received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(received, x.contiguous(), group=ep)
    gathered = received.new_empty(group_tp_worldsize * x.shape[0], tokens, width)
    dist.all_gather_into_tensor(gathered, received, group=tp)
    parts = gathered.view(group_tp_worldsize, group_ep_worldsize, experts, tokens, width)
    if shard_type == 0:  # hidden parts side by side
        joined = parts.permute(2, 1, 3, 0, 4).reshape(experts, group_ep_worldsize * tokens, group_tp_worldsize * width)
    else:  # token parts one after another
        joined = parts.permute(2, 1, 0, 3, 4).reshape(experts, group_ep_worldsize * group_tp_worldsize * tokens, width)
    return joined.contiguous()


def outputs(
    activated: Tensor, joined: Tensor, product: Tensor, need_allgather_out: bool, need_activation_feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y1, y2, y3)`; what was not asked for is empty. y1 and y3 never share memory."""
    shared = activated is product and need_activation_feature
    return (
        activated.clone() if shared else activated,
        joined if need_allgather_out else product.new_empty(0, 0, 0),
        product if need_activation_feature else product.new_empty(0, 0, 0),
    )


def _reference(
    x: Tensor,
    weight: Tensor,
    group_ep: str,
    group_ep_worldsize: int,
    group_tp: str,
    group_tp_worldsize: int,
    *,
    bias: Tensor | None = None,
    shard_type: int = 0,
    act_type: str = "None",
    need_allgather_out: bool = False,
    need_activation_feature: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    joined = gathered_tokens(x, group_ep, group_ep_worldsize, group_tp, group_tp_worldsize, shard_type)
    product = torch.bmm(joined, weight)
    if bias is not None:
        product = (product + bias.reshape(weight.shape[0], 1, -1)).to(x.dtype)
    wide = product.to(_checks.wide_dtype(x))
    activated = BY_NAME[act_type.lower()](wide).to(x.dtype)
    return outputs(activated, joined, product, need_allgather_out, need_activation_feature)


def _fake(  # noqa: ANN202
    x, weight, group_ep, group_ep_worldsize, group_tp, group_tp_worldsize, *, bias=None, shard_type=0, act_type="None",  # noqa: ANN001
    need_allgather_out=False, need_activation_feature=False,  # noqa: ANN001
):  # fmt: skip
    tokens = x.shape[1] * group_ep_worldsize * (group_tp_worldsize if shard_type == 1 else 1)
    y = x.new_empty(weight.shape[0], tokens, weight.shape[2])
    gathered = x.new_empty((weight.shape[0], tokens, weight.shape[1]) if need_allgather_out else (0, 0, 0))
    return y, gathered, x.new_empty(y.shape if need_activation_feature else (0, 0, 0))


define(
    "npu_alltoall_allgather_bmm(Tensor x, Tensor weight, str group_ep, int group_ep_worldsize, str group_tp,"
    " int group_tp_worldsize, *, Tensor? bias=None, int shard_type=0, str act_type='None', bool need_allgather_out=False,"
    " bool need_activation_feature=False) -> (Tensor, Tensor, Tensor)",
    family="alltoall_allgather_bmm",
    reference=_reference,
    fake=_fake,
)
