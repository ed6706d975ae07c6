"""What is lost and what is scored in classification, by the labels that the data has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.data import Labels, OneLabel, SeveralLabels, accepted_labels, competing_classes
from dinat.errors import UserError
from dinat.metrics.classification import ClassificationMetric, check_labels
from dinat.metrics.ranking import RankingMetric
from dinat.tasks.task import Metric


class OneClass:
    """One class per image: cross-entropy, top-1 and top-5.

    Attributes:
        headline, labels: see `Task`.
        share: the label of the share of training images that are right.
        several: whether an image may have several classes.
    """

    headline = "top1"
    labels = {"loss": "loss", "top1": "top-1", "top5": "top-5"}  # noqa: RUF012 - never written
    share = "top1"
    several = False

    def __init__(self, benchmark: str | None = None) -> None:
        self.benchmark = benchmark

    def target(self, num_classes: int) -> Labels:
        """How the label that a reader gives becomes a target."""
        return OneLabel()

    def check(self, targets: Tensor, num_classes: int) -> None:
        """Raises UserError for targets that a head of so many classes cannot have."""
        check_labels(targets, num_classes)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """The mean over images; targets are `(B,)`, or mixed, `(B, num_classes)`."""
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Figures of the training set, summed over images; mixed images count as what there is most of."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        return {self.share: 100 * (logits.argmax(dim=1) == labels).sum()}

    def metric(self, names: Sequence[str], device: torch.device, confusion: bool) -> Metric:
        """An empty metric for classes of these names."""
        return ClassificationMetric(
            names, device, confusion=confusion, competing=competing_classes(self.benchmark),
            accepted=accepted_labels(self.benchmark),
        )  # fmt: skip

    def columns(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures of a row of results.csv: timm's."""
        top1, top5 = (round(figures[name], 4) for name in ("top1", "top5"))
        return {
            "top1": top1,
            "top1_err": round(100 - figures["top1"], 4),
            "top5": top5,
            "top5_err": round(100 - figures["top5"], 4),
        }


class RankedClass(OneClass):
    """One class per image, of two or more, in order or not: cross-entropy, and the figures of MedMNIST.

    As published, classes in order (ordinal regression) are learned and scored like others.
    """

    headline = "auc"
    labels = {"loss": "loss", "auc": "AUC", "acc": "accuracy", "balanced_acc": "balanced accuracy"}  # noqa: RUF012
    share = "acc"

    def metric(self, names: Sequence[str], device: torch.device, confusion: bool) -> RankingMetric:
        return RankingMetric(names, several=self.several)  # what it keeps is enough for the matrix

    def columns(self, figures: Mapping[str, float]) -> dict[str, float]:
        return {name: round(figures[name], 4) for name in self.labels if name != "loss"}


class SeveralClasses(RankedClass):
    """Any number of classes per image: binary cross-entropy, mean over classes, and the figures of MedMNIST.

    Args:
        kind: what readers give, "indices" or "multi_hot".
    """

    several = True

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def target(self, num_classes: int) -> Labels:
        return SeveralLabels(self.kind, num_classes)

    def check(self, targets: Tensor, num_classes: int) -> None:
        pass  # what is wrong with the labels of an image has been told with its name

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Targets are `(B, num_classes)`; smoothed ones are `smoothing / 2` away from 0 and 1."""
        return F.binary_cross_entropy_with_logits(logits, targets * (1 - smoothing) + smoothing / 2)

    def sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"acc": 100 * ((logits > 0) == targets.bool()).double().mean(dim=1).sum()}

    def metric(self, names: Sequence[str], device: torch.device, confusion: bool) -> RankingMetric:
        if confusion:
            raise UserError("confusion=true: not for several labels per image. Leave it out, or set per_class=true.")
        return super().metric(names, device, confusion)
