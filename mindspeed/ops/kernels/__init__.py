"""Faster operator bodies, one package per vendor; `mindspeed.ops._registry` imports them at the first call that needs them."""
