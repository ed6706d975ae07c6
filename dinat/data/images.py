"""How a file becomes an image, for training, evaluation, `dinat predict`, `dinat verify` and dense data alike."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}  # channels of a model -> mode of its images
BACKGROUND = "white"  # what is behind transparent pixels
MAX_ASPECT = 100  # longer side : shorter side; resizing the shorter side enlarges the other as much
# What integers and floats may range up to: 8 bits, 16 bits, and 0 to 1.
FULL_SCALES = {"I": (255, 65535), "F": (1, 255, 65535)}
DARK = 13  # bits: an image of 16 that uses no more has at most 31 of 255

log = logging.getLogger("dinat")


class ImageError(ValueError):
    """An image that cannot be used, and why."""


class Encoded(io.BytesIO):
    """The bytes of an image, what to call it where it has a name, and what is wrong with it, if that is known."""

    def __init__(self, data: bytes, name: str | None, problem: str | None = None) -> None:
        super().__init__(data)
        self.name, self.problem = name, problem


def open_image(
    file: str | Path | BinaryIO | Image.Image, *, exif_transpose: bool = False, channels: int = 3
) -> Image.Image:
    """A decoded image of 8 bits per channel, grey (`channels=1`) or RGB (3).

    Deeper images are scaled to 8 bits: 16-bit ones by their upper byte, others from the smallest of the ranges 0 to 1
    (floats), 255 and 65535 that holds their values, else from their own range. Transparent images lie on white.

    Args:
        file: a path, an open file, or what a library made of one.
        exif_transpose: turn the image upright, as its EXIF orientation says.

    Raises:
        ImageError: for whatever Pillow cannot decode, sides more than `MAX_ASPECT` : 1 apart, more pixels than Pillow
            takes (twice `PIL.Image.MAX_IMAGE_PIXELS`), or values that are not finite.
    """
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        width, height = image.size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError(f"{width} x {height} pixels; one side may be {MAX_ASPECT} times the other")
        if exif_transpose:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            values = np.asarray(image)
            _mention_dark(int(values.max()).bit_length())
            image = Image.fromarray((values >> 8).astype(np.uint8))
        elif image.mode in FULL_SCALES:
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert(MODES[channels])
    except UnidentifiedImageError as error:  # its message names an open file by its address
        raise ImageError("cannot identify image file") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except IsADirectoryError as error:
        raise ImageError("a folder, not an image") from error
    except Exception as error:  # decoders raise anything on malformed bytes: OSError, SyntaxError, struct.error
        raise ImageError(str(error) or type(error).__name__) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ImageError("it holds values that are not finite")
    full = next((full for full in FULL_SCALES[image.mode] if low >= 0 and high <= full), None)
    if full == 65535:
        _mention_dark(int(high).bit_length())
    if full is None:
        values, full = values - low, high - low
    levels = values // 256 if full == 65535 else (values * (255 / (full or 1))).round()
    return Image.fromarray(levels.astype(np.uint8))


@cache
def _mention_dark(bits: int) -> None:
    """Once per process: cameras of 10 or 12 bits write files of 16, of which the upper byte is all but black."""
    if 0 < bits <= DARK:
        log.warning("an image of 16 bits uses %d, so it is nearly black here, as in OpenCV. Scale such images.", bits)


def image_endings() -> set[str]:
    """The file endings of all formats that Pillow opens here, lower case with their dot."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def is_data(name: str) -> bool:
    """Whether a file or folder of this name belongs to the data: not hidden, not what macOS puts into archives."""
    return not name.startswith(".") and name != "__MACOSX"


def walk_data(root: str | Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and all below it: the folder, and the names of the folders and files in it that are data.

    Links are followed, but for those to a folder that they are in, which have no end.

    Raises:
        OSError: for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:  # os.walk passes over it otherwise
        raise error

    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folder = Path(place)
        folders[:] = sorted(name for name in filter(is_data, folders) if not _turns_back(folder / name))
        yield folder, folders, sorted(filter(is_data, files))


def _turns_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def pick_images(paths: Iterable[str], endings: Collection[str] | None = None) -> tuple[list[str], str]:
    """The paths of images, by their endings, and one line about the others; empty where all are images."""
    endings = endings or image_endings()
    images, left_out = [], Counter()
    for path in paths:
        ending = os.path.splitext(path)[1].lower()
        if ending in endings:
            images.append(path)
        else:
            left_out[ending] += 1
    return images, count_endings(left_out, "as no image") if left_out else ""


def count_endings(left_out: Counter[str], reason: str) -> str:
    """One line about files that are left out, by their endings."""
    listed = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in left_out.most_common(8))
    count = left_out.total()
    return f"{count} file{'s are' if count > 1 else ' is'} left out {reason}: {listed}"
