"""Semantic segmentation from a folder of images and a folder of masks whose pixels are labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from dinat.data.folders import existing_root, first_existing, named_files, pair_files, read_image, split_names
from dinat.data.images import image_endings
from dinat.errors import UserError

IGNORED = 255  # in the maps of targets
MASK_FOLDERS = ("annotations", "masks", "labels")
MASK_FILES = (".png", ".tif", ".tiff", ".bmp")  # without loss: labels are exact
NAMES = ("classes.txt", "objectInfo150.txt")  # the latter is ADE20K's


class SemanticFolder(Dataset):
    """Images and masks of the same names; items are `(image, {"semantic": (H, W) uint8, "image_id"})`.

    Read are `ROOT/images/SPLIT` with `ROOT/annotations/SPLIT` (ADE20K's layout; also `masks` or `labels`), and
    `ROOT/SPLIT/images` with `ROOT/SPLIT/masks` (or the others). Palette images are read as indices.

    Args:
        root: the folder that holds everything.
        split: "train" or "validation", or one of their usual synonyms.
        images, masks: folders below `root`, where the layout is another.
        classes: names in the order of the labels, or a file with a name per line below `root`; by default classes.txt.
        ignore_label: value of pixels that count nowhere.
        reduce_zero_label: 0 counts nowhere and labels begin at 1, as in ADE20K.
        image_ending, mask_ending: what follows the common name, such as _mask.png; by default any of the usual endings.

    Attributes:
        classes: names in the order of the labels.

    Raises:
        UserError: for folders or names that are not there, an image without a mask, or a mask without an image.
    """

    def __init__(
        self, root: str | Path, split: str, *, images: str | None = None, masks: str | None = None,
        classes: Sequence[str] | str | None = None, ignore_label: int | None = IGNORED, reduce_zero_label: bool = False,
        image_ending: str | None = None, mask_ending: str | None = None,
    ) -> None:  # fmt: skip
        self.root = existing_root(root)
        folders = [self.root / "images" / name for name in split_names(split)]
        folders += [self.root / name / "images" for name in split_names(split)]
        self.images = first_existing([self.root / images] if images else folders, f"{split}: folder of images")
        # The masks' path differs from the images' in one word.
        parts = self.images.relative_to(self.root).parts
        folders = [self.root.joinpath(*(name if part == "images" else part for part in parts)) for name in MASK_FOLDERS]
        self.masks = first_existing([self.root / masks] if masks else folders, f"{split}: folder of masks")
        self.classes = read_names(self.root, classes)
        refuse_too_many(self.classes)
        self.values = _label_of_values(len(self.classes), ignore_label, reduce_zero_label)
        endings = ([image_ending] if image_ending else image_endings(), [mask_ending] if mask_ending else MASK_FILES)
        self.pairs = pair_files(*map(named_files, (self.images, self.masks), endings))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        image_path, mask_path = self.pairs[index]
        image, values = read_pair(image_path, mask_path)
        if len(unlisted := np.setdiff1d(values, list(self.values))):
            known = f"{len(self.classes)} classes ({min(self.values)} to {max(self.values)})"
            raise ValueError(
                f"{mask_path}: {(values == unlisted[0]).sum()} pixels have the value {unlisted[0]}; of {known}"
            )
        table = np.zeros(max(self.values) + 1, np.uint8)
        table[list(self.values)] = list(self.values.values())
        return image, {"semantic": tv_tensors.Mask(torch.from_numpy(table[values])), "image_id": index}

    def filename(self, index: int, absolute: bool = False) -> str:
        """The file of an image, below the folder of images or from the root of the file system."""
        path = self.pairs[index][0]
        return str(path if absolute else path.relative_to(self.images))


def read_pair(image_path: Path, mask_path: Path) -> tuple[tv_tensors.Image, np.ndarray]:
    """An image (3, H, W) and the integers (H, W) that its mask file holds; of a palette image, its indices.

    Raises:
        ValueError: for a mask in colours, or of another size than the image.
    """
    image = read_image(image_path)
    with Image.open(mask_path) as mask:
        if mask.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{mask_path}: a mask has one number per pixel; this image has mode {mask.mode}")
        values = np.array(mask).astype(np.int64)
    if values.shape != image.shape[-2:]:
        (height, width), (rows, columns) = values.shape, image.shape[-2:]
        raise ValueError(f"{mask_path}: has {width} x {height} pixels, its image {image_path} {columns} x {rows}")
    return image, values


def read_names(root: Path, classes: Sequence[str] | str | None) -> list[str]:
    """The names of the classes: as given, or from a file with a name in each line.

    Raises:
        UserError: where there is none, it is empty, or a name comes twice.
    """
    if classes is None or isinstance(classes, str):
        files = [root / classes] if classes else [root / name for name in NAMES]
        path = first_existing(files, "names of the classes, one per line (or set data.kwargs.classes)")
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}. Save it as that.") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if path.name == NAMES[1]:  # Idx, Ratio, Train, Val, Name
            lines = [line.split("\t")[-1].strip() for line in lines[1:]]
        classes, source = lines, str(path)
    else:
        source = "data.kwargs.classes"
    if not classes:
        raise UserError(f"{source}: no names of classes.")
    if shared := sorted({name for name in classes if list(classes).count(name) > 1}):
        raise UserError(f"{source}: several classes are named {shared[0]}.")
    return list(classes)


def refuse_too_many(classes: Sequence[str]) -> None:
    """Raises UserError for more classes than a map of bytes can have."""
    if len(classes) > IGNORED:
        raise UserError(f"{len(classes)} classes: at most {IGNORED} fit into a map of bytes.")


def _label_of_values(count: int, ignore_label: int | None, reduce_zero_label: bool) -> dict[int, int]:
    """Value of a pixel -> label, 255 where it counts nowhere."""
    first = int(reduce_zero_label)
    labels = {label + first: label for label in range(count)}
    if ignore_label in labels:
        raise UserError(
            f"data.kwargs.ignore_label={ignore_label}: is the value of a class; there are {count} from {first} on."
        )
    if reduce_zero_label:
        labels[0] = IGNORED
    if ignore_label is not None:
        labels[ignore_label] = IGNORED
    return labels
