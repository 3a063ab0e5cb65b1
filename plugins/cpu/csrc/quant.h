// y = x W^T with W in 8 or 4 bits: the layouts that the driver (quant.cpp) and the kernels (isa/quant.cpp) agree on.
//
// W is unsigned integers with a scale, and perhaps a zero point, for each row and each `group` (32, 64 or 128) columns;
// x is rounded to signed 8-bit integers with a scale for each row and group when the product is made. So a group's sum
//     scale of W * scale of x * sum over k of (W - zero) * x
// is one of integers, exact in any order, and the results of the groups are added in float32 in order of k. Bits depend
// neither on the other rows nor on threads nor on the instruction set.
//
// Weights. Output rows in blocks of 32; a block holds, for each group of columns, 32 scales (bf16 or float32), 32 zero
// points (int32) if there are any, and then the integers: for each step of 4 columns 32 times 4 bytes, or, in 4 bits,
// for each two steps 32 times 4 bytes whose low halves are the first step's.
//
// x. Rows in tiles of up to max_tile_rows; a tile holds, for each group, the rows' scales, what their sums begin with
// (minus the sum of x, already times the middle of W's range where there are no zero points), and then for each step the
// rows' 4 integers, as the instruction set takes them.
#pragma once

#include "linear.h"
#include "types.h"

namespace quire {

constexpr int columns_per_step = 4;

struct QuantShape {
    int64_t n, k;
    int bits, group;
    bool zeros;
    DType scales;

    QUIRE_CONST int64_t groups() const { return (k + group - 1) / group; }
    QUIRE_CONST int64_t blocks() const { return (n + group_rows - 1) / group_rows; }
    QUIRE_CONST int64_t scales_bytes() const { return int64_t(group_rows) * dtype_bytes(scales); }
    QUIRE_CONST int64_t header_bytes() const { return scales_bytes() + (zeros ? group_rows * 4 : 0); }
    QUIRE_CONST int64_t group_bytes() const { return header_bytes() + int64_t(group) * group_rows * bits / 8; }
    QUIRE_CONST int64_t block_bytes() const { return groups() * group_bytes(); }
};

struct QuantXArgs {
    Matrix x;
    Tiles tiles;
    QuantShape shape;
    char* packed;
};

struct QuantArgs {
    QuantShape shape;
    const char* weight;
    const char* x;  // packed
    Tiles tiles;
    LinearArgs results;  // what linear does with its sums: n, activation, bias, residual, out
};

struct QuantCall {
    QuantShape shape;
    Matrix x;
    int64_t rows;
    const char* weight;
    Activation activation;  // other than none: n must be a multiple of 64
    const void* bias;
    DType bias_type;
    Matrix residual, out;
};

size_t packed_bytes(const QuantShape& shape);
// q [n, k] bytes, below 16 for 4 bits; scales [n, groups] of the shape's type; zeros [n, groups] bytes or null: then
// 2^(bits - 1).
void pack_weight(const QuantShape& shape, const uint8_t* q, const void* scales, const uint8_t* zeros, char* packed);
// Rounds W [n, k] (rows of float32 or bf16) and packs it, a group at a time: nothing of W's size is needed in between.
// As quantize() of the reference: 8 bits make the largest magnitude of a group 127; 4 bits try four scales and keep the
// one with the least squared error. A group that holds a NaN or an infinity gets a scale of NaN. Scales
// are bf16, and there are no zero points.
void pack_rounded(const QuantShape& shape, const Matrix& w, char* packed);
void linear(const QuantCall& call);

}  // namespace quire
