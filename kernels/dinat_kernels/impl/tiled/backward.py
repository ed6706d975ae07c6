"""The backward pass: tiles in matrix products.

What a tile reads, and what a token's gradient is the sum of, are rows: the numbers of one token and one head, which lie
together in memory.  Rows are copied and summed up by their indices, several times as fast as along an inner dimension.
Only the logits of some tiles exist at a time; they are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry import Neighborhood
from ..layout import Layout, layout_of
from ..precision import working_dtype
from .plan import Costs, Plan, plan_of
from .unrolled import group_bias

# Logits of a chunk: 5 MB in float32, so that two of them stay in the cache, and two heads of a 56x56 map are one chunk.
_CHUNK = 5 << 18
# Measured, k = 7.
_COSTS = Costs(key=28, block=0, image=0)


class _Sums(NamedTuple):
    """What the gradients of tokens are the sums of."""

    tokens: Tensor  # of an image, whose gradients these are
    rows: Tensor  # of slots: those of the first token's first head, of its second head, ... of each image
    offsets: Tensor  # (images * tokens * heads): where in `rows` each sum begins


class _Chunk(NamedTuple):
    """Some rows of tiles, of some images; None where a tile is an image."""

    reads: list[Tensor | None]  # for each input, see `_reads`
    sums: list[_Sums | None]  # for query, key and value


def _has_rows(x: Tensor) -> bool:
    """Whether memory is a matrix with the numbers of one token and head in a row."""
    return x.stride(-1) == 1 and all(step % x.shape[-1] == 0 for step in x.stride()[:-1])


def _reads(tokens: np.ndarray, group: int, layout: Layout, images: int) -> Tensor:
    """The rows of `layout` that the slots of tiles read, (images * kv_heads * tiles * group * slots).

    Args:
        tokens: (tiles, slots).
        group: heads that follow one another in the slots, because they share a matrix product with their key head.
    """
    of_image, *of_axes, of_head, _ = (step // layout.shape[-1] for step in layout.stride)
    position = np.unravel_index(tokens, layout.shape[1:-2])
    token = sum(i * step for i, step in zip(position, of_axes, strict=True))
    head = np.arange(layout.shape[-2]).reshape(-1, 1, group, 1) * of_head
    image = np.arange(images)[:, None] * of_image
    return torch.from_numpy(image + (head + token[:, None]).ravel()).flatten().to(layout.device)


def _sums(tokens: np.ndarray, group: int, layout: Layout, images: int, owner: np.ndarray | None) -> _Sums:
    """What the gradients of the tokens of `layout` are the sums of, in slots as in `_reads`.

    Args:
        owner: (tiles, slots), zero where a slot has no gradient.
    """
    heads, (tiles, slots) = layout.shape[-2], tokens.shape
    tokens = tokens.ravel()
    slot = np.arange(tiles * slots) if owner is None else np.flatnonzero(owner)
    slot = slot[np.argsort(tokens[slot], kind="stable")]
    tokens, first, sizes = np.unique(tokens[slot], return_index=True, return_counts=True)
    # As many sums of each token as there are heads.
    head, first, sizes = np.tile(np.arange(heads), len(tokens)), np.repeat(first, heads), np.repeat(sizes, heads)
    offsets = np.cumsum(sizes) - sizes
    slot, head = slot[np.repeat(first - offsets, sizes) + np.arange(sizes.sum())], np.repeat(head, sizes)
    rows = ((head // group * tiles + slot // slots) * group + head % group) * slots + slot % slots
    image = np.arange(images)[:, None]
    rows, offsets = image * (heads * tiles * slots) + rows, image * len(rows) + offsets
    rows, offsets = rows.astype(np.int32), offsets.astype(np.int32)  # enough for a chunk, and faster
    return _Sums(*(torch.from_numpy(x).flatten().to(layout.device) for x in (tokens, rows, offsets)))


# As many as the layers of a model need: those of a large map take as much memory as its tensors.
@lru_cache(maxsize=32)
def _chunks(plan: Plan, *layouts: Layout) -> tuple[list[tuple[slice, dict[int, _Chunk]]], list[slice]]:
    """The rows of tiles (see `Plan.chunks`) with their chunks by the number of images, and the images done at a time.

    Args:
        layouts: of query, key, value, and the gradients of out and, if there is one, lse.
    """
    query, key, *_ = layouts
    batch, heads, group = query.shape[0], query.shape[-2], query.shape[-2] // key.shape[-2]
    row_chunks, image_chunks = plan.chunks(heads, batch, _CHUNK)
    kinds = list(zip(("query", "key", "key", "query", "query"), layouts, strict=False))

    def chunk(rows: slice, images: int) -> _Chunk:
        if plan.is_one_tile:
            return _Chunk([None] * len(kinds), [None] * 3)
        tiles = plan.tiles(rows)
        slots = {"query": (plan.query[tiles], group), "key": (plan.key[tiles], 1)}
        reads = {kind: _reads(*slots[kind[0]], kind[1], images) for kind in set(kinds)}
        of_query = _sums(*slots["query"], query, images, plan.owner[tiles])
        of_key = _sums(*slots["key"], key, images, None)
        return _Chunk([reads[kind] for kind in kinds], [of_query, of_key, of_key])

    counts = {images.stop - images.start for images in image_chunks}
    return [(rows, {count: chunk(rows, count) for count in counts}) for rows in row_chunks], image_chunks


def _slots_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """(images, *spatial, heads, dim) in slots: images, heads, tiles and slots in the order of `_reads`, then dim."""
    if rows is None:
        return x.flatten(1, -3).transpose(1, 2)
    dim = x.shape[-1]
    last = sum((n - 1) * step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)) // dim
    return x.as_strided((last + 1, dim), (dim, 1)).index_select(0, rows)


def _tokens_of(slots: Tensor, sums: _Sums | None, images: int, heads: int) -> Tensor:
    """Gradients of slots to those of tokens, (images, tokens, heads, dim)."""
    dim = slots.shape[-1]
    if sums is None:
        return slots.view(images, heads, -1, dim).transpose(1, 2)
    return F.embedding_bag(sums.rows, slots.view(-1, dim), sums.offsets, mode="sum").view(images, -1, heads, dim)


def _of_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    bias: Tensor | None,
    scale: float,
    shape: tuple,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Gradients of the logits, and of q and k, but for the scale, and v.

    Args:
        q, d_out, d_lse: (images * kv_heads * tiles, group * slots, dim); dim is 1 in `d_lse`.
        k, v: (images * kv_heads * tiles, slots, dim).
        bias: (kv_heads or 1, tiles, group * slots, slots).
        shape: images, kv_heads, tiles.
    """
    logits = torch.bmm(q, k.mT)
    if bias is None:
        logits.mul_(scale)
    else:
        by_head = logits.unflatten(0, shape)
        torch.add(bias, by_head, alpha=scale, out=by_head)
    weights = logits.softmax(-1)
    # d logits = weights * (d weights - their mean); in the memory of the logits
    d_logits = torch.bmm(d_out, v.mT, out=logits)
    torch._softmax_backward_data(d_logits, weights, -1, weights.dtype, grad_input=d_logits)
    if d_lse is not None:  # of which every logit has its weight
        d_logits.addcmul_(weights, d_lse)
    return d_logits, (torch.bmm(d_logits, k), torch.bmm(d_logits.mT, q), torch.bmm(weights.mT, d_out))


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    grads: Sequence[Tensor],
) -> Tensor | None:
    """The gradient of rpb, and in `grads` those of query, key and value, given those of out and lse.

    `out` and `lse` are not needed: a softmax gives the weights again.

    Args:
        grads: what is written to, in the shapes of query, key and value; contiguous, or the parts of a contiguous
            packed projection.
    """
    batch, *spatial, heads, _ = query.shape
    kv_heads, dtype, device = key.shape[-2], working_dtype(query.dtype), query.device
    group = heads // kv_heads
    plan = plan_of(tuple(spatial), window, _COSTS)
    inputs = [x if _has_rows(x) else x.contiguous() for x in (query, key, value, grad_out)]
    if grad_lse is not None:
        inputs.append(grad_lse.contiguous()[..., None])
    chunks, image_chunks = _chunks(plan, *map(layout_of, inputs))
    bias, grad_bias = plan.bias(rpb, dtype, device), None
    owner = plan.tensor("owner", device=device) if plan.overlapping else None
    # With several chunks of tiles, each has but a part of a token's gradient.
    totals = [x.new_zeros((batch, math.prod(spatial), *x.shape[-2:]), dtype=dtype) for x in grads if len(chunks) > 1]

    for rows, by_count in chunks:
        tiles, d_bias = plan.tiles(rows), None
        tile_bias = None if bias is None else group_bias(plan.tile_bias(bias, rows), kv_heads, heads)
        for images in image_chunks:
            count = images.stop - images.start
            reads, sums = by_count[count]
            shape = count, kv_heads, tiles.stop - tiles.start
            q, k, v, d_out, *d_lse = (
                _slots_of(x[images], rows_of_x).to(dtype).reshape(math.prod(shape), -1, x.shape[-1])
                for x, rows_of_x in zip(inputs, reads, strict=True)
            )
            if owner is not None:  # of a token in two query slots, one is to send gradients
                for x in (d_out, *d_lse):
                    x.view(-1, shape[2], group, plan.query_slots, x.shape[-1]).mul_(owner[tiles, None, :, None])
            d_logits, slots = _of_slots(q, k, v, d_out, d_lse[0] if d_lse else None, tile_bias, scale, shape)
            for i, (of_slots, of_tokens, factor) in enumerate(zip(slots, sums, (scale, scale, 1.0), strict=True)):
                grad = _tokens_of(of_slots, of_tokens, count, grads[i].shape[-2])
                if totals:
                    totals[i][images].index_add_(1, of_tokens.tokens, grad, alpha=factor)
                else:
                    torch.mul(grad, factor, out=grads[i][images].flatten(1, -3))
            if rpb is not None:
                d_logits = d_logits.view(*shape, *d_logits.shape[1:])
                d_logits = d_logits[0] if count == 1 else d_logits.sum(0)
                d_bias = d_logits if d_bias is None else d_bias.add_(d_logits)
        if rpb is not None:
            d_bias = plan.bias_grad(d_bias.unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1), rows)
            grad_bias = d_bias if grad_bias is None else grad_bias.add_(d_bias)
    for grad, total in zip(grads, totals, strict=False):
        grad.copy_(total.view(grad.shape))
    return None if rpb is None else plan.table_grad(grad_bias).to(rpb.dtype)
