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

enum class Access : uint8_t { read, write, atomic, in_flight };

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

    // Asynchronous writes: in flight, then done. With an object they are released there, and are no thread's own;
    // without one they become the calling thread's.
    void begin_write(const void* pointer, size_t bytes);
    void end_write(const void* pointer, size_t bytes, const void* object);

private:
    struct Node {
        uint32_t next, time, block;
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
    void begin_write(const void*, size_t) {}
    void end_write(const void*, size_t, const void*) {}
};

#endif

extern Checker checker;

} // namespace emu
