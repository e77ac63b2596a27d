"""Getters of context-parallel groups: what exists, what does not, and that all of it ends with the host's groups."""

import pytest
import torch.distributed as dist

from mindspeed.core.context_parallel import parallel_state
from mindspeed.core.context_parallel.groups import ACTIVE, ContextGroups
from mindspeed.core.context_parallel.plan import HYBRID, RING, ContextPlan
from mindspeed.testing import ranks
from tests.training.runs import TINY, assert_same_digits, train


def test_without_groups_every_getter_names_the_flag():
    for name in (name for name in dir(parallel_state) if name.startswith("get_")):
        with pytest.raises(RuntimeError, match="--context-parallel-size above 1"):
            getattr(parallel_state, name)()


@ranks(8)
def test_hybrid_with_windows(world):
    groups = ContextGroups()
    groups.create(ContextPlan(HYBRID, 8, degree=2, window=2), world.group, overlap=True)
    state, rank = parallel_state, world.rank
    ring = [rank % 2 + 2 * place for place in range(4)]
    assert state.get_context_parallel_global_ranks_for_hybrid_ulysses() == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert state.get_context_parallel_world_size_for_hybrid_ulysses() == 2
    assert state.get_context_parallel_rank_for_hybrid_ulysses() == rank % 2
    assert dist.get_process_group_ranks(state.get_context_parallel_group_for_hybrid_ulysses()) == [
        rank // 2 * 2,
        rank // 2 * 2 + 1,
    ]
    assert state.get_context_parallel_global_ranks_for_hybrid_ring() == ring
    assert state.get_context_parallel_world_size_for_hybrid_ring() == 4
    assert state.get_context_parallel_rank_for_hybrid_ring() == rank // 2
    assert dist.get_process_group_ranks(state.get_context_parallel_group_for_hybrid_ring()) == ring
    assert dist.get_process_group_ranks(state.get_context_parallel_group_for_send_recv_overlap()) == ring
    window = state.get_context_parallel_global_ranks_for_intra_window()
    assert window == ring[rank // 4 * 2 : rank // 4 * 2 + 2]
    for group in (
        state.get_context_parallel_group_for_intra_window(),
        state.get_context_parallel_group_for_intra_window_send_recv_overlap(),
    ):
        assert dist.get_process_group_ranks(group) == window
    if rank == 0:
        assert state.get_context_parallel_global_ranks_for_inter_window_kv() == [0, 4]
        assert state.get_context_parallel_global_ranks_for_inter_window_dkv() == [0, 6]
    groups.drop()
    with pytest.raises(RuntimeError, match="do not exist"):
        state.get_context_parallel_group_for_hybrid_ring()


@ranks(4)
def test_groups_of_any_rank_order_and_a_second_life(world):
    """Row 14 of the defects: groups come from gathered ranks, and dropping forgets all of them."""
    for members in ([0, 2], [0, 1]):
        mine = (
            [dist.new_group([0, 2]), dist.new_group([1, 3])]
            if members == [0, 2]
            else [dist.new_group([0, 1]), dist.new_group([2, 3])]
        )
        cp = next(group for group in mine if world.rank in dist.get_process_group_ranks(group))
        groups = ContextGroups()
        groups.create(ContextPlan(RING, 2), cp, overlap=True)
        again = parallel_state.get_context_parallel_group_for_send_recv_overlap()
        assert again is not cp and dist.get_process_group_ranks(again) == dist.get_process_group_ranks(cp)
        with pytest.raises(RuntimeError, match="needs --cp-window-size above 1"):
            parallel_state.get_context_parallel_group_for_intra_window()
        groups.drop()
        assert ACTIVE.groups is None and groups.extra == {} and groups.members == {}


@ranks(8, megatron=True)
@pytest.mark.parametrize(
    ("sizes", "order", "expected"),
    [
        ((2, 2, 1), "tp-cp-ep-dp-pp", [0, 2]),
        ((1, 4, 2), "tp-cp-ep-dp-pp", [0, 1, 2, 3]),
        ((2, 2, 1), "tp-ep-dp-cp-pp", [0, 4]),
    ],
)
def test_groups_of_the_host(world, sizes, order, expected):
    """Tensor, context and pipeline sizes in the host's order and in another: every group lies inside the host's."""
    from megatron.core import parallel_state as host

    tensor, context, pipeline = sizes
    host.initialize_model_parallel(tensor, pipeline, context_parallel_size=context, order=order)
    cp, groups = host.get_context_parallel_group(), ContextGroups()
    members = dist.get_process_group_ranks(cp)
    plan = ContextPlan(HYBRID, 4, degree=2) if context == 4 else ContextPlan(RING, context)
    groups.create(plan, cp, overlap=True)
    if world.rank == 0:
        assert members == expected
    if context == 4:
        place = members.index(world.rank)
        assert parallel_state.get_context_parallel_global_ranks_for_hybrid_ulysses() == members[place // 2 * 2 :][:2]
        assert parallel_state.get_context_parallel_global_ranks_for_hybrid_ring() == members[place % 2 :: 2]
    else:
        again = parallel_state.get_context_parallel_group_for_send_recv_overlap()
        assert dist.get_process_group_ranks(again) == members
    groups.drop()
    host.destroy_model_parallel()


@ranks(4, megatron=True)
def test_two_runs_in_one_process(world):
    """Initialise, destroy, initialise, with other groups each time."""
    common = TINY.replace("--num-layers 4", "--num-layers 1").replace("--train-iters 3", "--train-iters 1")
    first = train(f"{common} --context-parallel-size 4 --cp-window-size 2 --use-cp-send-recv-overlap").curve
    assert ACTIVE.groups is None
    hybrid = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
    second = train(f"{common} --context-parallel-size 4 {hybrid}").curve
    if world.rank == world.size - 1:
        assert_same_digits(first, second)
