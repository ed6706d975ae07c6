"""Pictures of what was found: boxes, masks and maps over their image, each class in a colour of its own."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from dinat.files import write_atomically

OPACITY = 0.6
IGNORED = 255  # of semantic maps
GOLDEN = 0.618034  # of a turn: neighbouring classes get hues far apart
CELL, GAP, HEAD = 320, 8, 20  # pixels: the longer side of a picture in a table, what is between, the line of titles


def draw(
    image: Tensor, result: dict[str, Any], classes: Sequence[str], *, min_score: float = 0.5, side: int | None = None
) -> Image.Image:  # fmt: skip
    """A picture of a prediction or a target, whatever it holds: `semantic`, `panoptic`, or `boxes` with `masks`.

    Args:
        image: uint8 (3, H, W).
        result: as `model.predict` returns it or a data set gives it, in the frame of `image`.
        classes: names, in the order of the labels.
        min_score: of the detections that are drawn.
        side: length of the picture's longer side; by default that of the image.
    """
    height, width = image.shape[-2:]
    scale = (side or max(height, width)) / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    picture = F.resize(torch.as_tensor(image), size, antialias=True)
    masks, boxes, labels, scores = _parts(result, min_score)
    colours = [colour(label) for label in labels]
    marks, anchor = [], "mm"  # where the names go: into the middle of masks, into the corner of boxes
    if masks is not None and len(masks):
        masks = F.resize_mask(masks.to(torch.uint8), size).bool()
        picture = draw_segmentation_masks(picture, masks, alpha=OPACITY, colors=colours)
        marks = [_middle(mask) for mask in masks]
    if boxes is not None and len(boxes):
        scaled = boxes * torch.tensor([size[1] / width, size[0] / height]).repeat(2)
        picture = draw_bounding_boxes(picture, scaled, colors=colours, width=2)
        marks, anchor = [(left + 3, top + 1) for left, top, _, _ in scaled.tolist()], "la"
    drawn = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(drawn)
    for mark, label, score in zip(marks, labels, scores, strict=True):
        name = classes[label] if score is None else f"{classes[label]} {score:.2f}"
        pen.text(mark, name, anchor=anchor, fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def write_pictures(
    path: Path, rows: Iterable[tuple[Tensor, dict[str, Any], dict[str, Any]]], classes: Sequence[str],
    min_score: float = 0.5,
) -> None:  # fmt: skip
    """Writes a PNG with a row for each (image, target, prediction): the image, the truth, what was found.

    All three are in the image's frame. The file is whole or not there.
    """
    table = [
        [draw(image, result, classes, min_score=min_score, side=CELL) for result in ({}, target, prediction)]
        for image, target, prediction in rows
    ]
    heights = [row[0].height for row in table]
    sheet = Image.new("RGB", (3 * (CELL + GAP) - GAP, HEAD + sum(height + GAP for height in heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "truth", "prediction")):
        pen.text((column * (CELL + GAP), 4), title, fill="black")
        for row, pictures in enumerate(table):
            top = HEAD + sum(height + GAP for height in heights[:row])
            sheet.paste(pictures[column], (column * (CELL + GAP), top))
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def colour(label: int) -> tuple[int, int, int]:
    """The colour (red, green, blue) of a class."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.85, 1 - 0.3 * (label % 2))
    return int(255 * red), int(255 * green), int(255 * blue)


def _parts(
    result: dict[str, Any], min_score: float
) -> tuple[Tensor | None, Tensor | None, list[int], Sequence[float | None]]:  # fmt: skip
    """Masks (N, H, W), boxes (N, 4), labels and scores of what is to be drawn."""
    result = {
        key: torch.as_tensor(value).cpu() if isinstance(value, Tensor) else value for key, value in result.items()
    }
    if "semantic" in result:
        labels = [label for label in result["semantic"].unique().tolist() if label != IGNORED]
        return result["semantic"] == torch.tensor(labels)[:, None, None], None, labels, [None] * len(labels)
    if "panoptic" in result:
        if "segments" in result:
            known = [(segment["id"], segment["label"]) for segment in result["segments"]]
        else:
            known = list(zip(result["segment_ids"].tolist(), result["labels"].tolist(), strict=True))
        numbers, labels = torch.tensor([number for number, _ in known]), [label for _, label in known]
        return result["panoptic"] == numbers[:, None, None], None, labels, [None] * len(labels)
    if "boxes" not in result:
        return None, None, [], []
    scores = result.get("scores")
    keep = torch.ones(len(result["boxes"]), dtype=torch.bool) if scores is None else scores >= min_score
    masks = result["masks"][keep] if "masks" in result else None
    labels = result["labels"][keep].tolist()
    return masks, result["boxes"][keep], labels, [None] * len(labels) if scores is None else scores[keep].tolist()


def _middle(mask: Tensor) -> tuple[float, float]:
    """A point (x, y) of a mask, in the middle of the middle one of its rows; the corner if it has none."""
    ys, xs = np.nonzero(mask.numpy())
    if not len(ys):
        return 0.0, 0.0
    row = xs[ys == ys[len(ys) // 2]]
    return float(row[len(row) // 2]), float(ys[len(ys) // 2])
