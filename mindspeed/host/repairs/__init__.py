"""Level-0 repairs: what must hold in megatron-core for everybody, one module per theme.

Each module offers `patches(platform) -> Iterator[Patch]`; `mindspeed.host.level0` collects them.
"""
