"""Adaptive context parallelism: sparse masks of any shape, tokens remapped and tiles scheduled so that all devices work."""
