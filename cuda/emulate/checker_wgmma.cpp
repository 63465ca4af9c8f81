// The memory checker's part on warpgroup products: see checker.h.
#include <algorithm>

#include "block.h"
#include "checker.h"
#include "report.h"
#include "shared.h"

namespace emu {

#if EMU_CHECKED

namespace {

inline Thread& self() { return *static_cast<Thread*>(current); }

} // namespace

// --- Shared memory --------------------------------------------------------------------------------------------------

void Checker::product_reads(const void* pointer, size_t bytes) {
    Products& products = products_[self().warp];
    access(pointer, bytes, Access::reading, self().warp * kLanes, kernel_pc());
    products.reads.push_back({static_cast<const std::byte*>(pointer), bytes, products.open});
}

void Checker::product_commit() { ++products_[self().warp].open; }

void Checker::product_wait(unsigned pending_groups) {
    Products& products = products_[self().warp];
    if (products.open <= pending_groups + 1) return;
    products.retired = std::max(products.retired, products.open - 1 - pending_groups);
    auto retired = [&](const ProductRead& read) { return read.group <= products.retired; };
    for (const ProductRead& read : products.reads) {
        if (!retired(read)) continue;
        size_t first = size_t(read.pointer - shared_.base), end = first + read.bytes;
        for (size_t word = first / 4; word * 4 < end; ++word) {
            for (uint32_t i = shared_.heads[word]; i; i = shared_nodes_[i].next) {
                Node& node = shared_nodes_[i];
                if (node.kind != Access::reading || node.thread / kLanes != self().warp) continue;
                if (node.time > products.retired) continue;  // a later group reads it, too
                node.kind = Access::read_by_warp;
                node.time = now_;
            }
        }
    }
    products.reads.erase(std::remove_if(products.reads.begin(), products.reads.end(), retired), products.reads.end());
}

// --- Proxies --------------------------------------------------------------------------------------------------------

void Checker::proxy_fence() {
    const Row& row = rows_[self().id];
    proxy_fences_[self().id].push_back({++now_, settled_, any_rows_ ? row : Row()});
    proxy_fenced_ = settled_;
}

/// Whether a fence.proxy.async lies between a write that `thread` knows and now.
bool Checker::through_proxy(unsigned thread, const Node& written) const {
    if (written.thread == threads_ || written.time < proxy_settled_) return true;  // bulk copies are of that proxy
    for (const ProxyFence& fence : proxy_fences_[written.thread]) {
        if (fence.time <= written.time) continue;
        Node event = written;
        event.time = fence.time;
        if (knows(thread, event)) return true;
    }
    for (const ProxyFence& fence : proxy_fences_[thread]) {
        if (written.time < fence.settled) return true;
        if (!fence.known.empty() && written.time < fence.known[written.thread]) return true;
    }
    return false;
}

void Checker::report_proxy(const Now& now, const std::byte* at, const Node& old) {
    Now byte = now;
    byte.pointer = at;
    fail("no proxy fence: %s; written by %s at %s, and no fence.proxy.async lies between", name_of_access(byte).c_str(),
         name_of(block.threads()[old.thread]).c_str(), name_of_place(old.place).c_str());
}

// --- Accumulators ---------------------------------------------------------------------------------------------------

void Checker::product_sums(const void* registers, size_t bytes, unsigned lane) {
    unsigned thread = self().warp * kLanes + lane;
    auto* first = static_cast<const std::byte*>(registers);
    const void* pc = kernel_pc();
    uint32_t group = products_[self().warp].open;
    auto place = uint32_t(static_cast<const std::byte*>(pc) - kernel_image.begin);
    std::vector<Sums>& known = sums_[thread];
    bool fenced = product_fenced_[thread];
    auto old = std::find_if(known.begin(), known.end(), [&](const Sums& s) { return s.first == first; });
    if (old == known.end()) old = known.insert(old, {first, bytes, group, place, false});
    if (!fenced || old->touched) {
        fail("no wgmma.fence: the wgmma at %s, %s accumulates in registers that the thread has used since the last one",
             name_of_pc(pc).c_str(), name_of(block.threads()[thread]).c_str());
    }
    *old = {first, bytes, group, place, false};
}

void Checker::product_fence() {
    unsigned first = self().warp * kLanes;
    for (unsigned thread = first; thread < std::min(threads_, first + kLanes); ++thread) {
        product_fenced_[thread] = 1;
        for (Sums& sums : sums_[thread]) sums.touched = false;
    }
}

void Checker::touch_register(const std::byte* at, size_t bytes, Access kind, unsigned thread, const void* pc) {
    for (Sums& sums : sums_[thread]) {
        if (at + bytes <= sums.first || sums.first + sums.bytes <= at) continue;
        sums.touched = true;
        if (sums.group <= products_[thread / kLanes].retired) continue;
        fail("in use: %s of a register at %s, %s; the wgmma at %s accumulates there and has not been waited for",
             kind == Access::read ? "read" : "write", name_of_pc(pc).c_str(), name_of(block.threads()[thread]).c_str(),
             name_of_place(sums.place).c_str());
    }
}

#endif

} // namespace emu
