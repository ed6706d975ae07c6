"""Which keys a query sees: the window arithmetic that every backend shares.

Neighborhood attention (Hassani et al., CVPR 2023, section 3.1) with dilation (Hassani & Shi, 2022, section 3.1), and
with the stride and causal axes of generalized neighborhood attention (Hassani et al., 2025, section 3).  Everything
here is per axis: the visible set of a multi-dimensional query is the product of its per-axis windows.

An axis of `length` tokens falls into `dilation` groups of every d-th token.  Index `i` has group `i % d` and position
`i // d`; windows are contiguous ranges of positions within the query's own group.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Neighborhood(NamedTuple):
    """The window of every axis: one entry per spatial axis."""

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    def undilated(self) -> Neighborhood:
        """The window among the tokens of a dilation group."""
        return self._replace(dilation=(1,) * self.rank)

    def flat(self) -> list[int]:
        """All entries in one list, as the ops take them."""
        return [int(x) for axes in self for x in axes]

    @classmethod
    def from_flat(cls, entries: Sequence[int]) -> Neighborhood:
        """`flat` undone."""
        rank = len(entries) // 4
        kernel_size, dilation, stride, is_causal = (tuple(entries[i * rank : (i + 1) * rank]) for i in range(4))
        return cls(kernel_size, dilation, stride, tuple(map(bool, is_causal)))


def per_axis(name: str, value: int | Sequence[int], rank: int, kind: type) -> tuple:
    """An argument as one entry per axis: from one number or a sequence of them, of any integer type.

    Raises:
        ValueError: another number of entries than axes, or an entry is no integer; the message names the argument.
    """
    values = tuple(value) if isinstance(value, (tuple, list, Sequence)) else (value,) * rank
    try:
        entries = tuple(kind(v if isinstance(v, (bool, np.bool_)) else operator.index(v)) for v in values)
    except TypeError:
        entries = ()
    if len(entries) != rank:
        raise ValueError(f"{name} must be one {kind.__name__} or {rank} of them (one per axis), got {value!r}")
    return entries


def make_neighborhood(
    rank: int,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Neighborhood:
    """Expand per-axis arguments to `rank` axes and check them.

    Raises:
        ValueError: an argument has the wrong number of entries, `kernel_size < 1`, `dilation < 1`, or `stride` outside
            `1 .. kernel_size`.
    """
    window = Neighborhood(
        per_axis("kernel_size", kernel_size, rank, int),
        per_axis("dilation", dilation, rank, int),
        per_axis("stride", stride, rank, int),
        per_axis("is_causal", is_causal, rank, bool),
    )
    for axis, (k, d, s, _) in enumerate(zip(*window, strict=True)):
        if k < 1:
            raise ValueError(f"kernel_size must be at least 1, got {k} on axis {axis}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on axis {axis}")
        if not 1 <= s <= k:
            raise ValueError(f"stride must lie in 1..kernel_size, got stride {s} with kernel_size {k} on axis {axis}")
    return window


def check_fits(window: Neighborhood, spatial: Sequence[int]) -> None:
    """Raise ValueError unless `kernel_size * dilation <= length` on every axis of a map of size `spatial`."""
    for axis, (length, k, d) in enumerate(zip(spatial, window.kernel_size, window.dilation, strict=True)):
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation must not exceed the axis length: kernel_size {k} * dilation {d} = {k * d} "
                f"> length {length} on axis {axis}. Use a smaller window or dilation, or pad the map."
            )


def group_length(length: int, dilation: int, group: int) -> int:
    """Number of tokens in a dilation group: `ceil((length - group) / dilation)`."""
    return -(-(length - group) // dilation)


def visible_range(
    position: np.ndarray, length: int, kernel_size: int, stride: int, is_causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last visible key position, for query positions in a group of `length` tokens.

    Stride groups of `stride` queries share the window of their leader.  Near a border the window shifts inward, so a
    query that is not causal always sees exactly `kernel_size` keys; a causal one sees 1 to `kernel_size`, none after
    itself.

    Both results are monotonic in `position`.
    """
    if is_causal:
        leader = np.minimum(position // stride * stride + stride - 1, length - 1)
        return np.maximum(leader - kernel_size + 1, 0), position + 1
    leader = np.minimum(position // stride * stride + stride // 2, length - 1)
    start = np.clip(leader - kernel_size // 2, 0, length - kernel_size)
    return start, start + kernel_size


def seeing_range(
    position: np.ndarray, length: int, kernel_size: int, stride: int, is_causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last query position that sees a key, for key positions: the inverse of `visible_range`.

    A range, because the bounds of visible ranges are monotonic; so are both results.
    """
    if is_causal:
        # start(query) <= key, where start is that of the stride group's last query.
        end = (position + kernel_size - stride) // stride * stride + stride
        return position, np.where(position + kernel_size > length - 1, length, np.minimum(end, length))
    half, lead = kernel_size // 2, stride // 2
    # start(query) > key - kernel_size, unless start is 0 for all that come before.
    start = -(-(position - kernel_size + 1 + half - lead) // stride) * stride
    # start(query) <= key, unless start is the last one for all that follow.
    end = (position + half - lead) // stride * stride + stride
    return (
        np.where(position < kernel_size, 0, start),
        np.where(position >= length - kernel_size, length, np.minimum(end, length)),
    )


class Slots(NamedTuple):
    """The window of every token of an axis, one slot per key; (length, kernel_size) each."""

    key: np.ndarray  # token in each slot
    entry: np.ndarray  # its entry in the bias table
    visible: np.ndarray  # False in the slots after a causal window's last key


def slots_of(length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool) -> Slots:
    """The keys that every query of an axis sees, in order."""
    group, query = np.arange(length) % dilation, np.arange(length) // dilation
    start, end = np.empty((2, length), dtype=np.int64)
    for g in range(dilation):
        n = group_length(length, dilation, g)
        start[g::dilation], end[g::dilation] = visible_range(np.arange(n), n, kernel_size, stride, is_causal)
    position = start[:, None] + np.arange(kernel_size)
    visible = position < end[:, None]
    position = np.minimum(position, end[:, None] - 1)  # an invisible slot repeats a key, with weight 0
    return Slots(position * dilation + group[:, None], position - query[:, None] + kernel_size - 1, visible)


def visible_pairs(window: Neighborhood, spatial: Sequence[int]) -> int:
    """Number of visible (query, key) pairs of one head on a map of size `spatial`."""
    total = 1
    for length, k, d, s, causal in zip(spatial, *window, strict=True):
        pairs = 0
        for group in range(d) if causal else ():
            n = group_length(length, d, group)
            start, end = visible_range(np.arange(n), n, k, s, causal)
            pairs += int((end - start).sum())
        total *= pairs if causal else length * k
    return total
