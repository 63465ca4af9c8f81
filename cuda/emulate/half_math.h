// Functions on bf16 and fp16 that CUDA's headers offer to device code only.
//
// Fused multiply-add rounds once, as the device's; square roots and exponentials are correctly rounded or nearly so
// (the device approximates them).
#pragma once

namespace emu {

/// a·b + c rounded to float "to odd": a later rounding to bf16 or fp16 then gives what one rounding would have.
inline float fma_to_odd(float a, float b, float c) {
    double product = double(a) * double(b);  // exact: both have at most 11 bits
    double sum = product + double(c);
    double error = (product - (sum - (sum - product))) + (double(c) - (sum - product));  // Knuth's two-sum: exact
    float rounded = float(sum);
    double rest = (sum - double(rounded)) + error;
    if (rest == 0.0 || !(__builtin_fabsf(rounded) <= 3.4e38f)) return rounded;
    bool toward_zero = (rest < 0.0) == (rounded > 0.0);
    uint32_t bits = bits_as<uint32_t>(rounded);
    if (rounded == 0.0f) return bits_as<float>(rest < 0.0 ? 0x80000001u : 1u);
    return bits_as<float>((toward_zero ? bits - 1 : bits) | 1u);
}

} // namespace emu

#define EMU_HALF(T, T2, to_float, from_float, from_pair)                                                              \
    inline T __hfma(T a, T b, T c) { return from_float(emu::fma_to_odd(to_float(a), to_float(b), to_float(c))); }     \
    inline T2 __hfma2(T2 a, T2 b, T2 c) { return from_pair(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }           \
    inline T hrsqrt(T a) { return from_float(rsqrtf(to_float(a))); }                                                  \
    inline T hsqrt(T a) { return from_float(sqrtf(to_float(a))); }                                                    \
    inline T hrcp(T a) { return from_float(1.0f / to_float(a)); }                                                     \
    inline T hexp(T a) { return from_float(expf(to_float(a))); }                                                      \
    inline T hexp2(T a) { return from_float(exp2f(to_float(a))); }                                                    \
    inline T hlog(T a) { return from_float(logf(to_float(a))); }                                                      \
    inline T hlog2(T a) { return from_float(log2f(to_float(a))); }                                                    \
    inline T hrint(T a) { return from_float(nearbyintf(to_float(a))); }                                               \
    inline T hfloor(T a) { return from_float(floorf(to_float(a))); }                                                  \
    inline T hceil(T a) { return from_float(ceilf(to_float(a))); }                                                    \
    inline T htrunc(T a) { return from_float(truncf(to_float(a))); }                                                  \
    inline T2 h2exp2(T2 a) { return from_pair(hexp2(a.x), hexp2(a.y)); }                                              \
    inline T2 h2rsqrt(T2 a) { return from_pair(hrsqrt(a.x), hrsqrt(a.y)); }
EMU_HALF(__nv_bfloat16, __nv_bfloat162, __bfloat162float, __float2bfloat16_rn, __halves2bfloat162)
EMU_HALF(__half, __half2, __half2float, __float2half_rn, __halves2half2)
#undef EMU_HALF
