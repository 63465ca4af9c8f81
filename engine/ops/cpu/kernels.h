// The kernels of one instruction set, as a table of plain functions.
//
// Each kernel file is compiled once per instruction set, with ENGINE_ISA naming the namespace (portable, avx2, avx512,
// avx512_bf16) and ENGINE_ISA_LEVEL its rank; kernels.cpp collects the results and cpu_features.cpp chooses by CPUID.
//
// To add an operation: an argument struct and a line in ENGINE_KERNEL_LIST here; a file `name.cpp` with
// `namespace engine { namespace ENGINE_ISA { void name(...) } }` and all helpers in an unnamed namespace inside; the
// file's name in KERNEL_SOURCES of setup.py; a binding. Kernel files include no C++ standard headers with templates or
// inline functions (<algorithm>, <vector>, <atomic> …): the linker could keep an AVX-512 copy of such a function for
// everybody. <cmath>, <cstring>, <cstdint> are fine. Kernels check nothing: bindings do.
#pragma once

#include <cstdint>

#include "attention_args.h"
#include "dtypes.h"
#include "fp4_args.h"
#include "fp8_args.h"
#include "row_args.h"
#include "scratch.h"
#include "thread_pool.h"

namespace engine {

// out [T, N] = x [T, K] · wᵀ + bias [N] + residual [T, N]. Strides are elements from row to row.
struct LinearArgs {
    const void* x;
    DType x_type;
    int64_t x_stride;
    int64_t T;
    const void* w;  // tiles, see weight_tiles.h
    DType w_type;
    int64_t N, K;
    const float* bias;     // or null
    const void* residual;  // x_type, or null; may be out itself
    int64_t residual_stride;
    void* out;
    DType out_type;
    int64_t out_stride;
};

//                          result  name        parameters
#define ENGINE_KERNEL_LIST(KERNEL)                                             \
    KERNEL(void, linear, (const LinearArgs&, ThreadPool&, Scratch&))           \
    KERNEL(bool, all_finite, (const void* data, DType, int64_t count, ThreadPool&)) \
    KERNEL(void, embed, (const EmbedArgs&, ThreadPool&))                           \
    KERNEL(void, rms_norm, (const RmsNormArgs&, ThreadPool&))                      \
    KERNEL(void, silu_mul, (const SiluMulArgs&, ThreadPool&))                      \
    KERNEL(bool, rope_and_cache, (const RopeArgs&, ThreadPool&))                   \
    KERNEL(void, attention, (const AttentionArgs&, ThreadPool&, Scratch&))         \
    KERNEL(bool, prepare_fp4, (const PrepareArgs&, ThreadPool&, Scratch&))         \
    KERNEL(float, quantize_weight, (const QuantizeWeightArgs&, ThreadPool&))       \
    KERNEL(void, quantize_feedback, (const QuantizeFeedbackArgs&, ThreadPool&, Scratch&)) \
    KERNEL(void, fp4_linear, (const Fp4LinearArgs&, ThreadPool&, Scratch&))        \
    KERNEL(void, w4a16_linear, (const W4a16Args&, ThreadPool&, Scratch&)) \
    KERNEL(bool, prepare_fp8, (const PrepareFp8Args&, ThreadPool&, Scratch&))      \
    KERNEL(void, fp8_linear, (const Fp8LinearArgs&, ThreadPool&, Scratch&))

struct Kernels {
    const char* isa;
#define ENGINE_POINTER(result, name, parameters) result(*name) parameters;
    ENGINE_KERNEL_LIST(ENGINE_POINTER)
#undef ENGINE_POINTER
};

#define ENGINE_DECLARATION(result, name, parameters) result name parameters;
#ifdef ENGINE_ISA
namespace ENGINE_ISA {
ENGINE_KERNEL_LIST(ENGINE_DECLARATION)
}
#endif

// Instruction sets compiled in and supported by this CPU, best first; the last entry is followed by null.
const Kernels* const* available_kernels();

}  // namespace engine
