// y = x W^T + b in bfloat16 with fp32 accumulation, for CPUs whose bf16 matrix products are slower than their fp32 ones: operands are
// widened, torch multiplies them in fp32, results are rounded once. These kernels are what stands around the product:
//
//   widen        fp32 copy of a bf16 matrix, optionally with the sums of its columns (the bias gradient)
//   round_rows   bf16 of an fp32 matrix, optionally plus a bias
//   few_rows     y = x W^T + b itself for few rows of x in fp32 or bf16, where reading W once is all the work (decoding)
//
// Bytes moved per element: widen 6, round_rows 6; few_rows: W's. The binding cuts the output channels into slices so that the fp32 sides stay in cache.
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

constexpr int64_t kFewRows = 8;  // up to here a product is bound by reading the weight

struct FewRows {
    DType dtype;
    int64_t rows, in, out;  // rows: any number
    const void* x;          // [rows, in], rows x_stride apart
    int64_t x_stride;
    const void* weight;  // [out, in], rows weight_stride apart
    int64_t weight_stride;
    const void* bias;   // [out], or null
    const void* added;  // [rows, out] contiguous, added with the bias; or null
};

// y [rows, out] contiguous, rounded once. A row's bits depend neither on the other rows nor on the number of threads.
void few_rows_cpu(const FewRows& op, void* y, const Parallel& parallel);

}  // namespace neox
