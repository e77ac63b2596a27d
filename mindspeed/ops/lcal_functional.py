"""Matrix products with a collective: pipelined inside one operator of the device, or cut into chunks so that one chunk computes
while the previous one communicates.

`coc_ops` is the ready-made object; its methods write into preallocated tensors and return them. They have no derivative of their
own: call them from the forward and backward of an autograd function.
"""

# m rows, k inner size, n output size, w ranks

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed.ops import _checks, _coc  # noqa: F401  (_coc defines the operators)
from mindspeed.ops.comm import resolve

HINT = "call it inside a torch.autograd.Function"


@dataclass(frozen=True)
class CoCConfig:
    """The group of the collectives: this rank, the number of ranks, and the name of the group."""

    rank_id: int
    rank_size: int
    comm_domain: str


@dataclass(frozen=True)
class TP2DConfig:
    """A grid of `ag_dim` gathering by `rs_dim` scattering ranks; `inner_dim_is_ag`: the gathering ranks are adjacent."""

    ag_dim: int
    rs_dim: int
    inner_dim_is_ag: bool = True


class CoCOperations:
    """Matrix products joined with collectives over `group` (Megatron's tensor-parallel group unless it is set).

    chunks: into how many parts the rows are cut; the result does not depend on it beyond the order of sums.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, chunks: int = 4) -> None:
        self.group = group
        self.chunks = chunks
        self.grids: dict[tuple[str, TP2DConfig], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}

    def set_comm_config(self, config: CoCConfig) -> None:
        """Use the group that the configuration names; raises ValueError if its size or this rank differ."""
        group = resolve("set_comm_config", "comm_domain", config.comm_domain)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        _checks.require(
            "set_comm_config", "rank_size", config.rank_size == size, f"must be the size of the group, {size}", config.rank_size
        )
        _checks.require("set_comm_config", "rank_id", config.rank_id == rank, f"must be this rank, {rank}", config.rank_id)
        self.group = group

    def active_group(self) -> dist.ProcessGroup:
        """The configured group, or Megatron's tensor-parallel group if Megatron is loaded and initialised."""
        if self.group is not None:
            return self.group
        state = sys.modules.get("megatron.core.parallel_state")
        if state is None or not state.model_parallel_is_initialized():
            raise RuntimeError("coc_ops: no group; set coc_ops.group or call set_comm_config (Megatron's groups do not exist)")
        return state.get_tensor_model_parallel_group()

    def pure_matmul(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None, trans_b: bool | None = None
    ) -> Tensor:
        """`output[m, n] = input1[m, k] @ input2 + bias`."""
        weight = _weight("pure_matmul", input1, input2, output, bias, trans_b, input1.shape[0])
        with torch.no_grad():
            torch.mm(input1, weight, out=output)
            return _add_bias(output, bias)

    def matmul_all_reduce(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None, trans_b: bool | None = None
    ) -> Tensor:
        """`output[m, n] = allreduce(input1[m, k] @ input2) + bias`."""
        weight = _weight("matmul_all_reduce", input1, input2, output, bias, trans_b, input1.shape[0])
        group = self.active_group()
        with torch.no_grad():
            torch.ops.mindspeed.coc_matmul_all_reduce_(input1, weight, output, group.group_name, self.chunks)
            return _add_bias(output, bias)

    def all_gather_matmul(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None, trans_b: bool | None = None
    ) -> Tensor:
        """`output[m, n] = allgather(input1[m/w, k]) @ input2 + bias`."""
        return self._gather("all_gather_matmul", input1, input2, output, None, bias, trans_b)

    def all_gather_matmul_v2(
        self,
        input1: Tensor,
        input2: Tensor,
        output: Tensor,
        comm_output: Tensor,
        bias: Tensor | None = None,
        trans_b: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `all_gather_matmul`; the gathered input goes to `comm_output[m, k]`. Returns both."""
        return self._gather("all_gather_matmul_v2", input1, input2, output, comm_output, bias, trans_b), comm_output

    def matmul_reduce_scatter(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None, trans_b: bool | None = None
    ) -> Tensor:
        """`output[m/w, n] = reducescatter(input1[m, k] @ input2) + bias`."""
        group = self.active_group()
        op, size = "matmul_reduce_scatter", dist.get_world_size(group)
        _checks.require(op, "input1", input1.shape[0] % size == 0, f"must have a multiple of {size} rows", tuple(input1.shape))
        weight = _weight(op, input1, input2, output, bias, trans_b, input1.shape[0] // size)
        with torch.no_grad():
            torch.ops.mindspeed.coc_matmul_reduce_scatter_(input1, weight, output, group.group_name, self.chunks)
            return _add_bias(output, bias)

    def all_gather_matmul_reduce_scatter(
        self,
        input1: Tensor,
        input2: Tensor,
        output: Tensor,
        tp2d_config: TP2DConfig,
        bias: Tensor | None = None,
        trans_b: bool | None = None,
    ) -> Tensor:
        """Gather rows over one side of the grid, multiply, reduce-scatter rows over the other: `output[m * ag / rs, n]`."""
        op = "all_gather_matmul_reduce_scatter"
        gather_group, scatter_group = self.grid(tp2d_config)
        rows, rest = divmod(input1.shape[0] * tp2d_config.ag_dim, tp2d_config.rs_dim)
        _checks.require(op, "input1", rest == 0, f"must give rows divisible by {tp2d_config.rs_dim}", tuple(input1.shape))
        weight = _weight(op, input1, input2, output, bias, trans_b, rows)
        with torch.no_grad():
            gathered = input1.new_empty(input1.shape[0] * tp2d_config.ag_dim, input1.shape[1])
            dist.all_gather_into_tensor(gathered, input1.contiguous(), group=gather_group)
            torch.ops.mindspeed.coc_matmul_reduce_scatter_(gathered, weight, output, scatter_group.group_name, self.chunks)
            return _add_bias(output, bias)

    def grid(self, config: TP2DConfig) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """This rank's gathering and scattering group; made at the first call, which all ranks of the group must join."""
        group = self.active_group()
        key = (group.group_name, config)
        if key not in self.grids:
            ranks = dist.get_process_group_ranks(group)
            cells = config.ag_dim * config.rs_dim
            _checks.require(
                "tp2d_config", "ag_dim * rs_dim", cells == len(ranks), f"must be the group size {len(ranks)}", cells
            )
            inner = config.ag_dim if config.inner_dim_is_ag else config.rs_dim
            place = dist.get_rank(group)
            adjacent = ranks[place // inner * inner : (place // inner + 1) * inner]
            strided = ranks[place % inner :: inner]
            # One side that is the whole group needs no second communicator; torch names a group after its members, and one
            # that took the name of a destroyed group could meet its addresses in the store and wait for them.
            groups = [
                group if members == ranks else dist.new_group(members, use_local_synchronization=True)
                for members in (adjacent, strided)
            ]
            self.grids[key] = tuple(groups if config.inner_dim_is_ag else reversed(groups))
        return self.grids[key]

    def _gather(
        self,
        op: str,
        input1: Tensor,
        input2: Tensor,
        output: Tensor,
        comm_output: Tensor | None,
        bias: Tensor | None,
        trans_b: bool | None,
    ) -> Tensor:
        group = self.active_group()
        size = dist.get_world_size(group)
        weight = _weight(op, input1, input2, output, bias, trans_b, input1.shape[0] * size)
        if comm_output is not None:
            _checks.tensor(op, "comm_output", comm_output, (input1.dtype,))
            _checks.shape(op, "comm_output", comm_output, (input1.shape[0] * size, input1.shape[1]))
            _checks.require(op, "comm_output", comm_output.is_contiguous(), "must be contiguous", comm_output.stride())
            _checks.same_device(op, input1=input1, comm_output=comm_output)
        with torch.no_grad():
            name = group.group_name
            torch.ops.mindspeed.coc_all_gather_matmul_(input1, weight, output, comm_output, name, self.chunks)
            return _add_bias(output, bias)


def _weight(
    op: str, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None, trans_b: bool | None, rows: int
) -> Tensor:
    """Check the operands; returns input2 as [k, n]. Without `trans_b`, a mismatch of sizes means that it is transposed."""
    for name, value in (("input1", input1), ("input2", input2), ("output", output)):
        _checks.tensor(op, name, value, (input1.dtype,) if name != "input1" else _checks.FLOATS, ndim=2)
    transposed = input1.shape[1] != input2.shape[0] if trans_b is None else trans_b
    weight = input2.t() if transposed else input2
    _checks.require(
        op, "input2", weight.shape[0] == input1.shape[1], f"must have inner size {input1.shape[1]}", tuple(input2.shape)
    )
    _checks.shape(op, "output", output, (rows, weight.shape[1]))
    if bias is not None:
        _checks.tensor(op, "bias", bias, (input1.dtype, torch.float32))
        _checks.shape(op, "bias", bias, (1, weight.shape[1]), (weight.shape[1],))
    _checks.require(op, "output", output.is_contiguous(), "must be contiguous", output.stride())
    _checks.same_device(op, input1=input1, input2=input2, output=output, bias=bias)
    _checks.forward_only(op, HINT, input1, input2, bias)
    return weight


def _add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """The bias is added once, after the communication."""
    return output if bias is None else output.add_(bias)


coc_ops = CoCOperations()
