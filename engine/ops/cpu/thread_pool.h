// A persistent team of threads for short loops.
//
// The caller takes part, so a pool of n threads starts n - 1 workers. Between loops a worker spins for about 50 µs (the
// gap between two operations of a decode step is shorter) and then sleeps. Ranges are handed out dynamically; a worker
// that wakes late finds nothing left and nobody waits for it. Which thread computes a range must therefore not matter
// for the result.
//
// Between the products of a decode step the memory would stand still while one thread prepares the next: spinning
// workers then fetch what they will be the first to read (`expect`).
//
// One loop at a time per pool: callers lock (see Backend in backend.h). Loops do not nest. After fork() the child
// starts workers of its own at its first loop.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engine {

struct Span {
    const char* data = nullptr;
    size_t bytes = 0;
};

class ThreadPool {
public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // A grain for parallel_streams: eight ranges a thread, few enough that handing them out costs nothing.
    int64_t stream_grain(int64_t count) const { return count / (threads_ * 8) + 1; }

    // Calls body(begin, end, thread) on disjoint ranges of at most `grain` that cover [0, count); `thread` in
    // [0, threads()) tells concurrent calls apart, for scratch memory. The first exception thrown by a body is thrown
    // again here once all have stopped; ranges not yet begun are then skipped.
    template <class Body>
    void parallel_for(int64_t count, int64_t grain, Body&& body) {
        run(count, grain, Order::any, [](void* b, int64_t begin, int64_t end, int thread) {
            (*static_cast<Body*>(b))(begin, end, thread);
        }, &body);
    }

    // The same for work that reads memory as a stream: every thread has an equal part of [0, count), count < 2^31, and
    // goes through it in ascending order; one that is done takes from the end of another's part. So short ranges keep
    // the CPU's prefetchers going, and a thread that comes late (other processes want CPUs too) holds nobody up.
    template <class Body>
    void parallel_streams(int64_t count, int64_t grain, Body&& body) {
        run(count, grain, Order::streams, [](void* b, int64_t begin, int64_t end, int thread) {
            (*static_cast<Body*>(b))(begin, end, thread);
        }, &body);
    }

    // Until told otherwise, workers that wait bring the beginning of their part of `memory` into their caches: it is
    // what the next loop of streams will read. Nothing is read that counts, so it need not be there.
    void expect(Span memory);

private:
    using Call = void (*)(void* body, int64_t begin, int64_t end, int thread);
    enum class Order { any, streams };
    struct State;

    void run(int64_t count, int64_t grain, Order order, Call call, void* body);

    int threads_;
    State* state_;  // owned; a pointer, because a forked child must abandon it without destroying it
};

}  // namespace engine
