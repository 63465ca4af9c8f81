#include "slabs.h"

#include <cstdlib>
#include <new>

#include <sys/mman.h>

namespace engine {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlab = size_t{64} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::shared_ptr<char> new_slab(size_t bytes) {
    char* data = static_cast<char*>(std::aligned_alloc(kHugePage, bytes));
    if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: harmless where refused
#endif
    return {data, std::free};
}

}  // namespace

std::shared_ptr<void> Slabs::allocate(size_t bytes) {
    bytes = round_up(bytes, 64);
    if (bytes > kSlab / 2) return new_slab(round_up(bytes, kHugePage));
    if (used_ + bytes > size_) {
        slab_ = new_slab(kSlab);
        size_ = kSlab;
        used_ = 0;
    }
    const std::shared_ptr<void> memory(slab_, slab_.get() + used_);
    used_ += bytes;
    return memory;
}

}  // namespace engine
