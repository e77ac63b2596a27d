"""Products joined with a collective: values for any number of ranks and chunks, dispatch, and who may share GPU memory."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mindspeed.ops import _coc, _symmetric_memory
from mindspeed.ops._registry import REGISTRY, backends
from mindspeed.ops.lcal_functional import CoCConfig, CoCOperations, TP2DConfig, coc_ops
from mindspeed.testing import ranks
from mindspeed.testing.operators import check_operator, counted_collectives, operator_calls

M, K, N = 8, 6, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_all(world, dtype, chunks):
    coc = CoCOperations(world.group, chunks)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    close = lambda value, exact: torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance)  # noqa: E731
    inputs = [draw(M, K, seed=r).to(dtype) for r in range(world.size)]
    weights = [draw(K, N, seed=9 + r).to(dtype) for r in range(world.size)]
    x, w, bias = inputs[world.rank], weights[world.rank], draw(1, N, seed=99).to(dtype)
    total = sum(a.double() @ b.double() for a, b in zip(inputs, weights, strict=True))
    empty = lambda rows, columns=N: torch.empty(rows, columns, dtype=dtype)  # noqa: E731
    for weight, transposed in ((w, None), (w.t().contiguous(), None), (w.t().contiguous(), True), (w, False)):
        out = empty(M)
        assert coc.matmul_all_reduce(x, weight, out, bias, transposed) is out
        close(out, total + bias.double())
        close(
            coc.matmul_reduce_scatter(x, weight, empty(M // world.size), bias, transposed),
            world.my_chunk(total) + bias.double(),
        )
        close(coc.pure_matmul(x, weight, empty(M), bias, transposed), x.double() @ w.double() + bias.double())
        gathered = torch.cat(inputs).double()
        close(coc.all_gather_matmul(x, weight, empty(M * world.size), bias, transposed), gathered @ w.double() + bias.double())
        with counted_collectives() as counted:
            out, kept = coc.all_gather_matmul_v2(x, weight, empty(M * world.size), empty(M * world.size, K), None, transposed)
        assert counted == ["all_gather_into_tensor"] * min(chunks, M)
        close(out, gathered @ w.double())
        assert torch.equal(kept.double(), gathered)


@ranks(1)
def test_world_1(world):
    check_all(world, torch.float32, 4)


@ranks(2)
def test_world_2(world):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_all(world, dtype, 4)
    for chunks in (1, 2, 3, 8, 100):
        check_all(world, torch.float32, chunks)


@ranks(4)
def test_world_4(world):
    check_all(world, torch.float32, 2)


@ranks(2)
def test_the_number_of_chunks_does_not_matter(world):
    x, w = draw(64, 32, seed=world.rank), draw(32, 16, seed=5)
    results = [CoCOperations(world.group, chunks).matmul_all_reduce(x, w, torch.empty(64, 16)) for chunks in (1, 2, 4, 8)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


@ranks(4)
def test_two_dimensional_form(world):
    for config in (TP2DConfig(2, 2, True), TP2DConfig(2, 2, False), TP2DConfig(4, 1), TP2DConfig(1, 4)):
        ag, rs = config.ag_dim, config.rs_dim
        coc = CoCOperations(world.group, 2)
        inputs = [draw(M, K, seed=r) for r in range(4)]
        weights = [draw(K, N, seed=9 + r) for r in range(4)]
        place = [
            (r // ag, r % ag) if config.inner_dim_is_ag else (r % rs, r // rs) for r in range(4)
        ]  # (scatter, gather) index
        mine = place[world.rank]
        total = 0
        for scatter in range(rs):
            gathered = torch.cat([inputs[place.index((scatter, g))] for g in range(ag)])
            total = total + gathered @ weights[place.index((scatter, mine[1]))]
        out = coc.all_gather_matmul_reduce_scatter(
            inputs[world.rank], weights[world.rank], torch.empty(M * ag // rs, N), config
        )
        torch.testing.assert_close(out, total.chunk(rs)[mine[0]], rtol=1e-5, atol=1e-5)
        assert coc.grid(config) is coc.grid(config)


@ranks(2)
def test_configuration_and_errors(world):
    coc = CoCOperations()
    with pytest.raises(RuntimeError, match="no group; set coc_ops.group or call set_comm_config"):
        coc.active_group()
    coc.set_comm_config(CoCConfig(world.rank, 2, world.group.group_name))
    assert coc.active_group() is world.group
    with pytest.raises(ValueError, match="rank_size must be the size of the group, 2, got 4"):
        coc.set_comm_config(CoCConfig(world.rank, 4, world.group.group_name))
    with pytest.raises(ValueError, match="comm_domain must name a process group"):
        coc.set_comm_config(CoCConfig(world.rank, 2, "127.0.0.1:1"))
    x, square = draw(4, 4), draw(4, 4)
    torch.testing.assert_close(coc.pure_matmul(x, square, torch.empty(4, 4), trans_b=True), x @ square.t())
    torch.testing.assert_close(coc.pure_matmul(x, square, torch.empty(4, 4)), x @ square)
    with pytest.raises(ValueError, match=r"output must have shape \(4, 4\)"):
        coc.matmul_all_reduce(x, square, torch.empty(4, 3))
    with pytest.raises(ValueError, match="input2 must have inner size 4"):
        coc.matmul_all_reduce(x, draw(3, 5), torch.empty(4, 5))
    with pytest.raises(ValueError, match="output must be contiguous"):
        coc.matmul_all_reduce(x, square, torch.empty(4, 4).t())
    with pytest.raises(TypeError, match="comm_output must have dtype float32"):
        coc.all_gather_matmul_v2(x, square, torch.empty(8, 4), torch.empty(8, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="input1 must have a multiple of 2 rows"):
        coc.matmul_reduce_scatter(draw(3, 4), square, torch.empty(1, 4))
    with pytest.raises(ValueError, match="ag_dim \\* rs_dim must be the group size 2, got 4"):
        coc.grid(TP2DConfig(2, 2))
    with pytest.raises(RuntimeError, match="has no derivative, .*; call it inside a torch.autograd.Function"):
        coc.pure_matmul(x.requires_grad_(), square, torch.empty(4, 4))


@ranks(2)
def test_empty_sizes(world):
    coc, w = CoCOperations(world.group, 4), world.size
    for m, k, n in ((0, 3, 2), (4, 0, 2), (4, 3, 0)):
        x, weight = draw(m, k), draw(k, n)
        results = [
            coc.pure_matmul(x, weight, torch.empty(m, n)),
            coc.matmul_all_reduce(x, weight, torch.empty(m, n)),
            coc.all_gather_matmul(x, weight, torch.empty(m * w, n)),
            coc.all_gather_matmul_v2(x, weight, torch.empty(m * w, n), torch.empty(m * w, k))[0],
            coc.matmul_reduce_scatter(x, weight, torch.empty(m // w, n)),
            coc.all_gather_matmul_reduce_scatter(x, weight, torch.empty(m * w, n), TP2DConfig(w, 1)),
        ]
        for result in results:
            assert k > 0 or torch.equal(result, torch.zeros_like(result))


def test_the_ready_made_object_has_no_group():
    assert coc_ops.group is None


@ranks(1)
def test_each_method_is_one_operator_of_the_family(world):
    coc, name = CoCOperations(world.group), world.group.group_name
    x, w = draw(M, K), draw(K, N)
    for run, operator in (
        (lambda: coc.matmul_all_reduce(x, w, torch.empty(M, N)), "coc_matmul_all_reduce_"),
        (lambda: coc.all_gather_matmul(x, w, torch.empty(M, N)), "coc_all_gather_matmul_"),
        (lambda: coc.all_gather_matmul_v2(x, w, torch.empty(M, N), torch.empty(M, K)), "coc_all_gather_matmul_"),
        (lambda: coc.matmul_reduce_scatter(x, w, torch.empty(M, N)), "coc_matmul_reduce_scatter_"),
    ):
        assert operator_calls(run) == {operator: 1}
        with backends("coc_ops=ref"):
            run()
        assert REGISTRY.operators[operator].last["cpu"].kernel == "ref"
    for sample in ((x, w, torch.empty(M, N), None, name, 2), (x, w, torch.empty(M, N), torch.empty(M, K), name, 2)):
        check_operator(torch.ops.mindspeed.coc_all_gather_matmul_.default, sample)
    for operator in (torch.ops.mindspeed.coc_matmul_all_reduce_, torch.ops.mindspeed.coc_matmul_reduce_scatter_):
        check_operator(operator.default, (x, w, torch.empty(M, N), name, 2))


# ---- CUDA: peers read and write each other's memory ---------------------------------------------------------------------------


@ranks(2)
def test_products_over_shared_memory(world):
    """torch's own fallback stands for its operators, which want GPUs; it says what they compute."""
    import torch.distributed._symmetric_memory as shared

    x, w, name = draw(M, K, seed=world.rank), draw(K, N, seed=9 + world.rank), world.group.group_name
    gather, scatter = (
        REGISTRY.operators[operator].kernels["cuda"][0] for operator in ("coc_all_gather_matmul_", "coc_matmul_reduce_scatter_")
    )
    assert gather.backend == scatter.backend == "aten"
    operators = mock.Mock(
        fused_all_gather_matmul=shared._fused_all_gather_matmul_fallback,
        fused_matmul_reduce_scatter=shared._fused_matmul_reduce_scatter_fallback,
    )
    ours, truth = (torch.full((2 * M, N), float("nan")) for _ in range(2))
    kept, true_kept = (torch.full((2 * M, K), float("nan")) for _ in range(2))
    with mock.patch.object(torch.ops, "symm_mem", operators):
        gather.body(x, w, ours, kept, name, 4)
        _coc._all_gather_matmul(x, w, truth, true_kept, name, 4)
        torch.testing.assert_close((ours, kept), (truth, true_kept))
        gather.body(x, w, ours.zero_(), None, name, 4)
        torch.testing.assert_close(ours, truth)
        scatter.body(x, w, ours[: M // 2], name, 4)
    _coc._matmul_reduce_scatter(x, w, truth[: M // 2], name, 4)
    torch.testing.assert_close(ours[: M // 2], truth[: M // 2])


@ranks(2)
def test_a_rank_without_access_makes_all_ranks_take_the_plain_form(world):
    arguments = (None, None, None, world.group.group_name, 4)
    declines = REGISTRY.operators["coc_matmul_reduce_scatter_"].kernels["cuda"][0].declines
    for answers, expected in (
        ((None, None), None),
        ((None, "no access"), "no access"),
        (("no access", None), "no access"),
    ):
        _symmetric_memory._obstacle.cache_clear()
        with (
            mock.patch.object(_symmetric_memory, "_place", lambda: ("host", f"gpu {world.rank}")),
            mock.patch.object(_symmetric_memory, "_obstacle_here", lambda places, found=answers: found[world.rank]),
        ):
            assert declines(*arguments) == expected
            with mock.patch.object(dist, "all_gather_object", side_effect=AssertionError("asked twice")):
                assert declines(*arguments) == expected
    _symmetric_memory._obstacle.cache_clear()


@ranks(1)
def test_one_rank_shares_with_nobody(world):
    assert "one rank" in _symmetric_memory.obstacle(world.group)


@pytest.mark.parametrize(
    ("places", "access", "expected"),
    [
        ([("a", "x"), ("a", "y")], True, None),
        ([("a", "x"), ("b", "y")], True, "several hosts"),
        ([("a", "x"), ("a", "x")], True, "share a GPU"),
        ([("a", "x"), ("a", "z")], True, "GPU z of the group is not visible"),
        ([("a", "x"), ("a", "y")], False, "GPU 0 has no peer access to GPU 1"),
    ],
)
def test_who_may_share_memory(places, access, expected):
    cuda = torch.cuda
    with (
        mock.patch.object(cuda, "current_device", lambda: 0),
        mock.patch.object(cuda, "device_count", lambda: 2),
        mock.patch.object(cuda, "get_device_properties", lambda index: mock.Mock(uuid="xy"[index])),
        mock.patch.object(cuda, "can_device_access_peer", lambda own, peer: access),
    ):
        reason = _symmetric_memory._obstacle_here(places)
    assert reason is None if expected is None else expected in reason


def test_the_operators_of_torch_are_found_without_help():
    """They exist only once their module is imported, which neither torch nor a process group does."""
    code = "from mindspeed.ops import _symmetric_memory as own; print(own._missing())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_torch_without_the_operators_is_named():
    with mock.patch.object(torch.ops, "symm_mem", object()):
        assert "no symm_mem::fused_all_gather_matmul" in _symmetric_memory._obstacle_here([])
