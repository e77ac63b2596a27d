"""Products joined with collectives on the NPU: which kernels and collectives run, for one rank and for rank 0 of several."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.npu_contract import hccl_world, npu_contract

BF16, FP32 = torch.bfloat16, torch.float32
E, C, H, M = 4, 6, 16, 8


def tensor(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype, device="npu")


def launched(calls):
    torch.npu.synchronize()
    return calls.names


def kernel_of(name):
    from mindspeed.ops import backend_report

    return backend_report("npu")[name].kernel


# ---- names of groups -----------------------------------------------------------------------------------------------------------


@npu_contract()
def test_groups_are_found_by_the_name_of_their_communicator(calls):
    from mindspeed.ops.comm import comm_name, resolve

    with hccl_world() as group:
        with pytest.raises(ValueError, match="known groups: 0$"):  # looking for a name makes no communicator
            resolve("op", "group", "fake_comm")
        assert comm_name(group) == "fake_comm"
        assert resolve("op", "group", "fake_comm") is group
        assert resolve("op", "group", group.group_name) is group


# ---- experts ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "None": [], "GeLU": ["aclnnGelu"], "silu": ["aclnnSilu"], "RELU": ["aclnnRelu"], "FastGeLU": ["aclnnFastGelu"],
}  # fmt: skip


@npu_contract()
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_alltoall_allgather_bmm(calls, activation, shard, ranks):
    from mindspeed.ops.npu_all_to_all_all_gather_bmm import npu_alltoall_allgather_bmm

    experts, hidden = E // ranks, H * (ranks if shard == 0 else 1)
    x, weight, bias = tensor(E, C, H), tensor(experts, hidden, M), tensor(experts, M)
    with hccl_world(ranks) as group:
        calls.reset()
        y1, y2, y3 = npu_alltoall_allgather_bmm(
            x, weight, group, ranks, group, ranks, bias=bias, shard_type=shard, act_type=activation
        )
        rearranged = ["aclnnInplaceCopy"] if ranks > 1 else []
        expected = ["HcclAlltoAll", "HcclAllGather", *rearranged, "aclnnBaddbmm", *ACTIVATIONS[activation]]
        assert launched(calls) == expected
    tokens = ranks * C * (ranks if shard == 1 else 1)
    (product,) = calls.named("aclnnBaddbmm")
    shapes = [(experts, 1, M), (experts, tokens, hidden), (experts, hidden, M), (experts, tokens, M)]
    assert [argument.shape for argument in product.tensors] == shapes
    assert (y1.shape, y1.dtype, y2.shape, y3.shape) == ((experts, tokens, M), BF16, (0, 0, 0), (0, 0, 0))
    assert kernel_of("npu_alltoall_allgather_bmm") == "npu"


@npu_contract()
def test_alltoall_allgather_bmm_gives_what_is_asked_for(calls):
    from mindspeed.ops.npu_all_to_all_all_gather_bmm import npu_alltoall_allgather_bmm

    x, weight, bias = tensor(E, C, H), tensor(E, H, M), tensor(E, 1, M, dtype=FP32)
    wanted = {"need_allgather_out": True, "need_activation_feature": True}
    with hccl_world() as group:
        calls.reset()
        results = npu_alltoall_allgather_bmm(x, weight, group, 1, group, 1, bias=bias, **wanted)
        assert launched(calls) == [
            "HcclAlltoAll", "HcclAllGather", "aclnnBatchMatMul", "aclnnAdd", "aclnnInplaceCopy",  # a float32 bias is added in float32
            "aclnnInplaceCopy",  # y1 and y3 do not share memory
        ]  # fmt: skip
    assert [(tuple(value.shape), value.dtype) for value in results] == [((E, C, M), BF16), ((E, C, H), BF16), ((E, C, M), BF16)]
    assert len({value.data_ptr() for value in results}) == 3


@npu_contract()
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shard", [0, 1])
def test_bmm_reducescatter_alltoall(calls, shard, ranks):
    from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import npu_bmm_reducescatter_alltoall

    experts, tokens = E // ranks, C * ranks
    hidden = H // ranks if shard == 0 else H
    x, weight, bias = tensor(experts, ranks * tokens, M), tensor(experts, M, H), tensor(experts, 1, hidden)
    with hccl_world(ranks) as group:
        calls.reset()
        y = npu_bmm_reducescatter_alltoall(x, weight, group, ranks, group, ranks, bias=bias, shard_type=shard)
        arranged = ["aclnnInplaceCopy"] if ranks > 1 else []
        expected = ["aclnnBatchMatMul", *arranged, "HcclReduceScatter", "aclnnAdd", *arranged, "HcclAlltoAll"]
        assert launched(calls) == expected
    assert (y.shape, y.dtype) == ((E, tokens, H // ranks) if shard == 0 else (E, tokens // ranks, H), BF16)
    assert kernel_of("npu_bmm_reducescatter_alltoall") == "npu"


# ---- coc_ops -----------------------------------------------------------------------------------------------------------------------

K, N = 256, 32


def coc(name, group, ranks, dtype=BF16, inner=K):
    """Run one method on 16 rows; returns its results."""
    from mindspeed.ops.lcal_functional import CoCOperations

    rows = {"matmul_reduce_scatter": 16 // ranks, "matmul_all_reduce": 16, "pure_matmul": 16}.get(name, 16 * ranks)
    x, w, output, bias = tensor(16, inner, dtype=dtype), tensor(N, inner, dtype=dtype), tensor(rows, N, dtype=dtype), None
    kept = (tensor(rows, inner, dtype=dtype),) if name == "all_gather_matmul_v2" else ()
    result = getattr(CoCOperations(group), name)(x, w, output, *kept, bias)
    results = (result,) if isinstance(result, torch.Tensor) else result
    assert [value is given for value, given in zip(results, (output, *kept), strict=True)] == [True] * len(results)
    return results


COC = {
    "matmul_all_reduce": ("coc_matmul_all_reduce_", "aclnnMatmulAllReduce", 1),
    "all_gather_matmul": ("coc_all_gather_matmul_", "aclnnAllGatherMatmul", 1),
    "all_gather_matmul_v2": ("coc_all_gather_matmul_", "aclnnAllGatherMatmul", 2),
    "matmul_reduce_scatter": ("coc_matmul_reduce_scatter_", "aclnnMatmulReduceScatter", 1),
}


@npu_contract()
@pytest.mark.parametrize("method", COC)
def test_coc_is_one_fused_operator(calls, method):
    operator, kernel, outputs = COC[method]
    with hccl_world(2) as group:
        coc(method, group, 2)
        names = [name for name in launched(calls) if not name.startswith("aclnnInplaceZero")]
        assert names == [kernel, *["aclnnInplaceCopy"] * outputs]
        assert kernel_of(operator) == "npu"
    given = calls.named(kernel)[0].tensors
    assert [(argument.shape, argument.dtype) for argument in given[:2]] == [((16, K), "bfloat16"), ((K, N), "bfloat16")]
    assert given[1].strides == (1, K), "a transposed weight is passed as a view"


@npu_contract()
def test_coc_adds_the_bias_once_after_the_communication(calls):
    from mindspeed.ops.lcal_functional import CoCOperations

    with hccl_world(2) as group:
        x, w, bias, output = tensor(16, K), tensor(K, N), tensor(1, N), tensor(16, N)
        calls.reset()
        CoCOperations(group).matmul_all_reduce(x, w, output, bias)
        assert launched(calls) == ["aclnnMatmulAllReduce", "aclnnInplaceCopy", "aclnnInplaceAdd"]


@npu_contract()
@pytest.mark.parametrize("method", COC)
def test_coc_in_chunks_when_told_to(calls, method):
    from mindspeed.ops._registry import backends

    collective = {"matmul_all_reduce": "HcclAllReduce", "matmul_reduce_scatter": "HcclReduceScatter"}.get(
        method, "HcclAllGather"
    )
    with hccl_world(2) as group, backends("coc_ops=ref"):
        coc(method, group, 2)
        assert [launched(calls).count(name) for name in (collective, "aclnnMatmul", "aclnnMm")] in ([4, 4, 0], [4, 0, 4])
        assert kernel_of(COC[method][0]) == "ref"


@npu_contract()
@pytest.mark.parametrize(
    ("ranks", "dtype", "inner", "reason"),
    [(3, BF16, K, "groups of"), (2, FP32, K, "16-bit operands"), (2, BF16, 255, "inner sizes from 256 to 65534, not 255")],
)
def test_coc_beyond_the_limits_of_the_operator(calls, ranks, dtype, inner, reason):
    from mindspeed.ops import backend_report

    with hccl_world(ranks) as group:
        coc("all_gather_matmul", group, ranks, dtype, inner)
        report = backend_report("npu")["coc_all_gather_matmul_"]
        assert report.kernel == "ref" and reason in report.reason
        assert launched(calls).count("HcclAllGather") == 4


@npu_contract()
def test_coc_of_a_grid_gathers_then_scatters(calls):
    from mindspeed.ops.lcal_functional import CoCOperations, TP2DConfig

    with hccl_world(2) as group:
        operations, config = CoCOperations(group), TP2DConfig(2, 2)
        operations.grids[group.group_name, config] = (group, group)  # this rank's groups; making them would wait for the others
        output = operations.all_gather_matmul_reduce_scatter(tensor(16, K), tensor(K, N), tensor(16, N), config)
        names = [name for name in launched(calls) if name != "aclnnInplaceZero"]
        assert names == ["HcclAllGather", "aclnnMatmulReduceScatter", "aclnnInplaceCopy"]
    assert output.shape == (16, N)
