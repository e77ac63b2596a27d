"""Whether a fused operator takes the host's place: asked for by a flag, chosen for the device, or switched off.

Given = fused, or an error at start that says why not. Absent = fused where a device kernel exists, the host's own code on
CPU. `--disable-fused-ops` and the host's own `--no-*-fusion` flags win over the choice for the device and contradict a request.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from mindspeed.ops._registry import REGISTRY
from mindspeed.patching import Patch, Problem, RunShape, wrap

NAMES = ("rmsnorm", "swiglu", "rope", "softmax", "permute", "gmm", "wgrad")
DISABLE = "--disable-fused-ops"


def names_in(text: str | None) -> tuple[str, ...]:
    """Names in a comma list, blanks and empty items dropped."""
    return tuple(item.strip() for item in (text or "").split(",") if item.strip())


def is_disabled(name: str, run: RunShape) -> bool:
    """Whether `--disable-fused-ops` names this operator."""
    return name in names_in(run.get("disable_fused_ops"))


def uses_transformer_engine(run: RunShape) -> bool:
    """Whether layers are Transformer Engine's, which bring fused operators of their own."""
    named = run.get("transformer_impl") == "transformer_engine"
    return named and importlib.util.find_spec("transformer_engine") is not None


def device_kernel(operator: str, device: str) -> str:
    """Backend of the kernel that would be tried first on a device, or "" when only plain torch is left.

    Raises:
        ValueError: MINDSPEED_OPS names a kernel that the device does not have.
    """
    route = REGISTRY.route(REGISTRY.operators[operator], device)
    return route[0].backend if route else ""


def why_fused(name: str, operator: str, run: RunShape, *, asked: str, wanted: bool) -> str:
    """What turns the fused operator on, or "".

    Args:
        name: as in `--disable-fused-ops`.
        operator: its dispatcher operator, whose kernels decide.
        asked: the flag by which the user asked for it, or "".
        wanted: whether the run would use it, and no flag of the host declines it.
    """
    if asked:
        return asked
    if not wanted or run.platform == "cpu" or is_disabled(name, run):
        return ""
    kernel = device_kernel(operator, run.platform)
    return f"{run.platform} has a kernel ({kernel})" if kernel else ""


def configs_say(field: str, applies: Callable[[Any], bool], host: Any) -> Iterator[Patch]:
    """In a program that makes its configs itself, set a field to True in every new one to which the operator applies.

    Megatron-LM and the trainer make configs from the arguments, which say it already.
    """
    if host.kind != "program":
        return

    def post_init(original: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
        if applies(config):
            setattr(config, field, True)
        original(config, *args, **kwargs)

    target = "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__"
    yield wrap(target, post_init, reason=f"new configs ask for {field}", after=("*",))


def contradictions(name: str, option: str, run: RunShape, declined: str = "") -> Iterator[Problem]:
    """Problems of asking for and declining the same operator; `declined` is the host's flag if it was given."""
    if is_disabled(name, run):
        yield Problem(option, None, f"is contradicted by {DISABLE} {name}", "keep one of them")
    if declined:
        yield Problem(option, None, f"is contradicted by {declined}", "keep one of them")
