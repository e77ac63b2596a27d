"""Level 0: what must hold in the host before anything else, whatever flags are given.

`activate()` retargets torch to the platform, then repairs megatron-core (and megatron.training where a
checkout is the host). It is idempotent; Megatron-LM, the built-in trainer and `mindspeed.enable` all use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from mindspeed import platform as platforms
from mindspeed.host import index_builder
from mindspeed.host.identity import HostIdentity, identify
from mindspeed.host.repairs import (
    adam,
    buckets,
    checkpoint_io,
    collectives,
    datasets,
    fused_kernels,
    jit,
    latent_attention,
    moe,
    norms,
    numpy_names,
    optimizer_order,
    param_groups,
    random_streams,
    transformer_engine,
    type_strings,
)
from mindspeed.patching.ledger import Ledger
from mindspeed.patching.patch import Patch
from mindspeed.patching.plan import Plan
from mindspeed.platform import Platform

logger = logging.getLogger(__name__)

# owner of the rows -> module with `patches(platform)`
REPAIRS: dict[str, ModuleType] = {
    "repair.jit": jit,
    "repair.type-strings": type_strings,
    "repair.transformer-engine": transformer_engine,
    "repair.norms": norms,
    "repair.adam": adam,
    "compat.numpy": numpy_names,
    "compat.torch": checkpoint_io,
    "repair.buckets": buckets,
    "repair.collectives": collectives,
    "repair.moe": moe,
    "repair.latent-attention": latent_attention,
    "repair.fused-kernels": fused_kernels,
    "repair.datasets": datasets,
    "repair.optimizer-order": optimizer_order,
    "repair.param-groups": param_groups,
    "repair.random-streams": random_streams,
}
# Modules that the repairs change or that hold compiled functions; imported first, with compilation off.
_CORE_MODULES = (
    "megatron.core",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.legacy_a2a_token_dispatcher",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.datasets.utils",
)


def level0_patches(platform: Platform) -> Iterator[Patch]:
    """All repairs of megatron-core for this platform, with their owners; imports megatron-core."""
    import_core(platform)
    for owner, module in REPAIRS.items():
        for patch in module.patches(platform):
            yield dataclasses.replace(patch, owner=owner)


def training_patches(platform: Platform) -> Iterator[Patch]:
    """Repairs of megatron.training; only where a Megatron-LM checkout is the host."""
    yield from platform.training_patches()
    for patch in fused_kernels.training_patches(platform):
        yield dataclasses.replace(patch, owner="repair.fused-kernels")


def import_core(platform: Platform) -> None:
    """Import the modules that level 0 touches, without their warnings about packages that we stand in for."""
    with jit.not_compiling(platform), quiet_about_fallbacks():
        for name in _CORE_MODULES:
            importlib.import_module(name)


@contextlib.contextmanager
def quiet_about_fallbacks() -> Iterator[None]:
    """Drop the host's warnings about absent Transformer Engine and APEX while its modules are imported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|APEX|transformer_engine).*")
        yield


def activate(ledger: Ledger) -> HostIdentity | None:
    """Activate the platform and apply every repair that is not in the ledger yet.

    Returns:
        The host, or None when megatron-core is not installed (then only the platform is active).

    Raises:
        TargetError: an unsupported or mixed host.
    """
    host = identify()
    platform = platforms.current()
    platform.activate(ledger)
    if host is None or any(row.owner in REPAIRS for row in ledger.rows):
        return host
    index_builder.install()
    Plan.of(level0_patches(platform), host_versions=host.versions).apply(ledger)
    logger.info("platform %s; %s", platform.name, host)
    return host


def activate_training(ledger: Ledger) -> None:
    """Apply the repairs of megatron.training once its modules can be imported."""
    platform = platforms.current()
    with jit.not_compiling(platform), quiet_about_fallbacks():
        importlib.import_module("megatron.training.initialize")
    Plan.of(training_patches(platform)).apply(ledger)
