#include "ops/norm/norm.h"

#include "common/binding.h"

namespace neox {
namespace {

using Optional = std::optional<Tensor>;

void check_parameter(const char* op, const Optional& parameter, const char* argument, const Tensor& x) {
    if (!parameter) return;
    check_same_type(op, *parameter, argument, x, "x");
    check_last_dim(op, *parameter, argument, x, "x");
}

void check_like_x(const char* op, const Optional& tensor, const char* argument, const Tensor& x) {
    if (!tensor) return;
    check_same_type(op, *tensor, argument, x, "x");
    check_same_shape(op, *tensor, argument, x, "x");
}

// Name in error messages: the public function that takes these arguments.
const char* name_of(bool rms, bool dual) {
    return dual ? (rms ? "dual_rms_norm" : "dual_layer_norm") : (rms ? "rms_norm" : "layer_norm");
}

void check_norm(const Tensor& x, const Optional& residual, const Tensor& weight, const Optional& bias,
                const Optional& weight2, const Optional& bias2, double eps, bool rms) {
    const char* const op = name_of(rms, weight2.has_value());
    check_float(op, x, "x");
    check_rank(op, x, "x", 1, 64);
    check(op, x.size(x.dim() - 1) > 0, "x", "must not have an empty last dimension", shape_text(x));
    check_like_x(op, residual, "residual", x);
    check_parameter(op, weight, weight2 ? "weight1" : "weight", x);
    check_parameter(op, bias, weight2 ? "bias1" : "bias", x);
    check_parameter(op, weight2, "weight2", x);
    check_parameter(op, bias2, "bias2", x);
    check(op, eps >= 0, "eps", "must not be negative or NaN", eps);
}

Optional contiguous(const Optional& tensor) { return tensor ? Optional(contiguous(*tensor)) : std::nullopt; }
const void* pointer(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
Tensor nothing(const Tensor& like) { return empty(like, {0}); }

// (y1, y2, sum, mean, rstd). y2 needs weight2, sum a residual, mean a layer norm; otherwise they are empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm(Tensor x, Optional residual, Tensor weight, Optional bias,
                                                        Optional weight2, Optional bias2, double eps, bool rms) {
    check_norm(x, residual, weight, bias, weight2, bias2, eps, rms);
    const Rows rows(x), residual_rows(residual.value_or(x));
    weight = contiguous(weight);
    bias = contiguous(bias), weight2 = contiguous(weight2), bias2 = contiguous(bias2);
    const auto shape = shape_of(x);
    const Tensor y1 = empty(x, shape);
    const Tensor y2 = weight2 ? empty(x, shape) : nothing(x);
    const Tensor sum = residual ? empty(x, shape) : nothing(x);
    const Tensor mean = empty(x, {rms ? 0 : rows.count}, ScalarType::Float);
    const Tensor rstd = empty(x, {rows.count}, ScalarType::Float);
    NormForward op = {};
    op.dtype = dtype_of(x);
    op.rms = rms;
    op.outputs = weight2 ? 2 : 1;
    op.rows = rows.count, op.cols = rows.size;
    op.eps = static_cast<float>(eps);
    op.x = rows.tensor.const_data_ptr(), op.x_stride = rows.stride;
    op.residual = residual ? residual_rows.tensor.const_data_ptr() : nullptr, op.residual_stride = residual_rows.stride;
    op.parameters[0] = {weight.const_data_ptr(), pointer(bias)};
    op.parameters[1] = {pointer(weight2), pointer(bias2)};
    op.y[0] = y1.mutable_data_ptr(), op.y[1] = y2.mutable_data_ptr();
    op.sum = sum.mutable_data_ptr();
    op.mean = static_cast<float*>(mean.mutable_data_ptr()), op.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    NEOX_RUN(norm_forward, x, op);
    return {y1, y2, sum, mean, rstd};
}

// (ds, dweight1, dbias1, dweight2, dbias2). Gradients of absent parameters are empty tensors. s is x, or the sum if
// there was a residual.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(Tensor dy, Optional dy2, Optional dsum, Tensor s,
                                                                 Tensor mean, Tensor rstd, Tensor weight, bool has_bias,
                                                                 Optional weight2, bool has_bias2, bool rms) {
    const char* const name = name_of(rms, weight2.has_value());
    check_norm(s, std::nullopt, weight, std::nullopt, weight2, std::nullopt, 0.0, rms);
    check_like_x(name, dy, weight2 ? "dy1" : "dy", s);
    check(name, dy2.has_value() == weight2.has_value(), "dy2", "must come with weight2",
          dy2 ? "dy2 alone" : "weight2 alone");
    check_like_x(name, dy2, "dy2", s);
    check_like_x(name, dsum, "dsum", s);
    const Rows rows(s), dy_rows(dy), dy2_rows(dy2.value_or(dy)), dsum_rows(dsum.value_or(dy));
    check(name, mean.numel() == (rms ? 0 : rows.count) && rstd.numel() == rows.count, "mean, rstd",
          "must come from the forward", concat(shape_text(mean), ", ", shape_text(rstd)));
    weight = contiguous(weight), weight2 = contiguous(weight2);
    const int outputs = weight2 ? 2 : 1;
    const Tensor ds = empty(s, shape_of(s));
    const Tensor dweight = empty(s, {rows.size}), dbias = empty(s, {has_bias ? rows.size : 0});
    const Tensor dweight2 = empty(s, {weight2 ? rows.size : 0}), dbias2 = empty(s, {has_bias2 ? rows.size : 0});
    NormBackward op = {};
    op.dtype = dtype_of(s);
    op.rms = rms;
    op.outputs = outputs;
    op.rows = rows.count, op.cols = rows.size;
    op.s = rows.tensor.const_data_ptr(), op.s_stride = rows.stride;
    op.mean = static_cast<const float*>(mean.const_data_ptr()),
    op.rstd = static_cast<const float*>(rstd.const_data_ptr());
    op.weight[0] = weight.const_data_ptr(), op.weight[1] = pointer(weight2);
    op.dy[0] = dy_rows.tensor.const_data_ptr(), op.dy_stride[0] = dy_rows.stride;
    op.dy[1] = dy2_rows.tensor.const_data_ptr(), op.dy_stride[1] = dy2_rows.stride;
    op.dsum = dsum ? dsum_rows.tensor.const_data_ptr() : nullptr, op.dsum_stride = dsum_rows.stride;
    op.ds = ds.mutable_data_ptr();
    op.dweight[0] = dweight.mutable_data_ptr(), op.dweight[1] = dweight2.mutable_data_ptr();
    op.dbias[0] = has_bias ? dbias.mutable_data_ptr() : nullptr,
    op.dbias[1] = has_bias2 ? dbias2.mutable_data_ptr() : nullptr;
    const Tensor partial = empty(s, {2 * outputs, NEOX_QUERY(norm_partials, s, op), rows.size}, ScalarType::Float);
    op.partial = static_cast<float*>(partial.mutable_data_ptr());
    NEOX_RUN(norm_backward, s, op);
    return {ds, dweight, dbias, dweight2, dbias2};
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def(
        "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? weight2, Tensor? bias2, float eps, bool "
        "rms)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "norm_backward(Tensor dy, Tensor? dy2, Tensor? dsum, Tensor s, Tensor mean, Tensor rstd, Tensor weight, bool "
        "has_bias, Tensor? weight2, bool has_bias2,"
        " bool rms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("norm", TORCH_BOX(&neox::norm));
    m.impl("norm_backward", TORCH_BOX(&neox::norm_backward));
}
