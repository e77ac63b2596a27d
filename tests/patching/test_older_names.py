import argparse
import sys

import pytest

from mindspeed.deprecate import AutoExecuteFunction, NoExecuteFunction
from mindspeed.errors import ConfigError, ConflictError, TargetError
from mindspeed.features_manager.adapter import adapted
from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager
from mindspeed.patch_utils import MindSpeedPatchesManager as Manager
from mindspeed.patching import activation
from mindspeed.patching.ledger import Ledger
from tests.patching.conftest import TOY
from tests.patching.test_activation import ToyHost


@pytest.fixture(autouse=True)
def clean():
    yield
    Manager.patches_info.clear()
    Manager.ledger.revert(force=True)
    MindSpeedFeaturesManager.set_features_list([])


def counting_wrapper(original):
    counting_wrapper.made += 1

    def call(*args, **kwargs):
        return original(*args, **kwargs) + 1

    return call


def tenfold_decorator(original):
    return lambda *args, **kwargs: original(*args, **kwargs) * 10


def halve(x):
    return x / 2


def test_names_decide_between_wrap_and_replace(toy):
    counting_wrapper.made = 0
    Manager.register_patch("tests.patching.toy.double", halve)
    Manager.register_patch("tests.patching.toy.double", counting_wrapper)
    Manager.register_patch("tests.patching.toy.double", tenfold_decorator)
    assert list(Manager.patches_info) == ["tests.patching.toy.double"]
    Manager.apply_patches()
    assert toy.double(8) == toy.double(8) == 50 and counting_wrapper.made == 1
    assert [row.operation for row in Manager.ledger] == ["replace", "wrap", "wrap"] and Manager.patches_info == {}
    Manager.ledger.revert()


def test_second_replacement_needs_force(toy):
    Manager.register_patch("tests.patching.toy.double", halve)
    with pytest.raises(ConflictError, match="force_patch=True"):
        Manager.register_patch("tests.patching.toy.double", abs)
    Manager.register_patch("tests.patching.toy.double", abs, force_patch=True)
    Manager.apply_patches()
    assert toy.double(-3) == 3
    Manager.ledger.revert()


def test_wrappers_can_be_taken_back(toy):
    for wrapper in (counting_wrapper, tenfold_decorator):
        Manager.register_patch("tests.patching.toy.double", wrapper)
    Manager.remove_wrappers("tests.patching.toy.double", "counting_wrapper")
    Manager.apply_patches()
    assert toy.double(1) == 20
    Manager.ledger.revert()


def test_absent_targets_are_errors_or_stand_in_elsewhere(toy, caplog):
    Manager.register_patch("tests.patching.toy.gone", halve)
    with pytest.raises(TargetError, match="toy:gone does not exist"):
        Manager.apply_patches()
    Manager.patches_info.clear()
    Manager.register_patch("tests.patching.toy.gone", halve, create_dummy=True)
    Manager.apply_patches()
    assert not hasattr(toy, "gone") and "mindspeed.absent.tests.patching.toy.gone" in caplog.text
    assert sys.modules.pop("mindspeed.absent.tests.patching.toy").gone is halve


class OlderFeature(MindSpeedFeature):
    """Doubles more."""

    def __init__(self):
        super().__init__("double-more")

    def register_args(self, parser):
        parser.add_argument_group("older").add_argument("--double-more", type=int, default=None)

    def pre_validate_args(self, args):
        args.derived_from_it = args.double_more + 1

    def validate_args(self, args):
        self.incompatible_check(args, "double_less")
        self.dependency_check(args, "seq_length")
        assert args.double_more < 100, "too much"

    def register_patches(self, patch_manager, args):
        patch_manager.register_patch("tests.patching.toy.double", lambda x: x * args.double_more)


def test_older_feature_lives_like_ours(toy):
    features = adapted([OlderFeature()])
    parser = activation.add_flags(argparse.ArgumentParser(), features)
    args = parser.parse_args(["--double-more", "7"])
    args.seq_length = 8
    active = activation.settle(features, args, platform="cpu")
    assert args.derived_from_it == 8 and [(one.name, one.why) for one in active] == [("OlderFeature", "--double-more 7")]
    ledger = Ledger()
    activation.activate(activation.check(features, args, platform="cpu"), ToyHost(args), ledger)
    assert toy.double(2) == 14 and [row.owner for row in ledger] == ["OlderFeature"]
    ledger.revert()
    assert activation.choose(features, parser.parse_args([]), platform="cpu") == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"double_more": 7}, "--double-more: needs --seq-length"),
        ({"double_more": 7, "seq_length": 1, "double_less": True}, "cannot be combined with --double-less"),
        ({"double_more": 700, "seq_length": 1}, "--double-more 700: too much"),
    ],
)
def test_older_refusals_become_problems(values, words):
    features = adapted([OlderFeature()])
    with pytest.raises(ConfigError, match=words):
        activation.check(features, argparse.Namespace(**values), platform="cpu")


def test_manager_drives_features_without_enable(toy):
    MindSpeedFeaturesManager.set_features_list([OlderFeature()])
    args = argparse.Namespace(double_more=3, seq_length=1)
    MindSpeedFeaturesManager.pre_validate_features_args(args)
    MindSpeedFeaturesManager.validate_features_args(args)
    MindSpeedFeaturesManager.post_validate_features_args(args)
    MindSpeedFeaturesManager.apply_features_patches(args)
    assert args.derived_from_it == 4 and toy.double(5) == 15 and Manager.ledger.rows[0].owner == "OlderFeature"
    Manager.ledger.revert()


def test_choices_are_widened_in_a_list_of_their_own():
    choices = ["a"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=choices)
    MindSpeedFeature.add_parser_argument_choices_value(parser, "--kind", "b")
    assert parser.parse_args(["--kind", "b"]).kind == "b" and choices == ["a"]


def test_functions_run_at_definition_unless_suspended():
    ran = []

    def act():
        """Acts."""
        ran.append(1)

    with NoExecuteFunction():
        held = AutoExecuteFunction(act)
    assert ran == [] and held.__doc__ == "Acts."
    held()
    AutoExecuteFunction(act)
    assert ran == [1, 1]


def test_targets_of_the_toy_are_as_before(toy):
    assert TOY == toy.__name__
