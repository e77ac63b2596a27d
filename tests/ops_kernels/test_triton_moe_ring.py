"""Token permutation, chunk sorting and ring update in Triton, under the interpreter, against the definitions."""

from __future__ import annotations

import pytest
import torch

from mindspeed.testing.triton_interpreter import triton_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def ran_triton(*names):
    from mindspeed.ops import backend_report

    report = backend_report(torch.get_default_device().type)
    assert {name: report[name].kernel for name in names} == dict.fromkeys(names, "triton"), report


@triton_interpreter("moe_token_permute=triton")
@pytest.mark.parametrize("num_out", [None, 13, -4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_and_unpermute(dtype, num_out):
    from mindspeed.ops._moe import _permute, gathered_sum
    from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
    from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
    from mindspeed.testing.operators import assert_operator_accurate

    indices = torch.randint(0, 5, (9, 2))
    count = {None: 18, 13: 13, -4: 14}[num_out]
    tokens, probs = normal(9, 33, dtype=dtype), normal(9, 2)
    assert_operator_accurate(
        lambda x: npu_moe_token_permute(x, indices, num_out)[0], lambda x: _permute(x, indices, count)[0], tokens
    )
    permuted, order = npu_moe_token_permute(tokens.detach(), indices, num_out)
    assert torch.equal(order, _permute(tokens.detach(), indices, count)[1])
    assert_operator_accurate(
        lambda x, p: npu_moe_token_unpermute(x, order, p),
        lambda x, p: gathered_sum(x, order.view(9, 2), p),
        permuted.requires_grad_(),
        probs,
    )
    ran_triton("moe_token_permute", "moe_token_permute_backward", "moe_token_unpermute", "moe_token_unpermute_backward")


@triton_interpreter("moe_token_permute=triton")
def test_routing_map_with_tokens_of_different_counts():
    from mindspeed.ops import backends
    from mindspeed.ops.moe_routing_map import permute, unpermute

    routing, tokens, probs = torch.rand(9, 5) < 0.4, normal(9, 33), normal(9, 5)

    def outputs():
        permuted, permuted_probs, row_map = permute(tokens, routing, probs, int(routing.sum()))
        out = unpermute(permuted.sin() * permuted_probs.unsqueeze(1), row_map, (9, 33))
        weighted = unpermute(permuted, row_map, (9, 33), probs)
        return [out, weighted, *torch.autograd.grad((out * weighted).sum(), (tokens, probs))]

    ours = outputs()
    ran_triton("moe_permute_map_backward", "moe_token_unpermute", "moe_token_unpermute_backward")
    with backends("moe_token_permute=ref"):
        torch.testing.assert_close(ours, outputs())


@triton_interpreter("sort_chunks=triton")
@pytest.mark.parametrize("shape", [(12,), (12, 5), (12, 3, 7)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_sort_chunks(dtype, shape):
    from mindspeed.ops.sort_chunks import sort_chunks

    x = (torch.randn(shape) * 10).to(dtype)
    y = sort_chunks(x, torch.tensor([3, 0, 4, 5]), torch.tensor([2, 1, 3, 0]))
    assert torch.equal(y, torch.cat([x[3:7], x[7:], x[:3]]))
    ran_triton("sort_chunks")


@triton_interpreter("sort_chunks=triton")
def test_gradient_of_sort_chunks():
    from mindspeed.ops.sort_chunks import sort_chunks

    x, weights = normal(12, 5), torch.randn(12, 5)
    (sort_chunks(x, torch.tensor([3, 0, 4, 5]), torch.tensor([2, 1, 3, 0])) * weights).sum().backward()
    assert torch.equal(x.grad, torch.cat([weights[9:], weights[:9]]))


@triton_interpreter("ring_attention_update=triton")
@pytest.mark.parametrize("kind", ["SBH", "TND blocks", "TND tokens"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ring_update(dtype, kind):
    from mindspeed.ops import backends
    from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update

    out, stat = ((7, 2, 3 * 20), (2, 3, 7, 8)) if kind == "SBH" else ((14, 3, 20), (14, 3, 8))
    blocks = []
    for _ in range(2):
        top, total = torch.randn(*stat[:-1], 1).expand(stat).clone(), torch.rand(*stat[:-1], 1).expand(stat).clone()
        top[0, 0], total[0, 0] = float("-inf"), 0.0  # rows that see nothing on either side
        blocks += [torch.randn(out).to(dtype), top, total]
    blocks[1][1, 1], blocks[2][1, 1] = float("-inf"), 0.0  # and rows that see nothing on one side
    lengths = [5, 0, 9] if kind == "TND blocks" else None
    options = {"softmax_layout": "TND" if kind == "TND tokens" else ""}
    ours = npu_ring_attention_update(*blocks, lengths, kind[:3], **options)
    ran_triton("ring_attention_update")
    with backends("ring_attention_update=ref"):
        expected = npu_ring_attention_update(*blocks, lengths, kind[:3], **options)
    assert all(torch.isfinite(value).all() for value in (ours[0], ours[2]))
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-6, atol=1e-6)
