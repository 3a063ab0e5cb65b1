#include "pool.h"

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace quire {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins while `waiting()`; true when it ended within the time. It looks at the clock every hundred pauses.
template <class F>
bool spin(F&& waiting, int microseconds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    do {
        for (int i = 0; i < 100; i++) {
            if (!waiting()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return !waiting();
}

// For waits that are short unless the other thread has lost its core, perhaps to us: then give it up.
template <class F>
void spin_then_yield(F&& waiting) {
    while (!spin(waiting, 20)) std::this_thread::yield();
}

std::vector<int> allowed_cores() {
    std::vector<int> cores;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int core = 0; core < CPU_SETSIZE; core++)
            if (CPU_ISSET(core, &set)) cores.push_back(core);
#endif
    return cores;
}

void bind_to(int core) {
#if defined(__linux__)
    if (core >= CPU_SETSIZE) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // best effort: a container may forbid it
#else
    (void)core;
#endif
}

}  // namespace

Pool::Pool(int threads, const std::vector<int>& cores, int spin_us) : spin_us_(spin_us) {
    if (threads < 1 || threads > max_threads)
        throw std::invalid_argument("threads must be between 1 and " + std::to_string(max_threads) + ", got " +
                                    std::to_string(threads));
    if (!cores.empty() && int(cores.size()) < threads)
        throw std::invalid_argument("cores must name one for each of " + std::to_string(threads) + " threads, or none");
    for (int worker = 1; worker < threads; worker++)
        workers_.emplace_back([this, worker, core = cores.empty() ? -1 : cores[worker]] { work(worker, core); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        job_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::dispatch(Function function, void* context) {
    std::lock_guard<std::mutex> one_job(callers_);
    if (workers_.empty()) return function(context, 0);
    function_ = function;
    context_ = context;
    running_.store(int(workers_.size()), std::memory_order_relaxed);
    job_.fetch_add(1);  // publishes the three above
    // Sequentially consistent on both sides: either we see the sleeper, or it sees the job before it sleeps.
    if (sleeping_.load() > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
    function(context, 0);
    spin_then_yield([&] { return running_.load(std::memory_order_acquire) != 0; });
}

void Pool::work(int worker, int core) {
    if (core >= 0) bind_to(core);
    for (uint64_t done = 0;;) {
        const auto idle = [&] { return job_.load() == done; };
        if (!spin(idle, spin_us_)) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, [&] { return !idle(); });
            sleeping_.fetch_sub(1);
        }
        done++;
        if (stop_) return;
        function_(context_, worker);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

void Pool::barrier() {
    if (workers_.empty()) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == int(workers_.size())) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    spin_then_yield([&] { return phase_.load(std::memory_order_acquire) == phase; });
}

Shares::Shares(int64_t count, int workers) : workers_(workers) {
    for (int worker = 0; worker < workers; worker++) {
        ranges_[worker].next.store(count * worker / workers, std::memory_order_relaxed);
        ranges_[worker].end = count * (worker + 1) / workers;
    }
}

namespace {

std::mutex pool_mutex;
std::shared_ptr<Pool> the_pool;

// The threads of a pool do not survive a fork: the child leaves it as it is (it could not join them) and makes its own.
[[maybe_unused]] void forget_pool() { new std::shared_ptr<Pool>(std::move(the_pool)); }

void replace_pool(int threads, const std::vector<int>& cores, int spin_us) {
#if defined(__linux__)
    static const int registered = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                                                 [] { forget_pool(); pool_mutex.unlock(); });
    (void)registered;
#endif
    the_pool = std::make_shared<Pool>(threads, cores, spin_us);
}

}  // namespace

std::shared_ptr<Pool> current_pool() {
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (!the_pool) {
        std::vector<int> cores = allowed_cores();
        if (int(cores.size()) > Pool::max_threads) cores.resize(Pool::max_threads);
        replace_pool(cores.empty() ? 1 : int(cores.size()), cores, 50);
    }
    return the_pool;
}

void set_threads(int threads, const std::vector<int>& cores, int spin_us) {
    std::lock_guard<std::mutex> lock(pool_mutex);
    replace_pool(threads, cores, spin_us);
}

}  // namespace quire
