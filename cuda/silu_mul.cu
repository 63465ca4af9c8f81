// silu_mul: out = gate / (1 + e^−gate) · up, in fp32, rounded once.
//
//   gate_up [T, 2F] = gate | up, out [T, F], of one type; rows gate_up_stride and out_stride elements apart
//
// Grid: (T, ceil(F / (8 · threads))) blocks of any multiple of 32 threads; a thread owns eight neighbours. No shared
// memory. Moves 6F bytes a row in 16-bit types. Reference: ReferenceOps.silu_mul, bit for bit.
#include "common.cuh"
#include "mma.cuh"

template <class T>
__device__ __forceinline__ void silu_mul(const T* gate_up, i64 gate_up_stride, T* out, i64 out_stride, int F) {
    ptx::wait_for_earlier_kernels();
    const int f = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (f >= F) return;
    const T* gate = gate_up + blockIdx.x * gate_up_stride;
    out += blockIdx.x * out_stride;
    float v[8], up[8];
    load_eight(gate + f, F - f, is_aligned(gate), v);
    load_eight(gate + F + f, F - f, is_aligned(gate + F), up);
    silu_mul(v, up);
    store_eight(out + f, F - f, is_aligned(out), v);
}

#define PARAMETERS(T) const T *gate_up, i64 gate_up_stride, T *out, i64 out_stride, int F
#define ARGUMENTS gate_up, gate_up_stride, out, out_stride, F
extern "C" __global__ void silu_mul_bf16(PARAMETERS(bf16)) { silu_mul(ARGUMENTS); }
extern "C" __global__ void silu_mul_f16(PARAMETERS(f16)) { silu_mul(ARGUMENTS); }
extern "C" __global__ void silu_mul_f32(PARAMETERS(float)) { silu_mul(ARGUMENTS); }
