// What every binding needs of torch: its threads, its allocator, and tensors seen as rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace neox {

using torch::headeronly::ScalarType;

// torch's intra-op threads, as set by torch.set_num_threads.
inline Parallel torch_parallel() {
    return Parallel{[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
        STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
    }};
}

inline DType dtype_of(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat32; }

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// Contiguous and uninitialised, device of `like`, dtype of `like` unless given.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// A tensor [..., size] as `count` rows of `size` contiguous elements, `stride` elements apart. Any tensor whose leading dimensions
// collapse into one (a slice of a wider buffer, say) is used in place; any other is copied.
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
    // Sets stride. Dimensions of one element have no say.
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
