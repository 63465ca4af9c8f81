// The checking build's memory checker: data races, uninitialised reads, accesses out of bounds.
//
// Order. The runtime's fibres run one at a time, so a global clock `now` that each synchronisation advances stamps every
// access. Thread t knows what thread u did before time known(t, u): the last block barrier, the last __syncwarp of their
// warp, or t's own row, which named barriers, mbarriers and atomics after a fence fill in. Two accesses to a byte
// by different threads, one of them a write, race unless the later thread knows the earlier access. That holds or fails
// whatever the schedule was, as long as control flow does not depend on it. Shuffles and mma order nothing.
//
// History. Each 4-byte word of shared memory, and of arrays that the kernel may write, has a list of the accesses that
// still matter: (kind, byte mask, thread, block, time, place in the code). A new access is compared with all of them and
// replaces those it makes redundant, so lists stay short. Blocks run one after another; between them only atomics after
// __threadfence order anything.
//
// Arrays that the kernel takes as pointers to const have no history, only bounds. Not seen: accesses by libc functions
// called by name (memcpy of a length unknown when compiling).
//
// A kernel that is launched while those before it still run must not touch what they may write, or store anything, before
// its griddepcontrol.wait, and each of its threads must come to one. The launcher says which arrays no kernel writes.
//
// wgmma (checker_wgmma.cpp) reads shared memory at any time between its issue and the wait_group of its warp that
// retires its group; from then on the read is an ordinary one of all the warp's lanes, which another warp's write must
// know, by a barrier. It reads on behalf of its warp's first lane. What a thread wrote, or cp.async for it, needs a
// fence.proxy.async before a wgmma reads it: one that follows the write in the writer, or in the reading lane, or in
// any thread with a __syncthreads on both sides.
//
// Accumulators are known by their variables' addresses: from issue to wait nobody may touch them, and after a touch
// comes a wgmma.fence before the next wgmma on them. Not seen: A's fragments and metadata in registers, which the
// compiler does know (it serialises wgmma where they change too early); a first wgmma's accumulators written between
// fence and issue. Stricter than GPUs may be: each warp of a warpgroup retires its own
// part; a fence of a third thread between named barriers or mbarriers does not count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "image.h"
#include "launch.h"
#include "warp.h"

namespace emu {

#if EMU_CHECKED

// in_flight: written by a copy not waited for; reading: by a wgmma not waited for; read_by_warp: by one its warp has
// waited for.
enum class Access : uint8_t { read, write, atomic, in_flight, reading, read_by_warp };

class Checker {
public:
    void begin_launch(const Launch& launch);
    void begin_block(unsigned linear_index, unsigned threads);
    void end_launch();

    /// Reports and ends the launch if this access of the block's thread `thread`, made at `pc`, is wrong.
    void access(const void* pointer, size_t bytes, Access kind, unsigned thread, const void* pc);

    // Synchronisation. The calling thread, or the lanes of its warp.
    void sync_block();
    void sync_lanes(unsigned mask);
    void release(const void* object);
    void acquire(const void* object);
    void fence();                       // __threadfence and its relatives: makes later atomics release
    void atomic_order(const void* pointer);

    void grid_dependency_wait();
    void end_thread();

    // Asynchronous writes: in flight, then done. With an object they are released there, and are no thread's own;
    // without one they become the calling thread's.
    void begin_write(const void* pointer, size_t bytes);
    void end_write(const void* pointer, size_t bytes, const void* object);

    // Warpgroup products of the calling warp; the proxy fence of the calling thread.
    void product_reads(const void* pointer, size_t bytes);
    void product_sums(const void* registers, size_t bytes, unsigned lane);
    void product_fence();
    void product_commit();
    void product_wait(unsigned pending_groups);
    void proxy_fence();

private:
    struct Node {
        uint32_t next, time, block;  // time of what is being read: the number of its group
        uint32_t place;  // its code, from the start of the kernels' module
        uint16_t thread;
        uint8_t mask;  // bytes of the word
        Access kind;
    };
    /// The words of a stretch of memory, each with a list of nodes (index 0: none).
    struct History {
        std::byte* base = nullptr;  // a multiple of 4
        uint32_t* heads = nullptr;
        size_t words = 0;
        bool shared = false;        // of this block only; must be written before it is read
        std::vector<Node>* nodes = nullptr;
        uint32_t* free = nullptr;   // list of nodes to use again
    };
    struct Global {
        Region region;
        History history;  // no heads where the kernel does not write
    };
    using Row = std::vector<uint32_t>;  // by thread: what it did before this time is known; last, asynchronous writes
    using BlockSet = std::vector<bool>;
    struct ProductRead {
        const std::byte* pointer;
        size_t bytes;
        uint32_t group;
    };
    struct Products {  // of a warp: groups are numbered from 1; the open one, the last one retired, what others read
        uint32_t open = 1, retired = 0;
        std::vector<ProductRead> reads;
    };
    struct Sums {  // a thread's accumulators, in its variables
        const std::byte* first;
        size_t bytes;
        uint32_t group;  // the last that works on them
        uint32_t place;
        bool touched;    // since the last wgmma.fence
    };
    struct ProxyFence {
        uint32_t time, settled;
        Row known;  // empty: no more than `settled` says
    };
    struct Now {  // the access being checked
        const std::byte* pointer;
        size_t bytes;
        Access kind;
        unsigned thread;
        uint32_t place;
    };

    void access_shared(const Now& now);
    void access_global(const Now& now);
    void record(const Now& now, History& history);
    void touch(const Now& now, History& history, size_t word, uint8_t mask);
    bool repeats(const Now& now, const Node& last, uint8_t mask) const;
    bool covers(const Now& now, const History& history, const Node& old, uint8_t mask) const;
    bool knows(unsigned thread, const Node& old) const;
    static bool conflict(Access a, Access b);
    void touch_register(const std::byte* at, size_t bytes, Access kind, unsigned thread, const void* pc);
    bool through_proxy(unsigned thread, const Node& written) const;
    [[noreturn]] void report_proxy(const Now& now, const std::byte* at, const Node& old);
    uint32_t new_node(History& history);
    void map_history(History& history, std::byte* base, size_t bytes);
    void unmap_history(History& history);

    Row& row_of(unsigned thread);
    Row known_to(unsigned thread) const;
    void join(const std::vector<unsigned>& group);

    std::string name_of_place(uint32_t place) const;
    std::string name_of_memory(const std::byte* pointer) const;
    std::string name_of_access(const Now& now) const;
    [[noreturn]] void report_out_of_bounds(const Now& now);
    void check_early(const Now& now) const;
    [[noreturn]] void report_race(const Now& now, const std::byte* at, const Node& old);

    uint32_t now_ = 1;
    uint32_t settled_ = 1;        // what any thread did before is known to all
    uint32_t async_settled_ = 0;  // asynchronous writes before are known to all: a barrier alone does not order them
    std::vector<uint32_t> warp_settled_;
    std::vector<Row> rows_;       // empty where a thread knows no more than its warp
    bool any_rows_ = false;
    std::vector<uint8_t> fenced_;
    std::unordered_map<const void*, Row> released_;            // within the block
    std::unordered_map<const void*, BlockSet> released_to_blocks_;
    BlockSet known_blocks_;
    bool dependent_ = false;
    std::vector<uint8_t> waited_;  // by thread: for the kernels before
    std::vector<Products> products_;       // by warp
    std::vector<std::vector<Sums>> sums_;  // by thread
    std::vector<uint8_t> product_fenced_;
    std::vector<std::vector<ProxyFence>> proxy_fences_;  // by thread, since the last block barrier, and one before
    uint32_t proxy_fenced_ = 0, proxy_settled_ = 0;      // what any fence covers; what one before the last barrier did
    unsigned block_ = 0, threads_ = 0;  // threads_ is also the number of the thread that asynchronous writes count as

    History shared_;
    std::vector<uint8_t> written_;  // by word of shared memory: mask of bytes that have a value
    std::vector<Node> shared_nodes_, global_nodes_;
    uint32_t shared_free_ = 0, global_free_ = 0;
    std::vector<Global> globals_;   // by address
    Global* last_global_ = nullptr;
    Image runtime_;  // this library
};

#else

struct Checker {  // the fast build's: nothing
    void begin_launch(const Launch&) {}
    void begin_block(unsigned, unsigned) {}
    void end_launch() {}
    void sync_block() {}
    void sync_lanes(unsigned) {}
    void release(const void*) {}
    void acquire(const void*) {}
    void fence() {}
    void atomic_order(const void*) {}
    void grid_dependency_wait() {}
    void end_thread() {}
    void begin_write(const void*, size_t) {}
    void end_write(const void*, size_t, const void*) {}
    void product_reads(const void*, size_t) {}
    void product_sums(const void*, size_t, unsigned) {}
    void product_fence() {}
    void product_commit() {}
    void product_wait(unsigned) {}
    void proxy_fence() {}
};

#endif

extern Checker checker;

} // namespace emu
