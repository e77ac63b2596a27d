"""Values that hold for all operators whose operands, or incoming gradients, share memory between their elements."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops._samples import Sample, all_samples

ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
STATISTICS = ("softmax_max", "softmax_sum")  # must fit to the other operands


def expanded(dim: int) -> Callable[[Tensor], Tensor]:
    """One slice along `dim` in place of all, with stride 0."""
    return lambda value: value.narrow(dim, 0, 1).expand_as(value) if -value.dim() <= dim < value.dim() else value


def sliding(value: Tensor) -> Tensor:
    """A window that moves by one element with every index, so that rows overlap."""
    line = value.reshape(-1)[: sum(size - 1 for size in value.shape) + 1].clone()
    return line.as_strided(value.shape, (1,) * value.dim())


LAYOUTS = {
    "first": expanded(0),
    "second": expanded(1),
    "third": expanded(2),
    "last": expanded(-1),
    "everywhere": lambda value: value.reshape(-1)[:1].view((1,) * value.dim()).expand_as(value),
    "sliding": sliding,
}
LABELS = tuple(all_samples(torch.float32, 2))


def results(sample: Sample, operands: dict[str, Tensor], *, shared: bool) -> list[Tensor]:
    """Outputs and gradients, the incoming gradients being one number with stride 0 (`shared`) or dense."""
    leaves = {name: operands.get(name, sample.arguments[name]).detach().requires_grad_() for name in sample.gradients}
    outputs = sample.run(**(operands | leaves))
    roots = [value for value in outputs if value.requires_grad]
    ones = [torch.ones((), dtype=root.dtype).expand_as(root) for root in roots]
    grads = ones if shared else [one.contiguous() for one in ones]
    found = torch.autograd.grad(roots, list(leaves.values()), grads, allow_unused=True) if roots else ()
    return [value.detach() for value in (*outputs, *found) if value is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", LABELS)
def test_operands_that_overlap_give_what_copies_of_them_give(label, dtype, layout):
    torch.manual_seed(11)
    sample = all_samples(dtype, 40)[label]
    tensors = {name: value for name, value in sample.tensors().items() if name not in (*sample.changes, *STATISTICS)}
    tensors = {name: value for name, value in tensors.items() if value.is_floating_point() or value.dtype == torch.int8}
    assert tensors, "no operand to lay out anew"
    overlapping = {name: LAYOUTS[layout](value) for name, value in tensors.items() if value.dim()}
    for chosen in [*({name: value} for name, value in overlapping.items()), overlapping]:
        copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in chosen.items()}
        ours = results(sample, chosen, shared=True)
        expected = results(sample, copies, shared=False)
        for index, (value, truth) in enumerate(zip(ours, expected, strict=True)):
            rounding = ROUNDING.get(value.dtype, 0.0)
            torch.testing.assert_close(
                value, truth, rtol=rounding, atol=rounding, equal_nan=True, msg=f"result {index} of {list(chosen)}"
            )
