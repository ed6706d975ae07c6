"""A class for each pixel, and which object it belongs to: panoptic quality."""

from __future__ import annotations

from typing import Any, ClassVar

from dinat.data.ade20k import Ade20kPanoptic
from dinat.data.cityscapes import CityscapesPanoptic
from dinat.data.coco import CocoPanoptic
from dinat.data.mapillary import MapillaryPanoptic
from dinat.data.scenes import PanopticScenes
from dinat.metrics.panoptic import PanopticMetric
from dinat.tasks.dense import DenseTask


class Panoptic(DenseTask):
    """Panoptic segmentation."""

    name = "panoptic"
    headline = "pq"
    hub_task = "image-segmentation"
    labels = PanopticMetric.labels
    readers: ClassVar = {
        "digit_scenes": PanopticScenes,
        "coco_panoptic": CocoPanoptic,
        "ade20k": Ade20kPanoptic,
        "cityscapes": CityscapesPanoptic,
        "mapillary": MapillaryPanoptic,
    }

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "things": list(self.val_set.things)}

    def metric(self, confusion: bool = False) -> PanopticMetric:
        return PanopticMetric(self.classes, self.val_set.things)
