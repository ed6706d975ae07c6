"""The "torch" backend: tiled neighborhood attention in plain PyTorch, for any device and dtype.

Every axis is cut into tiles: runs of `T` neighboring query positions of one dilation group, together with the `R` key
positions that contain all their windows.  A multi-dimensional tile is the product of one tile per axis.  Attention is
then a batched matrix product between the queries and the keys of a tile, with one additive tensor that holds the bias
and minus infinity where a key is out of a query's window.  Work and memory are linear in the number of
tokens.

`T` is chosen per axis by a cost model; it covers the special cases by itself: with `kernel_size * dilation == length` a
tile is a whole dilation group, needs no mask, and this is plain attention on blocks; on a small map one tile is the
whole map.

Only the logits of one chunk of tiles exist at a time, in the backward pass too, which recomputes them from `lse`.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Neighborhood, group_length, visible_range
from .precision import without_autocast, working_dtype

# Logits of a chunk: 1 MB in float32.  Larger chunks leave the cache and page-fault on every allocation.
_CHUNK = 1 << 18
# Entries of the additive tensor that a fused call reads: 16 MB in float32.
_BIAS_CHUNK = 1 << 22
# Bytes of additive tensors that are kept for the next call.
_BIAS_CACHE = 256 << 20
# Gathering a key costs about as much as its products with 64 queries (measured, k = 7).
_GATHER_COST = 64
# Of one image, the calls that gather cost as much as 20,000 products besides (measured, fused).
_CALL_COST = 20_000


class _Axis(NamedTuple):
    """Tiles of one axis, as host index arrays.  `n` tiles of `T` queries and `R` keys, `kinds` distinct patterns."""

    query: np.ndarray  # (n, T) token of each query slot; slots may repeat a token, never miss one
    key: np.ndarray  # (n, R) token of each key slot
    entry: np.ndarray  # (kinds, T, R) bias table entry of a (query, key) pair; 2k - 1 where the key is not visible
    kind: np.ndarray  # (n,) pattern of each tile
    slot: np.ndarray  # (length,) where token i is found in the flattened (n, T) slots


def _axis_windows(length: int, k: int, d: int, s: int, causal: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    groups = (group_length(length, d, g) for g in range(d))
    return [visible_range(np.arange(n), n, k, s, causal) for n in groups]


def _tile_starts(n: int, tile: int) -> np.ndarray:
    """Tiles cover 0..n-1; the last one is moved back to end at the border, so it may overlap its neighbor."""
    return np.minimum(np.arange(0, n, tile), n - tile)


def _key_span(windows: list[tuple[np.ndarray, np.ndarray]], tile: int) -> int:
    """The largest number of keys that a tile of `tile` queries needs."""
    spans = []
    for start, end in windows:
        first = _tile_starts(len(start), tile)
        spans.append(int((end[first + tile - 1] - start[first]).max()))
    return max(spans)


def _make_axis(length: int, k: int, d: int, s: int, causal: bool, tile: int) -> _Axis:
    windows = _axis_windows(length, k, d, s, causal)
    if tile == length:
        return _whole_axis(windows, length, k, d)
    span = _key_span(windows, tile)
    query, key, entry = [], [], []
    slot = np.empty(length, dtype=np.int64)
    for group, (start, end) in enumerate(windows):
        n = len(start)
        for first in _tile_starts(n, tile):
            q = first + np.arange(tile)
            begin = max(0, min(start[first], n - span))
            j = begin + np.arange(span)  # in the smallest groups this may run past the end: never visible there
            visible = (start[q, None] <= j) & (j < end[q, None])
            entry.append(np.where(visible, j - q[:, None] + k - 1, 2 * k - 1))
            slot[q * d + group] = len(query) * tile + np.arange(tile)
            query.append(q * d + group)
            key.append(np.minimum(j, n - 1) * d + group)
    kinds = {pattern.tobytes(): pattern for pattern in entry}
    order = {content: i for i, content in enumerate(kinds)}
    kind = np.array([order[pattern.tobytes()] for pattern in entry])
    return _Axis(np.stack(query), np.stack(key), np.stack(list(kinds.values())), kind, slot)


def _whole_axis(windows: list[tuple[np.ndarray, np.ndarray]], length: int, k: int, d: int) -> _Axis:
    """One tile that holds the axis, its tokens in order whatever their group."""
    token = np.arange(length)
    position, group = token // d, token % d
    start, end = (np.array([windows[g][bound][p] for p, g in zip(position, group, strict=True)]) for bound in (0, 1))
    visible = (group[:, None] == group) & (start[:, None] <= position) & (position < end[:, None])
    entry = np.where(visible, position - position[:, None] + k - 1, 2 * k - 1)
    return _Axis(token[None], token[None], entry[None], np.zeros(1, dtype=np.int64), token)


def _choose_tiles(spatial: tuple[int, ...], window: Neighborhood, call_cost: int) -> tuple[int, ...]:
    """The tile size per axis that minimizes (keys gathered) x (queries that use each of them + cost of the gather)."""
    candidates = []
    for length, k, d, s, causal in zip(spatial, *window, strict=True):
        windows = _axis_windows(length, k, d, s, causal)
        shortest, longest = length // d, group_length(length, d, 0)
        sizes = sorted({min(-(-longest // parts), shortest) for parts in range(1, longest + 1)})
        pairs = []  # (tile size, keys gathered along the axis); only sizes that gather less than all smaller ones
        for tile in [size for size in sizes if size <= 32 or size == shortest]:
            keys = sum(-(-len(start) // tile) for start, _ in windows) * _key_span(windows, tile)
            if not pairs or keys < pairs[-1][1]:
                pairs.append((tile, keys))
        if d > 1:  # all groups in one tile
            pairs.append((length, length))
        candidates.append(pairs)

    def cost(choice: tuple[tuple[int, int], ...]) -> int:
        queries, keys = (math.prod(column) for column in zip(*choice, strict=True))
        if queries >= math.prod(spatial):  # one tile is the map itself
            return queries * keys
        return keys * (queries + _GATHER_COST) + call_cost

    return tuple(tile for tile, _ in min(itertools.product(*candidates), key=cost))


class _Plan:
    """Everything about a problem that depends only on the map size and the window."""

    def __init__(self, spatial: tuple[int, ...], window: Neighborhood, call_cost: int) -> None:
        tiles = _choose_tiles(spatial, window, call_cost)
        self.spatial, self.window = spatial, window
        self.axes = [_make_axis(*axis, tile) for *axis, tile in zip(spatial, *window, tiles, strict=True)]
        self.counts = tuple(len(a.query) for a in self.axes)  # tiles per axis
        self.query_slots = math.prod(a.query.shape[1] for a in self.axes)  # per tile
        self.key_slots = math.prod(a.key.shape[1] for a in self.axes)
        self.kinds = tuple(len(a.entry) for a in self.axes)
        self.masked = any((a.entry == 2 * k - 1).any() for a, k in zip(self.axes, window.kernel_size, strict=True))
        self._tensors: dict[tuple, Tensor] = {}

    def tensor(self, name: str, *, device: torch.device, axis: int | None = None) -> Tensor:
        """The index array `name` (of one axis) as a tensor on `device`, cached."""
        at = (name, axis, device)
        tensor = self._tensors.get(at)
        if tensor is None or torch.compiler.is_compiling():
            source = getattr(self if axis is None else self.axes[axis], name)
            with torch.inference_mode(False):  # autograd may save it later
                tensor = torch.tensor(source, device=device)
            if type(tensor) is Tensor and not torch.compiler.is_compiling():  # a traced one must not be kept
                self._tensors[at] = tensor
        return tensor

    @cached_property
    def is_one_tile(self) -> bool:
        """Whether a single tile holds the whole map, its tokens in order."""
        return math.prod(self.counts) == 1

    @cached_property
    def uniform(self) -> bool:
        """Whether all tiles have the same bias."""
        return math.prod(self.kinds) == 1

    @cached_property
    def overlapping(self) -> bool:
        """Whether some token stands in more than one query slot."""
        return math.prod(self.counts) * self.query_slots > math.prod(self.spatial)

    @cached_property
    def owner(self) -> np.ndarray:
        """(tiles, query_slots), float: 1 for the slot that a token's result is taken from, 0 for the others."""
        owner = np.zeros(math.prod(self.counts) * self.query_slots, dtype=np.float32)
        owner[self.slot] = 1
        return owner.reshape(-1, self.query_slots)

    def _flat(self, per_axis: list[np.ndarray]) -> np.ndarray:
        """Token index in the flattened map of every (tile, slot): (tiles, slots), axis 0 slowest in both."""
        rank = len(per_axis)
        flat = np.zeros((1,) * (2 * rank), dtype=np.int64)
        for a, index in enumerate(per_axis):
            shape = [1] * (2 * rank)
            shape[a], shape[rank + a] = index.shape
            flat = flat * self.spatial[a] + index.reshape(shape)
        return flat.reshape(math.prod(self.counts), -1)

    @cached_property
    def query(self) -> np.ndarray:
        return self._flat([a.query for a in self.axes])

    @cached_property
    def key(self) -> np.ndarray:
        return self._flat([a.key for a in self.axes])

    @cached_property
    def slot(self) -> np.ndarray:
        """(tokens,): where each token of the map is found in the flattened (tiles, query_slots)."""
        tile = slot = np.zeros(1, dtype=np.int64)
        for a, count in zip(self.axes, self.counts, strict=True):
            size = a.query.shape[1]
            tile = (tile[:, None] * count + a.slot // size).reshape(-1)
            slot = (slot[:, None] * size + a.slot % size).reshape(-1)
        return tile * self.query_slots + slot

    def chunks(self, heads: int, batch: int, limit: int | None) -> tuple[list[slice], list[slice]]:
        """Rows (tiles of axis 0, each with all tiles of the other axes) and images that make up one chunk of work."""
        if limit is None:
            return [slice(0, self.counts[0])], [slice(0, batch)]
        row = heads * math.prod(self.counts[1:]) * self.query_slots * self.key_slots
        rows = min(self.counts[0], max(1, limit // row))
        images = max(1, limit // (row * rows))
        return _slices(self.counts[0], rows), _slices(max(batch, 1), images)

    def tiles(self, rows: slice) -> slice:
        """The flattened tiles of `rows`."""
        per_row = math.prod(self.counts[1:])
        return slice(rows.start * per_row, rows.stop * per_row)

    def bias(self, rpb: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Bias and mask as one additive tensor (heads or 1, *kinds, query_slots, key_slots); None without either."""
        if rpb is None:
            if not self.masked:
                return None
            rpb = torch.zeros((1, *(2 * k - 1 for k in self.window.kernel_size)), dtype=dtype, device=device)
        rank = len(self.axes)
        table = F.pad(rpb.to(dtype), (0, 1) * rank, value=float("-inf"))
        shape = [table.shape[0]]
        for a, axis in enumerate(self.axes):
            table = table.index_select(a + 1, self.tensor("entry", axis=a, device=device).flatten())
            shape += axis.entry.shape
        order = [0] + [1 + 3 * a + part for part in range(3) for a in range(rank)]  # kinds, then queries, then keys
        table = table.view(shape).permute(order)
        return table.reshape(*table.shape[: rank + 1], self.query_slots, self.key_slots)

    def tile_bias(self, bias: Tensor, rows: slice) -> Tensor:
        """The additive tensor of the tiles in `rows`: (heads or 1, tiles, query_slots, key_slots)."""
        for a in range(len(self.axes)):
            kind = self.tensor("kind", axis=a, device=bias.device)
            bias = bias.index_select(a + 1, kind[rows] if a == 0 else kind)
        return bias.flatten(1, len(self.axes))

    def sum_bias_grad(self, grad: Tensor, rows: slice) -> Tensor:
        """Adjoint of `bias` followed by `tile_bias`: (heads, tiles, query_slots, key_slots) to the table's shape."""
        rank = len(self.axes)
        counts = [rows.stop - rows.start, *self.counts[1:]]
        slots = [a.query.shape[1] for a in self.axes] + [a.key.shape[1] for a in self.axes]
        grad = grad.view(grad.shape[0], *counts, *slots)
        grad = grad.permute([0] + [1 + a + part * rank for a in range(rank) for part in range(3)])
        for a, k in enumerate(self.window.kernel_size):
            entry = self.tensor("entry", axis=a, device=grad.device)
            kind = self.tensor("kind", axis=a, device=grad.device)
            index = entry[kind[rows] if a == 0 else kind].flatten()
            grad = _sum_into(grad.flatten(a + 1, a + 3), a + 1, index, 2 * k).narrow(a + 1, 0, 2 * k - 1)
        return grad

    def add_key_grad_(self, total: Tensor, grad: Tensor, rows: slice) -> None:
        """Add slot gradients, (batch, heads, tiles, key_slots, dim), to `total`, (batch, *spatial, heads, dim)."""
        rank = len(self.axes)
        counts = [rows.stop - rows.start, *self.counts[1:]]
        slots = [a.key.shape[1] for a in self.axes]
        grad = grad.view(*grad.shape[:2], *counts, *slots, grad.shape[-1])
        grad = grad.permute([0, 1] + [2 + a + part * rank for a in range(rank) for part in range(2)] + [2 + 2 * rank])
        for a in reversed(range(1, rank)):
            index = self.tensor("key", axis=a, device=grad.device).flatten()
            grad = _sum_into(grad.flatten(2 + 2 * a, 3 + 2 * a), 2 + 2 * a, index, self.spatial[a])
        index = self.tensor("key", axis=0, device=grad.device)[rows].flatten()
        total.movedim(-2, 1).index_add_(2, index, grad.flatten(2, 3))


def _slices(total: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def _sum_into(source: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    shape = list(source.shape)
    shape[dim] = size
    return source.new_zeros(shape).index_add_(dim, index, source)


@lru_cache(maxsize=128)
def _plan(spatial: tuple[int, ...], window: Neighborhood, call_cost: int = 0) -> _Plan:
    return _Plan(spatial, window, call_cost)


class _BiasCache:
    """Additive tensors of recent calls, least recently used first out.

    A table is told by its memory and its contents, which are compared each time: an optimizer or `load_state_dict` may
    have changed them in place.  Without a table, what is kept is the mask alone.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple, tuple[Tensor | None, Tensor]] = OrderedDict()  # (copy of the table, result)
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple, rpb: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what it returned for the same `key` and `rpb`."""
        key = key if rpb is None else (*key, rpb.data_ptr(), rpb.dtype)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and (rpb is None or torch.equal(entry[0], rpb)):
                self._entries.move_to_end(key)
                return entry[1]
        table, bias = None if rpb is None else rpb.detach().clone(), make()
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


def _split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, *spatial, heads, dim) to (batch, kv_heads, heads // kv_heads, tokens, dim), a view."""
    x = x.flatten(1, -3)
    return x.unflatten(2, (kv_heads, x.shape[2] // kv_heads)).permute(0, 2, 3, 1, 4)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`x.index_select(1, index)` of x (batch, tokens, heads, dim), by rows: no copy of a strided x comes first."""
    batch, tokens = x.shape[:2]
    if batch > 1:
        index = (index + tokens * torch.arange(batch, device=x.device)[:, None]).flatten()
    return x.flatten(2).flatten(0, 1).index_select(0, index).view(batch, -1, *x.shape[2:])


def _gather(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles of `x`: (batch, kv_heads, group, tokens, dim) and index (tiles, slots) to (..., tiles, group * slots, dim).

    The heads of a group follow one another in the slots, so that they share one matrix product with their key head.
    """
    x = x.index_select(3, index.flatten()).to(dtype).unflatten(3, index.shape)
    return x.transpose(2, 3).flatten(3, 4)


def _ungather(tiles: Tensor, slot: Tensor, heads: int) -> Tensor:
    """Undo `_gather` for queries: (batch, kv_heads, tiles, group * slots, dim) to (batch, tokens, heads, dim)."""
    batch, kv_heads, count, rows, dim = tiles.shape
    group = heads // kv_heads
    tiles = tiles.view(batch, kv_heads, count, group, rows // group, dim).permute(0, 2, 4, 1, 3, 5)
    return tiles.flatten(1, 2).index_select(1, slot).flatten(2, 3)


def _group_bias(bias: Tensor, kv_heads: int, heads: int) -> Tensor:
    """(heads or 1, tiles, slots, keys) to (kv_heads or 1, tiles, group * slots, keys), the layout of the logits."""
    if bias.shape[0] == 1:
        return bias.repeat(1, 1, heads // kv_heads, 1)
    return bias.unflatten(0, (kv_heads, heads // kv_heads)).transpose(1, 2).flatten(2, 3)


def _logits(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, kv_heads, tiles, queries, dim) and (..., keys, dim) to (..., queries, keys)."""
    logits = query @ key.transpose(-2, -1)
    return logits if bias is None else logits.add_(bias)


def _assemble(grid: list[list[Tensor]], dim: int) -> Tensor:
    """Join chunks, one list of image chunks for every chunk of rows; `dim` is that of the tiles."""
    rows = [images[0] if len(images) == 1 else torch.cat(images) for images in grid]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=dim)


def _can_fuse(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's fused CPU attention can compute the tiles."""
    return query.is_cpu and query.shape == key.shape == value.shape and query.numel() > 0


# Attention of (batch, heads, tokens, dim), last stride 1, with an additive tensor: out, and lse (batch, heads, tokens).
_fused = torch._scaled_dot_product_flash_attention_for_cpu


@lru_cache(maxsize=1024)
def _heads_first(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides that show (batch, *spatial, heads, dim) as (batch, heads, tokens, dim), if strides can."""
    batch, *spatial, heads, dim = shape
    of_batch, *of_axes, of_heads, of_dim = stride
    regular = all(a == n * b for a, n, b in zip(of_axes, spatial[1:], of_axes[1:], strict=False))
    if not regular or of_dim != 1:  # which the fused attention takes for granted
        return None
    return (batch, heads, math.prod(spatial), dim), (of_batch, of_heads, of_axes[-1], 1)


@lru_cache(maxsize=1024)
def _heads_last(
    shape: tuple[int, ...], stride: tuple[int, ...], spatial: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides that show (batch, heads, tokens, ...) as (batch, *spatial, heads, ...)."""
    batch, heads, _, *rest = shape
    of_batch, of_heads, of_tokens, *of_rest = stride
    of_axes = [of_tokens * math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]
    return (batch, *spatial, heads, *rest), (of_batch, *of_axes, of_heads, *of_rest)


def _fused_map(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, spatial: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU attention of a map that is one tile.  On small maps every view counts."""
    views = [_heads_first(x.shape, x.stride()) for x in (query, key, value)]
    q, k, v = [
        x.flatten(1, -3).contiguous().transpose(1, 2) if view is None else x.as_strided(*view)
        for x, view in zip((query, key, value), views, strict=True)
    ]
    out, lse = _fused(q, k, v, attn_mask=bias, scale=scale)
    out, lse = [x.as_strided(*_heads_last(x.shape, x.stride(), spatial)) for x in (out, lse)]
    return out, lse


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, window: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` with PyTorch's fused CPU attention in every tile, which keeps no logits."""
    batch, *spatial, heads, dim = query.shape
    plan = _plan(tuple(spatial), window, _CALL_COST if batch == 1 else 0)
    dtype, device = working_dtype(query.dtype), query.device

    def additive(rows: slice) -> Tensor | None:
        """Bias and mask of the tiles in `rows`: (tiles or 1, heads or 1, query_slots, key_slots)."""
        bias = plan.bias(rpb, dtype, device)
        if bias is None or not plan.uniform:
            return None if bias is None else plan.tile_bias(bias, rows).transpose(0, 1)
        return bias.view(1, -1, plan.query_slots, plan.key_slots)

    def kept(rows: slice) -> Tensor | None:
        """`additive` of all tiles, which is worth keeping."""
        if rpb is None and not plan.masked:
            return None
        return _biases.get((plan, dtype), rpb, lambda: additive(rows))

    if plan.is_one_tile:
        return _fused_map(query, key, value, kept(slice(0, 1)), scale, plan.spatial)

    q, k, v = (x.flatten(1, -3) for x in (query, key, value))  # (batch, tokens, heads, dim)

    if plan.uniform or (rpb is None and not plan.masked):  # all tiles of all images share the bias, and so one call
        row_chunks, image_chunks = plan.chunks(heads, batch, None)
    else:
        row_chunks, image_chunks = plan.chunks(heads, 1, _BIAS_CHUNK)[0], _slices(batch, 1)
    outs: list[list[Tensor]] = []
    lses: list[list[Tensor]] = []
    for rows in row_chunks:
        tiles = plan.tiles(rows)
        query_index, key_index = (plan.tensor(name, device=device)[tiles].flatten() for name in ("query", "key"))
        tile_bias = (kept if len(row_chunks) == 1 else additive)(rows)  # a large map's would push out all others
        outs.append([])
        lses.append([])
        for images in image_chunks:
            count = images.stop - images.start
            out, lse = _fused(
                _take(q[images], query_index).view(-1, plan.query_slots, heads, dim).transpose(1, 2),
                _take(k[images], key_index).view(-1, plan.key_slots, heads, dim).transpose(1, 2),
                _take(v[images], key_index).view(-1, plan.key_slots, heads, dim).transpose(1, 2),
                attn_mask=tile_bias,
                scale=scale,
            )
            outs[-1].append(out.transpose(1, 2).reshape(count, -1, heads, dim))
            lses[-1].append(lse.transpose(1, 2).reshape(count, -1, heads, 1))
    slot = plan.tensor("slot", device=device)
    out, lse = (_take(_assemble(grid, dim=1), slot) for grid in (outs, lses))
    return out.view(value.shape), lse.view(query.shape[:-1])


def attention(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, window: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Tiled forward pass; arguments and results as `reference.attention`."""
    run = _fused_attention if _can_fuse(query, key, value) else unrolled_attention
    return run(query, key, value, rpb, window, scale)


@without_autocast
def unrolled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: Neighborhood,
    scale: float,
    *,
    dropout_p: float = 0.0,
    chunk: int | None = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """`attention` in elementary operations, which can be traced, exported and differentiated by autograd.

    Differentiated so, it keeps the logits; `attention_backward` does not.

    Args:
        dropout_p: probability of zeroing an attention weight; the others are scaled by `1 / (1 - dropout_p)`.
        chunk: the largest number of logits that exist at a time. None computes all at once, with no loop over the
            batch; lse has its exact gradient only then.
    """
    batch, *spatial, heads, _ = query.shape
    kv_heads, dtype, device = key.shape[-2], working_dtype(query.dtype), query.device
    plan = _plan(tuple(spatial), window)
    q, k, v = (_split_heads(x, kv_heads) for x in (query, key, value))
    bias = plan.bias(rpb, dtype, device)
    row_chunks, image_chunks = plan.chunks(heads, batch, chunk)
    outs: list[list[Tensor]] = []
    lses: list[list[Tensor]] = []
    for rows in row_chunks:
        query_index, key_index = (plan.tensor(name, device=device)[plan.tiles(rows)] for name in ("query", "key"))
        tile_bias = None if bias is None else _group_bias(plan.tile_bias(bias, rows), kv_heads, heads)
        outs.append([])
        lses.append([])
        for images in image_chunks:
            logits = _logits(
                _gather(q[images], query_index, dtype) * scale, _gather(k[images], key_index, dtype), tile_bias
            )
            weights = logits.softmax(-1)
            if chunk is None:
                lses[-1].append(logits.logsumexp(-1, keepdim=True))
            else:
                # The largest weight is exp(largest logit - lse). Not for autograd, which splits gradients among ties,
                # but twice as fast as logsumexp, which exponentiates again.
                lses[-1].append(logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log())
            weights = F.dropout(weights, dropout_p) if dropout_p else weights
            outs[-1].append(weights @ _gather(v[images], key_index, dtype))
    slot = plan.tensor("slot", device=device)
    out = _ungather(_assemble(outs, dim=2), slot, heads).to(value.dtype)
    lse = _ungather(_assemble(lses, dim=2), slot, heads)
    return out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention` with respect to query, key, value and rpb, given those of out and lse."""
    batch, *spatial, heads, _ = query.shape
    kv_heads, dtype, device = key.shape[-2], working_dtype(query.dtype), query.device
    plan = _plan(tuple(spatial), window)
    q, k, v, grad_o = (_split_heads(x, kv_heads) for x in (query, key, value, grad_out))
    # d logits = weights * (d weights - delta), where delta = rowsum(d out * out); lse adds its gradient to every logit.
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - grad_lse
    row_terms = _split_heads(torch.stack((lse, delta), -1), kv_heads)
    bias = plan.bias(rpb, dtype, device)
    owner = plan.tensor("owner", device=device) if plan.overlapping else None

    grad_q: list[list[Tensor]] = []
    grad_k = torch.zeros(key.shape, dtype=dtype, device=device)
    grad_v = torch.zeros(value.shape, dtype=dtype, device=device)
    grad_rpb = None if rpb is None else torch.zeros(rpb.shape, dtype=dtype, device=device)
    row_chunks, image_chunks = plan.chunks(heads, batch, _CHUNK)
    for rows in row_chunks:
        tiles = plan.tiles(rows)
        query_index, key_index = (plan.tensor(name, device=device)[tiles] for name in ("query", "key"))
        tile_bias = None if bias is None else _group_bias(plan.tile_bias(bias, rows), kv_heads, heads)
        grad_q.append([])
        for images in image_chunks:
            query_tiles = _gather(q[images], query_index, dtype) * scale
            key_tiles = _gather(k[images], key_index, dtype)
            out_tiles = _gather(grad_o[images], query_index, dtype)
            lse_tiles, delta_tiles = _gather(row_terms[images], query_index, dtype).split(1, -1)
            weights = _logits(query_tiles, key_tiles, tile_bias).sub_(lse_tiles).exp_()
            if owner is not None:  # a token in two query slots: only one of them may send gradients
                weights = weights.unflatten(3, (heads // kv_heads, -1)).mul_(owner[tiles, None, :, None]).flatten(3, 4)
            grad_logits = out_tiles @ _gather(v[images], key_index, dtype).transpose(-2, -1)
            grad_logits = grad_logits.sub_(delta_tiles).mul_(weights)
            grad_q[-1].append((grad_logits @ key_tiles) * scale)
            plan.add_key_grad_(grad_k[images], grad_logits.transpose(-2, -1) @ query_tiles, rows)
            plan.add_key_grad_(grad_v[images], weights.transpose(-2, -1) @ out_tiles, rows)
            if grad_rpb is not None:
                grad_bias = grad_logits.sum(0).unflatten(2, (heads // kv_heads, -1)).transpose(1, 2).flatten(0, 1)
                grad_rpb += plan.sum_bias_grad(grad_bias, rows)
    grad_query = _ungather(_assemble(grad_q, dim=2), plan.tensor("slot", device=device), heads).reshape(query.shape)
    return (
        grad_query.to(query.dtype),
        grad_k.to(key.dtype),
        grad_v.to(value.dtype),
        None if grad_rpb is None else grad_rpb.to(rpb.dtype),
    )
