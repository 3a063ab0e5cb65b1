// Tiles of AMX: eight registers of up to 16 rows of 64 bytes, and products of two of them into a third.
//
// A thread configures the tiles before it uses them and releases them when it is done: a configured thread makes every
// context switch save 8 KB, and nothing else may rely on a configuration. C(m, n) += sum over pairs of A(m, pair) times
// B(pair, n): a row of B holds one pair of 16 columns, which is a step of a packed weight (linear.h).
#pragma once

#include "vec.h"

#if defined(__AMX_TILE__)

namespace quire::QUIRE_ISA {

// Not the compiler's own: GCC 12 does not say that these read memory, and drops or delays the stores before them.
#undef _tile_loadd
#undef _tile_stream_loadd
#define QUIRE_TILE_LOAD(name, tile, base, stride)                                                               \
    asm volatile(name " (%0,%1,1), %%tmm" #tile ::"r"(static_cast<const void*>(base)), "r"(int64_t(stride)) : "memory")
#define _tile_loadd(tile, base, stride) QUIRE_TILE_LOAD("tileloadd", tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) QUIRE_TILE_LOAD("tileloaddt1", tile, base, stride)

constexpr int tile_rows = 16;
constexpr int tile_row_bytes = 64;

// The tiles' shapes as the processor takes them; those without rows are not to be used.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

};

QUIRE_INLINE void set_tile(TileConfig& config, int tile, int rows) {
    config.rows[tile] = uint8_t(rows);
    config.row_bytes[tile] = uint16_t(rows ? tile_row_bytes : 0);
}

// For up to 32 rows of x with 32 of W. Tiles 0 to 3 are sums (0 and 1 of the first 16 rows of x, 2 and 3 of the
// others), 4 and 5 those rows, 6 and 7 the rows of W.
QUIRE_INLINE void configure_product(int rows) {
    TileConfig config;
    const int first = smaller(rows, tile_rows), second = rows - first;
    set_tile(config, 0, first);
    set_tile(config, 1, first);
    set_tile(config, 2, second);
    set_tile(config, 3, second);
    set_tile(config, 4, first);
    set_tile(config, 5, second);
    set_tile(config, 6, tile_rows);
    set_tile(config, 7, tile_rows);
    asm volatile("ldtilecfg %0" ::"m"(config));
}

}  // namespace quire::QUIRE_ISA

#endif
