#include "common/columns.cuh"
#include "common/philox.h"
#include "ops/bias_dropout_add/bias_dropout_add.h"

namespace neox {
namespace {

constexpr int kThreads = 256;
constexpr int kWaves = 64;         // most blocks per multiprocessor; with this many, a partial last wave costs little
constexpr int kForwardDepth = 2;   // packs in flight per thread and input: 64 bytes per thread in both passes
constexpr int kBackwardDepth = 4;  // 1,024 threads with 64 bytes each: twice what hides the latency
constexpr int kQuad = 4;           // columns that share a Philox counter; also a thread's share of misaligned rows

// Ten rounds of two multiplications (half rate) and two logical instructions per four elements: 15 issue slots per
// element. Moving 6 bytes leaves 40 (H200).
struct Mask {
    bool has_dropout;
    PhiloxKeys keys;  // derived in the kernel, they took a quarter of the backward's instructions
    uint64_t counter_high;
    uint32_t threshold;
    bool drops_all;
    float scale;
    int64_t quads;  // groups of four columns in a row

    Mask(const Dropout& dropout, int64_t cols)
        : has_dropout(dropout.seed),
          keys(has_dropout ? static_cast<uint64_t>(dropout.seed[0]) : 0),
          counter_high(has_dropout ? static_cast<uint64_t>(dropout.seed[1]) : 0),
          threshold(static_cast<uint32_t>(dropout_threshold(dropout.p))),
          drops_all(dropout_threshold(dropout.p) > UINT32_MAX),
          scale(dropout.p < 1 ? static_cast<float>(1 / (1 - dropout.p)) : 0.0f),
          quads((cols + kQuad - 1) / kQuad) {}

    // v scaled, or zero if dropped, for columns [column, column + kPack) of a row. column is a multiple of 4.
    template <int kPack>
    __device__ __forceinline__ void apply(int64_t row, int64_t column, float (&v)[kPack]) const {
        static_assert(kPack % kQuad == 0);
        if (!has_dropout) return;
        const auto counter =
            static_cast<uint64_t>(row) * static_cast<uint64_t>(quads) + static_cast<uint64_t>(column / kQuad);
#pragma unroll
        for (int quad = 0; quad < kPack / kQuad; ++quad) {
            const PhiloxWords words = philox(keys, counter + quad, counter_high);
#pragma unroll
            for (int k = 0; k < kQuad; ++k) {
                float& element = v[quad * kQuad + k];
                element = words.word[k] >= threshold && !drops_all ? element * scale : 0.0f;
            }
        }
    }
};

template <class T>
struct Forward {
    const T *x, *bias, *residual;
    int64_t x_stride, residual_stride;
    T* y;
    int64_t rows, cols;
    Mask mask;
};

template <class T, int kPack>
struct ForwardItem {
    Pack<T, kPack> x, residual;
};

// A pack, or the rest of a quad if the rows are misaligned.
template <bool kWhole, int kPack, class T>
NEOX_DEVICE Pack<T, kPack> fetch_columns(const T* row, int64_t column, int64_t cols) {
    if constexpr (kWhole) return fetch<kPack>(row + column);
    return fetch_first<kPack>(row + column, cols - column);
}

template <bool kWhole, int kPack, class T>
NEOX_DEVICE void store_columns(T* row, int64_t column, int64_t cols, const float (&in)[kPack]) {
    if constexpr (kWhole) return store(row + column, in);
    store_first(row + column, cols - column, in);
}

template <class T, bool kWhole>
constexpr int kColumns = kWhole ? Pack<T>::kSize : kQuad;

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) forward(Forward<T> in) {
    constexpr int kPack = kColumns<T, kWhole>;
    using Item = ForwardItem<T, kPack>;
    for_packs<kWhole ? kForwardDepth : 1>(
        in.rows, (in.cols + kPack - 1) / kPack,
        [&](int64_t row, int64_t pack) {
            return Item{fetch_columns<kWhole, kPack>(in.x + row * in.x_stride, pack * kPack, in.cols),
                        fetch_columns<kWhole, kPack>(in.residual + row * in.residual_stride, pack * kPack, in.cols)};
        },
        [&](int64_t row, int64_t pack, const Item& item) {
            const int64_t column = pack * kPack;
            float v[kPack], residual[kPack], bias[kPack] = {};
            unpack(item.x, v);
            unpack(item.residual, residual);
            if (in.bias) unpack(fetch_columns<kWhole, kPack>(in.bias, column, in.cols), bias);
#pragma unroll
            for (int k = 0; k < kPack; ++k) v[k] += bias[k];
            in.mask.apply(row, column, v);
#pragma unroll
            for (int k = 0; k < kPack; ++k) v[k] += residual[k];
            store_columns<kWhole>(in.y + row * in.cols, column, in.cols, v);
        });
}

template <class T>
struct Backward {
    const T* dy;
    int64_t dy_stride;
    T* dx;           // or null
    float* partial;  // [gridDim.y, cols], or null
    int64_t rows, cols;
    Mask mask;
};

// One ColumnSums block: computes dx for its columns and stripe of rows, and their column sums for dbias.
template <class T, bool kWhole>
__global__ void __launch_bounds__(ColumnSums::kThreads, ColumnSums::kResident) backward(Backward<T> in) {
    constexpr int kPack = kColumns<T, kWhole>;
    const int64_t column =
        (static_cast<int64_t>(blockIdx.x) * ColumnSums::kLanes + threadIdx.x % ColumnSums::kLanes) * kPack;
    float sums[kPack] = {};
    if (column < in.cols) {
        for_stripe_rows<kWhole ? kBackwardDepth : 1>(
            Stripe(in.rows),
            [&](int64_t row) { return fetch_columns<kWhole, kPack>(in.dy + row * in.dy_stride, column, in.cols); },
            [&](int64_t row, const Pack<T, kPack>& item) {
                float d[kPack];
                unpack(item, d);
                in.mask.apply(row, column, d);
                if (in.dx) store_columns<kWhole>(in.dx + row * in.cols, column, in.cols, d);
#pragma unroll
                for (int k = 0; k < kPack; ++k) sums[k] += d[k];
            });
    }
    if (in.partial) write_stripe_sum(sums, in.partial, column, in.cols);
}

template <class T, bool kWhole>
cudaError_t launch_forward(const Forward<T>& task, Stream stream) {
    constexpr int kPack = kColumns<T, kWhole>;
    const unsigned blocks = blocks_for(task.rows * ((task.cols + kPack - 1) / kPack), kThreads * kForwardDepth, kWaves);
    return launch(forward<T, kWhole>, dim3(blocks), dim3(kThreads), 0, stream, task);
}

template <class T, bool kWhole>
cudaError_t launch_backward(const Backward<T>& task, Stream stream) {
    const int64_t tile = ColumnSums::kLanes * kColumns<T, kWhole>;
    const dim3 grid(static_cast<unsigned>((task.cols + tile - 1) / tile),
                    static_cast<unsigned>(ColumnSums::stripes(task.rows, task.cols)));
    return launch(backward<T, kWhole>, grid, dim3(ColumnSums::kThreads), 0, stream, task);
}

}  // namespace

int64_t bias_dropout_add_partials_cuda(int64_t rows, int64_t cols) { return ColumnSums::stripes(rows, cols); }

const char* bias_dropout_add_forward_cuda(const BiasDropoutAdd& op, void* y, Stream stream) {
    if (op.rows == 0 || op.cols == 0) return nullptr;
    return message(dispatch_device(op.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Forward<T> task{static_cast<const T*>(op.x),
                              static_cast<const T*>(op.bias),
                              static_cast<const T*>(op.residual),
                              op.x_stride,
                              op.residual_stride,
                              static_cast<T*>(y),
                              op.rows,
                              op.cols,
                              Mask(op.dropout, op.cols)};
        const bool vectorized = can_vectorize<T>(op.x, op.x_stride, op.cols) &&
                                can_vectorize<T>(op.residual, op.residual_stride, op.cols) &&
                                can_vectorize<T>(y, op.cols, op.cols) && can_vectorize<T>(op.bias, 0, 0);
        return vectorized ? launch_forward<T, true>(task, stream) : launch_forward<T, false>(task, stream);
    }));
}

const char* bias_dropout_add_backward_cuda(const BiasDropoutAddBackward& op, Stream stream) {
    if (op.cols == 0) return nullptr;
    return message(dispatch_device(op.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Backward<T> task{static_cast<const T*>(op.dy),    op.dy_stride, static_cast<T*>(op.dx),
                               op.dbias ? op.partial : nullptr, op.rows,      op.cols,
                               Mask(op.dropout, op.cols)};
        const bool vectorized =
            can_vectorize<T>(op.dy, op.dy_stride, op.cols) && can_vectorize<T>(op.dx, op.cols, op.cols);
        const cudaError_t error =
            vectorized ? launch_backward<T, true>(task, stream) : launch_backward<T, false>(task, stream);
        if (error != cudaSuccess || !op.dbias) return error;
        StripeSums<T> sums;
        sums.add(op.partial, static_cast<T*>(op.dbias));
        return launch_add_stripes(sums, ColumnSums::stripes(op.rows, op.cols), op.cols, stream);
    }));
}

}  // namespace neox
