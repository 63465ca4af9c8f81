// Products of mxfp4 weights for many tokens; see linear_fp4_tile.cuh.
#include "linear_fp4_tile.cuh"

FP4_TILE_ENTRIES(mxfp4, Mxfp4Codes)
