"""The backward pass: tiles in matrix products.

What a tile holds is gathered, and gradients of tokens are summed up, by vectors: the numbers of one token and one head,
which lie together in memory.  Copied by its index, a vector costs a fraction of what it does along an inner dimension.
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

from ..layout import PREPARED, Backward, Call, Layout
from ..precision import without_autocast, working_dtype
from .plan import Costs, Plan, group_bias, plan_of, ungroup_bias

# Logits of a chunk: 5 MB in float32, so that two of them stay in the cache, and two heads of a 56x56 map are one chunk.
_CHUNK = 5 << 18
# Measured, k = 7.
_COSTS = Costs(key=28, block=0, image=0)


class _Sums(NamedTuple):
    """What the gradients of tokens are the sums of."""

    tokens: Tensor  # of an image, whose gradients these are
    vectors: Tensor  # of slots: those of the first token's first head, of its second head, ... of each image
    offsets: Tensor  # (images * tokens * heads): where in `vectors` each sum begins


class _Indices(NamedTuple):
    """Of some tiles of some images.  None where a tile is an image: its slots are the tokens, in order."""

    gathers: Sequence[Tensor | None]  # see `_gathered`, for each input
    sums: Sequence[_Sums | None]  # for query, key and value


def _has_vectors(x: Layout) -> bool:
    """Whether memory is a matrix of vectors; strides of 0 and any storage offset will do."""
    return x.stride[-1] == 1 and all(step % x.shape[-1] == 0 for step in x.stride[:-1])


def _gathered(tokens: np.ndarray, group: int, layout: Layout, images: int) -> Tensor:
    """The vectors of a tensor in the slots of tiles, (images * kv_heads * tiles * group * slots).

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


def _summed(tokens: np.ndarray, group: int, layout: Layout, images: int, owner: np.ndarray | None) -> _Sums:
    """What the gradients of the tokens of a tensor are the sums of, in slots as in `_gathered`.

    Args:
        owner: (tiles, slots), zero where a slot has no gradient.
    """
    heads, (tiles, slots) = layout.shape[-2], tokens.shape
    # Slots, those of a token one after another.
    slot = np.arange(tiles * slots) if owner is None else np.flatnonzero(owner)
    slot = slot[np.argsort(tokens.ravel()[slot], kind="stable")]
    unique, first, count = np.unique(tokens.ravel()[slot], return_index=True, return_counts=True)
    # As many sums of a token as there are heads, all of the same slots.
    count_of_sum, first_of_sum = np.repeat(count, heads), np.repeat(first, heads)
    offsets = np.cumsum(count_of_sum) - count_of_sum
    slot = slot[np.repeat(first_of_sum - offsets, count_of_sum) + np.arange(count_of_sum.sum())]
    head = np.repeat(np.tile(np.arange(heads), len(unique)), count_of_sum)
    # The number of (kv_head, tile, head of the group, slot).
    vectors = ((head // group * tiles + slot // slots) * group + head % group) * slots + slot % slots
    of_image = heads * tiles * slots
    image = np.arange(images)[:, None]
    kind = np.int32 if images * of_image < 2**31 else np.int64  # the former is faster
    vectors, offsets = (image * of_image + vectors).astype(kind), (image * len(vectors) + offsets).astype(kind)
    return _Sums(*(torch.from_numpy(x).flatten().to(layout.device) for x in (unique, vectors, offsets)))


def _indices(plan: Plan, start: int, stop: int, images: int, *layouts: Layout) -> _Indices:
    """The indices of tiles `start` to `stop`.

    Args:
        layouts: of query, key, value, and the gradients of out and, if there is one, lse.
    """
    if plan.is_one_tile:
        return _Indices([None] * len(layouts), [None] * 3)
    query, key, *_ = layouts
    group = query.shape[-2] // key.shape[-2]
    queries, keys = (plan.query[start:stop], group), (plan.key[start:stop], 1)
    of_key = _gathered(*keys, key, images)
    of_value = of_key if layouts[2] == key else _gathered(*keys, layouts[2], images)
    others = [_gathered(*queries, layout, images) for layout in layouts[3:]]
    sums = _summed(*queries, query, images, plan.owner[start:stop]), _summed(*keys, key, images, None)
    return _Indices([_gathered(*queries, query, images), of_key, of_value, *others], [*sums, sums[1]])


_kept_indices = lru_cache(maxsize=PREPARED)(_indices)


def _gather(x: Tensor, vectors: Tensor | None) -> Tensor:
    """Slots of (images, *spatial, heads, dim), in the order of `_gathered`, and dim; a view without `vectors`."""
    if vectors is None:
        return x.flatten(1, -3).transpose(1, 2)
    dim = x.shape[-1]
    last = sum((n - 1) * step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)) // dim
    return x.as_strided((last + 1, dim), (dim, 1)).index_select(0, vectors)


def _sum_up(slots: Tensor, sums: _Sums | None, images: int, heads: int) -> Tensor:
    """Gradients of slots to those of tokens, (images, tokens, heads, dim)."""
    dim = slots.shape[-1]
    if sums is None:
        return slots.view(images, heads, -1, dim).transpose(1, 2)
    return F.embedding_bag(sums.vectors, slots.view(-1, dim), sums.offsets, mode="sum").view(images, -1, heads, dim)


def _tile_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    bias: Tensor | None,
    scale: float,
    shape: tuple,
) -> tuple[Tensor, Sequence[Tensor]]:
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
    # d logits = weights * (d weights - their mean), all in the memory of the logits: a row is written once it is read.
    d_logits = torch.bmm(d_out, v.mT, out=logits)
    torch._softmax_backward_data(d_logits, weights, -1, weights.dtype, grad_input=d_logits)
    if d_lse is not None:  # of which every logit has its weight
        d_logits.addcmul_(weights, d_lse)
    return d_logits, (torch.bmm(d_logits, k), torch.bmm(d_logits.mT, q), torch.bmm(weights.mT, d_out))


def prepare_backward(call: Call, grad_out: Layout, has_grad_lse: bool, grads: Sequence[Layout]) -> Backward:
    """The backward pass for a call.

    Args:
        grad_out: layout of the gradient of out.
        has_grad_lse: whether lse has a gradient, too.
        grads: layouts of the gradients of query, key and value: contiguous, or the parts of a contiguous packed
            projection.

    Returns:
        What takes the gradients of out and lse (None for zeros), query, key, value, rpb, out, lse, and memory for the
        gradients of query, key and value, which it writes; it returns that of rpb.  Here a softmax gives the weights
        again, and out and lse are of no use.
    """
    query, key, value, _, window, scale, *_ = call
    batch, *spatial, heads, _ = query.shape
    kv_heads, dtype, device = key.shape[-2], working_dtype(query.dtype), query.device
    group = heads // kv_heads
    plan = plan_of(tuple(spatial), window, _COSTS)
    in_place = [_has_vectors(x) for x in (query, key, value, grad_out)]
    layouts = [
        x if readable else x.contiguous() for x, readable in zip((query, key, value, grad_out), in_place, strict=True)
    ]
    if has_grad_lse:
        layouts.append(query._replace(shape=(*query.shape[:-1], 1), dtype=dtype).contiguous())
    owner = plan.tensor("owner", device=device) if plan.overlapping else None
    row_chunks, image_chunks = plan.chunks(heads, batch, _CHUNK)
    counts = {images.stop - images.start for images in image_chunks}
    # The indices of a large map would fill the memory; and each of its chunks has but a part of a token's gradient.
    is_large = len(row_chunks) > 1
    find = _indices if is_large else _kept_indices

    @without_autocast
    def run(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grads: Sequence[Tensor],
    ) -> Tensor | None:
        tensors = zip((query, key, value, grad_out), in_place, strict=True)
        inputs = [x if readable else x.contiguous() for x, readable in tensors]
        if grad_lse is not None:
            inputs.append(grad_lse.contiguous()[..., None])
        bias, grad_bias, totals = plan.bias(rpb, dtype, device), None, None
        if is_large:
            totals = [x.new_zeros((batch, math.prod(spatial), *x.shape[-2:]), dtype=dtype) for x in grads]

        for rows in row_chunks:
            tiles, d_bias = plan.tiles(rows), None
            indices = {count: find(plan, tiles.start, tiles.stop, count, *layouts) for count in counts}
            tile_bias = None if bias is None else group_bias(plan.tile_bias(bias, rows), kv_heads, heads)
            for images in image_chunks:
                count = images.stop - images.start
                shape = count, kv_heads, tiles.stop - tiles.start
                gathers, sums = indices[count]
                q, k, v, d_out, *d_lse = (
                    _gather(x[images], vectors).to(dtype).reshape(math.prod(shape), -1, x.shape[-1])
                    for x, vectors in zip(inputs, gathers, strict=True)
                )
                if owner is not None:  # of a token in two query slots, one is to send gradients; both are copies
                    for x in (d_out, *d_lse):
                        x.view(-1, shape[2], group, plan.query_slots, x.shape[-1]).mul_(owner[tiles, None, :, None])
                d_logits, slots = _tile_gradients(q, k, v, d_out, d_lse[0] if d_lse else None, tile_bias, scale, shape)
                for i, factor in enumerate((scale, scale, 1.0)):
                    grad = _sum_up(slots[i], sums[i], count, grads[i].shape[-2])
                    if totals is None:
                        torch.mul(grad, factor, out=grads[i][images].flatten(1, -3))
                    else:
                        totals[i][images].index_add_(1, sums[i].tokens, grad, alpha=factor)
                if rpb is not None:
                    d_logits = d_logits.unflatten(0, shape)
                    d_logits = d_logits[0] if count == 1 else d_logits.sum(0)
                    d_bias = d_logits if d_bias is None else d_bias.add_(d_logits)
            if rpb is not None:
                d_bias = plan.bias_grad(ungroup_bias(d_bias, heads), rows)
                grad_bias = d_bias if grad_bias is None else grad_bias.add_(d_bias)
        if totals is not None:
            for grad, total in zip(grads, totals, strict=True):
                grad.copy_(total.view(grad.shape))
        return None if rpb is None else plan.table_grad(grad_bias).to(rpb.dtype)

    return run
