// How products of few rows fetch their weights: near ahead, in one stream with the processor's own prefetcher, or far.
//
// Few rows leave the processor's prefetcher time to run ahead, and a far fetch is then only in its way; with more rows it
// falls behind, and far keeps up. Where the one turns into the other differs between processors and kinds of weights. So
// the first products of weights that no cache holds try both in turns, for each number of rows, and the median of their
// times decides. No bit depends on it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace quire {

class Trials {
public:
    static constexpr int64_t most_rows = 8;      // more rows do not wait for memory alone
    static constexpr int64_t least = 4ll << 20;  // bytes of a weight
    static constexpr int samples = 48;           // of each way
    static constexpr int undecided = -1;

    struct Choice {
        bool near, timed;  // timed: took() is to be told how long it took
    };
    Choice choose(int64_t rows, int64_t bytes);
    void took(int64_t rows, Choice choice, double seconds);

    // 1 near, 0 far, or undecided.
    int decided(int64_t rows) const;
    void forget();

private:
    struct Trial {
        std::atomic<int> decided{undecided};
        int64_t bytes = 0;  // of the weights that are compared: all of the first one's size
        int asked = 0, count[2] = {};
        double seconds[2][samples];
    };

    std::mutex mutex_;
    Trial trials_[most_rows];
};

Trials& trials(int bits);  // of the weights: 4, 8, or 16 for all that are not integers
// Another instruction set is in use.
void forget_trials();

// How one product fetches: while it is tried, its life is what is timed.
class Fetching {
public:
    Fetching(Trials& trials, int64_t rows, int64_t bytes)
        : trials_(trials), rows_(rows), choice_(trials.choose(rows, bytes)), start_(now()) {}
    ~Fetching() {
        if (choice_.timed) trials_.took(rows_, choice_, std::chrono::duration<double>(now() - start_).count());
    }
    Fetching(const Fetching&) = delete;
    Fetching& operator=(const Fetching&) = delete;
    bool near() const { return choice_.near; }

private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point now() const { return choice_.timed ? Clock::now() : Clock::time_point(); }

    Trials& trials_;
    const int64_t rows_;
    const Trials::Choice choice_;
    const Clock::time_point start_;
};

}  // namespace quire
