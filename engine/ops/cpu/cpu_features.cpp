#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace engine {

#if defined(__x86_64__)

namespace {

struct Leaf {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
    Leaf r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf does not exist
    return r;
}

bool all_bits(uint32_t word, uint32_t bits) { return (word & bits) == bits; }
constexpr uint32_t bit(int n) { return uint32_t{1} << n; }

// Register state the operating system saves on a context switch: XCR0 bits 1-2 SSE and AVX, 5-7 AVX-512.
uint32_t saved_state() {
    if (!all_bits(cpuid(1, 0).ecx, bit(27))) return 0;  // no OSXSAVE
    uint32_t eax, edx;
    asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

}  // namespace

bool cpu_has_avx2() {
    return all_bits(saved_state(), bit(1) | bit(2))
           && all_bits(cpuid(1, 0).ecx, bit(12) | bit(28) | bit(29))  // FMA AVX F16C
           && all_bits(cpuid(7, 0).ebx, bit(5));                      // AVX2
}

bool cpu_has_avx512() {
    return cpu_has_avx2() && all_bits(saved_state(), bit(5) | bit(6) | bit(7))
           && all_bits(cpuid(7, 0).ebx, bit(16) | bit(17) | bit(30) | bit(31));  // F DQ BW VL
}

bool cpu_has_avx512_bf16() {  // Zen 4, Sapphire Rapids and later; the one older CPU with BF16, Cooper Lake, has no VBMI
    return cpu_has_avx512() && all_bits(cpuid(7, 0).ecx, bit(1) | bit(11))  // VBMI VNNI
           && all_bits(cpuid(7, 1).eax, bit(5));                             // BF16
}

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }

#endif

}  // namespace engine
