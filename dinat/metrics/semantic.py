"""Mean intersection over union, from the confusion matrix of all pixels (not a mean over images)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dinat.distributed import ALONE, World
from dinat.metrics import class_rows

IGNORED = 255  # of target maps


class SemanticMetric:
    """mIoU as in mmsegmentation and detectron2: over the classes that occur in the targets or in the predictions.

    Args:
        classes: names, in the order of the labels.
    """

    labels: ClassVar[dict[str, str]] = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """Counts `semantic` maps (H, W) of labels; 255 in a target counts nowhere.

        Raises:
            ValueError: for maps of different sizes.
        """
        count = len(self.classes)
        for prediction, target in zip(predictions, targets, strict=True):
            predicted, wanted = (
                prediction["semantic"].long(),
                target["semantic"].to(prediction["semantic"].device).long(),
            )
            if predicted.shape != wanted.shape:
                raise ValueError(f"a prediction of {[*predicted.shape]} pixels for a target of {[*wanted.shape]}")
            pairs = (wanted * count + predicted)[wanted != IGNORED]
            self.confusion += torch.bincount(pairs, minlength=count**2).view(count, count).cpu()

    def compute(self, world: World = ALONE) -> dict[str, float]:
        """`miou`, and the accuracies over pixels (`pixel_accuracy`) and over classes (`class_accuracy`)."""
        confusion = self.confusion_matrix(world).double()
        return {
            "miou": _percent(_iou(confusion).nanmean()),
            "pixel_accuracy": _percent(confusion.diagonal().sum() / confusion.sum()),
            "class_accuracy": _percent(_recall(confusion).nanmean()),
        }

    def per_class(self, world: World = ALONE) -> list[dict[str, Any]]:
        """IoU, accuracy and pixels of each class; None for a figure of a class that does not occur."""
        matrix = self.confusion_matrix(world)
        figures = {"iou": _iou(matrix.double()), "accuracy": _recall(matrix.double())}
        columns = {name: (100 * values).tolist() for name, values in figures.items()}
        return class_rows(self.classes, columns | {"pixels": matrix.sum(1).tolist()})

    def confusion_matrix(self, world: World = ALONE) -> Tensor:
        """(num_classes, num_classes) int64: how many pixels of class i were predicted as class j."""
        return torch.stack(world.gather(self.confusion)).sum(0)


def _iou(confusion: Tensor) -> Tensor:
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def _recall(confusion: Tensor) -> Tensor:
    return confusion.diagonal() / confusion.sum(1)


def _percent(value: Tensor) -> float:
    return 100 * float(value)
