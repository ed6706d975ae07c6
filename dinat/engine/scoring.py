"""Scores of a model on a data set: every image counted once, on one process or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dinat.data import blank, count_images
from dinat.distributed import World
from dinat.errors import UserError
from dinat.tasks import Scores, Task

log = logging.getLogger("dinat")


@torch.no_grad()
def measure(
    task: Task,
    model: nn.Module,
    batches: Iterable,
    *,
    per_class: bool = False,
    confusion: bool = False,
    lockstep: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Evaluates `model` on batches of `(images, targets, problems)` as the task's `eval_loader` yields them.

    Args:
        per_class, confusion: details to find as well.
        lockstep: keep processes at the same number of batches, as a sharded model needs and a stream does not provide.
        tick: called after each batch with the number of batches done.

    Raises:
        UserError: for an unreadable image under `data.on_bad_image=fail`, or targets that the model cannot have.
    """
    training = model.training
    model.eval()
    metric, world = task.metric(confusion), task.world
    count = skipped = 0
    batches = _in_lockstep(batches, world) if lockstep else batches
    for done, (images, targets, problems) in enumerate(batches, start=1):
        report_bad_images(problems, task.data["on_bad_image"])
        task.score(metric, model, images, targets)
        count, skipped = count + count_images(targets), skipped + len(problems)
        tick(done)
    model.train(training)
    count, skipped = world.sum(torch.tensor([count, skipped], device=world.device)).tolist()
    if not count:
        raise UserError("evaluation: no image was counted. Is the validation split empty or unreadable?")
    return Scores(
        metric.compute(world),
        count,
        skipped,
        metric.per_class(world) if per_class else None,
        metric.confusion_matrix(world) if confusion else None,
    )


def report_bad_images(problems: Sequence[str], policy: str) -> None:
    """Logs images that could not be read, or raises UserError for the first, by `data.on_bad_image`."""
    for problem in problems:
        if policy == "fail":
            raise UserError(f"unreadable image {problem}. Repair it, or set data.on_bad_image=skip.")
        log.warning("skipped unreadable image %s", problem)


def _in_lockstep(batches: Iterable, world: World) -> Iterator[Any]:
    """The batches, followed by copies of the last with nothing to count until all processes have run out."""
    iterator, batch = iter(batches), None
    while True:
        fresh = next(iterator, None)
        if not world.any(fresh is not None):
            return
        if fresh is None and batch is None:
            raise UserError("evaluation: a process has no image at all. Use fewer processes.")
        batch = fresh or blank(batch)
        yield batch
