"""The backward kernels.  Names and geometry as in positions.py.

With weights p = exp(logit - lse), the gradients of weights dp = d_out · v, and delta = d_out · out - d_lse of every
query, the gradient of a logit is ds = p (dp - delta), and

    d_query = scale Σ ds key,   d_key = scale Σ ds query,   d_value = Σ p d_out,   d_rpb = Σ ds.

`query_kernel` owns tiles of queries, `key_kernel` tiles of keys; nothing is added up by more than one program, but for
the bias table, of which every program writes a part.  So results do not depend on the order in which programs run.
"""

import triton
import triton.language as tl

from . import positions as at

# Entries of the bias table that are summed up at a time.
ENTRIES: tl.constexpr = tl.constexpr(64)


@triton.jit
def within(x, n):
    """0 <= x < n, in one comparison."""
    return x.to(tl.uint32) < n


@triton.jit(do_not_specialize=at.SIZES)
def query_kernel(
    p_q,  # (batch, L_d, L_h, L_w, heads, head_dim), strides in elements below, the last one 1
    p_k,  # (batch, L_d, L_h, L_w, heads / GROUP, head_dim)
    p_v,  # (batch, L_d, L_h, L_w, heads / GROUP, value_dim)
    p_rpb,  # (heads, 2 K_d - 1, 2 K_h - 1, 2 K_w - 1), contiguous; unused without HAS_RPB
    p_do,  # (batch, L_d, L_h, L_w, heads, value_dim), strides as above
    p_out,  # as do, but contiguous
    p_lse,  # (batch, L_d, L_h, L_w, heads), float32, contiguous
    p_dlse,  # as lse; unused without HAS_DLSE
    p_delta,  # as lse; written if GRAD_QUERY and not WHOLE, read if not GRAD_QUERY
    p_dq,  # as q, but contiguous but for its row; written if GRAD_QUERY
    p_dk,  # as k, likewise; written if WHOLE
    p_dv,  # as v, likewise; written if WHOLE
    p_drpb,  # (programs, 2 K_d - 1, 2 K_h - 1, 2 K_w - 1), float32; written if GRAD_RPB
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
    do_batch,
    do_d,
    do_h,
    do_w,
    do_head,
    dq_row,  # elements from one token to the next
    dk_row,
    dv_row,
    L_d,
    L_h,
    L_w,
    dilation_d,
    dilation_h,
    dilation_w,
    tiles_d,  # tiles of the longest dilation group
    tiles_h,
    tiles_w,
    heads,
    batch,
    images,  # of a program, at most, which does the same tile of each
    GROUP: tl.constexpr,  # query heads per key head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr,  # kernel_size, stride, is_causal, and whether every query sees its whole group, axis by axis
    TILE: tl.constexpr,  # a tile of queries, as BOX
    BOX: tl.constexpr,  # the box of keys that hold all its windows: positions.block
    BQ: tl.constexpr,  # slots of a tile: a power of two
    BK: tl.constexpr,  # slots of the parts of a block: powers of two
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_RPB: tl.constexpr,
    SIGN: tl.constexpr,  # of the scale: -1, 0 or 1
    WIDE: tl.constexpr,  # offsets need 64 bits
    PACKED: tl.constexpr,  # query, key and value have the same strides, and so have their gradients
    PRECISION: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    GRAD_QUERY: tl.constexpr,
    GRAD_RPB: tl.constexpr,
    WHOLE: tl.constexpr,  # tile and block are a whole dilation group: its d_key and d_value too
):
    """One program: the queries of one tile of one dilation group, of one head, in some images.

    The gradient of the table is summed over the images pair by pair, and only then sorted into the table's entries,
    which takes all pairs of a tile in one block; else a launch of its own has one program for each block.
    """
    if PACKED:  # offsets of the same tokens are then the same, and take registers once
        k_batch, k_d, k_h, k_w = q_batch, q_d, q_h, q_w
        v_batch, v_d, v_h, v_w = q_batch, q_d, q_h, q_w
        dk_row, dv_row = dq_row, dq_row
    BLOCKS: tl.constexpr = BOX[5]
    lengths, dilation, tiles = (L_d, L_h, L_w), (dilation_d, dilation_h, dilation_w), (tiles_d, tiles_h, tiles_w)
    i = tl.program_id(0)
    i_head, i = (i % heads).to(tl.int64), i // heads
    first_block = 0
    if not GRAD_QUERY:
        first_block, i = i % BLOCKS, i // BLOCKS
    first, group, i = at.locate(i, tiles, dilation, TILE)
    n = at.group_lengths(lengths, dilation, group, WINDOW)
    if not at.inside(first, n):  # a shorter group has no tile here
        return
    q_pos, m_q = at.block(tl.arange(0, BQ), 0, first, n, TILE)
    q_index = at.tokens(q_pos, dilation, group, WIDE)
    lo, hi = at.first_keys(first, n, WINDOW), at.end_of_keys(first, n, TILE, WINDOW)
    TABLE: tl.constexpr = (2 * WINDOW[0] - 1) * (2 * WINDOW[4] - 1) * (2 * WINDOW[8] - 1)
    p_rpb += i_head * TABLE
    HOISTED: tl.constexpr = BLOCKS == 1 or not GRAD_QUERY
    if HOISTED:
        parts = at.key_parts(
            first_block, lo, hi, q_pos, m_q, n, dilation, group, p_rpb, scale, WINDOW, BOX, BK, HAS_RPB, WIDE
        )
    if GRAD_RPB:
        b_drpb = ()
        for i_part in tl.static_range(len(BK)):
            _, _, b_bias = parts[i_part]
            b_drpb += (tl.zeros_like(b_bias),)

    o_q, o_do = at.offsets(q_index, (q_d, q_h, q_w)), at.offsets(q_index, (do_d, do_h, do_w))
    o_token = at.flat(q_index, lengths)
    o_out = o_token * heads
    p_q += i_head * q_head
    p_k += i_head // GROUP * k_head
    p_v += i_head // GROUP * v_head
    p_do += i_head * do_head
    p_out += i_head * VALUE_DIM
    p_lse += i_head
    p_dlse += i_head
    p_delta += i_head
    p_dq += i_head * HEAD_DIM
    p_dk += i_head * HEAD_DIM
    p_dv += i_head * VALUE_DIM
    for i_image in range(i * images, tl.minimum((i + 1) * images, batch)):
        i_batch = at.numbered(i_image, WIDE or BLOCKS > 1)
        i_token = i_batch * (L_d * L_h * L_w)
        i_out = i_token * heads
        b_q = at.signed(at.load(p_q, o_q, i_batch * q_batch, m_q, HEAD_DIM, BD), SIGN)  # (BQ, BD)
        b_do = at.load(p_do, o_do, i_batch * do_batch, m_q, VALUE_DIM, BV)  # (BQ, BV)
        b_lse = tl.load(at.pointers(p_lse, o_out, i_out))
        if GRAD_QUERY:
            b_out = at.load(p_out, o_out * VALUE_DIM, i_out * VALUE_DIM, m_q, VALUE_DIM, BV)
            b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
            if HAS_DLSE:
                b_delta -= tl.load(at.pointers(p_dlse, o_out, i_out))
            if not WHOLE:
                tl.store(at.pointers(p_delta, o_out, i_out), b_delta, mask=m_q)
        else:
            b_delta = tl.load(at.pointers(p_delta, o_out, i_out))
        b_dq = tl.zeros([BQ, BD], tl.float32)
        for i_block in range(BLOCKS if GRAD_QUERY else 1):
            if not HOISTED:
                parts = at.key_parts(
                    i_block, lo, hi, q_pos, m_q, n, dilation, group, p_rpb, scale, WINDOW, BOX, BK, HAS_RPB, WIDE
                )
            sums = ()
            for i_part in tl.static_range(len(BK)):
                k_index, m_k, b_bias = parts[i_part]
                o_k, o_v = at.offsets(k_index, (k_d, k_h, k_w)), at.offsets(k_index, (v_d, v_h, v_w))
                b_k = at.load(p_k, o_k, i_batch * k_batch, m_k, HEAD_DIM, BD)  # (BK, BD)
                b_v = at.load(p_v, o_v, i_batch * v_batch, m_k, VALUE_DIM, BV)  # (BK, BV)
                b_logit = at.logits(b_q, b_k, b_bias, scale, PRECISION)  # (BQ, BK)
                b_weight = at.weights(b_logit, b_lse[:, None], scale, b_q.dtype)
                b_p = b_weight.to(b_do.dtype)
                b_dlogit = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
                b_dlogit = b_weight * (b_dlogit - b_delta[:, None])
                if GRAD_RPB:
                    sums += (b_drpb[i_part] + b_dlogit,)
                b_dlogit = b_dlogit.to(b_k.dtype)
                # The other products come last: with d_value before, registers spill on GPUs of sm_80.
                if GRAD_QUERY:
                    b_dq = tl.dot(b_dlogit, b_k, b_dq, input_precision=PRECISION)
                if WHOLE:
                    o_key, m_key = o_token, m_q  # the same tokens, and in one part in the same slots
                    if len(BK) > 1:
                        o_key, m_key = at.flat(k_index, lengths), m_k
                    b_dv = tl.dot(tl.trans(b_p), b_do, input_precision=PRECISION)  # (BK, BV)
                    at.store(p_dv, o_key * dv_row, i_token * dv_row, b_dv, m_key, VALUE_DIM, BV)
                    b_dk = tl.dot(tl.trans(b_dlogit), b_q, input_precision=PRECISION)  # (BK, BD)
                    at.store(p_dk, o_key * dk_row, i_token * dk_row, b_dk * scale, m_key, HEAD_DIM, BD)
            if GRAD_RPB:
                b_drpb = sums
        if GRAD_QUERY:
            at.store(p_dq, o_token * dq_row, i_token * dq_row, b_dq * (scale * SIGN), m_q, HEAD_DIM, BD)

    if GRAD_RPB:
        # An entry of the table is one key of every query, at most: so many steps from the first key of the box.
        p_drpb += tl.program_id(0).to(tl.int64) * TABLE
        table_h: tl.constexpr = 2 * WINDOW[4] - 1
        table_w: tl.constexpr = 2 * WINDOW[8] - 1
        runs: tl.constexpr = (BOX[2] + BOX[4] - 1) // BOX[4]
        row, col = first_block // runs * BOX[3], first_block % runs * BOX[4]
        # Positions again, from a zero that the compiler does not know: kept over the loop, they would spill.
        zero = tl.minimum(images, 1) - 1
        q_pos, _ = at.block(tl.arange(0, BQ) + zero, 0, first, n, TILE)
        q_d = (q_pos[0] - lo[0] - WINDOW[0] + 1)[None, :]
        q_h = (q_pos[1] - lo[1] - WINDOW[4] + 1)[None, :]
        q_w = (q_pos[2] - lo[2] - WINDOW[8] + 1)[None, :]
        q_slot = ((q_d * BOX[1] + q_h) - row) * BOX[4] + q_w - col
        for i_entry in range((TABLE + ENTRIES - 1) // ENTRIES):
            entry = i_entry * ENTRIES + tl.arange(0, ENTRIES) + zero
            e_d, e_h, e_w = entry // (table_h * table_w), entry // table_w % table_h, entry % table_w
            slot = q_slot + ((e_d * BOX[1] + e_h) * BOX[4] + e_w)[:, None]
            m = (entry < TABLE)[:, None] & within(q_h + e_h[:, None], BOX[1]) & within(q_w + e_w[:, None], BOX[2])
            if BOX[0] > 1:
                m = m & within(q_d + e_d[:, None], BOX[0])
            if BLOCKS > 1:
                m = m & within((q_d + e_d[:, None]) * BOX[1] + q_h + e_h[:, None] - row, BOX[3])
                m = m & within(q_w + e_w[:, None] - col, BOX[4])
            b_entry = 0.0
            first_slot = 0
            for i_part in tl.static_range(len(BK)):
                slot_of_part, m_part = slot - first_slot, m
                if len(BK) > 1:
                    m_part = m & within(slot_of_part, BK[i_part])
                b = tl.gather(tl.trans(b_drpb[i_part]), tl.where(m_part, slot_of_part, 0), 0)  # (ENTRIES, BQ)
                b_entry += tl.sum(tl.where(m_part, b, 0.0), 1)
                first_slot += BK[i_part]
            tl.store(p_drpb + entry, b_entry, mask=entry < TABLE)


@triton.jit(do_not_specialize=at.SIZES)
def key_kernel(
    p_q,  # (batch, L_d, L_h, L_w, heads, head_dim), strides in elements below, the last one 1
    p_k,  # (batch, L_d, L_h, L_w, heads / GROUP, head_dim)
    p_v,  # (batch, L_d, L_h, L_w, heads / GROUP, value_dim)
    p_rpb,  # (heads, 2 K_d - 1, 2 K_h - 1, 2 K_w - 1), contiguous; unused without HAS_RPB
    p_do,  # (batch, L_d, L_h, L_w, heads, value_dim), strides as above
    p_lse,  # (batch, L_d, L_h, L_w, heads), float32, contiguous
    p_delta,  # as lse
    p_dk,  # as k, but contiguous but for its row
    p_dv,  # as v, likewise
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
    do_batch,
    do_d,
    do_h,
    do_w,
    do_head,
    dk_row,  # elements from one token to the next
    dv_row,
    L_d,
    L_h,
    L_w,
    dilation_d,
    dilation_h,
    dilation_w,
    tiles_d,  # tiles of the longest dilation group
    tiles_h,
    tiles_w,
    heads,
    batch,
    images,  # of a program, at most, which does the same tile of each
    GROUP: tl.constexpr,  # query heads per key head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr,  # kernel_size, stride, is_causal, and whether every query sees its whole group, axis by axis
    TILE: tl.constexpr,  # a tile of keys, as BOX
    BOX: tl.constexpr,  # the box of queries that see one of them: positions.block
    BQ: tl.constexpr,  # slots of the parts of a block: powers of two
    BK: tl.constexpr,  # slots of a tile: a power of two
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_RPB: tl.constexpr,
    SIGN: tl.constexpr,  # of the scale: -1, 0 or 1
    WIDE: tl.constexpr,  # offsets need 64 bits
    PACKED: tl.constexpr,  # query, key and value have the same strides, and so have their gradients
    PRECISION: tl.constexpr,
):
    """One program: the keys of one tile of one dilation group, of one key head, in some images.

    It walks the queries whose windows hold any of its keys, those of all heads that share the key head.
    """
    if PACKED:  # offsets of the same tokens are then the same, and take registers once
        k_batch, k_d, k_h, k_w = q_batch, q_d, q_h, q_w
        v_batch, v_d, v_h, v_w = q_batch, q_d, q_h, q_w
        dv_row = dk_row
    BLOCKS: tl.constexpr = BOX[5]
    lengths, dilation, tiles = (L_d, L_h, L_w), (dilation_d, dilation_h, dilation_w), (tiles_d, tiles_h, tiles_w)
    kv_heads = heads // GROUP
    i = tl.program_id(0)
    i_kv, i = (i % kv_heads).to(tl.int64), i // kv_heads
    first, group, i = at.locate(i, tiles, dilation, TILE)
    n = at.group_lengths(lengths, dilation, group, WINDOW)
    if not at.inside(first, n):  # a shorter group has no tile here
        return
    k_pos, m_k = at.block(tl.arange(0, BK), 0, first, n, TILE)
    k_index = at.tokens(k_pos, dilation, group, WIDE)
    lo, hi = at.first_queries(first, WINDOW), at.end_of_queries(first, n, TILE, WINDOW)
    TABLE: tl.constexpr = (2 * WINDOW[0] - 1) * (2 * WINDOW[4] - 1) * (2 * WINDOW[8] - 1)
    HOISTED: tl.constexpr = BLOCKS == 1 and GROUP == 1
    if HOISTED:
        parts = at.query_parts(
            0, lo, hi, k_pos, m_k, n, dilation, group, p_rpb + i_kv * TABLE, scale, WINDOW, BOX, BQ, HAS_RPB, WIDE
        )

    o_k, o_v = at.offsets(k_index, (k_d, k_h, k_w)), at.offsets(k_index, (v_d, v_h, v_w))
    o_key = at.flat(k_index, lengths)
    p_k += i_kv * k_head
    p_v += i_kv * v_head
    p_dk += i_kv * HEAD_DIM
    p_dv += i_kv * VALUE_DIM
    for i_image in range(i * images, tl.minimum((i + 1) * images, batch)):
        i_batch = at.numbered(i_image, WIDE or BLOCKS > 1)
        i_token = i_batch * (L_d * L_h * L_w)
        b_k = at.signed(at.load(p_k, o_k, i_batch * k_batch, m_k, HEAD_DIM, BD), SIGN)  # (BK, BD)
        b_v = at.load(p_v, o_v, i_batch * v_batch, m_k, VALUE_DIM, BV)  # (BK, BV)
        b_dk = tl.zeros([BK, BD], tl.float32)
        b_dv = tl.zeros([BK, BV], tl.float32)
        for i_block in range(GROUP * BLOCKS):
            i_head = i_kv * GROUP + i_block // BLOCKS
            if not HOISTED:
                block, p_table = i_block % BLOCKS, p_rpb + i_head * TABLE
                parts = at.query_parts(
                    block, lo, hi, k_pos, m_k, n, dilation, group, p_table, scale, WINDOW, BOX, BQ, HAS_RPB, WIDE
                )
            for i_part in tl.static_range(len(BQ)):
                q_index, m_q, b_bias = parts[i_part]
                o_q, o_do = at.offsets(q_index, (q_d, q_h, q_w)), at.offsets(q_index, (do_d, do_h, do_w))
                b_q = at.load(p_q + i_head * q_head, o_q, i_batch * q_batch, m_q, HEAD_DIM, BD)  # (BQ, BD)
                b_do = at.load(p_do + i_head * do_head, o_do, i_batch * do_batch, m_q, VALUE_DIM, BV)  # (BQ, BV)
                i_out, o_out = i_token * heads, at.flat(q_index, lengths) * heads
                b_lse = tl.load(at.pointers(p_lse + i_head, o_out, i_out))
                b_delta = tl.load(at.pointers(p_delta + i_head, o_out, i_out))
                b_logit = at.logits(b_k, b_q, b_bias, scale, PRECISION)  # (BK, BQ)
                b_weight = at.weights(b_logit, b_lse[None, :], scale, b_k.dtype)
                b_dlogit = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
                b_dlogit = b_weight * (b_dlogit - b_delta[None, :])
                b_dv = tl.dot(b_weight.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
                b_dk = tl.dot(b_dlogit.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        at.store(p_dk, o_key * dk_row, i_token * dk_row, b_dk * (scale * SIGN), m_k, HEAD_DIM, BD)
        at.store(p_dv, o_key * dv_row, i_token * dv_row, b_dv, m_k, VALUE_DIM, BV)
