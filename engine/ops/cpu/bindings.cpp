// The extension module engine._native: class Backend, to which each bind_*.cpp adds its operations, and the argument
// checks they share.

#include "bindings.h"

#include "kernels.h"

namespace engine {
namespace {

int float16_type_num = -1, bfloat16_type_num = -1;  // NumPy numbers ml_dtypes' type when it is registered
PyObject *invalid_argument = nullptr, *numerical_error = nullptr;

const Kernels& kernels_named(const std::string& isa) {
    std::string known;
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
        if (isa == (*k)->isa) return **k;
        known += std::string(known.empty() ? "" : ", ") + (*k)->isa;
    }
    reject("instruction set '" + isa + "' is not available here; choose one of " + known);
}

py::list isa_names() {
    py::list names;
    for (const Kernels* const* k = available_kernels(); *k; ++k) names.append((*k)->isa);
    return names;
}

template <class T>
const T* vector_of(const py::array& array, const char* name, int64_t size, int type_num, const char* type_name) {
    const bool fits = array.ndim() == 1 && array.dtype().normalized_num() == type_num
                      && (size < 0 || array.shape(0) == size)
                      && (array.shape(0) < 2 || array.strides(0) == static_cast<py::ssize_t>(sizeof(T)));
    if (fits) return static_cast<const T*>(array.data());
    const std::string length = size < 0 ? "n" : std::to_string(size);
    reject(std::string(name) + " must be a contiguous " + type_name + " [" + length + "], not " + describe(array));
}

}  // namespace

void reject(const std::string& message) { throw ArgumentError(message); }

std::string describe(const py::array& array) {
    std::string text = py::str(array.dtype()).cast<std::string>() + " [";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    text += "]";
    if (!(array.flags() & py::array::c_style)) text += " with strides";
    return text;
}

DType dtype_of(const py::array& array, const char* name) {
    const int num = array.dtype().num();
    if (num == py::detail::npy_api::NPY_FLOAT_) return DType::f32;
    if (num == float16_type_num) return DType::f16;
    if (num == bfloat16_type_num) return DType::bf16;
    reject(std::string(name) + " must be float32, float16 or bfloat16, not " + describe(array));
}

Matrix matrix(const py::array& array, const char* name) {
    const DType type = dtype_of(array, name);
    if (array.ndim() != 2) reject(std::string(name) + " must have 2 dimensions, not " + describe(array));
    const int64_t size = size_of(type), rows = array.shape(0), columns = array.shape(1);
    if (rows == 0 || columns == 0) return {nullptr, type, rows, columns, columns};  // NumPy's strides mean nothing then
    const int64_t stride = rows > 1 ? array.strides(0) : columns * size;
    if ((columns > 1 && array.strides(1) != size) || stride % size || stride < columns * size)
        reject(std::string(name) + " must have contiguous, non-overlapping rows; it is " + describe(array));
    return {const_cast<void*>(array.data()), type, rows, columns, stride / size};
}

Matrix writable_matrix(const py::array& array, const char* name) {
    if (!array.writeable()) reject(std::string(name) + " is read-only");
    return matrix(array, name);
}

const float* float_vector(const py::array& array, const char* name, int64_t size) {
    return vector_of<float>(array, name, size, py::detail::npy_api::NPY_FLOAT_, "float32");
}

const int32_t* int_vector(const py::array& array, const char* name, int64_t size) {
    return vector_of<int32_t>(array, name, size, py::dtype::of<int32_t>().normalized_num(), "int32");
}

OperandRows operand_rows(const py::array& x_array, const std::optional<py::array>& norm_weight, float eps, bool silu) {
    const Matrix x = matrix(x_array, "x");
    if (silu && x.columns % 2) reject("gate | up must have an even number of columns, not " + describe(x_array));
    if (silu && norm_weight) reject("x is either normalised or gated, not both");
    const int64_t K = silu ? x.columns / 2 : x.columns;
    const float* weight = norm_weight ? float_vector(*norm_weight, "norm weight", K) : nullptr;
    return {x.data, x.type, x.stride, x.rows, K, weight, eps, silu};
}

ProductOut product_out(const py::array& out_array, int64_t T, int64_t N, const std::optional<py::array>& bias,
                       const std::optional<py::array>& residual_array) {
    const Matrix out = writable_matrix(out_array, "out");
    require_shape(out, "out", T, N);
    ProductOut to{N, nullptr, nullptr, 0, out.data, out.type, out.stride};
    if (bias) to.bias = float_vector(*bias, "bias", N);
    if (residual_array) {
        const Matrix residual = matrix(*residual_array, "residual");
        require_shape(residual, "residual", T, N);
        if (residual.type != out.type)
            reject("residual must have out's dtype; out is " + describe(out_array) + ", residual "
                   + describe(*residual_array));
        to.residual = residual.data;
        to.residual_stride = residual.stride;
    }
    return to;
}

void require_shape(const Matrix& m, const char* name, int64_t rows, int64_t columns) {
    if (m.rows == rows && m.columns == columns) return;
    reject(std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "], not ["
           + std::to_string(m.rows) + ", " + std::to_string(m.columns) + "]");
}

}  // namespace engine

PYBIND11_MODULE(_native, module) {
    using namespace engine;
    module.doc() = "C++ kernels of engine.ops.cpu, which is the only module that should import this one";
    float16_type_num = py::dtype("float16").num();
    bfloat16_type_num = py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")).num();
    const py::module_ errors = py::module_::import("engine.errors");
    invalid_argument = py::object(errors.attr("InvalidArgument")).release().ptr();
    numerical_error = py::object(errors.attr("NumericalError")).release().ptr();
    py::register_local_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const ArgumentError& error) {
            PyErr_SetString(invalid_argument, error.what());
        } catch (const NotFinite& error) {
            PyErr_SetString(numerical_error, error.what());
        }
    });
    module.def("isa_names", &isa_names, "instruction sets this CPU can run, best first");
    BackendClass backend(module, "Backend", "threads, scratch memory and one instruction set's kernels");
    backend.def(py::init([](int threads, const std::string& isa) {
        if (threads < 1 || threads > 1024) reject("threads must be in 1..1024, not " + std::to_string(threads));
        return new Backend(threads, kernels_named(isa));
    }));
    bind_linear(module, backend);
    bind_rows(backend);
    bind_attention(module, backend);
    bind_fp4(module, backend);
    bind_fp8(module, backend);
}
