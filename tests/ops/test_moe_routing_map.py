import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.ops.moe_routing_map import RowMap, permute, unpermute
from mindspeed.testing.operators import assert_compiles, assert_operator_accurate, check_operator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def routing(kind, tokens=9, experts=4):
    if kind == "top 2":
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, torch.rand(tokens, experts).topk(2).indices, True)
    if kind == "uneven":
        return torch.rand(tokens, experts) < 0.4
    if kind == "one expert":
        return torch.arange(experts).eq(2).expand(tokens, experts).contiguous()
    return torch.ones(tokens, experts, dtype=torch.bool)


def slots(routing_map, capacity=None):
    """(token, expert) of each permuted row."""
    found = []
    for expert in range(routing_map.shape[1]):
        chosen = [t for t in range(len(routing_map)) if routing_map[t, expert]]
        if capacity is not None:
            others = [t for t in range(len(routing_map)) if not routing_map[t, expert]]
            chosen = (chosen + others)[:capacity]
        found += [(t, expert) for t in chosen]
    return found


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["top 2", "uneven", "one expert", "all"])
@pytest.mark.parametrize("capacity", [None, 3, 20])
def test_there_and_back(kind, dtype, capacity, body):
    routing_map = routing(kind)
    rows = slots(routing_map, capacity)
    tokens, probs = torch.randn(9, 6).to(dtype).requires_grad_(), torch.rand(9, 4).to(dtype).requires_grad_()
    count = None if capacity is None else capacity * 4

    def go(tokens, probs):
        permuted, permuted_probs, _ = permute(tokens, routing_map, probs, count, capacity is not None)
        return permuted, permuted_probs

    def go_textbook(tokens, probs):
        return torch.stack([tokens[t] for t, _ in rows]), torch.stack([probs[t, e] for t, e in rows])

    row_map = permute(tokens, routing_map, None, count, capacity is not None)[2]
    permuted = torch.randn(len(rows), 6).to(dtype).requires_grad_()

    def back_textbook(permuted, probs):
        out = [permuted.new_zeros(6)] * 9
        for row, (t, e) in enumerate(rows):
            out[t] = out[t] + permuted[row] * probs[t, e]
        return torch.stack(out)

    with backends(f"moe_token_permute={body}"):
        assert_operator_accurate(go, go_textbook, tokens, probs)
        assert_operator_accurate(lambda x, p: unpermute(x, row_map, (9, 6), p), back_textbook, permuted, probs)
        assert_operator_accurate(
            lambda x: unpermute(x, row_map, (9, 6)), lambda x: back_textbook(x, torch.ones(9, 4, dtype=x.dtype)), permuted
        )


def test_fewer_rows_than_routed_drop_the_last_experts():
    routing_map = routing("all", tokens=3)
    tokens = torch.arange(3.0).unsqueeze(1)
    permuted, _, row_map = permute(tokens, routing_map, num_out_tokens=5)
    assert permuted.flatten().tolist() == [0, 1, 2, 0, 1]
    assert unpermute(permuted, row_map, (3, 1)).flatten().tolist() == [0, 2, 2]


def test_gradient_of_the_tokens_alone():
    routing_map = routing("top 2")
    tokens = torch.randn(9, 6, requires_grad=True)
    permuted, none, _ = permute(tokens, routing_map, num_out_tokens=18)
    permuted.sum().backward()
    assert none is None
    torch.testing.assert_close(tokens.grad, torch.full((9, 6), 2.0))


def test_gradient_of_the_probabilities_alone():
    routing_map = routing("top 2")
    tokens, probs = torch.randn(9, 6, requires_grad=True), torch.rand(9, 4, requires_grad=True)
    permute(tokens, routing_map, probs, 18)[1].sum().backward()
    torch.testing.assert_close(probs.grad, routing_map.float())
    torch.testing.assert_close(tokens.grad, torch.zeros(9, 6))


def test_operators_are_well_formed_and_trace():
    routing_map, tokens, probs = routing("top 2"), torch.randn(9, 6), torch.rand(9, 4)
    ops = torch.ops.mindspeed
    check_operator(
        ops.moe_permute_map.default,
        (tokens, routing_map, None, 18, False),
        (tokens.clone().requires_grad_(), routing_map, probs.clone().requires_grad_(), 12, True),
        (tokens.bfloat16(), routing_map, probs, 18, False),
        (tokens[:0], routing_map[:0], probs[:0], 0, False),
    )
    row_map = permute(tokens, routing_map)[2].tensor
    check_operator(ops.moe_permute_map_backward.default, (torch.randn(18, 6), torch.rand(18), row_map))
    assert_compiles(lambda t: permute(t, routing_map, num_out_tokens=18)[0], tokens.requires_grad_())


def test_more_rows_than_routed_pairs(monkeypatch):
    routing_map, tokens = torch.eye(3, dtype=torch.bool), torch.arange(1.0, 4.0).unsqueeze(1)
    permuted, _, row_map = permute(tokens, routing_map, num_out_tokens=5)
    assert torch.equal(row_map.tensor, torch.tensor([[0, -1, -1], [-1, 1, -1], [-1, -1, 2]], dtype=torch.int32))
    assert torch.equal(unpermute(permuted, row_map, (3, 1)), tokens)
    with pytest.raises(ValueError, match="num_out_tokens must be at most 9 pairs, got 10"):
        permute(tokens, routing_map, num_out_tokens=10)
    with pytest.raises(ValueError, match="num_out_tokens must not be negative, got -1"):
        permute(tokens, routing_map, num_out_tokens=-1)
    monkeypatch.setenv("MINDSPEED_OPS_STRICT", "1")
    with pytest.raises(ValueError, match="num_out_tokens must be at most 3 routed pairs, got 5"):
        permute(tokens, routing_map, num_out_tokens=5)


def test_maps_of_another_origin_and_wrong_shapes_are_refused():
    routing_map, tokens = routing("top 2"), torch.randn(9, 6)
    permuted, _, row_map = permute(tokens, routing_map)
    with pytest.raises(TypeError, match="row_map must be a RowMap of destination rows .*, got Tensor"):
        unpermute(permuted, row_map.tensor, (9, 6))
    with pytest.raises(TypeError, match="got source"):
        unpermute(permuted, RowMap("source", row_map.tensor), (9, 6))
    with pytest.raises(ValueError, match=r"restore_shape must be \(9, 6\), got \(8, 6\)"):
        unpermute(permuted, row_map, (8, 6))
    with pytest.raises(ValueError, match="routing_map must have 9 rows"):
        permute(tokens, routing_map[:5])
    with pytest.raises(ValueError, match=r"probs must have shape \(9, 4\)"):
        permute(tokens, routing_map, torch.rand(9, 3))
