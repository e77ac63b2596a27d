"""What a benchmark case is. A group is a file `benchmarks/<group>.py` or a folder `benchmarks/<group>/bench_*.py`.

    @case("ops.rms_norm.both", feature="rms_norm", metric="ratio", against="torch eager", must=5.0, aim=7.0)
    def rms_norm_both(run: Run) -> Timing:
        '''RMSNorm forward and backward, 8192 x 4096 bf16.'''
        return operator_timing(
            rms_norm, plain_rms_norm, lambda: (torch.randn(...), torch.ones(...)), mode="both",
            peers={"torch eager": plain_rms_norm, "torch.compile": lambda: torch.compile(plain_rms_norm)},
            floor=Floor(bytes=5 * M * H * 2), workload={"M": M, "H": H, "dtype": "bf16"},
        )

A case function is called only when the case runs, in a process of its own. It returns
  * `Timing`: callables that are timed here, paired round by round;
  * `Paired`: a function that performs one round by itself, for cases of several processes or with a clock of their own;
  * `Counted`: figures without noise.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

import torch

PRESETS = ("smoke", "standard", "full")
Metric = Literal["fraction", "ratio", "value"]
Better = Literal["higher", "lower", "equal"]


class Skip(Exception):
    """Raised by a case function that cannot run here; the text says what it needs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the command was called, for case functions that depend on it."""

    device: str = "cpu"
    preset: str = "standard"
    rounds: int = 5
    peers: tuple[str, ...] | None = None  # None: all that are installed
    ranks: tuple[int, ...] = (1, 2)
    timeout: float = 300.0

    def wants_peer(self, name: str) -> bool:
        """Whether a peer was asked for; names are compared without regard to case, spaces and dots."""
        return self.peers is None or _plain(name) in map(_plain, self.peers)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What the machine must do at least: bytes read and written, and floating-point operations in `dtype`."""

    bytes: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Check:
    """Outcome of a correctness check; `tolerance` is what `error` may be."""

    error: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the result may be reported (a NaN never is)."""
        return self.error <= self.tolerance


@runtime_checkable
class Staged(Protocol):
    """A contender with an untimed part: what is timed is the outer call of `call(*prepare(*inputs))`.

    With a true attribute `reusable`, one `prepare` serves all calls of a round.
    """

    def prepare(self, *inputs: Any) -> tuple[Any, ...]:
        """Untimed part; returns the arguments of `call`."""
        ...

    def call(self, *prepared: Any) -> Any:
        """Timed part."""
        ...


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Other software for the same job.

    Attributes:
        make: returns the callable that is timed; called once, imports what it needs. `ImportError` means not installed.
        version: shown beside the figures.
    """

    make: Callable[[], Callable[..., Any] | Staged]
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Callables on the same inputs, timed in alternating order.

    Attributes:
        ours: the measured call; receives `*inputs()`.
        inputs: fresh random inputs, drawn once a round and given to ours and all peers.
        peers: by name.
        check: judges one contender (`ours` or what a peer made) before anything is timed; required.
        floor: least work, timed in the same rounds; None if there is no meaningful one.
        workload: shapes, dtypes, sizes: goes into the report.
    """

    ours: Callable[..., Any] | Staged
    inputs: Callable[[], tuple[Any, ...]]
    check: Callable[[Any], Check]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    floor: Floor | None = None
    workload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One round performed by the case itself.

    Attributes:
        round: returns the cost of "ours" and of each peer, and optionally of "floor", measured next to each other.
        check: outcome of the correctness check, made before the first round.
        statistic: "median" of the rounds, "min" for costs that only noise can raise, or "last" if every round returns the
            best estimate so far.
        versions: of peers, by name.
        status: why a peer has no figures, by name: "not installed", for example.
    """

    round: Callable[[], Mapping[str, float]]
    check: Check
    statistic: Literal["median", "min", "last"] = "median"
    workload: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    status: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Exact figures: ours, the derived minimum, and what peers need."""

    ours: float
    check: Check
    floor: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case as declared by `@case`."""

    id: str
    feature: str
    metric: Metric
    against: str | None
    better: Better
    must: float | None
    aim: float | None
    unit: str
    preset: str
    devices: tuple[str, ...]
    function: Callable[[Run], Timing | Paired | Counted]

    @property
    def group(self) -> str:
        """First part of the id; `attn` is short for attention."""
        first = self.id.partition(".")[0]
        return "attention" if first == "attn" else first

    @property
    def clock(self) -> str:
        """ "cpu", "wall" or "device"; "count" for exact figures."""
        first = self.unit.partition(" ")[0].lower()
        return first if first in ("cpu", "wall", "device") else "count"

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


def case(
    id: str,
    *,
    feature: str,
    metric: Metric,
    against: str | None = None,
    better: Better = "higher",
    must: float | None = None,
    aim: float | None = None,
    unit: str = "CPU ms",
    preset: str = "standard",
    devices: Iterable[str] = ("cpu",),
) -> Callable[[Callable[[Run], Any]], Callable[[Run], Any]]:
    """Declare a case.

    Args:
        id: `<group>.<name>...`, unique.
        metric: "fraction" (floor / ours), "ratio" (cost of the peer `against` / ours), or "value" (ours in `unit`).
        better: which direction of the metric is better; "equal" asks for exactly `must`.
        must, aim: bounds of the metric; below `must` the case fails.
        unit: of our figure; "CPU ms" or "CPU s" (user and system time of all processes), "wall ms", "device ms", or the
            unit of a count ("bytes", "calls").
        preset: smallest preset in which the case runs.
    """
    if metric == "ratio" and not against:
        raise TypeError(f"case {id}: a ratio needs the peer it is taken against")
    if preset not in PRESETS:
        raise TypeError(f"case {id}: preset {preset!r} is none of {', '.join(PRESETS)}")

    def declare(function: Callable[[Run], Any]) -> Callable[[Run], Any]:
        if not (function.__doc__ or "").strip():
            raise TypeError(f"case {id} needs a docstring that says what is measured")
        declared = Case(
            id=id, feature=feature, metric=metric, against=against, better=better, must=must, aim=aim, unit=unit,
            preset=preset, devices=tuple(devices), function=function,
        )  # fmt: skip
        function.__cases__ = [*getattr(function, "__cases__", []), declared]  # type: ignore[attr-defined]
        return function

    return declare


def operator_timing(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Callable[[], tuple[Any, ...]],
    *,
    mode: Literal["forward", "backward", "both"] = "both",
    peers: Mapping[str, Callable[..., Any] | Peer] | None = None,
    floor: Floor | None = None,
    workload: Mapping[str, Any] | None = None,
    check_inputs: Callable[[], tuple[Any, ...]] | None = None,
    slack: float = 2.0,
) -> Timing:
    """A `Timing` of an operator: forward alone, backward alone, or both; checked by `mindspeed.testing.accuracies`.

    Args:
        fn, reference: operator and textbook torch; take `*inputs()`, return a tensor or a tuple of tensors.
        inputs: floating tensors that require grad receive a gradient in "backward" and "both".
        peers: functions with the same arguments (or `Peer`s that make one).
        check_inputs: smaller inputs for the float64 check; by default the timed ones.
    """
    from mindspeed.testing.accuracy import accuracies

    def check(contender: Any) -> Check:
        rows = accuracies(contender.fn, reference, *(check_inputs or inputs)(), slack=slack)
        worst = max(rows, key=lambda row: row.error / row.allowed if row.allowed else row.error)
        return Check(worst.error, worst.allowed, worst.name)

    def as_peer(given: Callable[..., Any] | Peer) -> Peer:
        if isinstance(given, Peer):
            return Peer(make=lambda: OperatorCall(given.make(), mode), version=given.version)  # type: ignore[arg-type]
        return Peer(make=lambda: OperatorCall(given, mode), version=torch.__version__)

    return Timing(
        ours=OperatorCall(fn, mode),
        inputs=inputs,
        check=check,
        peers={name: as_peer(given) for name, given in (peers or {}).items()},
        floor=floor,
        workload={"mode": mode, **(workload or {})},
    )


class OperatorCall:
    """Forward, backward or both of one operator; the incoming gradients are drawn outside of the timed part."""

    def __init__(self, fn: Callable[..., Any], mode: str) -> None:
        self.fn = fn
        self.mode = mode
        self.reusable = mode != "backward"  # a graph serves one backward

    def prepare(self, *inputs: Any) -> tuple[Any, ...]:
        """Run forward to learn the outputs' shapes, and draw their gradients."""
        if self.mode == "forward":
            return inputs, None, None
        outputs = _tensors(self.fn(*inputs))
        grads = [torch.randn_like(output) for output in outputs]
        return inputs, outputs if self.mode == "backward" else None, grads

    def call(self, inputs: tuple[Any, ...], outputs: list[torch.Tensor] | None, grads: list[torch.Tensor] | None) -> Any:
        """The measured part."""
        if grads is None:
            with torch.no_grad():
                return self.fn(*inputs)
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        return torch.autograd.grad(outputs or _tensors(self.fn(*inputs)), wanted, grads, allow_unused=True)


def _tensors(returned: Any) -> list[torch.Tensor]:
    found = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    return [item for item in found if isinstance(item, torch.Tensor) and item.requires_grad]


def groups() -> dict[str, list[str]]:
    """Importable module names of every group, by group."""
    found: dict[str, list[str]] = {}
    here = Path(__file__).parent
    for entry in pkgutil.iter_modules([str(here)]):
        if entry.name.startswith("_") or entry.name in ("peers", "report"):
            continue
        found[entry.name] = [f"benchmarks.{entry.name}"]
    for folder in sorted(path for path in here.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))):
        files = sorted(folder.glob("bench_*.py"))
        if files:
            found[folder.name] = [f"benchmarks.{folder.name}.{file.stem}" for file in files]
    return found


def cases_of(modules: Iterable[str]) -> list[Case]:
    """All cases declared in these modules, in order of their names.

    Raises:
        ValueError: two cases share an id.
    """
    found: dict[str, Case] = {}
    for module in modules:
        for declared in _cases_in(importlib.import_module(module)):
            if declared.id in found:
                raise ValueError(f"two benchmark cases are called {declared.id}")
            found[declared.id] = declared
    return list(found.values())


def _cases_in(module: ModuleType) -> list[Case]:
    """Of the module's own functions, and of those that it keeps in tuples."""
    items = [item for value in vars(module).values() for item in (value if isinstance(value, tuple) else (value,))]
    functions = [item for item in items if getattr(item, "__module__", None) == module.__name__]
    return [declared for function in functions for declared in getattr(function, "__cases__", [])]
