"""Dropout, residual addition and RMSNorm in one operator."""

from __future__ import annotations

from torch import Tensor

from mindspeed.ops._dropout_add_norm import dropout_add_norm


def npu_dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`norm(dropout(x0 * rowscale * layerscale) + residual) * weight + bias` with RMSNorm over the last dimension.

    x0, residual: [..., H] (any leading dimensions); weight, bias, layerscale: [H]; rowscale: the leading dimensions of x0.
    weight, bias and residual may be float32 with 16-bit x0. Returns y in the dtype of x0, then, if asked for, the sum before
    the norm (`prenorm`; dtype of residual, else float32 if `residual_in_fp32`, else of x0) and the boolean mask
    (`return_dropout_mask`; True = kept). Keeps that sum and the statistics; dropout is replayed from its random state.
    """
    return dropout_add_norm(
        "npu_dropout_add_rms_norm",
        x0,
        residual,
        weight,
        bias,
        dropout_p,
        epsilon,
        rowscale,
        layerscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        return_dropout_mask=return_dropout_mask,
    )
