"""The interpreter's tests once more, compiled and on a GPU."""

from __future__ import annotations

from mindspeed.testing.triton_interpreter import on_cuda
from tests.ops_kernels import (
    test_triton_cross_entropy,
    test_triton_grouped,
    test_triton_moe_ring,
    test_triton_norm_activation,
    test_triton_optimizer,
    test_triton_quantised,
)
from tests.ops_kernels import test_triton_rotary_softmax_dropout as test_triton_rotary

for _module in (
    test_triton_cross_entropy,
    test_triton_grouped,
    test_triton_moe_ring,
    test_triton_norm_activation,
    test_triton_optimizer,
    test_triton_quantised,
    test_triton_rotary,
):
    for _name, _test in vars(_module).items():
        if hasattr(_test, "choices"):
            globals()[_name.replace("test_", f"{_module.__name__.rpartition('.')[2]}_", 1)] = on_cuda(_test)
