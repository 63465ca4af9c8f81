// Bindings of embed, rms_norm, silu_mul.

#include "bindings.h"
#include "kernels.h"

namespace engine {
namespace {

void require_type(const Matrix& m, const char* name, DType type, const char* like) {
    if (m.type != type) reject(std::string(name) + " must have the dtype of " + like);
}

void embed(Backend& backend, const py::array& table_array, const py::array& ids_array, const py::array& out_array) {
    const Matrix table = matrix(table_array, "table"), out = writable_matrix(out_array, "out");
    const int32_t* ids = int_vector(ids_array, "token_ids", out.rows);
    require_shape(out, "out", out.rows, table.columns);
    for (int64_t t = 0; t < out.rows; ++t)
        if (ids[t] < 0 || ids[t] >= table.rows)
            reject("token id " + std::to_string(ids[t]) + " is outside the table of " + std::to_string(table.rows)
                   + " rows");
    const EmbedArgs args{table.data, table.type, table.stride, ids, out.rows, out.columns,
                         out.data, out.type, out.stride};
    const Running running(backend);
    backend.kernels.embed(args, backend.pool);
}

void rms_norm(Backend& backend, const py::array& x_array, const py::array& weight, float eps,
              const py::array& out_array) {
    const Matrix x = matrix(x_array, "x"), out = writable_matrix(out_array, "out");
    require_shape(out, "out", x.rows, x.columns);
    require_type(out, "out", x.type, "x");
    const RmsNormArgs args{x.data, x.stride, float_vector(weight, "weight", x.columns), eps, x.rows, x.columns,
                           out.data, out.stride, x.type};
    const Running running(backend);
    backend.kernels.rms_norm(args, backend.pool);
}

void silu_mul(Backend& backend, const py::array& gate_up_array, const py::array& out_array) {
    const Matrix gate_up = matrix(gate_up_array, "gate_up"), out = writable_matrix(out_array, "out");
    require_shape(gate_up, "gate_up", out.rows, 2 * out.columns);
    require_type(out, "out", gate_up.type, "gate_up");
    const SiluMulArgs args{gate_up.data, gate_up.stride, out.rows, out.columns, out.data, out.stride, out.type};
    const Running running(backend);
    backend.kernels.silu_mul(args, backend.pool);
}

}  // namespace

void bind_rows(BackendClass& backend) {
    backend.def("embed", &embed, py::arg("table"), py::arg("token_ids"), py::arg("out"));
    backend.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
    backend.def("silu_mul", &silu_mul, py::arg("gate_up"), py::arg("out"));
}

}  // namespace engine
