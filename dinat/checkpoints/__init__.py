"""Weights of these models: where to get them, how to read them, and how to bring them into the models' own layout.

The models call this package, so it knows models only as modules with a state dict.
"""

from dinat.checkpoints.fetching import download, find_weights, pretrained_overlay, sources
from dinat.checkpoints.fitting import check_fit, fit, fit_dense, resize_rpb
from dinat.checkpoints.layouts import Shape, to_huggingface, to_native
from dinat.checkpoints.reading import read_checkpoint

__all__ = [
    "Shape",
    "check_fit",
    "download",
    "find_weights",
    "fit",
    "fit_dense",
    "pretrained_overlay",
    "read_checkpoint",
    "resize_rpb",
    "sources",
    "to_huggingface",
    "to_native",
]
