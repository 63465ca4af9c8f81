// Makes CUDA C++ of a host compiler's C++: force-included before every kernel file (-include emulate/simt.h -x c++).
//
// Order matters. First the standard and CUDA's own headers, as host code: their conversions and arithmetic on bf16, fp16,
// fp8 and fp4 values round as the device does. Then what they lack for the host. Last the words that change meaning:
// qualifiers, __CUDA_ARCH__, assert.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include "launch.h"
#include "ptx.h"
#include "warp.h"

#include "intrinsics.h"
#include "half_math.h"
#include "collectives.h"
#include "atomics.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __managed__
#undef __grid_constant__
#undef __launch_bounds__
#undef __cluster_dims__
#undef __forceinline__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __cluster_dims__(...)
#define __forceinline__ inline __attribute__((always_inline))
// All shared memory is the module's thread-local segment: shared.h.
#define __shared__ thread_local
// Read in the preprocessed text by the launcher, which lists the entry points and takes the bounds out.
#define __global__ __attribute__((noinline, visibility("default")))
#define __launch_bounds__(...) emu_launch_bounds(__VA_ARGS__)
#define alignas(bytes) __attribute__((aligned(bytes))) // as CUDA, wherever it stands among the specifiers

#define threadIdx (::emu::current->index)
#define blockIdx (::emu::launched.block_index)
#define blockDim (::emu::launched.block_dim)
#define gridDim (::emu::launched.grid_dim)
constexpr int warpSize = 32;

#undef assert
#define assert(condition) ((condition) ? void(0) : ::emu::fail_at(::emu::Site::here(), "assertion: %s", #condition))

#define __CUDACC__ 1
#define __CUDA_ARCH__ EMU_CUDA_ARCH // and, from the command line, __CUDA_ARCH_FEAT_SM90_ALL and the like
