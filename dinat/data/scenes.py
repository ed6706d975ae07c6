"""Digit scenes: detection and segmentation on real images that ship with scikit-learn, so nothing is downloaded.

Handwritten digits, enlarged and tinted, are blended over crops of two photographs. Validation scenes are made of the
digits that classification holds out and of the other half of each photograph: neither a digit nor a background pixel
of theirs is ever trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from dinat.data.digits import Digits
from dinat.errors import UserError

VALIDATION_SCENES = 128
VALIDATION_SEED = 0  # fixed: figures of different runs must be about the same scenes
OPAQUE = 0.5  # a pixel belongs to a digit from this share of its ink on
ATTEMPTS = 10  # at a place for a digit, before the scene goes without it

Target = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """`image` uint8 (H, W, 3); of the N digits, in the order of painting: visible `masks` (N, H, W) and `labels`."""

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


class DigitScenes(Dataset):
    """Scenes as `(image, target)`; the subclasses say what a target is. Scene `i` is a function of (split, i, seed).

    Args:
        split: "train" or "validation" (always the same 128 scenes for the same sizes, whatever the seed).
        size: side of a scene in pixels.
        digits: least and largest number of digits in a scene; fewer where a digit finds no free place.
        digit_size: least and largest side of a digit's square in pixels.
        contrast: least difference in brightness between a digit and what is around it, 0 to 0.5.
        visible: share of a digit that later ones must leave uncovered.
        scenes: number of training scenes.
        seed: of the training scenes.

    Raises:
        UserError: for values outside of these ranges, or digits that do not fit.
    """

    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __init__(
        self, split: str, *, size: int = 96, digits: Sequence[int] = (2, 4), digit_size: Sequence[int] = (28, 44),
        contrast: float = 0.4, visible: float = 0.6, scenes: int = 4000, seed: int = 0,
    ) -> None:  # fmt: skip
        for name, (least, most) in {"digits": digits, "digit_size": digit_size}.items():
            if not 1 <= least <= most:
                raise UserError(f"data.kwargs.{name}=[{least}, {most}]: give the least and the largest, from 1.")
        if digit_size[1] > size:
            raise UserError(
                f"data.kwargs.digit_size=[{digit_size[0]}, {digit_size[1]}]: larger than a scene, data.img_size={size}."
            )
        if not 0 <= contrast <= 0.5:
            raise UserError(f"data.kwargs.contrast={contrast}: give a difference in brightness from 0 to 0.5.")
        if not 0 < visible <= 1:
            raise UserError(f"data.kwargs.visible={visible}: give a share of a digit, above 0 and up to 1.")
        training = split == "train"
        self.split, self.size, self.digits, self.digit_size = split, size, tuple(digits), tuple(digit_size)
        self.contrast, self.visible, self.length = contrast, visible, scenes if training else VALIDATION_SCENES
        self.facts = (0, seed) if training else (1, VALIDATION_SEED)
        source = Digits(split)
        self.ink = source.images.astype(np.float32) / 255
        self.labels = source.targets
        self.photographs = [Image.fromarray(half) for half in _halves(split)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        scene = self.scene(index)
        image = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(scene.image.transpose(2, 0, 1))))
        return image, {**self.target(scene), "image_id": index}

    def filename(self, index: int, absolute: bool = False) -> str:
        """A name for scene `index`."""
        return f"{self.split}/{index:06d}.png"

    def target(self, scene: Scene) -> Target:
        """What is to be predicted of a scene."""
        raise NotImplementedError

    def scene(self, index: int) -> Scene:
        """Scene `index`."""
        random = np.random.default_rng((*self.facts, index))
        canvas = self._background(random)
        shape = canvas.shape[:2]
        masks: list[np.ndarray] = []
        whole: list[int] = []  # pixels of each digit before others cover it
        labels: list[int] = []
        for _ in range(random.integers(self.digits[0], self.digits[1] + 1)):
            digit = random.integers(len(self.ink))
            alpha = _enlarge(self.ink[digit], int(random.integers(self.digit_size[0], self.digit_size[1] + 1)))
            ink = alpha >= OPAQUE
            for _ in range(ATTEMPTS):
                top, left = random.integers(0, np.subtract(shape, alpha.shape) + 1)
                place = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
                left_over = [mask.sum() - (mask[place] & ink).sum() for mask in masks]
                if all(rest >= self.visible * area for rest, area in zip(left_over, whole, strict=True)):
                    break
            else:
                continue
            tint = _tint(random, canvas[place].mean((0, 1)), self.contrast)
            canvas[place] += alpha[..., None] * (tint - canvas[place])
            for mask in masks:
                mask[place] &= ~ink
            mask = np.zeros(shape, bool)
            mask[place] = ink
            masks.append(mask)
            whole.append(ink.sum())
            labels.append(self.labels[digit])
        return Scene((canvas * 255).round().astype(np.uint8), np.stack(masks), np.array(labels))

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """A square crop of a photograph's half, once to twice the size where there is room, perhaps flipped."""
        photograph = self.photographs[random.integers(len(self.photographs))]
        room = min(photograph.size)
        side = random.integers(min(self.size, room), min(2 * self.size, room) + 1)
        left, top = (int(random.integers(length - side + 1)) for length in photograph.size)
        box = (left, top, left + side, top + side)
        crop = np.asarray(photograph.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        return (crop[:, ::-1] if random.integers(2) else crop).astype(np.float32) / 255


class DetectionScenes(DigitScenes):
    """Digits as boxes and instance masks."""

    def target(self, scene: Scene) -> Target:
        masks = torch.from_numpy(scene.masks)
        size = tuple(masks.shape[-2:])
        return {
            "boxes": tv_tensors.BoundingBoxes(_boxes(scene.masks), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(scene.labels),
            "masks": tv_tensors.Mask(masks),
            "iscrowd": torch.zeros(len(masks), dtype=torch.bool),
            "area": torch.from_numpy(scene.masks.sum((1, 2)).astype(np.float32)),
        }


class SemanticScenes(DigitScenes):
    """A class per pixel: the digit, or 10 for the background."""

    classes: ClassVar[list[str]] = [*DigitScenes.classes, "background"]

    def target(self, scene: Scene) -> Target:
        # Masks do not overlap, so at most one row says anything but "background".
        of_digits = (scene.masks * (scene.labels - 10)[:, None, None]).sum(0) + 10
        return {"semantic": tv_tensors.Mask(torch.from_numpy(of_digits.astype(np.uint8)))}


class PanopticScenes(DigitScenes):
    """Every pixel belongs to a segment: digits are things, the background is stuff."""

    classes: ClassVar[list[str]] = SemanticScenes.classes
    things: ClassVar[list[bool]] = [True] * 10 + [False]

    def target(self, scene: Scene) -> Target:
        masks = np.concatenate([scene.masks, ~scene.masks.any(0, keepdims=True)])
        ids = np.arange(1, len(masks) + 1)
        return {
            "labels": torch.from_numpy(np.append(scene.labels, 10)),
            "iscrowd": torch.zeros(len(masks), dtype=torch.bool),
            "panoptic": tv_tensors.Mask(torch.from_numpy(np.einsum("nhw,n->hw", masks, ids).astype(np.int32))),
            "segment_ids": torch.from_numpy(ids),
        }


def _halves(split: str) -> list[np.ndarray]:
    """The left halves of scikit-learn's two photographs for training, the right halves for validation."""
    from sklearn.datasets import load_sample_images

    halves = []
    for photograph in load_sample_images().images:
        middle = photograph.shape[1] // 2
        halves.append(photograph[:, :middle] if split == "train" else photograph[:, middle:])
    return halves


def _enlarge(ink: np.ndarray, side: int) -> np.ndarray:
    """The opacity (side, side) of a digit of 8x8 grey levels: smooth, with an edge of about two pixels."""
    smooth = Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip((np.asarray(smooth) - OPAQUE) * side / 8 + OPAQUE, 0, 1)


def _tint(random: np.random.Generator, around: np.ndarray, contrast: float) -> np.ndarray:
    """A colour whose brightness differs from that of the colour `around` by at least `contrast`."""
    brightness = around.mean()
    darker, lighter = max(brightness - contrast, 0.0), max(1 - contrast - brightness, 0.0)
    level = random.uniform(0, darker + lighter) if darker + lighter else float(brightness < 0.5)
    if level > darker:
        level += 1 - darker - lighter
    colour = random.uniform(0, 1, 3)
    colour -= colour.mean()
    vivid = min(1.0, level / -colour.min(), (1 - level) / colour.max())  # as far as all channels stay within 0..1
    return (level + vivid * colour).astype(np.float32)


def _boxes(masks: np.ndarray) -> Tensor:
    """The boxes (N, 4), XYXY, around masks (N, H, W) that are not empty."""
    edges = []
    for axis in (1, 2):  # what is occupied of the columns, then of the rows
        occupied = masks.any(axis)
        first = occupied.argmax(1)
        edges.append((first, occupied.shape[1] - occupied[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = edges
    return torch.from_numpy(np.stack([left, top, right, bottom], 1).astype(np.float32))
