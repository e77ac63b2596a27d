"""Every feature has its test and its page; pages name only flags that exist; names in declarations are real."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest
import typer

from mindspeed.cli import app
from mindspeed.patching.discovery import all_features
from mindspeed.patching.flags import flag_specs
from mindspeed.patching.parser import EngineFlags, add_flags, all_specs
from mindspeed.patching.withdrawn import withdrawn, without_effect
from mindspeed.training.flag_table import every_flag

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "features"
FEATURES = {feature.name: feature for feature in all_features()}
# Options of other programs, and of the launcher in `mindspeed pretrain`, that pages mention.
FOREIGN = {
    "--nproc_per_node",
    "--nproc-per-node",
    "--nnodes",
    "--node_rank",
    "--master_addr",
    "--master_port",
    "--rdzv-backend",
}
FOREIGN |= {"--nproc", "--upgrade", "--extra-index-url", "--no-build-isolation", "--markdown", "--help"}


def by_name(value):
    return pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))(value)


@by_name
def test_feature_has_a_test_file(feature):
    area = type(feature).__module__.split(".")[2]
    tests = [*(ROOT / "tests" / "core" / area).rglob("test_*.py"), *(ROOT / "tests" / "hosts").rglob("test_*.py")]
    naming = [path for path in tests if re.search(rf"\b{type(feature).__name__}\b", path.read_text(encoding="utf-8"))]
    assert naming, f"no test below tests/core/{area} names {type(feature).__name__}"


@by_name
def test_feature_has_a_page(feature):
    page = PAGES / f"{feature.page}.md"
    assert page.exists(), f"{feature.name} needs {page.relative_to(ROOT)} (or name another page in its declaration)"
    missing = [spec.option for spec in feature.specs if spec.option not in page.read_text(encoding="utf-8")]
    assert missing == [], f"{page.name} does not mention {', '.join(missing)}"


@by_name
def test_declaration_is_sound(feature):
    assert feature.level in (0, 1, 2)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", feature.name)
    assert set(feature.conflicts) <= set(FEATURES), "conflicts name features that do not exist"
    assert set(feature.needs) <= set(FEATURES), "needs name features that do not exist"
    assert feature.name not in feature.conflicts and all(feature.conflicts.values())
    assert not set(feature.needs) & set(feature.conflicts)
    for spec in feature.specs:
        assert list(spec.problems(spec.default)) == [] and spec.help[0].isupper() and spec.help.rstrip().endswith((".", ")")), (
            spec
        )
        assert spec.option.startswith("--") and spec.option == spec.option.lower()


def known_options():
    options = {spec.option for spec in every_flag()} | {alias for spec in every_flag() for alias in spec.aliases}
    for spec in (*all_specs(all_features()).values(), *flag_specs(EngineFlags)):
        options |= {spec.option, *spec.aliases}
    options |= set(
        json.loads(resources.files("mindspeed.training").joinpath("host_only_flags.json").read_text(encoding="utf-8"))
    )
    for command in typer.main.get_command(app).commands.values():
        options |= {option for parameter in command.params for option in parameter.opts}
    return options | set(without_effect()) | FOREIGN


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_pages_name_only_flags_that_exist(page):
    known = known_options()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", page.read_text(encoding="utf-8")))
    assert [option for option in sorted(named) if option not in known and withdrawn(option) is None] == []


def test_all_flags_fit_one_parser_with_the_trainers():
    import argparse

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for spec in every_flag():
        spec.add_to(parser)
    add_flags(parser, all_features())
    read = parser.parse_args([])
    for dest, spec in all_specs(all_features()).items():
        assert hasattr(read, dest), spec.option


@by_name
def test_feature_is_off_by_default_unless_it_is_always_on(feature):
    import argparse

    from mindspeed.patching.activation import run_shape
    from mindspeed.patching.flags import read_flags

    if feature.level == 2:
        defaults = {spec.dest: spec.default for spec in every_flag()}
        args = argparse.Namespace(**defaults)
        assert feature.why(read_flags(feature.flags, defaults), run_shape(args, "cpu")) == ""
