// y = residual + dropout(x + bias), with dropout scaled by 1 / (1 - p) in training.
//
//   dx = dropout(dy) with the same mask,   dbias = sum over rows of dx,   dresidual = dy
//
// Element (row, column) draws word w mod 4 of philox(seed[0], w / 4, seed[1]), w = row * (cols rounded up to a multiple
// of 4) + column. The mask is a pure function of seed and position: it is not stored, and the backward recomputes it.
//
// Shapes: x, residual, y, dy, dx [rows, cols]; bias, dbias [cols]; seed [2].
//
// Bytes moved per element, times its size: forward 3 (read x, residual; write y), backward 2 (read dy, write dx), or 1
// without dropout.
//
// Source: Srivastava et al., JMLR 15, 2014; the fusion is that of Megatron-LM (arXiv:1909.08053).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

struct Dropout {
    const int64_t* seed;  // [2], in host memory on every device; null: no dropout
    double p;             // 0 <= p <= 1
};

struct BiasDropoutAdd {
    DType dtype;
    int64_t rows, cols;
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    const void* bias;      // [cols], or null
    const void* residual;  // [rows, cols], rows residual_stride apart
    int64_t residual_stride;
    Dropout dropout;
};

struct BiasDropoutAddBackward {
    DType dtype;
    int64_t rows, cols;
    const void* dy;  // [rows, cols], rows dy_stride apart
    int64_t dy_stride;
    Dropout dropout;
    void* dx;        // [rows, cols] contiguous; null without dropout, where dx equals dy
    void* dbias;     // [cols], or null
    float* partial;  // [bias_dropout_add_partials(rows, cols), cols] fp32 scratch, if there is dbias
};

// y [rows, cols] contiguous. The CUDA launchers return null or CUDA's error message.
void bias_dropout_add_forward_cpu(const BiasDropoutAdd& op, void* y, const Parallel& parallel);
const char* bias_dropout_add_forward_cuda(const BiasDropoutAdd& op, void* y, Stream stream);

void bias_dropout_add_backward_cpu(const BiasDropoutAddBackward& op, const Parallel& parallel);
const char* bias_dropout_add_backward_cuda(const BiasDropoutAddBackward& op, Stream stream);

inline int64_t bias_dropout_add_partials_cpu(int64_t rows, int64_t) { return Blocks(rows).count; }
int64_t bias_dropout_add_partials_cuda(int64_t rows, int64_t cols);

}  // namespace neox
