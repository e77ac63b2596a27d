"""Pipeline parallelism: where layers live and in which order stages work."""
