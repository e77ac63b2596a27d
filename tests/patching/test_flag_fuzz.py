"""Any flags in any combination either pass all checks or are refused with our error; nothing else may happen.

The grammar comes from the features' declarations, so new flags join by themselves. Problems found once stay
as examples in REGRESSIONS.
"""

import argparse
import copy
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed.errors import ConfigError
from mindspeed.host.program import host_defaults
from mindspeed.patching import activation
from mindspeed.patching.discovery import all_features
from mindspeed.patching.parser import all_specs

CASES = int(os.environ.get("MINDSPEED_FUZZ_CASES", "300"))
FEATURES = all_features()
SPECS = all_specs(FEATURES)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 100, 10**9])
FLOATS = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, float("inf"), float("nan")])
TEXTS = st.sampled_from(["", "0", "1", "0,1", "0-3", "7,9", "1.5", "a", "[[1,1]]", "None", "ä\u2028", "x" * 5000])

# Arguments of the host that features look at, with values that the host itself accepts.
SIZES = st.fixed_dictionaries(
    {
        "num_layers": st.sampled_from([1, 2, 4, 8]),
        "hidden_size": st.sampled_from([64, 128, 256]),
        "num_attention_heads": st.sampled_from([4, 8]),
        "seq_length": st.sampled_from([16, 24, 64]),
        "micro_batch_size": st.sampled_from([1, 2]),
        "global_batch_size": st.sampled_from([8, 16]),
        "tensor_model_parallel_size": st.sampled_from([1, 2, 4]),
        "pipeline_model_parallel_size": st.sampled_from([1, 2]),
        "context_parallel_size": st.sampled_from([1, 2, 4]),
        "expert_model_parallel_size": st.sampled_from([1, 2]),
        "num_experts": st.sampled_from([None, 4]),
        "sequence_parallel": st.booleans(),
        "bf16": st.booleans(),
        "use_distributed_optimizer": st.booleans(),
        "moe_token_dispatcher_type": st.sampled_from(["allgather", "alltoall", "alltoall_seq"]),
        "moe_grouped_gemm": st.booleans(),
        "recompute_granularity": st.sampled_from([None, "full", "selective"]),
        "recompute_method": st.sampled_from([None, "block", "uniform"]),
        "position_embedding_type": st.sampled_from(["learned_absolute", "rope"]),
        "normalization": st.sampled_from(["LayerNorm", "RMSNorm"]),
        "swiglu": st.booleans(),
    }
)

REGRESSIONS = [
    {},
    {"optimization_level": 7},
    {"noop_layers": "x" * 5000},
]


def value_of(spec):
    """Valid and invalid values for a flag."""
    if spec.is_switch:
        return st.sampled_from([not spec.default, not spec.default, "yes", 1])
    scalar = {int: NUMBERS, float: st.one_of(FLOATS, NUMBERS)}.get(spec.kind, TEXTS)
    if spec.choices is not None:
        scalar = st.one_of(st.sampled_from(spec.choices), scalar)
    return st.lists(scalar, max_size=4) if spec.is_many else st.one_of(scalar, st.none(), TEXTS)


@st.composite
def flags(draw):
    chosen = draw(st.lists(st.sampled_from(sorted(SPECS)), unique=True, max_size=6))
    return {dest: draw(value_of(SPECS[dest])) for dest in chosen}


def namespace(sizes, given):
    size = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"] * sizes["context_parallel_size"]
    derived = {"world_size": 2 * size, "data_parallel_size": 2, "padded_vocab_size": 512, "max_position_embeddings": 64}
    return argparse.Namespace(**{**host_defaults(), **sizes, **derived, **given})


def verdict(args):
    """True when accepted, the problems when refused; every other exception is a failure of the feature."""
    args = copy.copy(args)
    try:
        activation.settle(FEATURES, args, platform="cpu")
        before = dict(vars(args))
        try:
            activation.check(FEATURES, args, platform="cpu")
        except ConfigError:
            assert same(vars(args), before), "a refusal changed the arguments"
            raise
    except ConfigError as error:
        for problem in error.problems:
            assert problem.flag and problem.rule and problem.fix, problem
            assert not str(problem).startswith(": "), problem
        return error.problems
    return True


def same(left, right):
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(SIZES, flags())
def test_any_flags_are_accepted_or_refused(sizes, given):
    verdict(namespace(sizes, given))


@pytest.mark.parametrize("given", REGRESSIONS, ids=lambda given: ",".join(given)[:30] or "defaults")
def test_regressions(given):
    sizes = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64, "micro_batch_size": 1}
    sizes |= {"global_batch_size": 8, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    sizes |= {"context_parallel_size": 1}
    accepted = verdict(namespace(sizes, given))
    assert accepted is True or given


@pytest.mark.parametrize("dest", sorted(SPECS))
def test_both_spellings_of_every_flag_are_equal(dest):
    spec = SPECS[dest]
    parser = activation.add_flags(argparse.ArgumentParser(allow_abbrev=False), FEATURES)
    if spec.is_switch:
        assert getattr(parser.parse_args([spec.option]), dest) is (not spec.default)
        return
    text = str(spec.choices[-1]) if spec.choices else {int: "3", float: "0.5"}.get(spec.kind, "1")
    apart, joined = parser.parse_args([spec.option, text]), parser.parse_args([f"{spec.option}={text}"])
    assert apart == joined and getattr(apart, dest) is not None
