"""Core attention as the flags of a run make it, without a host: what the tests of its features share."""

import argparse
import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed.core.context_parallel.gathered_attention import heads_first, sequence_first
from mindspeed.core.context_parallel.scope import layout_scope
from mindspeed.core.transformer.flash_attention.feature import FlashFlags, build_wiring

RING, ULYSSES, HYBRID = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo"
GATHER, ADAPTIVE = "kvallgather_cp_algo", "adaptive_cp_algo"


class Tracker:
    """Stands for the host's random-state tracker; counts its scopes."""

    forks = 0

    @contextlib.contextmanager
    def fork(self):
        self.forks += 1
        yield


def run_of(flags=None, *, group=None, given=(), tp=(0, 1), tracker=None, **arguments):
    """What flash attention puts into a host whose arguments are these; process groups exist when `group` is given."""
    args = argparse.Namespace(given_flags=frozenset(given), **arguments)
    tracker = tracker or Tracker()
    targets = {
        "megatron.core.tensor_parallel.random:get_cuda_rng_tracker": lambda: tracker,
        "training:get_tokenizer": lambda: SimpleNamespace(eod=0),
    }
    host = SimpleNamespace(
        args=args,
        load=targets.__getitem__,
        group=lambda name: group,
        rank=lambda name: tp[0],
        size=lambda name: tp[1],
    )
    wiring = build_wiring(flags or FlashFlags(), host)
    if group is not None and wiring.attention.maker.plan.size > 1:
        wiring.groups.create(wiring.attention.maker.plan, group, overlap=False)
    return wiring


def layer(kind="causal", *, heads=4, dropout=0.0, training=True, scale=0.3, number=1, **config):
    """The host's core attention as far as ours reads it."""
    defaults = dict(num_attention_heads=heads, apply_query_key_layer_scaling=False, sequence_parallel=False)
    return SimpleNamespace(
        config=SimpleNamespace(**{**defaults, **config}),
        softmax_scale=scale,
        layer_number=number,
        attn_mask_type=SimpleNamespace(name=kind),
        attention_dropout=SimpleNamespace(p=dropout),
        training=training,
    )


def attention_of(wiring, module=None, *, mask=None, packed=None, layout=None):
    """`wiring`'s core attention on [B, heads, s, D] tensors, as the comparisons with dense attention want it."""
    module = module or layer()

    def attention(q, k, v):
        inputs = [sequence_first(tensor) for tensor in (q, k, v)]
        if packed is not None:
            inputs = [tensor.squeeze(1) for tensor in inputs]
        with layout_scope(layout):
            out = wiring.attention(module, *inputs, mask, packed=packed)
        out = out.unsqueeze(1) if packed is not None else out
        return heads_first(out.unflatten(-1, (q.shape[1], -1)))

    return attention


def plan_arguments(algorithm, size, **more):
    """Arguments of a context-parallel run."""
    degree = {"ulysses_degree_in_cp": 2} if algorithm == HYBRID else {}
    return dict(context_parallel_algo=algorithm, context_parallel_size=size, **degree, **more)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest storage that any operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
