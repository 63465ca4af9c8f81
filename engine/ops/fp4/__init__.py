"""FP4 arithmetic in NumPy: the definition that the C++ and CUDA kernels are compared with, bit for bit.

    elements   the two 4-bit element formats and how two codes share a byte
    scales     the three scale formats
    blocks     block formats built from them: NVFP4, MXFP4, HiF4
    grades     block scales of weights, chosen by error; no calibration
    feedback   weight codes that make up for each other's errors, given the input's second moments
    split      SharQ: activations into backbone and residual
    product    matrix products of FP4 operands

The rule everywhere: an elementary step is one fp32 operation, correctly rounded (nearest-even), subnormals kept, in the
order written; no fused multiply-add unless it says so, no reciprocal where a division is written. Where a step is
exact the text says so, and a kernel may then compute it as it likes. Inputs are finite: callers check.
"""
