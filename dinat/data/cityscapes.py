"""Cityscapes' fine annotations: 19 classes, of which 8 are things.

`ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `ROOT/gtFine/SPLIT/CITY/*_gtFine_{labelIds,instanceIds}.png` are as
published. Labels are `trainId`s; what has none counts nowhere. cityscapesscripts' createPanopticImgs adds
`ROOT/gtFine/cityscapes_panoptic_SPLIT.json`, and a folder of PNG files of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from dinat.classes import CITYSCAPES
from dinat.data.coco import CocoPanoptic, Record
from dinat.data.folders import (
    existing_root,
    first_existing,
    named_files,
    pair_files,
    refuse_other_classes,
    split_names,
)
from dinat.data.masks import IGNORED, SemanticFolder, read_pair

IMAGES, TRUTH = "leftImg8bit", "gtFine"  # folders
IMAGE_ENDING = "_leftImg8bit.png"
LABEL_IDS = range(34)  # all that there are
INSTANCES = 1000  # pixels of an instance have label id * INSTANCES + its number


class CityscapesSemantic(SemanticFolder):
    """A label for each pixel, from the files *_labelIds.png.

    Args:
        root, split: as of `SemanticFolder`.
        classes: of the training data, which must be the same.
    """

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] | None = None) -> None:
        root = existing_root(root)
        refuse_other_classes("Cityscapes", CITYSCAPES.names, classes)
        split = find_split(root, split)
        super().__init__(
            root, split, images=f"{IMAGES}/{split}", masks=f"{TRUTH}/{split}", classes=CITYSCAPES.names,
            image_ending=IMAGE_ENDING, mask_ending=f"_{TRUTH}_labelIds.png",
        )  # fmt: skip
        self.values = dict.fromkeys(LABEL_IDS, IGNORED) | {number: i for i, number in enumerate(CITYSCAPES.ids)}


class CityscapesInstances(Dataset):
    """Objects with boxes and masks, from the files *_instanceIds.png; items as of `CocoObjects`.

    Groups of things that are not told apart are crowds. Caravans and trailers are no classes here, nor in the
    benchmark.

    Args:
        root, split: as of `SemanticFolder`.
        classes: of the training data, which must be the same.

    Attributes:
        classes, category_ids: names and label ids in the order of the labels.
    """

    masks = True

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] | None = None) -> None:
        self.root, things = existing_root(root), CITYSCAPES.only_things()
        refuse_other_classes("Cityscapes", things.names, classes)
        self.classes, self.category_ids = list(things.names), list(things.ids)
        split = find_split(self.root, split)
        self.images = self.root / IMAGES / split
        truth = named_files(self.root / TRUTH / split, [f"_{TRUTH}_instanceIds.png"])
        self.pairs = pair_files(named_files(self.images, [IMAGE_ENDING]), truth)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        image_path, truth_path = self.pairs[index]
        image, ids = read_pair(image_path, truth_path)
        values = np.unique(ids)
        numbers = np.where(values < INSTANCES, values, values // INSTANCES)  # label ids
        if len(unknown := values[~np.isin(numbers, LABEL_IDS)]):
            raise ValueError(f"{truth_path}: has the value {unknown[0]}, which is no label id and of no instance")
        kept = np.isin(numbers, self.category_ids)
        masks = torch.from_numpy(ids == values[kept][:, None, None])
        boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])  # of whole pixels
        return image, {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])),
            "labels": torch.tensor([self.category_ids.index(number) for number in numbers[kept]], dtype=torch.int64),
            "masks": tv_tensors.Mask(masks),
            "iscrowd": torch.from_numpy(values[kept] < INSTANCES),
            "area": masks.sum((1, 2)).float(),
            "image_id": index,
        }

    def filename(self, index: int, absolute: bool = False) -> str:
        """The file of an image, below the folder of images or from the root of the file system."""
        path = self.pairs[index][0]
        return str(path if absolute else path.relative_to(self.images))


class CityscapesPanoptic(CocoPanoptic):
    """Segments of all classes. Arguments as of `CocoPanoptic`.

    The file names that the JSON file has for images are not theirs; their ids tell.
    """

    annotation_files = (f"{TRUTH}/cityscapes_panoptic_{{split}}.json",)
    image_folders = (f"{IMAGES}/{{split}}",)

    def _file_name(self, image: Record) -> str:
        number = str(image["id"])
        return f"{number.partition('_')[0]}/{number}{IMAGE_ENDING}"


def find_split(root: Path, split: str) -> str:
    """What the split is called below `root`."""
    places = [root / IMAGES / name for name in split_names(split)]
    return first_existing(places, f"{split}: folder of images").name
