// y = x W^T + b in bfloat16 with fp32 accumulation, for CPUs whose bf16 matrix products are slower than their fp32 ones: operands are
// widened, torch multiplies them in fp32, results are rounded once. These kernels are what stands around the product:
//
//   widen        fp32 copy of a bf16 matrix, optionally with the sums of its columns (the bias gradient)
//   round_rows   bf16 of an fp32 matrix, optionally plus a bias
//   dot_rows     y = x W^T + b itself for few rows of x, where reading W once is all the work (decoding)
//
// Bytes moved per element: widen 6, round_rows 6. The binding cuts the output channels into slices so that the fp32 sides stay in cache.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"

namespace neox {

// rows of cols elements, stride elements apart.
struct Matrix16 {
    const bf16* data;
    int64_t rows, cols, stride;
};

// to [rows, cols] contiguous.
void widen_cpu(const Matrix16& from, float* to, const Parallel& parallel);

// The same; sums [cols] of each column, rounded once; partial [Blocks(rows).count, cols] scratch.
void widen_and_sum_cpu(const Matrix16& from, float* to, bf16* sums, float* partial, const Parallel& parallel);

// from [rows, cols] contiguous, bias [cols] or null; to has rows `to_stride` apart.
void round_rows_cpu(const float* from, int64_t rows, int64_t cols, const bf16* bias, bf16* to, int64_t to_stride, const Parallel& parallel);

// x [x_rows, weight.cols] contiguous fp32, weight [out, in], bias [out] or null, y [x_rows, out] contiguous.
void dot_rows_cpu(const float* x, int64_t x_rows, const Matrix16& weight, const bf16* bias, bf16* y, const Parallel& parallel);

}  // namespace neox
