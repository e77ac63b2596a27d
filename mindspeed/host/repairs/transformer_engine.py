"""Let megatron-core run its non-fp8 paths when Transformer Engine is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from packaging.version import Version

from mindspeed.patching.patch import Patch, set_value, wrap
from mindspeed.platform import Platform


def installed() -> bool:
    """Whether Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def patches(platform: Platform) -> Iterator[Patch]:
    """Answer the version question with 0.0 and let the fp8 quantiser pass when there is nothing to quantise."""
    if installed():
        return
    yield set_value(
        "megatron.core.utils:_te_version",
        Version("0.0"),
        reason="get_te_version() imports Transformer Engine; loading a torch_dist checkpoint would end there",
    )
    yield wrap(
        "megatron.core.fp8_utils:_quantize_param_shard_impl",
        quantize_when_needed,
        reason="the distributed optimizer calls it in every step, with or without fp8 parameters",
    )


def quantize_when_needed(original: Callable[..., Any], model_params: Any, *args: Any, **kwargs: Any) -> Any:
    """Skip the quantiser for an empty list; with fp8 parameters the host's own error stays."""
    if len(model_params) == 0:
        return None
    return original(model_params, *args, **kwargs)
