"""Runs tests with Triton kernels in Triton's interpreter, on CPU tensors; no GPU is needed.

    @triton_interpreter("rms_norm=triton")
    def test_rms_norm():
        ...            # mindspeed.ops.rms_norm runs its Triton kernel here

The interpreter is chosen when Triton is first imported, so the body runs in a process of its own. It proves correctness, never
speed. Its stores of bfloat16 truncate where a GPU rounds to nearest: allow one unit in the last place there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

from mindspeed.testing.shipped import Place, Process, shared_process, shipped


def triton_interpreter(choices: str, *, seconds: float = 60.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test so that its body runs under the interpreter with `choices` in the notation of `MINDSPEED_OPS`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        test = shipped(function, _process, unavailable, set(), seconds=seconds, around=("mindspeed.ops:backends", choices))
        test.choices = choices  # type: ignore[attr-defined]
        return test

    return decorate


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """The same test with compiled kernels on the GPU at hand, in this process; marked `cuda`."""
    import pytest

    body, choices = test.__wrapped__, test.choices  # type: ignore[attr-defined]

    @functools.wraps(body)
    def compiled(*args: object, **kwargs: object) -> None:
        import torch

        from mindspeed.ops import backends

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU; bash scripts/gpu_check.sh runs these tests")
        with torch.device("cuda"), backends(choices):
            body(*args, **kwargs)

    return pytest.mark.cuda(compiled)


@functools.cache
def unavailable() -> str | None:
    """Why interpreted tests cannot run here, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


def place() -> Place:
    """The process in which Triton interprets."""
    return Place("interpreter", f"{__name__}:prepare", {"TRITON_INTERPRET": "1"})


def _process() -> Process:
    return shared_process("interpreter", place)


def prepare() -> dict[str, object]:
    """Set the process up: one thread, fixed seed."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(1234)
    return {}
