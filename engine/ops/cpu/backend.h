// What one CpuOps object owns, and what every kernel gets: threads, scratch memory and the chosen set of kernels.
#pragma once

#include <mutex>

#include "scratch.h"
#include "slabs.h"
#include "thread_pool.h"
#include "weight_order.h"

namespace engine {

struct Kernels;

struct Backend {
    Backend(int threads, const Kernels& chosen) : pool(threads), kernels(chosen) {}

    ThreadPool pool;
    Scratch scratch;
    Slabs weights;
    WeightOrder order;
    const Kernels& kernels;
    std::mutex busy;  // held during an operation: one at a time per backend
};

}  // namespace engine
