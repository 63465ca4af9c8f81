// Matrix instructions on 16- and 8-bit elements, as pure functions of 32 lanes' registers.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16 / k32"; lane l, g = l >> 2, q = l & 3, register r; an element
// of 32/E bits, i its place in the register, 0 lowest):
//     A    row g + 8 (r & 1), k = E q + i + 4 E (r >> 1)
//     B    column g,          k = E q + i + 4 E r
//     C/D  row g + 8 (r >> 1), column 2 q + (r & 1)
// and so for every E: 2 (bf16, f16), 4 (s8, e4m3), 8 (e2m1).
//
// Arithmetic of floating-point accumulation (Xie et al., "MMA-Sim", arXiv 2511.10909, bit-exact on their probes of every
// architecture; PTX itself promises only "at least single precision"): per step of `step` products, the exact products
// and C are truncated toward zero to a common 2^(top − fraction_bits), top the largest sum of exponents among them (not
// below −126), summed exactly, and the sum truncated toward zero to fp32. NaN is 0x7FFFFFFF.
#pragma once

#include <cstdint>

namespace emu {
namespace ptx {

enum class Element { bf16, f16, e4m3 };

struct Accumulation {
    int fraction_bits;
    int step;           // products summed at once
    bool short_result;  // fp32 with only 13 mantissa bits (fp8 on sm_89, and Hopper's wgmma fp8)
};
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
// c += A B over the k = picked[row][s] of B, s < count; picked null: k = s.
void accumulate(const Factors& factors, int count, const uint8_t (*picked)[Factors::max_k], Accumulation how,
                float (&c)[16][8]);

// d in place of c. m16n8k16, 16-bit elements.
void mma_16(Element element, int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4]);
// m16n8k32, e4m3.
void mma_e4m3(int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4]);
// Sparse m16n8k32, 16-bit elements, metadata already taken from the selected lanes: see sparse_columns_16.
void mma_sp_16(Element element, int arch, const uint32_t (&a)[32][4], const uint32_t (&b)[32][4],
               const uint8_t (&picked)[16][Factors::max_k], float (&c)[32][4]);

}  // namespace ptx
}  // namespace emu
