#include "common/activation.cuh"
#include "common/columns.cuh"
#include "ops/bias_gelu/bias_gelu.h"

namespace neox {
namespace {

constexpr int kThreads = 256;
constexpr int kWaves = 64;  // most blocks per multiprocessor; with this many, a partial last wave costs little
constexpr int kDepth = 2;   // packs in flight per thread and input

template <class T, bool kTanh>
NEOX_DEVICE ValueAndSlope activate(float u) {
    return kTanh ? gelu_tanh<T>(u) : gelu<T>(u);
}

template <class T, bool kTanh, int kPack>
__global__ void __launch_bounds__(kThreads)
    forward(const T* x, int64_t x_stride, const T* bias, T* y, int64_t rows, int64_t cols) {
    for_packs<kDepth>(
        rows, cols / kPack, [&](int64_t row, int64_t col) { return fetch<kPack>(x + row * x_stride + col * kPack); },
        [&](int64_t row, int64_t col, const Pack<T, kPack>& item) {
            float u[kPack], b[kPack] = {};
            unpack(item, u);
            if (bias) load(bias + col * kPack, b);
#pragma unroll
            for (int k = 0; k < kPack; ++k) u[k] = activate<T, kTanh>(u[k] + b[k]).value;
            store(y + row * cols + col * kPack, u);
        });
}

template <class T>
struct Backward {
    const T *dy, *x, *bias;
    int64_t dy_stride, x_stride;
    T* dx;
    float* partial;  // [gridDim.y, cols], or null
    int64_t rows, cols;
};

template <class T, int kPack>
struct BackwardItem {
    Pack<T, kPack> x, dy;
};

// One ColumnSums block: computes dx for its columns and stripe of rows, and their column sums for dbias.
template <class T, bool kTanh, int kPack>
__global__ void __launch_bounds__(ColumnSums::kThreads, ColumnSums::kResident) backward(Backward<T> in) {
    const int64_t column =
        (static_cast<int64_t>(blockIdx.x) * ColumnSums::kLanes + threadIdx.x % ColumnSums::kLanes) * kPack;
    float sums[kPack] = {};
    if (column < in.cols) {
        const Pack<T, kPack> bias = in.bias ? fetch<kPack>(in.bias + column) : Pack<T, kPack>{};
        for_stripe_rows<kDepth>(
            Stripe(in.rows),
            [&](int64_t row) {
                return BackwardItem<T, kPack>{fetch<kPack>(in.x + row * in.x_stride + column),
                                              fetch<kPack>(in.dy + row * in.dy_stride + column)};
            },
            [&](int64_t row, const BackwardItem<T, kPack>& item) {
                float u[kPack], b[kPack], dz[kPack];
                unpack(bias, b);
                unpack(item.x, u);
                unpack(item.dy, dz);
#pragma unroll
                for (int k = 0; k < kPack; ++k) {
                    dz[k] *= activate<T, kTanh>(u[k] + b[k]).slope;
                    sums[k] += dz[k];
                }
                store(in.dx + row * in.cols + column, dz);
            });
    }
    if (in.partial) write_stripe_sum(sums, in.partial, column, in.cols);
}

template <class T, bool kTanh, int kPack>
cudaError_t launch_forward(const BiasGelu& in, void* y, Stream stream) {
    const unsigned blocks = blocks_for(in.rows * (in.cols / kPack), kThreads * kDepth, kWaves);
    return launch(forward<T, kTanh, kPack>, dim3(blocks), dim3(kThreads), 0, stream, static_cast<const T*>(in.x),
                  in.x_stride, static_cast<const T*>(in.bias), static_cast<T*>(y), in.rows, in.cols);
}

template <class T, bool kTanh, int kPack>
cudaError_t launch_backward(const Backward<T>& in, Stream stream) {
    const int64_t tile = ColumnSums::kLanes * kPack;
    const dim3 grid(static_cast<unsigned>((in.cols + tile - 1) / tile),
                    static_cast<unsigned>(ColumnSums::stripes(in.rows, in.cols)));
    return launch(backward<T, kTanh, kPack>, grid, dim3(ColumnSums::kThreads), 0, stream, in);
}

}  // namespace

int64_t bias_gelu_partials_cuda(int64_t rows, int64_t cols) { return ColumnSums::stripes(rows, cols); }

const char* bias_gelu_forward_cuda(const BiasGelu& in, void* y, Stream stream) {
    if (in.rows == 0 || in.cols == 0) return nullptr;
    return message(dispatch_device(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kPack = Pack<T>::kSize;
        const bool vectorized = can_vectorize<T>(in.x, in.x_stride, in.cols) && can_vectorize<T>(y, in.cols, in.cols) &&
                                can_vectorize<T>(in.bias, 0, 0);
        if (in.tanh)
            return vectorized ? launch_forward<T, true, kPack>(in, y, stream)
                              : launch_forward<T, true, 1>(in, y, stream);
        return vectorized ? launch_forward<T, false, kPack>(in, y, stream) : launch_forward<T, false, 1>(in, y, stream);
    }));
}

const char* bias_gelu_backward_cuda(const BiasGelu& in, const void* dy, int64_t dy_stride, void* dx, void* dbias,
                                    float* partial, Stream stream) {
    if (in.cols == 0) return nullptr;
    return message(dispatch_device(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kPack = Pack<T>::kSize;
        const Backward<T> task{static_cast<const T*>(dy),
                               static_cast<const T*>(in.x),
                               static_cast<const T*>(in.bias),
                               dy_stride,
                               in.x_stride,
                               static_cast<T*>(dx),
                               in.bias ? partial : nullptr,
                               in.rows,
                               in.cols};
        const bool vectorized = can_vectorize<T>(in.x, in.x_stride, in.cols) &&
                                can_vectorize<T>(dy, dy_stride, in.cols) && can_vectorize<T>(dx, in.cols, in.cols) &&
                                can_vectorize<T>(in.bias, 0, 0);
        const auto run = in.tanh ? (vectorized ? launch_backward<T, true, kPack> : launch_backward<T, true, 1>)
                                 : (vectorized ? launch_backward<T, false, kPack> : launch_backward<T, false, 1>);
        const cudaError_t error = run(task, stream);
        if (error != cudaSuccess || !in.bias) return error;
        StripeSums<T> sums;
        sums.add(partial, static_cast<T*>(dbias));
        return launch_add_stripes(sums, ColumnSums::stripes(in.rows, in.cols), in.cols, stream);
    }));
}

}  // namespace neox
