"""Names of weights in the layouts that others publish, brought to ours: backbones, and the heads around them."""

from .backbone import STEM, Shape, to_huggingface, to_native
from .heads import Row, rename_heads

__all__ = ["STEM", "Row", "Shape", "rename_heads", "to_huggingface", "to_native"]
