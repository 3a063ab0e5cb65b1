#include "linear.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "memory.h"
#include "pool.h"
#include "trials.h"

namespace quire {
namespace {

// Sums that may lie beside a panel of x in the second cache, for groups that take the panel in turns.
constexpr int64_t shared_sums = 512 * 1024;
// Packing less than this is not worth meeting the other threads for.
constexpr int64_t pack_alone = 64 * 1024;

int64_t groups_of(int64_t n) { return (n + group_rows - 1) / group_rows; }

void pack_group(const char* w, int64_t row_bytes, int64_t n, int64_t k, DType type, int64_t group, char* out) {
    const int64_t steps = steps_of(k, type), used = k * dtype_bytes(type);
    // 16 steps of 32 rows at a time: a line of each row, read whole, and 2 KB to write. No processor's own prefetcher
    // follows 32 rows.
    for (int64_t s = 0; s < steps; s += step_block, out += step_block * step_bytes) {
        for (int i = 0; i < group_rows; i++) {
            const int64_t row = group * group_rows + i, from = s * 4;
            if (row < n && from + 64 < used) __builtin_prefetch(w + row * row_bytes + from + 64);
            uint32_t units[step_block] = {};
            if (row < n && from < used)
                std::memcpy(units, w + row * row_bytes + from, size_t(used - from < 64 ? used - from : 64));
            for (int j = 0; j < step_block; j++) std::memcpy(out + j * step_bytes + i * 4, &units[j], 4);
        }
    }
}

// x itself, where its rows already are what packing would make of them.
bool is_packed(const LinearCall& c, const Kernels& isa) {
    const bool same = c.x.type == c.type && isa.x_bytes[int(c.type)] == 4;
    return same && c.rows == 1 && steps_of(c.k, c.type) * 4 == c.k * dtype_bytes(c.type);
}

}  // namespace

size_t packed_bytes(int64_t n, int64_t k, DType type) {
    return size_t(groups_of(n) * steps_of(k, type) * step_bytes);
}

void pack_weight(const void* w, int64_t stride, int64_t n, int64_t k, DType type, char* packed) {
    const int64_t group_bytes = steps_of(k, type) * step_bytes;
    const std::shared_ptr<Pool> held = current_pool();
    Shares shares(groups_of(n), held->size());
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t group) {
            pack_group(static_cast<const char*>(w), stride * dtype_bytes(type), n, k, type, group,
                       packed + group * group_bytes);
        });
    });
}

void linear(const LinearCall& c) {
    const Kernels& isa = kernels();
    const std::shared_ptr<Pool> held = current_pool();
    Pool& threads = *held;
    const int type = int(c.type), workers = threads.size();
    const int64_t steps = steps_of(c.k, c.type);
    const Tiles passes = passes_of(c.rows);
    thread_local Scratch packed;
    for (int64_t pass = 0; pass < passes.tiles; pass++) {
        const int64_t row = passes.begin(pass), rows = passes.size(pass);
        const Tiles tiles = {rows, (rows + isa.max_tile_rows[type] - 1) / isa.max_tile_rows[type]};
        PackXArgs pack = {rows_from(c.x, row), tiles, c.k, steps, c.type, nullptr};
        const Fetching fetching(trials(16), rows, int64_t(packed_bytes(c.n, c.k, c.type)));
        LinearArgs args = {c.weight, nullptr, tiles, steps, c.type, c.n, c.activation, c.bias, c.bias_type,
                           rows_from(c.residual, row), rows_from(c.out, row), fetching.near()};
        const bool ready = is_packed(c, isa), alone = workers == 1 || rows * c.k <= pack_alone;
        if (ready) {
            args.x = static_cast<const char*>(c.x.data);
        } else {
            pack.packed = static_cast<char*>(packed.reserve(size_t(rows * steps * isa.x_bytes[type])));
            args.x = pack.packed;
            if (alone)
                for (int64_t tile = 0; tile < tiles.tiles; tile++) isa.pack_x(pack, tile);
        }
        // With many threads for few groups, several share one and split its tiles; long rows of x, which the second
        // cache cannot hold, meet several groups at a time.
        const int64_t groups = args.groups(), group_sums = rows * group_rows * 4 * (args.columns() < c.n ? 2 : 1);
        const int64_t parts = std::min((4 * workers + groups - 1) / groups, tiles.tiles);
        const int64_t together = steps > 2 * panel_steps ? std::min(shared_sums / group_sums, groups / (2 * workers)) : 1;
        const int64_t chunk = std::max<int64_t>(together, 1), chunks = (groups + chunk - 1) / chunk;
        Shares packing(tiles.tiles, workers), work(chunks * parts, workers);
        threads.run([&](int worker) {
            if (!ready && !alone) {
                packing.each(worker, [&](int64_t tile) { isa.pack_x(pack, tile); });
                threads.barrier();
            }
            thread_local Scratch scratch;
            auto* sums = static_cast<float*>(scratch.reserve(size_t(chunk * group_sums)));
            work.each(worker, [&](int64_t item) {
                const int64_t part = item % parts, group = item / parts * chunk;
                isa.linear_groups(args, group, std::min(group + chunk, groups), tiles.tiles * part / parts,
                                  tiles.tiles * (part + 1) / parts, sums);
            });
        });
    }
}

}  // namespace quire
