"""benchmarks/real_photographs.py: the tiles have what the pictures have, and can be trained on. Needs the wheels:

pip install --no-deps --target FOLDER deepforest==2.1.0 stardist==0.9.2
DINAT_REAL_DATA=FOLDER pytest tests/test_real_photographs.py
"""

import csv
import importlib
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dinat.data.coco import CocoObjects

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPLITS = ("train", "validation")


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("real_photographs")


@pytest.fixture
def package(script):
    """Finds the folder of a data set's package, or skips the test."""

    def package(data):
        found = script.find(script.WHEELS[data], [os.environ.get("DINAT_REAL_DATA", "."), *sys.path])
        if found is None:
            pytest.skip(f"{script.WHEELS[data]} is neither in DINAT_REAL_DATA nor installed")
        return found

    return package


def opened(root):
    """split -> all (file name, target) of it as the project's reader gives them; there are images, not black."""
    sets = {split: CocoObjects(root, split) for split in SPLITS}
    for images in sets.values():
        assert all(image.float().std() > 1 for image, _ in images)
    return {split: [(images.filename(i), images[i][1]) for i in range(len(images))] for split, images in sets.items()}


def test_trees(script, package, tmp_path):
    folder = package("trees")
    counts = script.write_trees(folder, tmp_path)
    for split, tiles in opened(tmp_path).items():
        boxes = ElementTree.parse(folder / "data" / f"{script.TREES[split]}.xml").findall("object/bndbox")
        assert counts[split] == len(boxes) == sum(int((~target["iscrowd"]).sum()) for _, target in tiles)
        area = sum(
            (int(box.findtext("xmax")) - int(box.findtext("xmin")) + 1)
            * (int(box.findtext("ymax")) - int(box.findtext("ymin")) + 1)
            for box in boxes
        )
        assert sum(float(target["area"].sum()) for _, target in tiles) == area  # with the crowds, nothing is lost


def test_nuclei(script, package, tmp_path):
    folder = package("nuclei")
    counts = script.write_nuclei(folder, tmp_path)
    numbers = np.asarray(Image.open(folder / "data" / "images" / "mask2d.tif"))
    tiles = [tile for tiles in opened(tmp_path).values() for tile in tiles]
    assert sum(counts.values()) == len(np.unique(numbers)) - 1
    assert sum(int((~target["iscrowd"]).sum()) for _, target in tiles) == sum(counts.values())
    covered = np.zeros_like(numbers, bool)
    for name, target in tiles:
        left, top = map(int, Path(name).stem.split("_"))
        masks = target["masks"].numpy()
        assert (masks.sum(0) <= 1).all()
        covered[top : top + masks.shape[1], left : left + masks.shape[2]] = masks.any(0)
    assert (covered == (numbers > 0)).all()


def test_objects_are_cut_where_tiles_end(script):
    """A picture of 2 x 1 tiles: a box within one, one across the border, and what the smaller part of it becomes."""
    left, right = script.cut((200, 500), [[10, 20, 40, 50], [230, 0, 260, 10]], script.part_of_box).items()
    assert (left[0], right[0]) == ((0, 0, 250, 200), (250, 0, 500, 200))
    assert [(one["bbox"], one["iscrowd"]) for one in left[1]] == [([10, 20, 30, 30], 0), ([230, 0, 20, 10], 0)]
    assert [(one["bbox"], one["iscrowd"]) for one in right[1]] == [([0, 0, 10, 10], 1)]
    mask = np.zeros((200, 500), bool)
    mask[5:9, 240:255] = True
    left, right = script.cut(mask.shape, [mask], script.part_of_mask).values()
    assert [(one["bbox"], one["area"], one["iscrowd"]) for one in left + right] == [
        ([240, 5, 10, 4], 40, 0), ([0, 5, 5, 4], 20, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("data", ["trees", "nuclei"])
def test_two_updates(script, package, tmp_path, data):
    output = tmp_path / "rows.csv"
    arguments = ["--data", data, "--wheels", package(data).parent, "--runs", tmp_path, "--output", output]
    script.main([*map(str, arguments), "--overrides", "scheduler.updates=2", "batch_size=2"])
    (row,) = csv.DictReader(output.open())
    assert (row["data"], row["updates"]) == (data, "2")
    assert float(row["box_ap"]) >= 0
    assert (row["mask_ap"] == "") == (data == "trees")


def test_what_is_missing_is_told(script, tmp_path, monkeypatch, capsys):
    """An index without packages stands in for a machine without network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SystemExit) as stop:
        script.find_or_fetch(script.WHEELS["nuclei"], tmp_path)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: stardist==0.9.2 is neither in {tmp_path} nor installed, and pip does not get it: ")
