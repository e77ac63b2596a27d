"""Transformer blocks: attention, norms, activation functions."""
