"""Which versions of the host are installed and which are supported, for messages."""

from __future__ import annotations

import importlib.metadata
import sys

SUPPORTED = {"megatron-core": "0.12.1 (checkout tag core_v0.12.1 or PyPI)"}


def host_versions() -> dict[str, str]:
    """Version and place of the host's distributions, as far as they can be told without importing them."""
    versions: dict[str, str] = {}
    core = sys.modules.get("megatron.core")
    if core is not None and getattr(core, "__version__", None):
        path = next(iter(getattr(core, "__path__", [])), "")
        versions["megatron-core"] = f"{core.__version__} at {path}"
    else:
        try:
            versions["megatron-core"] = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            versions["megatron-core"] = "not installed"
    return versions
