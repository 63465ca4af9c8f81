// The functions of warp.h: what models may ask, answered by the block, the checker and shared memory.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "checker.h"
#include "report.h"
#include "shared.h"
#include "warp.h"

namespace emu {

namespace {

inline Thread& self() { return *static_cast<Thread*>(current); }

void lanes_synchronise(void* const lanes[32]) {
    unsigned mask = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) mask |= unsigned(lanes[lane] != nullptr) << lane;
    checker.sync_lanes(mask);
}

} // namespace

unsigned thread_id() { return self().id; }
unsigned lane_id() { return self().lane; }
unsigned warp_id() { return self().warp; }
unsigned block_threads() { return block.count(); }
unsigned warp_lanes() { return block.warp_of(self()).exists; }
bool on_gpu() { return block.running(); }

void warp_collective(unsigned mask, void* mine, WarpModel model, Site site) { block.meet(mask, mine, model, site); }

void sync_lanes(unsigned mask, Site site) {
    char here;
    block.meet(mask, &here, lanes_synchronise, site);
}

unsigned sync_block(bool predicate, Site site) { return block.sync_block(predicate, site); }

void named_barrier(unsigned id, unsigned threads, bool wait, Site site) { block.named_barrier(id, threads, wait, site); }

void wait_until(bool (*ready)(void*), void* state, Site site) { block.wait_until(ready, state, site); }

void yield() { block.yield(); }

void sync_release(const void* object) { checker.release(object); }
void sync_acquire(const void* object) { checker.acquire(object); }
void fence() { checker.fence(); }
void grid_dependency_wait() { checker.grid_dependency_wait(); }

void begin_atomic(const void* pointer, size_t bytes) {
    // A thread that spins on an atomic must let the others run, whatever its priority.
    constexpr unsigned kStepsBeforeYield = 64;
    if (++self().steps % kStepsBeforeYield == 0) block.yield();
    note_atomic(pointer, bytes, self().lane);
    checker.atomic_order(pointer);
}

// --- Shared memory --------------------------------------------------------------------------------------------------

bool is_shared(const void* pointer) { return shared_memory.contains(pointer); }

uint32_t shared_offset(const void* pointer) {
    // One past the end is an address too: loops compute it.
    if (shared_memory.offset(pointer) > shared_memory.bytes()) fail("%p is not an address in shared memory", pointer);
    return uint32_t(shared_memory.offset(pointer));
}

void* shared_pointer(uint32_t offset) {
    if (offset > shared_memory.bytes()) fail("shared address 0x%x is beyond shared memory", offset);
    return shared_memory.at(offset);
}

// --- Accesses that models make --------------------------------------------------------------------------------------

#if EMU_CHECKED
static void note(const void* pointer, size_t bytes, Access kind, unsigned lane) {
    checker.access(pointer, bytes, kind, self().warp * kLanes + lane, kernel_pc());
}
void note_read(const void* pointer, size_t bytes, unsigned lane) { note(pointer, bytes, Access::read, lane); }
void note_write(const void* pointer, size_t bytes, unsigned lane) { note(pointer, bytes, Access::write, lane); }
void note_atomic(const void* pointer, size_t bytes, unsigned lane) { note(pointer, bytes, Access::atomic, lane); }
#else
void note_read(const void*, size_t, unsigned) {}
void note_write(const void*, size_t, unsigned) {}
void note_atomic(const void*, size_t, unsigned) {}
#endif

// --- Asynchronous copies --------------------------------------------------------------------------------------------

namespace {

void carry_out(const AsyncCopy& copy) {
    std::memcpy(copy.dst, copy.src, copy.bytes);
    std::memset(static_cast<std::byte*>(copy.dst) + copy.bytes, 0, copy.zero_fill_bytes);
}

/// Lands the calling thread's copies of all groups before `group`.
void land_before(unsigned group) {
    auto& copies = self().copies;
    auto still = std::find_if(copies.begin(), copies.end(), [=](const AsyncCopy& copy) { return copy.group >= group; });
    for (auto copy = copies.begin(); copy != still; ++copy) {
        if (block.lazy_copies()) carry_out(*copy);
        checker.end_write(copy->dst, copy->bytes + copy->zero_fill_bytes, nullptr);
    }
    copies.erase(copies.begin(), still);
}

} // namespace

bool async_is_lazy() { return block.lazy_copies(); }

void async_copy(void* dst, const void* src, size_t bytes, size_t zero_fill_bytes, Site site) {
    size_t size = bytes + zero_fill_bytes;
    if (!is_shared(dst)) fail_at(site, "asynchronous copy: the destination is not in shared memory");
    if (size && (shared_offset(dst) % size || (bytes && reinterpret_cast<uintptr_t>(src) % size))) {
        fail_at(site, "asynchronous copy of %zu bytes: an address is not a multiple of that", size);
    }
    if (bytes) note_read(src, bytes, self().lane);
    checker.begin_write(dst, size);
    AsyncCopy copy{dst, src, bytes, zero_fill_bytes, self().group};
    if (!block.lazy_copies()) carry_out(copy);
    self().copies.push_back(copy);
}

void async_commit() { ++self().group; }

void async_wait(unsigned pending_groups, Site) {
    unsigned committed = self().group;
    if (committed > pending_groups) land_before(committed - pending_groups);
}

void async_wait_all(Site) { land_before(self().group + 1); }

void product_reads(const void* pointer, size_t bytes) { checker.product_reads(pointer, bytes); }
void product_sums(const void* registers, size_t bytes, unsigned lane) { checker.product_sums(registers, bytes, lane); }
void product_fence() { checker.product_fence(); }
void product_commit() { checker.product_commit(); }
void product_wait(unsigned pending_groups) { checker.product_wait(pending_groups); }
void async_proxy_fence() { checker.proxy_fence(); }

void async_write_begin(void* dst, size_t bytes, Site) { checker.begin_write(dst, bytes); }
void async_write_end(void* dst, size_t bytes, const void* object) { checker.end_write(dst, bytes, object); }

} // namespace emu
