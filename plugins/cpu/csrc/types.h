// Plain types that every part of the extension shares. No templates and no standard containers here: this header is
// compiled with several instruction sets, and an inline function emitted twice could be linked in the wrong one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quire {

enum class DType : int { f32 = 0, bf16 = 1 };

// For small functions that kernels call: always inlined, so that no copy made for one instruction set serves all.
#define QUIRE_CONST constexpr __attribute__((always_inline)) inline

QUIRE_CONST int dtype_bytes(DType t) { return t == DType::f32 ? 4 : 2; }

enum class Activation : int { none = 0, silu = 1, gelu = 2, gelu_tanh = 3 };

// A matrix with contiguous rows: element (i, j) is data[i * stride + j], counted in elements.
struct Matrix {
    void* data = nullptr;
    DType type = DType::f32;
    int64_t stride = 0;
};

// The matrix from a row on; nothing stays nothing.
__attribute__((always_inline)) inline Matrix rows_from(Matrix m, int64_t row) {
    if (m.data) m.data = static_cast<char*>(m.data) + row * m.stride * dtype_bytes(m.type);
    return m;
}

}  // namespace quire
