// Products of hif4 weights for many tokens; see linear_fp4_tile.cuh.
#include "linear_fp4_tile.cuh"

FP4_TILE_ENTRIES(hif4, Hif4Codes)
