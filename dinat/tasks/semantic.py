"""A class for each pixel: mean intersection over union."""

from __future__ import annotations

from typing import ClassVar

from dinat.data.ade20k import Ade20kSemantic
from dinat.data.cityscapes import CityscapesSemantic
from dinat.data.coco import CocoSemantic
from dinat.data.mapillary import MapillarySemantic
from dinat.data.masks import SemanticFolder
from dinat.data.scenes import SemanticScenes
from dinat.metrics.semantic import SemanticMetric
from dinat.tasks.dense import DenseTask


class Semantic(DenseTask):
    """Semantic segmentation."""

    name = "semantic"
    headline = "miou"
    hub_task = "image-segmentation"
    averages = True
    labels = SemanticMetric.labels
    readers: ClassVar = {
        "digit_scenes": SemanticScenes,
        "masks": SemanticFolder,
        "coco_panoptic": CocoSemantic,
        "ade20k": Ade20kSemantic,
        "cityscapes": CityscapesSemantic,
        "mapillary": MapillarySemantic,
    }

    def check_details(self, *, per_class: bool, confusion: bool) -> None:
        """Both can be had."""

    def metric(self, confusion: bool = False) -> SemanticMetric:
        return SemanticMetric(self.classes)
