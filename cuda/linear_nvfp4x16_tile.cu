// Products of nvfp4x16 weights for many tokens; see linear_fp4_tile.cuh.
#include "linear_fp4_tile.cuh"

FP4_TILE_ENTRIES(nvfp4x16, Nvfp4Codes<16>)
TILE_ENTRIES(nvfp4x16_one_f16, Nvfp4Codes<16>, f16, Paths::one)
