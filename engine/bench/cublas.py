"""What NVIDIA's libraries take for the same products: bf16 by cuBLAS, FP8 by cuBLASLt; the benchmarks' peers.

Both compute out [M, N] bf16 = x [M, K] · w [N, K]ᵀ. cuBLAS comes through CuPy's binding. cuBLASLt has none there, so
the few calls it takes are made through ctypes; its FP8 products have one scale for each side, here 1, and fast
accumulation on, as engines use them. The libraries choose their kernels themselves, by their heuristics.

Weights are random rows repeated, as in `quick_weights`. Nothing here runs where the libraries are missing: `peers`
says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from engine.bench.quick_weights import BF16, random_rows
from engine.errors import DeviceError
from engine.ops.gpu.cuda_device import CudaDevice, GpuArray

BF16_PEER, FP8_PEER = "cublas-bf16", "cublaslt-fp8"
_R_32F, _R_16BF, _R_8F_E4M3 = 0, 14, 28  # cudaDataType
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1
_WORKSPACE = 32 << 20  # bytes, what NVIDIA advises on Hopper
# cublasLtMatmulDescAttributes_t and cublasLtMatmulPreferenceAttributes_t
_TRANS_A, _A_SCALE, _B_SCALE, _FAST_ACCUM = 3, 17, 18, 25
_MAX_WORKSPACE = 1


class Peer(Protocol):
    """A library's product."""

    bytes_per_weight: int

    def weight(self, N: int, K: int) -> GpuArray:
        """Random weights [N, K]."""

    def product(self, M: int, weights: list[GpuArray]) -> list[Callable[[], None]]:
        """A call per weight, all with the same M rows of activations. Raises DeviceError where there is no kernel."""


def peers(device: CudaDevice) -> tuple[dict[str, Peer], list[str]]:
    """Those that work here, by name, and why others do not."""
    found: dict[str, Peer] = {}
    missing: list[str] = []
    for name, make in ((BF16_PEER, Cublas), (FP8_PEER, CublasLt)):
        try:
            found[name] = make(device)
        except (DeviceError, ImportError, OSError) as problem:
            missing.append(f"{name}: {problem}")
    return found, missing


class Cublas:
    """bf16 by cublasGemmEx."""

    bytes_per_weight = 2

    def __init__(self, device: CudaDevice) -> None:
        from cupy.cuda import cublas
        from cupy.cuda import device as device_module

        self._device = device
        self._cublas = cublas
        self._handle = device_module.get_cublas_handle()
        cublas.setStream(self._handle, device.stream.ptr)
        cublas.setPointerMode(self._handle, 0)  # the factors are on the host
        self._one, self._zero = np.array([1], np.float32), np.array([0], np.float32)

    def weight(self, N: int, K: int) -> GpuArray:
        return self._device.repeat_rows(random_rows(K), N)

    def product(self, M: int, weights: list[GpuArray]) -> list[Callable[[], None]]:
        N, K = weights[0].shape
        x, out = self._device.repeat_rows(random_rows(K), M), self._device.empty((M, N), BF16)

        def call(w: GpuArray) -> None:  # column by column, as cuBLAS sees it: outᵀ [N, M] = w [N, K] · xᵀ [K, M]
            left, right = (w.address, _R_16BF, K), (x.address, _R_16BF, K)
            self._cublas.gemmEx(
                self._handle, 1, 0, N, M, K, self._one.ctypes.data, *left, *right, self._zero.ctypes.data,
                out.address, _R_16BF, N, _COMPUTE_32F, _GEMM_DEFAULT,
            )  # fmt: skip

        return [lambda w=w: call(w) for w in weights]  # type: ignore[misc]  # each with its own


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasLt:
    """FP8 (E4M3) by cublasLtMatmul. Raises DeviceError where the library is missing, or has no FP8 for this GPU."""

    bytes_per_weight = 1

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        if int("".join(c for c in device.arch if c.isdigit())) < 89:
            raise DeviceError(f"{device.arch} has no FP8 instructions")
        self._library = _load()
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._workspace = device.empty((_WORKSPACE,), np.dtype(np.uint8))
        self._scale = device.upload(np.array([1], np.float32))
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._calls: list[Any] = []  # keeps descriptors alive

    def weight(self, N: int, K: int) -> GpuArray:
        return self._device.repeat_rows(self._codes(K), N)

    def product(self, M: int, weights: list[GpuArray]) -> list[Callable[[], None]]:
        N, K = weights[0].shape
        padded = -(-M // 16) * 16  # its kernels want multiples of 16 of whatever lies along a row
        x = self._device.repeat_rows(self._codes(K), padded)
        out = self._device.empty((padded, N), BF16)
        try:
            plan = self._plan(N, M, K)
        except DeviceError:
            plan = self._plan(N, padded, K)
        return [lambda w=w: self._multiply(plan, w, x, out) for w in weights]  # type: ignore[misc]  # each its own

    @staticmethod
    def _codes(K: int) -> Any:
        return random_rows(K).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    def _plan(self, N: int, M: int, K: int) -> tuple[Any, ...]:
        """Descriptors of outᵀ [N, M] = w [N, K] · xᵀ [K, M], column by column, and the library's choice of kernel."""
        operation = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(operation), _COMPUTE_32F, _R_32F)
        scale = ctypes.c_void_p(self._scale.address)
        values = ((_TRANS_A, ctypes.c_int32(1)), (_A_SCALE, scale), (_B_SCALE, scale), (_FAST_ACCUM, ctypes.c_int8(1)))
        for attribute, value in values:
            size = ctypes.c_size_t(ctypes.sizeof(value))
            self._call("cublasLtMatmulDescSetAttribute", operation, attribute, ctypes.byref(value), size)
        layouts = [ctypes.c_void_p() for _ in range(3)]
        shapes = ((_R_8F_E4M3, K, N, K), (_R_8F_E4M3, K, M, K), (_R_16BF, N, M, N))
        for layout, (kind, rows, columns, stride) in zip(layouts, shapes, strict=True):
            sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
            self._call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), kind, *sizes)
        preference, size = ctypes.c_void_p(), ctypes.c_size_t(_WORKSPACE)
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        self._call(
            "cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, ctypes.byref(size), ctypes.c_size_t(8)
        )
        choice, count = _Choice(), ctypes.c_int(0)
        w, x, out = layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, operation, w, x, out, out, preference, 1,
            ctypes.byref(choice), ctypes.byref(count),
        )  # fmt: skip
        if not count.value or choice.state:
            raise DeviceError(f"cuBLASLt has no FP8 kernel for N = {N}, M = {M}, K = {K}")
        return operation, w, x, out, choice

    def _multiply(self, plan: tuple[Any, ...], w: GpuArray, x: GpuArray, out: GpuArray) -> None:
        operation, w_layout, x_layout, out_layout, choice = plan
        address = ctypes.c_void_p
        self._call(
            "cublasLtMatmul", self._handle, operation, ctypes.byref(self._one), address(w.address), w_layout,
            address(x.address), x_layout, ctypes.byref(self._zero), address(out.address), out_layout,
            address(out.address), out_layout, ctypes.byref(choice.algorithm), address(self._workspace.address),
            ctypes.c_size_t(_WORKSPACE), address(self._device.stream.ptr),
        )  # fmt: skip

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise DeviceError(f"{name} answers status {status}")


def _load() -> ctypes.CDLL:
    from cupy.cuda import cublas  # loads cuBLAS wherever it is, and cuBLASLt with it

    assert cublas is not None
    for name in ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError("libcublasLt is not there")
