"""Ragged causal attention over paged keys and values: prefill, chunks, decode and draft verification in one kernel.

The reference is ``quire.reference.paged.attention``. A program takes a tile of one sequence's queries together with
all query heads that share a KV head (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245), so that
a key is read once for all of them, and runs over the keys with the softmax kept up as it goes (Dao et al. 2022,
FlashAttention, https://arxiv.org/abs/2205.14135). For few queries and long contexts the keys are cut into parts
(Dao et al. 2023, Flash-Decoding, https://pytorch.org/blog/flash-decoding/), which attention_merge.py joins.

Bits: tiles of keys lie at multiples of BLOCK_N from the sequence's start, and a tile that shows a query nothing leaves
its sums as they were, so a query's bits do not depend on which of a tile's rows it is. They do depend on BLOCK_N, on the
instruction that the tile's shape gives, and on where the keys are cut: an even division of the sequence into ``n_splits``
puts the cuts anywhere. The batch-invariant variant has one tile for every number of queries and cuts at multiples of
``split_len``; a tile of many queries then goes through the parts one by one (PARTED) and joins them as
attention_merge.py does.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_bounds(lo, hi, split, n_splits, split_len, shortest, BLOCK_N: tl.constexpr):
    """The keys [begin, end) of part ``split`` of the visible keys [lo, hi); ``begin`` is a multiple of BLOCK_N."""
    aligned = (lo // BLOCK_N) * BLOCK_N
    if split_len > 0:
        begin = tl.maximum(aligned, split * split_len)
        end = tl.minimum(hi, (split + 1) * split_len)
    else:
        length = tl.maximum(tl.cdiv(hi - aligned, n_splits), shortest)
        length = tl.cdiv(length, BLOCK_N) * BLOCK_N
        begin = aligned + split * length
        end = tl.minimum(hi, begin + length)
    return begin, end


@triton.jit
def _load(at, channel, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Numbers of a tile of keys. What is not visible may hold NaN, and 0 * NaN is NaN: it must not reach a product."""
    if MASKED and BLOCK_D != D:
        numbers = tl.load(at, mask=inside & (channel < D), other=0)
    elif MASKED:
        numbers = tl.load(at, mask=inside, other=0)
    elif BLOCK_D != D:
        numbers = tl.load(at, mask=channel < D, other=0)
    else:
        numbers = tl.load(at)
    return numbers


@triton.jit
def _decoded(codes, EIGHT_BITS: tl.constexpr, DOT: tl.constexpr):
    """A tile's numbers as a product's factors; of codes in 8 bits what they stand for before scaling, of e4m3 a 256th and
    in float16 of int8 a 64th, which leaves it room for weights with the scales in them. e4m3 is read by arithmetic, since
    no two architectures have the same kinds of fp8: moved left by 7 a code is the float16 of the same mantissa, whose
    exponent is biased by 8 more, and the sign that its extension to 16 bits has put below the highest is taken away."""
    if EIGHT_BITS == 2:
        codes = ((codes.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)
    numbers = codes.to(DOT)
    if EIGHT_BITS == 1 and tl.float16 == DOT:
        numbers *= 0.015625
    return numbers


@triton.jit
def _tile(
    q, q_rest, top, total, acc, start, lo, hi, position, k_ptr, v_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
    stride_page, stride_slot, factor, cap_in, window, D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, EIGHT_BITS: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum, sum and weighted values with it."""
    key = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (key >= lo) & (key < hi)
    if MASKED:
        page = tl.load(table_ptr + key // PAGE, mask=inside, other=0)
    else:
        page = tl.load(table_ptr + key // PAGE)
    place = page.to(tl.int64) * stride_page + (key % PAGE) * stride_slot
    # Scales multiply scores and weights, which are fewer than a tile's numbers where its rows are few. Where they are many,
    # a thread would hold the scales of most keys at once: they multiply the numbers then, which lie by key.
    BY_NUMBER: tl.constexpr = EIGHT_BITS != 0 and q.shape[0] > 64 and REST == 0
    BY_SCORE: tl.constexpr = EIGHT_BITS != 0 and not BY_NUMBER
    UNIT: tl.constexpr = 256.0 if EIGHT_BITS == 2 else 64.0 if tl.float16 == DOT else 1.0
    if EIGHT_BITS:
        scale_at = page.to(tl.int64) * (KV_HEADS * PAGE) + key % PAGE
        key_scale = _load(key_scales_ptr + scale_at, d, inside, 1, 1, MASKED) * UNIT
        value_scale = key_scale
    if REST:
        v = _load(k_ptr + place[:, None] + d[None, :], d[None, :], inside[:, None], D, BLOCK_D, MASKED)
        r = tl.arange(0, BLOCK_R)
        rest_at = k_ptr + place[None, :] + D + r[:, None]
        rest = _load(rest_at, r[:, None], inside[None, :], REST, BLOCK_R, MASKED)
        v = _decoded(v, EIGHT_BITS, DOT)
        scores = tl.dot(q, tl.trans(v), input_precision="ieee")
        scores = tl.dot(q_rest, _decoded(rest, EIGHT_BITS, DOT), scores, input_precision="ieee")
    else:
        k = _load(k_ptr + place[None, :] + d[:, None], d[:, None], inside[None, :], D, BLOCK_D, MASKED)
        v = _load(v_ptr + place[:, None] + d[None, :], d[None, :], inside[:, None], D, BLOCK_D, MASKED)
        k = _decoded(k, EIGHT_BITS, DOT)
        v = _decoded(v, EIGHT_BITS, DOT)
        if EIGHT_BITS:
            value_scale = _load(value_scales_ptr + scale_at, d, inside, 1, 1, MASKED) * UNIT
        if BY_NUMBER:
            k = (k.to(tl.float32) * key_scale[None, :]).to(DOT)
            v = (v.to(tl.float32) * value_scale[:, None]).to(DOT)
        scores = tl.dot(q, k, input_precision="ieee")
    if BY_SCORE:
        scores *= key_scale[None, :]
    if CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which at both ends goes to what it should.
        scores = 1.0 - 2.0 / (tl.exp2(scores * cap_in) + 1.0)
    # One form of the exponent whether or not the tile is masked, so that both give the same bits.
    if MASKED:
        visible = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        highest = tl.max(tl.where(visible, scores, float("-inf")), 1)
    else:
        highest = tl.max(scores, 1)
    new_top = tl.maximum(top, highest * factor)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if BY_SCORE:
        weights *= value_scale[None, :]
    acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _keys(
    q, q_rest, top, total, acc, low, whole_low, whole_high, high, lo, position, k_ptr, v_ptr, key_scales_ptr,
    value_scales_ptr, table_ptr, stride_page, stride_slot, factor, cap_in, window, D: tl.constexpr, BLOCK_D: tl.constexpr,
    REST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, EIGHT_BITS: tl.constexpr, WHOLE: tl.constexpr, STAY: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The keys [low, high), of which those in [whole_low, whole_high) are visible to every query (not WHOLE: masked all)."""
    if WHOLE:
        if WINDOW:
            for start in tl.range(low, whole_low, BLOCK_N, disable_licm=STAY):
                top, total, acc = _tile(
                    q, q_rest, top, total, acc, start, lo, high, position, k_ptr, v_ptr, key_scales_ptr, value_scales_ptr,
                    table_ptr, stride_page, stride_slot, factor, cap_in, window, D, BLOCK_D, REST, BLOCK_R, BLOCK_N, PAGE,
                    KV_HEADS, WINDOW, CAP, EIGHT_BITS, True, DOT,
                )  # fmt: skip
        for start in tl.range(whole_low, whole_high, BLOCK_N, disable_licm=STAY):
            top, total, acc = _tile(
                q, q_rest, top, total, acc, start, lo, high, position, k_ptr, v_ptr, key_scales_ptr, value_scales_ptr,
                table_ptr, stride_page, stride_slot, factor, cap_in, window, D, BLOCK_D, REST, BLOCK_R, BLOCK_N, PAGE,
                KV_HEADS, WINDOW, CAP, EIGHT_BITS, False, DOT,
            )  # fmt: skip
    else:
        whole_high = low
    for start in tl.range(whole_high, high, BLOCK_N, disable_licm=STAY):
        top, total, acc = _tile(
            q, q_rest, top, total, acc, start, lo, high, position, k_ptr, v_ptr, key_scales_ptr, value_scales_ptr,
            table_ptr, stride_page, stride_slot, factor, cap_in, window, D, BLOCK_D, REST, BLOCK_R, BLOCK_N, PAGE,
            KV_HEADS, WINDOW, CAP, EIGHT_BITS, True, DOT,
        )  # fmt: skip
    return top, total, acc


@triton.jit(do_not_specialize=["n_splits", "split_len", "shortest", "window", "table_stride"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, key_scales_ptr, value_scales_ptr, out_ptr, part_ptr, stats_ptr, table_ptr, start_ptr, lens_ptr,
    tiles_ptr, sinks_ptr, factor, cap_in, window, n_splits, split_len, shortest, table_stride, stride_page, stride_slot,
    HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, EIGHT_BITS: tl.constexpr, TILES: tl.constexpr,
    SPLIT: tl.constexpr, PARTED: tl.constexpr, STAY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, parts), or (tiles, blocks of a tile's rows, parts) where attention is latent.

    q [T, HQ, D + REST], out [T, HQ, D]; k, v one layer's pages, with scales [pages, KV heads, PAGE] for EIGHT_BITS (1:
    int8, 2: the bits of e4m3); table [N, table_stride]; start [N + 1]; lens [N]. REST: channels that a latent key has
    beyond those that are its value; 0: keys and values are stored apart. tiles int32 [n, 2]:
    (sequence, first query within it), or without TILES tile n is the one query of sequence n. factor: what a score is
    multiplied with to be an exponent of 2 (after a soft cap; cap_in before it). DOT: the type of the products'
    factors. With SPLIT a part's sums go to part float32 [tiles, KV heads, BLOCK_Q * GROUP, parts, D] and (maximum, sum)
    to stats [..., parts, 2]. PARTED: parts of ``split_len`` keys, summed apart and joined here.
    STAY: what a loop does not change is computed in it all the same, where registers to keep it are missing.
    """
    KV_HEADS: tl.constexpr = HQ // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if TILES:
        sequence, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    else:
        sequence, first = tile, 0
    begin, context = tl.load(start_ptr + sequence), tl.load(lens_ptr + sequence)
    queries = tl.load(start_ptr + sequence + 1) - begin
    count = tl.minimum(queries - first, BLOCK_Q)
    row = tl.arange(0, BLOCK_M)
    if REST:  # many heads share one key: they may be more than a tile has rows
        row += kv_head * BLOCK_M
        kv_head *= 0
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = token < count
    position = context - queries + first + token  # of each row's query in its sequence
    oldest = context - queries + first
    d = tl.arange(0, BLOCK_D)
    vector = ((begin + first + token).to(tl.int64) * HQ + head)[:, None]
    at = vector * D + d[None, :]
    q_at = q_ptr + vector * (D + REST)
    q = tl.load(q_at + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0).to(DOT)
    q_rest = q
    if REST:
        r = tl.arange(0, BLOCK_R)[None, :]
        q_rest = tl.load(q_at + D + r, mask=valid[:, None] & (r < REST), other=0.0).to(DOT)

    lo, hi = 0, tl.maximum(tl.minimum(oldest + count, context), 0)
    if WINDOW:
        lo = tl.maximum(oldest - window + 1, 0)
    if SPLIT:
        low, high = split_bounds(lo, hi, split, n_splits, split_len, shortest, BLOCK_N)
    else:
        low, high = (lo // BLOCK_N) * BLOCK_N, hi
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS and not SPLIT:
        top = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr += kv_head * D
    v_ptr += kv_head * D
    key_scales_ptr += kv_head * PAGE
    value_scales_ptr += kv_head * PAGE
    table_ptr += sequence.to(tl.int64) * table_stride

    # Only the tiles at the ends need masks: [low, whole_low) a window's, [whole_high, high) the diagonal. A latent key's
    # tile leaves no registers for a second loop.
    WHOLE: tl.constexpr = not (SPLIT or REST)
    whole_low, whole_high = low, tl.maximum(((oldest + 1) // BLOCK_N) * BLOCK_N, low)
    if WINDOW:
        last = tl.maximum(oldest + count - window, 0)
        whole_low = tl.minimum(tl.maximum(tl.cdiv(last, BLOCK_N) * BLOCK_N, low), high)
        whole_high = tl.maximum(whole_high, whole_low)
    if PARTED:
        for part in tl.range(low // split_len, tl.cdiv(high, split_len), num_stages=1, disable_licm=STAY):
            begin_part, end_part = tl.maximum(part * split_len, low), tl.minimum((part + 1) * split_len, high)
            low_part = tl.minimum(tl.maximum(whole_low, begin_part), end_part)
            high_part = tl.minimum(tl.maximum(whole_high, low_part), end_part)
            part_top, part_total, part_acc = _keys(
                q, q_rest, tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, BLOCK_D], tl.float32), begin_part, low_part, high_part, end_part, lo, position, k_ptr,
                v_ptr, key_scales_ptr, value_scales_ptr, table_ptr, stride_page, stride_slot, factor, cap_in, window, D,
                BLOCK_D, REST, BLOCK_R, BLOCK_N, PAGE, KV_HEADS, WINDOW, CAP, EIGHT_BITS, WHOLE, STAY, DOT,
            )  # fmt: skip
            # As attention_merge.py; a row that the part showed nothing stays as it is.
            new_top = tl.maximum(top, part_top)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            decay, weight = tl.exp2(top - base), tl.exp2(part_top - base)
            acc = tl.fma(part_acc, weight[:, None], acc * decay[:, None])
            total = tl.fma(part_total, weight, total * decay)
            top = new_top
    else:
        top, total, acc = _keys(
            q, q_rest, top, total, acc, low, whole_low, whole_high, high, lo, position, k_ptr, v_ptr, key_scales_ptr,
            value_scales_ptr, table_ptr, stride_page, stride_slot, factor, cap_in, window, D, BLOCK_D, REST, BLOCK_R, BLOCK_N,
            PAGE, KV_HEADS, WINDOW, CAP, EIGHT_BITS, WHOLE, STAY, DOT,
        )  # fmt: skip

    if SPLIT:
        rows = (tile.to(tl.int64) * KV_HEADS + kv_head) * (BLOCK_Q * GROUP) + row
        part = rows * n_splits + split
        tl.store(stats_ptr + 2 * part, top, mask=valid)
        tl.store(stats_ptr + 2 * part + 1, total, mask=valid)
        if low < high:
            tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=valid[:, None] & (d[None, :] < D))
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (d[None, :] < D))
