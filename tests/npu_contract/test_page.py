"""The examples of the page on the contract run as they are written."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contributing-npu.md"
EXAMPLES = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "testing.npu_" in text]


@pytest.mark.npu_contract
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, tmp_path):
    file = tmp_path / f"test_example_{number}.py"
    file.write_text(EXAMPLES[number])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_the_page_has_examples_of_both_stand_ins():
    text = "".join(EXAMPLES)
    assert "@npu_contract()" in text and "@npu_semantics()" in text
