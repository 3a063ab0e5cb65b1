// What the kernels of attention share: the keys that a row sees, the places of blocks, and how the tiles of a row merge.
#pragma once

#include "../attention.h"

#include "vmath.h"

namespace quire::QUIRE_ISA {
namespace {

constexpr int blocks_of_tile = key_tile / key_block;
constexpr int score_stride = key_tile + 16;  // floats; not a power of two, so that rows do not share cache sets
constexpr float minus_infinity = -__builtin_inff();

struct Span { int64_t begin, end; };

// Keys that the query at `position` sees.
QUIRE_INLINE Span visible(const AttentionArgs& a, int64_t position) {
    return {larger<int64_t>(0, position - a.window + 1), position + 1};
}

// Walks the blocks of one KV head of one sequence.
class BlockWalk {
public:
    QUIRE_INLINE BlockWalk make(const AttentionArgs& a, const AttentionTask& task, int64_t block) {
        BlockWalk walk;
        const KVLayout& l = a.layout;
        walk.table_ = a.block_tables + task.sequence * a.block_table_stride;
        walk.pool_ = a.pool + task.head * l.head_bytes();
        walk.page_bytes_ = l.head_page_bytes();
        walk.extent_bytes_ = l.extent_bytes();
        walk.key_bytes_ = l.key_block_bytes();
        walk.value_bytes_ = l.value_block_bytes();
        walk.values_offset_ = l.values_offset();
        walk.per_page_ = l.page_size / key_block;
        walk.page_ = block / walk.per_page_;
        walk.place_ = block % walk.per_page_;
        return walk;
    }
    const char* keys() const { return head() + place_ * key_bytes_; }
    const char* values() const { return head() + values_offset_ + place_ * value_bytes_; }
    // As many bytes as a block's keys and values take, in the order of memory: those of a page's blocks are its all.
    const char* piece() const { return head() + place_ * (key_bytes_ + value_bytes_); }
    void next() {
        if (++place_ < per_page_) return;
        place_ = 0;
        page_++;
    }

private:
    const char* head() const { return pool_ + page_offset(uint32_t(table_[page_]), extent_bytes_, page_bytes_); }

    const int32_t* table_;
    const char* pool_;
    int64_t page_bytes_, extent_bytes_, key_bytes_, value_bytes_, values_offset_, per_page_, page_, place_;
};

// The scales of W keys (or values) of a tile, key i the first of them.
QUIRE_INLINE VF scales_of(const char* const* blocks, int i, int64_t data_bytes) {
    return load(reinterpret_cast<const float*>(blocks[i / key_block] + data_bytes) + i % key_block);
}

// Adds a tile's result to what a row has so far; `first`: nothing yet.
QUIRE_INLINE void merge(float* state, bool first, float maximum, float sum, const float* values, int64_t channels) {
    if (first) {
        state[0] = maximum;
        state[1] = sum;
        for (int64_t c = 0; c < channels; c += W) store(state + 16 + c, load(values + c));
        return;
    }
    const VF old = set1(state[0]), now = set1(maximum), both = max(old, now);
    const VF keep_old = exp(old - both), keep_new = exp(now - both);
    float t[W];
    store(t, both);
    state[0] = t[0];
    store(t, fma(set1(sum), keep_new, set1(state[1]) * keep_old));
    state[1] = t[0];
    for (int64_t c = 0; c < channels; c += W)
        store(state + 16 + c, fma(load(values + c), keep_new, load(state + 16 + c) * keep_old));
}

// A row's result: the sink counts as one more key without a value.
void write_out(const AttentionArgs& a, int64_t token, int64_t head, float maximum, float total, const float* values) {
    VF sum = set1(total), factor = set1(1.0f);
    if (a.sinks) {
        const VF sink = set1(a.sinks[head]), both = max(set1(maximum), sink);
        factor = exp(set1(maximum) - both);
        sum = fma(sum, factor, exp(sink - both));
    }
    factor = factor / sum;
    const int dim = a.layout.head_dim;
    const int64_t at = token * a.out.stride + head * dim;
    for (int c = 0; c < dim; c += W) {
        const VF y = load(values + c) * factor;
        if (a.out.type == DType::bf16) store_first(static_cast<bf16*>(a.out.data) + at + c, y, dim - c);
        else store_first(static_cast<float*>(a.out.data) + at + c, y, dim - c);
    }
}

}  // namespace
}  // namespace quire::QUIRE_ISA
