// Products with 16-bit weights for few tokens: cuda/linear_decode.cuh on weights [N, K] as they are, row by row.
//
//   out[t, n] = Σ_k x[t, k] · W[n, k] + bias[n] + residual[t, n]      x [M, K] and W of one type, bf16 or f16
//
// No layout of its own: an embedding table serves as the head as it is. K a multiple of 8 and rows aligned to 16 bytes.
// A unit is 16 rows × 64 k: four cp.async of 16 bytes a lane, 128 contiguous bytes of a row each eight lanes; what lies
// beyond K is filled with zeros. Sums of 64 k come from the tensor core and are added in fp32.
// Bytes moved: 2 a weight. Reference: ReferenceOps.linear.
#include "linear_decode.cuh"

template <class T>
struct RowMajorWeight {
    static constexpr int kUnitK = 64, kUnitBytes = kTileRows * kUnitK * 2;
    static constexpr int kColumnPadding = 64;  // lanes g and g + 1 then read different halves of the 32 banks
    const T* w;
    int N, K;

    // In shared memory a row is 128 bytes; in odd rows the two halves of it are exchanged, so that lanes g and g + 1,
    // which read 64 bytes of two rows, hit different banks.
    static __device__ __forceinline__ u32 place(int row, int sixteen) {
        return row * (2 * kUnitK) + 16 * (sixteen ^ (row & 1) << 2);
    }

    struct Stream {
        const T* rows[4];
        int k, K;
        unsigned long long read_once;

        __device__ __forceinline__ Stream(const RowMajorWeight& weight, int tile, int unit, int lane)
            : k(unit * kUnitK + 8 * (lane & 7)), K(weight.K), read_once(ptx::l2_evict_first()) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = min(tile * kTileRows + 4 * i + (lane >> 3), weight.N - 1);
                rows[i] = weight.w + static_cast<i64>(row) * K;
            }
        }

        __device__ __forceinline__ void copy_next(u32 shared) {
            const int lane = lane_of_warp();
            const bool inside = k < K;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                ptx::cp_async_16_hint(shared + place(4 * i + (lane >> 3), lane & 7), rows[i] + (inside ? k : 0),
                                      inside ? 16 : 0, read_once);
            k += kUnitK;
        }
    };

    static __device__ __forceinline__ void store_eight(u8* column, int k, const u32 (&words)[4]) {
        *reinterpret_cast<uint4*>(column + 2 * k) = make_uint4(words[0], words[1], words[2], words[3]);
    }

    // Of each 32 k lane q has 8 q … 8 q + 7 of both operands: k is permuted, alike.
    template <int kTiles>
    __device__ __forceinline__ void multiply(int, int, const u8* shared, const u8* const (&column)[kTiles], int k,
                                             const float*, float (&sums)[kTiles][4]) const {
        const int lane = lane_of_warp(), g = lane >> 2, q = lane & 3;
        float unit_sums[kTiles][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 low = *reinterpret_cast<const uint4*>(shared + place(g, 4 * half + q));
            const uint4 high = *reinterpret_cast<const uint4*>(shared + place(g + 8, 4 * half + q));
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const uint4 x = *reinterpret_cast<const uint4*>(column[i] + 2 * (k + 32 * half + 8 * q));
                multiply_add<T>(unit_sums[i], {low.x, high.x, low.y, high.y}, {x.x, x.y});
                multiply_add<T>(unit_sums[i], {low.z, high.z, low.w, high.w}, {x.z, x.w});
            }
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][e] = __fadd_rn(sums[i][e], unit_sums[i][e]);
    }
};

#define OUTPUT_PARAMETERS                                                                                         \
    const float *bias, const void *residual, void *out, int out_type, int M, int N, int K, int slice_k,           \
        int slices_per_block, int chunk_k, float *partials, u32 *arrivals
#define OUTPUT_ARGUMENTS \
    bias, residual, out, out_type, M, N, K, slice_k, slices_per_block, chunk_k, partials, arrivals

template <int kTiles, class T>
__device__ __forceinline__ void decode_16_bit(const T* x, i64 x_stride, const T* w, OUTPUT_PARAMETERS) {
    using Weight = RowMajorWeight<T>;
    const Weight weight = {w, N, K};
    const Rows<T, Weight> input = {x, x_stride, K};
    const Epilogue epilogue = {1.0f, nullptr, nullptr, bias, residual, out, out_type, N};
    decode_linear<kTiles>(weight, input, epilogue, {slice_k, slices_per_block, chunk_k, partials, arrivals}, M, N, K);
}

#define ENTRIES(T, tiles, blocks)                                                           \
    extern "C" __global__ void __launch_bounds__(256, blocks)                               \
        linear_decode_##T##_t##tiles(const T* x, i64 x_stride, const T* w, OUTPUT_PARAMETERS) { \
        decode_16_bit<tiles>(x, x_stride, w, OUTPUT_ARGUMENTS);                             \
    }
ENTRIES(bf16, 1, 4)
ENTRIES(bf16, 2, 3)
ENTRIES(bf16, 4, 2)
ENTRIES(f16, 1, 4)
ENTRIES(f16, 2, 3)
ENTRIES(f16, 4, 2)
