"""AUC and accuracies of scores that are kept until the end: the published figures of MedMNIST (arXiv:2110.14795)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.data import IGNORE
from dinat.distributed import ALONE, World
from dinat.errors import UserError
from dinat.metrics import class_rows
from dinat.metrics.classification import check_labels

log = logging.getLogger("dinat")


class RankingMetric:
    """Loss, AUC, accuracy and balanced accuracy (%), over all images of all processes.

    AUC is the mean over classes of the area under the ROC curve of one class against the rest; of two classes, that of
    the second. Accuracy is of the likeliest class; for several labels per image, that of each label at a probability of
    0.5, mean over labels. Balanced accuracy is the mean of the classes' recalls; for several labels, of those of each
    label's presence and absence, mean over labels.

    Args:
        classes: names, in the order of the labels.
        several: whether images have several labels: targets are (B, classes) then, and scores are sigmoids.
    """

    def __init__(self, classes: Sequence[str], *, several: bool = False) -> None:
        self.classes, self.several = list(classes), several
        self.scores: list[Tensor] = []
        self.truth: list[Tensor] = []
        self.loss = torch.zeros((), dtype=torch.float64)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds logits `(B, classes)` and targets `(B,)` or `(B, classes)`; rows of `IGNORE` do not count.

        Raises:
            UserError: for a label beyond the classes.
        """
        count = len(self.classes)
        if not self.several:
            check_labels(targets, count)
        logits, targets = logits.float().cpu(), targets.cpu()
        counted = targets != IGNORE if targets.ndim == 1 else (targets != IGNORE).all(dim=1)
        logits, targets = logits[counted], targets[counted]
        if self.several:
            losses = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(dim=1)
            self.scores.append(logits.sigmoid())
            self.truth.append(targets.bool())
        else:
            losses = F.cross_entropy(logits, targets, reduction="none")
            self.scores.append(logits.softmax(dim=1))
            self.truth.append(F.one_hot(targets, count).bool())
        self.loss += losses.double().sum()

    def gathered(self, world: World) -> tuple[Tensor, Tensor]:
        """Scores and truth of all processes, (images, classes)."""
        empty = torch.zeros(0, len(self.classes))
        shares = world.gather((torch.cat([empty, *self.scores]), torch.cat([empty.bool(), *self.truth])))
        scores, truth = (torch.cat(parts) for parts in zip(*shares, strict=True))
        return scores, truth

    def compute(self, world: World = ALONE) -> dict[str, float]:
        """`loss`, `auc`, `acc` and `balanced_acc`.

        Raises:
            UserError: no class has images with it and without it, so that there is no AUC.
        """
        scores, truth = self.gathered(world)
        found = self.decide(scores)
        areas = self.areas(scores, truth)
        if areas.isnan().all():
            raise UserError("AUC: every class has all images or none. Evaluate on images of several classes.")
        if areas.isnan().any():
            names = [name for name, area in zip(self.classes[-len(areas) :], areas, strict=True) if area.isnan()]
            log.warning("AUC: left out are classes that all images have or none: %s", ", ".join(names))
        right = (found == truth).double().mean() if self.several else (found & truth).any(dim=1).double().mean()
        recalls = recall(found, truth)
        balanced = torch.stack([recalls, recall(~found, ~truth)]).nanmean(0) if self.several else recalls
        return {
            "loss": sum(world.gather(self.loss.item())) / len(scores),
            "auc": 100 * areas.nanmean().item(),
            "acc": 100 * right.item(),
            "balanced_acc": 100 * balanced.nanmean().item(),
        }

    def per_class(self, world: World = ALONE) -> list[dict[str, Any]]:
        """Images of each class, how many of them were found (%), and its AUC (%); None where there are none."""
        scores, truth = self.gathered(world)
        areas = [100 * area(column, mask) for column, mask in zip(scores.T, truth.T, strict=True)]
        recalls = (100 * recall(self.decide(scores), truth)).tolist()
        return class_rows(self.classes, {"count": truth.sum(0).tolist(), "recall": recalls, "auc": areas})

    def confusion_matrix(self, world: World = ALONE) -> Tensor:
        """(classes, classes) int64: how many images of class i were predicted as class j."""
        scores, truth = self.gathered(world)
        return (truth.double().T @ self.decide(scores).double()).long()

    def decide(self, scores: Tensor) -> Tensor:
        """Which classes are predicted, (images, classes) bool."""
        if self.several:
            return scores > 0.5
        return F.one_hot(scores.argmax(dim=1), len(self.classes)).bool()

    def areas(self, scores: Tensor, truth: Tensor) -> Tensor:
        """AUC of each class that counts, NaN where there is none."""
        first = 1 if len(self.classes) == 2 and not self.several else 0
        columns = zip(scores.T[first:], truth.T[first:], strict=True)
        return torch.tensor([area(column, mask) for column, mask in columns], dtype=torch.float64)


def area(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores higher than a negative, ties counting half; NaN without.

    Args:
        scores: (N,).
        positive: (N,) bool.
    """
    values, place = scores.unique(return_inverse=True)
    positives = torch.bincount(place[positive], minlength=len(values)).double()
    negatives = torch.bincount(place[~positive], minlength=len(values)).double()
    below = negatives.cumsum(0) - negatives / 2
    return ((positives * below).sum() / (positives.sum() * negatives.sum())).item()


def recall(found: Tensor, truth: Tensor) -> Tensor:
    """How many images of each class were found, (classes,); NaN for a class without images."""
    return (found & truth).sum(0).double() / truth.sum(0)
