// Rotary position embedding (arXiv:2104.09864), half-split layout, on the first r of a head's d channels, r even:
//
//   y[i]       = cos[i]       x[i]       - sin[i]       x[i + r/2]        0 <= i < r/2
//   y[i + r/2] = cos[i + r/2] x[i + r/2] + sin[i + r/2] x[i]
//
// and y = x beyond r. The gradient is the transposed map (`transposed`), which for tables with equal halves is the turn back.
//
// Bytes moved: in place, the rotated channels twice (read, write); out of place, all channels twice. The tables stay in cache: one row
// of them serves all heads of a token.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

// Heads [batch, seq, groups, heads, d] by element strides, contiguous in d. A plain [b, s, n, d] has one group.
struct Heads {
    int64_t batch_stride, seq_stride, group_stride, head_stride;
    int64_t groups, heads;
};

// fp32 rows of r entries; batch_stride 0 where one table serves the whole batch.
struct RotaryTables {
    const float* cos;
    const float* sin;
    int64_t batch_stride;
    int64_t rotary_dim;
    bool transposed;
};

struct RotarySize {
    int64_t batch, seq, head_dim;
};

// x and y may be the same memory with the same strides: then only the rotated channels are touched. The CUDA form returns null, or what
// CUDA said.
void rotary_cpu(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x, const Heads& x_heads, void* y, const Heads& y_heads,
                const Parallel& parallel);
const char* rotary_cuda(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x, const Heads& x_heads, void* y, const Heads& y_heads,
                        Stream stream);

}  // namespace neox
