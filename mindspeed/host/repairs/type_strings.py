"""Teach the optimizers what a parameter's type is called off CUDA.

They compare `param.type()` with texts such as `torch.cuda.HalfTensor`. The texts change, not `Tensor.type`:
torch keeps telling the truth to everybody else.
"""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed.patching.patch import Patch, rewrite
from mindspeed.platform import Platform

TARGETS = {
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups": (
        "Float",
        "Half",
        "BFloat16",
    ),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__": ("Half", "BFloat16"),
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": ("Float", "Half", "BFloat16"),
    "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32": ("Float",),
}
_PREFIX = {"cpu": "torch.", "npu": "torch.npu."}


def patches(platform: Platform) -> Iterator[Patch]:
    """Rewrite the type names in the four places that compare them."""
    prefix = _PREFIX.get(platform.name)
    if prefix is None:
        return
    for target, kinds in TARGETS.items():
        constants = {f"torch.cuda.{kind}Tensor": f"{prefix}{kind}Tensor" for kind in kinds}
        yield rewrite(target, constants, reason=f"parameters are {prefix}*Tensor on {platform.name}")
