// How products of few rows fetch their weights: near ahead, in one stream with the processor's own prefetcher, or far.
//
// On Zen 3 near reads faster, elsewhere far may keep up better, and nothing says so beforehand. So the first products of
// weights that no cache holds try both in turns, for each number of rows, and the median of their times decides. No bit
// depends on it.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace quire {

class Trials {
public:
    static constexpr int64_t most_rows = 8;      // more rows do not wait for memory alone
    static constexpr int64_t least = 8ll << 20;  // bytes of a weight
    static constexpr int samples = 48;           // of each way
    static constexpr int undecided = -1;

    struct Choice {
        bool near, timed;  // timed: took() is to be told how long it took
    };
    Choice choose(int64_t rows, int64_t bytes);
    void took(int64_t rows, Choice choice, double seconds);

    // 1 near, 0 far, or undecided.
    int decided(int64_t rows) const;
    // Another instruction set is in use.
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

Trials& trials();

}  // namespace quire
