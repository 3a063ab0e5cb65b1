// Pages as AMX tiles of bfloat16: what is not stored so is converted, 64 bytes of a page at a time, and loses nothing:
// an 8 bit integer fits in the 8 bits of a bfloat16, a float16 in two of them.
#pragma once

#include <initializer_list>

#include "../attention.h"

#include "amx.h"
#include "vec.h"

#if defined(__AMX_BF16__)

namespace quire::QUIRE_ISA {
namespace {

constexpr int slice_keys = 32;  // keys that one product of weights and values reduces over

struct PagesBf16 {
    static constexpr bool direct = true;   // pages hold tiles already, where they are whole
    static constexpr bool scaled = false;
    static constexpr int parts = 1;        // tiles whose sum is the number
    static constexpr int rows = 1;         // of a tile, that 64 bytes become
    QUIRE_INLINE void convert(__m512i x, char* out, int64_t, int64_t) { _mm512_store_si512(out, x); }
};

// The upper halves of the 32-bit units of two vectors, side by side.
struct UpperHalves { alignas(64) uint16_t index[32]; };
constexpr UpperHalves make_upper_halves() {
    UpperHalves u = {};
    for (int i = 0; i < 32; i++) u.index[i] = uint16_t(2 * i + 1);
    return u;
}
alignas(64) constexpr UpperHalves upper_halves = make_upper_halves();

struct PagesF16 {
    static constexpr bool direct = false, scaled = false;
    static constexpr int parts = 2, rows = 1;
    // The upper 8 bits of each number at `out`, the rest in the other part.
    QUIRE_INLINE void convert(__m512i x, char* out, int64_t, int64_t part) {
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
        // Cut, not rounded: the rest then fits in 3 bits, and both are finite.
        const __m512i mask = _mm512_set1_epi32(int(0xffff0000u));
        const auto rest = [&](__m512 v) {
            return _mm512_castps_si512(_mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), mask))));
        };
        const __m512i upper = _mm512_load_si512(upper_halves.index);
        _mm512_store_si512(out, _mm512_permutex2var_epi16(_mm512_castps_si512(low), upper, _mm512_castps_si512(high)));
        _mm512_store_si512(out + part, _mm512_permutex2var_epi16(rest(low), upper, rest(high)));
    }
};

// Bytes of the bfloat16 of 0 to 127, and how two vectors of bytes interleave to the pairs of a unit of 4.
struct ByteTables { alignas(64) uint8_t low[128], high[128], first[64], second[64]; };
constexpr ByteTables make_byte_tables() {
    ByteTables t = {};
    for (int i = 1; i < 128; i++) {
        int exponent = 0;
        while (i >> (exponent + 1)) exponent++;
        const unsigned bits = unsigned(127 + exponent) << 7 | (unsigned(i) << (7 - exponent) & 0x7f);
        t.low[i] = uint8_t(bits);
        t.high[i] = uint8_t(bits >> 8);
    }
    for (int i = 0; i < 64; i++) {  // byte i of the pairs: of unit i / 4, element i / 2 % 2 of the pair, low or high
        const int from = i / 4 * 4 + i / 2 % 2;
        t.first[i] = uint8_t(from + 64 * (i % 2));
        t.second[i] = uint8_t(from + 2 + 64 * (i % 2));
    }
    return t;
}
alignas(64) constexpr ByteTables byte_tables = make_byte_tables();

struct PagesS8 {
    static constexpr bool direct = false, scaled = true;
    static constexpr int parts = 1, rows = 2;
    QUIRE_INLINE __m512i table(const uint8_t* p) { return _mm512_load_si512(p); }
    // 16 units of 4 bytes to two rows of pairs: the first two of each, the other two.
    QUIRE_INLINE void convert(__m512i x, char* out, int64_t row, int64_t) {
        const __m512i index = _mm512_abs_epi8(x);
        const __m512i low = _mm512_permutex2var_epi8(table(byte_tables.low), index, table(byte_tables.low + 64));
        __m512i high = _mm512_permutex2var_epi8(table(byte_tables.high), index, table(byte_tables.high + 64));
        high = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // high | (x & sign)
        _mm512_store_si512(out, _mm512_permutex2var_epi8(low, table(byte_tables.first), high));
        _mm512_store_si512(out + row, _mm512_permutex2var_epi8(low, table(byte_tables.second), high));
    }
};

// A block of keys as tiles: [part][32 channels][16 pairs of channels][16 keys], zero beyond the last channel.
template <class Pages>
void convert_keys(const char* block, const KVLayout& l, int chunks, char* out) {
    const int64_t steps = l.key_data_bytes() / 64, part = int64_t(chunks) * tile_rows * tile_row_bytes;
    for (int64_t s = 0; s < steps; s++)
        Pages::convert(_mm512_loadu_si512(block + s * 64), out + s * Pages::rows * 64, 64, part);
    for (int p = 0; p < Pages::parts; p++)
        for (int64_t row = steps * Pages::rows; row < chunks * tile_rows; row++)
            _mm512_store_si512(out + p * part + row * 64, _mm512_setzero_si512());
}

// Two blocks of values as rows of tiles: [part][16 pairs of keys][channels].
template <class Pages>
void convert_values(const char* v0, const char* v1, const KVLayout& l, char* out) {
    const int64_t row = l.value_dim() * 4, part = tile_rows * row, half = l.value_data_bytes();
    for (const char* from : {v0, v1})
        for (const char* end = from + half; from != end; out += (Pages::rows - 1) * row)
            for (const char* to = from + row; from != to; from += 64, out += 64)
                Pages::convert(_mm512_loadu_si512(from), out, row, part);
}

// The same of numbers that may be NaN: keys outside [begin, end), counted in the slice, are zero.
template <class Pages>
void convert_edge(const char* v0, const char* v1, const KVLayout& l, int64_t begin, int64_t end, char* out) {
    const int64_t row = l.value_dim() * 4, part = tile_rows * row;
    const auto sees = [&](int64_t key) { return key >= begin && key < end; };
    for (int i = 0; i < tile_rows; i++) {
        const char* from = (i < tile_rows / 2 ? v0 : v1) + i % (tile_rows / 2) * row;
        const __m512i keep = _mm512_set1_epi32(int((sees(2 * i) ? 0xffffu : 0) | (sees(2 * i + 1) ? 0xffff0000u : 0)));
        for (int64_t c = 0; c < row; c += 64, out += 64)
            Pages::convert(_mm512_and_si512(_mm512_loadu_si512(from + c), keep), out, row, part);
    }
}

}  // namespace
}  // namespace quire::QUIRE_ISA

#endif
