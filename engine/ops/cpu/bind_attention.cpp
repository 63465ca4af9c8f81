// Bindings of the KV cache, rope_and_cache and attention. They check every index: the kernels follow them blindly.

#include <limits>
#include <memory>
#include <optional>

#include <pybind11/stl.h>

#include "attention_plan.h"
#include "bindings.h"
#include "kernels.h"

namespace engine {
namespace {

// A contiguous 2-D array of one element type.
template <class T>
struct Table {
    const T* data;
    int64_t rows, columns;
};

template <class T>
Table<T> table(const py::array& array, const char* name, const char* type_name) {
    const bool fits = array.ndim() == 2 && array.dtype().normalized_num() == py::dtype::of<T>().normalized_num()
                      && (array.flags() & py::array::c_style);
    if (!fits) reject(std::string(name) + " must be a contiguous " + type_name + " [n, m], not " + describe(array));
    return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1)};
}

void require_range(const int32_t* values, int64_t count, int64_t limit, const char* what) {
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
    }
    if (low < 0 || (count > 0 && high >= limit))
        reject(std::string(what) + " must be in 0.." + std::to_string(limit - 1) + ", but "
               + std::to_string(low < 0 ? low : high) + " occurs");
}

// scales [2 · num_layers]: of E4M3, whose codes NumPy has under ml_dtypes' name.
std::unique_ptr<KVCache> new_kv_cache(int64_t num_layers, int64_t num_blocks, int64_t KVH, int64_t D,
                                      const py::dtype& dtype, const std::optional<py::array>& scales) {
    const bool narrow = py::str(dtype).cast<std::string>() == "float8_e4m3fn";
    if (narrow != scales.has_value()) reject("scales belong to a KV cache in E4M3, and only to one");
    const DType type =
        narrow ? DType::e4m3 : dtype_of(py::array(dtype, py::array::ShapeContainer{0}), "the cache's dtype");
    if (num_layers < 1 || num_blocks < 1 || KVH < 1 || D < 8 || D > kMaxHeadDim || D % 8)
        reject("a KV cache needs layers, blocks and KV heads, and a head_dim that is a multiple of 8 up to "
               + std::to_string(kMaxHeadDim) + "; got " + std::to_string(num_layers) + ", " + std::to_string(num_blocks)
               + ", " + std::to_string(KVH) + ", " + std::to_string(D));
    if (num_blocks * kBlockTokens > std::numeric_limits<int32_t>::max())
        reject("a KV cache of " + std::to_string(num_blocks) + " blocks has more slots than int32 can number");
    const float* checked = scales ? float_vector(*scales, "scales", 2 * num_layers) : nullptr;
    return std::make_unique<KVCache>(num_layers, num_blocks, KVH, D, type, checked);
}

KVLayer layer_of(const KVCache& cache, int64_t layer) {
    if (layer < 0 || layer >= cache.num_layers)
        reject("layer " + std::to_string(layer) + " of a cache with " + std::to_string(cache.num_layers) + " layers");
    return cache.layer(layer);
}

py::array_t<uint8_t> tiles(const py::object& cache, int64_t layer) {
    const KVLayer kv = layer_of(cache.cast<const KVCache&>(), layer);
    uint8_t* data = reinterpret_cast<uint8_t*>(kv.data);
    return py::array_t<uint8_t>({kv.KVH, kv.num_blocks, tile_pair_bytes(kv)}, data, cache);
}

void require_type(const Matrix& m, const char* name, const KVCache& cache) {
    if (m.type != cache.type && cache.type != DType::e4m3)
        reject(std::string(name) + " must have the KV cache's dtype");
}

// H, from rows of (H + others) heads of D.
int64_t query_heads(const Matrix& m, const char* name, const KVCache& cache, int64_t others) {
    const int64_t H = m.columns / cache.D - others;
    if (m.columns % cache.D || H < 1 || H % cache.KVH)
        reject(std::string(name) + " has " + std::to_string(m.columns) + " columns, which does not fit "
               + std::to_string(cache.KVH) + " KV heads of " + std::to_string(cache.D));
    return H;
}

void rope_and_cache(Backend& backend, const py::array& qkv_array, const py::array& rope_array,
                    const py::array& positions_array, const py::array& slots_array, const KVCache& cache, int64_t layer,
                    const std::optional<py::array>& q_norm, const std::optional<py::array>& k_norm, float eps,
                    const py::array& out_array) {
    const Matrix qkv = matrix(qkv_array, "qkv"), out = writable_matrix(out_array, "out");
    const int64_t T = qkv.rows, H = query_heads(qkv, "qkv", cache, 2 * cache.KVH);
    require_shape(out, "out", T, H * cache.D);
    require_type(qkv, "qkv", cache);
    if (out.type != qkv.type) reject("out must have qkv's dtype");
    const Table<float> rope = table<float>(rope_array, "rope_table", "float32");
    if (rope.columns != cache.D)
        reject("rope_table must be [P, " + std::to_string(cache.D) + "], not " + describe(rope_array));
    const int32_t* positions = int_vector(positions_array, "positions", T);
    const int32_t* slots = int_vector(slots_array, "slot_mapping", T);
    require_range(positions, T, rope.rows, "positions");
    require_range(slots, T, cache.num_blocks * kBlockTokens, "slots");
    const RopeArgs args{qkv.data, qkv.type, qkv.stride, rope.data, positions, slots, T, H,
                        q_norm ? float_vector(*q_norm, "q_norm", cache.D) : nullptr,
                        k_norm ? float_vector(*k_norm, "k_norm", cache.D) : nullptr,
                        eps, layer_of(cache, layer), out.data, out.stride};
    bool finite;
    {
        const Running running(backend);
        finite = backend.kernels.rope_and_cache(args, backend.pool);
    }
    if (!finite) throw NotFinite("K or V holds NaN or infinity, which a KV cache in FP8 cannot hold");
}

// Sequence s owns rows [query_start[s], query_start[s + 1]) at the last positions of its context, in order.
void require_consistent(const AttentionBatch& batch, const int32_t* positions, int64_t T, int64_t num_blocks) {
    if (batch.query_start[0] != 0 || batch.query_start[batch.S] != T)
        reject("query_start must run from 0 to " + std::to_string(T));
    for (int64_t s = 0; s < batch.S; ++s) {
        const int64_t begin = batch.query_start[s], end = batch.query_start[s + 1], context = batch.context_lens[s];
        const auto name = [&] { return "sequence " + std::to_string(s) + " of the batch"; };
        if (begin > end || end - begin > context || context > batch.width * kBlockTokens)
            reject(name() + " has " + std::to_string(end - begin) + " rows, a context of " + std::to_string(context)
                   + " and " + std::to_string(batch.width) + " blocks");
        for (int64_t t = begin; t < end; ++t)
            if (positions[t] != context - (end - t))
                reject(name() + ": its rows are not the last positions of its context");
        const int64_t used = (context + kBlockTokens - 1) / kBlockTokens;
        require_range(batch.block_tables + s * batch.width, used, num_blocks, "blocks");
    }
}

void attention(Backend& backend, const py::array& q_array, const py::array& positions_array,
               const py::array& query_start, const py::array& context_lens, const py::array& block_tables,
               const KVCache& cache, int64_t layer, float scale, std::optional<int64_t> window,
               const py::array& out_array) {
    const Matrix q = matrix(q_array, "q"), out = writable_matrix(out_array, "out");
    const int64_t H = query_heads(q, "q", cache, 0);
    require_shape(out, "out", q.rows, q.columns);
    require_type(q, "q", cache);
    if (out.type != q.type) reject("out must have q's dtype");
    if (window && *window < 1) reject("window must be at least 1, not " + std::to_string(*window));
    const int32_t* positions = int_vector(positions_array, "positions", q.rows);
    const Table<int32_t> blocks = table<int32_t>(block_tables, "block_tables", "int32");
    const AttentionBatch batch{int_vector(query_start, "query_start", blocks.rows + 1),
                               int_vector(context_lens, "context_lens", blocks.rows),
                               blocks.data, blocks.rows, blocks.columns};
    require_consistent(batch, positions, q.rows, cache.num_blocks);
    AttentionArgs args{q.data, q.type, q.stride, H, positions, nullptr, 0, layer_of(cache, layer), scale,
                       window.value_or(std::numeric_limits<int32_t>::max()), out.data, out.stride};
    const Running running(backend);
    const std::vector<AttentionItem> items = plan_attention(batch, H, cache.KVH, backend.pool.threads());
    args.items = items.data();
    args.num_items = static_cast<int64_t>(items.size());
    backend.kernels.attention(args, backend.pool, backend.scratch);
}

}  // namespace

void bind_attention(py::module_& module, BackendClass& backend) {
    module.attr("kv_block_size") = kBlockTokens;
    py::class_<KVCache>(module, "KVCache", "paged K and V of all layers in tiles; see kv_cache.h")
        .def_readonly("num_blocks", &KVCache::num_blocks)
        .def_property_readonly("block_size", [](const KVCache&) { return kBlockTokens; })
        .def_property_readonly("nbytes", &KVCache::nbytes)
        .def("tiles", &tiles, py::arg("layer"), "a view of the layer's memory, uint8 [KVH, blocks, K and V tile]");
    module.def("new_kv_cache", &new_kv_cache, py::arg("num_layers"), py::arg("num_blocks"), py::arg("num_kv_heads"),
               py::arg("head_dim"), py::arg("dtype"), py::arg("scales") = py::none());
    backend.def("rope_and_cache", &rope_and_cache, py::arg("qkv"), py::arg("rope_table"), py::arg("positions"),
                py::arg("slot_mapping"), py::arg("cache"), py::arg("layer"), py::arg("q_norm"), py::arg("k_norm"),
                py::arg("eps"), py::arg("out"));
    backend.def("attention", &attention, py::arg("q"), py::arg("positions"), py::arg("query_start"),
                py::arg("context_lens"), py::arg("block_tables"), py::arg("cache"), py::arg("layer"), py::arg("scale"),
                py::arg("window"), py::arg("out"));
}

}  // namespace engine
