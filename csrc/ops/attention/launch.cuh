// Host side of the CUDA kernels: a problem as the device sees it, choice of instances, and the workspace. No torch.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "ops/attention/problem.cuh"

namespace neox::attention {

// Pieces of one allocation, each at a multiple of 256 bytes. With a null base it only counts.
class Workspace {
  public:
    explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        T* const piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether all rows of a tensor can be copied in packs of 8 elements. Strides of dimensions of one element have no say.
inline bool rows_fit_packs(const Attention& in, const void* data, const AttentionStrides& strides, int64_t sequence, int64_t heads) {
    const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && in.head_dim % 8 == 0 && fits(in.batch, strides.batch) && fits(sequence, strides.sequence) &&
           fits(in.groups, strides.group) && fits(heads, strides.head);
}

template <class T>
Matrix<T> query_matrix(const Attention& in, std::conditional_t<std::is_const_v<T>, const void*, void*> data, const AttentionStrides& strides) {
    return {static_cast<T*>(data), strides, rows_fit_packs(in, data, strides, in.queries, in.heads)};
}

template <class T>
Matrix<T> key_matrix(const Attention& in, std::conditional_t<std::is_const_v<T>, const void*, void*> data, const AttentionStrides& strides) {
    return {static_cast<T*>(data), strides, rows_fit_packs(in, data, strides, in.keys, 1)};
}

// Strides of a contiguous [batch, queries, groups * heads, head_dim].
inline AttentionStrides output_strides(const Attention& in) {
    const int64_t heads = in.groups * in.heads;
    return {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim};
}

inline Problem problem_of(const Attention& in, Workspace& workspace) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    Problem problem{};
    problem.batch = static_cast<int>(in.batch), problem.groups = static_cast<int>(in.groups), problem.heads = static_cast<int>(in.heads);
    problem.queries = static_cast<int>(in.queries), problem.keys = static_cast<int>(in.keys), problem.head_dim = static_cast<int>(in.head_dim);
    problem.rows = static_cast<int>(in.queries * in.heads);
    problem.offset = static_cast<int>(in.keys - in.queries);
    problem.causal = in.causal;
    problem.window = static_cast<int>(std::min(in.window, kMost));
    problem.reach = !in.causal ? 0xffffffffu : static_cast<unsigned>(in.window ? problem.window - 1 : kMost);
    problem.segments = in.segments;
    problem.segment_entries = static_cast<int>(ceil_divide(in.keys, kSegmentTile));
    problem.segment_table = in.segments ? workspace.take<int2>(in.batch * problem.segment_entries) : nullptr;
    problem.slopes = in.slopes;
    problem.scale = in.scale, problem.softcap = in.softcap;
    problem.drops = in.dropout > 0;
    problem.seed[0] = in.seed[0], problem.seed[1] = in.seed[1];
    problem.threshold = static_cast<uint32_t>(dropout_threshold(in.dropout));
    problem.kept = 1.0f / (1.0f - in.dropout);
    return problem;
}

// The plain kernels fold the scale into the exponent; the others also do softcap, ALiBi, dropout, and scales that turn the order around.
inline bool needs_extras(const Attention& in) { return in.softcap > 0 || in.slopes || in.dropout > 0 || !(in.scale > 0); }

inline BlockOrder block_order(const Attention& in, int64_t tiles, bool reversed) {
    constexpr int64_t kCacheBytes = 24 << 20;  // of the 40 MB (A100) and 50 MB (H100) of L2
    const int64_t pairs = in.batch * in.groups, bytes_per_pair = std::max<int64_t>(4 * in.keys * in.head_dim, 1);
    const int64_t chunk = std::min(std::max<int64_t>(kCacheBytes / bytes_per_pair, 1), std::max<int64_t>(pairs, 1));
    return {static_cast<int>(tiles), static_cast<int>(pairs), static_cast<int>(chunk), reversed};
}

// head_dim of the instance that does a problem.
inline int instance_dim(int64_t head_dim) {
    for (const int dim : {32, 64, 96, 128, 192}) {
        if (head_dim <= dim) return dim;
    }
    return 256;
}

// Calls body(zero of the element type, head_dim of the instance, whether extras are needed).
template <class Body>
cudaError_t dispatch_instance(const Attention& in, const Body& body) {
    const auto with_dim = [&](auto zero, auto dim) { return needs_extras(in) ? body(zero, dim, std::true_type{}) : body(zero, dim, std::false_type{}); };
    const auto with_type = [&](auto zero) {
        if (in.head_dim <= 32) return with_dim(zero, std::integral_constant<int, 32>{});
        if (in.head_dim <= 64) return with_dim(zero, std::integral_constant<int, 64>{});
        if (in.head_dim <= 96) return with_dim(zero, std::integral_constant<int, 96>{});
        if (in.head_dim <= 128) return with_dim(zero, std::integral_constant<int, 128>{});
        if (in.head_dim <= 192) return with_dim(zero, std::integral_constant<int, 192>{});
        return with_dim(zero, std::integral_constant<int, 256>{});
    };
    if (in.head_dim > kMostChannelsCuda) return cudaErrorInvalidValue;
    switch (in.dtype) {
        case DType::kBFloat16:
            return with_type(__nv_bfloat16{});
        case DType::kFloat16:
            return with_type(__half{});
        case DType::kFloat32:
            break;
    }
    return cudaErrorInvalidValue;
}

// The table of segment ids: one warp per entry.
static __global__ void __launch_bounds__(128) segment_table_kernel(const int32_t* segments, int2* table, int64_t entries, int entries_per_batch, int keys) {
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarpSize;
    if (entry >= entries) return;
    const int64_t batch = entry / entries_per_batch;
    const int first = static_cast<int>(entry % entries_per_batch) * kSegmentTile, key = min(first + static_cast<int>(threadIdx.x) % kWarpSize, keys - 1);
    int low = segments[batch * keys + key], high = low;
#pragma unroll
    for (int offset = kWarpSize / 2; offset; offset /= 2) {
        low = min(low, __shfl_xor_sync(kFullWarp, low, offset));
        high = max(high, __shfl_xor_sync(kFullWarp, high, offset));
    }
    if (threadIdx.x % kWarpSize == 0) table[entry] = make_int2(low, high);
}

static_assert(kSegmentTile == kWarpSize, "one lane per key of an entry");

inline cudaError_t fill_segment_table(const Problem& problem, Stream stream) {
    const int64_t entries = static_cast<int64_t>(problem.batch) * problem.segment_entries;
    if (!problem.segments || entries == 0) return cudaSuccess;
    return launch(segment_table_kernel, dim3(static_cast<unsigned>(ceil_divide(entries, 4))), dim3(128), 0, stream, problem.segments,
                  const_cast<int2*>(problem.segment_table), entries, problem.segment_entries, problem.keys);
}

}  // namespace neox::attention
