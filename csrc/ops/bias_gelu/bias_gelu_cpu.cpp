#include "common/reduce.h"
#include "common/vec.h"
#include "ops/bias_gelu/bias_gelu.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread

struct ValueAndSlope {
    Vec value, slope;
};

template <bool kTanh>
NEOX_INLINE ValueAndSlope gelu(Vec u) {
    if constexpr (kTanh) {
        const Vec square = u * u;
        const Vec z = u * (square * 0.0713548163f + 1.59576912f);  // 2c(u + a u^3)
        const Vec dz = square * 0.214064449f + 1.59576912f;        // 2c(1 + 3a u^2)
        const Logistic s = logistic(z);
        const Vec bend = u * dz * s.slope;
        return {u * s.value, s.value + (s.slope > 0.0f ? bend : Vec{})};  // if the slope is 0, u dz may be infinite
    } else {
        const Normal normal_u = normal(u);
        return {u * normal_u.cdf, normal_u.cdf + u * normal_u.pdf};
    }
}

template <class T, bool kTanh>
void forward(const BiasGelu& in, T* y, const Parallel& parallel) {
    const T* const x = static_cast<const T*>(in.x);
    const T* const bias = static_cast<const T*>(in.bias);
    parallel(in.rows, kGrain / (in.cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* const x_row = x + row * in.x_stride;
            T* const y_row = y + row * in.cols;
            for_each_vec(in.cols, [&](int64_t i, auto load, auto store) {
                const Vec u = bias ? load(x_row + i) + load(bias + i) : load(x_row + i);
                store(y_row + i, gelu<kTanh>(u).value);
            });
        }
    });
}

template <class T, bool kTanh>
void backward(const BiasGelu& in, const T* dy, int64_t dy_stride, T* dx, float* partial, const Parallel& parallel) {
    const T* const x = static_cast<const T*>(in.x);
    const T* const bias = static_cast<const T*>(in.bias);
    const Blocks blocks(in.rows);
    parallel(blocks.count, kGrain / (in.cols * blocks.size + 1), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            float* const sums = bias ? partial + block * in.cols : nullptr;
            for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
                const bool first = row == blocks.begin(block);
                for_each_vec(in.cols, [&](int64_t i, auto load, auto store) {
                    const Vec u = load(x + row * in.x_stride + i);
                    const Vec dz = load(dy + row * dy_stride + i) * gelu<kTanh>(bias ? u + load(bias + i) : u).slope;
                    store(dx + row * in.cols + i, dz);
                    if (sums) store(sums + i, first ? dz : load(static_cast<const float*>(sums) + i) + dz);
                });
            }
        }
    });
}

}  // namespace

void bias_gelu_forward_cpu(const BiasGelu& in, void* y, const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        (in.tanh ? forward<T, true> : forward<T, false>)(in, static_cast<T*>(y), parallel);
    });
}

void bias_gelu_backward_cpu(const BiasGelu& in, const void* dy, int64_t dy_stride, void* dx, void* dbias,
                            float* partial, const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto run = in.tanh ? backward<T, true> : backward<T, false>;
        run(in, static_cast<const T*>(dy), dy_stride, static_cast<T*>(dx), partial, parallel);
        if (in.bias) sum_blocks(partial, Blocks(in.rows).count, in.cols, static_cast<T*>(dbias), parallel);
    });
}

}  // namespace neox
