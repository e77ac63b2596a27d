"""Counter of floating-point operations, fused attention on CPU and our own operators included.

with count_flops() as counted:
    model(x).sum().backward()
assert counted.total == ...
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mindspeed.ops._registry import REGISTRY


def _attention_flops(query: torch.Tensor, key: torch.Tensor, causal: bool) -> int:
    """Two matmuls of one forward: 4 B N Sq Sk D, half of it under a causal mask."""
    batch, heads, queries, width = query.shape
    return 4 * batch * heads * queries * key.shape[2] * width // (2 if causal else 1)


def _flash_forward(query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return _attention_flops(query, key, is_causal)


def _flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout_p: float, is_causal: bool, **_: Any
) -> int:
    return _attention_flops(query, key, is_causal) * 5 // 2  # five matmuls: scores again, dP, dV, dQ, dK


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


class FlopCount(TorchDispatchMode):
    """Floating-point operations of matrix products, convolutions and attention; element-wise work counts nothing.

    Attributes:
        by_operator: operations by operator name, `aten::mm` for instance.
        by_phase: operations in "forward" and in "backward" (recomputation included).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.by_phase: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.by_operator.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            if body := _body_of_our_operator(func, args):
                with self:  # its body is torch again
                    return body(*args, **kwargs)
            if func._overloadpacket not in _CPU_ATTENTION and func._overloadpacket not in flop_registry:
                with self:
                    result = func.decompose(*args, **kwargs)
                    if result is not NotImplemented:
                        return result
        result = func(*args, **kwargs)
        self._count(func, result, args, kwargs)
        return result

    def _count(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        packet = getattr(func, "_overloadpacket", func)
        if packet in _CPU_ATTENTION:
            flops = _CPU_ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        else:
            return
        self.by_operator[func.name().partition(".")[0]] += flops
        self.by_phase["forward" if torch._C._current_autograd_node() is None else "backward"] += flops


def _body_of_our_operator(func: Any, args: Any) -> Callable[..., Any] | None:
    """The torch code that an operator of this library runs on the CPU."""
    if func.namespace != "mindspeed":
        return None
    operator = REGISTRY.operators.get(func._schema.name.partition("::")[2])
    on_cpu = all(argument.device.type == "cpu" for argument in args if isinstance(argument, torch.Tensor))
    return (lambda *a, **k: operator.run("cpu", *a, **k)) if operator and on_cpu else None


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the floating-point operations inside the block."""
    with FlopCount() as counted:
        yield counted
