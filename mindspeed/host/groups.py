"""megatron-core's process groups by short name; the same for every host."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from torch import distributed

from mindspeed.host.protocol import GROUPS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# short name -> (accessor of megatron.core.parallel_state, its arguments)
_ACCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp": ("get_tensor_model_parallel_group", {}),
    "pp": ("get_pipeline_model_parallel_group", {}),
    "dp": ("get_data_parallel_group", {}),
    "dp_cp": ("get_data_parallel_group", {"with_context_parallel": True}),
    "cp": ("get_context_parallel_group", {}),
    "ep": ("get_expert_model_parallel_group", {}),
    "etp": ("get_expert_tensor_parallel_group", {}),
    "tp_cp": ("get_tensor_and_context_parallel_group", {}),
    "tp_ep": ("get_expert_tensor_and_model_parallel_group", {}),
    "mp": ("get_model_parallel_group", {}),
    "embd": ("get_embedding_group", {}),
}


class ParallelGroups:
    """The part that all hosts share: megatron-core's groups, asked when needed, since they may be destroyed and made anew."""

    def group(self, name: str) -> ProcessGroup:
        """Process group by short name (see `mindspeed.host.protocol.GROUPS`).

        Raises:
            KeyError: no such name.
            AssertionError: from megatron-core, when its groups do not exist yet.
        """
        if name == "world":
            return cast("ProcessGroup", distributed.GroupMember.WORLD)
        if name not in _ACCESSORS:
            raise KeyError(f"no group {name!r}; there are {', '.join(GROUPS)}")
        accessor, arguments = _ACCESSORS[name]
        parallel_state = importlib.import_module("megatron.core.parallel_state")
        return cast("ProcessGroup", getattr(parallel_state, accessor)(**arguments))

    def size(self, name: str) -> int:
        """World size of a group by short name."""
        return distributed.get_world_size(self.group(name))

    def rank(self, name: str) -> int:
        """Rank of this process in a group by short name."""
        return distributed.get_rank(self.group(name))
