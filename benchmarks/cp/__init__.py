"""Context parallelism: counted figures, and costs over ranks."""
