// Memory for weights: many arrays, large ones, that live as long as the model.
//
// They lie one after the other in slabs advised to use huge pages: a GEMV crosses a 4 KB page every 100 ns, and both
// the page walks and the prefetchers' restarts would show. Separate huge-page allocations would waste 1 MB each on
// average. A slab is freed with the last array in it; pages never written cost nothing.
#pragma once

#include <cstddef>
#include <memory>

namespace engine {

class Slabs {
public:
    // `bytes` of 64-byte aligned memory; what it holds is up to chance until written. Throws std::bad_alloc.
    std::shared_ptr<void> allocate(size_t bytes);

private:
    std::shared_ptr<char> slab_;  // the one being filled
    size_t used_ = 0, size_ = 0;
};

}  // namespace engine
