// One step of a dot product in W lanes: acc += w * x, where w is W neighbours of a packed operand (a 32-bit unit in
// each lane) and x one 32-bit unit, or its two halves as floats, for all lanes. Linear and attention consist of these.
#pragma once

#include "vec.h"

namespace quire::QUIRE_ISA {

// float32 operands: a step is one element.
struct DotF32 {
    static constexpr bool scaled = false;  // whether w has scales besides (of KV in 8 bits)
    static constexpr int per_step = 1;  // elements of the reduced dimension
    static constexpr int x_bytes = 4;
    static constexpr int operand_registers = 1;
    static constexpr int parts = 1;
    using X = float;
    struct Operand { VF w; };
    QUIRE_INLINE Operand load_operand(const char* p) { return {load(reinterpret_cast<const float*>(p))}; }
    template <int PART>
    QUIRE_INLINE VF part(const char* p) { return load(reinterpret_cast<const float*>(p)); }
    QUIRE_INLINE VF step(VF acc, Operand o, const char* x) {
        float value;
        memcpy(&value, x, 4);
        return fma(o.w, set1(value), acc);
    }
};

// Pairs of bf16 widened to float32, x widened when it was packed.
struct DotBf16Wide {
    static constexpr bool scaled = false;
    static constexpr int per_step = 2;
    static constexpr int x_bytes = 8;
    static constexpr int operand_registers = 2;
    static constexpr int parts = 2;
    using X = float;
    struct Operand { VF low, high; };
    template <int PART>
    QUIRE_INLINE VF part(const char* p) { return PART == 0 ? pair_low(load_raw(p)) : pair_high(load_raw(p)); }
    QUIRE_INLINE Operand load_operand(const char* p) {
        const VRaw raw = load_raw(p);
        return {pair_low(raw), pair_high(raw)};
    }
    QUIRE_INLINE VF step(VF acc, Operand o, const char* x) {
        float low, high;
        memcpy(&low, x, 4);
        memcpy(&high, x + 4, 4);
        return fma(o.high, set1(high), fma(o.low, set1(low), acc));
    }
};

#if defined(QUIRE_HAS_BF16_DOT)
// Pairs of bf16 by the instruction that multiplies and adds a pair.
struct DotBf16 {
    static constexpr bool scaled = false;
    static constexpr int per_step = 2;
    static constexpr int x_bytes = 4;
    static constexpr int operand_registers = 1;
    using X = bf16;
    struct Operand { VRaw w; };
    QUIRE_INLINE Operand load_operand(const char* p) { return {load_raw(p)}; }
    QUIRE_INLINE VF step(VF acc, Operand o, const char* x) { return dot_bf16(acc, o.w, x); }
};
#else
using DotBf16 = DotBf16Wide;
#endif

// Pairs of float16, as pairs of bf16.
struct DotF16 : DotBf16Wide {
    template <int PART>
    QUIRE_INLINE VF part(const char* p) { return PART == 0 ? half_low(load_raw(p)) : half_high(load_raw(p)); }
    QUIRE_INLINE Operand load_operand(const char* p) {
        const VRaw raw = load_raw(p);
        return {half_low(raw), half_high(raw)};
    }
};

// Four signed bytes widened to float32, x in float32.
struct DotS8 {
    static constexpr bool scaled = true;
    static constexpr int per_step = 4;
    static constexpr int x_bytes = 16;
    static constexpr int operand_registers = 4;
    static constexpr int parts = 4;
    using X = float;
    template <int PART>
    QUIRE_INLINE VF part(const char* p) { return signed_byte<PART>(load_raw(p)); }
    struct Operand { VF w[4]; };
    QUIRE_INLINE Operand load_operand(const char* p) {
        const VRaw raw = load_raw(p);
        return {{signed_byte<0>(raw), signed_byte<1>(raw), signed_byte<2>(raw), signed_byte<3>(raw)}};
    }
    QUIRE_INLINE VF step(VF acc, Operand o, const char* x) {
        float values[4];
        memcpy(values, x, 16);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc = fma(o.w[i], set1(values[i]), acc);
        return acc;
    }
};

// One element of each step: w's are widened one by one, and either they or x stay in registers for as long as the other
// goes by.
template <class Dot, int PART, int ROWS, int VECTORS>
QUIRE_INLINE void multiply_part(VF (&acc)[ROWS][VECTORS], const char* w, const char* w2, const char* x, int x_stride) {
    constexpr int half = (VECTORS + 1) / 2;
    const auto w_at = [&](int j) { return Dot::template part<PART>(j < half ? w + j * W * 4 : w2 + (j - half) * W * 4); };
    const auto x_at = [&](int r) { return broadcast(x + r * x_stride + PART * 4); };
    if constexpr (ROWS < VECTORS) {
        VF kept[ROWS];
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++) kept[r] = x_at(r);
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            const VF wide = w_at(j);
#pragma GCC unroll 32
            for (int r = 0; r < ROWS; r++) acc[r][j] = add_product(acc[r][j], wide, kept[r]);
        }
    } else {
        VF kept[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) kept[j] = w_at(j);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++) {
            const VF value = x_at(r);
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) acc[r][j] = add_product(acc[r][j], kept[j], value);
        }
    }
    if constexpr (PART + 1 < Dot::parts) multiply_part<Dot, PART + 1>(acc, w, w2, x, x_stride);
}

// One step of ROWS rows of x, `x_stride` bytes apart, with VECTORS vectors of w: one half of them from `w`, the other
// from `w2`, each side by side.
template <class Dot, int ROWS, int VECTORS>
QUIRE_INLINE void multiply_step(VF (&acc)[ROWS][VECTORS], const char* w, const char* w2, const char* x, int x_stride) {
    if constexpr (REGISTERS == 32) {
        constexpr int half = (VECTORS + 1) / 2;
        typename Dot::Operand operand[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++)
            operand[j] = Dot::load_operand(j < half ? w + j * W * 4 : w2 + (j - half) * W * 4);
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) acc[r][j] = Dot::step(acc[r][j], operand[j], x + r * x_stride);
    } else {
        multiply_part<Dot, 0>(acc, w, w2, x, x_stride);
    }
}

constexpr int sums_in_registers = 12;  // vectors of sums that stay in registers where there are 16: the rest are operands

// Rows of x whose accumulators over `vectors` vectors stay in 32 registers, with all operands of w.
template <class Dot>
constexpr int rows_in_registers(int vectors) {
    const int rows = (32 - vectors * Dot::operand_registers - 1) / vectors;
    return rows < 1 ? 1 : rows > 14 ? 14 : rows;
}

}  // namespace quire::QUIRE_ISA
