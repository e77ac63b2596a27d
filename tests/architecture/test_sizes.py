"""Files and functions that fit on a few screens, and no state hidden in modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mindspeed", "benchmarks", "tools", "tests", "scripts")
FILE_LINES, FUNCTION_LINES = 400, 60


def sources(*suffixes):
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def long_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} has {lines} lines"


def rebound_globals(tree):
    return [name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names]


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_looked_at(folder):
    assert any(path.is_relative_to(ROOT / folder) for path in sources(".py"))


def test_files_are_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(".py", ".sh", ".c", ".cpp")}
    assert [f"{path.relative_to(ROOT)}: {count}" for path, count in lines.items() if count > FILE_LINES] == []


def test_functions_are_short():
    assert [f"{path.relative_to(ROOT)}: {text}" for path in sources(".py") for text in long_functions(parsed(path))] == []


def test_no_function_rebinds_a_name_of_its_module():
    found = {str(path.relative_to(ROOT)): names for path in sources(".py") if (names := rebound_globals(parsed(path)))}
    assert found == {}


def test_what_is_too_long_or_global_is_seen():
    body = "    x = 1\n" * FUNCTION_LINES
    assert list(long_functions(ast.parse(f"def f():\n{body}"))) == [f"f has {FUNCTION_LINES + 1} lines"]
    assert rebound_globals(ast.parse("def f():\n    global a, b\n")) == ["a", "b"]
