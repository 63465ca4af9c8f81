// Matrix instructions on 16- and 8-bit elements, as pure functions of 32 lanes' registers.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16 / k32"; lane l, g = l >> 2, q = l & 3, register r; an element
// of 32/E bits, i its place in the register, 0 lowest):
//     A    row g + 8 (r & 1), k = E q + i + 4 E (r >> 1)
//     B    column g,          k = E q + i + 4 E r
//     C/D  row g + 8 (r >> 1), column 2 q + (r & 1)
// and so for every E: 2 (bf16, f16), 4 (s8, e4m3), 8 (e2m1).
//
// Arithmetic of floating-point accumulation (Xie et al., "MMA-Sim", arXiv 2511.10909, bit-exact on their probes of
// every architecture; PTX itself promises only "at least single precision"): per step of `step` products, the exact
// products and C are truncated toward zero to a common 2^(top − fraction_bits), top the largest sum of exponents among
// them (not below −126), summed exactly, and the sum truncated toward zero to fp32. NaN is 0x7FFFFFFF.
#pragma once

#include <cstdint>

namespace emu {
namespace ptx {

enum class Element { bf16, f16, e4m3 };

struct Accumulation {
    int fraction_bits;
    int step;           // products summed at once
    bool short_result;  // fp32 with only 13 mantissa bits
};
// Up to sm_89: 24 bits, two steps; e4m3 on sm_89: 13 bits, two steps, short results. From sm_90 on: 25 bits, one step.
Accumulation accumulation(int arch, Element element, int k);

// Codes of a 16 × 2ER or 8 × ER matrix from the lanes' registers, by the formulas above.
template <int E, int R, class Code>
void unpack_a(const uint32_t (&a)[32][R], Code (&codes)[16][2 * E * R]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < E; ++i)
                codes[lane / 4 + 8 * (r & 1)][E * (lane & 3) + i + 4 * E * (r >> 1)] =
                    static_cast<Code>(a[lane][r] >> (32 / E * i) & (E == 2 ? 0xFFFF : E == 4 ? 0xFF : 0xF));
}
template <int E, int R, class Code>
void unpack_b(const uint32_t (&b)[32][R], Code (&codes)[8][4 * E * R]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < E; ++i)
                codes[lane / 4][E * (lane & 3) + i + 4 * E * r] =
                    static_cast<Code>(b[lane][r] >> (32 / E * i) & (E == 2 ? 0xFFFF : E == 4 ? 0xFF : 0xF));
}

// Rows of A against eight columns of B, as numbers.
struct Factors {
    static constexpr int max_k = 32;
    double a[16][max_k], b[max_k][8];
    int16_t a_exponent[16][max_k], b_exponent[max_k][8];  // of subnormals: the smallest normal's; of zero: very low
    bool special = false;                                  // an infinity or a NaN anywhere
    void set_a(int row, int k, Element element, uint32_t code);
    void set_b(int k, int column, Element element, uint32_t code);
};
// k of B for each stored element of a sparse A.
using Picked = uint8_t[16][Factors::max_k];

// c += A B, `count` products per element; of B the k that `picked` says, or all of them in order where it is null.
void accumulate(const Factors& factors, int count, const Picked* picked, Accumulation how, float (&c)[32][4]);

// All below: d in place of c.
//
// Sparse A keeps two of every four k. Metadata nibble i0 | i1 << 2 (i0 < i1) of chunk c: stored elements 2 c, 2 c + 1
// of the row belong to k = 4 c + i0, 4 c + i1. Which nibble is whose (lane 4 g + j; selector f):
//     m16n8k32, 16 bits   lanes j = 2 f + h, h = 0, 1: bits 0-15 row g, bits 16-31 row g + 8, k in [16 h, + 16)
//     m16n8k32, s8        lanes j = 2 f + h: row g + 8 h, all 32 k
//     m16n8k64, s8        every lane (f = 0): row g + 8 (j & 1), k in [32 (j >> 1), + 32)
// The PTX ISA shows these as figures (section "Matrix Fragments for sparse mma"). The first and third are what CUTLASS's
// reorder_meta arranges for ldmatrix and what TileLang's tables say; the second is derived from the third: check it on
// hardware. Sparse rounding is taken to be the dense step on (stored A, picked B), which is derived too.

// Sets picked from metadata; false where a nibble is illegal.
bool pick_16(const uint32_t (&metadata)[32], int selector, Picked& picked);
bool pick_s8_k32(const uint32_t (&metadata)[32], int selector, Picked& picked);
bool pick_s8_k64(const uint32_t (&metadata)[32], Picked& picked);

// 16-bit elements: m16n8k16 and, sparse, m16n8k32.
void mma_16(Element element, int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4]);
void mma_sp_16(Element element, int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][4], const Picked& picked,
               float (&c)[32][4]);
// e4m3: m16n8k32.
void mma_e4m3(int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4]);
// s8 into s32, wrapping: K of B = 16 (RA 2, RB 1), 32 (4, 2), and sparse 32 (2, 2), 64 (4, 4).
template <int RA, int RB>
void mma_s8(const uint32_t (&a)[32][RA], const uint32_t (&b)[32][RB], const Picked* picked, uint32_t (&c)[32][4]) {
    int8_t a_codes[16][8 * RA], b_codes[8][16 * RB];
    unpack_a<4>(a, a_codes);
    unpack_b<4>(b, b_codes);
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            uint32_t& sum = c[4 * (row % 8) + column / 2][2 * (row / 8) + column % 2];
            for (int s = 0; s < 8 * RA; ++s)
                sum += static_cast<uint32_t>(a_codes[row][s] * b_codes[column][picked ? (*picked)[row][s] : s]);
        }
}

}  // namespace ptx
}  // namespace emu
