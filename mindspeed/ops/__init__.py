"""Operators with one name and one meaning on every device; importable without Megatron."""

from mindspeed.ops._registry import Ran, backend_report, backends

__all__ = ["Ran", "backend_report", "backends"]
