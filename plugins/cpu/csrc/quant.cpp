#include "quant.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "memory.h"
#include "pool.h"
#include "trials.h"

namespace quire {
namespace {

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
    const Kernels& isa = kernels();
    const std::shared_ptr<Pool> held = current_pool();
    Shares shares(shape.blocks(), held->size());
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t block) { isa.quant_round(shape, w, block, packed + block * shape.block_bytes()); });
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
    const Tiles passes = passes_of(c.rows);
    for (int64_t pass = 0; pass < passes.tiles; pass++) {
        const int64_t row = passes.begin(pass), rows = passes.size(pass);
        const Tiles tiles = {rows, (rows + isa.quant_tile_rows - 1) / isa.quant_tile_rows};
        const Fetching fetching(trials(s.bits), rows, int64_t(packed_bytes(s)));
        const QuantXArgs pack = {rows_from(c.x, row), tiles, s,
                                 static_cast<char*>(packed.reserve(size_t(rows * row_bytes)))};
        QuantArgs args = {s, c.weight, pack.packed, tiles, {}};
        args.results.near = fetching.near();
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
