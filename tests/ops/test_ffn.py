import pytest
import torch
import torch.nn.functional as F

from mindspeed.ops.ffn import npu_ffn
from mindspeed.testing.operators import check_operator

PLAIN = {"gelu": F.gelu, "relu": torch.relu, "silu": F.silu, "fastgelu": lambda x: x / (1 + torch.exp(-1.702 * x))}
GATED = {"geglu": F.gelu, "swiglu": F.silu, "reglu": torch.relu}
SLACK = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def gate(x, activation):
    a, b = x.chunk(2, -1)
    return activation(a) * b


@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("name", [*PLAIN, *GATED, "SwiGLU"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_network(name, dtype, bias):
    gated = name.lower() in GATED
    x = torch.randn(2, 3, 8).to(dtype)
    w1, w2 = (torch.randn(8, 20 if gated else 10) / 3).to(dtype), (torch.randn(10, 6) / 3).to(dtype)
    bias_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    b1, b2 = (torch.randn(w.shape[1]).to(bias_dtype) if bias else None for w in (w1, w2))
    y = npu_ffn(x, w1, w2, name, bias1=b1, bias2=b2)
    add = lambda value, b: value if b is None else value + b.double()  # noqa: E731
    hidden = add(x.double() @ w1.double(), b1)
    hidden = gate(hidden, GATED[name.lower()]) if gated else PLAIN[name](hidden)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), add(hidden @ w2.double(), b2), rtol=SLACK[dtype], atol=SLACK[dtype])


@pytest.mark.parametrize("counts", [[2, 1, 3], [0, 6, 0], [6, 0, 0]])
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_experts(counts, form):
    x, w1, w2, b1 = torch.randn(6, 4), torch.randn(3, 4, 5), torch.randn(3, 5, 2), torch.randn(3, 5)
    parts = [
        npu_ffn(rows, w1[e], w2[e], "silu", bias1=b1[e]) if len(rows) else rows.new_zeros(0, 2)
        for e, rows in enumerate(x.split(counts))
    ]
    ends = torch.tensor(counts).cumsum(0).tolist()
    torch.testing.assert_close(npu_ffn(x, w1, w2, "silu", bias1=b1, expert_tokens=form(counts)), torch.cat(parts))
    torch.testing.assert_close(npu_ffn(x, w1, w2, "silu", bias1=b1, expert_tokens_index=form(ends)), torch.cat(parts))
    torch.testing.assert_close(
        torch.ops.mindspeed.npu_ffn(x, w1, w2, "silu", bias1=b1, expert_tokens_index=ends), torch.cat(parts)
    )


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
def test_integer_form(dtype, experts):
    shape = (2,) if experts else ()
    integers = lambda *s: torch.randint(-20, 20, s, dtype=torch.int8)  # noqa: E731
    x, w1, w2 = integers(5, 8), integers(*shape, 8, 6), integers(*shape, 6, 4)
    b1, b2 = (torch.randint(-50, 50, (*shape, n), dtype=torch.int32) for n in (6, 4))
    deq1, deq2 = torch.rand(*shape, 6) / 100, torch.rand(*shape, 4) / 100
    scale, offset = torch.tensor([7.0, 5.0] if experts else [7.0]), torch.tensor([1.0, 2.0] if experts else [1.0])
    options = {"expert_tokens": [2, 3]} if experts else {}
    y = npu_ffn(
        x,
        w1,
        w2,
        "relu",
        bias1=b1,
        bias2=b2,
        deq_scale1=deq1,
        deq_scale2=deq2,
        scale=scale,
        offset=offset,
        output_dtype=dtype,
        **options,
    )
    parts = []
    for e, rows in enumerate(x.split([2, 3]) if experts else [x]):
        pick = (lambda t, e=e: t[e].double()) if experts else (lambda t: t.double())
        hidden = torch.relu((rows.double() @ pick(w1) + pick(b1)) * pick(deq1)) * pick(scale) + pick(offset)
        hidden = hidden.round().clamp(-128, 127)
        parts.append((hidden @ pick(w2) + pick(b2)) * pick(deq2))
    assert y.dtype == (dtype or torch.float16)
    torch.testing.assert_close(y.double(), torch.cat(parts), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("groups", [None, 2])
def test_integer_weights(groups):
    x = torch.randn(5, 8).half()
    w1, w2 = (torch.randint(-20, 20, s, dtype=torch.int8) for s in ((8, 6), (6, 4)))
    s1, s2 = ((torch.rand(*(() if groups is None else (groups,)), n) / 50).half() for n in (6, 4))
    o1 = torch.randint(-3, 3, s1.shape).half()
    y = npu_ffn(x, w1, w2, "gelu", antiquant_scale1=s1, antiquant_scale2=s2, antiquant_offset1=o1)
    wide = lambda s, rows: s.double() if groups is None else s.double().repeat_interleave(rows // groups, 0)  # noqa: E731
    hidden = F.gelu(x.double() @ ((w1.double() + wide(o1, 8)) * wide(s1, 8)))
    torch.testing.assert_close(y.double(), hidden @ (w2.double() * wide(s2, 6)), rtol=1e-2, atol=1e-2)


def test_operator_is_well_formed():
    torch.library.opcheck(
        torch.ops.mindspeed.ffn.default,
        (torch.randn(5, 4), torch.randn(2, 4, 6), torch.randn(2, 6, 3), "gelu"),
        {"expert_tokens": [2, 3]},
    )
    check_operator(torch.ops.mindspeed.ffn.default, (torch.randn(0, 4), torch.randn(4, 6), torch.randn(6, 3), "relu"))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"activation": "tanh"}, ValueError, "activation must be one of 'fastgelu'"),
        ({"activation": "swiglu"}, ValueError, r"weight2 must have inner size 3, got \(6, 3\)"),
        ({"weight1": torch.ones(5, 6)}, ValueError, "weight1 must have inner size 4"),
        ({"expert_tokens": [5]}, ValueError, "expert_tokens needs weights with experts"),
        ({"scale": torch.ones(1)}, ValueError, "scale is for int8 x"),
        ({"bias1": torch.ones(6).half()}, TypeError, "bias1 must have dtype float32"),
        ({"output_dtype": torch.float16}, ValueError, "output_dtype must be one of None, torch.float32, got torch.float16"),
        ({"x": torch.ones(4)}, ValueError, "x must have 2 to 8 dimensions"),
        ({"activation": None}, ValueError, "activation must be one of 'fastgelu'.*, got None"),
        ({"offset": torch.ones(1)}, ValueError, "offset is for int8 x, got a tensor"),
        ({"antiquant_offset1": torch.ones(6)}, ValueError, "antiquant_offset1 is for float x and int8 weights"),
        ({"weight1": torch.ones(4, 6, device="meta")}, RuntimeError, "weight1 must be on cpu like x, got meta"),
        ({"bias2": torch.ones(2)}, ValueError, r"bias2 must have shape \(3,\), got \(2,\)"),
    ],
)
def test_errors(change, error, text):
    arguments = {"x": torch.ones(5, 4), "weight1": torch.ones(4, 6), "weight2": torch.ones(6, 3), "activation": "relu"} | change
    with pytest.raises(error, match=f"npu_ffn: {text}"):
        npu_ffn(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"deq_scale1": torch.ones(7)}, ValueError, r"deq_scale1 must have shape \(6,\), got \(7,\)"),
        ({"deq_scale2": torch.ones(3).half()}, TypeError, "deq_scale2 must have dtype float32 or bfloat16 or int64 or uint64"),
        ({"deq_scale2": None}, ValueError, "deq_scale2 is for int8 x, got None"),
        ({"scale": torch.ones(5)}, ValueError, r"scale must have shape \(1,\) or \(6,\), got \(5,\)"),
        ({"offset": torch.ones(2)}, ValueError, r"offset must have shape \(1,\) or \(6,\), got \(2,\)"),
    ],
)
def test_errors_of_the_integer_form(change, error, text):
    int8 = lambda *shape: torch.ones(shape, dtype=torch.int8)  # noqa: E731
    arguments = {"x": int8(5, 4), "weight1": int8(4, 6), "weight2": int8(6, 3), "activation": "relu", "scale": torch.ones(1)}
    with pytest.raises(error, match=f"npu_ffn: {text}"):
        npu_ffn(**(arguments | {"deq_scale1": torch.ones(6), "deq_scale2": torch.ones(3)} | change))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"antiquant_scale1": torch.ones(7)}, ValueError, r"antiquant_scale1 must have shape \(6,\) or \(1, 6\), got \(7,\)"),
        ({"antiquant_scale1": torch.ones(5, 6)}, ValueError, "antiquant_scale1 must have at most 4 groups, got 5"),
        ({"antiquant_scale2": torch.ones(3).half()}, TypeError, "antiquant_scale2 must have dtype float32, got float16"),
        ({"antiquant_offset2": torch.ones(2, 3)}, ValueError, r"antiquant_offset2 must have shape \(3,\), got \(2, 3\)"),
        ({"antiquant_scale2": None}, ValueError, "antiquant_scale2 is for float x and int8 weights, got None"),
    ],
)
def test_errors_of_integer_weights(change, error, text):
    int8 = lambda *shape: torch.ones(shape, dtype=torch.int8)  # noqa: E731
    arguments = {"x": torch.ones(5, 4), "weight1": int8(4, 6), "weight2": int8(6, 3), "activation": "relu"}
    with pytest.raises(error, match=f"npu_ffn: {text}"):
        npu_ffn(**(arguments | {"antiquant_scale1": torch.ones(6), "antiquant_scale2": torch.ones(3)} | change))


def test_errors_with_experts():
    x, w1, w2 = torch.ones(5, 4), torch.ones(2, 4, 6), torch.ones(2, 6, 3)
    for options, text in (
        ({}, "expert_tokens must be given with experts"),
        ({"expert_tokens": [2, 3], "expert_tokens_index": [2, 5]}, "expert_tokens excludes expert_tokens_index"),
        ({"expert_tokens": [2, 2]}, "expert_tokens must count all 5 rows"),
        ({"expert_tokens_index": [3, 2]}, "do not decrease"),
        ({"expert_tokens": [5]}, "must have 2 entries"),
    ):
        with pytest.raises(ValueError, match=text):
            npu_ffn(x, w1, w2, "relu", **options)
    with pytest.raises(TypeError, match="expert_tokens must have dtype int32 or int64, got float32"):
        npu_ffn(x, w1, w2, "relu", expert_tokens=torch.tensor([2.0, 3.0]))
    with pytest.raises(RuntimeError, match="has no derivative"):
        npu_ffn(x.requires_grad_(), w1, w2, "relu", expert_tokens=[2, 3])
