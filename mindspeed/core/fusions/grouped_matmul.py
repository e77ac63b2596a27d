"""Grouped matrix multiplication under the names of the `grouped_gemm` package, which the host looks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mindspeed.ops.gmm import npu_gmm_v2


def grouped_gemm_is_available() -> bool:
    """Always: the operator has a body for every device."""
    return True


def assert_grouped_gemm_is_available() -> None:
    """Nothing to assert; see `grouped_gemm_is_available`."""


class Ops:
    """Stands for the module `grouped_gemm.ops`."""

    @staticmethod
    def gmm(
        a: Tensor,
        b: Tensor,
        batch_sizes: Tensor | Sequence[int],
        trans_b: bool = False,
        gemm_fusion: bool = False,
        original_weight: Tensor | None = None,
    ) -> Tensor:
        """`a_g @ b_g` for consecutive groups of rows; a: [M, K], b: [G, K, N] ([G, N, K] with `trans_b`), batch_sizes: [G].

        `gemm_fusion` adds the weight gradient to `original_weight.main_grad` in backward.
        """
        weight = b.transpose(-2, -1) if trans_b else b
        return npu_gmm_v2(a, weight, group_list=batch_sizes, gemm_fusion=gemm_fusion, original_weight=original_weight)
