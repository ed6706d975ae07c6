"""What training and evaluation are about: one file per task. The engine knows no head and no data set."""

from __future__ import annotations

import importlib

from dinat.errors import UserError, nearest
from dinat.tasks.task import Origin, Scores, Step, Task

TASKS = {
    "classification": "Classification",
    "detection": "Detection",
    "semantic": "Semantic",
    "panoptic": "Panoptic",
}

__all__ = ["TASKS", "Origin", "Scores", "Step", "Task", "find_task"]


def find_task(name: str) -> type[Task]:
    """The class of a task. Raises UserError for an unknown one, or one whose packages are not installed."""
    if name not in TASKS:
        raise UserError(f"task={name}: no such task. Known: {', '.join(TASKS)}.{nearest(str(name), TASKS)}")
    return getattr(importlib.import_module(f"dinat.tasks.{name}"), TASKS[name])
