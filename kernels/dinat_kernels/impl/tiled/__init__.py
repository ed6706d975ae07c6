"""The "torch" backend: tiled neighborhood attention in plain PyTorch, for any device and dtype.

A tile is a run of queries and the keys that their windows cover (see `plan`).  Attention is then a batched matrix
product between the queries and the keys of a tile, with one additive tensor that holds the bias and minus infinity
where a key is out of a query's window.  Work and memory are linear in the number of tokens.

On the CPU, PyTorch's fused attention computes the tiles (`cpu`); elsewhere and for tracing, elementary operations do
(`unrolled`), as in the backward pass (`backward`).
"""

from __future__ import annotations

from functools import partial

from ..layout import Call, Forward, unpacking
from . import cpu
from .backward import prepare_backward
from .unrolled import attention

__all__ = ["prepare", "prepare_backward"]


def prepare(call: Call) -> Forward:
    """The forward pass for a call; its arguments and results as `reference.attention`."""
    if cpu.can_fuse(call.query, call.key, call.value):
        return cpu.prepare(call)
    return unpacking(partial(attention, window=call.window, scale=call.scale), call)
