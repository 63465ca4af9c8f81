// engine._cuda: the kernels that nvcc compiled when the package was built, launched from C++.
//
// The extension carries a cubin of every kernel file for every architecture (images.h) and finds the driver, libcuda,
// when a GPU is first asked for: importing it needs none. `Kernels` launches one kernel at a time, as the NVRTC loader
// does; a `Recording` is a list of launches made ready once (a whole decode step) that one call runs, or captures into
// a CUDA graph. Memory and streams are the caller's, as plain addresses.
//
// A launch that is told to overlap starts while the kernel before it in the stream still runs (programmatic dependent
// launch, sm_90 on): the kernel itself waits before it touches what others write. Whether one does is the caller's to
// know (engine.ops.gpu.launch.WAITING).
//
// It does not choose kernels, shapes or arguments: those come as engine.ops.gpu.launch.Launch has them.

#include <cuda.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "images.h"

namespace py = pybind11;

namespace {

[[noreturn]] void fail(const std::string& message) {
    PyErr_SetString(py::module_::import("engine.errors").attr("DeviceError").ptr(), message.c_str());
    throw py::error_already_set();
}

// ---- the driver ------------------------------------------------------------------------------------------------------

#define ENGINE_TEXT(name) #name
#define ENGINE_SYMBOL(name) ENGINE_TEXT(name)  // the versioned name that cuda.h gives a function by a macro

// The functions of libcuda that are used here; X(function).
#define ENGINE_DRIVER(X) \
    X(cuInit) X(cuGetErrorName) X(cuGetErrorString) X(cuDeviceGet) X(cuDevicePrimaryCtxRetain) X(cuCtxGetCurrent) \
    X(cuCtxSetCurrent) X(cuModuleLoadData) X(cuModuleUnload) X(cuModuleGetFunction) X(cuFuncSetAttribute) \
    X(cuLaunchKernelEx) X(cuStreamSynchronize) X(cuStreamIsCapturing) X(cuStreamBeginCapture) \
    X(cuStreamEndCapture) X(cuGraphInstantiateWithFlags) X(cuGraphLaunch) X(cuGraphExecDestroy) X(cuGraphDestroy)

struct Driver {
#define ENGINE_FIELD(function) decltype(&::function) function = nullptr;
    ENGINE_DRIVER(ENGINE_FIELD)
#undef ENGINE_FIELD
    // Sizes of a kernel's parameters: from CUDA 12.4 on, so it may be missing.
    CUresult (*param_info)(CUfunction, size_t, size_t*, size_t*) = nullptr;

    // Raises DeviceError where there is no driver.
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    void check(CUresult result, const std::string& what) const {
        if (result == CUDA_SUCCESS) return;
        const char *name = nullptr, *text = nullptr;
        cuGetErrorName(result, &name);
        cuGetErrorString(result, &text);
        fail(what + ": " + (name ? name : "CUDA error " + std::to_string(result)) + (text ? ", " : "")
             + (text ? text : ""));
    }

  private:
    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) fail(std::string("no NVIDIA driver: ") + dlerror() + "; use device='cpu'");
#define ENGINE_FIND(function) \
    function = reinterpret_cast<decltype(function)>(dlsym(library, ENGINE_SYMBOL(function))); \
    if (!function) fail("the NVIDIA driver is too old: it has no " ENGINE_SYMBOL(function));
        ENGINE_DRIVER(ENGINE_FIND)
#undef ENGINE_FIND
        param_info = reinterpret_cast<decltype(param_info)>(dlsym(library, "cuFuncGetParamInfo"));
        check(cuInit(0), "the NVIDIA driver does not start");
    }
};

// ---- launches --------------------------------------------------------------------------------------------------------

constexpr int kDefaultShared = 48 << 10;  // dynamic shared memory that a kernel may have without asking

struct Function {
    std::string name;
    CUfunction handle = nullptr;
    int shared = kDefaultShared;  // allowed so far
    bool sizes_known = false;
    std::vector<size_t> sizes;  // of its parameters
};

// A launch ready to go: values are the arguments' bytes, eight to each.
struct Ready {
    const Function* function;
    unsigned grid[3], block[3], shared;
    bool overlaps;  // the kernel before it
    std::vector<uint64_t> values;

    void launch(const Driver& driver, CUstream stream) {
        void* arguments[64];  // `Kernels::ready` refuses more
        for (size_t i = 0; i < values.size(); ++i) arguments[i] = &values[i];
        CUlaunchAttribute overlapping{};
        overlapping.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlapping.value.programmaticStreamSerializationAllowed = 1;
        CUlaunchConfig config{};
        config.gridDimX = grid[0], config.gridDimY = grid[1], config.gridDimZ = grid[2];
        config.blockDimX = block[0], config.blockDimY = block[1], config.blockDimZ = block[2];
        config.sharedMemBytes = shared;
        config.hStream = stream;
        config.attrs = &overlapping;
        config.numAttrs = overlaps ? 1 : 0;
        driver.check(driver.cuLaunchKernelEx(&config, function->handle, arguments, nullptr),
                     "launching " + function->name);
    }
};

// A captured graph, ready to run.
class Graph {
  public:
    Graph(const Driver& driver, CUgraph graph) : driver_(driver), graph_(graph) {
        driver.check(driver.cuGraphInstantiateWithFlags(&executable_, graph, 0), "making a CUDA graph");
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        driver_.cuGraphExecDestroy(executable_);
        driver_.cuGraphDestroy(graph_);
    }

    void launch(uintptr_t stream) {
        driver_.check(driver_.cuGraphLaunch(executable_, reinterpret_cast<CUstream>(stream)), "running a CUDA graph");
    }

  private:
    const Driver& driver_;
    CUgraph graph_;
    CUgraphExec executable_ = nullptr;
};

// An argument's bytes: None is a null pointer, a device array has an address, the rest are NumPy scalars.
std::pair<uint64_t, size_t> argument(const py::handle& value, const std::string& where) {
    if (value.is_none()) return {0, sizeof(uint64_t)};
    if (py::hasattr(value, "address")) return {value.attr("address").cast<uint64_t>(), sizeof(uint64_t)};
    Py_buffer view;
    if (PyObject_GetBuffer(value.ptr(), &view, PyBUF_SIMPLE) != 0) {
        PyErr_Clear();
        fail(where + " must be a device array, None or a NumPy scalar, not " + py::repr(value).cast<std::string>());
    }
    uint64_t bits = 0;
    const auto size = static_cast<size_t>(view.len);
    if (size <= sizeof(bits)) std::memcpy(&bits, view.buf, size);
    PyBuffer_Release(&view);
    if (size > sizeof(bits)) fail(where + " has " + std::to_string(size) + " bytes; at most 8 fit");
    return {bits, size};
}

// The kernels for one GPU. debug: wait after each launch, so that a failure names its kernel.
class Kernels {
  public:
    Kernels(std::string arch, int device, bool debug) : driver_(Driver::get()), arch_(std::move(arch)), debug_(debug) {
        bool carried = false;
        for (int i = 0; i < kImageCount; ++i) carried = carried || arch_ == kImages[i].arch;
        if (!carried) fail("engine._cuda carries no kernels for " + arch_ + "; use the NVRTC loader");
        CUdevice handle;
        driver_.check(driver_.cuDeviceGet(&handle, device), "GPU " + std::to_string(device));
        driver_.check(driver_.cuDevicePrimaryCtxRetain(&context_, handle), "a context on the GPU");
    }
    Kernels(const Kernels&) = delete;
    Kernels& operator=(const Kernels&) = delete;
    ~Kernels() {
        for (const auto& [source, module] : modules_) driver_.cuModuleUnload(module);  // fails at exit: no harm
    }

    void launch(const py::handle& launch, uintptr_t stream, bool overlaps) {
        Ready one = ready(launch, overlaps);
        use();
        run(one, reinterpret_cast<CUstream>(stream));
    }

    // launch: an engine.ops.gpu.launch.Launch. Raises DeviceError for what no kernel takes.
    Ready ready(const py::handle& launch, bool overlaps) {
        use();
        Function& function = find(launch.attr("source").cast<std::string>(), launch.attr("kernel").cast<std::string>());
        Ready made{};
        made.function = &function;
        made.overlaps = overlaps;
        const auto grid = launch.attr("grid").cast<std::vector<unsigned>>();
        const auto block = launch.attr("block").cast<std::vector<unsigned>>();
        if (grid.size() != 3 || block.size() != 3) fail(function.name + ": grid and block have three dimensions");
        std::copy(grid.begin(), grid.end(), made.grid);
        std::copy(block.begin(), block.end(), made.block);
        made.shared = launch.attr("shared").cast<unsigned>();
        allow(function, static_cast<int>(made.shared));
        const auto args = py::reinterpret_borrow<py::sequence>(launch.attr("args"));
        const size_t count = py::len(args);
        if (count > 64 || (function.sizes_known && count != function.sizes.size()))
            fail(function.name + " takes " + std::to_string(function.sizes.size()) + " arguments, not "
                 + std::to_string(count));
        for (size_t i = 0; i < count; ++i) {
            const std::string where = "argument " + std::to_string(i) + " of " + function.name;
            const auto [bits, size] = argument(py::object(args[i]), where);
            if (function.sizes_known && size != function.sizes[i])
                fail(where + " has " + std::to_string(function.sizes[i]) + " bytes, not " + std::to_string(size));
            made.values.push_back(bits);
        }
        return made;
    }

    // All launches, one behind the other.
    void run_all(std::vector<Ready>& launches, uintptr_t stream) {
        use();
        for (Ready& one : launches) run(one, reinterpret_cast<CUstream>(stream));
    }

    std::unique_ptr<Graph> capture(std::vector<Ready>& launches, uintptr_t address) {
        use();
        const auto stream = reinterpret_cast<CUstream>(address);
        driver_.check(driver_.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "recording a graph");
        CUgraph graph = nullptr;
        try {
            for (Ready& one : launches) run(one, stream);
        } catch (...) {
            driver_.cuStreamEndCapture(stream, &graph);
            if (graph) driver_.cuGraphDestroy(graph);
            throw;
        }
        driver_.check(driver_.cuStreamEndCapture(stream, &graph), "recording a graph");
        return std::make_unique<Graph>(driver_, graph);
    }

  private:
    void run(Ready& one, CUstream stream) {
        one.launch(driver_, stream);
        if (!debug_) return;
        CUstreamCaptureStatus status;
        driver_.check(driver_.cuStreamIsCapturing(stream, &status), "running " + one.function->name);
        if (status == CU_STREAM_CAPTURE_STATUS_NONE)  // nothing runs while a graph is captured
            driver_.check(driver_.cuStreamSynchronize(stream), "running " + one.function->name);
    }

    // The context is a thread's own setting, and threads come from everywhere.
    void use() {
        CUcontext current = nullptr;
        driver_.check(driver_.cuCtxGetCurrent(&current), "the GPU's context");
        if (current != context_) driver_.check(driver_.cuCtxSetCurrent(context_), "the GPU's context");
    }

    Function& find(const std::string& source, const std::string& kernel) {
        auto found = functions_.find({source, kernel});
        if (found != functions_.end()) return found->second;
        Function function;
        function.name = kernel + " of " + source;
        driver_.check(driver_.cuModuleGetFunction(&function.handle, module(source), kernel.c_str()),
                      "finding " + function.name);
        if (driver_.param_info) {
            size_t offset, size;
            while (driver_.param_info(function.handle, function.sizes.size(), &offset, &size) == CUDA_SUCCESS)
                function.sizes.push_back(size);
            function.sizes_known = true;
        }
        return functions_.emplace(std::make_pair(source, kernel), std::move(function)).first->second;
    }

    CUmodule module(const std::string& source) {
        if (modules_.count(source)) return modules_[source];
        for (int i = 0; i < kImageCount; ++i) {
            if (source != kImages[i].source || arch_ != kImages[i].arch) continue;
            CUmodule loaded;
            driver_.check(driver_.cuModuleLoadData(&loaded, kImages[i].begin), "loading " + source + " for " + arch_);
            return modules_[source] = loaded;
        }
        fail("engine._cuda carries no " + source + " for " + arch_ + "; build it anew");
    }

    void allow(Function& function, int shared) {
        if (shared <= function.shared) return;
        driver_.check(
            driver_.cuFuncSetAttribute(function.handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
            function.name + " with " + std::to_string(shared) + " bytes of shared memory");
        function.shared = shared;
    }

    const Driver& driver_;
    std::string arch_;
    bool debug_;
    CUcontext context_ = nullptr;
    std::map<std::string, CUmodule> modules_;
    std::map<std::pair<std::string, std::string>, Function> functions_;  // nodes stay where they are
};

// Launches made ready once. Keeps the kernels and, through the launches, the arrays alive.
class Recording {
  public:
    Recording(py::object kernels, py::sequence launches, const std::vector<bool>& overlaps)
        : kernels_(std::move(kernels)), held_(py::list(launches)), owner_(kernels_.cast<Kernels&>()) {
        if (held_.size() != overlaps.size()) fail("a recording is told of each launch whether it overlaps");
        for (size_t i = 0; i < held_.size(); ++i) ready_.push_back(owner_.ready(held_[i], overlaps[i]));
    }

    size_t size() const { return ready_.size(); }
    void run(uintptr_t stream) { owner_.run_all(ready_, stream); }
    std::unique_ptr<Graph> capture(uintptr_t stream) { return owner_.capture(ready_, stream); }

  private:
    py::object kernels_;
    py::list held_;
    Kernels& owner_;
    std::vector<Ready> ready_;
};

py::list images() {
    py::list found;
    for (int i = 0; i < kImageCount; ++i) {
        const Image& image = kImages[i];
        found.append(py::make_tuple(image.source, image.arch, py::bytes(image.begin, image.end - image.begin)));
    }
    return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The CUDA kernels as nvcc compiled them, launched from C++; see cuda/bindings.cpp.";
    module.def("images", &images, "(source, architecture, cubin) of all that is carried.");
    py::class_<Kernels>(module, "Kernels")
        .def(py::init<std::string, int, bool>(), py::arg("arch"), py::arg("device") = 0, py::arg("debug") = false,
             "Raises DeviceError without a driver, a GPU, or kernels for arch.")
        .def("launch", &Kernels::launch, py::arg("launch"), py::arg("stream"), py::arg("overlaps") = false);
    py::class_<Graph>(module, "Graph").def("launch", &Graph::launch, py::arg("stream"));
    py::class_<Recording>(module, "Recording")
        .def(py::init<py::object, py::sequence, const std::vector<bool>&>(), py::arg("kernels"), py::arg("launches"),
             py::arg("overlaps"))
        .def("__len__", &Recording::size)
        .def("run", &Recording::run, py::arg("stream"), "All launches in order, in one call.")
        .def("capture", &Recording::capture, py::arg("stream"), py::keep_alive<0, 1>(), "A CUDA graph of them.");
}
