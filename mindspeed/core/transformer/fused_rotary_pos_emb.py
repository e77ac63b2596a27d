"""Fused rotary position embedding: one operator per tensor, cosines and sines computed once per table of angles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mindspeed.core.fusions import fused_rope
from mindspeed.core.transformer.fused_choice import contradictions, is_disabled, uses_transformer_engine, why_fused
from mindspeed.patching import Feature, Patch, Problem, RunShape, flag, replace, set_value, wrap

OPTION = "--use-fused-rotary-pos-emb"
UTILS = "megatron.core.models.common.embeddings.rope_utils"
KINDS = ("rope", "mrope")


@dataclass(frozen=True, kw_only=True)
class RotaryFlags:
    """Flags of `FusedRotaryPosEmb`."""

    use_fused_rotary_pos_emb: bool = flag(False, "Rotate queries and keys with one fused operator on any device.")


def fused_by_flag(run: RunShape) -> str:
    """What asks for our kernel by name: the flag, or `apply_rope_fusion` in a program's config; "" when nothing does."""
    if run.get("use_fused_rotary_pos_emb"):
        return OPTION
    return "apply_rope_fusion" if "apply_rope_fusion" in run.given and run.get("apply_rope_fusion") else ""


def why_ours(run: RunShape) -> str:
    """What turns our rotary kernel on, or ""."""
    declined = "apply_rope_fusion" in run.given and not run.get("apply_rope_fusion")
    wanted = run.get("position_embedding_type") in KINDS and not declined
    elsewhere = uses_transformer_engine(run)  # whose fused function the host prefers
    asked = fused_by_flag(run)
    if asked != OPTION and (elsewhere or is_disabled("rope", run)):
        return ""
    return why_fused("rope", "rotary", run, asked=asked, wanted=wanted)


class FusedRotaryPosEmb(Feature):
    """Rotate queries and keys in one fused operator."""

    level = 1
    page = "fused-operators"
    flags = RotaryFlags
    operators = ("rotary",)

    def why(self, flags: RotaryFlags, run: RunShape) -> str:
        """The flag, rope fusion asked for by a config, or a device with a kernel."""
        return why_ours(run)

    def check(self, flags: RotaryFlags, run: RunShape) -> Iterator[Problem]:
        """A request must be one that can be granted."""
        if not flags.use_fused_rotary_pos_emb:
            return
        kind = run.get("position_embedding_type")
        if kind not in KINDS:
            rule = f"needs --position-embedding-type rope or mrope (given {kind})"
            yield Problem(OPTION, None, rule, f"add --position-embedding-type rope or remove {OPTION}")
        declined = "apply_rope_fusion" in run.given and not run.get("apply_rope_fusion")
        yield from contradictions("rope", OPTION, run, "--no-rope-fusion" if declined else "")

    def patches(self, flags: RotaryFlags, host: Any) -> Iterator[Patch]:
        """All ways by which the host's attention layers reach a rotation."""
        packed = Packed(host)
        yield wrap(f"{UTILS}:apply_rotary_pos_emb", packed.any_form, reason="rotates with one operator")
        yield replace(
            f"{UTILS}:_apply_rotary_pos_emb_bshd", fused_rope.apply_rotary_pos_emb_bshd, reason="rotates with one operator"
        )
        yield replace(
            f"{UTILS}:_apply_rotary_pos_emb_thd", packed.apply, reason="rotates all packed sequences with one operator"
        )
        for name, function in (("fused_apply_rotary_pos_emb", rotate_plain), ("fused_apply_rotary_pos_emb_thd", packed.rotate)):
            put = set_value if host.load(f"{UTILS}:{name}") is None else replace
            yield put(f"{UTILS}:{name}", function, reason="configs with apply_rope_fusion mean our operator")


def rotate_plain(t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False) -> Tensor:
    """The call of Transformer Engine and Apex; `transpose_output_memory` is a hint about layout that changes no value."""
    return fused_rope.apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)


class Packed:
    """Rotation of packed sequences, with the context-parallel position of this rank as the host knows it when called."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def apply(
        self,
        t: Tensor,
        cu_seqlens: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        """Stand in for the host's loop over sequences; t: [T, N, D]."""
        place = {"cp_rank": self.host.rank("cp"), "cp_size": self.host.size("cp")}
        return fused_rope.apply_rotary_pos_emb_thd(
            t, cu_seqlens, freqs, rotary_interleaved, multi_latent_attention, mscale, **place
        )

    def rotate(self, t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0) -> Tensor:
        """The call of Transformer Engine and Apex."""
        return fused_rope.apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_size=cp_size, cp_rank=cp_rank)

    def any_form(
        self,
        original: Callable[..., Tensor],
        t: Tensor,
        freqs: Tensor,
        config: Any,
        cu_seqlens: Tensor | None = None,
        mscale: float = 1.0,
    ) -> Tensor:
        """Both forms, whatever `config.apply_rope_fusion` says."""
        options = (config.rotary_interleaved, config.multi_latent_attention, mscale)
        if cu_seqlens is None:
            return fused_rope.apply_rotary_pos_emb_bshd(t, freqs, *options)
        return self.apply(t, cu_seqlens, freqs, *options)
