"""The tiny GPT with and without a fused flag, in the layouts that acceptance names; runs without it are shared by all flags."""

import math

from mindspeed.testing.parity import assert_same_training

MODEL = "--num-layers 2 --normalization RMSNorm --swiglu --position-embedding-type rope"
TENSOR = "--tensor-model-parallel-size 2"
LAYOUTS = {"TP 1": ("", 1), "TP 2": (TENSOR, 2), "TP 2 SP": (f"{TENSOR} --sequence-parallel", 2)}


def assert_fused_trains_the_same(layout, flag, features, called):
    """Ten steps in fp32: losses within 1e-6 of the host's, and the feature's own patches ran."""
    extra, world = LAYOUTS[layout]
    first, second = assert_same_training(
        "", flag, world, steps=10, common=f"{MODEL} {extra}", features=features, called=called, rtol=1e-5
    )
    for ours, theirs in zip(second.losses, first.losses, strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-6), (second.losses, first.losses)
