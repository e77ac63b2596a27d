"""Instruments for tests, public so that features outside this repository can be proved the same way."""

from mindspeed.testing.multirank import ranks
from mindspeed.testing.world import World

__all__ = ["World", "ranks"]
