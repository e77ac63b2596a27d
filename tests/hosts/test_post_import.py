import importlib
import sys

import pytest

from mindspeed.host import post_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose body calls us in the middle, before it imports its last module."""
    place = tmp_path / "midway"
    place.mkdir()
    (place / "__init__.py").write_text("import midway_caller\nfrom midway import last\n")
    (place / "last.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("midway")]:
        del sys.modules[name]


def test_action_waits_for_the_last_module_of_a_package_that_is_being_imported(package, tmp_path):
    (tmp_path / "midway_caller.py").write_text(
        "import sys\nfrom mindspeed.host import post_import\nseen = []\n"
        "post_import.when_importable('midway', 'midway.last', lambda: seen.append(sys.modules['midway.last'].value))\n"
        "at_once = list(seen)\n"
    )
    importlib.import_module("midway")
    caller = sys.modules["midway_caller"]
    assert caller.at_once == [] and caller.seen == [1]
    assert type(sys.modules["midway.last"].__spec__.loader).__name__ == "SourceFileLoader"
    assert not any(isinstance(finder, post_import._AfterModule) for finder in sys.meta_path)


def test_action_runs_at_once_otherwise(package, tmp_path):
    (tmp_path / "midway_caller.py").write_text("")
    seen = []
    post_import.when_importable("midway", "midway.last", lambda: seen.append("before"))
    importlib.import_module("midway")
    post_import.when_importable("midway", "midway.last", lambda: seen.append("after"))
    assert seen == ["before", "after"]
