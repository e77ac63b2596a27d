"""Which megatron-core and which Megatron-LM this process would import, and whether they belong together."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed.errors import TargetError

SUPPORTED_CORE = ("0.12.1",)


@dataclass(frozen=True)
class HostIdentity:
    """Versions and places of the host's parts; `training_path` is None without a Megatron-LM checkout."""

    core_version: str
    core_path: Path
    training_path: Path | None
    torch_version: str

    @property
    def kind(self) -> str:
        """`megatron-lm` when `megatron.training` can be imported, else `program`."""
        return "program" if self.training_path is None else "megatron-lm"

    @property
    def versions(self) -> dict[str, str]:
        """Versions that patches are planned against."""
        return {"megatron-core": self.core_version, "torch": self.torch_version}

    def __str__(self) -> str:
        place = self.core_path if self.training_path is None else self.training_path.parent.parent
        return f"{self.kind}, megatron-core {self.core_version} at {place}, torch {self.torch_version}"


def find_package(name: str) -> Path | None:
    """Directory of an importable package, without importing the package itself."""
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__path__", None):
        return Path(next(iter(loaded.__path__)))
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def core_version(core_path: Path) -> str:
    """Version written in `package_info.py` of a megatron-core directory, read without importing it."""
    info = core_path / "package_info.py"
    try:
        text = info.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{core_path} is not a megatron-core package: {error.strerror or error}") from None
    numbers = {key: value for key, value in re.findall(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)", text, re.MULTILINE)}
    if len(numbers) != 3:
        raise TargetError(f"{info} does not state MAJOR, MINOR and PATCH; install megatron-core {SUPPORTED_CORE[-1]}")
    suffix = re.search(r"^PRE_RELEASE\s*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
    return "{MAJOR}.{MINOR}.{PATCH}".format(**numbers) + (suffix.group(1) if suffix else "")


def identify() -> HostIdentity | None:
    """Describe the installed host; None when megatron-core is not installed at all.

    Raises:
        TargetError: the version is not supported, or `megatron.core` and `megatron.training` come from
            different places with different versions.
    """
    core_path = find_package("megatron.core")
    if core_path is None:
        return None
    version = core_version(core_path)
    training_path = find_package("megatron.training")
    if training_path is not None:
        refuse_mixture(core_path, version, training_path)
    if version not in SUPPORTED_CORE:
        raise TargetError(
            f"megatron-core {version} at {core_path} is not supported. Supported: {', '.join(SUPPORTED_CORE)} "
            f"(Megatron-LM tag core_v{SUPPORTED_CORE[-1]} or `pip install megatron-core=={SUPPORTED_CORE[-1]}`)"
        )
    return HostIdentity(version, core_path, training_path, torch.__version__)


def refuse_mixture(core_path: Path, version: str, training_path: Path) -> None:
    """Stop when a checkout's `megatron.training` would run on another version's `megatron.core`.

    Both are parts of one namespace package, so an installed megatron-core can come first on the path.
    """
    own_core = training_path.parent / "core"
    if own_core.resolve() == core_path.resolve() or not own_core.is_dir():
        return
    own_version = core_version(own_core)
    if own_version != version:
        raise TargetError(
            f"mixed installation: megatron.core {version} comes from {core_path}, but megatron.training from "
            f"{training_path} needs {own_version}; put the checkout first: PYTHONPATH={training_path.parent.parent}"
        )
