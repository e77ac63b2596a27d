"""Each operator has a page, and the examples of all pages print what they say."""

import doctest
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
