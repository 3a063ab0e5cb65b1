// The machine's limits, measured with the same instructions that the kernels use: what their figures are held against.
#include "amx.h"
#include "dot.h"
#include "tables.h"

namespace quire::QUIRE_ISA {

// Reads every line once; the result depends on all of them, so that no compiler leaves any out.
float probe_read(const char* data, int64_t bytes) {
    VF sum[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int j = 0; j < 4; j++) prefetch_l2(reinterpret_cast<uintptr_t>(data) + i + 1024 + j * 64);
        for (int j = 0; j < 256; j += W * 4) {
            VF& s = sum[(j / (W * 4)) % 4];
            s = s + load(reinterpret_cast<const float*>(data + i + j));
        }
    }
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// `repeats` times 16 steps of `Dot` in 12 independent chains; the operations: 2 * W * per_step each.
template <class Dot>
static float probe(int64_t repeats) {
    alignas(64) char w[W * 4] = {};
    char x[16 * 8] = {};
    VF a[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) a[i] = set1(float(i));  // all different, or the compiler computes one of them
    typename Dot::Operand operand = Dot::load_operand(w);
    for (int64_t n = 0; n < repeats; n++)
        for (int s = 0; s < 16; s++)
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) a[i] = Dot::step(a[i], operand, x + s * Dot::x_bytes);
    VF sum = zero();
    for (int i = 0; i < 12; i++) sum = sum + a[i];
    return reduce_add(sum);
}

#if defined(__AMX_BF16__)
// The same with tiles: 16 times four products a repeat, of 16 x 16 results and 32 elements each.
static double probe_tiles(int64_t repeats) {
    alignas(64) char zeros[tile_rows * tile_row_bytes] = {};
    configure_product(2 * tile_rows);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, zeros, tile_row_bytes);
    _tile_loadd(5, zeros, tile_row_bytes);
    _tile_loadd(6, zeros, tile_row_bytes);
    _tile_loadd(7, zeros, tile_row_bytes);
    for (int64_t n = 0; n < repeats; n++)
        for (int s = 0; s < 16; s++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    _tile_release();
    return double(repeats) * 16 * 4 * 2 * 16 * 16 * 32;
}
#endif

double probe_dot(DType type, int64_t repeats) {
#if defined(__AMX_BF16__)
    if (type == DType::bf16) return probe_tiles(repeats / 16);
#endif
    const float nothing = type == DType::f32 ? probe<DotF32>(repeats) : probe<DotBf16>(repeats);
    const int per_step = type == DType::f32 ? 1 : 2;
    return double(repeats) * 16 * 12 * 2 * W * per_step + double(nothing);
}

}  // namespace quire::QUIRE_ISA
