import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mindspeed.ops import cross_entropy as module
from mindspeed.ops._registry import backends
from mindspeed.ops.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from mindspeed.testing import ranks
from mindspeed.testing.operators import (
    assert_compiles,
    assert_operator_accurate,
    check_operator,
    counted_collectives,
    kept_bytes,
    layouts,
    operator_calls,
)

BODIES = pytest.mark.parametrize("body", ["auto", "ref"])
OPS = torch.ops.mindspeed


def textbook(logits, target):
    """The host's formula, in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    shifted = wide - wide.amax(-1, keepdim=True)
    picked = shifted.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (shifted.exp().sum(-1).log() - picked) * (target != IGNORED)


def drawn(shape, dtype=torch.float32, spread=3.0):
    """Logits of a whole vocabulary, and targets of which the first is missing where there are several."""
    logits, target = (spread * torch.randn(shape)).to(dtype), torch.randint(0, shape[-1], shape[:-1])
    if target.numel() > 1:
        target.view(-1)[0] = IGNORED
    return logits, target


@BODIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 64), (7, 51), (2,), (200, 6), (3, 1)])
def test_values_and_gradients(dtype, shape, body):
    logits, target = drawn(shape, dtype)
    for _, x in layouts(logits):
        with backends(f"cross_entropy={body}"):
            assert_operator_accurate(
                lambda x: vocab_parallel_cross_entropy(x, target), lambda x: textbook(x, target), x.requires_grad_()
            )


@BODIES
def test_rows_in_several_blocks_the_last_one_smaller(body):
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = drawn((11, 37), dtype)
        with backends(f"cross_entropy={body}"), mock.patch.object(module, "BLOCK_BYTES", 4 * 37 * 4):
            assert_operator_accurate(
                lambda x, t=target: vocab_parallel_cross_entropy(x, t),
                lambda x, t=target: textbook(x, t),
                logits.requires_grad_(),
            )


@BODIES
def test_a_sure_prediction_keeps_its_digits(body):
    """Far from zero and almost certain: neither the loss nor `p - 1` may drown in the rounding of large numbers."""
    logits, target = torch.zeros(2, 100), torch.tensor([7, 7])
    logits[:, 7] = 14.0
    logits[1] += 60.0
    logits.requires_grad_()
    with backends(f"cross_entropy={body}"):
        loss = vocab_parallel_cross_entropy(logits, target)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    exact = math.log1p(99 * math.exp(-14.0))
    torch.testing.assert_close(loss.detach(), torch.full((2,), exact), rtol=5e-3, atol=0)
    torch.testing.assert_close(grad[:, 7], torch.full((2,), math.expm1(-exact)), rtol=5e-3, atol=0)


def test_it_is_torch_s_loss():
    logits, target = drawn((5, 9))
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, target), F.cross_entropy(logits, target, reduction="none"))


@BODIES
def test_gradcheck(body):
    logits, target = drawn((4, 5), torch.float64)
    with backends(f"cross_entropy={body}"):
        torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, target), (logits.requires_grad_(),))
        top = logits.detach().amax(-1) + 1.0  # of a shard: the maximum and most of the sum are elsewhere
        statistics = torch.stack((top, torch.full((4,), 30.0, dtype=torch.float64)))
        dlogits = OPS.vocab_parallel_cross_entropy_backward(torch.ones(4), logits.detach(), target + 5, statistics, 5)
    softmax = (logits.detach() - top[:, None]).exp() / 30.0
    softmax[torch.arange(1, 4), target[1:]] -= 1.0
    softmax[0] = 0.0 if target[0] + 5 == IGNORED else softmax[0]
    torch.testing.assert_close(dlogits, softmax)


def test_operators_are_well_formed_and_trace():
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = drawn((4, 6), dtype)
        forward = OPS.vocab_parallel_cross_entropy.default
        check_operator(
            forward,
            (logits, target, 0, ""),
            (logits.clone().requires_grad_(), target, 0, ""),
            (torch.randn(6, 4).to(dtype).t(), target, 6, ""),
            (logits[:0], target[:0], 0, ""),
        )
        statistics = forward(logits, target, 0, "")[1]
        check_operator(OPS.vocab_parallel_cross_entropy_backward.default, (torch.randn(4), logits, target, statistics, 0))
    assert_compiles(vocab_parallel_cross_entropy, logits.requires_grad_(), target)


def test_keeps_logits_target_and_two_numbers_a_row():
    logits, target = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    assert kept_bytes(lambda: vocab_parallel_cross_entropy(logits, target)) == 64 * 32 * 2 + 64 * 8 + 2 * 64 * 4


def test_one_call_each_way_and_logits_stay_what_they_were():
    logits, target = drawn((4, 6))
    before = logits.clone()
    logits.requires_grad_()
    calls = operator_calls(lambda: vocab_parallel_cross_entropy(logits, target).sum().backward())
    assert calls == {"vocab_parallel_cross_entropy": 1, "vocab_parallel_cross_entropy_backward": 1}
    assert torch.equal(logits.detach(), before)


@BODIES
def test_nonfinite_logits_spread_as_in_the_formula(body):
    logits = torch.zeros(5, 4)
    logits[0, 1] = float("nan")
    logits[1, 1] = math.inf
    logits[2, :2] = -math.inf
    logits[3] = -math.inf
    target = torch.tensor([0, 0, 0, 0, 0])
    leaf = logits.requires_grad_()
    with backends(f"cross_entropy={body}"):
        loss = vocab_parallel_cross_entropy(leaf, target)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(loss.detach(), textbook(logits.detach(), target), equal_nan=True)
    assert grad.isnan().any(-1).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ((torch.ones(2, 4).int(), torch.zeros(2).long()), TypeError, "logits must have dtype .* got int32"),
        ((torch.ones(2, 4), torch.zeros(2).int()), TypeError, "target must have dtype int64, got int32"),
        ((torch.tensor(1.0), torch.zeros(2).long()), ValueError, r"logits must have at least 1 dimension, got shape \(\)"),
        ((torch.ones(2, 0), torch.zeros(2).long()), ValueError, r"logits must have at least 1 column, got shape \(2, 0\)"),
        ((torch.ones(2, 3, 4), torch.zeros(2).long()), ValueError, r"target must have shape \(2, 3\), got \(2,\)"),
        ((torch.ones(2, 4), torch.tensor([0, 4])), ValueError, "target must hold .* 0 to 3, or -100 for none, got 4"),
        ((torch.ones(2, 4), torch.tensor([-1, 0])), ValueError, "target must hold .* 0 to 3, or -100 for none, got -1"),
        ((torch.ones(2, 4), torch.zeros(2).long(), "tp"), RuntimeError, "group names a process group, but none exists"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=f"^vocab_parallel_cross_entropy: {text}"):
        assert not operator_calls(lambda: vocab_parallel_cross_entropy(*call))


def test_targets_are_looked_at_where_that_is_free_or_asked_for(monkeypatch):
    read = []
    monkeypatch.setattr(module, "on_host", lambda value: False)
    monkeypatch.setattr(module, "in_shard", lambda *args: read.append(args) or pytest.fail("reached a body"))
    monkeypatch.setenv("MINDSPEED_OPS_STRICT", "1")
    with pytest.raises(ValueError, match="got 4"):
        vocab_parallel_cross_entropy(torch.ones(1, 4), torch.tensor([4]))
    monkeypatch.setenv("MINDSPEED_OPS_STRICT", "0")
    with pytest.raises(pytest.fail.Exception):
        vocab_parallel_cross_entropy(torch.ones(1, 4), torch.tensor([4]))


# ---- a vocabulary split over ranks ------------------------------------------------------------------------------------------


def shard_and_whole(world, dtype, columns):
    """This rank's logits and the whole ones; some rows lie in one shard only, one of them is padding (-inf) in all shards but one."""
    generator = torch.Generator().manual_seed(columns)
    whole = (3 * torch.randn(3, 5, columns * world.size, generator=generator)).to(dtype)
    whole[0, 0, columns:] = -torch.inf
    target = torch.randint(0, columns * world.size, (3, 5), generator=generator)
    target[0, 0], target[2, 4] = 1, IGNORED
    return whole[..., world.rank * columns : (world.rank + 1) * columns].contiguous(), whole, target


def assert_equals_one_process(world, body):
    for dtype, columns in ((torch.float32, 16), (torch.bfloat16, 7), (torch.float16, 7), (torch.float64, 2)):
        mine, whole, target = shard_and_whole(world, dtype, columns)
        weights = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
        mine.requires_grad_(), whole.requires_grad_()
        with backends(f"cross_entropy={body}"):
            expected = vocab_parallel_cross_entropy(whole, target)
            expected.backward(weights.to(expected.dtype))
            for group in (world.group, world.group.group_name):
                mine.grad = None
                with counted_collectives() as forward:
                    loss = vocab_parallel_cross_entropy(mine, target, group)
                with counted_collectives() as backward:
                    loss.backward(weights.to(loss.dtype))
                assert forward == ([] if world.size == 1 else ["all_reduce"] * 2) and backward == []
                torch.testing.assert_close(loss, expected)
                here = slice(world.rank * columns, (world.rank + 1) * columns)
                torch.testing.assert_close(mine.grad, whole.grad[..., here])


@ranks(1)
def test_world_1(world):
    for body in ("auto", "ref"):
        assert_equals_one_process(world, body)


@ranks(2)
def test_world_2(world):
    for body in ("auto", "ref"):
        assert_equals_one_process(world, body)


@ranks(4)
def test_world_4(world):
    for body in ("auto", "ref"):
        assert_equals_one_process(world, body)


@ranks(2)
def test_numbers_sent(world):
    """One for the maximum and two for the sum and the target's logit, for each row; nothing of the vocabulary's size."""
    sent, reduce = [], dist.all_reduce
    mine, _, target = shard_and_whole(world, torch.bfloat16, 100)

    def watched(tensor, *args, **kwargs):
        sent.append((tensor.numel(), tensor.dtype))
        return reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", watched):
        vocab_parallel_cross_entropy(mine.requires_grad_(), target, world.group).sum().backward()
    assert sent == [(15, torch.float32), (30, torch.float32)]


@ranks(2)
def test_nan_of_one_shard_reaches_the_loss_of_all(world):
    mine, _, target = shard_and_whole(world, torch.float32, 6)
    if world.rank == 0:
        mine[1, 1, 3] = float("nan")
    loss = vocab_parallel_cross_entropy(mine, target, world.group)
    assert loss.isnan().nonzero().tolist() == [[1, 1]]


@ranks(2)
def test_targets_beyond_all_shards_and_unknown_groups_are_refused(world):
    mine, _, target = shard_and_whole(world, torch.float32, 6)
    target[1, 2] = 12
    with pytest.raises(ValueError, match="0 to 11, or -100 for none, got 12"):
        vocab_parallel_cross_entropy(mine, target, world.group)
    with pytest.raises(ValueError, match="group must name a process group, got 'nobody'"):
        vocab_parallel_cross_entropy(mine, target, "nobody")


@ranks(2)
def test_traces_with_a_group(world):
    mine, _, target = shard_and_whole(world, torch.float32, 6)
    assert_compiles(lambda x: vocab_parallel_cross_entropy(x, target, world.group), mine.requires_grad_())
