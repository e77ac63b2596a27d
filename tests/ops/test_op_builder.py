import importlib
import warnings

import pytest
import torch

from mindspeed import op_builder
from mindspeed.ops.rms_norm import rms_norm

BUILDERS = (
    "FusionAttentionV2 NpuDropoutAddLayerNorm Swiglu Lcal RmsNorm GroupedMatMulAllReduce GMM GMMV2 QuantGMM WeightQuantGMM FFN "
    "MatmulAllReduceAddRmsNorm InplaceMatmulAllReduceAddRmsNorm RotaryPositionEmbedding MoeTokenPermute MoeTokenUnpermute "
    "RingAttentionUpdate BatchMatMulReduceScatterAlltoAll AllToAllAllGatherBatchMatMul MatmulAdd GroupMatmulAdd FusedEmaAdamW "
    "FusedAdamWV2"
).split()


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_forward_to_the_operator_modules(name):
    builder = getattr(op_builder, f"{name}OpBuilder")
    op_builder._load.cache_clear()
    with pytest.warns(
        FutureWarning, match=rf"{name}OpBuilder\(\).load\(\) builds nothing and will go; import .* from mindspeed.ops"
    ):
        namespace = builder().load()
    module = importlib.import_module(f"mindspeed.ops.{builder.module}")
    assert builder.functions
    for function in builder.functions:
        assert getattr(namespace, function) is getattr(module, function)


def test_every_builder_is_listed():
    assert {f"{name}OpBuilder" for name in BUILDERS} == {name for name in dir(op_builder) if name.endswith("OpBuilder")} - {
        "OpBuilder"
    }


def test_one_warning_only_and_the_documented_calls_work():
    op_builder._load.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            norm = op_builder.RmsNormOpBuilder().load().rms_norm
    assert len(caught) == 1
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
