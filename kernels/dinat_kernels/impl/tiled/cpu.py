"""Tiles in PyTorch's fused CPU attention, which keeps no logits.  Forward only.

What depends on layouts alone is prepared once: on small maps a call takes about as long as a hundred lines of Python.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..layout import Call, Forward, Layout, unpacking
from ..precision import working_dtype
from .plan import Costs, Plan, plan_of, slices

# Entries of the additive tensor that one call of the fused attention reads: 16 MB in float32.
_BIAS_CHUNK = 1 << 22
# As many of them may repeat it for several images: 1 MB.
_BIAS_OF_IMAGES = 1 << 18
# Bytes of gathered tiles, unless an image needs more.
_SCRATCH = 16 << 20
# Bytes of additive tensors that are kept for the next call.
_BIAS_CACHE = 256 << 20
# Measured, k = 7.  PyTorch works on 32 queries at a time.
_COSTS = Costs(key=15, block=10, image=6000)
_COSTS_OF_ONE_IMAGE = _COSTS._replace(views=True)

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


def prepare(call: Call) -> Forward:
    """See `tiled.prepare`."""
    *inputs, rpb = call[:4]
    batch, *spatial, heads, dim = call.query.shape
    plan = plan_of(tuple(spatial), call.window, _COSTS_OF_ONE_IMAGE if batch == 1 else _COSTS)
    make, view = (_on_views, _heads_first) if plan.is_one_tile or plan.are_halves else (_tiles, _matrix)
    views = [view(x) for x in inputs]
    if None not in views and (rpb is None or rpb == rpb.contiguous()) and call.gap in (None, heads * dim):
        return make(call, plan, views)

    run = prepare(Call(*[x and x.contiguous() for x in (*inputs, rpb)], *call[4:-1], gap=None))
    return unpacking(lambda *tensors: run(*[x if x is None else x.contiguous() for x in tensors]), call)


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


def _on_views(call: Call, plan: Plan, views: Sequence[_View]) -> Forward:
    """Maps of one tile, or one map of two halves: tiles are runs of tokens, and no tensor is copied."""
    key_of_bias, make_bias = _bias_source(call, plan)
    tiles = _views_of(list(map(_tile_view, views, (plan.query, plan.key, plan.key))), call.gap)
    out_shape, out_stride = call.query.contiguous()[:2]
    of_tokens, of_heads = out_stride[-3:-1]
    tokens_first = (plan.query_slots * of_tokens, of_heads, of_tokens, 1)  # of (tiles, heads, slots, dim)

    def run(query: Tensor, key: Tensor | None, value: Tensor | None, rpb: Tensor | None) -> tuple:
        out, lse = _fused(
            *tiles(query, key, value),
            attn_mask=_biases.get(key_of_bias, rpb, make_bias) if key_of_bias else None,
            scale=call.scale,
        )
        if out.stride() != tokens_first:
            out = out.transpose(1, 2).contiguous()
        lse = lse.transpose(1, 2).reshape(out_shape[:-1]) if call.with_lse else None
        return out.as_strided(out_shape, out_stride), lse

    return run


def _views_of(views: Sequence[_View], gap: int | None) -> Callable[..., Sequence[Tensor]]:
    """What makes these `views` of query, key and value, or of the packed projection if there is a `gap`."""
    (q_shape, q_stride), (k_shape, k_stride), (v_shape, v_stride) = views
    if gap is None:
        return lambda query, key, value: (
            query.as_strided(q_shape, q_stride),
            key.as_strided(k_shape, k_stride),
            value.as_strided(v_shape, v_stride),
        )
    if views[0] == views[1]:
        return lambda packed, *_: packed.as_strided((3, *q_shape), (gap, *q_stride)).unbind()
    return lambda packed, *_: (
        packed.as_strided(q_shape, q_stride),
        *packed.as_strided((2, *k_shape), (gap, *k_stride), packed.storage_offset() + gap).unbind(),
    )


def _tile_view(view: _View, slots: np.ndarray) -> _View:
    """A `_heads_first` view as one of tiles, (tiles, heads, slots, dim); `slots` (tiles, slots) are their tokens."""
    if len(slots) == 1:
        return view
    (_, heads, _, dim), (_, of_heads, of_tokens, _) = view
    step = int(slots[1, 0] - slots[0, 0])
    return (len(slots), heads, slots.shape[1], dim), (step * of_tokens, of_heads, of_tokens, 1)


class _Chunk(NamedTuple):
    """Some tiles of some images, which one call of the fused attention computes."""

    indices: list[Tensor]  # tokens that the tiles gather, one tensor for each of `sources` in `_tiles`
    tokens: Tensor | None  # whose results these tiles have, None for all
    slots: Tensor  # where these results are in the flattened tiles


def _tiles(call: Call, plan: Plan, views: Sequence[_View]) -> Forward:
    """A map of several tiles, whose tokens are gathered."""
    key_of_bias, make_bias = _bias_source(call, plan)
    layout, with_lse = call.query, call.with_lse
    batch, *_, heads, dim = layout.shape
    tokens, width, device = math.prod(plan.spatial), heads * dim, layout.device
    # What is gathered with one index: which of query, key and value; the name of the index; slots of a tile.
    sources = [(slice(0, 1), "query", plan.query_slots), (slice(1, 3), "key", plan.key_slots)]
    if plan.same_tokens:
        sources = [(slice(0, 3), "query", plan.query_slots)]
    tiles_of_image = math.prod(plan.counts)
    gathered = tiles_of_image * (plan.query_slots + 2 * plan.key_slots) * width * layout.dtype.itemsize
    row_chunks, step = [slice(0, plan.counts[0])], max(1, _SCRATCH // gathered)
    same_bias = plan.uniform or key_of_bias is None  # for all tiles
    if not same_bias:
        row_chunks, _ = plan.chunks(heads, 1, _BIAS_CHUNK)
        entries = heads * tiles_of_image * plan.query_slots * plan.key_slots
        step = max(1, min(step, batch, _BIAS_OF_IMAGES // entries)) if len(row_chunks) == 1 else 1
        key_of_bias, make_bias = (key_of_bias, step), partial(make_bias, images=step)
    image_chunks = slices(batch, step)

    def chunk_of(rows: slice, images: int) -> _Chunk:
        indices = [plan.gathered(name, rows, device).flatten() for _, name, _ in sources]
        owned, slots = (None, plan.tensor("slot", device=device)) if len(row_chunks) == 1 else plan.owned(rows)
        slots = _of_images(slots, images, tiles_of_image * plan.query_slots)
        return _Chunk([_of_images(index, images, tokens) for index in indices], owned, slots)

    kept = {}  # by the number of images
    if len(row_chunks) == 1:
        kept = {images: chunk_of(row_chunks[0], images) for images in {x.stop - x.start for x in image_chunks}}

    def rows_of(matrix: Tensor, images: slice) -> Tensor:
        """The tokens of `images` in `matrix` (batch * tokens, columns)."""
        return matrix if len(image_chunks) == 1 else matrix[images.start * tokens : images.stop * tokens]

    def matrices_of(query: Tensor, key: Tensor | None, value: Tensor | None) -> list[list[Tensor]]:
        """Tokens of query, key and value, a list for each of `sources`: one matrix if they are side by side."""
        if call.gap is None:
            tensors = query, key, value
            return [_side_by_side(tensors[part], views[part], width) for part, *_ in sources]
        (rows, _), stride = views[0]
        columns = [(part.start * width, (part.stop - part.start) * width) for part, *_ in sources]
        return [[query.as_strided((rows, n), stride, query.storage_offset() + first)] for first, n in columns]

    def gather(chunk: _Chunk, matrices: list[list[Tensor]], images: slice) -> list[Tensor]:
        """Tiles (images * tiles, heads, slots, dim) of query, key and value, in memory that is used again."""
        parts = zip(sources, chunk.indices, strict=True)
        size = width * sum(index.shape[0] * (part.stop - part.start) for (part, *_), index in parts)
        memory, start = _scratch.get(size, layout.dtype), 0
        tiles: list[Tensor] = []
        for (*_, slots), index, group in zip(sources, chunk.indices, matrices, strict=True):
            rows = index.shape[0]
            for matrix in group:
                columns = matrix.shape[1]
                part = memory.as_strided((rows, columns), (columns, 1), start)
                torch.index_select(rows_of(matrix, images), 0, index, out=part)
                shape = columns // width, rows // slots, heads, slots, dim
                tiles += memory.as_strided(shape, (width, slots * columns, dim, columns, 1), start).unbind()
                start += rows * columns
        return tiles

    def scatter(chunk: _Chunk, tiles: Tensor, result: Tensor, images: slice) -> None:
        """Write tiles (images * tiles, heads, slots, ...) to `result` (batch * tokens, columns)."""
        tiles = tiles.transpose(1, 2).reshape(-1, result.shape[1])
        result = rows_of(result, images)
        if chunk.tokens is None:
            torch.index_select(tiles, 0, chunk.slots, out=result)
        else:
            result.index_copy_(0, chunk.tokens, tiles.index_select(0, chunk.slots))

    def run(query: Tensor, key: Tensor | None, value: Tensor | None, rpb: Tensor | None) -> tuple:
        matrices = matrices_of(query, key, value)
        out = torch.empty((batch * tokens, width), dtype=layout.dtype, device=device)
        lse = (
            torch.empty((batch * tokens, heads), dtype=working_dtype(layout.dtype), device=device) if with_lse else None
        )
        for rows in row_chunks:
            if kept:
                chunks, bias = kept, _biases.get(key_of_bias, rpb, make_bias) if key_of_bias else None
            else:  # a large map, whose bias would push all others out
                chunks, bias = {1: chunk_of(rows, 1)}, make_bias(rpb, rows)
            for images in image_chunks:
                count = images.stop - images.start
                chunk, mask = chunks[count], bias if same_bias or count == step else bias[: count * tiles_of_image]
                results = _fused(*gather(chunk, matrices, images), attn_mask=mask, scale=call.scale)
                scatter(chunk, results[0], out, images)
                if with_lse:
                    scatter(chunk, results[1], lse, images)
        return out.view(layout.shape), lse.view(layout.shape[:-1]) if with_lse else None

    return run


def _of_images(index: Tensor, images: int, rows: int) -> Tensor:
    """Where `index` points to in each of some images of `rows` rows that lie one below the other."""
    return index if images == 1 else (index + rows * torch.arange(images, device=index.device)[:, None]).flatten()


def _side_by_side(tensors: Sequence[Tensor], views: Sequence[_View], width: int) -> list[Tensor]:
    """The matrices of `views`; one for all if they stand column by column in memory, as in a packed projection."""
    shape, (step, _) = views[0]
    gap, count = width * tensors[0].element_size(), len(tensors)
    address = tensors[0].data_ptr()
    if (
        step >= count * width
        and all(view == views[0] for view in views[1:])
        and all(x.data_ptr() == address + i * gap for i, x in enumerate(tensors))
    ):
        with suppress(RuntimeError):  # neighbors by chance, each in a storage of its own
            return [tensors[0].as_strided((shape[0], count * width), (step, 1))]
    return [x.as_strided(*view) for x, view in zip(tensors, views, strict=True)]


class _Scratch(threading.local):
    """Memory for gathered tiles that each thread keeps: fresh memory costs a page fault for every 4 KB."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def get(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Memory of at least so many elements with anything in it, until the next call."""
        if elements * dtype.itemsize > _SCRATCH:
            return torch.empty(elements, dtype=dtype, device="cpu")
        memory = self._memory.get(dtype)
        if memory is None or elements > memory.shape[0]:
            with torch.inference_mode(False):
                memory = self._memory[dtype] = torch.empty(elements, dtype=dtype, device="cpu")
        return memory


_scratch = _Scratch()


def _bias_source(call: Call, plan: Plan) -> tuple[Hashable, Callable[..., Tensor | None]]:
    """How `_biases` knows the additive tensor of all tiles (None if there is none), and what makes it of the table."""
    key = (plan, working_dtype(call.query.dtype), call.rpb and call.rpb.dtype) if call.rpb or plan.masked else None
    return key, partial(_additive, plan, call.query)


def _additive(
    plan: Plan, layout: Layout, rpb: Tensor | None, rows: slice = slice(None), images: int = 1
) -> Tensor | None:
    """Bias and mask of the tiles in `rows` of some images, (images * tiles or 1, heads or 1, queries, keys); None
    without either.
    """
    bias = plan.bias(rpb, working_dtype(layout.dtype), layout.device)
    if bias is None:
        return None
    bias = plan.tile_bias(bias, rows).transpose(0, 1)
    return bias if images == 1 else bias.repeat(images, 1, 1, 1)
