import itertools
import math

import pytest
import torch

from mindspeed.ops._registry import backend_report, backends
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention as attention
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention_grad as attention_grad
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator, kept_bytes, operator_calls

BODIES = ["auto", "ref"]
CAUSAL_PATTERN = torch.ones(8, 8, dtype=torch.bool).triu(1)  # modes 2 to 8 look at the mode, not at the values


def rule(mode, i, j, sq, sk, b, pre, nxt, prefix, mask, h):
    """Whether key j is excluded for query i, straight from the table of modes."""
    shift = sk - sq
    if mode == 0:
        return bool(mask[b, h, i, j]) or j - i > nxt or i - j > pre
    if mode == 1:
        return bool(mask[b, h, i, j])
    if mode == 2:
        return j > i
    if mode == 3:
        return j - i > shift
    if mode == 4:
        return j - i > shift + nxt or j - i < shift - pre
    return j - i > shift and j >= prefix[b]


def textbook(q, k, v, scale, excluded=None, pse=None, pse_type=1):
    """Dense attention, [B, N, S, D]; rows that see nothing give 0. Also returns the log-sum-exp."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.transpose(-1, -2)
    if pse is None:
        s = s * scale
    else:
        s = (s + pse) * scale if pse_type == 1 else s * scale + pse
    if excluded is None:
        return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)
    s = s.masked_fill(excluded, float("-inf"))
    seen = ~excluded.all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~seen, 0.0), -1) * seen
    return p @ v, torch.logsumexp(s, -1)


def expand_mask(mode, b, n, sq, sk, pre=100, nxt=100, prefix=None, mask=None):
    full = torch.zeros(b, n, sq, sk, dtype=torch.bool)
    mask = torch.zeros(1, dtype=torch.bool).expand(b, n, sq, sk) if mask is None else mask.bool().expand(b, n, sq, sk)
    for bb, h, i, j in itertools.product(range(b), range(n), range(sq), range(sk)):
        full[bb, h, i, j] = rule(mode, i, j, sq, sk, bb, pre, nxt, prefix, mask, h)
    return full


def pack(t, layout):
    """From [B, N, S, D] to a layout."""
    if layout == "BNSD":
        return t
    if layout == "BSND":
        return t.transpose(1, 2)
    if layout == "BSH":
        return t.transpose(1, 2).flatten(2)
    return t.permute(2, 0, 1, 3).flatten(2)


def heads(b=2, n=4, nkv=2, sq=5, sk=7, d=8, dtype=torch.float32, dv=None):
    shapes = ((b, n, sq, d), (b, nkv, sk, d), (b, nkv, sk, dv or d))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "bnsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nkv", [1, 2, 4])
def test_layouts_values_and_gradients(layout, dtype, nkv, body):
    q, k, v = heads(nkv=nkv, dtype=dtype)
    run = lambda q, k, v: attention(*(pack(t, layout.upper()) for t in (q, k, v)), 4, layout, scale=0.3)[0]  # noqa: E731
    with backends(f"fusion_attention={body}"):
        assert_operator_accurate(run, lambda q, k, v: pack(textbook(q, k, v, 0.3)[0], layout.upper()), q, k, v)


MODES = [
    (0, {"pre_tokens": 2, "next_tokens": 1}),
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (4, {"pre_tokens": 2, "next_tokens": 1}),
    (4, {"pre_tokens": 3, "next_tokens": -1}),
    (5, {"prefix": [2, 4]}),
    (6, {"prefix": [0, 7]}),
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("mode", "options"), MODES)
@pytest.mark.parametrize(("sq", "sk"), [(5, 7), (7, 5), (6, 6)])
def test_sparse_modes(mode, options, sq, sk, body):
    q, k, v = heads(sq=sq, sk=sk)
    mask = torch.rand(2, 1, sq, sk) < 0.4 if mode in (0, 1) else CAUSAL_PATTERN
    excluded = expand_mask(
        mode,
        2,
        4,
        sq,
        sk,
        options.get("pre_tokens", 100),
        options.get("next_tokens", 100),
        options.get("prefix"),
        mask if mode < 2 else None,
    )
    run = lambda q, k, v: attention(q, k, v, 4, "BNSD", scale=0.3, atten_mask=mask, sparse_mode=mode, **options)  # noqa: E731
    with backends(f"fusion_attention={body}"):
        assert_operator_accurate(lambda *a: run(*a)[0], lambda *a: textbook(*a, 0.3, excluded)[0], q, k, v)
        _, top, total, *_ = run(q, k, v)
    lse = textbook(q, k, v, 0.3, excluded)[1]
    assert top.shape == total.shape == (2, 4, sq, 8)
    torch.testing.assert_close((top + total.log()).detach(), lse.detach().unsqueeze(-1).expand(2, 4, sq, 8))


@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_mask_shapes(shape, dtype):
    q, k, v = heads()
    mask = (torch.rand(shape) < 0.5).to(dtype)
    out = attention(q, k, v, 4, "BNSD", atten_mask=mask)[0]
    torch.testing.assert_close(out, textbook(q, k, v, 1.0, mask.bool().expand(2, 4, 5, 7))[0])


def test_without_a_mask_the_mode_is_ignored():
    q, k, v = heads()
    out = attention(q, k, v, 4, "BNSD", sparse_mode=3, pre_tokens=1, next_tokens=0)[0]
    torch.testing.assert_close(out, textbook(q, k, v, 1.0)[0])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing(dtype, body):
    q, k, v = heads(sq=7, sk=4, dtype=dtype)
    with backends(f"fusion_attention={body}"):
        out, top, total, *_ = attention(q, k, v, 4, "BNSD", atten_mask=CAUSAL_PATTERN, sparse_mode=3)
        out.square().sum().backward()
    assert torch.equal(out[:, :, :3], torch.zeros(2, 4, 3, 8, dtype=dtype))
    assert (top[:, :, :3] == float("-inf")).all() and (total[:, :, :3] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert (q.grad[:, :, :3] == 0).all()


def tnd(lengths, n, d):
    """Packed tokens and their cumulative ends."""
    ends = list(itertools.accumulate(lengths))
    return torch.randn(ends[-1], n, d).requires_grad_(), ends


def by_sequence(form, q, k, v, q_ends, k_ends):
    parts, start_q, start_k = [], 0, 0
    for index, (end_q, end_k) in enumerate(zip(q_ends, k_ends, strict=True)):
        part = (
            t[start:end].transpose(0, 1).unsqueeze(0)
            for t, start, end in ((q, start_q, end_q), (k, start_k, end_k), (v, start_k, end_k))
        )
        parts.append(
            form(index, *part)
            if end_q > start_q
            else (q.new_zeros(1, q.shape[1], 0, v.shape[2]), q.new_zeros(1, q.shape[1], 0))
        )
        start_q, start_k = end_q, end_k
    return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), [lse[0] for _, lse in parts]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("mode", [None, 2, 3, 4, 7, 8])
def test_packed_sequences(mode, body):
    lengths_q, lengths_k = [3, 0, 5, 2], [4, 0, 3, 2]
    q, q_ends = tnd(lengths_q, 4, 8)
    k, k_ends = tnd(lengths_k, 2, 8)
    v = torch.randn_like(k).requires_grad_()

    def form(index, q, k, v):
        if mode is None:
            return textbook(q, k, v, 0.3)
        own = mode
        if mode == 7:
            own = 4 if index == 3 else 3
        if mode == 8:
            own = 4 if index == 0 else 2
        return textbook(q, k, v, 0.3, expand_mask(own, 1, 4, q.shape[2], k.shape[2], pre=1, nxt=0))

    options = {} if mode is None else {"atten_mask": CAUSAL_PATTERN, "sparse_mode": mode, "pre_tokens": 1, "next_tokens": 0}
    run = lambda q, k, v: attention(  # noqa: E731
        q, k, v, 4, "TND", scale=0.3, actual_seq_qlen=[*q_ends, 0], actual_seq_kvlen=[*k_ends, 0], **options
    )
    with backends(f"fusion_attention={body}"):
        assert_operator_accurate(lambda *a: run(*a)[0], lambda *a: by_sequence(form, *a, q_ends, k_ends)[0], q, k, v)
        _, top, total, *_ = run(q, k, v)
    # the statistics of each sequence lie together as [N, s, 8]
    lse = torch.cat([part.flatten() for part in by_sequence(form, q, k, v, q_ends, k_ends)[1]])
    torch.testing.assert_close((top + total.log()).detach().reshape(-1, 8)[:, 3], lse.detach())


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("pse_type", [0, 1])
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 5, 7), (2, 4, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_bias_and_its_gradient(pse_type, shape, dtype, body):
    q, k, v = heads(dtype=dtype)
    pse = torch.randn(shape).to(dtype).requires_grad_()
    run = lambda q, k, v, pse: attention(q, k, v, 4, "BNSD", pse=pse, pse_type=pse_type, scale=0.3)[0]  # noqa: E731
    with backends(f"fusion_attention={body}"):
        assert_operator_accurate(run, lambda q, k, v, p: textbook(q, k, v, 0.3, None, p, pse_type)[0], q, k, v, pse)
        run(*(t.detach() for t in (q, k, v, pse)))  # the forward alone takes the flash kernel
    assert backend_report("cpu")["fusion_attention"].kernel == ("aten" if body == "auto" else "ref")


@pytest.mark.parametrize("pse_type", [2, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_slopes(pse_type, batched):
    q, k, v = heads()
    slopes = torch.rand(2, 4) if batched else torch.rand(4)
    distance = (torch.arange(7) + 3 - torch.arange(5).unsqueeze(1) - 2).abs().float()
    pse = -slopes.view(-1, 4, 1, 1) * (distance.sqrt() if pse_type == 3 else distance)
    out = attention(q, k, v, 4, "BNSD", pse=slopes, pse_type=pse_type, scale=0.3, q_start_idx=[2], kv_start_idx=[3])[0]
    torch.testing.assert_close(out, textbook(q, k, v, 0.3, None, pse, 0)[0])


@pytest.mark.parametrize("body", BODIES)
def test_compressed_bias_repeats_its_diagonals(body):
    size = 1100
    q, k, v = (torch.randn(1, 1, size, 4) for _ in range(3))
    full = -(torch.arange(size) - torch.arange(size).unsqueeze(1)).abs().float().view(1, 1, size, size) / 50
    arguments = {"atten_mask": CAUSAL_PATTERN, "sparse_mode": 2, "scale": 0.5}
    with backends(f"fusion_attention={body}"):
        out = attention(q, k, v, 1, "BNSD", pse=full[:, :, -1024:].contiguous(), **arguments)[0]
    torch.testing.assert_close(out, attention(q, k, v, 1, "BNSD", pse=full, **arguments)[0])


def test_gradient_of_a_compressed_bias():
    q, k, v = (torch.randn(1, 1, 1030, 2) for _ in range(3))
    short = torch.randn(1, 1, 1024, 1030, requires_grad=True)
    arguments = {"atten_mask": CAUSAL_PATTERN, "sparse_mode": 2}
    out = attention(q, k, v, 1, "BNSD", pse=short, **arguments)[0]
    dout = torch.randn_like(out)
    out.backward(dout)
    rows = torch.arange(1030)
    own = (rows - 6).clamp(min=0).unsqueeze(1)
    column = (rows + (own - (rows - 6).unsqueeze(1))).clamp(max=1029)
    leaf = short.detach().requires_grad_()
    full = leaf[0, 0][own.expand(1030, 1030), column].view(1, 1, 1030, 1030)
    textbook(q, k, v, 1.0, torch.ones(1030, 1030, dtype=torch.bool).triu(1), full, 1)[0].backward(dout)
    torch.testing.assert_close(short.grad, leaf.grad)


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


def test_value_heads_may_be_smaller():
    q, k, v = heads(dv=4)
    assert_operator_accurate(lambda *a: attention(*a, 4, "BNSD", scale=0.3)[0], lambda *a: textbook(*a, 0.3)[0], q, k, v)
    assert backend_report("cpu")["fusion_attention"].reason.startswith("aten's flash attention on CPU wants equal head sizes")


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
