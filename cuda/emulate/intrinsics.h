// Single-thread intrinsics: arithmetic with a stated rounding, bits, cached loads and stores, clocks.
//
// Functions that the device computes exactly (the _rn family, conversions, bit operations) are exact here. Those it
// approximates (__expf, rsqrtf, __fdividef …) are the host's correctly rounded or nearly so: results differ from a GPU's
// in the last bits, so kernels that must agree bit for bit use only the first kind.
#pragma once

#define EMU_FN inline __attribute__((always_inline))

// --- fp32 and fp64 with explicit rounding to nearest ------------------------------------------------------------------
EMU_FN float __fadd_rn(float a, float b) { return a + b; }
EMU_FN float __fsub_rn(float a, float b) { return a - b; }
EMU_FN float __fmul_rn(float a, float b) { return a * b; }
EMU_FN float __fdiv_rn(float a, float b) { return a / b; }
EMU_FN float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
EMU_FN float __frcp_rn(float a) { return 1.0f / a; }
EMU_FN float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMU_FN double __dadd_rn(double a, double b) { return a + b; }
EMU_FN double __dmul_rn(double a, double b) { return a * b; }
EMU_FN double __ddiv_rn(double a, double b) { return a / b; }
EMU_FN double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
EMU_FN double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

// --- Approximations on the device ------------------------------------------------------------------------------------
EMU_FN float rsqrtf(float a) { return float(1.0 / __builtin_sqrt(double(a))); }
EMU_FN double rsqrt(double a) { return 1.0 / __builtin_sqrt(a); }
EMU_FN float __frsqrt_rn(float a) { return rsqrtf(a); }
EMU_FN float __expf(float a) { return expf(a); }
EMU_FN float __exp10f(float a) { return exp10f(a); }
EMU_FN float __logf(float a) { return logf(a); }
EMU_FN float __log2f(float a) { return log2f(a); }
EMU_FN float __log10f(float a) { return log10f(a); }
EMU_FN float __sinf(float a) { return sinf(a); }
EMU_FN float __cosf(float a) { return cosf(a); }
EMU_FN float __tanf(float a) { return tanf(a); }
EMU_FN float __powf(float a, float b) { return powf(a, b); }
EMU_FN float __fdividef(float a, float b) { return a / b; }
EMU_FN float fdividef(float a, float b) { return a / b; }
EMU_FN void __sincosf(float a, float* sine, float* cosine) {
    *sine = sinf(a);
    *cosine = cosf(a);
}
EMU_FN float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; } // NaN gives 0

// --- min and max: any two arithmetic types, as CUDA's overloads ------------------------------------------------------
template <class A, class B>
EMU_FN std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> min(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));
    else return C(a) < C(b) ? C(a) : C(b);
}
template <class A, class B>
EMU_FN std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> max(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
    else return C(a) > C(b) ? C(a) : C(b);
}
EMU_FN unsigned umin(unsigned a, unsigned b) { return a < b ? a : b; }
EMU_FN unsigned umax(unsigned a, unsigned b) { return a > b ? a : b; }

// --- Bits ------------------------------------------------------------------------------------------------------------
namespace emu {
template <class To, class From>
EMU_FN To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
} // namespace emu
EMU_FN int __float_as_int(float a) { return emu::bits_as<int>(a); }
EMU_FN unsigned __float_as_uint(float a) { return emu::bits_as<unsigned>(a); }
EMU_FN float __int_as_float(int a) { return emu::bits_as<float>(a); }
EMU_FN float __uint_as_float(unsigned a) { return emu::bits_as<float>(a); }
EMU_FN long long __double_as_longlong(double a) { return emu::bits_as<long long>(a); }
EMU_FN double __longlong_as_double(long long a) { return emu::bits_as<double>(a); }
EMU_FN int __popc(unsigned a) { return __builtin_popcount(a); }
EMU_FN int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
EMU_FN int __ffs(int a) { return __builtin_ffs(a); }
EMU_FN int __ffsll(long long a) { return __builtin_ffsll(a); }
EMU_FN int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
EMU_FN int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
EMU_FN unsigned __brev(unsigned a) {
    a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
    a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
    a = (a >> 4 & 0x0f0f0f0fu) | (a & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(a);
}
/// Selector nibble i picks byte (nibble & 7) of y:x; with bit 3 set, that byte's sign replicated.
EMU_FN unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned pick = selector >> (4 * i) & 15;
        unsigned byte = unsigned(bytes >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
EMU_FN unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
EMU_FN unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
EMU_FN int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
EMU_FN unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
EMU_FN unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
EMU_FN int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> (8 * i))) * int8_t(b >> (8 * i));
    return c;
}

// --- Conversions -----------------------------------------------------------------------------------------------------
// Out of range, the device saturates and turns NaN into 0; a C++ cast would be undefined.
namespace emu {
template <class Integer>
EMU_FN Integer saturate(double whole) {
    using Limits = std::numeric_limits<Integer>;
    if (whole != whole) return 0;
    if (whole <= double(Limits::min())) return Limits::min();
    if (whole >= double(Limits::max())) return Limits::max();
    return Integer(whole);
}
} // namespace emu
EMU_FN int __float2int_rn(float a) { return emu::saturate<int>(std::nearbyint(double(a))); }
EMU_FN int __float2int_rz(float a) { return emu::saturate<int>(std::trunc(double(a))); }
EMU_FN int __float2int_rd(float a) { return emu::saturate<int>(std::floor(double(a))); }
EMU_FN int __float2int_ru(float a) { return emu::saturate<int>(std::ceil(double(a))); }
EMU_FN unsigned __float2uint_rn(float a) { return emu::saturate<unsigned>(std::nearbyint(double(a))); }
EMU_FN unsigned __float2uint_rz(float a) { return emu::saturate<unsigned>(std::trunc(double(a))); }
EMU_FN unsigned __float2uint_rd(float a) { return emu::saturate<unsigned>(std::floor(double(a))); }
EMU_FN long long __float2ll_rn(float a) { return emu::saturate<long long>(std::nearbyint(double(a))); }
EMU_FN float __int2float_rn(int a) { return float(a); }
EMU_FN float __uint2float_rn(unsigned a) { return float(a); }
EMU_FN float __ll2float_rn(long long a) { return float(a); }
EMU_FN double __int2double_rn(int a) { return a; }
EMU_FN float __double2float_rn(double a) { return float(a); }

// --- Memory: cache hints mean nothing here ---------------------------------------------------------------------------
template <class T> EMU_FN T __ldg(const T* p) { return *p; }
template <class T> EMU_FN T __ldca(const T* p) { return *p; }
template <class T> EMU_FN T __ldcg(const T* p) { return *p; }
template <class T> EMU_FN T __ldcs(const T* p) { return *p; }
template <class T> EMU_FN T __ldcv(const T* p) { return *p; }
template <class T> EMU_FN T __ldlu(const T* p) { return *p; }
template <class T> EMU_FN void __stcg(T* p, T value) { *p = value; }
template <class T> EMU_FN void __stcs(T* p, T value) { *p = value; }
template <class T> EMU_FN void __stwb(T* p, T value) { *p = value; }
template <class T> EMU_FN void __stwt(T* p, T value) { *p = value; }
EMU_FN size_t __cvta_generic_to_shared(const void* p) { return emu::shared_offset(p); }
EMU_FN void* __cvta_shared_to_generic(size_t offset) { return emu::shared_pointer(uint32_t(offset)); }
EMU_FN size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }
EMU_FN unsigned __isShared(const void* p) { return emu::is_shared(p); }
EMU_FN unsigned __isGlobal(const void* p) { return !emu::is_shared(p); }

// --- Time and ends ---------------------------------------------------------------------------------------------------
inline long long clock64() {
    static long long ticks = 0;
    return ++ticks;
}
inline int clock() { return int(clock64()); } // not libc's, which kernels cannot mean
inline void __nanosleep(unsigned) { emu::yield(); }
[[noreturn]] inline void __trap(emu::Site site = emu::Site::here()) { emu::fail_at(site, "__trap"); }
#define __builtin_assume(condition) ((condition) ? void(0) : ::emu::fail_at(::emu::Site::here(), "assumption: %s", #condition))
