"""The "triton" backend: fused kernels for every rank, window and bias, forward and backward, on CUDA and ROCm.

Importing this package imports Triton.
"""

from .launch import attention_backward, prepare

__all__ = ["attention_backward", "prepare"]
