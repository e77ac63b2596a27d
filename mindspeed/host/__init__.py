"""Where megatron is spoken: the host protocol and its implementations."""
