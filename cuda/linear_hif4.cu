// Products of hif4 weights; see linear_fp4.cuh.
#include "linear_fp4.cuh"

FP4_DECODE_ENTRIES(hif4, Hif4Codes)
