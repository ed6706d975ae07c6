"""The forward kernel.  Names and geometry as in positions.py."""

import triton
import triton.language as tl

from . import positions as at
from .positions import LOG2E

# Stands for "no key yet" in the running maximum: finite, so that no difference is inf - inf.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit(do_not_specialize=at.SIZES)
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
    PACKED: tl.constexpr,  # query, key and value have the same strides
    PRECISION: tl.constexpr,
):
    """One program: the queries of one tile of one dilation group, of one head, in some images.

    It walks the box of keys that the windows of its queries span, block by block, with an online softmax.  Where one
    block holds the box, its geometry, mask and bias are worked out once for all images.  Programs that follow each
    other are the heads of a token, which lie side by side in memory.
    """
    if PACKED:  # offsets of the same tokens are then the same, and take registers once
        k_batch, k_d, k_h, k_w = q_batch, q_d, q_h, q_w
        v_batch, v_d, v_h, v_w = q_batch, q_d, q_h, q_w
    BLOCKS: tl.constexpr = BOX[5]
    lengths, dilation, tiles = (L_d, L_h, L_w), (dilation_d, dilation_h, dilation_w), (tiles_d, tiles_h, tiles_w)
    i = tl.program_id(0)
    i_head, i = (i % heads).to(tl.int64), i // heads
    first, group, i = at.locate(i, tiles, dilation, TILE)
    n = at.group_lengths(lengths, dilation, group, WINDOW)
    if not at.inside(first, n):  # a shorter group has no tile here
        return
    q_pos, m_q = at.block(tl.arange(0, BQ), 0, first, n, TILE)
    q_index = at.tokens(q_pos, dilation, group, WIDE)
    lo, hi = at.first_keys(first, n, WINDOW), at.end_of_keys(first, n, TILE, WINDOW)
    p_rpb += i_head * ((2 * WINDOW[0] - 1) * (2 * WINDOW[4] - 1) * (2 * WINDOW[8] - 1))
    m_any = tl.full([BQ], True, tl.int1)  # slots without a query of their own compute another one's again
    if BLOCKS == 1:
        parts = at.key_parts(0, lo, hi, q_pos, m_any, n, dilation, group, p_rpb, scale, WINDOW, BOX, BK, HAS_RPB, WIDE)

    o_q = at.offsets(q_index, (q_d, q_h, q_w))
    o_out = at.flat(q_index, lengths) * heads
    p_q += i_head * q_head
    p_k += i_head // GROUP * k_head
    p_v += i_head // GROUP * v_head
    p_out += i_head * VALUE_DIM
    p_lse += i_head
    for i_image in range(i * images, tl.minimum((i + 1) * images, batch)):
        i_batch = at.numbered(i_image, WIDE or BLOCKS > 1)
        i_out = i_batch * (L_d * L_h * L_w) * heads
        b_q = at.signed(at.load(p_q, o_q, i_batch * q_batch, m_q, HEAD_DIM, BD), SIGN)  # (BQ, BD)
        b_max = tl.full([BQ], LOWEST, tl.float32)
        b_sum = tl.zeros([BQ], tl.float32)
        b_out = tl.zeros([BQ, BV], tl.float32)
        for i_block in range(BLOCKS):
            if BLOCKS > 1:
                parts = at.key_parts(
                    i_block, lo, hi, q_pos, m_any, n, dilation, group, p_rpb, scale, WINDOW, BOX, BK, HAS_RPB, WIDE
                )
            for i_part in tl.static_range(len(BK)):
                k_index, m_k, b_bias = parts[i_part]
                o_k, o_v = at.offsets(k_index, (k_d, k_h, k_w)), at.offsets(k_index, (v_d, v_h, v_w))
                b_k = at.load(p_k, o_k, i_batch * k_batch, m_k, HEAD_DIM, BD)  # (BK, BD)
                b_v = at.load(p_v, o_v, i_batch * v_batch, m_k, VALUE_DIM, BV)  # (BK, BV)
                b_logit = at.logits(b_q, b_k, b_bias, scale, PRECISION)  # (BQ, BK)
                b_new_max = tl.maximum(b_max, tl.max(b_logit, 1) * scale)
                b_weight = at.weights(b_logit, b_new_max[:, None], scale, b_q.dtype)  # (BQ, BK)
                if BLOCKS > 1 or i_part > 0:
                    b_decay = tl.exp2((b_max - b_new_max) * LOG2E)
                    b_sum *= b_decay
                    b_out *= b_decay[:, None]
                b_sum += tl.sum(b_weight, 1)
                b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
                b_max = b_new_max
        tl.store(at.pointers(p_lse, o_out, i_out), b_max + tl.log(b_sum), mask=m_q)
        b_out *= at.inverse(b_sum, b_q.dtype)[:, None]
        at.store(p_out, o_out * VALUE_DIM, i_out * VALUE_DIM, b_out, m_q, VALUE_DIM, BV)
