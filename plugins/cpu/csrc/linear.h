// y = x W^T: the layouts that the driver (linear.cpp) and the kernels (isa/linear.cpp) agree on.
//
// Weights. Output rows in groups of 32; a group holds, for each step over K, the 32 rows side by side: 128 bytes, and
// all steps in one piece of memory that a thread streams through. A step is one element of K in float32, and a pair of
// neighbours in bf16 (what the dot product instructions take). Steps are padded with zeros to a multiple of 16. The
// layout is the same on every instruction set.
//
// x. Rows in tiles of up to max_tile_rows; a tile holds, for each 16 steps, its rows one after the other. The inner
// loop then walks one pointer over x whatever the number of rows.
//
// Every output is one chain of additions over K in order, kept in one lane of one accumulator: that is why its bits
// depend neither on the number of rows, nor on the thread, the tile or the panel it is computed in.
#pragma once

#include "types.h"

namespace quire {

constexpr int group_rows = 32;    // output rows side by side
constexpr int step_block = 16;    // steps over K are padded to a multiple of this
constexpr int step_bytes = 128;   // of one step of one group
constexpr int panel_steps = 256;  // 32 KB of weights: what several tiles of x share before moving on

QUIRE_CONST int64_t steps_of(int64_t k, DType weight) {
    const int64_t steps = weight == DType::f32 ? k : (k + 1) / 2;
    return (steps + step_block - 1) / step_block * step_block;
}

// Rows of x, in tiles of rows / tiles or one more.
struct Tiles {
    int64_t rows = 0, tiles = 0;

    QUIRE_CONST int64_t begin(int64_t tile) const {
        const int64_t size = rows / tiles, larger = rows % tiles;
        return tile * size + (tile < larger ? tile : larger);
    }
    QUIRE_CONST int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

// What is computed at a time of so many rows of x: passes as large as each other. x is packed for one pass and the weights
// are read once for it: seldom, but packed x stays small.
constexpr int64_t pass_rows = 512;  // at most
QUIRE_CONST Tiles passes_of(int64_t rows) { return {rows, (rows + pass_rows - 1) / pass_rows}; }

struct PackXArgs {
    Matrix x;            // first row of the block
    Tiles tiles;
    int64_t k, steps;
    DType weight;
    char* packed;        // [tile][steps / 16][row in tile][16 steps]
};

struct LinearArgs {
    const char* weight;  // [group][steps][32] steps
    const char* x;       // packed
    Tiles tiles;
    int64_t steps;
    DType type;             // of the weight
    int64_t n;              // rows of W
    Activation activation;  // other than none: act(gate) * up, where rows of W are n / 2 of gate, then n / 2 of up
    const void* bias;       // [n] or null
    DType bias_type;
    Matrix residual;        // added to the result; data null: none
    Matrix out;             // first row of the block
    bool near;              // how a tile that streams through the weights fetches them; trials.h

    // Groups of results, and from a gate's group to the up rows that go with it.
    QUIRE_CONST int64_t groups() const {
        return activation == Activation::none ? (n + group_rows - 1) / group_rows : n / 2 / group_rows;
    }
    QUIRE_CONST int64_t columns() const { return activation == Activation::none ? n : n / 2; }
};

struct LinearCall {
    Matrix x;
    int64_t rows, k, n;
    const char* weight;
    DType type;
    Activation activation;  // other than none: n must be a multiple of 64
    const void* bias;
    DType bias_type;
    Matrix residual, out;
};

size_t packed_bytes(int64_t n, int64_t k, DType type);
// W [n, k], rows `stride` elements apart, into `packed`; element types are those of `type`.
void pack_weight(const void* w, int64_t stride, int64_t n, int64_t k, DType type, char* packed);
void linear(const LinearCall& call);

}  // namespace quire
