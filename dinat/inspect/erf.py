"""Effective receptive fields: how much each pixel counts for the token in the middle of a map, by its gradient.

Luo et al. 2016, https://arxiv.org/abs/1701.04128; the convention is that of Ding et al. 2022 (RepLKNet),
https://arxiv.org/abs/2203.06717, section 5.3, whose figures are compared across papers: 50 images of 1024 pixels, the
logarithm of the sums, and the smallest square around the middle that holds a share of it. As the logarithm is that of
1 + x, its shares grow and shrink with the scale of the features; shares of the sums themselves do not. Neither means
anything of an untrained model, nor beside those of images of another size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dinat.errors import UserError
from dinat.models.nat import NATStage

from .extraction import blocks

SHARES = (0.2, 0.3, 0.5, 0.99)


class Square(NamedTuple):
    """The smallest square around the middle that holds a share of a field."""

    share: float
    side: int  # in pixels
    area: float  # share of the image


def effective_fields(model: nn.Module, images: Iterable[Tensor]) -> list[np.ndarray]:
    """The effective receptive field of every level's map, before its norm.

    Args:
        model: of this package, or one that holds one, in evaluation mode.
        images: batches (batch, channels, height, width) of one size, as the model takes them.

    Returns:
        One array (height, width) per level: the gradient of the sum of the middle token's positive features, positive
        parts only, summed over channels, mean over images.

    Raises:
        UserError: the model has no neighborhood attention, or the images have several sizes.
        ValueError: the model is in training mode, or there are no images.
    """
    blocks(model)  # refuses other models
    if model.training:
        raise ValueError("effective_fields() works in evaluation mode: call model.eval() first")
    totals: list[np.ndarray] = []
    count = 0
    for batch in images:
        fields = [field.cpu().double().numpy() for field in _gradients(model, batch)]
        if totals and fields[0].shape != totals[0].shape:
            raise UserError(f"images: of {totals[0].shape} and {fields[0].shape} pixels; give images of one size.")
        totals = [total + field for total, field in zip(totals, fields, strict=True)] if totals else fields
        count += len(batch)
    if not count:
        raise ValueError("images: there are none")
    return [total / count for total in totals]


def _gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """(height, width) per level, summed over images and channels."""
    outputs: list[Tensor] = []
    hooks = [
        stage.register_forward_hook(lambda *call: outputs.append(call[2]))
        for stage in model.modules()
        if isinstance(stage, NATStage)
    ]
    try:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            model(images)
            middles = [out[:, :, out.shape[2] // 2, out.shape[3] // 2].relu().sum() for out in outputs]
            return [torch.autograd.grad(middle, images, retain_graph=True)[0].relu().sum((0, 1)) for middle in middles]
    finally:
        for hook in hooks:
            hook.remove()


def logarithm(field: np.ndarray) -> np.ndarray:
    """A field as the convention shows and measures it: log10(1 + x), divided by its largest value."""
    scaled = np.log10(1 + field)
    return scaled / (scaled.max() or 1)


def squares(field: np.ndarray, shares: Iterable[float] = SHARES) -> list[Square]:
    """The smallest square around the middle pixel that holds each share of a field; cut where the image ends."""
    height, width = field.shape
    found = []
    sums = np.pad(field.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for share in shares:
        for radius in range(max(height, width) // 2 + 1):
            (top, bottom), (left, right) = (
                (max(0, side // 2 - radius), min(side, side // 2 + radius + 1)) for side in (height, width)
            )
            inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
            if inside >= share * sums[-1, -1]:
                break
        found.append(Square(share, 2 * radius + 1, (bottom - top) * (right - left) / (height * width)))
    return found
