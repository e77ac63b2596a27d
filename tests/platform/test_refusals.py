"""Flags that a CPU cannot honour are named with reason and remedy; everything else passes."""

import argparse

import pytest

from mindspeed.platform import refused_on_cpu
from mindspeed.platform.refusals import REFUSALS

VALUES = {
    "fp8": "hybrid",
    "transformer_impl": "transformer_engine",
    "distributed_backend": "ucc",
    "moe_token_dispatcher_type": "flex",
    "cpu_offloading_num_layers": 2,
    "nccl_communicator_config_path": "nccl.yaml",
}
HARMLESS = {"transformer_impl": "local", "distributed_backend": "gloo", "moe_token_dispatcher_type": "alltoall"}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.option)
def test_each_flag_is_refused_when_used_and_only_then(refusal):
    used = argparse.Namespace(**{refusal.dest: VALUES.get(refusal.dest, True)})
    (problem,) = refused_on_cpu(used, given=frozenset({refusal.dest}))
    assert problem.flag == refusal.option and problem.rule and problem.fix
    unused = argparse.Namespace(**{refusal.dest: HARMLESS.get(refusal.dest, False)})
    assert not list(refused_on_cpu(unused, given=frozenset({refusal.dest})))


def test_a_default_is_no_wish():
    assert not list(refused_on_cpu(argparse.Namespace(transformer_impl="transformer_engine")))


def test_all_problems_are_reported_and_read_well():
    args = argparse.Namespace(fp8="e4m3", enable_cuda_graph=True, profile=True, use_pytorch_profiler=False)
    texts = [str(problem) for problem in refused_on_cpu(args)]
    assert len(texts) == 3
    assert texts[0] == ("--fp8-format e4m3: needs 8-bit matrix units, which platform cpu lacks. Train with --bf16 or in fp32.")
    assert texts[2].endswith("Add --use-pytorch-profiler.")
    assert not list(refused_on_cpu(argparse.Namespace(profile=True, use_pytorch_profiler=True)))


def test_no_host_has_all_flags():
    assert not list(refused_on_cpu(argparse.Namespace()))
