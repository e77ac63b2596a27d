"""Methods of tensor parallelism."""
