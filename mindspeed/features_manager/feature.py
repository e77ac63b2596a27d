"""`MindSpeedFeature`: base of features that other projects wrote in the older form."""

from __future__ import annotations

import argparse
from typing import Any

from mindspeed.errors import ConfigError, Problem


class MindSpeedFeature:
    """A feature that registers arguments and patches by methods.

    Attributes:
        feature_name: its flag without dashes, as attribute of the arguments.
        optimization_level: 0 always; otherwise applied when the flag is truthy and the run's level is as high.
    """

    def __init__(self, feature_name: str, optimization_level: int = 2) -> None:
        self.feature_name = feature_name.strip().lstrip("-").replace("-", "_")
        self.optimization_level = optimization_level
        self.default_patches = optimization_level == 0

    def is_need_apply(self, args: argparse.Namespace) -> bool:
        """Whether the arguments switch this feature on."""
        allowed = self.optimization_level <= getattr(args, "optimization_level", 2)
        return self.default_patches or (allowed and bool(getattr(args, self.feature_name, None)))

    def register_args(self, parser: argparse.ArgumentParser) -> None:
        """Add flags."""

    def pre_validate_args(self, args: argparse.Namespace) -> None:
        """Before the host validates."""

    def validate_args(self, args: argparse.Namespace) -> None:
        """Check values."""

    def post_validate_args(self, args: argparse.Namespace) -> None:
        """After the host has validated."""

    def pre_register_patches(self, patch_manager: Any, args: argparse.Namespace) -> None:
        """Patches that come first."""

    def register_patches(self, patch_manager: Any, args: argparse.Namespace) -> None:
        """Register patches with `patch_manager.register_patch`."""

    def incompatible_check(self, global_args: argparse.Namespace, check_args: str) -> None:
        """Refuse this feature together with another flag.

        Raises:
            ConfigError: both are on.
        """
        if getattr(global_args, self.feature_name, None) and getattr(global_args, check_args, None):
            other = _option(check_args)
            raise ConfigError(
                [Problem(_option(self.feature_name), None, f"cannot be combined with {other}", f"remove {other} or it")]
            )

    def dependency_check(self, global_args: argparse.Namespace, check_args: str) -> None:
        """Refuse this feature without another flag.

        Raises:
            ConfigError: this one is on and the other is not.
        """
        if getattr(global_args, self.feature_name, None) and not getattr(global_args, check_args, None):
            other = _option(check_args)
            raise ConfigError([Problem(_option(self.feature_name), None, f"needs {other}", f"add {other}")])

    @staticmethod
    def add_parser_argument_choices_value(parser: argparse.ArgumentParser, argument_name: str, new_choice: Any) -> None:
        """Allow one more value of an argument that the parser has."""
        for action in parser._actions:
            if argument_name in action.option_strings and new_choice not in (action.choices or ()):
                action.choices = [*(action.choices or ()), new_choice]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
