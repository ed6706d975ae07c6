"""The attention weights of every block for any images, with the keys that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dinat_kernels import NeighborhoodAttention2d
from dinat_kernels.geometry import slots_of
from torch import Tensor, nn

from dinat.errors import UserError
from dinat.files import write_atomically
from dinat.models.nat import NAT, NATStage


class Block(NamedTuple):
    """A transformer block of a model."""

    name: str  # LEVEL.BLOCK, both from 0
    attn: NeighborhoodAttention2d
    strides: tuple[int, int]  # (vertical, horizontal) pixels from one token to the next


@dataclass(frozen=True, eq=False)
class Attention:
    """What the heads of one block attend to.

    The query in row i and column j of the map sees the keys in `rows[i]` and `columns[j]`: its weights, as (k_h, k_w),
    belong to their product. On a map that is shorter than the window, some keys lie beyond its end, in the padding.

    Attributes:
        block: LEVEL.BLOCK.
        weights: (batch, heads, height, width, k_h * k_w), sums of 1.
        rows, columns: tokens in each slot, (height, k_h) and (width, k_w).
        kernel_size, dilation: (vertical, horizontal), in tokens.
        strides: (vertical, horizontal) pixels from one token to the next; a token is shown as so many pixels.
        rpb: bias table (heads, 2 k_h - 1, 2 k_w - 1).
    """

    block: str
    weights: Tensor
    rows: np.ndarray
    columns: np.ndarray
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    strides: tuple[int, int]
    rpb: Tensor

    @property
    def heads(self) -> int:
        return self.weights.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the map, in tokens."""
        return tuple(self.weights.shape[2:4])

    def token(self, x: int, y: int) -> tuple[int, int]:
        """The token (row, column) that is shown at a pixel. Raises UserError for a pixel outside of the image."""
        (height, width), (down, right) = self.size, self.strides
        row, column = y // down, x // right
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"at={x},{y}: outside of the image, whose pixels are 0,0 to {width * right - 1},{height * down - 1}."
            )
        return row, column

    def window(self, x: int, y: int, image: int = 0) -> Tensor:
        """Weights (heads, k_h, k_w) of the token at a pixel."""
        row, column = self.token(x, y)
        return self.weights[image, :, row, column].unflatten(-1, self.kernel_size)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model of this package, or of one within it, such as the backbone of a dense model.

    Raises:
        UserError: there is none, or the model is for volumes.
    """
    stages = [module for module in model.modules() if isinstance(module, NATStage)]
    if not stages:
        raise UserError(f"model={type(model).__name__}: has no neighborhood attention. `dinat list` shows what has.")
    if any(len(stage.strides) != 2 for stage in stages):
        raise UserError(f"model={type(model).__name__}: is for volumes; maps can be inspected.")
    return [
        Block(f"{level}.{index}", block.attn, stage.strides)
        for level, stage in enumerate(stages)
        for index, block in enumerate(stage.blocks)
    ]


def has_classifier(model: nn.Module) -> bool:
    """Whether the outputs of a model are the logits of classes."""
    return isinstance(model, NAT) and model.num_classes > 0


def find_block(layers: Sequence[Attention], name: str) -> Attention:
    """The one of these that is called LEVEL.BLOCK. Raises UserError if none is."""
    names = [layer.block for layer in layers]
    if name not in names:
        raise UserError(f"block={name}: no such block. There are {', '.join(names)}.")
    return layers[names.index(name)]


def check_head(attention: Attention, head: int | None) -> None:
    """Raises UserError unless the block has this head, or None, which is the mean of all."""
    if head is not None and not 0 <= head < attention.heads:
        raise UserError(f"head={head}: block {attention.block} has heads 0 to {attention.heads - 1}.")


@torch.no_grad()
def attention(model: nn.Module, images: Tensor) -> list[Attention]:
    """The weights of all blocks, from a forward pass without the fused operator.

    Args:
        model: one of this package, in evaluation mode, or any that has one within, such as a dense model.
        images: (batch, channels, height, width), as the model takes them.

    Returns:
        One `Attention` per block, in the order in which they run.

    Raises:
        UserError: the model has no neighborhood attention.
        ValueError: the model is in training mode, or compiled.
    """
    found = blocks(model)
    if model.training:
        raise ValueError("attention() works in evaluation mode: call model.eval() first")
    sizes: dict[str, torch.Size] = {}
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for block in found:
            stack.enter_context(_watched(block, sizes, weights))
        model(images)
    if len(weights) < len(found):
        raise ValueError("model: hooks were not called; give the model as it was before torch.compile")
    return [_described(block, sizes[block.name], weights[block.name]) for block in found]


@contextmanager
def _watched(block: Block, sizes: dict[str, torch.Size], weights: dict[str, Tensor]) -> Iterator[None]:
    """In this context, the block leaves the size of its map and its weights."""
    attn, fused = block.attn, block.attn.fused
    handles = [
        attn.register_forward_pre_hook(lambda _, inputs: sizes.update({block.name: inputs[0].shape[1:-1]})),
        attn.attn_drop.register_forward_hook(lambda *call: weights.update({block.name: call[2]})),
    ]
    attn.fused = False
    try:
        yield
    finally:
        attn.fused = fused
        for handle in handles:
            handle.remove()


def _described(block: Block, size: torch.Size, weights: Tensor) -> Attention:
    attn = block.attn
    height, width = size
    window = zip(weights.shape[2:4], attn.kernel_size, attn.dilation, attn.stride, attn.is_causal, strict=True)
    rows, columns = (slots_of(*axis).key for axis in window)
    return Attention(
        block.name,
        weights[:, :, :height, :width],
        rows[:height],
        columns[:width],
        tuple(attn.kernel_size),
        tuple(attn.dilation),
        block.strides,
        attn.rpb.detach(),
    )


def write_npz(path: Path, layers: Sequence[Attention]) -> None:
    """Writes weights and keys of all blocks: BLOCK.weights, BLOCK.rows, BLOCK.columns and BLOCK.strides, as `Attention`
    has them.
    """
    arrays = {
        f"{layer.block}.{name}": np.asarray(value)
        for layer in layers
        for name, value in dict(
            weights=layer.weights.cpu(), rows=layer.rows, columns=layer.columns, strides=layer.strides
        ).items()
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    write_atomically(path, write)
