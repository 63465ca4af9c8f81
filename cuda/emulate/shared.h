// A block's shared memory.
//
// simt.h makes every __shared__ variable thread_local. The runtime has no thread-local data of its own, so the module's
// TLS segment is exactly all shared memory: the static arrays of all its kernels, and the arena that every
// `extern __shared__ T name[]` is bound to (the launcher defines those names).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "launch.h"

namespace emu {

class SharedMemory {
public:
    /// Finds this operating-system thread's copy of the module's segment.
    void locate(const Launch& launch);

    /// Fills all arrays, and what the launch asked for of the arena, with the byte `value`: what no thread of a block has
    /// written is then the same wrong number in every run, or another with another value.
    void poison(uint32_t value);

    /// What a launch can use, as [begin, end) offsets: the arrays before and behind the arena, the latter's used part
    /// with the first.
    struct Range {
        size_t begin, end;
    };
    std::array<Range, 2> used() const {
        return {{{0, arena_.offset + arena_.bytes}, {arena_.offset + arena_capacity_, bytes_}}};
    }

    bool contains(const void* pointer) const { return offset(pointer) < bytes_; }
    size_t offset(const void* pointer) const { return size_t(static_cast<const std::byte*>(pointer) - base_); }
    std::byte* at(size_t offset) const { return base_ + offset; }
    size_t bytes() const { return bytes_; }

    /// The array that holds all of [offset, offset + bytes), or null.
    const SharedArray* array_at(size_t offset, size_t bytes) const;
    /// "shared array tile, byte 48"; also for what lies between two arrays.
    std::string describe(size_t offset) const;

private:
    const SharedArray *arrays_ = nullptr, *arrays_end_ = nullptr;  // by offset, the arena excepted
    std::byte* base_ = nullptr;
    size_t bytes_ = 0;
    SharedArray arena_{};  // its bytes are those this launch asked for
    size_t arena_capacity_ = 0;
};

extern SharedMemory shared_memory;

} // namespace emu
