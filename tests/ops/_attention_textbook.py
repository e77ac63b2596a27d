"""Dense attention straight from its formula, and operands for the tests of fusion attention."""

import itertools

import torch

BODIES = ["auto", "ref"]


CAUSAL_PATTERN = torch.ones(8, 8, dtype=torch.bool).triu(1)  # modes 2 to 8 look at the mode, not at the values


def rule(mode, i, j, sq, sk, b, pre, nxt, prefix, mask, h):
    """Whether key j is excluded for query i, straight from the table of modes."""
    shift = sk - sq
    if mode == 0:
        return bool(mask[b, h, i, j]) or j - i > nxt or i - j > pre
    if mode == 1:
        return bool(mask[b, h, i, j])
    if mode == 2:
        return j > i
    if mode == 3:
        return j - i > shift
    if mode == 4:
        return j - i > shift + nxt or j - i < shift - pre
    return j - i > shift and j >= prefix[b]


def textbook(q, k, v, scale, excluded=None, pse=None, pse_type=1):
    """Dense attention, [B, N, S, D]; rows that see nothing give 0. Also returns the log-sum-exp."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.transpose(-1, -2)
    if pse is None:
        s = s * scale
    else:
        s = (s + pse) * scale if pse_type == 1 else s * scale + pse
    if excluded is None:
        return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)
    s = s.masked_fill(excluded, float("-inf"))
    seen = ~excluded.all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~seen, 0.0), -1) * seen
    return p @ v, torch.logsumexp(s, -1)


def expand_mask(mode, b, n, sq, sk, pre=100, nxt=100, prefix=None, mask=None):
    full = torch.zeros(b, n, sq, sk, dtype=torch.bool)
    mask = torch.zeros(1, dtype=torch.bool).expand(b, n, sq, sk) if mask is None else mask.bool().expand(b, n, sq, sk)
    for bb, h, i, j in itertools.product(range(b), range(n), range(sq), range(sk)):
        full[bb, h, i, j] = rule(mode, i, j, sq, sk, bb, pre, nxt, prefix, mask, h)
    return full


def pack(t, layout):
    """From [B, N, S, D] to a layout."""
    if layout == "BNSD":
        return t
    if layout == "BSND":
        return t.transpose(1, 2)
    if layout == "BSH":
        return t.transpose(1, 2).flatten(2)
    return t.permute(2, 0, 1, 3).flatten(2)


def heads(b=2, n=4, nkv=2, sq=5, sk=7, d=8, dtype=torch.float32, dv=None):
    shapes = ((b, n, sq, d), (b, nkv, sk, d), (b, nkv, sk, dv or d))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def tnd(lengths, n, d):
    """Packed tokens and their cumulative ends."""
    ends = list(itertools.accumulate(lengths))
    return torch.randn(ends[-1], n, d).requires_grad_(), ends


def by_sequence(form, q, k, v, q_ends, k_ends):
    parts, start_q, start_k = [], 0, 0
    for index, (end_q, end_k) in enumerate(zip(q_ends, k_ends, strict=True)):
        part = (
            t[start:end].transpose(0, 1).unsqueeze(0)
            for t, start, end in ((q, start_q, end_q), (k, start_k, end_k), (v, start_k, end_k))
        )
        parts.append(
            form(index, *part)
            if end_q > start_q
            else (q.new_zeros(1, q.shape[1], 0, v.shape[2]), q.new_zeros(1, q.shape[1], 0))
        )
        start_q, start_k = end_q, end_k
    return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), [lse[0] for _, lse in parts]
