"""Features about checkpoints."""
