#include "quant.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "bf16.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace quire {
namespace {

constexpr int64_t block_rows = 504;      // rows of x that are packed at once, as in linear.cpp
constexpr int64_t pack_alone = 8 * 1024;  // elements below which meeting the other threads costs more than it saves

// Where the integers of row i of a block go: column c of a group.
void put(const QuantShape& s, char* group_data, int i, int c, int value) {
    char* data = group_data + s.header_bytes() + i * 4;
    const int step = c / columns_per_step, byte = c % columns_per_step;
    if (s.bits == 8) data[step * step_bytes + byte] = char(value);
    else data[step / 2 * step_bytes + byte] |= char(value << (step % 2 * 4));
}

void pack_block(const QuantShape& s, const uint8_t* q, const char* scales, const uint8_t* zeros, int64_t block,
                char* out) {
    const int64_t groups = s.groups(), width = dtype_bytes(s.scales);
    for (int64_t g = 0; g < groups; g++, out += s.group_bytes()) {
        std::memset(out, 0, size_t(s.group_bytes()));
        for (int i = 0; i < group_rows; i++) {
            const int64_t row = block * group_rows + i;
            if (row >= s.n) break;
            std::memcpy(out + i * width, scales + (row * groups + g) * width, size_t(width));
            const int32_t zero = zeros ? zeros[row * groups + g] : 1 << (s.bits - 1);
            if (s.zeros) std::memcpy(out + s.scales_bytes() + i * 4, &zero, 4);
            for (int c = 0; c < s.group; c++) {
                const int64_t column = g * s.group + c;
                put(s, out, i, c, column < s.k ? q[row * s.k + column] : zero);
            }
        }
    }
}

// `count` elements of a row from `column` on as floats, zeros up to `group`.
void load_floats(const Matrix& m, int64_t row, int64_t column, int64_t count, int group, float* out) {
    if (m.type == DType::f32) {
        std::memcpy(out, static_cast<const float*>(m.data) + row * m.stride + column, size_t(count) * 4);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(m.data) + row * m.stride + column;
        for (int64_t c = 0; c < count; c++) out[c] = from_bf16(from[c]);
    }
    std::fill(out + count, out + group, 0.0f);
}

struct Rounding {
    float scale;
    double error;
    int8_t q[128];
};

// x to integers when its largest magnitude, `extreme`, is to become `most`; a negative `most` keeps extreme's sign.
// `compare`: sum the squared errors, too.
void round_to(const float* x, int group, float extreme, float most, int middle, bool compare, Rounding& out) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    const float scale = from_bf16(to_bf16(most < 0 ? extreme / most : (extreme < 0 ? -extreme : extreme) / most));
    const float divisor = scale != 0 ? scale : 1.0f, low = float(-middle), high = float(middle - 1);
    float rounded[128];
    for (int c = 0; c < group; c++) {
        float q = (x[c] / divisor + magic) - magic;
        q = q > low ? q : low;  // also for NaN
        rounded[c] = q < high ? q : high;
    }
    for (int c = 0; c < group; c++) out.q[c] = int8_t(int32_t(rounded[c]));
    out.scale = scale;
    if (!compare) return;
    double errors[4] = {};
    for (int c = 0; c < group; c += 4)
        for (int j = 0; j < 4; j++) {
            const double error = double(rounded[c + j] * scale - x[c + j]);
            errors[j] += error * error;
        }
    out.error = (errors[0] + errors[1]) + (errors[2] + errors[3]);
}

Rounding round_group(const float* x, int group, int bits) {
    float extreme = 0, odd = 0;
    for (int c = 0; c < group; c++) {
        odd += x[c] * 0.0f;
        if ((x[c] < 0 ? -x[c] : x[c]) > (extreme < 0 ? -extreme : extreme)) extreme = x[c];
    }
    Rounding best, next;
    if (bits == 8) {
        round_to(x, group, extreme, 127.0f, 128, false, best);
    } else {
        round_to(x, group, extreme, -8.0f, 8, true, best);
        for (const float most : {-8.7f, 7.0f, 7.7f}) {
            round_to(x, group, extreme, most, 8, true, next);
            if (next.error < best.error) best = next;
        }
    }
    if (odd != 0) best.scale = odd;  // NaN, then
    return best;
}

void round_block(const QuantShape& s, const Matrix& w, int64_t block, char* out) {
    const int middle = 1 << (s.bits - 1);
    float x[128];
    for (int64_t g = 0; g < s.groups(); g++, out += s.group_bytes()) {
        std::memset(out, 0, size_t(s.group_bytes()));
        for (int i = 0; i < group_rows && block * group_rows + i < s.n; i++) {
            const int64_t column = g * s.group;
            load_floats(w, block * group_rows + i, column, std::min<int64_t>(s.group, s.k - column), s.group, x);
            const Rounding rounded = round_group(x, s.group, s.bits);
            const uint16_t scale = to_bf16(rounded.scale);
            std::memcpy(out + i * 2, &scale, 2);
            char* data = out + s.header_bytes() + i * 4;
            for (int c = 0; c < s.group; c += 4, data += c % (32 / s.bits) ? 0 : step_bytes) {
                uint8_t four[4];
                for (int j = 0; j < 4; j++) four[j] = uint8_t(rounded.q[c + j] + middle);
                if (s.bits == 4 && c % 8)
                    for (int j = 0; j < 4; j++) four[j] = uint8_t(four[j] << 4 | uint8_t(data[j]));
                std::memcpy(data, four, 4);
            }
        }
    }
}

Matrix rows_from(Matrix m, int64_t row) {
    if (m.data) m.data = static_cast<char*>(m.data) + row * m.stride * dtype_bytes(m.type);
    return m;
}

}  // namespace

size_t packed_bytes(const QuantShape& shape) { return size_t(shape.blocks() * shape.block_bytes()); }

void pack_weight(const QuantShape& shape, const uint8_t* q, const void* scales, const uint8_t* zeros, char* packed) {
    const std::shared_ptr<Pool> held = current_pool();
    Shares shares(shape.blocks(), held->size());
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t block) {
            pack_block(shape, q, static_cast<const char*>(scales), zeros, block, packed + block * shape.block_bytes());
        });
    });
}

void pack_rounded(const QuantShape& shape, const Matrix& w, char* packed) {
    const std::shared_ptr<Pool> held = current_pool();
    Shares shares(shape.blocks(), held->size());
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t block) { round_block(shape, w, block, packed + block * shape.block_bytes()); });
    });
}

void linear(const QuantCall& c) {
    const Kernels& isa = kernels();
    const std::shared_ptr<Pool> held = current_pool();
    Pool& threads = *held;
    const int workers = threads.size();
    const QuantShape& s = c.shape;
    const int64_t row_bytes = s.groups() * (8 + s.group / columns_per_step * isa.quant_x_step);
    thread_local Scratch packed;
    for (int64_t row = 0; row < c.rows; row += block_rows) {
        const int64_t rows = std::min(c.rows - row, block_rows);
        const Tiles tiles = {rows, (rows + isa.quant_tile_rows - 1) / isa.quant_tile_rows};
        const QuantXArgs pack = {rows_from(c.x, row), tiles, s,
                                 static_cast<char*>(packed.reserve(size_t(rows * row_bytes)))};
        QuantArgs args = {s, c.weight, pack.packed, tiles, {}};
        args.results.n = s.n;
        args.results.activation = c.activation;
        args.results.bias = c.bias;
        args.results.bias_type = c.bias_type;
        args.results.residual = rows_from(c.residual, row);
        args.results.out = rows_from(c.out, row);
        const bool alone = workers == 1 || rows * s.k <= pack_alone;
        if (alone)
            for (int64_t tile = 0; tile < tiles.tiles; tile++) isa.quant_pack_x(pack, tile, 0, s.groups());
        // Few tiles are packed in pieces of some groups.
        const int64_t pieces = std::min((4 * workers + tiles.tiles - 1) / tiles.tiles, s.groups());
        const int64_t blocks = args.results.groups();
        const int64_t parts = std::min((4 * workers + blocks - 1) / blocks, tiles.tiles);
        Shares packing(tiles.tiles * pieces, workers), work(blocks * parts, workers);
        threads.run([&](int worker) {
            if (!alone) {
                packing.each(worker, [&](int64_t item) {
                    const int64_t piece = item % pieces;
                    isa.quant_pack_x(pack, item / pieces, s.groups() * piece / pieces, s.groups() * (piece + 1) / pieces);
                });
                threads.barrier();
            }
            thread_local Scratch scratch;
            auto* sums = static_cast<float*>(scratch.reserve(size_t(rows) * 2 * group_rows * sizeof(float)));
            work.each(worker, [&](int64_t item) {
                const int64_t part = item % parts, tile = tiles.tiles * part / parts;
                isa.quant_block(args, item / parts, tile, tiles.tiles * (part + 1) / parts, sums);
            });
        });
    }
}

}  // namespace quire
