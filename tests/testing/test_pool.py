"""The worker pool: values, failures, hangs and cleanliness between tests."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import psutil
import pytest
import torch
import torch.distributed as dist

from mindspeed.testing import ranks
from mindspeed.testing.pool import Pool, RankFailure, RankSkip, pools


@dataclass
class Sizes:
    rows: int
    columns: int


@pytest.fixture
def sizes():
    return Sizes(rows=4, columns=3)


@ranks(2)
@pytest.mark.parametrize("scale", [1, 3])
def test_body_runs_on_every_rank_with_parameters_and_fixtures(world, scale, sizes):
    whole = scale * torch.arange(sizes.rows * sizes.columns, dtype=torch.float32).view(sizes.rows, sizes.columns)
    chunk = world.my_chunk(whole, dim=0)
    assert chunk.shape == (2, 3)
    dist.all_reduce(chunk, group=world.group)
    torch.testing.assert_close(chunk, whole[:2] + whole[2:])
    torch.testing.assert_close(world.gather(world.my_chunk(whole, dim=0), dim=0), whole)


class TestClass:
    @ranks(2)
    def test_methods_work_too(self, world):
        assert isinstance(self, TestClass) and world.size == 2


@ranks(2)
def test_memory_is_nan_and_threads_are_one(world):
    assert torch.empty(7).isnan().all()
    assert torch.get_num_threads() == 1


@ranks(2)
@pytest.mark.plain_memory
def test_memory_can_be_left_plain(world):
    assert not torch.are_deterministic_algorithms_enabled()


@ranks(2)
def test_shared_directory_is_shared_and_empty(world):
    assert not [path for path in world.shared_dir.iterdir() if "from" not in path.name]
    (world.shared_dir / f"from{world.rank}").touch()
    world.barrier()
    assert len(list(world.shared_dir.iterdir())) == 2


def rank_and_draw(world, add=0):
    return world.rank + add, torch.rand(()).item(), os.getpid()


def test_values_come_back_in_order_of_rank_and_seeds_repeat():
    first, second = pools().get(2).run(rank_and_draw, add=10), pools().get(2).run(rank_and_draw, add=10)
    assert [rank for rank, _, _ in first] == [10, 11]
    assert first == second, "same seed and same processes for every test"


def fails_on_one(world):
    print("about to fail" if world.rank == 1 else "waiting")
    if world.rank == 1:
        left, right = 1, 2
        assert left == right
    dist.barrier()


def test_a_failure_shows_rank_assertion_output_and_the_other_ranks_stack():
    started = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        pools().get(2).run(fails_on_one)
    text = str(caught.value)
    assert time.monotonic() - started < 20
    assert "rank 1 of 2: AssertionError: assert 1 == 2" in text
    assert "rank 0 was still here" in text and "in barrier" in text and "about to fail" in text
    assert pools().get(2).run(rank_and_draw)[1][0] == 1, "a fresh pool serves the next test"


def hangs(world):
    while world.rank == 0:
        time.sleep(0.1)


def test_a_hang_is_killed_with_stacks():
    with pytest.raises(RankFailure, match=r"ranks \[0\] of 2 did not finish within 1 s(.|\n)*in hangs"):
        pools().get(2).run(hangs, timeout=1)


def ends_hard(world):
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankFailure, match="rank 0 of 2: the process ended"):
        pools().get(2).run(ends_hard)


def skips(world):
    pytest.skip("no such device")


def test_a_skip_on_the_ranks_is_a_skip_here():
    with pytest.raises(RankSkip, match="no such device"):
        pools().get(2).run(skips)


def litter(world):
    os.environ["MINDSPEED_LITTER"] = "1"
    os.chdir(world.shared_dir)
    sys.argv.append("--litter")
    torch.set_default_dtype(torch.float64)
    dist.new_group([0, 1])
    return os.getpid()


def observe(world):
    found = os.environ.get("MINDSPEED_LITTER"), "--litter" in sys.argv, torch.get_default_dtype()
    return (*found, len(dist.distributed_c10d._world.pg_map), os.getcwd() == str(world.shared_dir), os.getpid())


def test_the_next_test_sees_nothing_of_the_one_before():
    pids = pools().get(2).run(litter)
    seen = pools().get(2).run(observe)
    assert [entry[:5] for entry in seen] == [(None, False, torch.float32, 1, False)] * 2
    assert [entry[5] for entry in seen] == pids, "and runs in the same processes"


def destroys_default_group(world):
    dist.destroy_process_group()


def test_a_destroyed_default_group_is_made_anew():
    pools().get(2).run(destroys_default_group)
    assert [rank for rank, _, _ in pools().get(2).run(rank_and_draw)] == [0, 1]


@ranks(2, megatron=True)
@pytest.mark.parametrize("repetition", [0, 1])
def test_megatron_state_is_destroyed_between_tests(world, repetition):
    from megatron.core import parallel_state

    assert not parallel_state.is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    assert parallel_state.get_tensor_model_parallel_world_size() == 2


def test_world_must_be_an_argument():
    with pytest.raises(TypeError, match="must take `world`"):
        ranks(2)(lambda q: None)


def test_my_chunk_refuses_a_remainder():
    with pytest.raises(RankFailure, match=r"ValueError: dimension 0 of \(3,\) does not divide by 2 ranks"):
        pools().get(2).run(chunk_of_three)


def chunk_of_three(world):
    world.my_chunk(torch.zeros(3))


def test_nothing_is_left_when_the_owner_dies(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        sys.path.insert(0, os.path.dirname(__file__))
        from mindspeed.testing.pool import pools
        import owner_body
        print(*pools().get(2).run(owner_body.pid), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    (tmp_path / "owner_body.py").write_text("import os\ndef pid(world):\n    return os.getpid()\n")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = [int(word) for word in ended.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_closed_pool_leaves_no_process():
    pool = Pool(pools().zygote_for(), 2)
    pids = [pid for _, _, pid in pool.run(rank_and_draw)]
    pool.close()
    time.sleep(0.2)
    assert not any(_alive(pid) for pid in pids)


def test_seed_here_is_fixed_too():
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(1234)).item()
