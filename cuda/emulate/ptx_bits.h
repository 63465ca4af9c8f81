// The bits of floating-point numbers, for the models of matrix products.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emu {
namespace ptx {

constexpr uint32_t nan_bits = 0x7FFFFFFF;  // the NaN that tensor cores give

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline double power_of_two(int exponent) {  // in the range of normal numbers
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}
// floor(log2 |value|) of what is finite and not zero; a subnormal has the smallest normal's, -126.
inline int exponent_of(float value) {
    const auto field = static_cast<int>(bits_of(value) >> 23 & 0xFF);
    return (field ? field : 1) - 127;
}
// The exact sum times scale, truncated toward zero to fp32; what it cannot hold is an infinity. |sum| < 2^53.
inline float toward_zero(int64_t sum, double scale) {
    const double exact = static_cast<double>(sum) * scale;
    if (std::fabs(exact) >= 0x1p128) return exact > 0 ? INFINITY : -INFINITY;
    const auto nearest = static_cast<float>(exact);
    const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(exact);
    return away ? float_of(bits_of(nearest) - 1) : nearest;
}

}  // namespace ptx
}  // namespace emu
