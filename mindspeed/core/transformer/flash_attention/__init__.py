"""Fused attention in place of the host's core attention, with every mask, on every device."""
