"""The functions of NATTEN 0.20 and newer: neighborhood attention, full attention, and both merged.

All tensors are heads last.  Source: https://github.com/SHI-Labs/NATTEN, the signatures of its release 0.21.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import Bools, Ints
from ..functional import na1d as _na1d
from ..functional import na2d as _na2d
from ..functional import na3d as _na3d
from ..impl.precision import autocast_dtype, autocast_tensor, without_autocast, working_dtype

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]

# Choices among equal implementations, which NATTEN's functions take and these ignore.
_BACKENDS = {f"{kernels}-{kind}" for kernels in ("cutlass", "hopper", "blackwell", "flex") for kind in ("fna", "fmha")}
_TUNING = {
    *(f"{step}{tile}" for step in ("", "backward_") for tile in ("q_tile_shape", "kv_tile_shape")),
    *(f"{step}{tile}" for step in ("", "backward_") for tile in ("q_tile_size", "kv_tile_size")),
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
}
_PACKED = {
    f"{kind}seqlen{s}_{side}" for kind, s in (("", "s"), ("cumulative_", ""), ("max_", "")) for side in ("Q", "KV")
}
_T = TypeVar("_T")


def given(argument: _T | None, default: _T) -> _T:
    """An argument that may be None for its default.  0 is no default: it is refused later on."""
    return default if argument is None else argument


def _check_tuning(tuning: dict) -> None:
    if unknown := set(tuning) - _TUNING:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints | None = 1,
    dilation: Ints | None = 1,
    is_causal: Bools | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    *,
    backend: str | None = None,
    return_lse: bool = False,
    rpb: Tensor | None = None,
    **tuning,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention as NATTEN 0.20 and newer call it; `na1d`, `na2d` and `na3d` are this function.

    Args:
        query: (batch, *spatial, heads, head_dim); key and value likewise, see `dinat_kernels.na2d`.
        additional_keys: (batch, tokens, kv_heads, head_dim), seen by every query besides its neighborhood.
        additional_values: (batch, tokens, kv_heads, value_dim).
        attention_kwargs: further arguments of `attention`, which serves the additional keys.
        backend: one of `dinat_kernels.backends()`.  NATTEN's own names select among equal implementations, as do tile
            shapes and the other arguments in `tuning`: they are ignored.
        return_lse: also return the logarithm of the softmax denominator, additional keys included.
        rpb: relative position bias, which NATTEN dropped in 0.20.

    Returns:
        (batch, *spatial, heads, value_dim), with `return_lse` also (batch, *spatial, heads).

    Raises:
        TypeError: an argument that NATTEN does not have.
        ValueError: as `dinat_kernels.na2d`, or additional keys and values that do not fit together.
    """
    _check_tuning(tuning)
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query must have 4 to 6 dimensions, got shape {tuple(query.shape)}")
    more = _check_additional(key, value, additional_keys, additional_values)
    result = (_na1d, _na2d, _na3d)[rank - 1](
        query,
        key,
        value,
        kernel_size,
        dilation=given(dilation, 1),
        stride=given(stride, 1),
        is_causal=given(is_causal, False),
        scale=scale,
        rpb=rpb,
        return_lse=return_lse or more,
        backend=None if backend in _BACKENDS else backend,
    )
    if not more:
        return result
    near_out, near_lse = result
    far = attention(
        query.flatten(1, -3),
        additional_keys,
        additional_values,
        scale=scale,
        return_lse=True,
        **(attention_kwargs or {}),
    )
    far_out, far_lse = (x.unflatten(1, query.shape[1:-2]) for x in far)
    out, lse = _merge([near_out, far_out], [near_lse, far_lse])
    return (out, lse) if return_lse else out


na1d = na2d = na3d = neighborhood_attention_generic


def _check_additional(key: Tensor, value: Tensor, more_keys: Tensor | None, more_values: Tensor | None) -> bool:
    """Whether there are additional keys and values; a ValueError says which do not fit."""
    if (more_keys is None) != (more_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if more_keys is None:
        return False
    for name, x, like in (("additional_keys", more_keys, key), ("additional_values", more_values, value)):
        expected = (key.shape[0], more_keys.shape[1:2].numel(), *like.shape[-2:])
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must be (batch, tokens, heads, dim) = {expected}, got {tuple(x.shape)}")
    return True


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    backend: str | None = None,
    return_lse: bool = False,
    **tuning,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key, heads last.

    Args:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, kv_heads, head_dim); `heads` must be a multiple of `kv_heads`.
        value: (batch, keys, kv_heads, value_dim).
        is_causal: hide from query i the keys after key i.
        scale: factor of the dot products, `head_dim ** -0.5` by default.
        return_lse: also return the logarithm of the softmax denominator, which is differentiable.  All dot products
            are kept then; without, `scaled_dot_product_attention` of PyTorch does the work.
        backend, tuning: select among equal implementations of NATTEN; ignored.

    Returns:
        (batch, queries, heads, value_dim), with `return_lse` also (batch, queries, heads), float32 or float64.

    Raises:
        TypeError: an argument that NATTEN does not have.
        ValueError: the shapes do not fit together, or several sequences are packed into one (`seqlens_Q` and others).
    """
    if packed := sorted(name for name in _PACKED & set(tuning) if tuning[name] is not None):
        raise ValueError(
            f"{packed[0]}: sequences packed into one are not served; call attention for each of them, or "
            "torch.nn.attention.varlen.varlen_attn for all"
        )
    _check_tuning({name: x for name, x in tuning.items() if name not in _PACKED})
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, sorted(_BACKENDS)))}, got {backend!r}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-dimensional, (batch, tokens, heads, dim), got shape {tuple(x.shape)}")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch size of query, {query.shape[0]}, got {x.shape[0]}")
    groups = query.shape[2] // max(1, key.shape[2])
    if key.shape[:3] != value.shape[:3] or query.shape[2] != groups * key.shape[2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "key must have the head_dim of query and value the tokens and heads of key, which divide those of query; "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    dtype = autocast_dtype(query.device.type)
    if dtype is not None:
        query, key, value = (autocast_tensor(x, dtype) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if not return_lse:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=groups > 1)
        return out.transpose(1, 2)
    out, lse = _with_lse(query, key, value, groups, is_causal, given(scale, query.shape[-1] ** -0.5))
    return out.transpose(1, 2), lse.transpose(1, 2)


@without_autocast
def _with_lse(
    query: Tensor, key: Tensor, value: Tensor, groups: int, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(query.dtype)
    key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    logits = scale * (query.to(dtype) @ key.mT)
    if is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    return (logits.softmax(-1) @ value).to(query.dtype), logits.logsumexp(-1)


def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """Outputs of the same queries on different keys, merged into what all keys together would give.

    Differentiable by outputs and `lse_tensors` alike, so these must come with their gradients: those that `attention`
    and `na2d` return do.  Others would give wrong gradients.

    Args:
        outputs: (batch, *tokens, heads, dim) each.
        lse_tensors: (batch, *tokens, heads) each, natural logarithms of the softmax denominators.
        torch_compile: ignored.
        use_autograd_fix: refuse an lse without gradients.  NATTEN overwrites tensors that its kernels saved instead.

    Returns:
        The merged output and its lse.

    Raises:
        ValueError: fewer than two outputs, shapes that differ, or an lse without gradients.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            "outputs and lse_tensors must be two or more, and as many, "
            f"got {len(outputs)} outputs and {len(lse_tensors)} lse_tensors"
        )
    for i, (out, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outputs must have one shape and lse_tensors the same without dim, {tuple(outputs[0].shape)}, "
                f"got {tuple(out.shape)} and {tuple(lse.shape)} at {i}"
            )
        if use_autograd_fix and out.requires_grad and not lse.requires_grad:
            raise ValueError(
                f"lse_tensors[{i}] has no gradient while its output has one: take both from attention or na2d with "
                "return_lse=True, or pass use_autograd_fix=False if queries and keys need none"
            )
    return _merge(outputs, lse_tensors)


def _merge(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(outputs[0].dtype)
    lses = torch.stack([lse.to(dtype) for lse in lse_tensors])
    lse = lses.logsumexp(0)
    shares = (lses - lse).exp().unsqueeze(-1)
    out = sum(share * x.to(dtype) for share, x in zip(shares, outputs, strict=True))
    return out.to(outputs[0].dtype), lse
