// Divisor of cuda/prepare.cuh, restated, for all mantissas of g (24 bits) and x (8 bits): how many pairs have a quotient
// that might be rounded to another bf16 or E4M3 than x / g is.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

static uint32_t bits(float x) {
    uint32_t raw;
    std::memcpy(&raw, &x, 4);
    return raw;
}
static float number(uint32_t raw) {
    float x;
    std::memcpy(&x, &raw, 4);
    return x;
}
// Whether every rounding to at most 8 significant bits makes the same of both: they are equal, or lie between the same
// two numbers of 9 bits.
static bool alike(float a, float b) {
    const uint32_t rest = (1u << 15) - 1, left = bits(a), right = bits(b);
    return (left == right) | ((left >> 15 == right >> 15) & ((left & rest) != 0) & ((right & rest) != 0));
}

int main() {
    long wrong = 0;
    for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
        const float g = number(0x3f800000u | mantissa), inverse = 1.0f / g;
        const float high = std::fmaf(-g, inverse, 1.0f) < 0 ? number(bits(inverse) - 1) : inverse;
        const float low = std::fmaf(-g, high, 1.0f) * inverse;
        if (low < 0) ++wrong;
        int found = 0;
        for (int i = 128; i < 256; ++i) {
            const float x = static_cast<float>(i);
            found += !alike(std::fmaf(x, high, x * low), x / g);
        }
        wrong += found;
    }
    std::printf("%ld\n", wrong);
}
