// Bindings of the FP4 operations: prepare_fp4, quantize_weight, quantize_feedback, pack_fp4,
// fp4_linear, w4a16_linear.
//
// An operand made here is a PreparedOperand: all its arrays in one allocation, seen by Python under the names of
// engine/fp4_types.py. Building a dataclass of six arrays instead would take longer than the split itself at T = 1.
// fp4_linear takes either.

#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "kernels.h"
#include "packed_fp4.h"

namespace engine {
namespace {

constexpr const char* kFormatNames[] = {"nvfp4", "mxfp4", "hif4"};

const char* name_of(Fp4Format format) { return kFormatNames[static_cast<int>(format)]; }

Fp4Format format_of(const std::string& name) {
    for (int i = 0; i < 3; ++i)
        if (name == kFormatNames[i]) return static_cast<Fp4Format>(i);
    reject("unknown FP4 format '" + name + "'; known: nvfp4, mxfp4, hif4");
}

void check_depth(Fp4Format format, int64_t K) {
    const int64_t multiple = format == Fp4Format::hif4 ? 64 : 32;
    if (K <= 0 || K % multiple)
        reject("K must be a positive multiple of " + std::to_string(multiple) + ", not " + std::to_string(K));
}

// ---- operands -------------------------------------------------------------------------------------------------------

// Of an array [T, columns] with elements of `item` bytes.
struct Extent {
    int64_t columns, item;
    int64_t row_bytes() const { return columns * item; }
};

Extent codes_extent(const Fp4Operand& a, int p) { return {p == 0 && a.sparse ? a.K / 4 : a.K / 2, 1}; }
Extent meta_extent(const Fp4Operand& a) { return {a.sparse ? a.K / (a.format == Fp4Format::hif4 ? 8 : 16) : 0, 1}; }
Extent scale_extent(const Fp4Operand& a, int p) { return {a.K / a.block[p], a.format == Fp4Format::hif4 ? 4 : 1}; }

// An operand without its arrays.
Fp4Operand shape_of(Fp4Format format, int64_t T, int64_t K, int paths, bool sparse) {
    Fp4Operand a{format, T, K, paths, sparse, nullptr, {}, nullptr, {}, {}};
    a.block[1] = format == Fp4Format::nvfp4 ? 16 : format == Fp4Format::mxfp4 ? 32 : 64;
    a.block[0] = sparse && format == Fp4Format::nvfp4 ? 32 : a.block[1];
    return a;
}

struct PreparedOperand {
    Fp4Operand view;
    std::unique_ptr<uint8_t[]> memory;

    explicit PreparedOperand(const Fp4Operand& shape) : view(shape) {
        const int64_t g_bytes = 4, meta_bytes = meta_extent(view).row_bytes();
        int64_t bytes = whole_lines(g_bytes) + whole_lines(meta_bytes);
        for (int p = 0; p < view.paths; ++p)
            bytes += whole_lines(codes_extent(view, p).row_bytes()) + whole_lines(scale_extent(view, p).row_bytes());
        memory.reset(new uint8_t[static_cast<size_t>(bytes)]);
        uint8_t* next = memory.get();
        const auto take = [&](int64_t row_bytes) { return (next += whole_lines(row_bytes)) - whole_lines(row_bytes); };
        view.g = reinterpret_cast<const float*>(take(g_bytes));
        if (view.sparse) view.meta = take(meta_bytes);
        for (int p = 0; p < view.paths; ++p) {
            view.codes[p] = take(codes_extent(view, p).row_bytes());
            view.scale[p] = take(scale_extent(view, p).row_bytes());
        }
    }

    int64_t whole_lines(int64_t row_bytes) const { return (view.T * row_bytes + 63) / 64 * 64; }
};

py::array read_only(py::array array) {
    array.attr("flags").attr("writeable") = false;
    return array;
}

// One of an operand's arrays, sharing its memory.
py::array array_view(py::handle owner, const void* data, int64_t T, Extent extent) {
    const py::dtype type = extent.item == 4 ? py::dtype::of<uint32_t>() : py::dtype::of<uint8_t>();
    return read_only(py::array(type, {T, extent.columns}, {extent.row_bytes(), extent.item}, data, owner));
}

const PreparedOperand& operand_with(py::handle self, int paths, const char* name) {
    const auto& a = py::cast<const PreparedOperand&>(self);
    if (a.view.paths == paths) return a;
    const char* other = paths == 1 ? "two paths" : "one path";
    throw py::attribute_error(std::string("an operand of ") + other + " has no " + name);
}

template <class T>
const T* rows_of(const py::array& array, const char* name, int64_t rows, int64_t columns) {
    const bool fits = array.ndim() == 2 && array.dtype().equal(py::dtype::of<T>()) && array.shape(0) == rows
                      && array.shape(1) == columns;
    if (fits && (array.flags() & py::array::c_style)) return static_cast<const T*>(array.data());
    const std::string type = sizeof(T) == 4 ? "uint32" : "uint8";
    reject(std::string(name) + " must be contiguous " + type + " ["
           + std::to_string(rows) + ", " + std::to_string(columns) + "], not " + describe(array));
}

py::array member(py::handle object, const char* name) { return py::cast<py::array>(object.attr(name)); }

// The arrays of one path of `object`, which `held` keeps alive.
void take_path(py::handle object, int p, const char* codes_name, const char* scale_name, Fp4Operand& a,
               std::vector<py::array>& held) {
    const py::array codes = member(object, codes_name), scale = member(object, scale_name);
    // The only format with two block sizes, in the only operand that says so by its shape alone.
    if (a.paths == 1 && a.format == Fp4Format::nvfp4 && scale.ndim() == 2 && scale.shape(1) * 32 == a.K)
        a.block[0] = 32;
    const int64_t columns = scale_extent(a, p).columns;
    a.codes[p] = rows_of<uint8_t>(codes, codes_name, a.T, codes_extent(a, p).columns);
    if (a.format == Fp4Format::hif4) a.scale[p] = rows_of<uint32_t>(scale, scale_name, a.T, columns);
    else a.scale[p] = rows_of<uint8_t>(scale, scale_name, a.T, columns);
    held.insert(held.end(), {codes, scale});
}

// A SharqOperand or Fp4Matrix of engine/fp4_types.py.
Fp4Operand operand_of_arrays(py::handle object, std::vector<py::array>& held) {
    const Fp4Format format = format_of(py::cast<std::string>(object.attr("format")));
    const bool two_paths = py::hasattr(object, "residual"), sparse = two_paths && !object.attr("meta").is_none();
    const py::array last = member(object, two_paths ? "residual" : "payload");
    if (last.ndim() != 2) reject("an FP4 payload must have 2 dimensions, not " + describe(last));
    Fp4Operand a = shape_of(format, last.shape(0), last.shape(1) * 2, two_paths ? 2 : 1, sparse);
    check_depth(format, a.K);
    held.push_back(member(object, "g"));
    a.g = float_vector(held.back(), "g", a.T);
    if (!two_paths) {
        take_path(object, 0, "payload", "scale", a, held);
        return a;
    }
    take_path(object, 0, "backbone", "backbone_scale", a, held);
    take_path(object, 1, "residual", "residual_scale", a, held);
    if (sparse) {
        held.push_back(member(object, "meta"));
        a.meta = rows_of<uint8_t>(held.back(), "meta", a.T, meta_extent(a).columns);
    }
    return a;
}

std::unique_ptr<PreparedOperand> prepare_fp4(Backend& backend, const py::array& x_array, const std::string& format_name,
                                             int paths, bool sparse, const std::optional<py::array>& norm_weight,
                                             float eps, bool silu, float fixed_g) {
    const Fp4Format format = format_of(format_name);
    const OperandRows rows = operand_rows(x_array, norm_weight, eps, silu);
    if (rows.x_type == DType::f16) reject("x must be float32 or bfloat16, not " + describe(x_array));
    check_depth(format, rows.K);
    auto operand = std::make_unique<PreparedOperand>(shape_of(format, rows.T, rows.K, paths, sparse));
    const PrepareArgs args{rows, fixed_g, operand->view};
    bool finite;
    {
        const Running running(backend);
        finite = backend.kernels.prepare_fp4(args, backend.pool, backend.scratch);
    }
    if (!finite) throw NotFinite("x, or x rounded to bfloat16, holds NaN or infinity; FP4 has codes for neither");
    return operand;
}

// ---- weights and products -------------------------------------------------------------------------------------------

constexpr const char* kGradeNames[] = {"rtn", "4over6", "sweep"};

WeightGrade grade_of(const std::string& name, Fp4Format format) {
    for (int i = 0; i < 3; ++i) {
        if (name != kGradeNames[i]) continue;
        const WeightGrade grade = static_cast<WeightGrade>(i);
        if (grade == WeightGrade::four_over_six && format != Fp4Format::nvfp4)
            reject(std::string("the weight grade 4over6 is defined for nvfp4, not for ") + name_of(format)
                   + "; use rtn or sweep");
        return grade;
    }
    reject("unknown weight grade '" + name + "'; known: rtn, 4over6, sweep");
}

void check_block(Fp4Format format, int block, const Matrix& w) {
    const bool has_block = format == Fp4Format::nvfp4 ? block == 16 || block == 32
                                                      : block == (format == Fp4Format::mxfp4 ? 32 : 64);
    if (!has_block) reject(std::string(name_of(format)) + " has no blocks of " + std::to_string(block));
    if (w.rows == 0) reject("w must have at least one row");
    if (w.columns == 0 || w.columns % block)
        reject("K of w must be a positive multiple of " + std::to_string(block) + ", not " + std::to_string(w.columns));
}

void check_largest(float amax, Fp4Format format) {
    if (!std::isfinite(amax)) throw NotFinite("the weight holds NaN or infinity; FP4 has codes for neither");
    if (format == Fp4Format::nvfp4 || amax < 0x1.ffp127f) return;
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(amax));
    throw NotFinite(std::string("the weight's largest magnitude, ") + text + ", is infinite in bfloat16");
}

// Payload, scale and g of an Fp4Matrix.
py::tuple quantize_weight(Backend& backend, const py::array& w_array, const std::string& format_name, int block,
                          const std::string& grade_name) {
    const Fp4Format format = format_of(format_name);
    const WeightGrade grade = grade_of(grade_name, format);
    const Matrix w = matrix(w_array, "w");
    check_block(format, block, w);
    const int64_t blocks = w.columns / block;
    const auto wide = py::dtype::of<uint32_t>(), narrow = py::dtype::of<uint8_t>();
    py::array_t<uint8_t> codes({w.rows, w.columns / 2});
    py::array scale(format == Fp4Format::hif4 ? wide : narrow, {w.rows, blocks});
    py::array_t<float> g(w.rows);
    const QuantizeWeightArgs args{w.data, w.type, w.stride, w.rows, w.columns, format, block, grade,
                                  codes.mutable_data(), scale.mutable_data(), g.mutable_data()};
    float amax;
    {
        const Running running(backend);
        amax = backend.kernels.quantize_weight(args, backend.pool);
    }
    check_largest(amax, format);
    return py::make_tuple(codes, scale, g);
}

const float* panels_of(const py::array& array, const char* name, int64_t K, int block) {
    const bool fits = array.ndim() == 3 && array.shape(0) == K / block && array.shape(1) == K && array.shape(2) == block;
    if (fits && array.dtype().equal(py::dtype::of<float>()) && (array.flags() & py::array::c_style))
        return static_cast<const float*>(array.data());
    reject(std::string(name) + " must be contiguous float32 [" + std::to_string(K / block) + ", " + std::to_string(K)
           + ", " + std::to_string(block) + "], not " + describe(array));
}

// Payload and scale of an Fp4Matrix.
py::tuple quantize_feedback(Backend& backend, const py::array& w_array, float g, const std::string& format_name,
                            int block, const py::array& first, const py::array& later, const py::array& weight,
                            int refinements) {
    const Fp4Format format = format_of(format_name);
    if (format == Fp4Format::hif4) reject("errors are fed back for nvfp4 and mxfp4, not for hif4");
    const Matrix w = matrix(w_array, "w");
    check_block(format, block, w);
    const int64_t K = w.columns;
    py::array_t<uint8_t> codes({w.rows, K / 2}), scale({w.rows, K / block});
    const QuantizeFeedbackArgs args{w.data, w.type, w.stride, w.rows, K, g, format, block,
                                    panels_of(first, "first", K, block), panels_of(later, "later", K, block),
                                    float_vector(weight, "weight", K), refinements,
                                    codes.mutable_data(), scale.mutable_data()};
    {
        const Running running(backend);
        backend.kernels.quantize_feedback(args, backend.pool, backend.scratch);
    }
    return py::make_tuple(codes, scale);
}

std::string describe_shard(const Fp4Operand& a) {
    return std::string(name_of(a.format)) + " with K = " + std::to_string(a.K) + " in blocks of "
           + std::to_string(a.block[0]);
}

std::unique_ptr<PackedFp4> pack_fp4(Backend& backend, const py::sequence& shards) {
    if (py::len(shards) == 0) reject("pack_fp4 needs at least one shard");
    std::vector<py::array> held;
    std::vector<PackedFp4::Row> rows;
    Fp4Operand first{};
    for (size_t i = 0; i < py::len(shards); ++i) {
        const py::object object = shards[i];
        const Fp4Operand shard = operand_of_arrays(object, held);
        if (i == 0) first = shard;
        if (shard.paths != 1 || shard.T == 0) reject("a weight shard must be an Fp4Matrix with at least one row");
        if (shard.format != first.format || shard.K != first.K || shard.block[0] != first.block[0])
            reject("all shards need one format, K and block, but got " + describe_shard(first) + " and "
                   + describe_shard(shard));
        const uint8_t* scale = static_cast<const uint8_t*>(shard.scale[0]);
        const int64_t scale_bytes = scale_extent(shard, 0).row_bytes();
        for (int64_t n = 0; n < shard.T; ++n)
            rows.push_back({shard.codes[0] + n * shard.K / 2, scale + n * scale_bytes, shard.g[n]});
    }
    const Running running(backend);
    return std::make_unique<PackedFp4>(rows, first.K, first.format, first.block[0], backend.weights, backend.pool);
}

void fp4_linear(Backend& backend, const py::object& operand, const PackedFp4& w, const py::array& out,
                const std::optional<py::array>& bias, const std::optional<py::array>& residual) {
    std::vector<py::array> held;
    const bool prepared = py::isinstance<PreparedOperand>(operand);
    const Fp4Operand x = prepared ? py::cast<const PreparedOperand&>(operand).view : operand_of_arrays(operand, held);
    if (x.format != w.format)
        reject(std::string("activations in ") + name_of(x.format) + " do not multiply weights in " + name_of(w.format));
    if (x.K != w.K)
        reject("activations with K = " + std::to_string(x.K) + " do not multiply weights with K = "
               + std::to_string(w.K));
    const Fp4LinearArgs args{x, w.data(), w.g(), w.block, product_out(out, x.T, w.N, bias, residual)};
    const Multiplying running(backend, w, w.nbytes);
    backend.kernels.fp4_linear(args, backend.pool, backend.scratch);
}

void w4a16_linear(Backend& backend, const py::array& x_array, const PackedFp4& w, const py::array& out,
                  const std::optional<py::array>& bias, const std::optional<py::array>& residual) {
    const Matrix x = matrix(x_array, "x");
    require_shape(x, "x", x.rows, w.K);
    const W4a16Args args{x.data,   x.type, x.stride, x.rows,
                         w.K,      w.format, w.data(), w.g(),
                         w.block,  product_out(out, x.rows, w.N, bias, residual)};
    const Multiplying running(backend, w, w.nbytes);
    backend.kernels.w4a16_linear(args, backend.pool, backend.scratch);
}

py::cpp_function codes_property(int paths, int p, const char* name) {
    return [=](const py::object& self) {
        const Fp4Operand& a = operand_with(self, paths, name).view;
        return array_view(self, a.codes[p], a.T, codes_extent(a, p));
    };
}

py::cpp_function scale_property(int paths, int p, const char* name) {
    return [=](const py::object& self) {
        const Fp4Operand& a = operand_with(self, paths, name).view;
        return array_view(self, a.scale[p], a.T, scale_extent(a, p));
    };
}

py::object meta_property(const py::object& self) {
    const Fp4Operand& a = operand_with(self, 2, "meta").view;
    if (!a.sparse) return py::none();
    return array_view(self, a.meta, a.T, meta_extent(a));
}

py::array g_property(const py::object& self) {
    const Fp4Operand& a = py::cast<const PreparedOperand&>(self).view;
    return read_only(py::array(py::dtype::of<float>(), {a.T}, {int64_t{4}}, a.g, self));
}

}  // namespace

void bind_fp4(py::module_& module, BackendClass& backend) {
    py::class_<PreparedOperand>(module, "PreparedOperand", "activations in FP4; arrays as in engine/fp4_types.py")
        .def_property_readonly("format", [](const PreparedOperand& a) { return name_of(a.view.format); })
        .def_property_readonly("T", [](const PreparedOperand& a) { return a.view.T; })
        .def_property_readonly("K", [](const PreparedOperand& a) { return a.view.K; })
        .def_property_readonly("paths", [](const PreparedOperand& a) { return a.view.paths; })
        .def_property_readonly("g", &g_property)
        .def_property_readonly("meta", &meta_property)
        .def_property_readonly("backbone", codes_property(2, 0, "backbone"))
        .def_property_readonly("backbone_scale", scale_property(2, 0, "backbone_scale"))
        .def_property_readonly("residual", codes_property(2, 1, "residual"))
        .def_property_readonly("residual_scale", scale_property(2, 1, "residual_scale"))
        .def_property_readonly("payload", codes_property(1, 0, "payload"))
        .def_property_readonly("scale", scale_property(1, 0, "scale"));
    py::class_<PackedFp4>(module, "PackedFp4", "an FP4 weight [N, K] in tiles; see fp4_tiles.h")
        .def_property_readonly("format", [](const PackedFp4& w) { return name_of(w.format); })
        .def_property_readonly("block", [](const PackedFp4& w) { return w.block; })
        .def_property_readonly("N", [](const PackedFp4& w) { return w.N; })
        .def_property_readonly("K", [](const PackedFp4& w) { return w.K; })
        .def_property_readonly("nbytes", [](const PackedFp4& w) { return w.nbytes; });
    backend.def("prepare_fp4", &prepare_fp4, py::arg("x"), py::arg("format"), py::arg("paths"), py::arg("sparse"),
                py::arg("norm_weight"), py::arg("eps"), py::arg("silu"), py::arg("fixed_g"));
    backend.def("quantize_weight", &quantize_weight, py::arg("w"), py::arg("format"), py::arg("block"),
                py::arg("grade"));
    backend.def("quantize_feedback", &quantize_feedback, py::arg("w"), py::arg("g"), py::arg("format"),
                py::arg("block"), py::arg("first"), py::arg("later"), py::arg("weight"), py::arg("refinements"));
    backend.def("pack_fp4", &pack_fp4, py::arg("shards"));
    backend.def("fp4_linear", &fp4_linear, py::arg("operand"), py::arg("weight"), py::arg("out"), py::arg("bias"),
                py::arg("residual"));
    backend.def("w4a16_linear", &w4a16_linear, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("bias"),
                py::arg("residual"));
}

}  // namespace engine
