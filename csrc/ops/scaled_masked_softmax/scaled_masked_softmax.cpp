#include "ops/scaled_masked_softmax/scaled_masked_softmax.h"

#include "common/binding.h"

namespace neox {
namespace {

// Describes x [..., s, t], where `heads` heads share a batch of the mask.
ScoreRows describe(const Tensor& x, double scale) {
    const int64_t dims = x.dim();
    int64_t outer = 1;
    for (int64_t i = 0; i + 2 < dims; ++i) outer *= x.size(i);
    const int64_t heads = dims == 4 ? x.size(1) : 1;
    return ScoreRows{
        dtype_of(x), heads ? outer / heads : 0, heads, x.size(dims - 2), x.size(dims - 1), scale, nullptr, 0, false};
}

Tensor run_forward(const ScoreRows& scores, const Tensor& x) {
    const Rows rows(x);
    Tensor y = empty(x, shape_of(x));
    NEOX_RUN(scaled_masked_softmax_forward, x, scores, rows.tensor.const_data_ptr(), rows.stride, y.mutable_data_ptr());
    return y;
}

Tensor scaled_masked_softmax(Tensor x, Tensor mask, double scale) {
    const char* const op = "scaled_masked_softmax";
    check_float(op, x, "x");
    check_rank(op, x, "x", 4, 4);
    check_device(op, mask, "mask");
    check(op, mask.scalar_type() == ScalarType::Bool, "mask", "must be bool, True hides",
          torch::headeronly::toString(mask.scalar_type()));
    check_rank(op, mask, "mask", 4, 4);
    const bool fits = (mask.size(0) == 1 || mask.size(0) == x.size(0)) && mask.size(1) == 1 &&
                      mask.size(2) == x.size(2) && mask.size(3) == x.size(3);
    check(op, fits, "mask", concat("must be [", x.size(0), " or 1, 1, ", x.size(2), ", ", x.size(3), "]"),
          shape_text(mask));
    mask = neox::contiguous(mask);
    ScoreRows scores = describe(x, scale);
    scores.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    scores.mask_batches = mask.size(0);
    return run_forward(scores, x);
}

Tensor scaled_causal_softmax(Tensor x, double scale) {
    const char* const op = "scaled_causal_softmax";
    check_float(op, x, "x");
    check_rank(op, x, "x", 2, 64);
    ScoreRows scores = describe(x, scale);
    scores.causal = true;
    return run_forward(scores, x);
}

// The backward of both operators. y is the output of the forward.
Tensor scaled_softmax_backward(Tensor dy, Tensor y, double scale, bool causal) {
    const char* const op = "scaled_softmax_backward";
    check_float(op, y, "y");
    check_rank(op, y, "y", 2, 64);
    check_same_type(op, dy, "dy", y, "y");
    check_same_shape(op, dy, "dy", y, "y");
    const Rows dy_rows(dy), y_rows(y);
    ScoreRows scores = describe(y, scale);
    scores.causal = causal;
    Tensor dx = empty(y, shape_of(y));
    NEOX_RUN(scaled_masked_softmax_backward, y, scores, dy_rows.tensor.const_data_ptr(), dy_rows.stride,
             y_rows.tensor.const_data_ptr(), y_rows.stride, dx.mutable_data_ptr());
    return dx;
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def("scaled_masked_softmax(Tensor x, Tensor mask, float scale) -> Tensor");
    m.def("scaled_causal_softmax(Tensor x, float scale) -> Tensor");
    m.def("scaled_softmax_backward(Tensor dy, Tensor y, float scale, bool causal) -> Tensor");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("scaled_masked_softmax", TORCH_BOX(&neox::scaled_masked_softmax));
    m.impl("scaled_causal_softmax", TORCH_BOX(&neox::scaled_causal_softmax));
    m.impl("scaled_softmax_backward", TORCH_BOX(&neox::scaled_softmax_backward));
}
