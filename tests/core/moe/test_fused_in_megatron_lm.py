"""All fused operators at once in Megatron-LM itself, against Megatron-LM without them."""

import os

import pytest

from mindspeed.testing.parity import assert_same_training
from tests.core.moe.test_permute_fusion import MOE

pytestmark = [
    pytest.mark.megatron_lm,
    pytest.mark.timeout(600),
    pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"),
]


def test_experts_with_every_fused_operator_train_the_same():
    flags = "--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --moe-grouped-gemm "
    flags += "--gemm-gradient-accumulation-fusion --use-fused-moe-token-permute-and-unpermute"
    names = ["fused-rmsnorm", "fused-swiglu", "fused-rotary-pos-emb", "grouped-gemm", "moe-permute-fusion"]
    common = f"{MOE} --normalization RMSNorm --position-embedding-type rope"
    called = ["megatron.core.models.common.embeddings.rope_utils:apply_rotary_pos_emb"]
    called += ["megatron.core.transformer.moe.moe_utils:permute"]
    assert_same_training("", flags, 2, steps=4, host="megatron-lm", common=common, features=names, called=called)
