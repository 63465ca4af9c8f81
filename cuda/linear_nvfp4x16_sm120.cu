// Products of nvfp4 weights with a scale per 16 k on block-scaled tensor cores; see linear_sm120.cuh. For other
// architectures nothing is left of this file: launch_linear_sm120.py chooses it.
#include "linear_sm120.cuh"

#if PTX_SM120A
SM120_ENTRIES(linear_nvfp4x16_sharq, Nvfp4By16, Backbone::expanded, true)
SM120_ENTRIES(linear_nvfp4x16_dense, Nvfp4By16, Backbone::none, true)
SM120_ENTRIES(linear_nvfp4x16_sharq_dense, Nvfp4By16, Backbone::dense, true)
#endif
