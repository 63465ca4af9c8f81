// all_finite: no element of an array is NaN or infinite, i.e. no exponent field is all ones. Memory-bound.

#include "kernels.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements handed out at a time

// The array may be unaligned: a memory-mapped tensor begins where its file says.
template <class Bits>
bool finite_range(const char* data, int64_t count, Bits exponent) {
    constexpr int64_t kStep = 1024;  // leave early at the first bad stretch
    for (int64_t first = 0; first < count; first += kStep) {
        const int64_t stop = min_of(first + kStep, count);
        Bits bad = 0;
        for (int64_t i = first; i < stop; ++i) {
            Bits bits;
            std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));
            bad |= static_cast<Bits>((bits & exponent) == exponent);
        }
        if (bad) return false;
    }
    return true;
}

bool finite_range(const char* data, DType type, int64_t count) {
    if (type == DType::f32) return finite_range<uint32_t>(data, count, 0x7f800000);
    return finite_range<uint16_t>(data, count, type == DType::f16 ? 0x7c00 : 0x7f80);
}

}  // namespace

bool all_finite(const void* data, DType type, int64_t count, ThreadPool& pool) {
    const char* bytes = static_cast<const char*>(data);
    const int64_t chunks = ceil_div(count, kGrain);
    int found = 0;  // only ever set to 1, by any thread, and read after the loop
    pool.parallel_for(chunks, 1, [&](int64_t begin, int64_t end, int) {
        const int64_t first = begin * kGrain, n = min_of(end * kGrain, count) - first;
        if (__atomic_load_n(&found, __ATOMIC_RELAXED)) return;
        if (!finite_range(bytes + first * size_of(type), type, n)) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
    });
    return !found;
}

}  // namespace ENGINE_ISA
}  // namespace engine
