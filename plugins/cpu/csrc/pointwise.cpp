#include "pointwise.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_plan.h"
#include "kernels.h"
#include "pool.h"

namespace quire {
namespace {

// Elements below which meeting the other threads costs more than they save.
constexpr int64_t worth_sharing = 32 * 1024;

// f(row0, row1) over all rows, by all threads when there is enough to do.
template <class F>
void over_rows(int64_t rows, int64_t columns, F&& f) {
    const std::shared_ptr<Pool> held = current_pool();
    const int workers = held->size();
    if (workers == 1 || rows < 2 || rows * columns < worth_sharing) return f(0, rows);
    const int64_t pieces = std::min<int64_t>(rows, 4 * workers);
    Shares shares(pieces, workers);
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t piece) { f(rows * piece / pieces, rows * (piece + 1) / pieces); });
    });
}

}  // namespace

void norm(const NormArgs& args, int64_t rows) {
    const Kernels& isa = kernels();
    over_rows(rows, args.columns, [&](int64_t row0, int64_t row1) { isa.norm_rows(args, row0, row1); });
}

void prepare_qkv(const QkvArgs& args, int64_t tokens) {
    check_slots(args.kv, tokens);
    for (int64_t t = 0; args.cos_sin && t < tokens; t++)
        if (args.positions[t] < 0 || args.positions[t] >= args.cos_sin_rows)
            throw std::out_of_range("position " + std::to_string(args.positions[t]) + " is not in a rotary table of " +
                                    std::to_string(args.cos_sin_rows));
    const Kernels& isa = kernels();
    const int64_t columns = int64_t(args.heads + 2 * args.kv.layout.kv_heads) * args.kv.layout.head_dim;
    over_rows(tokens, columns, [&](int64_t token0, int64_t token1) { isa.prepare_tokens(args, token0, token1); });
}

void gated_act(const GatedArgs& args, int64_t rows) {
    const Kernels& isa = kernels();
    over_rows(rows, 2 * args.width, [&](int64_t row0, int64_t row1) { isa.gate_rows(args, row0, row1); });
}

void argmax(const Matrix& x, int64_t rows, int64_t columns, int64_t* out) {
    const Kernels& isa = kernels();
    over_rows(rows, columns, [&](int64_t row0, int64_t row1) {
        for (int64_t row = row0; row < row1; row++)
            out[row] = isa.argmax_row(static_cast<const float*>(x.data) + row * x.stride, columns);
    });
}

}  // namespace quire
