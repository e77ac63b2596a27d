"""Dense attention in float64 for comparison, and inputs that all ranks draw alike."""

import torch

from mindspeed.core.context_parallel.layout import SequenceLayout, take


def draw(length, *, batch=2, heads=4, groups=2, dim=8, value_dim=None, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of the output, [B, heads, S, D], over the whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, dim), (groups, dim), (groups, value_dim or dim), (heads, value_dim or dim))
    return [torch.randn(batch, n, length, d, generator=generator).to(dtype) for n, d in sizes]


def hidden_pairs(layout: SequenceLayout, batch):
    """Boolean [B, 1, S, S], True where hidden, from the meaning of the layout's rules alone."""
    if layout.custom_mask is not None:
        return layout.custom_mask.reshape(-1, 1, layout.length, layout.length).expand(batch, -1, -1, -1)
    row, key = torch.arange(layout.length)[:, None], torch.arange(layout.length)[None, :]
    hidden = torch.zeros(batch, 1, layout.length, layout.length, dtype=torch.bool)
    if layout.future is not None:
        hidden |= key > row + layout.future
    if layout.past is not None:
        hidden |= key < row - layout.past
    for sample, boundaries in enumerate(layout.boundaries or ()):
        document = torch.bucketize(torch.arange(layout.length), torch.tensor(boundaries[1:]), right=True)
        hidden[sample, 0] |= document[:, None] != document[None, :]
    return hidden


def dense(q, k, v, grad_out, layout, scale, bias=None):
    """Output and gradients (out, dq, dk, dv) in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    repeat = q.shape[1] // k.shape[1]
    key, value = (tensor.repeat_interleave(repeat, 1) for tensor in leaves[1:])
    scores = scale * leaves[0] @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.double()
    weights = scores.masked_fill(hidden_pairs(layout, q.shape[0]), float("-inf")).softmax(-1).nan_to_num(0.0)
    out = weights @ value
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())]


def shares(tensors, layout, rank):
    """A rank's part of [B, heads, S, D] tensors, as fresh leaves."""
    index = layout.index(rank)
    parts = []
    for tensor in tensors:
        batch_first = tensor.transpose(1, 2)
        part = take(batch_first, index, 1).transpose(1, 2).contiguous()
        parts.append(part.requires_grad_())
    return parts


def assert_near(ours, truth, dtype=torch.float32):
    """fp32: max error 1e-5 of the largest entry; bf16: 1e-2 in the Frobenius norm."""
    error = ours.double() - truth.double()
    if dtype == torch.float32:
        assert error.abs().max() <= 1e-5 * max(1.0, truth.abs().max().item()), error.abs().max()
    else:
        assert error.norm() <= 1e-2 * truth.double().norm(), error.norm() / truth.norm()


def assert_parity(attention, layout, rank, *, dtype=torch.float32, scale=0.3, bias=None, **sizes):
    """`attention(q, k, v)` on this rank's share equals dense attention, values and gradients."""
    tensors = draw(layout.length, dtype=dtype, **sizes)
    truth = dense(*tensors, layout, scale, bias)
    q, k, v, grad_out = shares(tensors, layout, rank)
    out = attention(q, k, v)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    expected = shares([tensor.detach() for tensor in truth], layout, rank)
    for ours, true in zip((out.detach(), *gradients), expected, strict=True):
        assert_near(ours, true.detach(), dtype)
