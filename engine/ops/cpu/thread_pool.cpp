#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

namespace engine {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPausesPerClockRead = 32;
constexpr size_t kFetched = 512;                  // bytes between two looks for news
constexpr size_t kMostAhead = size_t{512} << 10;  // half of a common L2
constexpr int kPausesBeforeYield = 2000;  // the caller, waiting for a worker that is at work (or was descheduled)

std::atomic<uint32_t> fork_count{0};

void count_forks() {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); }); });
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#ifdef __linux__
int current_cpu() { return sched_getcpu(); }

// Moves this thread to a CPU other than `cpu`. On a machine with other work the scheduler can leave a worker on its
// caller's CPU for seconds, each waiting for the other; a short ban on that CPU ends it.
void leave_cpu(int cpu) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
    cpu_set_t others = allowed;
    CPU_CLR(cpu, &others);
    if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_cpu() { return -1; }
void leave_cpu(int) {}
#endif

}  // namespace

// `gate` is the whole protocol: bits 63..32 count the loops, bit 31 says that the current one may be entered, the bits
// below count the workers inside. A worker enters by adding 1 while the bit is set; the caller clears the bit when no
// range is left and waits for the count to reach 0. Only then are the loop's fields below written again.
struct ThreadPool::State {
    static constexpr uint64_t kOpen = uint64_t{1} << 31;
    static constexpr uint64_t kInside = kOpen - 1;
    static uint32_t loop_of(uint64_t gate) { return static_cast<uint32_t>(gate >> 32); }

    alignas(64) std::atomic<uint64_t> gate{0};
    alignas(64) std::atomic<int64_t> next{0};  // Order::any: first element nobody has taken
    struct alignas(64) Part {
        std::atomic<uint64_t> left{0};  // begin << 32 | end
    };
    std::vector<Part> parts;  // Order::streams: what nobody has taken of each thread's part
    alignas(64) int64_t count = 0;
    int64_t grain = 1;
    Order order = Order::any;
    Call call = nullptr;
    void* body = nullptr;
    std::atomic<int> caller_cpu{-1};
    std::exception_ptr error;  // guarded by mutex
    std::atomic<const char*> expected{nullptr};
    std::atomic<size_t> expected_bytes{0};

    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<int> sleepers{0};
    std::atomic<bool> stop{false};
    const uint32_t forks = fork_count.load();
    std::vector<std::thread> workers;

    explicit State(int threads) : parts(static_cast<size_t>(threads)) {
        for (int i = 1; i < threads; ++i) workers.emplace_back([this, i] { work_until_stopped(i); });
    }

    void open_loop() {
        caller_cpu.store(current_cpu(), std::memory_order_relaxed);
        const uint64_t loop = loop_of(gate.load(std::memory_order_relaxed)) + uint64_t{1};
        gate.store(loop << 32 | kOpen);
        if (sleepers.load() > 0) wake_all();
    }

    void close_loop() {
        gate.fetch_and(~kOpen);
        for (int i = 0; gate.load() & kInside; ++i) i < kPausesBeforeYield ? pause() : std::this_thread::yield();
    }

    void wake_all() {
        { const std::lock_guard<std::mutex> lock(mutex); }  // no sleeper is between its check and its wait
        wake.notify_all();
    }

    struct Range {
        int64_t begin, end;
    };

    void share_out() {
        next.store(0, std::memory_order_relaxed);
        if (order == Order::any) return;
        const int64_t threads = static_cast<int64_t>(parts.size());
        for (int64_t i = 0; i < threads; ++i) {
            const uint64_t begin = static_cast<uint64_t>(count * i / threads);
            parts[i].left.store(begin << 32 | static_cast<uint64_t>(count * (i + 1) / threads));
        }
    }

    // Up to `grain` elements of a part, from its front or its back; empty where nothing is left.
    Range take_from(Part& part, bool front) {
        uint64_t left = part.left.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t begin = static_cast<int64_t>(left >> 32), end = static_cast<int64_t>(left & 0xffffffff);
            if (begin >= end) return {0, 0};
            const int64_t size = std::min(grain, end - begin);
            const Range taken = front ? Range{begin, begin + size} : Range{end - size, end};
            const uint64_t rest = front ? static_cast<uint64_t>(taken.end) << 32 | static_cast<uint64_t>(end)
                                        : static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(taken.begin);
            if (part.left.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return taken;
        }
    }

    Range take(int thread) {
        if (order == Order::any) {
            const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            return {begin, std::min(begin + grain, count)};
        }
        Range taken = take_from(parts[thread], true);
        for (size_t i = 1; i < parts.size() && taken.begin == taken.end; ++i)
            taken = take_from(parts[(thread + i) % parts.size()], false);
        return taken;
    }

    void take_nothing_more() {
        next.store(count, std::memory_order_relaxed);
        for (Part& part : parts) part.left.store(0, std::memory_order_relaxed);
    }

    void take_ranges(int thread) {
        for (;;) {
            const Range range = take(thread);
            if (range.begin >= range.end) return;
            try {
                call(body, range.begin, range.end, thread);
            } catch (...) {
                take_nothing_more();
                const std::lock_guard<std::mutex> lock(mutex);
                if (!error) error = std::current_exception();
            }
        }
    }

    // How much of what is expected a worker has fetched.
    struct Ahead {
        const char* whole = nullptr;
        size_t done = 0;
    };

    // The two values may be of different spans for a moment: prefetching a wrong address does nothing.
    void fetch(int thread, Ahead& ahead) {
        const char* whole = expected.load(std::memory_order_relaxed);
        if (whole != ahead.whole) ahead = {whole, 0};
        const size_t part = expected_bytes.load(std::memory_order_relaxed) / parts.size();
        if (ahead.done >= std::min(part, kMostAhead)) return;
        const char* from = whole + part * static_cast<size_t>(thread) + ahead.done;
        for (size_t line = 0; line < kFetched; line += 64) __builtin_prefetch(from + line, 0, 2);
        ahead.done += kFetched;
    }

    void work_until_stopped(int thread) {
        uint32_t seen = 0;
        Ahead ahead;
        while (wait_for_loop_after(seen, thread, ahead)) {
            const int occupied = caller_cpu.load(std::memory_order_relaxed);
            if (occupied >= 0 && occupied == current_cpu()) leave_cpu(occupied);
            uint64_t now = gate.load();
            while (now & kOpen) {
                if (!gate.compare_exchange_weak(now, now + 1)) continue;
                take_ranges(thread);
                gate.fetch_sub(1);
                break;
            }
            seen = loop_of(now);
        }
    }

    // False when the pool is being destroyed.
    bool wait_for_loop_after(uint32_t seen, int thread, Ahead& ahead) {
        const auto news = [&] { return loop_of(gate.load()) != seen || stop.load(); };
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < kPausesPerClockRead; ++i) {
                if (news()) return !stop.load();
                fetch(thread, ahead);
                pause();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, news);
        sleepers.fetch_sub(1);
        return !stop.load();
    }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), state_(nullptr) {
    count_forks();
    state_ = new State(threads);
}

ThreadPool::~ThreadPool() {
    if (state_->forks != fork_count.load()) return;  // the threads belong to the parent process
    state_->stop.store(true);
    state_->wake_all();
    for (std::thread& worker : state_->workers) worker.join();
    delete state_;
}

void ThreadPool::expect(Span memory) {
    state_->expected.store(memory.data, std::memory_order_relaxed);
    state_->expected_bytes.store(memory.bytes, std::memory_order_relaxed);
}

void ThreadPool::run(int64_t count, int64_t grain, Order order, Call call, void* body) {
    if (count <= 0) return;
    if (threads_ == 1 || count <= grain) return call(body, 0, count, 0);
    if (state_->forks != fork_count.load()) state_ = new State(threads_);
    State& state = *state_;
    state.count = count;
    state.grain = grain;
    state.order = order;
    state.call = call;
    state.body = body;
    state.error = nullptr;
    state.share_out();
    state.open_loop();
    state.take_ranges(0);
    state.close_loop();
    if (state.error) std::rethrow_exception(state.error);
}

}  // namespace engine
