"""Fusion attention v2: implies flash attention, says where it changes nothing, and computes the same."""

import argparse
import logging

import pytest

from mindspeed.core.transformer.flash_attention.feature import FlashAttention
from mindspeed.core.transformer.flash_attention.fusion_attention_v2 import FusionAttentionV2
from mindspeed.notices import log_once
from mindspeed.patching import activation
from mindspeed.testing.parity import assert_same_training


def test_it_implies_flash_attention():
    args = argparse.Namespace(use_fusion_attn_v2=True, use_flash_attn=False, optimization_level=2)
    features = (FusionAttentionV2(), FlashAttention())
    activation.settle(features, args, platform="cpu", given={"use_fusion_attn_v2"})
    assert args.use_flash_attn is True


@pytest.mark.parametrize(
    ("platform", "positions", "words"),
    [
        ("cpu", "rope", "--use-fusion-attn-v2 changes nothing on cpu"),
        ("npu", "rope", "--use-fusion-attn-v2 is only needed for ALiBi"),
        ("npu", "alibi", ""),
    ],
)
def test_it_says_where_it_is_not_needed(caplog, platform, positions, words):
    log_once.cache_clear()
    args = argparse.Namespace(
        use_fusion_attn_v2=True, use_flash_attn=True, position_embedding_type=positions, optimization_level=2
    )
    with caplog.at_level(logging.INFO, logger="mindspeed"):
        activation.check((FusionAttentionV2(), FlashAttention()), args, platform=platform, given=set())
    assert words in caplog.text and (words or caplog.text == "")


def test_it_trains_as_flash_attention_does():
    assert_same_training(
        "--use-flash-attn", "--use-fusion-attn-v2", rtol=0.0, weight_atol=0.0, features=["fusion-attention-v2"]
    )
