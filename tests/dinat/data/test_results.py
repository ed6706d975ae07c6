"""COCO's result files, read by other libraries."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from dinat.data.coco import read_ids
from dinat.data.results import write_detections, write_panoptic


def test_detections_are_read_by_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    masks = torch.zeros(2, 8, 9, dtype=torch.bool)
    masks[0, 2:5, 3:7] = True
    masks[1, 6:, :1] = True
    found = {
        "boxes": torch.tensor([[3.0, 2, 7, 5], [0, 6, 1.5, 8]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([1, 0]),
        "masks": masks,
    }
    nothing = {key: value[:0] for key, value in found.items()}
    write_detections(tmp_path / "found.json", [(42, "a.jpg", found), (7, "b.jpg", nothing)], category_ids=[7, 90])
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        data.dataset = {"images": [{"id": 42, "height": 8, "width": 9}], "categories": [{"id": 7}, {"id": 90}]}
        data.createIndex()
        read = data.loadRes(str(tmp_path / "found.json"))
    first, second = read.loadAnns(read.getAnnIds())
    assert (first["image_id"], first["category_id"], first["bbox"], first["score"]) == (42, 90, [3, 2, 4, 3], 0.5)
    assert (second["category_id"], second["bbox"]) == (7, [0, 6, 1.5, 2])
    assert np.array_equal(read.annToMask(first), masks[0])
    assert np.array_equal(read.annToMask(second), masks[1])


def test_boxes_alone(tmp_path):
    found = {"boxes": torch.ones(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64)}
    write_detections(tmp_path / "found.json", [(1, "a.jpg", found)], category_ids=[3])
    assert json.loads((tmp_path / "found.json").read_text()) == [
        {"image_id": 1, "file_name": "a.jpg", "category_id": 3, "bbox": [1, 1, 0, 0], "score": 1}
    ]


def test_panoptic_results(tmp_path):
    ids = torch.tensor([[1, 300], [70000, 0]], dtype=torch.int32)
    segments = [{"id": number, "label": label} for number, label in ((1, 0), (300, 1), (70000, 1))]
    found = {"panoptic": ids, "segments": segments}
    write_panoptic(tmp_path / "found.json", [(42, "street/a.jpg", found)], category_ids=[7, 90])
    (annotation,) = json.loads((tmp_path / "found.json").read_text())["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (42, "a.png")
    assert annotation["segments_info"] == [
        {"id": 1, "category_id": 7}, {"id": 300, "category_id": 90}, {"id": 70000, "category_id": 90},
    ]  # fmt: skip
    assert np.array_equal(read_ids(tmp_path / "found/a.png"), ids)
