"""What the choice of a backend and its preparations may depend on: everything about a tensor but its contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What is known of a tensor but its contents; strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def contiguous(self) -> Layout:
        """The layout of `x.contiguous()`."""
        stride = [1]
        for size in self.shape[:0:-1]:
            stride.insert(0, stride[0] * size)
        return self._replace(stride=tuple(stride))


def layout_of(x: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(x.shape, x.stride(), x.dtype, x.device)


def problem_of(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> tuple:
    """All layouts, in the form that is fastest to make and to look up."""
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        None if rpb is None else (rpb.shape, rpb.stride(), rpb.dtype, rpb.device),
    )  # fmt: skip


def layouts_of(problem: tuple) -> tuple[Layout, Layout, Layout, Layout | None]:
    """The layouts of query, key, value and rpb: `problem_of` undone."""
    *fields, rpb = problem
    return *(Layout(*fields[i : i + 4]) for i in (0, 4, 8)), rpb and Layout(*rpb)


# A forward pass that was prepared for some layouts: query, key, value and rpb to out and lse.
Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
# Forward passes that are kept prepared.
PREPARED = 128
