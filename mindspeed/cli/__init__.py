"""Command line: doctor, features, explain, preprocess, pretrain, quickstart."""

from mindspeed.cli.app import app, main

__all__ = ["app", "main"]
