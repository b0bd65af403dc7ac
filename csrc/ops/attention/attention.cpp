#include "ops/attention/attention.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "attention";

struct Options {
    std::optional<Tensor> segment_ids, alibi_slopes, seed;
    bool causal;
    double scale;
    int64_t window;  // 0: no window
    double softcap;  // 0: no softcap
    double dropout_p;
    bool hopper = false;
};

void check_channels(const Tensor& tensor, const char* argument) {
    const int64_t last = tensor.dim() - 1;
    check(kOp, tensor.size(last) == 1 || tensor.stride(last) == 1, argument, "must have a contiguous last dimension",
          concat("stride ", tensor.stride(last)));
    check(kOp, tensor.size(last) >= 1, argument, "must have at least one channel", shape_text(tensor));
}

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
    check_float(kOp, q, "q");
    check_rank(kOp, q, "q", 4, 4);
    check_same_type(kOp, k, "k", q, "q");
    check_rank(kOp, k, "k", 4, 4);
    check(kOp, k.size(0) == q.size(0), "k", concat("must have the batch size of q, ", q.size(0)), shape_text(k));
    check(kOp, k.size(3) == q.size(3), "k", concat("must have the head_dim of q, ", q.size(3)), shape_text(k));
    check(kOp, k.size(2) >= 1 && q.size(2) % k.size(2) == 0, "q",
          concat("must have a multiple of k's ", k.size(2), " heads"), q.size(2));
    check_same_type(kOp, v, "v", k, "k");
    check_same_shape(kOp, v, "v", k, "k");
    check_channels(q, "q");
    check_channels(k, "k");
    check_channels(v, "v");
}

void check_packed(const Tensor& qkv) {
    check_float(kOp, qkv, "qkv");
    check_rank(kOp, qkv, "qkv", 5, 5);
    check(kOp, qkv.size(3) >= 3, "qkv", "must hold at least one query, one key and one value per group in dimension 3",
          shape_text(qkv));
    check_channels(qkv, "qkv");
}

void check_vector(const Tensor& tensor, const char* argument, ScalarType type, int64_t size) {
    check(kOp, tensor.scalar_type() == type, argument, concat("must be ", torch::headeronly::toString(type)),
          torch::headeronly::toString(tensor.scalar_type()));
    check(kOp, tensor.dim() == 1 && tensor.size(0) == size, argument, concat("must have shape [", size, "]"),
          shape_text(tensor));
}

void check_segments(const Tensor& segments, int64_t batch, int64_t queries, int64_t keys) {
    check_device(kOp, segments, "segment_ids");
    check(kOp, segments.scalar_type() == ScalarType::Int, "segment_ids", "must be Int (int32)",
          torch::headeronly::toString(segments.scalar_type()));
    check(kOp, queries <= keys, "segment_ids", concat("needs at least as many keys as queries, ", queries), keys);
    const bool ok = segments.dim() == 2 && segments.size(0) == batch && segments.size(1) == keys;
    check(kOp, ok, "segment_ids", concat("must have one id per key, shape [", batch, ", ", keys, "]"),
          shape_text(segments));
}

// Checks the scalars and the optional tensors, and makes the latter contiguous.
void check_options(Options& options, int64_t batch, int64_t queries, int64_t keys, int64_t heads) {
    check(kOp, queries <= INT32_MAX && keys <= INT32_MAX, "q, k", "must be shorter than 2^31", std::max(queries, keys));
    check(kOp, std::isfinite(options.scale), "scale", "must be finite", options.scale);
    check(kOp, options.window >= 0, "window", "must be at least 1", options.window);
    check(kOp, options.window == 0 || options.causal, "window", "needs causal=True", options.window);
    check(kOp, options.softcap >= 0 && std::isfinite(options.softcap), "softcap", "must be positive and finite",
          options.softcap);
    check(kOp, options.dropout_p >= 0 && options.dropout_p < 1, "dropout_p", "must be in [0, 1)", options.dropout_p);
    check(kOp, options.dropout_p == 0 || options.seed, "seed", "is needed with dropout", "none");
    if (options.segment_ids) {
        check_segments(*options.segment_ids, batch, queries, keys);
        options.segment_ids = neox::contiguous(*options.segment_ids);
    }
    if (options.alibi_slopes) {
        check_device(kOp, *options.alibi_slopes, "alibi_slopes");
        check_vector(*options.alibi_slopes, "alibi_slopes", ScalarType::Float, heads);
        options.alibi_slopes = neox::contiguous(*options.alibi_slopes);
    }
    if (options.seed) {
        check(kOp, options.seed->is_cpu(), "seed", "must be on the CPU", "a tensor of another device");
        check_vector(*options.seed, "seed", ScalarType::Long, 2);
        options.seed = neox::contiguous(*options.seed);
    }
}

// Checks the restrictions of the CUDA kernels.
void check_kernel(const Attention& in, [[maybe_unused]] const Tensor& like) {
#if defined(NEOX_CUDA_KERNELS)
    const char* const problem = in.hopper ? NEOX_QUERY(attention_hopper_problem, like, in) : nullptr;
    check(kOp, !problem, "backend", concat("cannot be \"hopper\": ", problem ? problem : ""), "hopper");
    check(kOp, in.dtype != DType::kFloat32, "q",
          "must be bfloat16 or float16 on a GPU; backend \"sdpa\" supports float32", "Float");
    check(kOp, in.head_dim <= kMaxChannelsCuda, "q",
          concat("must have at most ", kMaxChannelsCuda, " channels per head on a GPU"), in.head_dim);
    check(kOp, in.queries * in.heads <= INT32_MAX, "q", "must have fewer than 2^31 (query, head of a group) pairs",
          in.queries * in.heads);
#else
    check(kOp, !in.hopper, "backend", "cannot be \"hopper\": its kernels need a GPU", "hopper");
#endif
}

void set_options(Attention& in, const Options& options) {
    in.causal = options.causal;
    in.scale = static_cast<float>(options.scale);
    in.window = options.window;
    in.segments = options.segment_ids ? static_cast<const int32_t*>(options.segment_ids->const_data_ptr()) : nullptr;
    in.slopes = options.alibi_slopes ? static_cast<const float*>(options.alibi_slopes->const_data_ptr()) : nullptr;
    in.softcap = static_cast<float>(options.softcap);
    in.dropout = static_cast<float>(options.dropout_p);
    in.hopper = options.hopper;
    if (options.seed) {
        const int64_t* const seed = static_cast<const int64_t*>(options.seed->const_data_ptr());
        in.seed[0] = static_cast<uint64_t>(seed[0]);
        in.seed[1] = static_cast<uint64_t>(seed[1]);
    }
}

// Strides of a [b, s, n, d] tensor whose n heads are groups of `heads`.
AttentionStrides strides_of(const Tensor& tensor, int64_t heads) {
    return AttentionStrides{tensor.stride(0), tensor.stride(1), heads * tensor.stride(2), tensor.stride(2)};
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, Options& options) {
    check_qkv(q, k, v);
    check_options(options, q.size(0), q.size(1), k.size(1), q.size(2));
    Attention in{};
    in.dtype = dtype_of(q);
    in.batch = q.size(0), in.queries = q.size(1), in.keys = k.size(1);
    in.groups = k.size(2), in.heads = q.size(2) / k.size(2), in.head_dim = q.size(3);
    in.q = q.const_data_ptr(), in.k = k.const_data_ptr(), in.v = v.const_data_ptr();
    in.q_strides = strides_of(q, in.heads), in.k_strides = strides_of(k, 1), in.v_strides = strides_of(v, 1);
    set_options(in, options);
    return in;
}

// Strides and offsets of q, k and v in a packed tensor [b, s, g, m + 2, d].
struct Packed {
    AttentionStrides strides;
    int64_t key, value;  // offsets of the first key and value, in elements

    explicit Packed(const Tensor& qkv) : strides{qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3)} {
        key = (qkv.size(3) - 2) * qkv.stride(3);
        value = (qkv.size(3) - 1) * qkv.stride(3);
    }
};

template <class Pointer>
Pointer advance(Pointer data, int64_t elements, const Tensor& tensor) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return static_cast<Byte*>(data) + elements * static_cast<int64_t>(tensor.element_size());
}

Attention describe(const Tensor& qkv, Options& options) {
    check_packed(qkv);
    Attention in{};
    in.dtype = dtype_of(qkv);
    in.batch = qkv.size(0), in.queries = in.keys = qkv.size(1);
    in.groups = qkv.size(2), in.heads = qkv.size(3) - 2, in.head_dim = qkv.size(4);
    check_options(options, in.batch, in.queries, in.keys, in.groups * in.heads);
    const Packed packed(qkv);
    in.q = qkv.const_data_ptr();
    in.k = advance(in.q, packed.key, qkv);
    in.v = advance(in.q, packed.value, qkv);
    in.q_strides = in.k_strides = in.v_strides = packed.strides;
    set_options(in, options);
    return in;
}

std::tuple<Tensor, Tensor> run_forward(const Attention& in, const Tensor& like) {
    check_kernel(in, like);
    const int64_t heads = in.groups * in.heads;
    Tensor out = empty(like, {in.batch, in.queries, heads, in.head_dim});
    Tensor lse = empty(like, {in.batch, heads, in.queries}, ScalarType::Float);
    float* const lse_data = static_cast<float*>(lse.mutable_data_ptr());
#if defined(NEOX_CUDA_KERNELS)
    Tensor workspace = empty(like, {NEOX_QUERY(attention_forward_workspace, like, in)}, ScalarType::Byte);
    NEOX_RUN(attention_forward, like, in, out.mutable_data_ptr(), lse_data, workspace.mutable_data_ptr());
#else
    attention_forward_cpu(in, out.mutable_data_ptr(), lse_data, torch_parallel());
#endif
    return {out, lse};
}

// dout, and out and lse of the forward. Owns the contiguous copies.
struct Saved {
    Tensor dout, out, lse;

    Saved(const Attention& in, const Tensor& dout_in, const Tensor& out_in, const Tensor& lse_in, const Tensor& like)
        : dout(dout_in), out(neox::contiguous(out_in)), lse(neox::contiguous(lse_in)) {
        const std::vector<int64_t> shape{in.batch, in.queries, in.groups * in.heads, in.head_dim};
        check_same_type(kOp, dout, "dout", like, "q");
        check(kOp, shape_of(dout) == shape, "dout", "must have the shape of the output", shape_text(dout));
        check_same_type(kOp, out, "out", like, "q");
        check(kOp, shape_of(out) == shape, "out", "must be the output of the forward", shape_text(out));
        const bool fits = lse.scalar_type() == ScalarType::Float &&
                          shape_of(lse) == std::vector<int64_t>{in.batch, in.groups * in.heads, in.queries};
        check(kOp, fits, "lse", "must be the lse of the forward", shape_text(lse));
        if (in.head_dim > 1 && dout.stride(3) != 1) dout = torch::stable::contiguous(dout);
    }
};

void run_backward(const Attention& in, const Saved& saved, AttentionGradients grad,
                  [[maybe_unused]] bool deterministic) {
    check_kernel(in, saved.dout);
    grad.dout = saved.dout.const_data_ptr();
    grad.dout_strides = strides_of(saved.dout, in.heads);
    grad.out = saved.out.const_data_ptr();
    grad.lse = static_cast<const float*>(saved.lse.const_data_ptr());
#if defined(NEOX_CUDA_KERNELS)
    Tensor workspace =
        empty(saved.dout, {NEOX_QUERY(attention_backward_workspace, saved.dout, in, deterministic)}, ScalarType::Byte);
    NEOX_RUN(attention_backward, saved.dout, in, grad, deterministic, workspace.mutable_data_ptr());
#else
    attention_backward_cpu(in, grad, torch::stable::get_num_threads(), torch_parallel());  // always deterministic
#endif
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> segment_ids,
                                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> seed, bool causal,
                                     double scale, int64_t window, double softcap, double dropout_p, bool hopper) {
    Options options{segment_ids, alibi_slopes, seed, causal, scale, window, softcap, dropout_p, hopper};
    return run_forward(describe(q, k, v, options), q);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                      std::optional<Tensor> segment_ids,
                                                      std::optional<Tensor> alibi_slopes, std::optional<Tensor> seed,
                                                      bool causal, double scale, int64_t window, double softcap,
                                                      double dropout_p, bool deterministic, bool hopper) {
    Options options{segment_ids, alibi_slopes, seed, causal, scale, window, softcap, dropout_p, hopper};
    const Attention in = describe(q, k, v, options);
    const Saved saved(in, dout, out, lse, q);
    Tensor dq = empty(q, shape_of(q)), dk = empty(k, shape_of(k)), dv = empty(v, shape_of(v));
    AttentionGradients grad{};
    grad.dq = dq.mutable_data_ptr(), grad.dk = dk.mutable_data_ptr(), grad.dv = dv.mutable_data_ptr();
    grad.dq_strides = strides_of(dq, in.heads), grad.dk_strides = strides_of(dk, 1),
    grad.dv_strides = strides_of(dv, 1);
    run_backward(in, saved, grad, deterministic);
    return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_qkv(Tensor qkv, std::optional<Tensor> segment_ids,
                                         std::optional<Tensor> alibi_slopes, std::optional<Tensor> seed, bool causal,
                                         double scale, int64_t window, double softcap, double dropout_p, bool hopper) {
    Options options{segment_ids, alibi_slopes, seed, causal, scale, window, softcap, dropout_p, hopper};
    return run_forward(describe(qkv, options), qkv);
}

Tensor attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, std::optional<Tensor> segment_ids,
                              std::optional<Tensor> alibi_slopes, std::optional<Tensor> seed, bool causal, double scale,
                              int64_t window, double softcap, double dropout_p, bool deterministic, bool hopper) {
    Options options{segment_ids, alibi_slopes, seed, causal, scale, window, softcap, dropout_p, hopper};
    const Attention in = describe(qkv, options);
    const Saved saved(in, dout, out, lse, qkv);
    Tensor dqkv = empty(qkv, shape_of(qkv));
    const Packed packed(dqkv);
    AttentionGradients grad{};
    grad.dq = dqkv.mutable_data_ptr();
    grad.dk = advance(grad.dq, packed.key, dqkv);
    grad.dv = advance(grad.dq, packed.value, dqkv);
    grad.dq_strides = grad.dk_strides = grad.dv_strides = packed.strides;
    run_backward(in, saved, grad, deterministic);
    return dqkv;
}

// Shared memory per block in bytes: (forward, backward, limit of the GPU that holds q). Zeros in a library without CUDA
// kernels.
std::tuple<int64_t, int64_t, int64_t> attention_shared([[maybe_unused]] Tensor q, [[maybe_unused]] bool general) {
#if defined(NEOX_CUDA_KERNELS)
    const AttentionShared bytes = NEOX_QUERY(attention_shared, q, q.size(q.dim() - 1), general);
    return {bytes.forward, bytes.backward, bytes.limit};
#else
    return {0, 0, 0};
#endif
}

}  // namespace
}  // namespace neox

#define NEOX_ATTENTION_OPTIONS                                                                                       \
    "Tensor? segment_ids, Tensor? alibi_slopes, Tensor? seed, bool causal, float scale, int window, float softcap, " \
    "float dropout_p"

NEOX_SCHEMAS(m) {
    m.def("attention(Tensor q, Tensor k, Tensor v, " NEOX_ATTENTION_OPTIONS ", bool hopper=False) -> (Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " NEOX_ATTENTION_OPTIONS
        ", bool deterministic, bool hopper=False) -> (Tensor, Tensor, Tensor)");
    m.def("attention_qkv(Tensor qkv, " NEOX_ATTENTION_OPTIONS ", bool hopper=False) -> (Tensor, Tensor)");
    m.def("attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, " NEOX_ATTENTION_OPTIONS
          ", bool deterministic, bool hopper=False) -> Tensor");
    m.def("attention_shared(Tensor q, bool general) -> (int, int, int)");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("attention", TORCH_BOX(&neox::attention));
    m.impl("attention_backward", TORCH_BOX(&neox::attention_backward));
    m.impl("attention_qkv", TORCH_BOX(&neox::attention_qkv));
    m.impl("attention_qkv_backward", TORCH_BOX(&neox::attention_qkv_backward));
    m.impl("attention_shared", TORCH_BOX(&neox::attention_shared));
}
