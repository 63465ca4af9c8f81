// Products of nvfp4x32 weights for many tokens on Hopper; see linear_fp4_wgmma.cuh.
#include "linear_fp4_wgmma.cuh"

FP4_WGMMA_ENTRIES(nvfp4x32, Nvfp4Codes<32>)
