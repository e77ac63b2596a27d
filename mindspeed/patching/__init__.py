"""Planned, verified and reversible changes of a host."""

from mindspeed.errors import Problem
from mindspeed.patching.feature import Change, Feature, RunShape
from mindspeed.patching.flags import NoFlags, flag
from mindspeed.patching.patch import Patch, add, replace, rewrite, set_value, wrap

__all__ = [
    "Change",
    "Feature",
    "NoFlags",
    "Patch",
    "Problem",
    "RunShape",
    "add",
    "flag",
    "replace",
    "rewrite",
    "set_value",
    "wrap",
]
