"""ADE20K's scene parsing data (ADEChallengeData2016), as published and as prepared for Mask2Former.

`ROOT/images/{training,validation}`, `ROOT/annotations/...` with the semantic maps and `ROOT/objectInfo150.txt` with the
names of the classes are as published; Mask2Former's scripts add `ROOT/ade20k_instance_{train,val}.json`, and
`ROOT/ade20k_panoptic_{train,val}.json` with a folder of PNG files of the same name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinat.data.coco import CocoObjects, CocoPanoptic
from dinat.data.masks import SemanticFolder


class Ade20kSemantic(SemanticFolder):
    """150 classes; 0 in the files is "other", which counts nowhere. Arguments as of `SemanticFolder`."""

    def __init__(self, root: str | Path, split: str, **options: Any) -> None:
        super().__init__(root, split, **{"reduce_zero_label": True, **options})


class Ade20kInstances(CocoObjects):
    """100 classes of things. Arguments as of `CocoObjects`."""

    annotation_files = ("ade20k_instance_{split}.json",)


class Ade20kPanoptic(CocoPanoptic):
    """150 classes, of which 100 are things. Arguments as of `CocoPanoptic`.

    Things were painted over stuff, so some segments of stuff have no pixel left.
    """

    annotation_files = ("ade20k_panoptic_{split}.json",)
    covered = True
