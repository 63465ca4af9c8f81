// Hopper's warpgroup products and the barriers they wait for.
//
// wgmma m64nNk16, sparse m64nNk32: each of the four warps of a warpgroup computes 16 of the 64 rows, warp w rows 16 w …;
// so one warp is modelled at a time. A and accumulators in registers are ptx_mma.h's fragments: accumulator register 4 j
// + r belongs to columns 8 j …, A's four registers to k = 0 … 15. Sparse A is stored 64 × 16; a warp's metadata is
// mma.sp's for its 16 rows (ptx_mma.h).
//
// Matrices in shared memory are named by 64-bit descriptors (PTX ISA "Matrix Descriptor Format", "Strides"; CUTLASS
// mma_sm90_desc.hpp and the canonical layouts of mma_traits_sm90_gmma.hpp agree): bits 0-13 start address, 16-29
// leading byte offset (LBO), 32-45 stride byte offset (SBO), all in units of 16 bytes; 49-51 base offset (0 here);
// 62-63 swizzle: 0 none, 1 128 bytes, 2 64, 3 32. In units of 16 bytes (8 elements), W = 1, 2, 4, 8 units of swizzle:
//     K-major   element row r, k:  none:  r % 8 + (r / 8) SBO + (k / 8) LBO
//                                  else:  (r % 8) W + (r / 8) SBO + k / 8            (LBO unused)
//     MN-major  unit u = r / 8:    none:  u SBO + k % 8 + (k / 8) LBO
//                                  else:  u % W + (u / W) LBO + (k % 8) W + (k / 8) SBO
// and then address bits 4-6 are xored with bits 7-9 (of them log2 W).
//
// wgmma runs where it is issued, not where it is waited for. A checking build reports what would notice the difference:
// operands written, accumulators touched before wgmma.wait_group, fences left out (checker.h).
#pragma once

#include <cstdint>

#include "ptx_mma.h"

namespace emu {
namespace ptx {

struct MatrixDescriptor {
    uint32_t start, leading, stride;  // bytes
    int swizzle_units;                // W
    int base_offset;
    explicit MatrixDescriptor(uint64_t bits);
    // Address of 16 bytes: row and k for K-major; for MN-major row is a multiple of 8 and the unit holds eight rows.
    uint32_t address(int row, int k, bool mn_major) const;
};

// K columns of k, 16 or 32, and `rows` rows from `first`, as codes; `read` gives 16 bytes of shared memory.
using ReadUnit = const void* (*)(uint32_t address);
template <int K>
void read_matrix(const MatrixDescriptor& descriptor, bool mn_major, int first, int rows, ReadUnit read,
                 uint16_t (*codes)[K]);

// An mbarrier's 64 bits, in a layout of our own (the real one is opaque).
struct Mbarrier {
    uint32_t pending : 11, expected : 11;  // arrivals still to come in this phase, and in each
    uint32_t waiting : 10;                 // threads that wait, less than 1024 at once
    int32_t bytes : 31;                    // announced and not yet landed
    uint32_t phase : 1;
    static constexpr uint32_t most_arrivals = 2047;
    void complete_if_done();
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier is 64 bits");

}  // namespace ptx
}  // namespace emu
