// Products of mxfp4 weights on block-scaled tensor cores; see linear_sm120.cuh. For other architectures nothing is left
// of this file: launch_linear_sm120.py chooses it.
#include "linear_sm120.cuh"

#if PTX_SM120A
SM120_ENTRIES(linear_mxfp4_sharq, Mxfp4By32, Backbone::expanded, true)
SM120_ENTRIES(linear_mxfp4_dense, Mxfp4By32, Backbone::none, true)
SM120_ENTRIES(linear_mxfp4_sharq_dense, Mxfp4By32, Backbone::dense, true)
#endif
