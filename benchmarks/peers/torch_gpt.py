"""The GPT of `step.gpt4` written directly in torch: what a user without Megatron would write, also under torch.compile."""

# B batch, S sequence, H hidden, N heads, D head size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotary position embedding, halves rotated against each other."""
    left, right = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat([-right, left], dim=-1) * sin_SD


class Layer(nn.Module):
    """Attention and gated MLP, each after an RMSNorm and around a residual."""

    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        batch, length, hidden = x_BSH.shape
        qkv = self.qkv(self.norm_1(x_BSH)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, cos_SD, sin_SD), rotate(k, cos_SD, sin_SD), v, is_causal=True)
        x_BSH = x_BSH + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.up(self.norm_2(x_BSH)).chunk(2, dim=-1)
        return x_BSH + self.down(F.silu(gate) * up)


class TorchGpt(nn.Module):
    """Tied embeddings, rotary positions, mean cross entropy as the result."""

    def __init__(self, layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(hidden, heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        width = hidden // heads
        frequency = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens)
        for layer in self.layers:
            x_BSH = layer(x_BSH, self.cos, self.sin)
        logits = F.linear(self.norm(x_BSH), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
