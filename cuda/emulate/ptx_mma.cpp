#include "ptx_mma.h"

#include <cmath>

#include "ptx_bits.h"

namespace emu {
namespace ptx {

namespace {

constexpr int16_t exponent_of_zero = -4096;  // below every sum of exponents, and twice it fits 16 bits
constexpr int lowest_top = -126;

struct Number {
    double value;
    int16_t exponent;
    bool special;
};

Number number_of_bf16(uint32_t code) {
    const float value = float_of(code << 16);
    const bool zero = !(code & 0x7FFF), special = (code & 0x7F80) == 0x7F80;
    return {value, zero ? exponent_of_zero : static_cast<int16_t>(exponent_of(value)), special};
}

Number number_of_f16(uint32_t code) {
    const uint32_t magnitude = code & 0x7FFF, field = magnitude >> 10;
    const double sign = code & 0x8000 ? -1 : 1;
    if (field == 31) return {magnitude & 0x3FF ? NAN : sign * INFINITY, 0, true};
    const double value = sign * (float_of(magnitude << 13) * 0x1p112);  // the field counts from 2^-127 there
    const auto exponent = static_cast<int16_t>((field ? field : 1) - 15);
    return {value, magnitude ? exponent : exponent_of_zero, false};
}

Number number_of_e4m3(uint32_t code) {
    const auto field = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
    if ((code & 0x7F) == 0x7F) return {NAN, 0, true};
    const int exponent = (field ? field : 1) - 7, significand = (field ? 8 : 0) + mantissa;
    const double value = significand * power_of_two(exponent - 3);
    return {code & 0x80 ? -value : value, significand ? static_cast<int16_t>(exponent) : exponent_of_zero, false};
}

Number number_of(Element element, uint32_t code) {
    if (element == Element::bf16) return number_of_bf16(code);
    return element == Element::f16 ? number_of_f16(code) : number_of_e4m3(code);
}

// Infinities and NaNs: no rounding decides them, so any order of a double sum will do.
float special_sum(const Factors& factors, int row, int column, const uint8_t* picked, int begin, int end, float c,
                  bool& found) {
    double sum = c;
    found = !std::isfinite(c);
    for (int s = begin; s < end; ++s) {
        const int k = picked ? picked[s] : s;
        const double a = factors.a[row][s], b = factors.b[k][column];
        found = found || !std::isfinite(a) || !std::isfinite(b);
        sum += a * b;
    }
    return std::isnan(sum) ? float_of(nan_bits) : static_cast<float>(sum);
}

// One step of one row: eight columns at a time, so that the compiler can use vector instructions.
void step_of_row(const Factors& factors, int row, int begin, int end, const uint8_t* picked, Accumulation how,
                 float (&c)[8]) {
    int16_t top[8];
    for (int j = 0; j < 8; ++j) top[j] = static_cast<int16_t>(c[j] == 0 ? lowest_top : exponent_of(c[j]));
    for (int s = begin; s < end; ++s) {
        const int16_t exponent = factors.a_exponent[row][s];
        const int16_t* of_b = factors.b_exponent[picked ? picked[s] : s];
        for (int j = 0; j < 8; ++j) {
            const auto sum = static_cast<int16_t>(exponent + of_b[j]);
            top[j] = top[j] > sum ? top[j] : sum;
        }
    }
    double scale[8];
    int64_t total[8];
    for (int j = 0; j < 8; ++j) {
        scale[j] = power_of_two(how.fraction_bits - top[j]);
        total[j] = static_cast<int64_t>(c[j] * scale[j]);
    }
    for (int s = begin; s < end; s += 16) {  // sixteen products of less than 2^(2 + 25) fit 32 bits with their sign
        int32_t part[8] = {};
        for (int t = s; t < end && t < s + 16; ++t) {
            const double a = factors.a[row][t];
            const double* b = factors.b[picked ? picked[t] : t];
            for (int j = 0; j < 8; ++j) part[j] += static_cast<int32_t>(a * b[j] * scale[j]);
        }
        for (int j = 0; j < 8; ++j) total[j] += part[j];
    }
    for (int j = 0; j < 8; ++j) {
        c[j] = toward_zero(total[j], power_of_two(top[j] - how.fraction_bits));
        if (how.short_result) c[j] = float_of(bits_of(c[j]) & ~0x3FFu);
    }
}

void step_with_specials(const Factors& factors, int row, int begin, int end, const uint8_t* picked, Accumulation how,
                        float (&c)[8]) {
    float decided[8];
    bool found[8];
    Factors finite = factors;  // only the row's own columns are ever looked at again
    for (int j = 0; j < 8; ++j) {
        decided[j] = special_sum(factors, row, j, picked, begin, end, c[j], found[j]);
        if (found[j]) {
            c[j] = 0;
            for (int k = 0; k < Factors::max_k; ++k) finite.b[k][j] = 0, finite.b_exponent[k][j] = exponent_of_zero;
        }
    }
    for (int s = begin; s < end; ++s)
        if (!std::isfinite(finite.a[row][s])) finite.a[row][s] = 0;
    step_of_row(finite, row, begin, end, picked, how, c);
    for (int j = 0; j < 8; ++j) c[j] = found[j] ? decided[j] : c[j];
}

template <int KA, int KB, class Code>
void mma(Element element, Accumulation how, const Code (&a)[16][KA], const Code (&b)[8][KB],
         const Picked* picked, float (&c)[32][4]) {
    Factors factors;
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < KA; ++k) factors.set_a(row, k, element, a[row][k]);
    for (int column = 0; column < 8; ++column)
        for (int k = 0; k < KB; ++k) factors.set_b(k, column, element, b[column][k]);
    accumulate(factors, KA, picked, how, c);
}

// The nibbles of `count` chunks of four k, the first of them chunk `first` of the row.
bool pick_chunks(uint32_t nibbles, int count, int first, uint8_t (&picked)[Factors::max_k]) {
    for (int chunk = 0; chunk < count; ++chunk) {
        const uint32_t low = nibbles >> (4 * chunk) & 3, high = nibbles >> (4 * chunk + 2) & 3;
        if (low >= high) return false;
        picked[2 * (first + chunk)] = static_cast<uint8_t>(4 * (first + chunk) + low);
        picked[2 * (first + chunk) + 1] = static_cast<uint8_t>(4 * (first + chunk) + high);
    }
    return true;
}

}  // namespace

bool pick_16(const uint32_t (&metadata)[32], int selector, Picked& picked) {
    bool legal = true;
    for (int lane = 0; lane < 32; ++lane) {
        const int h = lane % 4 - 2 * selector;
        if (h != 0 && h != 1) continue;
        legal = legal && pick_chunks(metadata[lane], 4, 4 * h, picked[lane / 4]);
        legal = legal && pick_chunks(metadata[lane] >> 16, 4, 4 * h, picked[lane / 4 + 8]);
    }
    return legal;
}

bool pick_s8_k32(const uint32_t (&metadata)[32], int selector, Picked& picked) {
    bool legal = true;
    for (int lane = 0; lane < 32; ++lane) {
        const int h = lane % 4 - 2 * selector;
        if (h == 0 || h == 1) legal = legal && pick_chunks(metadata[lane], 8, 0, picked[lane / 4 + 8 * h]);
    }
    return legal;
}

bool pick_s8_k64(const uint32_t (&metadata)[32], Picked& picked) {
    bool legal = true;
    for (int lane = 0; lane < 32; ++lane)
        legal = legal && pick_chunks(metadata[lane], 8, 8 * (lane >> 1 & 1), picked[lane / 4 + 8 * (lane & 1)]);
    return legal;
}

Accumulation accumulation(int arch, Element element, int k) {
    if (arch >= 900) return {25, k, false};
    if (element == Element::e4m3) return {13, k / 2, true};
    return {24, k / 2, false};
}

void Factors::set_a(int row, int k, Element element, uint32_t code) {
    const Number number = number_of(element, code);
    a[row][k] = number.value;
    a_exponent[row][k] = number.exponent;
    special = special || number.special;
}

void Factors::set_b(int k, int column, Element element, uint32_t code) {
    const Number number = number_of(element, code);
    b[k][column] = number.value;
    b_exponent[k][column] = number.exponent;
    special = special || number.special;
}

void accumulate(const Factors& factors, int count, const Picked* picked, Accumulation how, float (&c)[32][4]) {
    for (int row = 0; row < 16; ++row) {
        const auto element = [&](int j) -> float& { return c[4 * (row % 8) + j / 2][2 * (row / 8) + j % 2]; };
        float sums[8];
        for (int j = 0; j < 8; ++j) sums[j] = element(j);
        for (int begin = 0; begin < count; begin += how.step) {
            bool special = factors.special;
            for (int j = 0; j < 8; ++j) special = special || !std::isfinite(sums[j]);
            const auto step = special ? step_with_specials : step_of_row;
            step(factors, row, begin, begin + how.step, picked ? (*picked)[row] : nullptr, how, sums);
        }
        for (int j = 0; j < 8; ++j) element(j) = sums[j];
    }
}

void mma_16(Element element, int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4]) {
    uint16_t a_codes[16][16], b_codes[8][16];
    unpack_a<2>(a, a_codes);
    unpack_b<2>(b, b_codes);
    mma(element, accumulation(arch, element, 16), a_codes, b_codes, nullptr, c);
}

void mma_e4m3(int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4]) {
    uint8_t a_codes[16][32], b_codes[8][32];
    unpack_a<4>(a, a_codes);
    unpack_b<4>(b, b_codes);
    mma(Element::e4m3, accumulation(arch, Element::e4m3, 32), a_codes, b_codes, nullptr, c);
}

void mma_sp_16(Element element, int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][4], const Picked& picked,
               float (&c)[32][4]) {
    uint16_t a_codes[16][16], b_codes[8][32];
    unpack_a<2>(a, a_codes);
    unpack_b<2>(b, b_codes);
    mma(element, accumulation(arch, element, 16), a_codes, b_codes, &picked, c);
}

}  // namespace ptx
}  // namespace emu
