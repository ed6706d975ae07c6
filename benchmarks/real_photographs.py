"""Train and test a detector on real photographs, twice; append rows to benchmarks/results/real_photographs.csv.

    PYTHONPATH=.:kernels OMP_NUM_THREADS=1 python benchmarks/real_photographs.py

* trees: crowns in airborne pictures of Yellowstone, boxes only. Training is on one picture, the test on another, 13 km
  away. In the wheel of deepforest 2.1.0 (MIT); the pictures come from NEON, the National Ecological Observatory
  Network, and the wheel states no licence of theirs.
* nuclei: a microscope picture with a mask for each nucleus. Training is on its left half, the test on its right one. In
  the wheel of stardist 0.9.2 (BSD-3). It uses 0 to 235 of its 16 bits and would be black in 8, so values are stretched,
  from the 1st to the 99.8th percentile of the left half.

The wheels are fetched from PyPI, without what they require, unless --wheels (by default the variable DINAT_REAL_DATA)
is a folder that they were unpacked to, or they are installed. Pictures are cut into tiles of even size, as COCO files.
**The tile that has most of an object has it, as far as it reaches; parts in other tiles are crowds**, on which a model
is not trained, and a detection of which the test does not count. So all tiles together have each object once.

`train.py` and `eval.py` do the rest: a small Mask R-CNN on dinat_pico_patch4, from scratch, some minutes of one thread.
Two pictures tell whether the way from files to figures works. How good the models are, they do not tell: the settings
were chosen after a look at the test halves (two trials of trees, two of nuclei), so the figures flatter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from harness import RESULTS, ROOT, append, command, facts, rounded
from harness import read as read_rows
from PIL import Image

from dinat import rle
from dinat.data.coco import ROBOFLOW

WHEELS = {"trees": "deepforest==2.1.0", "nuclei": "stardist==0.9.2"}
TREES = {"train": "2019_YELL_2_528000_4978000_image_crop2", "validation": "2019_YELL_2_541000_4977000_image_crop"}
TILE = 256  # pixels; tiles are as near to it as even ones can be
PERCENTILES = (1, 99.8)
COMMON = ["task=detection", "data=coco", "augment=dense", "runtime.device=cpu", "eval_every=1000"]
RECIPES = {
    "trees": [  # at half their size, so that the model sees each picture often
        "++model.kwargs.masks=false", "model.kwargs.anchor_scale=2", "batch_size=8", "scheduler.updates=400",
        "augment.transform=[{resize: {shortest: 128, scale: [0.75, 1.33]}}, {flip: {}}, {photometric: {}}]",
        "data.eval_transform=[{resize: {shortest: 128}}]",
    ],
    "nuclei": [
        "batch_size=2", "scheduler.updates=250", "scheduler.warmup_updates=20",  # an epoch is one update
        "augment.transform=[{resize: {shortest: 256, scale: [0.75, 1.33]}}, {flip: {}}]",
    ],
}  # fmt: skip
FIGURES = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")

Tile = tuple[int, int, int, int]  # left, top, right, bottom
Annotation = dict[str, Any]


def find(wheel: str, folders: Sequence[str | Path]) -> Path | None:
    """The folder of a wheel's package, of the wheel's version, in one of `folders`; None if it is not there."""
    name, _, version = wheel.partition("==")
    found = metadata.distributions(name=name, path=[str(folder) for folder in folders])
    return next((Path(one.locate_file(name)) for one in found if one.version == version), None)


def find_or_fetch(wheel: str, folder: Path) -> Path:
    """The folder of a wheel's package: in `folder` or installed, else fetched into `folder`; or ends with status 2."""
    if package := find(wheel, [folder, *sys.path]):
        return package
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--target", str(folder), wheel]
    pip = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
    if package := find(wheel, [folder]):
        return package
    reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
    print(f"error: {wheel} is neither in {folder} nor installed, and pip does not get it: {reason}", file=sys.stderr)
    sys.exit(2)


def tiles_of(height: int, width: int) -> list[Tile]:
    """Even tiles that cover a picture, none smaller than two thirds of TILE."""
    rows, columns = (np.linspace(0, side, round(side / TILE) + 1).astype(int).tolist() for side in (height, width))
    return [(left, top, right, bottom) for (top, bottom), (left, right) in product(pairwise(rows), pairwise(columns))]


def part_of_box(box: Sequence[int], tile: Tile) -> Annotation | None:
    """What a tile has of a box [left, top, right, bottom], as an annotation; None if nothing."""
    left, top = max(box[0], tile[0]), max(box[1], tile[1])
    width, height = min(box[2], tile[2]) - left, min(box[3], tile[3]) - top
    if width <= 0 or height <= 0:
        return None
    return {"bbox": [left - tile[0], top - tile[1], width, height], "area": width * height}


def part_of_mask(mask: np.ndarray, tile: Tile) -> Annotation | None:
    """What a tile has of a mask, bool (height, width) of the picture, as an annotation; None if nothing."""
    left, top, right, bottom = tile
    part = mask[top:bottom, left:right]
    ys, xs = part.nonzero()
    if not len(ys):
        return None
    corner, end = np.array([xs.min(), ys.min()]), np.array([xs.max(), ys.max()]) + 1
    (shape,) = rle.encode(torch.from_numpy(part)[None])
    return {"bbox": [*corner.tolist(), *(end - corner).tolist()], "area": len(ys), "segmentation": shape}


def cut(size: tuple[int, int], objects: Iterable[Any], part: Callable) -> dict[Tile, list[Annotation]]:
    """The tiles of a picture of `size` (height, width), with an object where most of it is, its other parts as crowds.

    Args:
        objects, part: `part(object, tile)` is what the tile has of the object.
    """
    tiles: dict[Tile, list[Annotation]] = {tile: [] for tile in tiles_of(*size)}
    for one in objects:
        parts = {tile: found for tile in tiles if (found := part(one, tile))}
        home = max(parts, key=lambda tile: parts[tile]["area"])
        for tile, found in parts.items():
            tiles[tile].append({**found, "iscrowd": int(tile != home), "category_id": 1})
    return tiles


def write(folder: Path, name: str, pixels: np.ndarray, tiles: dict[Tile, list[Annotation]]) -> int:
    """Writes tiles as PNG, and their COCO file; returns the number of objects in them, without crowds."""
    folder.mkdir(parents=True)
    images = []
    for number, (left, top, right, bottom) in enumerate(tiles):
        images.append({"id": number, "file_name": f"{left}_{top}.png", "width": right - left, "height": bottom - top})
        Image.fromarray(pixels[top:bottom, left:right]).save(folder / images[-1]["file_name"])
    records = [{**one, "image_id": number} for number, found in enumerate(tiles.values()) for one in found]
    content = {
        "images": images,
        "annotations": [{**one, "id": number} for number, one in enumerate(records)],
        "categories": [{"id": 1, "name": name}],
    }
    (folder / ROBOFLOW).write_text(json.dumps(content))
    return sum(not one["iscrowd"] for one in records)


def write_trees(package: Path, root: Path) -> dict[str, int]:
    """Writes the two pictures of trees; returns split -> objects."""
    counts = {}
    for split, name in TREES.items():
        pixels = np.asarray(Image.open(package / "data" / f"{name}.png").convert("RGB"))
        tiles = cut(pixels.shape[:2], read_voc(package / "data" / f"{name}.xml"), part_of_box)
        counts[split] = write(root / split, "tree", pixels, tiles)
    return counts


def read_voc(path: Path) -> list[list[int]]:
    """Boxes [left, top, right, bottom] of a VOC file, which counts pixels from 1 and includes the last ones."""
    corners = (("xmin", 1), ("ymin", 1), ("xmax", 0), ("ymax", 0))
    boxes = ElementTree.parse(path).iterfind("object/bndbox")
    return [[int(box.findtext(corner)) - first for corner, first in corners] for box in boxes]


def write_nuclei(package: Path, root: Path) -> dict[str, int]:
    """Writes the two halves of the picture of nuclei; returns split -> objects."""
    folder = package / "data" / "images"
    values, numbers = (np.asarray(Image.open(folder / name)) for name in ("img2d.tif", "mask2d.tif"))
    middle = values.shape[1] // 2
    low, high = np.percentile(values[:, :middle], PERCENTILES)
    pixels = ((values - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
    tiles = cut(values.shape, [numbers == number for number in np.unique(numbers) if number], part_of_mask)
    halves = {"train": lambda left: left < middle, "validation": lambda left: left >= middle}
    return {
        split: write(root / split, "nucleus", pixels, {tile: found for tile, found in tiles.items() if within(tile[0])})
        for split, within in halves.items()
    }


WRITERS = {"trees": write_trees, "nuclei": write_nuclei}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--wheels", type=Path, default=os.environ.get("DINAT_REAL_DATA"), help="folder of the packages")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "real_photographs", help="for data and run folders"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "real_photographs.csv")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration of training, for a trial")
    options = parser.parse_args(arguments)
    runs = options.runs.absolute() / time.strftime("%Y-%m-%d_%H-%M-%S")
    wheels = Path(options.wheels or options.runs / "wheels").absolute()
    packages = {data: find_or_fetch(WHEELS[data], wheels) for data in options.data}
    for data, package in packages.items():
        machine, start = facts("cpu"), time.perf_counter()
        root, run = runs / data, runs / data / "run"
        objects = WRITERS[data](package, root)
        command("train.py", *COMMON, *RECIPES[data], f"data.root={root}", f"dir={run}", *options.overrides)
        found = json.loads(command("eval.py", f"checkpoint={run}", "runtime.device=cpu").splitlines()[-1])
        row = {
            "data": data,
            **{f"{split}_objects": count for split, count in objects.items()},
            "updates": read_rows(run / "summary.csv")[-1]["step"],
            **{name: rounded(found[name]) if name in found else None for name in FIGURES},  # trees have no masks
            "seconds": round(time.perf_counter() - start),  # all of it: writing, training, evaluation
        }
        append(options.output, machine | row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
