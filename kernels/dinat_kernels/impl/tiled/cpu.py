"""Tiles in PyTorch's fused CPU attention, which keeps no logits.  Forward only.

What depends on layouts alone is prepared once: on small maps a call takes about as long as a hundred lines of Python.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...geometry import Neighborhood
from ..layout import Forward, Layout
from ..precision import working_dtype
from .plan import Costs, Plan, plan_of, slices

# Entries of the additive tensor that one call of the fused attention reads: 16 MB in float32.
_BIAS_CHUNK = 1 << 22
# Bytes of gathered tiles, unless an image needs more.
_SCRATCH = 16 << 20
# Bytes of additive tensors that are kept for the next call.
_BIAS_CACHE = 256 << 20
# Measured, k = 7.  PyTorch works on 32 queries at a time.
_COSTS = Costs(key=15, block=10, image=6000)

# Attention of (batch, heads, tokens, dim), last stride 1, with an additive tensor: out, and lse (batch, heads, tokens).
_fused = torch._scaled_dot_product_flash_attention_for_cpu


class _BiasCache:
    """Additive tensors of recent calls, oldest first out.

    A table is told by its memory and its contents, which are compared each time: an optimizer or `load_state_dict` may
    have changed them in place.  Without a table, what is kept is the mask alone.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple, tuple[bytes, Tensor]] = {}  # (the table's bytes, result)
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, rpb: Tensor | None, make: Callable[[Tensor | None], Tensor]) -> Tensor:
        """`make(rpb)`, or what it returned for the same `key` and table, which must be contiguous."""
        address = 0 if rpb is None else rpb.data_ptr()
        entry = self._entries.get((key, address))
        # A third of the time of torch.equal.
        if entry is not None and (rpb is None or ctypes.string_at(address, rpb.nbytes) == entry[0]):
            return entry[1]
        return self._add((key, address), b"" if rpb is None else ctypes.string_at(address, rpb.nbytes), make(rpb))

    def _add(self, key: tuple, table: bytes, bias: Tensor) -> Tensor:
        with self._lock:
            self._drop(key)
            self._entries[key] = table, bias
            self._bytes += bias.nbytes
            while self._bytes > _BIAS_CACHE:
                self._drop(next(iter(self._entries)))
        return bias

    def _drop(self, key: tuple) -> None:
        if key in self._entries:
            self._bytes -= self._entries.pop(key)[1].nbytes


_biases = _BiasCache()


def can_fuse(query: Layout, key: Layout, value: Layout) -> bool:
    """Whether PyTorch's fused CPU attention can compute the tiles."""
    return query.device.type == "cpu" and query.shape == key.shape == value.shape and math.prod(query.shape) > 0


def prepare(
    query: Layout, key: Layout, value: Layout, rpb: Layout | None, window: Neighborhood, scale: float, with_lse: bool
) -> Forward:
    """See `tiled.prepare`."""
    _, *spatial, _, _ = query.shape
    plan = plan_of(tuple(spatial), window, _COSTS)
    make, view = (_whole_map, _heads_first) if plan.is_one_tile else (_tiles, _matrix)
    views = [view(x) for x in (query, key, value)]
    if None not in views and (rpb is None or rpb == rpb.contiguous()):
        return make(plan, query, rpb, scale, with_lse, views)

    layouts = [x and x.contiguous() for x in (query, key, value, rpb)]
    run = prepare(*layouts, window, scale, with_lse)
    return lambda *tensors: run(*[x if x is None else x.contiguous() for x in tensors])


_View = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides, for `as_strided`


def _heads_first(x: Layout) -> _View | None:
    """(batch, *spatial, heads, dim) as (batch, heads, tokens, dim), last stride 1, if strides can say so."""
    batch, *spatial, heads, dim = x.shape
    of_batch, *of_axes, of_heads, of_dim = x.stride
    regular = all(a == n * b for a, n, b in zip(of_axes, spatial[1:], of_axes[1:], strict=False))
    if not regular or of_dim != 1:
        return None
    return (batch, heads, math.prod(spatial), dim), (of_batch, of_heads, of_axes[-1], 1)


def _matrix(x: Layout) -> _View | None:
    """(batch, *spatial, heads, dim) as (batch * tokens, heads * dim), if strides can say so."""
    batch, *_, heads, dim = x.shape
    tokens = _heads_first(x)
    if tokens is None:
        return None
    _, _, count, _ = tokens[0]
    of_batch, of_heads, of_tokens, _ = tokens[1]
    if of_heads != dim or (batch > 1 and of_batch != count * of_tokens):
        return None
    return (batch * count, heads * dim), (of_tokens, 1)


def _whole_map(
    plan: Plan, layout: Layout, of_rpb: Layout | None, scale: float, with_lse: bool, views: Sequence[_View]
) -> Forward:
    """A map that is one tile: no tensor is copied."""
    key_of_bias, make_bias = _bias_source(plan, layout, of_rpb)
    (q_shape, q_stride), (k_shape, k_stride), (v_shape, v_stride) = views
    out_shape, out_stride = layout.contiguous()[:2]
    tokens_first = (out_stride[0], *out_stride[-2:-4:-1], 1)  # of (batch, heads, tokens, dim)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out, lse = _fused(
            query.as_strided(q_shape, q_stride),
            key.as_strided(k_shape, k_stride),
            value.as_strided(v_shape, v_stride),
            attn_mask=_biases.get(key_of_bias, rpb, make_bias) if key_of_bias else None,
            scale=scale,
        )
        if out.stride() != tokens_first:
            out = out.transpose(1, 2).contiguous()
        lse = lse.transpose(1, 2).reshape(out_shape[:-1]) if with_lse else None
        return out.as_strided(out_shape, out_stride), lse

    return run


def _tiles(
    plan: Plan, layout: Layout, of_rpb: Layout | None, scale: float, with_lse: bool, views: Sequence[_View]
) -> Forward:
    """A map of several tiles, whose tokens are gathered."""
    key_of_bias, make_bias = _bias_source(plan, layout, of_rpb)
    batch, *_, heads, dim = layout.shape
    tokens, width = math.prod(plan.spatial), heads * dim
    gathered = math.prod(plan.counts) * (plan.query_slots + 2 * plan.key_slots) * width  # elements of an image
    if plan.uniform or key_of_bias is None:  # all tiles of all images share the bias
        row_chunks, step = [slice(0, plan.counts[0])], max(1, _SCRATCH // (gathered * layout.dtype.itemsize))
    else:
        row_chunks, step = plan.chunks(heads, 1, _BIAS_CHUNK)[0], 1
    image_chunks = slices(batch, step)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if plan.same_tokens:
            matrices = [_side_by_side((query, key, value), views)]
        else:
            matrices = [_side_by_side((query,), views[:1]), _side_by_side((key, value), views[1:])]
        out = torch.empty((batch, tokens, width), dtype=layout.dtype)
        lse = torch.empty((batch, tokens, heads), dtype=working_dtype(layout.dtype)) if with_lse else None
        for rows in row_chunks:
            if len(row_chunks) == 1 and key_of_bias:
                bias = _biases.get(key_of_bias, rpb, make_bias)
            else:  # a large map's would push out all others
                bias = make_bias(rpb, rows)
            indices = [plan.tensor(name, device=layout.device)[plan.tiles(rows)] for name in ("query", "key")]
            owned, slot = (
                (None, plan.tensor("slot", device=layout.device)) if len(row_chunks) == 1 else plan.owned(rows)
            )
            for images in image_chunks:
                taken = _gather(matrices, indices, images, batch, layout)
                results = _fused(*taken, attn_mask=bias, scale=scale)
                for result, tiles in zip((out, lse), results, strict=True):
                    if result is None:
                        continue
                    tiles = tiles.transpose(1, 2).reshape(-1, result.shape[-1])
                    if owned is None:
                        _select(tiles, slot, result[images])
                    else:
                        picked = tiles.new_empty((images.stop - images.start, len(slot), result.shape[-1]))
                        result[images].index_copy_(1, owned, _select(tiles, slot, picked))
        return out.view(layout.shape), None if lse is None else lse.view(layout.shape[:-1])

    return run


class _Scratch(threading.local):
    """Memory for gathered tiles that each thread keeps: fresh memory costs a page fault for every 4 KB."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def get(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Memory with anything in it, until the next call."""
        if elements * dtype.itemsize > _SCRATCH:
            return torch.empty(elements, dtype=dtype)
        memory = self._memory.get(dtype)
        if memory is None or elements > len(memory):
            with torch.inference_mode(False):
                memory = self._memory[dtype] = torch.empty(elements, dtype=dtype)
        return memory[:elements]


_scratch = _Scratch()


def _gather(
    matrices: list[list[Tensor]], indices: list[Tensor], images: slice, batch: int, layout: Layout
) -> list[Tensor]:
    """Query, key and value tiles (images * tiles, heads, slots, dim) of some images, valid until the next call.

    Args:
        matrices: of the tensors to gather with each of `indices`; with the first alone if there is one list.
        indices: (tiles, slots), tokens of an image.
    """
    *_, heads, dim = layout.shape
    count, width = images.stop - images.start, heads * dim
    sizes = [count * index.numel() * m.shape[1] for group, index in zip(matrices, indices, strict=False) for m in group]
    spaces = iter(_scratch.get(sum(sizes), layout.dtype).split(sizes))
    taken = []
    for group, index in zip(matrices, indices, strict=False):
        for matrix in group:
            tokens, columns = len(matrix) // batch, matrix.shape[1]
            rows = matrix.narrow(0, images.start * tokens, count * tokens)
            tiles = _select(rows, index.flatten(), next(spaces).view(count, index.numel(), columns))
            shape = (count * len(index), index.shape[1], columns // width, heads, dim)
            taken += tiles.view(shape).permute(2, 0, 3, 1, 4).unbind()
    return taken


def _side_by_side(tensors: Sequence[Tensor], views: Sequence[_View]) -> list[Tensor]:
    """The matrices of `views`; one for all if they stand column by column in memory, as in a packed projection."""
    first, (shape, (step, _)) = tensors[0], views[0]
    width, count = shape[1], len(tensors)
    if (
        count > 1
        and step >= count * width
        and all(view == views[0] for view in views)
        and all(b.data_ptr() - a.data_ptr() == width * first.element_size() for a, b in itertools.pairwise(tensors))
        and all(x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for x in tensors)
    ):
        return [first.as_strided((shape[0], count * width), (step, 1))]
    return [x.as_strided(*view) for x, view in zip(tensors, views, strict=True)]


def _select(matrix: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Rows `index` of each image that `matrix` holds, one below the other, into `out` (images, rows, columns)."""
    images = len(out)
    if images > 1:
        index = (index + len(matrix) // images * torch.arange(images)[:, None]).flatten()
    torch.index_select(matrix, 0, index, out=out.view(-1, out.shape[-1]))
    return out


def _bias_source(plan: Plan, layout: Layout, of_rpb: Layout | None) -> tuple[Hashable, Callable[..., Tensor | None]]:
    """How `_biases` knows the additive tensor of all tiles (None if there is none), and what makes it of the table."""
    key = (plan, working_dtype(layout.dtype), of_rpb and of_rpb.dtype) if of_rpb or plan.masked else None
    return key, partial(_additive, plan, layout)


def _additive(plan: Plan, layout: Layout, rpb: Tensor | None, rows: slice = slice(None)) -> Tensor | None:
    """Bias and mask of the tiles in `rows`, (tiles or 1, heads or 1, queries, keys); None without either."""
    bias = plan.bias(rpb, working_dtype(layout.dtype), layout.device)
    if bias is None or not plan.uniform:
        return None if bias is None else plan.tile_bias(bias, rows).transpose(0, 1)
    return bias.view(1, -1, plan.query_slots, plan.key_slots)
