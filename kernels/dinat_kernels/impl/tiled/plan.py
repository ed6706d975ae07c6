"""How a map is cut into tiles.

Every axis is cut into runs of `T` neighboring query positions of one dilation group, together with the `R` key
positions that contain all their windows.  A multi-dimensional tile is the product of one tile per axis.

`T` is chosen per axis by a cost model; it covers the special cases by itself: with `kernel_size * dilation == length` a
tile is a whole dilation group, needs no mask, and this is plain attention on blocks; on a small map one tile is the
whole map.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry import Neighborhood, group_length, visible_range


class Costs(NamedTuple):
    """What tiles cost besides products, in products of a query and a key."""

    key: int  # to gather a key
    block: int  # to begin with another 32 queries, for each key
    image: int  # to gather anything
    views: bool = False  # whether the halves of a map need no gather


class Axis(NamedTuple):
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


def _make_axis(length: int, k: int, d: int, s: int, causal: bool, tile: int) -> Axis:
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
    return Axis(np.stack(query), np.stack(key), np.stack(list(kinds.values())), kind, slot)


def _whole_axis(windows: list[tuple[np.ndarray, np.ndarray]], length: int, k: int, d: int) -> Axis:
    """One tile that holds the axis, its tokens in order whatever their group."""
    token = np.arange(length)
    position, group = token // d, token % d
    start, end = (np.array([windows[g][bound][p] for p, g in zip(position, group, strict=True)]) for bound in (0, 1))
    visible = (group[:, None] == group) & (start[:, None] <= position) & (position < end[:, None])
    entry = np.where(visible, position - position[:, None] + k - 1, 2 * k - 1)
    return Axis(token[None], token[None], entry[None], np.zeros(1, dtype=np.int64), token)


def _are_halves(tiles: tuple[int, ...], spatial: tuple[int, ...], window: Neighborhood) -> bool:
    """Whether two tiles, cut along the first axis, make up the map: each is a run of tokens."""
    return (2 * tiles[0], *tiles[1:]) == spatial and window.dilation[0] == 1


def _choose_tiles(spatial: tuple[int, ...], window: Neighborhood, costs: Costs) -> tuple[int, ...]:
    """The tile size per axis that minimizes (keys in all) x (queries that use each of them + cost of the gather)."""
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

    def cost(choice: tuple[tuple[int, int], ...]) -> float:
        queries, keys = (math.prod(column) for column in zip(*choice, strict=True))  # of a tile, in all
        if queries >= math.prod(spatial):  # one tile is the map itself
            return queries * keys
        if costs.views and _are_halves(tuple(tile for tile, _ in choice), spatial, window):
            return keys * (queries + costs.block / 2 * math.ceil(queries / 32))  # half: fitted
        return keys * (queries + costs.block * math.ceil(queries / 32) + costs.key) + costs.image

    return tuple(tile for tile, _ in min(itertools.product(*candidates), key=cost))


class Plan:
    """Everything about a problem that depends only on the map size and the window."""

    def __init__(self, spatial: tuple[int, ...], window: Neighborhood, costs: Costs) -> None:
        tiles = _choose_tiles(spatial, window, costs)
        self.spatial, self.window = spatial, window
        self.axes = [_make_axis(*axis, tile) for *axis, tile in zip(spatial, *window, tiles, strict=True)]
        self.counts = tuple(len(a.query) for a in self.axes)  # tiles per axis
        self.query_slots = math.prod(a.query.shape[1] for a in self.axes)  # per tile
        self.key_slots = math.prod(a.key.shape[1] for a in self.axes)
        self.kinds = tuple(len(a.entry) for a in self.axes)
        self.are_halves = costs.views and _are_halves(tiles, spatial, window)
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
    def same_tokens(self) -> bool:
        """Whether the queries of every tile are its keys."""
        return np.array_equal(self.query, self.key)

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
        return slices(self.counts[0], rows), slices(max(batch, 1), images)

    def tiles(self, rows: slice) -> slice:
        """The flattened tiles of `rows`."""
        per_row = math.prod(self.counts[1:])
        return slice(rows.start * per_row, rows.stop * per_row)

    def gathered(self, name: str, rows: slice, device: torch.device) -> Tensor | None:
        """Tokens in the slots of "query" or "key", (tiles, slots), of the tiles in `rows`; None for all in order."""
        return None if self.is_one_tile else self.tensor(name, device=device)[self.tiles(rows)]

    def owned(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Tokens whose results come from the tiles in `rows`, and where in the flattened (tiles, query_slots) of these
        rows they are.
        """
        tiles = self.tiles(rows)
        slot = self.slot - tiles.start * self.query_slots
        tokens = np.flatnonzero((slot >= 0) & (slot < (tiles.stop - tiles.start) * self.query_slots))
        return torch.from_numpy(tokens), torch.from_numpy(slot[tokens])

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
        """The additive tensor of the tiles in `rows`, (heads or 1, tiles, query_slots, key_slots); of one tile if all
        have the same.
        """
        if not self.uniform:
            for a in range(len(self.axes)):
                bias = bias.index_select(a + 1, self._kind(a, rows, bias.device))
        return bias.flatten(1, len(self.axes))

    def _kind(self, axis: int, rows: slice, device: torch.device) -> Tensor:
        """The pattern of each tile of an axis, for the tiles in `rows`."""
        kind = self.tensor("kind", axis=axis, device=device)
        return kind[rows] if axis == 0 else kind

    def bias_grad(self, grad: Tensor, rows: slice) -> Tensor:
        """Adjoint of `tile_bias`: (heads, tiles, query_slots, key_slots) to the shape of `bias`."""
        if self.uniform:
            grad = grad if grad.shape[1] == 1 else grad.sum(1, keepdim=True)
            return grad.unflatten(1, self.kinds)
        grad = grad.unflatten(1, (rows.stop - rows.start, *self.counts[1:]))
        for a in reversed(range(len(self.axes))):
            grad = _sum_into(grad, a + 1, self._kind(a, rows, grad.device), self.kinds[a])
        return grad

    def table_grad(self, grad: Tensor) -> Tensor:
        """Adjoint of `bias`: its shape to that of the table."""
        rank = len(self.axes)
        grad = grad.unflatten(-1, [a.key.shape[1] for a in self.axes])
        grad = grad.unflatten(rank + 1, [a.query.shape[1] for a in self.axes])
        grad = grad.permute([0] + [1 + a + part * rank for a in range(rank) for part in range(3)])
        for a, k in enumerate(self.window.kernel_size):
            index = self.tensor("entry", axis=a, device=grad.device).flatten()
            grad = _sum_into(grad.flatten(a + 1, a + 3), a + 1, index, 2 * k).narrow(a + 1, 0, 2 * k - 1)
        return grad.contiguous()


def group_bias(bias: Tensor, kv_heads: int, heads: int) -> Tensor:
    """(heads or 1, tiles, slots, keys) to (kv_heads or 1, tiles, group * slots, keys), the layout of the logits."""
    if bias.shape[0] == 1:
        return bias.repeat(1, 1, heads // kv_heads, 1)
    return bias.unflatten(0, (kv_heads, heads // kv_heads)).transpose(1, 2).flatten(2, 3)


def ungroup_bias(grad: Tensor, heads: int) -> Tensor:
    """Adjoint of `group_bias`, with a bias for each head."""
    return grad.unflatten(2, (heads // grad.shape[0], -1)).transpose(1, 2).flatten(0, 1)


def slices(total: int, step: int) -> list[slice]:
    """0 to `total` in slices of `step`."""
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def _sum_into(source: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    shape = list(source.shape)
    shape[dim] = size
    return source.new_zeros(shape).index_add_(dim, index, source)


@lru_cache(maxsize=128)
def plan_of(spatial: tuple[int, ...], window: Neighborhood, costs: Costs) -> Plan:
    """The plan for maps of `spatial` tokens."""
    return Plan(spatial, window, costs)
