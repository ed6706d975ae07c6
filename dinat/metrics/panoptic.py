"""Panoptic quality (arXiv:1801.00868), by the protocol of COCO's panopticapi.

torchmetrics' PanopticQuality forgives a missed segment where the prediction is void, so it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from dinat.distributed import ALONE, World
from dinat.metrics import class_rows

VOID = 0  # in maps of segment ids: no segment
OFFSET = 1 << 32  # larger than any segment id


class PanopticMetric:
    """PQ, SQ and RQ, averaged over the classes that occur, and over things and stuff alone.

    Segments match where they are of one class and their IoU, void pixels of the target set aside, exceeds 1/2. An
    unmatched prediction counts for nothing if more than half of it is void or a crowd of its class in the target; a
    crowd is never missed.

    Args:
        classes: names, in the order of the labels.
        things: which of them are things.
    """

    labels: ClassVar[dict[str, str]] = {"pq": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff"}

    def __init__(self, classes: Sequence[str], things: Sequence[bool]) -> None:
        self.classes, self.things = list(classes), np.array(things, bool)
        self.counts = np.zeros((len(classes), 4))  # sum of IoUs, matches, unmatched predictions, missed segments

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """Matches the segments of each image.

        Predictions are `panoptic` (H, W), ids of segments or 0, and `segments`, dicts with `id` and `label`; targets
        are `panoptic`, `segment_ids`, `labels` and `iscrowd`.

        Raises:
            ValueError: for maps of different sizes, or ids of a map that no segment has.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            wanted = dict(zip(target["segment_ids"].tolist(), target["labels"].tolist(), strict=True))
            crowds = set(target["segment_ids"][target["iscrowd"].bool()].tolist())
            found = {segment["id"]: segment["label"] for segment in prediction["segments"]}
            maps = [one["panoptic"].cpu().numpy().astype(np.int64) for one in (target, prediction)]
            self.counts += count_segments(*maps, wanted, found, crowds, len(self.classes))

    def compute(self, world: World = ALONE) -> dict[str, float]:
        """`pq`, `sq`, `rq`, and the same over things (`pq_things`, ...) and stuff (`pq_stuff`, ...)."""
        qualities, occurs = self._qualities(world)
        groups = {"": occurs, "_things": occurs & self.things, "_stuff": occurs & ~self.things}
        return {
            f"{name}{suffix}": 100 * float(column[group].mean()) if group.any() else float("nan")
            for suffix, group in groups.items()
            for name, column in zip(("pq", "sq", "rq"), qualities.T, strict=True)
        }

    def per_class(self, world: World = ALONE) -> list[dict[str, Any]]:
        """Whether it is a thing, PQ, SQ and RQ of each class; None for a class that does not occur."""
        qualities, occurs = self._qualities(world)
        qualities[~occurs] = np.nan
        columns = zip(("pq", "sq", "rq"), (100 * qualities).T.tolist(), strict=True)
        return class_rows(self.classes, {"thing": self.things.tolist(), **dict(columns)})

    def _qualities(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """PQ, SQ, RQ of each class, (K, 3), and whether it occurs at all, (K,)."""
        iou, matched, unmatched, missed = sum(world.gather(self.counts)).T
        occurs = matched + unmatched + missed > 0
        sq = iou / np.maximum(matched, 1)
        rq = matched / np.where(occurs, matched + unmatched / 2 + missed / 2, 1)
        return np.stack([sq * rq, sq, rq], axis=1), occurs


def count_segments(
    wanted_map: np.ndarray, found_map: np.ndarray, wanted: dict[int, int], found: dict[int, int], crowds: set[int],
    num_classes: int,
) -> np.ndarray:  # fmt: skip
    """Sum of IoUs, matches, unmatched predictions and missed segments of one image by class, (num_classes, 4).

    Args:
        wanted_map, found_map: segment ids (H, W), 0 where there is none.
        wanted, found: segment id -> label.
        crowds: ids of wanted segments that are crowds.
    """
    if wanted_map.shape != found_map.shape:
        raise ValueError(f"a prediction of {[*found_map.shape]} pixels for a target of {[*wanted_map.shape]}")
    pairs, sizes = np.unique(wanted_map * OFFSET + found_map, return_counts=True)
    shared = {divmod(int(pair), OFFSET): int(size) for pair, size in zip(pairs, sizes, strict=True)}
    area: dict[tuple[str, int], int] = {}
    for (of_wanted, of_found), size in shared.items():
        for key in (("wanted", of_wanted), ("found", of_found)):
            area[key] = area.get(key, 0) + size
    for side, known in (("wanted", wanted), ("found", found)):
        if unknown := {number for one, number in area if one == side} - {VOID, *known}:
            raise ValueError(f"the {side} map has ids {sorted(unknown)[:5]}, which no segment has")

    counts = np.zeros((num_classes, 4))
    matched_wanted, matched_found = set(), set()
    for (of_wanted, of_found), intersection in shared.items():
        if VOID in (of_wanted, of_found) or of_wanted in crowds or wanted[of_wanted] != found[of_found]:
            continue
        union = area["wanted", of_wanted] + area["found", of_found] - intersection - shared.get((VOID, of_found), 0)
        if intersection / union > 0.5:
            counts[wanted[of_wanted], :2] += intersection / union, 1
            matched_wanted.add(of_wanted)
            matched_found.add(of_found)

    crowd_of = {
        label: number for number, label in wanted.items() if number in crowds
    }  # the last one, as in panopticapi
    for number, label in found.items():
        excused = shared.get((VOID, number), 0) + shared.get((crowd_of.get(label), number), 0)
        if number not in matched_found and not excused > area.get(("found", number), 0) / 2:
            counts[label, 2] += 1
    for number, label in wanted.items():
        if number not in matched_wanted | crowds:
            counts[label, 3] += 1
    return counts
