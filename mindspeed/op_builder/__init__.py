"""Old entry to the operators: `RmsNormOpBuilder().load().rms_norm`. Nothing is built; import from `mindspeed.ops` instead."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import SimpleNamespace
from typing import ClassVar


class OpBuilder:
    """A builder that builds nothing: `load()` returns a namespace with the functions of an operator module."""

    module: ClassVar[str] = ""
    functions: ClassVar[tuple[str, ...]] = ()

    def load(self) -> SimpleNamespace:
        """The functions of the operator, from `mindspeed.ops`."""
        return _load(type(self).__name__, self.module, self.functions)


@functools.cache
def _load(builder: str, module: str, functions: tuple[str, ...]) -> SimpleNamespace:
    warnings.warn(
        f"{builder}().load() builds nothing and will go; import {', '.join(functions)} from mindspeed.ops.{module}",
        FutureWarning,
        stacklevel=3,
    )
    source = importlib.import_module(f"mindspeed.ops.{module}")
    return SimpleNamespace(**{name: getattr(source, name) for name in functions})


def _builder(name: str, module: str, *functions: str) -> type[OpBuilder]:
    text = f"Old entry to `mindspeed.ops.{module}`."
    return type(name, (OpBuilder,), {"__doc__": text, "__module__": __name__, "module": module, "functions": functions})


AllToAllAllGatherBatchMatMulOpBuilder = _builder(
    "AllToAllAllGatherBatchMatMulOpBuilder", "npu_all_to_all_all_gather_bmm", "npu_alltoall_allgather_bmm"
)
BatchMatMulReduceScatterAlltoAllOpBuilder = _builder(
    "BatchMatMulReduceScatterAlltoAllOpBuilder", "npu_bmm_reduce_scatter_all_to_all", "npu_bmm_reducescatter_alltoall"
)
FFNOpBuilder = _builder("FFNOpBuilder", "ffn", "npu_ffn")
FusedAdamWV2OpBuilder = _builder("FusedAdamWV2OpBuilder", "npu_apply_fused_adamw_v2", "npu_apply_fused_adamw_v2")
FusedEmaAdamWOpBuilder = _builder("FusedEmaAdamWOpBuilder", "npu_apply_fused_ema_adamw", "npu_apply_fused_ema_adamw")
FusionAttentionV2OpBuilder = _builder(
    "FusionAttentionV2OpBuilder", "fusion_attention_v2", "npu_fusion_attention", "npu_fusion_attention_grad"
)
GMMOpBuilder = _builder("GMMOpBuilder", "gmm", "npu_gmm", "npu_gmm_backward")
GMMV2OpBuilder = _builder("GMMV2OpBuilder", "gmm", "npu_gmm_v2", "npu_gmm_backward")
GroupedMatMulAllReduceOpBuilder = _builder(
    "GroupedMatMulAllReduceOpBuilder", "npu_grouped_mat_mul_all_reduce", "npu_grouped_mat_mul_all_reduce"
)
GroupMatmulAddOpBuilder = _builder("GroupMatmulAddOpBuilder", "npu_groupmatmul_add", "npu_groupmatmul_add_fp32")
InplaceMatmulAllReduceAddRmsNormOpBuilder = _builder(
    "InplaceMatmulAllReduceAddRmsNormOpBuilder", "npu_mm_all_reduce_add_rms_norm_", "npu_mm_all_reduce_add_rms_norm_"
)
LcalOpBuilder = _builder("LcalOpBuilder", "lcal_functional", "coc_ops", "CoCConfig", "TP2DConfig", "CoCOperations")
MatmulAddOpBuilder = _builder("MatmulAddOpBuilder", "npu_matmul_add", "npu_matmul_add_fp32", "npu_matmul_add_fp16")
MatmulAllReduceAddRmsNormOpBuilder = _builder(
    "MatmulAllReduceAddRmsNormOpBuilder", "npu_mm_all_reduce_add_rms_norm", "npu_mm_all_reduce_add_rms_norm"
)
MoeTokenPermuteOpBuilder = _builder("MoeTokenPermuteOpBuilder", "npu_moe_token_permute", "npu_moe_token_permute")
MoeTokenUnpermuteOpBuilder = _builder("MoeTokenUnpermuteOpBuilder", "npu_moe_token_unpermute", "npu_moe_token_unpermute")
NpuDropoutAddLayerNormOpBuilder = _builder(
    "NpuDropoutAddLayerNormOpBuilder", "dropout_add_layer_norm", "npu_dropout_add_layer_norm"
)
QuantGMMOpBuilder = _builder("QuantGMMOpBuilder", "quant_gmm", "npu_quant_gmm", "npu_quant_gmm_v2")
RingAttentionUpdateOpBuilder = _builder(
    "RingAttentionUpdateOpBuilder", "npu_ring_attention_update", "npu_ring_attention_update"
)
RmsNormOpBuilder = _builder("RmsNormOpBuilder", "rms_norm", "rms_norm")
RotaryPositionEmbeddingOpBuilder = _builder(
    "RotaryPositionEmbeddingOpBuilder", "npu_rotary_position_embedding", "npu_rotary_position_embedding"
)
SwigluOpBuilder = _builder("SwigluOpBuilder", "swiglu", "swiglu")
WeightQuantGMMOpBuilder = _builder(
    "WeightQuantGMMOpBuilder", "weight_quant_gmm", "npu_weight_quant_gmm", "npu_weight_quant_gmm_v2"
)
