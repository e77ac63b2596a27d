import copy
import pickle

import pytest

from mindspeed.patching.settings import Settings


@pytest.fixture
def settings():
    return Settings(["b", "a"], {"parts": [1, 2], "size": 3, "table": {"x": [1]}})


def test_flags_are_attributes_and_features_members(settings):
    assert settings.size == 3 and settings.parts == (1, 2) and list(settings) == ["parts", "size", "table"]
    assert "a" in settings and "c" not in settings and settings.features == ("a", "b")
    with pytest.raises(AttributeError, match="no feature declares a flag 'speed'"):
        settings.speed  # noqa: B018


def test_settings_do_not_change(settings):
    for change in (
        lambda: setattr(settings, "size", 4),
        lambda: delattr(settings, "size"),
        lambda: setattr(settings, "new", 1),
    ):
        with pytest.raises(AttributeError, match="do not change"):
            change()


def test_copies_pickles_and_hashes(settings):
    assert copy.copy(settings) is copy.deepcopy(settings) is settings
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings and hash(again) == hash(settings) and again != Settings(["a"], {"size": 3})
