"""Features of the older form, seen as features of ours: same parser, same checks, same plan, same ledger."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from mindspeed.errors import ConfigError, Problem
from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.patch_utils import MindSpeedPatchesManager
from mindspeed.patching.feature import Change, Feature, RunShape
from mindspeed.patching.patch import Patch


class _OlderFeature(Feature):
    """A feature that another project wrote with register_args, validate_args and register_patches."""

    def __init__(self, older: MindSpeedFeature) -> None:
        self._older = older
        self._normalised: argparse.Namespace | None = None
        self.name = type(older).__name__  # type: ignore[misc]
        self.level = older.optimization_level  # type: ignore[misc]

    @property
    def summary(self) -> str:
        """First line of the older feature's docstring, or whose it is."""
        text = (type(self._older).__doc__ or "").strip()
        return text.splitlines()[0] if text else f"{self._older.feature_name}, from {type(self._older).__module__}"

    def register_args(self, parser: argparse.ArgumentParser) -> None:
        """Let the older feature add its flags to a parser."""
        self._older.register_args(parser)

    def why(self, flags: Any, run: RunShape) -> str:
        """Its flag, when it says that it applies."""
        value = run.get(self._older.feature_name)
        option = "--" + self._older.feature_name.replace("_", "-")
        if not self._older.is_need_apply(run.namespace):
            return ""
        return "always" if not value else option if value is True else f"{option} {value}"

    def normalise(self, flags: Any, run: RunShape) -> Iterator[Change]:
        """What pre_validate_args would change; once, as it may not bear a second time."""
        if self._normalised is run.namespace:
            return
        self._normalised = run.namespace
        copy = argparse.Namespace(**vars(run.namespace))
        self._older.pre_validate_args(copy)
        for dest, value in vars(copy).items():
            if value is not run.get(dest):
                yield Change(dest, value, f"{self.name} is on")

    def check(self, flags: Any, run: RunShape) -> Iterator[Problem]:
        """What validate_args refuses; post_validate_args may still change arguments when it refuses nothing."""
        self._normalised = None
        try:
            self._older.validate_args(argparse.Namespace(**vars(run.namespace)))
            self._older.post_validate_args(run.namespace)
        except ConfigError as error:
            yield from error.problems
        except (AssertionError, ValueError) as error:
            yield Problem(self.why(flags, run), None, str(error) or "was refused by its own check", "change or remove it")

    def patches(self, flags: Any, host: Any) -> Iterator[Patch]:
        """What it registers, owned by its class name."""
        with MindSpeedPatchesManager.registering_for(self.name):
            self._older.pre_register_patches(MindSpeedPatchesManager, host.args)
            self._older.register_patches(MindSpeedPatchesManager, host.args)
        yield from MindSpeedPatchesManager.take()


def adapted(features: list[MindSpeedFeature]) -> tuple[Feature, ...]:
    """Each older feature as one of ours."""
    return tuple(_OlderFeature(older) for older in features)
