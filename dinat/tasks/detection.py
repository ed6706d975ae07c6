"""Boxes around objects, and their masks: average precision as COCO defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinat import dense
from dinat.data.ade20k import Ade20kInstances
from dinat.data.cityscapes import CityscapesInstances
from dinat.data.coco import CocoObjects
from dinat.data.scenes import DetectionScenes
from dinat.errors import UserError
from dinat.metrics.detection import DetectionMetric
from dinat.tasks.dense import DenseTask
from dinat.tasks.task import Origin


class Detection(DenseTask):
    """Detection, and instance segmentation where the data has masks.

    Models that were trained for all segments are evaluated too: their things, in the order of their labels, are the
    data's classes.

    Attributes:
        label_of_thing: of such a model, the data's label of each of its own, -1 of stuff.
    """

    label_of_thing: Tensor | None = None

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

    def open_validation(self, origin: Origin) -> None:
        things = self.things_among_segments(origin)
        if things is None:
            return super().open_validation(origin)
        names = [name for name, thing in zip(origin.classes, things, strict=True) if thing] if origin.classes else None
        self.val_set = self.read("validation", classes=names)
        self.classes, self.num_classes = list(self.val_set.classes), len(things)
        if len(self.classes) != sum(things):
            raise UserError(
                f"class counts differ: {self.full_name()} has {sum(things)} classes of things, the data "
                f"{len(self.classes)}. Evaluate on the data that the model was trained for."
            )
        of_things = torch.tensor(things)
        self.label_of_thing = torch.where(of_things, of_things.cumsum(0) - 1, -1)

    def things_among_segments(self, origin: Origin) -> Sequence[bool] | None:
        """Which classes of the model are things, where it was trained for all segments."""
        name = self.model["name"]
        of_its_own = origin.classes and name in dense.PUBLISHED  # a run that began with the published model
        return None if of_its_own else dense.things_of(name)

    def predict(self, *arguments: Any) -> list[dict]:
        found = super().predict(*arguments)
        if self.label_of_thing is None:
            return found
        return [one | {"labels": self.label_of_thing.to(one["labels"].device)[one["labels"]]} for one in found]

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
