"""Average precision of boxes and instance masks as COCO defines it, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from dinat import rle
from dinat.distributed import ALONE, World
from dinat.metrics import class_rows

KINDS = {"box": "bbox", "mask": "segm"}  # our words: COCO's
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar", "ar_small", "ar_medium",
         "ar_large")  # fmt: skip


class Image(NamedTuple):
    """What is counted of an image, as COCO's records: size (height, width), what is there and what was found."""

    size: tuple[int, int]
    objects: list[dict[str, Any]]
    detections: list[dict[str, Any]]


class DetectionMetric:
    """AP and AR of at most 100 detections per image, crowds and areas as in the targets.

    Masks are kept run-length encoded, boxes in COCO's (left, top, width, height).

    Args:
        classes: names, in the order of the labels.
        masks: whether masks are scored beside boxes.
    """

    labels: ClassVar[dict[str, str]] = {
        "box_ap": "box AP",
        "box_ap50": "box AP50",
        "box_ap75": "box AP75",
        "mask_ap": "mask AP",
        "mask_ap50": "mask AP50",
        "mask_ap75": "mask AP75",
    }

    def __init__(self, classes: Sequence[str], masks: bool = True) -> None:
        self.classes = list(classes)
        self.kinds = ("box", "mask") if masks else ("box",)
        self.images: dict[int | str, Image] = {}

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """Keeps what was found (`boxes`, `scores`, `labels`, `masks`) and what is there, image by image.

        Targets have `image_id`, `boxes`, `labels` and, where given, `masks`, `iscrowd` and `area`; both are in the
        frame of the original image.

        Raises:
            ValueError: for an image that was counted before.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            image = target["image_id"]
            if image in self.images:
                raise ValueError(f"image {image} is counted twice")
            objects = self._records(target)
            crowds = target["iscrowd"].tolist() if "iscrowd" in target else [False] * len(objects)
            areas = target["area"].tolist() if "area" in target else [box[2] * box[3] for box in _boxes(target)]
            for record, crowd, area in zip(objects, crowds, areas, strict=True):
                record |= {"iscrowd": int(crowd), "area": area}
            detections = self._records(prediction)
            for record, score in zip(detections, prediction["scores"].tolist(), strict=True):
                record["score"] = score
            size = tuple(target["masks"].shape[-2:]) if "mask" in self.kinds else (0, 0)
            self.images[image] = Image(size, objects, detections)

    def compute(self, world: World = ALONE) -> dict[str, float]:
        """`box_ap`, `box_ap50`, `box_ap75`, by size (`_small`, ...), `box_ar` (of 100), ..., and of masks alike.

        nan where there is no object of that size.
        """
        return {
            f"{kind}_{name}": _percent(value)
            for kind, evaluation in self._evaluate(world).items()
            for name, value in zip(STATS, evaluation.stats[: len(STATS)], strict=True)
        }

    def per_class(self, world: World = ALONE) -> list[dict[str, Any]]:
        """AP and AP50 of each kind for each class; None for a class without objects."""
        columns = {}
        for kind, evaluation in self._evaluate(world).items():
            precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class), all sizes, 100 detections
            for name, part in {"ap": precision, "ap50": precision[:1]}.items():
                # -1 everywhere for a class without objects, and nowhere for another
                columns[f"{kind}_{name}"] = [_percent(value) for value in part.mean(axis=(0, 1))]
        return class_rows(self.classes, columns)

    def _records(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        records = [
            {"bbox": box, "category_id": label}
            for box, label in zip(_boxes(result), result["labels"].tolist(), strict=True)
        ]
        if "mask" in self.kinds:
            for record, mask in zip(records, rle.encode(result["masks"]), strict=True):
                record["segmentation"] = mask
        return records

    def _evaluate(self, world: World) -> dict[str, Any]:
        """A finished COCOeval for each kind, over the images of all processes."""
        images: dict[int | str, Image] = {}
        for share in world.gather(self.images):
            if twice := images.keys() & share.keys():
                raise ValueError(f"image {next(iter(twice))} is counted by two processes")
            images |= share
        # equal scores are ranked by the order, so it must not depend on the division of the images
        order = sorted(images, key=lambda image: (isinstance(image, str), image))
        return {kind: self._evaluate_kind(kind, [images[image] for image in order]) for kind in self.kinds}

    def _evaluate_kind(self, kind: str, images: Sequence[Image]) -> Any:
        library = rle.coco_eval()
        shape = "bbox" if kind == "box" else "segmentation"
        objects = [{**record, "image_id": number} for number, image in enumerate(images) for record in image.objects]
        detections = [
            {"image_id": number, "category_id": record["category_id"], "score": record["score"], shape: record[shape]}
            for number, image in enumerate(images)
            for record in image.detections
        ]
        sizes = [{"id": number, "height": image.size[0], "width": image.size[1]} for number, image in enumerate(images)]
        truth = library.COCO({
            "images": sizes,
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.classes)],
            "annotations": [{**record, "id": number} for number, record in enumerate(objects, start=1)],
        })  # fmt: skip
        evaluation = library.COCOeval_faster(truth, truth.loadRes(detections), iouType=KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation


def _boxes(result: dict[str, Any]) -> list[list[float]]:
    boxes: Tensor = result["boxes"].detach().double().cpu().reshape(-1, 4)
    boxes = boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist()


def _percent(value: float) -> float:
    """COCO's -1, where there is nothing to be found, is nan."""
    return 100 * float(value) if value > -1 else float(np.nan)
