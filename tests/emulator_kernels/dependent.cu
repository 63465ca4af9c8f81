// Kernels launched while the one before may still run: what they may do before griddepcontrol.wait, and what not.
#include "common.cuh"
#include "mma.cuh"

#define PARAMETERS const float *constant, const float *made, float *out
#define HERE (blockIdx.x * blockDim.x + threadIdx.x)

extern "C" __global__ void waits_first(PARAMETERS) {
    ptx::wait_for_earlier_kernels();
    out[HERE] = constant[HERE] + made[HERE];
}

// Copies of constants are under way while it waits.
extern "C" __global__ void reads_constants_early(PARAMETERS) {
    extern __shared__ float shared[];
    ptx::cp_async_small<4>(ptx::shared_address(shared + threadIdx.x), constant + HERE);
    const float x = constant[HERE];
    ptx::wait_for_earlier_kernels();
    ptx::cp_async_wait_all();
    out[HERE] = x + shared[threadIdx.x] + made[HERE];
}

extern "C" __global__ void reads_early(PARAMETERS) {
    const float x = made[HERE];
    ptx::wait_for_earlier_kernels();
    out[HERE] = x;
}

extern "C" __global__ void copies_early(PARAMETERS) {
    extern __shared__ float shared[];
    ptx::cp_async_small<4>(ptx::shared_address(shared + threadIdx.x), made + HERE);
    ptx::wait_for_earlier_kernels();
    ptx::cp_async_wait_all();
    out[HERE] = shared[threadIdx.x];
}

extern "C" __global__ void stores_early(PARAMETERS) {
    out[HERE] = constant[HERE];
    ptx::wait_for_earlier_kernels();
}

extern "C" __global__ void adds_early(PARAMETERS) {
    atomicAdd(out + HERE, 1.0f);
    ptx::wait_for_earlier_kernels();
}

// Its last thread leaves at once: a kernel behind it may then start before the one before has ended.
extern "C" __global__ void leaves_early(PARAMETERS) {
    if (threadIdx.x + 1 == blockDim.x) return;
    ptx::wait_for_earlier_kernels();
    out[HERE] = made[HERE];
}

extern "C" __global__ void never_waits(PARAMETERS) { out[HERE] = made[HERE]; }
