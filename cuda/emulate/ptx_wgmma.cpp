#include "ptx_wgmma.h"

#include <cstring>

namespace emu {
namespace ptx {

namespace {
uint32_t field(uint64_t bits, int at) { return static_cast<uint32_t>(bits >> at & 0x3FFF) << 4; }
}  // namespace

MatrixDescriptor::MatrixDescriptor(uint64_t bits)
    : start(field(bits, 0)),
      leading(field(bits, 16)),
      stride(field(bits, 32)),
      swizzle_units(bits >> 62 == 0 ? 1 : 16 >> (bits >> 62)),
      base_offset(static_cast<int>(bits >> 49 & 7)) {}

uint32_t MatrixDescriptor::address(int row, int k, bool mn_major) const {
    const auto unit = static_cast<uint32_t>(row / 8), eighth = static_cast<uint32_t>(k / 8);
    const auto in_row = static_cast<uint32_t>(row % 8), in_k = static_cast<uint32_t>(k % 8);
    const auto width = static_cast<uint32_t>(swizzle_units);
    if (width == 1) return start + 16 * (mn_major ? in_k : in_row) + unit * stride + eighth * leading;
    const uint32_t linear =
        start + (mn_major ? 16 * (unit % width) + unit / width * leading + 16 * in_k * width + eighth * stride
                          : 16 * in_row * width + unit * stride + 16 * eighth);
    return linear ^ ((linear >> 7 & (width - 1)) << 4);
}

template <int K>
void read_matrix(const MatrixDescriptor& descriptor, bool mn_major, int first, int rows, ReadUnit read,
                 uint16_t (*codes)[K]) {
    uint16_t unit[8];
    for (int row = 0; row < rows; row += mn_major ? 8 : 1)
        for (int k = 0; k < K; k += mn_major ? 1 : 8) {
            std::memcpy(unit, read(descriptor.address(first + row, k, mn_major)), 16);
            for (int i = 0; i < 8; ++i) (mn_major ? codes[row + i][k] : codes[row][k + i]) = unit[i];
        }
}

template void read_matrix(const MatrixDescriptor&, bool, int, int, ReadUnit, uint16_t (*)[16]);
template void read_matrix(const MatrixDescriptor&, bool, int, int, ReadUnit, uint16_t (*)[32]);

void Mbarrier::complete_if_done() {
    if (pending || bytes) return;
    phase ^= 1;
    pending = expected;
}

}  // namespace ptx
}  // namespace emu
