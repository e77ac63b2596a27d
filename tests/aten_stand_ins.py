"""Stand-ins on a CPU for the operators of aten behind `mindspeed.ops._aten_attention`; they do what aten's kernels do.

Written from the kernels' source and shape functions: alignment of windows and triangles, what a size of a window means, the
statistics of rows without keys, padded statistics, and masks that depend on the random state alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mindspeed.ops import _aten_attention

NAMES = ("flash", "flash_backward", "efficient", "efficient_backward")


class StandIns:
    """`calls` records (name, arguments that matter)."""

    def __init__(self):
        self.calls = []

    @staticmethod
    def scores(q, k, scale, bias=None):
        repeats = q.shape[1] // k.shape[1]
        scores = scale * q.float() @ k.repeat_interleave(repeats, 1).float().transpose(-1, -2)
        return scores if bias is None else scores + bias.float()

    @staticmethod
    def hidden(queries, keys, left, right, longest):
        """Windows are aligned at the lower right corner; negative and large sides have no limit; one side alone gets `longest`."""
        left, right = (-1 if side >= longest else side for side in (left, right))
        if left < 0 <= right:
            left = longest
        elif right < 0 <= left:
            right = longest
        distance = torch.arange(keys)[None] - torch.arange(queries)[:, None] - (keys - queries)
        if left < 0:
            return torch.zeros(queries, keys, dtype=torch.bool)
        return (distance < -left) | (distance > right)

    @staticmethod
    def kept(shape, p, state):
        """Dropout multipliers; a function of the random state."""
        if p == 0.0:
            return torch.ones(())
        generator = torch.Generator().manual_seed(int(state.flatten()[0].to(torch.int64)))
        return (torch.rand(shape, generator=generator) >= p).float() / (1 - p)

    def sequences(self, tensors, ends):
        """Pieces [1, heads, S, D] of packed [T, heads, D] tensors, or the whole [B, S, heads, D] ones as [B, heads, S, D]."""
        if ends is None:
            return [[tensor.transpose(1, 2) for tensor in tensors]]
        spans = [list(zip(own[:-1], own[1:], strict=True)) for own in ends]
        return [
            [tensor[span[0] : span[1]].transpose(0, 1)[None] for tensor, span in zip(tensors, own, strict=True)]
            for own in zip(*spans, strict=True)
        ]

    @staticmethod
    def ends(ends_q, ends_k, q, k, max_q, max_k, count):
        """Python lists of cumulative lengths, for `count` query-like tensors, then key and value."""
        if ends_q is None:
            assert ends_k is None and (max_q, max_k) == (q.shape[1], k.shape[1])
            return None
        for ends, longest, tensor in ((ends_q, max_q, q), (ends_k, max_k, k)):
            assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == tensor.shape[0] and ends.diff().max() == longest
        assert (ends_q.diff() > 0).all() and (ends_k.diff() > 0).all() and len(ends_q) == len(ends_k)
        return [ends_q.tolist()] + [ends_k.tolist()] * 2 + [ends_q.tolist()] * count

    def flash(
        self, q, k, v, ends_q, ends_k, max_q, max_k, p, is_causal, debug, *, scale, window_size_left=-1, window_size_right=-1
    ):
        self.check_operands(q, k, v)
        assert debug is False
        self.calls.append(("flash", is_causal, window_size_left, window_size_right, p))
        right = 0 if is_causal else window_size_right
        state = (
            torch.tensor([torch.initial_seed(), 0], dtype=torch.int64).view(torch.uint64),
            torch.empty(0, dtype=torch.uint64),
        )
        outs, statistics = [], []
        for query, key, value in self.sequences((q, k, v), self.ends(ends_q, ends_k, q, k, max_q, max_k, 0)):
            hidden = self.hidden(query.shape[2], key.shape[2], window_size_left, right, max_k)
            scores = self.scores(query, key, scale).masked_fill(hidden, float("-inf"))
            lse = scores.logsumexp(-1)
            weights = scores.softmax(-1).nan_to_num(0.0) * self.kept(scores.shape, p, state[0].view(torch.int64))
            outs.append((weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1).float()).to(q.dtype))
            statistics.append(lse.masked_fill(torch.isinf(lse), float("inf")))  # its sign for rows without keys
        if ends_q is None:
            return outs[0].transpose(1, 2).contiguous(), statistics[0], *state, torch.empty(0)
        out = torch.cat([out[0].transpose(0, 1) for out in outs])
        return out, torch.cat([lse[0] for lse in statistics], 1), *state, torch.empty(0)

    def flash_backward(self, grad, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, p, is_causal, rng, unused, *, scale,
                       window_size_left=-1, window_size_right=-1):  # fmt: skip
        self.check_operands(grad, q, k, v, out)
        assert torch.isfinite(lse).all() and lse.dtype == torch.float32 and lse.is_contiguous() and rng.dtype == torch.uint64
        self.calls.append(("flash_backward", is_causal, window_size_left, window_size_right, p))
        right = 0 if is_causal else window_size_right
        ends = self.ends(ends_q, ends_k, q, k, max_q, max_k, 2)
        rows = [lse] if ends is None else [part[None] for part in lse.split(ends_q.diff().tolist(), 1)]
        found = []
        for (query, key, value, grad_part, out_part), own in zip(self.sequences((q, k, v, grad, out), ends), rows, strict=True):
            hidden = self.hidden(query.shape[2], key.shape[2], window_size_left, right, max_k)
            scores = self.scores(query, key, scale).masked_fill(hidden, float("-inf"))
            kept = self.kept(scores.shape, p, rng.view(torch.int64))
            found.append(self.gradients(grad_part, query, key, value, out_part, own, scores, scale, kept))
        if ends is None:
            return tuple(value.transpose(1, 2) for value in found[0])
        return tuple(torch.cat([part[0].transpose(0, 1) for part in parts]) for parts in zip(*found, strict=True))

    @staticmethod
    def check_operands(*tensors):
        assert len({(tensor.dtype, tensor.shape[-1]) for tensor in tensors}) == 1 and tensors[0].shape[-1] % 8 == 0
        for tensor in tensors:
            assert tensor.stride(-1) == 1 and tensor.storage_offset() % 8 == 0
            steps = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
            assert all(step % 8 == 0 for step, extent in steps if extent > 1)

    @staticmethod
    def gradients(grad, q, k, v, out, lse, scores, scale, kept):
        repeats = q.shape[1] // k.shape[1]
        weights = (scores - lse.unsqueeze(-1)).exp()
        values, keys = (tensor.repeat_interleave(repeats, 1).float() for tensor in (v, k))
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = weights * (kept * (grad.float() @ values.transpose(-1, -2)) - delta) * scale
        dk, dv = grad_scores.transpose(-1, -2) @ q.float(), (kept * weights).transpose(-1, -2) @ grad.float()
        dk, dv = (value.unflatten(1, (-1, repeats)).sum(2) for value in (dk, dv))
        return [value.to(q.dtype) for value in (grad_scores @ keys, dk, dv)]

    def efficient_scores(self, q, k, bias, is_causal, scale):
        assert q.shape[1] == k.shape[1] and q.shape[-1] % 8 == 0
        if bias is not None:
            assert not is_causal and bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
            assert bias.stride(-1) == 1 and all(stride % 16 == 0 for stride in bias.stride()[:-1])
        scores = self.scores(q, k, scale, bias)
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf")) if is_causal else scores

    def efficient(self, q, k, v, bias, compute_log_sumexp, p=0.0, is_causal=False, *, scale=None):
        assert compute_log_sumexp and v.shape[-1] % 8 == 0 and all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        self.calls.append(("efficient", bias is not None, is_causal, p))
        scores = self.efficient_scores(q, k, bias, is_causal, scale)
        lse = torch.full((*q.shape[:2], q.shape[2] + -q.shape[2] % 32), float("inf"))
        lse[..., : q.shape[2]] = scores.logsumexp(-1).nan_to_num(neginf=0.0)
        state = torch.tensor(torch.initial_seed()), torch.tensor(0)
        weights = scores.softmax(-1) * self.kept(scores.shape, p, state[0])  # NaN for rows without keys
        return (weights @ v.float()).to(q.dtype), lse, *state

    def efficient_backward(self, grad, q, k, v, bias, out, lse, seed, offset, p, wanted, is_causal=False, *, scale=None):
        assert lse.shape[-1] == q.shape[2] + -q.shape[2] % 32 and torch.isfinite(lse).all()
        assert (
            wanted == [True, True, True, False]
            and out.dtype == grad.dtype == q.dtype
            and grad.stride(-1) == out.stride(-1) == 1
        )
        self.calls.append(("efficient_backward", bias is not None, is_causal, p))
        scores = self.efficient_scores(q, k, bias, is_causal, scale)
        kept = self.kept(scores.shape, p, seed)
        return *self.gradients(grad, q, k, v, out, lse[..., : q.shape[2]], scores, scale, kept), None


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIns]:
    """For a fixture: aten's operators replaced, and a machine of compute capability 9.0 whose generator is the CPU's."""
    found = StandIns()
    for name in NAMES:
        monkeypatch.setattr(_aten_attention, f"_{name}", getattr(found, name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.default_generator,), raising=False)
    cached = _aten_attention._no_flash_state, _aten_attention._no_efficient_state
    for state_of in cached:
        state_of.cache_clear()
        state_of(torch.device("cpu"))  # made once per device
    found.calls.clear()
    yield found
    for state_of in cached:
        state_of.cache_clear()
