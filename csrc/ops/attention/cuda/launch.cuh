// Host side of the CUDA kernels: kernel parameters, choice of instances, workspace. No torch.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "ops/attention/cuda/params.cuh"

namespace neox::attention {

// Carves buffers out of one allocation, aligned to 256 bytes. With a null base it only counts bytes.
class Workspace {
  public:
    explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* allocate(int64_t count) {
        T* const buffer = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return buffer;
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether all rows of a tensor can be copied 16 bytes, 8 elements, at a time. The stride of a dimension of size 1 does
// not matter, except that of the sequence: tiles compute addresses past the last row, although they do not read them.
inline bool rows_vectorize(const Attention& in, const void* data, const AttentionStrides& strides, int64_t heads) {
    const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && in.head_dim % 8 == 0 && fits(in.batch, strides.batch) &&
           strides.sequence % 8 == 0 && fits(in.groups, strides.group) && fits(heads, strides.head);
}

template <class T>
Matrix<T> query_matrix(const Attention& in, std::conditional_t<std::is_const_v<T>, const void*, void*> data,
                       const AttentionStrides& strides) {
    return {static_cast<T*>(data), strides, rows_vectorize(in, data, strides, in.heads)};
}

template <class T>
Matrix<T> key_matrix(const Attention& in, std::conditional_t<std::is_const_v<T>, const void*, void*> data,
                     const AttentionStrides& strides) {
    return {static_cast<T*>(data), strides, rows_vectorize(in, data, strides, 1)};
}

// Strides of a contiguous [batch, queries, groups * heads, head_dim].
inline AttentionStrides output_strides(const Attention& in) {
    const int64_t heads = in.groups * in.heads;
    return {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim};
}

inline Params make_params(const Attention& in, Workspace& workspace) {
    constexpr int64_t kMaxPosition = std::numeric_limits<int32_t>::max();
    Params params{};
    params.batch = static_cast<int>(in.batch), params.groups = static_cast<int>(in.groups),
    params.heads = static_cast<int>(in.heads);
    params.queries = static_cast<int>(in.queries), params.keys = static_cast<int>(in.keys),
    params.head_dim = static_cast<int>(in.head_dim);
    params.rows = static_cast<int>(in.queries * in.heads);
    params.by_heads = Divisor::by(params.heads);
    params.offset = static_cast<int>(in.keys - in.queries);
    params.causal = in.causal;
    params.window = static_cast<int>(std::min(in.window, kMaxPosition));
    params.reach = !in.causal ? 0xffffffffu : static_cast<unsigned>(in.window ? params.window - 1 : kMaxPosition);
    params.segments = in.segments;
    params.segment_entries = static_cast<int>(ceil_divide(in.keys, kSegmentTile));
    params.segment_table = in.segments ? workspace.allocate<int2>(in.batch * params.segment_entries) : nullptr;
    params.slopes = in.slopes;
    params.scale = in.scale, params.softcap = in.softcap;
    params.has_dropout = in.dropout > 0;
    params.seed[0] = in.seed[0], params.seed[1] = in.seed[1];
    params.threshold = static_cast<uint32_t>(dropout_threshold(in.dropout));
    params.keep_scale = 1.0f / (1.0f - in.dropout);
    return params;
}

// The basic kernels implement masks only and fold a positive scale into the exponent. The general ones add softcap,
// ALiBi, dropout and any scale.
inline bool is_general(const Attention& in) { return in.softcap > 0 || in.slopes || in.dropout > 0 || !(in.scale > 0); }

inline BlockOrder block_order(const Attention& in, int64_t tiles, bool reversed) {
    constexpr int64_t kCacheBytes = 24 << 20;  // of 40 MB (A100) and 50 MB (H100) of L2
    const int64_t pairs = in.batch * in.groups, bytes_per_pair = std::max<int64_t>(4 * in.keys * in.head_dim, 1);
    const int64_t chunk = std::min(std::max<int64_t>(kCacheBytes / bytes_per_pair, 1), std::max<int64_t>(pairs, 1));
    return {static_cast<int>(tiles), static_cast<int>(pairs), static_cast<int>(chunk), reversed};
}

// head_dim of the instance that handles a problem; the channels past the problem's are zeros in shared memory. Fewer
// instances would waste more multiplications, and more would cost compile time that the rare sizes are not worth.
inline int instance_dim(int64_t head_dim, bool general) {
    if (head_dim <= 64) return 64;
    if (head_dim <= 96 && !general) return 96;
    return head_dim <= 128 ? 128 : 256;
}

inline int instance_dim(const Attention& in) { return instance_dim(in.head_dim, is_general(in)); }

// Calls body with a zero of the element type.
template <class Body>
cudaError_t dispatch_type(const Attention& in, const Body& body) {
    if (in.head_dim > kMaxChannelsCuda) return cudaErrorInvalidValue;
    if (in.dtype == DType::kBFloat16) return body(__nv_bfloat16{});
    if (in.dtype == DType::kFloat16) return body(__half{});
    return cudaErrorInvalidValue;
}

// Calls body(head_dim of the instance, general) with both as compile-time constants.
template <class Body>
cudaError_t dispatch_instance(int dim, bool general, const Body& body) {
    const auto with = [&](auto constant) {
        return general ? body(constant, std::true_type{}) : body(constant, std::false_type{});
    };
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

// Writes the table of segment ids, if there are segments (attention_forward_cuda.cu).
cudaError_t fill_segment_table(const Params& params, Stream stream);

}  // namespace neox::attention
