#include "common/activation.cuh"
#include "common/columns.cuh"
#include "ops/gated/gated.h"

namespace neox {
namespace {

constexpr int kThreads = 256;
constexpr int kWaves = 64;  // most blocks per multiprocessor; with this many, a partial last wave costs little
// packs in flight per thread and input: 64 bytes in the forward, 96 in the backward; 32 KiB per multiprocessor hide the
// latency
constexpr int kDepth = 2;

template <Activation kActivation, class T>
NEOX_DEVICE ValueAndSlope activate(float u) {
    if constexpr (kActivation == Activation::kSilu) return silu<T>(u);
    if constexpr (kActivation == Activation::kGelu) return gelu<T>(u);
    return relu<T>(u);
}

template <class T>
struct Forward {
    const T *x, *gate;
    int64_t x_stride, gate_stride;
    T* y;
    int64_t rows, cols;
};

template <class T, int kPack>
struct ForwardItem {
    Pack<T, kPack> x, gate;
};

template <class T, Activation kActivation, int kPack>
__global__ void __launch_bounds__(kThreads) forward(Forward<T> in) {
    using Item = ForwardItem<T, kPack>;
    for_packs<kDepth>(
        in.rows, in.cols / kPack,
        [&](int64_t row, int64_t col) {
            return Item{fetch<kPack>(in.x + row * in.x_stride + col * kPack),
                        fetch<kPack>(in.gate + row * in.gate_stride + col * kPack)};
        },
        [&](int64_t row, int64_t col, const Item& item) {
            float u[kPack], gate[kPack];
            unpack(item.x, u);
            unpack(item.gate, gate);
#pragma unroll
            for (int k = 0; k < kPack; ++k) u[k] = activate<kActivation, T>(u[k]).value * gate[k];
            store(in.y + row * in.cols + col * kPack, u);
        });
}

template <class T>
struct Backward {
    Forward<T> in;  // y is unused
    const T* dy;
    int64_t dy_stride;
    T *dx, *dgate;
};

template <class T, int kPack>
struct BackwardItem {
    Pack<T, kPack> x, gate, dy;
};

template <class T, Activation kActivation, int kPack>
__global__ void __launch_bounds__(kThreads) backward(Backward<T> task) {
    using Item = BackwardItem<T, kPack>;
    const Forward<T>& in = task.in;
    for_packs<kDepth>(
        in.rows, in.cols / kPack,
        [&](int64_t row, int64_t col) {
            return Item{fetch<kPack>(in.x + row * in.x_stride + col * kPack),
                        fetch<kPack>(in.gate + row * in.gate_stride + col * kPack),
                        fetch<kPack>(task.dy + row * task.dy_stride + col * kPack)};
        },
        [&](int64_t row, int64_t col, const Item& item) {
            float x[kPack], gate[kPack], dy[kPack];
            unpack(item.x, x);
            unpack(item.gate, gate);
            unpack(item.dy, dy);
#pragma unroll
            for (int k = 0; k < kPack; ++k) {
                const ValueAndSlope a = activate<kActivation, T>(x[k]);
                x[k] = dy[k] * gate[k] * a.slope;  // dx
                gate[k] = dy[k] * a.value;         // dgate
            }
            const int64_t offset = row * in.cols + col * kPack;
            store(task.dx + offset, x);
            store(task.dgate + offset, gate);
        });
}

// Calls body(std::integral_constant<Activation, ...>, std::integral_constant<int, kPack>).
template <class T, class Body>
cudaError_t with_kernel(Activation activation, bool packs, const Body& body) {
    const auto with_pack = [&](auto chosen) {
        return packs ? body(chosen, std::integral_constant<int, Pack<T>::kSize>{})
                     : body(chosen, std::integral_constant<int, 1>{});
    };
    switch (activation) {
        case Activation::kSilu:
            return with_pack(std::integral_constant<Activation, Activation::kSilu>{});
        case Activation::kGelu:
            return with_pack(std::integral_constant<Activation, Activation::kGelu>{});
        case Activation::kRelu:
            return with_pack(std::integral_constant<Activation, Activation::kRelu>{});
    }
    return cudaErrorInvalidValue;
}

template <class T>
Forward<T> describe(const Gated& in, void* y) {
    return {static_cast<const T*>(in.x),
            static_cast<const T*>(in.gate),
            in.x_stride,
            in.gate_stride,
            static_cast<T*>(y),
            in.rows,
            in.cols};
}

// Contiguous rows are treated as one long row, so that packs may cross the ends of rows.
template <class T>
void join_rows(Forward<T>& in, int64_t& other_stride) {
    if (in.x_stride != in.cols || in.gate_stride != in.cols || other_stride != in.cols) return;
    in.cols *= in.rows;
    in.rows = 1;
    in.x_stride = in.gate_stride = other_stride = in.cols;
}

template <class T>
bool packs(const Forward<T>& in) {
    return can_vectorize<T>(in.x, in.x_stride, in.cols) && can_vectorize<T>(in.gate, in.gate_stride, in.cols);
}

}  // namespace

const char* gated_forward_cuda(const Gated& in, void* y, Stream stream) {
    if (in.rows == 0 || in.cols == 0) return nullptr;
    return message(dispatch_device(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        Forward<T> task = describe<T>(in, y);
        int64_t y_stride = task.cols;
        join_rows(task, y_stride);
        return with_kernel<T>(
            in.activation, packs(task) && can_vectorize<T>(y, y_stride, task.cols), [&](auto activation, auto pack) {
                const unsigned blocks = blocks_for(task.rows * (task.cols / pack()), kThreads * kDepth, kWaves);
                return launch(forward<T, activation(), pack()>, dim3(blocks), dim3(kThreads), 0, stream, task);
            });
    }));
}

const char* gated_backward_cuda(const Gated& in, const void* dy, int64_t dy_stride, void* dx, void* dgate,
                                Stream stream) {
    if (in.rows == 0 || in.cols == 0) return nullptr;
    return message(dispatch_device(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        Backward<T> task{describe<T>(in, nullptr), static_cast<const T*>(dy), dy_stride, static_cast<T*>(dx),
                         static_cast<T*>(dgate)};
        join_rows(task.in, task.dy_stride);
        const int64_t cols = task.in.cols;
        const bool vectorized = packs(task.in) && can_vectorize<T>(dy, task.dy_stride, cols) &&
                                can_vectorize<T>(dx, cols, cols) && can_vectorize<T>(dgate, cols, cols);
        return with_kernel<T>(in.activation, vectorized, [&](auto activation, auto pack) {
            const unsigned blocks = blocks_for(task.in.rows * (cols / pack()), kThreads * kDepth, kWaves);
            return launch(backward<T, activation(), pack()>, dim3(blocks), dim3(kThreads), 0, stream, task);
        });
    }));
}

}  // namespace neox
