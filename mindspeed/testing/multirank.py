"""The decorator that turns a test into a multi-rank test.

@ranks(4)
@pytest.mark.parametrize("causal", [False, True])
def test_ring_equals_dense_attention(world, causal):
    q, k, v = sequence(length=64, seed=0)
    ours = ring_attention(*map(world.my_chunk, (q, k, v)), group=world.group, causal=causal)
    assert_close(ours, world.my_chunk(dense_attention(q, k, v, causal=causal)))
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mindspeed.testing.pool import RankSkip, pools

__all__ = ["ranks"]


def ranks(size: int, *, megatron: bool = False, timeout: float = 120.0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a test body on `size` gloo ranks; it receives a `World` first, then its parameters and fixtures.

    The body runs in other processes and is found there by module and name, so it must be a function or a method of a
    test class at the top of its module. Fixture and parameter values travel by pickle. Between tests megatron's state
    is destroyed, patches are reverted, and seed, environment and working directory are restored.

    Args:
        size: number of ranks.
        megatron: megatron-core is imported before the ranks are forked, once for the whole session.
        timeout: seconds after which the ranks are killed and all their stacks shown.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(body)
        names = list(signature.parameters)
        if "world" not in names[:2]:
            raise TypeError(f"@ranks({size}): {body.__qualname__} must take `world` as its first argument")

        @functools.wraps(body)
        def on_all_ranks(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            values = args[names.index("world") :]  # a test method's instance is made anew on each rank
            try:
                pools().get(size, megatron=megatron).run(on_all_ranks, *values, timeout=timeout, **kwargs)
            except RankSkip as skip:
                import pytest

                pytest.skip(str(skip))

        kept = [parameter for name, parameter in signature.parameters.items() if name != "world"]
        on_all_ranks.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        on_all_ranks.__rank_body__ = body  # type: ignore[attr-defined]
        return on_all_ranks

    return decorate
