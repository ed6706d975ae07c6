"""Tiles in elementary operations: any device and dtype, grouped queries, and tracing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry import Neighborhood
from ..precision import without_autocast, working_dtype
from .plan import Costs, Plan, group_bias, plan_of

# Logits of a chunk, which exist at a time: 4 MB in float32, so that a few of them stay in the cache.
_CHUNK = 1 << 20
# Measured, k = 7.
_COSTS = Costs(key=64, block=0, image=0)


def _split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, *spatial, heads, dim) to (batch, kv_heads, heads // kv_heads, tokens, dim), a view."""
    x = x.flatten(1, -3)
    return x.unflatten(2, (kv_heads, x.shape[2] // kv_heads)).permute(0, 2, 3, 1, 4)


def _gather(x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Tiles of `x`: (batch, kv_heads, group, tokens, dim) and index (tiles, slots) to (..., tiles, group * slots, dim).

    The heads of a group follow one another in the slots, so that they share one matrix product with their key head.
    Without an index, the one tile is a view where it can be.
    """
    x = x.unsqueeze(3) if index is None else x.index_select(3, index.flatten()).unflatten(3, index.shape)
    return x.to(dtype).transpose(2, 3).flatten(3, 4)


def _ungather(tiles: Tensor, plan: Plan, heads: int) -> Tensor:
    """Undo `_gather` for queries: (batch, kv_heads, tiles, group * slots, dim) to (batch, tokens, heads, dim), which is
    contiguous.
    """
    tiles = tiles.unflatten(3, (heads // tiles.shape[1], -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    if plan.is_one_tile:
        return tiles.flatten(2, 3).contiguous()
    return tiles.index_select(1, plan.tensor("slot", device=tiles.device)).flatten(2, 3)


def _logits(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, kv_heads, tiles, queries, dim) and (..., keys, dim) to (..., queries, keys)."""
    logits = query @ key.transpose(-2, -1)
    return logits if bias is None else logits.add_(bias)


def _assemble(grid: list[list[Tensor]], dim: int) -> Tensor:
    """Join chunks, one list of image chunks for every chunk of rows; `dim` is that of the tiles."""
    rows = [images[0] if len(images) == 1 else torch.cat(images) for images in grid]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=dim)


@without_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: Neighborhood,
    scale: float,
    *,
    dropout_p: float = 0.0,
    chunk: int | None = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """Forward pass in elementary operations, which can be traced, exported and differentiated by autograd.

    Arguments and results as `reference.attention`.  Differentiated by autograd, it keeps the logits.

    Args:
        dropout_p: probability of zeroing an attention weight; the others are scaled by `1 / (1 - dropout_p)`.
        chunk: the largest number of logits that exist at a time. None computes all at once, with no loop over the
            batch; lse has its exact gradient only then.
    """
    batch, *spatial, heads, _ = query.shape
    kv_heads, dtype, device = key.shape[-2], working_dtype(query.dtype), query.device
    plan = plan_of(tuple(spatial), window, _COSTS)
    q, k, v = (_split_heads(x, kv_heads) for x in (query, key, value))
    bias = plan.bias(rpb, dtype, device)
    row_chunks, image_chunks = plan.chunks(heads, batch, chunk)
    outs: list[list[Tensor]] = []
    lses: list[list[Tensor]] = []
    for rows in row_chunks:
        query_index, key_index = (plan.gathered(name, rows, device) for name in ("query", "key"))
        tile_bias = None if bias is None else group_bias(plan.tile_bias(bias, rows), kv_heads, heads)
        outs.append([])
        lses.append([])
        for images in image_chunks:
            logits = _logits(
                _gather(q[images], query_index, dtype) * scale, _gather(k[images], key_index, dtype), tile_bias
            )
            weights = logits.softmax(-1)
            if chunk is None:
                lses[-1].append(logits.logsumexp(-1, keepdim=True))
            else:
                # The largest weight is exp(largest logit - lse). Not for autograd, which splits gradients among ties,
                # but twice as fast as logsumexp, which exponentiates again.
                lses[-1].append(logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log())
            weights = F.dropout(weights, dropout_p) if dropout_p else weights
            outs[-1].append(weights @ _gather(v[images], key_index, dtype))
    out = _ungather(_assemble(outs, dim=2), plan, heads).to(value.dtype)
    lse = _ungather(_assemble(lses, dim=2), plan, heads)
    return out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])
