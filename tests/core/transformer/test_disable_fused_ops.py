import argparse

import pytest

from mindspeed.core.transformer.disable_fused_ops import DisableFlags, DisableFusedOps
from mindspeed.core.transformer.fused_choice import NAMES, device_kernel, names_in
from mindspeed.ops import backends
from mindspeed.patching import RunShape
from mindspeed.testing.npu_contract import npu_contract


def test_names_are_read_and_unknown_ones_refused():
    assert names_in(" rmsnorm, ,rope") == ("rmsnorm", "rope") and names_in(None) == ()
    run = RunShape(argparse.Namespace(), "cpu")
    assert list(DisableFusedOps().check(DisableFlags(disable_fused_ops=",".join(NAMES)), run)) == []
    (problem,) = DisableFusedOps().check(DisableFlags(disable_fused_ops="rope,norm"), run)
    assert str(problem).startswith("--disable-fused-ops rope,norm: 'norm' is no fused operator. Choose from rmsnorm,swiglu,")


@pytest.mark.parametrize(("names", "fused", "changes"), [("wgrad", True, 1), ("wgrad", False, 0), ("rope", True, 0)])
def test_weight_gradients_are_declined_by_the_host_s_flag(names, fused, changes):
    run = RunShape(argparse.Namespace(gradient_accumulation_fusion=fused), "cpu")
    derived = list(DisableFusedOps().normalise(DisableFlags(disable_fused_ops=names), run))
    assert [(change.dest, change.value) for change in derived] == [("gradient_accumulation_fusion", False)] * changes


def test_kernel_of_a_device_is_named_unless_plain_torch_is_chosen():
    import mindspeed.ops.rms_norm  # noqa: F401 - defines the operator

    assert device_kernel("rms_norm", "cpu") == "aten"
    with backends("rms_norm=ref"):
        assert device_kernel("rms_norm", "cpu") == ""


@npu_contract()
def test_npu_has_a_kernel_for_each_operator_that_the_device_decides():
    from mindspeed.core.transformer import (  # noqa: F401 - define the operators
        fused_choice,
        fused_rmsnorm,
        fused_rotary_pos_emb,
        fused_softmax,
        fused_swiglu,
    )

    operators = ("rms_norm", "swiglu", "rotary", "scaled_masked_softmax")
    assert [fused_choice.device_kernel(name, "npu") for name in operators] == ["npu"] * 4
