// rms_norm: out = (x · inv_rms) · weight, inv_rms = 1 / sqrt(mean(x²) + eps) over the row, in fp32, rounded once.
//
//   x, out [T, C] of one type, rows x_stride and out_stride elements apart; weight [C] float32
//
// Grid: T blocks of a multiple of 32 threads, 128 for speed: then a thread owns eight neighbours of every 1024, which
// are eight of the 1024 partial sums whose order is fixed. 512 bytes of shared memory. Memory gives x once (the second
// read finds it in L1: a row is at most 128 KiB) and takes out: 4C bytes a row in 16-bit types, beside weight in L2.
// Reference: ReferenceOps.rms_norm, bit for bit.
#include "common.cuh"
#include "mma.cuh"

template <class T>
__device__ __forceinline__ void rms_norm(const T* x, i64 x_stride, const float* weight, float eps, T* out,
                                         i64 out_stride, int C) {
    __shared__ float4 sums[kPartials / 32];
    ptx::wait_for_earlier_kernels();
    x += blockIdx.x * x_stride;
    out += blockIdx.x * out_stride;
    const bool load_vectors = is_aligned(x), weight_vectors = is_aligned(weight), store_vectors = is_aligned(out);
    const float scale = inverse_rms(x, C, eps, sums);
#pragma unroll 2
    for (int c = 8 * threadIdx.x; c < C; c += 8 * blockDim.x) {
        float v[8], w[8];
        load_eight(x + c, C - c, load_vectors, v);
        load_eight(weight + c, C - c, weight_vectors, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = normalised(v[i], scale, w[i]);
        store_eight(out + c, C - c, store_vectors, v);
    }
}

#define PARAMETERS(T) const T *x, i64 x_stride, const float *weight, float eps, T *out, i64 out_stride, int C
#define ARGUMENTS x, x_stride, weight, eps, out, out_stride, C
extern "C" __global__ void rms_norm_bf16(PARAMETERS(bf16)) { rms_norm(ARGUMENTS); }
extern "C" __global__ void rms_norm_f16(PARAMETERS(f16)) { rms_norm(ARGUMENTS); }
extern "C" __global__ void rms_norm_f32(PARAMETERS(float)) { rms_norm(ARGUMENTS); }
