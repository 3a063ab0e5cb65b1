// Integer weights where products of bytes are summed in 16 bits first (AVX2): the inner loop that quant.cpp's is for
// instruction sets which sum them in 32 bits at once. The same layouts, and exactly the same integers.
//
// vpmaddubsw multiplies unsigned bytes by signed ones and adds two neighbours in 16 bits. With 4 bits, w is at most 15 and
// |x| at most 127, so that 8 steps of 2 * 15 * 127 fit before they are widened; with 8 bits |w - 128| and x with the sign
// of w - 128 give at most 2 * 128 * 127, which fits once.
#pragma once

#include "../quant.h"

#include "vec.h"

namespace quire::QUIRE_ISA {
namespace {

constexpr int half_vectors = 2;       // half of a block's rows at a time: what the registers hold for 4 rows of x
constexpr int steps_in_16_bits = 8;  // of 4 bits

// Four bytes of x for all lanes, and sums, where they are written: else GCC 12 broadcasts for all rows first, and has too
// few registers left for the sums.
QUIRE_INLINE __m256i all_of(const char* x) {
    __m256i all;
    asm volatile("vpbroadcastd %1, %0" : "=x"(all) : "m"(*reinterpret_cast<const int32_t(*)>(x)));
    return all;
}
QUIRE_INLINE __m256i add_16(__m256i sum, __m256i x) {
    asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
QUIRE_INLINE __m256i add_32(__m256i sum, __m256i x) {
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}

// As multiply() in quant.cpp.
template <int ROWS, int BITS, bool ZEROS>
void multiply_bytes(const QuantShape& shape, const char* w, const char* x, int64_t groups, float* acc, bool first,
                    uintptr_t ahead, int64_t ahead_step) {
    constexpr int x_step = columns_per_step;  // bytes of a row of x
    constexpr int turn = BITS == 4 ? steps_in_16_bits / 2 : 1;  // steps of the weights' bytes between two widenings
    const int steps = shape.group * BITS / 32;
    const bool fetch_each = ahead_step >= step_bytes;  // a line in each step of each half, or a group's at once
    const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(char(-128));
    for (int64_t g = 0; g < groups; g++, first = false) {
        const char *header = w, *x_header = x;
        w += shape.header_bytes();
        x += ROWS * 8;
        const int64_t fetch_now = fetch_each ? shape.header_bytes() : ahead_step * steps;
        for (int64_t i = 0; i < fetch_now; i += 64) prefetch_l2(ahead + uintptr_t(i));
        ahead += uintptr_t(fetch_now);
#pragma GCC unroll 1
        for (int half = 0; half < group_rows / W; half += half_vectors) {
            __m256i total[ROWS][half_vectors];
#pragma GCC unroll 32
            for (int r = 0; r < ROWS; r++) {
                int32_t offset;
                memcpy(&offset, x_header + (ROWS + r) * 4, 4);
#pragma GCC unroll 2
                for (int j = 0; j < half_vectors; j++) {
                    total[r][j] = _mm256_set1_epi32(BITS == 4 || ZEROS ? offset : 0);
                    if (ZEROS) {
                        const VRaw zeros = load_raw(header + shape.scales_bytes() + (half + j) * W * 4);
                        const __m256i from_middle = _mm256_sub_epi32(zeros.v, _mm256_set1_epi32(BITS == 4 ? 0 : 128));
                        total[r][j] = _mm256_mullo_epi32(total[r][j], from_middle);
                    }
                }
            }
            const char *w_at = w + half * W * 4, *x_at = x;
#pragma GCC unroll 1
            for (int s = 0; s < steps; s += turn) {
                if (BITS == 4) {
                    __m256i sum[ROWS][half_vectors];
#pragma GCC unroll 4
                    for (int t = 0; t < turn; t++, w_at += step_bytes) {
                        if (fetch_each) prefetch_l2(ahead), ahead += 64;
#pragma GCC unroll 2
                        for (int part = 0; part < 2; part++, x_at += ROWS * x_step) {
                            __m256i some[half_vectors];
#pragma GCC unroll 2
                            for (int j = 0; j < half_vectors; j++) {
                                const __m256i both = load_raw(w_at + j * W * 4).v;
                                some[j] = _mm256_and_si256(part ? _mm256_srli_epi16(both, 4) : both, nibble);
                            }
#pragma GCC unroll 32
                            for (int r = 0; r < ROWS; r++) {
                                const __m256i x0 = all_of(x_at + r * x_step);
#pragma GCC unroll 2
                                for (int j = 0; j < half_vectors; j++) {
                                    const __m256i products = _mm256_maddubs_epi16(some[j], x0);
                                    sum[r][j] = t + part == 0 ? products : add_16(sum[r][j], products);
                                }
                            }
                        }
                    }
#pragma GCC unroll 32
                    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                        for (int j = 0; j < half_vectors; j++)
                            total[r][j] = add_32(total[r][j], _mm256_madd_epi16(sum[r][j], ones));
                } else {
                    if (fetch_each) prefetch_l2(ahead), ahead += 64;
                    __m256i sign[half_vectors], size[half_vectors];
#pragma GCC unroll 2
                    for (int j = 0; j < half_vectors; j++) {
                        sign[j] = _mm256_xor_si256(load_raw(w_at + j * W * 4).v, middle);
                        size[j] = _mm256_abs_epi8(sign[j]);
                    }
#pragma GCC unroll 32
                    for (int r = 0; r < ROWS; r++) {
                        const __m256i x0 = all_of(x_at + r * x_step);
#pragma GCC unroll 2
                        for (int j = 0; j < half_vectors; j++) {
                            const __m256i sum = _mm256_maddubs_epi16(size[j], _mm256_sign_epi8(x0, sign[j]));
                            total[r][j] = add_32(total[r][j], _mm256_madd_epi16(sum, ones));
                        }
                    }
                    w_at += step_bytes;
                    x_at += ROWS * x_step;
                }
            }
#pragma GCC unroll 2
            for (int j = half; j < half + half_vectors; j++) {
                const VF scale = shape.scales == DType::bf16 ? load(reinterpret_cast<const bf16*>(header) + j * W)
                                                             : load(reinterpret_cast<const float*>(header) + j * W);
#pragma GCC unroll 32
                for (int r = 0; r < ROWS; r++) {
                    float x_scale;
                    memcpy(&x_scale, x_header + r * 4, 4);
                    float* at = acc + r * group_rows + j * W;
                    const VF sum = to_float({total[r][j - half]});
                    store(at, fma(sum, scale * set1(x_scale), first ? zero() : load(at)));
                }
            }
        }
        w += shape.group_bytes() - shape.header_bytes();
        x += int64_t(ROWS) * shape.group / columns_per_step * x_step;
    }
}

}  // namespace
}  // namespace quire::QUIRE_ISA
