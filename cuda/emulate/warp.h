// What the models of CUDA intrinsics and PTX instructions may ask of the emulator's runtime.
//
// A kernel's threads are fibres on one operating-system thread. Exactly one runs at a time, and it runs until it blocks:
// no locks or atomics are needed anywhere in a model. The functions below are the whole seam: simt.h builds the CUDA
// intrinsics on them, ptx.h the PTX instructions. block.cpp implements them.
//
// Memory checking: in a checking build (EMU_CHECKED) the compiler reports the kernel's own loads and stores. A model's
// accesses are invisible to it, so a model announces them with note_read and note_write *before* it makes them.
// In a fast build these calls do nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

/// A place in the kernel's source. As a defaulted parameter `Site site = Site::here()` it is the caller's.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

/// Ends the launch with this report (printf-style), which names kernel, block, thread and, where given, the site.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_at(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// --- Who am I -------------------------------------------------------------------------------------------------------
unsigned thread_id();     ///< 0 … threads of the block - 1: x + y·blockDim.x + z·blockDim.x·blockDim.y
unsigned lane_id();       ///< 0 … 31
unsigned warp_id();       ///< thread_id() / 32
unsigned block_threads(); ///< threads of the block
unsigned warp_lanes();    ///< mask of the calling warp's lanes that exist (the last warp may be partial)
bool on_gpu();            ///< false outside a kernel launch

// --- Meeting --------------------------------------------------------------------------------------------------------
/// All lanes of `mask` meet here; the last to arrive runs model(lanes), where lanes[i] is lane i's `mine` (nullptr
/// outside the mask); then all go on. `mine` may point into the caller's stack and is how results come back.
/// A lane that is not in its own mask, or lanes that come with another mask, model or site, are reported with both
/// sites. Lanes of disjoint masks may meet at different places at once. Orders no memory: see sync_lanes.
using WarpModel = void (*)(void* const lanes[32]);
void warp_collective(unsigned mask, void* mine, WarpModel model, Site site);

/// bar.warp.sync: the lanes of `mask` meet and see each other's memory.
void sync_lanes(unsigned mask, Site site);

/// __syncthreads: all threads of the block, all from the same site. Returns how many came with a true predicate.
unsigned sync_block(bool predicate, Site site);

/// barrier.sync / barrier.arrive `id` for `threads` threads (a multiple of 32; 0 means the whole block). Sites may
/// differ, as in producers and consumers. An arriving thread (wait = false) goes on at once.
void named_barrier(unsigned id, unsigned threads, bool wait, Site site);

/// Blocks until ready(state) is true; for mbarriers and flags. If no thread can go on, the launch fails with a list of
/// who waits where. `ready` must be pure: it is called often, from any fibre.
void wait_until(bool (*ready)(void*), void* state, Site site);

/// Lets other threads run: spin loops, __nanosleep. Counts against the launch's limit of switches.
void yield();

/// Happens-before for objects that live in memory (mbarriers): what the caller did before release(object) is visible
/// to whoever acquires the same object later. Only the checker cares.
void sync_release(const void* object);
void sync_acquire(const void* object);

/// A memory fence of any scope: the calling thread's later atomics release what it has done so far.
void fence();

/// Announces an atomic operation of the calling thread, which follows at once: checked like note_atomic, acquires (and
/// after a fence releases) `pointer`, and now and then lets other threads run, so that a spinning thread ends.
void begin_atomic(const void* pointer, size_t bytes);

/// griddepcontrol.wait of the calling thread: from here on it may touch what kernels before wrote.
void grid_dependency_wait();

// --- Shared memory --------------------------------------------------------------------------------------------------
/// 32-bit shared-window addresses, as in PTX operands.
uint32_t shared_offset(const void* pointer); ///< fails if the pointer is not into shared memory
void* shared_pointer(uint32_t offset);       ///< fails if the offset is beyond shared memory
bool is_shared(const void* pointer);

// --- Accesses that models make --------------------------------------------------------------------------------------
/// `lane` is the lane of the calling warp on whose behalf the model reads or writes (models run in the last arriver).
/// Inside warp_collective a report names the collective's site.
void note_read(const void* pointer, size_t bytes, unsigned lane);
void note_write(const void* pointer, size_t bytes, unsigned lane);
void note_atomic(const void* pointer, size_t bytes, unsigned lane);

// --- Asynchronous copies --------------------------------------------------------------------------------------------
/// cp.async of the calling thread: `bytes` copied, then `zero_fill_bytes` zeros (cp.async's ignore-src tail). They land
/// at the wait (lazy schedule) or at once (eager); until the wait any access to dst is reported.
void async_copy(void* dst, const void* src, size_t bytes, size_t zero_fill_bytes, Site site);
void async_commit();
void async_wait(unsigned pending_groups, Site site); ///< wait_group N: at most N youngest groups stay in flight
void async_wait_all(Site site);                      ///< also copies not yet committed

/// Writes by an asynchronous unit (bulk copies, TMA): between begin and end any access to the bytes is reported. The
/// caller moves the bytes itself, anywhere between the two. From then on those who acquire `object` (the mbarrier) may
/// access them, and who has met one of those at a barrier since; the thread that ends the write is not among them by
/// that alone.
void async_write_begin(void* dst, size_t bytes, Site site);
void async_write_end(void* dst, size_t bytes, const void* object);

// --- Warpgroup products ---------------------------------------------------------------------------------------------
// wgmma runs where it is issued, but a program may count on that only from wait_group on; the checker holds it to that.
// All of the calling warp, except async_proxy_fence, which is the calling thread's.
void product_reads(const void* pointer, size_t bytes);                       ///< shared memory
void product_sums(const void* registers, size_t bytes, unsigned lane);      ///< a lane's accumulators
void product_fence();                         ///< wgmma.fence
void product_commit();                        ///< wgmma.commit_group
void product_wait(unsigned pending_groups);   ///< wgmma.wait_group
void async_proxy_fence();                     ///< fence.proxy.async

/// True if asynchronous work should land as late as the program allows (the schedule's choice), false for at once.
bool async_is_lazy();

} // namespace emu
