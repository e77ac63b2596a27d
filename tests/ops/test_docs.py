"""Each operator has a page, and the examples of all pages print what they say."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import mindspeed.ops

PAGES = Path(__file__).parents[2] / "docs" / "ops"


def examples():
    for page in sorted(PAGES.glob("*.md")):
        for number, text in enumerate(re.findall(r"```pycon\n(.*?)```", page.read_text(), flags=re.DOTALL)):
            yield pytest.param(page, text, id=f"{page.stem}-{number}")


@pytest.mark.parametrize(("page", "text"), examples())
def test_examples_print_what_the_page_says(page, text):
    case = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert case.examples
    report = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(case, out=report.append)
    assert results.failed == 0, "".join(report)


def test_every_operator_has_a_page_with_an_example_and_a_line_in_the_index():
    index = (PAGES / "index.md").read_text()
    for _, name, is_package in pkgutil.iter_modules(mindspeed.ops.__path__):
        if name.startswith("_") or is_package or name == "comm":
            continue
        page = PAGES / f"{name}.md"
        assert page.exists(), f"docs/ops/{name}.md is missing"
        assert "```pycon" in page.read_text(), f"docs/ops/{name}.md has no example"
        assert f"({name}.md)" in index, f"docs/ops/index.md does not list {name}"


def signatures():
    for page in sorted(PAGES.glob("*.md")):
        for path, arguments in re.findall(r"`(mindspeed\.ops\.\w+\.\w+)\(([^`]*?)\)(?:\s*->[^`]*)?`", page.read_text()):
            if arguments != "…":
                yield pytest.param(path, " ".join(arguments.split()), id=path.removeprefix("mindspeed.ops."))


@pytest.mark.parametrize(("path", "arguments"), signatures())
def test_pages_give_the_signatures_of_the_code(path, arguments):
    module, _, name = path.rpartition(".")
    actual = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    written = inspect.signature(eval(f"lambda {arguments}: None")).parameters.values()
    assert [(p.name, p.kind, p.default) for p in written] == [(p.name, p.kind, p.default) for p in actual]


def test_every_page_gives_the_signature_of_its_module():
    given = {parameter.values[0].rpartition(".")[0] for parameter in signatures()}
    pages = {f"mindspeed.ops.{page.stem}" for page in PAGES.glob("*.md")} - {"mindspeed.ops.index"}
    assert pages - given == {"mindspeed.ops.lcal_functional"}  # whose object has a table of methods


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_pages_say_what_a_user_must_know(page):
    if page.stem == "index":
        return
    text = page.read_text()
    for heading in ("**Precision.**", "**Devices.**", "**Errors.**"):
        assert heading in text, f"{page.name} lacks {heading}"
    assert page.stem == "lcal_functional" or "Formula" in text, f"{page.name} gives no formula"
    assert "\n|---|" in text, f"{page.name} has no table of arguments"
