// Products of nvfp4x32 weights for many tokens; see linear_fp4_tile.cuh.
#include "linear_fp4_tile.cuh"

FP4_TILE_ENTRIES(nvfp4x32, Nvfp4Codes<32>)
TILE_ENTRIES(nvfp4x32_one_f16, Nvfp4Codes<32>, f16, Paths::one)
