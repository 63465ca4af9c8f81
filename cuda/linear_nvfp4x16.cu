// Products of nvfp4x16 weights; see linear_fp4.cuh.
#include "linear_fp4.cuh"

FP4_DECODE_ENTRIES(nvfp4x16, Nvfp4Codes<16>)
