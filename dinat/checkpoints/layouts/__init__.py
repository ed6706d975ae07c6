"""Names of weights in the layouts that others publish, brought to ours: backbones, and the heads around them."""

from .backbone import STEM, Shape, backbone_prefix, to_huggingface, to_native
from .heads import HEADS, method_of, rename_heads

__all__ = [
    "HEADS",
    "STEM",
    "Shape",
    "backbone_prefix",
    "method_of",
    "rename_heads",
    "to_huggingface",
    "to_native",
]
