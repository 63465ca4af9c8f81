// The running block: its threads, who is ready, who waits where. Internal to the runtime; models see warp.h.
//
// Scheduling. A thread runs until it blocks; then the ready thread of highest priority goes on, warp before lane.
// Strict priorities let one warp run as far ahead of the others as barriers allow, which is what uncovers races;
// resuming at random would keep the warps close together. `Schedule` sets the priorities; random ones are drawn anew at
// every block barrier. Switches go straight from thread to thread.
#pragma once

#include <string>
#include <vector>

#include "fibers.h"
#include "launch.h"
#include "warp.h"

namespace emu {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kNamedBarriers = 16;
constexpr unsigned kFullWarp = 0xffffffffu;

enum class State : uint8_t { ready, meeting, block_barrier, named_barrier, polling, resting, ended };

struct AsyncCopy {
    void* dst;
    const void* src;
    size_t bytes, zero_fill_bytes;
    unsigned group;
};

struct Thread : ThreadIndex {
    Fiber fiber;
    unsigned id, lane, warp;
    State state;
    Site site;               // where it waits
    unsigned waits_for;      // mask or barrier number, for reports
    bool (*poll)(void*);     // polling: what must become true
    void* poll_state;
    unsigned group;          // cp.async: the group that is open
    unsigned steps;          // atomics since it last yielded
    std::vector<AsyncCopy> copies;  // in flight, oldest first
};

/// Lanes of one mask that meet. Masks may nest: some lanes meet among themselves while others wait for the whole warp.
struct Meeting {
    unsigned mask, arrived;  // arrived = 0: free
    WarpModel model;
    Site site;
    void* lanes[kLanes];
};

struct Warp {
    unsigned exists;    // lanes there are
    unsigned ready;     // by position; position = lane ^ flip
    unsigned flip;      // the lanes' order of priority
    unsigned position;  // the warp's own priority, 0 first
    unsigned meetings_used;  // of the array below, as many as ever were open at once
    Meeting meetings[kLanes];
};

struct NamedBarrier {
    unsigned expected = 0, arrived = 0, waiting = 0;
};

class Block {
public:
    /// Runs one block to its end; false if a report was written.
    bool run(const Launch& launch, unsigned linear_index);

    Thread* threads() { return threads_; }
    const StackPool& stacks() const { return stacks_; }
    unsigned count() const { return count_; }
    Warp& warp_of(const Thread& thread) { return warps_[thread.warp]; }
    bool lazy_copies() const { return launch_->schedule.lazy_copies; }
    bool running() const { return running_; }

    void meet(unsigned mask, void* mine, WarpModel model, Site site);
    unsigned sync_block(bool predicate, Site site);
    void named_barrier(unsigned id, unsigned threads, bool wait, Site site);
    void wait_until(bool (*ready)(void*), void* state, Site site);
    void yield();
    [[noreturn]] void leave();  // back to run(), abandoning all threads

private:
    static void thread_main();
    void prepare(const Launch& launch);
    void set_priorities();
    static Meeting& meeting_of(Warp& warp, unsigned mask);
    void make_ready(Thread& thread);
    void wait(State state, Site site, unsigned waits_for);
    void resume_next();
    void poll();
    void end_rest();
    [[noreturn]] void end_thread();
    [[noreturn]] void report_deadlock();
    std::string first_in(State state) const;
    uint64_t random();

    const Launch* launch_ = nullptr;
    Fiber outside_;
    StackPool stacks_;
    Thread threads_[kMaxThreads];
    Warp warps_[kMaxThreads / kLanes];
    unsigned warp_at_[kMaxThreads / kLanes];  // by position
    unsigned ready_warps_ = 0;                // by position
    unsigned count_ = 0, warp_count_ = 0, ended_ = 0, polling_ = 0, resting_ = 0;
    unsigned barrier_arrived_ = 0, barrier_true_ = 0, barrier_result_ = 0;
    Site barrier_site_{};
    NamedBarrier named_[kNamedBarriers];
    uint64_t random_state_ = 0;
    bool running_ = false, failed_ = false;
};

extern Block block;  // the one that runs
} // namespace emu
