// The part of CUDA's runtime that csrc/common/device.cuh calls, for tests on machines without the toolkit: it records
// the calls, and fails where a test asks for that.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned a, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlock,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

namespace fake_runtime {

struct State {
    std::map<cudaFuncAttribute, int> attributes;  // that were set, of any kernel
    std::vector<size_t> launches;                 // bytes of dynamic shared memory
    cudaError_t launch_error = cudaSuccess;       // of the next launches
    cudaError_t last_error = cudaSuccess;
    std::map<cudaDeviceAttr, int> device;  // known attributes of the device
};
inline State state;

}  // namespace fake_runtime

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
    fake_runtime::state.attributes[attribute] = value;
    return cudaSuccess;
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t shared_bytes, cudaStream_t) {
    fake_runtime::state.launches.push_back(shared_bytes);
    if (fake_runtime::state.launch_error != cudaSuccess)
        fake_runtime::state.last_error = fake_runtime::state.launch_error;
    return fake_runtime::state.launch_error;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = fake_runtime::state.last_error;
    fake_runtime::state.last_error = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const auto found = fake_runtime::state.device.find(attribute);
    if (found == fake_runtime::state.device.end()) return cudaErrorInvalidValue;
    *value = found->second;
    return cudaSuccess;
}
