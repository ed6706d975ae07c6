"""The "torch" backend: tiled neighborhood attention in plain PyTorch, for any device and dtype.

A tile is a run of queries and the keys that their windows cover (see `plan`).  Attention is then a batched matrix
product between the queries and the keys of a tile, with one additive tensor that holds the bias and minus infinity
where a key is out of a query's window.  Work and memory are linear in the number of tokens.

On the CPU, PyTorch's fused attention computes the tiles (`cpu`); elsewhere, in the backward pass, and for tracing,
elementary operations do (`unrolled`).
"""

from __future__ import annotations

from functools import partial

from ...geometry import Neighborhood
from ..layout import Forward, Layout, unpacking
from . import cpu
from .unrolled import attention, attention_backward

__all__ = ["attention_backward", "prepare"]


def prepare(
    query: Layout,
    key: Layout,
    value: Layout,
    rpb: Layout | None,
    window: Neighborhood,
    scale: float,
    with_lse: bool,
    gap: int | None,
) -> Forward:
    """The forward pass for tensors of these layouts; its arguments and results as `reference.attention`.

    Args:
        with_lse: if not, None may be returned in the place of lse.
        gap: as `gap_of`; if not None, the pass is given the packed projection and None for key and value.
    """
    if cpu.can_fuse(query, key, value):
        return cpu.prepare(query, key, value, rpb, window, scale, with_lse, gap)
    return unpacking(partial(attention, window=window, scale=scale), gap)
