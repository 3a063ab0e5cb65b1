// What the kernel sources of one instruction set hand to its table.
#pragma once

#include "../kernels.h"

namespace quire::QUIRE_ISA {

struct LinearLimits { int rows[2], x_bytes[2]; };
extern const LinearLimits linear_limits;
void pack_x(const PackXArgs& args, int64_t tile);
void linear_groups(const LinearArgs& args, int64_t group0, int64_t group1, int64_t tile0, int64_t tile1, float* scratch);
struct QuantLimits { int rows, x_step; };
extern const QuantLimits quant_limits;
void quant_pack_x(const QuantXArgs& args, int64_t tile, int64_t group0, int64_t group1);
void quant_block(const QuantArgs& args, int64_t block, int64_t tile0, int64_t tile1, float* scratch);
void quant_round(const QuantShape& shape, const Matrix& w, int64_t block, char* out);
int64_t attention_scratch(const AttentionArgs& args, int rows);
void attention_task(const AttentionArgs& args, const AttentionTask& task, char* scratch);
void attention_finish(const AttentionArgs& args, const AttentionTask& all, char* scratch);
void write_kv(const WriteKVArgs& args, int64_t token0, int64_t token1);
void norm_rows(const NormArgs& args, int64_t row0, int64_t row1);
void prepare_tokens(const QkvArgs& args, int64_t token0, int64_t token1);
void gate_rows(const GatedArgs& args, int64_t row0, int64_t row1);
int64_t argmax_row(const float* x, int64_t columns);
void logit_peaks(const float* x, int64_t columns, float* peaks);
void logit_weights(const float* x, int64_t n, float best, float temperature, float least, float* weights);
void weight_sums(const float* x, int64_t columns, float best, float temperature, float least, double* sums);
float probe_read(const char* data, int64_t bytes);
double probe_dot(DType type, int64_t repeats);

}  // namespace quire::QUIRE_ISA
