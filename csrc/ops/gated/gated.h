// y = act(x) gate, where act is silu (SwiGLU), exact gelu (GeGLU) or relu (ReGLU).
//
//   dx = dy gate act'(x),   dgate = dy act(x)
//
// Shapes: all [rows, cols].
//
// Bytes moved per element, times its size: forward 3 (read x, gate; write y), backward 5 (read dy, x, gate; write dx,
// dgate).
//
// Source: Shazeer, arXiv:2002.05202.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

enum class Activation { kSilu, kGelu, kRelu };

struct Gated {
    DType dtype;
    Activation activation;
    int64_t rows, cols;
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    const void* gate;  // [rows, cols], rows gate_stride apart
    int64_t gate_stride;
};

// y [rows, cols] contiguous. The CUDA launchers return null or CUDA's error message.
void gated_forward_cpu(const Gated& in, void* y, const Parallel& parallel);
const char* gated_forward_cuda(const Gated& in, void* y, Stream stream);

// dy [rows, cols], rows dy_stride apart; dx, dgate [rows, cols] contiguous.
void gated_backward_cpu(const Gated& in, const void* dy, int64_t dy_stride, void* dx, void* dgate,
                        const Parallel& parallel);
const char* gated_backward_cuda(const Gated& in, const void* dy, int64_t dy_stride, void* dx, void* dgate,
                                Stream stream);

}  // namespace neox
