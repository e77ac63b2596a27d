"""The flag table agrees with a recording of Megatron-LM's parser, and unknown flags are explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed.errors import ConfigError
from mindspeed.training.arguments import build_parser, host_only_flags, parse_args
from mindspeed.training.flag_kinds import moe_layer_freq
from mindspeed.training.flag_table import GROUPS, every_flag

FACTS = json.loads(Path(__file__).with_name("host_parser_facts.json").read_text())
OWN = {flag.option for flag in GROUPS["built-in trainer"]}
FEWER_CHOICES = {"--ckpt-format", "--tokenizer-type"}  # the trainer serves a part, and has a tokenizer of its own


@pytest.mark.parametrize("flag", [flag for flag in every_flag() if flag.option not in OWN], ids=lambda flag: flag.option)
def test_row_equals_the_hosts_parser(flag):
    fact = FACTS[flag.option]
    assert flag.dest == fact["dest"]
    assert flag.default == fact["default"]
    assert flag.is_switch == fact["switch"]
    assert flag.is_many == fact["many"]
    if not flag.is_switch:
        assert {"moe_layer_freq": "moe_freq_type"}.get(flag.kind.__name__, flag.kind.__name__) == (fact["type"] or "str")
        if flag.option not in FEWER_CHOICES:
            assert [str(choice) for choice in flag.choices or ()] == (fact["choices"] or [])
    assert flag.help.endswith(".")


def test_own_flags_do_not_take_names_of_the_host():
    assert not OWN & ({*FACTS} | host_only_flags())


@pytest.mark.megatron_lm
@pytest.mark.skipif(
    not os.environ.get("MEGATRON_LM_PATH"), reason="set MEGATRON_LM_PATH to a Megatron-LM core_v0.12.1 checkout"
)
def test_recording_is_up_to_date():
    """The recording and the list of flags that only a checkout has, against the checkout's parser itself."""
    program = (
        "import argparse, json\n"
        "from megatron.training.arguments import add_megatron_arguments\n"
        "parser = add_megatron_arguments(argparse.ArgumentParser())\n"
        "print('RESULT', json.dumps({o: [a.dest, repr(a.default)] for a in parser._actions for o in a.option_strings}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.environ["MEGATRON_LM_PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    real = json.loads(done.stdout.split("RESULT", 1)[1])
    real.pop("-h"), real.pop("--help")
    assert {*FACTS} | host_only_flags() == {*real}
    assert not {*FACTS} & host_only_flags()
    for option, fact in FACTS.items():
        assert [fact["dest"], repr(fact["default"])] == real[option], option


def problem_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv=list(words))
    return str(caught.value)


def test_flag_that_only_a_checkout_has():
    text = problem_of("--bert-no-binary-head", "--retro-project-dir", "x")
    assert "2 problems" in text
    assert "--bert-no-binary-head: is a flag of Megatron-LM that the built-in trainer does not support" in text
    assert "checkout" in text


def test_unknown_flag_names_the_nearest():
    assert "did you mean --num-layers" in problem_of("--num-layer", "4").lower().replace("or", "")


def test_value_of_the_wrong_form():
    assert "--num-layers" in problem_of("--num-layers", "four")


def test_abbreviations_are_not_accepted():
    assert "--hidden-siz" in problem_of("--hidden-siz", "4")


def test_equals_sign_and_repetition():
    args = parse_args(argv=["--lr=0.5", "--lr", "0.25", "--num-layers=3"])
    assert (args.lr, args.num_layers) == (0.25, 3)
    assert {"lr", "num_layers"} <= set(args.given_flags) and "seed" not in args.given_flags


def test_a_programs_own_flag():
    def provider(parser):
        parser.add_argument("--my-flag", type=int, default=7)
        return parser

    assert parse_args(provider, argv=["--my-flag", "8"]).my_flag == 8


def test_features_flags_are_there():
    assert "--noop-layers" in build_parser()._option_string_actions


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2", 2), ("[0,1,1]", [0, 1, 1]), ("([0]+[1]*3)*2", [0, 1, 1, 1, 0, 1, 1, 1]), ("[1] * 2 + [0]", [1, 1, 0])],
)
def test_moe_layer_freq(text, expected):
    assert moe_layer_freq(text) == expected


@pytest.mark.parametrize("text", ["[__import__('os')]", "[1]*'a'", "[x]"])
def test_moe_layer_freq_evaluates_nothing_else(text):
    with pytest.raises((ValueError, TypeError)):
        moe_layer_freq(text)
