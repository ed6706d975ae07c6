"""The "triton" backend: fused kernels for every rank, window and bias, forward and backward, on CUDA and ROCm.

Importing this package imports Triton.
"""

from .launch import attention, attention_backward

__all__ = ["attention", "attention_backward"]
