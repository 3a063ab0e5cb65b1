// Attention by AMX tiles: bfloat16 queries against keys and values that are bfloat16, or become it without loss.
//
// The same sums whatever the task: scores go over the channels in steps of 32, weighted values over the keys of a tile
// in slices of 32, both from the first on, each row for itself. A task is a sequence of jobs, one for each tile of keys
// and 16 rows; while the softmax of one job runs on the vector unit, the tile unit makes the scores of the next and the
// values of the one before: eight rounds of one slice each, that the processor overlaps.
#pragma once

#include "amx.h"
#include "attention_pages.h"
#include "attention_rows.h"

#if defined(__AMX_BF16__)

namespace quire::QUIRE_ISA {
namespace {

constexpr int slices_of_tile = key_tile / slice_keys;
constexpr int weight_stride = key_tile * 2 + 64;  // bytes
constexpr int tile_bytes = tile_rows * tile_row_bytes;
constexpr int pass_tiles = 4;  // tiles of channels whose sums stay in registers

// Tiles 0 to 3: sums of values; 6 and 7: scores; 4: queries or weights; 5: keys or values.
QUIRE_INLINE void configure_attention(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) set_tile(config, tile, tile == 5 ? tile_rows : rows);
    asm volatile("ldtilecfg %0" ::"m"(config));
}

// Denormals are zero, as they are for the tile unit; they would only cost time.
class FlushDenormals {
public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

private:
    const unsigned before_;
};

// Where the blocks of a tile of keys are. Those of a slice that is not read in full point to one that is.
struct KeyTile {
    int64_t index;
    const char *keys[blocks_of_tile], *values[blocks_of_tile];
    unsigned ready_keys, ready_values;  // slices that lie converted in the task's memory
    int first, last;                    // blocks that the task reads
    bool ready_scales;
    float key_scales[key_tile], value_scales[key_tile];  // of integers; with the scale of all scores
};

// 16 rows of a task against a tile of keys.
struct Job {
    KeyTile* tile;
    int row0, begin, end;  // rows row0 + begin .. row0 + end - 1 see some of the tile
    int64_t see0, see1;    // keys that any of them sees, counted in the tile
    int first, last;       // slices
    unsigned ready_edges;
    float* scores;         // [row][score_stride]
    char* weights;         // [row][weight_stride bytes]
    float maximum[tile_rows], sum[tile_rows];
};

// Fetches the blocks of a tile of keys while something else is computed, a few lines at a time and evenly: a burst of many
// would hold up what comes after it, and memory that waits for the next burst is lost time.
class Stream {
public:
    // `points`: how often pull() is called for a tile.
    Stream(const KVLayout& l, int points)
        : key_bytes_(l.key_block_bytes()), value_bytes_(l.value_block_bytes()),
          rate_(unsigned(blocks_of_tile * (key_bytes_ + value_bytes_) / 64 * 65536 / points) + 1) {}

    void start(const KeyTile* tile) {
        tile_ = tile;
        run_ = tile ? 2 * tile->first : 0;
        at_ = end_ = 0;
    }
    __attribute__((always_inline)) void pull() {
        due_ += rate_;
        for (; due_ >= 65536 && (at_ < end_ || next_run()); due_ -= 65536, at_ += 64) prefetch_l2(at_);
        due_ &= 65535;
    }
    void drain() {
        for (; at_ < end_ || next_run(); at_ += 64) prefetch_l2(at_);
    }

private:
    // A block's keys, its values, the next block's keys, and so on, as far as they follow each other in memory.
    __attribute__((noinline)) bool next_run() {
        if (!tile_ || run_ >= 2 * tile_->last) return false;
        at_ = end_ = address(run_);
        for (; run_ < 2 * tile_->last && address(run_) == end_; run_++) end_ += run_ % 2 ? value_bytes_ : key_bytes_;
        return true;
    }
    uintptr_t address(int run) const {
        return reinterpret_cast<uintptr_t>((run % 2 ? tile_->values : tile_->keys)[run / 2]);
    }

    const KeyTile* tile_ = nullptr;
    const int64_t key_bytes_, value_bytes_;
    const unsigned rate_;  // lines, in 65536ths
    unsigned due_ = 0;
    uintptr_t at_ = 0, end_ = 0;
    int run_ = 0;
};

template <class Pages>
class TileTask {
public:
    TileTask(const AttentionArgs& a, const AttentionTask& task, char* scratch);
    void run();

private:
    int64_t position(int64_t row) const { return position0_ + row / a_.group; }
    void find_blocks(KeyTile& tile, const AttentionTask& task, int64_t begin, int64_t end, int64_t index);
    void find_ahead(int64_t index);
    bool next_job(Job& job);
    const char* keys_of(Job& job, int slice);
    const char* values_of(Job& job, int slice);
    void score_slice(Job& job, int slice);
    void gather_scales(KeyTile& tile) const;
    void soften(Job& job, int row);
    void value_step(Job& job, int step);
    void finish(const Job& job);
    void pack_queries();

    const AttentionArgs& a_;
    const AttentionTask& task_;
    const KVLayout& l_;
    const int64_t token0_, position0_, channels_;
    const int rows_, row_tiles_, chunks_, channel_tiles_, passes_;
    const bool single_;  // one tile of rows: what was converted for it is not needed again
    KeyTile tiles_[4];   // of values, of weights, of scores, and the one to be fetched
    KeyTile* ahead_ = nullptr;
    Stream stream_;
    int64_t next_tile_;
    int next_rows_ = 0, jobs_ = 0;
    char *q_, *keys_, *values_, *edges_, *weights_[2];
    float *scores_[2], *sums_, *maxima_, *totals_, *state_;
};

QUIRE_INLINE int64_t slice_key_bytes(int parts, int chunks) { return int64_t(2) * parts * chunks * tile_bytes; }
QUIRE_INLINE int64_t slice_value_bytes(int parts, int tiles) { return int64_t(parts) * tiles * tile_bytes; }

int64_t tile_scratch(const KVLayout& l, int rows) {
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows, chunks = (l.head_dim + 31) / 32;
    const int64_t parts = l.type == KVType::f16 ? 2 : 1, values = slice_value_bytes(int(parts), int(l.value_dim() / 16));
    return tiles * tile_rows * (chunks * 64 + l.value_dim() * 4 + 8) + 2 * tile_rows * (score_stride * 4 + weight_stride) +
           slices_of_tile * slice_key_bytes(int(parts), int(chunks)) + (slices_of_tile + 2) * values +
           tile_rows * l.value_dim() * 4 + 4096;
}

template <class Pages>
TileTask<Pages>::TileTask(const AttentionArgs& a, const AttentionTask& task, char* scratch)
    : a_(a), task_(task), l_(a.layout), token0_(a.query_start[task.sequence] + task.q0),
      position0_(a.context_lens[task.sequence] - (a.query_start[task.sequence + 1] - a.query_start[task.sequence]) +
                 task.q0),
      channels_(a.layout.value_dim()), rows_((task.q1 - task.q0) * a.group),
      row_tiles_((rows_ + tile_rows - 1) / tile_rows), chunks_((a.layout.head_dim + 31) / 32),
      channel_tiles_(int(channels_ / 16)), passes_((channel_tiles_ + pass_tiles - 1) / pass_tiles),
      single_(row_tiles_ == 1 && passes_ == 1),
      stream_(l_, slices_of_tile * (chunks_ + channel_tiles_ + smaller(rows_, tile_rows))),
      next_tile_(task.tile0) {
    const auto cut = [&](int64_t bytes) {
        char* piece = scratch;
        scratch += (bytes + 63) / 64 * 64;
        return piece;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(cut(count * 4)); };
    for (int i = 0; i < 2; i++) scores_[i] = floats(tile_rows * score_stride);
    for (int i = 0; i < 2; i++) weights_[i] = cut(tile_rows * weight_stride);
    sums_ = floats(tile_rows * channels_);
    q_ = cut(int64_t(row_tiles_) * chunks_ * tile_bytes);
    keys_ = cut(slices_of_tile * slice_key_bytes(Pages::parts, chunks_));
    edges_ = cut(2 * slice_value_bytes(Pages::parts, channel_tiles_));
    values_ = cut(slices_of_tile * slice_value_bytes(Pages::parts, channel_tiles_));
    maxima_ = floats(row_tiles_ * tile_rows);
    totals_ = floats(row_tiles_ * tile_rows);
    state_ = floats(rows_ * channels_);
}

// Rows of tiles: [tile of rows][32 channels][16 rows]. Rows beyond the last hold anything: their results go nowhere.
template <class Pages>
void TileTask<Pages>::pack_queries() {
    const int dim = l_.head_dim;
    for (int r = 0; r < rows_; r++) {
        const int64_t head = int64_t(task_.head) * a_.group + r % a_.group;
        const bf16* x = static_cast<const bf16*>(a_.q.data) + (token0_ + r / a_.group) * a_.q.stride + head * dim;
        char* to = q_ + (int64_t(r / tile_rows) * chunks_ * tile_rows + r % tile_rows) * tile_row_bytes;
        for (int c = 0; c < dim; c += 32, to += tile_bytes) {
            const __mmask32 some = dim - c >= 32 ? ~0u : (1u << (dim - c)) - 1;
            _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(some, x + c));
        }
    }
}

// Blocks of the keys begin .. end-1 of tile `index`.
template <class Pages>
void TileTask<Pages>::find_blocks(KeyTile& tile, const AttentionTask& task, int64_t begin, int64_t end, int64_t index) {
    const int64_t base = index * key_tile;
    tile.index = index;
    tile.ready_keys = tile.ready_values = 0;
    tile.ready_scales = false;
    tile.first = int(larger<int64_t>(0, begin - base) / key_block);
    tile.last = int((smaller<int64_t>(key_tile, end - base) + key_block - 1) / key_block);
    BlockWalk walk = BlockWalk::make(a_, task, base / key_block + tile.first);
    for (int b = tile.first; b < tile.last; b++, walk.next()) {
        tile.keys[b] = walk.keys();
        tile.values[b] = walk.values();
    }
    const auto point = [&](int from, int to) {
        tile.keys[from] = tile.keys[to];
        tile.values[from] = tile.values[to];
    };
    if (tile.first % 2) point(tile.first - 1, tile.first);
    if (tile.last % 2) point(tile.last, tile.last - 1);
}

// The tile of keys after `index`, in this task or, after its last, the first of the task that is likely next.
template <class Pages>
void TileTask<Pages>::find_ahead(int64_t index) {
    ahead_ = &tiles_[(index + 1) & 3];
    const int64_t end = position(rows_ - 1) + 1;
    if (index + 1 < task_.tile1 && (index + 1) * key_tile < end)
        return find_blocks(*ahead_, task_, visible(a_, position0_).begin, end, index + 1);
    ahead_ = nullptr;
    const AttentionTask* then = a_.after;
    if (!then) return;
    const int64_t count = a_.query_start[then->sequence + 1] - a_.query_start[then->sequence];
    const int64_t first = a_.context_lens[then->sequence] - count + then->q0, last = first + then->q1 - then->q0;
    ahead_ = &tiles_[(index + 1) & 3];
    find_blocks(*ahead_, *then, visible(a_, first).begin, last, then->tile0);
}

template <class Pages>
bool TileTask<Pages>::next_job(Job& job) {
    for (; next_tile_ < task_.tile1; next_tile_++, next_rows_ = 0) {
        const int64_t base = next_tile_ * key_tile;
        KeyTile& tile = tiles_[next_tile_ & 3];
        if (next_rows_ == 0) {
            if (ahead_ != &tile || tile.index != next_tile_)
                find_blocks(tile, task_, visible(a_, position0_).begin, position(rows_ - 1) + 1, next_tile_);
            find_ahead(next_tile_);
        }
        // The rows of the queries that see some of the tile.
        const int64_t from = larger<int64_t>(0, base - position0_) * a_.group;
        const int64_t to = smaller<int64_t>(task_.q1 - task_.q0, base + key_tile - 1 + a_.window - position0_) * a_.group;
        while (next_rows_ < row_tiles_) {
            const int64_t row0 = int64_t(next_rows_++) * tile_rows;
            const int64_t begin = larger(from, row0), end = smaller(smaller<int64_t>(to, rows_), row0 + tile_rows);
            if (begin >= end) continue;
            job.tile = &tile;
            job.row0 = int(row0);
            job.begin = int(begin - row0);
            job.end = int(end - row0);
            job.see0 = larger<int64_t>(0, visible(a_, position(begin)).begin - base);
            job.see1 = smaller<int64_t>(key_tile, position(end - 1) + 1 - base);
            job.first = int(job.see0 / slice_keys);
            job.last = int((job.see1 + slice_keys - 1) / slice_keys);
            job.ready_edges = 0;
            job.scores = scores_[jobs_ % 2];
            job.weights = weights_[jobs_ % 2];
            jobs_++;
            return true;
        }
    }
    return false;
}

// The two blocks of a slice as tiles, [block][part][32 channels].
template <class Pages>
const char* TileTask<Pages>::keys_of(Job& job, int slice) {
    KeyTile& tile = *job.tile;
    const int64_t bytes = slice_key_bytes(Pages::parts, chunks_);
    char* out = keys_ + (single_ ? slice & 1 : slice) * bytes;
    if (tile.ready_keys >> slice & 1) return out;
    for (int b = 0; b < 2; b++)
        convert_keys<Pages>(tile.keys[2 * slice + b], l_, chunks_, out + b * bytes / 2);
    tile.ready_keys |= 1u << slice;
    return out;
}

template <class Pages>
void TileTask<Pages>::score_slice(Job& job, int slice) {
    if (slice < job.first || slice >= job.last) return;
    const char* q = q_ + int64_t(job.row0 / tile_rows) * chunks_ * tile_bytes;
    const char *k0, *k1;
    if (Pages::direct && l_.head_dim % 32 == 0) {
        k0 = job.tile->keys[2 * slice];
        k1 = job.tile->keys[2 * slice + 1];
    } else {
        k0 = keys_of(job, slice);
        k1 = k0 + slice_key_bytes(Pages::parts, chunks_) / 2;
        if (slice + 1 < job.last) keys_of(job, slice + 1);  // now, so that it is stored when it is loaded
    }
    _tile_zero(6);
    _tile_zero(7);
    for (int c = 0; c < chunks_; c++, q += tile_bytes, k0 += tile_bytes, k1 += tile_bytes) {
        _tile_loadd(4, q, tile_row_bytes);
        for (int part = 0; part < Pages::parts; part++) {
            const int64_t at = int64_t(part) * chunks_ * tile_bytes;
            _tile_loadd(5, k0 + at, tile_row_bytes);
            _tile_dpbf16ps(6, 4, 5);
            _tile_loadd(5, k1 + at, tile_row_bytes);
            _tile_dpbf16ps(7, 4, 5);
        }
        stream_.pull();
    }
    float* out = job.scores + slice * slice_keys;
    _tile_stored(6, out, score_stride * 4);
    _tile_stored(7, out + 16, score_stride * 4);
}

template <class Pages>
void TileTask<Pages>::gather_scales(KeyTile& tile) const {
    tile.ready_scales = true;
    for (int i = tile.first / 2 * 2 * key_block; i < (tile.last + 1) / 2 * 2 * key_block; i += W) {
        store(tile.key_scales + i, scales_of(tile.keys, i, l_.key_data_bytes()) * set1(a_.scale));
        store(tile.value_scales + i, scales_of(tile.values, i, l_.value_data_bytes()));
    }
}

// Scores of a row to weights: scale, cap, hide, 2^(score - maximum), rounded to bfloat16.
template <class Pages>
void TileTask<Pages>::soften(Job& job, int row) {
    const int64_t base = job.tile->index * key_tile;
    const Span sees = visible(a_, position(job.row0 + row));
    const int lo = job.first * slice_keys, hi = job.last * slice_keys;
    const int begin = int(larger<int64_t>(lo, sees.begin - base)), end = int(smaller<int64_t>(hi, sees.end - base));
    float* s = job.scores + row * score_stride;
    const VF hidden = set1(minus_infinity);
    const bool plain = !Pages::scaled && a_.soft_cap == 0 && a_.scale > 0;
    if constexpr (Pages::scaled) {
        if (!job.tile->ready_scales) gather_scales(*job.tile);
        for (int i = lo; i < hi; i += W) store(s + i, load(s + i) * load(job.tile->key_scales + i));
    } else if (!plain) {
        for (int i = lo; i < hi; i += W) store(s + i, load(s + i) * set1(a_.scale));
    }
    if (a_.soft_cap != 0)
        for (int i = lo; i < hi; i += W) store(s + i, set1(a_.soft_cap) * tanh(load(s + i) / set1(a_.soft_cap)));
    for (int i = lo; i < begin; i += W) store(s + i, keep(load(s + i), begin - i, W, hidden));
    for (int i = end / W * W; i < hi; i += W) store(s + i, keep(load(s + i), 0, end - i, hidden));
    VF top0 = hidden, top1 = hidden;
    for (int i = lo; i < hi; i += 2 * W) {
        top0 = max(load(s + i), top0);
        top1 = max(load(s + i + W), top1);
    }
    const float top = reduce_max(max(top0, top1)), unit = plain ? a_.scale : 1.0f, factor = unit * log2_e;
    job.maximum[row] = top * unit;
    const VF f = set1(factor), offset = set1(-top * factor);
    VF total0 = zero(), total1 = zero();
    char* out = job.weights + row * weight_stride + lo * 2;
    for (int i = lo; i < hi; i += 2 * W, out += 4 * W) {
        VF p0 = coarse_power_of_two(fma(load(s + i), f, offset)), p1 = coarse_power_of_two(fma(load(s + i + W), f, offset));
        total0 = total0 + p0;
        total1 = total1 + p1;
        if constexpr (Pages::scaled) {
            p0 = p0 * load(job.tile->value_scales + i);
            p1 = p1 * load(job.tile->value_scales + i + W);
            if (i < begin || i + 2 * W > end) {  // 0 times the scale of a slot that nobody wrote may be NaN
                p0 = keep(p0, begin - i, end - i, zero());
                p1 = keep(p1, begin - i - W, end - i - W, zero());
            }
        }
        _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(p1.v, p0.v));
        stream_.pull();
    }
    job.sum[row] = reduce_add(total0 + total1);
}

// The values of a slice, rows of pairs of keys. Keys that no row of the job sees are zero: what lies there may be NaN, and
// a weight of zero does not undo that.
template <class Pages>
const char* TileTask<Pages>::values_of(Job& job, int slice) {
    KeyTile& tile = *job.tile;
    const char *v0 = tile.values[2 * slice], *v1 = tile.values[2 * slice + 1];
    const int64_t begin = job.see0 - slice * slice_keys, end = job.see1 - slice * slice_keys;
    const int64_t bytes = slice_value_bytes(Pages::parts, channel_tiles_);
    if (!Pages::scaled && (begin > 0 || end < slice_keys)) {
        const int place = begin > 0 ? 0 : 1;
        char* out = edges_ + place * bytes;
        if (!(job.ready_edges >> place & 1)) convert_edge<Pages>(v0, v1, l_, begin, end, out);
        job.ready_edges |= 1u << place;
        return out;
    }
    if (Pages::direct && v1 == v0 + l_.value_block_bytes()) return v0;
    char* out = values_ + (single_ ? slice & 1 : slice) * bytes;
    if (!(tile.ready_values >> slice & 1)) convert_values<Pages>(v0, v1, l_, out);
    tile.ready_values |= 1u << slice;
    return out;
}

// An eighth of the products of weights and values: passes over the slices, each for some tiles of channels.
template <class Pages>
void TileTask<Pages>::value_step(Job& job, int step) {
    for (int i = step * passes_; i < (step + 1) * passes_; i++) {
        const int pass = i / slices_of_tile, slice = i % slices_of_tile;
        if (slice < job.first || slice >= job.last) continue;
        const int tiles = smaller(pass_tiles, channel_tiles_ - pass * pass_tiles);
        if (slice == job.first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        if (slice + 1 < job.last) values_of(job, slice + 1);  // as above
        const char* v = values_of(job, slice) + pass * pass_tiles * tile_row_bytes;
        _tile_loadd(4, job.weights + slice * slice_keys * 2, weight_stride);
        for (int part = 0; part < Pages::parts; part++, v += tile_rows * channels_ * 4) {
            _tile_loadd(5, v, channels_ * 4);
            _tile_dpbf16ps(0, 4, 5);
            stream_.pull();
            if (tiles < 2) continue;
            _tile_loadd(5, v + 64, channels_ * 4);
            _tile_dpbf16ps(1, 4, 5);
            stream_.pull();
            if (tiles < 3) continue;
            _tile_loadd(5, v + 128, channels_ * 4);
            _tile_dpbf16ps(2, 4, 5);
            stream_.pull();
            if (tiles < 4) continue;
            _tile_loadd(5, v + 192, channels_ * 4);
            _tile_dpbf16ps(3, 4, 5);
            stream_.pull();
        }
        if (slice != job.last - 1) continue;
        float* out = sums_ + pass * pass_tiles * 16;
        _tile_stored(0, out, channels_ * 4);
        if (tiles > 1) _tile_stored(1, out + 16, channels_ * 4);
        if (tiles > 2) _tile_stored(2, out + 32, channels_ * 4);
        if (tiles > 3) _tile_stored(3, out + 48, channels_ * 4);
    }
}

// Adds a job's results to what its rows have so far, or leaves them where the task's go.
template <class Pages>
void TileTask<Pages>::finish(const Job& job) {
    const int64_t index = job.tile->index;
    float keep_old[tile_rows], keep_new[tile_rows];
    float *maxima = maxima_ + job.row0, *totals = totals_ + job.row0;
    if (task_.partial < 0) {
        const VF old = load(maxima), now = load(job.maximum), both = max(old, now);
        store(keep_old, exp(old - both));
        store(keep_new, exp(now - both));
    }
    for (int r = job.begin; r < job.end; r++) {
        const float* values = sums_ + r * channels_;
        if (task_.partial >= 0) {
            float* to = a_.partial + task_.partial +
                        ((index - task_.tile0) * rows_ + job.row0 + r) * partial_row(l_);
            to[0] = job.maximum[r];
            to[1] = job.sum[r];
            for (int64_t c = 0; c < channels_; c += W) store(to + 16 + c, load(values + c));
            continue;
        }
        float* state = state_ + (job.row0 + r) * channels_;
        if (visible(a_, position(job.row0 + r)).begin / key_tile == index) {
            maxima[r] = job.maximum[r];
            totals[r] = job.sum[r];
            for (int64_t c = 0; c < channels_; c += W) store(state + c, load(values + c));
            continue;
        }
        // As merge() does it, to the bit.
        const float both = job.maximum[r] < maxima[r] ? maxima[r] : job.maximum[r];
        const VF o = set1(keep_old[r]), n = set1(keep_new[r]);
        float t[W];
        store(t, fma(set1(job.sum[r]), n, set1(totals[r]) * o));
        maxima[r] = both;
        totals[r] = t[0];
        for (int64_t c = 0; c < channels_; c += W) store(state + c, fma(load(values + c), n, load(state + c) * o));
    }
}

template <class Pages>
void TileTask<Pages>::run() {
    pack_queries();
    configure_attention(smaller(rows_, tile_rows));
    Job jobs[3];
    Job *scores = nullptr, *weights = nullptr, *values = nullptr;
    for (int n = 0;; n++) {
        values = weights;
        weights = scores;
        scores = &jobs[n % 3];
        if (!next_job(*scores)) scores = nullptr;
        if (!values && !weights && !scores) break;
        if (scores && (!weights || scores->tile != weights->tile)) {
            stream_.drain();
            stream_.start(ahead_);
        }
        for (int step = 0; step < slices_of_tile; step++) {
            if (scores) score_slice(*scores, step);
            if (weights) {
                const int count = weights->end - weights->begin;
                for (int r = count * step / slices_of_tile; r < count * (step + 1) / slices_of_tile; r++)
                    soften(*weights, weights->begin + r);
            }
            if (values) value_step(*values, step);
        }
        if (values) finish(*values);
    }
    _tile_release();
    if (task_.partial >= 0) return;
    for (int r = 0; r < rows_; r++)
        write_out(a_, token0_ + r / a_.group, int64_t(task_.head) * a_.group + r % a_.group, maxima_[r], totals_[r],
                  state_ + r * channels_);
}

}  // namespace
}  // namespace quire::QUIRE_ISA

#endif
