// y = gelu(x + bias), with the exact or the tanh form of gelu (Hendrycks & Gimpel, arXiv:1606.08415).
//
//   exact  gelu(u) = u P(u),                    d gelu/du = P(u) + u p(u)       P, p: cdf and density of the normal distribution
//   tanh   gelu(u) = u s(2 c (u + a u^3)),      s = logistic function, c = sqrt(2 / pi), a = 0.044715
//
// Bytes moved per element of x: forward 2 (read x, write y), backward 3 (read dy and x, write dx), times the size of an element.
// The bias gradient comes out of the same pass.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

struct BiasGelu {
    DType dtype;
    bool tanh;
    int64_t rows, cols;
    const void* x;  // [rows, cols], rows x_stride elements apart
    int64_t x_stride;
    const void* bias;  // [cols], or null
};

// y [rows, cols] contiguous. The CUDA forms return null, or what CUDA said.
void bias_gelu_forward_cpu(const BiasGelu& in, void* y, const Parallel& parallel);
const char* bias_gelu_forward_cuda(const BiasGelu& in, void* y, Stream stream);

// dy [rows, cols], rows dy_stride apart; dx [rows, cols] contiguous; dbias [cols] where there is a bias;
// partial [bias_gelu_partials(rows, cols), cols] fp32 scratch where there is a bias.
void bias_gelu_backward_cpu(const BiasGelu& in, const void* dy, int64_t dy_stride, void* dx, void* dbias, float* partial, const Parallel& parallel);
const char* bias_gelu_backward_cuda(const BiasGelu& in, const void* dy, int64_t dy_stride, void* dx, void* dbias, float* partial, Stream stream);

inline int64_t bias_gelu_partials_cpu(int64_t rows, int64_t) { return Blocks(rows).count; }
int64_t bias_gelu_partials_cuda(int64_t rows, int64_t cols);

}  // namespace neox
