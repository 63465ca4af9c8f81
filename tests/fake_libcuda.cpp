// A stand-in for libcuda.so.1, to try engine._cuda without a GPU: every call it gets is one line on stdout.
//
// One module, whose kernels all take embed's parameters (a pointer, int64, two pointers, int64, int32): that is what a
// launch prints. Launches with more than 227 KiB of shared memory are refused, as real ones are.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default"))) CUresult

__attribute__((constructor)) static void write_at_once() { std::setvbuf(stdout, nullptr, _IONBF, 0); }

static bool capturing = false;
static const size_t kSizes[] = {8, 8, 8, 8, 8, 4};

EXPORT cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT cuGetErrorName(CUresult, const char** name) { return *name = "CUDA_ERROR_SOME", CUDA_SUCCESS; }
EXPORT cuGetErrorString(CUresult, const char** text) { return *text = "some error", CUDA_SUCCESS; }
EXPORT cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    return *context = reinterpret_cast<CUcontext>(0x10), CUDA_SUCCESS;
}
EXPORT cuCtxGetCurrent(CUcontext* context) { return *context = nullptr, CUDA_SUCCESS; }
EXPORT cuCtxSetCurrent(CUcontext context) {
    return context == reinterpret_cast<CUcontext>(0x10) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
EXPORT cuModuleLoadData(CUmodule* module, const void* image) {
    if (std::memcmp(image, "\x7f" "ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    std::printf("load\n");
    return *module = reinterpret_cast<CUmodule>(0x20), CUDA_SUCCESS;
}
EXPORT cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    if (std::strncmp(name, "embed_", 6)) return CUDA_ERROR_NOT_FOUND;
    return *function = reinterpret_cast<CUfunction>(std::strcmp(name, "embed_f32_f32") ? 0x30 : 0x40), CUDA_SUCCESS;
}
EXPORT cuFuncGetParamInfo(CUfunction, size_t index, size_t* offset, size_t* size) {
    if (index >= 6) return CUDA_ERROR_INVALID_VALUE;
    return *offset = 8 * index, *size = kSizes[index], CUDA_SUCCESS;
}
EXPORT cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
    std::printf("attribute %d %d\n", attribute, value);
    return value > 227 << 10 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
    const CUlaunchConfig& c = *config;
    for (unsigned i = 0; i < c.numAttrs; ++i) {
        if (c.attrs[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) return CUDA_ERROR_INVALID_VALUE;
        if (c.attrs[i].value.programmaticStreamSerializationAllowed) std::printf("overlapping ");
    }
    std::printf("%s %zx on %zx: %u %u %u, %u %u %u, %u:", capturing ? "capture" : "launch",
                reinterpret_cast<size_t>(function), reinterpret_cast<size_t>(c.hStream), c.gridDimX, c.gridDimY,
                c.gridDimZ, c.blockDimX, c.blockDimY, c.blockDimZ, c.sharedMemBytes);
    for (int i = 0; i < 6; ++i) {
        uint64_t value = 0;
        std::memcpy(&value, arguments[i], kSizes[i]);
        std::printf(" %llx", static_cast<unsigned long long>(value));
    }
    std::printf("\n");
    return c.gridDimX ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT cuStreamSynchronize(CUstream) { return std::printf("wait\n"), CUDA_SUCCESS; }
EXPORT cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
EXPORT cuStreamBeginCapture(CUstream, CUstreamCaptureMode) {
    return capturing = true, std::printf("begin\n"), CUDA_SUCCESS;
}
EXPORT cuStreamEndCapture(CUstream, CUgraph* graph) {
    std::printf("end\n");
    return capturing = false, *graph = reinterpret_cast<CUgraph>(0x50), CUDA_SUCCESS;
}
EXPORT cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph, unsigned long long) {
    return *executable = reinterpret_cast<CUgraphExec>(0x60), CUDA_SUCCESS;
}
EXPORT cuGraphLaunch(CUgraphExec, CUstream stream) {
    return std::printf("graph on %zx\n", reinterpret_cast<size_t>(stream)), CUDA_SUCCESS;
}
EXPORT cuGraphExecDestroy(CUgraphExec) { return std::printf("destroy executable\n"), CUDA_SUCCESS; }
EXPORT cuGraphDestroy(CUgraph) { return std::printf("destroy graph\n"), CUDA_SUCCESS; }
