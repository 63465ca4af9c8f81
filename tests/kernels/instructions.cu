// Probes of mma.cuh: one kernel per wrapper, registers in and out of global memory. Reference: the formulas in
// tests/test_emulated_instructions.py. One warp per block where nothing else is said; block i takes the i-th case, and
// register r of lane l of a case is word (32 i + l) R + r of its array.
#include "mma.cuh"

namespace {

template <int R, class T>
__device__ void fetch(T (&r)[R], const T* from) {
    for (int i = 0; i < R; ++i) r[i] = from[(static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) * R + i];
}
template <int R, class T>
__device__ void store(T* to, const T (&r)[R]) {
    for (int i = 0; i < R; ++i) to[(static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) * R + i] = r[i];
}

template <int RA, int RB, class T, class F>
__device__ void dense(const uint32_t* a, const uint32_t* b, T* c, F mma) {
    uint32_t ra[RA], rb[RB];
    T rc[4];
    fetch(ra, a);
    fetch(rb, b);
    fetch(rc, c);
    mma(rc, ra, rb);
    store(c, rc);
}

template <int RA, int RB, class T, class F>
__device__ void sparse(const uint32_t* a, const uint32_t* b, const uint32_t* e, T* c, F mma) {
    uint32_t re[1];
    fetch(re, e);
    const auto with_metadata = [&](T(&rc)[4], const uint32_t(&ra)[RA], const uint32_t(&rb)[RB]) {
        mma(rc, ra, rb, re[0]);
    };
    dense<RA, RB>(a, b, c, with_metadata);
}

template <int RB, class F>
__device__ void scaled(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb, float* c, F mma) {
    uint32_t ra[1], rb[1];
    fetch(ra, sa);
    fetch(rb, sb);
    const auto with_scales = [&](float(&rc)[4], const uint32_t(&r)[4], const uint32_t(&s)[RB]) {
        mma(rc, r, s, ra[0], rb[0]);
    };
    dense<4, RB>(a, b, c, with_scales);
}

// 64 rows of 16 bytes in shared memory, filled from and written back to global memory.
__device__ unsigned char* tile() {
    __shared__ __align__(16) unsigned char bytes[64 * 16];
    return bytes;
}
__device__ void fill(const unsigned char* image) {
    for (int i = threadIdx.x; i < 64 * 16; i += blockDim.x) tile()[i] = image[i];
    __syncthreads();
}

template <int N, class F>
__device__ void warpgroup(const unsigned char* image, int bytes, uint64_t a, uint64_t b, float* c, F mma) {
#if PTX_SM90A
    extern __shared__ __align__(1024) unsigned char shared[];
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) shared[i] = image[i];
    ptx::fence_async_proxy();
    __syncthreads();
    const uint64_t start = ptx::shared_address(shared) >> 4;
    float rc[N / 2];
    fetch(rc, c);
    ptx::wgmma_fence();
    mma(rc, a + start, b + start);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    store(c, rc);
#endif
}

}  // namespace

// --- Matrix products -------------------------------------------------------------------------------------------------
#define DENSE(name, RA, RB, T, wrapper)                                                           \
    extern "C" __global__ void name(const uint32_t* a, const uint32_t* b, T* c) {                 \
        dense<RA, RB>(a, b, c, [](T(&rc)[4], const uint32_t(&ra)[RA], const uint32_t(&rb)[RB]) {  \
            wrapper(rc, ra, rb);                                                                  \
        });                                                                                       \
    }
#define SPARSE(name, RA, RB, T, wrapper)                                                               \
    extern "C" __global__ void name(const uint32_t* a, const uint32_t* b, const uint32_t* e, T* c) {   \
        sparse<RA, RB>(a, b, e, c, [](T(&rc)[4], const uint32_t(&ra)[RA], const uint32_t(&rb)[RB], uint32_t re) { \
            wrapper(rc, ra, rb, re);                                                                   \
        });                                                                                            \
    }
#define SCALED(name, wrapper)                                                                                          \
    extern "C" __global__ void name(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb,      \
                                    float* c) {                                                                       \
        scaled<2>(a, b, sa, sb, c, [](float(&rc)[4], const uint32_t(&ra)[4], const uint32_t(&rb)[2], uint32_t fa,      \
                                      uint32_t fb) { wrapper(rc, ra, rb, fa, fb); });                                 \
    }
#define SCALED_SPARSE(name, wrapper)                                                                                   \
    extern "C" __global__ void name(const uint32_t* a, const uint32_t* b, const uint32_t* e, const uint32_t* sa,       \
                                    const uint32_t* sb, float* c) {                                                   \
        uint32_t re[1];                                                                                                \
        fetch(re, e);                                                                                                  \
        scaled<4>(a, b, sa, sb, c, [&](float(&rc)[4], const uint32_t(&ra)[4], const uint32_t(&rb)[4], uint32_t fa,     \
                                       uint32_t fb) { wrapper(rc, ra, rb, re[0], fa, fb); });                         \
    }

DENSE(mma_bf16, 4, 2, float, ptx::mma_m16n8k16_bf16)
DENSE(mma_f16, 4, 2, float, ptx::mma_m16n8k16_f16)
DENSE(mma_s8_k16, 2, 1, int, ptx::mma_m16n8k16_s8)
DENSE(mma_s8_k32, 4, 2, int, ptx::mma_m16n8k32_s8)
SPARSE(mma_sp_bf16_0, 4, 4, float, ptx::mma_sp_m16n8k32_bf16<0>)
SPARSE(mma_sp_bf16_1, 4, 4, float, ptx::mma_sp_m16n8k32_bf16<1>)
SPARSE(mma_sp_f16_0, 4, 4, float, ptx::mma_sp_m16n8k32_f16<0>)
SPARSE(mma_sp_f16_1, 4, 4, float, ptx::mma_sp_m16n8k32_f16<1>)
SPARSE(mma_sp_s8_k32_0, 2, 2, int, ptx::mma_sp_m16n8k32_s8<0>)
SPARSE(mma_sp_s8_k32_1, 2, 2, int, ptx::mma_sp_m16n8k32_s8<1>)
SPARSE(mma_sp_s8_k64, 4, 4, int, ptx::mma_sp_m16n8k64_s8)
#if PTX_ARCH >= 89
DENSE(mma_e4m3, 4, 2, float, ptx::mma_m16n8k32_e4m3)
#endif
#if PTX_SM120A
SCALED(nvfp4, ptx::mma_m16n8k64_nvfp4)
SCALED(nvfp4_threads_13, (ptx::mma_m16n8k64_nvfp4<1, 3>))
SCALED(mxfp4, ptx::mma_m16n8k64_mxfp4)
SCALED(mxfp4_bytes_20_threads_12, (ptx::mma_m16n8k64_mxfp4<2, 0, 1, 2>))
SCALED(mxfp4_bytes_02_threads_01, (ptx::mma_m16n8k64_mxfp4<0, 2, 0, 1>))
SCALED_SPARSE(sparse_nvfp4, ptx::mma_sp_m16n8k128_nvfp4)
SCALED_SPARSE(sparse_nvfp4_threads_12, (ptx::mma_sp_m16n8k128_nvfp4<1, 2>))
SCALED_SPARSE(sparse_mxfp4, ptx::mma_sp_m16n8k128_mxfp4)
SCALED_SPARSE(sparse_mxfp4_bytes_22_threads_13, (ptx::mma_sp_m16n8k128_mxfp4<2, 2, 1, 3>))
#endif

// --- Matrices between shared memory and registers: lane l's row is rows[l] -------------------------------------------
#define LOAD_MATRIX(name, R, wrapper)                                                                           \
    extern "C" __global__ void name(const unsigned char* image, const int* rows, uint32_t* out) {               \
        fill(image);                                                                                            \
        uint32_t r[R];                                                                                          \
        wrapper(r, ptx::shared_address(tile()) + 16 * rows[threadIdx.x]);                                       \
        store(out, r);                                                                                          \
    }
LOAD_MATRIX(ldmatrix_x1, 1, ptx::ldmatrix_x1)
LOAD_MATRIX(ldmatrix_x2, 2, ptx::ldmatrix_x2)
LOAD_MATRIX(ldmatrix_x4, 4, ptx::ldmatrix_x4)
LOAD_MATRIX(ldmatrix_x1_trans, 1, ptx::ldmatrix_x1_trans)
LOAD_MATRIX(ldmatrix_x2_trans, 2, ptx::ldmatrix_x2_trans)
LOAD_MATRIX(ldmatrix_x4_trans, 4, ptx::ldmatrix_x4_trans)

extern "C" __global__ void ldmatrix_misaligned(const unsigned char* image, uint32_t* out) {
    fill(image);
    uint32_t r[1];
    ptx::ldmatrix_x1(r, ptx::shared_address(tile()) + 16 * (threadIdx.x % 8) + (threadIdx.x == 5 ? 8 : 0));
    store(out, r);
}

extern "C" __global__ void divergent(const unsigned char* image, uint32_t* out) {
    fill(image);
    uint32_t r[1];
    const uint32_t at = ptx::shared_address(tile()) + 16 * (threadIdx.x % 8);
    if (threadIdx.x % 2) {
        ptx::ldmatrix_x1(r, at);
    } else {
        ptx::ldmatrix_x1_trans(r, at);
    }
    store(out, r);
}

#if PTX_ARCH >= 90
#define STORE_MATRIX(name, R, wrapper)                                                                          \
    extern "C" __global__ void name(const uint32_t* in, const int* rows, unsigned char* image) {                \
        fill(image);                                                                                            \
        uint32_t r[R];                                                                                          \
        fetch(r, in);                                                                                           \
        wrapper(ptx::shared_address(tile()) + 16 * rows[threadIdx.x], r);                                       \
        __syncwarp();                                                                                           \
        for (int i = threadIdx.x; i < 64 * 16; i += 32) image[i] = tile()[i];                                   \
    }
STORE_MATRIX(stmatrix_x2, 2, ptx::stmatrix_x2)
STORE_MATRIX(stmatrix_x4, 4, ptx::stmatrix_x4)
STORE_MATRIX(stmatrix_x4_trans, 4, ptx::stmatrix_x4_trans)
#endif

// --- Copies ----------------------------------------------------------------------------------------------------------
// Thread i copies 16 bytes, of which it reads reads[i], through the wrapper that `form` names; group by group.
extern "C" __global__ void cp_async(const unsigned char* from, const int* reads, int form, unsigned char* to) {
    const uint32_t at = ptx::shared_address(tile()) + 16 * threadIdx.x;
    const unsigned char* source = from + 16 * threadIdx.x;
    const auto read = static_cast<uint32_t>(reads[threadIdx.x]);
    if (form == 0) ptx::cp_async_16(at, source);
    if (form == 1) ptx::cp_async_16(at, source, read);
    if (form == 2) ptx::cp_async_16_hint(at, source, ptx::l2_evict_first());
    if (form == 3) ptx::cp_async_16_hint(at, source, read, ptx::l2_evict_last());
    for (uint32_t i = 0; form == 4 && i < 16; i += 8)
        ptx::cp_async_small<8>(at + i, source + i, read < i ? 0 : read > i + 8 ? 8 : read - i);
    for (uint32_t i = 0; form == 5 && i < 16; i += 4)
        ptx::cp_async_small<4>(at + i, source + i, read < i ? 0 : read > i + 4 ? 4 : read - i);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * static_cast<int>(blockDim.x); i += blockDim.x) to[i] = tile()[i];
}
// Two groups of 16 bytes per thread; waits for `pending` = 1 or 0 of them before looking at the first.
extern "C" __global__ void cp_async_groups(const unsigned char* from, int pending, unsigned char* to) {
    const uint32_t at = ptx::shared_address(tile()) + 32 * threadIdx.x;
    const unsigned char* source = from + 32 * threadIdx.x;
    ptx::cp_async_16(at, source);
    ptx::cp_async_commit();
    ptx::cp_async_16(at + 16, source + 16);
    if (pending == 2) ptx::cp_async_commit(), ptx::cp_async_wait<2>();  // too weak: nothing has to be there
    if (pending == 1) ptx::cp_async_commit(), ptx::cp_async_wait<1>();
    if (pending == 0) ptx::cp_async_wait_all();
    for (int i = 0; i < 16; ++i) to[16 * threadIdx.x + i] = tile()[32 * threadIdx.x + i];
    ptx::cp_async_wait_all();
}
extern "C" __global__ void load_once(const unsigned char* from, int form, unsigned char* to) {
    ptx::prefetch_l2(from);
    const int bytes = form == 0 ? 4 : form == 1 ? 8 : 16;
    uint32_t r[4], one[1], two[2];
    if (form == 0) ptx::load_once_4(one, from + 4 * threadIdx.x);
    if (form == 1) ptx::load_once_8(two, from + 8 * threadIdx.x);
    if (form == 2) ptx::load_once_16(r, from + 16 * threadIdx.x);
    if (form == 3) ptx::load_once_16(r, from + 16 * threadIdx.x, ptx::l2_evict_first());
    for (int i = 0; i < bytes; ++i) {
        const uint32_t word = form == 0 ? one[0] : form == 1 ? two[i / 4] : r[i / 4];
        to[bytes * threadIdx.x + i] = static_cast<unsigned char>(word >> (8 * (i % 4)));
    }
}

// --- Reciprocals and conversions -------------------------------------------------------------------------------------
extern "C" __global__ void reciprocals(const float* x, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::reciprocal(x[i]);
}
#if PTX_ARCH >= 89
extern "C" __global__ void to_e4m3(const float* x, uint16_t* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::e4m3x2(x[2 * i], x[2 * i + 1]);
}
extern "C" __global__ void from_e4m3(const uint16_t* x, uint32_t* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::f16x2_of_e4m3(x[i]);
}
#endif
#if PTX_SM120A
extern "C" __global__ void to_e2m1(const float* x, uint32_t* out) {
    float r[8];
    fetch(r, x);
    out[blockIdx.x * blockDim.x + threadIdx.x] = ptx::e2m1x8(r);
}
extern "C" __global__ void from_e2m1(const uint32_t* x, uint32_t* out) {
    uint32_t r[4];
    ptx::f16x8_of_e2m1(r, x[blockIdx.x * blockDim.x + threadIdx.x]);
    store(out, r);
}
extern "C" __global__ void to_ue8m0(const float* x, uint16_t* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::ue8m0x2(x[2 * i], x[2 * i + 1]);
}
#endif

// --- Barriers: warp 0 produces numbers one buffer at a time, the other warps add them up -----------------------------
extern "C" __global__ void named_barriers(int rounds, int* sums) {
    __shared__ int buffer[32];
    int sum = 0;
    for (int i = 0; i < rounds; ++i) {
        if (threadIdx.x < 32) {
            if (i) ptx::barrier_sync(2, blockDim.x);  // consumers have read the last round
            buffer[threadIdx.x] = 100 * i + static_cast<int>(threadIdx.x);
            ptx::barrier_arrive(1, blockDim.x);
        } else {
            ptx::barrier_sync(1, blockDim.x);
            sum += buffer[threadIdx.x % 32];
            if (i + 1 < rounds) ptx::barrier_arrive(2, blockDim.x);
        }
    }
    sums[threadIdx.x] = sum;
}

#if PTX_ARCH >= 90
// Two buffers filled in turn by bulk copies that thread 0 starts; all threads add up what lands. `flaw` 1: nobody waits
// for the data; 2: too few bytes are announced.
extern "C" __global__ void bulk_pipeline(const int* from, int rounds, int flaw, int* sums) {
    __shared__ __align__(16) int buffers[2][64];
    __shared__ uint64_t full[2], empty[2];
    ptx::grid_dependency_wait();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(ptx::shared_address(&full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&empty[i]), blockDim.x);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::launch_dependents();
    int sum = 0;
    for (int round = 0; round < rounds; ++round) {
        const int slot = round % 2, parity = round / 2 % 2;
        if (threadIdx.x == 0) {
            ptx::mbarrier_wait(ptx::shared_address(&empty[slot]), parity ^ 1);
            ptx::mbarrier_arrive_expect(ptx::shared_address(&full[slot]), flaw == 2 ? 128 : 256);
            const uint32_t to = ptx::shared_address(buffers[slot]);
            ptx::bulk_copy(to, from + 64 * round, 256, ptx::shared_address(&full[slot]));
        }
        if (flaw != 1) ptx::mbarrier_wait(ptx::shared_address(&full[slot]), parity);
        sum += buffers[slot][threadIdx.x % 64];
        ptx::mbarrier_arrive(ptx::shared_address(&empty[slot]));
    }
    sums[threadIdx.x] = sum;
}
#endif

// --- Warpgroup products: 128 threads; descriptors without the start address ------------------------------------------
#define WARPGROUP(name, N, add, transpose_a, transpose_b)                                                        \
    extern "C" __global__ void name(const unsigned char* image, int bytes, uint64_t a, uint64_t b, float* c) {   \
        warpgroup<N>(image, bytes, a, b, c, [](float(&rc)[N / 2], uint64_t da, uint64_t db) {                    \
            ptx::wgmma_m64n##N##k16_bf16<transpose_a, transpose_b>(rc, da, db, add);                             \
        });                                                                                                      \
    }
#define WARPGROUP_REGISTERS(name, N, transpose_b)                                                                \
    extern "C" __global__ void name(const unsigned char* image, int bytes, const uint32_t* a, uint64_t b,        \
                                    float* c) {                                                                  \
        uint32_t ra[4];                                                                                          \
        fetch(ra, a);                                                                                            \
        warpgroup<N>(image, bytes, 0, b, c, [&](float(&rc)[N / 2], uint64_t, uint64_t db) {                      \
            ptx::wgmma_m64n##N##k16_bf16<transpose_b>(rc, ra, db, true);                                         \
        });                                                                                                      \
    }
#define WARPGROUP_SPARSE(name, selector)                                                                         \
    extern "C" __global__ void name(const unsigned char* image, int bytes, uint64_t a, uint64_t b,               \
                                    const uint32_t* e, float* c) {                                               \
        uint32_t re[1];                                                                                          \
        fetch(re, e);                                                                                            \
        warpgroup<128>(image, bytes, a, b, c, [&](float(&rc)[64], uint64_t da, uint64_t db) {                    \
            ptx::wgmma_sp_m64n128k32_bf16<selector>(rc, da, db, re[0], true);                                    \
        });                                                                                                      \
    }
#define WARPGROUP_SPARSE_REGISTERS(name, selector)                                                               \
    extern "C" __global__ void name(const unsigned char* image, int bytes, const uint32_t* a, uint64_t b,        \
                                    const uint32_t* e, float* c) {                                               \
        uint32_t ra[4], re[1];                                                                                   \
        fetch(ra, a);                                                                                            \
        fetch(re, e);                                                                                            \
        warpgroup<128>(image, bytes, 0, b, c, [&](float(&rc)[64], uint64_t, uint64_t db) {                       \
            ptx::wgmma_sp_m64n128k32_bf16<selector>(rc, ra, db, re[0], true);                                    \
        });                                                                                                      \
    }
#if PTX_SM90A
WARPGROUP(wgmma_64_kk, 64, true, 0, 0)
WARPGROUP(wgmma_64_km, 64, true, 0, 1)
WARPGROUP(wgmma_64_mk, 64, true, 1, 0)
WARPGROUP(wgmma_64_mm, 64, false, 1, 1)
WARPGROUP(wgmma_128_kk, 128, true, 0, 0)
WARPGROUP(wgmma_256_kk, 256, false, 0, 0)
WARPGROUP(wgmma_256_km, 256, true, 0, 1)
WARPGROUP_REGISTERS(wgmma_64_registers, 64, 1)
WARPGROUP_REGISTERS(wgmma_128_registers, 128, 0)
WARPGROUP_REGISTERS(wgmma_256_registers, 256, 0)
WARPGROUP_SPARSE(wgmma_sp_128_0, 0)
WARPGROUP_SPARSE(wgmma_sp_128_1, 1)
WARPGROUP_SPARSE_REGISTERS(wgmma_sp_128_registers_0, 0)
WARPGROUP_SPARSE_REGISTERS(wgmma_sp_128_registers_1, 1)

extern "C" __global__ void registers_between_warpgroups(int* out) {
    if (threadIdx.x < 128) {
        ptx::fewer_registers<24>();
    } else {
        ptx::more_registers<240>();
    }
    out[threadIdx.x] = 1;
}
#endif
