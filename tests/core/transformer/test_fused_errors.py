"""Every error text of the fused-operator flags, from the command line of each host; all problems of a command line at once."""

from __future__ import annotations

import pytest

from mindspeed.errors import ConfigError
from mindspeed.training import pretraining
from tests.hosts.conftest import checkout, matrix, runs  # noqa: F401 - fixtures of Megatron-LM's own script
from tests.hosts.launcher import tiny_gpt
from tests.hosts.test_megatron_lm_traps import refused
from tests.training.runs import TINY

DENSE = {
    "flags": "--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --gemm-gradient-accumulation-fusion "
    "--use-fused-moe-token-permute-and-unpermute --disable-fused-ops rmsnorm,swiglu,rope,gmm,norm",
    "says": [
        "--use-fused-rmsnorm: needs --normalization RMSNorm (given LayerNorm)",
        "--use-fused-rmsnorm: is contradicted by --disable-fused-ops rmsnorm",
        "--use-fused-swiglu: needs --swiglu",
        "--use-fused-swiglu: is contradicted by --disable-fused-ops swiglu",
        "--use-fused-rotary-pos-emb: needs --position-embedding-type rope or mrope (given learned_absolute)",
        "--use-fused-rotary-pos-emb: is contradicted by --disable-fused-ops rope",
        "--gemm-gradient-accumulation-fusion: needs --moe-grouped-gemm",
        "--gemm-gradient-accumulation-fusion: is contradicted by --disable-fused-ops gmm",
        "--use-fused-moe-token-permute-and-unpermute: needs --num-experts",
        "--disable-fused-ops rmsnorm,swiglu,rope,gmm,norm: 'norm' is no fused operator",
    ],
}
DECLINED = {
    "flags": "--normalization RMSNorm --swiglu --position-embedding-type rope --use-fused-rmsnorm --use-fused-swiglu "
    "--use-fused-rotary-pos-emb --no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion --num-experts 4 "
    "--moe-token-dispatcher-type allgather --moe-permute-fusion --disable-fused-ops permute,wgrad --moe-grouped-gemm "
    "--gemm-gradient-accumulation-fusion --disable-bias-linear",
    "says": [
        "--use-fused-rmsnorm: is contradicted by --no-persist-layer-norm",
        "--use-fused-swiglu: is contradicted by --no-bias-swiglu-fusion",
        "--use-fused-rotary-pos-emb: is contradicted by --no-rope-fusion",
        "--moe-permute-fusion: is not served by --moe-token-dispatcher-type allgather",
        "--moe-permute-fusion: is contradicted by --disable-fused-ops permute",
        "--gemm-gradient-accumulation-fusion: is contradicted by --disable-fused-ops wgrad",
    ],
}
OLD_DISPATCHER = {
    "flags": "--num-experts 4 --moe-token-dispatcher-type alltoall_seq --use-fused-moe-token-permute-and-unpermute "
    "--moe-permute-fusion --disable-bias-linear",
    "says": ["is not served by --moe-token-dispatcher-type alltoall_seq"],
}


@pytest.mark.parametrize("case", [DENSE, DECLINED, OLD_DISPATCHER], ids=["unfit", "declined", "old dispatcher"])
def test_trainer_refuses_with_every_reason(case):
    with pytest.raises(ConfigError) as caught:
        pretraining.pretrain(argv=f"{TINY} {case['flags']}".split())
    assert [text for text in case["says"] if text not in str(caught.value)] == []


@pytest.mark.megatron_lm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [DENSE, DECLINED], ids=["unfit", "declined"])
def test_megatron_lm_refuses_with_every_reason(runs, matrix, case):  # noqa: F811
    refused(runs(*tiny_gpt(matrix.corpus), *case["flags"].split()), *case["says"])
