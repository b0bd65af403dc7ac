// y = x W^T + b in bfloat16 with fp32 accumulation, for CPUs whose bf16 matrix products are slower than fp32 ones.
// Operands are widened, torch multiplies them in fp32, and the results are rounded once.
//
//   dx = dy W      dW = dy^T x      db = sum over rows of dy
//
// Shapes: x [..., in], W [out, in], b [out], y [..., out]. The kernels here surround the product:
//
//   widen        fp32 copy of a bf16 matrix, optionally with the sums of its columns (db)
//   round_rows   bf16 copy of an fp32 matrix, optionally plus a bias
//   few_rows     y = x W^T + b itself for a few rows of x in fp32 or bf16, as in decoding, where reading W dominates
//
// Bytes moved: widen and round_rows 6 per element (2 in bf16, 4 in fp32); few_rows those of W. The binding slices the
// output channels so that the fp32 matrices stay in cache.
//
// Source: PyTorch's torch.nn.functional.linear; one rounding of an fp32 sum, as in BLAS bf16 products with fp32
// accumulation (sbgemm).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"

namespace neox {

// `rows` rows of `cols` elements, `stride` elements apart.
struct Matrix16 {
    const bf16* data;
    int64_t rows, cols, stride;
};

// Writes to [rows, cols], contiguous.
void widen_cpu(const Matrix16& from, float* to, const Parallel& parallel);

// The same, and the sum of each column, rounded once, to sums [cols]. partial: scratch [Blocks(rows).count, cols].
void widen_and_sum_cpu(const Matrix16& from, float* to, bf16* sums, float* partial, const Parallel& parallel);

// from [rows, cols] contiguous; bias [cols] or null; the rows of `to` are `to_stride` elements apart.
void round_rows_cpu(const float* from, int64_t rows, int64_t cols, const bf16* bias, bf16* to, int64_t to_stride,
                    const Parallel& parallel);

constexpr int64_t kFewRows = 8;  // up to this many rows, a product is bound by reading the weight

struct FewRows {
    DType dtype;
    int64_t rows, in, out;
    const void* x;  // [rows, in], rows x_stride apart
    int64_t x_stride;
    const void* weight;  // [out, in], rows weight_stride apart
    int64_t weight_stride;
    const void* bias;   // [out], or null
    const void* added;  // [rows, out] contiguous, added together with the bias; or null
};

// y [rows, out] contiguous, rounded once. The bits of a row depend neither on other rows nor on the number of threads.
void few_rows_cpu(const FewRows& op, void* y, const Parallel& parallel);

}  // namespace neox
