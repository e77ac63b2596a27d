"""One small call of every public operator, for the tests that hold for all of them."""

# M rows; T tokens, K choices, E experts, H hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mindspeed.ops import moe_routing_map
from mindspeed.ops.cross_entropy import vocab_parallel_cross_entropy
from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm
from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm
from mindspeed.ops.ffn import npu_ffn
from mindspeed.ops.fusion_attention_v2 import npu_fusion_attention, npu_fusion_attention_grad
from mindspeed.ops.gmm import npu_gmm, npu_gmm_v2
from mindspeed.ops.layer_norm import layer_norm
from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2
from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw
from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16, npu_matmul_add_fp32
from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
from mindspeed.ops.npu_ring_attention_update import npu_ring_attention_update
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding
from mindspeed.ops.quant_gmm import npu_quant_gmm, npu_quant_gmm_v2
from mindspeed.ops.rms_norm import rms_norm
from mindspeed.ops.scaled_masked_softmax import scaled_masked_softmax
from mindspeed.ops.sort_chunks import sort_chunks
from mindspeed.ops.swiglu import bias_swiglu, swiglu, weighted_swiglu
from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm, npu_weight_quant_gmm_v2


@dataclass
class Sample:
    """A public function, its arguments by name, what it changes in place and what it has gradients of."""

    function: Callable
    arguments: dict[str, object]
    gradients: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    label: str = field(default="")

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def run(self, **replaced: object) -> list[Tensor]:
        """The tensors that the call returns and those that it changed, from a fixed random state."""
        arguments = self.arguments | replaced
        arguments |= {name: arguments[name].clone() for name in self.changes}
        torch.manual_seed(5)
        return flat(self.function(**arguments)) + [arguments[name] for name in self.changes]


def flat(value: object) -> list[Tensor]:
    """The tensors of a result; a row map counts as its tensor."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, tuple | list) else []


def int8(*shape: int) -> Tensor:
    return torch.randint(-100, 100, shape, dtype=torch.int8)


def ends(rows: int, groups: int) -> Tensor:
    """Cumulative ends of groups, the first one empty."""
    return torch.tensor([rows * index // max(groups - 1, 1) for index in range(groups)])


def all_samples(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    """Every operator with float operands of `dtype` and `rows` rows, which may be 0."""
    found: dict[str, Sample] = {}
    for part in (norms, activations, attention, products, tokens, optimizers, inference):
        for label, sample in part(dtype, rows).items():
            sample.label = label
            found[label] = sample
    return found


def norms(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, weight, bias = draw(rows, 3, 6), draw(6), draw(6)
    every = {
        "x0": x,
        "residual": draw(rows, 3, 6),
        "weight": weight,
        "bias": bias,
        "dropout_p": 0.4,
        "epsilon": 1e-5,
        "rowscale": draw(rows, 3),
        "layerscale": draw(6),
        "prenorm": True,
    }
    plain = {"x0": x, "residual": None, "weight": weight, "bias": None, "dropout_p": 0.0, "epsilon": 1e-5}
    wanted = ("x0", "residual", "weight", "bias", "rowscale", "layerscale")
    return {
        "rms_norm": Sample(rms_norm, {"x": x, "gamma": weight}, ("x", "gamma")),
        "layer_norm": Sample(layer_norm, {"x": x, "weight": weight, "bias": bias}, ("x", "weight", "bias")),
        "layer_norm without bias": Sample(layer_norm, {"x": x, "weight": weight}, ("x", "weight")),
        "dropout_add_layer_norm": Sample(npu_dropout_add_layer_norm, every, wanted),
        "dropout_add_layer_norm, plain": Sample(npu_dropout_add_layer_norm, plain, ("x0", "weight")),
        "dropout_add_rms_norm": Sample(npu_dropout_add_rms_norm, every, wanted),
        "dropout_add_rms_norm, mask": Sample(
            npu_dropout_add_rms_norm, plain | {"dropout_p": 0.4, "return_dropout_mask": True}, ("x0", "weight")
        ),
    }


def activations(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, head, table = draw(rows, 3, 6), draw(rows, 2, 3, 8), (rows, 1, 1, 8)
    turn = {"x": head, "cos": draw(*table), "sin": draw(*table)}
    scores = draw(2, rows, 4, 6)
    return {
        "swiglu": Sample(swiglu, {"x": x}, ("x",)),
        "swiglu, other dimension": Sample(swiglu, {"x": draw(4, rows, 3), "dim": 0}, ("x",)),
        "bias_swiglu": Sample(bias_swiglu, {"x": x, "bias": draw(6)}, ("x", "bias")),
        "weighted_swiglu": Sample(weighted_swiglu, {"x": x, "weights": draw(rows, 3, 1)}, ("x", "weights")),
        "rotary, halves": Sample(npu_rotary_position_embedding, turn, ("x", "cos", "sin")),
        "rotary, neighbours": Sample(npu_rotary_position_embedding, turn | {"mode": 1}, ("x", "cos", "sin")),
        "cross entropy": Sample(
            vocab_parallel_cross_entropy, {"logits": x, "target": torch.arange(3 * rows).view(rows, 3) % 6}, ("logits",)
        ),
        "softmax, mask": Sample(
            scaled_masked_softmax, {"x": scores, "mask": torch.rand(2, 1, 4, 6) < 0.4, "scale": 0.5}, ("x",)
        ),
        "softmax, causal": Sample(scaled_masked_softmax, {"x": scores, "causal": True}, ("x",)),
    }


def attention(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    q, k, v = draw(2, 4, rows, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    operands = {"query": q, "key": k, "value": v, "head_num": 4, "input_layout": "BNSD", "scale": 0.3}
    mask = torch.rand(rows, 5) < 0.3
    packed = {
        "query": draw(rows, 2, 8),
        "key": draw(rows, 2, 8),
        "value": draw(rows, 2, 8),
        "head_num": 2,
        "input_layout": "TND",
        "actual_seq_qlen": [rows // 2, rows],
        "actual_seq_kvlen": [rows // 2, rows],
    }
    statistics = {"softmax_max": torch.ones(2, 4, rows, 8), "softmax_sum": torch.ones(2, 4, rows, 8), "attention_in": q}
    merged, both = {}, {}
    for side in ("prev", "cur"):
        merged |= {f"{side}_attn_out": draw(rows, 2, 8)}
        merged |= {f"{side}_softmax_{kind}": torch.rand(2, 2, rows, 8) + 0.1 for kind in ("max", "sum")}
        both |= {f"{side}_attn_out": draw(rows, 2, 8)}
        both |= {f"{side}_softmax_{kind}": torch.rand(rows, 2, 8) + 0.1 for kind in ("max", "sum")}
    three = ("query", "key", "value")
    return {
        "attention": Sample(npu_fusion_attention, operands | {"atten_mask": mask}, three),
        "attention, bias": Sample(npu_fusion_attention, operands | {"pse": draw(2, 4, rows, 5)}, (*three, "pse")),
        "attention, dropout": Sample(npu_fusion_attention, operands | {"keep_prob": 0.7}, three),
        "attention, packed": Sample(npu_fusion_attention, packed, three),
        "attention_grad": Sample(npu_fusion_attention_grad, operands | statistics | {"grad_outputs": q.clone()}),
        "ring update": Sample(npu_ring_attention_update, merged),
        "ring update, packed": Sample(
            npu_ring_attention_update, both | {"layout": "TND", "actual_seq_qlen": torch.tensor([0, rows // 2, rows])}
        ),
    }


def products(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    bias = torch.randn(3, 5).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    grouped = {"x": draw(rows, 6), "weight": draw(3, 6, 5), "group_list": ends(rows, 3)}
    summed = {"x": draw(6, rows), "weight": draw(rows, 5), "group_list": ends(rows, 3), "group_type": 2}
    pair = {"total_input": draw(rows, 6), "grad_output": draw(rows, 5)}
    expert = {"x": draw(rows, 6), "dy": draw(rows, 5), "grouplist": ends(rows, 3), "grad": torch.randn(3, 6, 5)}
    return {
        "gmm": Sample(npu_gmm, grouped, ("x", "weight")),
        "gmm, bias": Sample(npu_gmm, grouped | {"bias": bias}, ("x", "weight", "bias")),
        "gmm_v2": Sample(npu_gmm_v2, grouped | {"group_list": ends(rows, 3).diff(prepend=torch.zeros(1, dtype=torch.int64))}),
        "gmm, list": Sample(npu_gmm, grouped | {"group_list": ends(rows, 3).tolist()}, ("x", "weight")),
        "gmm, type 2": Sample(npu_gmm, summed),
        "matmul_add_fp32": Sample(npu_matmul_add_fp32, pair | {"grad": torch.randn(5, 6)}, changes=("grad",)),
        "matmul_add_fp16": Sample(npu_matmul_add_fp16, pair | {"grad": torch.randn(5, 6).half()}, changes=("grad",)),
        "groupmatmul_add": Sample(npu_groupmatmul_add_fp32, expert, changes=("grad",)),
    }


def tokens(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    routing_map = (torch.arange(3) != torch.arange(rows).unsqueeze(1) % 3).contiguous()
    moved = moe_routing_map.permute(draw(rows, 6), routing_map, None, 2 * rows)[2]
    order = torch.randperm(2 * rows).int()
    back = {"permuted_tokens": draw(2 * rows, 6), "row_map": moved, "restore_shape": (rows, 6), "probs": draw(rows, 3)}
    given = {"tokens": draw(rows, 6), "routing_map": routing_map, "probs": draw(rows, 3), "num_out_tokens": 2 * rows}
    return {
        "permute": Sample(
            npu_moe_token_permute, {"tokens": draw(rows, 6), "indices": torch.randint(0, 3, (rows, 2))}, ("tokens",)
        ),
        "unpermute": Sample(
            npu_moe_token_unpermute,
            {"permuted_tokens": draw(2 * rows, 6), "sorted_indices": order, "probs": draw(rows, 2)},
            ("permuted_tokens", "probs"),
        ),
        "unpermute without probs": Sample(
            npu_moe_token_unpermute, {"permuted_tokens": draw(2 * rows, 6), "sorted_indices": order}, ("permuted_tokens",)
        ),
        "permute by map": Sample(moe_routing_map.permute, given, ("tokens", "probs")),
        "permute by map, padded": Sample(moe_routing_map.permute, given | {"drop_and_pad": True}, ("tokens", "probs")),
        "unpermute by map": Sample(moe_routing_map.unpermute, back, ("permuted_tokens", "probs")),
        "sort_chunks": Sample(
            sort_chunks,
            {"x": draw(rows, 6), "split_sizes": torch.tensor([rows, 0]), "order": torch.tensor([1, 0])},
            ("x",),
        ),
    }


def optimizers(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape).to(dtype)

    shape, states = (rows, 3), ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    step = {name: draw(*shape) for name in (*states, "grad")} | {"state_step": torch.tensor(2)}
    averaged = {name: torch.rand(shape) for name in ("grad", "var", "m", "v", "s")} | {"step": torch.tensor([2])}
    return {
        "adamw": Sample(npu_apply_fused_adamw_v2, step | {"amsgrad": True}, changes=states),
        "adamw, plain": Sample(npu_apply_fused_adamw_v2, step | {"max_exp_avg_sq": None}, changes=states[:3]),
        "ema_adamw": Sample(npu_apply_fused_ema_adamw, averaged, changes=("var", "m", "v", "s")),
        "ema_adamw, mode 0": Sample(
            npu_apply_fused_ema_adamw, averaged | {"mode": 0, "bias_correction": False}, changes=("var", "m", "v", "s")
        ),
    }


def inference(dtype: torch.dtype, rows: int) -> dict[str, Sample]:
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    sizes = ends(rows, 2).diff(prepend=torch.zeros(1, dtype=torch.int64))
    integers = {"x": int8(rows, 6), "weight": int8(2, 6, 5), "scale": torch.rand(2, 5), "group_list": ends(rows, 2)}
    extras = {"per_token_scale": torch.rand(rows), "bias": torch.ones(2, 5, dtype=torch.int32), "act_type": 5}
    weights = {"x": torch.randn(rows, 6).to(half), "weight": int8(2, 6, 5), "antiquant_scale": torch.rand(2, 5).to(half)}
    network = {
        "x": torch.randn(rows, 6).to(dtype),
        "weight1": torch.randn(6, 5).to(dtype),
        "weight2": torch.randn(5, 4).to(dtype),
    }
    experts = {
        "x": torch.randn(rows, 6).to(dtype),
        "weight1": torch.randn(2, 6, 5).to(dtype),
        "weight2": torch.randn(2, 5, 4).to(dtype),
    }
    whole = {
        "x": int8(rows, 6),
        "weight1": int8(6, 5),
        "weight2": int8(5, 4),
        "scale": torch.rand(1),
        "deq_scale1": torch.rand(5),
        "deq_scale2": torch.rand(4),
    }
    return {
        "quant_gmm": Sample(npu_quant_gmm, integers | extras),
        "quant_gmm_v2": Sample(npu_quant_gmm_v2, integers | {"group_list": sizes}),
        "weight_quant_gmm": Sample(npu_weight_quant_gmm, weights | {"group_list": ends(rows, 2)}),
        "weight_quant_gmm_v2": Sample(
            npu_weight_quant_gmm_v2, weights | {"group_list": sizes, "antiquant_offset": torch.rand(2, 5).to(half)}
        ),
        "ffn": Sample(npu_ffn, network | {"activation": "gelu"}),
        "ffn, experts": Sample(npu_ffn, experts | {"activation": "relu", "expert_tokens": [0, rows]}),
        "ffn, int8": Sample(npu_ffn, whole | {"activation": "silu"}),
    }
