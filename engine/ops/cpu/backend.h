// What one CpuOps object owns, and what every kernel gets: threads, scratch memory and the chosen set of kernels.
#pragma once

#include <cstddef>
#include <mutex>

#include "slabs.h"
#include "thread_pool.h"

namespace engine {

struct Kernels;

// Memory that only grows, 64-byte aligned, reused by every operation; contents do not survive the next reserve().
class Scratch {
public:
    Scratch() = default;
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* reserve(size_t bytes);

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

struct Backend {
    Backend(int threads, const Kernels& chosen) : pool(threads), kernels(chosen) {}

    ThreadPool pool;
    Scratch scratch;
    Slabs weights;
    const Kernels& kernels;
    std::mutex busy;  // held during an operation: one at a time per backend
};

}  // namespace engine
