// The plugin's own threads. A job is a function that every worker calls once; the calling thread is worker 0.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

class Pool {
public:
    static constexpr int max_threads = 256;

    // Thread i beyond the caller's (0) is bound to cores[i], unless `cores` is empty. After a job they watch for the next
    // one for `spin_us` microseconds, then sleep.
    Pool(int threads, const std::vector<int>& cores, int spin_us);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return int(workers_.size()) + 1; }

    // f(worker) on every worker; returns when all have finished. Jobs of different callers queue up.
    template <class F>
    void run(F&& f) {
        dispatch([](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &f);
    }

    // Inside a job: returns when every worker has called it.
    void barrier();

private:
    using Function = void (*)(void* context, int worker);

    void dispatch(Function function, void* context);
    void work(int worker, int core);

    std::mutex callers_;
    std::vector<std::thread> workers_;
    const int spin_us_;

    alignas(64) std::atomic<uint64_t> job_{0};  // counts jobs: a new value is the signal to start
    Function function_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Items 0 .. count-1, a contiguous range for each worker, so that each streams through memory of its own. Who is done
// takes items from the ranges of the others: a core that another program keeps busy delays nobody for long.
class Shares {
public:
    Shares(int64_t count, int workers);

    template <class F>
    void each(int worker, F&& f) {
        for (int i = 0; i < workers_; i++) {
            Range& range = ranges_[(worker + i) % workers_];
            while (range.next.load(std::memory_order_relaxed) < range.end) {
                const int64_t item = range.next.fetch_add(1, std::memory_order_relaxed);
                if (item < range.end) f(item);
            }
        }
    }

private:
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const int workers_;
    Range ranges_[Pool::max_threads];
};

// The pool in use. It is made at the first call, and again in a process that has been forked. Who computes holds on to
// it, so that set_threads may replace it meanwhile.
std::shared_ptr<Pool> current_pool();
void set_threads(int threads, const std::vector<int>& cores, int spin_us);

}  // namespace quire
