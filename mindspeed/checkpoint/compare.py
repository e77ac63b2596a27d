"""Whether a checkpoint fits the run: a comparison of the arguments saved with it and those of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mindspeed.errors import CheckpointError, Problem

# Destinations that decide the shapes of the weights, in any format.
_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "max_position_embeddings",
    "position_embedding_type",
    "add_position_embedding",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "qk_layernorm",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "mtp_num_layers",
)
# Compared only where the run uses what they describe: their defaults differ between versions.
_ONLY_WITH = {
    "num_query_groups": "group_query_attention",
    "moe_ffn_hidden_size": "num_experts",
    "moe_shared_expert_intermediate_size": "num_experts",
    "q_lora_rank": "multi_latent_attention",
    "kv_lora_rank": "multi_latent_attention",
}
# In the `torch` format each file holds one rank's part, so the layout must agree as well.
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# Learned positions only: with others, the sequence may grow.
_POSITIONS = "max_position_embeddings"
_NEGATED = {"add_bias_linear": "--disable-bias-linear"}
_ABSENT = object()


def shape_problems(saved: Mapping[str, Any], run: Mapping[str, Any], *, format: str = "torch") -> Iterator[Problem]:
    """Each dimension in which a checkpoint differs from the run.

    Args:
        saved: `vars(state["args"])` of the checkpoint.
        run: `vars(args)` of the run. Names that either side lacks are not compared.
        format: "torch" also compares the parallel layout; "torch_dist" is resharded on load.
    """
    names = _SHAPE if format == "torch_dist" else (*_SHAPE, *_LAYOUT)
    for name in names:
        old, new = saved.get(name, _ABSENT), run.get(name, _ABSENT)
        if old is _ABSENT or new is _ABSENT or old == new:
            continue
        if name in _ONLY_WITH and not run.get(_ONLY_WITH[name]):
            continue
        if name == _POSITIONS and saved.get("position_embedding_type", "learned_absolute") != "learned_absolute":
            continue
        if name == "padded_vocab_size" and format == "torch_dist":
            continue  # the host cuts or pads the table to the run's size
        yield Problem(_NEGATED.get(name, option(name)), new, f"the checkpoint was saved with {old}", _remedy(name, old))


def option(name: str) -> str:
    """Command-line form of a destination."""
    return "--" + name.replace("_", "-")


def _remedy(name: str, old: Any) -> str:
    if name in _LAYOUT:
        return f"use {old}, or convert the checkpoint to --ckpt-format torch_dist, which loads in any layout"
    if name == "padded_vocab_size":
        return f"use the tokenizer and --make-vocab-size-divisible-by of that run (padded size {old})"
    return f"use {old}, or load another checkpoint"


def optimizer_problems(saved: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the saved optimizer state is of the kind that the run will load; nothing when it will not be loaded."""
    if run.get("finetune") or run.get("no_load_optim") or saved.get("no_save_optim"):
        return
    was, now = bool(saved.get("use_distributed_optimizer")), bool(run.get("use_distributed_optimizer"))
    if was != now:
        kind = "with" if was else "without"
        rule = f"the checkpoint was saved {kind} --use-distributed-optimizer"
        yield Problem("--use-distributed-optimizer", "on" if now else "off", rule, "use the same, or --no-load-optim")
    old, new = saved.get("optimizer", "adam"), run.get("optimizer", "adam")
    if old != new:
        yield Problem("--optimizer", new, f"the checkpoint was saved with {old}", f"use {old}, or --no-load-optim")


def check_fits(saved: Mapping[str, Any], run: Mapping[str, Any], *, format: str = "torch", directory: object = "") -> None:
    """Compare everything.

    Raises:
        CheckpointError: names each differing dimension.
    """
    shapes = list(shape_problems(saved, run, format=format))
    problems = shapes + list(optimizer_problems(saved, run))
    if not problems:
        return
    what = "of another shape" if shapes else "with another optimizer"
    lines = "".join(f"\n  {index}. {problem}" for index, problem in enumerate(problems, 1))
    raise CheckpointError(f"checkpoint {what}{f' ({directory})' if directory else ''}:{lines}")
