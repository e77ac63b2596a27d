"""Fusion attention: dropout, foreign statistics, empty dimensions, tracing, what is kept, errors."""

import math

import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention as attention
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention_grad as attention_grad
from mindspeed.testing.operators import assert_compiles, check_operator, kept_bytes, operator_calls
from tests.ops._attention_textbook import BODIES, CAUSAL_PATTERN, heads, textbook, tnd


@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_dropout_is_replayed(layout):
    n, sq, sk, keep = 2, 40, 50, 0.7
    q, k = torch.randn(1, n, sq, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, n, sk, 4, dtype=torch.float64)
    v = torch.eye(sk, dtype=torch.float64).expand(1, n, sk, sk)  # the result is P * Z itself
    options = {}
    if layout == "TND":
        q, k, v = (t.detach()[0].transpose(0, 1).contiguous() for t in (q, k, v))
        options = {"actual_seq_qlen": [sq], "actual_seq_kvlen": [sk]}
    q, k, v = (t.requires_grad_() for t in (q, k, v.contiguous()))
    out, top, total, _, seed, offset, numels = attention(q, k, v, n, layout, keep_prob=keep, **options)
    kept = out != 0
    assert abs(kept.double().mean().item() - keep) < 4 * math.sqrt(keep * (1 - keep) / kept.numel())
    assert numels == n * sq * sk
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    again = attention_grad(
        q, k, v, dout, n, layout, softmax_max=top, softmax_sum=total, attention_in=out, keep_prob=keep, seed=seed, offset=offset,
        numels=numels, **options,
    )  # fmt: skip
    torch.testing.assert_close(again[:3], grads)
    as_bnsd = (lambda t: t.transpose(0, 1).unsqueeze(0)) if layout == "TND" else (lambda t: t)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    bq, bk, bv = (as_bnsd(t) for t in leaves)
    expected = (torch.softmax(bq @ bk.transpose(-1, -2), -1) * as_bnsd(kept) / keep) @ bv
    torch.testing.assert_close(as_bnsd(out), expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, as_bnsd(dout)))


@pytest.mark.parametrize("body", BODIES)
def test_backward_with_statistics_of_a_larger_key_set(body):
    q, k, v = heads(n=2, nkv=2, sk=8)
    dout = torch.randn(2, 2, 5, 8)
    with backends(f"fusion_attention={body}"):
        out, top, total, *_ = attention(q, k, v, 2, "BNSD", scale=0.3)
        expected = torch.autograd.grad(out, (q, k, v), dout)
        dq = 0
        for half in (slice(0, 4), slice(4, 8)):
            part = attention_grad(
                q,
                k[:, :, half],
                v[:, :, half],
                dout,
                2,
                "BNSD",
                softmax_max=top,
                softmax_sum=total,
                attention_in=out,
                scale=0.3,
            )
            dq = dq + part[0]
            torch.testing.assert_close(part[1], expected[1][:, :, half])
            torch.testing.assert_close(part[2], expected[2][:, :, half])
            assert part[3] is None
    torch.testing.assert_close(dq, expected[0])


@pytest.mark.parametrize("body", BODIES)
def test_gradcheck(body):
    q, k, v = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with backends(f"fusion_attention={body}"):
        torch.autograd.gradcheck(
            lambda q, k, v: attention(q, k, v, 2, "BNSD", atten_mask=CAUSAL_PATTERN, sparse_mode=2)[0], (q, k, v)
        )


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("b", "sq", "sk"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_dimensions(b, sq, sk, body):
    q, k, v = heads(b=b, sq=sq, sk=sk)
    with backends(f"fusion_attention={body}"):
        out, top, total, *_ = attention(q, k, v, 4, "BNSD")
        out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and (total == 0).all()
    assert all((t.grad == 0).all() for t in (q, k, v))


def test_operator_is_well_formed_and_traces():
    q, k, v = heads(dtype=torch.bfloat16)
    rest = (4, "BNSD", None, CAUSAL_PATTERN, 0.3, 1.0, 100, 100, 0, None, None, None, 3, 1, None, None, None)
    op = torch.ops.mindspeed.fusion_attention.default
    packed = torch.randn(5, 2, 4)
    ends = ([2, 5], [2, 5])
    check_operator(
        op,
        (q, k, v, *rest),
        (
            q.detach().float().transpose(1, 2),
            k.detach().float().transpose(1, 2),
            v.detach().float().transpose(1, 2),
            4,
            "BSND",
            *rest[2:],
        ),
        (
            packed,
            packed.clone(),
            packed.clone(),
            2,
            "TND",
            None,
            None,
            0.3,
            0.5,
            9,
            9,
            0,
            None,
            *ends,
            0,
            1,
            None,
            None,
            torch.tensor([3, 0]),
        ),
    )
    q, k, v = (t.detach() for t in (q, k, v))
    out, top, total = op(q, k, v, *rest)
    check_operator(torch.ops.mindspeed.fusion_attention_backward.default, (out.clone(), q, k, v, out, top, total, False, *rest))
    assert_compiles(lambda q, k, v: attention(q, k, v, 4, "BNSD", atten_mask=CAUSAL_PATTERN, sparse_mode=3)[0], *heads())


def test_keeps_operands_result_and_statistics_but_nothing_quadratic():
    size = 64
    q, k, v = heads(b=1, n=2, nkv=2, sq=size, sk=size, d=16)
    expected = 4 * 2 * size * 16 * 4 + 2 * 2 * size * 8 * 4
    assert kept_bytes(lambda: attention(q, k, v, 2, "BNSD")) == expected
    assert kept_bytes(lambda: attention(q, k, v, 2, "BNSD", keep_prob=0.9)) == expected + 16
    calls = operator_calls(lambda: attention(q, k, v, 2, "BNSD")[0].sum().backward())
    assert calls == {"fusion_attention": 1, "fusion_attention_backward": 1}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input_layout": "SBND"}, ValueError, "input_layout must be one of 'BSH', 'SBH', 'BSND', 'BNSD', 'TND', got 'SBND'"),
        ({"keep_prob": 0.0}, ValueError, r"keep_prob must lie in \(0, 1\], got 0.0"),
        ({"sparse_mode": 7}, ValueError, "sparse_mode must be one of 0, 1, 2, 3, 4, 5, 6, got 7"),
        ({"pse_type": 4}, ValueError, "pse_type must be one of 0, 1, 2, 3, got 4"),
        ({"padding_mask": torch.ones(1)}, ValueError, "padding_mask must be None"),
        ({"head_num": 3}, ValueError, "query must have 3 heads"),
        ({"input_layout": "TND"}, ValueError, "query must have 3 dimensions"),
        ({"atten_mask": torch.ones(4, 7).bool()}, ValueError, r"atten_mask must be \[Sq, Sk\] or"),
        ({"atten_mask": CAUSAL_PATTERN, "sparse_mode": 5}, ValueError, "prefix must have 2 entries in mode 5 and 6"),
        ({"atten_mask": torch.ones(5, 7)}, TypeError, "atten_mask must have dtype bool or uint8"),
        ({"pse": torch.ones(2, 4, 5, 6)}, ValueError, r"pse must be \[B or 1, N, Sq, 1 or 1024, Sk\]"),
        ({"pse": torch.ones(4).half(), "pse_type": 2}, TypeError, "pse must have dtype float32, got float16"),
        ({"value": torch.ones(2, 4, 7, 8)}, ValueError, "value must have 2 heads like key"),
        ({"key": torch.ones(2, 2, 7, 6)}, ValueError, "key must have the head size of query"),
    ],
)
def test_errors(change, error, text):
    q, k, v = heads()
    arguments = {"query": q, "key": k, "value": v, "head_num": 4, "input_layout": "BNSD"} | change
    with pytest.raises(error, match=f"npu_fusion_attention: {text}"):
        attention(**arguments)


@pytest.mark.parametrize(
    ("q_ends", "k_ends", "text"),
    [
        (None, [5], "actual_seq_qlen must hold cumulative ends for layout TND"),
        ([5], [], "actual_seq_kvlen must hold cumulative ends"),
        ([3, 2], [3, 5], "actual_seq_qlen must rise to at most 5"),
        ([3, 6], [3, 5], "actual_seq_qlen must rise to at most 5"),
        ([3, 5], [5], "actual_seq_kvlen must have 2 entries"),
    ],
)
def test_errors_of_packed_sequences(q_ends, k_ends, text):
    t = torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match=text):
        attention(t, t, t, 2, "TND", actual_seq_qlen=q_ends, actual_seq_kvlen=k_ends)
    with pytest.raises(ValueError, match="pse must be None in sparse modes 7 and 8"):
        attention(t, t, t, 2, "TND", actual_seq_qlen=[5], actual_seq_kvlen=[5], sparse_mode=7, pse=torch.ones(1, 2, 5, 5))


def test_packed_sequences_with_dropout_trace():
    q, ends = tnd([3, 0, 2], 2, 4)
    options = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    assert_compiles(lambda q: attention(q, q, q, 2, "TND", keep_prob=0.5, **options)[0], q)


@pytest.mark.parametrize("pse_type", [2, 3])
def test_slopes_get_no_gradient(pse_type):
    q, k, v = heads()
    slopes = torch.rand(4, requires_grad=True)
    attention(q, k, v, 4, "BNSD", pse=slopes, pse_type=pse_type)[0].sum().backward()
    assert slopes.grad is None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("body", BODIES)
def test_gradients_of_some_operands_only(wanted, body):
    operands = [t.detach().requires_grad_(index in wanted) for index, t in enumerate(heads())]
    with backends(f"fusion_attention={body}"):
        out = attention(*operands, 4, "BNSD", scale=0.3)[0]
        dout = torch.randn_like(out)
        out.backward(dout)
    exact = textbook(*(leaves := [t.detach().requires_grad_() for t in operands]), 0.3)[0]
    expected = torch.autograd.grad(exact, leaves, dout)
    for index, operand in enumerate(operands):
        assert (operand.grad is not None) == (index in wanted)
        if index in wanted:
            torch.testing.assert_close(operand.grad, expected[index])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"grad_outputs": None}, TypeError, "grad_outputs must be a tensor, got NoneType"),
        (
            {"grad_outputs": torch.ones(2, 4, 5, 7)},
            ValueError,
            r"grad_outputs must have shape \(2, 4, 5, 8\), got \(2, 4, 5, 7\)",
        ),
        ({"grad_outputs": torch.ones(2, 4, 5, 8).half()}, TypeError, "grad_outputs must have dtype float32, got float16"),
        ({"attention_in": torch.ones(2, 4, 4, 8)}, ValueError, r"attention_in must have shape \(2, 4, 5, 8\)"),
        ({"softmax_max": None}, TypeError, "softmax_max must be a tensor, got NoneType"),
        ({"softmax_sum": torch.ones(2, 4, 5, 1)}, ValueError, r"softmax_sum must have shape \(2, 4, 5, 8\)"),
        (
            {"softmax_max": torch.ones(2, 4, 5, 8).half()},
            TypeError,
            "softmax_max must have dtype float32 or float64, got float16",
        ),
        (
            {"attention_in": torch.ones(2, 4, 5, 8, device="meta")},
            RuntimeError,
            "attention_in must be on cpu like query, got meta",
        ),
        ({"head_num": 3}, ValueError, "query must have 3 heads"),
        ({"input_layout": None}, ValueError, "input_layout must be one of 'BSH'"),
    ],
)
def test_errors_of_the_gradient(change, error, text):
    q, k, v = (t.detach() for t in heads())
    statistics = {"softmax_max": torch.ones(2, 4, 5, 8), "softmax_sum": torch.ones(2, 4, 5, 8)}
    arguments = {"query": q, "key": k, "value": v, "grad_outputs": q, "head_num": 4, "input_layout": "BNSD", "attention_in": q}

    def run():
        with pytest.raises(error, match=f"npu_fusion_attention_grad: {text}"):
            attention_grad(**(arguments | statistics | change))

    assert not operator_calls(run)
