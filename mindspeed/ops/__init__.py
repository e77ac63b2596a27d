"""Operators with one name and one meaning on every device; importable without Megatron."""
