#include "ops/decode_block/decode_block.h"

#include <cmath>

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "decode_block";
using Optional = std::optional<Tensor>;

// Indices into the list of parameters that neox/ops/decode_block.py builds.
enum Part {
    kNorm1,
    kNorm1Bias,
    kNorm2,
    kNorm2Bias,
    kQueryNorm,
    kKeyNorm,
    kQkv,
    kQkvBias,
    kOut,
    kOutBias,
    kGate,
    kGateBias,
    kUp,
    kUpBias,
    kDown,
    kDownBias
};
constexpr const char* kNames[] = {
    "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "query_norm", "key_norm", "qkv.weight",  "qkv.bias",
    "out.weight",   "out.bias",   "gate.weight",  "gate.bias",  "up.weight",  "up.bias",  "down.weight", "down.bias"};
constexpr size_t kParts = sizeof(kNames) / sizeof(kNames[0]);

BlockActivation activation_of(const std::string& name) {
    constexpr struct {
        const char* name;
        BlockActivation activation;
    } known[] = {{"gelu", BlockActivation::kGelu},
                 {"gelu_tanh", BlockActivation::kGeluTanh},
                 {"swiglu", BlockActivation::kGatedSilu},
                 {"geglu", BlockActivation::kGatedGelu},
                 {"reglu", BlockActivation::kGatedRelu}};
    for (const auto& one : known) {
        if (name == one.name) return one.activation;
    }
    throw std::invalid_argument(
        concat(kOp, ": activation must be gelu, gelu_tanh, swiglu, geglu or reglu; got ", name));
}

// The parameters of a block. Each is checked when it is accessed.
class Parameters {
  public:
    Parameters(const std::vector<Optional>& list, const Tensor& stream) : list_(list), stream_(stream) {
        check(kOp, list.size() == kParts, "parameters", concat("must be ", kParts, " tensors or None"), list.size());
    }

    bool has(Part part) const { return list_[part].has_value(); }

    int64_t rows(Part part) const {
        check(kOp, has(part), kNames[part], "is needed", "none");
        check_rank(kOp, *list_[part], kNames[part], 2, 2);
        return list_[part]->size(0);
    }

    // Data pointer of a parameter [out, in], or [out] if in = 0; null if the parameter is absent.
    const void* get(Part part, int64_t out, int64_t in) const {
        if (!has(part)) return nullptr;
        const Tensor& tensor = *list_[part];
        check_same_type(kOp, tensor, kNames[part], stream_, "stream");
        if (in) {
            check(kOp, tensor.dim() == 2 && tensor.size(0) == out && tensor.size(1) == in, kNames[part],
                  concat("must have shape [", out, ", ", in, "]"), shape_text(tensor));
        } else {
            check(kOp, tensor.dim() == 1 && tensor.size(0) == out, kNames[part], concat("must have shape [", out, "]"),
                  shape_text(tensor));
        }
        check(kOp, tensor.is_contiguous(), kNames[part], "must be contiguous", "strides of a view");
        return tensor.const_data_ptr();
    }

    const void* need(Part part, int64_t out, int64_t in) const {
        check(kOp, has(part), kNames[part], "is needed", "none");
        return get(part, out, in);
    }

    Projection projection(Part weight, int64_t out, int64_t in) const {
        return {need(weight, out, in), get(static_cast<Part>(weight + 1), out, 0)};
    }

  private:
    const std::vector<Optional>& list_;
    const Tensor& stream_;
};

void set_parameters(DecodeBlock& op, const Parameters& parameters) {
    const int64_t hidden = op.hidden, head_dim = op.head_dim;
    const int64_t mixed = parameters.rows(kQkv) - 2 * op.groups * head_dim;
    check(kOp, mixed > 0 && mixed % (op.groups * head_dim) == 0, "qkv.weight",
          concat("must have a multiple of ", op.groups * head_dim, " rows, at least ", 3 * op.groups * head_dim),
          parameters.rows(kQkv));
    op.heads = mixed / (op.groups * head_dim);
    op.width = parameters.rows(kUp);
    op.norms[0] = {parameters.need(kNorm1, hidden, 0), parameters.get(kNorm1Bias, hidden, 0)};
    op.norms[1] = {op.parallel ? parameters.get(kNorm2, hidden, 0) : parameters.need(kNorm2, hidden, 0),
                   parameters.get(kNorm2Bias, hidden, 0)};
    op.query_norm = parameters.get(kQueryNorm, head_dim, 0);
    op.key_norm = op.query_norm ? parameters.need(kKeyNorm, head_dim, 0) : nullptr;
    op.qkv = parameters.projection(kQkv, mixed + 2 * op.groups * head_dim, hidden);
    op.out = parameters.projection(kOut, hidden, mixed);
    op.up = parameters.projection(kUp, op.width, hidden);
    op.down = parameters.projection(kDown, hidden, op.width);
    const bool gated = op.activation != BlockActivation::kGelu && op.activation != BlockActivation::kGeluTanh;
    check(kOp, gated == parameters.has(kGate), "gate.weight", "must be given if and only if the activation is gated",
          gated ? "none" : "one");
    if (gated) op.gate = parameters.projection(kGate, op.width, hidden);
}

void check_cache(const Tensor& cache, const char* name, const Tensor& like, int64_t batch, int64_t tokens) {
    check_same_type(kOp, cache, name, like, "stream");
    check_rank(kOp, cache, name, 4, 4);
    check(kOp, cache.is_contiguous(), name, "must be contiguous", "strides of a view");
    check(kOp, cache.size(0) == batch, name, concat("must have the batch size of stream, ", batch), shape_text(cache));
    check(kOp, cache.size(1) >= tokens, name, concat("must have room for ", tokens, " tokens"), shape_text(cache));
}

void set_tables(DecodeBlock& op, const Optional& cos, const Optional& sin) {
    check(kOp, cos.has_value() == sin.has_value(), "cos, sin", "must be given together", "one of them");
    if (!cos) return;
    for (const Tensor* table : {&*cos, &*sin}) {
        check_device(kOp, *table, "cos, sin");
        const int64_t dims = table->dim(), r = table->size(dims - 1);
        const bool fits = table->scalar_type() == ScalarType::Float &&
                          (dims == 2 || (dims == 3 && table->size(0) == op.batch)) && table->size(dims - 2) == op.seq &&
                          r > 0 && r % 2 == 0 && r <= op.head_dim;
        check(kOp, fits, "cos, sin",
              concat("must be fp32 [", op.seq, ", r] or [", op.batch, ", ", op.seq, ", r], r even, <= ", op.head_dim),
              shape_text(*table));
    }
    check_same_shape(kOp, *sin, "sin", *cos, "cos");
    const int64_t r = cos->size(cos->dim() - 1);
    op.tables = {static_cast<const float*>(cos->const_data_ptr()), static_cast<const float*>(sin->const_data_ptr()),
                 cos->dim() == 3 ? op.seq * r : 0, r, false};
}

void set_masks(DecodeBlock& op, const Optional& segment_ids, const Optional& alibi_slopes) {
    if (segment_ids) {
        check_device(kOp, *segment_ids, "segment_ids");
        const bool fits = segment_ids->scalar_type() == ScalarType::Int && segment_ids->dim() == 2 &&
                          segment_ids->size(0) == op.batch && segment_ids->size(1) == op.length + op.seq;
        check(kOp, fits, "segment_ids", concat("must be int32 [", op.batch, ", ", op.length + op.seq, "]"),
              shape_text(*segment_ids));
        op.segments = static_cast<const int32_t*>(segment_ids->const_data_ptr());
    }
    if (alibi_slopes) {
        check_device(kOp, *alibi_slopes, "alibi_slopes");
        const bool fits = alibi_slopes->scalar_type() == ScalarType::Float && alibi_slopes->dim() == 1 &&
                          alibi_slopes->size(0) == op.groups * op.heads;
        check(kOp, fits, "alibi_slopes", concat("must be fp32 [", op.groups * op.heads, "]"),
              shape_text(*alibi_slopes));
        op.slopes = static_cast<const float*>(alibi_slopes->const_data_ptr());
    }
}

std::tuple<Tensor, Tensor> decode_block(Tensor stream, Optional delta, Tensor keys, Tensor values, int64_t length,
                                        Optional cos, Optional sin, Optional segment_ids, Optional alibi_slopes,
                                        std::vector<Optional> parameters, bool rms, bool parallel, double eps,
                                        StringHandle name, double scale, int64_t window, double softcap) {
    const std::string activation = take(name);
    check_float(kOp, stream, "stream");
    check_rank(kOp, stream, "stream", 3, 3);
    check(kOp, length >= 0, "length", "must not be negative", length);
    check(kOp, window >= 0, "window", "must be at least 1", window);
    check(kOp, std::isfinite(scale), "scale", "must be finite", scale);
    check(kOp, std::isfinite(softcap) && softcap >= 0, "softcap", "must be positive and finite", softcap);
    check(kOp, eps >= 0, "eps", "must not be negative", eps);
    stream = neox::contiguous(stream);
    for (Optional* table : {&cos, &sin, &segment_ids, &alibi_slopes}) {
        if (*table) *table = neox::contiguous(**table);
    }
    if (delta) {
        check_same_type(kOp, *delta, "delta", stream, "stream");
        check_same_shape(kOp, *delta, "delta", stream, "stream");
        delta = neox::contiguous(*delta);
    }
    DecodeBlock op = {};
    op.dtype = dtype_of(stream);
    op.batch = stream.size(0), op.seq = stream.size(1), op.hidden = stream.size(2);
    check_cache(keys, "keys", stream, op.batch, length + op.seq);
    check_cache(values, "values", stream, op.batch, length + op.seq);
    check_same_shape(kOp, values, "values", keys, "keys");
    op.groups = keys.size(2), op.head_dim = keys.size(3);
    op.rms = rms, op.parallel = parallel, op.eps = static_cast<float>(eps), op.activation = activation_of(activation);
    set_parameters(op, Parameters(parameters, stream));
    op.keys = keys.mutable_data_ptr(), op.values = values.mutable_data_ptr();
    op.cache_batch_stride = keys.size(1) * op.groups * op.head_dim, op.length = length;
    set_tables(op, cos, sin);
    set_masks(op, segment_ids, alibi_slopes);
    op.scale = static_cast<float>(scale), op.window = window, op.softcap = static_cast<float>(softcap);
    op.stream = stream.const_data_ptr(), op.delta = delta ? delta->const_data_ptr() : nullptr;
    Tensor new_stream = empty(stream, shape_of(stream)), new_delta = empty(stream, shape_of(stream));
    if (stream.numel())
        decode_block_cpu(op, new_stream.mutable_data_ptr(), new_delta.mutable_data_ptr(), torch_parallel());
    return {new_stream, new_delta};
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_FRAGMENT(neox, m) {
    m.def(
        "decode_block(Tensor stream, Tensor? delta, Tensor(a!) keys, Tensor(b!) values, int length, Tensor? cos, "
        "Tensor? sin, Tensor? segment_ids,"
        " Tensor? alibi_slopes, Tensor?[] parameters, bool rms, bool parallel, float eps, str activation, float scale, "
        "int window, float softcap)"
        " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(neox, CPU, m) { m.impl("decode_block", TORCH_BOX(&neox::decode_block)); }
