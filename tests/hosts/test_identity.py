import sys

import pytest

from mindspeed.errors import TargetError
from mindspeed.host import identity


def make_core(path, version=(0, 12, 1), suffix=""):
    path.mkdir(parents=True)
    lines = [f"{key} = {number}" for key, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)]
    (path / "package_info.py").write_text("\n".join([*lines, f"PRE_RELEASE = '{suffix}'"]))
    return path


def test_version_is_read_without_importing(tmp_path):
    assert identity.core_version(make_core(tmp_path / "a")) == "0.12.1"
    assert identity.core_version(make_core(tmp_path / "b", (0, 13, 0), "rc1")) == "0.13.0rc1"


def test_directory_without_version_is_named(tmp_path):
    with pytest.raises(TargetError, match=str(tmp_path)):
        identity.core_version(tmp_path)
    (tmp_path / "package_info.py").write_text("MAJOR = 0")
    with pytest.raises(TargetError, match="does not state MAJOR, MINOR and PATCH"):
        identity.core_version(tmp_path)


def test_equal_versions_from_two_places_are_accepted(tmp_path):
    installed = make_core(tmp_path / "site" / "megatron" / "core")
    training = make_core(tmp_path / "checkout" / "megatron" / "core").parent / "training"
    identity.refuse_mixture(installed, "0.12.1", training)


def test_different_versions_are_refused_with_both_places_and_the_remedy(tmp_path):
    installed = make_core(tmp_path / "site" / "megatron" / "core")
    training = make_core(tmp_path / "checkout" / "megatron" / "core", (0, 13, 0)).parent / "training"
    with pytest.raises(TargetError) as caught:
        identity.refuse_mixture(installed, "0.12.1", training)
    text = str(caught.value)
    assert str(installed) in text and str(training) in text and f"PYTHONPATH={tmp_path / 'checkout'}" in text


def test_unsupported_version_is_refused(tmp_path, monkeypatch):
    core = make_core(tmp_path / "megatron" / "core", (0, 11, 0))
    monkeypatch.setattr(identity, "find_package", lambda name: core if name == "megatron.core" else None)
    with pytest.raises(TargetError, match="megatron-core 0.11.0 at .* is not supported. Supported: 0.12.1"):
        identity.identify()


def test_absent_host_is_no_error(monkeypatch):
    monkeypatch.setattr(identity, "find_package", lambda name: None)
    assert identity.identify() is None


def test_installed_host():
    found = identity.identify()
    assert found is not None and found.core_version == "0.12.1"
    assert found.kind == ("program" if found.training_path is None else "megatron-lm")
    assert "0.12.1" in str(found) and "megatron-core" in found.versions


def test_package_is_found_without_importing_it():
    assert identity.find_package("no_such_package_at_all") is None
    assert identity.find_package("no_such_package_at_all.inside") is None
    assert "wsgiref" in str(identity.find_package("wsgiref")) and "wsgiref.handlers" not in sys.modules
