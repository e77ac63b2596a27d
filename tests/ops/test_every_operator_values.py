"""Values that hold for all operators: bodies agree, NaN spreads, one call each way, double precision gradients."""

import pytest
import torch

from mindspeed.ops._registry import backends
from mindspeed.testing.operators import operator_calls
from tests.ops._samples import Sample, all_samples

LABELS = tuple(all_samples(torch.float32, 2))
DIFFERENTIABLE = tuple(label for label, sample in all_samples(torch.float32, 2).items() if sample.gradients)
UNSEEN = {
    "attention": "its mask excludes some keys",
    "softmax, mask": "its mask excludes some entries",
    "softmax, causal": "the last entry is excluded",
    "permute by map, padded": "drops the last token",
    "ffn, int8": "rounds to integers inside",
}
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-10}


def sample_of(label: str, dtype: torch.dtype = torch.float32, rows: int = 4) -> Sample:
    torch.manual_seed(11)
    return all_samples(dtype, rows)[label]


def values_and_gradients(sample: Sample) -> list[torch.Tensor]:
    leaves = {name: sample.arguments[name].detach().requires_grad_() for name in sample.gradients}
    outputs = sample.run(**leaves)
    roots = [value for value in outputs if value.requires_grad]
    found = torch.autograd.grad(roots, list(leaves.values()), [torch.ones_like(root) for root in roots]) if roots else ()
    return [value.detach() for value in (*outputs, *found)]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", LABELS)
def test_the_body_of_the_cpu_agrees_with_the_reference(label, dtype, rows):
    sample = sample_of(label, dtype, rows)
    results = []
    for body in ("auto", "ref"):
        with backends(f"*={body}"):
            results.append(values_and_gradients(sample))
    for index, (ours, expected) in enumerate(zip(*results, strict=True)):
        if label.startswith("attention") and index in (1, 2):
            continue  # the statistics of two bodies agree in their combination only, see below
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        rounding = ROUNDING.get(ours.dtype, 0.0)
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=rounding, equal_nan=True)
    if label.startswith("attention") and label != "attention_grad":
        ours, expected = (top + total.log() for _, top, total, *_ in results)
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("label", [label for label in LABELS if label not in UNSEEN])
def test_nan_reaches_a_result(label):
    sample = sample_of(label)
    assert not any(value.isnan().any() for value in sample.run() if value.is_floating_point())
    for name, value in sample.tensors().items():
        if not value.is_floating_point() or name in ("softmax_max", "softmax_sum"):
            continue
        poisoned = value.clone()
        poisoned.view(-1)[-1] = float("nan")
        assert any(result.isnan().any() for result in sample.run(**{name: poisoned}) if result.is_floating_point()), name


@pytest.mark.parametrize("label", DIFFERENTIABLE)
def test_one_call_each_way(label):
    sample = sample_of(label)
    leaves = {name: sample.arguments[name].requires_grad_() for name in sample.gradients}

    calls = operator_calls(lambda: sample.run(**leaves))
    calls.pop("dropout_mask", None)  # asked for by the caller
    assert sum(calls.values()) == 1
    (name,) = calls
    roots = [root for root in sample.run(**leaves) if root.requires_grad]
    calls = operator_calls(lambda: torch.autograd.backward(roots, [torch.ones_like(root) for root in roots]))
    assert calls == {"sort_chunks" if name == "sort_chunks" else f"{name}_backward": 1}


@pytest.mark.parametrize("body", ["auto", "ref"])
@pytest.mark.parametrize("label", DIFFERENTIABLE)
def test_gradients_in_double_precision(label, body):
    sample = sample_of(label, torch.float64, rows=3)
    leaves = {name: sample.arguments[name].requires_grad_() for name in sample.gradients}

    def run(*values):
        return [root for root in sample.run(**dict(zip(leaves, values, strict=True))) if root.requires_grad]

    with backends(f"*={body}"):
        torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)
