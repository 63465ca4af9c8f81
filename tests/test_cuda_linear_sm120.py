"""The FP4 products on block-scaled tensor cores, on the emulator, whose instructions round as real ones are said to.

Three checks of a result: bit by bit against this file's own model of the instructions and the kernels' order of sums;
against float64 products of the dequantised operands, within what that model can lose; against the NumPy reference.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from test_cuda_linear import dequantized, device_operand, fp4_matrix

from engine.errors import DeviceError, InvalidArgument
from engine.fp4_types import Fp4Matrix, SharqOperand
from engine.ops.fp4 import blocks
from engine.ops.fp4.elements import unpack
from engine.ops.fp4.split import paths
from engine.ops.gpu import compile as compiling
from engine.ops.gpu import launch_linear_sm120 as sm120
from engine.ops.gpu import weight_layout
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.emulator import SCHEDULES
from engine.ops.gpu.launch_linear import Output, Workspace
from engine.ops.reference import ReferenceOps

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
REFERENCE = ReferenceOps()


class Case(NamedTuple):
    """An entry point: a weight's format and block, what of an operand is multiplied, whether that is stored sparse."""

    format: str
    block: int
    path: str
    sparse: bool = False

    def __str__(self):
        return f"{self.format}x{self.block}-{self.path}"


CASES = [
    Case("nvfp4", 32, "sharq", True),
    Case("nvfp4", 32, "sparse", True),
    Case("nvfp4", 32, "dense"),
    Case("nvfp4", 32, "sharq_dense"),
    Case("nvfp4", 16, "sharq", True),
    Case("nvfp4", 16, "dense"),
    Case("nvfp4", 16, "sharq_dense"),
    Case("mxfp4", 32, "sharq", True),
    Case("mxfp4", 32, "dense"),
    Case("mxfp4", 32, "sharq_dense"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
SHARQ = CASES[0]


@lru_cache
def device(checked=False, schedule=SCHEDULES[0]):
    return EmulatedDevice("sm_120a", checked=checked, schedule=schedule)


def operand_of(case, rng, M, K):
    """Activations with channels of many sizes and outliers, zeros among them."""
    x = rng.standard_normal((M, K)) * np.exp(rng.standard_normal(K))
    x[:, rng.integers(0, K, 2)] *= 40
    x[:, 32:64] = 0
    x = x.astype(BF16)
    if case.path == "dense":
        return REFERENCE.prepare_fp4(x, format=case.format)
    return REFERENCE.prepare_sharq(x, format=case.format, sparse=case.sparse)


def run(case, operand, matrix, *, tokens=None, splits=None, out=None, bias=None, residual=None, dev=None):
    """out = operand · matrixᵀ through the kernel that `case` names."""
    dev = dev or device()
    weight = weight_layout.pack_fp4([matrix], placed=False).on(dev.upload)
    M = len(operand.g)
    plan = sm120.plan(M, weight, case.path, sms=dev.sms, tokens=tokens, splits=splits)
    arrivals = dev.zeros((max(1, plan.cut.arrivals),), np.dtype(np.uint32))
    work = Workspace(dev.empty((max(1, plan.cut.partials),), F32), arrivals)
    out = dev.empty((M, matrix.rows), F32) if out is None else out
    dev.launch(sm120.linear(device_operand(operand, dev), weight, Output(out, bias, residual), work, plan, case.path))
    assert not arrivals.any()
    return out


def parts_of(case, operand):
    """What is multiplied, as ordinary matrices in the order of the kernel, and whether by the sparse instruction."""
    if isinstance(operand, Fp4Matrix):
        return [(operand, False)]
    backbone, residual = paths(operand)
    by_sparse = case.sparse and str(case).startswith("nvfp4x32")
    return [(backbone, by_sparse)] * (case.path != "dense") + [(residual, False)] * (case.path != "sparse")


def expected(case, operand, matrix):
    """In float64, exact for these sizes but for the last bits."""
    return sum(dequantized(part) @ dequantized(matrix).T for part, _ in parts_of(case, operand))


# ---- an independent model --------------------------------------------------------------------------------------------
# What cuda/emulate/ptx_fp4.h says of an instruction's sum, in float64, of which every number below is exact: dots are
# small integers over 4, terms have at most 24 significant bits, and what is summed are multiples, below 2^50, of 2^lsb.


class Padded(NamedTuple):
    """A matrix with K padded to 128: the elements' values, each one's scale, its scale's exponent."""

    values: np.ndarray  # [R, P] E2M1
    scales: np.ndarray  # [R, P]
    exponents: np.ndarray  # [R, P]: scale = m · 2^exponent with m = 8 … 15, below 8 where a UE4M3 is subnormal

    @classmethod
    def of(cls, matrix):
        rows, K, P = matrix.rows, matrix.K, -(-matrix.K // 128) * 128
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = unpack(matrix.payload)
        values, scales = np.zeros((rows, P)), np.zeros((rows, P))
        values[:, :K] = np.where(codes & 8, -1, 1) * magnitudes[codes & 7]
        stored = blocks.block_format(matrix.format, matrix.block)
        scales[:, :K] = stored.unit(matrix.scale).repeat(matrix.block, 1) * 2.0  # a unit is E2M1's smallest, 0.5
        lowest = -6 if matrix.format == "nvfp4" else -127
        exponents = np.full((rows, P), lowest)
        positive = scales > 0
        exponents[positive] = np.maximum(np.floor(np.log2(scales[positive])), lowest)
        return cls(values, scales, exponents - 3)

    def columns(self, k, count):
        return Padded(*(array[:, k : k + count] for array in self))


def instruction(c, a, b, group):
    """c + the products of a [M, k] and b [N, k], four groups of k: one instruction's result."""
    terms, lsb = [], np.full(c.shape, -174.0)
    for k in range(0, 4 * group, group):
        x, w = a.columns(k, group), b.columns(k, group)
        scale = x.scales[:, :1] * w.scales[:, 0]
        terms.append((x.values @ w.values.T) * scale)
        live = ((x.values != 0).astype(F64) @ (w.values != 0).T > 0) & (scale > 0)
        largest = x.exponents[:, :1] + w.exponents[:, 0] - 2  # of dot · m_x · m_w, a dot in quarters
        lsb = np.where(live, np.maximum(lsb, largest - 27), lsb)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(c.astype(F64)))), -126)
    lsb = np.where(c != 0, np.maximum(lsb, exponent - 35), lsb)
    exact = sum(np.trunc(np.ldexp(term, -lsb.astype(int))) for term in (*terms, c.astype(F64)))
    assert np.abs(exact).max() < 2**52
    return toward_zero(np.ldexp(exact, lsb.astype(int)))


def toward_zero(x):
    nearest = x.astype(F32)
    return np.where(np.abs(nearest.astype(F64)) > np.abs(x), np.nextafter(nearest, F32.type(0)), nearest)


def slice_of(K):
    """k that are summed apart: at most eight slices, each a power of two and at least 256."""
    return next(size for size in (256, 512, 1024, 2048, 4096) if 8 * size >= K)


def slices_of(case, operand, matrix):
    """For every slice of K the operands (a, b, k in a scale group) of its instructions, in order."""
    weight = Padded.of(matrix)
    K, steps = weight.values.shape[1], []
    for order, (part, by_sparse) in enumerate(parts_of(case, operand)):
        a, group = Padded.of(part), 32 if by_sparse else 16
        steps += [(k // 128, order, k, a, group) for k in range(0, K, 4 * group)]
    steps.sort(key=lambda step: step[:3])  # 128 k after 128 k, in them path after path
    for start in range(0, K, slice_of(K)):
        inside = [step[2:] for step in steps if start <= step[2] < start + slice_of(K)]
        yield [(a.columns(k, 4 * group), weight.columns(k, 4 * group), group) for k, a, group in inside]


def model_sum(case, operand, matrix):
    """Sums without global scales [M, N] float32, the bits the kernels must give."""
    total = None
    for instructions in slices_of(case, operand, matrix):
        c = np.zeros((len(operand.g), matrix.rows), F32)
        for a, b, group in instructions:
            c = instruction(c, a, b, group)
        total = c if total is None else total + c
    return total


def model(case, operand, matrix, bias=None, residual=None):
    y = model_sum(case, operand, matrix) * (operand.g[:, None] * matrix.g)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual.astype(F32)


def assert_same(actual, wanted):
    np.testing.assert_array_equal(actual.view(f"u{actual.itemsize}"), wanted.view(f"u{wanted.itemsize}"))


@each_case
@pytest.mark.parametrize(("M", "N", "K"), [(3, 40, 192), (18, 16, 448), (70, 150, 576)])
def test_bit_by_bit(case, M, N, K):
    """Tails of M, N and K, every shape of block, K in one block or split over several."""
    rng = np.random.default_rng(M)
    operand, matrix = operand_of(case, rng, M, K), fp4_matrix(rng, N, K, case.format, case.block)
    wanted = model(case, operand, matrix)
    for tokens in sm120.SHAPES:
        for splits in (1, 3):
            assert_same(run(case, operand, matrix, tokens=tokens, splits=splits), wanted)


# ---- against float64 -------------------------------------------------------------------------------------------------


def bound(case, operand, matrix):
    """What each output may be off by: the model's losses, instruction after instruction, and the roundings after them.

    An instruction's result is truncated to fp32: below 2^-23 of it. Before, five addends are truncated, each by less
    than 2^lsb: that is at most 2^-35 of the accumulator or 2^(X − 27), and 4 · 2^X at most a product of two scales.
    """
    y = np.zeros((len(operand.g), matrix.rows))
    off = np.zeros_like(y)
    for instructions in slices_of(case, operand, matrix):
        sums, lost = np.zeros_like(y), np.zeros_like(y)
        for a, b, _ in instructions:
            before, sums = sums, sums + (a.values * a.scales) @ (b.values * b.scales).T
            scales = a.scales.max(1)[:, None] * b.scales.max(1)
            largest = np.maximum(np.abs(before), np.abs(sums)) + lost
            lost = lost + 2.0**-23 * largest + 5 * (2.0**-29 * scales + 2.0**-35 * largest)
        y, off = y + sums, off + lost + 2.0**-24 * np.abs(y + sums)
    factor = operand.g[:, None].astype(F64) * matrix.g
    return off * factor + 4 * 2.0**-24 * np.abs(y * factor)  # three more roundings


@each_case
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 2304), (33, 48, 1024), (140, 136, 512)])
def test_within_what_the_model_loses(case, M, N, K):
    rng = np.random.default_rng(K)
    operand, matrix = operand_of(case, rng, M, K), fp4_matrix(rng, N, K, case.format, case.block)
    exact = expected(case, operand, matrix)
    y = run(case, operand, matrix)
    allowed = bound(case, operand, matrix)
    assert (np.abs(y - exact) <= allowed).all()
    assert allowed.max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("case", [SHARQ, CASES[4], CASES[7]], ids=str)
def test_long_rows_stay_near_the_definition(case):
    """The largest K of the models served: 1e-5 of max |Y| is what the backend promises of a layer."""
    rng, K = np.random.default_rng(5), 18944
    operand, matrix = operand_of(case, rng, 2, K), fp4_matrix(rng, 16, K, case.format, case.block)
    reference = REFERENCE.fp4_linear(operand, REFERENCE.pack_fp4([matrix]), out=np.empty((2, 16), F32))
    assert np.abs(run(case, operand, matrix) - reference).max() <= 1e-5 * np.abs(reference).max()


def test_one_pass_is_the_sum_of_its_halves():
    rng, (M, N, K) = np.random.default_rng(6), (20, 48, 640)
    operand, matrix = operand_of(SHARQ, rng, M, K), fp4_matrix(rng, N, K, "nvfp4", 32)
    halves = [SHARQ._replace(path=path) for path in ("sparse", "dense")]
    sparse, dense = (run(half, operand, matrix).astype(F64) for half in halves)
    allowed = sum(bound(half, operand, matrix) for half in (SHARQ, *halves))
    assert (np.abs(run(SHARQ, operand, matrix) - (sparse + dense)) <= allowed).all()
    expanded = SHARQ._replace(path="sharq_dense")  # the same numbers, the backbone stored dense
    backbone, residual = paths(operand)
    scale = operand.backbone_scale.repeat(2, 1)
    as_dense = SharqOperand(operand.g, backbone.payload, None, scale, residual.payload, residual.scale)
    allowed = bound(SHARQ, operand, matrix) + bound(expanded, as_dense, matrix)
    assert (np.abs(run(SHARQ, operand, matrix).astype(F64) - run(expanded, as_dense, matrix)) <= allowed).all()


# ---- what a token's bits depend on -----------------------------------------------------------------------------------


def rows_of(operand, rows):
    fields = {name: getattr(operand, name) for name in operand.__dataclass_fields__}
    return type(operand)(**{name: v[rows] if isinstance(v, np.ndarray) else v for name, v in fields.items()})


@pytest.mark.parametrize("case", [SHARQ, CASES[5], CASES[7]], ids=str)
def test_a_tokens_bits_depend_on_its_row_alone(case):
    """Alone, among any number of others, in any place, whatever shape and split its batch gets."""
    rng, (M, N, K) = np.random.default_rng(7), (130, 40, 320)
    operand, matrix = operand_of(case, rng, M, K), fp4_matrix(rng, N, K, case.format, case.block)
    whole = run(case, operand, matrix)
    for rows in ([0], [129], [63, 5], range(15), range(100, 117), range(2, 66), range(65), range(129)):
        rows = list(rows)
        assert_same(run(case, rows_of(operand, rows), matrix), whole[rows])


# ---- epilogue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_bias_residual_and_one_rounding(dtype, splits):
    rng, (M, N, K) = np.random.default_rng(8), (5, 37, 320)
    operand, matrix = operand_of(SHARQ, rng, M, K), fp4_matrix(rng, N, K, "nvfp4", 32)
    operand = rows_of(operand, list(range(M)))
    bias = rng.standard_normal(N).astype(F32)
    residual = (10 * rng.standard_normal((M, N))).astype(dtype)
    with np.errstate(over="ignore"):
        wanted = model(SHARQ, operand, matrix, bias, residual).astype(dtype)
        plain = model(SHARQ, operand, matrix).astype(dtype)
    out = device().empty((M, N), dtype)
    assert_same(run(SHARQ, operand, matrix, splits=splits, out=out, bias=bias, residual=residual), wanted)
    in_place = device().upload(residual)
    assert_same(run(SHARQ, operand, matrix, splits=splits, out=in_place, bias=bias, residual=in_place), wanted)
    assert_same(run(SHARQ, operand, matrix, splits=splits, out=out), plain)


# ---- races, bounds, schedules ----------------------------------------------------------------------------------------


@each_case
def test_any_schedule(case):
    rng, (M, N, K) = np.random.default_rng(9), (17, 72, 1280)
    operand, matrix = operand_of(case, rng, M, K), fp4_matrix(rng, N, K, case.format, case.block)
    wanted = model(case, operand, matrix)
    for tokens, schedule in zip((16, 64, 128, 16), SCHEDULES, strict=True):
        splits = 1 if tokens > 16 else 3
        assert_same(run(case, operand, matrix, tokens=tokens, splits=splits, dev=device(schedule=schedule)), wanted)


@pytest.mark.parametrize("case", [SHARQ, CASES[1], CASES[2], CASES[3]], ids=str)
def test_checked(case):
    """No race, nothing read before it is written, nothing beyond an array: with rings that go round, tails, splits."""
    rng = np.random.default_rng(10)
    for (M, N, K), tokens, splits in (((1, 16, 1280), 16, 1), ((7, 72, 448), 64, 2), ((130, 40, 704), 128, 1)):
        operand, matrix = operand_of(case, rng, M, K), fp4_matrix(rng, N, K, case.format, case.block)
        for schedule in SCHEDULES[:2]:
            dev = device(checked=True, schedule=schedule)
            y = run(case, operand, matrix, tokens=tokens, splits=splits, dev=dev)
            assert_same(y, model(case, operand, matrix))


# ---- what is refused, what is chosen ---------------------------------------------------------------------------------


def units(format, block, *, placed=False, N=16, K=128):
    return weight_layout.pack_fp4([fp4_matrix(np.random.default_rng(0), N, K, format, block)], placed=placed)


def test_refusals():
    with pytest.raises(InvalidArgument, match="no block-scaled instruction multiplies hif4"):
        sm120.plan(1, units("hif4", 64), "dense", sms=1)
    with pytest.raises(InvalidArgument, match="nvfp4 weights with a scale per 32 k, not nvfp4x16"):
        sm120.plan(1, units("nvfp4", 16), "sparse", sms=1)
    with pytest.raises(InvalidArgument, match="placed=False"):
        sm120.plan(1, units("nvfp4", 32, placed=True), "sharq", sms=1)
    weight = units("nvfp4", 32)
    operand = operand_of(CASES[7], np.random.default_rng(0), 1, 128)
    output, work = Output(np.empty((1, 16), F32)), Workspace(None, None)
    with pytest.raises(InvalidArgument, match="activations in mxfp4 cannot be multiplied with a weight in nvfp4"):
        sm120.linear(operand, weight, output, work, sm120.plan(1, weight, "sharq", sms=1))


def test_plans_fit_the_machine():
    """Shared memory within a block's 99 KiB, as many blocks an SM as promised, grids that cover everything once."""
    for case in CASES:
        for M, N, K in ((1, 4096, 4096), (17, 37888, 3584), (4096, 3584, 18944)):
            weight = units(case.format, case.block)
            weight = weight_layout.Fp4Units(weight.format, weight.block, False, N, K, weight.units, weight.g)
            plan = sm120.plan(M, weight, case.path, sms=170)
            assert plan.shared + 128 <= 99 * 1024
            assert plan.shape.blocks * (plan.shared + 128 + 1024) <= 100 * 1024
            x, y, z = plan.grid
            assert (x - 1) * plan.shape.tokens < M <= x * plan.shape.tokens
            assert (z - 1) * plan.shape.rows < N <= z * plan.shape.rows
            assert (y - 1) * plan.cut.slices_per_block < plan.cut.slices <= y * plan.cut.slices_per_block
            assert (plan.cut.partials == 0) == (y == 1)


# ---- compiled code ---------------------------------------------------------------------------------------------------


SOURCES = ("linear_nvfp4x32_sm120.cu", "linear_nvfp4x16_sm120.cu", "linear_mxfp4_sm120.cu")
OMMA = re.compile(r"OMMA\.SF(?P<sparse>\.SP)?\.(?P<shape>\d+)\.F32\.E2M1\.E2M1\.(?P<scales>\S+) (?P<operands>[^;]*);")
USAGE = re.compile(r"Function (?P<name>\w+):\n\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+).*? LOCAL:(?P<local>\d+)")
# Of a thread, by tokens of a block: 128 threads twice an SM, or 256 once, may have 255.
MOST_REGISTERS = {16: 136, 64: 216, 128: 255}


def tool(name):
    """One of CUDA's binary utilities: from a wheel, else on PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or () if spec else ()
    wheels = [path for folder in folders for path in sorted(Path(folder).glob(f"*/bin/{name}"))]
    return str(wheels[0]) if wheels else shutil.which(name)


@lru_cache
def dumped(source, arch, folder):
    """Text of cuobjdump -sass by kernel, and of -res-usage."""
    image = compiling.cubin(source, arch).read_bytes()
    path = Path(folder) / f"{Path(source).stem}-{arch}.cubin"
    path.write_bytes(image)
    command = [tool("cuobjdump"), str(path)]
    sass, usage = (
        subprocess.run([*command, option], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "-res-usage")
    )
    kernels = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
    return {name.strip(): text for name, text in kernels.items()}, usage


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    try:
        compiling.nvrtc_version()
    except DeviceError as error:
        pytest.skip(str(error))
    if tool("cuobjdump") is None:
        pytest.skip("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump nvidia-nvdisasm)")
    folder = str(tmp_path_factory.mktemp("cubins"))
    return lambda source, arch: dumped(source, arch, folder)


@pytest.mark.parametrize("arch", sm120.ARCHITECTURES)
def test_one_pass_issues_one_sparse_and_two_dense_instructions(dump, arch):
    """For each 16 tokens × 8 rows × 128 k, on the same weight registers."""
    kernels, _ = dump(SOURCES[0], arch)
    for tokens, tiles in ((16, 1 * 2), (64, 4 * 2), (128, 4 * 4)):
        found = list(OMMA.finditer(kernels[f"linear_nvfp4x32_sharq_m{tokens}"]))
        assert {match["scales"] for match in found} == {"UE4M3.4X"}
        sparse, dense = ([m for m in found if bool(m["sparse"]) == flag] for flag in (True, False))
        assert ({m["shape"] for m in sparse}, {m["shape"] for m in dense}) == ({"168128"}, {"16864"})
        assert (len(sparse), len(dense)) == (tiles, 2 * tiles)
        weights = {register(match) for match in sparse}
        assert {register(match) for match in dense} == weights | {first + 2 for first in weights}


def register(match):
    """The first of the registers of B."""
    return int(re.match(r" *R(\d+)", match["operands"].split(",")[2])[1])


@pytest.mark.parametrize("source", SOURCES)
def test_every_entry_point_has_its_instructions_and_no_spills(dump, source):
    kernels, usage = dump(source, "sm_120a")
    resources = {match["name"]: match for match in USAGE.finditer(usage)}
    assert set(kernels) == set(resources)
    cases = [case for case in CASES if source.startswith(f"linear_{name_of(case)}_sm120")]
    assert len(kernels) == 3 * len(cases)
    for case in cases:
        sparse = int(case.path in ("sharq", "sparse") and source == SOURCES[0])
        dense = {"sharq": 2 if sparse else 4, "sharq_dense": 4, "sparse": 0, "dense": 2}[case.path]
        for tokens, tiles in ((16, 2), (64, 8), (128, 16)):
            name = f"linear_{name_of(case)}_{case.path}_m{tokens}"
            found = OMMA.findall(kernels[name])
            assert [bool(match[0]) for match in found].count(True) == sparse * tiles
            assert len(found) == (sparse + dense) * tiles
            assert {match[2] for match in found} == {"E8" if case.format == "mxfp4" else "UE4M3.4X"}
            assert (resources[name]["stack"], resources[name]["local"]) == ("0", "0")
            assert int(resources[name]["registers"]) <= MOST_REGISTERS[tokens]


def name_of(case):
    return "mxfp4" if case.format == "mxfp4" else f"nvfp4x{case.block}"
