"""From the queries of Mask2Former and OneFormer to predictions, in the original's order of steps.

Masks are brought to the padded images' size, cut to the image, and resized to the original image, all bilinearly;
then classes and masks are combined. (transformers' own functions resize masks to 384 x 384 first.)

Everywhere, `logits` are (queries, num_classes + 1), the last for "no object", and `masks` logits (queries, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from .model import resize


def fit_masks(masks: Tensor, padded: tuple[int, int], frame: tuple[int, int], size: tuple[int, int] | None) -> Tensor:
    """Mask logits of any resolution for an image of `frame`, padded to `padded`, resized to `size` unless None."""
    masks = resize(masks[None].float(), padded)[..., : frame[0], : frame[1]]
    return (masks if size is None else resize(masks, size))[0]


def semantic(logits: Tensor, masks: Tensor) -> Tensor:
    """Scores of the classes (num_classes, h, w): of all queries, class probability times mask."""
    return torch.einsum("qc,qhw->chw", logits.float().softmax(-1)[:, :-1], masks.sigmoid())


def panoptic(
    logits: Tensor, masks: Tensor, things: Sequence[bool], object_threshold: float, overlap_threshold: float
) -> tuple[Tensor, list[dict]]:
    """int32 (h, w) of segment ids from 1, 0 for none, and the segments: dicts of id, label, isthing and score.

    Args:
        things: whether a class has instances; segments of one class that has not are one.
        object_threshold: queries with a lower score are dropped.
        overlap_threshold: and those of which less than this share is in front of the others.
    """
    scores, labels = logits.float().softmax(-1).max(-1)
    keep = (labels != logits.shape[-1] - 1) & (scores > object_threshold)
    scores, labels, masks = scores[keep], labels[keep], masks[keep].sigmoid()
    out = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
    if not len(masks):
        return out, []
    front = (scores[:, None, None] * masks).argmax(0)
    segments: list[dict] = []
    stuff: dict[int, int] = {}  # label -> id
    for i, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
        whole, visible = masks[i] >= 0.5, front == i
        mask = whole & visible
        if not mask.any() or visible.sum().item() / whole.sum().item() < overlap_threshold:
            continue
        if label not in stuff:
            segments.append({"id": len(segments) + 1, "label": label, "isthing": bool(things[label]), "score": score})
            if not things[label]:
                stuff[label] = len(segments)
        out[mask] = stuff.get(label, len(segments))
    return out, segments


def instances(logits: Tensor, masks: Tensor, things: Sequence[bool], count: int) -> dict[str, Tensor]:
    """The `count` best pairs of query and class, of which those of things: boxes, scores, labels and masks.

    The score is the class's probability times the mean of the mask's within the mask.
    """
    probabilities = logits.float().softmax(-1)[:, :-1]
    scores, indices = probabilities.flatten().topk(min(count, probabilities.numel()))
    labels = indices % probabilities.shape[1]
    of_things = torch.tensor(things, device=labels.device)[labels]
    scores, labels, queries = scores[of_things], labels[of_things], indices[of_things] // probabilities.shape[1]
    masks = masks[queries]
    inside = masks > 0
    weights = inside.flatten(1).float()
    quality = (masks.sigmoid().flatten(1) * weights).sum(1) / (weights.sum(1) + 1e-6)
    boxes = masks.new_zeros(len(masks), 4)
    some = inside.flatten(1).any(1)
    boxes[some] = masks_to_boxes(inside[some]).to(boxes) + boxes.new_tensor([0, 0, 1, 1])  # of whole pixels
    return {"boxes": boxes, "scores": scores * quality, "labels": labels, "masks": inside}
