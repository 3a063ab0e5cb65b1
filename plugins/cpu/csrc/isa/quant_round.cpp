// Weights to integers with scales, one block of rows at a time; quant.h says how they are rounded. Every operation is written
// out, and none is fused: an instruction set changes how many are done at once, not one bit.
#include "../quant.h"

#include "tables.h"
#include "vec.h"

namespace quire::QUIRE_ISA {
namespace {

// `count` elements of a row from `column` on as floats, zeros up to `group`.
void load_floats(const Matrix& m, int64_t row, int64_t column, int64_t count, int group, float* out) {
    if (m.type == DType::f32) {
        memcpy(out, static_cast<const float*>(m.data) + row * m.stride + column, size_t(count) * 4);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + row * m.stride + column;
        for (int64_t c = 0; c < count; c++) out[c] = bf16_to_float(from[c]);
    }
    for (int64_t c = count; c < group; c++) out[c] = 0;
}

using Float4 = float __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));

QUIRE_INLINE Float4 load_four(const float* x) {
    Float4 four;
    memcpy(&four, x, 16);
    return four;
}

struct Rounding {
    float scale;
    double error;
    int8_t q[128 + W];
};

// x to integers when its largest magnitude, `extreme`, is to become `most`; a negative `most` keeps extreme's sign.
// `compare`: sum the squared errors, too.
void round_to(const float* x, int group, float extreme, float most, int middle, bool compare, Rounding& out) {
    const VF magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    const float scale = bf16_to_float(float_to_bf16(most < 0 ? extreme / most : (extreme < 0 ? -extreme : extreme) / most));
    const VF divisor = set1(scale != 0 ? scale : 1.0f), low = set1(float(-middle)), high = set1(float(middle - 1));
    float rounded[128];
    for (int c = 0; c < group; c += W) {
        const VF q = min(max((load(x + c) / divisor + magic) - magic, low), high);  // low for NaN
        store(rounded + c, q);
        store_s8(out.q + c, q);
    }
    out.scale = scale;
    if (!compare) return;
    Double4 errors = {};
    for (int c = 0; c < group; c += 4) {
        const Double4 error = __builtin_convertvector(load_four(rounded + c) * scale - load_four(x + c), Double4);
        errors += error * error;
    }
    out.error = (errors[0] + errors[1]) + (errors[2] + errors[3]);
}

Rounding round_group(const float* x, int group, int bits) {
    VF top = zero(), odd = zero();
    for (int c = 0; c < group; c += W) {
        top = max(abs(load(x + c)), top);  // passes over NaN
        odd = odd + load(x + c) * zero();
    }
    const float largest = reduce_max(top), not_finite = reduce_add(odd);
    int first = 0;
    while (first < group - 1 && x[first] != largest && x[first] != -largest) first++;
    const float extreme = largest > 0 ? x[first] : 0.0f;
    Rounding best, next;
    if (bits == 8) {
        round_to(x, group, extreme, 127.0f, 128, false, best);
    } else {
        round_to(x, group, extreme, -8.0f, 8, true, best);
        constexpr float others[] = {-8.7f, 7.0f, 7.7f};
        for (const float most : others) {
            round_to(x, group, extreme, most, 8, true, next);
            if (next.error < best.error) best = next;
        }
    }
    if (not_finite != 0) best.scale = __builtin_nanf("");
    return best;
}

}  // namespace

void quant_round(const QuantShape& s, const Matrix& w, int64_t block, char* out) {
    const int middle = 1 << (s.bits - 1);
    float x[128];
    for (int64_t g = 0; g < s.groups(); g++, out += s.group_bytes()) {
        memset(out, 0, size_t(s.group_bytes()));
        for (int i = 0; i < group_rows && block * group_rows + i < s.n; i++) {
            const int64_t column = g * s.group, bytes = dtype_bytes(w.type), row_at = (block * group_rows + i) * w.stride;
            // No processor's own prefetcher follows 32 rows.
            if (column + s.group < s.k) {
                const auto next = reinterpret_cast<uintptr_t>(w.data) + uintptr_t((row_at + column + s.group) * bytes);
                for (int64_t line = 0; line < s.group * bytes; line += 64) prefetch_l1(next + uintptr_t(line));
            }
            load_floats(w, block * group_rows + i, column, smaller<int64_t>(s.group, s.k - column), s.group, x);
            const Rounding rounded = round_group(x, s.group, s.bits);
            const uint16_t scale = float_to_bf16(rounded.scale);
            memcpy(out + i * 2, &scale, 2);
            char* data = out + s.header_bytes() + i * 4;
            for (int c = 0; c < s.group; c += 4, data += c % (32 / s.bits) ? 0 : step_bytes) {
                uint8_t four[4];
                for (int j = 0; j < 4; j++) four[j] = uint8_t(rounded.q[c + j] + middle);
                if (s.bits == 4 && c % 8)
                    for (int j = 0; j < 4; j++) four[j] = uint8_t(four[j] << 4 | uint8_t(data[j]));
                memcpy(data, four, 4);
            }
        }
    }
}

}  // namespace quire::QUIRE_ISA
