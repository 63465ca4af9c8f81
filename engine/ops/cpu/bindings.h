// Shared by the bind_*.cpp files: argument checking, and the lock every operation holds.
//
// A binding checks everything (types, shapes, strides) with the GIL held, then creates a `Running`, then calls a kernel
// with plain pointers. Failed checks throw ArgumentError, which Python sees as engine.errors.InvalidArgument.
#pragma once

#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "backend.h"
#include "product_args.h"

namespace engine {

namespace py = pybind11;

struct ArgumentError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// A 2-D activation: rows of `columns` neighbouring elements, `stride` elements apart.
struct Matrix {
    void* data;
    DType type;
    int64_t rows, columns, stride;
};

std::string describe(const py::array& array);  // "float32 [3, 64]"

DType dtype_of(const py::array& array, const char* name);  // float32, float16, bfloat16

Matrix matrix(const py::array& array, const char* name);           // readable
Matrix writable_matrix(const py::array& array, const char* name);  // and writable

// A contiguous 1-D array of exactly `size` elements (any size if -1).
const float* float_vector(const py::array& array, const char* name, int64_t size);
const int32_t* int_vector(const py::array& array, const char* name, int64_t size);

// Of an operation that quantises activations; x_array [T, K], or with silu [T, 2K].
OperandRows operand_rows(const py::array& x_array, const std::optional<py::array>& norm_weight, float eps, bool silu);

// Of a product [T, N]; out of any activation type, residual of the same.
ProductOut product_out(const py::array& out, int64_t T, int64_t N, const std::optional<py::array>& bias,
                       const std::optional<py::array>& residual);

struct NotFinite : std::runtime_error {  // which Python sees as engine.errors.NumericalError
    using std::runtime_error::runtime_error;
};

[[noreturn]] void reject(const std::string& message);
void require_shape(const Matrix& m, const char* name, int64_t rows, int64_t columns);

// While it lives: the GIL is released and this thread owns the backend.
class Running {
public:
    explicit Running(Backend& backend) : lock_(backend.busy) {}

private:
    py::gil_scoped_release release_;
    std::lock_guard<std::mutex> lock_;
};

// The same while a weight is multiplied; afterwards idle threads fetch the beginning of the one that will be next.
class Multiplying {
public:
    template <class Packed>
    Multiplying(Backend& backend, const Packed& w, size_t bytes)
        : running_(backend), pool_(backend.pool), next_(backend.order.after({static_cast<const char*>(w.data()), bytes})) {
        pool_.expect({});
    }
    ~Multiplying() { pool_.expect(next_); }
    Multiplying(const Multiplying&) = delete;
    Multiplying& operator=(const Multiplying&) = delete;

private:
    Running running_;
    ThreadPool& pool_;
    const Span next_;
};

using BackendClass = py::class_<Backend>;
void bind_linear(py::module_& module, BackendClass& backend);
void bind_rows(BackendClass& backend);
void bind_attention(py::module_& module, BackendClass& backend);
void bind_fp4(py::module_& module, BackendClass& backend);
void bind_fp8(py::module_& module, BackendClass& backend);

}  // namespace engine
