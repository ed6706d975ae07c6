"""Loss, top-1 and top-5 of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.data import IGNORE
from dinat.distributed import ALONE, World
from dinat.errors import UserError


class ClassificationMetric:
    """Cross-entropy, top-1 and top-5 (%), and counts per class.

    Args:
        classes: names, in the order of the labels.
        confusion: whether to keep the confusion matrix.
        competing: indices of the classes that predictions are chosen from, all if None.
        accepted: which classes are right for each label, (labels, num_classes) bool, where labels are not classes;
            there is nothing per class then, and no confusion matrix.
    """

    def __init__(
        self, classes: Sequence[str], device: torch.device, *, confusion: bool = False,
        competing: Sequence[int] | None = None, accepted: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.classes, self.accepted = list(classes), accepted
        num_classes = len(self.classes)
        self.num_labels = num_classes if accepted is None else len(accepted)
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(2, dtype=exact, device=device)  # loss, correct in 5
        counts = {"dtype": torch.int64, "device": device}
        self.correct, self.total = torch.zeros(self.num_labels, **counts), torch.zeros(self.num_labels, **counts)
        self.matrix = torch.zeros(num_classes, num_classes, **counts) if confusion else None
        self.excluded = torch.zeros(num_classes, dtype=torch.bool, device=device)
        if competing is not None:
            self.excluded[[index for index in range(num_classes) if index not in {*competing}]] = True

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds logits `(B, num_classes)` and labels `(B,)`; rows with label `IGNORE` do not count.

        Raises:
            UserError: for a label beyond the classes.
        """
        check_labels(targets, self.num_labels)
        counted = (targets != IGNORE).to(logits.device, non_blocking=True)
        targets = targets.to(logits.device, non_blocking=True)[counted]
        logits = logits.float()[counted].masked_fill(self.excluded, -torch.inf)
        ranked = logits.topk(min(5, len(self.classes)), dim=1).indices
        if self.accepted is None:
            right, losses = ranked == targets[:, None], F.cross_entropy(logits, targets, reduction="none")
        else:
            rows = self.accepted[targets.cpu()].to(logits.device)
            right = rows.gather(1, ranked)
            losses = -logits.log_softmax(dim=1).masked_fill(~rows, -torch.inf).logsumexp(dim=1)  # of any right class
        self.sums[0] += losses.to(self.sums.dtype).sum()
        self.sums[1] += right.any(dim=1).sum()
        self.correct += torch.bincount(targets[right[:, 0]], minlength=self.num_labels)
        self.total += torch.bincount(targets, minlength=self.num_labels)
        if self.matrix is not None:
            pairs = torch.bincount(targets * len(self.classes) + ranked[:, 0], minlength=self.matrix.numel())
            self.matrix += pairs.view_as(self.matrix)

    def compute(self, world: World = ALONE) -> dict[str, float]:
        """`loss`, `top1` and `top5` over all images of all processes."""
        sums, count = world.sum(self.sums), world.sum(self.total).sum().item()
        return {
            "loss": sums[0].item() / count,
            "top1": 100 * world.sum(self.correct).sum().item() / count,
            "top5": 100 * sums[1].item() / count,
        }

    def per_class(self, world: World = ALONE) -> list[dict[str, Any]]:
        """Images, correct ones and accuracy (%) of each class; accuracy is None for a class without images."""
        counts = zip(world.sum(self.total).tolist(), world.sum(self.correct).tolist(), strict=True)
        return [
            {
                "class": index,
                "name": name,
                "count": total,
                "correct": correct,
                "top1": 100 * correct / total if total else None,
            }
            for index, (name, (total, correct)) in enumerate(zip(self.classes, counts, strict=True))
        ]

    def confusion_matrix(self, world: World = ALONE) -> Tensor:
        """(num_classes, num_classes) int64: how many images of class i were predicted as class j."""
        return world.sum(self.matrix).cpu()


def check_labels(targets: Tensor, num_classes: int) -> None:
    """Raises UserError for a label beyond the head, which would otherwise be a device-side assertion."""
    if len(targets) and (largest := int(targets.max())) >= num_classes:
        raise UserError(f"the data has a label {largest}, the model {num_classes} classes. Set data.num_classes.")
