#include "ops/bias_gelu/bias_gelu.h"

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "bias_gelu";

void check_bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, const std::string& approximate) {
    check_float(kOp, x, "x");
    check_rank(kOp, x, "x", 1, 64);
    if (bias) {
        check_same_type(kOp, *bias, "bias", x, "x");
        check_last_dim(kOp, *bias, "bias", x, "x");
    }
    check(kOp, approximate == "none" || approximate == "tanh", "approximate", "must be \"none\" or \"tanh\"",
          approximate);
}

BiasGelu describe(const Rows& x, const std::optional<Tensor>& bias, const std::string& approximate) {
    return BiasGelu{dtype_of(x.tensor),
                    approximate == "tanh",
                    x.count,
                    x.size,
                    x.tensor.const_data_ptr(),
                    x.stride,
                    bias ? bias->const_data_ptr() : nullptr};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(contiguous(*tensor)) : std::nullopt;
}

Tensor bias_gelu(Tensor x, std::optional<Tensor> bias, StringHandle form) {
    const std::string approximate = take(form);
    check_bias_gelu(x, bias, approximate);
    bias = contiguous(bias);
    const Rows rows(x);
    Tensor y = empty(x, shape_of(x));
    NEOX_RUN(bias_gelu_forward, x, describe(rows, bias, approximate), y.mutable_data_ptr());
    return y;
}

// (dx, dbias). dbias is an empty tensor if there is no bias.
std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, Tensor x, std::optional<Tensor> bias, StringHandle form) {
    const std::string approximate = take(form);
    check_bias_gelu(x, bias, approximate);
    check_same_type(kOp, dy, "dy", x, "x");
    check_same_shape(kOp, dy, "dy", x, "x");
    bias = contiguous(bias);
    const Rows rows(x), dy_rows(dy);
    Tensor dx = empty(x, shape_of(x));
    Tensor dbias = empty(x, {bias ? rows.size : 0});
    Tensor partial =
        empty(x, {bias ? NEOX_QUERY(bias_gelu_partials, x, rows.count, rows.size) : 0, rows.size}, ScalarType::Float);
    NEOX_RUN(bias_gelu_backward, x, describe(rows, bias, approximate), dy_rows.tensor.const_data_ptr(), dy_rows.stride,
             dx.mutable_data_ptr(), dbias.mutable_data_ptr(), static_cast<float*>(partial.mutable_data_ptr()));
    return {dx, dbias};
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def("bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor");
    m.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("bias_gelu", TORCH_BOX(&neox::bias_gelu));
    m.impl("bias_gelu_backward", TORCH_BOX(&neox::bias_gelu_backward));
}
