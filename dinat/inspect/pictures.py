"""Pictures of what `dinat.inspect` finds, by matplotlib; `save` writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dinat.files import write_atomically

from .erf import logarithm
from .extraction import Attention
from .field import Field
from .heads import Head

SHADES = LinearSegmentedColormap.from_list("attention", ["#fff7ec", "#fdd49e", "#fc8d59", "#d7301f", "#7f0000"])
BLUE = "#0067c0"
REACHED = ListedColormap(["#eef1f5", BLUE])


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all; the same figure gives the same bytes."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={"Software": None}))


def _draw_tiles(axis: Axes, rows: Sequence[Sequence[np.ndarray]], columns: int) -> None:
    """Rows of small pictures, each shaded up to its own largest value, in a frame for so many columns."""
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            axis.imshow(tile / tile.max(), cmap=SHADES, vmin=0, vmax=1, extent=(x + 0.05, x + 0.95, y + 0.95, y + 0.05))
    axis.set(xlim=(0, columns), ylim=(len(rows), 0), aspect=1, xticks=[], yticks=[], frame_on=False)


def draw_contact_sheet(picture: Image.Image, layers: Sequence[Attention], x: int, y: int, image: int = 0) -> Figure:
    """The windows of the query at a pixel: a row per block, over the image the mean of its heads, then every head."""
    heads = max(layer.heads for layer in layers)
    side = 1.0  # inches of a tile
    figure = Figure(figsize=(side * (heads + 1.8), side * len(layers) + 0.4), layout="constrained")
    grid = figure.subplots(len(layers), 2, squeeze=False, gridspec_kw=dict(width_ratios=(1, heads)))
    figure.suptitle(f"Attention of pixel {x}, {y}: the mean of the heads over the image, and every head", fontsize=10)
    for (over, tiles), layer in zip(grid, layers, strict=True):
        windows = layer.window(x, y, image).cpu().numpy()
        _draw_window(over, picture, layer, windows.mean(0), x, y)
        dilation = "" if max(layer.dilation) == 1 else f"\nd = {_by(layer.dilation)}"
        over.set_ylabel(f"{layer.block}{dilation}", rotation=0, ha="right", va="center", fontsize=9)
        _draw_tiles(tiles, [windows], heads)
    return figure


def _by(pair: tuple[int, int]) -> str:
    """One number for two that are the same."""
    return " x ".join(map(str, dict.fromkeys(pair)))


def _draw_window(axis: Axes, picture: Image.Image, layer: Attention, weights: np.ndarray, x: int, y: int) -> None:
    axis.imshow(picture.convert("L"), cmap="gray", alpha=0.6, extent=(0, picture.width, picture.height, 0))
    (row, column), (down, right) = layer.token(x, y), layer.strides
    for i, key_row in enumerate(layer.rows[row]):
        for j, key_column in enumerate(layer.columns[column]):
            place = (key_column * right, key_row * down), right, down
            axis.add_patch(Rectangle(*place, color=SHADES(weights[i, j] / weights.max()), alpha=0.9, linewidth=0))
    place = (column * right, row * down), right, down
    axis.add_patch(Rectangle(*place, fill=False, edgecolor=BLUE, linewidth=1))
    axis.set(xlim=(0, picture.width), ylim=(picture.height, 0), xticks=[], yticks=[])


def draw_heads(heads: Sequence[Head]) -> Figure:
    """Every head as a dot over depth: distance, entropy, content and importance."""
    names = list(dict.fromkeys(head.block for head in heads))
    views = {
        "distance": "mean distance in pixels",
        "entropy": "entropy in nats",
        "divergence": "divergence from the bias alone in nats",
        "importance": "importance",
    }
    shown = {name: label for name, label in views.items() if getattr(heads[0], name) is not None}
    figure = Figure(figsize=(6.4 * 2, 3.2 * math.ceil(len(shown) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(shown) / 2), 2, squeeze=False).flat
    levels = list(dict.fromkeys(head.block.split(".")[0] for head in heads))
    for axis, (name, label) in zip(grid, shown.items(), strict=False):
        for i, block in enumerate(names):
            values = [getattr(head, name) for head in heads if head.block == block]
            level = levels.index(block.split(".")[0])
            spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0]
            axis.plot(i + np.array(spread), values, "o", markersize=4, alpha=0.75, color=f"C{level % 10}")
            axis.plot([i - 0.35, i + 0.35], [np.mean(values)] * 2, color="black", linewidth=1)
        axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 0, fontsize=8)
        axis.set(xlabel="block", ylabel=label)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid(axis="y", alpha=0.3)
    for axis in list(grid):
        axis.set_axis_off()
    return figure


def draw_patterns(heads: Sequence[Head]) -> Figure:
    """A row per block: the mean pattern of every head, and below it what its bias alone would give."""
    rows = {
        name: [head for head in heads if head.block == name] for name in dict.fromkeys(head.block for head in heads)
    }
    widest = max(map(len, rows.values()))
    side = 0.6  # inches of a tile
    figure = Figure(figsize=(side * widest + 1, (2 * side + 0.15) * len(rows) + 0.4), layout="constrained")
    figure.suptitle("Mean pattern of every head; below it, of its bias alone", fontsize=9)
    for axis, (name, row) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        _draw_tiles(axis, [[head.pattern for head in row], [head.bias for head in row]], widest)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def draw_fields(fields: Mapping[str, Sequence[Field]], most: int = 8) -> Figure:
    """What reaches the middle token, after one block after the other: a row per model, up to where all is reached."""
    reached = [next((i + 1 for i, f in enumerate(row) if f.area() == 1), len(row)) for row in fields.values()]
    columns = min(most, *(len(row) for row in fields.values()), max(reached))
    figure = Figure(figsize=(1.75 * columns + 0.3, 2.25 * len(fields)), layout="constrained")
    grid = figure.subplots(len(fields), columns, squeeze=False)
    for axes, (name, row) in zip(grid, fields.items(), strict=True):
        for axis, field in zip(axes, row, strict=False):
            rows, columns_of_pixels = field.of()
            axis.imshow(np.outer(rows, columns_of_pixels), cmap=REACHED, vmin=0, vmax=1)
            share = f"{_by(field.extent())} px, {100 * field.area():.1f} %"
            axis.set_title(f"block {field.block}, d = {_by(field.dilation)}\n{share}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, fontsize=10)
    return figure


def draw_effective_fields(fields: Sequence[np.ndarray]) -> Figure:
    """The effective receptive field of every level, by the convention's logarithm."""
    figure = Figure(figsize=(2.6 * len(fields), 2.8), layout="constrained")
    for level, (axis, field) in enumerate(zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True)):
        axis.imshow(logarithm(field), cmap="magma", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"level {level}", fontsize=9)
    return figure


def draw_cam(picture: Image.Image, cam: np.ndarray, title: str) -> Figure:
    """The image, and a class activation map (height, width) over it."""
    figure = Figure(figsize=(7.2, 3.9 * picture.height / picture.width + 0.3), layout="constrained")
    plain, over = figure.subplots(1, 2)
    plain.imshow(picture)
    over.imshow(picture.convert("L"), cmap="gray")
    over.imshow(cam, cmap="inferno", alpha=0.25 + 0.5 * cam, vmin=0, vmax=1)
    for axis in (plain, over):
        axis.set_axis_off()
    over.set_title(title, fontsize=9)
    return figure
