import argparse
from dataclasses import dataclass

import pytest

from mindspeed.errors import ConfigError
from mindspeed.patching import Feature, flag
from mindspeed.patching.activation import add_flags, explain_unknown_flags, given_flags
from mindspeed.patching.discovery import all_features
from mindspeed.patching.parser import all_specs
from mindspeed.patching.withdrawn import withdrawn


@dataclass(frozen=True, kw_only=True)
class ToyFlags:
    fast_mode: bool = flag(False, "Be fast, 100% of the time.")
    ring_size: int = flag(1, "Ranks in a ring.", aliases=("--ring",))
    parts: tuple[int, ...] | None = flag(None, "Sizes of parts.")
    tokenizer_type: str | None = flag(None, "Kind of tokenizer.", choices=("New",))


class Toy(Feature):
    """A toy with 100% coverage."""

    flags = ToyFlags


def parser_with(*define):
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="host")
    parser.add_argument("--hidden-size", type=int)
    for names, options in define:
        parser.add_argument(*names, **options)
    return parser


def test_flags_and_help():
    parser = add_flags(parser_with(), [Toy()])
    read = parser.parse_args("--fast-mode --ring-size=3 --parts 1 2 --optimization-level 1".split())
    assert (read.fast_mode, read.ring_size, read.parts, read.optimization_level) == (True, 3, [1, 2], 1)
    assert parser.parse_args(["--ring", "4"]).ring_size == 4
    text = " ".join(parser.format_help().split())
    assert "Be fast, 100% of the time." in text and "A toy with 100% coverage." in text


def test_both_spellings_are_equal_and_last_wins():
    parser = add_flags(parser_with(), [Toy()])
    assert parser.parse_args(["--ring-size", "-2"]) == parser.parse_args(["--ring-size=-2"])
    assert parser.parse_args("--ring-size 1 --ring-size 5".split()).ring_size == 5


def test_given_flags_are_named_and_repeats_logged(caplog):
    parser = add_flags(parser_with(), [Toy()])
    assert given_flags(parser, "--ring-size=3 --fast-mode --ring 4 --parts 1 -2 --other".split()) == {
        "ring_size",
        "fast_mode",
        "parts",
    }
    assert "--ring is given more than once; the last value counts" in caplog.text


def test_same_flag_of_the_program_is_shared_and_choices_join():
    choices = ["Old"]
    parser = parser_with((["--ring-size"], {"type": int, "default": 7}), (["--tokenizer-type"], {"choices": choices}))
    read = add_flags(parser, [Toy()]).parse_args(["--tokenizer-type", "New"])
    assert read.ring_size == 7 and read.tokenizer_type == "New" and choices == ["Old"]


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ((["--ring-size"], {"type": str}), "type str, where mindspeed expects int"),
        ((["--ring-size"], {"action": "store_true"}), "no value, where mindspeed expects one"),
        ((["--fast-mode"], {"type": int}), "a value, where mindspeed expects none"),
        ((["--parts"], {"type": int}), "one value"),
        ((["--ring-size"], {"type": int, "nargs": "+"}), "several values"),
    ],
)
def test_same_flag_of_another_kind_is_refused(definition, words):
    with pytest.raises(ConfigError, match=f"{definition[0][0]}: is defined by the program with {words}"):
        add_flags(parser_with(definition), [Toy()])


def test_two_features_must_agree_on_a_flag():
    @dataclass(frozen=True, kw_only=True)
    class OtherFlags:
        ring_size: int = flag(2, "Another default.")

    class Other(Feature):
        """Disagrees."""

        flags = OtherFlags

    with pytest.raises(TypeError, match="'other' declares --ring-size unlike another feature"):
        add_flags(parser_with(), [Toy(), Other()])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ring-sice", "3"], "--ring-sice: is not a flag. Did you mean --ring-size"),
        (["--use-nanopipe"], "--use-nanopipe: was withdrawn (legacy models only). See --schedules-method."),
        (["--fast"], "--fast: is not a flag. Did you mean --fast-mode"),  # no abbreviations
        (["--ring_size", "3"], "Did you mean --ring-size"),
        (["--nd2-dim1-size=3"], "--nd2-dim1-size: was withdrawn"),
    ],
)
def test_unknown_flags_are_explained(words, told, capsys):
    parser = add_flags(parser_with(), [Toy()])
    explain_unknown_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert told in capsys.readouterr().err


def test_flags_without_effect_are_accepted(caplog, capsys):
    parser = add_flags(parser_with(), [Toy()])
    read = parser.parse_args("--jit-compile --shape-order SBH".split())
    assert not {"jit_compile", "shape_order"} & set(vars(read))
    assert "--jit-compile has no effect any more" in caplog.text
    with pytest.raises(SystemExit):
        parser.parse_args(["--shape-order", "BSH"])
    assert "only SBH is supported" in capsys.readouterr().err


# The flags that older launch scripts may carry, as data independent of our table's patterns.
GONE = """--use-nanopipe --use-nanopipe-swap --use-pipe-experts --pipe-experts-multi-data --pipe-experts-multi-stream
--ampipe-degree --automated-pipeline --automated-pipeline-perf --save-memory-ratio --num-layer-list --recompute-module-list
--recompute-type --optimized-mbs-list --mbs-idx --pp-schedule-list --adaptive-recompute-device-size --adaptive-recompute-enable
--adaptive-memory-optimization --memory-fragmentation --enable-zero3 --use-nd-matmul --nd1-dim1-size --nd2-dim1-size
--moe-model-type --expert-interval --moe-train-capacity-factor --noisy-gate-policy --enable-token-rearrange-opt --no-use-rts
--moe-no-drop --moe-dynamic-padding --moe-use-sinkhorn --moe-adaptive-recompute-activation --moe-bmm-mc2
--use-fused-moe-token-permute-and-unpermute --optimize-vpp-send-recv-comm --use-ema --additional-config --add-dense-bias
--skip-bias-add --rope-scaling-type --yarn-scaling-factor --auto-settings --target-nnodes --prof-file""".split()


@pytest.mark.parametrize("option", GONE)
def test_every_withdrawn_flag_is_known_or_revived(option):
    revived = {spec.option for spec in all_specs(all_features()).values()}
    told = withdrawn(option)
    assert option in revived or (told is not None and told.instead), option
