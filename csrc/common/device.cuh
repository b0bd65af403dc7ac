// Included by every kernel file: the CUDA toolkit, or the SIMT emulator in the test build (-DSIMT_EMU, tests/emu).
//
// Three constructs replace CUDA syntax that the emulator cannot redefine: STATIC_SMEM and DYNAMIC_SMEM for shared
// memory, and launch() for <<<>>>. Inline PTX is in ptx.cuh only.
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

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), with the opt-in for more than 48 KiB of shared memory.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          [[maybe_unused]] Stream stream, Arguments&&... arguments) {
    std::tuple<Parameters...> fixed(static_cast<Parameters>(arguments)...);
#if defined(SIMT_EMU)
    simt::Launch task{reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, {}};
    std::apply([&](auto&... values) { (task.arguments.push_back({&values, sizeof(values)}), ...); }, fixed);
    simt::launch(task, [&] { std::apply(kernel, fixed); });
    return cudaSuccess;
#else
    const void* const address = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
        cudaError_t error =
            cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        // The maximum carve-out: by default the driver may reserve too little shared memory for a second block per
        // multiprocessor.
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(address, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
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

// Number of streaming multiprocessors of the current device.
inline int multiprocessors() {
    int device = 0, count = 1;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 1;
    return count;
}

// Largest shared memory of a block on the current device, in bytes.
inline size_t shared_memory_limit() {
    int device = 0, bytes = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
    return known ? static_cast<size_t>(bytes) : 48 * 1024;
}

// Return value of a launcher: null or CUDA's error message. CUDA stores the error of a failed launch until it is
// queried, and the next caller that queries, such as torch, would attribute it to itself; it is therefore cleared.
inline const char* message(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// Calls body with a value of the device type for dtype and returns its cudaError_t.
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
