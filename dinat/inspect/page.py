"""One HTML file with the attention of every query, in every head of every block: no server, no network.

A weight takes one byte, in steps of 1/255 of the largest of its window; as weights sum up to 1, that is all the page
needs. DiNAT-Mini at 224 pixels has 2.2 million of them.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dinat.errors import UserError
from dinat.files import write_atomically

from .extraction import Attention, check_head, find_block

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path,
    picture: Image.Image,
    layers: Sequence[Attention],
    *,
    title: str = "Neighborhood attention",
    image: int = 0,
    block: str | None = None,
    head: int | None = None,
    at: tuple[int, int] | None = None,
) -> None:
    """Writes the page of one image.

    Args:
        path: of the HTML file.
        picture: the image as the model saw it, in its size.
        layers: what `attention` returned.
        title: of the page.
        image: which one of the batch.
        block: LEVEL.BLOCK that is shown at first; the first one by default.
        head: that is shown at first; None for the mean.
        at: pixel (x, y) whose token is shown at first; that in the middle by default.

    Raises:
        UserError: unknown `block`, a `head` that it has not, `at` outside of the image; a picture of another size than
            the maps are of.
    """
    first = layers[0] if block is None else find_block(layers, block)
    check_head(first, head)
    covered = [tokens * stride for tokens, stride in zip(layers[0].size, layers[0].strides, strict=True)]
    if any(
        not side - stride < length <= side
        for length, side, stride in zip(picture.size[::-1], covered, layers[0].strides, strict=True)
    ):
        raise UserError(
            f"picture: is {picture.width} x {picture.height} pixels, the maps are of an image of {covered}."
        )
    x, y = (side // 2 for side in picture.size) if at is None else at
    first.token(x, y)
    blocks, packed = [], []
    for layer in layers:
        weights = layer.weights[image].float()
        packed.append((weights / weights.amax(-1, keepdim=True) * 255).round().to(torch.uint8).cpu().numpy().tobytes())
        blocks.append(
            dict(
                name=layer.block,
                heads=layer.heads,
                size=layer.size,
                kernel=layer.kernel_size,
                dilation=layer.dilation,
                strides=layer.strides,
                rows=layer.rows.tolist(),
                columns=layer.columns.tolist(),
            )
        )
    data = dict(
        title=title,
        width=picture.width,
        height=picture.height,
        blocks=blocks,
        first=dict(block=layers.index(first), head=-1 if head is None else head, x=x, y=y),
    )
    file = io.BytesIO()
    picture.save(file, format="PNG")
    contents = {
        "TITLE": html.escape(title),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "PICTURE": base64.b64encode(file.getvalue()).decode(),
        "WEIGHTS": base64.b64encode(b"".join(packed)).decode(),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub("%([A-Z]+)%", lambda place: contents[place[1]], template).encode()
    write_atomically(path, lambda temporary: temporary.write_bytes(page))
