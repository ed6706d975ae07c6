"""Boxes around objects, and their masks: average precision as COCO defines it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from dinat.data.ade20k import Ade20kInstances
from dinat.data.cityscapes import CityscapesInstances
from dinat.data.coco import CocoObjects
from dinat.data.scenes import DetectionScenes
from dinat.errors import UserError
from dinat.metrics.detection import DetectionMetric
from dinat.tasks.dense import DenseTask


class Detection(DenseTask):
    """Detection, and instance segmentation where the data has masks."""

    name = "detection"
    headline = "box_ap"
    hub_task = "object-detection"
    labels = DetectionMetric.labels
    readers: ClassVar = {
        "digit_scenes": DetectionScenes,
        "coco": CocoObjects,
        "ade20k": Ade20kInstances,
        "cityscapes": CityscapesInstances,
    }

    def build_model(self) -> nn.Module:
        model = super().build_model()
        if getattr(model, "mask_heads", None) and not getattr(self.train_set, "masks", True):
            raise UserError(
                f"model.kwargs.masks=true: {self.train_set.file} has boxes only. Set ++model.kwargs.masks=false."
            )
        return model

    def metric(self, confusion: bool = False) -> DetectionMetric:
        masks = self.arguments().get("masks", True)  # whether the model has any
        return DetectionMetric(self.classes, masks=masks and getattr(self.val_set, "masks", True))
