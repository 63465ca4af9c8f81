// The memory checker: see checker.h. Empty in a fast build.
#include "checker.h"

#include <sys/mman.h>

#include <algorithm>

#include "block.h"
#include "report.h"
#include "shared.h"

namespace emu {

Checker checker;

#if EMU_CHECKED

namespace {

inline Thread& self() { return *static_cast<Thread*>(current); }

const char* verb(Access kind) {
    switch (kind) {
        case Access::read: return "read";
        case Access::write: return "write";
        case Access::atomic: return "atomic";
        case Access::in_flight: return "asynchronous copy";
        case Access::reading:
        case Access::read_by_warp: return "wgmma's read";
    }
    return "";
}

} // namespace

// --- Launches and blocks --------------------------------------------------------------------------------------------

void Checker::begin_launch(const Launch& launch) {
    runtime_ = image_of(this);
    dependent_ = launch.dependent;
    shared_nodes_.assign(1, {});
    global_nodes_.assign(1, {});
    shared_free_ = global_free_ = 0;
    released_to_blocks_.clear();
    globals_.clear();
    last_global_ = nullptr;
    if (shared_.base != shared_memory.at(0) || shared_.words != (shared_memory.bytes() + 3) / 4) {
        unmap_history(shared_);  // another module's
        map_history(shared_, shared_memory.at(0), shared_memory.bytes());
    }
    shared_.shared = true;
    shared_.nodes = &shared_nodes_;
    shared_.free = &shared_free_;
    written_.resize(shared_.words);
    for (uint32_t i = 0; i < launch.region_count; ++i) {
        Global global{launch.regions[i], {}};
        if (global.region.writable) map_history(global.history, global.region.base, global.region.bytes);
        global.history.nodes = &global_nodes_;
        global.history.free = &global_free_;
        globals_.push_back(global);
    }
    auto by_address = [](const Global& a, const Global& b) { return a.region.base < b.region.base; };
    std::sort(globals_.begin(), globals_.end(), by_address);
    size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    known_blocks_.assign(blocks, false);
}

void Checker::end_launch() {
    for (Global& global : globals_) unmap_history(global.history);
    globals_.clear();
}

void Checker::begin_block(unsigned linear_index, unsigned threads) {
    block_ = linear_index;
    threads_ = threads;
    now_ = settled_ = 1;
    async_settled_ = 0;
    warp_settled_.assign((threads + kLanes - 1) / kLanes, 0);
    rows_.assign(threads, {});
    any_rows_ = false;
    fenced_.assign(threads, 0);
    waited_.assign(threads, 0);
    products_.assign(warp_settled_.size(), {});
    sums_.assign(threads, {});
    product_fenced_.assign(threads, 0);
    proxy_fences_.assign(threads, {});
    proxy_fenced_ = proxy_settled_ = 0;
    released_.clear();
    known_blocks_.assign(known_blocks_.size(), false);
    for (SharedMemory::Range range : shared_memory.used()) {
        size_t first = range.begin / 4, words = (range.end + 3) / 4 - first;
        std::fill_n(shared_.heads + first, words, 0);
        std::fill_n(written_.begin() + std::ptrdiff_t(first), words, 0);
    }
    shared_nodes_.resize(1);
    shared_free_ = 0;
}

void Checker::map_history(History& history, std::byte* base, size_t bytes) {
    auto begin = reinterpret_cast<uintptr_t>(base) & ~uintptr_t(3);
    history.base = reinterpret_cast<std::byte*>(begin);
    history.words = (reinterpret_cast<uintptr_t>(base) + bytes - begin + 3) / 4;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* heads = mmap(nullptr, history.words * 4 + 4, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (heads == MAP_FAILED) fail("no memory to check %zu bytes", bytes);
    history.heads = static_cast<uint32_t*>(heads);
}

void Checker::unmap_history(History& history) {
    if (history.heads) munmap(history.heads, history.words * 4 + 4);
    history.heads = nullptr;
}

// --- One access -----------------------------------------------------------------------------------------------------

void Checker::access(const void* pointer, size_t bytes, Access kind, unsigned thread, const void* pc) {
    if (watchdog_expired) report_time_limit(kernel_pc());
    auto* at = static_cast<const std::byte*>(pointer);
    if (block.stacks().contains(at)) {  // its own variables
        if (!sums_[thread].empty()) touch_register(at, bytes, kind, thread, pc);
        return;
    }
    if (runtime_.contains(at)) return;  // threadIdx
    auto place = uint32_t(static_cast<const std::byte*>(pc) - kernel_image.begin);
    if (shared_memory.contains(at)) {
        access_shared({at, bytes, kind, thread, place});
    } else if (!kernel_image.contains(at)) {  // its constants and __device__ tables are not checked
        access_global({at, bytes, kind, thread, place});
    }
}

void Checker::access_shared(const Now& now) {
    size_t offset = shared_memory.offset(now.pointer);
    if (!shared_memory.array_at(offset, now.bytes)) report_out_of_bounds(now);
    record(now, shared_);
}

void Checker::access_global(const Now& now) {
    auto holds = [&](const Global& g) {
        return now.pointer >= g.region.base && now.pointer + now.bytes <= g.region.base + g.region.bytes;
    };
    if (!last_global_ || !holds(*last_global_)) {
        auto found = std::find_if(globals_.begin(), globals_.end(), holds);
        if (found == globals_.end()) report_out_of_bounds(now);
        last_global_ = &*found;
    }
    if (dependent_ && !waited_[now.thread]) check_early(now);
    if (last_global_->history.heads) return record(now, last_global_->history);
    if (now.kind != Access::read) {
        fail("%s, an array that the kernel takes as pointer to const", name_of_access(now).c_str());
    }
}

/// Before griddepcontrol.wait, in last_global_.
void Checker::check_early(const Now& now) const {
    if (now.kind == Access::read && last_global_->region.early) return;
    fail("too early: %s, before griddepcontrol.wait; %s", name_of_access(now).c_str(),
         now.kind == Access::read ? "a kernel before may still write there" : "a kernel before may still use it");
}

void Checker::grid_dependency_wait() { waited_[self().id] = 1; }

void Checker::end_thread() {
    if (dependent_ && !waited_[self().id]) {
        fail("%s ends without griddepcontrol.wait; a kernel behind this one counts on it", name_of(self()).c_str());
    }
}

void Checker::record(const Now& now, History& history) {
    size_t first = size_t(now.pointer - history.base), end = first + now.bytes;
    for (size_t word = first / 4; word * 4 < end; ++word) {
        size_t from = std::max(first, word * 4) - word * 4, to = std::min(end, word * 4 + 4) - word * 4;
        touch(now, history, word, uint8_t((1u << to) - (1u << from)));
    }
}

/// Compares the access with the word's history, drops what it covers, and adds it.
void Checker::touch(const Now& now, History& history, size_t word, uint8_t mask) {
    if (history.shared) {
        if (now.kind == Access::write) written_[word] |= mask;
        uint8_t missing = mask & ~written_[word];
        bool reads = now.kind != Access::write && now.kind != Access::in_flight;
        if (missing && reads) {
            // An asynchronous copy in flight is the better explanation: found below, as a race.
            bool in_flight = false;
            for (uint32_t i = history.heads[word]; i; i = (*history.nodes)[i].next) {
                in_flight |= (*history.nodes)[i].kind == Access::in_flight;
            }
            if (!in_flight) {
                Now byte = now;
                byte.pointer = history.base + word * 4 + __builtin_ctz(missing);
                fail("uninitialised: %s, which no thread of this block has written yet", name_of_access(byte).c_str());
            }
        }
    }
    std::vector<Node>& nodes = *history.nodes;
    uint32_t* link = &history.heads[word];
    uint32_t time = now.kind == Access::reading ? products_[now.thread / kLanes].open : now_;
    if (Node& last = nodes[*link]; *link && repeats(now, last, mask)) {
        last.time = time;
        last.place = now.place;
        return;
    }
    unsigned other_readers = 0;
    while (uint32_t i = *link) {
        Node& old = nodes[i];
        if ((old.mask & mask) && conflict(old.kind, now.kind) && !knows(now.thread, old)) {
            report_race(now, history.base + word * 4 + __builtin_ctz(old.mask & mask), old);
        }
        if (now.kind == Access::reading && old.kind == Access::write && (old.mask & mask) &&
            !through_proxy(now.thread, old)) {
            report_proxy(now, history.base + word * 4 + __builtin_ctz(old.mask & mask), old);
        }
        if (covers(now, history, old, mask)) {
            *link = old.next;
            old.next = *history.free;
            *history.free = i;
            continue;
        }
        other_readers += old.kind == Access::read && old.block != block_ && !(mask & ~old.mask);
        link = &old.next;
    }
    // Two blocks that read are enough to find a third that writes: one of them is not the writer.
    if (now.kind == Access::read && other_readers >= 2) return;
    uint32_t added = new_node(history);
    nodes[added] = {history.heads[word], time, block_, now.place, uint16_t(now.thread), mask, now.kind};
    history.heads[word] = added;
}

/// The thread did the same just before, and nothing has come between: what was compared then holds.
bool Checker::repeats(const Now& now, const Node& last, uint8_t mask) const {
    return last.thread == now.thread && last.kind == now.kind && last.mask == mask && last.block == block_ &&
           now.kind != Access::in_flight;
}

bool Checker::conflict(Access a, Access b) {
    if (a == Access::in_flight || b == Access::in_flight) return true;
    auto reads = [](Access kind) {
        return kind == Access::read || kind == Access::reading || kind == Access::read_by_warp;
    };
    return !(reads(a) && reads(b)) && !(a == Access::atomic && b == Access::atomic);
}

/// Whether `thread` comes after the access `old` by synchronisation or program order.
bool Checker::knows(unsigned thread, const Node& old) const {
    if (old.kind == Access::in_flight || old.kind == Access::reading) return false;
    if (old.block != block_) return known_blocks_[old.block];
    if (old.kind == Access::read_by_warp) {
        unsigned first = old.thread / kLanes * kLanes, end = std::min(threads_, first + kLanes);
        if (old.time < settled_ || (first <= thread && thread < end)) return true;
        if (!any_rows_ || rows_[thread].empty()) return false;
        return *std::max_element(&rows_[thread][first], &rows_[thread][end]) > old.time;
    }
    if (old.thread == threads_) {
        return old.time < async_settled_ || (any_rows_ && !rows_[thread].empty() && old.time < rows_[thread][threads_]);
    }
    if (old.thread == thread || old.time < settled_) return true;
    if (old.thread / kLanes == thread / kLanes && old.time < warp_settled_[thread / kLanes]) return true;
    return any_rows_ && !rows_[thread].empty() && old.time < rows_[thread][old.thread];
}

/// Whether any later access that would conflict with `old` and not know it would do the same with the new access.
bool Checker::covers(const Now& now, const History& history, const Node& old, uint8_t mask) const {
    if (old.kind == Access::in_flight) return false;
    if (old.kind == Access::reading) {  // a later group of the same warp is retired later
        return now.kind == Access::reading && now.thread / kLanes == old.thread / kLanes && !(old.mask & ~mask);
    }
    if (history.shared && old.time < (old.thread == threads_ ? async_settled_ : settled_)) {  // all know it
        bool through = old.kind != Access::write || old.thread == threads_ || old.time < proxy_settled_;
        if (through) return true;  // and no wgmma will ask for a fence
    }
    if ((old.mask & ~mask) || !knows(now.thread, old)) return false;
    return now.kind == Access::write || now.kind == old.kind;
}

uint32_t Checker::new_node(History& history) {
    if (uint32_t free = *history.free) {
        *history.free = (*history.nodes)[free].next;
        return free;
    }
    history.nodes->emplace_back();
    return uint32_t(history.nodes->size() - 1);
}

// --- Asynchronous writes --------------------------------------------------------------------------------------------

void Checker::begin_write(const void* pointer, size_t bytes) {
    access(pointer, bytes, Access::in_flight, self().id, kernel_pc());
}

void Checker::end_write(const void* pointer, size_t bytes, const void* object) {
    auto* at = static_cast<const std::byte*>(pointer);
    if (!shared_memory.contains(at)) return;
    unsigned writer = object ? threads_ : self().id;
    size_t first = size_t(at - shared_.base), end = first + bytes;
    for (size_t word = first / 4; word * 4 < end; ++word) {
        size_t from = std::max(first, word * 4) - word * 4, to = std::min(end, word * 4 + 4) - word * 4;
        written_[word] |= uint8_t((1u << to) - (1u << from));
        for (uint32_t i = shared_.heads[word]; i; i = shared_nodes_[i].next) {
            Node& node = shared_nodes_[i];
            if (node.kind != Access::in_flight) continue;
            node.kind = Access::write;
            node.time = now_;
            node.thread = uint16_t(writer);
        }
    }
    if (!object) return;
    Row& released = released_[object];
    released.resize(threads_ + 1);
    released[threads_] = ++now_;
}

// --- Synchronisation ------------------------------------------------------------------------------------------------

void Checker::sync_block() {
    settled_ = ++now_;
    for (const Row& row : rows_) {
        if (any_rows_ && !row.empty()) async_settled_ = std::max(async_settled_, row[threads_]);
    }
    if (any_rows_) rows_.assign(threads_, {});
    any_rows_ = false;
    proxy_settled_ = proxy_fenced_;
    for (std::vector<ProxyFence>& fences : proxy_fences_) {
        if (fences.size() > 1) fences.erase(fences.begin(), fences.end() - 1);
    }
}

void Checker::sync_lanes(unsigned mask) {
    Warp& warp = block.warp_of(self());
    if (mask == warp.exists && !any_rows_) {
        warp_settled_[self().warp] = ++now_;
        return;
    }
    std::vector<unsigned> group;
    for (; mask; mask &= mask - 1) group.push_back(self().warp * kLanes + unsigned(__builtin_ctz(mask)));
    join(group);
}

/// All that `thread` knows, written out by thread.
Checker::Row Checker::known_to(unsigned thread) const {
    Row row = rows_[thread].empty() ? Row(threads_ + 1, 0) : rows_[thread];
    for (unsigned u = 0; u < threads_; ++u) row[u] = std::max(row[u], settled_);
    row[threads_] = std::max(row[threads_], async_settled_);
    unsigned warp = thread / kLanes;
    for (unsigned u = warp * kLanes; u < std::min(threads_, (warp + 1) * kLanes); ++u) {
        row[u] = std::max(row[u], warp_settled_[warp]);
    }
    return row;
}

Checker::Row& Checker::row_of(unsigned thread) {
    any_rows_ = true;
    if (rows_[thread].empty()) rows_[thread].assign(threads_ + 1, 0);
    return rows_[thread];
}

namespace {

void take_maximum(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    if (into.empty()) into.assign(from.size(), 0);
    for (size_t u = 0; u < into.size(); ++u) into[u] = std::max(into[u], from[u]);
}

} // namespace

void Checker::join(const std::vector<unsigned>& group) {
    ++now_;
    Row all(threads_ + 1, 0);
    for (unsigned t : group) take_maximum(all, known_to(t));
    for (unsigned t : group) all[t] = now_;
    for (unsigned t : group) row_of(t) = all;
}

void Checker::release(const void* object) {
    Row known = known_to(self().id);
    known[self().id] = ++now_;
    take_maximum(released_[object], known);
    auto* at = static_cast<const std::byte*>(object);
    if (shared_memory.contains(at) || kernel_image.contains(at)) return;  // no other block's business
    BlockSet& blocks = released_to_blocks_[object];
    blocks.resize(known_blocks_.size());
    for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = blocks[b] || known_blocks_[b] || b == block_;
}

void Checker::acquire(const void* object) {
    if (auto found = released_.find(object); found != released_.end()) take_maximum(row_of(self().id), found->second);
    if (auto found = released_to_blocks_.find(object); found != released_to_blocks_.end()) {
        for (size_t b = 0; b < found->second.size(); ++b) known_blocks_[b] = known_blocks_[b] || found->second[b];
    }
}

void Checker::fence() { fenced_[self().id] = 1; }

/// An atomic sees what was released at its address, and releases what its thread did before a fence.
void Checker::atomic_order(const void* pointer) {
    acquire(pointer);
    if (fenced_[self().id]) release(pointer);
}

// --- Reports --------------------------------------------------------------------------------------------------------

std::string Checker::name_of_place(uint32_t place) const { return name_of_pc(kernel_image.begin + place); }

std::string Checker::name_of_memory(const std::byte* pointer) const {
    if (shared_memory.contains(pointer)) return shared_memory.describe(shared_memory.offset(pointer));
    const Global* nearest = nullptr;
    auto distance = [&](const Global& g) {
        if (pointer < g.region.base) return size_t(g.region.base - pointer);
        return size_t(std::max(pointer - (g.region.base + g.region.bytes) + 1, std::ptrdiff_t(0)));
    };
    for (const Global& global : globals_) {
        if (!nearest || distance(global) < distance(*nearest)) nearest = &global;
    }
    if (!nearest || distance(*nearest) > (1u << 20)) {
        char text[40];
        std::snprintf(text, sizeof text, "address %p, no argument's", static_cast<const void*>(pointer));
        return text;
    }
    return std::string(nearest->region.name) + ", byte " + std::to_string(pointer - nearest->region.base) + " of " +
           std::to_string(nearest->region.bytes);
}

std::string Checker::name_of_access(const Now& now) const {
    return std::string(verb(now.kind)) + " of " + std::to_string(now.bytes) + " bytes at " + name_of_place(now.place) + ": " +
           name_of_memory(now.pointer) + ", " + name_of(block.threads()[now.thread]);
}

void Checker::report_out_of_bounds(const Now& now) { fail("out of bounds: %s", name_of_access(now).c_str()); }

void Checker::report_race(const Now& now, const std::byte* at, const Node& old) {
    Now byte = now;
    byte.pointer = at;
    std::string what = name_of_access(byte), where = name_of_place(old.place);
    if (old.kind == Access::in_flight) {
        fail("in flight: %s; %s issued a copy there at %s and has not waited for it", what.c_str(),
             name_of(block.threads()[old.thread]).c_str(), where.c_str());
    }
    if (old.kind == Access::reading) {
        fail("in use: %s; a wgmma of warp %u at %s reads there and has not been waited for", what.c_str(),
             old.thread / kLanes, where.c_str());
    }
    std::string who = old.block != block_       ? "thread number " + std::to_string(old.thread) + " of block number " + std::to_string(old.block)
                      : old.thread == threads_ ? "a bulk copy"
                                               : name_of(block.threads()[old.thread]);
    fail("%s: %s; %s by %s at %s, and nothing orders the two", old.block == block_ ? "data race" : "race between blocks",
         what.c_str(), verb(old.kind), who.c_str(), where.c_str());
}

#endif

} // namespace emu
