// Tensor maps of bulk copies: what the hardware knows about a tensor in global memory. They are made on the host and
// passed as kernel parameters (const __grid_constant__, aligned to 64 bytes).
#pragma once

#include <type_traits>

#include "common/device.cuh"
#if defined(SIMT_EMU)
#include "async.h"
#else
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

namespace neox {

// 16-bit elements of 4 dimensions. Dimension 0 is contiguous.
struct TensorBox {
    const void* data;
    int64_t sizes[4];    // in elements
    int64_t strides[4];  // in elements; that of dimension 0 is 1
    int box[4];          // what one copy moves; box[0] is 64 elements, a row of 128 swizzled bytes
};

// Why a tensor cannot have a map, or null. The limits are those of cuTensorMapEncodeTiled.
inline const char* tensor_map_problem(const TensorBox& of) {
    if (reinterpret_cast<uintptr_t>(of.data) % 16) return "its address must be a multiple of 16 bytes";
    for (int i = 0; i < 4; ++i) {
        if (of.sizes[i] < 1 || of.sizes[i] > int64_t{1} << 32) return "its sizes must be from 1 to 2^32";
        if (i && (of.strides[i] * 2 % 16 || of.strides[i] <= 0 || of.strides[i] * 2 >= int64_t{1} << 40))
            return "its strides must be positive multiples of 16 bytes below 2^40";
        if (of.box[i] < 1 || of.box[i] > 256) return "a box must have 1 to 256 elements per dimension";
    }
    return of.box[0] == 64 ? nullptr : "a row of the box must have 128 bytes, which its swizzle permutes";
}

#if defined(SIMT_EMU)
using TensorMap = simt::TensorMap;

template <class T>
cudaError_t make_tensor_map(TensorMap& map, const TensorBox& of) {
    if (tensor_map_problem(of)) return cudaErrorInvalidValue;
    map = TensorMap{static_cast<const char*>(of.data), 4, {}, {}, {}, true};
    for (int i = 0; i < 4; ++i) {
        map.sizes[i] = static_cast<uint64_t>(of.sizes[i]);
        map.strides[i] = static_cast<uint64_t>(of.strides[i]) * 2;
        map.box[i] = static_cast<uint32_t>(of.box[i]);
    }
    return cudaSuccess;
}
#else
using TensorMap = CUtensorMap;

// The driver encodes the map. Its function is looked up by name, so that the library loads without a driver.
template <class T>
cudaError_t make_tensor_map(TensorMap& map, const TensorBox& of) {
    if (tensor_map_problem(of)) return cudaErrorInvalidValue;
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorCallRequiresNewerDriver;
    cuuint64_t sizes[4], strides[3];
    cuuint32_t box[4];
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    for (int i = 0; i < 4; ++i) {
        sizes[i] = static_cast<cuuint64_t>(of.sizes[i]);
        box[i] = static_cast<cuuint32_t>(of.box[i]);
        if (i) strides[i - 1] = static_cast<cuuint64_t>(of.strides[i]) * 2;
    }
    const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address)(
        &map, std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        const_cast<void*>(of.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

}  // namespace neox
