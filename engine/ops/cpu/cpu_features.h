// What this CPU and operating system can run (CPUID, and XGETBV for the registers the system saves). False off x86.
#pragma once

namespace engine {

bool cpu_has_avx2();         // AVX2, FMA, F16C
bool cpu_has_avx512();       // and AVX-512 F, BW, DQ, VL
bool cpu_has_avx512_bf16();  // and AVX-512 VNNI, VBMI, BF16

}  // namespace engine
