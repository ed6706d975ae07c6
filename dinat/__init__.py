"""Neighborhood-attention vision backbones for timm."""

__version__ = "0.1.0"
