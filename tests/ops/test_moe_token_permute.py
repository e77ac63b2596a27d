import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator, kept_bytes, operator_calls

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUTES = {
    "top 2 of 5": torch.tensor([[0, 3], [4, 0], [1, 2], [3, 0], [2, 1], [0, 4], [3, 2]]),
    "top 1": torch.tensor([2, 0, 1, 1, 0, 2, 2]),
    "all experts": torch.tensor([[1, 0, 2]] * 7),
    "one expert": torch.zeros(7, 1, dtype=torch.int64),
}


def textbook_permute(indices, count):
    copies = indices.numel() // len(indices)
    order = sorted(range(indices.numel()), key=lambda flat: (int(indices.flatten()[flat]), flat))
    return lambda tokens: torch.stack([tokens[flat // copies] for flat in order[:count]])


def textbook_unpermute(sorted_indices, rows):
    def form(permuted, probs=None):
        weights = torch.ones(len(sorted_indices), 1, dtype=permuted.dtype) if probs is None else probs
        count, copies = weights.shape
        out = []
        for t in range(count):
            total = permuted.new_zeros(permuted.shape[1])
            for k in range(copies):
                if (row := int(sorted_indices[t * copies + k])) < rows:
                    total = total + weights[t, k] * permuted[row]
            out.append(total)
        return torch.stack(out).to(permuted.dtype)

    return form


def test_worked_example():
    tokens = torch.arange(4.0).unsqueeze(1)
    permuted, sorted_indices = npu_moe_token_permute(tokens, torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0]]))
    assert sorted_indices.tolist() == [0, 4, 5, 1, 2, 6, 7, 3]
    assert sorted_indices.dtype == torch.int32
    assert permuted.flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_out", [None, 0, 5, -2, 1000])
def test_permute_values_and_gradients(route, dtype, num_out, body):
    indices = ROUTES[route]
    total = indices.numel()
    count = {None: total, 0: total, 5: 5, -2: total - 2, 1000: total}[num_out]
    tokens = torch.randn(7, 10).to(dtype).requires_grad_()
    run = lambda tokens: npu_moe_token_permute(tokens, indices, num_out)[0]  # noqa: E731
    with backends(f"moe_token_permute={body}"):
        assert_operator_accurate(run, textbook_permute(indices, count), tokens)


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_out", [None, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_values_and_gradients(route, dtype, num_out, weighted, body):
    indices = ROUTES[route]
    tokens = torch.randn(7, 10).to(dtype)
    permuted, sorted_indices = npu_moe_token_permute(tokens, indices, num_out)
    permuted.requires_grad_()
    probs = torch.rand(7, indices.numel() // 7).to(dtype).requires_grad_()
    textbook = textbook_unpermute(sorted_indices, len(permuted))
    with backends(f"moe_token_permute={body}"):
        if weighted:
            run = lambda x, p: npu_moe_token_unpermute(x, sorted_indices, p)  # noqa: E731
            assert_operator_accurate(run, textbook, permuted, probs)
        else:
            assert_operator_accurate(lambda x: npu_moe_token_unpermute(x, sorted_indices), textbook, permuted)


def test_float32_probs_with_16_bit_tokens():
    permuted, probs = torch.randn(6, 4).bfloat16().requires_grad_(), torch.rand(3, 2, requires_grad=True)
    sorted_indices = torch.tensor([5, 1, 0, 3, 2, 4], dtype=torch.int32)
    out = npu_moe_token_unpermute(permuted, sorted_indices, probs)
    out.sum().backward()
    assert (out.dtype, permuted.grad.dtype, probs.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = (permuted.detach().double()[sorted_indices.long()].view(3, 2, 4) * probs.double().unsqueeze(2)).sum(1)
    assert torch.equal(out, exact.float().bfloat16())


def test_round_trip_with_probs_that_sum_to_one_is_the_identity():
    tokens = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    probs = torch.softmax(torch.randn(7, 2, dtype=torch.float64), 1).requires_grad_()

    def there_and_back(tokens, probs):
        permuted, sorted_indices = npu_moe_token_permute(tokens, ROUTES["top 2 of 5"])
        return npu_moe_token_unpermute(permuted, sorted_indices, probs)

    torch.testing.assert_close(there_and_back(tokens, probs), tokens)
    torch.autograd.gradcheck(there_and_back, (tokens, probs))


def test_dropped_rows_of_nonfinite_tokens_do_not_leak():
    permuted, sorted_indices = npu_moe_token_permute(torch.randn(7, 4), ROUTES["top 2 of 5"], 5)
    permuted[0] = float("inf")
    rows = sorted_indices.view(7, 2)
    out = npu_moe_token_unpermute(permuted, sorted_indices, torch.rand(7, 2))
    assert out[~(rows == 0).any(1)].isfinite().all()


def test_operators_are_well_formed_and_trace():
    ops = torch.ops.mindspeed
    tokens, indices = torch.randn(7, 4), ROUTES["top 2 of 5"]
    row_map = npu_moe_token_permute(tokens, indices)[1].view(7, 2)
    permuted, probs = torch.randn(14, 4), torch.rand(7, 2)
    check_operator(
        ops.moe_token_permute.default,
        (tokens, indices, 14),
        (tokens.bfloat16().requires_grad_(), indices, 9),
        (tokens[:0], indices[:0], 0),
    )
    check_operator(ops.moe_token_permute_backward.default, (permuted, row_map))
    check_operator(
        ops.moe_token_unpermute.default,
        (permuted, row_map, None),
        (permuted.clone().requires_grad_(), row_map, probs.clone().requires_grad_()),
        (permuted[:0], row_map[:0], probs[:0]),
    )
    check_operator(
        ops.moe_token_unpermute_backward.default, (tokens, permuted, row_map, probs, 14), (tokens, None, row_map, None, 9)
    )
    assert_compiles(
        lambda t, p: npu_moe_token_unpermute(*npu_moe_token_permute(t, indices), p),
        tokens.requires_grad_(),
        probs.requires_grad_(),
    )


def test_what_is_kept_and_called():
    tokens, indices = torch.randn(7, 4, requires_grad=True), ROUTES["top 2 of 5"]
    assert kept_bytes(lambda: npu_moe_token_permute(tokens, indices)) == 14 * 4
    permuted, sorted_indices = npu_moe_token_permute(tokens, indices)
    probs = torch.rand(7, 2)
    assert kept_bytes(lambda: npu_moe_token_unpermute(permuted, sorted_indices, probs)) == 2 * 14 * 4
    probs.requires_grad_()
    assert kept_bytes(lambda: npu_moe_token_unpermute(permuted, sorted_indices, probs)) == 2 * 14 * 4 + 14 * 4 * 4
    calls = operator_calls(lambda: npu_moe_token_permute(tokens, indices)[0].sum().backward())
    assert calls == {"moe_token_permute": 1, "moe_token_permute_backward": 1}


def test_no_tokens():
    tokens = torch.randn(0, 4, requires_grad=True)
    permuted, sorted_indices = npu_moe_token_permute(tokens, torch.zeros(0, 2, dtype=torch.int64))
    out = npu_moe_token_unpermute(permuted, sorted_indices, torch.rand(0, 2))
    out.sum().backward()
    assert out.shape == (0, 4) and tokens.grad.shape == (0, 4)


def test_errors(monkeypatch):
    tokens, indices = torch.randn(4, 3), torch.tensor([[0, 1]] * 4)
    with pytest.raises(NotImplementedError, match="padded_mode"):
        npu_moe_token_permute(tokens, indices, padded_mode=True)
    with pytest.raises(TypeError, match="indices must have dtype int32 or int64, got float32"):
        npu_moe_token_permute(tokens, indices.float())
    with pytest.raises(ValueError, match="indices must have 4 rows"):
        npu_moe_token_permute(tokens, indices[:3])
    with pytest.raises(ValueError, match="num_out_tokens must leave at least 0 of 8 rows, got -9"):
        npu_moe_token_permute(tokens, indices, -9)
    permuted, sorted_indices = npu_moe_token_permute(tokens, indices)
    with pytest.raises(TypeError, match="sorted_indices must have dtype int32, got int64"):
        npu_moe_token_unpermute(permuted, sorted_indices.long())
    with pytest.raises(ValueError, match="probs must have 8 elements"):
        npu_moe_token_unpermute(permuted, sorted_indices, torch.rand(4, 3))
    with pytest.raises(NotImplementedError, match="padded_mode"):
        npu_moe_token_unpermute(permuted, sorted_indices, padded_mode=True)
    monkeypatch.setenv("MINDSPEED_OPS_STRICT", "1")
    for wrong in ([0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 8], [-1, 1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(ValueError, match=r"sorted_indices must hold each of 0..7 once, got"):
            npu_moe_token_unpermute(permuted, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="indices must not be negative, got -1"):
        npu_moe_token_permute(tokens, torch.tensor([[0, -1]] * 4))
