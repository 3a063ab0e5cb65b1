// What happens between the products: norms, rotary embedding with storing of keys and values, gated activations, and the
// largest logit. Each row is one thread's, with sums over its columns in a fixed order.
#pragma once

#include "attention.h"
#include "types.h"

namespace quire {

// out = norm(s) * (weight + offset) + bias with s = x + residual, rounded to x's type. RMS norm unless `centred`.
struct NormArgs {
    Matrix x, residual, sum, out;  // residual.data null: none, and then sum is not written
    const void* weight;
    DType weight_type;
    const void* bias;  // of weight's type, or null
    int64_t columns;
    float eps, offset;
    bool centred;
};

// Rows [q heads | k heads | v heads] of head_dim each. Queries stay, normed and rotated; keys (also) and values go to
// their slots.
struct QkvArgs {
    WriteKVArgs kv;  // k and v are filled in by the kernel
    Matrix qkv;
    int heads;
    const void *q_norm, *k_norm;  // weights [head_dim], or null
    DType norm_type;
    float eps, offset;
    const int64_t* positions;
    const float* cos_sin;  // [positions, rotary_dim]: cosines, then sines; null: no rotary embedding
    int64_t cos_sin_stride, cos_sin_rows;
    int rotary_dim;
    bool interleaved;  // channels 2 i and 2 i + 1 turn together instead of i and i + rotary_dim / 2
};

struct GatedArgs {
    Matrix x, out;
    int64_t width;  // of out
    Activation activation;
};

void norm(const NormArgs& args, int64_t rows);
// Throws std::out_of_range for a position that cos_sin does not have, or a slot that the pool does not.
void prepare_qkv(const QkvArgs& args, int64_t tokens);
void gated_act(const GatedArgs& args, int64_t rows);
// The first column with the largest value, of each row of float32; -1 when that is not finite or there is a NaN.
void argmax(const Matrix& x, int64_t rows, int64_t columns, int64_t* out);

}  // namespace quire
