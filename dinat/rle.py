"""Run-length encoded masks, as COCO writes them: {"size": [height, width], "counts": ...}."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinat.errors import UserError


def coco_eval() -> ModuleType:
    """faster-coco-eval, which an extra installs: `COCO`, `COCOeval_faster` and `mask`.

    Raises:
        UserError: where it is missing.
    """
    try:
        return importlib.import_module("faster_coco_eval")
    except ImportError as error:
        raise UserError(
            'COCO masks and metrics need faster-coco-eval, not installed here: pip install "dinat[dense]".'
        ) from error


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Masks (N, H, W) -> N run-length encodings, ready for JSON."""
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.to("cpu", torch.uint8).permute(1, 2, 0).numpy())
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in coco_eval().mask.encode(columns)]


def decode(segmentation: list | dict[str, Any], height: int, width: int) -> np.ndarray:
    """A COCO segmentation (polygons, or a run-length encoding with or without compression) -> bool (height, width).

    Raises:
        ValueError: for an encoding that is damaged or of another size.
    """
    library = coco_eval().mask
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            tall, wide = segmentation["size"]
            raise ValueError(f"its mask has {wide} x {tall} pixels, the image {width} x {height}")
        if isinstance(segmentation["counts"], list):
            segmentation = library.frPyObjects(segmentation, height, width)
        encoded = segmentation
    else:
        encoded = library.merge(library.frPyObjects(segmentation, height, width))
    try:
        return library.decode(encoded).reshape(height, width).astype(bool)
    except RuntimeError as error:  # the library's word for counts that are no counts
        raise ValueError(f"its mask is damaged: {error}") from error
