"""From tensors to kernel launches: the plan of a problem is made once and found again in a dictionary."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...geometry import Neighborhood, group_length, seeing_range, visible_range
from ..layout import Backward, Call, Forward, Layout, unpacking
from .backward import key_kernel, query_kernel
from .configs import Extent, ProblemClass, choose, next_power_of_two
from .forward import forward_kernel

# What ranks the sizes of blocks, as the counts of benchmarks/aot.py do: what a block costs besides its slots, in slots;
# and how much more a slot costs if its mask and bias are not worked out once for many images.
_BLOCK_COST = 12
_REPEATED = 1.5
# Of a program: what it does before its first image, in blocks; and how many images it does at most.
_PROLOGUE = 4
_MAX_IMAGES = 64

Strided = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of a tensor


class Gpu(NamedTuple):
    """What plans depend on."""

    arch: str  # "sm_90", "gfx942"; "interpreter" for CPU tensors
    processors: int  # multiprocessors


@cache
def gpu_of(device: torch.device) -> Gpu:
    """That of a device."""
    if device.type == "cpu":
        return Gpu("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Gpu(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


class Plan(NamedTuple):
    """All arguments of a launch that are not tensors."""

    name: str  # of the kernel: "forward", "query", "rpb", "key"
    extent: Extent
    kernel: Callable
    grid: tuple[int, int, int]
    integers: tuple[int, ...]  # strides and rows of tensors, then lengths, dilations, tiles, heads, batch, images
    constants: dict  # the compile-time arguments of the kernel, in its order
    options: dict  # num_warps, num_stages, enable_fp_fusion
    complete: bool  # every program has a tile; else some write nothing, those of dilation groups that are shorter
    compiled: dict  # what Triton made of it, by all else that Triton specialises on


class Launch(NamedTuple):
    """A kernel and what it works on."""

    plan: Plan
    tensors: tuple[Tensor, ...]
    scale: float

    def __call__(self) -> None:
        _launch(*self)

    def arguments(self) -> tuple:
        """Those of the kernel, in its order."""
        return _arguments(*self)


class _Recording(NamedTuple):
    launches: list[Launch]
    gpu: Gpu | None


_recording: _Recording | None = None


def recorded(run: Callable[[], object], gpu: Gpu | None = None) -> list[Launch]:
    """The launches of `run`, of which none is made: to be made one by one, or only compiled.

    Args:
        gpu: that of tensors on the device "meta".
    """
    global _recording
    _recording = _Recording([], gpu)
    try:
        run()
        return _recording.launches
    finally:
        _recording = None


def tile_shape(lengths: tuple[int, int, int], limit: int) -> tuple[int, int, int]:
    """Positions of a tile per axis: whole groups if they fit into `limit`, else a near-cube.

    Its sides are powers of two, but for the shortest where the limit is none.
    """
    if math.prod(lengths) <= limit:
        return lengths
    tile = [1, 1, 1]

    def shortest() -> int:
        """The axis to make longer: one that the group is longer on; the last one first, where tokens are neighbors."""
        return min((a for a in (2, 1, 0) if tile[a] < lengths[a]), key=lambda a: tile[a])

    while 2 * math.prod(tile) <= limit:
        tile[shortest()] *= 2
    axis = shortest()
    tile[axis] = limit * tile[axis] // math.prod(tile)
    return tuple(tile)


def span(lengths: set[int], tile: int, k: int, s: int, causal: bool, bounds: Callable) -> int:
    """The largest number of positions between the `bounds` of a tile's first and last position.

    Args:
        lengths: of all dilation groups.
        bounds: `visible_range` for tiles of queries, `seeing_range` for tiles of keys.
    """
    spans = []
    for n in lengths:
        start, end = bounds(np.arange(n), n, k, s, causal)
        first = np.arange(0, n, tile)
        spans.append((end[np.minimum(first + tile, n) - 1] - start[first]).max())
    return int(max(spans))


def block_shape(box: tuple[int, int, int], limit: int, parts: int = 1) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """The cheapest blocks for a box: the sizes of a block's parts, and its rows, columns and number in the box.

    Args:
        limit: of the size of a part.
        parts: so many make up a block, at most.  It has several only where it holds the box.
    """
    volume = math.prod(box)
    if limit < volume <= limit * parts:
        rest = (volume - 1) % limit + 1
        sizes = (*[limit] * ((volume - 1) // limit), max(16, next_power_of_two(rest)))
        return sizes, (box[0] * box[1], box[2], 1)

    def shape(size: int) -> tuple[int, int, int]:
        runs = -(-box[2] // size)
        columns = -(-box[2] // runs)
        rows = min(size // columns, box[0] * box[1])
        return rows, columns, -(-box[0] * box[1] // rows) * runs

    def cost(size: int) -> int:
        blocks = shape(size)[2]
        return (size + _BLOCK_COST) * blocks * (1 if blocks == 1 else _REPEATED)

    best = min((size for size in (256, 128, 64, 32, 16) if size <= limit), key=cost)
    return (best,), shape(best)


def images_per_program(batch: int, programs: int, resident: int, blocks: int) -> int:
    """How many images of so many blocks a program does, of `batch` with `programs` each; a GPU holds `resident`.

    A full GPU after the other does its programs, each a prologue and then its images; the last ones do the rest.
    """

    def time(parts: int) -> int:
        return -(-programs * parts // resident) * (_PROLOGUE + -(-batch // parts) * blocks)

    return -(-batch // min(range(-(-batch // _MAX_IMAGES), batch + 1), key=time))


def make_plan(
    kernel: str,
    layouts: tuple[Strided, ...],
    dtype: torch.dtype,
    gpu: Gpu,
    window: Neighborhood,
    has_rpb: bool,
    sign: int,
    precision: str,
    grad_rows: tuple[int, ...] = (),
    has_dlse: bool = False,
) -> Plan:
    """Everything about a launch that does not depend on the contents of tensors.

    Args:
        kernel: "forward"; of the backward pass "query", "rpb" (the rest of the query kernel's work where a tile has
            several key blocks) or "key".
        layouts: shape and strides of query, key, value, and in the backward pass of the gradient of out.
        gpu: where it runs.
        sign: of the scale, -1, 0 or 1.
        precision: of float32 products, "ieee" or "tf32".
        grad_rows: in the backward pass, elements from one token to the next in the gradients of query, key and value.
        has_dlse: whether lse has a gradient; only the query kernel reads it.
    """
    batch, *spatial, heads, head_dim = layouts[0][0]
    kv_heads, value_dim = layouts[2][0][-2:]
    unit = 3 - len(spatial)
    lengths = (*[1] * unit, *spatial)
    size, dilation, stride, causal = (
        (*[fill] * unit, *axes) for fill, axes in zip((1, 1, 1, False), window, strict=True)
    )
    longest = tuple(group_length(n, d, 0) for n, d in zip(lengths, dilation, strict=True))
    full = tuple(k * d == n and not c for k, d, n, c in zip(size, dilation, lengths, causal, strict=True))

    windows = [n / (k * d) for k, d, n in zip(size, dilation, lengths, strict=True)]
    extent = "dense" if all(full) else "halves" if set(windows) <= {1, 2} and not any(causal) else "halo"

    dims = [max(16, next_power_of_two(dim)) for dim in (head_dim, value_dim)]
    own = "query" if kernel == "rpb" else kernel
    config = choose(ProblemClass(own, gpu.arch, 8 * dtype.itemsize, max(dims), extent, math.prod(size)))
    tile = size if extent == "halves" and math.prod(size) <= config.tile else tile_shape(longest, config.tile)
    groups = [{group_length(n, d, 0), group_length(n, d, d - 1)} for n, d in zip(lengths, dilation, strict=True)]
    bounds = seeing_range if kernel == "key" else visible_range
    box = tuple(map(span, groups, tile, size, stride, causal, [bounds] * 3))
    sizes, (block_rows, columns, blocks) = block_shape(box, config.block, config.parts)
    tiles = tuple(-(-n // t) for n, t in zip(longest, tile, strict=True))
    programs = heads // (heads // kv_heads if kernel == "key" else 1) * math.prod(tiles) * math.prod(dilation)
    if kernel == "rpb":
        programs *= blocks
    steps = 1 if kernel == "rpb" else blocks
    images = images_per_program(batch, programs, config.programs * gpu.processors, steps)
    slots = max(16, next_power_of_two(math.prod(tile)))
    warps = max(1, config.num_warps * slots * sizes[0] // (next_power_of_two(config.tile) * config.block))

    def strides(layout: Strided) -> tuple[int, ...]:
        batch_stride, *steps, head_stride, _ = layout[1]
        return (batch_stride, *[0] * unit, *steps, head_stride)

    def reach(layout: Strided) -> int:
        return sum((n - 1) * step for n, step in zip((batch, *lengths), strides(layout)[:-1], strict=True))

    rows = dict(forward=(), query=grad_rows, key=grad_rows[1:])[own]
    widest = max(heads * head_dim, heads * value_dim, *grad_rows)
    constants = dict(
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        WINDOW=tuple(itertools.chain(*zip(size, stride, causal, full, strict=True))),
        TILE=(*tile, tile[0] * tile[1], tile[2], 1),
        BOX=(*box, block_rows, columns, blocks),
        BQ=sizes if kernel == "key" else slots,
        BK=slots if kernel == "key" else sizes,
        BD=dims[0],
        BV=dims[1],
        HAS_RPB=has_rpb,
        SIGN=sign,
        WIDE=max(*map(reach, layouts), batch * math.prod(lengths) * widest) >= 2**31 - 128,
        PACKED=len(set(map(strides, layouts[:3]))) == 1 and len(set(grad_rows)) <= 1,
        PRECISION=precision,
    )
    if own == "query":
        constants["HAS_DLSE"] = has_dlse
        constants["GRAD_QUERY"] = kernel == "query"
        constants["GRAD_RPB"] = has_rpb and (kernel == "rpb" or blocks == 1)
        constants["WHOLE"] = kernel == "query" and tile == longest and blocks == 1 and heads == kv_heads
    return Plan(
        name=kernel,
        extent=extent,
        kernel=dict(forward=forward_kernel, query=query_kernel, key=key_kernel)[own],
        grid=(programs * -(-batch // images), 1, 1),
        integers=(*itertools.chain(*map(strides, layouts), rows, lengths, dilation, tiles), heads, batch, images),
        constants=constants,
        options=dict(num_warps=warps, num_stages=config.num_stages, enable_fp_fusion=True),
        complete=all(len({-(-n // t) for n in of_axis}) == 1 for of_axis, t in zip(groups, tile, strict=True)),
        compiled={},
    )


class _Problem(tuple):
    """The arguments of `make_plan` that are the same for all kernels; known by identity, as to hash them takes long."""

    __hash__, __eq__ = object.__hash__, object.__eq__


@lru_cache(maxsize=4096)
def _plan(kernel: str, problem: _Problem, *others: object) -> Plan:
    return make_plan(kernel, *problem, *others)


def forget_plans() -> None:
    """Make plans anew, because configurations have changed."""
    _plan.cache_clear()


def _arguments(plan: Plan, tensors: tuple[Tensor, ...], scale: float) -> tuple:
    return (*tensors, abs(scale) or 1.0, *plan.integers, *plan.constants.values())


def _launch(plan: Plan, tensors: tuple[Tensor, ...], scale: float) -> None:
    if _recording is not None:
        _recording.launches.append(Launch(plan, tensors, scale))
        return
    arguments = _arguments(plan, tensors, scale)
    device = tensors[0].device
    # Triton compiles for the alignment and dtype of pointers; the dtype of the bias table is not in the plan.
    variant = (device, tensors[3].dtype, *[x.data_ptr() % 16 for x in tensors])
    compiled = plan.compiled.get(variant)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if compiled is None:
            plan.compiled[variant] = plan.kernel[plan.grid](*arguments, **plan.options)
        else:  # what Triton's own dispatch would find, in half of the time
            compiled[plan.grid](*arguments)


def _is_readable(x: Layout) -> bool:
    """Whether the last dimension is contiguous, as the kernels need it."""
    return x.stride[-1] == 1 or x.shape[-1] == 1


def _table(rpb: Tensor | None, unused: Tensor) -> Tensor:
    """The bias table as the kernels read it; any tensor if there is none."""
    if rpb is None:
        return unused
    return rpb.float().contiguous() if rpb.dtype == torch.float64 else rpb.contiguous()


def _problem(layouts: Sequence[Layout], has_rpb: bool, window: Neighborhood, scale: float) -> _Problem:
    query, sign = layouts[0], (scale > 0) - (scale < 0)
    extents = tuple((x.shape, x.stride) for x in layouts)
    gpu = (_recording and _recording.gpu) or gpu_of(query.device)
    return _Problem((extents, query.dtype, gpu, window, has_rpb, sign))


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products, as PyTorch is set: "ieee" or "tf32"."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def prepare(call: Call) -> Forward:
    """Fused forward pass, see `tiled.prepare`, in float16, bfloat16 or float32.

    Reads query, key and value where they are if their last dimension is contiguous, whatever the other strides, and
    allocates nothing but the results.  Deterministic.
    """
    inputs, scale = call[:3], call.scale
    if not all(map(_is_readable, inputs)):
        run = prepare(Call(*(x.contiguous() for x in inputs), *call[3:-1], gap=None))
        return unpacking(lambda q, k, v, rpb: run(q.contiguous(), k.contiguous(), v.contiguous(), rpb), call)

    query, _, value = inputs
    dtype, device, out_shape = query.dtype, query.device, (*query.shape[:-1], value.shape[-1])
    problem = _problem(inputs, call.rpb is not None, call.window, scale)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor]:
        out = torch.empty(out_shape, dtype=dtype, device=device)
        lse = torch.empty(out_shape[:-1], dtype=torch.float32, device=device)
        if out.numel():
            plan = _plan("forward", problem, _precision(dtype))
            _launch(plan, (query, key, value, _table(rpb, out), out, lse), scale)
        return out, lse

    return unpacking(run, call)


def prepare_backward(call: Call, grad_out: Layout, has_grad_lse: bool, grads: Sequence[Layout]) -> Backward:
    """Fused backward pass, see `tiled.prepare_backward`.

    Recomputes the weights from lse.  Allocates one float32 per query and head, and, with a bias, a table for every
    program.  Deterministic: no atomics, and all sums have a fixed order.
    """
    inputs = (*call[:3], grad_out)
    in_place = list(map(_is_readable, inputs))
    layouts = [x if readable else x.contiguous() for x, readable in zip(inputs, in_place, strict=True)]
    dtype, has_rpb, scale = call.query.dtype, call.rpb is not None, call.scale
    problem = _problem(layouts, has_rpb, call.window, scale)
    rows = tuple(x.stride[-3] for x in grads)

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
        query, key, value, grad_out = (x if readable else x.contiguous() for x, readable in tensors)
        out, lse = out.contiguous(), lse.contiguous()
        delta = torch.empty_like(lse)
        grad_lse = delta if grad_lse is None else grad_lse.contiguous()  # the former is not read
        inputs = query, key, value, _table(rpb, out), grad_out
        precision, grad_rpb = _precision(dtype), None
        plan = _plan("query", problem, precision, rows, has_grad_lse)
        plans = [plan]
        if has_rpb and not plan.constants["GRAD_RPB"]:
            plans.append(_plan("rpb", problem, precision, rows))
        for of_queries in plans:
            parts = delta
            if of_queries.constants["GRAD_RPB"]:
                shape = of_queries.grid[0] // rpb.shape[0], *rpb.shape
                parts = lse.new_empty(shape) if of_queries.complete else lse.new_zeros(shape)
            _launch(of_queries, (*inputs, out, lse, grad_lse, delta, *grads, parts), scale)
            if parts is not delta:
                grad_rpb = parts.sum(0).to(rpb.dtype)
        if not plan.constants["WHOLE"]:
            _launch(_plan("key", problem, precision, rows), (*inputs, lse, delta, *grads[1:]), scale)
        return grad_rpb

    return run
