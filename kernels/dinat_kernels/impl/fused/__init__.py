"""The "triton" backend: one fused kernel for every rank, window and bias, on CUDA and ROCm.

It has no backward pass of its own: `dinat_kernels.impl` serves that with another backend.  Importing this package
imports Triton.
"""

from .launch import attention

__all__ = ["attention"]
