// Rotary position embedding in the half-split layout, on the first r (even) of a head's d channels:
//
//   y[i]       = cos[i]       x[i]       - sin[i]       x[i + r/2]        0 <= i < r/2
//   y[i + r/2] = cos[i + r/2] x[i + r/2] + sin[i + r/2] x[i]
//
// and y = x for the other channels. The gradient is the transposed map (`transposed`); for tables with equal halves
// that is the inverse rotation.
//
// Shapes: x, y [b, s, n, d] or packed [b, s, g, m + 2, d]; cos, sin [s, r] or [b, s, r] in fp32.
//
// Bytes moved per element, times its size: 2 (read x, write y), in place for the rotated channels only. The tables stay
// in cache, because one row of them serves all heads of a token.
//
// Source: Su et al., arXiv:2104.09864; half-split layout as in GPT-NeoX and Llama.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

// Element strides of heads [batch, seq, groups, heads, d], contiguous in d. A tensor [b, s, n, d] has one group.
struct Heads {
    int64_t batch_stride, seq_stride, group_stride, head_stride;
    int64_t groups, heads;
};

// fp32 rows of r entries; batch_stride 0 if one table serves all of the batch.
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

// x and y may be the same memory with the same strides; then only the rotated channels are accessed. The CUDA launcher
// returns null or CUDA's error message.
void rotary_cpu(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x, const Heads& x_heads,
                void* y, const Heads& y_heads, const Parallel& parallel);
const char* rotary_cuda(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x,
                        const Heads& x_heads, void* y, const Heads& y_heads, Stream stream);

}  // namespace neox
