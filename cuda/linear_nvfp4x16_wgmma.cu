// Products of nvfp4x16 weights for many tokens on Hopper; see linear_fp4_wgmma.cuh.
#include "linear_fp4_wgmma.cuh"

FP4_WGMMA_ENTRIES(nvfp4x16, Nvfp4Codes<16>)
