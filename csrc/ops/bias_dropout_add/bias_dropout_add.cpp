#include "ops/bias_dropout_add/bias_dropout_add.h"

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "bias_dropout_add";

void check_dropout(const std::optional<Tensor>& seed, double p) {
    check(kOp, p >= 0 && p <= 1, "p", "must be from 0 to 1", p);
    if (!seed) return;
    check(kOp, seed->is_cpu(), "seed", "must be on the CPU", "a tensor of another device");
    const bool ok = seed->scalar_type() == ScalarType::Long && seed->dim() == 1 && seed->size(0) == 2;
    check(kOp, ok, "seed", "must be int64 [2]",
          concat(torch::headeronly::toString(seed->scalar_type()), " ", shape_text(*seed)));
}

void check_bias_dropout_add(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
                            const std::optional<Tensor>& seed, double p) {
    check_float(kOp, x, "x");
    check_rank(kOp, x, "x", 1, 64);
    if (bias) {
        check_same_type(kOp, *bias, "bias", x, "x");
        check_last_dim(kOp, *bias, "bias", x, "x");
    }
    check_same_type(kOp, residual, "residual", x, "x");
    check_same_shape(kOp, residual, "residual", x, "x");
    check_dropout(seed, p);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(contiguous(*tensor)) : std::nullopt;
}

Dropout describe(const std::optional<Tensor>& seed, double p) {
    return Dropout{seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, p};
}

Tensor bias_dropout_add(Tensor x, std::optional<Tensor> bias, Tensor residual, std::optional<Tensor> seed, double p) {
    check_bias_dropout_add(x, bias, residual, seed, p);
    bias = contiguous(bias);
    seed = contiguous(seed);
    const Rows rows(x), residual_rows(residual);
    const Tensor y = empty(x, shape_of(x));
    const BiasDropoutAdd op = {dtype_of(x),
                               rows.count,
                               rows.size,
                               rows.tensor.const_data_ptr(),
                               rows.stride,
                               bias ? bias->const_data_ptr() : nullptr,
                               residual_rows.tensor.const_data_ptr(),
                               residual_rows.stride,
                               describe(seed, p)};
    NEOX_RUN(bias_dropout_add_forward, x, op, y.mutable_data_ptr());
    return y;
}

// (dx, dbias). Without a seed dx equals dy and is an empty tensor here; without a bias so is dbias.
std::tuple<Tensor, Tensor> bias_dropout_add_backward(Tensor dy, std::optional<Tensor> seed, double p, bool has_bias) {
    check_float(kOp, dy, "dy");
    check_rank(kOp, dy, "dy", 1, 64);
    check_dropout(seed, p);
    seed = contiguous(seed);
    const Rows rows(dy);
    const Tensor dx = empty(dy, seed ? shape_of(dy) : std::vector<int64_t>{0});
    const Tensor dbias = empty(dy, {has_bias ? rows.size : 0});
    const Tensor partial =
        empty(dy, {has_bias ? NEOX_QUERY(bias_dropout_add_partials, dy, rows.count, rows.size) : 0, rows.size},
              ScalarType::Float);
    const BiasDropoutAddBackward op = {dtype_of(dy),
                                       rows.count,
                                       rows.size,
                                       rows.tensor.const_data_ptr(),
                                       rows.stride,
                                       describe(seed, p),
                                       seed ? dx.mutable_data_ptr() : nullptr,
                                       has_bias ? dbias.mutable_data_ptr() : nullptr,
                                       static_cast<float*>(partial.mutable_data_ptr())};
    NEOX_RUN(bias_dropout_add_backward, dy, op);
    return {dx, dbias};
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def("bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor? seed, float p) -> Tensor");
    m.def("bias_dropout_add_backward(Tensor dy, Tensor? seed, float p, bool has_bias) -> (Tensor, Tensor)");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("bias_dropout_add", TORCH_BOX(&neox::bias_dropout_add));
    m.impl("bias_dropout_add_backward", TORCH_BOX(&neox::bias_dropout_add_backward));
}
