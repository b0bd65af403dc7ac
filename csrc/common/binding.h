// What the bindings use of torch: its threads, its allocator, and tensors viewed as rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <vector>

#if defined(NEOX_CUDA_KERNELS) && !defined(SIMT_EMU)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
// Defined in torch's CUDA library only. Weak, so that the operators also load into a CPU-only torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));
#endif

#include "common/check.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

using torch::headeronly::ScalarType;

// A string argument. The operator receives a handle and owns it. Declared as std::string it would leak: torch's
// conversion (ToImpl<std::string> in torch 2.11 to 2.13) allocates a string that it never frees and returns a copy of
// it.
inline std::string take(StringHandle handle) {
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
}

// A binding is compiled once per library: with the kernels of <op>_cpu.cpp, or (NEOX_CUDA_KERNELS) with those of
// <op>_cuda.cu, for a GPU or for the emulator. NEOX_RUN(f, like, arguments...) calls f_cpu with torch's threads, or
// f_cuda with the current stream of the GPU that holds `like`. NEOX_QUERY(f, like, arguments...) returns a number, such
// as the size of a workspace. Both make that GPU the current device, because the number of multiprocessors and the size
// of shared memory differ between devices. Schemas are defined once, by the library that is loaded first.
#if defined(NEOX_CUDA_KERNELS)
#define NEOX_QUERY(name, like, ...) neox::query_device(like, [&] { return name##_cuda(__VA_ARGS__); })
#define NEOX_RUN(name, like, ...) \
    neox::run_on_device(#name, like, [&](neox::Stream stream) { return name##_cuda(__VA_ARGS__, stream); })
#else
#define NEOX_QUERY(name, like, ...) name##_cpu(__VA_ARGS__)
#define NEOX_RUN(name, like, ...) name##_cpu(__VA_ARGS__, neox::torch_parallel())
#endif
#if defined(NEOX_CUDA_KERNELS) && !defined(SIMT_EMU)
#define NEOX_SCHEMAS(m) \
    [[maybe_unused]] static void neox_schemas_of_the_cpu_library(torch::stable::detail::StableLibrary& m)
#else
#define NEOX_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(neox, m)
#endif
#define NEOX_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(neox, NEOX_OP_DEVICE, m)

// torch's intra-op threads, as set by torch.set_num_threads.
inline Parallel torch_parallel() {
    return Parallel{[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
        TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
    }};
}

#if defined(NEOX_CUDA_KERNELS)
// Returns query(), called with the GPU of `like` as the current device.
template <class Query>
auto query_device([[maybe_unused]] const Tensor& like, const Query& query) {
#if !defined(SIMT_EMU)
    const torch::stable::accelerator::DeviceGuard guard(like.get_device());
#endif
    return query();
}

// Calls launcher(stream) with the GPU of `like` as the current device. It returns null or CUDA's error message.
template <class Launcher>
void run_on_device(const char* name, [[maybe_unused]] const Tensor& like, const Launcher& launcher) {
#if defined(SIMT_EMU)
    const char* const error = launcher(nullptr);
#else
    const torch::stable::accelerator::DeviceGuard guard(like.get_device());
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error(concat(name, ": this torch has no CUDA"));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &stream));
    const char* const error = launcher(stream);
#endif
    if (error) throw std::runtime_error(concat(name, ": the kernel could not be launched: ", error));
}
#endif

inline DType dtype_of(const Tensor& tensor) {
    const auto type = tensor.scalar_type();
    return type == ScalarType::BFloat16 ? DType::kBFloat16
           : type == ScalarType::Half   ? DType::kFloat16
                                        : DType::kFloat32;
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A contiguous uninitialised tensor on the device of `like`, with its dtype unless given.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape,
                    std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A tensor [..., size] as `count` rows of `size` contiguous elements, `stride` elements apart. A tensor whose leading
// dimensions collapse into one, such as a slice of a wider buffer, is used in place; any other is copied.
struct Rows {
    Tensor tensor;  // keeps the memory alive
    int64_t count;
    int64_t size;
    int64_t stride;

    explicit Rows(const Tensor& source) : tensor(source), count(1), size(1), stride(1) {
        const int64_t dims = source.dim();
        size = dims ? source.size(dims - 1) : 1;
        for (int64_t i = 0; i + 1 < dims; ++i) count *= source.size(i);
        stride = size;
        if (source.is_contiguous()) return;
        if (!collapses(source)) {
            tensor = torch::stable::contiguous(source);
            stride = size;
        }
    }

    template <class T>
    const T* data() const {
        return static_cast<const T*>(tensor.const_data_ptr());
    }

  private:
    // Sets stride. Dimensions of size 1 are ignored.
    bool collapses(const Tensor& source) {
        const int64_t last = source.dim() - 1;
        if (source.size(last) != 1 && source.stride(last) != 1) return false;
        int64_t expected = -1;
        for (int64_t i = last - 1; i >= 0; --i) {
            if (source.size(i) == 1) continue;
            if (expected < 0) {
                stride = source.stride(i);
            } else if (source.stride(i) != expected) {
                return false;
            }
            expected = source.stride(i) * source.size(i);
        }
        return true;
    }
};

}  // namespace neox
