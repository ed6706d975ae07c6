"""Average precision against pycocotools on made-up detections with crowds and areas that are not the masks'."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch

from dinat.metrics.detection import STATS, DetectionMetric

CLASSES, SIZE = ["ant", "bee", "cat"], (90, 120)


class Gathered:
    """The processes of a job, of which this is one: what each of them would hand over."""

    def __init__(self, *metrics):
        self.metrics = metrics

    def gather(self, value):
        return [metric.images for metric in self.metrics]


def made_up(seed, images=12):
    """Predictions and targets of images: objects found well, badly, twice or not at all, and false alarms."""
    random = np.random.default_rng(seed)
    predictions, targets = [], []
    for image_id in random.permutation(1000)[:images]:
        objects = np.sort(random.uniform(0, 1, (random.integers(0, 7), 2, 2)), 1) * SIZE[::-1]
        objects[:, 1] = np.maximum(objects[:, 1], objects[:, 0] + 2)
        boxes = torch.from_numpy(objects.reshape(-1, 4)).float()
        labels = torch.from_numpy(random.integers(0, 3, len(boxes)))
        targets.append({
            "image_id": int(image_id),
            "boxes": boxes,
            "labels": labels,
            "masks": ellipses(boxes),
            "iscrowd": torch.from_numpy(random.random(len(boxes)) < 0.2),
            "area": torch.from_numpy(random.choice([500.0, 4000.0, 20000.0], len(boxes))).float(),
        })  # fmt: skip
        noise = torch.from_numpy(random.normal(0, 4, (2 * len(boxes) + 2, 4))).float()
        found = torch.cat([boxes, boxes, torch.tensor([[5.0, 5, 40, 40], [50, 20, 90, 80]])]) + noise
        found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 2)
        labels = torch.cat([labels, torch.from_numpy(random.integers(0, 3, len(labels) + 2))])
        scores = torch.from_numpy(random.permutation(len(found)) / len(found) + image_id * 1e-5)  # no ties
        predictions.append({"boxes": found, "labels": labels, "scores": scores, "masks": ellipses(found)})
    return predictions, targets


def ellipses(boxes):
    """Ellipses inscribed in boxes, bool (N, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    across = (columns - (left + right) / 2) / (right - left) * 2
    down = (rows - (top + bottom) / 2) / (bottom - top) * 2
    return across**2 + down**2 <= 1


def by_pycocotools(predictions, targets, kind):
    """The twelve figures, and the precision array, of the original implementation."""
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def record(result, index):
        left, top, right, bottom = result["boxes"][index].double().tolist()
        encoded = mask.encode(np.asfortranarray(result["masks"][index].numpy().astype(np.uint8)))
        shape = {"bbox": [left, top, right - left, bottom - top]} if kind == "bbox" else {"segmentation": encoded}
        return {**shape, "category_id": int(result["labels"][index])}

    annotations, found = [], []
    for prediction, target in zip(predictions, targets, strict=True):
        about = {"image_id": target["image_id"]}
        for index in range(len(target["boxes"])):
            counted = {"iscrowd": int(target["iscrowd"][index]), "area": float(target["area"][index])}
            annotations.append({**about, **record(target, index), **counted, "id": len(annotations) + 1})
        for index in range(len(prediction["boxes"])):
            found.append({**about, **record(prediction, index), "score": float(prediction["scores"][index])})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": target["image_id"], "height": SIZE[0], "width": SIZE[1]} for target in targets],
            "categories": [{"id": label} for label in range(3)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@pytest.fixture(scope="module")
def counted():
    predictions, targets = made_up(0)
    metric = DetectionMetric(CLASSES)
    metric.update(predictions, targets)
    return metric, predictions, targets


@pytest.mark.parametrize(("kind", "theirs"), [("box", "bbox"), ("mask", "segm")])
def test_figures_are_those_of_pycocotools(counted, kind, theirs):
    metric, predictions, targets = counted
    stats, precision = by_pycocotools(predictions, targets, theirs)
    figures = metric.compute()
    assert 5 < figures[f"{kind}_ap"] < 90
    assert [figures[f"{kind}_{name}"] for name in STATS] == pytest.approx(list(100 * stats), abs=1e-9)
    for label, row in enumerate(metric.per_class()):
        assert (row["class"], row["name"]) == (label, CLASSES[label])
        assert row[f"{kind}_ap"] == pytest.approx(100 * precision[:, :, label, 0, 2].mean(), abs=1e-9)
        assert row[f"{kind}_ap50"] == pytest.approx(100 * precision[0, :, label, 0, 2].mean(), abs=1e-9)


def test_processes_give_the_figures_of_one(counted):
    metric, predictions, targets = counted
    parts = [DetectionMetric(CLASSES) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.update(predictions[rank::2], targets[rank::2])
    assert metric.compute() == pytest.approx(parts[0].compute(Gathered(*parts)), abs=0, nan_ok=True)
    with pytest.raises(ValueError, match="counted by two processes"):
        metric.compute(Gathered(metric, parts[1]))
    with pytest.raises(ValueError, match="is counted twice"):
        metric.update(predictions[:1], targets[:1])


def test_boxes_alone(counted):
    _, predictions, targets = counted
    metric = DetectionMetric(CLASSES, masks=False)
    bare = [{key: value for key, value in target.items() if key != "masks"} for target in targets]
    metric.update([{**prediction, "masks": None} for prediction in predictions], bare)
    assert metric.compute()["box_ap"] == counted[0].compute()["box_ap"]
    assert not any(name.startswith("mask") for name in metric.compute())


def test_nothing_found_is_zero_and_nothing_there_is_nan():
    masks = torch.ones(1, 8, 8, dtype=torch.bool)
    boxes, labels = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([1])
    nothing = {"boxes": boxes[:0], "labels": labels[:0], "scores": torch.zeros(0), "masks": masks[:0]}
    target = {"image_id": 3, "boxes": boxes, "labels": labels, "masks": masks}
    metric = DetectionMetric(CLASSES)
    metric.update([nothing], [target])
    assert metric.compute()["mask_ap"] == metric.compute()["box_ap"] == 0
    rows = metric.per_class()
    assert rows[0]["box_ap"] is None
    assert rows[1]["box_ap"] == 0
    metric = DetectionMetric(CLASSES)
    metric.update([nothing], [{**nothing, "image_id": 3}])
    assert all(math.isnan(value) for value in metric.compute().values())
