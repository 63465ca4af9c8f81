// Bindings of pack_weight, linear and all_finite.

#include <memory>
#include <optional>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "kernels.h"
#include "packed_weight.h"

namespace engine {
namespace {

struct BoundWeight {
    std::unique_ptr<PackedWeight> packed;
    py::tuple shard_rows;
};

BoundWeight pack_weight(Backend& backend, const py::sequence& shards) {
    if (py::len(shards) == 0) reject("pack_weight needs at least one shard");
    std::vector<const void*> rows;
    py::tuple shard_rows(py::len(shards));
    std::vector<py::array> held;
    Matrix first{};
    for (size_t i = 0; i < py::len(shards); ++i) {
        held.push_back(py::cast<py::array>(shards[i]));
        const Matrix shard = matrix(held.back(), "a weight shard");
        if (i == 0) first = shard;
        if (shard.rows == 0 || shard.columns == 0) reject("a weight shard must not be empty: " + describe(held.back()));
        if (shard.type != first.type || shard.columns != first.columns)
            reject("all shards need one dtype and one K, but got " + describe(held[0]) + " and "
                   + describe(held.back()));
        const int64_t row_bytes = shard.stride * size_of(shard.type);
        for (int64_t n = 0; n < shard.rows; ++n) rows.push_back(static_cast<const char*>(shard.data) + n * row_bytes);
        shard_rows[i] = shard.rows;
    }
    std::unique_ptr<PackedWeight> packed;
    {
        const Running running(backend);
        packed = std::make_unique<PackedWeight>(rows, first.columns, first.type, backend.weights, backend.pool);
    }
    return {std::move(packed), std::move(shard_rows)};
}

void linear(Backend& backend, const py::array& x_array, const BoundWeight& weight, const py::array& out_array,
            const std::optional<py::array>& bias, const std::optional<py::array>& residual_array) {
    const PackedWeight& w = *weight.packed;
    const Matrix x = matrix(x_array, "x"), out = writable_matrix(out_array, "out");
    require_shape(x, "x", x.rows, w.K);
    require_shape(out, "out", x.rows, w.N);
    if (out.type != x.type && out.type != DType::f32)
        reject("out must have x's dtype or float32; x is " + describe(x_array) + ", out " + describe(out_array));
    LinearArgs args{};
    args.x = x.data, args.x_type = x.type, args.x_stride = x.stride, args.T = x.rows;
    args.w = w.data(), args.w_type = w.type, args.N = w.N, args.K = w.K;
    args.out = out.data, args.out_type = out.type, args.out_stride = out.stride;
    if (bias) args.bias = float_vector(*bias, "bias", w.N);
    if (residual_array) {
        const Matrix residual = matrix(*residual_array, "residual");
        require_shape(residual, "residual", x.rows, w.N);
        if (residual.type != x.type)
            reject("residual must have x's dtype; x is " + describe(x_array) + ", residual "
                   + describe(*residual_array));
        args.residual = residual.data;
        args.residual_stride = residual.stride;
    }
    const Multiplying running(backend, w, w.nbytes);
    backend.kernels.linear(args, backend.pool, backend.scratch);
}

bool all_finite(Backend& backend, const py::array& array) {
    const DType type = dtype_of(array, "array");
    if (!(array.flags() & py::array::c_style)) reject("all_finite needs a contiguous array, not " + describe(array));
    const int64_t count = array.size();
    const void* data = array.data();
    const Running running(backend);
    return backend.kernels.all_finite(data, type, count, backend.pool);
}

}  // namespace

void bind_linear(py::module_& module, BackendClass& backend) {
    py::class_<BoundWeight>(module, "PackedWeight", "a weight [N, K] in tiles; see packed_weight.h")
        .def_property_readonly("N", [](const BoundWeight& w) { return w.packed->N; })
        .def_property_readonly("K", [](const BoundWeight& w) { return w.packed->K; })
        .def_property_readonly("nbytes", [](const BoundWeight& w) { return w.packed->nbytes; })
        .def_property_readonly("shard_rows", [](const BoundWeight& w) { return w.shard_rows; });
    backend.def("pack_weight", &pack_weight, py::arg("shards"));
    backend.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("bias"),
                py::arg("residual"));
    backend.def("all_finite", &all_finite, py::arg("array"));
}

}  // namespace engine
