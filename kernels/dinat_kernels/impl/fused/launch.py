"""From tensors to a kernel launch: the plan of a problem is made once and found again in a dictionary."""

from __future__ import annotations

import contextlib
import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...geometry import Neighborhood, group_length, visible_range
from .configs import Config, ProblemClass, choose, next_power_of_two
from .forward import forward_kernel

# What a key block costs besides its key slots, in slots: ranks blocks as the counts of benchmarks/aot.py do.
_BLOCK_COST = 12


class Plan(NamedTuple):
    """All arguments of a launch that are not tensors."""

    grid: tuple[int, int, int]
    integers: tuple[int, ...]  # strides of q, k, v, then lengths, dilations, tiles
    constants: dict  # the compile-time arguments of the kernel, in its order
    options: dict  # num_warps, num_stages
    compiled: dict  # what Triton made of it, by all else that Triton specialises on


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942"; "interpreter" for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tile_shape(lengths: tuple[int, int, int], limit: int) -> tuple[int, int, int]:
    """Query positions of a tile per axis: whole groups if they fit into `limit`, else a near-cube of powers of two."""
    if math.prod(lengths) <= limit:
        return lengths
    tile = [1, 1, 1]
    while 2 * math.prod(tile) <= limit:
        # Double the shortest side that the group is longer than; the last axis first, where tokens are neighbors.
        open_axes = [a for a in (2, 1, 0) if tile[a] < lengths[a]]
        if not open_axes:
            break
        tile[min(open_axes, key=lambda a: tile[a])] *= 2
    return tuple(tile)


def key_span(lengths: set[int], tile: int, k: int, s: int, causal: bool) -> int:
    """The largest number of keys between the first and the last one that a tile sees, over groups of `lengths`."""
    spans = []
    for n in lengths:
        start, end = visible_range(np.arange(n), n, k, s, causal)
        first = np.arange(0, n, tile)
        spans.append((end[np.minimum(first + tile, n) - 1] - start[first]).max())
    return int(max(spans))


def key_block(span: tuple[int, int, int], limit: int) -> tuple[int, int, int]:
    """Block size, rows and columns of a block: the cheapest up to `limit`."""

    def shape(block: int) -> tuple[int, int, int]:
        runs = -(-span[2] // block)
        columns = -(-span[2] // runs)
        return block, min(block // columns, span[0] * span[1]), columns

    def cost(block: int) -> int:
        _, rows, columns = shape(block)
        return (block + _BLOCK_COST) * -(-span[0] * span[1] // rows) * -(-span[2] // columns)

    sizes = [size for size in (16, 32, 64, 128) if size <= limit]
    return shape(min(reversed(sizes), key=cost))


def make_plan(
    query: tuple[tuple[int, ...], tuple[int, ...]],
    key: tuple[tuple[int, ...], tuple[int, ...]],
    value: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    arch: str,
    window: Neighborhood,
    has_rpb: bool,
    sign: int,
    precision: str,
    config: Config | None = None,
) -> Plan:
    """Everything about a launch that does not depend on the contents of tensors.

    Args:
        query, key, value: shape and strides of the tensor.
        arch: as `architecture`.
        sign: of the scale, -1, 0 or 1.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the chosen one.
    """
    batch, *spatial, heads, head_dim = query[0]
    kv_heads, value_dim = value[0][-2:]
    unit = (1,) * (3 - len(spatial))
    lengths = (*unit, *spatial)
    kernel, dilation, stride, causal = (
        (*fill * len(unit), *axes) for fill, axes in zip(((1,), (1,), (1,), (False,)), window, strict=True)
    )
    longest = tuple(group_length(n, d, 0) for n, d in zip(lengths, dilation, strict=True))
    full = tuple(k * d == n and not c for k, d, n, c in zip(kernel, dilation, lengths, causal, strict=True))

    dims = [max(16, next_power_of_two(dim)) for dim in (head_dim, value_dim)]
    problem = ProblemClass(arch, 8 * dtype.itemsize, max(dims), all(full), math.prod(kernel))
    config = config or choose(problem)
    tile = tile_shape(longest, config.tile)
    groups = [{group_length(n, d, 0), group_length(n, d, d - 1)} for n, d in zip(lengths, dilation, strict=True)]
    span = tuple(map(key_span, groups, tile, kernel, stride, causal))
    block, rows, columns = key_block(span, config.block)
    tiles = tuple(-(-n // t) for n, t in zip(longest, tile, strict=True))

    def strides(tensor) -> tuple[int, ...]:
        batch_stride, *steps, head_stride, _ = tensor[1]
        return (batch_stride, *[0] * len(unit), *steps, head_stride)

    def extent(tensor) -> int:
        return sum((n - 1) * step for n, step in zip(lengths, strides(tensor)[1:-1], strict=True))

    return Plan(
        grid=(heads * math.prod(tiles) * math.prod(dilation) * batch, 1, 1),
        integers=(*strides(query), *strides(key), *strides(value), *lengths, *dilation, *tiles),
        constants=dict(
            HEADS=heads,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            KERNEL=kernel,
            STRIDE=stride,
            CAUSAL=causal,
            FULL=full,
            TILE=tile,
            SPAN=span,
            ROWS=rows,
            COLS=columns,
            BQ=max(16, next_power_of_two(math.prod(tile))),
            BK=block,
            BD=dims[0],
            BV=dims[1],
            HAS_RPB=has_rpb,
            SIGN=sign,
            WIDE=max(map(extent, (query, key, value))) >= 2**31 - 128,
            PRECISION=precision,
        ),
        options=dict(num_warps=config.num_warps, num_stages=config.num_stages),
        compiled={},
    )


_plan = lru_cache(maxsize=4096)(make_plan)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: Neighborhood,
    scale: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused forward pass; arguments and results as `reference.attention`, in float16, bfloat16 or float32.

    Reads query, key and value where they are if their last dimension is contiguous, whatever the other strides, and
    allocates nothing but the results.  Deterministic.  `config` replaces the launch configuration (for tuning).
    """
    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    out = value.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if not out.numel():
        return out, lse
    tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    plan = _plan(
        (query.shape, query.stride()),
        (key.shape, key.stride()),
        (value.shape, value.stride()),
        query.dtype,
        architecture(query.device),
        window,
        rpb is not None,
        (scale > 0) - (scale < 0),
        "tf32" if tf32 and not torch.version.hip else "ieee",
        config,
    )
    if rpb is not None:
        rpb = rpb.float().contiguous() if rpb.dtype == torch.float64 else rpb.contiguous()
    table = out if rpb is None else rpb
    arguments = (query, key, value, table, out, lse, abs(scale) or 1.0, *plan.integers, *plan.constants.values())
    variant = (query.device, table.dtype, *(x.data_ptr() % 16 for x in arguments[:4]))
    compiled = plan.compiled.get(variant)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        if compiled is None:
            plan.compiled[variant] = forward_kernel[plan.grid](*arguments, **plan.options)
        else:  # what Triton's own dispatch would find, in half of the time
            compiled[plan.grid](*arguments)
    return out, lse
