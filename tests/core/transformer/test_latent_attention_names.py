"""Flags of latent attention under their other names: the same run, or a refusal."""

import argparse

import pytest

from mindspeed.core.transformer.latent_attention_names import LatentAttentionNames
from mindspeed.errors import ConfigError
from mindspeed.patching import activation
from tests.training.runs import TINY, train

HOST = dict(multi_latent_attention=False, qk_head_dim=128, qk_pos_emb_head_dim=64)
NAMES = (LatentAttentionNames(),)


def settled(given=(), **values):
    args = argparse.Namespace(**{**HOST, **values})
    activation.settle(NAMES, args, platform="cpu", given=given)
    activation.check(NAMES, args, platform="cpu", given=given)
    return args.multi_latent_attention, args.qk_head_dim, args.qk_pos_emb_head_dim


def test_other_names_set_the_hosts_flags():
    assert settled() == (False, 128, 64)
    assert settled(multi_head_latent_attention=True) == (True, 128, 64)
    assert settled(multi_head_latent_attention=True, qk_nope_head_dim=32, qk_rope_head_dim=16) == (True, 32, 16)
    assert settled(multi_latent_attention=True, qk_rope_head_dim=16) == (True, 128, 16)


def test_the_same_value_twice_is_no_contradiction():
    given = {"qk_head_dim"}
    assert settled(given, multi_latent_attention=True, qk_head_dim=32, qk_nope_head_dim=32) == (True, 32, 64)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            dict(multi_latent_attention=True, qk_head_dim=16, qk_nope_head_dim=32),
            "--qk-nope-head-dim 32: contradicts --qk-head-dim 16, which means the same. Give one of the two",
        ),
        (
            dict(multi_latent_attention=True, qk_pos_emb_head_dim=8, qk_rope_head_dim=4),
            "--qk-rope-head-dim 4: contradicts --qk-pos-emb-head-dim 8",
        ),
        (dict(qk_nope_head_dim=32), "--qk-nope-head-dim 32: needs --multi-latent-attention"),
        (dict(multi_latent_attention=True, qk_nope_head_dim=0), "--qk-nope-head-dim 0: must be at least 1"),
    ],
)
def test_contradictions_and_lonely_sizes_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        settled(set(values), **values)


def test_both_spellings_train_alike():
    common = f"{TINY} --num-layers 1 --train-iters 2 --v-head-dim 16 --kv-lora-rank 16 --position-embedding-type rope"
    theirs = train(f"{common} --multi-latent-attention --qk-head-dim 16 --qk-pos-emb-head-dim 8")
    ours = train(f"{common} --multi-head-latent-attention --qk-nope-head-dim 16 --qk-rope-head-dim 8")
    assert ours.curve == theirs.curve and ours.digest == theirs.digest
    assert train(f"{common} --multi-latent-attention --qk-head-dim 32 --qk-pos-emb-head-dim 8").curve != theirs.curve
