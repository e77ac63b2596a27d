"""Benchmarks: `python -m benchmarks --list` shows what there is; docs/testing.md explains how a case is written."""
