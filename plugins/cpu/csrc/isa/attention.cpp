// Paged attention of one instruction set: which kernel takes which pages. attention.h describes the layouts and the
// order of sums.
#include "../attention.h"

#include "attention_tiles.h"
#include "attention_vectors.h"
#include "kv_write.h"
#include "tables.h"

namespace quire::QUIRE_ISA {

int64_t attention_scratch(const AttentionArgs& a, int rows) {
    const int64_t steps = (a.layout.head_dim + step_block) / step_block * step_block;
    const int64_t per_row = partial_row(a.layout) * 4 + steps * 8 + 256;
    const int64_t per_tile_row = (score_stride + key_tile + a.layout.value_dim()) * 4;
    const int64_t vectors = rows * per_row + 16 * per_tile_row + 2 * a.layout.value_block_bytes() + 1024;
#if defined(__AMX_BF16__)
    return larger(vectors, tile_scratch(a.layout, rows));
#else
    return vectors;
#endif
}

void attention_task(const AttentionArgs& a, const AttentionTask& task, char* scratch) {
#if defined(__AMX_BF16__)
    if (a.q.type == DType::bf16 && a.layout.type != KVType::f32) {
        const FlushDenormals flush;
        if (a.layout.type == KVType::bf16) return TileTask<PagesBf16>(a, task, scratch).run();
        if (a.layout.type == KVType::f16) return TileTask<PagesF16>(a, task, scratch).run();
        return TileTask<PagesS8>(a, task, scratch).run();
    }
#endif
    if (a.layout.type == KVType::f32) return attend<DotF32>(a, task, scratch);
    if (a.layout.type == KVType::f16) return attend<DotF16>(a, task, scratch);
    if (a.layout.type == KVType::s8) return attend<DotS8>(a, task, scratch);
    // Queries and weights stay float32 where the model is.
    if (a.q.type == DType::f32) return attend<DotBf16Wide>(a, task, scratch);
    attend<DotBf16>(a, task, scratch);
}

void attention_finish(const AttentionArgs& a, const AttentionTask& all, char* scratch) {
#if defined(__AMX_BF16__)
    const FlushDenormals flush;
#endif
    const int32_t start = a.query_start[all.sequence], count = a.query_start[all.sequence + 1] - start;
    const int64_t position0 = a.context_lens[all.sequence] - count + all.q0, size = partial_row(a.layout);
    const int rows = (all.q1 - all.q0) * a.group;
    float* state = reinterpret_cast<float*>(scratch);
    for (int r = 0; r < rows; r++) {
        const Span seen = visible(a, position0 + r / a.group);
        const int64_t first = seen.begin / key_tile, last = (seen.end - 1) / key_tile;
        for (int64_t tile = first; tile <= last; tile++) {
            const float* from = a.partial + all.partial + ((tile - all.tile0) * rows + r) * size;
            merge(state, tile == first, from[0], from[1], from + 16, size - 16);
        }
        write_out(a, start + all.q0 + r / a.group, int64_t(all.head) * a.group + r % a.group, state[0], state[1],
                  state + 16);
    }
}

void write_kv(const WriteKVArgs& a, int64_t token0, int64_t token1) {
    switch (a.layout.type) {
        case KVType::f32: return write_any<float>(a, token0, token1);
        case KVType::bf16: return write_any<bf16>(a, token0, token1);
        case KVType::f16: return write_any<half>(a, token0, token1);
        case KVType::s8: return write_any<int8_t>(a, token0, token1);
    }
}

}  // namespace quire::QUIRE_ISA
