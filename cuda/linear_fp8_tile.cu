// Products of FP8 weights for many tokens; see linear_fp8_tile.cuh.
#include "linear_fp8_tile.cuh"

#define ENTRY(T, warps_m)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128 * warps_m)                                                       \
        linear_tile_fp8_##T##_m##warps_m(const T* x, i64 x_stride, FP8_TILE_PARAMETERS) {                             \
        const Fp8Tile<T, 2 / warps_m> weight = {units, scale, steps, N, fp8_units_along_k(K)};                        \
        const float *row_scale = steps == 1 ? scale : nullptr, power = power_of_two(kFp8Power<T>);                    \
        const Epilogue epilogue = {power, token_scale, row_scale, bias, residual, out, out_type, N};                  \
        tile_linear<T, Paths::one, warps_m>(weight, {x, nullptr, nullptr, x_stride, M, K}, epilogue, slice_k);        \
    }
ENTRY(bf16, 1)
ENTRY(bf16, 2)
ENTRY(f16, 1)
ENTRY(f16, 2)

// E4M3 codes as bf16, exactly: values [count], a multiple of 8. A thread for each eight.
extern "C" __global__ void expand_fp8(const u8* codes, bf16* out, i64 count) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count / 8) return;
    const uint2 raw = reinterpret_cast<const uint2*>(codes)[i];
    const uint2 low = e4m3_in_order<bf16>(raw.x), high = e4m3_in_order<bf16>(raw.y);
    reinterpret_cast<uint4*>(out)[i] = make_uint4(low.x, low.y, high.x, high.y);
}
