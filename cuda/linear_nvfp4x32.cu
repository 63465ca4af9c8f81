// Products of nvfp4x32 weights; see linear_fp4.cuh.
#include "linear_fp4.cuh"

FP4_DECODE_ENTRIES(nvfp4x32, Nvfp4Codes<32>)
