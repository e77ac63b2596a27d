"""Fixtures for all tests."""

pytest_plugins = ["mindspeed.testing.fixtures"]
