#include "embedding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bf16.h"
#include "pool.h"

namespace quire {
namespace {

// Elements below which meeting the other threads costs more than they save.
constexpr int64_t worth_sharing = 32 * 1024;

// f(row, id) for each of the ids, after a look at all of them.
template <class F>
void for_each_id(const int64_t* ids, int64_t count, int64_t vocabulary, int64_t columns, F&& f) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocabulary)
            throw std::out_of_range("token id " + std::to_string(ids[i]) + " is not in a vocabulary of " +
                                    std::to_string(vocabulary));
    const std::shared_ptr<Pool> held = current_pool();
    const int workers = held->size();
    if (workers == 1 || count < 2 || count * columns < worth_sharing) {
        for (int64_t i = 0; i < count; i++) f(i, ids[i]);
        return;
    }
    const int64_t pieces = std::min<int64_t>(count, 4 * workers);
    Shares shares(pieces, workers);
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t piece) {
            for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; i++) f(i, ids[i]);
        });
    });
}

char* row_of(const Matrix& m, int64_t row) {
    return static_cast<char*>(m.data) + row * m.stride * dtype_bytes(m.type);
}

void store(const Matrix& m, char* row, int64_t column, float value) {
    if (m.type == DType::f32) {
        std::memcpy(row + column * 4, &value, 4);
    } else {
        const uint16_t narrow = to_bf16(value);
        std::memcpy(row + column * 2, &narrow, 2);
    }
}

}  // namespace

void embed(const Matrix& table, int64_t vocabulary, int64_t columns, const int64_t* ids, int64_t count,
           const Matrix& out) {
    for_each_id(ids, count, vocabulary, columns, [&](int64_t row, int64_t id) {
        std::memcpy(row_of(out, row), row_of(table, id), size_t(columns * dtype_bytes(table.type)));
    });
}

void embed_packed(const char* packed, int64_t n, int64_t k, DType type, const int64_t* ids, int64_t count,
                  const Matrix& out) {
    const int64_t bytes = k * dtype_bytes(type), group_bytes = steps_of(k, type) * step_bytes;
    for_each_id(ids, count, n, k, [&](int64_t row, int64_t id) {
        const char* from = packed + id / group_rows * group_bytes + id % group_rows * 4;
        char* to = row_of(out, row);
        int64_t at = 0;
        for (; at + 4 <= bytes; at += 4, from += step_bytes) std::memcpy(to + at, from, 4);
        std::memcpy(to + at, from, size_t(bytes - at));  // half of the last pair of an odd k
    });
}

void embed_packed(const QuantShape& s, const char* packed, const int64_t* ids, int64_t count, const Matrix& out) {
    for_each_id(ids, count, s.n, s.k, [&](int64_t row, int64_t id) {
        const int64_t i = id % group_rows;
        const char* group = packed + id / group_rows * s.block_bytes();
        char* to = row_of(out, row);
        for (int64_t begin = 0; begin < s.k; begin += s.group, group += s.group_bytes()) {
            float scale;
            int32_t zero = 1 << (s.bits - 1);
            if (s.scales == DType::f32) {
                std::memcpy(&scale, group + i * 4, 4);
            } else {
                uint16_t narrow;
                std::memcpy(&narrow, group + i * 2, 2);
                scale = from_bf16(narrow);
            }
            if (s.zeros) std::memcpy(&zero, group + s.scales_bytes() + i * 4, 4);
            const char* data = group + s.header_bytes() + i * 4;
            const int used = int(std::min<int64_t>(s.group, s.k - begin));
            for (int c = 0; c < used; c++) {
                const int step = c / columns_per_step, byte = c % columns_per_step;
                const auto stored = uint8_t(data[(s.bits == 8 ? step : step / 2) * step_bytes + byte]);
                const int q = s.bits == 8 ? stored : stored >> (step % 2 * 4) & 15;
                store(out, to, begin + c, float(q - zero) * scale);
            }
        }
    });
}

}  // namespace quire
