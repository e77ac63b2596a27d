"""Instruments for tests, public so that features outside this repository can be proved the same way."""
