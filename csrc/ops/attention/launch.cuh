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

// Whether all rows of a tensor can be copied in packs of 8 elements. Strides of dimensions of one element have no say, but for the sequence's:
// tiles address rows behind the last, though they do not read them.
inline bool rows_fit_packs(const Attention& in, const void* data, const AttentionStrides& strides, int64_t heads) {
    const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && in.head_dim % 8 == 0 && fits(in.batch, strides.batch) && strides.sequence % 8 == 0 &&
           fits(in.groups, strides.group) && fits(heads, strides.head);
}

template <class T>
Matrix<T> query_matrix(const Attention& in, std::conditional_t<std::is_const_v<T>, const void*, void*> data, const AttentionStrides& strides) {
    return {static_cast<T*>(data), strides, rows_fit_packs(in, data, strides, in.heads)};
}

template <class T>
Matrix<T> key_matrix(const Attention& in, std::conditional_t<std::is_const_v<T>, const void*, void*> data, const AttentionStrides& strides) {
    return {static_cast<T*>(data), strides, rows_fit_packs(in, data, strides, 1)};
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
    problem.by_heads = Divisor::by(problem.heads);
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

// The plain kernels do masks only, and fold a positive scale into the exponent. The general ones also do softcap, ALiBi, dropout and any scale.
inline bool is_general(const Attention& in) { return in.softcap > 0 || in.slopes || in.dropout > 0 || !(in.scale > 0); }

inline BlockOrder block_order(const Attention& in, int64_t tiles, bool reversed) {
    constexpr int64_t kCacheBytes = 24 << 20;  // of the 40 MB (A100) and 50 MB (H100) of L2
    const int64_t pairs = in.batch * in.groups, bytes_per_pair = std::max<int64_t>(4 * in.keys * in.head_dim, 1);
    const int64_t chunk = std::min(std::max<int64_t>(kCacheBytes / bytes_per_pair, 1), std::max<int64_t>(pairs, 1));
    return {static_cast<int>(tiles), static_cast<int>(pairs), static_cast<int>(chunk), reversed};
}

// head_dim of the instance that does a problem: channels up to it are zeros in shared memory. Fewer sizes would waste more products, more would cost
// more compilation than the rare sizes are worth.
inline int instance_dim(int64_t head_dim, bool general) {
    if (head_dim <= 64) return 64;
    if (head_dim <= 96 && !general) return 96;
    return head_dim <= 128 ? 128 : 256;
}

inline int instance_dim(const Attention& in) { return instance_dim(in.head_dim, is_general(in)); }

// Calls body(zero of the element type).
template <class Body>
cudaError_t dispatch_type(const Attention& in, const Body& body) {
    if (in.head_dim > kMostChannelsCuda) return cudaErrorInvalidValue;
    if (in.dtype == DType::kBFloat16) return body(__nv_bfloat16{});
    if (in.dtype == DType::kFloat16) return body(__half{});
    return cudaErrorInvalidValue;
}

// Calls body(head_dim of the instance, whether it is general), both as constants.
template <class Body>
cudaError_t dispatch_instance(int dim, bool general, const Body& body) {
    const auto with = [&](auto constant) { return general ? body(constant, std::true_type{}) : body(constant, std::false_type{}); };
    switch (dim) {
        case 64:
            return with(std::integral_constant<int, 64>{});
        case 96:
            return general ? cudaErrorInvalidValue : body(std::integral_constant<int, 96>{}, std::false_type{});
        case 128:
            return with(std::integral_constant<int, 128>{});
        case 256:
            return with(std::integral_constant<int, 256>{});
        default:
            return cudaErrorInvalidValue;
    }
}

// Writes the table of segment ids where there are segments (attention_forward_cuda.cu).
cudaError_t fill_segment_table(const Problem& problem, Stream stream);

}  // namespace neox::attention
