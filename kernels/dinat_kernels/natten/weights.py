"""The functions of NATTEN 0.14 to 0.17 that return attention weights, and those that average values with them.

Shapes as in `explicit`.
Source: https://github.com/SHI-Labs/NATTEN, the signatures of its releases 0.14.6 and 0.17.1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..explicit import average, logits
from ..functional import Bools, Ints
from ..geometry import check_fits, make_neighborhood
from ..impl.precision import autocast_dtype, autocast_tensor
from .fused import given

__all__ = [
    *(f"na{rank}d_{step}" for rank in (1, 2, 3) for step in ("qk", "av")),
    *(f"natten{rank}d{step}" for rank in (1, 2, 3) for step in ("qkrpb", "qk", "av")),
]


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
    heads = query.shape[1]
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, {query.shape[-1]}, got {key.shape[-1]}")
    if rpb is not None:
        if any(window.is_causal):
            raise ValueError(f"rpb cannot be combined with a causal axis, got is_causal={window.is_causal}")
        expected = (heads, *(2 * k - 1 for k in window.kernel_size))
        if tuple(rpb.shape) != expected:
            raise ValueError(
                f"rpb must have shape (heads, 2 * kernel_size - 1, ...) = {expected}, got {tuple(rpb.shape)}"
            )
    scores = logits(query, key, window, rpb)
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
    out = average(near, value, window)
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
