#include "ops/linear/linear.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "linear";
constexpr int64_t kSliceElements = 2 << 20;  // elements of the fp32 output of a slice: 8 MiB

void check_bfloat16(const Tensor& tensor, const char* argument) {
    check_device(kOp, tensor, argument);
    check(kOp, tensor.scalar_type() == ScalarType::BFloat16, argument, "must be bfloat16",
          torch::headeronly::toString(tensor.scalar_type()));
}

void check_shapes(const Tensor& x, const Tensor& weight) {
    check_rank(kOp, x, "x", 1, 64);
    check_rank(kOp, weight, "weight", 2, 2);
    const int64_t in = x.size(x.dim() - 1);
    check(kOp, weight.size(1) == in, "weight", concat("must have as many columns as x has channels, ", in),
          shape_text(weight));
}

void check_linear(const Tensor& x, const Tensor& weight) {
    check_bfloat16(x, "x");
    check_bfloat16(weight, "weight");
    check_shapes(x, weight);
}

// The bias as a contiguous tensor.
std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, const Tensor& weight) {
    if (!bias) return bias;
    check_rank(kOp, *bias, "bias", 1, 1);
    check(kOp, bias->size(0) == weight.size(0), "bias",
          concat("must have as many elements as weight has rows, ", weight.size(0)), bias->size(0));
    return neox::contiguous(*bias);
}

Matrix16 matrix(const Rows& rows) { return Matrix16{rows.data<bf16>(), rows.count, rows.size, rows.stride}; }

Matrix16 slice_rows(const Matrix16& from, int64_t begin, int64_t count) {
    return Matrix16{from.data + begin * from.stride, count, from.cols, from.stride};
}

Matrix16 slice_cols(const Matrix16& from, int64_t begin, int64_t count) {
    return Matrix16{from.data + begin, from.rows, count, from.stride};
}

Tensor widened(const Tensor& like, const Matrix16& from) {
    Tensor to = empty(like, {from.rows, from.cols}, ScalarType::Float);
    widen_cpu(from, static_cast<float*>(to.mutable_data_ptr()), torch_parallel());
    return to;
}

// Output channels per slice, such that the fp32 output of `rows` rows stays in cache. A multiple of 64 if there are
// several slices.
int64_t slice_width(int64_t rows, int64_t out) {
    const int64_t width = std::max<int64_t>(kSliceElements / std::max<int64_t>(rows, 1) / 64 * 64, 256);
    return width * 3 / 2 >= out ? out : width;
}

void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

void multiply_and_add(Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

std::vector<int64_t> output_shape(const Tensor& x, int64_t channels) {
    std::vector<int64_t> shape = shape_of(x);
    shape.back() = channels;
    return shape;
}

FewRows few_rows(const Rows& x, const Rows& weight, const std::optional<Tensor>& bias) {
    return FewRows{dtype_of(x.tensor),
                   x.count,
                   x.size,
                   weight.count,
                   x.tensor.const_data_ptr(),
                   x.stride,
                   weight.tensor.const_data_ptr(),
                   weight.stride,
                   bias ? bias->const_data_ptr() : nullptr,
                   nullptr};
}

// x W^T + b for a few rows of x, without a gradient.
Tensor linear_few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias) {
    check_float(kOp, x, "x");
    check_same_type(kOp, weight, "weight", x, "x");
    check_shapes(x, weight);
    if (bias) check_same_type(kOp, *bias, "bias", x, "x");
    bias = checked_bias(bias, weight);
    const Rows x_rows(x), weight_rows(weight);
    Tensor y = empty(x, output_shape(x, weight.size(0)));
    few_rows_cpu(few_rows(x_rows, weight_rows, bias), y.mutable_data_ptr(), torch_parallel());
    return y;
}

Tensor linear_bf16(Tensor x, Tensor weight, std::optional<Tensor> bias) {
    check_linear(x, weight);
    if (bias) check_bfloat16(*bias, "bias");
    bias = checked_bias(bias, weight);
    const Rows x_rows(x), weight_rows(weight);
    const Matrix16 w = matrix(weight_rows);
    Tensor y = empty(x, output_shape(x, w.rows));
    if (x_rows.count <= kFewRows) {
        few_rows_cpu(few_rows(x_rows, weight_rows, bias), y.mutable_data_ptr(), torch_parallel());
        return y;
    }
    const Tensor x32 = widened(x, matrix(x_rows));  // [rows, in]
    bf16* const y_data = static_cast<bf16*>(y.mutable_data_ptr());
    const bf16* const bias_data = bias ? static_cast<const bf16*>(bias->const_data_ptr()) : nullptr;
    const int64_t width = slice_width(x_rows.count, w.rows);
    for (int64_t begin = 0; begin < w.rows; begin += width) {
        const int64_t count = std::min(width, w.rows - begin);
        const Tensor w32 = widened(x, slice_rows(w, begin, count));  // [count, in]
        Tensor y32 = empty(x, {x_rows.count, count}, ScalarType::Float);
        multiply(y32, x32, transposed(w32));
        round_rows_cpu(static_cast<const float*>(y32.const_data_ptr()), x_rows.count, count,
                       bias_data ? bias_data + begin : nullptr, y_data + begin, w.rows, torch_parallel());
    }
    return y;
}

// dy [..., out], x [..., in], weight [out, in] -> (dx, dweight, dbias). Gradients that are not needed are empty
// tensors.
std::tuple<Tensor, Tensor, Tensor> linear_bf16_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx,
                                                        bool need_dweight, bool need_dbias) {
    check_linear(x, weight);
    check_bfloat16(dy, "dy");
    const Rows dy_rows(dy), x_rows(x), weight_rows(weight);
    const Matrix16 dy16 = matrix(dy_rows), w = matrix(weight_rows);
    const int64_t rows = x_rows.count, in = w.cols, out = w.rows;
    check(kOp, dy16.rows == rows && dy16.cols == out, "dy",
          concat("must be the gradient of ", rows, " rows of ", out, " channels"), shape_text(dy));
    const Tensor none = empty(x, {0});
    Tensor dx = need_dx ? empty(x, shape_of(x)) : none;
    Tensor dweight = need_dweight ? empty(x, {out, in}) : none;
    Tensor dbias = need_dbias ? empty(x, {out}) : none;
    const Tensor x32 = need_dweight ? widened(x, matrix(x_rows)) : none;
    Tensor dx32 = need_dx ? empty(x, {rows, in}, ScalarType::Float) : none;
    const int64_t width = slice_width(rows, out);
    Tensor partial = empty(x, {need_dbias ? Blocks(rows).count : 0, std::min(width, out)}, ScalarType::Float);
    for (int64_t begin = 0; begin < out; begin += width) {
        const int64_t count = std::min(width, out - begin);
        const Matrix16 slice = slice_cols(dy16, begin, count);
        Tensor dy32 = empty(x, {rows, count}, ScalarType::Float);
        if (need_dbias) {
            widen_and_sum_cpu(slice, static_cast<float*>(dy32.mutable_data_ptr()),
                              static_cast<bf16*>(dbias.mutable_data_ptr()) + begin,
                              static_cast<float*>(partial.mutable_data_ptr()), torch_parallel());
        } else {
            widen_cpu(slice, static_cast<float*>(dy32.mutable_data_ptr()), torch_parallel());
        }
        if (need_dx) {
            const Tensor w32 = widened(x, slice_rows(w, begin, count));
            begin == 0 ? multiply(dx32, dy32, w32) : multiply_and_add(dx32, dy32, w32);
        }
        if (need_dweight) {
            Tensor dw32 = empty(x, {count, in}, ScalarType::Float);
            multiply(dw32, transposed(dy32), x32);
            round_rows_cpu(static_cast<const float*>(dw32.const_data_ptr()), count, in, nullptr,
                           static_cast<bf16*>(dweight.mutable_data_ptr()) + begin * in, in, torch_parallel());
        }
    }
    if (need_dx)
        round_rows_cpu(static_cast<const float*>(dx32.const_data_ptr()), rows, in, nullptr,
                       static_cast<bf16*>(dx.mutable_data_ptr()), in, torch_parallel());
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_FRAGMENT(neox, m) {
    m.def("linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
    m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
    m.def(
        "linear_bf16_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias) -> "
        "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(neox, CPU, m) {
    m.impl("linear_few_rows", TORCH_BOX(&neox::linear_few_rows));
    m.impl("linear_bf16", TORCH_BOX(&neox::linear_bf16));
    m.impl("linear_bf16_backward", TORCH_BOX(&neox::linear_bf16_backward));
}
