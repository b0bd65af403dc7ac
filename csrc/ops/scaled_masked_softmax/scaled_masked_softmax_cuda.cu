#include <algorithm>

#include "common/exp.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ops/scaled_masked_softmax/scaled_masked_softmax.h"

namespace neox {
namespace {

// Partition of a row: kWarps warps share it, and each lane holds kElements of it in registers, in packs kWarps * 32
// packs apart, so that memory is read once. Rows of one warp need no barrier; four of them form a block. A lane has 64
// bytes in flight, twice that in the backward. About 100 registers per thread allow 600 threads, hence 40 KiB in flight
// per multiprocessor; 32 KiB hide the latency.
template <int kElements_, int kWarps_>
struct Cut {
    static constexpr int kElements = kElements_, kWarps = kWarps_;
    static constexpr int kLanes = kWarps * kWarpSize;
    static constexpr int kRows = kWarps == 1 ? 4 : 1;
    static constexpr int kThreads = kLanes * kRows;
    static constexpr int64_t kColumns = static_cast<int64_t>(kElements) * kLanes;
};

// Longer rows are processed in a loop, this much per iteration.
struct Looped {
    static constexpr int kElements = 32, kWarps = 16;
    static constexpr int kThreads = kWarps * kWarpSize;
};

struct Visibility {
    const uint8_t* mask;  // rows of `cols` columns, or null
    int64_t mask_batch;   // rows of x per batch of the mask: heads * seq, or 0 if one mask serves all
    int64_t rows, seq, cols;
    bool causal;

    // Columns visible to a row before the mask is applied.
    __device__ __forceinline__ int64_t columns(int64_t row) const {
        if (!causal) return cols;
        const int64_t seen = row % seq + 1 + cols - seq;
        return seen < 0 ? 0 : seen < cols ? seen : cols;
    }
    __device__ __forceinline__ const uint8_t* mask_row(int64_t row) const {
        if (!mask) return nullptr;
        return mask + ((mask_batch ? row / mask_batch * seq : 0) + row % seq) * cols;
    }
};

template <class T>
struct Forward {
    const T* x;
    int64_t x_stride;
    T* y;
    Visibility visibility;
    float scale;
};

template <class T>
struct Backward {
    const T *dy, *y;
    int64_t dy_stride, y_stride;
    T* dx;
    Visibility visibility;
    float scale;
};

template <class T, int kPack>
struct Scores {
    Pack<T, kPack> x;
    Pack<uint8_t, kPack> mask;
};

template <class T, int kPack>
NEOX_DEVICE Scores<T, kPack> fetch_scores(const T* x, const uint8_t* mask, int64_t column) {
    Scores<T, kPack> scores = {fetch<kPack>(x + column), {}};
    if (mask) scores.mask = fetch<kPack>(mask + column);
    return scores;
}

// scale x, or minus infinity in hidden columns.
template <class T, int kPack>
NEOX_DEVICE void unpack_scores(const Scores<T, kPack>& scores, float scale, int64_t left, float (&v)[kPack]) {
    unpack(scores.x, v);
#pragma unroll
    for (int k = 0; k < kPack; ++k) v[k] = k < left && !scores.mask.get(k) ? v[k] * scale : -INFINITY;
}

// y of an element of a row whose maximum is -inf: 0 if the element is hidden, NaN if it is NaN, which fmaxf drops.
NEOX_DEVICE float without_maximum(float v) { return v == v ? 0.0f : v; }

template <class T, int kPack, class C>
__global__ void __launch_bounds__(C::kThreads) forward(Forward<T> in) {
    constexpr int kPacks = C::kElements / kPack;
    STATIC_SMEM(float, scratch, [C::kWarps]);
    const int lane = static_cast<int>(threadIdx.x) % C::kLanes;
    const Visibility& at = in.visibility;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * C::kRows + threadIdx.x / C::kLanes; row < at.rows;
         row += static_cast<int64_t>(gridDim.x) * C::kRows) {
        const int visible = static_cast<int>(at.columns(row));
        const uint8_t* const mask = at.mask_row(row);
        const T* const x = in.x + row * in.x_stride;
        Scores<T, kPack> scores[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int column = (i * C::kLanes + lane) * kPack;
            if (column < visible) scores[i] = fetch_scores<T, kPack>(x, mask, column);
        }
        float v[kPacks][kPack], shift = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int left = visible - (i * C::kLanes + lane) * kPack;
            if (left > 0) {
                unpack_scores(scores[i], in.scale, left, v[i]);
#pragma unroll
                for (int k = 0; k < kPack; ++k) shift = fmaxf(shift, v[i][k]);
            }
        }
        shift = block_reduce<Max, C::kWarps>(shift, scratch);
        const bool nothing = shift == -INFINITY;
        if (nothing) shift = 0.0f;  // every term is exp(-inf) = 0, or NaN, which fmaxf dropped
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const bool seen = (i * C::kLanes + lane) * kPack < visible;
#pragma unroll
            for (int k = 0; k < kPack; ++k) {
                // computed before the selection: nvcc would turn it into a branch
                const float e = exp_nonpositive<T>(v[i][k] - shift);
                v[i][k] = seen ? e : 0.0f;
                sum += v[i][k];
            }
        }
        sum = block_reduce<Sum, C::kWarps>(sum, scratch);
        const float inverse = nothing ? 1.0f : 1.0f / sum;
        T* const y = in.y + row * at.cols;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int column = (i * C::kLanes + lane) * kPack;
            if (column >= at.cols) continue;
#pragma unroll
            for (int k = 0; k < kPack; ++k) v[i][k] *= inverse;
            store(y + column, v[i]);
        }
    }
}

// The same with two reads of the row. The first keeps each thread's maximum and sum, rescaled when the maximum grows.
template <class T, int kPack>
__global__ void __launch_bounds__(Looped::kThreads) forward_looped(Forward<T> in) {
    constexpr int kPacks = kPack == 1 ? 4 : Looped::kElements / kPack;
    constexpr int64_t kStep = static_cast<int64_t>(Looped::kThreads) * kPack;
    STATIC_SMEM(float, scratch, [Looped::kWarps]);
    const Visibility& at = in.visibility;
    for (int64_t row = blockIdx.x; row < at.rows; row += gridDim.x) {
        const int64_t visible = at.columns(row);
        const uint8_t* const mask = at.mask_row(row);
        const T* const x = in.x + row * in.x_stride;
        float best = -INFINITY, sum = 0.0f;
        for (int64_t first = static_cast<int64_t>(threadIdx.x) * kPack; first < visible; first += kPacks * kStep) {
            Scores<T, kPack> scores[kPacks];
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                if (first + i * kStep < visible) scores[i] = fetch_scores<T, kPack>(x, mask, first + i * kStep);
            }
            float v[kPacks][kPack], grown = best;
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                unpack_scores(scores[i], in.scale, visible - first - i * kStep, v[i]);
#pragma unroll
                for (int k = 0; k < kPack; ++k) grown = fmaxf(grown, v[i][k]);
            }
            const float shift = grown == -INFINITY ? 0.0f : grown;  // no visible column so far: every term is 0
            sum *= exp_nonpositive<T>(best - shift);
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
#pragma unroll
                for (int k = 0; k < kPack; ++k) sum += exp_nonpositive<T>(v[i][k] - shift);
            }
            best = grown;
        }
        const float shift = block_reduce<Max, Looped::kWarps>(best, scratch);
        const bool nothing = shift == -INFINITY;
        const float scaled_sum = sum * exp_nonpositive<T>(best - shift);
        sum = block_reduce<Sum, Looped::kWarps>(nothing ? 0.0f : scaled_sum, scratch);
        const float inverse = 1.0f / sum;
        for (int64_t column = static_cast<int64_t>(threadIdx.x) * kPack; column < at.cols; column += kStep) {
            float v[kPack] = {};
            if (column < visible) {
                unpack_scores(fetch_scores<T, kPack>(x, mask, column), in.scale, visible - column, v);
#pragma unroll
                for (int k = 0; k < kPack; ++k) {
                    const float y = exp_nonpositive<T>(v[k] - shift) * inverse;
                    v[k] = nothing ? without_maximum(v[k]) : y;
                }
            }
            store(in.y + row * at.cols + column, v);
        }
    }
}

template <class T, int kPack>
struct Gradient {
    Pack<T, kPack> y, dy;
};

// A pack's contribution to sum_j y[j] dy[j].
template <class T, int kPack>
NEOX_DEVICE float dot(const Gradient<T, kPack>& item, int64_t left) {
    float y[kPack], dy[kPack], sum = 0.0f;
    unpack(item.y, y);
    unpack(item.dy, dy);
#pragma unroll
    for (int k = 0; k < kPack; ++k) sum += k < left ? y[k] * dy[k] : 0.0f;
    return sum;
}

template <class T, int kPack>
NEOX_DEVICE void store_gradient(T* dx, const Gradient<T, kPack>& item, float mean, float scale, int64_t left) {
    float y[kPack], dy[kPack];
    unpack(item.y, y);
    unpack(item.dy, dy);
#pragma unroll
    for (int k = 0; k < kPack; ++k) dy[k] = k < left ? (dy[k] - mean) * y[k] * scale : 0.0f;
    store(dx, dy);
}

template <class T, int kPack, class C>
__global__ void __launch_bounds__(C::kThreads) backward(Backward<T> in) {
    constexpr int kPacks = C::kElements / kPack;
    STATIC_SMEM(float, scratch, [C::kWarps]);
    const int lane = static_cast<int>(threadIdx.x) % C::kLanes;
    const Visibility& at = in.visibility;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * C::kRows + threadIdx.x / C::kLanes; row < at.rows;
         row += static_cast<int64_t>(gridDim.x) * C::kRows) {
        const int visible = static_cast<int>(at.columns(row));
        const T *const y = in.y + row * in.y_stride, *const dy = in.dy + row * in.dy_stride;
        Gradient<T, kPack> items[kPacks] = {};
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int column = (i * C::kLanes + lane) * kPack;
            if (column < visible) items[i] = {fetch<kPack>(y + column), fetch<kPack>(dy + column)};
        }
        float mean = 0.0f;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) mean += dot(items[i], visible - (i * C::kLanes + lane) * kPack);
        mean = block_reduce<Sum, C::kWarps>(mean, scratch);
        T* const dx = in.dx + row * at.cols;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int column = (i * C::kLanes + lane) * kPack;
            if (column < at.cols) store_gradient(dx + column, items[i], mean, in.scale, visible - column);
        }
    }
}

template <class T, int kPack>
__global__ void __launch_bounds__(Looped::kThreads) backward_looped(Backward<T> in) {
    constexpr int kPacks = 4;
    constexpr int64_t kStep = static_cast<int64_t>(Looped::kThreads) * kPack;
    STATIC_SMEM(float, scratch, [Looped::kWarps]);
    const Visibility& at = in.visibility;
    for (int64_t row = blockIdx.x; row < at.rows; row += gridDim.x) {
        const int64_t visible = at.columns(row);
        const T *const y = in.y + row * in.y_stride, *const dy = in.dy + row * in.dy_stride;
        float mean = 0.0f;
        for (int64_t first = static_cast<int64_t>(threadIdx.x) * kPack; first < visible; first += kPacks * kStep) {
            Gradient<T, kPack> items[kPacks] = {};
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                const int64_t column = first + i * kStep;
                if (column < visible) items[i] = {fetch<kPack>(y + column), fetch<kPack>(dy + column)};
            }
#pragma unroll
            for (int i = 0; i < kPacks; ++i) mean += dot(items[i], visible - first - i * kStep);
        }
        mean = block_reduce<Sum, Looped::kWarps>(mean, scratch);
        for (int64_t column = static_cast<int64_t>(threadIdx.x) * kPack; column < at.cols; column += kStep) {
            Gradient<T, kPack> item = {};
            if (column < visible) item = {fetch<kPack>(y + column), fetch<kPack>(dy + column)};
            store_gradient(in.dx + row * at.cols + column, item, mean, in.scale, visible - column);
        }
    }
}

template <class Task>
cudaError_t launch_rows(void (*kernel)(Task), int threads, int rows_per_block, const Task& task, Stream stream) {
    const int64_t blocks = (task.visibility.rows + rows_per_block - 1) / rows_per_block;
    return launch(kernel, dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX))),
                  dim3(static_cast<unsigned>(threads)), 0, stream, task);
}

// Calls body with the Cut that fits a row, or with Looped.
template <int kPack, class Body>
cudaError_t with_cut(int64_t cols, const Body& body) {
    if (cols <= Cut<8, 1>::kColumns) return body(Cut<8, 1>{});
    if constexpr (kPack == 1) {  // half as many elements per lane: scalar loads need more registers
        if (cols <= Cut<16, 4>::kColumns) return body(Cut<16, 4>{});
        if (cols <= Cut<16, 8>::kColumns) return body(Cut<16, 8>{});
    } else {
        if (cols <= Cut<32, 1>::kColumns) return body(Cut<32, 1>{});
        if (cols <= Cut<32, 2>::kColumns) return body(Cut<32, 2>{});
        if (cols <= Cut<32, 4>::kColumns) return body(Cut<32, 4>{});
        if (cols <= Cut<32, 16>::kColumns) return body(Cut<32, 16>{});
    }
    return body(Looped{});
}

template <class T, int kPack>
cudaError_t launch_forward(const Forward<T>& task, Stream stream) {
    return with_cut<kPack>(task.visibility.cols, [&](auto cut) {
        using C = decltype(cut);
        if constexpr (std::is_same_v<C, Looped>)
            return launch_rows(forward_looped<T, kPack>, C::kThreads, 1, task, stream);
        else
            return launch_rows(forward<T, kPack, C>, C::kThreads, C::kRows, task, stream);
    });
}

template <class T, int kPack>
cudaError_t launch_backward(const Backward<T>& task, Stream stream) {
    return with_cut<kPack>(task.visibility.cols, [&](auto cut) {
        using C = decltype(cut);
        if constexpr (std::is_same_v<C, Looped>)
            return launch_rows(backward_looped<T, kPack>, C::kThreads, 1, task, stream);
        else
            return launch_rows(backward<T, kPack, C>, C::kThreads, C::kRows, task, stream);
    });
}

Visibility describe(const ScoreRows& in) {
    return {in.mask,  in.mask_batches > 1 ? in.heads * in.seq : 0, in.batches * in.heads * in.seq, in.seq, in.cols,
            in.causal};
}

}  // namespace

const char* scaled_masked_softmax_forward_cuda(const ScoreRows& rows, const void* x, int64_t x_stride, void* y,
                                               Stream stream) {
    const Visibility visibility = describe(rows);
    if (visibility.rows == 0 || visibility.cols == 0) return nullptr;
    return message(dispatch_device(rows.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kPack = Pack<T>::kSize;
        const Forward<T> task{static_cast<const T*>(x), x_stride, static_cast<T*>(y), visibility,
                              static_cast<float>(rows.scale)};
        const bool vectorized = can_vectorize<T>(x, x_stride, rows.cols) && can_vectorize<T>(y, rows.cols, rows.cols) &&
                                can_vectorize<uint8_t, kPack>(rows.mask, rows.cols, rows.cols);
        return vectorized ? launch_forward<T, kPack>(task, stream) : launch_forward<T, 1>(task, stream);
    }));
}

const char* scaled_masked_softmax_backward_cuda(const ScoreRows& rows, const void* dy, int64_t dy_stride, const void* y,
                                                int64_t y_stride, void* dx, Stream stream) {
    const Visibility visibility = describe(rows);
    if (visibility.rows == 0 || visibility.cols == 0) return nullptr;
    return message(dispatch_device(rows.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Backward<T> task{static_cast<const T*>(dy),
                               static_cast<const T*>(y),
                               dy_stride,
                               y_stride,
                               static_cast<T*>(dx),
                               visibility,
                               static_cast<float>(rows.scale)};
        const bool vectorized = can_vectorize<T>(dy, dy_stride, rows.cols) &&
                                can_vectorize<T>(y, y_stride, rows.cols) && can_vectorize<T>(dx, rows.cols, rows.cols);
        return vectorized ? launch_backward<T, Pack<T>::kSize>(task, stream) : launch_backward<T, 1>(task, stream);
    }));
}

}  // namespace neox
