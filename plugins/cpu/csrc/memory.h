// Memory for packed weights and KV pages: zero until touched, in huge pages where the system allows them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace quire {

struct Chunk;

// A piece of a large mapping. Small pieces share one, so that each does not waste most of a huge page; a mapping goes
// back to the system with the last piece in it.
class Buffer {
public:
    // `spread`: memory that any thread may write and all read (KV pages), rather than what each thread first touches
    // its own part of (weights). It matters where set_nodes has named memory nodes.
    explicit Buffer(size_t bytes, bool spread = false);

    uintptr_t address() const { return address_; }
    size_t size() const { return size_; }

private:
    std::shared_ptr<Chunk> chunk_;
    uintptr_t address_ = 0;
    size_t size_ = 0;
};

// Has the memory of the next `bytes` of buffers (those that are not spread) made ready by a thread: fresh pages cost
// clearing, and that can go on while the caller is at something else. The thread is at most `lead` bytes ahead of the
// buffers that were there when the last one came. What no buffer took goes back with the next call; `bytes` may be 0.
void begin_buffers(size_t bytes, size_t lead);

// The memory nodes (of a machine with several) that new buffers use: one, or, for those that are spread, all of them in
// turns. A preference, as with huge pages: a full node leaves its part to the others. Empty: as the system does it.
void set_nodes(const std::vector<int>& nodes);

// Working memory that a call needs and the next call reuses: one per thread that calls, grown when it must be.
class Scratch {
public:
    ~Scratch();
    void* reserve(size_t bytes);

private:
    void* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace quire
