"""The "triton" backend: fused kernels for every rank, window and bias, forward and backward, on CUDA and ROCm.

Importing this package imports Triton.
"""

from .launch import prepare, prepare_backward

__all__ = ["prepare", "prepare_backward"]
