// y = softmax(scale x) along the last dimension over the columns visible to a row:
//
//   y[j] = e^(scale x[j] - m) / sum over visible k of e^(scale x[k] - m),   m = max over visible k of scale x[k]
//   dx   = scale y (dy - sum_j y[j] dy[j])
//
//   masked   mask nonzero: the column is hidden
//   causal   row i of s sees columns j <= i + t - s; the last row is aligned with the last column
//
// Hidden columns are 0. A row without visible columns is 0.
//
// Shapes: x, y [b, n, s, t], mask [b or 1, 1, s, t]. Any number of columns.
//
// Bytes moved per element, times its size: forward 2 (read x, write y) and 1 byte of mask; backward 3 (read dy, y;
// write dx). Causal rows read and compute only visible columns. Rows longer than the CUDA kernels hold in registers
// (16,384 columns, 4,096 if misaligned) are read twice.
//
// Source: the fused softmax of Megatron-LM (scaled_masked_softmax, scaled_upper_triang_masked_softmax;
// arXiv:1909.08053). Longer rows: online softmax, arXiv:1805.02867.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

struct ScoreRows {
    DType dtype;
    int64_t batches, heads, seq, cols;  // rows = batches * heads * seq
    double scale;
    const uint8_t* mask;  // [mask_batches, seq, cols] contiguous, or null
    int64_t mask_batches;
    bool causal;
};

// x: rows x_stride elements apart; y [rows, cols] contiguous. The CUDA launchers return null or CUDA's error message.
void scaled_masked_softmax_forward_cpu(const ScoreRows& rows, const void* x, int64_t x_stride, void* y,
                                       const Parallel& parallel);
const char* scaled_masked_softmax_forward_cuda(const ScoreRows& rows, const void* x, int64_t x_stride, void* y,
                                               Stream stream);

// dx [rows, cols] contiguous. The mask is not read, because y is 0 in hidden columns.
void scaled_masked_softmax_backward_cpu(const ScoreRows& rows, const void* dy, int64_t dy_stride, const void* y,
                                        int64_t y_stride, void* dx, const Parallel& parallel);
const char* scaled_masked_softmax_backward_cuda(const ScoreRows& rows, const void* dy, int64_t dy_stride, const void* y,
                                                int64_t y_stride, void* dx, Stream stream);

}  // namespace neox
