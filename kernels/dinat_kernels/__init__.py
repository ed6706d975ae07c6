"""Neighborhood attention for PyTorch: 1-D, 2-D and 3-D, dilated, strided, causal, with relative position bias."""

from . import flops as _flops
from .functional import na1d, na2d, na3d
from .impl import backends
from .modules import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d

_flops.register()

__all__ = [
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "backends",
    "na1d",
    "na2d",
    "na3d",
]
