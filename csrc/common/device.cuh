// What every kernel file includes: the CUDA toolkit, or the SIMT emulator in the test build (-DSIMT_EMU, tests/emu).
//
// Three spellings are ours because the emulator cannot redefine the language's: STATIC_SMEM and DYNAMIC_SMEM for shared memory, and
// launch() for <<<>>>. Inline PTX lives in ptx.cuh alone.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#if defined(SIMT_EMU)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "common/dtype.h"
#include "common/stream.h"

#define NEOX_DEVICE static __device__ __forceinline__

#if defined(SIMT_EMU)
#define STATIC_SMEM(T, name, dims)    \
    static const char name##_key = 0; \
    using name##_array = T dims;      \
    name##_array& name = *static_cast<name##_array*>(simt::static_shared(&name##_key, sizeof(name##_array), #name))
#define DYNAMIC_SMEM(name) unsigned char* const name = static_cast<unsigned char*>(simt::dynamic_shared())
#else
#define STATIC_SMEM(T, name, dims) __shared__ T name dims
#define DYNAMIC_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace neox {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), with the opt-in that more than 48 KiB of shared memory needs.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, [[maybe_unused]] Stream stream, Arguments&&... arguments) {
    std::tuple<Parameters...> fixed(static_cast<Parameters>(arguments)...);
#if defined(SIMT_EMU)
    simt::run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, fixed); });
    return cudaSuccess;
#else
    const void* const address = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        // All of the L1 as shared memory: left alone, the driver may keep too little of it for the second block of a multiprocessor.
        if (error == cudaSuccess) error = cudaFuncSetAttribute(address, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        if (error != cudaSuccess) return error;
    }
    return std::apply(
        [&](auto&... values) {
            void* pointers[] = {static_cast<void*>(&values)...};
            return cudaLaunchKernel(address, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream));
        },
        fixed);
#endif
}

// Streaming multiprocessors of the current device.
inline int multiprocessors() {
    int device = 0, count = 1;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return count;
}

// Shared memory that one block may have on the current device.
inline size_t shared_memory_limit() {
    int device = 0, bytes = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
    return known ? static_cast<size_t>(bytes) : 48 * 1024;
}

// What a launcher returns: null, or what CUDA said. CUDA keeps the error of a refused launch until it is asked for; left there, the next caller
// that asks, torch among them, would take it for its own.
inline const char* message(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// Calls body with a value of the device type that belongs to dtype, and returns its cudaError_t.
template <class Body>
cudaError_t dispatch_device(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(float{});
        case DType::kBFloat16:
            return body(__nv_bfloat16{});
        case DType::kFloat16:
            return body(__half{});
    }
    return cudaErrorInvalidValue;
}

}  // namespace neox
