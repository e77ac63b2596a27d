"""One dispatcher library for all operators, and the choice of a body per operator and device.

Every operator is `torch.ops.mindspeed.<name>`. Its plain-torch body (`reference`) is the definition: it runs on every device
and is the truth of the tests. A faster body registers with `register_kernel` under one of the names in `BACKENDS`; torch
dispatches on the device, and per device the first registered body that does not decline the arguments runs.

Bodies that need a vendor package live in `mindspeed/ops/kernels/<npu|triton>/<family>.py` and are imported at the first call
of that family on that device, never earlier. `MINDSPEED_OPS="rms_norm=ref,gmm=triton,*=auto"` overrides the choice, and
`backend_report()` tells what it was. The decision record `docs/decisions/0006-operator-registration.md` explains why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("mindspeed", "DEF")

BACKENDS = ("auto", "ref", "aten", "triton", "npu", "lib")

# dispatch key, and the package of vendor bodies that may hold something for the device
_DEVICES = {
    "cpu": ("CPU", ()),
    "cuda": ("CUDA", ("triton",)),
    "npu": ("PrivateUse1", ("npu", "triton")),
}

FAMILIES = (
    "adamw",
    "alltoall_allgather_bmm",
    "bmm_reducescatter_alltoall",
    "coc_ops",
    "cross_entropy",
    "dropout_add_norm",
    "ema_adamw",
    "ffn",
    "fusion_attention",
    "gmm",
    "grouped_mat_mul_all_reduce",
    "groupmatmul_add",
    "layer_norm",
    "matmul_add",
    "mm_all_reduce_add_rms_norm",
    "moe_token_permute",
    "quant_gmm",
    "ring_attention_update",
    "rms_norm",
    "rotary",
    "scaled_masked_softmax",
    "sort_chunks",
    "swiglu",
    "weight_quant_gmm",
)
"""What `MINDSPEED_OPS` may name: a family is one operator with its backward and its variants."""


class Ran(NamedTuple):
    """One row of `backend_report()`."""

    device: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Kernel:
    """A body for one operator; `declines(*args)` returns the reason why it cannot serve these arguments, or None."""

    backend: str
    body: Callable
    declines: Callable[..., str | None] | None
    opt_in: bool


@dataclass
class Operator:
    """A dispatcher operator with its definition (`reference`) and the bodies registered for each device."""

    name: str
    family: str
    reference: Callable
    kernels: dict[str, list[Kernel]] = field(default_factory=lambda: {device: [] for device in _DEVICES})
    routes: dict[str, tuple[Kernel, ...]] = field(default_factory=dict)
    last: dict[str, Ran] = field(default_factory=dict)
    told: set[tuple[str, str, str]] = field(default_factory=set)

    def run(self, device: str, *args: object, **kwargs: object) -> object:
        """Run the first body of the route that accepts the arguments; the reference if none does."""
        route = self.routes.get(device)
        if route is None:
            route = self.routes[device] = REGISTRY.route(self, device)
        reason, level = "plain torch", logging.INFO
        if route and not (isinstance(args[0], Tensor) and args[0].numel() == 0):  # device kernels never see empty input
            for kernel in route:
                reason = kernel.declines(*args, **kwargs) if kernel.declines else None
                if reason is None:
                    self.last[device] = Ran(device, kernel.backend, "accepts the arguments")
                    return kernel.body(*args, **kwargs)
                if kernel is route[-1] and device != "cpu":
                    level = logging.WARNING  # nothing fast is left
                self.step_aside(device, kernel.backend, reason, level)
        self.last[device] = Ran(device, "ref", reason)
        return self.reference(*args, **kwargs)

    def step_aside(self, device: str, backend: str, reason: str, level: int) -> None:
        """Say once per reason that a faster body is not used."""
        key = (device, backend, reason)
        if key not in self.told:
            self.told.add(key)
            logger.log(level, "mindspeed::%s on %s: the %s kernel steps aside: %s", self.name, device, backend, reason)


class Registry:
    """All operators by name, and what the user chose for them."""

    def __init__(self) -> None:
        self.operators: dict[str, Operator] = {}
        self.choices: dict[str, str] | None = None  # None: read MINDSPEED_OPS when first needed
        self.loaded: dict[tuple[str, str], str] = {}  # (package, family) -> why it could not be imported, or ""

    def choice(self, family: str) -> tuple[str, bool]:
        """The backend chosen for a family, and whether it was named itself (not through `*`)."""
        if self.choices is None:
            self.choices = parse_choices(os.environ.get("MINDSPEED_OPS", ""))
        named = self.choices.get(family)
        return (named, True) if named else (self.choices.get("*", "auto"), False)

    def load(self, family: str, device: str) -> str:
        """Import the vendor bodies of a family for a device; returns why there are none ("" if all was imported)."""
        reasons = []
        packages = _DEVICES[device][1]
        if device == "cpu" and self.choice(family)[0] == "triton":
            packages = ("triton",)
        for package in packages:
            key = (package, family)
            if key not in self.loaded:
                self.loaded[key] = _import_bodies(f"mindspeed.ops.kernels.{package}", family)
            if self.loaded[key]:
                reasons.append(self.loaded[key])
        return "; ".join(reasons)

    def route(self, operator: Operator, device: str) -> tuple[Kernel, ...]:
        """The bodies to try in order; raises ValueError if a body chosen by name does not exist for the device."""
        missing = self.load(operator.family, device)
        choice, named = self.choice(operator.family)
        kernels = operator.kernels[device]
        if choice == "ref":
            return ()
        if choice == "auto":
            return tuple(kernel for kernel in kernels if not kernel.opt_in)
        chosen = tuple(kernel for kernel in kernels if kernel.backend == choice)
        if not chosen and named and self.family_has(operator.family, device, choice):
            return tuple(kernel for kernel in kernels if not kernel.opt_in)  # another member of the family has it
        if not chosen and named:
            valid = sorted({"auto", "ref", *(kernel.backend for kernel in kernels)})
            if choice == "triton" and device == "cpu" and not missing:
                missing = "Triton runs on a CPU under TRITON_INTERPRET=1 only"
            why = f" ({missing})" if missing else ""
            raise ValueError(
                f"MINDSPEED_OPS: {operator.family}={choice} is not available on {device}{why}; use one of {', '.join(valid)}"
            )
        return chosen or tuple(kernel for kernel in kernels if not kernel.opt_in)

    def family_has(self, family: str, device: str, backend: str) -> bool:
        """Whether any operator of the family has a body of that name on the device."""
        members = (operator for operator in self.operators.values() if operator.family == family)
        return any(kernel.backend == backend for operator in members for kernel in operator.kernels[device])

    def forget_routes(self) -> None:
        """Choose again at the next call of each operator."""
        for operator in self.operators.values():
            operator.routes.clear()


REGISTRY = Registry()


def parse_choices(text: str) -> dict[str, str]:
    """Parse `MINDSPEED_OPS`; raises ValueError naming the valid operators or choices."""
    choices = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        family, equals, backend = (part.strip() for part in item.partition("="))
        if not equals or backend not in BACKENDS:
            raise ValueError(f"MINDSPEED_OPS: {item!r} must be <operator>=<choice> with a choice of {', '.join(BACKENDS)}")
        if family != "*" and family not in FAMILIES:
            raise ValueError(f"MINDSPEED_OPS: {family!r} is no operator; use '*' or one of {', '.join(FAMILIES)}")
        choices[family] = backend
    return choices


def _import_bodies(package: str, family: str) -> str:
    """Import `<package>.<family>` if it exists; returns the reason when its vendor package is missing."""
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(f"{package}.{family}") is None:
        return f"no {package.rpartition('.')[2]} body is written for {family}"
    try:
        importlib.import_module(f"{package}.{family}")
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "mindspeed":  # our own mistake must not look like a missing package
            raise
        return f"{missing or error} is not installed"
    return ""


def define(
    schema: str,
    *,
    family: str,
    reference: Callable,
    fake: Callable,
    autograd: type[torch.autograd.Function] | None = None,
) -> Operator:
    """Define `mindspeed::<schema>`: plain-torch body for every device, shapes for tracing, and its derivative.

    `autograd` is a Function whose `forward` calls the operator through `below_autograd`; without it a backward pass through
    the operator raises. Schemas of mutating operators mark the argument `Tensor(a!)` and return `()`.
    """
    if family not in FAMILIES:
        raise ValueError(f"define({schema!r}): {family!r} is not in mindspeed.ops._registry.FAMILIES")
    name = schema.partition("(")[0].strip()
    operator = Operator(name, family, reference)
    REGISTRY.operators[name] = operator
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    for device, (key, _) in _DEVICES.items():
        LIBRARY.impl(name, partial(operator.run, device), key)
    torch.library.register_fake(f"mindspeed::{name}", fake, lib=LIBRARY)
    if "!)" not in schema:  # mutating operators are never recorded
        LIBRARY.impl(name, _autograd_kernel(name, autograd), "Autograd")
    return operator


def alias(schema: str, function: Callable) -> None:
    """Define a documented dispatcher name that decomposes into other operators of the library."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(schema.partition("(")[0].strip(), function, "CompositeImplicitAutograd")


def _autograd_kernel(name: str, function: type[torch.autograd.Function] | None) -> Callable:
    """What runs under the `Autograd` key: the operator itself unless a gradient may be wanted.

    Operators with a derivative have positional arguments only, as `Function.apply` does.
    """

    def kernel(*args: object, **kwargs: object) -> object:
        values = (*args, *kwargs.values())
        if not (torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)):
            return below_autograd(name, *args, **kwargs)
        if function is not None:
            return function.apply(*args)
        return _WithoutDerivative.apply(name, tuple(kwargs), *values)

    return kernel


class _WithoutDerivative(torch.autograd.Function):
    """Fails in backward; torch's own fallback would leave the gradient out in silence."""

    @staticmethod
    def forward(ctx, name, keywords, *values):  # noqa: ANN001, ANN002, ANN205
        ctx.name = name
        count = len(values) - len(keywords)
        return below_autograd(name, *values[:count], **dict(zip(keywords, values[count:], strict=True)))

    @staticmethod
    def backward(ctx, *grads):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError(f"mindspeed::{ctx.name} has no derivative; detach its inputs or call it under torch.no_grad()")


def below_autograd(name: str, *args: object, **kwargs: object) -> object:
    """Call an operator from inside its own autograd Function."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.mindspeed, name)(*args, **kwargs)


def register_kernel(
    name: str,
    backend: str,
    *,
    devices: tuple[str, ...],
    declines: Callable[..., str | None] | None = None,
    opt_in: bool = False,
    first: bool = False,
) -> Callable[[Callable], Callable]:
    """Register a faster body for operator `name` (without namespace) on `devices` ("cpu", "cuda", "npu").

    The body takes the operator's schema arguments below autograd and must return what the reference returns: same shapes,
    dtypes, contiguous outputs. `declines` takes the same arguments and returns a reason to step aside, or None; it must not
    synchronise with the device. Bodies are tried in order of registration, a `first` one before all others. `opt_in` bodies run only when named in
    `MINDSPEED_OPS`. A body never sees an empty first tensor.
    """
    if backend not in BACKENDS[2:]:
        raise ValueError(f"register_kernel({name!r}): backend {backend!r} must be one of {', '.join(BACKENDS[2:])}")
    operator = REGISTRY.operators[name]

    def register(body: Callable) -> Callable:
        for device in devices:
            kernels = operator.kernels[device]
            kernels.insert(0 if first else len(kernels), Kernel(backend, body, declines, opt_in))
            operator.routes.pop(device, None)
        return body

    return register


@contextlib.contextmanager
def backends(text: str) -> Iterator[None]:
    """Choose bodies inside a block, in the notation of `MINDSPEED_OPS`; for tests and for bisecting numerics."""
    before, REGISTRY.choices = REGISTRY.choices, parse_choices(text)
    REGISTRY.forget_routes()
    try:
        yield
    finally:
        REGISTRY.choices = before
        REGISTRY.forget_routes()


def backend_report(device: str | None = None) -> dict[str, Ran]:
    """`{operator: (device type, chosen kernel, reason)}` for the operators defined so far.

    Operators that have run on the device report what ran last; the others report what would be tried first.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator.type if accelerator is not None else "cpu"
    report = {}
    for name, operator in sorted(REGISTRY.operators.items()):
        if device in operator.last:
            report[name] = operator.last[device]
            continue
        route = REGISTRY.route(operator, device)
        choice, _ = REGISTRY.choice(operator.family)
        why = f"MINDSPEED_OPS says {choice}" if choice != "auto" else (REGISTRY.load(operator.family, device) or "first choice")
        report[name] = Ran(device, route[0].backend if route else "ref", f"{why}; not called yet")
    return report


def on_host(value: Tensor) -> bool:
    """Whether the values of a tensor can be read without synchronisation: on the CPU, and not while a graph is traced."""
    return type(value) is Tensor and value.device.type == "cpu" and not torch.compiler.is_compiling()


def strict() -> bool:
    """Whether `MINDSPEED_OPS_STRICT=1` asks for value checks that need a device synchronisation."""
    return os.environ.get("MINDSPEED_OPS_STRICT", "0") not in ("", "0")
