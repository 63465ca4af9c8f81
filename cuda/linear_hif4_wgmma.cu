// Products of hif4 weights for many tokens on Hopper; see linear_fp4_wgmma.cuh.
#include "linear_fp4_wgmma.cuh"

FP4_WGMMA_ENTRIES(hif4, Hif4Codes)
