"""What Megatron-LM is run with, and which run each must equal: the acceptance table of the host layer as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Flags = Mapping[str, Any]
DISTRIBUTED: dict[str, Any] = {"use_distributed_optimizer": True}
OVERLAPPED: dict[str, Any] = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
SP2: dict[str, Any] = {**TP2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP2: dict[str, Any] = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
DROPOUT: dict[str, Any] = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "iterations": 6}
FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "block"}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "disable_bias_linear": True,
}
EP2: dict[str, Any] = {**MOE, "expert_model_parallel_size": 2}
LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
    "disable_bias_linear": True,
}
# Printed are seven digits of the loss: sums in another order may move the last of them by one.
LAST_DIGIT = 2.5e-7
SUMS_OF_16_BITS = 5e-5


@dataclass(frozen=True)
class Case:
    """One line of the matrix.

    Attributes:
        name, world, flags: of the run; flags are changes of the tiny GPT of `launcher.tiny_gpt`.
        like: name of the case whose curve it must have; empty when it must only be finite and fall.
        tolerance: largest relative difference of losses; 0 means equal in every printed digit.
        seeded: start from the one seed checkpoint, so that layouts begin with the same weights.
        resume: checkpoint format of a stop after 3 steps and a second run; the curves together are compared.
        then: (ranks, flags) of the second run where they differ: another layout.
    """

    name: str
    world: int = 1
    flags: Flags = field(default_factory=dict)
    like: str = ""
    tolerance: float = 0.0
    seeded: bool = False
    resume: str = ""
    then: tuple[int, Flags] | None = None


def layouts() -> list[Case]:
    """fp32, one seed checkpoint: every layout prints what one process prints."""
    table: list[tuple[str, int, Flags]] = [
        ("DP2", 2, {}),
        ("DP2 overlap-grad-reduce", 2, {"overlap_grad_reduce": True}),
        ("DP2 distributed optimizer", 2, DISTRIBUTED),
        ("DP2 distributed, grad overlap", 2, {**DISTRIBUTED, "overlap_grad_reduce": True}),
        ("DP2 distributed, grad and param overlap", 2, OVERLAPPED),
        ("DP2 distributed, overlaps, small buckets", 2, {**OVERLAPPED, "ddp_bucket_size": 4000}),
        ("DP2 distributed, average in collective", 2, {**DISTRIBUTED, "ddp_average_in_collective": True}),
        ("TP2", 2, TP2),
        ("TP2 SP", 2, SP2),
        ("PP2", 2, PP2),
        ("PP2 VPP2", 2, VPP2),
        ("PP2 VPP2 distributed", 2, {**VPP2, **DISTRIBUTED}),
        ("PP2 VPP2 distributed overlaps", 4, {**VPP2, **OVERLAPPED}),
        ("PP4", 4, {"pipeline_model_parallel_size": 4}),
        ("TP2 PP2", 4, {**TP2, **PP2}),
        ("TP2 SP PP2", 4, {**SP2, **PP2}),
        ("TP2 SP DP2 distributed overlaps", 4, {**SP2, **OVERLAPPED}),
        ("recompute full uniform", 2, FULL),
        ("recompute full block 2", 2, {**BLOCK, "recompute_num_layers": 2}),
        ("recompute selective", 2, {"recompute_activations": True}),
        ("recompute full, distributed saved activations", 2, {**TP2, **FULL, "distribute_saved_activations": True}),
        (
            "recompute 1 layer per pipeline rank, PP2 VPP2",
            2,
            {**VPP2, **BLOCK, "recompute_num_layers": 1, "enable_recompute_layers_per_pp_rank": True},
        ),
        ("timers, evaluation, straggler, norms, zeros", 2, REPORTS),
    ]
    one = [Case("1 process", seeded=True)]
    return one + [Case(name, world, flags, "1 process", LAST_DIGIT, seeded=True) for name, world, flags in table]


REPORTS: dict[str, Any] = {
    "eval_iters": 1,
    "eval_interval": 2,
    "timing_log_level": 2,
    "log_params_norm": True,
    "log_num_zeros_in_grad": True,
    "log_throughput": True,
    "log_straggler": True,
}


def precisions() -> list[Case]:
    """16-bit training."""
    bf16, fp16 = {"bf16": True}, {"fp16": True, "initial_loss_scale": 2**12}
    overflow = {"fp16": True, "initial_loss_scale": 2**22, "hysteresis": 1, "iterations": 8}
    return [
        Case("bf16", 1, bf16, "1 process", 2e-5, seeded=True),
        Case("bf16 DP2", 2, bf16, "bf16", 1e-5, seeded=True),
        Case("bf16 DP2 distributed overlaps", 2, {**bf16, **OVERLAPPED}, "bf16", 1e-5, seeded=True),
        Case("bf16 TP2 SP", 2, {**bf16, **SP2}, "bf16", SUMS_OF_16_BITS, seeded=True),
        Case("fp16", 1, fp16, "1 process", 1e-4, seeded=True),
        Case("fp16 DP2", 2, fp16, "fp16", 5e-5, seeded=True),
        Case("fp16 DP2 distributed overlaps", 2, {**fp16, **OVERLAPPED}, "fp16", 5e-5, seeded=True),
        Case("fp16 with overflow steps", 1, overflow),
    ]


def recomputation() -> list[Case]:
    """With dropout: recomputation repeats the very same random numbers."""
    table: list[tuple[str, Flags]] = [
        ("full", FULL),
        ("block 1", {**BLOCK, "recompute_num_layers": 1}),
        ("selective", {"recompute_activations": True}),
        ("full, distributed saved activations", {**FULL, "distribute_saved_activations": True}),
    ]
    base = Case("dropout TP2", 2, {**TP2, **DROPOUT})
    return [base, *(Case(f"dropout TP2, recompute {name}", 2, {**TP2, **DROPOUT, **f}, base.name) for name, f in table)]


def mixtures() -> list[Case]:
    """Mixture of experts: dispatchers and layouts of one model agree."""
    one = Case("MoE EP2 alltoall", 2, EP2)
    shared = {**EP2, "moe_shared_expert_intermediate_size": 64}
    return [
        Case("MoE", 1, MOE),
        Case("MoE DP2", 2, MOE, "MoE", LAST_DIGIT),
        one,
        Case("MoE EP2 allgather", 2, {**EP2, "moe_token_dispatcher_type": "allgather"}, one.name, LAST_DIGIT),
        Case("MoE EP2 alltoall_seq", 2, {**EP2, "moe_token_dispatcher_type": "alltoall_seq"}, one.name, LAST_DIGIT),
        Case("MoE EP2 TP2 SP", 4, {**EP2, **SP2}, one.name, LAST_DIGIT),
        Case("MoE EP2 TP2 SP, expert TP 1", 4, {**EP2, **SP2, "expert_tensor_parallel_size": 1}, one.name, LAST_DIGIT),
        Case("MoE EP2 distributed overlaps", 2, {**EP2, **OVERLAPPED}, one.name, LAST_DIGIT),
        Case("MoE EP2 shared experts", 2, shared),
        Case("MoE EP2 shared experts, overlap", 2, {**shared, "moe_shared_expert_overlap": True}, "MoE EP2 shared experts"),
    ]


def models() -> list[Case]:
    """Other shapes of model."""
    mtp = {"mtp_num_layers": 1, "position_embedding_type": "rope"}
    return [
        Case("SwiGLU RMSNorm rope GQA untied", 1, LLAMA),
        Case("SwiGLU RMSNorm rope GQA untied DP2", 2, LLAMA, "SwiGLU RMSNorm rope GQA untied", LAST_DIGIT),
        Case("SwiGLU RMSNorm rope GQA untied TP2 SP", 2, {**LLAMA, **SP2}),
        Case("qk-layernorm TP2 SP", 2, {**SP2, "qk_layernorm": True}),
        Case("multi-token prediction", 1, mtp),
        Case("multi-token prediction DP2", 2, mtp, "multi-token prediction", LAST_DIGIT),
        Case("default transformer-impl", 1, {"transformer_impl": None}, "1 process", seeded=True),
        Case("mock data", 1, {"data_path": None, "data_cache_path": None, "mock_data": True}),
    ]


def resumptions() -> list[Case]:
    """A stop and a resumption, with dropout, against the undisturbed run."""
    table: dict[str, tuple[int, Flags]] = {
        "1 process": (1, {}),
        "DP2 distributed": (2, DISTRIBUTED),
        "TP2 SP": (2, SP2),
        "PP2": (2, PP2),
        "PP2 VPP2 distributed": (2, {**VPP2, **DISTRIBUTED}),
        "TP2 SP DP2 distributed": (4, {**SP2, **DISTRIBUTED}),
        "bf16 DP2 distributed overlaps": (2, {"bf16": True, **OVERLAPPED}),
        "MoE EP2 distributed": (2, {**EP2, **DISTRIBUTED}),
    }
    cases = []
    for name, (world, flags) in table.items():
        whole = Case(f"dropout {name}", world, {**DROPOUT, **flags})
        cases.append(whole)
        for kind in ("torch", "torch_dist", "async"):
            cases.append(Case(f"resume {name}, {kind}", world, {**DROPOUT, **flags}, whole.name, resume=kind))
    return cases


def reshardings() -> list[Case]:
    """A checkpoint of TP2 x PP2 with the distributed optimizer goes on in other layouts."""
    source = {**TP2, **PP2, **DISTRIBUTED, "iterations": 6}
    whole = Case("TP2 PP2 distributed, 6 steps", 4, source)
    table: list[tuple[str, int, Flags]] = [
        ("1 process", 1, DISTRIBUTED),
        ("TP2", 2, {**TP2, **DISTRIBUTED}),
        ("PP2", 2, {**PP2, **DISTRIBUTED}),
        ("DP4", 4, DISTRIBUTED),
    ]
    return [
        whole,
        *(
            Case(
                f"TP2 PP2 -> {name}",
                4,
                source,
                whole.name,
                1e-6,
                resume="torch_dist",
                then=(world, {"iterations": 6, "no_load_rng": True, **flags}),
            )
            for name, world, flags in table
        ),
    ]


GROUPS = {
    "layouts": layouts,
    "precisions": precisions,
    "recomputation": recomputation,
    "mixtures": mixtures,
    "models": models,
    "resumptions": resumptions,
    "reshardings": reshardings,
}
# Few and well chosen, for every change; the whole table is behind the mark `slow`.
EVERY_CHANGE = (
    "1 process",
    "DP2 distributed, grad and param overlap",
    "TP2 SP",
    "PP2 VPP2 distributed",
    "TP2 PP2",
    "recompute 1 layer per pipeline rank, PP2 VPP2",
    "timers, evaluation, straggler, norms, zeros",
    "bf16 DP2 distributed overlaps",
    "MoE EP2 TP2 SP, expert TP 1",
    "SwiGLU RMSNorm rope GQA untied TP2 SP",
    "resume DP2 distributed, torch",
    "resume TP2 SP, torch_dist",
    "resume 1 process, async",
    "TP2 PP2 -> DP4",
)


def all_cases() -> dict[str, Case]:
    """Every case by name."""
    return {case.name: case for group in GROUPS.values() for case in group()}
