"""Mapillary Vistas 1.2, with 65 classes, as it is published.

`ROOT/{training,validation}/images` and, beside that or below `v1.2`, `labels` and `panoptic` with `panoptic_2018.json`;
`ROOT/config.json` or `config_v1.2.json` has the names of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinat.data.coco import CocoPanoptic
from dinat.data.folders import existing_root, first_existing, refuse_other_classes, split_names
from dinat.data.masks import IGNORED, SemanticFolder
from dinat.errors import UserError
from dinat.files import read_json


class MapillarySemantic(SemanticFolder):
    """The classes that config.json marks for evaluation; pixels of others count nowhere.

    Args:
        root, split: as of `SemanticFolder`.
        classes: of the training data, which must be the same.
    """

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] | None = None) -> None:
        root = existing_root(root)
        file = first_existing([root / "config_v1.2.json", root / "config.json"], "names of the classes")
        try:
            labels = [(label["readable"], label["evaluate"]) for label in read_json(file)["labels"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: no list 'labels' with readable and evaluate of each: {error!r}") from error
        names = [name for name, evaluated in labels if evaluated]
        refuse_other_classes(str(file), names, classes)
        places = [root / split / place for split in split_names(split) for place in ("v1.2/labels", "labels")]
        masks = first_existing(places, f"{split}: folder of labels").relative_to(root)
        super().__init__(root, split, images=f"{masks.parts[0]}/images", masks=str(masks), classes=names)
        counts = iter(range(len(names)))
        self.values = {value: next(counts) if evaluated else IGNORED for value, (_, evaluated) in enumerate(labels)}


class MapillaryPanoptic(CocoPanoptic):
    """Segments of all classes. Arguments as of `CocoPanoptic`.

    The JSON files have heights for widths (https://github.com/mapillary/mapillary_vistas/issues/16); images tell.
    """

    annotation_files = ("{split}/v1.2/panoptic/panoptic_2018.json", "{split}/panoptic/panoptic_2018.json")
    image_folders = ("{split}/images",)
    sizes_hold = False

    def _png_folders(self) -> list[Path]:
        return [self.root / self.segments if self.segments else self.file.parent]
