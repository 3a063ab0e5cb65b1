// The table of one instruction set.
#include "tables.h"

#define QUIRE_TEXT_(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_(x)
#define QUIRE_JOIN_(a, b) a##b
#define QUIRE_JOIN(a, b) QUIRE_JOIN_(a, b)

namespace quire {

const Kernels* QUIRE_JOIN(kernels_, QUIRE_ISA)() {
    using namespace QUIRE_ISA;
    static const Kernels table = {
        QUIRE_TEXT(QUIRE_ISA),
        {linear_limits.rows[0], linear_limits.rows[1]},
        {linear_limits.x_bytes[0], linear_limits.x_bytes[1]},
        pack_x,
        linear_groups,
        quant_limits.rows,
        quant_limits.x_step,
        quant_pack_x,
        quant_block,
        quant_round,
        attention_scratch,
        attention_task,
        attention_finish,
        write_kv,
        norm_rows,
        prepare_tokens,
        gate_rows,
        argmax_row,
        logit_peaks,
        logit_weights,
        weight_sums,
        probe_read,
        probe_dot,
    };
    return &table;
}

}  // namespace quire
