"""Mask R-CNN and Cascade Mask R-CNN on any timm backbone, from torchvision's parts.

Papers: Mask R-CNN - https://arxiv.org/abs/1703.06870, Cascade R-CNN - https://arxiv.org/abs/1906.09756. The published
models were trained with mmdetection, and the numbers here are its: anchors, RoI pooling, final detections and pasting
of masks are our own, since torchvision's differ. Boxes are x1, y1, x2, y2 in pixels of the padded images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    FeaturePyramidNetwork,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dinat.errors import UserError

from .features import Features
from .model import DenseModel, Target


class Anchors(AnchorGenerator):
    """Anchors of exact sizes, around the corner of each cell, at fixed strides."""

    def __init__(self, strides: Sequence[int], scale: float, aspect_ratios: Sequence[float]) -> None:
        self.strides = strides
        super().__init__(tuple((scale * stride,) for stride in strides), (tuple(aspect_ratios),) * len(strides))

    def generate_anchors(
        self, scales: Sequence[float], aspect_ratios: Sequence[float], dtype=torch.float32, device="cpu"
    ) -> Tensor:
        """(anchors, 4) around the origin; ratios are height / width."""
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        widths, heights = ((ratio[:, None] * scales).flatten() for ratio in (1 / roots, roots))
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, maps[0].device)
        strides = [[torch.tensor(s, device=maps[0].device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], strides))
        return [anchors] * len(images.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's, in float32 whatever the precision of the maps: lower ones do not know single pixels."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(maps)
        return [x.float() for x in objectness], [x.float() for x in deltas]


class BestMatcher(Matcher):
    """Assigns each box the object it overlaps most, if by `high_threshold`; and each object the boxes that overlap it
    most, if by `min_quality`, whatever else these overlap.

    Indices of objects; -1 for background, -2 for neither.
    """

    def __init__(self, high_threshold: float, low_threshold: float, min_quality: float | None) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=min_quality is not None)
        self.min_quality = min_quality

    def __call__(self, overlaps: Tensor) -> Tensor:
        """`overlaps` (objects, boxes) to (boxes,)."""
        if not overlaps.numel():
            return torch.full((overlaps.shape[1],), self.BELOW_LOW_THRESHOLD, device=overlaps.device)
        return super().__call__(overlaps)

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, overlaps: Tensor) -> None:
        best = overlaps.max(dim=1).values
        for i, quality in enumerate(best.tolist()):  # a later object takes a box from an earlier one, as originally
            if quality >= self.min_quality:
                matches[overlaps[i] == best[i]] = i


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, with the original's losses and rules on which anchors are trained.

    Args:
        beta: of the smooth L1 loss of boxes; 0 for L1.
        inside: train only anchors that lie within the image, rather than within what the image is padded to.
        size_divisor: of what an image is padded to.
        kwargs: of `RegionProposalNetwork`.
    """

    def __init__(
        self, *args: Any, beta: float, inside: bool, size_divisor: int, min_quality: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.beta, self.inside, self.size_divisor = beta, inside, size_divisor
        self.proposal_matcher = BestMatcher(kwargs["fg_iou_thresh"], kwargs["bg_iou_thresh"], min_quality)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (1 object, 0 background, -1 not trained) and boxes of the anchors of each image.

        Args:
            anchors: (anchors, 4) per image.
            targets: `boxes` (objects, 4) and `frame`, the (height, width) of the image.
        """
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            valid = self._trained(boxes, *target["frame"])
            matches = torch.full((len(boxes),), BestMatcher.BETWEEN_THRESHOLDS, device=boxes.device)
            matches[valid] = self.proposal_matcher(box_iou(target["boxes"], boxes[valid]))
            labels.append((matches >= 0).float() - (matches == BestMatcher.BETWEEN_THRESHOLDS).float())
            truth = target["boxes"] if len(target["boxes"]) else boxes[:1]  # of no image without objects is one used
            matched.append(truth[matches.clamp(min=0)])
        return labels, matched

    def _trained(self, anchors: Tensor, height: int, width: int) -> Tensor:
        if self.inside:
            x1, y1, x2, y2 = anchors.unbind(1)
            return (x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)
        height, width = (-(-side // self.size_divisor) * self.size_divisor for side in (height, width))
        x, y = (anchors[:, :2] + anchors[:, 2:]).unbind(1)  # twice the corner of the cell
        return (x < 2 * width) & (y < 2 * height)

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(x).bool() for x in self.fg_bg_sampler(labels))
        sampled = positive | negative
        count = sampled.sum().clamp(min=1)
        truth = torch.cat(labels)[sampled]
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth, reduction="sum")
        return loss / count, box_loss(deltas[positive], torch.cat(targets)[positive], self.beta) / count


def box_loss(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Smooth L1 loss, summed; L1 if `beta` is 0."""
    return F.smooth_l1_loss(deltas, targets, beta=beta, reduction="sum")


class BoxPredictor(nn.Module):
    """Scores of the classes, background last, and a box for each class but background."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, num_classes * 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(RoIs, width) to logits (RoIs, num_classes + 1) and deltas (RoIs, num_classes, 4)."""
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))


@dataclass(frozen=True)
class Stage:
    """One pass over the RoIs; in training, those that overlap an object by `iou` are its."""

    iou: float
    deviations: tuple[float, float, float, float]  # of box deltas, which the network gives in these units
    weight: float = 1.0  # of its losses


@dataclass
class Samples:
    """The RoIs of one image that a stage is trained on: first `positive` ones of objects, then background."""

    boxes: Tensor  # (n, 4)
    labels: Tensor  # (n,), num_classes for background
    objects: Tensor  # (positive,), index of the object
    given: Tensor  # (n,) bool: the box is an object's own

    @property
    def positive(self) -> int:
        return len(self.objects)


class RCNN(DenseModel):
    """Feature pyramid, proposals, and stages that classify and refine them; the last boxes get masks.

    Args:
        num_classes: of objects.
        backbone: name of a timm model; `backbone_kwargs` are its arguments, see `dinat.dense.features.Features`.
        pretrained_backbone: start from the backbone's pretrained weights.
        masks: whether there are mask heads; without, targets need no masks, and predictions have none.
        fpn_channels: of the feature pyramid and of the proposals' head.
        anchor_scale: side of a square anchor, in cells.
        aspect_ratios: height / width of the anchors.
        box_channels: of the last layers of the box heads; `mask_channels` of the mask heads.
        rpn_samples, roi_samples: anchors and RoIs per image that are trained.
        rpn_keep_train, rpn_keep: proposals per image in training and evaluation; `rpn_top` of each level go into their
            selection, in training `rpn_top_train`.
        rpn_nms, nms: boxes that overlap a better one by more are dropped, among proposals and among detections.
        score_threshold: detections have a higher score.
        detections: of an image, at most.
    """

    tasks = ("detection",)
    not_exported = "how many proposals and detections there are depends on the image"
    stages: ClassVar[tuple[Stage, ...]]
    convolutions: ClassVar[bool]  # in the box heads, before the last layer
    regression: ClassVar[str]  # loss of boxes, "l1" or "giou"
    rpn_beta: ClassVar[float]
    rpn_inside: ClassVar[bool]
    rpn_keep_train: ClassVar[int]

    def __init__(
        self,
        num_classes: int = 80,
        backbone: str = "dinat_mini",
        backbone_kwargs: dict[str, Any] | None = None,
        pretrained_backbone: bool = False,
        task: str | None = None,
        size_divisor: int = 32,
        masks: bool = True,
        fpn_channels: int = 256,
        anchor_scale: float = 8.0,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        box_channels: int = 1024,
        mask_channels: int = 256,
        rpn_samples: int = 256,
        roi_samples: int = 512,
        rpn_top_train: int = 2000,
        rpn_top: int = 1000,
        rpn_keep_train: int | None = None,
        rpn_keep: int = 1000,
        rpn_nms: float = 0.7,
        score_threshold: float = 0.05,
        nms: float = 0.5,
        detections: int = 100,
    ) -> None:
        features = Features(backbone, pretrained_backbone, **(backbone_kwargs or {}))
        super().__init__(num_classes, task, features.pretrained_cfg, size_divisor)
        strides = features.strides
        if any(fine * 2 != coarse for fine, coarse in pairwise(strides)):
            raise UserError(
                f"backbone={backbone}: each feature map must have half the side of the one before; strides: {strides}."
            )
        self.strides = strides
        self.features = features
        self.fpn = FeaturePyramidNetwork(features.channels, fpn_channels, LastLevelMaxPool())
        keep = self.rpn_keep_train if rpn_keep_train is None else rpn_keep_train
        self.rpn = ProposalNetwork(
            Anchors([*strides, 2 * strides[-1]], anchor_scale, aspect_ratios),
            ProposalHead(fpn_channels, len(aspect_ratios)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            min_quality=0.3,
            batch_size_per_image=rpn_samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": rpn_top_train, "testing": rpn_top},
            post_nms_top_n={"training": keep, "testing": rpn_keep},
            nms_thresh=rpn_nms,
            beta=self.rpn_beta,
            inside=self.rpn_inside,
            size_divisor=size_divisor,
        )
        self.box_heads = nn.ModuleList(self._box_head(fpn_channels, box_channels) for _ in self.stages)
        self.box_predictors = nn.ModuleList(BoxPredictor(box_channels, num_classes) for _ in self.stages)
        with_masks = self.stages if masks else ()
        self.mask_heads = nn.ModuleList(MaskRCNNHeads(fpn_channels, (mask_channels,) * 4, 1) for _ in with_masks)
        self.mask_predictors = nn.ModuleList(
            MaskRCNNPredictor(mask_channels, mask_channels, num_classes) for _ in with_masks
        )
        self.coders = [BoxCoder(tuple(1 / x for x in stage.deviations)) for stage in self.stages]
        self.sampler = BalancedPositiveNegativeSampler(roi_samples, 0.25)
        self.score_threshold, self.nms, self.detections = score_threshold, nms, detections

    def _box_head(self, width: int, channels: int) -> nn.Module:
        if self.convolutions:
            return FastRCNNConvFCHead((width, 7, 7), [width] * 4, [channels], norm_layer=nn.BatchNorm2d)
        return TwoMLPHead(width * 7 * 7, channels)

    @property
    def backbone(self) -> nn.Module:
        return self.features

    def _pyramid(self, batch: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.features(batch)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))

    def _boxes(self, stage: int, maps: list[Tensor], rois: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, num_classes + 1) and deltas (n, num_classes, 4) of the RoIs of all images."""
        return self.box_predictors[stage](self.box_heads[stage](pool(maps, self.strides, rois, 7)))

    def _masks(self, stage: int, maps: list[Tensor], rois: list[Tensor]) -> Tensor:
        """Logits (n, num_classes, 28, 28)."""
        x = pool(maps, self.strides, rois, 14)
        return self.mask_predictors[stage](self.mask_heads[stage](x)).float()

    def losses(self, batch: Tensor, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        if self.mask_heads and any("masks" not in target for target in targets):
            raise UserError(f"masks=True: the data has boxes only; create {self.method} with masks=False.")
        frames = [tuple(image.shape[-2:]) for image in images]
        boxes = [target["boxes"].as_subclass(Tensor).float() for target in targets]
        pyramid = self._pyramid(batch)
        truth = [{"boxes": b, "frame": frame} for b, frame in zip(boxes, frames, strict=True)]
        proposals, losses = self.rpn(ImageList(batch, frames), pyramid, truth)
        losses = {"loss_rpn_class": losses["loss_objectness"], "loss_rpn_box": losses["loss_rpn_box_reg"]}
        maps = list(pyramid.values())[: len(self.strides)]
        for i, stage in enumerate(self.stages):
            samples = [
                self.sample(stage, rois, b, target["labels"])
                for rois, b, target in zip(proposals, boxes, targets, strict=True)
            ]
            logits, deltas = self._boxes(i, maps, [s.boxes for s in samples])
            part = self._box_losses(i, logits, deltas, samples, boxes)
            if self.mask_heads:
                part["loss_mask"] = self._mask_loss(i, maps, samples, targets)
            suffix = f"_{i}" if len(self.stages) > 1 else ""
            losses |= {name + suffix: stage.weight * loss for name, loss in part.items()}
            if i + 1 < len(self.stages):
                proposals = self._refined(i, logits.detach(), deltas.detach(), samples, frames)
        return losses

    @torch.no_grad()
    def sample(self, stage: Stage, rois: Tensor, boxes: Tensor, labels: Tensor) -> Samples:
        """RoIs to train on, drawn from proposals and the objects' own boxes, a quarter of objects at most."""
        given = torch.arange(len(boxes) + len(rois), device=rois.device) < len(boxes)
        rois = torch.cat([boxes, rois])
        min_quality = stage.iou if len(self.stages) == 1 else None
        matches = BestMatcher(stage.iou, stage.iou, min_quality)(box_iou(boxes, rois))
        matches[: len(boxes)] = torch.arange(len(boxes), device=rois.device)
        positive, negative = (x[0].bool() for x in self.sampler([(matches >= 0).long()]))
        order = torch.cat([positive.nonzero()[:, 0], negative.nonzero()[:, 0]])
        objects = matches[positive]
        background = torch.full((int(negative.sum()),), self.num_classes, device=rois.device)
        return Samples(rois[order], torch.cat([labels[objects], background]), objects, given[order])

    def _box_losses(
        self, stage: int, logits: Tensor, deltas: Tensor, samples: list[Samples], boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        labels = torch.cat([s.labels for s in samples])
        count = max(len(labels), 1)
        positive = labels < self.num_classes
        rois = torch.cat([s.boxes for s in samples])[positive]
        truth = torch.cat([b[s.objects] for s, b in zip(samples, boxes, strict=True)])
        deltas = deltas[positive, labels[positive]]
        if self.regression == "l1":
            regression = box_loss(deltas, self.coders[stage].encode_single(truth, rois), 0.0)
        else:
            regression = 10 * generalized_box_iou_loss(self.coders[stage].decode_single(deltas, rois), truth, "sum")
        classification = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss_class": classification / count, "loss_box": regression / count}

    def _mask_loss(self, stage: int, maps: list[Tensor], samples: list[Samples], targets: Sequence[Target]) -> Tensor:
        rois = [s.boxes[: s.positive] for s in samples]
        logits = self._masks(stage, maps, rois)
        labels = torch.cat([s.labels[: s.positive] for s in samples])
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        truth = torch.cat(
            [
                crop_masks(target["masks"][s.objects], boxes, logits.shape[-1])
                for target, s, boxes in zip(targets, samples, rois, strict=True)
            ]
        )
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return loss / max(truth.numel(), 1)

    def _refined(
        self, stage: int, logits: Tensor, deltas: Tensor, samples: list[Samples], frames: list[tuple]
    ) -> list[Tensor]:
        """The RoIs of the next stage: those of this one, moved; the objects' own boxes come anew there."""
        labels = torch.cat([s.labels for s in samples])
        labels = torch.where(labels == self.num_classes, logits[:, :-1].argmax(1), labels)
        rois = self._move(stage, torch.cat([s.boxes for s in samples]), deltas, labels)
        rois = rois.split([len(s.boxes) for s in samples])
        return [clip_boxes_to_image(r[~s.given], frame) for r, s, frame in zip(rois, samples, frames, strict=True)]

    def _move(self, stage: int, rois: Tensor, deltas: Tensor, labels: Tensor) -> Tensor:
        """(n, 4): RoIs moved by the deltas of the classes `labels`."""
        return self.coders[stage].decode_single(deltas[torch.arange(len(rois), device=rois.device), labels], rois)

    def outputs(self, batch: Tensor) -> Any:
        frames = [tuple(batch.shape[-2:])] * len(batch)
        return self.predictions(batch, frames, frames)

    def predictions(self, batch: Tensor, frames: Sequence[tuple], sizes: Sequence[tuple], **kwargs: Any) -> list[dict]:
        if kwargs.get("task", self.task) != self.task or kwargs.keys() - {"task"}:
            raise TypeError(f"predict() of {self.method} takes no {', '.join(kwargs)}")
        pyramid = self._pyramid(batch)
        proposals, _ = self.rpn(ImageList(batch, list(frames)), pyramid)
        maps = list(pyramid.values())[: len(self.strides)]
        results = self._detect(maps, proposals, frames, sizes)
        if self.mask_heads:
            scales = [_scale(frame, size, batch) for frame, size in zip(frames, sizes, strict=True)]
            rois = [result["boxes"] / scale for result, scale in zip(results, scales, strict=True)]
            labels = torch.cat([result["labels"] for result in results])
            masks = sum(
                self._masks(i, maps, rois)[torch.arange(len(labels), device=labels.device), labels].sigmoid()
                for i in range(len(self.stages))
            ) / len(self.stages)
            for result, part, size in zip(results, masks.split([len(r) for r in rois]), sizes, strict=True):
                result["masks"] = paste_masks(part, result["boxes"], size)
        return results

    def _detect(
        self, maps: list[Tensor], rois: list[Tensor], frames: Sequence[tuple], sizes: Sequence[tuple]
    ) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels in the frames of `sizes`."""
        counts = [len(r) for r in rois]
        total = 0
        for i in range(len(self.stages)):
            logits, deltas = self._boxes(i, maps, rois)
            total = total + logits
            if i + 1 < len(self.stages):
                moved = self._move(i, torch.cat(rois), deltas, logits[:, :-1].argmax(1)).split(counts)
                rois = [clip_boxes_to_image(r, frame) for r, frame in zip(moved, frames, strict=True)]
        scores = (total / len(self.stages)).softmax(1)[:, :-1].split(counts)
        boxes = self.coders[-1].decode_single(deltas.flatten(1), torch.cat(rois)).unflatten(1, (-1, 4)).split(counts)
        results = []
        for image_boxes, image_scores, frame, size in zip(boxes, scores, frames, sizes, strict=True):
            image_boxes = clip_boxes_to_image(image_boxes, frame) * _scale(frame, size, image_boxes)
            found, labels = (image_scores > self.score_threshold).nonzero().unbind(1)
            candidates, values = image_boxes[found, labels], image_scores[found, labels]
            keep = batched_nms(candidates, values, labels, self.nms)[: self.detections]
            results.append({"boxes": candidates[keep], "scores": values[keep], "labels": labels[keep]})
        return results


class MaskRCNN(RCNN):
    """Mask R-CNN as published with NAT and DiNAT; arguments as of `RCNN`."""

    method = "mask_rcnn"
    stages = (Stage(0.5, (0.1, 0.1, 0.2, 0.2)),)
    convolutions = False
    regression = "l1"
    rpn_beta = 0.0
    rpn_inside = False
    rpn_keep_train = 1000


class CascadeMaskRCNN(RCNN):
    """Cascade Mask R-CNN as published with NAT and DiNAT; arguments as of `RCNN`."""

    method = "cascade_mask_rcnn"
    stages = (
        Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
        Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
        Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
    )
    convolutions = True
    regression = "giou"
    rpn_beta = 1 / 9
    rpn_inside = True
    rpn_keep_train = 2000


def pool(maps: Sequence[Tensor], strides: Sequence[int], rois: Sequence[Tensor], side: int) -> Tensor:
    """Features (n, channels, side, side) of the RoIs (n_i, 4) of each image, each from the map for its size.

    A RoI of 14 cells of the finest map, or less than twice as many, is pooled from it, one of twice as many from the
    next. Bins are sampled as densely as the cells lie.
    """
    boxes = torch.cat(list(rois))
    images = torch.cat([torch.full((len(r), 1), i, dtype=r.dtype, device=r.device) for i, r in enumerate(rois)])
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt()
    levels = (sizes / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    out = boxes.new_zeros(len(boxes), maps[0].shape[1], side, side)
    for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        mine = (levels == level).nonzero()[:, 0]
        rows = torch.cat([images, boxes], 1)[mine]
        pooled = roi_align(x.float(), rows, side, 1 / stride, sampling_ratio=0, aligned=True)
        out = out.index_put((mine,), pooled)
    return out


def crop_masks(masks: Tensor, boxes: Tensor, side: int) -> Tensor:
    """What masks (n, height, width) are within boxes (n, 4): float 0 or 1, (n, side, side)."""
    rows = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes), boxes], 1)
    masks = masks.as_subclass(Tensor).to(boxes)[:, None]
    return (roi_align(masks, rows, side, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n, side, side) of 0 to 1 within their boxes, as bool (n, height, width) of an image of `size`.

    Each pixel takes the mask's value at its centre, interpolated, and is of the object from 0.5 on.
    """
    out = masks.new_zeros((len(masks), *size), dtype=torch.bool)
    limit = boxes.new_tensor([size[1], size[0]] * 2)
    edges = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], 1).clamp(min=0).minimum(limit).long()
    for mask, box, edge, pasted in zip(masks, boxes, edges.tolist(), out, strict=True):
        x1, y1, x2, y2 = edge  # outside of the box, values are below 0.5
        x, y = (torch.arange(a, b, device=box.device, dtype=box.dtype) + 0.5 for a, b in ((x1, x2), (y1, y2)))
        x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
        pasted[y1:y2, x1:x2] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return out


def _scale(frame: tuple[int, int], size: tuple[int, int], like: Tensor) -> Tensor:
    """(4,): what boxes of an image of `frame` are multiplied by for one of `size`."""
    ratio = [size[1] / frame[1], size[0] / frame[0]]
    return like.new_tensor(ratio * 2, dtype=torch.float32)
