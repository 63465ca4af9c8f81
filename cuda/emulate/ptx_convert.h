// Conversions to and from the narrow formats (PTX ISA "cvt"): nearest, ties to even, saturating to the largest finite
// value. NaN becomes E4M3's and UE8M0's NaN (0x7F, 0xFF) and E2M1's +6, which has none.
#pragma once

#include <cstdint>

namespace emu {
namespace ptx {

uint32_t e2m1_of(float value);
uint32_t e4m3_of(float value);
uint32_t ue8m0_of(float value);  // of the magnitude, upward (as cuda_fp8.h does where the instruction is missing)
uint32_t f16_of_e2m1(uint32_t code);
uint32_t f16_of_e4m3(uint32_t code);

}  // namespace ptx
}  // namespace emu
