"""Figures of predictions, exact over any number of processes that each saw their share of the images.

A metric takes what a model predicts and the targets of the data: `update(predictions, targets)` on every process, then
`compute(world)`, which returns the same figures on all of them, in percent but for losses, and `per_class(world)`.
What people call the figures that the tables show is in `labels`, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def class_rows(classes: Iterable[str], columns: dict[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """A table with a row per class: `class` (its index), `name`, and the columns, None in the place of nan."""
    rows = zip(classes, *columns.values(), strict=True)
    return [
        {"class": index, "name": name} | {key: _known(value) for key, value in zip(columns, values, strict=True)}
        for index, (name, *values) in enumerate(rows)
    ]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
