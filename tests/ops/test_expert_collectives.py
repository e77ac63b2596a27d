"""Expert dispatch with its first product, and the second product with the way back."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mindspeed.ops.npu_all_to_all_all_gather_bmm import npu_alltoall_allgather_bmm as dispatch
from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import npu_bmm_reducescatter_alltoall as combine
from mindspeed.testing import ranks
from mindspeed.testing.operators import assert_compiles, check_operator, counted_collectives

E_, C, H, M = 4, 6, 8, 10
ACTIVATIONS = {
    "None": lambda x: x,
    "GeLU": F.gelu,
    "silu": lambda x: x * torch.sigmoid(x),
    "ReLU": F.relu,
    "FastGeLU": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def grid(world, ep, tp):
    """(ep group, tp group, ep rank, tp rank) of this rank in a grid with adjacent tp ranks."""
    ep_rank, tp_rank = divmod(world.rank, tp)
    ep_groups = [dist.new_group(range(first, ep * tp, tp)) for first in range(tp)]
    tp_groups = [dist.new_group(range(first, first + tp)) for first in range(0, ep * tp, tp)]
    return ep_groups[tp_rank], tp_groups[ep_rank], ep_rank, tp_rank


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def part(tensor, rank, size, dim):
    return tensor.chunk(size, dim)[rank].contiguous()


def check_grid(world, ep, tp):
    ep_group, tp_group, ep_rank, tp_rank = grid(world, ep, tp)
    tokens = [draw(E_, C, H, seed=r) for r in range(ep)]  # what each expert rank holds, whole
    weight, bias = draw(E_, H, M, seed=50) / 3, draw(E_, 1, M, seed=51)
    mine = slice(ep_rank * E_ // ep, (ep_rank + 1) * E_ // ep)
    gathered = torch.cat([t[mine] for t in tokens], 1)
    my_weight, my_bias = part(weight[mine], tp_rank, tp, 2), part(bias[mine], tp_rank, tp, 2)
    product = torch.bmm(gathered, my_weight) + my_bias
    for shard, dim in ((0, 2), (1, 1)):
        x = part(tokens[ep_rank], tp_rank, tp, dim)
        for name, activation in ACTIVATIONS.items():
            arguments = (x, my_weight, ep_group, ep, tp_group, tp)
            options = {"bias": my_bias, "shard_type": shard, "act_type": name}
            with counted_collectives() as counted:
                y1, y2, y3 = dispatch(*arguments, **options, need_allgather_out=True, need_activation_feature=True)
            assert len(counted) == 2
            torch.testing.assert_close((y2, y3, y1), (gathered, product, activation(product)), rtol=1e-5, atol=1e-5)
        y1, y2, y3 = dispatch(*arguments, **(options | {"bias": my_bias.squeeze(1)}))
        assert y2.shape == y3.shape == (0, 0, 0)

        back = draw(E_, M, H, seed=60) / 3
        added = draw(E_, 1, H, seed=61)
        after = part(added, tp_rank, tp, 2) if shard == 0 else added
        hidden = [torch.bmm(t, weight) for t in tokens]
        expected = torch.bmm(hidden[ep_rank], back) + added
        inner = torch.cat([h[mine] for h in hidden], 1)
        with counted_collectives() as counted:
            out = combine(
                part(inner, tp_rank, tp, 2),
                part(back[mine], tp_rank, tp, 1),
                ep_group,
                ep,
                tp_group,
                tp,
                bias=after[mine],
                shard_type=shard,
            )
        assert len(counted) == 2
        torch.testing.assert_close(out, part(expected, tp_rank, tp, dim), rtol=1e-4, atol=1e-4)


def check_round_trip(world, ep, tp):
    """Identity weights bring every token back to its owner."""
    ep_group, tp_group, ep_rank, tp_rank = grid(world, ep, tp)
    x = draw(E_, C, H, seed=world.rank)
    x = x[:, : C // tp].contiguous()
    eye = torch.eye(H).expand(E_ // ep, H, H)
    y, *_ = dispatch(x, part(eye, tp_rank, tp, 2), ep_group, ep, tp_group, tp, shard_type=1)
    out = combine(y, part(eye, tp_rank, tp, 1), ep_group, ep, tp_group, tp, shard_type=1)
    torch.testing.assert_close(out, x)


@ranks(1)
def test_grid_1x1(world):
    check_grid(world, 1, 1)
    check_round_trip(world, 1, 1)


@ranks(2)
def test_grids_of_2(world):
    check_grid(world, 2, 1)
    check_grid(world, 1, 2)
    check_round_trip(world, 2, 1)


@ranks(4)
def test_grid_2x2(world):
    check_grid(world, 2, 2)
    check_round_trip(world, 2, 2)


@ranks(1)
def test_operators_are_well_formed_and_half_precision(world):
    name = world.group.group_name
    x, weight = draw(E_, C, H).bfloat16(), draw(E_, H, M).bfloat16()
    check_operator(torch.ops.mindspeed.npu_alltoall_allgather_bmm.default, (x, weight, name, 1, name, 1))
    check_operator(torch.ops.mindspeed.npu_bmm_reducescatter_alltoall.default, (x, weight, name, 1, name, 1))
    y, *_ = dispatch(x, weight, name, 1, name, 1, act_type="GeLU")
    torch.testing.assert_close(y, F.gelu(torch.bmm(x.double(), weight.double())).bfloat16(), rtol=2e-2, atol=2e-2)


@ranks(1)
def test_traces_in_one_graph(world):
    name = world.group.group_name
    options = {"need_allgather_out": True, "need_activation_feature": True, "act_type": "SiLU"}
    assert_compiles(lambda x, w: dispatch(x, w, name, 1, name, 1, **options), draw(E_, C, H), draw(E_, H, M))
    assert_compiles(lambda x, w: combine(x, w, name, 1, name, 1, shard_type=1), draw(E_, C, M), draw(E_, M, H))


@ranks(2)
def test_no_tokens(world):
    group = world.group
    y, *_ = dispatch(draw(E_, 0, H), draw(E_ // 2, 2 * H, M), group, 2, group, 2)
    assert y.shape == (E_ // 2, 0, M)
    assert combine(draw(E_ // 2, 0, M), draw(E_ // 2, M, H), group, 2, group, 2).shape == (E_, 0, H // 2)


@ranks(2)
def test_errors(world):
    x, weight = draw(E_, C, H), draw(E_ // 2, H, M)
    group = world.group
    with pytest.raises(ValueError, match="group_tp_worldsize must be the size of the group, 2, got 1"):
        dispatch(x, weight, group, 2, group, 1, shard_type=1)
    with pytest.raises(ValueError, match="act_type must be one of"):
        dispatch(x, weight, group, 2, group, 2, act_type="SELU")
    with pytest.raises(ValueError, match="x must hold a multiple of 3 experts"):
        dispatch(x, weight, group, 3, group, 2)
    with pytest.raises(ValueError, match=r"weight must have shape \(2, 16, 10\)"):
        dispatch(x, weight, group, 2, group, 2)
    with pytest.raises(RuntimeError, match="has no derivative"):
        dispatch(x.requires_grad_(), weight, group, 2, group, 2, shard_type=1)
    with pytest.raises(ValueError, match="x must hold a multiple of 4 tokens"):
        combine(draw(2, 6, M), draw(2, M, H), group, 2, group, 2, shard_type=1)
    with pytest.raises(
        ValueError, match="npu_bmm_reducescatter_alltoall: group_ep_worldsize must be the size of the group, 2, got 1"
    ):
        combine(draw(2, 4, M), draw(2, M, H), group, 1, group, 2)
    with pytest.raises(ValueError, match="group_tp_worldsize must be at least 1, got 0"):
        combine(draw(2, 4, M), draw(2, M, H), group, 2, group, 0)
    with pytest.raises(ValueError, match="npu_alltoall_allgather_bmm: act_type must be one of 'None', .*, got 7"):
        dispatch(x.detach(), weight, group, 2, group, 2, act_type=7)
    with pytest.raises(RuntimeError, match="npu_alltoall_allgather_bmm: weight must be on cpu like x, got meta"):
        dispatch(x.detach(), weight.to("meta"), group, 2, group, 2, shard_type=1)
    for call, shape in ((dispatch, (E_, C, H)), (combine, (E_, C, M))):
        with pytest.raises(ValueError, match="group_ep must name a process group, got 'nowhere'; known groups: .*"):
            call(draw(*shape), draw(shape[0], shape[2], M), "nowhere", 1, group, 1)
