"""Devices behind one interface: Ascend NPU, NVIDIA GPU, CPU."""
