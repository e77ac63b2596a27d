"""Other software's attention over a sequence that is shared out, behind one signature.

Each maker imports its library, raising ImportError where it is not installed, and returns `attention(q, k, v)` on
[S / R, B, heads, D] of this rank, causal. Rings take zigzag shares, Ulysses contiguous ones.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable
from unittest import mock

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.peers.flash_attn_stand_in import installed

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def deepspeed_ulysses(group: ProcessGroup) -> Attention:
    """DeepSpeed's `DistributedAttention` around torch's attention."""
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    # Its shared-memory extension takes minutes to compile and serves other collectives than this one.
    with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, dist_init_required=False, verbose=False)

    def local(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    module = DistributedAttention(local, group, scatter_idx=2, gather_idx=0)
    return lambda q, k, v: module(q, k, v, batch_dim_idx=1)


def ring_flash_attn_zigzag(group: ProcessGroup) -> Attention:
    """ring-flash-attn's balanced ring."""
    return _ring("ring_flash_attn.zigzag_ring_flash_attn", "zigzag_ring_flash_attn_func", group)


def yunchang_zigzag(group: ProcessGroup) -> Attention:
    """yunchang's copy of it."""
    return _ring("yunchang.ring.zigzag_ring_flash_attn", "zigzag_ring_flash_attn_func", group)


def _ring(module: str, function: str, group: ProcessGroup) -> Attention:
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(package)
    # ring-flash-attn's own __init__ wants transformers, which the ring has no use for.
    bare = {package: importlib.util.module_from_spec(spec)} if package == "ring_flash_attn" else {}
    with mock.patch.dict(sys.modules, bare), installed():
        call = getattr(importlib.import_module(module), function)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch_first = (tensor.transpose(0, 1).contiguous() for tensor in (q, k, v))
        return call(*batch_first, softmax_scale=1 / math.sqrt(q.shape[-1]), causal=True, group=group).transpose(0, 1)

    return attention


PEERS: dict[str, tuple[str, Callable[[ProcessGroup], Attention], bool]] = {
    # name: package, maker, whether shares are zigzag
    "DeepSpeed": ("deepspeed", deepspeed_ulysses, False),
    "ring-flash-attn": ("ring-flash-attn", ring_flash_attn_zigzag, True),
    "yunchang": ("yunchang", yunchang_zigzag, True),
}


def version(name: str) -> str | None:
    """Installed version of a peer, None if it is not installed."""
    try:
        return importlib.metadata.version(PEERS[name][0])
    except importlib.metadata.PackageNotFoundError:
        return None
