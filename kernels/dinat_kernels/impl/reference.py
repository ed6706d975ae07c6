"""The definition: dense masked attention, differentiable by autograd.  The oracle that every other backend is tested
against.

Time and memory are quadratic in the number of tokens.  All that it shares with the other backends is the window
arithmetic of `geometry.visible_range` and the choice of precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..geometry import Neighborhood, group_length, visible_range
from .layout import Call, Forward, unpacking
from .precision import without_autocast, working_dtype


def _axis_tables(length: int, k: int, d: int, s: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """For every (query, key) pair of an axis: is the key visible, and its entry in the bias table; (length, length)."""
    index = np.arange(length)
    group, position = index % d, index // d
    start, end = np.empty_like(index), np.empty_like(index)
    for g in range(d):
        n = group_length(length, d, g)
        start[g::d], end[g::d] = visible_range(np.arange(n), n, k, s, causal)
    same_group = group[:, None] == group[None, :]
    in_window = (start[:, None] <= position[None, :]) & (position[None, :] < end[:, None])
    entry = position[None, :] - position[:, None] + k - 1
    return same_group & in_window, np.clip(entry, 0, 2 * k - 2)


@without_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention by its definition.

    Args:
        query: (batch, *spatial, heads, head_dim).
        key: (batch, *spatial, kv_heads, head_dim).
        value: (batch, *spatial, kv_heads, value_dim).
        rpb: (heads, 2 * k_1 - 1, ..., 2 * k_r - 1) or None.

    Returns:
        out (batch, *spatial, heads, value_dim) in the dtype of `value`, and lse (batch, *spatial, heads), float32
        (float64 for float64 inputs).  All arithmetic is in that dtype.
    """
    spatial: Sequence[int] = query.shape[1:-2]
    rank, heads, kv_heads = len(spatial), query.shape[-2], key.shape[-2]
    dtype = working_dtype(query.dtype)

    q, k, v = (x.flatten(1, rank).transpose(1, 2).to(dtype) for x in (query, key, value))  # (batch, heads, tokens, dim)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    logits = scale * (q @ k.transpose(-2, -1))  # (batch, heads, queries, keys)

    tables = [_axis_tables(*axis) for axis in zip(spatial, *window, strict=True)]
    visible = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    entry = torch.zeros(1, 1, dtype=torch.long, device=query.device)
    for (axis_visible, axis_entry), size in zip(tables, window.kernel_size, strict=True):
        axis_visible = torch.from_numpy(axis_visible).to(query.device)
        axis_entry = torch.from_numpy(axis_entry).to(query.device)
        visible = torch.kron(visible, axis_visible)
        ones = torch.ones_like(axis_entry)
        entry = torch.kron(entry, ones) * (2 * size - 1) + torch.kron(torch.ones_like(entry), axis_entry)
    if rpb is not None:
        logits = logits + rpb.to(dtype).flatten(1)[:, entry]
    logits = logits.masked_fill(~visible, float("-inf"))

    out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, spatial)
    lse = logits.logsumexp(-1).transpose(1, 2).unflatten(1, spatial)
    return out.to(value.dtype).contiguous(), lse.contiguous()


def prepare(call: Call) -> Forward:
    """See `tiled.prepare`."""
    return unpacking(partial(attention, window=call.window, scale=call.scale), call)
