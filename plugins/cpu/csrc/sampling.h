// One token per row of logits, and log-probabilities, as the contract's reference defines them: a token's weight is
// exp((logit - largest) / temperature) as a whole multiple of 2^-34, so that sums in double are exact in any order. The
// bits of a result then depend neither on the other rows nor on how rows are shared among threads.
//
// No sort of the vocabulary. The largest logit of every 64 is kept; the k-th of those is a bound that at least k logits
// reach, and few more: top-k, and top-p nearly always, are settled among the logits that reach it.
//
// Bytes and operations: a row of V logits is read once for the maxima (4 V bytes) and, unless top-k bounds what is
// kept, once more for an exponential and an addition each; both passes are shared among the threads.
#pragma once

#include "types.h"

namespace quire {

constexpr int peak_block = 64;
constexpr float weight_one = 17179869184.0f;  // 2^34: the weight of the likeliest token

struct SampleArgs {
    Matrix logits;  // float32
    int64_t columns;
    const float* temperature;  // 0: the largest logit, the lowest id among equals
    const int32_t* top_k;      // 0 or columns and above: off
    const float *top_p, *min_p;
    const double* uniform;
    int64_t* out;  // -1: the largest logit is not finite, or there is a NaN
};

struct LogprobArgs {
    Matrix logits;  // float32
    int64_t columns;
    const int64_t* chosen;
    int64_t count;  // of the likeliest, at most columns
    int64_t* ids;   // [rows, 1 + count]: chosen is first, then the likeliest, the lower id first among equals
    float* values;  // [rows, 1 + count]
    int64_t* ranks; // of the chosen: 1 + how many logits are larger
};

void sample(const SampleArgs& args, int64_t rows);
void logprobs(const LogprobArgs& args, int64_t rows);

}  // namespace quire
