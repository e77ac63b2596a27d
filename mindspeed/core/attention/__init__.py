"""Attention of one tile (some queries, some keys) on every device, and how tiles are merged into attention."""

from mindspeed.core.attention.contract import CAUSAL, FULL, Scoring, Visibility
from mindspeed.core.attention.dispatch import attend, attend_backward
from mindspeed.core.attention.dropout import Dropout
from mindspeed.core.attention.merge import Accumulator, GradientSum, merge, merge_fused, merge_into

__all__ = [
    "CAUSAL",
    "FULL",
    "Accumulator",
    "Dropout",
    "GradientSum",
    "Scoring",
    "Visibility",
    "attend",
    "attend_backward",
    "merge",
    "merge_fused",
    "merge_into",
]
