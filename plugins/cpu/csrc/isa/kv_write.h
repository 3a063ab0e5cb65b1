// Writing keys and values to their pages; attention.h has the layout.
#pragma once

#include "../attention.h"

#include "vec.h"

namespace quire::QUIRE_ISA {
namespace {

// Converts to the pool's type and writes the keys and values of one head of one token to its slot.
template <class E, class T>
void write_head(const KVLayout& layout, char* page, int64_t slot, const T* k, const T* v) {
    constexpr int per_step = 4 / sizeof(E);
    E row[256 + W];
    const int64_t at = slot % layout.page_size, block = at / key_block, lane = at % key_block;
    const int dim = layout.head_dim;
    for (int c = 0; c < dim; c += W) store(row + c, load_first(k + c, dim - c));
    for (int c = dim; c % per_step; c++) row[c] = E();
    char* keys = page + block * layout.key_block_bytes() + lane * 4;
    for (int c = 0; c < dim; c += per_step, keys += 64) memcpy(keys, row + c, 4);
    for (int c = 0; c < dim; c += W) store(row + c, load_first(v + c, dim - c));
    char* values = page + layout.values_offset() + block * layout.value_block_bytes();
    values += lane / per_step * layout.value_dim() * 4 + lane % per_step * sizeof(E);
    for (int c = 0; c < dim; c++, values += 4) memcpy(values, row + c, sizeof(E));
}

// One head of one token in 8 bits: integers to out[dim]; returns the scale, NaN if anything was not finite.
template <class T>
float round_head(const T* x, int dim, int8_t* out) {
    VF top = zero(), odd = zero();
    for (int c = 0; c < dim; c += W) {
        const VF v = load_first(x + c, dim - c);
        top = max(abs(v), top);
        odd = odd + v * zero();
    }
    const float largest = reduce_max(top);
    const VF inverse = set1(largest > 0 ? 127.0f / largest : 0.0f), most = set1(127.0f);
    for (int c = 0; c < dim; c += W) store_s8(out + c, max(zero() - most, min(most, load_first(x + c, dim - c) * inverse)));
    return largest / 127.0f + reduce_add(odd);
}

template <class T>
void write_head_s8(const KVLayout& layout, char* page, int64_t slot, const T* k, const T* v) {
    int8_t row[256 + W] = {};
    const int64_t at = slot % layout.page_size, block = at / key_block, lane = at % key_block;
    const int dim = layout.head_dim;
    char* keys = page + block * layout.key_block_bytes();
    float scale = round_head(k, dim, row);
    memcpy(keys + layout.key_data_bytes() + lane * 4, &scale, 4);
    for (int c = 0; c < dim; c += 4) memcpy(keys + c / 4 * 64 + lane * 4, row + c, 4);
    char* values = page + layout.values_offset() + block * layout.value_block_bytes();
    scale = round_head(v, dim, row);
    memcpy(values + layout.value_data_bytes() + lane * 4, &scale, 4);
    values += lane / 4 * layout.value_dim() * 4 + lane % 4;
    for (int c = 0; c < dim; c++) values[c * 4] = char(row[c]);
}

template <class E, class T>
void write_tokens(const WriteKVArgs& a, int64_t token0, int64_t token1) {
    const KVLayout& layout = a.layout;
    for (int64_t t = token0; t < token1; t++) {
        const uint32_t number = uint32_t(a.slots[t] / layout.page_size);
        char* page = a.pool + page_offset(number, layout.extent_bytes(), layout.head_page_bytes());
        const T* k = static_cast<const T*>(a.k.data) + t * a.k.stride;
        const T* v = static_cast<const T*>(a.v.data) + t * a.v.stride;
        for (int h = 0; h < layout.kv_heads; h++, page += layout.head_bytes())
            if constexpr (sizeof(E) == 1)
                write_head_s8(layout, page, a.slots[t], k + h * layout.head_dim, v + h * layout.head_dim);
            else write_head<E, T>(layout, page, a.slots[t], k + h * layout.head_dim, v + h * layout.head_dim);
    }
}

template <class E>
void write_any(const WriteKVArgs& a, int64_t token0, int64_t token1) {
    if (a.k.type == DType::bf16) write_tokens<E, bf16>(a, token0, token1);
    else write_tokens<E, float>(a, token0, token1);
}

}  // namespace
}  // namespace quire::QUIRE_ISA
