// Elementary functions on a VF. The polynomials are least-squares fits at Chebyshev nodes, made for this file.
#pragma once

#include "../types.h"
#include "vec.h"

namespace quire::QUIRE_ISA {

constexpr float log2_e = 1.44269504f;

// Within 2 units in the last place; 0 below -87.3, where float32 turns denormal; the value at 88 above 88; NaN is kept.
QUIRE_INLINE VF exp(VF x) {
    // The operands' order matters: min and max return the second one for NaN.
    const VF c = max(set1(-87.33f), min(set1(88.0f), x));
    const VF n = round(c * set1(log2_e));
    // ln 2 in two pieces, the first with so few bits that n times it is exact.
    const VF r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), c));
    VF q = fma(r, set1(0.0013933734f), set1(0.008363236f));
    q = fma(q, r, set1(0.041666463f));
    q = fma(q, r, set1(0.16666576f));
    q = fma(q, r, set1(0.5f));
    const VF p = fma(q, r * r, r) + set1(1.0f);
    return select_lt(x, set1(-87.33f), zero(), scale_by_power(p, n));
}

// 2^x for x <= 0, within 2 units in the last place; 0 below -126, where float32 turns denormal; NaN is kept.
QUIRE_INLINE VF power_of_two(VF x) {
    const VF c = max(set1(-126.0f), x), n = round(c), r = c - n;
    VF q = fma(r, set1(0.00132186722f), set1(0.00967169832f));
    q = fma(q, r, set1(0.0555089302f));
    q = fma(q, r, set1(0.24022238f));
    q = fma(q, r, set1(0.693146884f));
    return select_lt(x, set1(-126.0f), zero(), scale_by_power(fma(q, r, set1(1.0f)), n));
}

QUIRE_INLINE VF tanh(VF x) {
    const VF a = abs(x), u = x * x;
    VF q = fma(u, set1(0.0023735156f), set1(-0.008412554f));
    q = fma(q, u, set1(0.021789107f));
    q = fma(q, u, set1(-0.053961653f));
    q = fma(q, u, set1(0.13333313f));
    q = fma(q, u, set1(-0.33333334f));
    const VF small = fma(q * u, x, x);
    const VF e = exp(a * set1(-2.0f));
    const VF large = copysign((set1(1.0f) - e) / (set1(1.0f) + e), x);
    return select_lt(a, set1(0.6f), small, large);
}

QUIRE_INLINE VF erf(VF x) {
    const VF a = min(set1(9.0f), abs(x)), u = a * a;
    VF s = fma(u, set1(-9.67359e-06f), set1(0.00011268254f));
    s = fma(s, u, set1(-0.00084843964f));
    s = fma(s, u, set1(0.0052210535f));
    s = fma(s, u, set1(-0.026865438f));
    s = fma(s, u, set1(0.11283783f));
    s = fma(s, u, set1(-0.37612638f));
    s = fma(s, u, set1(1.1283792f)) * a;
    // erfc(a) exp(a^2) / t is smooth in t = 1 / (1 + a / 2).
    const VF t = set1(1.0f) / fma(a, set1(0.5f), set1(1.0f));
    VF q = fma(t, set1(0.091378786f), set1(-0.2199304f));
    q = fma(q, t, set1(0.07454333f));
    q = fma(q, t, set1(0.06634196f));
    q = fma(q, t, set1(0.17668854f));
    q = fma(q, t, set1(0.24743907f));
    q = fma(q, t, set1(0.28198174f));
    q = fma(q, t, set1(0.2821013f));
    const VF l = set1(1.0f) - q * t * exp(zero() - u);
    return copysign(select_lt(a, set1(1.0f), s, l), x);
}

QUIRE_INLINE VF silu(VF x) { return x / (set1(1.0f) + exp(zero() - x)); }
QUIRE_INLINE VF gelu(VF x) { return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.70710678f))); }
QUIRE_INLINE VF gelu_tanh(VF x) {
    // (1 + tanh(y)) / 2 is the logistic function of 2 y, which loses nothing where tanh is near -1.
    const VF twice = set1(1.59576912f) * fma(set1(0.044715f) * x * x, x, x);
    return x / (set1(1.0f) + exp(zero() - twice));
}

QUIRE_INLINE VF activate(Activation kind, VF x) {
    switch (kind) {
        case Activation::silu: return silu(x);
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        default: return x;
    }
}

}  // namespace quire::QUIRE_ISA
