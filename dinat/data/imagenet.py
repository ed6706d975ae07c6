"""ImageNet-1k's evaluation sets: which folder is which class, which classes compete, which labels are right.

From timm's index files. ImageNet-A and -R (arXiv:1907.07174, arXiv:2006.16241) have 200 of the classes, and only these
compete. ReaL (arXiv:2006.07159) has any number of right labels per validation image; images without one do not count.
"""

from __future__ import annotations

import json
import pkgutil
import re
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from dinat.errors import UserError, nearest

BENCHMARKS = ("imagenet", "imagenet_real", "imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")
IGNORE = -1  # the target of an image that does not count


def class_map(benchmark: str | None) -> dict[str, int] | None:
    """Class folder -> class index; None where the sorted folders are in order.

    Raises:
        UserError: an unknown benchmark.
    """
    if benchmark not in (None, *BENCHMARKS):
        known = ", ".join(BENCHMARKS)
        raise UserError(f"data.benchmark={benchmark}: not known. Known: {known}.{nearest(str(benchmark), BENCHMARKS)}")
    if benchmark == "imagenet_v2":
        return {str(index): index for index in range(1000)}
    if benchmark in ("imagenet_sketch", "imagenet_a", "imagenet_r"):
        return {name: index for index, name in enumerate(ImageNetInfo().label_names())}
    return None


def competing_classes(benchmark: str | None) -> list[int] | None:
    """Indices of the classes that a prediction is chosen from, None for all."""
    if benchmark not in ("imagenet_a", "imagenet_r"):
        return None
    return [int(line) for line in _timm_info(f"{benchmark}_indices.txt").split()]


def accepted_labels(benchmark: str | None) -> Tensor | None:
    """For labels that are numbers of validation images: whether each class is right, (50000, 1000) bool; else None."""
    if benchmark != "imagenet_real":
        return None
    labels = json.loads(_timm_info("imagenet_real_labels.json"))
    accepted = torch.zeros(len(labels), 1000, dtype=torch.bool)
    for image, classes in enumerate(labels):
        accepted[image, classes] = True
    return accepted


def number_images(samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """(path, class) -> (path, number of the validation image), or `IGNORE` if ReaL has no label for it.

    Raises:
        UserError: a file without its original name, ILSVRC2012_val_00000001.JPEG for the first.
    """
    labels = json.loads(_timm_info("imagenet_real_labels.json"))
    numbered = []
    for path, _ in samples:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", Path(path).stem)
        if not match:
            raise UserError(f"data.benchmark=imagenet_real: {path} is not named as in ImageNet, ILSVRC2012_val_*.")
        image = int(match[1]) - 1
        numbered.append((path, image if labels[image] else IGNORE))
    return numbered


def _timm_info(name: str) -> str:
    return pkgutil.get_data("timm.data", f"_info/{name}").decode()
