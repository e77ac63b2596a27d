import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops._softmax_statistics import block_index
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention as attention
from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update as update
from mindspeed.testing.operators import assert_compiles, check_operator, operator_calls

BODIES = ["auto", "ref"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 600])
def test_merge_of_two_halves_equals_the_whole(dtype, size, body):
    q, k, v = (torch.randn(s, 2, 12).to(dtype) for s in (size, 10, 10))
    whole = attention(q.double(), k.double(), v.double(), 3, "SBH", scale=0.5)
    halves = [attention(q, k[part], v[part], 3, "SBH", scale=0.5)[:3] for part in (slice(0, 4), slice(4, 10))]
    with backends(f"ring_attention_update={body}"):
        out, top, total = update(*halves[0], *halves[1])
    assert out.dtype == dtype and top.shape == (2, 3, size, 8)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), whole[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close((top + total.log()).double(), whole[1] + whole[2].log(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("body", BODIES)
def test_rows_that_see_nothing_on_one_or_both_sides(body):
    out, top, total = torch.randn(3, 1, 4), torch.randn(1, 1, 3, 8), torch.rand(1, 1, 3, 8) + 0.5
    nothing = torch.zeros(3, 1, 4), torch.full((1, 1, 3, 8), float("-inf")), torch.zeros(1, 1, 3, 8)
    with backends(f"ring_attention_update={body}"):
        for merged in (update(out, top, total, *nothing), update(*nothing, out, top, total)):
            torch.testing.assert_close(merged, (out, top, total))
        blind = update(*nothing, *nothing)
    assert all(torch.equal(value, expected) for value, expected in zip(blind, nothing, strict=True))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("lengths", [[3, 0, 4], [7], [2, 3]])
def test_packed_sequences_in_both_arrangements(lengths, body):
    tokens, n, d = 7, 2, 4
    results = [torch.randn(tokens, n, d) for _ in range(2)]
    true = [torch.randn(tokens, n, 1).expand(tokens, n, 8).exp() for _ in range(4)]
    arguments = results[0], true[0].log(), true[1], results[1], true[2].log(), true[3]
    blocked, start = [], 0
    rest = tokens - sum(lengths)
    for value in arguments:
        parts, start = [], 0
        for length in [*lengths, rest]:
            parts.append(value[start : start + length].transpose(0, 1).reshape(-1, 8) if value.shape[-1] == 8 else value)
            start += length
        blocked.append(torch.cat(parts).view(tokens, n, 8) if value.shape[-1] == 8 else value)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    with backends(f"ring_attention_update={body}"):
        expected = update(*arguments, layout="TND", softmax_layout="TND")
        for form in (ends, lengths):
            out, top, total = update(*blocked, form, "TND")
            torch.testing.assert_close(out, expected[0])
            first = torch.cat(
                [s[:, 0] for s in expected[1].split([*lengths, rest]) for s in [s.transpose(0, 1).reshape(-1, 8)]]
            )
            torch.testing.assert_close(top.reshape(-1, 8)[:, 0], first)
    weight = expected[1].exp() * expected[2]
    torch.testing.assert_close(weight, true[0] * true[1] + true[2] * true[3])
    by_hand = (true[0] * true[1] * 1)[..., :1] * results[0] + (true[2] * true[3])[..., :1] * results[1]
    torch.testing.assert_close(expected[0], by_hand / weight[..., :1])


def test_writes_where_it_is_asked_to():
    arguments = [torch.randn(3, 1, 4), torch.randn(1, 1, 3, 8), torch.rand(1, 1, 3, 8)]
    other = [torch.randn(3, 1, 4), torch.randn(1, 1, 3, 8), torch.rand(1, 1, 3, 8)]
    expected = update(*arguments, *other)
    given = tuple(arguments)
    assert update(*arguments, *other, out=given) is given
    torch.testing.assert_close(given, expected)


def test_operator_is_well_formed_and_traces():
    sbh = [torch.randn(3, 2, 4), torch.randn(2, 2, 3, 8), torch.rand(2, 2, 3, 8)]
    packed = [torch.randn(5, 2, 4), torch.randn(5, 2, 8), torch.rand(5, 2, 8)]
    op = torch.ops.mindspeed.ring_attention_update.default
    copies = lambda values: [value.clone() for value in values]  # noqa: E731
    check_operator(
        op,
        (*sbh, *copies(sbh), None, "SBH", ""),
        (sbh[0].bfloat16(), *sbh[1:], sbh[0].bfloat16(), *copies(sbh[1:]), None, "SBH", ""),
        (*packed, *copies(packed), torch.tensor([0, 2, 5]), "TND", ""),
        (*packed, *copies(packed), None, "TND", "TND"),
        (*(value[:0] for value in packed), *(value[:0] for value in packed), None, "TND", "TND"),
    )
    assert_compiles(lambda *a: update(*a), *sbh, *copies(sbh))
    assert operator_calls(lambda: update(*sbh, *copies(sbh))) == {"ring_attention_update": 1}


def test_errors():
    out, top, total = torch.randn(3, 1, 4), torch.randn(1, 2, 3, 8), torch.rand(1, 2, 3, 8)
    with pytest.raises(ValueError, match="layout must be one of 'SBH', 'TND', got 'BSH'"):
        update(out, top, total, out, top, total, layout="BSH")
    with pytest.raises(ValueError, match=r"cur_attn_out must have shape \(3, 1, 4\), got \(2, 1, 4\)"):
        update(out, top, total, out[:2], top, total)
    with pytest.raises(TypeError, match="cur_attn_out must have dtype float32, got float16"):
        update(out, top, total, out.half(), top, total)
    with pytest.raises(ValueError, match=r"prev_softmax_max must have shape \(1, 2, 3, 3\), got \(1, 2, 8, 3\)"):
        update(out, top.transpose(2, 3), total, out, top.transpose(2, 3), total)
    packed, statistics = torch.randn(5, 2, 4), torch.rand(5, 2, 8)
    with pytest.raises(ValueError, match="actual_seq_qlen must be given"):
        update(packed, statistics, statistics, packed, statistics, statistics, layout="TND")
    with pytest.raises(TypeError, match="actual_seq_qlen must have dtype int64, got int32"):
        ends = torch.tensor([0, 5], dtype=torch.int32)
        update(packed, statistics, statistics, packed, statistics, statistics, ends, "TND")


@pytest.mark.parametrize("lengths", [[3, 9], [-2, 4], [7], [0, 0, 0], [2, -1, 9], []])
def test_rows_stay_inside_whatever_the_lengths_on_a_device_say(lengths):
    index = block_index(torch.tensor(lengths, dtype=torch.int64), 5, 3)
    assert sorted(index.flatten().tolist()) == list(range(15))


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([3, 9], ValueError, r"must not count more than the 5 rows, got \[3, 9\]"),
        ([3, -1], ValueError, "must hold sizes that are not negative"),
        ("35", TypeError, "must be a list of int or an int64 tensor, got str"),
        ([2.0, 3.0], TypeError, "must hold integers"),
        (torch.tensor([2, 5]), ValueError, r"must hold cumulative ends with a leading 0, got \[2, 5\]"),
        (torch.tensor([0, 9]), ValueError, "must not count more than the 5 rows"),
        (torch.tensor([0, 4, 3]), ValueError, "must hold cumulative ends that do not decrease"),
        (torch.tensor([0, 5], device="meta"), RuntimeError, "must be on cpu or on the CPU, got meta"),
    ],
)
def test_lists_that_do_not_fit(lengths, error, text):
    out, statistics = torch.randn(5, 2, 4), torch.rand(5, 2, 8)

    def run():
        with pytest.raises(error, match=f"npu_ring_attention_update: actual_seq_qlen {text}"):
            update(out, statistics, statistics, out, statistics, statistics, lengths, "TND")

    assert not operator_calls(run)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda out: out[:2], ValueError, "out must be three tensors, got 2"),
        (lambda out: (out[0][:2], *out[1:]), ValueError, r"out\[0\] must have shape \(3, 1, 4\), got \(2, 1, 4\)"),
        (lambda out: (*out[:2], out[2].half()), TypeError, r"out\[2\] must have dtype float32, got float16"),
        (lambda out: (out[0], out[1].to("meta"), out[2]), RuntimeError, r"out\[1\] must be on cpu"),
    ],
)
def test_targets_that_do_not_fit(change, error, text):
    values = (torch.randn(3, 1, 4), torch.rand(1, 1, 3, 8), torch.rand(1, 1, 3, 8))
    with pytest.raises(error, match=f"npu_ring_attention_update: {text}"):
        update(*values, *values, out=change(values))


def test_statistics_in_half_precision_are_refused():
    out, statistics = torch.randn(3, 1, 4).half(), torch.rand(1, 1, 3, 8).half()
    with pytest.raises(TypeError, match="prev_softmax_max must have dtype float32 or float64, got float16"):
        update(out, statistics, statistics, out, statistics, statistics)
