#include "attention_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace quire {
namespace {

// Query rows of a task, about: enough that keys and values are seldom read again, few enough that tasks are many.
constexpr int task_rows = 56;
// A task of one range of queries is cut at tiles only to give every thread several tasks, and not below two tiles.
constexpr int tasks_per_thread = 4, least_tiles = 2;
constexpr int64_t write_block = 32;  // tokens that a thread stores at once

int64_t cost(const AttentionTask& task, int group) {
    return int64_t(task.tile1 - task.tile0) * (4 + (task.q1 - task.q0) * group);
}

void clear_rows(const Matrix& m, int64_t begin, int64_t end, int64_t width) {
    const int64_t size = dtype_bytes(m.type);
    for (int64_t row = begin; row < end; row++)
        std::memset(static_cast<char*>(m.data) + row * m.stride * size, 0, size_t(width * size));
}

// All tasks, none cut: ranges of queries of each sequence and KV head, with all the tiles they see.
std::vector<AttentionTask> whole_tasks(const AttentionPlan& plan, int kv_heads, int group, int64_t window) {
    const int32_t queries = std::max(1, task_rows / group);
    std::vector<AttentionTask> tasks;
    for (int32_t n = 0; n < plan.sequences(); n++) {
        const int32_t count = plan.query_start()[n + 1] - plan.query_start()[n], context = plan.context_lens()[n];
        if (context == 0) continue;
        for (int32_t q0 = 0; q0 < count; q0 += queries) {
            const int32_t q1 = std::min(count, q0 + queries);
            const int64_t first = context - count + q0, last = context - count + q1 - 1;
            const int64_t begin = std::max<int64_t>(0, first - window + 1);
            for (int32_t head = 0; head < kv_heads; head++)
                tasks.push_back({n, head, q0, q1, int32_t(begin / key_tile), int32_t(last / key_tile + 1), -1});
        }
    }
    return tasks;
}

}  // namespace

void AttentionPlan::update(const int32_t* query_start, const int32_t* context_lens, int32_t sequences) {
    for (int32_t n = 0; n < sequences; n++) {
        const int32_t count = query_start[n + 1] - query_start[n];
        if (count < 0 || context_lens[n] < 0 || (context_lens[n] > 0 && context_lens[n] < count))
            throw std::invalid_argument("sequence " + std::to_string(n) + " has " + std::to_string(count) +
                                        " new tokens, but a context of " + std::to_string(context_lens[n]));
    }
    query_start_.assign(query_start, query_start + sequences + 1);
    context_lens_.assign(context_lens, context_lens + sequences);
    works_.clear();
}

const AttentionWork& AttentionPlan::work(int kv_heads, int group, int64_t window, int threads) {
    const Key key = {kv_heads, group, window, threads};
    for (const auto& [known, work] : works_)
        if (known == key) return work;
    AttentionWork work;
    const std::vector<AttentionTask> whole = whole_tasks(*this, kv_heads, group, window);
    int64_t total = 0;
    for (const AttentionTask& task : whole) total += cost(task, group);
    const int64_t fair = threads == 1 ? total : total / (threads * tasks_per_thread);
    for (AttentionTask task : whole) {
        const int32_t tiles = task.tile1 - task.tile0, rows = (task.q1 - task.q0) * group;
        work.max_rows = std::max(work.max_rows, int(rows));
        const int64_t pieces = std::min<int64_t>(fair ? (cost(task, group) + fair - 1) / fair : 1, tiles / least_tiles);
        if (pieces <= 1) {
            work.tasks.push_back(task);
            continue;
        }
        task.partial = work.partial_rows;
        work.partial_rows += int64_t(tiles) * rows;
        work.split.push_back(task);
        for (int64_t piece = 0; piece < pieces; piece++) {
            AttentionTask part = task;
            part.tile0 = task.tile0 + int32_t(tiles * piece / pieces);
            part.tile1 = task.tile0 + int32_t(tiles * (piece + 1) / pieces);
            part.partial = task.partial + int64_t(part.tile0 - task.tile0) * rows;
            work.tasks.push_back(part);
        }
    }
    std::stable_sort(work.tasks.begin(), work.tasks.end(), [&](const AttentionTask& a, const AttentionTask& b) {
        return cost(a, group) > cost(b, group);
    });
    works_.emplace_back(key, std::move(work));
    return works_.back().second;
}

void attention(AttentionArgs args, AttentionPlan& plan, int kv_heads, int64_t tokens) {
    const Kernels& isa = kernels();
    const std::shared_ptr<Pool> held = current_pool();
    Pool& threads = *held;
    args.query_start = plan.query_start();
    args.context_lens = plan.context_lens();
    const int32_t sequences = plan.sequences();
    const int64_t width = int64_t(kv_heads) * args.group * args.layout.head_dim;
    clear_rows(args.out, 0, args.query_start[0], width);
    clear_rows(args.out, args.query_start[sequences], tokens, width);
    for (int32_t n = 0; n < sequences; n++)
        if (args.context_lens[n] == 0) clear_rows(args.out, args.query_start[n], args.query_start[n + 1], width);

    const AttentionWork& work = plan.work(kv_heads, args.group, args.window, threads.size());
    if (work.tasks.empty()) return;
    const int64_t row_floats = partial_row(args.layout);
    thread_local Scratch partial;
    if (work.partial_rows)
        args.partial = static_cast<float*>(partial.reserve(size_t(work.partial_rows * row_floats) * sizeof(float)));
    std::atomic<size_t> next{0}, next_split{0};  // the largest tasks first, whoever is free
    threads.run([&](int) {
        thread_local Scratch scratch;
        auto* memory = static_cast<char*>(scratch.reserve(size_t(isa.attention_scratch(args, work.max_rows))));
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < work.tasks.size();) {
            AttentionTask task = work.tasks[i];
            if (task.partial >= 0) task.partial *= row_floats;
            AttentionArgs mine = args;
            const size_t then = next.load(std::memory_order_relaxed);
            mine.after = then < work.tasks.size() ? &work.tasks[then] : nullptr;
            isa.attention_task(mine, task, memory);
        }
        if (work.split.empty()) return;
        threads.barrier();
        for (size_t i; (i = next_split.fetch_add(1, std::memory_order_relaxed)) < work.split.size();) {
            AttentionTask all = work.split[i];
            all.partial *= row_floats;
            isa.attention_finish(args, all, memory);
        }
    });
}

void check_slots(const WriteKVArgs& args, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++)
        if (args.slots[t] < 0 || args.slots[t] >= args.slot_count)
            throw std::out_of_range("slot " + std::to_string(args.slots[t]) + " of token " + std::to_string(t) +
                                    " is not in a pool of " + std::to_string(args.slot_count));
}

void write_kv(const WriteKVArgs& args, int64_t tokens) {
    check_slots(args, tokens);
    const Kernels& isa = kernels();
    const std::shared_ptr<Pool> held = current_pool();
    const int64_t blocks = (tokens + write_block - 1) / write_block;
    if (blocks <= 1) return isa.write_kv(args, 0, tokens);
    Shares shares(blocks, held->size());
    held->run([&](int worker) {
        shares.each(worker, [&](int64_t block) {
            isa.write_kv(args, block * write_block, std::min(tokens, (block + 1) * write_block));
        });
    });
}

}  // namespace quire
