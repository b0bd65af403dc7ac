#include <cstring>

#include "ops/rotary/rotary.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread

// Scalar code that the compiler vectorises, with 8 lanes if r / 2 does not fill a wider register (r = 16 in
// Pythia-160M).
template <class T>
inline void turn(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) {
        const float low = to_float(x[i]);
        const float high = to_float(x[i + half]);
        y[i] = from_float<T>(cos[i] * low - sin[i] * high);
        y[i + half] = from_float<T>(cos[i + half] * high + sin[i + half] * low);
    }
}

// Transposed map: each sine multiplies the other half.
template <class T>
inline void turn_transposed(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) {
        const float low = to_float(x[i]);
        const float high = to_float(x[i + half]);
        y[i] = from_float<T>(cos[i] * low + sin[i + half] * high);
        y[i + half] = from_float<T>(cos[i + half] * high - sin[i] * low);
    }
}

template <class T>
void rotate(const RotarySize& size, const RotaryTables& tables, const T* x, const Heads& x_heads, T* y,
            const Heads& y_heads, const Parallel& parallel) {
    const int64_t r = tables.rotary_dim;
    const int64_t half = r / 2;
    const int64_t row_size = x_heads.groups * x_heads.heads * size.head_dim;
    parallel(size.batch * size.seq, kGrain / (row_size + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / size.seq, s = row % size.seq;
            const float* const cos = tables.cos + b * tables.batch_stride + s * r;
            const float* const sin = tables.sin + b * tables.batch_stride + s * r;
            for (int64_t g = 0; g < x_heads.groups; ++g) {
                for (int64_t h = 0; h < x_heads.heads; ++h) {
                    const T* const from = x + b * x_heads.batch_stride + s * x_heads.seq_stride +
                                          g * x_heads.group_stride + h * x_heads.head_stride;
                    T* const to = y + b * y_heads.batch_stride + s * y_heads.seq_stride + g * y_heads.group_stride +
                                  h * y_heads.head_stride;
                    (tables.transposed ? turn_transposed<T> : turn<T>)(from, to, cos, sin, half);
                    if (from != to) std::memcpy(to + r, from + r, (size.head_dim - r) * sizeof(T));
                }
            }
        }
    });
}

}  // namespace

void rotary_cpu(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x, const Heads& x_heads,
                void* y, const Heads& y_heads, const Parallel& parallel) {
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        rotate<T>(size, tables, static_cast<const T*>(x), x_heads, static_cast<T*>(y), y_heads, parallel);
    });
}

}  // namespace neox
