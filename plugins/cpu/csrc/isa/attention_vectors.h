// Attention by vectors: every instruction set, and every type of page and query.
#pragma once

#include "../linear.h"

#include "attention_rows.h"
#include "dot.h"

namespace quire::QUIRE_ISA {
namespace {

constexpr int block_vectors = key_block / W;  // of keys, or as many channels
template <class Dot>
constexpr int max_rows = REGISTERS == 32 ? rows_in_registers<Dot>(2 * block_vectors) : sums_in_registers / block_vectors;
// Whether the sums of ROWS queries for two blocks of keys, or 32 channels, stay in registers. Else they are made for half.
constexpr bool both_in_registers(int rows) { return REGISTERS == 32 || rows * 2 * block_vectors <= sums_in_registers; }

// Where registers are few, a fetch in each step costs a third of the time: none is made where nothing is to come.
QUIRE_INLINE void fetch_line(uintptr_t next, bool wanted) {
    if (REGISTERS == 32 || wanted) prefetch_l2(next);
}

// The scores of two blocks of keys, or of one, 16 each, for ROWS queries. Meanwhile fetches as many bytes from `ahead` on.
template <class Dot, int ROWS, int BLOCKS>
void scores_of(const char* k0, const char* k1, const char* q, int64_t q_block_bytes, int64_t steps, float* out,
               const char* ahead, bool wanted) {
    constexpr int NV = BLOCKS * block_vectors;
    uintptr_t next = reinterpret_cast<uintptr_t>(ahead);
    VF a[ROWS][NV];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) a[r][j] = zero();
    for (int64_t block = 0; block < steps; block += step_block, q += q_block_bytes) {
        const int count = int(smaller<int64_t>(step_block, steps - block));
        for (int s = 0; s < count; s++, k0 += 64, k1 += 64, next += BLOCKS * 64) {
            fetch_line(next, wanted);
            if (BLOCKS == 2) fetch_line(next + 64, wanted);
            multiply_step<Dot, ROWS, NV>(a, k0, BLOCKS == 2 ? k1 : k0 + (NV + 1) / 2 * W * 4, q + s * Dot::x_bytes,
                                         step_block * Dot::x_bytes);
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) store(out + r * score_stride + j * W, a[r][j]);
}

// VECTORS vectors of channels, from byte `offset` of a step on, of weights * values over some blocks of keys, for ROWS
// queries. Meanwhile fetches, for each block, as many bytes from its `ahead` on.
template <class Dot, int ROWS, int VECTORS>
void values_of(const char* const* v, const char* const* ahead, bool wanted, int first, int last, int64_t offset,
               int64_t step_stride, const char* p, float* out, int64_t out_stride) {
    constexpr int steps = key_block / Dot::per_step, half = (VECTORS + 1) / 2 * W * 4;
    VF a[ROWS][VECTORS];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) a[r][j] = zero();
    for (int b = first; b < last; b++) {
        const char* w = v[b] + offset;
        const int begin = b * steps;
        const char* x = p + (begin / step_block * ROWS * step_block + begin % step_block) * Dot::x_bytes;
        uintptr_t next = reinterpret_cast<uintptr_t>(ahead[b]);
#pragma GCC unroll 1
        for (int s = 0; s < steps; s++, w += step_stride, x += Dot::x_bytes, next += VECTORS * W * 4) {
            for (int line = 0; line < VECTORS * W * 4; line += 64) fetch_line(next + uintptr_t(line), wanted);
            multiply_step<Dot, ROWS, VECTORS>(a, w, w + half, x, step_block * Dot::x_bytes);
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) store(out + r * out_stride + j * W, a[r][j]);
}

template <class Dot, int ROWS>
void scores_of_rows(int rows, const char* const k[2], const char* q, int64_t q_block_bytes, int64_t steps, float* out,
                    const char* ahead, bool wanted) {
    if (rows == ROWS) {
        if constexpr (both_in_registers(ROWS)) {
            scores_of<Dot, ROWS, 2>(k[0], k[1], q, q_block_bytes, steps, out, ahead, wanted);
        } else {
            scores_of<Dot, ROWS, 1>(k[0], nullptr, q, q_block_bytes, steps, out, ahead, wanted);
            scores_of<Dot, ROWS, 1>(k[1], nullptr, q, q_block_bytes, steps, out + key_block, ahead + steps * 64, wanted);
        }
        return;
    }
    if constexpr (ROWS > 1) scores_of_rows<Dot, ROWS - 1>(rows, k, q, q_block_bytes, steps, out, ahead, wanted);
}

template <class Dot, int ROWS, int VECTORS>
void values_of_rows(int rows, const char* const* v, const char* const* ahead, bool wanted, int first, int last,
                    int64_t offset, int64_t step_stride, const char* p, float* out, int64_t out_stride) {
    if constexpr (VECTORS == block_vectors || both_in_registers(ROWS))
        if (rows == ROWS)
            return values_of<Dot, ROWS, VECTORS>(v, ahead, wanted, first, last, offset, step_stride, p, out, out_stride);
    if constexpr (ROWS > 1)
        values_of_rows<Dot, ROWS - 1, VECTORS>(rows, v, ahead, wanted, first, last, offset, step_stride, p, out,
                                               out_stride);
}

// Working memory of a task, cut from what the caller provides.
struct Memory {
    char* q;          // packed queries
    float* scores;    // [row of a tile of rows][score_stride]
    char* weights;    // packed
    char* clean;      // two blocks of values without what no query may see
    float* values;    // [row of a tile of rows][channels]: of one tile of keys
    float* state;     // [row][16 + channels]: maximum, sum, values so far
};

// What is known of a task: positions, and where rows are. Row r is query q0 + r / group, head r % group of the group.
template <class Dot>
struct Work {
    const AttentionArgs& a;
    const AttentionTask& task;
    Memory m;
    int64_t token0, position0;  // of query q0
    int rows, steps;
    Tiles tiles;                // of rows

    int64_t position(int64_t row) const { return position0 + row / a.group; }
    int64_t q_block_bytes(int64_t tile) const { return int64_t(tiles.size(tile)) * step_block * Dot::x_bytes; }
    char* packed_q(int64_t tile) const {
        return m.q + tiles.begin(tile) * ((steps + step_block - 1) / step_block * step_block) * Dot::x_bytes;
    }
};

template <class Dot, class T>
void pack_queries(const Work<Dot>& w) {
    const int dim = w.a.layout.head_dim;
    for (int64_t tile = 0; tile < w.tiles.tiles; tile++) {
        char* out = w.packed_q(tile);
        const int64_t row0 = w.tiles.begin(tile), rows = w.tiles.size(tile);
        for (int s = 0; s < w.steps; s += step_block)
            for (int64_t r = row0; r < row0 + rows; r++, out += step_block * Dot::x_bytes) {
                const int64_t head = int64_t(w.task.head) * w.a.group + r % w.a.group;
                const T* x = static_cast<const T*>(w.a.q.data) + (w.token0 + r / w.a.group) * w.a.q.stride + head * dim;
                auto* to = reinterpret_cast<typename Dot::X*>(out);
                for (int i = 0; i < step_block * Dot::per_step; i += W) {
                    const int64_t from = s * Dot::per_step + i;
                    const int n = int(smaller<int64_t>(W, dim - from));
                    store(to + i, n > 0 ? load_first(x + from, n) : zero());
                }
            }
    }
}

// A copy of a block of values in which keys outside [begin, end) (counted in the block) are zero: what lies there may
// be NaN, and a weight of zero does not undo that.
template <class Dot>
const char* clean_block(const KVLayout& layout, const char* block, int64_t begin, int64_t end, char* copy) {
    constexpr int size = 4 / Dot::per_step;  // bytes of an element
    const int64_t channels = layout.value_dim();
    memset(copy, 0, size_t(layout.value_block_bytes()));
    for (int64_t key = larger<int64_t>(0, begin); key < smaller<int64_t>(key_block, end); key++) {
        const int64_t at = key / Dot::per_step * channels * 4 + key % Dot::per_step * size;
        for (int64_t c = 0; c < channels; c++) memcpy(copy + at + c * 4, block + at + c * 4, size);
    }
    return copy;
}

// The blocks of a tile of keys: pointers for the visible ones, values cleaned at the borders.
struct Blocks {
    int first, last;
    const char *k[blocks_of_tile + 1], *v[blocks_of_tile + 1];
};

// 2^(unit (score - top)), as a product takes it from memory: where that is in 8 bits, it is not computed to 24 before.
QUIRE_INLINE VF weight_for(const float*, VF score, VF top, VF unit) { return power_of_two((score - top) * unit); }
QUIRE_INLINE void store_weight(float* p, VF w) { store(p, w); }
#if defined(QUIRE_HAS_BF16_DOT)
QUIRE_INLINE VF weight_for(const bf16*, VF score, VF top, VF unit) {
    return coarse_power_of_two(fma(score, unit, zero() - top * unit));
}
QUIRE_INLINE void store_weight(bf16* p, VF w) { store_operand(p, w); }
#endif

// Lanes first .. last-1 of the scores at `s`: hidden.
inline void hide(float* s, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) s[i] = minus_infinity;
}

// Scores to weights for one row: scale, cap, hide what is not in [begin, end), e^(score - maximum). Leaves them packed;
// returns maximum and sum.
template <class Dot>
void soften(const AttentionArgs& a, const Blocks& blocks, float* scores, int64_t begin, int64_t end, char* packed,
            int64_t packed_stride, float& maximum, float& sum) {
    const unsigned lo = unsigned(blocks.first * key_block), hi = unsigned(blocks.last * key_block);
    const bool plain = !Dot::scaled && a.soft_cap == 0 && a.scale > 0;  // then the maximum can be scaled instead
    for (unsigned i = lo; !plain && i < hi; i += W) {
        VF s = load(scores + i) * set1(a.scale);
        if constexpr (Dot::scaled) s = s * scales_of(blocks.k, int(i), a.layout.key_data_bytes());
        if (a.soft_cap != 0) s = set1(a.soft_cap) * tanh(s / set1(a.soft_cap));
        store(scores + i, s);
    }
    hide(scores, lo, begin);
    hide(scores, end, hi);
    VF highest = set1(minus_infinity), total = zero();
    for (unsigned i = lo; i < hi; i += W) highest = max(highest, load(scores + i));
    const float scale = plain ? a.scale : 1.0f, most = reduce_max(highest);
    maximum = most * scale;
    const VF top = set1(most), unit = set1(scale * log2_e);
    constexpr unsigned block = step_block * Dot::per_step;  // weights of a row in one block of packed steps
    for (unsigned i = lo; i < hi; i += W) {
        auto* to = reinterpret_cast<typename Dot::X*>(packed + i / block * packed_stride) + i % block;
        VF p = weight_for(to, load(scores + i), top, unit);
        total = total + p;
        if constexpr (Dot::scaled) {
            p = p * scales_of(blocks.v, int(i), a.layout.value_data_bytes());
            // 0 times the scale of a slot that nobody wrote may be NaN.
            if (i < begin || i + W > end) p = keep(p, int(begin) - int(i), int(end) - int(i), zero());
        }
        store_weight(to, p);
    }
    sum = reduce_add(total);
}

template <class Dot>
void find_blocks(const Work<Dot>& w, int64_t tile, Span seen, Blocks& blocks) {
    const int64_t base = tile * key_tile;
    const int64_t begin = larger(seen.begin - base, int64_t(0)), end = smaller(seen.end - base, int64_t(key_tile));
    blocks.first = int(begin / key_block);
    blocks.last = int((end + key_block - 1) / key_block);
    BlockWalk walk = BlockWalk::make(w.a, w.task, base / key_block + blocks.first);
    for (int b = blocks.first; b < blocks.last; b++, walk.next()) {
        blocks.k[b] = walk.keys();
        blocks.v[b] = walk.values();
    }
    blocks.k[blocks.last] = blocks.k[blocks.last - 1];  // scores are made for two blocks at a time
    blocks.v[blocks.last] = blocks.v[blocks.last - 1];
    if (Dot::scaled) return;  // integers are never NaN
    const int64_t bytes = w.a.layout.value_block_bytes();
    const auto clean = [&](int b, char* copy) {
        blocks.v[b] = clean_block<Dot>(w.a.layout, blocks.v[b], begin - b * key_block, end - b * key_block, copy);
    };
    const int f = blocks.first, l = blocks.last - 1;
    if (begin % key_block) clean(f, w.m.clean);
    if (end % key_block && (f != l || begin % key_block == 0)) clean(l, w.m.clean + bytes);
}

// What comes after a tile, to be fetched while it is computed: in the order of memory, so that the processor's own
// prefetchers see one stream and run ahead of it, and evenly over the time of both products.
struct Ahead {
    int64_t piece_bytes;                 // of a block's keys and values
    const char* piece[blocks_of_tile];   // null beyond the last

    // `at` bytes from the beginning; where nothing is to come, `instead`.
    const char* place(int64_t at, const char* instead) const {
        const char* from = piece[at / piece_bytes];
        return from ? from + at % piece_bytes : instead;
    }

    // The tile after `tile` of the task or, after its last, the first of what this thread will probably do next.
    template <class Dot>
    bool find(const Work<Dot>& w, int64_t tile) {
        const AttentionTask* task = &w.task;
        int64_t end = w.position(w.rows - 1) + 1, next = tile + 1;
        if (next >= task->tile1 || next * key_tile >= end) {
            task = w.a.after;
            if (!task) return false;
            end = w.a.context_lens[task->sequence];
            next = task->tile0;
        }
        const int64_t base = next * key_tile;
        BlockWalk walk = BlockWalk::make(w.a, *task, base / key_block);
        piece_bytes = w.a.layout.key_block_bytes() + w.a.layout.value_block_bytes();
        for (int b = 0; b < blocks_of_tile; b++) {
            piece[b] = nullptr;
            if (base + b * key_block >= end) continue;
            piece[b] = walk.piece();
            walk.next();
        }
        return true;
    }
};

// One tile of keys for rows row0 .. row0+rows-1, which all see some of it and lie in one tile of rows.
template <class Dot>
void attend_tile(const Work<Dot>& w, int64_t tile, int64_t row_tile, int64_t row0, int rows, const Ahead* ahead) {
    const AttentionArgs& a = w.a;
    const int64_t base = tile * key_tile, channels = a.layout.value_dim();
    Blocks blocks;
    const Span seen = {visible(a, w.position(row0)).begin, w.position(row0 + rows - 1) + 1};
    find_blocks(w, tile, seen, blocks);
    const char* q = w.packed_q(row_tile) + (row0 - w.tiles.begin(row_tile)) * step_block * Dot::x_bytes;
    const int64_t half = ahead ? ahead->piece_bytes / 2 : 0;  // what one block of keys, or of values, fetches
    for (int b = blocks.first; b < blocks.last; b += 2)
        scores_of_rows<Dot, max_rows<Dot>>(rows, blocks.k + b, q, w.q_block_bytes(row_tile), w.steps,
                                           w.m.scores + b * key_block,
                                           ahead ? ahead->place(b * half, blocks.k[b]) : blocks.k[b], ahead != nullptr);
    float maximum[16], sum[16];
    const int64_t packed_block = int64_t(rows) * step_block * Dot::x_bytes;
    for (int r = 0; r < rows; r++) {
        const Span s = visible(a, w.position(row0 + r));
        soften<Dot>(a, blocks, w.m.scores + r * score_stride, s.begin - base, s.end - base, w.m.weights +
                    r * step_block * Dot::x_bytes, packed_block, maximum[r], sum[r]);
    }
    const int64_t step_bytes = channels * 4;
    const char* later[blocks_of_tile];
    // The part of the second half of what comes next that products with `width` channels from c on fetch.
    const auto find_later = [&](int64_t c, int64_t width) {
        for (int b = blocks.first; b < blocks.last; b++)
            later[b] = ahead ? ahead->place(blocks_of_tile * half + (c * blocks_of_tile + b * width) * half / channels,
                                            blocks.v[b])
                             : blocks.v[b];
    };
    const int64_t wide = both_in_registers(rows) ? 2 * key_block : key_block;  // channels at a time
    for (int64_t c = 0, width; c < channels; c += width) {
        width = smaller(wide, channels - c);
        find_later(c, width);
        const auto product = width == key_block ? values_of_rows<Dot, max_rows<Dot>, block_vectors>
                                                : values_of_rows<Dot, max_rows<Dot>, 2 * block_vectors>;
        product(rows, blocks.v, later, ahead != nullptr, blocks.first, blocks.last, c * 4, step_bytes, w.m.weights,
                w.m.values + c, channels);
    }
    for (int r = 0; r < rows; r++) {
        const float* values = w.m.values + r * channels;
        if (w.task.partial < 0) {
            const bool first = visible(a, w.position(row0 + r)).begin / key_tile == tile;
            merge(w.m.state + (row0 + r) * partial_row(a.layout), first, maximum[r], sum[r], values, channels);
        } else {
            const int64_t at = (tile - w.task.tile0) * w.rows + row0 + r;
            merge(a.partial + w.task.partial + at * partial_row(a.layout), true, maximum[r], sum[r], values, channels);
        }
    }
}

// Rows of the task that see a tile of keys: those of a range of queries.
template <class Dot>
Span rows_that_see(const Work<Dot>& w, int64_t tile) {
    const int64_t base = tile * key_tile, queries = w.task.q1 - w.task.q0;
    const int64_t begin = larger<int64_t>(0, base - w.position0);
    const int64_t end = smaller<int64_t>(queries, base + key_tile - 1 + w.a.window - w.position0);
    return {begin * w.a.group, end * w.a.group};
}

template <class Dot>
void attend(const AttentionArgs& a, const AttentionTask& task, char* scratch) {
    const int32_t start = a.query_start[task.sequence], count = a.query_start[task.sequence + 1] - start;
    const int rows = (task.q1 - task.q0) * a.group, steps = (a.layout.head_dim + Dot::per_step - 1) / Dot::per_step;
    const int64_t channels = a.layout.value_dim();
    Memory m;
    const auto cut = [&](int64_t bytes) {
        char* piece = scratch;
        scratch += (bytes + 63) / 64 * 64;
        return piece;
    };
    m.state = reinterpret_cast<float*>(cut(rows * partial_row(a.layout) * 4));
    m.scores = reinterpret_cast<float*>(cut(max_rows<Dot> * score_stride * 4));
    m.weights = cut(max_rows<Dot> * key_tile * 4);
    m.values = reinterpret_cast<float*>(cut(max_rows<Dot> * channels * 4));
    m.clean = cut(2 * a.layout.value_block_bytes());
    m.q = cut(0);
    const Work<Dot> w = {a, task, m, start + task.q0, a.context_lens[task.sequence] - count + task.q0, rows, steps,
                         {rows, (rows + max_rows<Dot> - 1) / max_rows<Dot>}};
    if (a.q.type == DType::bf16) pack_queries<Dot, bf16>(w);
    else pack_queries<Dot, float>(w);
    for (int64_t tile = task.tile0; tile < task.tile1; tile++) {
        Ahead next;
        const Ahead* ahead = next.find(w, tile) ? &next : nullptr;
        const Span see = rows_that_see(w, tile);
        for (int64_t t = 0; t < w.tiles.tiles; t++) {
            const int64_t begin = larger(see.begin, w.tiles.begin(t)), end = smaller(see.end, w.tiles.begin(t + 1));
            if (begin >= end) continue;
            attend_tile(w, tile, t, begin, int(end - begin), ahead);
            ahead = nullptr;
        }
    }
    if (task.partial >= 0) return;
    for (int r = 0; r < rows; r++) {
        const float* state = m.state + r * partial_row(a.layout);
        write_out(a, w.token0 + r / a.group, int64_t(task.head) * a.group + r % a.group, state[0], state[1], state + 16);
    }
}

}  // namespace
}  // namespace quire::QUIRE_ISA
