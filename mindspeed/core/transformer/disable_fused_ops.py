"""Force the host's and reference code in place of chosen fused operators, to find out where numbers part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed.core.transformer.fused_choice import DISABLE, NAMES, names_in
from mindspeed.patching import Change, Feature, Problem, RunShape, flag


@dataclass(frozen=True, kw_only=True)
class DisableFlags:
    """Flags of `DisableFusedOps`."""

    disable_fused_ops: str | None = flag(
        None, f"Comma list of fused operators not to use, of {', '.join(NAMES)}.", metavar="LIST"
    )


class DisableFusedOps(Feature):
    """Leave chosen operators to the host's own code; the features that would replace it ask here."""

    page = "fused-operators"
    flags = DisableFlags

    def normalise(self, flags: DisableFlags, run: RunShape) -> Iterator[Change]:
        """Weight gradients are fused by a flag of the host, which is on by default."""
        if "wgrad" in names_in(flags.disable_fused_ops) and run.get("gradient_accumulation_fusion"):
            yield Change("gradient_accumulation_fusion", False, f"{DISABLE} names wgrad")

    def check(self, flags: DisableFlags, run: RunShape) -> Iterator[Problem]:
        """Names must be known."""
        for name in names_in(flags.disable_fused_ops):
            if name not in NAMES:
                yield Problem(
                    DISABLE, flags.disable_fused_ops, f"{name!r} is no fused operator", f"choose from {','.join(NAMES)}"
                )
