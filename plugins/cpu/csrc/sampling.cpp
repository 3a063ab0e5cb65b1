#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace quire {
namespace {

constexpr int64_t piece_blocks = 256;  // of a row, for one thread at a time
constexpr int64_t candidates = 256;    // maxima whose logits are looked at first when only top-p cuts
constexpr int bins = 1024;             // for rows where they are not enough
constexpr float infinity = std::numeric_limits<float>::infinity();

struct Candidate {
    float logit, weight;
    int64_t id;
};

bool larger(const Candidate& a, const Candidate& b) { return a.logit > b.logit; }

struct RowView {
    const float* x;
    int64_t columns;
    const float* peaks;  // [blocks]
    int64_t blocks;
    float best;  // infinite: no token can be chosen
};

float best_of(const float* peaks, int64_t blocks) {
    const float best = *std::max_element(peaks, peaks + blocks);
    return std::isfinite(best) ? best : infinity;
}

// A bound that at least `count` logits reach, if there are so many.
float bound_of(const RowView& row, int64_t count) {
    if (count > row.blocks) return -infinity;
    std::vector<float> peaks(row.peaks, row.peaks + row.blocks);
    std::nth_element(peaks.begin(), peaks.begin() + (count - 1), peaks.end(), std::greater<float>());
    return peaks[size_t(count - 1)];
}

// Logits that reach the bound, in order of their ids, without weights.
std::vector<Candidate> collect(const RowView& row, float bound) {
    std::vector<Candidate> found;
    for (int64_t b = 0; b < row.blocks; b++) {
        if (!(row.peaks[b] >= bound)) continue;
        const int64_t end = std::min(row.columns, (b + 1) * peak_block);
        for (int64_t i = b * peak_block; i < end; i++)
            if (row.x[i] >= bound) found.push_back({row.x[i], 0.0f, i});
    }
    return found;
}

void drop_below(std::vector<Candidate>& list, float threshold) {
    list.erase(std::remove_if(list.begin(), list.end(), [&](const Candidate& c) { return c.logit < threshold; }),
               list.end());
}

double mass_of(const std::vector<Candidate>& list) {
    double mass = 0;
    for (const Candidate& c : list) mass += c.weight;
    return mass;
}

// The smallest logit of the fewest largest ones whose weights and `before` reach `goal` together (all of them do).
float nucleus_of(std::vector<Candidate> list, double before, double goal) {
    auto begin = list.begin(), end = list.end();
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, larger);
        double mass = 0;
        for (auto c = begin; c != middle; ++c) mass += c->weight;
        if (before + mass >= goal) {
            end = middle;
        } else {
            before += mass;
            begin = middle;
        }
    }
    return begin->logit;
}

double goal_of(double uniform, double total) { return std::min(std::floor(uniform * total), total - 1); }

class Draw {
public:
    Draw(const SampleArgs& args, int64_t n, const RowView& row, const double* sums)
        : a_(args), isa_(kernels()), n_(n), row_(row), sums_(sums) {}

    static bool cuts_by_count(const SampleArgs& a, int64_t n) { return a.top_k[n] > 0 && a.top_k[n] < a.columns; }
    static float least(const SampleArgs& a, int64_t n) { return a.min_p[n] * weight_one; }

    int64_t token() const {
        if (row_.best == infinity) return -1;
        if (a_.temperature[n_] == 0) return first_of_best();
        if (cuts_by_count(a_, n_)) return among_top_k();
        if (a_.top_p[n_] < 1) return among_nucleus();
        return among_all();
    }

private:
    int64_t first_of_best() const {
        int64_t block = 0;
        while (row_.peaks[block] != row_.best) block++;
        int64_t i = block * peak_block;
        while (row_.x[i] != row_.best) i++;
        return i;
    }

    void weigh(std::vector<Candidate>& list) const {
        std::vector<float> x(list.size()), w(list.size());
        for (size_t i = 0; i < list.size(); i++) x[i] = list[i].logit;
        isa_.logit_weights(x.data(), int64_t(x.size()), row_.best, a_.temperature[n_], least(a_, n_), w.data());
        for (size_t i = 0; i < list.size(); i++) list[i].weight = w[i];
    }

    int64_t among_top_k() const {
        const int64_t k = a_.top_k[n_];
        std::vector<Candidate> list = collect(row_, bound_of(row_, k));
        std::vector<Candidate> order = list;
        std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), larger);
        drop_below(list, order[size_t(k - 1)].logit);
        weigh(list);
        if (a_.top_p[n_] < 1) drop_below(list, nucleus_of(list, 0, double(a_.top_p[n_]) * mass_of(list)));
        return pick(list);
    }

    int64_t among_nucleus() const {
        double total = 0;
        for (int64_t b = 0; b < row_.blocks; b++) total += sums_[b];
        const double goal = double(a_.top_p[n_]) * total;
        std::vector<Candidate> list = collect(row_, bound_of(row_, candidates));
        weigh(list);
        if (mass_of(list) < goal) return among_wide_nucleus(goal);
        drop_below(list, nucleus_of(list, 0, goal));
        return pick(list);
    }

    // A flat row: logits are sorted into bins by their distance from the largest, and only one bin is looked into.
    int64_t among_wide_nucleus(double goal) const {
        std::vector<float> w(size_t(row_.columns));
        isa_.logit_weights(row_.x, row_.columns, row_.best, a_.temperature[n_], least(a_, n_), w.data());
        const float scale = float(bins) / (25.0f * a_.temperature[n_]);  // from a distance of 24.3 on a weight is 0
        const auto bin_of = [&](int64_t i) { return std::min(bins - 1, int((row_.best - row_.x[i]) * scale)); };
        std::vector<double> mass(bins);
        for (int64_t i = 0; i < row_.columns; i++)
            if (w[i] > 0) mass[size_t(bin_of(i))] += w[i];
        int bin = 0;
        double before = 0;
        for (; bin + 1 < bins && before + mass[size_t(bin)] < goal; bin++) before += mass[size_t(bin)];
        std::vector<Candidate> list;
        for (int64_t i = 0; i < row_.columns; i++)
            if (w[i] > 0 && bin_of(i) == bin) list.push_back({row_.x[i], w[i], i});
        const float threshold = nucleus_of(list, before, goal);
        double total = 0, sum = 0;
        for (int64_t i = 0; i < row_.columns; i++) total += row_.x[i] >= threshold ? w[i] : 0.0f;
        const double share = goal_of(a_.uniform[n_], total);
        for (int64_t i = 0; i < row_.columns; i++)
            if (row_.x[i] >= threshold && (sum += w[i]) > share) return i;
        return list.back().id;
    }

    // The first token whose cumulative weight exceeds the row's share of the total.
    int64_t pick(const std::vector<Candidate>& list) const {
        const double goal = goal_of(a_.uniform[n_], mass_of(list));
        double sum = 0;
        for (const Candidate& c : list)
            if ((sum += c.weight) > goal) return c.id;
        return list.back().id;
    }

    int64_t among_all() const {
        double total = 0, before = 0;
        for (int64_t b = 0; b < row_.blocks; b++) total += sums_[b];
        const double goal = goal_of(a_.uniform[n_], total);
        int64_t b = 0;
        for (; b + 1 < row_.blocks && before + sums_[b] <= goal; b++) before += sums_[b];
        const int64_t from = b * peak_block, count = std::min<int64_t>(peak_block, row_.columns - from);
        float w[peak_block];
        isa_.logit_weights(row_.x + from, count, row_.best, a_.temperature[n_], least(a_, n_), w);
        for (int64_t i = 0; i < count; i++)
            if ((before += w[i]) > goal) return from + i;
        return row_.columns - 1;
    }

    const SampleArgs& a_;
    const Kernels& isa_;
    int64_t n_;
    RowView row_;
    const double* sums_;
};

// Runs both passes over all rows, then finish(row, view, sums) for each. `weighs(n)`: whether a row needs the sums of
// its weights, at temperature(n) with nothing below least(n).
template <class Weighs, class Temperature, class Least, class Finish>
void over_logits(const Matrix& logits, int64_t columns, int64_t rows, Weighs&& weighs, Temperature&& temperature,
                 Least&& least, Finish&& finish) {
    if (!rows) return;
    const Kernels& isa = kernels();
    const std::shared_ptr<Pool> held = current_pool();
    Pool& threads = *held;
    const int64_t blocks = (columns + peak_block - 1) / peak_block, pieces = (blocks + piece_blocks - 1) / piece_blocks;
    std::vector<float> peaks(size_t(rows * blocks));
    std::vector<double> sums(size_t(rows * blocks));
    Shares first(rows * pieces, threads.size()), second(rows * pieces, threads.size()), last(rows, threads.size());
    const auto row_of = [&](int64_t n) { return static_cast<const float*>(logits.data) + n * logits.stride; };
    const auto piece_of = [&](int64_t item, auto&& f) {
        const int64_t n = item / pieces, block = item % pieces * piece_blocks, from = block * peak_block;
        f(n, block, from, std::min(piece_blocks * peak_block, columns - from));
    };
    threads.run([&](int worker) {
        first.each(worker, [&](int64_t item) {
            piece_of(item, [&](int64_t n, int64_t block, int64_t from, int64_t count) {
                isa.logit_peaks(row_of(n) + from, count, peaks.data() + n * blocks + block);
            });
        });
        threads.barrier();
        second.each(worker, [&](int64_t item) {
            piece_of(item, [&](int64_t n, int64_t block, int64_t from, int64_t count) {
                const float best = best_of(peaks.data() + n * blocks, blocks);
                if (best == infinity || !weighs(n)) return;
                isa.weight_sums(row_of(n) + from, count, best, temperature(n), least(n),
                                sums.data() + n * blocks + block);
            });
        });
        threads.barrier();
        last.each(worker, [&](int64_t n) {
            const float* own = peaks.data() + n * blocks;
            finish(n, RowView{row_of(n), columns, own, blocks, best_of(own, blocks)}, sums.data() + n * blocks);
        });
    });
}

}  // namespace

void sample(const SampleArgs& a, int64_t rows) {
    over_logits(
        a.logits, a.columns, rows, [&](int64_t n) { return a.temperature[n] != 0 && !Draw::cuts_by_count(a, n); },
        [&](int64_t n) { return a.temperature[n]; }, [&](int64_t n) { return Draw::least(a, n); },
        [&](int64_t n, const RowView& row, const double* sums) { a.out[n] = Draw(a, n, row, sums).token(); });
}

void logprobs(const LogprobArgs& a, int64_t rows) {
    const auto finish = [&](int64_t n, const RowView& row, const double* sums) {
        int64_t* ids = a.ids + n * (1 + a.count);
        float* values = a.values + n * (1 + a.count);
        ids[0] = a.chosen[n];
        a.ranks[n] = 1;
        if (row.best == infinity) {  // nothing is likely: the caller fails such a row
            for (int64_t i = 0; i < a.count; i++) ids[1 + i] = i;
            std::fill(values, values + 1 + a.count, std::numeric_limits<float>::quiet_NaN());
            return;
        }
        const float picked = row.x[ids[0]];
        for (int64_t b = 0; b < row.blocks; b++) {
            if (!(row.peaks[b] > picked)) continue;
            const int64_t end = std::min(row.columns, (b + 1) * peak_block);
            for (int64_t i = b * peak_block; i < end; i++) a.ranks[n] += row.x[i] > picked;
        }
        if (a.count) {
            std::vector<Candidate> list = collect(row, bound_of(row, a.count));
            std::partial_sort(list.begin(), list.begin() + a.count, list.end(), [](const auto& x, const auto& y) {
                return x.logit > y.logit || (x.logit == y.logit && x.id < y.id);
            });
            for (int64_t i = 0; i < a.count; i++) ids[1 + i] = list[size_t(i)].id;
        }
        double total = 0;
        for (int64_t b = 0; b < row.blocks; b++) total += sums[b];
        const double normalizer = double(row.best) + std::log(total / double(weight_one));
        for (int64_t i = 0; i <= a.count; i++) values[i] = float(double(row.x[ids[i]]) - normalizer);
    };
    over_logits(a.logits, a.columns, rows, [](int64_t) { return true; }, [](int64_t) { return 1.0f; },
                [](int64_t) { return 0.0f; }, finish);
}

}  // namespace quire
