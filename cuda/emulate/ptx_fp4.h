// Block-scaled FP4 matrix instructions of sm_120a, dense m16n8k64 and sparse m16n8k128, as pure functions of 32 lanes'
// registers. Fragments of A, B, C are ptx_mma.h's for E = 8; beyond them (lane l, g = l >> 2, q = l & 3):
//     scales of A    row m: 32 bits of lane 4 (m % 8) + 2 thread + m / 8, thread 0 or 1
//     scales of B    column n: 32 bits of lane 4 n + thread, thread 0 … 3
//                    4X: byte j scales the j-th quarter of k; 2X: byte `byte` + j (byte 0 or 2) the j-th half
//     metadata       lane l: row g + 8 (l & 1), k in [64 ((l >> 1) & 1), + 64), nibble c = i0 | i1 << 2 for the c-th 8
//                    of them: stored codes 4 c, 4 c + 1 belong to k = 8 c + 2 i0 + {0, 1}, codes 4 c + 2, 4 c + 3 to
//                    8 c + 2 i1 + {0, 1}; i0 < i1
// Sources: PTX ISA "Block Scaling for mma.sync", CuTe's layouts; the byte order of scales and the metadata map have not
// been seen on hardware by this project.
//
// Arithmetic, reported by third parties from probes of two RTX Blackwell cards (and consistent with MMA-Sim, arXiv
// 2511.10909, whose exponents are these plus 8): a scale is m 2^x with m = 8 … 15, or m < 8 for UE4M3's subnormals;
// four dots of 16 stored elements are exact; each adds dot · ma · mb · 2^X, X = xa + xb − 2; lsb = max(max X − 27,
// E_C − 35, −174), over the dots in which some product is not zero and over a C that is not zero; all five addends are
// truncated toward zero to multiples of 2^lsb, summed exactly, and the sum truncated toward zero to fp32. A NaN scale
// (UE4M3 0x7F, 0xFF; UE8M0 0xFF) makes NaN; UE4M3's sign bit is ignored; UE4M3 zero makes its dots zero.
#pragma once

#include <cstdint>

namespace emu {
namespace ptx {

enum class ScaleType { ue4m3, ue8m0 };

struct ScaleSelector {
    int byte, thread;
};

struct BlockScales {
    ScaleType type;
    int count;  // per row and instruction: 4 or 2
    uint32_t a[32], b[32];
    ScaleSelector a_from, b_from;
};

void mma_fp4(const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], const BlockScales& scales, float (&c)[32][4]);
// False, and nothing computed, where a metadata nibble is not one of the six legal ones.
bool mma_sp_fp4(const uint32_t (&a)[32][4], const uint32_t (&b)[32][4], const uint32_t (&metadata)[32],
                const BlockScales& scales, float (&c)[32][4]);

}  // namespace ptx
}  // namespace emu
