"""Hyperparameters of a loaded optimizer go to the parameter group they were saved for, not to the one in the same place.

megatron-core orders groups (with and without weight decay) by a rank's first parameter: the embedding on the
first pipeline stage, a norm on the others. A `torch_dist` checkpoint holds the first stage's order for all, so
that the other stages resumed with weight decay on norms and biases and none on matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mindspeed.patching.patch import Patch, wrap
from mindspeed.platform import Platform

_OPTIMIZERS = (
    "megatron.core.optimizer.optimizer:FP32Optimizer",
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
)
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in _IDENTITY)


def matched(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups in the order of `own`; parameters, which are this rank's already, stay in their place.

    Groups that cannot be told apart, or of which one side has others, are left as they are.
    """
    by_identity = {_identity(group): group for group in saved}
    wanted = [_identity(group) for group in own]
    if len(by_identity) != len(saved) or len(own) != len(saved) or set(wanted) != set(by_identity):
        return saved
    in_place = [{"params": group["params"]} if "params" in group else {} for group in saved]
    return [{**by_identity[key], **params} for key, params in zip(wanted, in_place, strict=True)]


def load_matched(original: Callable[..., Any], optimizer: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a state dict whose groups may stand in another rank's order."""
    inner = state_dict.get("optimizer", state_dict)
    if "param_groups" in inner:
        inner["param_groups"] = matched(optimizer.param_groups, inner["param_groups"])
    return original(optimizer, state_dict, *args, **kwargs)


def patches(platform: Platform) -> Iterator[Patch]:
    """Repairs of loading on every pipeline stage but the first."""
    for optimizer in _OPTIMIZERS:
        yield wrap(f"{optimizer}.load_state_dict", load_matched, reason="groups are matched by what they are")
