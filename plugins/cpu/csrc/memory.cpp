#include "memory.h"

#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

namespace quire {

namespace {
[[maybe_unused]] constexpr size_t huge_page = size_t(2) << 20;
[[maybe_unused]] constexpr size_t chunk_bytes = size_t(64) << 20;
constexpr size_t alignment = 4096;

[[maybe_unused]] size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

std::mutex nodes_mutex;
std::vector<int> nodes_in_use;
}  // namespace

void set_nodes(const std::vector<int>& nodes) {
    std::lock_guard<std::mutex> lock(nodes_mutex);
    nodes_in_use = nodes;
}

namespace {

void* allocate(size_t bytes, size_t align = alignment) {
    void* data = nullptr;
    if (posix_memalign(&data, align, bytes ? bytes : 1) != 0) throw std::bad_alloc();
    return data;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
// Each buffer an allocation of its own, of exactly its size: the sanitizer sees what leaves it.
struct Chunk {
    Chunk(size_t bytes, bool) : base(allocate(bytes)) { std::memset(base, 0, bytes); }
    ~Chunk() { std::free(base); }
    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;

    void* base;
};

Buffer::Buffer(size_t bytes, bool spread) : chunk_(std::make_shared<Chunk>(bytes, spread)), size_(bytes) {
    address_ = reinterpret_cast<uintptr_t>(chunk_->base);
}

void begin_buffers(size_t, size_t) {}
#else
namespace {

std::vector<int> nodes() {
    std::lock_guard<std::mutex> lock(nodes_mutex);
    return nodes_in_use;
}

// Pages of the range come from the nodes in turns when they are first touched (man 2 mbind). By the system call, since
// libnuma is not on every machine.
void take_turns(uintptr_t start, size_t size, const std::vector<int>& nodes) {
#if defined(SYS_mbind)
    constexpr int interleave = 3, bits = 8 * sizeof(unsigned long);
    unsigned long mask[1024 / bits] = {};
    for (const int node : nodes)
        if (node >= 0 && node < 1024) mask[node / bits] |= 1ul << (node % bits);
    syscall(SYS_mbind, start, size, interleave, mask, 1024ul + 1, 0u);  // a wish: a container may forbid it
#else
    (void)start, (void)size, (void)nodes;
#endif
}

}  // namespace

struct Chunk {
    Chunk(size_t bytes, bool spread) : size(round_up(bytes, huge_page)) {
        // One huge page more than asked, to start at the border of one; what is never touched costs nothing.
        mapped = size + huge_page;
        base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        start = round_up(reinterpret_cast<uintptr_t>(base), huge_page);
#if defined(MADV_HUGEPAGE)
        madvise(reinterpret_cast<void*>(start), size, MADV_HUGEPAGE);  // a wish: the system may have none
#endif
        const std::vector<int> wanted = nodes();
        if (spread ? !wanted.empty() : wanted.size() == 1) take_turns(start, size, wanted);
    }
    ~Chunk() { munmap(base, mapped); }
    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;

    const size_t size;
    size_t mapped, used = 0;
    void* base;
    uintptr_t start;
};

namespace {

// Memory for buffers to come, and the thread that touches it before they are there.
class Ahead {
public:
    ~Ahead() { end(); }

    void begin(size_t bytes, size_t lead) {
        std::lock_guard<std::mutex> one(callers_);
        end();
        if (bytes == 0) return;
        std::lock_guard<std::mutex> lock(mutex_);
        chunk_ = std::make_shared<Chunk>(bytes, false);
        stop_ = false;
        lead_ = allowed_ = lead;
        thread_ = std::thread([this, chunk = chunk_] { touch(*chunk); });
    }

    // The mapping, with `room` bytes at `address`; null if they are not there.
    std::shared_ptr<Chunk> take(size_t room, uintptr_t& address) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!chunk_ || chunk_->size - chunk_->used < room) return nullptr;
        allowed_ = lead_ + chunk_->used;
        wake_.notify_one();
        address = chunk_->start + chunk_->used;
        chunk_->used += room;
        return chunk_;
    }

private:
    void touch(const Chunk& chunk) {
        for (size_t at = 0; at < chunk.size; at += huge_page) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || at < allowed_; });
                if (stop_) return;
            }
            // Reads and writes in one, and changes nothing: a buffer may be there, and be written, already.
            for (size_t page = at; page < at + huge_page; page += alignment)
                __atomic_fetch_or(reinterpret_cast<char*>(chunk.start + page), 0, __ATOMIC_RELAXED);
        }
    }

    void end() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            wake_.notify_one();
        }
        if (thread_.joinable()) thread_.join();
        std::lock_guard<std::mutex> lock(mutex_);
        if (!chunk_) return;
        const size_t used = round_up(chunk_->used, huge_page);
        if (used < chunk_->size) madvise(reinterpret_cast<void*>(chunk_->start + used), chunk_->size - used, MADV_DONTNEED);
        chunk_.reset();
    }

    std::mutex callers_, mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Chunk> chunk_;
    std::thread thread_;
    size_t lead_ = 0, allowed_ = 0;
    bool stop_ = false;
};

Ahead ahead;

}  // namespace

void begin_buffers(size_t bytes, size_t lead) { ahead.begin(bytes, lead); }

Buffer::Buffer(size_t bytes, bool spread) : size_(bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Chunk> filling;  // weak: the pieces alone keep a mapping
    const size_t room = round_up(bytes ? bytes : 1, alignment);
    if (!spread) {
        chunk_ = ahead.take(room, address_);
        if (chunk_) return;
    }
    if (spread || room >= chunk_bytes / 2) {
        chunk_ = std::make_shared<Chunk>(room, spread);
        address_ = chunk_->start;
        return;
    }
    std::lock_guard<std::mutex> lock(mutex);
    chunk_ = filling.lock();
    if (!chunk_ || chunk_->size - chunk_->used < room) {
        chunk_ = std::make_shared<Chunk>(chunk_bytes, false);
        filling = chunk_;
    }
    address_ = chunk_->start + chunk_->used;
    chunk_->used += room;
}
#endif

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    const bool fits = bytes == capacity_;  // no byte more, so that the sanitizer sees what leaves it
    const size_t room = bytes, unit = alignment;
#else
    const bool fits = bytes <= capacity_;
    const size_t unit = bytes < huge_page / 2 ? alignment : huge_page;
    const size_t room = round_up(bytes + bytes / 4, unit);
#endif
    if (!fits) {
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
        data_ = allocate(room, unit);
#if defined(MADV_HUGEPAGE)
        if (unit == huge_page) madvise(data_, room, MADV_HUGEPAGE);
#endif
        capacity_ = room;
    }
    return data_;
}

}  // namespace quire
