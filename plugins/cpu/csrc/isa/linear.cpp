// The inner loops of y = x W^T; linear.h describes the layouts.
#include "../linear.h"

#include "amx.h"
#include "dot.h"
#include "epilogue.h"
#include "tables.h"

namespace quire::QUIRE_ISA {
namespace {

constexpr int NV = group_rows / W;      // vectors of a group

// Vectors of a group whose sums stay in registers at a time for `rows` rows: all, or, where registers are few, a part.
constexpr int vectors_at_once(int rows) {
    int vectors = NV;
    while (REGISTERS == 16 && rows * vectors > sums_in_registers && vectors > 1) vectors /= 2;
    return vectors;
}
constexpr int64_t pass_steps = 64;  // 8 KB of weights: what the passes over a group's vectors find in the first cache

// acc[ROWS][VECTORS] of [ROWS][32] (+)= w * x over `steps` steps, meanwhile fetching `ahead` onwards at `ahead_step`
// bytes a step: LINES lines in each step or, with LINES 0, as many as are due for each 16 steps. Where to fetch next.
template <class Dot, int ROWS, int VECTORS, int LINES>
uintptr_t multiply_pass(const char* w, const char* x, int64_t steps, float* acc, bool first, uintptr_t ahead,
                        int ahead_step) {
    VF a[ROWS][VECTORS];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) a[r][j] = first ? zero() : load(acc + r * group_rows + j * W);
    for (int64_t block = 0; block < steps; block += step_block) {
        if (LINES == 0) {
            for (int i = 0; i < ahead_step * step_block; i += 64) prefetch_l2(ahead + uintptr_t(i));
            ahead += uintptr_t(ahead_step * step_block);
        }
#pragma GCC unroll 1  // unrolled, few rows spend their time on addresses to fetch
        for (int s = 0; s < step_block; s++) {
            if (LINES > 0) prefetch_l2(ahead);
            if (LINES > 1) prefetch_l2(ahead + 64);
            if (LINES > 0) ahead += uintptr_t(ahead_step);
            multiply_step<Dot, ROWS, VECTORS>(a, w, w + (VECTORS + 1) / 2 * W * 4, x, step_block * Dot::x_bytes);
            w += step_bytes;
            x += Dot::x_bytes;
        }
        x += (ROWS - 1) * step_block * Dot::x_bytes;
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) store(acc + r * group_rows + j * W, a[r][j]);
    return ahead;
}

// acc[ROWS][32] (+)= w * x over `steps` steps, meanwhile fetching `ahead` onwards at `ahead_step` bytes a step: evenly
// over the passes, since memory that waits for the next one is lost time. Where registers are few, a fetch in each step
// costs a third of the time: only a tile that streams through the weights alone has it.
template <class Dot, int ROWS>
void multiply(const char* w, const char* x, int64_t steps, float* acc, bool first, uintptr_t ahead, int ahead_step) {
    constexpr int VECTORS = vectors_at_once(ROWS), PASSES = NV / VECTORS, LINES = PASSES == 1 ? 2 : 1;
    const bool stream = REGISTERS == 32 || ahead_step == step_bytes;
    const int pass_step = (ahead_step + PASSES - 1) / PASSES;
    const int64_t once = PASSES == 1 ? steps : pass_steps;
    for (int64_t from = 0; from < steps; from += once) {
        const int64_t count = smaller(steps - from, once);
        const char *w_from = w + from * step_bytes, *x_from = x + from * ROWS * Dot::x_bytes;
#pragma GCC unroll 1
        for (int j = 0; j < NV; j += VECTORS) {
            const auto pass = stream ? multiply_pass<Dot, ROWS, VECTORS, LINES> : multiply_pass<Dot, ROWS, VECTORS, 0>;
            ahead = pass(w_from + j * W * 4, x_from, count, acc + j * W, first && from == 0, ahead, pass_step);
        }
    }
}

template <class Dot, int ROWS>
void multiply_rows(int rows, const char* w, const char* x, int64_t steps, float* acc, bool first, uintptr_t ahead,
                   int ahead_step) {
    if (rows == ROWS) return multiply<Dot, ROWS>(w, x, steps, acc, first, ahead, ahead_step);
    if constexpr (ROWS > 1) multiply_rows<Dot, ROWS - 1>(rows, w, x, steps, acc, first, ahead, ahead_step);
}

// Multiplies tiles of x with pieces of W.
template <class Dot>
struct Product {
    static constexpr int max_rows = REGISTERS == 16 ? sums_in_registers / 2 : rows_in_registers<Dot>(NV);

    // How many steps ahead of its use a single tile fetches both lines of a step (of one, some processors read half as fast).
    // Lines that come in two passes over the weights have to be asked for early.
    static constexpr int64_t ahead(int rows, bool near) { return near && vectors_at_once(rows) == NV ? 12 : 64; }

    QUIRE_MEMBER void operator()(int rows, const char* w, const char* x, int64_t steps, float* acc, bool first,
                                 uintptr_t ahead, int ahead_step) {
        multiply_rows<Dot, max_rows>(rows, w, x, steps, acc, first, ahead, ahead_step);
    }
};

#if defined(__AMX_BF16__)
// Pairs of bf16 by tiles: 16 pairs of 16 rows of x with 16 rows of W in one instruction. A sum is still one chain over K
// in order, whatever the other rows: 32 elements to an instruction, which rounds each pair's products and sum on their
// way, and takes denormals for zero.
struct DotTiles : DotBf16 {};

// x is read past what the nearest cache keeps for itself (a hint): W's panel is to stay there.
template <bool TWO>
QUIRE_INLINE void multiply_tiles(int rows, const char* w, const char* x, int64_t steps, float* acc, bool first,
                                 uintptr_t ahead, int ahead_step) {
    constexpr int acc_bytes = group_rows * 4, block_bytes = step_block * step_bytes;
    float* acc2 = acc + tile_rows * group_rows;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO) _tile_zero(3);
    } else {
        _tile_loadd(0, acc, acc_bytes);
        _tile_loadd(1, acc + tile_rows, acc_bytes);
        if (TWO) _tile_loadd(2, acc2, acc_bytes);
        if (TWO) _tile_loadd(3, acc2 + tile_rows, acc_bytes);
    }
    const int fetch = ahead_step * step_block;
    for (int64_t block = 0; block < steps; block += step_block) {
        for (int i = 0; i < fetch; i += 64) prefetch_l2(ahead + i);
        _tile_loadd(6, w, step_bytes);
        _tile_stream_loadd(4, x, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + step_bytes / 2, step_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_stream_loadd(5, x + tile_rows * tile_row_bytes, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        ahead += fetch;
        w += block_bytes;
        x += rows * tile_row_bytes;
    }
    _tile_stored(0, acc, acc_bytes);
    _tile_stored(1, acc + tile_rows, acc_bytes);
    if (TWO) _tile_stored(2, acc2, acc_bytes);
    if (TWO) _tile_stored(3, acc2 + tile_rows, acc_bytes);
}

// Tiles keep their shapes from call to call: setting them takes as long as four products.
template <>
struct Product<DotTiles> {
    static constexpr int max_rows = 2 * tile_rows;
    int configured = 0;

    // A tile of W reads every other line of 2 KB: its lines are asked for in order before that, not far ahead, so that
    // the hardware's prefetcher sees one stream.
    static constexpr int64_t ahead(int, bool) { return 12; }

    ~Product() { _tile_release(); }
    QUIRE_MEMBER void operator()(int rows, const char* w, const char* x, int64_t steps, float* acc, bool first,
                                 uintptr_t ahead, int ahead_step) {
        if (rows != configured) configure_product(configured = rows);
        if (rows > tile_rows) multiply_tiles<true>(rows, w, x, steps, acc, first, ahead, ahead_step);
        else multiply_tiles<false>(rows, w, x, steps, acc, first, ahead, ahead_step);
    }
};
using DotPairs = DotTiles;
#else
using DotPairs = DotBf16;
#endif

template <class Dot>
struct Task {
    const LinearArgs& a;
    int64_t group0, group1, tile0, tile1;  // groups of results, tiles of x
    float* scratch;                        // for each group of W, the sums of all tiles
    Product<Dot> product = {};

    // A gate's group of W, then the up group that goes with it.
    const int64_t halves = a.activation == Activation::none ? 1 : 2;
    const int64_t first_row = a.tiles.begin(tile0);

    QUIRE_MEMBER const char* weight(int64_t group, int64_t half) const {
        return a.weight + (group + half * a.groups()) * a.steps * step_bytes;
    }
    QUIRE_MEMBER float* sums(int64_t group, int64_t half) const {
        const int64_t rows = a.tiles.begin(tile1) - first_row;
        return scratch + ((group - group0) * halves + half) * rows * group_rows;
    }
    // One tile times steps `from` to `to` of a group of W.
    QUIRE_MEMBER void multiply(int64_t tile, const char* w, int64_t from, int64_t to, float* sums, const char* ahead,
                               int ahead_step) {
        const int64_t row = a.tiles.begin(tile);
        const int rows = a.tiles.size(tile);
        product(rows, w + from * step_bytes, a.x + (row * a.steps + from * rows) * Dot::x_bytes, to - from,
                sums + (row - first_row) * group_rows, from == 0, reinterpret_cast<uintptr_t>(ahead), ahead_step);
    }
    QUIRE_MEMBER void finish(int64_t group, int64_t tile) {
        const int64_t row = a.tiles.begin(tile), at = (row - first_row) * group_rows;
        epilogue(a, group, row, a.tiles.size(tile), sums(group, 0) + at, sums(group, halves - 1) + at);
    }

    // One tile streams through the weights, fetching a fixed distance ahead.
    QUIRE_MEMBER void stream() {
        // A whole number of blocks: a tile takes one at a time.
        const int64_t ahead = smaller(a.steps, Product<Dot>::ahead(a.tiles.size(tile0), a.near));
        const int64_t turn = (a.steps - ahead) / step_block * step_block;
        for (int64_t group = group0; group < group1; group++) {
            for (int64_t half = 0; half < halves; half++) {
                const char* w = weight(group, half);
                const char* next = half + 1 < halves ? weight(group, half + 1) : weight(group + 1, 0);
                if (turn) multiply(tile0, w, 0, turn, sums(group, half), w + ahead * step_bytes, step_bytes);
                multiply(tile0, w, turn, a.steps, sums(group, half), next, step_bytes);
            }
            finish(group, tile0);
        }
    }

    // Several tiles take a panel of weights in turns, and each fetches its share of the panel that comes next. The
    // panels of all groups at the same steps come one after the other, so that the part of x which they meet stays near.
    // All are about as long: a short one would end before the next has come.
    QUIRE_MEMBER void share() {
        const int64_t count = tile1 - tile0, blocks = a.steps / step_block;
        const int64_t panels = (a.steps + panel_steps - 1) / panel_steps, longest = (blocks + panels - 1) / panels;
        const int64_t bytes = longest * step_block * step_bytes / count;
        const int ahead_step = int((step_bytes + count - 1) / count);
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t from = blocks * panel / panels * step_block, to = blocks * (panel + 1) / panels * step_block;
            for (int64_t group = group0; group < group1; group++)
                for (int64_t half = 0; half < halves; half++) {
                    const char* next = half + 1 < halves    ? weight(group, half + 1) + from * step_bytes
                                       : group + 1 < group1 ? weight(group + 1, 0) + from * step_bytes
                                       : to < a.steps       ? weight(group0, 0) + to * step_bytes
                                                            : weight(group1, 0);
                    for (int64_t t = tile0; t < tile1; t++) {
                        multiply(t, weight(group, half), from, to, sums(group, half), next + (t - tile0) * bytes,
                                 ahead_step);
                        if (to == a.steps && half + 1 == halves) finish(group, t);
                    }
                }
        }
    }
};

template <class Dot>
void compute(const LinearArgs& a, int64_t group0, int64_t group1, int64_t tile0, int64_t tile1, float* scratch) {
    Task<Dot> task = {a, group0, group1, tile0, tile1, scratch};
    if (tile1 - tile0 == 1) task.stream();
    else task.share();
}

// A row of x as the dot product takes it: `steps` steps from element `k0`, zeros beyond k.
template <class Dot, class T>
void pack_block(const T* x, int64_t k0, int64_t k, char* out) {
    constexpr int count = step_block * Dot::per_step;
    auto* to = reinterpret_cast<typename Dot::X*>(out);
    if (k0 + count <= k && sizeof(T) == 2 && sizeof(*to) == 2) {
        memcpy(to, x + k0, count * 2);
        return;
    }
    for (int i = 0; i < count; i += W) {
        const int n = int(smaller<int64_t>(W, k - k0 - i));
        const VF v = n > 0 ? load_first(x + k0 + i, n) : zero();
        store(to + i, v);
    }
}

// Row by row, since the processor's own prefetchers follow one, not all at once; what they miss of the next is asked for.
template <class Dot, class T>
void pack_tile(const PackXArgs& a, int64_t tile) {
    constexpr int block_bytes = step_block * Dot::x_bytes;
    const int rows = a.tiles.size(tile);
    const int64_t row0 = a.tiles.begin(tile);
    for (int r = 0; r < rows; r++) {
        const T* x = static_cast<const T*>(a.x.data) + (row0 + r) * a.x.stride;
        char* out = a.packed + row0 * a.steps * Dot::x_bytes + r * block_bytes;
        for (int64_t s = 0; s < a.steps; s += step_block, out += rows * block_bytes) {
            prefetch_l1(reinterpret_cast<uintptr_t>(x + a.x.stride + s * Dot::per_step));
            pack_block<Dot>(x, s * Dot::per_step, a.k, out);
        }
    }
}

}  // namespace

void pack_x(const PackXArgs& a, int64_t tile) {
    const bool narrow = a.x.type == DType::bf16;
    if (a.weight == DType::f32) return narrow ? pack_tile<DotF32, bf16>(a, tile) : pack_tile<DotF32, float>(a, tile);
    return narrow ? pack_tile<DotPairs, bf16>(a, tile) : pack_tile<DotPairs, float>(a, tile);
}

void linear_groups(const LinearArgs& a, int64_t group0, int64_t group1, int64_t tile0, int64_t tile1, float* scratch) {
    if (a.type == DType::f32) return compute<DotF32>(a, group0, group1, tile0, tile1, scratch);
    compute<DotPairs>(a, group0, group1, tile0, tile1, scratch);
}

extern const LinearLimits linear_limits;
const LinearLimits linear_limits = {{Product<DotF32>::max_rows, Product<DotPairs>::max_rows},
                                    {DotF32::x_bytes, DotPairs::x_bytes}};

}  // namespace quire::QUIRE_ISA
