"""Fused layers under the call signatures that the host and other projects use; built on `mindspeed.ops`."""
