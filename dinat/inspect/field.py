"""Theoretical receptive fields: the pixels that can reach a token at all, exactly, from strides and windows alone.

What reaches a token along one axis does not depend on the other one, in convolutions and in windows alike. So the field
of a token is the product of the pixels that reach its row and those that reach its column, each a Boolean matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from dinat_kernels import NeighborhoodAttention2d
from dinat_kernels.geometry import slots_of
from torch import nn

from dinat.errors import UserError
from dinat.models.dinat_s import PatchEmbed, PatchMerging
from dinat.models.nat import NAT, ConvDownsample, ConvStem

from .extraction import blocks


@dataclass(frozen=True, eq=False)
class Field:
    """What reaches the tokens of a map, after one block.

    Attributes:
        block: LEVEL.BLOCK.
        rows, columns: whether a row of pixels reaches a row of tokens, bool (tokens, pixels), and the same of columns.
        kernel_size, dilation: (vertical, horizontal), in tokens.
    """

    block: str
    rows: np.ndarray
    columns: np.ndarray
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the map, in tokens."""
        return len(self.rows), len(self.columns)

    @property
    def exceeds(self) -> bool:
        """Whether the window is larger than the map: the layer pads it, and padding has no pixels."""
        return any(k * d > n for k, d, n in zip(self.kernel_size, self.dilation, self.size, strict=True))

    def of(self, row: int | None = None, column: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns of pixels, bool, that reach a token; that in the middle unless given."""
        height, width = self.size
        return self.rows[height // 2 if row is None else row], self.columns[width // 2 if column is None else column]

    def extent(self, row: int | None = None, column: int | None = None) -> tuple[int, int]:
        """(vertical, horizontal) pixels from the first to the last one that reaches a token."""
        return tuple(int(np.ptp(np.flatnonzero(axis)) + 1) for axis in self.of(row, column))

    def touched(self, row: int | None = None, column: int | None = None) -> tuple[int, int]:
        """(rows, columns) of pixels that reach a token: fewer than the extent where the field has holes (gridding)."""
        return tuple(int(axis.sum()) for axis in self.of(row, column))

    def area(self, row: int | None = None, column: int | None = None) -> float:
        """Share of the image's pixels that reach a token."""
        rows, columns = self.of(row, column)
        return float(rows.mean() * columns.mean())

    def least_area(self) -> float:
        """The smallest `area` of all tokens."""
        return float(self.rows.mean(1).min() * self.columns.mean(1).min())


def receptive_fields(model: nn.Module, size: tuple[int, int]) -> list[Field]:
    """The receptive fields after every block, for images of a `size` (height, width) in pixels. No weights are needed.

    Raises:
        UserError: the model has no neighborhood attention, or a stem or downsampler of another kind than those of this
            package.
    """
    layers = [block.attn for block in blocks(model)]
    backbone = next((module for module in model.modules() if isinstance(module, NAT)), None)
    if backbone is None:
        raise UserError(f"model={type(model).__name__}: timm took the model apart; give it without features_only=True.")
    rows, columns = (_along(axis, backbone, layers, length) for axis, length in enumerate(size))
    return [
        Field(block.name, *fields, tuple(block.attn.kernel_size), tuple(block.attn.dilation))
        for block, *fields in zip(blocks(model), rows, columns, strict=True)
    ]


def _along(axis: int, backbone: NAT, layers: list[NeighborhoodAttention2d], length: int) -> list[np.ndarray]:
    """Which pixels of an axis reach which tokens of it, (tokens, pixels), after every block."""
    reach = _convolved(np.eye(length, dtype=bool), backbone.patch_embed, axis)
    fields = []
    for level in backbone.levels:
        reach = _convolved(reach, level.downsample, axis)
        for block in level.blocks:
            reach = _attended(reach, block.attn, axis)
            fields.append(reach)
    return fields


def _convolved(reach: np.ndarray, module: nn.Module, axis: int) -> np.ndarray:
    """`reach` after a stem or downsampler."""
    if isinstance(module, PatchMerging):
        steps = [(2, 2, 0)]
    elif isinstance(module, (ConvStem, ConvDownsample, PatchEmbed, nn.Identity)):
        convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        steps = [(part.kernel_size[axis], part.stride[axis], part.padding[axis]) for part in convolutions]
    else:
        raise UserError(f"model: the receptive field of a {type(module).__name__} is not known.")
    for kernel_size, stride, padding in steps:
        tokens = -(-len(reach) // stride)
        taps = stride * np.arange(tokens)[:, None] + np.arange(kernel_size) - padding
        inside = (taps >= 0) & (taps < len(reach))
        reach = (reach[np.where(inside, taps, 0)] & inside[..., None]).any(1)
    return reach


def _attended(reach: np.ndarray, attn: NeighborhoodAttention2d, axis: int) -> np.ndarray:
    """`reach` after attention; small maps are padded with tokens that no pixel reaches."""
    tokens, pixels = reach.shape
    window = attn.kernel_size[axis], attn.dilation[axis], attn.stride[axis], attn.is_causal[axis]
    padded = max(tokens, window[0] * window[1])
    slots = slots_of(padded, *window)
    reach = np.concatenate([reach, np.zeros((padded - tokens, pixels), bool)])
    return (reach[slots.key] & slots.visible[..., None]).any(1)[:tokens]
