// One vector of floats on each instruction set: VF with W lanes and the operations the kernels need.
//
// A kernel source is compiled once for each instruction set with QUIRE_ISA naming the namespace, so that the same
// source yields several functions side by side in one library. Kernels include nothing of the standard library that
// defines functions: the linker keeps one copy of those, possibly the one compiled for the newest machine.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(QUIRE_ISA)
#error "compile kernel sources with -DQUIRE_ISA=<portable|avx2|avx512|avx512_bf16|amx>"
#endif

#define QUIRE_INLINE static inline __attribute__((always_inline))
#define QUIRE_MEMBER inline __attribute__((always_inline))

namespace quire::QUIRE_ISA {
struct half { uint16_t bits; };  // float16
}

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace quire::QUIRE_ISA {

using bf16 = uint16_t;

template <class T>
QUIRE_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T>
QUIRE_INLINE T larger(T a, T b) { return a > b ? a : b; }

QUIRE_INLINE float bf16_to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
QUIRE_INLINE bf16 float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// The hint names the level to bring the line to: memory streams go to L2, so that L1 keeps what is reused.
QUIRE_INLINE void prefetch_l1(uintptr_t p) { __builtin_prefetch(reinterpret_cast<const void*>(p), 0, 3); }
QUIRE_INLINE void prefetch_l2(uintptr_t p) { __builtin_prefetch(reinterpret_cast<const void*>(p), 0, 2); }

// Loads and stores of the first n lanes (n >= 1; n >= W means all), and of either element type.
QUIRE_INLINE VF load_first(const float* p, int n) {
    if (n >= W) return load(p);
    float t[W] = {};
    for (int i = 0; i < n; i++) t[i] = p[i];
    return load(t);
}
QUIRE_INLINE VF load_first(const bf16* p, int n) {
    if (n >= W) return load(p);
    bf16 t[W] = {};
    for (int i = 0; i < n; i++) t[i] = p[i];
    return load(t);
}
QUIRE_INLINE void store_first(float* p, VF v, int n) {
    if (n >= W) return store(p, v);
    float t[W];
    store(t, v);
    for (int i = 0; i < n; i++) p[i] = t[i];
}
QUIRE_INLINE void store_first(bf16* p, VF v, int n) {
    if (n >= W) return store(p, v);
    bf16 t[W];
    store(t, v);
    for (int i = 0; i < n; i++) p[i] = t[i];
}

}  // namespace quire::QUIRE_ISA
