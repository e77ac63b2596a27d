import pytest
import torch

from mindspeed.ops._registry import backend_report, backends
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention as attention
from mindspeed.testing.operators import assert_operator_accurate
from tests.ops._attention_textbook import BODIES, CAUSAL_PATTERN, by_sequence, expand_mask, heads, pack, textbook, tnd


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
@pytest.mark.parametrize("given", ["mask", "slopes", "bias", "prefix"])
def test_packed_sequences_have_entries_of_their_own(given, body):
    """What is given per sample is given per sequence in a packed batch, in the size of the longest sequence."""
    lengths_q, lengths_k, prefix = [3, 0, 5, 2], [4, 0, 3, 2], [3, 0, 1, 0]
    q, q_ends = tnd(lengths_q, 4, 8)
    k, k_ends = tnd(lengths_k, 2, 8)
    v = torch.randn_like(k).requires_grad_()
    mask, slopes, bias = torch.rand(4, 1, 5, 4) < 0.4, torch.rand(4, 4), torch.randn(4, 4, 5, 4).requires_grad_()
    options = {
        "mask": {"atten_mask": mask, "sparse_mode": 1},
        "slopes": {"pse": slopes, "pse_type": 2},
        "bias": {},
        "prefix": {"atten_mask": CAUSAL_PATTERN, "sparse_mode": 6, "prefix": prefix},
    }[given]

    def run(q, k, v, bias):
        own = {"pse": bias, "pse_type": 0} if given == "bias" else options
        return attention(q, k, v, 4, "TND", scale=0.3, actual_seq_qlen=q_ends, actual_seq_kvlen=k_ends, **own)[0]

    def expected(q, k, v, bias):
        def form(index, q, k, v):
            sq, sk = q.shape[2], k.shape[2]
            if given == "mask":
                return textbook(q, k, v, 0.3, mask[index, :, :sq, :sk].unsqueeze(0).expand(1, 4, sq, sk))
            if given == "slopes":
                distance = (torch.arange(sk) - torch.arange(sq)[:, None]).abs()
                return textbook(q, k, v, 0.3, pse=-slopes[index].view(1, 4, 1, 1) * distance, pse_type=2)
            if given == "bias":
                return textbook(q, k, v, 0.3, pse=bias[index, :, :sq, :sk].unsqueeze(0), pse_type=0)
            return textbook(q, k, v, 0.3, expand_mask(6, 1, 4, sq, sk, prefix=[prefix[index]]))

        return by_sequence(form, q, k, v, q_ends, k_ends)[0]

    with backends(f"fusion_attention={body}"):
        if given == "bias":
            assert_operator_accurate(run, expected, q, k, v, bias)
        else:
            assert_operator_accurate(lambda *a: run(*a, bias), lambda *a: expected(*a, bias), q, k, v)


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


def test_value_heads_may_be_smaller():
    q, k, v = heads(dv=4)
    assert_operator_accurate(lambda *a: attention(*a, 4, "BNSD", scale=0.3)[0], lambda *a: textbook(*a, 0.3)[0], q, k, v)
    assert backend_report("cpu")["fusion_attention"].reason.startswith("aten's flash attention on CPU wants equal head sizes")


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 40])
def test_nan_spreads_to_the_rows_that_see_it(size, causal, body):
    q, k, v = (t.detach() for t in heads(sq=size, sk=size))
    q[0, 1, -1, 0] = float("nan")
    options = {"atten_mask": CAUSAL_PATTERN, "sparse_mode": 2} if causal else {}
    with backends(f"fusion_attention={body}"):
        out, top, total, *_ = attention(q, k, v, 4, "BNSD", **options)
    assert out[0, 1, -1].isnan().all() and (top + total.log())[0, 1, -1].isnan().all()
    assert out[1].isfinite().all() and out[0, 0].isfinite().all() and out[0, 1, :-1].isfinite().all()
