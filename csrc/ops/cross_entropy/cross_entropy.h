// Cross entropy of a softmax whose columns may be sharded over processes (vocabulary parallel), per row with target t,
// V = vocab_size:
//
//   L    = log sum_j e^x[j]
//   loss = (1 - a) (L - x[t]) + a (L - mean_j x[j]) + z L^2                     a: label smoothing, z: z-loss
//   dx   = dloss ((1 + 2 z L) e^(x - L) - a / V - (1 - a) [j = t])
//
// Three passes, so that a process group can combine the statistics in between: the statistics of each row over the
// local columns (max, sum of e^(x - max), x[t] if it is local, sum of x), the loss from the combined statistics, and
// the gradient. If one process has all columns and dloss is known in advance, `fused` does the first and the last pass
// in one.
//
// Shapes: x, dx [rows, cols]; targets, loss, dloss [rows]; four fp32 statistics per row.
//
// Bytes moved per logit, times its size: statistics 1 (read), gradient 2 (read, write; may be in place); fused 2 in
// all.
//
// Source: vocabulary-parallel cross entropy of Megatron-LM (arXiv:1909.08053); z-loss of PaLM (arXiv:2204.02311);
// online max and sum, arXiv:1805.02867.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

struct Logits {
    DType dtype;
    int64_t rows, cols;    // as stored
    int64_t num_columns;   // the real ones, which come first; the others are padding of the vocabulary
    int64_t first_column;  // vocabulary id of column 0
    const void* data;      // rows stride elements apart
    int64_t stride;
    const int64_t* targets;  // [rows], ids in the full vocabulary, or ignore_index
    int64_t ignore_index;
};

struct LossTerms {
    int64_t vocab_size;
    double z_loss, label_smoothing;
};

// [rows] each. `total` is filled only on request (need_total).
struct RowStatistics {
    float *max, *sum, *target, *total;
};

// The CUDA launchers return null or CUDA's error message.
void cross_entropy_statistics_cpu(const Logits& logits, const RowStatistics& out, bool need_total,
                                  const Parallel& parallel);

const char* cross_entropy_statistics_cuda(const Logits& logits, const RowStatistics& out, bool need_total,
                                          Stream stream);

// loss [rows]; 0 if the target is ignore_index.
void cross_entropy_loss_cpu(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms,
                            const RowStatistics& statistics, float* loss, const Parallel& parallel);
const char* cross_entropy_loss_cuda(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms,
                                    const RowStatistics& statistics, float* loss, Stream stream);

// dloss [rows]; dlogits [rows, cols], rows dstride apart, may alias the logits. Zero in padding columns and ignored
// rows.
void cross_entropy_backward_cpu(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics,
                                const float* dloss, void* dlogits, int64_t dstride, const Parallel& parallel);
const char* cross_entropy_backward_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics,
                                        const float* dloss, void* dlogits, int64_t dstride, Stream stream);

// Statistics and gradient in one pass over the logits, which have all columns of the vocabulary, for one dloss of all
// rows that is known in advance. dlogits as in the backward.
void cross_entropy_fused_cpu(const Logits& logits, const LossTerms& terms, const RowStatistics& out, float dloss,
                             void* dlogits, int64_t dstride, const Parallel& parallel);
const char* cross_entropy_fused_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& out,
                                     float dloss, void* dlogits, int64_t dstride, Stream stream);

// A gradient [rows, cols], rows `stride` apart, computed for one dloss of all rows.
struct FusedGradient {
    DType dtype;
    int64_t rows, cols;
    void* data;
    int64_t stride;
    float made_for;
};

// Multiplies rows whose dloss [rows] differs from made_for by dloss / made_for. Other rows are not accessed.
void cross_entropy_rescale_cpu(const FusedGradient& gradient, const float* dloss, const Parallel& parallel);
const char* cross_entropy_rescale_cuda(const FusedGradient& gradient, const float* dloss, Stream stream);

}  // namespace neox
