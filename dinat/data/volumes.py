"""What is done to a volume of one channel, uint8 (depth, height, width), on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinat.errors import UserError
from dinat.models.layers import AXES


def resize(volume: np.ndarray, size: Sequence[int]) -> Tensor:
    """uint8 `size` (1, D, H, W), trilinear where the volume has other sides."""
    sides = size[1:]
    tensor = torch.as_tensor(volume)[None]
    if list(tensor.shape[1:]) != list(sides):
        # antialiasing, which PyTorch has for maps alone: averages of whole voxels first
        factors = [max(1, old // new) for old, new in zip(tensor.shape[1:], sides, strict=True)]
        smooth = F.avg_pool3d(tensor[None].float(), factors)
        tensor = F.interpolate(smooth, size=tuple(sides), mode="trilinear")[0].round().to(torch.uint8)
    return tensor


def train_transform(size: Sequence[int], options: Mapping[str, Any]) -> Callable[[np.ndarray], Tensor]:
    """Volume -> uint8 `size`, augmented; draws from PyTorch's generator.

    Options:
        flip: axes, of depth, height and width, that are mirrored every second time.
        shift: voxels of the result, by how many it is moved at most along each axis; what comes in is 0.
        intensity: largest change of the contrast, e.g. 0.2 for factors of 0.8 to 1.2.
        no_aug: true for nothing of this.

    Raises:
        UserError: other options or axes.
    """
    if options.get("no_aug"):
        return partial(resize, size=size)
    known = {"flip": (), "shift": 0, "intensity": 0.0}
    given = {**known, **options}
    if given.keys() != known.keys() or not {*given["flip"]} <= {*AXES}:
        raise UserError(
            f"augment.transform={dict(options)}: for volumes there are flip (a list of {', '.join(AXES)}), shift and "
            "intensity. Choose augment=volumes, or augment=none."
        )
    return partial(augment, size=size, **given)


def augment(volume: np.ndarray, size: Sequence[int], flip: Sequence[str], shift: int, intensity: float) -> Tensor:
    """See `train_transform`."""
    tensor = resize(volume, size)
    mirrored = [1 + AXES.index(axis) for axis in flip if torch.rand(()) < 0.5]
    tensor = tensor.flip(mirrored)
    if shift:
        moves = torch.randint(-shift, shift + 1, (3,)).tolist()
        for axis, move in enumerate(moves, start=1):
            tensor = tensor.roll(move, axis)
            gap = slice(0, move) if move > 0 else slice(tensor.shape[axis] + move, None)
            tensor[(slice(None),) * axis + (gap,)] = 0
    if intensity:
        factor = 1 + intensity * (2 * torch.rand(()) - 1)
        tensor = (tensor * factor).round().clamp(0, 255).to(torch.uint8)
    return tensor
