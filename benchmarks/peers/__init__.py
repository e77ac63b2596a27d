"""Adapters of other software, imported only by the cases that compare with it."""
