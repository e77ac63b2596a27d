"""The device's random stream is the default generator; what the host draws goes to a stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.data.dataloader

from mindspeed.patching.patch import Patch, set_value, wrap
from mindspeed.platform.cpu_shims._places import answer, answers, everywhere
from mindspeed.platform.scope import mark

if TYPE_CHECKING:
    from mindspeed.platform.host_random import HostRandomStream

_BOTH = "seeds the host's stream too, as with a device"
_DATALOADER = "torch.utils.data.dataloader"
# Everything of a DataLoader's iterator that draws: base seeds, shuffles, and the user's dataset in this process.
_HOST_DRAWS = (
    "_BaseDataLoaderIter.__init__",
    "_SingleProcessDataLoaderIter.__init__",
    "_MultiProcessingDataLoaderIter.__init__",
    "_BaseDataLoaderIter._reset",
    "_MultiProcessingDataLoaderIter._reset",
    "_BaseDataLoaderIter.__next__",
)


def patches(host_stream: HostRandomStream) -> Iterator[Patch]:
    """Names of `torch.cuda`, `torch.manual_seed`, and the scope around DataLoader iterators."""
    yield from answers(_DEVICE_STREAM, "torch.cuda", "torch.cuda.random", reason="the default generator is the device's stream")
    yield from answers({"_lazy_call": _call_now, "_lazy_init": answer(None)}, "torch.cuda", reason="nothing to wait for")
    yield set_value("torch.cuda:default_generators", DeviceGenerators(), reason="the default generator is the device's stream")
    both = functools.partial(_seeding_both, host_stream)
    for name in ("manual_seed", "seed"):
        yield from everywhere(name, both, "torch", reason=_BOTH)
        # Another object than torch's: torch._dynamo, when imported, replaces torch.manual_seed if it is this one.
        yield wrap(f"torch.random:{name}", functools.partial(_seed_both, host_stream), reason=_BOTH)
    for method in _HOST_DRAWS:
        advice = functools.partial(_on_host_stream, host_stream)
        yield wrap(f"{_DATALOADER}:{method}", advice, reason="must not advance the device's stream")


class DeviceGenerators:
    """One generator for each device: whatever the index, the default generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[torch.Generator]:
        yield torch.default_generator


def _seed_both(host_stream: HostRandomStream, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    result = original(*args, **options)
    host_stream.seed(torch.default_generator.initial_seed())
    return result


def _seeding_both(host_stream: HostRandomStream, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def seeding(*args: Any, **options: Any) -> Any:
        return _seed_both(host_stream, original, *args, **options)

    seeding_both: Callable[..., Any] = mark(seeding, original)
    return seeding_both


def _on_host_stream(host_stream: HostRandomStream, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with host_stream.drawing():
        return original(*args, **options)


def _call_now(callback: Callable[[], None], **_options: Any) -> None:
    """A queue would never be emptied, since CUDA never starts here."""
    callback()


def _seed_device(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _random_seed() -> None:
    torch.default_generator.seed()


def _state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(new_state)


def _states() -> list[torch.Tensor]:
    return [torch.default_generator.get_state()]


def _set_states(new_states: Any) -> None:
    for state in new_states:
        torch.default_generator.set_state(state)


def _initial_seed() -> int:
    return torch.default_generator.initial_seed()


_DEVICE_STREAM: dict[str, Callable[..., Any]] = {
    "manual_seed": _seed_device,
    "manual_seed_all": _seed_device,
    "seed": _random_seed,
    "seed_all": _random_seed,
    "initial_seed": _initial_seed,
    "get_rng_state": _state,
    "get_rng_state_all": _states,
    "set_rng_state": _set_state,
    "set_rng_state_all": _set_states,
}
