// Bindings of the FP8 operations: prepare_fp8, pack_fp8, fp8_linear, w8a16_linear.

#include <algorithm>
#include <memory>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "kernels.h"
#include "packed_fp8.h"

namespace engine {
namespace {

// A contiguous matrix of codes.
Matrix codes_matrix(const py::array& array, const char* name) {
    const bool fits = array.ndim() == 2 && array.dtype().equal(py::dtype::of<uint8_t>())
                      && (array.flags() & py::array::c_style);
    if (!fits) reject(std::string(name) + " must be contiguous uint8 with 2 dimensions, not " + describe(array));
    return {const_cast<void*>(array.data()), DType::f32, array.shape(0), array.shape(1), array.shape(1)};
}

void require_depth(int64_t K, const PackedFp8& w) {
    if (K != w.K)
        reject("activations with K = " + std::to_string(K) + " do not multiply weights with K = "
               + std::to_string(w.K));
}

void prepare_fp8(Backend& backend, const py::array& x, const std::optional<py::array>& norm_weight, float eps,
                 bool silu, py::array_t<uint8_t>& codes, py::array_t<float>& scale) {
    const OperandRows rows = operand_rows(x, norm_weight, eps, silu);
    if (rows.K == 0) reject("FP8 rows need at least one element, not " + describe(x));
    require_shape(codes_matrix(codes, "codes"), "codes", rows.T, rows.K);
    float_vector(scale, "scale", rows.T);
    const PrepareFp8Args args{rows, codes.mutable_data(), scale.mutable_data()};
    bool finite;
    {
        const Running running(backend);
        finite = backend.kernels.prepare_fp8(args, backend.pool, backend.scratch);
    }
    if (!finite) throw NotFinite("x, or x rounded to bfloat16, holds NaN or infinity, which FP8 rows must not");
}

// ---- weights -------------------------------------------------------------------------------------------------------

// One shard, an Fp8Matrix of engine/fp8_types.py, which has checked its shapes.
struct Shard {
    py::array codes, scale;
    int64_t N, K, rows_per_scale, step;

    explicit Shard(const py::handle& object)
        : codes(py::cast<py::array>(object.attr("payload"))),
          scale(py::array_t<float, py::array::c_style>(py::cast<py::array>(object.attr("scale")))) {
        const Matrix m = codes_matrix(codes, "payload");
        const auto tile = py::cast<std::pair<int64_t, int64_t>>(object.attr("tile"));
        N = m.rows, K = m.columns, rows_per_scale = tile.first, step = std::min(tile.second, K);
        if (N == 0 || K == 0) reject("a weight shard must not be empty: " + describe(codes));
    }
    const uint8_t* row(int64_t n) const { return static_cast<const uint8_t*>(codes.data()) + n * K; }
    const float* row_scale(int64_t n) const {
        return static_cast<const float*>(scale.data()) + n / rows_per_scale * scale.shape(1);
    }
    bool has_nan() const {
        const uint8_t* first = row(0);
        return std::any_of(first, first + N * K, [](uint8_t code) { return (code & 0x7f) == 0x7f; });
    }
};

std::unique_ptr<PackedFp8> pack_fp8(Backend& backend, const py::sequence& objects) {
    if (py::len(objects) == 0) reject("pack_fp8 needs at least one shard");
    std::vector<Shard> shards;
    std::vector<PackedFp8::Row> rows;
    for (const py::handle object : objects) {
        shards.emplace_back(object);
        const Shard &first = shards.front(), &shard = shards.back();
        if (shard.K != first.K || shard.step != first.step)
            reject("all shards need one K and as many k per scale, but got " + std::to_string(first.K) + " by "
                   + std::to_string(first.step) + " and " + std::to_string(shard.K) + " by "
                   + std::to_string(shard.step));
        if (shard.has_nan()) throw NotFinite("the weight holds NaN, which FP8 weights must not");
        for (int64_t n = 0; n < shard.N; ++n) rows.push_back({shard.row(n), shard.row_scale(n)});
    }
    const Running running(backend);
    return std::make_unique<PackedFp8>(rows, shards[0].K, shards[0].step, backend.weights, backend.pool);
}

// ---- products ------------------------------------------------------------------------------------------------------

void multiply(Backend& backend, Fp8LinearArgs args, const PackedFp8& w) {
    args.K = w.K, args.w = w.data(), args.w_scale = w.scale(), args.w_step = w.step;
    const Multiplying running(backend, w, w.nbytes());
    backend.kernels.fp8_linear(args, backend.pool, backend.scratch);
}

void fp8_linear(Backend& backend, const py::array& codes_array, const py::array& scale, const PackedFp8& w,
                const py::array& out, const std::optional<py::array>& bias, const std::optional<py::array>& residual) {
    const Matrix codes = codes_matrix(codes_array, "codes");
    require_depth(codes.columns, w);
    Fp8LinearArgs args{};
    args.x = codes.data, args.codes = true, args.x_stride = codes.stride, args.T = codes.rows;
    args.x_scale = float_vector(scale, "scale", codes.rows);
    args.to = product_out(out, codes.rows, w.N, bias, residual);
    multiply(backend, args, w);
}

void w8a16_linear(Backend& backend, const py::array& x_array, const PackedFp8& w, const py::array& out,
                  const std::optional<py::array>& bias, const std::optional<py::array>& residual) {
    const Matrix x = matrix(x_array, "x");
    require_depth(x.columns, w);
    Fp8LinearArgs args{};
    args.x = x.data, args.x_type = x.type, args.x_stride = x.stride, args.T = x.rows;
    args.to = product_out(out, x.rows, w.N, bias, residual);
    multiply(backend, args, w);
}

}  // namespace

void bind_fp8(py::module_& module, BackendClass& backend) {
    py::class_<PackedFp8>(module, "PackedFp8", "an FP8 weight [N, K] in tiles; see fp8_tiles.h")
        .def_property_readonly("N", [](const PackedFp8& w) { return w.N; })
        .def_property_readonly("K", [](const PackedFp8& w) { return w.K; })
        .def_property_readonly("nbytes", [](const PackedFp8& w) { return w.nbytes(); });
    backend.def("prepare_fp8", &prepare_fp8, py::arg("x"), py::arg("norm_weight"), py::arg("eps"), py::arg("silu"),
                py::arg("codes").noconvert(), py::arg("scale").noconvert());
    backend.def("pack_fp8", &pack_fp8, py::arg("shards"));
    backend.def("fp8_linear", &fp8_linear, py::arg("codes"), py::arg("scale"), py::arg("weight"), py::arg("out"),
                py::arg("bias"), py::arg("residual"));
    backend.def("w8a16_linear", &w8a16_linear, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("bias"),
                py::arg("residual"));
}

}  // namespace engine
