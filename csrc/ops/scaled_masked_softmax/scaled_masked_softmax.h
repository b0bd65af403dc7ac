// y = softmax(scale x) along the last dimension over the columns that a row may see; hidden columns are 0, and so is a row that sees none.
//
//   masked   mask [b or 1, 1, s, t], nonzero hides a column
//   causal   row i of s sees the columns j <= i + t - s: the last row is aligned with the last column
//   dx = scale y (dy - sum_j y[j] dy[j])
//
// Any number of columns. Elements moved per element: forward 2 (x, y) and a byte of mask, backward 3 (dy, y, dx); causal rows read and
// compute only what they see. Rows longer than what the CUDA kernels hold in registers (16,384 columns, or 4,096 misaligned ones) are read twice.
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

// x: rows x_stride elements apart; y [rows, cols] contiguous. The CUDA forms return null, or what CUDA said.
void scaled_masked_softmax_forward_cpu(const ScoreRows& rows, const void* x, int64_t x_stride, void* y, const Parallel& parallel);
const char* scaled_masked_softmax_forward_cuda(const ScoreRows& rows, const void* x, int64_t x_stride, void* y, Stream stream);

// dx [rows, cols] contiguous. The mask is not read: y is 0 where it hides.
void scaled_masked_softmax_backward_cpu(const ScoreRows& rows, const void* dy, int64_t dy_stride, const void* y, int64_t y_stride, void* dx,
                                        const Parallel& parallel);
const char* scaled_masked_softmax_backward_cuda(const ScoreRows& rows, const void* dy, int64_t dy_stride, const void* y, int64_t y_stride, void* dx,
                                                Stream stream);

}  // namespace neox
