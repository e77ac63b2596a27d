"""Operator bodies in Triton, for CUDA; under the Triton interpreter (`TRITON_INTERPRET=1`) also for CPU tensors, on request.

Rules for all kernels: features of Triton 3.2 only; row offsets in int64; masks on every load and store; strides are arguments
and the last dimension is contiguous; arithmetic in float32, rounded once by the store; no atomics, so results repeat exactly.
Every file lists in `BUILDS` how its kernels are compiled ahead of time; `tests/ops_kernels` runs them in the interpreter and
compiles them for sm_80 and sm_90 without a GPU.
"""
