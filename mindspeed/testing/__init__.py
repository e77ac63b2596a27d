"""Instruments for tests, public so that features outside this repository can be proved the same way."""

from mindspeed.testing.accuracy import assert_as_accurate, with_grads
from mindspeed.testing.communication import count_communication
from mindspeed.testing.events import EventLog
from mindspeed.testing.flops import count_flops
from mindspeed.testing.memory import LiveMemory, saved_bytes
from mindspeed.testing.multirank import ranks
from mindspeed.testing.parity import assert_same_training, train
from mindspeed.testing.sleeping import SleepingStage, delayed_links
from mindspeed.testing.world import World

__all__ = [
    "EventLog",
    "LiveMemory",
    "SleepingStage",
    "World",
    "assert_as_accurate",
    "assert_same_training",
    "count_communication",
    "count_flops",
    "delayed_links",
    "ranks",
    "saved_bytes",
    "train",
    "with_grads",
]
