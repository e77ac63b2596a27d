"""An Adam that keeps `step` per parameter group, as the fused optimizers that megatron-core expects do.

torch's AdamW keeps a `step` tensor per parameter. megatron-core without Transformer Engine and APEX falls
back to it and then cannot reload its own `torch`-format distributed optimizer (`KeyError: 'step'`). Ours
counts per group; it writes both forms and reads either, so files move between plain megatron-core and us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mindspeed.host.repairs import transformer_engine
from mindspeed.patching.patch import Patch, set_value
from mindspeed.platform import Platform

_OPTIMIZER = "megatron.core.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"


class Adam(torch.optim.AdamW):
    """torch's AdamW, bit for bit, with an int `step` in each parameter group instead of one per parameter.

    A group's step counts its optimizer steps, whether or not every parameter had a gradient, as in APEX.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        done = int(group.get("step", 0))
        group["step"] = done + 1
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        states = [self._state_of(parameter, group["amsgrad"]) for parameter in parameters]
        fused = bool(group.get("fused"))
        device = parameters[0].device if fused or group["capturable"] else torch.device("cpu")
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            _step_tensors(done, len(parameters), device),
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group.get("fused"),
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _state_of(self, parameter: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's form: group-level `step`, and the per-parameter `step` tensors that torch's AdamW reads."""
        state_dict = super().state_dict()
        state = dict(state_dict["state"])
        for group in state_dict["param_groups"]:
            step = float(group.get("step", 0))
            for index in group["params"]:
                if index in state:
                    state[index] = {"step": torch.tensor(step, dtype=torch.float32), **state[index]}
        return {**state_dict, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read either form, from `load_state_dict` or unpickling; a group's own `step` wins over its parameters'."""
        for group in state["param_groups"]:
            entries = [state["state"][p] for p in group["params"] if state["state"].get(p)]
            steps = [float(entry["step"]) for entry in entries if "step" in entry]
            if group.get("step") is None:
                group["step"] = max(steps, default=0.0)
            group["step"] = int(group["step"])
            for entry in entries:  # torch looks for it, whoever wrote the state
                entry.setdefault("step", torch.tensor(float(group["step"])))
        super().__setstate__(state)
        for entry in self.state.values():
            entry.pop("step", None)


def _step_tensors(done: int, count: int, device: torch.device) -> list[Tensor]:
    """`count` separate 0-d fp32 tensors; the functional form adds one to each of them in place."""
    return list(torch.full((count,), float(done), dtype=torch.float32, device=device).unbind())


def patches(platform: Platform) -> Iterator[Patch]:
    """Put our Adam where the fused one would be; with Transformer Engine or APEX theirs stay."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE or transformer_engine.installed():
        return
    why = "the distributed optimizer reloads a step per group, which torch's AdamW does not keep"
    yield set_value(f"{_OPTIMIZER}:Adam", Adam, reason=why)
    yield set_value(f"{_DISTRIBUTED}:Adam", Adam, reason=why)
    yield set_value(f"{_DISTRIBUTED}:HAVE_APEX_OR_TE", True, reason=why)
