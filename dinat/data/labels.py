"""What becomes of the label that a reader gives for an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinat.data.imagenet import IGNORE
from dinat.errors import UserError, nearest

SEVERAL = ("indices", "multi_hot")  # what data.labels may be, beside null


class OneLabel:
    """One class per image: a target is its index. `filler` is that of an image that does not count."""

    filler = IGNORE

    def __call__(self, given: Any) -> int:
        """Raises ValueError for several labels."""
        try:
            return int(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"its label is {_shorten(given)}, not one class; for several set data.labels=indices or multi_hot"
            ) from error


class SeveralLabels:
    """Any number of classes per image: a target is (num_classes,) int64, 1 for those that apply and 0 for others.

    Args:
        kind: what readers give: "indices", the numbers of the classes that apply, or "multi_hot", 0 or 1 for each.
    """

    def __init__(self, kind: str, num_classes: int) -> None:
        self.kind, self.num_classes = kind, num_classes
        self.filler = torch.full((num_classes,), IGNORE)

    def __call__(self, given: Any) -> Tensor:
        """Raises ValueError for what is not of this kind."""
        try:
            values = torch.as_tensor(given).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            values = torch.tensor([torch.nan])
        if self.kind == "multi_hot":
            if len(values) != self.num_classes or not ((values == 0) | (values == 1)).all():
                raise ValueError(f"its labels are {_shorten(given)}, not {self.num_classes} zeros and ones")
            return values.long()
        if not ((values >= 0) & (values < self.num_classes) & (values == values.floor())).all():
            raise ValueError(f"its labels are {_shorten(given)}, not numbers of classes, 0 to {self.num_classes - 1}")
        return torch.zeros(self.num_classes, dtype=torch.int64).index_fill_(0, values.long(), 1)


Labels = OneLabel | SeveralLabels


def _shorten(given: Any) -> str:
    text = str(given.tolist() if hasattr(given, "tolist") else given)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_kind(kind: str | None) -> str | None:
    """`data.labels`, if it is one of those that there are. Raises UserError for another."""
    if kind not in (None, *SEVERAL):
        raise UserError(f"data.labels={kind}: no such kind. Known: {', '.join(SEVERAL)}.{nearest(str(kind), SEVERAL)}")
    return kind
