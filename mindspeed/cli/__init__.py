"""Command line: doctor, features, explain, preprocess, pretrain, quickstart."""
