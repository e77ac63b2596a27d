import pytest
import torch.distributed as dist

from mindspeed.ops.comm import comm_name, resolve
from mindspeed.testing import ranks


@ranks(2)
def test_names_of_groups(world):
    pair = dist.new_group([0, 1])
    assert comm_name(pair) == pair.group_name
    assert comm_name() == world.group.group_name
    assert comm_name("anything") == "anything"
    assert resolve("op", "group", pair.group_name) is pair
    assert resolve("op", "group", pair) is pair
    assert resolve("op", "group", None) is world.group
    with pytest.raises(ValueError, match=f"op: group must name a process group, got 'x'; known groups: .*{pair.group_name}"):
        resolve("op", "group", "x")


def test_without_any_group():
    assert not dist.is_initialized()
    with pytest.raises(
        RuntimeError, match="comm_name: no process group exists; call torch.distributed.init_process_group first"
    ):
        comm_name()
    with pytest.raises(RuntimeError, match="op: group names a process group, but none exists"):
        resolve("op", "group", "0")
