"""The functions of NATTEN 0.14 to 0.17 that return attention weights, and those that average values with them.

Query, key and value are (batch, heads, *spatial, dim), attention weights (batch, heads, *spatial, slots) with one slot
per key of the window, `prod(kernel_size)` of them, the last axis fastest.  They keep those weights, and gather the
neighbors of a chunk of queries at a time: memory is linear in the number of tokens, in both directions.
Source: https://github.com/SHI-Labs/NATTEN, the signatures of its releases 0.14.6 and 0.17.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import Bools, Ints
from ..geometry import Neighborhood, check_fits, group_length, make_neighborhood, visible_range
from ..impl.precision import autocast_dtype, autocast_tensor, without_autocast, working_dtype
from .fused import given

__all__ = [
    *(f"na{rank}d_{step}" for rank in (1, 2, 3) for step in ("qk", "av")),
    *(f"natten{rank}d{step}" for rank in (1, 2, 3) for step in ("qkrpb", "qk", "av")),
]

# Elements of the neighbors that are gathered at a time: 16 MB in float32.
_CHUNK = 1 << 22


class _Axis(NamedTuple):
    """The window of every token of an axis; (length, kernel_size) each."""

    key: np.ndarray  # token in each slot
    entry: np.ndarray  # its entry in the bias table
    visible: np.ndarray  # False in the slots after a causal window's last key


def _axis(length: int, k: int, d: int, s: int, causal: bool) -> _Axis:
    group, query = np.arange(length) % d, np.arange(length) // d
    start, end = np.empty((2, length), dtype=np.int64)
    for g in range(d):
        n = group_length(length, d, g)
        start[g::d], end[g::d] = visible_range(np.arange(n), n, k, s, causal)
    position = start[:, None] + np.arange(k)
    visible = position < end[:, None]
    position = np.minimum(position, end[:, None] - 1)  # an invisible slot repeats a key, with weight 0
    return _Axis(position * d + group[:, None], position - query[:, None] + k - 1, visible)


def _table(name: str, spatial: Sequence[int], window: Neighborhood, device: torch.device) -> Tensor:
    """The axes' arrays `name` as one tensor (tokens, slots): flat token and bias table indices, or visibility."""
    flat = torch.zeros(1, 1, dtype=torch.int64, device=device)
    sizes = {"key": spatial, "entry": [2 * k - 1 for k in window.kernel_size], "visible": [2] * window.rank}[name]
    for axis, size in zip(zip(spatial, *window, strict=True), sizes, strict=True):
        index = torch.from_numpy(getattr(_axis(*axis), name)).to(device, torch.int64)
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
    keys = [torch.from_numpy(_axis(*axis).key).to(x.device) for axis in zip(spatial, *window, strict=True)]
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


def _prepare(rank: int, kernel_size: Ints, dilation: Ints | None, is_causal: Bools | None, **tensors: Tensor):
    """The window, and the tensors in the dtype of autocast, checked against it and one another."""
    window = make_neighborhood(rank, kernel_size, given(dilation, 1), 1, given(is_causal, False))
    dtype = autocast_dtype(next(iter(tensors.values())).device.type)
    tensors = {name: x if dtype is None else autocast_tensor(x, dtype) for name, x in tensors.items()}
    (first, reference), *others = tensors.items()
    if reference.dim() != rank + 3:
        axes = ", ".join("XYZ"[:rank])
        raise ValueError(
            f"{first} must be {rank + 3}-dimensional, (batch, heads, {axes}, dim), got shape {tuple(reference.shape)}"
        )
    for name, x in others:
        if x.shape[:-1] != reference.shape[:-1]:
            raise ValueError(
                f"{name} must have the batch, heads and spatial sizes of {first}, {tuple(reference.shape[:-1])}, "
                f"got {tuple(x.shape[:-1])}"
            )
    check_fits(window, reference.shape[2:-1])
    return window, *tensors.values()


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: Bools | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Logits of every query, not scaled: `na1d_qk`, `na2d_qk` and `na3d_qk` of NATTEN 0.15 to 0.17.

    Args:
        query: (batch, heads, *spatial, head_dim), scaled by the caller; key likewise.
        additional_keys: (batch, heads, tokens, head_dim), seen by every query; their logits follow the window's.
        is_causal: hide the keys after the query, one or one per axis; their logits are minus infinity.
        rpb: relative position bias (heads, 2 * kernel_size[0] - 1, ...).

    Returns:
        (batch, heads, *spatial, prod(kernel_size) + tokens)

    Raises:
        ValueError: shapes or window arguments do not fit together; the message names the argument.
    """
    window, query, key = _prepare(rank, kernel_size, dilation, is_causal, query=query, key=key)
    spatial, heads = query.shape[2:-1], query.shape[1]
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, {query.shape[-1]}, got {key.shape[-1]}")
    scores = _Scores.apply(query.flatten(0, 1), key.flatten(0, 1), window).unflatten(0, query.shape[:2])
    if rpb is not None:
        if any(window.is_causal):
            raise ValueError(f"rpb cannot be combined with a causal axis, got is_causal={window.is_causal}")
        expected = (heads, *(2 * k - 1 for k in window.kernel_size))
        if tuple(rpb.shape) != expected:
            raise ValueError(
                f"rpb must have shape (heads, 2 * kernel_size - 1, ...) = {expected}, got {tuple(rpb.shape)}"
            )
        entry = _table("entry", spatial, window, query.device)
        bias = F.embedding(entry, rpb.flatten(1).t()).permute(2, 0, 1).unflatten(1, spatial)
        scores = (scores + bias).to(scores.dtype)
    if any(window.is_causal):
        visible = _table("visible", spatial, window, query.device).unflatten(0, spatial)
        scores = scores.masked_fill(~visible, float("-inf"))
    if additional_keys is not None:
        more = torch.einsum("bh...d,bhnd->bh...n", query, additional_keys.to(query.dtype))
        scores = torch.cat([scores, more], dim=-1)
    return scores


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints | None = 1,
    additional_values: Tensor | None = None,
    is_causal: Bools | None = False,
) -> Tensor:
    """Values averaged with the weights `attn`: `na1d_av`, `na2d_av` and `na3d_av` of NATTEN 0.15 to 0.17.

    Args:
        attn: (batch, heads, *spatial, prod(kernel_size) + tokens), what the function `_qk` returns after a softmax.
        value: (batch, heads, *spatial, value_dim).
        additional_values: (batch, heads, tokens, value_dim), where the logits had `additional_keys`.

    Returns:
        (batch, heads, *spatial, value_dim)

    Raises:
        ValueError: shapes or window arguments do not fit together; the message names the argument.
    """
    window, value, attn = _prepare(rank, kernel_size, dilation, is_causal, value=value, attn=attn)
    slots = [torch.Size(window.kernel_size).numel(), 0 if additional_values is None else additional_values.shape[-2]]
    if attn.shape[-1] != sum(slots):
        raise ValueError(f"attn must have {sum(slots)} weights per token, got {attn.shape[-1]}")
    near, far = attn.split(slots, dim=-1)
    out = _Average.apply(near.flatten(0, 1), value.flatten(0, 1), window).unflatten(0, value.shape[:2])
    if additional_values is not None:
        out = out + torch.einsum("bh...n,bhnd->bh...d", far.to(out.dtype), additional_values.to(out.dtype))
    return out


na1d_qk, na2d_qk, na3d_qk = (partial(_qk, rank) for rank in (1, 2, 3))
na1d_av, na2d_av, na3d_av = (partial(_av, rank) for rank in (1, 2, 3))

# The same with the names and arguments of NATTEN 0.14 and 0.15.
natten1dqk, natten2dqk = na1d_qk, na2d_qk
natten1dav, natten2dav = na1d_av, na2d_av


def natten1dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Ints, dilation: Ints | None = 1
) -> Tensor:
    """`na1d_qk` with a bias."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Ints, dilation: Ints | None = 1
) -> Tensor:
    """`na2d_qk` with a bias."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def depth_first(
    kernel_size_d: int, kernel_size: int, dilation_d: int | None, dilation: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kernel size and dilation per axis, where the window of the first axis is given apart."""
    dilation = given(dilation, 1)
    return (kernel_size_d, kernel_size, kernel_size), (given(dilation_d, 1), dilation, dilation)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int | None = 1,
    dilation: int | None = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` with a bias; the window of the first axis is given apart."""
    window = depth_first(kernel_size_d, kernel_size, dilation_d, dilation)
    return na3d_qk(query, key, *window, additional_keys, rpb=rpb)


def natten3dqk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int | None = 1,
    dilation: int | None = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk`; the window of the first axis is given apart."""
    return na3d_qk(query, key, *depth_first(kernel_size_d, kernel_size, dilation_d, dilation), additional_keys)


def natten3dav(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int | None = 1,
    dilation: int | None = 1,
    additional_values: Tensor | None = None,
) -> Tensor:
    """`na3d_av`; the window of the first axis is given apart."""
    return na3d_av(attn, value, *depth_first(kernel_size_d, kernel_size, dilation_d, dilation), additional_values)
