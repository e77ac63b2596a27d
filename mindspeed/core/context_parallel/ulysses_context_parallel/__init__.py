"""Ulysses: sequence split outside attention, heads split inside (arXiv 2309.14509)."""
