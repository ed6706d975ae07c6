"""The forward kernel.  Names: i_ program indices, p_ pointers, b_ blocks of data, o_ offsets, m_ masks.

Every map is three-dimensional here (axes d, h, w); missing leading axes have length and window 1.  Positions are those
of geometry.py: index = position * dilation + group.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Stands for "no key yet" in the running maximum: finite, also times any scale, so that no difference is inf - inf.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _window(o, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """`geometry.visible_range` of the query positions `o` in a group of n tokens."""
    if CAUSAL:
        start = tl.maximum(tl.minimum(o // S * S + S - 1, n - 1) - K + 1, 0)
        end = o + 1
    else:
        start = tl.minimum(tl.maximum(tl.minimum(o // S * S + S // 2, n - 1) - K // 2, 0), n - K)
        end = start + K
    return start, end


@triton.jit
def _sees(o_q, o_k, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """Which keys at positions `o_k` (1, BK) are in the windows of the queries at `o_q` (BQ, 1), on one axis."""
    start, end = _window(o_q, n, K, S, CAUSAL)
    return (o_k >= start) & (o_k < end)


@triton.jit
def forward_kernel(
    p_q,  # (batch, L_d, L_h, L_w, heads, head_dim), strides in elements below, the last one 1
    p_k,  # (batch, L_d, L_h, L_w, heads / GROUP, head_dim)
    p_v,  # (batch, L_d, L_h, L_w, heads / GROUP, value_dim)
    p_rpb,  # (heads, 2 K_d - 1, 2 K_h - 1, 2 K_w - 1), contiguous; unused without HAS_RPB
    p_out,  # (batch, L_d, L_h, L_w, heads, value_dim), contiguous
    p_lse,  # (batch, L_d, L_h, L_w, heads), float32, contiguous
    scale,  # magnitude of the scale; 1.0 if it is zero
    q_batch,
    q_d,
    q_h,
    q_w,
    q_head,
    k_batch,
    k_d,
    k_h,
    k_w,
    k_head,
    v_batch,
    v_d,
    v_h,
    v_w,
    v_head,
    L_d,
    L_h,
    L_w,
    dilation_d,
    dilation_h,
    dilation_w,
    tiles_d,  # query tiles of the longest dilation group
    tiles_h,
    tiles_w,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KERNEL: tl.constexpr,  # per axis, as everything up to SPAN
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    FULL: tl.constexpr,  # every query sees every key of its group: no mask
    TILE: tl.constexpr,  # query positions of a tile
    SPAN: tl.constexpr,  # key positions that hold all windows of a tile
    ROWS: tl.constexpr,  # a key block is ROWS runs of COLS keys; a run lies along w
    COLS: tl.constexpr,
    BQ: tl.constexpr,  # the sizes of blocks: powers of two
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_RPB: tl.constexpr,
    SIGN: tl.constexpr,  # of the scale: -1, 0 or 1
    WIDE: tl.constexpr,  # offsets within one image need 64 bits
    PRECISION: tl.constexpr,
):
    """One program: the queries of one tile of one dilation group, of one head of one image.

    It walks the box of keys that the windows of its queries span, block by block, with an online softmax.  Programs
    that follow each other are the heads of a token, which lie side by side in memory.
    """
    i = tl.program_id(0)
    i_head = i % HEADS
    i = i // HEADS
    i_w, i = i % tiles_w, i // tiles_w
    i_h, i = i % tiles_h, i // tiles_h
    i_d, i = i % tiles_d, i // tiles_d
    g_w, i = i % dilation_w, i // dilation_w
    g_h, i = i % dilation_h, i // dilation_h
    g_d, i = i % dilation_d, i // dilation_d
    i_batch = i.to(tl.int64)

    # Tokens of this dilation group; a shorter group may have no tile here.
    n_d = (L_d - g_d + dilation_d - 1) // dilation_d
    n_h = (L_h - g_h + dilation_h - 1) // dilation_h
    n_w = (L_w - g_w + dilation_w - 1) // dilation_w
    first_d, first_h, first_w = i_d * TILE[0], i_h * TILE[1], i_w * TILE[2]
    if (first_d >= n_d) | (first_h >= n_h) | (first_w >= n_w):
        return

    # Query positions, (BQ,) each.  A slot without a query of its own repeats another one, and stores nothing.
    o_q = tl.arange(0, BQ)
    q_pos_d = first_d + o_q // (TILE[1] * TILE[2])
    q_pos_h = first_h + o_q // TILE[2] % TILE[1]
    q_pos_w = first_w + o_q % TILE[2]
    m_q = (o_q < TILE[0] * TILE[1] * TILE[2]) & (q_pos_d < n_d) & (q_pos_h < n_h) & (q_pos_w < n_w)
    q_pos_d, q_pos_h, q_pos_w = tl.minimum(q_pos_d, n_d - 1), tl.minimum(q_pos_h, n_h - 1), tl.minimum(q_pos_w, n_w - 1)
    q_index_d = q_pos_d * dilation_d + g_d
    q_index_h = q_pos_h * dilation_h + g_h
    q_index_w = q_pos_w * dilation_w + g_w
    if WIDE:
        q_index_d, q_index_h, q_index_w = q_index_d.to(tl.int64), q_index_h.to(tl.int64), q_index_w.to(tl.int64)

    o_dim = tl.arange(0, BD)
    o_value = tl.arange(0, BV)
    m_dim = o_dim < HEAD_DIM
    m_value = o_value < VALUE_DIM
    p_q += i_batch * q_batch + i_head * q_head
    o_token = q_index_d * q_d + q_index_h * q_h + q_index_w * q_w
    b_q = tl.load(p_q + o_token[:, None] + o_dim[None, :], mask=m_dim[None, :], other=0.0)  # (BQ, BD)
    if SIGN != 1:
        b_q = (b_q.to(tl.float32) * SIGN).to(b_q.dtype)

    i_kv = i_head // GROUP
    p_k += i_batch * k_batch + i_kv * k_head
    p_v += i_batch * v_batch + i_kv * v_head
    # The box of keys begins where the window of the first query does, aligned or not.
    lo_d, _ = _window(first_d, n_d, KERNEL[0], STRIDE[0], CAUSAL[0])
    lo_h, _ = _window(first_h, n_h, KERNEL[1], STRIDE[1], CAUSAL[1])
    lo_w, _ = _window(first_w, n_w, KERNEL[2], STRIDE[2], CAUSAL[2])
    o_k = tl.arange(0, BK)
    k_row = o_k // COLS
    k_col = o_k % COLS

    TABLE_h: tl.constexpr = 2 * KERNEL[1] - 1
    TABLE_w: tl.constexpr = 2 * KERNEL[2] - 1
    TABLE: tl.constexpr = (2 * KERNEL[0] - 1) * TABLE_h * TABLE_w
    # The entry of a pair is (o_bias of the key) - (o_bias of the query): the offset `kernel_size - 1` of all axes
    # is the centre of the table.
    p_rpb += i_head * TABLE + TABLE // 2
    q_bias = (q_pos_d * TABLE_h + q_pos_h) * TABLE_w + q_pos_w

    # Logits are kept in units of `scale`, which the exponential applies.
    scale_log2 = scale * LOG2E
    b_max = tl.full([BQ], LOWEST, tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_out = tl.zeros([BQ, BV], tl.float32)
    RUNS: tl.constexpr = (SPAN[2] + COLS - 1) // COLS
    for i_block in range((SPAN[0] * SPAN[1] + ROWS - 1) // ROWS * RUNS):
        # Key positions, (BK,) each.  A slot without a key repeats another one, and is masked.
        row = i_block // RUNS * ROWS + k_row
        col = i_block % RUNS * COLS + k_col
        k_pos_d = lo_d + row // SPAN[1]
        k_pos_h = lo_h + row % SPAN[1]
        k_pos_w = lo_w + col
        m_k = (o_k < ROWS * COLS) & (row < SPAN[0] * SPAN[1]) & (col < SPAN[2])
        m_k = m_k & (k_pos_d < n_d) & (k_pos_h < n_h) & (k_pos_w < n_w)
        k_pos_d, k_pos_h, k_pos_w = (
            tl.minimum(k_pos_d, n_d - 1),
            tl.minimum(k_pos_h, n_h - 1),
            tl.minimum(k_pos_w, n_w - 1),
        )
        k_index_d = k_pos_d * dilation_d + g_d
        k_index_h = k_pos_h * dilation_h + g_h
        k_index_w = k_pos_w * dilation_w + g_w
        if WIDE:
            k_index_d, k_index_h, k_index_w = k_index_d.to(tl.int64), k_index_h.to(tl.int64), k_index_w.to(tl.int64)
        o_key = k_index_d * k_d + k_index_h * k_h + k_index_w * k_w
        b_k = tl.load(p_k + o_key[:, None] + o_dim[None, :], mask=m_dim[None, :], other=0.0)  # (BK, BD)
        o_key = k_index_d * v_d + k_index_h * v_h + k_index_w * v_w
        b_v = tl.load(p_v + o_key[:, None] + o_value[None, :], mask=m_value[None, :], other=0.0)  # (BK, BV)

        m_visible = m_k[None, :]  # (1, BK), or (BQ, BK) with any of the following
        if not FULL[0]:
            m_visible = m_visible & _sees(q_pos_d[:, None], k_pos_d[None, :], n_d, KERNEL[0], STRIDE[0], CAUSAL[0])
        if not FULL[1]:
            m_visible = m_visible & _sees(q_pos_h[:, None], k_pos_h[None, :], n_h, KERNEL[1], STRIDE[1], CAUSAL[1])
        if not FULL[2]:
            m_visible = m_visible & _sees(q_pos_w[:, None], k_pos_w[None, :], n_w, KERNEL[2], STRIDE[2], CAUSAL[2])
        # Bias and mask are where the product starts from.
        if HAS_RPB:
            k_bias = (k_pos_d * TABLE_h + k_pos_h) * TABLE_w + k_pos_w
            b_bias = tl.load(  # (BQ, BK)
                p_rpb + (k_bias[None, :] - q_bias[:, None]), mask=m_visible, other=float("-inf")
            )
            b_bias = b_bias.to(tl.float32) * (1 / scale)
        else:
            b_bias = tl.broadcast_to(tl.where(m_visible, 0.0, float("-inf")), [BQ, BK])
        b_logit = tl.dot(b_q, tl.trans(b_k), b_bias, input_precision=PRECISION)  # (BQ, BK)

        b_new_max = tl.maximum(b_max, tl.max(b_logit, 1))
        b_weight = tl.exp2(b_logit * scale_log2 - (b_new_max * scale_log2)[:, None])  # (BQ, BK)
        b_decay = tl.exp2((b_max - b_new_max) * scale_log2)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_out = b_out * b_decay[:, None]
        b_out += tl.dot(b_weight.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new_max

    # lse and out are contiguous: token by token, heads inside.
    o_out = (((i_batch * L_d + q_index_d) * L_h + q_index_h) * L_w + q_index_w) * HEADS + i_head
    tl.store(p_lse + o_out, b_max * scale + tl.log2(b_sum) / LOG2E, mask=m_q)
    tl.store(
        p_out + o_out[:, None] * VALUE_DIM + o_value[None, :],
        (b_out * (1 / b_sum)[:, None]).to(p_out.dtype.element_ty),
        mask=m_q[:, None] & m_value[None, :],
    )
