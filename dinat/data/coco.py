"""COCO annotation files: objects (boxes, instance masks), and panoptic segments as PNG + JSON.

Everything that a JSON file can tell is checked when a data set is opened; the rest, when an image is read. What is
wrong and what is mended is decided here alone:

* The file itself (not there, not JSON, a part missing; an id that two images, annotations or categories share; a
  category without a name; other classes than in training) is always refused.
* An annotation that means nothing (of an unknown image or category; a box of negative size or outside of the image; an
  area that is no number; an iscrowd that is neither 0 nor 1; a polygon of fewer than three points; a mask of another
  size, or none where others have one) and an image without its file are refused, or under `on_bad="skip"` left out
  and said.
* A box that reaches over the image's edge is clamped; an object whose box has no area, as two of COCO's own train2017,
  is left out. Either is said.
* What only the pixels tell (a file of another size than stated, a mask that cannot be decoded, segments that do not
  agree with their PNG) is a ValueError when the image is read.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from dinat import rle
from dinat.data.folders import existing_root, first_existing, read_image, split_names
from dinat.data.images import is_data, pick_images
from dinat.data.masks import IGNORED, refuse_too_many
from dinat.errors import UserError
from dinat.files import read_json

log = logging.getLogger("dinat")

SHOWN = 5  # of many problems of a kind
ROBOFLOW = "_annotations.coco.json"

Record = dict[str, Any]
Target = dict[str, Any]


class Problem(NamedTuple):
    """Something wrong with an image or annotation: where, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Packed:
    """A list of plain objects as one array of bytes.

    Loader processes share it: reading an object of a list counts its references, which copies its page of memory.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        pickled = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = np.cumsum([0, *map(len, pickled)])
        self.bytes = np.frombuffer(b"".join(pickled), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.bytes[self.ends[index] : self.ends[index + 1]])


class CocoFile(Dataset):
    """What objects and panoptic segments have in common: a JSON file with images and categories, a folder of images.

    Other data in this format differ in where the files are: a subclass says it in `annotation_files` and
    `image_folders`, patterns below `root`, the best first, where {split} is each of the split's names.

    Args:
        root: the folder that holds everything.
        split: "train" or "validation", or one of their usual synonyms.
        annotations, images: where the JSON file and the images are, below `root`, where the layout is another.
        classes: of the training data; the file must have the same, and labels follow their order.
        keep_empty: whether images without objects (crowds do not count) stay in.
        on_bad: "fail" or "skip", of images and annotations that cannot be used.

    Attributes:
        classes: names in the order of the labels.
        category_ids: the file's id of each class.

    Raises:
        UserError: as the module says.
    """

    annotation_files: ClassVar[tuple[str, ...]]
    image_folders: ClassVar[tuple[str, ...]] = ("{split}", "images/{split}")
    sizes_hold: ClassVar[bool] = True  # whether images have the sizes that the file states

    def __init__(
        self, root: str | Path, split: str, *, annotations: str | None = None, images: str | None = None,
        classes: Sequence[str] | None = None, keep_empty: bool = True, on_bad: str = "fail",
    ) -> None:  # fmt: skip
        if on_bad not in ("fail", "skip"):
            raise UserError(f"data.kwargs.on_bad={on_bad}: must be fail or skip.")
        self.root, self.split = existing_root(root), split
        self.file = self._annotation_file(annotations)
        self.folder = self._image_folder(images)
        content = read_coco(self.file)
        self.categories = _categories(self.file, content["categories"], classes)
        self.classes = [category["name"] for category in self.categories]
        self.category_ids = [category["id"] for category in self.categories]
        self.labels = {number: label for label, number in enumerate(self.category_ids)}
        found = {image["id"]: image | {"file_name": self._file_name(image)} for image in content["images"]}
        self.problems: list[Problem] = []
        per_image = self._annotations(content["annotations"], found)
        self._refuse_or_say(on_bad)
        records = [(image, per_image[number]) for number, image in found.items() if number in per_image]
        if not keep_empty:
            full = [record for record in records if not all(one["iscrowd"] for one in record[1])]
            log.info("%s: %d images without objects are left out", self.file, len(records) - len(full))
            records = full
        if not records:
            raise UserError(f"{self.file}: no image is left to use.")
        self.records = Packed(records)  # (image, its annotations)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        image, annotations = self.records[index]
        pixels = read_image(self.folder / image["file_name"])
        stated, size = (image["height"], image["width"]), tuple(pixels.shape[-2:])
        if self.sizes_hold and stated != size:
            raise ValueError(f"{self._where(image)}: has {_size(size)} pixels, stated are {_size(stated)}")
        image |= dict(zip(("height", "width"), size, strict=True))
        return pixels, {**self._target(image, annotations), "image_id": image["id"]}

    def filename(self, index: int, absolute: bool = False) -> str:
        """The file of an image, below the folder of images or from the root of the file system."""
        name = self.records[index][0]["file_name"]
        return str(self.folder / name) if absolute else name

    def _annotations(self, annotations: Iterable[Record], images: dict[int, Record]) -> dict[int, Any]:
        """image id -> what is to be kept of its annotations, for images to use; what is wrong to `self.problems`."""
        raise NotImplementedError

    def _target(self, image: Record, annotations: list[Record]) -> Target:
        raise NotImplementedError

    def _file_name(self, image: Record) -> str:
        """The file of an image, below the folder of images."""
        return image["file_name"]

    def _annotation_file(self, name: str | None) -> Path:
        if name is not None:
            return first_existing([self.root / name], "annotation file")
        names = split_names(self.split)
        for split in names:
            for pattern in self.annotation_files:
                if len(found := sorted(self.root.glob(pattern.format(split=split)))) > 1:
                    files, name = ", ".join(path.name for path in found), found[0].stem
                    raise UserError(
                        f"{found[0].parent} has several annotation files for {split}: {files}. Name the one to use, by "
                        f"data.train_split or data.val_split={name[name.index(split) :]}."
                    )
                if found:
                    return found[0]
        places = ", ".join(f"{self.root}/{pattern.format(split='SPLIT')}" for pattern in self.annotation_files)
        raise UserError(f"{self.split}: no annotation file. Looked for {places} with SPLIT = {', '.join(names)}.")

    def _image_folder(self, name: str | None) -> Path:
        if name is not None:
            return first_existing([self.root / name], "folder of images")
        if self.file.name == ROBOFLOW:
            return self.file.parent
        names = split_names(self.split)
        in_file = re.search(rf"(?:{'|'.join(names)})\w*$", self.file.stem)  # train2017 of instances_train2017
        splits = [in_file[0], *names] if in_file else names
        places = (self.root / place.format(split=split) for split in splits for place in self.image_folders)
        return first_existing(places, f"folder of images for {self.file}")

    def _where(self, image: Record, annotation: Any = None) -> str:
        """The place of a problem: file, image, annotation."""
        where = f"{self.file}: image {image['file_name']} (id {image['id']})"
        return where if annotation is None else f"{where}, annotation {annotation}"

    def _missing_files(self, images: Iterable[Record]) -> set[int]:
        """Ids of images without a file, noted as problems; says how many files no image names."""
        listing = cache(lambda folder: set(os.listdir(folder)) if folder.is_dir() else set())
        missing, used = set(), Counter()
        for image in images:
            path = self.folder / image["file_name"]
            if path.name in listing(path.parent):
                used[path.parent] += 1
            else:
                missing.add(image["id"])
                self.problems.append(Problem(self._where(image), f"there is no file {path}"))
        for folder, count in used.items():
            files, _ = pick_images(filter(is_data, listing(folder)))
            if len(files) > count:
                log.info("%s: %d images are not in %s", folder, len(files) - count, self.file)
        return missing

    def _refuse_or_say(self, on_bad: str) -> None:
        if not self.problems:
            return
        shown = "\n".join(map(str, self.problems[:SHOWN]))
        if len(self.problems) > SHOWN:
            shown += f"\n... and {len(self.problems) - SHOWN} more"
        if on_bad != "skip":
            raise UserError(f"{shown}\nRepair the file, or leave these out with +data.kwargs.on_bad=skip.")
        log.warning("left out, %d in all:\n%s", len(self.problems), shown)


class CocoObjects(CocoFile):
    """Objects with boxes and, where the file has segmentations, instance masks; items are `(image, target)`.

    Read are `ROOT/SPLIT/_annotations.coco.json` beside its images (Roboflow's layout) and
    `ROOT/annotations/instances_SPLIT*.json` with images in `ROOT/SPLIT*` or `ROOT/images/SPLIT*` (COCO's).

    Args:
        masks: whether to read masks; by default, whether the file has any.
        others: as `CocoFile`.
    """

    annotation_files = (
        f"{{split}}/{ROBOFLOW}", "annotations/instances_{split}.json", "annotations/instances_{split}*.json",
        "annotations/{split}.json",
    )  # fmt: skip

    def __init__(self, root: str | Path, split: str, *, masks: bool | None = None, **options: Any) -> None:
        self.masks = masks
        super().__init__(root, split, **options)

    def _annotations(self, annotations: Iterable[Record], images: dict[int, Record]) -> dict[int, list[Record]]:
        annotations = list(annotations)
        _refuse_shared_ids(self.file, "annotations", annotations)
        if self.masks is None:
            self.masks = any(annotation.get("segmentation") for annotation in annotations)
        missing = self._missing_files(images.values())
        per_image: dict[int, list[Record]] = {number: [] for number in images if number not in missing}
        clamped, without_area = [], []
        for annotation in annotations:
            image = _entry(images, annotation.get("image_id"))
            if wrong := self._wrong(annotation, image):
                where = self._where(image or _unknown(annotation), annotation["id"])
                self.problems.append(Problem(where, wrong))
            elif image["id"] in per_image:
                where = self._where(image, annotation["id"])
                if 0 in annotation["bbox"][2:]:
                    without_area.append(Problem(where, f"box {annotation['bbox']} has no area"))
                    continue
                box, reached_over = _clamp(annotation["bbox"], image)
                if reached_over:
                    clamped.append(Problem(where, f"box {annotation['bbox']} reaches over the edge"))
                per_image[image["id"]].append({
                    "box": box,
                    "label": self.labels[annotation["category_id"]],
                    "iscrowd": bool(annotation.get("iscrowd", 0)),
                    "area": annotation.get("area"),
                    "segmentation": annotation.get("segmentation") if self.masks else None,
                    "id": annotation["id"],
                })  # fmt: skip
        if without_area:
            log.warning("%d objects without area are left out, the first: %s", len(without_area), without_area[0])
        if clamped:
            log.warning("%d boxes are clamped to their image, the first: %s", len(clamped), clamped[0])
        return per_image

    def _wrong(self, annotation: Record, image: Record | None) -> str | None:
        """What is wrong with an annotation, None if nothing is."""
        if image is None:
            return "there is no such image"
        if _entry(self.labels, annotation.get("category_id")) is None:
            return f"category_id {annotation.get('category_id')!r} has no name in categories"
        if annotation.get("iscrowd") not in (None, 0, 1):
            return f"iscrowd {annotation['iscrowd']!r} is neither 0 nor 1"
        if (area := annotation.get("area")) is not None and not (_numbers([area]) and area >= 0):
            return f"area {area!r} is no number of pixels"
        box = annotation.get("bbox")
        if not _numbers(box) or len(box) != 4:
            return f"box {box} is not [left, top, width, height]"
        left, top, width, height = box
        if width < 0 or height < 0:
            return f"box {box} has a negative size"
        if left >= image["width"] or top >= image["height"] or left + width <= 0 or top + height <= 0:
            return f"box {box} lies outside of the image of {image['width']} x {image['height']} pixels"
        return _wrong_shape(annotation.get("segmentation"), image) if self.masks else None

    def _target(self, image: Record, annotations: list[Record]) -> Target:
        size = (image["height"], image["width"])
        boxes = torch.tensor([one["box"] for one in annotations], dtype=torch.float32).reshape(-1, 4)
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([one["label"] for one in annotations], dtype=torch.int64),
            "iscrowd": torch.tensor([one["iscrowd"] for one in annotations], dtype=torch.bool),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(self._masks(image, annotations))
        areas = [one["area"] for one in annotations]
        if None in areas:
            own = target["masks"].sum((1, 2)) if self.masks else (boxes[:, 2:] - boxes[:, :2]).prod(1)
            areas = [own if area is None else area for area, own in zip(areas, own.tolist(), strict=True)]
        return {**target, "area": torch.tensor(areas, dtype=torch.float32)}

    def _masks(self, image: Record, annotations: list[Record]) -> Tensor:
        """The objects' masks, bool (N, height, width)."""
        masks = np.zeros((len(annotations), image["height"], image["width"]), bool)
        for mask, one in zip(masks, annotations, strict=True):
            try:
                mask[:] = rle.decode(one["segmentation"], *mask.shape)
            except ValueError as error:
                raise ValueError(f"{self._where(image, one['id'])}: {error}") from error
        return torch.from_numpy(masks)


class CocoPanoptic(CocoFile):
    """Panoptic segments; items are `(image, target)` with the map of their ids, and the labels of these.

    Read are `ROOT/annotations/panoptic_SPLIT*.json` with its PNG files in the folder of the same name (there or in
    `ROOT`) and images as for objects. A PNG's colours are ids, red + 256 green + 65536 blue; 0 is void.

    Args:
        segments: the folder of PNG files below `root`, where it is another.
        others: as `CocoFile`.

    Attributes:
        things: which of the classes are things, by `isthing` of the categories.
    """

    annotation_files = (
        "annotations/panoptic_{split}.json", "annotations/panoptic_{split}*.json", "annotations/{split}.json",
    )  # fmt: skip
    covered: ClassVar[bool] = False  # whether segments may have no pixel; they are missed in evaluation, as in COCO's

    def __init__(self, root: str | Path, split: str, *, segments: str | None = None, **options: Any) -> None:
        self.segments = segments
        super().__init__(root, split, **options)
        for category in self.categories:
            if category.get("isthing") not in (0, 1):
                raise UserError(f"{self.file}: category {category['name']} does not say isthing, 0 or 1.")
        self.things = [bool(category["isthing"]) for category in self.categories]

    def _annotations(self, annotations: Iterable[Record], images: dict[int, Record]) -> dict[int, list[Record]]:
        annotations = list(annotations)
        self.png_folder = first_existing(self._png_folders(), f"folder of PNG files for {self.file}")
        _refuse_shared_ids(self.file, "annotations", annotations, "image_id")
        missing, files = self._missing_files(images.values()), set(os.listdir(self.png_folder))
        per_image: dict[int, list[Record]] = {}
        for annotation in annotations:
            image = images.get(annotation["image_id"])
            if wrong := self._wrong(annotation, image, files):
                where = self._where(image or _unknown(annotation))
                self.problems.append(Problem(where, wrong))
            elif image["id"] not in missing:
                image["png"] = annotation["file_name"]
                per_image[image["id"]] = [
                    {
                        "id": segment["id"],
                        "label": self.labels[segment["category_id"]],
                        "iscrowd": bool(segment.get("iscrowd", 0)),
                    }
                    for segment in annotation["segments_info"]
                ]
        for number in images.keys() - {annotation["image_id"] for annotation in annotations}:
            self.problems.append(Problem(self._where(images[number]), "has no annotation"))
        return per_image

    def _png_folders(self) -> list[Path]:
        """Where the PNG files may be."""
        own = self.root / self.segments if self.segments else self.file.with_suffix("")
        return [own, self.root / own.name]

    def _wrong(self, annotation: Record, image: Record | None, files: set[str]) -> str | None:
        if image is None:
            return "there is no such image"
        segments = annotation.get("segments_info")
        if not isinstance(segments, list) or not all(
            isinstance(one, dict) and isinstance(one.get("id"), int) for one in segments
        ):
            return "its segments_info is not a list of segments with ids"
        if annotation.get("file_name") not in files:
            return f"there is no file {self.png_folder / str(annotation.get('file_name'))}"
        numbers = Counter(segment["id"] for segment in segments)
        if shared := [number for number, count in numbers.items() if count > 1]:
            return f"several segments have the id {shared[0]}"
        for segment in segments:
            if not 0 < segment["id"] < 256**3:
                return f"segment {segment['id']}: ids are from 1 to {256**3 - 1}"
            if _entry(self.labels, segment.get("category_id")) is None:
                return f"segment {segment['id']}: category_id {segment.get('category_id')!r} has no name in categories"
            if segment.get("iscrowd") not in (None, 0, 1):
                return f"segment {segment['id']}: iscrowd {segment['iscrowd']!r} is neither 0 nor 1"
        return None

    def _target(self, image: Record, annotations: list[Record]) -> Target:
        path = self.png_folder / image["png"]
        ids = read_ids(path)
        if ids.shape != (image["height"], image["width"]):
            stated = _size((image["height"], image["width"]))
            raise ValueError(f"{self._where(image)}: {path} has {_size(ids.shape)} pixels, the image {stated}")
        numbers = np.array([segment["id"] for segment in annotations], np.int64)
        if len(unknown := np.setdiff1d(ids, [0, *numbers])):
            raise ValueError(f"{self._where(image)}: {path} has the id {unknown[0]}, which no segment has")
        if not self.covered and len(absent := np.setdiff1d(numbers, ids)):
            raise ValueError(f"{self._where(image)}: segment {absent[0]} has no pixel in {path}")
        return {
            "labels": torch.tensor([segment["label"] for segment in annotations], dtype=torch.int64),
            "iscrowd": torch.tensor([segment["iscrowd"] for segment in annotations], dtype=torch.bool),
            "panoptic": tv_tensors.Mask(torch.from_numpy(ids)),
            "segment_ids": torch.from_numpy(numbers),
        }


class CocoSemantic(CocoPanoptic):
    """A class for each pixel, that of its segment; void counts nowhere. Arguments as of `CocoPanoptic`."""

    def __init__(self, root: str | Path, split: str, **options: Any) -> None:
        super().__init__(root, split, **options)
        refuse_too_many(self.classes)

    def _target(self, image: Record, annotations: list[Record]) -> Target:
        segments = super()._target(image, annotations)
        semantic = torch.full((image["height"], image["width"]), IGNORED, dtype=torch.uint8)
        for number, label in zip(segments["segment_ids"].tolist(), segments["labels"].tolist(), strict=True):
            semantic[segments["panoptic"] == number] = label
        return {"semantic": tv_tensors.Mask(semantic)}


def read_coco(path: Path) -> dict[str, list[Record]]:
    """A COCO file with its lists of images, annotations and categories.

    Raises:
        UserError: where it is damaged, or ids are shared.
    """
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: no list '{key}', so not a COCO annotation file.")
    for image in content["images"]:
        sides = [image.get("height"), image.get("width")]
        if not isinstance(image.get("file_name"), str) or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError(
                f"{path}: image {image.get('id')}: file_name, height and width are needed, text and whole numbers; it "
                f"has {image}."
            )
    _refuse_shared_ids(path, "images", content["images"])
    _refuse_shared_ids(path, "categories", content["categories"])
    return content


def read_ids(path: Path) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG, int32 (H, W)."""
    with Image.open(path) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"{path}: segment ids are colours; this image has mode {image.mode}")
        colours = np.array(image.convert("RGB"), np.int32)
    return colours @ np.array([1, 256, 256**2], np.int32)


def _categories(path: Path, categories: list[Record], classes: Sequence[str] | None) -> list[Record]:
    """The categories in the order of the labels: of `classes`, else of their ids."""
    if not categories:
        raise UserError(f"{path}: holds no categories, which name the classes.")
    for category in categories:
        if not isinstance(category.get("name"), str) or not category["name"]:
            raise UserError(f"{path}: category {category['id']} has no name.")
    names = Counter(category["name"] for category in categories)
    if shared := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{path}: several categories are named {shared[0]}.")
    if classes is None:
        return sorted(categories, key=lambda category: category["id"])
    if names.keys() != set(classes):
        unknown, absent = sorted(names.keys() - set(classes)), sorted(set(classes) - names.keys())
        raise UserError(f"{path}: other classes than in training; only here: {unknown}, only there: {absent}.")
    return sorted(categories, key=lambda category: classes.index(category["name"]))


def _refuse_shared_ids(path: Path, kind: str, entries: Iterable[Record], key: str = "id") -> None:
    of_images = kind == "images" or key == "image_id"  # which may have names: those of ADE20K, Cityscapes, Mapillary do
    numbers = [entry.get(key) for entry in entries]
    for number in numbers:
        if not isinstance(number, int | str if of_images else int):
            raise UserError(f"{path}: {kind}: {key} {number!r} is not an integer{' or a name' if of_images else ''}.")
    for number, count in Counter(numbers).items():
        if count > 1:
            raise UserError(f"{path}: {count} {kind} have the {key} {number}.")


def _wrong_shape(segmentation: Any, image: Record) -> str | None:
    """What is wrong with a segmentation, as far as it is seen without decoding it."""
    if not segmentation:
        return "has no segmentation, where others have one"
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not (_lengths(size) and len(size) == 2 and (isinstance(counts, str) or _lengths(counts))):
            return "its segmentation is neither polygons nor a run-length encoding with size and counts"
        height, width = size
        if (height, width) != (image["height"], image["width"]):
            return f"its mask has {_size((height, width))} pixels, the image {_size((image['height'], image['width']))}"
        return None
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            return f"polygon {polygon} has fewer than three points [x, y, x, y, ...]"
    return None


def _clamp(box: Sequence[float], image: Record) -> tuple[list[float], bool]:
    """[left, top, width, height] -> [left, top, right, bottom] in the image, and whether that took anything away."""
    left, top, width, height = box
    corners = [left, top, left + width, top + height]
    limits = [image["width"], image["height"]] * 2
    inside = [min(max(corner, 0.0), limit) for corner, limit in zip(corners, limits, strict=True)]
    return inside, any(abs(one - other) > 0.01 for one, other in zip(corners, inside, strict=True))


def _entry(table: dict[Any, Any], key: Any) -> Any:
    """`table[key]`; None where there is none, whatever a file has in the place of a key."""
    return table.get(key) if isinstance(key, int | float | str) else None


def _unknown(annotation: Record) -> Record:
    """What stands for the image of an annotation that is of none."""
    return {"file_name": "?", "id": repr(annotation.get("image_id"))}


def _lengths(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _size(size: Sequence[int]) -> str:
    height, width = size
    return f"{width} x {height}"
