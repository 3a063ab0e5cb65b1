// Weights to integers with scales, one block of rows at a time; quant.h says how they are rounded. Every operation is written
// out, and none is fused: an instruction set changes how many are done at once, not one bit.
#include "../quant.h"

#include "tables.h"
#include "vec.h"

namespace quire::QUIRE_ISA {
namespace {

// `count` elements of a row from `column` on as floats, zeros up to `group`.
template <class T>
QUIRE_INLINE void load_floats(const T* from, int64_t count, int group, float* out) {
    for (int c = 0; c < group; c += W) {
        const int n = int(smaller<int64_t>(W, count - c));
        store(out + c, n > 0 ? load_first(from + c, n) : zero());
    }
}

using Float8 = float __attribute__((vector_size(32)));
using Double8 = double __attribute__((vector_size(64)));

QUIRE_INLINE Float8 load_eight(const float* x) {
    Float8 eight;
    memcpy(&eight, x, 32);
    return eight;
}

constexpr int most_scales = 4;  // that are tried

struct Rounding {
    float scale[most_scales];
    int8_t q[most_scales][128 + W];
};

// x to integers by each of COUNT scales; which of them is kept. The scales take turns: each waits for its own last sum.
template <int COUNT>
QUIRE_INLINE int round_by(const float* x, int group, int middle, Rounding& out) {
    const VF magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    const VF low = set1(float(-middle)), high = set1(float(middle - 1));
    float rounded[COUNT][128];
    VF divisor[COUNT];
    for (int k = 0; k < COUNT; k++) divisor[k] = set1(out.scale[k] != 0 ? out.scale[k] : 1.0f);
    for (int c = 0; c < group; c += W)
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            const VF q = min(max((load(x + c) / divisor[k] + magic) - magic, low), high);  // low for NaN
            store(rounded[k] + c, q);
            store_s8(out.q[k] + c, q);
        }
    if (COUNT == 1) return 0;
    Double8 errors[COUNT] = {};
    for (int c = 0; c < group; c += 8) {
        const Float8 exact = load_eight(x + c);
#pragma GCC unroll 4
        for (int k = 0; k < COUNT; k++) {
            const Double8 error = __builtin_convertvector(load_eight(rounded[k] + c) * out.scale[k] - exact, Double8);
            errors[k] += error * error;
        }
    }
    int best = 0;
    double least = 0;
    for (int k = 0; k < COUNT; k++) {
        const Double8& e = errors[k];
        const double sum = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
        if (k == 0 || sum < least) best = k, least = sum;
    }
    return best;
}

// Integers of one row and group, and their scale. Which of `out` holds them.
int round_group(const float* x, int group, int bits, Rounding& out) {
    VF top = zero(), bottom = zero(), odd = zero();
    for (int c = 0; c < group; c += W) {
        const VF v = load(x + c);
        top = max(v, top);  // passes over NaN
        bottom = max(zero() - v, bottom);
        odd = odd + v * zero();
    }
    const float highest = reduce_max(top), lowest = reduce_max(bottom), largest = highest > lowest ? highest : lowest;
    bool negative = largest > 0 && lowest == largest;  // the first of the largest magnitudes
    if (highest == lowest && largest > 0) {
        int first = 0;
        while (x[first] != largest && x[first] != -largest) first++;
        negative = x[first] < 0;
    }
    const auto rounded_scale = [](float scale) { return bf16_to_float(float_to_bf16(scale)); };
    int best = 0;
    if (bits == 8) {
        out.scale[0] = rounded_scale(largest / 127.0f);
        best = round_by<1>(x, group, 128, out);
    } else {
        // A negative one keeps the extreme's sign.
        const float extreme = negative ? -largest : largest;
        constexpr float steps[most_scales] = {-8.0f, -8.7f, 7.0f, 7.7f};
        for (int k = 0; k < most_scales; k++)
            out.scale[k] = rounded_scale(steps[k] < 0 ? extreme / steps[k] : largest / steps[k]);
        best = round_by<most_scales>(x, group, 8, out);
    }
    if (reduce_add(odd) != 0) out.scale[best] = __builtin_nanf("");
    return best;
}

}  // namespace

void quant_round(const QuantShape& s, const Matrix& w, int64_t block, char* out) {
    const int64_t rows = smaller<int64_t>(group_rows, s.n - block * group_rows), bytes = dtype_bytes(w.type);
    float x[128];
    Rounding rounded;
    for (int64_t g = 0; g < s.groups(); g++, out += s.group_bytes()) {
        if (rows < group_rows) memset(out, 0, size_t(s.group_bytes()));
        const int64_t column = g * s.group, count = smaller<int64_t>(s.group, s.k - column);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = (block * group_rows + i) * w.stride + column;
            // No processor's own prefetcher follows 32 rows.
            if (column + s.group < s.k) {
                const auto next = reinterpret_cast<uintptr_t>(w.data) + uintptr_t((at + s.group) * bytes);
                for (int64_t line = 0; line < s.group * bytes; line += 64) prefetch_l1(next + uintptr_t(line));
            }
            if (w.type == DType::f32) load_floats(static_cast<const float*>(w.data) + at, count, s.group, x);
            else load_floats(static_cast<const bf16*>(w.data) + at, count, s.group, x);
            const int best = round_group(x, s.group, s.bits, rounded);
            const uint16_t scale = float_to_bf16(rounded.scale[best]);
            memcpy(out + i * 2, &scale, 2);
            const int8_t* q = rounded.q[best];
            char* data = out + s.header_bytes() + i * 4;
            // Four integers at a time, from the middle of their range on.
            const auto four = [&](int c) {
                uint32_t all;
                memcpy(&all, q + c, 4);
                return s.bits == 8 ? all ^ 0x80808080u : (all & 0x0f0f0f0fu) ^ 0x08080808u;
            };
            for (int c = 0; c < s.group; c += 32 / s.bits, data += step_bytes) {
                const uint32_t all = s.bits == 8 ? four(c) : four(c) | four(c + 4) << 4;
                memcpy(data, &all, 4);
            }
        }
    }
}

}  // namespace quire::QUIRE_ISA
