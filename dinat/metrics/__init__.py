"""Metrics of dense prediction, exact over any number of processes that each saw their share of the images.

A metric takes what `model.predict` returns and the targets of the data, both in the original image's frame:
`update(predictions, targets)` on every process, then `compute(world)`, which returns the same percentages on all of
them. `world.gather(object)` is the list of every process's object, in order.
"""

from __future__ import annotations

from typing import Any, Protocol


class Processes(Protocol):
    """What a metric needs to know of the other processes."""

    def gather(self, value: Any) -> list[Any]: ...


class Alone:
    """A single process."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


ALONE = Alone()

__all__ = ["ALONE", "Alone", "Processes"]
