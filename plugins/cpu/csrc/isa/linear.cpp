// The inner loops of y = x W^T; linear.h describes the layouts.
#include "../linear.h"

#include "amx.h"
#include "dot.h"
#include "epilogue.h"
#include "tables.h"

namespace quire::QUIRE_ISA {
namespace {

constexpr int NV = group_rows / W;      // vectors of a group
constexpr int panel_steps = 256;        // 32 KB of weights: what several tiles of x share before moving on

// How far ahead of its use a single tile fetches a line. With few rows the hardware's prefetchers keep up by
// themselves, and fetching more than they do only delays them; with more, a step takes so long that they fall behind.
constexpr int few_rows = 6;
constexpr int steps_ahead_of_few = 16, steps_ahead_of_many = 64;

template <class Dot>
constexpr int max_rows = rows_in_registers<Dot>(NV);

// acc[ROWS][32] (+)= w * x over `steps` steps, meanwhile fetching `ahead` onwards at `ahead_step` bytes a step.
template <class Dot, int ROWS>
void multiply(const char* w, const char* x, int64_t steps, float* acc, bool first, uintptr_t ahead, int ahead_step) {
    VF a[ROWS][NV];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) a[r][j] = first ? zero() : load(acc + r * group_rows + j * W);
    for (int64_t block = 0; block < steps; block += step_block) {
        for (int s = 0; s < step_block; s++) {
            prefetch_l2(ahead);
            if (ROWS > few_rows) prefetch_l2(ahead + 64);
            ahead += ahead_step;
            multiply_step<Dot, ROWS, NV>(a, w, w + step_bytes / 2, x, step_block * Dot::x_bytes);
            w += step_bytes;
            x += Dot::x_bytes;
        }
        x += (ROWS - 1) * step_block * Dot::x_bytes;
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) store(acc + r * group_rows + j * W, a[r][j]);
}

template <class Dot, int ROWS>
void multiply_rows(int rows, const char* w, const char* x, int64_t steps, float* acc, bool first, uintptr_t ahead,
                   int ahead_step) {
    if (rows == ROWS) return multiply<Dot, ROWS>(w, x, steps, acc, first, ahead, ahead_step);
    if constexpr (ROWS > 1) multiply_rows<Dot, ROWS - 1>(rows, w, x, steps, acc, first, ahead, ahead_step);
}

#if defined(__AMX_BF16__)
// Pairs of bf16 by tiles: 16 pairs of 16 rows of x with 16 rows of W in one instruction. A sum is still one chain over K
// in order, whatever the other rows: 32 elements to an instruction, which rounds each pair's products and sum on their
// way, and takes denormals for zero.
struct DotTiles : DotBf16 {};
template <>
constexpr int max_rows<DotTiles> = 2 * tile_rows;

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
    for (int64_t block = 0; block < steps; block += step_block) {
        _tile_loadd(6, w, step_bytes);
        _tile_loadd(4, x, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + step_bytes / 2, step_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, x + tile_rows * tile_row_bytes, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int i = 0; i < ahead_step * step_block; i += 64) prefetch_l2(ahead + i);
        ahead += ahead_step * step_block;
        w += block_bytes;
        x += rows * tile_row_bytes;
    }
    _tile_stored(0, acc, acc_bytes);
    _tile_stored(1, acc + tile_rows, acc_bytes);
    if (TWO) _tile_stored(2, acc2, acc_bytes);
    if (TWO) _tile_stored(3, acc2 + tile_rows, acc_bytes);
}

template <>
void multiply_rows<DotTiles, max_rows<DotTiles>>(int rows, const char* w, const char* x, int64_t steps, float* acc,
                                                 bool first, uintptr_t ahead, int ahead_step) {
    configure_product(rows);
    if (rows > tile_rows) multiply_tiles<true>(rows, w, x, steps, acc, first, ahead, ahead_step);
    else multiply_tiles<false>(rows, w, x, steps, acc, first, ahead, ahead_step);
    _tile_release();
}
using DotPairs = DotTiles;
#else
using DotPairs = DotBf16;
#endif

// The sums of one group of rows of W for some tiles of x, `done(tile)` as each is complete. `after`: what is read next.
template <class Dot, class F>
QUIRE_INLINE void sums_of(const LinearArgs& a, int64_t group, int64_t tile0, int64_t tile1, const char* after,
                          float* sums, F&& done) {
    const char* w = a.weight + group * a.steps * step_bytes;
    const int64_t row_bytes = a.steps * Dot::x_bytes, row0 = a.tiles.begin(tile0), count = tile1 - tile0;
    // One tile streams through the weights, fetching a fixed distance ahead. Several tiles take a panel in turns, and
    // each fetches its share of the panel that comes next.
    const int64_t far = a.tiles.size(tile0) > few_rows ? steps_ahead_of_many : steps_ahead_of_few;
    const int64_t ahead = smaller(a.steps, far), share = panel_steps * step_bytes / count;
    const int ahead_step = int((step_bytes + count - 1) / count);
    for (int64_t p = 0, end; p < a.steps; p = end) {
        if (count > 1) end = smaller(a.steps, p + panel_steps);
        else end = p < a.steps - ahead ? a.steps - ahead : a.steps;
        const char* next = end == a.steps ? after : w + (count > 1 ? end : p + ahead) * step_bytes;
        for (int64_t t = tile0; t < tile1; t++) {
            const int rows = a.tiles.size(t);
            const int64_t row = a.tiles.begin(t);
            const uintptr_t fetch = reinterpret_cast<uintptr_t>(next) + (t - tile0) * share;
            multiply_rows<Dot, max_rows<Dot>>(rows, w + p * step_bytes, a.x + row * row_bytes + p * rows * Dot::x_bytes,
                                              end - p, sums + (row - row0) * group_rows, p == 0, fetch, ahead_step);
            if (end == a.steps) done(t);
        }
    }
}

template <class Dot>
void group_of(const LinearArgs& a, int64_t group, int64_t tile0, int64_t tile1, float* scratch) {
    const int64_t row0 = a.tiles.begin(tile0), rows = a.tiles.begin(tile1) - row0;
    const bool paired = a.activation != Activation::none;
    const char* next = a.weight + (group + 1) * a.steps * step_bytes;
    float *sums = scratch, *ups = scratch + rows * group_rows;
    const auto finish = [&](int64_t tile) {
        const int64_t row = a.tiles.begin(tile), at = (row - row0) * group_rows;
        epilogue(a, group, row, a.tiles.size(tile), sums + at, ups + at);
    };
    if (!paired) return sums_of<Dot>(a, group, tile0, tile1, next, sums, finish);
    const int64_t up_group = group + a.groups();
    const char* up = a.weight + up_group * a.steps * step_bytes;
    sums_of<Dot>(a, group, tile0, tile1, up, sums, [](int64_t) {});
    sums_of<Dot>(a, up_group, tile0, tile1, next, ups, finish);
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

template <class Dot, class T>
void pack_tile(const PackXArgs& a, int64_t tile) {
    const int rows = a.tiles.size(tile);
    const int64_t row0 = a.tiles.begin(tile);
    char* out = a.packed + row0 * a.steps * Dot::x_bytes;
    for (int64_t s = 0; s < a.steps; s += step_block)
        for (int r = 0; r < rows; r++, out += step_block * Dot::x_bytes)
            pack_block<Dot>(static_cast<const T*>(a.x.data) + (row0 + r) * a.x.stride, s * Dot::per_step, a.k, out);
}

}  // namespace

void pack_x(const PackXArgs& a, int64_t tile) {
    const bool narrow = a.x.type == DType::bf16;
    if (a.weight == DType::f32) return narrow ? pack_tile<DotF32, bf16>(a, tile) : pack_tile<DotF32, float>(a, tile);
    return narrow ? pack_tile<DotPairs, bf16>(a, tile) : pack_tile<DotPairs, float>(a, tile);
}

void linear_group(const LinearArgs& a, int64_t group, int64_t tile0, int64_t tile1, float* scratch) {
    if (a.type == DType::f32) return group_of<DotF32>(a, group, tile0, tile1, scratch);
    group_of<DotPairs>(a, group, tile0, tile1, scratch);
}

extern const LinearLimits linear_limits;
const LinearLimits linear_limits = {{max_rows<DotF32>, max_rows<DotPairs>}, {DotF32::x_bytes, DotPairs::x_bytes}};

}  // namespace quire::QUIRE_ISA
