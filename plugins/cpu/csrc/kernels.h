// What one instruction set provides: a table of functions, each a piece of work for one thread.
#pragma once

#include "attention.h"
#include "linear.h"
#include "pointwise.h"
#include "quant.h"
#include "types.h"

namespace quire {

struct Kernels {
    const char* name;
    // Linear: see linear.h.
    int max_tile_rows[2];    // by weight DType: most rows of x that the inner loop keeps in registers
    int x_bytes[2];          // by weight DType: bytes that one step over K takes of a row of packed x
    void (*pack_x)(const PackXArgs& args, int64_t tile);
    void (*linear_groups)(const LinearArgs& args, int64_t group0, int64_t group1, int64_t tile0, int64_t tile1,
                          float* scratch);
    // Linear with integer weights: see quant.h.
    int quant_tile_rows, quant_x_step;
    void (*quant_pack_x)(const QuantXArgs& args, int64_t tile, int64_t group0, int64_t group1);
    void (*quant_block)(const QuantArgs& args, int64_t block, int64_t tile0, int64_t tile1, float* scratch);
    void (*quant_round)(const QuantShape& shape, const Matrix& w, int64_t block, char* out);
    // Attention: see attention.h. Bytes of working memory that a task of so many rows (queries times group) needs.
    int64_t (*attention_scratch)(const AttentionArgs& args, int rows);
    void (*attention_task)(const AttentionArgs& args, const AttentionTask& task, char* scratch);
    // Merges what tasks left for tiles all.tile0 .. all.tile1-1 in `partial` from all.partial on.
    void (*attention_finish)(const AttentionArgs& args, const AttentionTask& all, char* scratch);
    void (*write_kv)(const WriteKVArgs& args, int64_t token0, int64_t token1);
    // Between the products: see pointwise.h.
    void (*norm_rows)(const NormArgs& args, int64_t row0, int64_t row1);
    void (*prepare_tokens)(const QkvArgs& args, int64_t token0, int64_t token1);
    void (*gate_rows)(const GatedArgs& args, int64_t row0, int64_t row1);
    int64_t (*argmax_row)(const float* x, int64_t columns);
    // Whole rows of logits: see sampling.h.
    void (*logit_peaks)(const float* x, int64_t columns, float* peaks);
    void (*logit_weights)(const float* x, int64_t n, float best, float temperature, float least, float* weights);
    void (*weight_sums)(const float* x, int64_t columns, float best, float temperature, float least, double* sums);
    // Limits of the machine: the sum of what is read; operations done.
    float (*probe_read)(const char* data, int64_t bytes);
    double (*probe_dot)(DType type, int64_t repeats);
};

// The tables, from the least to the most capable; each null where this library was built without it.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();

// The table in use: the most capable that this machine can run, unless set_isa chose another.
const Kernels& kernels();

}  // namespace quire
