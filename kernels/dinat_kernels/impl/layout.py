"""What the choice of a backend and its preparations may depend on: everything about a tensor but its contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Neighborhood


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

    def unbound(self) -> Layout:
        """The layout of each of `x.unbind(-3)`, of which there must be three."""
        if len(self.shape) < 3 or self.shape[-3] != 3:
            raise ValueError(f"a packed projection must have shape (..., 3, heads, dim), got {tuple(self.shape)}")
        shape, stride = ((*of_x[:-3], *of_x[-2:]) for of_x in (self.shape, self.stride))
        return self._replace(shape=shape, stride=stride)


def layout_of(x: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(x.shape, x.stride(), x.dtype, x.device)


def unpacked(query: Tensor, key: Tensor | None, value: Tensor | None) -> Sequence[Tensor]:
    """Query, key and value; without the latter two, `query` is a packed projection (..., 3, heads, dim) of them all."""
    return query.unbind(-3) if key is None else (query, key, value)


def problem_of(query: Tensor, key: Tensor | None, value: Tensor | None, rpb: Tensor | None) -> tuple:
    """All layouts, in the form that is fastest to make and to look up; key and value as in `unpacked`."""
    of_rpb = None if rpb is None else (rpb.shape, rpb.stride(), rpb.dtype, rpb.device)
    if key is None:
        return query.shape, query.stride(), query.dtype, query.device, of_rpb
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        of_rpb,
    )  # fmt: skip


def layouts_of(problem: tuple) -> tuple[Layout, Layout, Layout, Layout | None]:
    """The layouts of query, key, value and rpb: `problem_of` undone."""
    *fields, rpb = problem
    layouts = [Layout(*fields[i : i + 4]) for i in range(0, len(fields), 4)]
    if len(layouts) == 1:
        layouts = [layouts[0].unbound()] * 3
    return *layouts, rpb and Layout(*rpb)


def gap_of(problem: tuple) -> int | None:
    """Elements from query to key, and from key to value, in a packed projection; None if there is none."""
    return problem[1][-3] if len(problem) == 5 else None


class Call(NamedTuple):
    """What a backend prepares a forward pass for."""

    query: Layout
    key: Layout
    value: Layout
    rpb: Layout | None
    window: Neighborhood
    scale: float
    with_lse: bool  # if not, the pass may return None in the place of lse
    gap: int | None  # as `gap_of`; if there is one, the pass is given the packed projection, and no key and value


def unpacking(run: Callable, call: Call) -> Forward:
    """`run`, which wants query, key and value, as the pass that `call` asks for."""
    return run if call.gap is None else lambda query, key, value, rpb: run(*unpacked(query, key, value), rpb)


# A prepared forward pass: query, key, value (see `unpacked`) and rpb to out and lse.
Forward = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]
# A prepared backward pass, see `tiled.prepare_backward`.
Backward = Callable[..., Tensor | None]
# Problems whose passes are kept prepared.
PREPARED = 128
