#include "ops/gated/gated.h"

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "gated";

Activation activation_of(const std::string& name) {
    check(kOp, name == "silu" || name == "gelu" || name == "relu", "activation",
          "must be \"silu\", \"gelu\" or \"relu\"", name);
    return name == "silu" ? Activation::kSilu : name == "gelu" ? Activation::kGelu : Activation::kRelu;
}

void check_gated(const Tensor& x, const Tensor& gate) {
    check_float(kOp, x, "x");
    check_rank(kOp, x, "x", 1, 64);
    check_same_type(kOp, gate, "gate", x, "x");
    check_same_shape(kOp, gate, "gate", x, "x");
}

Gated describe(const Rows& x, const Rows& gate, Activation activation) {
    return Gated{dtype_of(x.tensor),           activation, x.count, x.size, x.tensor.const_data_ptr(), x.stride,
                 gate.tensor.const_data_ptr(), gate.stride};
}

Tensor gated(Tensor x, Tensor gate, StringHandle name) {
    const Activation activation = activation_of(take(name));
    check_gated(x, gate);
    const Rows x_rows(x), gate_rows(gate);
    const Tensor y = empty(x, shape_of(x));
    NEOX_RUN(gated_forward, x, describe(x_rows, gate_rows, activation), y.mutable_data_ptr());
    return y;
}

// (dx, dgate)
std::tuple<Tensor, Tensor> gated_backward(Tensor dy, Tensor x, Tensor gate, StringHandle name) {
    const Activation activation = activation_of(take(name));
    check_gated(x, gate);
    check_same_type(kOp, dy, "dy", x, "x");
    check_same_shape(kOp, dy, "dy", x, "x");
    const Rows dy_rows(dy), x_rows(x), gate_rows(gate);
    const Tensor dx = empty(x, shape_of(x)), dgate = empty(x, shape_of(x));
    NEOX_RUN(gated_backward, x, describe(x_rows, gate_rows, activation), dy_rows.tensor.const_data_ptr(),
             dy_rows.stride, dx.mutable_data_ptr(), dgate.mutable_data_ptr());
    return {dx, dgate};
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def("gated(Tensor x, Tensor gate, str activation) -> Tensor");
    m.def("gated_backward(Tensor dy, Tensor x, Tensor gate, str activation) -> (Tensor, Tensor)");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("gated", TORCH_BOX(&neox::gated));
    m.impl("gated_backward", TORCH_BOX(&neox::gated_backward));
}
