import pytest
import torch

from mindspeed.ops.lcal_functional import CoCConfig, CoCOperations, TP2DConfig, coc_ops
from mindspeed.testing import count_communication, ranks

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
        with count_communication() as counted:
            out, kept = coc.all_gather_matmul_v2(x, weight, empty(M * world.size), empty(M * world.size, K), None, transposed)
        assert counted.calls("all_gather") == counted.calls() == min(chunks, M)
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
    with pytest.raises(ValueError, match="input1 must have a multiple of 2 rows"):
        coc.matmul_reduce_scatter(draw(3, 4), square, torch.empty(1, 4))
    with pytest.raises(ValueError, match="ag_dim \\* rs_dim must be the group size 2, got 4"):
        coc.grid(TP2DConfig(2, 2))
    with pytest.raises(RuntimeError, match="has no derivative, .*; call it inside a torch.autograd.Function"):
        coc.pure_matmul(x.requires_grad_(), square, torch.empty(4, 4))


def test_the_ready_made_object_has_no_group():
    assert coc_ops.group is None
