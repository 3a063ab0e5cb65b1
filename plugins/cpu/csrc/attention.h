// Attention over paged keys and values: the layouts and work lists that the driver (attention.cpp) and the kernels
// (isa/attention.cpp) agree on.
//
// The pages of one KV head lie side by side, then those of the next: a task reads one head, so pages that follow each
// other are one stream. A page of a head holds keys and then values, both in blocks of 16 tokens:
//   keys    [block][step over channels][16 tokens]   a step is as many channels as fit in 4 bytes: 1, 2 or 4
//   values  [block][step over tokens][channels]      a step is as many tokens
// in units of 4 bytes. In 8 bits each token and head has a float32 scale for its key and one for its value; those of a
// block's 16 tokens stand at its end. Integers become floats as they are multiplied; the scale of a key multiplies its
// score, that of a value its weight. So 16 scores, or 16 channels of the result, lie side by side in both products, and a query or a
// weight is broadcast to them: the same inner loop as linear's. Channels of values are padded to a multiple of 16.
//
// Softmax. Keys are taken in tiles of 256 counted from position 0. A query row gets from each tile it sees a maximum, a
// sum and a weighted sum of values, computed from nothing but that tile; these are then merged in the order of the
// tiles. Which rows share a tile's work, and which thread does it, therefore changes no bit: a prompt may be cut
// anywhere, and the tiles of one long sequence may be spread over the threads.
#pragma once

#include "types.h"

namespace quire {

constexpr int key_block = 16;
constexpr int key_tile = 256;

enum class KVType : int { f32 = 0, bf16 = 1, f16 = 2, s8 = 3 };
QUIRE_CONST int kv_bytes(KVType t) { return t == KVType::f32 ? 4 : t == KVType::s8 ? 1 : 2; }

constexpr int extent_pages = 16;

// Where a page of a layer and head is, from where they are in extent 0.
QUIRE_CONST int64_t page_offset(uint32_t page, int64_t extent_bytes, int64_t page_bytes) {
    return page / extent_pages * extent_bytes + page % extent_pages * page_bytes;
}

// Shape of the pool of a KV group: [extents][layers][KV heads][pages of the extent][keys of the page's blocks, then values].
// Memory is taken for a few extents when the first tokens come, not for a part of every layer's own pool, and yet a head's
// pages follow each other as far as their numbers do. Bytes.
struct KVLayout {
    KVType type;
    int layers, kv_heads, head_dim, page_size;

    QUIRE_CONST int per_step() const { return 4 / kv_bytes(type); }
    QUIRE_CONST int64_t scale_bytes() const { return type == KVType::s8 ? key_block * 4 : 0; }
    QUIRE_CONST int64_t value_dim() const { return (head_dim + 15) / 16 * 16; }
    // Of the numbers of a block: its scales come next.
    QUIRE_CONST int64_t key_data_bytes() const { return (head_dim + per_step() - 1) / per_step() * key_block * 4; }
    QUIRE_CONST int64_t value_data_bytes() const { return key_block * value_dim() * kv_bytes(type); }
    QUIRE_CONST int64_t key_block_bytes() const { return key_data_bytes() + scale_bytes(); }
    QUIRE_CONST int64_t value_block_bytes() const { return value_data_bytes() + scale_bytes(); }
    QUIRE_CONST int64_t values_offset() const { return page_size / key_block * key_block_bytes(); }
    QUIRE_CONST int64_t head_page_bytes() const { return page_size / key_block * (key_block_bytes() + value_block_bytes()); }
    QUIRE_CONST int64_t head_bytes() const { return extent_pages * head_page_bytes(); }
    QUIRE_CONST int64_t layer_bytes() const { return kv_heads * head_bytes(); }
    QUIRE_CONST int64_t extent_bytes() const { return layers * layer_bytes(); }
};

struct WriteKVArgs {
    KVLayout layout;
    char* pool;            // where the layer is in extent 0
    const int64_t* slots;  // [tokens], each below slot_count
    int64_t slot_count;
    Matrix k, v;           // rows of tokens, kv_heads * head_dim wide
};

struct AttentionTask;

struct AttentionArgs {
    KVLayout layout;
    const char* pool;  // where the layer is in extent 0
    const int32_t* block_tables;
    int64_t block_table_stride;
    const int32_t* query_start;   // [sequences + 1]
    const int32_t* context_lens;  // [sequences]
    Matrix q, out;                // rows of tokens, heads * head_dim wide
    int group;                    // query heads that share a KV head
    int64_t window;               // keys a query sees at most, itself included
    float scale, soft_cap;        // soft_cap 0: none
    const float* sinks;           // [heads] or null
    float* partial;               // results of tiles, of the tasks that leave them there
    const AttentionTask* after;   // what this thread will probably do next, to be fetched meanwhile; or null
};

// Queries q0 .. q1-1 (counted in the new tokens of a sequence) of the heads that share a KV head, against some tiles.
struct AttentionTask {
    int32_t sequence, head, q0, q1;
    int32_t tile0, tile1;
    int64_t partial;  // -1: all tiles are here, write the result. Else the place of tile0's first row in `partial`
};

// Floats that a row leaves for a tile: maximum, sum, weighted values (in a multiple of 16 so that they stay aligned).
QUIRE_CONST int64_t partial_row(const KVLayout& layout) { return 16 + layout.value_dim(); }

}  // namespace quire
