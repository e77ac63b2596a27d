"""Exchanges for lengths and head counts that do not divide by the number of ranks."""
