"""Text from a trained model: one token after the other, the whole context computed anew each time."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompt: list[int],
    tokens: int,
    *,
    context: int,
    vocab_size: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Continue a prompt on a rank that holds the whole model.

    Args:
        model: takes tokens, positions and mask, and returns logits `[B, S, V]`.
        prompt: ids, at least one.
        tokens: number of ids to draw.
        context: ids that the model can see.
        vocab_size: ids without padding.
        temperature: below 1 is bolder, 0 always takes the likeliest.

    Returns:
        The ids drawn, without the prompt.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]], device=device)
        positions = torch.arange(window.shape[1], device=device).unsqueeze(0)
        logits = model(window, positions, None)[0, -1, :vocab_size].float().cpu()
        ids.append(_draw(logits, temperature, generator))
    model.train(was_training)
    return ids[len(prompt) :]


def _draw(logits: torch.Tensor, temperature: float, generator: Any) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
