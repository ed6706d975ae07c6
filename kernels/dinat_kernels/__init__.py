"""Neighborhood attention for PyTorch: 1-D, 2-D and 3-D, dilated, strided, causal, with relative position bias."""

from .impl import backends
from .functional import na1d, na2d, na3d

__all__ = ["backends", "na1d", "na2d", "na3d"]
