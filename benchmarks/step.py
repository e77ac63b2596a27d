"""Whole training steps: what our trainer costs over bare megatron-core calls, and what features gain."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from benchmarks._case import Check, Paired, Run, Skip, case
from benchmarks._ranks import cost
from mindspeed.testing.pool import pools

MICROS = 8  # per rank in step.scale: 2048 tokens, as in step.gpt4
STEPS = 6  # per round and contender; the first one is a warm-up


@case("step.trainer", feature="trainer", metric="ratio", against="megatron-core calls", must=1 / 1.03, aim=1.0, preset="smoke")
def trainer_overhead(run: Run) -> Paired:
    """A step of the built-in trainer beside the same step written by hand, h=256, S=256."""
    return _trainer_beside_calls(hidden=256, length=256)


@case("step.python", feature="trainer", metric="ratio", against="megatron-core calls", must=1 / 1.05, aim=1.0)
def python_overhead(run: Run) -> Paired:
    """The same at toy size, h=64, S=32, where only Python counts."""
    return _trainer_beside_calls(hidden=64, length=32)


def _trainer_beside_calls(hidden: int, length: int) -> Paired:
    trainer, calls = _train(hidden, length), _call_by_hand(hidden, length)
    error = max(abs(a - b) / abs(b) for a, b in zip(trainer.losses, calls.losses, strict=True))
    return Paired(
        round=lambda: {
            "ours": _train(hidden, length).seconds,
            "megatron-core calls": _call_by_hand(hidden, length).seconds,
        },
        check=Check(error, 1e-6, "losses of all steps"),
        workload={"layers": 4, "hidden": hidden, "seq": length, "micro batches": 4, "dtype": "fp32"},
    )


class _Steps:
    """Losses, CPU seconds of a step after the first, and what the first cost more."""

    def __init__(self, losses: list[float], moments: list[float]) -> None:
        self.losses = losses
        self.moments = moments
        first, *durations = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
        self.seconds = statistics.median(durations)
        self.only_once = first - self.seconds


def _train(hidden: int, length: int) -> _Steps:
    return train_with(f"--hidden-size {hidden} --seq-length {length} --max-position-embeddings {length}", length)


def train_with(flags: str, length: int) -> _Steps:
    """The built-in trainer in this process; a step lasts from one `step_begin` to the next, logging included."""
    import mindspeed
    from mindspeed.testing.parity import VOCABULARY, tiny_flags
    from mindspeed.testing.tiny_data import provider_for
    from mindspeed.testing.whole_weights import fill
    from mindspeed.training import model, pretraining

    losses: list[float] = []
    moments: list[float] = []
    seen: list[object] = []  # a run has one host, but asks for as many models as it has chunks

    def provide(pre_process: bool = True, post_process: bool = True) -> torch.nn.Module:
        chunk = model.model_provider(pre_process, post_process)
        fill(chunk)
        host = mindspeed.runtime().host
        if host not in seen:
            seen.append(host)
            host.events.on("step_begin", lambda iteration: moments.append(time.process_time()))
            host.events.on("log_line", lambda metrics: losses.append(metrics.get("lm loss", float("nan"))))
        return chunk

    with contextlib.redirect_stdout(io.StringIO()):
        pretraining.pretrain(
            provider_for(length, VOCABULARY - 1), model_provider=provide, argv=tiny_flags(flags, STEPS, "trainer")
        )
    return _Steps(losses, moments)


def _call_by_hand(hidden: int, length: int) -> _Steps:
    import mindspeed
    from mindspeed.testing.tiny_gpt import TinyGpt, TinyTraining

    moments = []
    with mindspeed.enabled(), _parallel_state_gone_after(), contextlib.redirect_stdout(io.StringIO()):
        training = TinyTraining(TinyGpt(hidden_size=hidden, seq_length=length))
        for _ in range(STEPS):
            moments.append(time.process_time())
            training.step()
    return _Steps(training.losses, moments)


@contextlib.contextmanager
def _parallel_state_gone_after() -> Iterator[None]:
    from megatron.core import parallel_state, rerun_state_machine

    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        rerun_state_machine.destroy_rerun_state_machine()


@case("step.off", feature="platform", metric="ratio", against="host", must=1 / 1.01, aim=1.0)
def nothing_on(run: Run) -> Paired:
    """Forward and backward of 4 layers, h=256, S=512, in fp32, enabled without any feature, beside megatron-core alone."""

    import mindspeed

    sides = {"ours": mindspeed.enabled, "host": _torch_cuda_means_cpu}
    (ours, _), (host, _) = (_loss_and_seconds(side()) for side in sides.values())
    return Paired(
        round=lambda: {name: _loss_and_seconds(side())[1] for name, side in sides.items()},
        check=Check(abs(ours - host), 0.0, "loss"),
        workload={"layers": 4, "hidden": 256, "seq": 512, "dtype": "fp32"},
    )


@contextlib.contextmanager
def _torch_cuda_means_cpu() -> Iterator[None]:
    """The least that megatron-core needs on a CPU: it asks torch.cuda where to put tensors, and for generators of its own."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    with (
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
        mock.patch.object(random.CudaRNGStatesTracker, "fork", lambda self, name="": contextlib.nullcontext()),
    ):
        parallel_state.initialize_model_parallel()
        yield


def _loss_and_seconds(surroundings: contextlib.AbstractContextManager[Any]) -> tuple[float, float]:
    """Loss and CPU seconds of forward and backward of megatron-core's own model, after one call that warms up."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from mindspeed.testing.whole_weights import fill

    tokens = torch.randint(0, 512, (1, 512), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool).triu(1)
    losses: list[float] = []
    with surroundings, _parallel_state_gone_after(), contextlib.redirect_stdout(io.StringIO()):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=4, hidden_size=256, num_attention_heads=4, attention_dropout=0.0, hidden_dropout=0.0,
            use_cpu_initialization=True, attention_softmax_in_fp32=False,
        )  # fmt: skip
        model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=512, max_sequence_length=512)
        fill(model)

        def step() -> None:
            loss = model(tokens, torch.arange(512).unsqueeze(0), mask, labels=tokens).mean()
            loss.backward()
            losses.append(loss.item())

        seconds = _second_call(step)
    return losses[-1], seconds


GPT4 = {"layers": 4, "hidden": 512, "heads": 8, "ffn": 1408, "vocabulary": 8192, "length": 2048}
FLASH = {"use_flash_attn": True, "transformer_impl": "local"}
FUSED = FLASH | {
    "use_fused_rmsnorm": True, "normalization": "RMSNorm",
    "use_fused_swiglu": True, "swiglu": True,
    "use_fused_rotary_pos_emb": True, "position_embedding_type": "rope",
    "cross_entropy_loss_fusion": True,
}  # fmt: skip


@case("step.gpt4.fp32", feature="flash-attention", metric="ratio", against="host", must=2.0, aim=2.25)
def gpt4_fp32(run: Run) -> Paired:
    """Forward and backward of 4 layers, h=512, S=2048 in fp32, with --use-flash-attn."""
    return _Gpt4Rounds(torch.float32, FLASH, run).paired()


@case("step.gpt4.bf16", feature="flash-attention", metric="ratio", against="host", must=2.5, aim=3.5)
def gpt4_bf16(run: Run) -> Paired:
    """The same in bf16."""
    return _Gpt4Rounds(torch.bfloat16, FLASH, run).paired()


@case("step.gpt4.fp32.fused", feature="fused-rmsnorm", metric="ratio", against="host", must=2.15, aim=2.25)
def gpt4_fp32_fused(run: Run) -> Paired:
    """The same in fp32 with fused norms, SwiGLU, rotary embedding and cross entropy too."""
    return _Gpt4Rounds(torch.float32, FUSED, run).paired()


@case("step.gpt4.bf16.fused", feature="fused-rmsnorm", metric="ratio", against="host", must=3.0, aim=3.5)
def gpt4_bf16_fused(run: Run) -> Paired:
    """The same in bf16 with fused norms, SwiGLU, rotary embedding and cross entropy too."""
    return _Gpt4Rounds(torch.bfloat16, FUSED, run).paired()


class _Gpt4Rounds:
    """Rounds of forward and backward through the host's model with and without features, and through plain torch."""

    def __init__(self, dtype: torch.dtype, flags: Mapping[str, Any], run: Run) -> None:
        self.dtype = dtype
        self.flags = flags
        generator = torch.Generator().manual_seed(1)
        self.tokens, self.labels = (
            torch.randint(0, GPT4["vocabulary"], (1, GPT4["length"]), generator=generator) for _ in range(2)
        )
        self.peers: dict[str, Callable[[], Any]] = {}
        if run.wants_peer("torch"):
            self.peers["torch"] = self._torch_model()
        if run.wants_peer("torch.compile"):
            self.peers["torch.compile"] = torch.compile(self._torch_model())

    def paired(self) -> Paired:
        """Check ours against the host, then offer the rounds."""
        ours, host = self._megatron(self.flags)[1], self._megatron({})[1]
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, host, strict=True))
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        return Paired(
            round=self.round,
            check=Check(error, tolerance, "relative norm of the difference of loss and gradients"),
            workload={**GPT4, "dtype": str(self.dtype).removeprefix("torch."), "flags": dict(self.flags)},
            versions=dict.fromkeys(self.peers, torch.__version__),
        )

    def round(self) -> dict[str, float]:
        """CPU seconds of one forward and backward of each contender, after one that warms up."""
        costs = {"ours": self._megatron(self.flags)[0], "host": self._megatron({})[0]}
        for name, model in self.peers.items():
            costs[name] = _second_call(lambda model=model: model(self.tokens, self.labels).backward())
        return costs

    def _megatron(self, flags: Mapping[str, Any]) -> tuple[float, list[torch.Tensor]]:
        """Seconds, and loss with the gradients of embedding and first layer."""
        import mindspeed

        shape = {
            "num_layers": GPT4["layers"], "hidden_size": GPT4["hidden"], "num_attention_heads": GPT4["heads"],
            "seq_length": GPT4["length"], "micro_batch_size": 1,
        }  # fmt: skip
        with mindspeed.enabled(**shape, **flags), _parallel_state_gone_after(), contextlib.redirect_stdout(io.StringIO()):
            model = self._megatron_model()
            positions = torch.arange(GPT4["length"]).unsqueeze(0)
            kept: list[torch.Tensor] = []

            def step() -> None:
                model.zero_grad(set_to_none=True)
                loss = model(self.tokens, positions, None, labels=self.labels).float().mean()
                loss.backward()
                kept[:] = [loss.detach().reshape(1)]

            seconds = _second_call(step)
            gradients = [parameter.grad.float() for parameter in list(model.parameters())[:3] if parameter.grad is not None]
        return seconds, kept + gradients

    def _megatron_model(self) -> torch.nn.Module:
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        from mindspeed.testing.whole_weights import fill

        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=GPT4["layers"], hidden_size=GPT4["hidden"], num_attention_heads=GPT4["heads"],
            ffn_hidden_size=GPT4["ffn"], gated_linear_unit=True, activation_func=torch.nn.functional.silu,
            normalization="RMSNorm", add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
            bf16=self.dtype == torch.bfloat16, params_dtype=self.dtype, attention_softmax_in_fp32=False,
            bias_activation_fusion=True, bias_dropout_fusion=True, masked_softmax_fusion=True,
        )  # fmt: skip
        model = GPTModel(
            config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=GPT4["vocabulary"], max_sequence_length=GPT4["length"], position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        )  # fmt: skip
        fill(model)
        return model.to(self.dtype)

    def _torch_model(self) -> torch.nn.Module:
        from benchmarks.peers.torch_gpt import TorchGpt

        return TorchGpt(**GPT4).to(self.dtype)


def _second_call(step: Callable[[], Any]) -> float:
    """CPU seconds of the second of two calls."""
    step()
    start = time.process_time()
    step()
    return time.process_time() - start


@case("step.scale.dp", feature="trainer", metric="ratio", against="one process", must=1 / 1.08, aim=1 / 1.03)
def data_parallel_scaling(run: Run) -> Paired:
    """CPU seconds per token summed over data-parallel ranks, tokens per rank fixed, beside one process."""
    size = max(run.ranks)
    if size < 2:
        raise Skip("needs --ranks with 2 or more")
    flags = f"--hidden-size 256 --seq-length 256 --max-position-embeddings 256 --global-batch-size {MICROS * size}"
    (first, *_), (alone,) = (
        pools().get(ranks, megatron=True).run(_losses_of_run, flags) for ranks in (size, 1)
    )  # the same samples in both runs
    error = max(abs(a - b) / abs(b) for a, b in zip(first, alone, strict=True))
    return Paired(
        round=lambda: {
            "ours": cost(size, _step_cost, flags, megatron=True) / size,
            "one process": cost(
                1, _step_cost, flags.replace(f"batch-size {MICROS * size}", f"batch-size {MICROS}"), megatron=True
            ),
        },
        check=Check(error, 1e-5, "losses of all steps"),
        workload={"ranks": size, "hidden": 256, "seq": 256, "micro batches per rank": MICROS, "dtype": "fp32"},
    )


def _losses_of_run(world: Any, flags: str) -> list[float]:
    return train_with(flags, 256).losses


def _step_cost(world: Any, flags: str) -> float:
    return train_with(flags, 256).seconds
