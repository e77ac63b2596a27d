"""Documented import paths of model pieces."""
