"""Where programs, tokens and pairs are: device functions that all kernels share.

Names: i_ program indices, p_ pointers, b_ blocks of data, o_ offsets, m_ masks.

Every map is three-dimensional here, and so are tuples: axes d, h, w; missing leading axes have length and window 1.
Positions are those of geometry.py: index = position * dilation + group.

A kernel gives every program a tile of positions of one dilation group, and walks the box of positions on the other side
of the attention that the tile has to do with: keys for a tile of queries, queries for a tile of keys.  A box is cut
into blocks of some rows of neighboring positions; a row lies along w.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Arguments whose values compile no kernel of their own, so that the layers of a model share theirs.
SIZES = ("L_h", "L_w", "dilation_h", "dilation_w", "tiles_h", "tiles_w", "heads", "batch", "images")


@triton.jit
def locate(i, tiles, dilation, TILE: tl.constexpr):
    """First position of the tile and dilation group of program `i`, and what is left of `i`."""
    i_w, i = i % tiles[2], i // tiles[2]
    i_h, i = i % tiles[1], i // tiles[1]
    i_d, i = i % tiles[0], i // tiles[0]
    g_w, i = i % dilation[2], i // dilation[2]
    g_h, i = i % dilation[1], i // dilation[1]
    g_d, i = i % dilation[0], i // dilation[0]
    return (i_d * TILE[0], i_h * TILE[1], i_w * TILE[2]), (g_d, g_h, g_w), i


@triton.jit
def _group_length(lengths, dilation, group, WINDOW: tl.constexpr, A: tl.constexpr):
    """On axis A; a window that is a whole group has its length, which saves registers: Triton 3.9 spilled two."""
    n = (lengths[A] - group[A] + dilation[A] - 1) // dilation[A]
    if WINDOW[4 * A + 3]:
        n = WINDOW[4 * A]
    return n


@triton.jit
def group_lengths(lengths, dilation, group, WINDOW: tl.constexpr):
    """Tokens of the group on every axis."""
    return (
        _group_length(lengths, dilation, group, WINDOW, 0),
        _group_length(lengths, dilation, group, WINDOW, 1),
        _group_length(lengths, dilation, group, WINDOW, 2),
    )


@triton.jit
def inside(position, n):
    return (position[0] < n[0]) & (position[1] < n[1]) & (position[2] < n[2])


@triton.jit
def block(o, i_block, first, end, BOX: tl.constexpr):
    """Positions of the slots `o` of block `i_block` of the box from `first` to `end`, and which of them exist.

    A slot without a position of its own repeats another one.

    BOX: positions per axis, rows and columns of a block, number of blocks.
    """
    ROWS: tl.constexpr = BOX[3]
    COLS: tl.constexpr = BOX[4]
    runs: tl.constexpr = (BOX[2] + COLS - 1) // COLS
    row = i_block // runs * ROWS + o // COLS
    col = i_block % runs * COLS + o % COLS
    position = (first[0] + row // BOX[1], first[1] + row % BOX[1], first[2] + col)
    m = (o < ROWS * COLS) & (row < BOX[0] * BOX[1]) & (col < BOX[2]) & inside(position, end)
    position = (
        tl.minimum(position[0], end[0] - 1),
        tl.minimum(position[1], end[1] - 1),
        tl.minimum(position[2], end[2] - 1),
    )
    return position, m


@triton.jit
def tokens(position, dilation, group, WIDE: tl.constexpr):
    """Map indices of group positions."""
    d = position[0] * dilation[0] + group[0]
    h = position[1] * dilation[1] + group[1]
    w = position[2] * dilation[2] + group[2]
    if WIDE:
        d, h, w = d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return d, h, w


@triton.jit
def offsets(index, steps):
    """Memory offsets of map indices within an image."""
    return index[0] * steps[0] + index[1] * steps[1] + index[2] * steps[2]


@triton.jit
def flat(index, lengths):
    """Numbers of tokens within an image."""
    return (index[0] * lengths[1] + index[1]) * lengths[2] + index[2]


@triton.jit
def numbered(i, WIDE: tl.constexpr):
    """The number of an image, in as many bits as its shifts have."""
    return tl.cast(i, tl.int64 if WIDE else tl.int32)


@triton.jit
def pointers(p, o, shift):
    """Pointers at the offsets `o` in the image that lies `shift` further.

    A shift of 64 bits moves the pointer, for all offsets at once.  One of 32 bits moves the offsets: where they are
    kept for all images, they then take one register each, not two.
    """
    if shift.dtype == tl.int64:
        p += shift
    else:
        o += shift
    return p + o


@triton.jit
def load(p, o, shift, m, DIM: tl.constexpr, SIZE: tl.constexpr):
    """Rows (., SIZE) of DIM elements each, at the offsets `o`; those not in `m` are zeros, and not read."""
    o_dim = tl.arange(0, SIZE)
    return tl.load(pointers(p, o, shift)[:, None] + o_dim[None, :], mask=m[:, None] & (o_dim < DIM)[None, :], other=0.0)


@triton.jit
def store(p, o, shift, b, m, DIM: tl.constexpr, SIZE: tl.constexpr):
    """The inverse of `load`, for the rows in `m`."""
    o_dim = tl.arange(0, SIZE)
    m_row = m[:, None] & (o_dim < DIM)[None, :]
    tl.store(pointers(p, o, shift)[:, None] + o_dim[None, :], b.to(p.dtype.element_ty), mask=m_row)


@triton.jit
def signed(b, SIGN: tl.constexpr):
    """`b` times the sign of the scale."""
    if SIGN != 1:
        b = (b.to(tl.float32) * SIGN).to(b.dtype)
    return b


@triton.jit
def window(o, n, WINDOW: tl.constexpr, A: tl.constexpr):
    """`geometry.visible_range` on axis A of the query positions `o` in a group of n tokens.

    WINDOW: kernel_size, stride, is_causal, and whether every query sees its whole group, axis by axis.  (Triton 3.6
    takes no tuple out of a tuple.)
    """
    k: tl.constexpr = WINDOW[4 * A]
    s: tl.constexpr = WINDOW[4 * A + 1]
    if WINDOW[4 * A + 2]:
        start = tl.maximum(tl.minimum(o // s * s + s - 1, n - 1) - k + 1, 0)
        end = o + 1
    else:
        start = tl.minimum(tl.maximum(tl.minimum(o // s * s + s // 2, n - 1) - k // 2, 0), n - k)
        end = start + k
    return start, end


@triton.jit
def seen(m, q, k, n, WINDOW: tl.constexpr, A: tl.constexpr):
    """Those of the pairs `m` whose keys at positions `k` are in the windows of the queries at `q`, on axis A."""
    if not WINDOW[4 * A + 3]:
        start, end = window(q[A], n[A], WINDOW, A)
        m = m & (k[A] >= start) & (k[A] < end)
    return m


@triton.jit
def _first_key(o, n, WINDOW: tl.constexpr, A: tl.constexpr):
    start, _ = window(o[A], n[A], WINDOW, A)
    return start


@triton.jit
def first_keys(first, n, WINDOW: tl.constexpr):
    """Where the box of keys of a tile of queries begins: at the window of the first one, aligned or not."""
    return _first_key(first, n, WINDOW, 0), _first_key(first, n, WINDOW, 1), _first_key(first, n, WINDOW, 2)


@triton.jit
def _last(first, n, TILE: tl.constexpr, A: tl.constexpr):
    return tl.minimum(first[A] + TILE[A], n[A]) - 1


@triton.jit
def _end_of_keys(first, n, TILE: tl.constexpr, WINDOW: tl.constexpr, A: tl.constexpr):
    _, end = window(_last(first, n, TILE, A), n[A], WINDOW, A)
    return end


@triton.jit
def end_of_keys(first, n, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Where the box of keys of a tile of queries ends: with the window of the last one."""
    return (
        _end_of_keys(first, n, TILE, WINDOW, 0),
        _end_of_keys(first, n, TILE, WINDOW, 1),
        _end_of_keys(first, n, TILE, WINDOW, 2),
    )


@triton.jit
def _first_query(first, WINDOW: tl.constexpr, A: tl.constexpr):
    k: tl.constexpr = WINDOW[4 * A]
    s: tl.constexpr = WINDOW[4 * A + 1]
    o = first[A]
    if not WINDOW[4 * A + 2]:
        o = tl.where(o < k, 0, (tl.maximum(o - k + 1, 0) + k // 2 - s // 2 + s - 1) // s * s)
    return o


@triton.jit
def first_queries(first, WINDOW: tl.constexpr):
    """Where the box of queries of a tile of keys begins: the start of `geometry.seeing_range`."""
    return _first_query(first, WINDOW, 0), _first_query(first, WINDOW, 1), _first_query(first, WINDOW, 2)


@triton.jit
def _end_of_queries(first, n, TILE: tl.constexpr, WINDOW: tl.constexpr, A: tl.constexpr):
    k: tl.constexpr = WINDOW[4 * A]
    s: tl.constexpr = WINDOW[4 * A + 1]
    ahead: tl.constexpr = k - s if WINDOW[4 * A + 2] else k // 2 - s // 2
    o = _last(first, n, TILE, A)
    return tl.where(o >= n[A] - k, n[A], tl.minimum((o + ahead) // s * s + s, n[A]))


@triton.jit
def end_of_queries(first, n, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Where the box of queries of a tile of keys ends: the end of `geometry.seeing_range`."""
    return (
        _end_of_queries(first, n, TILE, WINDOW, 0),
        _end_of_queries(first, n, TILE, WINDOW, 1),
        _end_of_queries(first, n, TILE, WINDOW, 2),
    )


@triton.jit
def bias(p_rpb, q, k, m, n, scale, WINDOW: tl.constexpr, HAS_RPB: tl.constexpr):
    """What is added to the products of pairs: the bias in units of `scale`, minus infinity where a key is not visible.

    Args:
        p_rpb: table of the head.
        q, k: positions of queries and keys, one of them (., 1), the other (1, .).
        m: which pairs exist; a block of all pairs.
    """
    m = seen(seen(seen(m, q, k, n, WINDOW, 0), q, k, n, WINDOW, 1), q, k, n, WINDOW, 2)
    if HAS_RPB:
        # The entry of a pair is that of the key minus that of the query: the offset `kernel_size - 1` of all axes is
        # the centre of the table.
        table_h: tl.constexpr = 2 * WINDOW[4] - 1
        table_w: tl.constexpr = 2 * WINDOW[8] - 1
        centre: tl.constexpr = ((2 * WINDOW[0] - 1) * table_h * table_w) // 2
        o_k = (k[0] * table_h + k[1]) * table_w + k[2]
        o_q = (q[0] * table_h + q[1]) * table_w + q[2]
        b = tl.load(p_rpb + centre + (o_k - o_q), mask=m, other=float("-inf")).to(tl.float32) * (1 / scale)
    else:
        b = tl.where(m, 0.0, float("-inf"))
    return b


@triton.jit
def logits(a, b, b_bias, scale, PRECISION: tl.constexpr):
    """Products of rows of queries and keys plus their `bias`, in units of `scale`."""
    if a.dtype != tl.float32:
        return tl.dot(a, tl.trans(b), b_bias, input_precision=PRECISION)
    # Sums that begin with a bias lose digits of every product.  A constant zero would be replaced by the bias again.
    zero = tl.zeros_like(b_bias) + tl.minimum(scale, 0.0)
    return tl.dot(a, tl.trans(b), zero, input_precision=PRECISION) + b_bias


@triton.jit
def weights(b_logit, b_shift, scale, dtype: tl.constexpr):
    """exp(logit - shift) of `logits`, which are in units of `scale`, for inputs of this dtype."""
    if dtype == tl.float32:  # the difference first: where weights are large it is small, and so are rounding errors
        return tl.exp2((b_logit * scale - b_shift) * LOG2E)
    return tl.exp2(b_logit * (scale * LOG2E) - b_shift * LOG2E)


@triton.jit
def inverse(x, dtype: tl.constexpr):
    """1 / x, for inputs of this dtype."""
    if dtype == tl.float32:  # a plain division may be off by two units in the last place
        return tl.div_rn(1.0, x)
    return 1 / x


@triton.jit
def key_parts(
    i_block,
    lo,
    hi,
    q,
    m_q,
    n,
    dilation,
    group,
    p_rpb,
    scale,
    WINDOW: tl.constexpr,
    BOX: tl.constexpr,
    BK: tl.constexpr,
    HAS_RPB: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Each part of a block: map indices of its keys, which exist, and their `bias` (BQ, .) for the queries at `q`."""
    parts = ()
    slot = 0
    for i_part in tl.static_range(len(BK)):
        k, m_k = block(slot + tl.arange(0, BK[i_part]), i_block, lo, hi, BOX)
        slot += BK[i_part]
        b = bias(
            p_rpb,
            (q[0][:, None], q[1][:, None], q[2][:, None]),
            (k[0][None, :], k[1][None, :], k[2][None, :]),
            m_q[:, None] & m_k[None, :],
            n,
            scale,
            WINDOW,
            HAS_RPB,
        )
        parts += ((tokens(k, dilation, group, WIDE), m_k, b),)
    return parts


@triton.jit
def query_parts(
    i_block,
    lo,
    hi,
    k,
    m_k,
    n,
    dilation,
    group,
    p_rpb,
    scale,
    WINDOW: tl.constexpr,
    BOX: tl.constexpr,
    BQ: tl.constexpr,
    HAS_RPB: tl.constexpr,
    WIDE: tl.constexpr,
):
    """As `key_parts`, of queries: their `bias` is (BK, .), of the keys at `k`."""
    parts = ()
    slot = 0
    for i_part in tl.static_range(len(BQ)):
        q, m_q = block(slot + tl.arange(0, BQ[i_part]), i_block, lo, hi, BOX)
        slot += BQ[i_part]
        b = bias(
            p_rpb,
            (q[0][None, :], q[1][None, :], q[2][None, :]),
            (k[0][:, None], k[1][:, None], k[2][:, None]),
            m_k[:, None] & m_q[None, :],
            n,
            scale,
            WINDOW,
            HAS_RPB,
        )
        parts += ((tokens(q, dilation, group, WIDE), m_q, b),)
    return parts
