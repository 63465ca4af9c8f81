"""The CUDA side's Python: finding the kernels' sources, compiling and launching them.

    sources.py      where cuda/ is, where CUDA's own headers are, what a .cu file includes
    ptx_rewrite.py  inline assembly as calls of the emulator's PTX interpreter
    host_build.py   a .cu file as a shared library for the CPU, cached on disk
    elf.py          the thread-local symbols of such a library: its __shared__ arrays
    emulator.py     EmulatedModule: launching such a library's kernels on NumPy arrays
    compile.py kernel_loaders.py    kernels for a GPU: NVRTC and its disk cache, or the extension engine._cuda
    device.py cuda_device.py        memory, launches, recordings: the emulator's, a GPU's
    launch_*.py weight_layout.py    an operation's launches; weights as its kernels want them
    prefill_products.py             products of prefill rows: which kernels, and scratch for expanded activations
    backend.py      GpuOps, the operations
    staging.py steps.py             a step's arrays on the device; decode steps recorded, tokens chosen

What runs the kernels on the CPU is C++: cuda/emulate/README.md.
"""
