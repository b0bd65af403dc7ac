// y = gelu(x + bias), with the exact or the tanh form of gelu.
//
//   exact  gelu(u) = u P(u),                    gelu'(u) = P(u) + u p(u)    P, p: normal cdf and density
//   tanh   gelu(u) = u s(2 c (u + a u^3)),      s = logistic function, c = sqrt(2 / pi), a = 0.044715
//
//   dx = dy gelu'(x + bias),   dbias = sum over rows of dx, computed in the same pass
//
// Shapes: x, y, dy, dx [rows, cols]; bias, dbias [cols].
//
// Bytes moved per element, times its size: forward 2 (read x, write y), backward 3 (read dy and x, write dx).
//
// Source: Hendrycks & Gimpel, arXiv:1606.08415; the fusion with the bias is that of Megatron-LM (arXiv:1909.08053).
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

// y [rows, cols] contiguous. The CUDA launchers return null or CUDA's error message.
void bias_gelu_forward_cpu(const BiasGelu& in, void* y, const Parallel& parallel);
const char* bias_gelu_forward_cuda(const BiasGelu& in, void* y, Stream stream);

// dy [rows, cols], rows dy_stride apart; dx [rows, cols] contiguous. With a bias: dbias [cols], and fp32 scratch
// partial [bias_gelu_partials(rows, cols), cols].
void bias_gelu_backward_cpu(const BiasGelu& in, const void* dy, int64_t dy_stride, void* dx, void* dbias,
                            float* partial, const Parallel& parallel);
const char* bias_gelu_backward_cuda(const BiasGelu& in, const void* dy, int64_t dy_stride, void* dx, void* dbias,
                                    float* partial, Stream stream);

inline int64_t bias_gelu_partials_cpu(int64_t rows, int64_t) { return Blocks(rows).count; }
int64_t bias_gelu_partials_cuda(int64_t rows, int64_t cols);

}  // namespace neox
