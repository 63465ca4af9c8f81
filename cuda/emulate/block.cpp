// Running one block: fibres, priorities, barriers, meetings of lanes. See block.h and warp.h.
#include "block.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "checker.h"
#include "report.h"
#include "shared.h"

namespace emu {

Block block;
ThreadIndex* current = nullptr;
LaunchIndex launched;

namespace {

inline Thread& self() { return *static_cast<Thread*>(current); }
inline bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }
inline unsigned lowest(unsigned mask) { return unsigned(__builtin_ctz(mask)); }

} // namespace

// --- A block's life -------------------------------------------------------------------------------------------------

bool Block::run(const Launch& launch, unsigned linear_index) {
    launch_ = &launch;
    random_state_ = launch.schedule.seed * 0x9e3779b97f4a7c15u + linear_index;
    prepare(launch);
    shared_memory.poison(launch.poison);
    checker.begin_block(linear_index, count_);
    running_ = true;
    failed_ = false;
    Warp& first = warps_[warp_at_[0]];
    Thread& thread = threads_[warp_at_[0] * kLanes + (lowest(first.ready) ^ first.flip)];
    first.ready &= first.ready - 1;
    if (!first.ready) ready_warps_ &= ~1u;
    current = &thread;
    fiber_switch(outside_, thread.fiber);
    running_ = false;
    current = nullptr;
    return !failed_;
}

void Block::prepare(const Launch& launch) {
    count_ = launch.block.x * launch.block.y * launch.block.z;
    warp_count_ = (count_ + kLanes - 1) / kLanes;
    ended_ = polling_ = resting_ = barrier_arrived_ = barrier_true_ = ready_warps_ = 0;
    std::fill(std::begin(named_), std::end(named_), NamedBarrier{});
    for (unsigned w = 0; w < warp_count_; ++w) {
        Warp& warp = warps_[w];
        unsigned lanes = std::min(kLanes, count_ - w * kLanes);
        warp.exists = lanes == kLanes ? kFullWarp : (1u << lanes) - 1;
        warp.ready = warp.flip = 0;
        warp.position = w;
        warp_at_[w] = w;
        for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
        warp.meetings_used = 0;
    }
    set_priorities();
    for (unsigned i = 0; i < count_; ++i) {
        Thread& thread = threads_[i];
        thread.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
        thread.id = i;
        thread.lane = i % kLanes;
        thread.warp = i / kLanes;
        thread.group = thread.steps = 0;
        thread.copies.clear();
        stacks_.prepare(thread.fiber, i, thread_main);
        make_ready(thread);
    }
}

/// Gives every warp its position and, with random priorities, every warp's lanes another order. All that is ready moves
/// along.
void Block::set_priorities() {
    uint32_t order = launch_->schedule.order;
    for (unsigned i = 0; i < warp_count_; ++i) warp_at_[i] = order == Schedule::descending ? warp_count_ - 1 - i : i;
    if (order == Schedule::random) {
        for (unsigned i = warp_count_ - 1; i > 0; --i) std::swap(warp_at_[i], warp_at_[random() % (i + 1)]);
    }
    ready_warps_ = 0;
    for (unsigned position = 0; position < warp_count_; ++position) {
        Warp& warp = warps_[warp_at_[position]];
        warp.position = position;
        unsigned flip = order == Schedule::ascending ? 0 : order == Schedule::descending ? 31 : random() % kLanes;
        unsigned ready = 0;
        for (unsigned bits = warp.ready; bits; bits &= bits - 1) ready |= 1u << (lowest(bits) ^ warp.flip ^ flip);
        warp.ready = ready;
        warp.flip = flip;
        ready_warps_ |= unsigned(ready != 0) << position;
    }
}

void Block::thread_main() {
    block.launch_->kernel->call(block.launch_->arguments);
    checker.end_thread();
    block.end_thread();
}

void Block::end_thread() {
    Thread& thread = self();
    if (barrier_arrived_) {
        fail_at(barrier_site_, "divergent barrier: %s waits at this __syncthreads, but %s has ended",
                first_in(State::block_barrier).c_str(), name_of(thread).c_str());
    }
    thread.state = State::ended;
    thread.site = {"", 0};
    thread.waits_for = 0;
    if (++ended_ == count_) leave();
    resume_next();
    __builtin_unreachable();
}

void Block::leave() {
    failed_ = ended_ != count_;
    Fiber abandoned;
    fiber_switch(abandoned, outside_);
    __builtin_unreachable();
}

uint64_t Block::random() {  // splitmix64
    uint64_t z = random_state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// --- Switching ------------------------------------------------------------------------------------------------------

void Block::make_ready(Thread& thread) {
    Warp& warp = warp_of(thread);
    thread.state = State::ready;
    warp.ready |= 1u << (thread.lane ^ warp.flip);
    ready_warps_ |= 1u << warp.position;
}

void Block::wait(State state, Site site, unsigned waits_for) {
    Thread& thread = self();
    thread.state = state;
    thread.site = site;
    thread.waits_for = waits_for;
    resume_next();
}

/// Leaves the running thread, which has been filed away, for the ready one of highest priority.
void Block::resume_next() {
    if (watchdog_expired) report_time_limit(kernel_pc());
    if (polling_) poll();
    if (!ready_warps_ && resting_) end_rest();
    if (!ready_warps_) report_deadlock();
    Warp& warp = warps_[warp_at_[lowest(ready_warps_)]];
    unsigned lane = lowest(warp.ready) ^ warp.flip;
    warp.ready &= warp.ready - 1;
    if (!warp.ready) ready_warps_ &= ~(1u << warp.position);
    Thread& from = self();
    Thread& to = threads_[unsigned(&warp - warps_) * kLanes + lane];
    current = &to;
    if (&from != &to) fiber_switch(from.fiber, to.fiber);
}

void Block::poll() {
    for (unsigned i = 0; i < count_; ++i) {
        Thread& thread = threads_[i];
        if (thread.state != State::polling || !thread.poll(thread.poll_state)) continue;
        --polling_;
        make_ready(thread);
    }
}

void Block::wait_until(bool (*ready)(void*), void* state, Site site) {
    if (ready(state)) return;
    Thread& thread = self();
    thread.poll = ready;
    thread.poll_state = state;
    ++polling_;
    wait(State::polling, site, 0);
}

/// A thread that yields rests until nobody else can go on.
void Block::yield() {
    ++resting_;
    wait(State::resting, {"", 0}, 0);
}

void Block::end_rest() {
    resting_ = 0;
    for (unsigned i = 0; i < count_; ++i) {
        if (threads_[i].state == State::resting) make_ready(threads_[i]);
    }
}

// --- Meetings -------------------------------------------------------------------------------------------------------

/// The meeting of `mask` that has begun, or a free one: there is one, since each waiting lane is in one.
Meeting& Block::meeting_of(Warp& warp, unsigned mask) {
    Meeting* free = nullptr;
    for (unsigned i = 0; i < warp.meetings_used; ++i) {
        Meeting& meeting = warp.meetings[i];
        if (meeting.arrived && meeting.mask == mask) return meeting;
        if (!meeting.arrived && !free) free = &meeting;
    }
    return free ? *free : warp.meetings[warp.meetings_used++];
}

void Block::meet(unsigned mask, void* mine, WarpModel model, Site site) {
    Thread& thread = self();
    Warp& warp = warp_of(thread);
    unsigned bit = 1u << thread.lane;
    mask &= warp.exists;  // a partial warp may name lanes it does not have
    if (!(mask & bit)) fail_at(site, "warp operation: lane %u is not in its own mask 0x%08x", thread.lane, mask);
    Meeting& meeting = meeting_of(warp, mask);
    if (!meeting.arrived) {
        meeting.mask = mask;
        meeting.model = model;
        meeting.site = site;
        if (mask != kFullWarp) std::memset(meeting.lanes, 0, sizeof meeting.lanes);
    } else if (meeting.model != model || !same(meeting.site, site)) {
        const Thread& other = threads_[thread.warp * kLanes + lowest(meeting.arrived)];
        fail_at(site, "divergent warp operation: %s %s", name_of(other).c_str(), describe_wait(other).c_str());
    }
    meeting.lanes[thread.lane] = mine;
    meeting.arrived |= bit;
    if (meeting.arrived != mask) return wait(State::meeting, site, mask);
    model(meeting.lanes);
    meeting.arrived = 0;
    for (unsigned rest = mask & ~bit; rest; rest &= rest - 1) make_ready(threads_[thread.warp * kLanes + lowest(rest)]);
}

unsigned Block::sync_block(bool predicate, Site site) {
    if (ended_) {
        fail_at(site, "divergent barrier: %u threads have ended, %s among them, without coming to this __syncthreads",
                ended_, first_in(State::ended).c_str());
    }
    if (!barrier_arrived_) barrier_site_ = site;
    if (!same(barrier_site_, site)) {
        fail_at(site, "divergent barrier: %s waits at another __syncthreads, %s:%d",
                first_in(State::block_barrier).c_str(), barrier_site_.file, barrier_site_.line);
    }
    barrier_true_ += predicate;
    if (++barrier_arrived_ != count_) {
        wait(State::block_barrier, site, 0);
        return barrier_result_;
    }
    barrier_result_ = barrier_true_;
    barrier_arrived_ = barrier_true_ = 0;
    checker.sync_block();
    Thread& last = self();
    for (unsigned i = 0; i < count_; ++i) {
        if (&threads_[i] != &last) make_ready(threads_[i]);
    }
    if (launch_->schedule.order == Schedule::random) set_priorities();
    return barrier_result_;
}

void Block::named_barrier(unsigned id, unsigned threads, bool wait_there, Site site) {
    if (id >= kNamedBarriers) fail_at(site, "barrier %u: a block has %u barriers", id, kNamedBarriers);
    unsigned expected = threads ? threads : count_;
    if (expected % kLanes && expected != count_) {
        fail_at(site, "barrier %u: %u threads is not a multiple of 32", id, expected);
    }
    NamedBarrier& barrier = named_[id];
    if (barrier.arrived && barrier.expected != expected) {
        fail_at(site, "barrier %u: this thread expects %u threads, others expect %u", id, expected, barrier.expected);
    }
    barrier.expected = expected;
    checker.release(&barrier);
    if (++barrier.arrived != expected) {
        if (!wait_there) return;
        wait(State::named_barrier, site, id);
        checker.acquire(&barrier);
        return;
    }
    barrier.arrived = 0;
    if (wait_there) checker.acquire(&barrier);
    for (unsigned i = 0; i < count_; ++i) {
        if (threads_[i].state == State::named_barrier && threads_[i].waits_for == id) make_ready(threads_[i]);
    }
}

std::string Block::first_in(State state) const {
    for (unsigned i = 0; i < count_; ++i) {
        if (threads_[i].state == state) return name_of(threads_[i]);
    }
    return "no thread";
}

// --- Deadlocks ------------------------------------------------------------------------------------------------------

/// Threads in the same state at the same place make one line of the report.
void Block::report_deadlock() {
    std::string text = "deadlock: no thread can go on";
    auto alike = [](const Thread& a, const Thread& b) {
        return a.state == b.state && a.waits_for == b.waits_for && (a.state == State::ready || same(a.site, b.site));
    };
    std::vector<const Thread*> kinds;
    for (unsigned i = 0; i < count_; ++i) {
        const Thread& thread = threads_[i];
        auto known = [&](const Thread* kind) { return alike(*kind, thread); };
        if (std::none_of(kinds.begin(), kinds.end(), known)) kinds.push_back(&thread);
    }
    for (const Thread* kind : kinds) {
        auto number = std::count_if(threads_, threads_ + count_, [&](const Thread& other) { return alike(other, *kind); });
        text += "\n  " + std::to_string(number) + " threads, " + name_of(*kind) + " first: " + describe_wait(*kind);
    }
    fail("%s", text.c_str());
}

} // namespace emu
