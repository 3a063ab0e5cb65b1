// The passes over a whole row of logits; sampling.h says what they are for.
#include "../sampling.h"

#include "tables.h"
#include "vmath.h"

namespace quire::QUIRE_ISA {
namespace {

// To whole numbers. From 2^23 on every float is one, and below that adding 2^23 rounds.
QUIRE_INLINE VF whole(VF a) {
    const VF magic = set1(8388608.0f);
    return select_lt(a, magic, (a + magic) - magic, a);
}

QUIRE_INLINE VF weight_of(VF x, VF best, VF temperature, VF least) {
    const VF w = whole(exp((x - best) / temperature) * set1(weight_one));
    return select_lt(w, least, zero(), w);
}

}  // namespace

// The largest of every 64; infinite where a NaN is among them.
void logit_peaks(const float* x, int64_t columns, float* peaks) {
    const VF infinity = set1(__builtin_inff()), low = zero() - infinity;
    for (int64_t c = 0; c < columns; c += peak_block, peaks++) {
        VF top = low, odd = zero();
        for (int64_t i = c; i < c + peak_block && i < columns; i += W) {
            VF v = load_first(x + i, int(smaller<int64_t>(W, columns - i)));
            if (i + W > columns) v = keep(v, 0, int(columns - i), low);
            odd = odd + (v - v) * zero();  // NaN for what is not finite ...
            top = max(v, top);
        }
        *peaks = reduce_max(top);
        if (reduce_add(odd) == 0) continue;
        for (int64_t i = c; i < c + peak_block && i < columns; i++)  // ... of which minus infinity is a masked token
            if (!(x[i] < __builtin_inff())) *peaks = __builtin_inff();
    }
}

// Weights of n logits; those below `least` become 0.
void logit_weights(const float* x, int64_t n, float best, float temperature, float least, float* weights) {
    const VF b = set1(best), t = set1(temperature), l = set1(least);
    for (int64_t i = 0; i < n; i += W) {
        const int some = int(smaller<int64_t>(W, n - i));
        store_first(weights + i, weight_of(load_first(x + i, some), b, t, l), some);
    }
}

// The sum of the weights of every 64 logits.
void weight_sums(const float* x, int64_t columns, float best, float temperature, float least, double* sums) {
    for (int64_t c = 0; c < columns; c += peak_block, sums++) {
        const int n = int(smaller<int64_t>(peak_block, columns - c));
        float w[peak_block] = {};
        logit_weights(x + c, n, best, temperature, least, w);
        double lanes[8] = {};
        for (int i = 0; i < peak_block; i += 8)
            for (int j = 0; j < 8; j++) lanes[j] += double(w[i + j]);
        double sum = 0;
        for (int j = 0; j < 8; j++) sum += lanes[j];
        *sums = sum;
    }
}

}  // namespace quire::QUIRE_ISA
