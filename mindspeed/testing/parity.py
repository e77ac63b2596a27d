"""Parity harness: train the same tiny GPT twice, with and without a feature or in two layouts, and compare everything.

    def test_noop_layers_train_the_same():
        assert_same_training("", "--swap-optimizer", features=["swap-optimizer"])
        assert_same_training("", "--tensor-model-parallel-size 2 --sequence-parallel", world_b=2)

Both runs start from weights that depend on their names alone and read the same samples; the vocabulary is padded to
the same size in every layout. Compared are losses, gradient norms, and the final weights put together from all ranks,
whose copies of a weight must agree bit for bit. A feature whose patches were never called does not pass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mindspeed.testing.pool import TORCH_MODULES, Pool, pools
from mindspeed.testing.tiny_data import provider_for
from mindspeed.testing.whole_weights import Part, copies_of, fill, join

Host = Literal["trainer", "megatron-lm"]
VOCABULARY = 4224  # padded; NullTokenizer adds one token; more than the ids that --mock-data might hold
SEQ_LENGTH = 32
# eps is large on purpose: with the usual 1e-8 a gradient of rounding size would still move its weight by a full step
TINY_FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings {seq} --seq-length {seq} "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --adam-eps 1e-4 --adam-beta2 0.999 "
    "--weight-decay 0.01 --clip-grad 1.0 --train-iters {steps} --log-interval 1 --eval-iters 0 --num-workers 0 "
    "--tokenizer-type NullTokenizer --vocab-size {vocabulary} --make-vocab-size-divisible-by {multiple} "
    "--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --no-create-attention-mask-in-dataloader {data}"
)
_OWN_DATA = {  # flags that satisfy the host's checks; the samples are `TinyTokens` all the same
    "trainer": "--mock-data --no-progress",
    "megatron-lm": "--mock-data --no-masked-softmax-fusion --use-cpu-initialization --distributed-timeout-minutes 2",
}


@dataclass(frozen=True)
class Calls:
    """How often a counted patch ran on the rank where it ran most."""

    owner: str
    target: str
    calls: int


@dataclass(frozen=True)
class TrainingRecord:
    """What one training run did.

    Attributes:
        losses, grad_norms: one entry for each step.
        features: names of the features that were on.
        patches: counted patches of features, with their calls.
        weights: final weights of the whole model by name.
    """

    losses: list[float]
    grad_norms: list[float]
    features: frozenset[str] = frozenset()
    patches: tuple[Calls, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass
class _RankRecord:
    """What one rank saw."""

    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    features: frozenset[str] = frozenset()
    patches: list[Calls] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Keep loss and gradient norm of a log line."""
        self.losses.append(metrics.get("lm loss"))
        self.grad_norms.append(float(metrics["grad norm"]))

    def close(self, models: Iterable[torch.nn.Module]) -> None:
        """Keep what is gone once the run is taken down."""
        import mindspeed

        runtime = mindspeed.runtime()
        self.features = frozenset(active.name for active in runtime.active)
        rows = [row for row in runtime.ledger.rows if row.calls is not None and row.owner in self.features]
        self.patches = [Calls(row.owner, row.target, row.calls) for row in rows]
        self.parts = copies_of(_bare(model) for model in models)


def _bare(model: torch.nn.Module) -> torch.nn.Module:
    """A chunk without its data-parallel and 16-bit wrappers."""
    while not hasattr(model, "sharded_state_dict") or type(model).__name__ in ("DistributedDataParallel", "Float16Module"):
        model = model.module
    return model


def tiny_flags(flags: str | Sequence[str], steps: int, host: Host) -> list[str]:
    """The whole command line of a run; `flags` come last, so that they win."""
    own = shlex.split(flags) if isinstance(flags, str) else list(flags)
    tensor = int(own[own.index("--tensor-model-parallel-size") + 1]) if "--tensor-model-parallel-size" in own else 1
    common = TINY_FLAGS.format(
        seq=SEQ_LENGTH, steps=steps, vocabulary=VOCABULARY - 1, multiple=VOCABULARY // tensor, data=_OWN_DATA[host]
    )
    return [*shlex.split(common), *own]


def train(flags: str | Sequence[str], *, world: int = 1, steps: int = 3, host: Host = "trainer") -> TrainingRecord:
    """Train the tiny GPT on `world` ranks of the pool.

    Runs that were made before in this session are not repeated.

    Raises:
        RankFailure: the run failed; the text holds every rank's traceback and output.
        AssertionError: ranks hold different copies of a weight.
    """
    own = shlex.split(flags) if isinstance(flags, str) else list(flags)
    return _train_once(tuple(own), world, steps, host)


@functools.lru_cache(maxsize=64)
def _train_once(flags: tuple[str, ...], world: int, steps: int, host: Host) -> TrainingRecord:
    argv = tiny_flags(flags, steps, host)
    if host == "trainer":
        records = pools().get(world, megatron=True).run(_train_here, argv)
    else:
        records = _on_megatron_lm(world, argv)
    return _merge(records)


def _merge(records: list[_RankRecord]) -> TrainingRecord:
    norms = records[0].grad_norms
    assert all(record.grad_norms == norms for record in records), "ranks report different gradient norms"
    losses = [loss for loss in records[-1].losses if loss is not None]
    calls: dict[tuple[str, str], int] = {}
    for patch in (patch for record in records for patch in record.patches):
        key = patch.owner, patch.target
        calls[key] = max(calls.get(key, 0), patch.calls)
    return TrainingRecord(
        losses=losses,
        grad_norms=norms,
        features=records[0].features,
        patches=tuple(Calls(owner, target, count) for (owner, target), count in calls.items()),
        weights=join(record.parts for record in records),
    )


def _train_here(world: Any, argv: list[str]) -> _RankRecord:
    """Body on each rank: the built-in trainer with our weights and samples."""
    import mindspeed
    from mindspeed.training import model, pretraining, session

    record = _RankRecord()

    def provide_model(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
        chunk = model.provider_from_text(session.get_args().model_provider)(pre_process, post_process)
        fill(chunk)
        if record.log not in mindspeed.runtime().host.events._handlers["log_line"]:
            mindspeed.runtime().host.events.on("log_line", record.log)
        return chunk

    pretraining.pretrain(
        provider_for(SEQ_LENGTH, VOCABULARY - 1), model_provider=provide_model, argv=argv, after_training=record.close
    )
    return record


def _on_megatron_lm(world: int, argv: list[str]) -> list[_RankRecord]:
    """Run Megatron-LM's own `pretrain` in fresh ranks, with our import line before it."""
    checkout = os.environ.get("MEGATRON_LM_PATH")
    if not checkout or not Path(checkout, "pretrain_gpt.py").is_file():
        raise FileNotFoundError("host megatron-lm needs MEGATRON_LM_PATH to name a checkout of core_v0.12.1")
    pool = Pool(pools().zygote_for("megatron-lm"), world, TORCH_MODULES)
    try:
        return pool.run(_megatron_lm_here, checkout, argv)
    finally:
        pool.close()


def _megatron_lm_here(world: Any, checkout: str, argv: list[str]) -> _RankRecord:
    """Body on each rank: what a user's script does, with our weights, samples and log."""
    sys.path.insert(0, checkout)
    sys.argv[1:] = argv
    import mindspeed.megatron_adaptor  # noqa: F401, I001 - the line under test comes first
    from megatron.core.enums import ModelType  # noqa: TID251 - the host itself
    from megatron.training import training  # noqa: TID251

    spec = importlib.util.spec_from_file_location("pretrain_gpt", Path(checkout, "pretrain_gpt.py"))
    script = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["pretrain_gpt"] = script  # names that it imports from the host are rebound where modules are listed
    spec.loader.exec_module(script)  # type: ignore[union-attr]
    record = _RankRecord()
    kept: list[torch.nn.Module] = []

    def provide_model(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
        chunk = script.model_provider(pre_process, post_process)
        fill(chunk)
        kept.append(chunk)
        return chunk

    with _logged(training, record):
        training.pretrain(
            provider_for(SEQ_LENGTH, VOCABULARY - 1), provide_model, ModelType.encoder_or_decoder, script.forward_step
        )
    record.close(kept)
    return record


@contextlib.contextmanager
def _logged(training: Any, record: _RankRecord) -> Any:
    """Read loss and gradient norm from the arguments of the host's `training_log`."""
    original: Callable[..., Any] = training.training_log

    def training_log(losses: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = losses.get("lm loss")
        record.log({"lm loss": None if loss is None else float(loss), "grad norm": args[7]})
        return original(losses, *args, **kwargs)

    training.training_log = training_log
    try:
        yield
    finally:
        training.training_log = original


def assert_same_training(  # noqa: PLR0913 - every test names two or three of them
    flags_a: str | Sequence[str],
    flags_b: str | Sequence[str],
    world_a: int = 1,
    world_b: int | None = None,
    steps: int = 3,
    *,
    host: Host = "trainer",
    rtol: float = 1e-5,
    weight_atol: float = 1e-5,
    features: Collection[str] = (),
    called: Collection[str] = (),
    rename: Callable[[str], str] = lambda name: name,
    common: str = "",
) -> tuple[TrainingRecord, TrainingRecord]:
    """Assert that two command lines train the same tiny GPT to the same losses, gradient norms and weights.

    Args:
        flags_a, flags_b: what differs between the runs, usually plain Megatron against the feature under test.
        world_a, world_b: numbers of ranks; `world_b` is `world_a` by default.
        rtol: of losses and gradient norms; 0 asks for equal bits. fp32 layouts keep 1e-5 easily.
        weight_atol: largest absolute difference of any final weight; 0 asks for equal bits.
        features: features that must be on in run b and not in run a, beyond those found to differ.
        called: patch targets that must have been called in run b.
        rename: name of a weight of run b -> its name in run a, for features that renumber layers.
        common: flags of both runs.

    Every feature that is on only in run b and has counted patches must have had at least one of them called.

    Returns:
        Both records, for further questions.
    """
    __tracebackhide__ = True
    first = train(shlex.split(common) + _words(flags_a), world=world_a, steps=steps, host=host)
    second = train(shlex.split(common) + _words(flags_b), world=world_b or world_a, steps=steps, host=host)
    _assert_features_ran(first, second, features, called)
    assert len(first.losses) == len(second.losses) == steps, f"{len(first.losses)} and {len(second.losses)} losses logged"
    for name, ours, theirs in (("loss", first.losses, second.losses), ("grad norm", first.grad_norms, second.grad_norms)):
        same = all(math.isclose(a, b, rel_tol=rtol, abs_tol=0.0) for a, b in zip(ours, theirs, strict=True))
        assert same, f"{name} curves differ by more than {rtol:g}:\n  {ours}\n  {theirs}"
    _assert_same_weights(first.weights, {rename(name): weight for name, weight in second.weights.items()}, weight_atol)
    return first, second


def _words(flags: str | Sequence[str]) -> list[str]:
    return shlex.split(flags) if isinstance(flags, str) else list(flags)


def _assert_features_ran(
    first: TrainingRecord, second: TrainingRecord, features: Collection[str], called: Collection[str]
) -> None:
    __tracebackhide__ = True
    added = second.features - first.features
    assert set(features) <= added, f"features on in the second run only: {sorted(added)}, expected {sorted(features)}"
    for feature in added:
        patches = [patch for patch in second.patches if patch.owner == feature]
        assert not patches or any(patch.calls for patch in patches), f"no patch of {feature} was called: {patches}"
    counts = {patch.target.replace(":", "."): patch.calls for patch in second.patches}
    for target in called:
        assert counts.get(target.replace(":", ".")), f"{target} was not called; counted were {counts}"


def _assert_same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor], atol: float) -> None:
    __tracebackhide__ = True
    assert first.keys() == second.keys(), f"weights in one run only: {sorted(first.keys() ^ second.keys())}"
    for name, weight in first.items():
        other = second[name]
        assert weight.shape == other.shape, f"{name}: shapes {tuple(weight.shape)} and {tuple(other.shape)}"
        difference = (weight.float() - other.float()).abs().max().item()
        assert difference <= atol, f"{name}: final weights differ by {difference:.2e}, allowed are {atol:g}"
