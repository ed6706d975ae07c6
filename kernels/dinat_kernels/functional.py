"""The public functions: neighborhood attention in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import ops
from .geometry import Neighborhood, check_fits, make_neighborhood
from .impl import reference, resolve
from .impl.layout import PREPARED, Forward, Layout, layouts_of, problem_of, unpacked
from .impl.precision import autocast_dtype, autocast_tensor
from .impl.tiled import unrolled

_HASHABLE = (int, bool, tuple)  # what a window argument must be to be looked up; lists become tuples
_SCALES = (int, float, type(None))
Ints = int | Sequence[int]
Bools = bool | Sequence[bool]
Window = tuple[Ints, Ints, Ints, Bools]  # kernel_size, dilation, stride and is_causal, without lists


def _check(
    rank: int,
    window: Window,
    scale: float | None,
    query: Tensor | Layout,
    key: Tensor | Layout,
    value: Tensor | Layout,
    rpb: Tensor | Layout | None,
) -> tuple[Neighborhood, float]:
    """The window and the scale, if all arguments are well formed and fit together; else a ValueError says which does
    not.
    """
    window = make_neighborhood(rank, *window)
    layout = f"(batch, {', '.join('XYZ'[:rank])}, heads, dim)"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != rank + 3:
            raise ValueError(f"{name} must be {rank + 3}-dimensional, {layout}, got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {x.dtype} on {x.device}"
            )
        if x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} must have the batch and spatial sizes of query, {tuple(query.shape[:-2])}, "
                f"got {tuple(x.shape[:-2])}"
            )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if query.shape[-1] == 0:
        raise ValueError("query must have a head_dim of at least 1, got 0")
    if value.shape[-1] == 0:
        raise ValueError("value must have a head_dim of at least 1, got 0")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, {query.shape[-1]}, got {key.shape[-1]}")
    if value.shape[-2] != kv_heads:
        raise ValueError(f"value must have the heads of key, {kv_heads}, got {value.shape[-2]}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of query must be a multiple of those of key, got {heads} and {kv_heads}")
    check_fits(window, query.shape[1:-2])
    if rpb is not None:
        if any(window.is_causal):
            raise ValueError(f"rpb cannot be combined with a causal axis, got is_causal={window.is_causal}")
        expected = (heads, *(2 * k - 1 for k in window.kernel_size))
        if tuple(rpb.shape) != expected:
            raise ValueError(
                f"rpb must have shape (heads, 2 * kernel_size - 1, ...) = {expected}, got {tuple(rpb.shape)}"
            )
        if not rpb.dtype.is_floating_point or rpb.device != query.device:
            raise ValueError(f"rpb must be a floating-point tensor on {query.device}, got {rpb.dtype} on {rpb.device}")
    return window, _scale(scale, query)


def _scale(scale: float | None, query: Tensor | Layout) -> float:
    """The scale, or its default."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


@lru_cache(maxsize=PREPARED)
def _prepare(
    rank: int,
    window: Window,
    scale: float | None,
    problem: tuple,
    backend: str | None,
    with_lse: bool,
    with_grad: bool,
) -> Forward:
    """What runs for tensors of these layouts that nobody watches, once all arguments are found to be right.

    Args:
        problem: as `problem_of`.
        with_grad: whether autograd will want to differentiate it.
    """
    query, key, value, rpb = layouts_of(problem)
    neighborhood, scale = _check(rank, window, scale, query, key, value, rpb)
    name = resolve(backend, query, value)
    if query.device.type == "meta":
        return partial(ops.attention, window=neighborhood, scale=scale, backend=name, with_lse=with_lse)
    if with_grad and name != "reference":  # which is made of operations that autograd knows
        return ops.differentiable(name, neighborhood, scale, problem)
    return ops.prepared(name, tuple(neighborhood.flat()), scale, problem, with_lse).forward


def _hashable(rank: int, *window: Ints | Bools) -> Window:
    """The window arguments of `na1d` and others in a form that can be looked up."""
    for axes in window:
        if type(axes) not in _HASHABLE:
            return make_neighborhood(rank, *window)
    return window


def attend(
    rank: int,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    window: Window,
    scale: float | None,
    rpb: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na1d`, `na2d` or `na3d`.

    Args:
        key, value: None if `query` is a packed projection of all three, (batch, *spatial, 3, heads, dim).
        window: kernel_size, dilation, stride and is_causal.
    """
    if not isinstance(scale, _SCALES):
        raise ValueError(f"scale must be a number or None, got {scale!r}")
    autocast = autocast_dtype(query.device.type)
    if autocast is not None:  # the bias keeps its dtype: it is added to float32 logits
        query, key, value = (x if x is None else autocast_tensor(x, autocast) for x in (query, key, value))
    if not ops.is_watched(query, key, value, rpb):  # the dispatcher would come to the same, much later
        with_grad = ops.needs_grad(query, key, value, rpb)
        run = _prepare(rank, window, scale, problem_of(query, key, value, rpb), backend, return_lse, with_grad)
        out, lse = run(query, key, value, rpb)
        return (out, lse) if return_lse else out

    if torch.jit.is_tracing():  # where sizes are tensors
        neighborhood, scale = make_neighborhood(rank, *window), _scale(scale, query)
    else:
        neighborhood, scale = _check(rank, window, scale, *unpacked(query, key, value), rpb)
    # An exported program should run anywhere: the choice is then the backend that consists of ATen operations.
    inline = _can_inline(query)
    name = "torch" if backend is None and inline else resolve(backend, query, query if value is None else value)

    if name == "reference":
        out, lse = reference.attention(*unpacked(query, key, value), rpb, neighborhood, scale)
    elif name == "torch" and inline:
        # The exported program is then made of ATen operations alone and runs where dinat_kernels is not installed.
        out, lse = unrolled.attention(*unpacked(query, key, value), rpb, neighborhood, scale, chunk=None)
    else:
        out, lse = ops.attention(query, key, value, rpb, neighborhood, scale, name, return_lse)
    return (out, lse) if return_lse else out


def _can_inline(query: Tensor) -> bool:
    """Whether this is a non-strict export of a fixed map size: plans can be neither traced by Dynamo nor symbolic."""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting and all(isinstance(size, int) for size in query.shape[1:])


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    dilation: Ints = 1,
    stride: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over sequences: `na2d` with one spatial axis, tensors (batch, length, heads, dim)."""
    window = _hashable(1, kernel_size, dilation, stride, is_causal)
    return attend(1, query, key, value, window, scale, rpb, return_lse, backend)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    dilation: Ints = 1,
    stride: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over feature maps.

    Every query attends to the `kernel_size` nearest keys of its dilation group on each axis; at the borders the window
    shifts inward, so the number of keys stays the same.  Source: Neighborhood Attention Transformer (Hassani et al.,
    CVPR 2023, section 3.1), dilation: Dilated Neighborhood Attention Transformer (Hassani & Shi, 2022, section 3.1),
    stride and causal axes: Generalized Neighborhood Attention (Hassani et al., 2025).

        out = softmax(scale * query @ key + rpb) @ value, over the visible keys

    Args:
        query: (batch, height, width, heads, head_dim).  Any strides; a view of a packed projection is not copied.
        key: (batch, height, width, kv_heads, head_dim).  `heads` must be a multiple of `kv_heads`; head h of the query
            uses head `h // (heads // kv_heads)`.
        value: (batch, height, width, kv_heads, value_dim).
        kernel_size: window size in tokens, odd or even, one for all axes or one per axis.  `kernel_size * dilation`
            must not exceed the axis length.  An even window `2r` has r keys before the query and r - 1 after it.
        dilation: distance between the tokens of a window, in tokens; one or one per axis.
        stride: this many neighboring queries share the window of their middle one (the last one on a causal axis), from
            1 (sliding window) to `kernel_size` (blocks).  The output has the size of the query whatever the stride.
        is_causal: hide the keys after the query; one or one per axis.
        scale: factor of the dot products, `head_dim ** -0.5` by default; 0.0 is legal.
        rpb: relative position bias (heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1), added unscaled.  The entry
            of a pair is `key position - query position + kernel_size - 1`, in steps of `dilation`.  Not with causal
            axes.
        return_lse: also return the logarithm of the softmax denominator; it is differentiable.
        backend: "reference" (dense, the definition), "torch" (tiled, any device), "triton", or None to choose.  A
            backend asked for by name never falls back to another.  See `backends()`.

    Returns:
        out (batch, height, width, heads, value_dim) in the dtype of the inputs; with `return_lse` also lse (batch,
        height, width, heads), natural logarithm, float32 (float64 for float64 inputs).  Half inputs are accumulated in
        float32.

    Raises:
        ValueError: shapes, dtypes or window arguments do not fit together; the message names the argument.
        RuntimeError: the backend asked for cannot run here.
    """
    window = _hashable(2, kernel_size, dilation, stride, is_causal)
    return attend(2, query, key, value, window, scale, rpb, return_lse, backend)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    dilation: Ints = 1,
    stride: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over volumes: `na2d` with three spatial axes, tensors (batch, D, H, W, heads, dim)."""
    window = _hashable(3, kernel_size, dilation, stride, is_causal)
    return attend(3, query, key, value, window, scale, rpb, return_lse, backend)
