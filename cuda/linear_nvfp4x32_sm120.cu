// Products of nvfp4 weights with a scale per 32 k on block-scaled tensor cores; see linear_sm120.cuh. For other
// architectures nothing is left of this file: launch_linear_sm120.py chooses it.
#include "linear_sm120.cuh"

#if PTX_SM120A
SM120_ENTRIES(linear_nvfp4x32_sharq, Nvfp4By32, Backbone::sparse, true)
SM120_ENTRIES(linear_nvfp4x32_sparse, Nvfp4By32, Backbone::sparse, false)
SM120_ENTRIES(linear_nvfp4x32_dense, Nvfp4By32, Backbone::none, true)
SM120_ENTRIES(linear_nvfp4x32_sharq_dense, Nvfp4By32, Backbone::dense, true)
#endif
