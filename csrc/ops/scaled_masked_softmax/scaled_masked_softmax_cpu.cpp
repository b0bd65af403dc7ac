#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/vec.h"
#include "ops/scaled_masked_softmax/scaled_masked_softmax.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef uint8_t VecByte __attribute__((vector_size(NEOX_VEC_WIDTH)));

// Sets lanes hidden by the mask to minus infinity.
NEOX_INLINE Vec hide(Vec v, const uint8_t* mask) {
    VecByte hidden;
    std::memcpy(&hidden, mask, sizeof(hidden));
#if defined(__AVX512F__) && NEOX_VEC_WIDTH == 16
    const VecInt wide = reinterpret_cast<VecInt>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(hidden)));
#else
    const VecInt wide = __builtin_convertvector(hidden, VecInt);
#endif
    return wide != 0 ? splat(-kInfinity) : v;
}

// The same for the last `count` < kVecWidth elements of a row. Lanes past them are hidden too.
NEOX_INLINE Vec hide(Vec v, const uint8_t* mask, int64_t count) {
    uint8_t lanes[kVecWidth];
    std::memset(lanes, 1, sizeof(lanes));
    for (int64_t i = 0; i < count; ++i) lanes[i] = mask ? mask[i] : 0;
    return hide(v, lanes);
}

// scores: scratch of `size` fp32 elements, rounded up to full vectors, so that x is read and converted once.
template <class T>
void forward_row(const T* x, const uint8_t* mask, int64_t size, float scale, float* scores, T* y) {
    Vec best = splat(-kInfinity);
    for_each_vec(size, [&](int64_t i, auto load, auto) {
        Vec v = load(x + i) * scale;
        if (size - i < kVecWidth) {
            v = hide(v, mask ? mask + i : nullptr, size - i);
        } else if (mask) {
            v = hide(v, mask + i);
        }
        neox::store(scores + i, v);
        best = max(best, v);
    });
    const float shift = max_lane(best);
    if (shift == -kInfinity) {  // no visible column, or NaN, which the comparisons of max drop; it is restored here
        for (int64_t i = 0; i < size; ++i) y[i] = from_float<T>(std::isnan(scores[i]) ? scores[i] : 0.0f);
        return;
    }
    Vec sums = {};
    for (int64_t i = 0; i < size; i += kVecWidth) {
        const Vec e = exp_nonpositive(load(scores + i) - shift);
        neox::store(scores + i, e);
        sums += e;
    }
    const float inverse = 1.0f / sum(sums);
    for_each_vec(size, [&](int64_t i, auto, auto store) { store(y + i, neox::load(scores + i) * inverse); });
}

template <class T>
void backward_row(const T* dy, const T* y, int64_t size, float scale, T* dx) {
    Vec sums = {};
    for_each_vec(size, [&](int64_t i, auto load, auto) { sums += load(dy + i) * load(y + i); });
    const float mean = sum(sums);
    for_each_vec(size,
                 [&](int64_t i, auto load, auto store) { store(dx + i, (load(dy + i) - mean) * load(y + i) * scale); });
}

// Columns visible to a row before the mask is applied.
int64_t visible(const ScoreRows& in, int64_t row) {
    if (!in.causal) return in.cols;
    return std::min(in.cols, std::max<int64_t>(0, row % in.seq + 1 + in.cols - in.seq));
}

template <class T>
void forward(const ScoreRows& in, const T* x, int64_t x_stride, T* y, const Parallel& parallel) {
    parallel(in.batches * in.heads * in.seq, kGrain / (in.cols + 1), [&](int64_t begin, int64_t end) {
        std::vector<float> scores(in.cols + kVecWidth);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t size = visible(in, row);
            const uint8_t* mask = in.mask;
            if (mask)
                mask +=
                    (in.mask_batches > 1 ? row / (in.heads * in.seq) * in.seq + row % in.seq : row % in.seq) * in.cols;
            forward_row(x + row * x_stride, mask, size, static_cast<float>(in.scale), scores.data(), y + row * in.cols);
            std::memset(static_cast<void*>(y + row * in.cols + size), 0, (in.cols - size) * sizeof(T));
        }
    });
}

template <class T>
void backward(const ScoreRows& in, const T* dy, int64_t dy_stride, const T* y, int64_t y_stride, T* dx,
              const Parallel& parallel) {
    parallel(in.batches * in.heads * in.seq, kGrain / (in.cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t size = visible(in, row);
            backward_row(dy + row * dy_stride, y + row * y_stride, size, static_cast<float>(in.scale),
                         dx + row * in.cols);
            std::memset(static_cast<void*>(dx + row * in.cols + size), 0, (in.cols - size) * sizeof(T));
        }
    });
}

}  // namespace

void scaled_masked_softmax_forward_cpu(const ScoreRows& rows, const void* x, int64_t x_stride, void* y,
                                       const Parallel& parallel) {
    dispatch(rows.dtype, [&](auto zero) {
        using T = decltype(zero);
        forward<T>(rows, static_cast<const T*>(x), x_stride, static_cast<T*>(y), parallel);
    });
}

void scaled_masked_softmax_backward_cpu(const ScoreRows& rows, const void* dy, int64_t dy_stride, const void* y,
                                        int64_t y_stride, void* dx, const Parallel& parallel) {
    dispatch(rows.dtype, [&](auto zero) {
        using T = decltype(zero);
        backward<T>(rows, static_cast<const T*>(dy), dy_stride, static_cast<const T*>(y), y_stride, static_cast<T*>(dx),
                    parallel);
    });
}

}  // namespace neox
