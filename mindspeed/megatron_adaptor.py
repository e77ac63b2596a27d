"""The one import line for Megatron-LM: `import mindspeed.megatron_adaptor`, before or after `import megatron`.

Importing it chooses the platform, retargets torch to it and repairs megatron-core. The rest of the story is told
when Megatron-LM handles its arguments (`mindspeed.host.megatron_arguments`): every feature's flags join the
host's parser; then features are chosen, checked all at once, planned and applied, before any process group exists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import mindspeed
from mindspeed.host import level0, post_import
from mindspeed.host.identity import identify
from mindspeed.host.megatron import MegatronHost
from mindspeed.host.megatron_arguments import ArgumentHooks
from mindspeed.host.megatron_defaults import HostDefaults
from mindspeed.patching import activation
from mindspeed.patching.discovery import all_features
from mindspeed.runtime import Runtime, start

__all__ = ["get_mindspeed_args", "patch_features", "repatch"]


def _start() -> Runtime:
    """Platform and repairs now; the argument hooks as soon as megatron.training can be imported."""
    identity = identify()
    runtime = start(MegatronHost(), (HostDefaults(), *all_features()))
    if identity is not None and identity.kind == "megatron-lm":

        def hook_arguments() -> None:
            level0.activate_training(runtime.ledger)
            ArgumentHooks(runtime).install()

        post_import.when_importable("megatron.training", "megatron.training.initialize", hook_arguments)
    return runtime


def patch_features() -> None:
    """Apply what the present arguments ask for; for programs that skip the host's validation."""
    repatch({})


def repatch(args: Mapping[str, Any]) -> None:
    """Take features back, change arguments (flag name -> value), check them and apply what they ask for now."""
    mindspeed.runtime().host.args = get_mindspeed_args()
    mindspeed.repatch(args)


def get_mindspeed_args() -> argparse.Namespace:
    """The run's arguments; before the host has parsed any, our own flags as the command line has them."""
    runtime = mindspeed.runtime()
    if vars(runtime.host.args):
        return runtime.host.args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    return activation.add_flags(parser, runtime.features).parse_known_args(sys.argv[1:])[0]


_start()
