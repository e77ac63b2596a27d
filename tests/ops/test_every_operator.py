"""What holds for all operators: schemas and shapes, tracing, layouts, gradients of some inputs only, checks before any work."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mindspeed.ops
from mindspeed.ops._registry import REGISTRY
from mindspeed.ops.sort_chunks import sort_chunks
from mindspeed.testing.operators import assert_compiles, layouts, operator_calls
from tests.ops._samples import Sample, all_samples

LABELS = tuple(all_samples(torch.float32, 2))
DIFFERENTIABLE = tuple(label for label, sample in all_samples(torch.float32, 2).items() if sample.gradients)
COLLECTIVE = {"alltoall_allgather_bmm", "bmm_reducescatter_alltoall", "coc_ops", "grouped_mat_mul_all_reduce"} | {
    "mm_all_reduce_add_rms_norm"
}
FORMS = [(torch.float32, "gradients"), (torch.float32, "strided"), (torch.float32, "empty")]
FORMS += [(torch.bfloat16, "plain"), (torch.bfloat16, "gradients")]


def sample_of(label: str, dtype: torch.dtype = torch.float32, rows: int = 4) -> Sample:
    torch.manual_seed(11)
    return all_samples(dtype, rows)[label]


class _Recorder(TorchDispatchMode):
    """The operators of the library that ran, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mindspeed":
            copies = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in args]
            self.calls.append((func, copies, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded(sample: Sample) -> list[tuple]:
    """The calls of a sample, with those of its backward."""
    leaves = {name: sample.arguments[name].detach().requires_grad_() for name in sample.gradients}
    with _Recorder() as recorder:
        outputs = [value for value in sample.run(**leaves) if value.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(value) for value in outputs])
    return recorder.calls


def has_derivative(func) -> bool:
    name = func.name().removeprefix("mindspeed::").partition(".")[0]
    return name == "sort_chunks" or f"{name}_backward" in REGISTRY.operators


def spread(value: object) -> object:
    """A float tensor as every second element of a larger one."""
    if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim()):
        return value
    wide = torch.full((*value.shape, 2), float("nan"), dtype=value.dtype)
    wide[..., 0] = value
    return wide[..., 0]


@pytest.mark.parametrize(("dtype", "form"), FORMS)
@pytest.mark.parametrize("label", LABELS)
def test_operators_are_well_formed(label, dtype, form):
    sample = sample_of(label, dtype, rows=0 if form == "empty" else 4)
    calls = recorded(sample)
    assert calls
    for func, args, kwargs in calls:
        derivative = has_derivative(func) and label != "gmm, type 2"
        if form == "gradients" and not derivative:
            continue
        if form == "gradients":
            args = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in args]
        if form == "strided":
            mutable = func._schema.is_mutable
            args = [args[0] if mutable else spread(args[0]), *(map(spread, args[1:]) if derivative else args[1:])]
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        tests += ("test_aot_dispatch_dynamic",) if form in ("gradients", "empty") else ()
        torch.library.opcheck(func, tuple(args), kwargs, test_utils=tests)


def test_the_samples_reach_every_operator():
    for _, name, _ in pkgutil.iter_modules(mindspeed.ops.__path__, "mindspeed.ops."):
        if not name.endswith("kernels"):
            importlib.import_module(name)
    reached = {call[0].name().removeprefix("mindspeed::") for label in LABELS for call in recorded(sample_of(label))}
    defined = {name for name, operator in REGISTRY.operators.items() if operator.family not in COLLECTIVE}
    assert defined - reached == set()


@pytest.mark.parametrize("label", LABELS)
def test_traces_in_one_graph(label):
    sample = sample_of(label)
    names = [name for name, value in sample.tensors().items() if value.is_floating_point()]
    values = [sample.arguments[name].requires_grad_(name in sample.gradients) for name in names]

    def run(*tensors):
        arguments = sample.arguments | dict(zip(names, tensors, strict=True))
        arguments |= {name: arguments[name].clone() for name in sample.changes}
        result = sample.function(**arguments)
        results = [result] if isinstance(result, torch.Tensor) else list(result or ())
        kept = [value for value in results if isinstance(value, torch.Tensor)]
        return kept + [arguments[name] for name in sample.changes]

    assert_compiles(run, *values)


def with_gradients(sample: Sample, wanted: tuple[str, ...], **replaced: torch.Tensor) -> tuple[list, dict]:
    """Outputs, and gradients by name for a fixed cotangent."""
    arguments = sample.arguments | replaced
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    outputs = sample.run(**(replaced | leaves))
    roots = [value for value in outputs if value.requires_grad]
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in roots]
    found = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True) if roots else ()
    return [value.detach() for value in outputs], dict(zip(leaves, found, strict=bool(roots)))


@pytest.mark.parametrize("label", DIFFERENTIABLE)
def test_gradient_of_one_input_alone_is_its_part_of_all(label):
    sample = sample_of(label)
    outputs, every = with_gradients(sample, sample.gradients)
    assert all(value is not None for value in every.values())
    for name in sample.gradients:
        alone, grads = with_gradients(sample, (name,))
        torch.testing.assert_close(alone, outputs)
        torch.testing.assert_close(grads[name], every[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("label", LABELS)
def test_strides_do_not_matter(label):
    sample = sample_of(label)
    outputs, grads = with_gradients(sample, sample.gradients)
    for name, value in sample.tensors().items():
        if name in sample.changes or value.numel() < 2:
            continue
        for form, strided in layouts(value):
            if form == "contiguous" or value.is_complex():
                continue
            again, again_grads = with_gradients(sample, sample.gradients, **{name: strided})
            for ours, expected in zip((*again, *again_grads.values()), (*outputs, *grads.values()), strict=True):
                torch.testing.assert_close(ours, expected, msg=lambda text, f=f"{name} {form}": f"{f}: {text}")


@pytest.mark.parametrize("label", LABELS)
def test_wrong_arguments_are_named_before_anything_runs(label):
    sample = sample_of(label)
    parameters = inspect.signature(sample.function).parameters
    for name, value in sample.tensors().items():
        wrong = [("text", TypeError)]
        if (sample.function, name) != (sort_chunks, "x"):  # which takes any dtype
            wrong.append((value.to(torch.complex64), TypeError))
        if "None" not in parameters[name].annotation and parameters[name].default is inspect.Parameter.empty:
            wrong.append((None, TypeError))
        for replacement, error in wrong:

            def call(name=name, replacement=replacement, error=error):
                with pytest.raises(error, match=rf"^[\w ]+: {name} "):
                    sample.function(**(sample.arguments | {name: replacement}))

            assert not operator_calls(call), f"{name}={replacement!r} reached an operator"


@pytest.mark.parametrize("label", LABELS)
def test_tensors_on_another_device_are_refused_before_anything_runs(label):
    sample = sample_of(label)
    names = list(sample.tensors())
    for name in names[1:]:

        def call(name=name):
            with pytest.raises(RuntimeError, match=r"^[\w ]+: .* must be on .*, got"):
                sample.function(**(sample.arguments | {name: sample.arguments[name].to("meta")}))

        assert not operator_calls(call), f"{name} on the meta device reached an operator"
