#include "trials.h"

#include <algorithm>

namespace quire {

Trials::Choice Trials::choose(int64_t rows, int64_t bytes) {
    if (rows > most_rows) return {false, false};
    Trial& trial = trials_[rows - 1];
    const int decided = trial.decided.load(std::memory_order_relaxed);
    if (decided != undecided) return {decided == 1, false};
    if (bytes < least) return {false, false};
    std::lock_guard<std::mutex> lock(mutex_);
    if (trial.bytes == 0) trial.bytes = bytes;
    if (trial.bytes != bytes) return {false, false};
    return {trial.asked++ % 2 == 1, true};
}

void Trials::took(int64_t rows, Choice choice, double seconds) {
    std::lock_guard<std::mutex> lock(mutex_);
    Trial& trial = trials_[rows - 1];
    int& count = trial.count[choice.near];
    if (trial.decided != undecided || count == samples) return;
    trial.seconds[choice.near][count++] = seconds;
    if (trial.count[0] < samples || trial.count[1] < samples) return;
    for (double* times : trial.seconds) std::nth_element(times, times + samples / 2, times + samples);
    trial.decided = trial.seconds[1][samples / 2] < trial.seconds[0][samples / 2];
}

int Trials::decided(int64_t rows) const {
    return rows < 1 || rows > most_rows ? undecided : trials_[rows - 1].decided.load();
}

void Trials::forget() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Trial& trial : trials_) {
        trial.decided = undecided;
        trial.bytes = 0;
        trial.asked = trial.count[0] = trial.count[1] = 0;
    }
}

Trials& trials(int bits) {
    static Trials all[3];
    return all[bits == 4 ? 0 : bits == 8 ? 1 : 2];
}

void forget_trials() {
    for (const int bits : {4, 8, 16}) trials(bits).forget();
}

}  // namespace quire
