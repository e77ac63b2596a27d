"""`MindSpeedFeaturesManager`: the list of features of the older form that other projects bring."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import ClassVar

from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.patch_utils import MindSpeedPatchesManager


class MindSpeedFeaturesManager:
    """Runs the methods of all listed features at the moments of a run."""

    FEATURES_LIST: ClassVar[list[MindSpeedFeature]] = []

    @classmethod
    def set_features_list(cls, features_list: Iterable[MindSpeedFeature]) -> None:
        """Say which features there are."""
        cls.FEATURES_LIST = list(features_list)

    @classmethod
    def register_features_args(cls, parser: argparse.ArgumentParser) -> None:
        """Let every feature add its flags."""
        for feature in cls.FEATURES_LIST:
            feature.register_args(parser)

    @classmethod
    def pre_validate_features_args(cls, args: argparse.Namespace) -> None:
        """Before the host validates; only features that are on are asked."""
        for feature in cls.active(args):
            feature.pre_validate_args(args)

    @classmethod
    def validate_features_args(cls, args: argparse.Namespace) -> None:
        """Let every feature that is on check its values."""
        for feature in cls.active(args):
            feature.validate_args(args)

    @classmethod
    def post_validate_features_args(cls, args: argparse.Namespace) -> None:
        """After the host has validated."""
        for feature in cls.active(args):
            feature.post_validate_args(args)

    @classmethod
    def active(cls, args: argparse.Namespace) -> list[MindSpeedFeature]:
        """Features that the arguments switch on."""
        return [feature for feature in cls.FEATURES_LIST if feature.is_need_apply(args)]

    @classmethod
    def apply_features_patches(cls, args: argparse.Namespace) -> None:
        """Register and apply at once, for programs that do not use `mindspeed.enable`."""
        for register in ("pre_register_patches", "register_patches"):
            for feature in cls.active(args):
                with MindSpeedPatchesManager.registering_for(type(feature).__name__):
                    getattr(feature, register)(MindSpeedPatchesManager, args)
        MindSpeedPatchesManager.apply_patches()
