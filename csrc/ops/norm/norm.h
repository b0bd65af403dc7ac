// Layer norm and RMS norm over the last dimension, with one or two sets of parameters on the same normalised rows (the
// parallel residual of GPT-NeoX normalises one x for attention and for the MLP).
//
//   s = x + residual, or x                       rounded to the element type, as if added by a separate operator
//   layer  n = (s - mean s) r,  r = 1 / sqrt(mean (s - mean s)^2 + eps)
//   rms    n = s r,             r = 1 / sqrt(mean s^2 + eps)
//   y_k = n w_k + b_k
//
//   g = sum_k dy_k w_k,   ds = dsum + r (g - mean g - n mean(g n))               rms: without mean g
//   dw_k = sum over rows of dy_k n,   db_k = sum over rows of dy_k
//
// Shapes: x, residual, s, y, ds [rows, cols]; w, b [cols]; mean and rstd [rows] in fp32.
//
// Bytes moved per element, times its size: forward 2 (read x, write y), +2 with a residual (read it, write s), +1 with
// a second output; backward 3 (read dy, s; write ds), +1 with dsum, +1 with a second output. A row is read from memory
// once.
//
// Source: Ba et al., arXiv:1607.06450 (layer norm); Zhang & Sennrich, arXiv:1910.07467 (RMS norm).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

struct NormParameters {
    const void* weight;  // [cols]
    const void* bias;    // [cols], or null
};

struct NormForward {
    DType dtype;
    bool rms;
    int outputs;  // 1 or 2
    int64_t rows, cols;
    float eps;
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    const void* residual;  // as x, rows residual_stride apart; or null
    int64_t residual_stride;
    NormParameters parameters[2];
    void* y[2];   // [rows, cols]
    void* sum;    // [rows, cols]; written if there is a residual
    float* mean;  // [rows]; not written by rms
    float* rstd;  // [rows]
};

struct NormBackward {
    DType dtype;
    bool rms;
    int outputs;
    int64_t rows, cols;
    const void* s;  // [rows, cols], rows s_stride apart: x, or the sum if there was a residual
    int64_t s_stride;
    const float* mean;  // [rows]
    const float* rstd;  // [rows]
    const void* weight[2];
    const void* dy[2];  // [rows, cols], rows dy_stride apart
    int64_t dy_stride[2];
    const void* dsum;  // as dy, or null
    int64_t dsum_stride;
    void* ds;          // [rows, cols]
    void* dweight[2];  // [cols]
    void* dbias[2];    // [cols], or null
    float* partial;    // [2 outputs, norm_partials(op), cols] scratch
};

// The CUDA launchers return null or CUDA's error message.
void norm_forward_cpu(const NormForward& op, const Parallel& parallel);
const char* norm_forward_cuda(const NormForward& op, Stream stream);
void norm_backward_cpu(const NormBackward& op, const Parallel& parallel);
const char* norm_backward_cuda(const NormBackward& op, Stream stream);

// Rows of each matrix of partial. Depends on the shape, the dtype and the requested gradients only.
inline int64_t norm_partials_cpu(const NormBackward& op) { return Blocks(op.rows).count; }
int64_t norm_partials_cuda(const NormBackward& op);

}  // namespace neox
