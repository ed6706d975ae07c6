"""Attention whose weights are a tensor, which the fused operator never has.

Query, key and value are (batch, heads, *spatial, dim), weights (batch, heads, *spatial, slots) with one slot per key of
the window, `prod(kernel_size)` of them, the last axis fastest.  The products gather the neighbors of a chunk of queries
at a time: memory is linear in the number of tokens, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Neighborhood, slots_of
from .impl.precision import without_autocast, working_dtype

# Elements of the neighbors that are gathered at a time: 16 MB in float32.
_CHUNK = 1 << 22


def _table(name: str, spatial: Sequence[int], window: Neighborhood, device: torch.device) -> Tensor:
    """The axes' arrays `name` as one tensor (tokens, slots): flat token and bias table indices, or visibility."""
    flat = torch.zeros(1, 1, dtype=torch.int64, device=device)
    sizes = {"key": spatial, "entry": [2 * k - 1 for k in window.kernel_size], "visible": [2] * window.rank}[name]
    for axis, size in zip(zip(spatial, *window, strict=True), sizes, strict=True):
        index = torch.from_numpy(getattr(slots_of(*axis), name)).to(device, torch.int64)
        flat = (flat[:, None, :, None] * size + index[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat == 2**window.rank - 1 if name == "visible" else flat


def _chunks(images: int, spatial: Sequence[int], entries: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images and of rows, and the rows' flat tokens; `entries` is what one token gathers."""
    row = spatial[1:].numel()
    rows = min(spatial[0], max(1, _CHUNK // (row * entries)))
    step = max(1, _CHUNK // (row * entries * rows))
    for image in range(0, images, step):
        for first in range(0, spatial[0], rows):
            last = min(first + rows, spatial[0])
            yield slice(image, image + step), slice(first, last), slice(first * row, last * row)


# Three products, each the derivative of the others, on x (images, *spatial, dim) and weights (images, *spatial, slots).


@without_autocast
def _scores(query: Tensor, key: Tensor, window: Neighborhood) -> Tensor:
    """Dot products of every query with the keys in its slots: weights."""
    spatial, dtype = query.shape[1:-1], working_dtype(query.dtype)
    index = _table("key", spatial, window, query.device)
    out = query.new_empty(*query.shape[:-1], index.shape[1])
    flat_out, flat_query, flat_key = (x.flatten(1, -2) for x in (out, query, key))
    for images, _, tokens in _chunks(len(query), spatial, index.shape[1] * query.shape[-1]):
        slots = index[tokens]
        neighbors = flat_key[images].index_select(1, slots.flatten()).unflatten(1, slots.shape)
        products = neighbors.to(dtype) @ flat_query[images, tokens].to(dtype).unsqueeze(-1)
        flat_out[images, tokens] = products.squeeze(-1).to(out.dtype)
    return out


@without_autocast
def _average(weights: Tensor, value: Tensor, window: Neighborhood) -> Tensor:
    """Sum of the values in every query's slots, weighted: like `value`."""
    spatial, dtype = value.shape[1:-1], working_dtype(value.dtype)
    index = _table("key", spatial, window, value.device)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    flat_out, flat_weights, flat_value = (x.flatten(1, -2) for x in (out, weights, value))
    for images, _, tokens in _chunks(len(value), spatial, index.shape[1] * value.shape[-1]):
        slots = index[tokens]
        neighbors = flat_value[images].index_select(1, slots.flatten()).unflatten(1, slots.shape)
        sums = flat_weights[images, tokens].to(dtype).unsqueeze(-2) @ neighbors.to(dtype)
        flat_out[images, tokens] = sums.squeeze(-2).to(out.dtype)
    return out


@without_autocast
def _spread(weights: Tensor, x: Tensor, window: Neighborhood) -> Tensor:
    """Adjoint of `_average`: every query adds its weighted `x` to the keys in its slots; like `x`."""
    spatial, dtype, rank = x.shape[1:-1], working_dtype(x.dtype), window.rank
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    keys = [torch.from_numpy(slots_of(*axis).key).to(x.device) for axis in zip(spatial, *window, strict=True)]
    order = [0] + [1 + a + part * rank for a in range(rank) for part in range(2)]  # an axis' tokens, then its slots
    for images, rows, _ in _chunks(len(x), spatial, weights.shape[-1] * x.shape[-1]):
        w = weights[images, rows].to(dtype).unflatten(-1, window.kernel_size).permute(order).unsqueeze(-1)
        sources = x[images, rows].to(dtype)
        for a in range(rank):
            sources = sources.unsqueeze(2 + 2 * a)
        sources = w * sources
        for a in reversed(range(1, rank)):  # axis by axis: few indices, long slices
            shape = list(sources.flatten(1 + 2 * a, 2 + 2 * a).shape)
            shape[1 + 2 * a] = spatial[a]
            sums = sources.new_zeros(shape)
            sources = sums.index_add_(1 + 2 * a, keys[a].flatten(), sources.flatten(1 + 2 * a, 2 + 2 * a))
        out[images].index_add_(1, keys[0][rows].flatten(), sources.flatten(1, 2))
    return out.to(x.dtype)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, window: Neighborhood) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.window = window
        return _scores(query, key, window)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key = ctx.saved_tensors
        return _Average.apply(grad, key, ctx.window), _Spread.apply(grad, query, ctx.window), None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, value: Tensor, window: Neighborhood) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.window = window
        return _average(weights, value, window)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, value = ctx.saved_tensors
        return _Scores.apply(grad, value, ctx.window), _Spread.apply(weights, grad, ctx.window), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, x: Tensor, window: Neighborhood) -> Tensor:
        ctx.save_for_backward(weights, x)
        ctx.window = window
        return _spread(weights, x, window)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, x = ctx.saved_tensors
        return _Scores.apply(x, grad, ctx.window), _Average.apply(weights, grad, ctx.window), None


def logits(query: Tensor, key: Tensor, window: Neighborhood, rpb: Tensor | None = None) -> Tensor:
    """Dot products of every query with the keys of its window, not scaled, plus the bias: (batch, heads, *spatial,
    slots).

    Those of hidden keys are minus infinity.  `rpb` is (heads, 2 * kernel_size[0] - 1, ...).
    """
    spatial = query.shape[2:-1]
    scores = _Scores.apply(query.flatten(0, 1), key.flatten(0, 1), window).unflatten(0, query.shape[:2])
    if rpb is not None:
        entry = _table("entry", spatial, window, query.device)
        bias = F.embedding(entry, rpb.flatten(1).t()).permute(2, 0, 1).unflatten(1, spatial)
        scores = (scores + bias).to(scores.dtype)
    if any(window.is_causal):
        visible = _table("visible", spatial, window, query.device).unflatten(0, spatial)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def average(weights: Tensor, value: Tensor, window: Neighborhood) -> Tensor:
    """Sum of the values in every query's window, weighted: (batch, heads, *spatial, dim)."""
    out = _Average.apply(weights.flatten(0, 1), value.flatten(0, 1), window)
    return out.unflatten(0, value.shape[:2])
