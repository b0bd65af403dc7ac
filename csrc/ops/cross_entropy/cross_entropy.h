// Cross entropy of a softmax over columns that may be spread over several processes, per row with target t, V = vocab_size:
//
//   L    = log sum_j e^x[j]
//   loss = (1 - a) (L - x[t]) + a (L - mean_j x[j]) + z L^2                     a: label smoothing, z: z-loss (PaLM, arXiv:2204.02311)
//   dx   = dloss ((1 + 2 z L) e^(x - L) - a / V - (1 - a) [j = t])
//
// Three passes, so that a process group can combine the middle: statistics of each row of the local columns (max, sum of e^(x - max),
// x[t] if it is local, sum of x), then the loss from the combined statistics, then the gradient. Bytes moved per logit: statistics 1 read,
// gradient 1 read and 1 write, which may be in place: no form that waits for the group, or for a dloss that nobody knows, does with less.
// Where one process has all columns and dloss is known ahead, `fused` takes the first and the last pass in one: 1 read and 1 write in all.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

struct Logits {
    DType dtype;
    int64_t rows, cols;    // as stored
    int64_t num_columns;   // the first of them that are real; the rest is padding of the vocabulary
    int64_t first_column;  // id of column 0 in the whole vocabulary
    const void* data;      // rows stride elements apart
    int64_t stride;
    const int64_t* targets;  // [rows], ids in the whole vocabulary, or ignore_index
    int64_t ignore_index;
};

struct LossTerms {
    int64_t vocab_size;
    double z_loss, label_smoothing;
};

// [rows] each. `total` is only filled where it is asked for.
struct RowStatistics {
    float *max, *sum, *target, *total;
};

// The CUDA forms return null, or what CUDA said.
void cross_entropy_statistics_cpu(const Logits& logits, const RowStatistics& out, bool need_total, const Parallel& parallel);

const char* cross_entropy_statistics_cuda(const Logits& logits, const RowStatistics& out, bool need_total, Stream stream);

// loss [rows]; 0 where the target is ignore_index.
void cross_entropy_loss_cpu(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms, const RowStatistics& statistics, float* loss,
                            const Parallel& parallel);
const char* cross_entropy_loss_cuda(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms, const RowStatistics& statistics,
                                    float* loss, Stream stream);

// dloss [rows]; dlogits [rows, cols], rows dstride apart, may be the logits themselves. Zero in padding columns and ignored rows.
void cross_entropy_backward_cpu(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics, const float* dloss, void* dlogits,
                                int64_t dstride, const Parallel& parallel);
const char* cross_entropy_backward_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics, const float* dloss, void* dlogits,
                                        int64_t dstride, Stream stream);

// Statistics, and the gradient for a dloss that is known ahead, one for all rows, at one look at the logits, which have all columns of the
// vocabulary. dlogits as in the backward.
void cross_entropy_fused_cpu(const Logits& logits, const LossTerms& terms, const RowStatistics& out, float dloss, void* dlogits, int64_t dstride,
                             const Parallel& parallel);
const char* cross_entropy_fused_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& out, float dloss, void* dlogits, int64_t dstride,
                                     Stream stream);

// A gradient [rows, cols], rows `stride` apart, that was made for one dloss of all rows.
struct FusedGradient {
    DType dtype;
    int64_t rows, cols;
    void* data;
    int64_t stride;
    float made_for;
};

// Multiplies the rows whose dloss [rows] is another by dloss / made_for. The others are not touched.
void cross_entropy_rescale_cpu(const FusedGradient& gradient, const float* dloss, const Parallel& parallel);
const char* cross_entropy_rescale_cuda(const FusedGradient& gradient, const float* dloss, Stream stream);

}  // namespace neox
