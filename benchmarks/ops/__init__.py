"""Operators on one device, against the host's formula, torch.compile and torch's own kernels."""
