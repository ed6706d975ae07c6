"""Scores of a model on a data set: every image counted once, on one process or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.data import IGNORE
from dinat.engine.distributed import World
from dinat.errors import UserError

log = logging.getLogger("dinat")


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, summed over all processes.

    `correct` and `total` count images per class; `confusion[i, j]`, where asked for, the images of class i predicted
    as class j. Percentages are of the images counted; unreadable ones are in `skipped` and nowhere else.
    """

    loss: float
    top1: float
    top5: float
    count: int
    skipped: int
    correct: Tensor
    total: Tensor
    confusion: Tensor | None = None


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable,
    world: World,
    *,
    num_classes: int,
    prepare: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager],
    on_bad_image: str = "skip",
    confusion: bool = False,
    lockstep: bool = False,
    competing: Sequence[int] | None = None,
    accepted: Tensor | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Evaluates `model` on batches of `(images, targets, problems)` as `dinat.data.eval_loader` yields them.

    Args:
        prepare: uint8 images -> normalised images on the model's device.
        lockstep: keep processes at the same number of batches, as a sharded model needs and a stream does not provide.
        competing: indices of the classes that predictions are chosen from, all if None.
        accepted: which classes are right for each label, (labels, num_classes) bool, where labels are not classes;
            `correct` and `total` then count labels, and there is no confusion matrix.
        tick: called after each batch with the number of batches done.

    Raises:
        UserError: for an unreadable image under `on_bad_image="fail"`, or a label outside the model's classes.
    """
    training = model.training
    model.eval()
    device = world.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(3, dtype=exact, device=device)  # loss, correct in 5, skipped
    num_labels = num_classes if accepted is None else len(accepted)
    correct, total = (torch.zeros(num_labels, dtype=torch.int64, device=device) for _ in range(2))
    matrix = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device) if confusion else None
    top = min(5, num_classes)
    excluded = torch.zeros(num_classes, dtype=torch.bool, device=device)
    if competing is not None:
        excluded[[index for index in range(num_classes) if index not in {*competing}]] = True
    batches = _in_lockstep(batches, world) if lockstep else batches
    for done, (images, targets, problems) in enumerate(batches, start=1):
        report_bad_images(problems, on_bad_image)
        check_labels(targets, num_labels)
        counted = targets != IGNORE
        targets, counted = targets.to(device, non_blocking=True), counted.to(device, non_blocking=True)
        with autocast():
            logits = model(prepare(images)).float()
        logits, targets = logits[counted].masked_fill(excluded, -torch.inf), targets[counted]
        ranked = logits.topk(top, dim=1).indices
        if accepted is None:
            right, losses = ranked == targets[:, None], F.cross_entropy(logits, targets, reduction="none")
        else:
            rows = accepted[targets.cpu()].to(device)
            right = rows.gather(1, ranked)
            losses = -logits.log_softmax(dim=1).masked_fill(~rows, -torch.inf).logsumexp(dim=1)  # of any right class
        hits = right[:, 0]
        sums[0] += losses.to(exact).sum()
        sums[1] += right.any(dim=1).sum()
        sums[2] += len(problems)
        correct += torch.bincount(targets[hits], minlength=num_labels)
        total += torch.bincount(targets, minlength=num_labels)
        if matrix is not None:
            matrix += torch.bincount(targets * num_classes + ranked[:, 0], minlength=len(matrix))
        tick(done)
    model.train(training)
    sums, correct, total = world.sum(sums).cpu(), world.sum(correct).cpu(), world.sum(total).cpu()
    count = int(total.sum())
    if not count:
        raise UserError("evaluation: no image was counted. Is the validation split empty or unreadable?")
    return Scores(
        loss=sums[0].item() / count,
        top1=100 * correct.sum().item() / count,
        top5=100 * sums[1].item() / count,
        count=count,
        skipped=int(sums[2]),
        correct=correct,
        total=total,
        confusion=None if matrix is None else world.sum(matrix).cpu().view(num_classes, num_classes),
    )


def report_bad_images(problems: Sequence[str], policy: str) -> None:
    """Logs images that could not be read, or raises UserError for the first, by `data.on_bad_image`."""
    for problem in problems:
        if policy == "fail":
            raise UserError(f"unreadable image {problem}. Repair it, or set data.on_bad_image=skip.")
        log.warning("skipped unreadable image %s", problem)


def check_labels(targets: Tensor, num_classes: int) -> None:
    """Raises UserError for a label beyond the head, which would otherwise be a device-side assertion."""
    if len(targets) and (largest := int(targets.max())) >= num_classes:
        raise UserError(f"the data has a label {largest}, the model {num_classes} classes. Set data.num_classes.")


def _in_lockstep(batches: Iterable, world: World) -> Iterator[Any]:
    """The batches, followed by copies of the last with nothing to count until all processes have run out."""
    iterator, batch = iter(batches), None
    while True:
        fresh = next(iterator, None)
        if not world.any(fresh is not None):
            return
        if fresh is None and batch is None:
            raise UserError("evaluation: a process has no image at all. Use fewer processes.")
        batch = fresh or (batch[0], torch.full_like(batch[1], IGNORE), [])
        yield batch
