// Runs any program of accesses and synchronisation: test_emulator_checker.py draws programs at random and compares the
// checker's verdict with a model of its own.
#include "mma.cuh"

enum Operation { kNothing, kRead, kWrite, kAtomic, kBlock, kWarp, kPart, kArrive, kPartSync };

/// program[step][thread] = operation + 16·bytes + 256·byte offset. Each step has the same kind of synchronisation, or
/// none, for all threads that take part; kArrive and kPartSync meet at a barrier of 64 threads, where kArrive does not
/// wait. Programs have at most 15 steps, so that each such step has a barrier of its own.
extern "C" __global__ void run_program(const int* program, int steps, int* sink) {
    __shared__ __align__(4) unsigned char memory[16];
    if (threadIdx.x < 16) memory[threadIdx.x] = 0;
    __syncthreads();
    int seen = 0;
    for (int step = 0; step < steps; ++step) {
        int code = program[step * int(blockDim.x) + int(threadIdx.x)];
        unsigned char* at = memory + code / 256;
        int bytes = code / 16 % 16;
        switch (code % 16) {
            case kRead:
                if (bytes == 1) seen += *(volatile unsigned char*)at;
                if (bytes == 2) seen += *(volatile unsigned short*)at;
                if (bytes == 4) seen += *(volatile int*)at;
                break;
            case kWrite:
                if (bytes == 1) *(volatile unsigned char*)at = 1;
                if (bytes == 2) *(volatile unsigned short*)at = 1;
                if (bytes == 4) *(volatile int*)at = 1;
                break;
            case kAtomic: atomicAdd((int*)at, 1); break;
            case kBlock: __syncthreads(); break;
            case kWarp: __syncwarp(); break;
            case kPart: __syncwarp(0x0000000fu); break;
            case kArrive: ptx::barrier_arrive(1 + step % 15, 64); break;
            case kPartSync: ptx::barrier_sync(1 + step % 15, 64); break;
            default: break;
        }
    }
    sink[threadIdx.x] = seen;
}
