// The inner loops of y = x W^T with integer weights; quant.h describes the layouts.
#include "../quant.h"

#include "epilogue.h"
#include "tables.h"
#if defined(QUIRE_BYTES_IN_16_BITS)
#include "quant_bytes.h"
#endif

namespace quire::QUIRE_ISA {
namespace {

constexpr int NV = group_rows / W;
constexpr int x_step = columns_per_step * x_integer_bytes;  // bytes of a step of a row of x
// The integer sums, the operands of two steps (4 bits) and a broadcast have to fit in the registers.
constexpr int max_rows = REGISTERS == 32 ? (x_integer_bytes == 1 ? (32 - 2 * NV - 1) / NV : 10) : W == 8 ? 4 : 1;
constexpr int64_t panel_bytes = 32 << 10;  // of weights: what several tiles of x share before moving on
// How far ahead a single tile fetches every line, in bytes (trials.h).
constexpr int64_t near_ahead = 512, far_ahead = 8192;

// Bytes of a group of a tile of x.
QUIRE_INLINE int64_t x_group_bytes(const QuantShape& s, int rows) {
    return int64_t(rows) * (8 + s.group / columns_per_step * x_step);
}

#if !defined(QUIRE_BYTES_IN_16_BITS)
// One step of ROWS rows of x with 32 rows of W.
template <int ROWS>
QUIRE_INLINE void multiply_step(VRaw (&total)[ROWS][NV], const VRaw (&w)[NV], const char* x) {
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) total[r][j] = dot_bytes(total[r][j], w[j], x + r * x_step);
}

// `groups` groups of columns of 32 rows of W, for ROWS rows of x: acc[ROWS][32] (+)= ...
template <int ROWS, int BITS, bool ZEROS>
void multiply(const QuantShape& shape, const char* w, const char* x, int64_t groups, float* acc, bool first,
              uintptr_t ahead, int64_t ahead_step) {
    const int steps = shape.group / columns_per_step;
    for (int64_t g = 0; g < groups; g++, first = false) {
        const char *header = w, *x_header = x;
        w += shape.header_bytes();
        x += ROWS * 8;
        if (ahead_step == step_bytes) {  // a tile alone: without the line of scales, far fetches wait for each group's
            for (int64_t i = 0; i < shape.header_bytes(); i += 64) prefetch_l2(ahead + uintptr_t(i));
            ahead += uintptr_t(shape.header_bytes());
        }
        VRaw total[ROWS][NV];
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++) {
            int32_t offset;
            memcpy(&offset, x_header + (ROWS + r) * 4, 4);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) {
                total[r][j] = set1_raw(offset);
                if (ZEROS) total[r][j] = multiply_raw(total[r][j], load_raw(header + shape.scales_bytes() + j * W * 4));
                own_register(total[r][j]);
            }
        }
        int s = 0;
        do {
            prefetch_l2(ahead);
            prefetch_l2(ahead + 64);
            ahead += ahead_step;
            VRaw low[NV], high[NV];
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) {
                low[j] = high[j] = load_raw(w + j * W * 4);
                if (BITS == 4) {
                    high[j] = high_nibbles(low[j]);
                    low[j] = low_nibbles(low[j]);
                }
            }
            multiply_step<ROWS>(total, low, x);
            if (BITS == 4) multiply_step<ROWS>(total, high, x + ROWS * x_step);
            w += step_bytes;
            x += ROWS * x_step * (8 / BITS);
        } while ((s += 8 / BITS) < steps);
        // What follows is kept out of the loop's registers.
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) own_register(total[r][j]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            const VF scale = shape.scales == DType::bf16 ? load(reinterpret_cast<const bf16*>(header) + j * W)
                                                         : load(reinterpret_cast<const float*>(header) + j * W);
#pragma GCC unroll 32
            for (int r = 0; r < ROWS; r++) {
                float x_scale;
                memcpy(&x_scale, x_header + r * 4, 4);
                float* at = acc + r * group_rows + j * W;
                store(at, fma(to_float(total[r][j]), scale * set1(x_scale), first ? zero() : load(at)));
            }
        }
    }
}

#endif

template <int ROWS>
void multiply_rows(int rows, const QuantShape& shape, const char* w, const char* x, int64_t groups, float* acc,
                   bool first, uintptr_t ahead, int64_t ahead_step) {
    if (rows == ROWS) {
#if defined(QUIRE_BYTES_IN_16_BITS)
        const auto with = shape.bits == 8 ? shape.zeros ? multiply_bytes<ROWS, 8, true> : multiply_bytes<ROWS, 8, false>
                          : shape.zeros   ? multiply_bytes<ROWS, 4, true>
                                          : multiply_bytes<ROWS, 4, false>;
#else
        const auto with = shape.bits == 8 ? shape.zeros ? multiply<ROWS, 8, true> : multiply<ROWS, 8, false>
                          : shape.zeros   ? multiply<ROWS, 4, true>
                                          : multiply<ROWS, 4, false>;
#endif
        return with(shape, w, x, groups, acc, first, ahead, ahead_step);
    }
    if constexpr (ROWS > 1) multiply_rows<ROWS - 1>(rows, shape, w, x, groups, acc, first, ahead, ahead_step);
}

// The sums of one block of rows of W for some tiles of x, `done(tile)` as each is complete.
template <class F>
QUIRE_INLINE void sums_of(const QuantArgs& a, int64_t block, int64_t tile0, int64_t tile1, const char* after,
                          float* sums, F&& done) {
    const QuantShape& s = a.shape;
    const char* w = a.weight + block * s.block_bytes();
    const int64_t groups = s.groups(), count = tile1 - tile0, row0 = a.tiles.begin(tile0);
    // As in linear: one tile fetches a fixed distance ahead; several share a panel, and fetch the next one together. The
    // last groups of a block fetch the next one's first.
    const int64_t panels = (groups * s.group_bytes() + panel_bytes - 1) / panel_bytes;
    const int64_t panel = (groups + panels - 1) / panels;
    const int64_t last = smaller(groups, ((a.results.near ? near_ahead : far_ahead) + s.group_bytes() - 1) / s.group_bytes());
    const int64_t ahead = a.results.near ? near_ahead : last * s.group_bytes();
    const int64_t group_steps = s.group * s.bits / 32;  // of the inner loop, each of step_bytes
    const int64_t ahead_step = count > 1 ? (s.group_bytes() + group_steps * count - 1) / (group_steps * count) : step_bytes;
    for (int64_t g = 0, end; g < groups; g = end) {
        if (count > 1) end = smaller(groups, g + panel);
        else end = g < groups - last ? groups - last : groups;
        const char* next = end == groups ? after : w + (count > 1 ? end * s.group_bytes() : ahead);
        for (int64_t t = tile0; t < tile1; t++) {
            const int rows = a.tiles.size(t);
            const int64_t row = a.tiles.begin(t);
            const char* x = a.x + row * groups * x_group_bytes(s, 1) + g * x_group_bytes(s, rows);
            const uintptr_t fetch = reinterpret_cast<uintptr_t>(next) + (t - tile0) * (panel * s.group_bytes() / count);
            multiply_rows<max_rows>(rows, s, w + g * s.group_bytes(), x, end - g, sums + (row - row0) * group_rows,
                                    g == 0, fetch, ahead_step);
            if (end == groups) done(t);
        }
    }
}

// One row's group of columns from `column` on: integers, their sum, and the scale, which is NaN if anything was not
// finite. What is too small to be scaled counts as zero.
template <class T>
void quantize(const T* x, int64_t column, int64_t k, int group, int8_t* integers, float& scale, int32_t& sum) {
    float values[128];
    VF top = zero();
    for (int i = 0; i < group; i += W) {
        const int n = int(smaller<int64_t>(W, k - column - i));
        const VF v = n > 0 ? load_first(x + column + i, n) : zero();
        store(values + i, v);
        top = max(abs(v), top);
    }
    const float largest = reduce_max(top);
    const VF inverse = set1(largest > 1e-30f ? 127.0f / largest : 0.0f);
    VF total = zero();  // exact: integers below 2^24. What is not finite has become NaN here: it, or infinity times zero
    for (int i = 0; i < group; i += W) {
        const VF v = round(max(set1(-127.0f), min(set1(127.0f), load(values + i) * inverse)));
        store_s8(integers + i, v);
        total = total + v;
    }
    const float exact = reduce_add(total);
    scale = exact == exact ? largest / 127.0f : exact;
    sum = exact == exact ? int32_t(exact) : 0;
}

template <class T>
void pack_tile(const QuantXArgs& a, int64_t tile, int64_t group0, int64_t group1) {
    const QuantShape& s = a.shape;
    const int rows = a.tiles.size(tile);
    const int64_t row0 = a.tiles.begin(tile);
    char* out = a.packed + row0 * s.groups() * x_group_bytes(s, 1) + group0 * x_group_bytes(s, rows);
    for (int64_t g = group0; g < group1; g++, out += x_group_bytes(s, rows)) {
        for (int r = 0; r < rows; r++) {
            int8_t q[128 + W];
            float scale;
            int32_t sum;
            const T* x = static_cast<const T*>(a.x.data) + (row0 + r) * a.x.stride;
            quantize(x, g * s.group, s.k, s.group, q, scale, sum);
            const int32_t offset = s.zeros ? -sum : -sum * (1 << (s.bits - 1));
            memcpy(out + r * 4, &scale, 4);
            memcpy(out + rows * 4 + r * 4, &offset, 4);
            char* to = out + rows * 8 + r * x_step;
            for (int i = 0; i < s.group; i += columns_per_step, to += rows * x_step) {
                if (x_integer_bytes == 1) {
                    memcpy(to, q + i, 4);
                } else {
                    const int16_t wide[4] = {q[i], q[i + 2], q[i + 1], q[i + 3]};
                    memcpy(to, wide, 8);
                }
            }
        }
    }
}

}  // namespace

void quant_pack_x(const QuantXArgs& a, int64_t tile, int64_t group0, int64_t group1) {
    if (a.x.type == DType::bf16) pack_tile<bf16>(a, tile, group0, group1);
    else pack_tile<float>(a, tile, group0, group1);
}

void quant_block(const QuantArgs& a, int64_t block, int64_t tile0, int64_t tile1, float* scratch) {
    const int64_t row0 = a.tiles.begin(tile0), rows = a.tiles.begin(tile1) - row0, bytes = a.shape.block_bytes();
    float *sums = scratch, *ups = scratch + rows * group_rows;
    const char* next = a.weight + (block + 1) * bytes;
    const auto finish = [&](int64_t tile) {
        const int64_t row = a.tiles.begin(tile), at = (row - row0) * group_rows;
        epilogue(a.results, block, row, a.tiles.size(tile), sums + at, ups + at);
    };
    if (a.results.activation == Activation::none) return sums_of(a, block, tile0, tile1, next, sums, finish);
    const int64_t up = block + a.results.groups();
    sums_of(a, block, tile0, tile1, a.weight + up * bytes, sums, [](int64_t) {});
    sums_of(a, up, tile0, tile1, next, ups, finish);
}

extern const QuantLimits quant_limits;
const QuantLimits quant_limits = {max_rows, x_step};

}  // namespace quire::QUIRE_ISA
