"""mindspeed: acceleration for Megatron training on Ascend NPU, NVIDIA GPU and CPU."""

__version__ = "0.1.0"
