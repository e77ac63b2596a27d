"""No operator makes the host wait for a GPU, but those that say so."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from mindspeed.ops._transfer import to_device
from mindspeed.ops.ffn import npu_ffn
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention
from mindspeed.ops.gmm import npu_gmm, npu_gmm_v2
from mindspeed.ops.moe_routing_map import permute
from mindspeed.ops.sort_chunks import sort_chunks
from tests.ops import _samples
from tests.ops._samples import Sample
from tests.ops_kernels._fake_cuda import Waits, fake_cuda, on_device

BF16, FP32 = torch.bfloat16, torch.float32
HOST = {"group_list", "grouplist", "split_sizes", "order", "actual_seq_qlen", "state_step", "step"}
"""Arguments that may be tensors in host memory."""


def larger() -> dict[str, Sample]:
    """Calls that need sizes for the kernels of aten: those of the usual samples are odd."""
    x, weight, ends = torch.randn(16, 24).to(BF16), torch.randn(3, 24, 8).to(BF16), torch.tensor([5, 5, 12])
    grouped = {"x": x, "weight": weight, "group_list": ends}
    heads = {name: torch.randn(24, 2, 16).to(BF16) for name in ("query", "key", "value")}
    mask = torch.ones(2048, 2048, dtype=torch.bool)
    packed = heads | {"head_num": 2, "input_layout": "TND", "actual_seq_qlen": [8, 24], "actual_seq_kvlen": [8, 24]}
    prefix = {name: torch.randn(2, 24, 2, 16).to(BF16) for name in heads} | {"head_num": 2, "input_layout": "BSND"}
    found = {
        "gmm, aligned": Sample(npu_gmm, grouped, ("x", "weight")),
        "gmm, aligned list": Sample(npu_gmm, grouped | {"group_list": ends.tolist()}, ("x", "weight")),
        "gmm_v2, aligned": Sample(npu_gmm_v2, grouped | {"group_list": torch.tensor([5, 0, 7])}, ("x", "weight")),
        "gmm, aligned type 2": Sample(npu_gmm, {"x": x.t(), "weight": x, "group_list": ends, "group_type": 2}),
        "attention, causal packed": Sample(
            npu_fusion_attention, packed | {"atten_mask": mask, "sparse_mode": 3}, ("query", "key", "value")
        ),
        "attention, band of one sequence": Sample(
            npu_fusion_attention, packed | {"atten_mask": mask, "sparse_mode": 7, "pre_tokens": 3, "next_tokens": 0}, ("query",)
        ),
        "attention, prefix": Sample(
            npu_fusion_attention, prefix | {"atten_mask": mask, "sparse_mode": 6, "prefix": [3, 9]}, ("query",)
        ),
        "attention, slopes": Sample(npu_fusion_attention, prefix | {"pse": torch.rand(2), "pse_type": 2}, ("query",)),
    }
    for label, sample in found.items():
        sample.label = label
    return found


SAMPLES = {
    f"{sample.label} {str(dtype).removeprefix('torch.')}": sample
    for dtype, samples in ((BF16, _samples.all_samples(BF16, 8)), (FP32, _samples.all_samples(FP32, 8)), (BF16, larger()))
    for sample in samples.values()
}


WAYS = [(name, way) for name, sample in SAMPLES.items() for way in ("all", "first")[: max(1, len(sample.gradients))]]


@pytest.mark.parametrize(("name", "gradients"), WAYS)
def test_bodies_for_cuda_do_not_wait(monkeypatch, name, gradients):
    sample = SAMPLES[name]
    with fake_cuda(monkeypatch, gradients="" if not sample.gradients else gradients) as device:
        for host in ((), HOST & set(sample.tensors())):
            sample.function(**{key: value if key in host else on_device(value) for key, value in sample.arguments.items()})
    assert device.ran
    if sample.gradients:
        assert any("backward" in operator or operator == "sort_chunks" for operator, _ in device.ran)


@pytest.mark.parametrize(
    ("name", "kernel"), [("gmm, aligned", "aten"), ("gmm bfloat16", "triton"), ("attention, slopes", "aten")]
)
def test_the_bodies_that_ran_are_those_of_the_device(monkeypatch, name, kernel):
    (sample,) = (sample for key, sample in SAMPLES.items() if key in (name, f"{name} bfloat16"))
    with fake_cuda(monkeypatch) as device:
        sample.function(**on_device(sample.arguments))
    assert {found for _, found in device.ran} == {kernel}


def test_a_device_without_a_grouped_product_of_its_own_gets_ours(monkeypatch):
    with fake_cuda(monkeypatch, capability=(8, 0)) as device:
        npu_gmm(**on_device(SAMPLES["gmm, aligned bfloat16"].arguments))
    assert device.ran == [("gmm", "triton"), ("gmm_backward", "triton")]


def test_what_waits_is_noticed(monkeypatch):
    """The harness itself: each way to wait raises."""
    ways = {
        "item": lambda x: x[0].item(),
        "tolist": lambda x: x.tolist(),
        "bool": lambda x: bool(x.sum() > 0),
        "nonzero": lambda x: x.nonzero(),
        "mask as an index": lambda x: x[x > 0],
        "mask as a place": lambda x: x.__setitem__(x > 0, 1.0),
        "index on the host": lambda x: x[torch.tensor([0, 1])],
        "equal": lambda x: torch.equal(x, x),
        "to the host": lambda x: x.cpu(),
        "to the device": lambda x: torch.tensor([1.0]).to(x.device),
        "later, but not from page-locked memory": lambda x: torch.tensor([1.0]).to(x.device, non_blocking=True),
        "a list": lambda x: torch.tensor([1.0], device=x.device),
        "copy": lambda x: x.copy_(torch.tensor([1.0])),
        "sizes of repeats": lambda x: x.repeat_interleave(x.long()),
    }
    waited = set()
    with fake_cuda(monkeypatch):
        x = torch.empty(3, device="cuda:0")
        for name, way in ways.items():
            try:
                way(x)
            except (Waits, RuntimeError, NotImplementedError):
                waited.add(name)
        to_device([1, 2], x.device)
        to_device(torch.tensor([1, 2]), x.device, FP32)
        x[1:].fill_(2.0)
        x[torch.zeros(2, dtype=torch.int64, device="cuda:0")] = 1.0
    assert waited == set(ways)


def test_operators_that_say_that_they_wait_do(monkeypatch):
    tokens, routing_map = torch.randn(4, 6), torch.ones(4, 3, dtype=torch.bool)
    experts = SAMPLES["ffn, experts float32"].arguments | {"expert_tokens": torch.tensor([0, 8])}
    with fake_cuda(monkeypatch, gradients=""):
        with pytest.raises(RuntimeError, match="cuda"):  # int() of a sum, for which torch wants the device at once
            permute(*on_device((tokens, routing_map)))
        with pytest.raises((Waits, RuntimeError), match="tolist|_local_scalar_dense"):
            npu_ffn(**on_device(experts))
        monkeypatch.setenv("MINDSPEED_OPS_STRICT", "1")
        with pytest.raises((Waits, RuntimeError), match="tolist|_local_scalar_dense"):
            sort_chunks(**on_device(SAMPLES["sort_chunks float32"].arguments))


HOSTS = [(name, host) for name, sample in SAMPLES.items() for host in (False, True)[: 1 + bool(HOST & set(sample.tensors()))]]


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "host"), HOSTS, ids=[f"{name}{', from the host' * host}" for name, host in HOSTS])
def test_gpu_operators_do_not_wait(name, host):
    """torch raises where it would synchronise; the first call, which compiles, may."""
    sample = SAMPLES[name]
    kept = HOST if host else set()
    arguments = {
        key: value if key in kept else tree_map_only(torch.Tensor, torch.Tensor.cuda, value)
        for key, value in sample.arguments.items()
    }
    leaves = [arguments[key].requires_grad_() for key in sample.gradients]

    def call() -> None:
        outputs = [value for value in _samples.flat(sample.function(**arguments)) if value.requires_grad]
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(value) for value in outputs], allow_unused=True)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
