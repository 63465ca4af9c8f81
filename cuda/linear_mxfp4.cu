// Products of mxfp4 weights; see linear_fp4.cuh.
#include "linear_fp4.cuh"

FP4_DECODE_ENTRIES(mxfp4, Mxfp4Codes)
