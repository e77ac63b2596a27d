"""Flash attention: the flags, their rules, and the places of the host where our attention takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mindspeed.core.context_parallel.adaptive.planner import AdaptivePlanner
from mindspeed.core.context_parallel.batches import BatchLayouts
from mindspeed.core.context_parallel.documents import boundaries_of, end_of_document, equal_documents
from mindspeed.core.context_parallel.groups import ContextGroups
from mindspeed.core.context_parallel.layout import Boundaries
from mindspeed.core.context_parallel.maker import Band, LayoutMaker
from mindspeed.core.context_parallel.plan import ADAPTIVE, HYBRID_ADAPTIVE, ContextPlan
from mindspeed.core.context_parallel.positions import RotaryRows
from mindspeed.core.transformer.flash_attention.alibi import distance_of, slopes_of_rank
from mindspeed.core.transformer.flash_attention.core_attention import CoreAttention
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import STORE
from mindspeed.core.transformer.flash_attention.wiring import Wiring
from mindspeed.core.transformer.fused_choice import uses_transformer_engine
from mindspeed.notices import warn_once
from mindspeed.patching import Change, Feature, Patch, Problem, RunShape, flag
from mindspeed.patching.flags import flag_specs

LAYER_OFFSET = "megatron.core.transformer.transformer_layer:get_transformer_layer_offset"
ROTATE = "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd"
NO_MASKS = "only flash attention applies a mask of the program, and this run goes without (--use-flash-attn)"
UNLIMITED = 65536  # the default of --pre-tockens: no limit, whatever the length


@dataclass(frozen=True, kw_only=True)
class FlashFlags:
    """Flags of `FlashAttention`."""

    pre_tockens: int = flag(UNLIMITED, "With flash attention: a row sees at most this many earlier tokens.")
    next_tockens: int = flag(0, "With flash attention: a row sees at most this many later tokens.")
    sparse_mode: int = flag(
        0,
        "Mask mode: 0 by layer, 1 the mask set by set_attention_mask, 2 and 3 causal, 4 the band alone.",
        choices=tuple(range(9)),
    )
    attention_mask_on_cpu: bool = flag(False, "Keep a custom mask in host memory and move tiles only.")


class FlashAttention(Feature):
    """Compute core attention with a fused kernel, without a tensor of all scores."""

    flags = FlashFlags
    switch = "--use-flash-attn, or something that implies it"

    def why(self, flags: FlashFlags, run: RunShape) -> str:
        """`--use-flash-attn`, or what needs it."""
        if run.get("use_flash_attn"):
            return "--use-flash-attn"
        return _implied_by(run)

    def normalise(self, flags: FlashFlags, run: RunShape) -> Iterator[Change]:
        """Masks come from layers and documents, never from the data set."""
        if not run.get("use_flash_attn"):
            yield Change("use_flash_attn", True, f"{_implied_by(run)} needs fused attention")
        if run.get("create_attention_mask_in_dataloader"):
            yield Change("create_attention_mask_in_dataloader", False, "flash attention builds no S x S masks")

    def check(self, flags: FlashFlags, run: RunShape) -> Iterator[Problem]:
        """Modes and bands that can be meant."""
        if flags.sparse_mode > 4:
            yield Problem("--sparse-mode", flags.sparse_mode, "5 to 8 are internal modes of the vendor kernel", "use 0 to 4")
        if _has_band(flags, run.given):
            past, future = flags.pre_tockens, flags.next_tockens
            if past + future < 0:
                yield Problem(
                    "--pre-tockens",
                    past,
                    f"with --next-tockens {future} rows would see no key",
                    f"use --pre-tockens {-future} or more",
                )
            if run.get("window_size"):
                yield Problem("window_size", run.window_size, "limits the same as --pre-tockens", "give one of them")
        _hints(flags, run)
        named = "transformer_impl" in run.given and run.get("transformer_impl") == "transformer_engine"
        if named or uses_transformer_engine(run):
            rule = "has its own attention, which knows nothing of our masks and layouts"
            yield Problem("--transformer-impl", "transformer_engine", rule, "use --transformer-impl local")

    def check_off(self, flags: FlashFlags, run: RunShape) -> Iterator[Problem]:
        """A mask that was set before the run would be dropped, and so would a band."""
        if STORE.is_set:
            yield Problem("set_attention_mask", None, NO_MASKS, "add the flag, or reset the mask with None")
        remedy = f"add --use-flash-attn at --optimization-level {self.level}, or remove it"
        if flags.sparse_mode in (1, 4):
            yield Problem("--sparse-mode", flags.sparse_mode, "needs flash attention", remedy)
        elif flags.sparse_mode == 0:
            for spec in flag_specs(FlashFlags)[:2]:
                if (value := getattr(flags, spec.dest)) != spec.default:
                    yield Problem(spec.option, value, "needs flash attention", remedy)

    def patches(self, flags: FlashFlags, host: Any) -> Iterator[Patch]:
        """Core attention, batches, rotary tables, recomputation."""
        wiring = _wiring(flags, host)
        yield from wiring.attention_patches()
        if wiring.attention.maker.plan.size > 1 or wiring.in_documents:
            yield from wiring.position_patches()
        if wiring.in_documents:
            yield from wiring.document_patches(host.args.pipeline_model_parallel_size, lambda: host.rank("tp") == 0)

    def subscribe(self, flags: FlashFlags, host: Any) -> None:
        """Make process groups when the host's exist, drop them with the host's."""
        STORE.begin_run()
        host.events.on("reverted", STORE.end_run)
        wiring = _wiring(flags, host)
        plan = wiring.attention.maker.plan
        if plan.size > 1:
            overlap = bool(getattr(host.args, "use_cp_send_recv_overlap", False))
            host.events.on("groups_created", lambda: wiring.groups.create(plan, host.group("cp"), overlap))
            host.events.on("groups_destroyed", wiring.groups.drop)

    def subscribe_off(self, flags: FlashFlags, host: Any) -> None:
        """Masks set from now on are refused."""
        STORE.begin_run(NO_MASKS)
        host.events.on("reverted", STORE.end_run)


def _hints(flags: FlashFlags, run: RunShape) -> None:
    """Flags that mean nothing beside others: said once."""
    given = [name for name in ("pre_tockens", "next_tockens") if name in run.given]
    if flags.sparse_mode in (1, 2, 3) and given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        warn_once("%s ignored: --sparse-mode %s has no band, modes 0 and 4 have", options, flags.sparse_mode)
    backend = run.get("attention_backend")
    backend = getattr(backend, "name", backend)
    if backend not in (None, "auto", "flash"):
        warn_once("--attention-backend %s is ignored: it chooses kernels of Transformer Engine, --use-flash-attn ours", backend)


def _has_band(flags: FlashFlags, given: frozenset[str]) -> bool:
    """Whether --pre-tockens and --next-tockens mean something: in mode 4, or in mode 0 when they were given."""
    if flags.sparse_mode == 4:
        return True
    named = given & {"pre_tockens", "next_tockens"} or flags.pre_tockens != UNLIMITED or flags.next_tockens != 0
    return flags.sparse_mode == 0 and bool(named)


def _wiring(flags: FlashFlags, host: Any) -> Wiring:
    """What this activation puts into the host; one object for subscriptions and patches."""
    return host.events.shared("flash-attention", lambda: build_wiring(flags, host))


def build_wiring(flags: FlashFlags, host: Any) -> Wiring:
    """Methods of a run, from its arguments."""
    args = vars(host.args)
    plan, groups = ContextPlan.of(args), ContextGroups()
    in_documents = bool(args.get("reset_attention_mask"))
    band = _band(flags, frozenset(args.get("given_flags") or ()))
    adaptive = AdaptivePlanner.of(args, groups) if plan.algorithm in (ADAPTIVE, HYBRID_ADAPTIVE) and plan.size > 1 else None
    maker = LayoutMaker(plan, band, adaptive, mask_on_cpu=bool(args.get("attention_mask_on_cpu")))
    attention = CoreAttention(
        maker,
        groups,
        slopes_of=_slopes_of(host) if args.get("position_embedding_type") == "alibi" else None,
        distance=distance_of(args.get("alibi_fusion_attn_type"), bool(args.get("alibi_diagonal_opposite"))),
        rng_fork=lambda: host.load("megatron.core.tensor_parallel.random:get_cuda_rng_tracker")().fork(),
        mask_required=flags.sparse_mode == 1,
        in_documents=in_documents,
    )
    batches = BatchLayouts(
        maker,
        groups,
        documents=_documents(host) if in_documents else None,
        restart_positions=bool(args.get("reset_position_ids")) and in_documents,
        tensor_group=lambda: host.group("tp"),
    )
    return Wiring(
        attention,
        batches,
        RotaryRows(maker, groups, restart=batches.restart_positions),
        in_documents,
        layer_offset=lambda config: host.load(LAYER_OFFSET)(config),
        rotate=lambda *tensors, **options: host.load(ROTATE)(*tensors, **options),
    )


def _documents(host: Any) -> Callable[[Tensor], Boundaries]:
    """How the documents of a batch are found: after end-of-document tokens, or one every so many tokens."""
    size = getattr(host.args, "fix_sub_seq_length", 0)
    if size:
        return lambda tokens: equal_documents(tokens, size)
    return lambda tokens: boundaries_of(tokens, end_of_document(host.load("training:get_tokenizer")()))


def _band(flags: FlashFlags, given: frozenset[str]) -> Band:
    if not _has_band(flags, given):
        return Band()
    unlimited = flags.pre_tockens == UNLIMITED and "pre_tockens" not in given
    return Band(None if unlimited else flags.pre_tockens, flags.next_tockens, rules=flags.sparse_mode == 4)


def _slopes_of(host: Any) -> Any:
    return lambda heads, device: slopes_of_rank(heads, host.rank("tp"), host.size("tp"), device)


def _implied_by(run: RunShape) -> str:
    if (run.get("context_parallel_size") or 1) > 1:
        return f"--context-parallel-size {run.context_parallel_size}"
    if run.get("use_fusion_attn_v2"):
        return "--use-fusion-attn-v2"
    return "--position-embedding-type alibi" if run.get("position_embedding_type") == "alibi" else ""
