"""The built-in trainer: pretraining from the megatron-core package alone."""
