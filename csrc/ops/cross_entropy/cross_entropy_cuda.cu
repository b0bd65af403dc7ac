// The logits are the largest tensor of a model and their rows are long: one block processes one row. Maximum and sum
// are computed in one pass by rescaling the sum when the maximum grows (one more exponential per 32 elements), so that
// the statistics read the logits once and buffer no row. The gradient reads and writes them once. Each pack is read and
// written by the same thread, so that it may be in place.
//
// Each thread requests 64 bytes before it uses any: 16 KiB per block, 4 or 5 blocks and 64 KiB per multiprocessor,
// where bandwidth times latency of an H100 is about 20 KiB. There is no barrier before the end of the row, and other
// blocks load while one reduces. Two exponentials and some ten instructions per element take about half of the time of
// its 6 bytes.
//
// `fused` reads the logits once: a row is requested at once and stays in shared memory until its sum is known. Two rows
// of 50,304 bf16 columns (98 KiB) fit into the 227 KiB of a multiprocessor, so that one loads while the other is
// processed. A thread reads back only what it requested itself. Rows that do not fit or are misaligned are read twice,
// the second time mostly from L2.
#include "common/reduce.cuh"
#include "common/row_packs.cuh"
#include "ops/cross_entropy/cross_entropy.h"

namespace neox {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kAhead = 4;  // packs that a thread requests at a time
constexpr int kFusedThreads = 384, kFusedWarps = kFusedThreads / kWarpSize;

// Adds kAhead packs to the statistics of a row: raw[0] at column `col`, each next one `apart` columns further.
template <class T>
NEOX_DEVICE void add_packs(const uint4 (&raw)[kAhead], int64_t col, int64_t apart, int64_t columns, bool need_total,
                           MaxSum& row, float& total) {
    constexpr int kSize = Pack<T>::kSize;
    float value[kAhead * kSize];
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
        float pack[kSize];
        unpack<T>(raw[p], pack);
        const int valid = valid_of<T>(columns - col - p * apart);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
            value[p * kSize + k] = k < valid ? pack[k] : -INFINITY;
            if (need_total) total += k < valid ? pack[k] : 0.0f;
        }
    }
    row.add(value);
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) statistics(Logits in, RowStatistics out, bool need_total) {
    constexpr int kSize = Pack<T>::kSize;
    STATIC_SMEM(float, scratch, [kWarps]);
    const int64_t row = blockIdx.x, target = in.targets[row], column = target - in.first_column;
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    if (target == in.ignore_index) {
        if (threadIdx.x == 0) out.max[row] = 0.0f, out.sum[row] = 1.0f, out.target[row] = 0.0f, out.total[row] = 0.0f;
        return;
    }
    MaxSum mine;
    float total = 0.0f;
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * kSize; first < in.num_columns;
         first += kThreads * kSize * kAhead) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p)
            raw[p] = load_raw<kVector>(x + first + p * kThreads * kSize,
                                       valid_of<T>(in.num_columns - first - p * kThreads * kSize));
        add_packs<T>(raw, first, kThreads * kSize, in.num_columns, need_total, mine, total);
    }
    const MaxSum all = block_merge<kWarps>(mine, scratch);
    if (need_total) total = block_reduce<Sum, kWarps>(total, scratch);
    if (threadIdx.x != 0) return;
    out.max[row] = all.max;
    out.sum[row] = all.sum;
    out.total[row] = total;
    out.target[row] = column >= 0 && column < in.num_columns ? to_fp32(x[column]) : 0.0f;
}

// A target outside the vocabulary gives NaN. Only the host could raise an error.
__global__ void __launch_bounds__(kThreads) losses(int64_t rows, const int64_t* targets, int64_t ignore_index,
                                                   LossTerms terms, RowStatistics stats, float* loss) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows) return;
    const double shift = stats.max[row], log_sum = log(static_cast<double>(stats.sum[row]));
    const double mean = stats.total[row] / static_cast<double>(terms.vocab_size);
    double value = (1 - terms.label_smoothing) * (shift - stats.target[row] + log_sum);
    if (terms.label_smoothing > 0) value += terms.label_smoothing * (shift - mean + log_sum);
    if (terms.z_loss > 0) value += terms.z_loss * (shift + log_sum) * (shift + log_sum);
    const bool inside = targets[row] >= 0 && targets[row] < terms.vocab_size;
    loss[row] = targets[row] == ignore_index ? 0.0f : inside ? static_cast<float>(value) : NAN;
}

struct Gradient {
    void* dlogits;
    int64_t stride;
    // subtracted from the probability of the target, 1 - label smoothing + smooth; of others, label smoothing /
    // vocab_size
    float z_loss, hot, smooth;
};

// The map from a row's logits to their gradient.
struct RowGradient {
    int64_t column;  // of the target
    float shift, factor, hot, smooth;

    __device__ __forceinline__ RowGradient(const Gradient& out, int64_t column_in, float max, float sum, float dloss)
        : column(column_in), shift(max), hot(dloss * out.hot), smooth(dloss * out.smooth) {
        factor = dloss * (1.0f + 2.0f * out.z_loss * (max + logf(sum))) / sum;
    }
    // Gradient of the pack at `col`. Elements from `valid` on are padding.
    template <class T>
    __device__ __forceinline__ uint4 of(const uint4& raw, int64_t col, int valid) const {
        float value[Pack<T>::kSize];
        unpack<T>(raw, value);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) {
            const float gradient = exp_nonpositive(value[k] - shift) * factor - (col + k == column ? hot : smooth);
            // computed first, then selected: inside ?: nvcc would branch around the exponential
            value[k] = k >= valid ? 0.0f : gradient;
        }
        return pack<T>(value);
    }
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) backward(Logits in, RowStatistics stats, Gradient out, const float* dloss) {
    constexpr int kSize = Pack<T>::kSize;
    const int64_t row = blockIdx.x, target = in.targets[row];
    const int64_t columns = target == in.ignore_index ? 0 : in.num_columns;  // zeros past them
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    T* const dx = static_cast<T*>(out.dlogits) + row * out.stride;
    const RowGradient gradient(out, target - in.first_column, stats.max[row], stats.sum[row], dloss[row]);
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * kSize; first < in.cols;
         first += kThreads * kSize * kAhead) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int64_t col = first + p * kThreads * kSize;
            raw[p] = load_written<kVector>(x + col, valid_of<T>(columns - col));
        }
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int64_t col = first + p * kThreads * kSize;
            store_raw<kVector>(dx + col, gradient.of<T>(raw[p], col, valid_of<T>(columns - col)),
                               valid_of<T>(in.cols - col));
        }
    }
}

// kStaged: a row fits into shared memory, one uint4 per pack.
template <class T, bool kVector, bool kStaged>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused(Logits in, RowStatistics out, Gradient gradient, float dloss, bool need_total) {
    static_assert(kVector || !kStaged);
    constexpr int kSize = Pack<T>::kSize, kRound = kFusedThreads * kSize;
    STATIC_SMEM(float, scratch, [kFusedWarps]);
    uint4* staged = nullptr;
    if constexpr (kStaged) {
        DYNAMIC_SMEM(memory);
        staged = reinterpret_cast<uint4*>(memory);
    }
    const int64_t row = blockIdx.x, target = in.targets[row], column = target - in.first_column;
    const int64_t columns = target == in.ignore_index ? 0 : in.num_columns,
                  mine = static_cast<int64_t>(threadIdx.x) * kSize;
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    T* const dx = static_cast<T*>(gradient.dlogits) + row * gradient.stride;
    // The thread's pack at `col`, from shared memory or from global memory.
    const auto pack_at = [&](int64_t col) {
        if constexpr (kStaged) {
            return col < columns ? staged[col / kSize] : make_uint4(0, 0, 0, 0);
        } else {
            return load_written<kVector>(x + col, valid_of<T>(columns - col));
        }
    };
    if constexpr (kStaged) {
        for (int64_t col = mine; col < columns; col += kRound) cp_async_16(staged + col / kSize, x + col);
        cp_async_commit();
    }
    // Read before the barriers of block_merge: after them other threads overwrite the logits with the gradient.
    const float logit = threadIdx.x == 0 && column >= 0 && column < columns ? to_fp32(x[column]) : 0.0f;
    if constexpr (kStaged) cp_async_wait<0>();
    MaxSum part;
    float total = 0.0f;
    for (int64_t first = mine; first < columns; first += kRound * kAhead) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) raw[p] = pack_at(first + p * kRound);
        add_packs<T>(raw, first, kRound, columns, need_total, part, total);
    }
    MaxSum all = block_merge<kFusedWarps>(part, scratch);
    if (need_total) total = block_reduce<Sum, kFusedWarps>(total, scratch);
    if (columns == 0) all.max = 0.0f, all.sum = 1.0f;
    if (threadIdx.x == 0)
        out.max[row] = all.max, out.sum[row] = all.sum, out.target[row] = logit, out.total[row] = total;
    const RowGradient of_row(gradient, column, all.max, all.sum, dloss);
    for (int64_t first = mine; first < in.cols; first += kRound * kAhead) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) raw[p] = pack_at(first + p * kRound);
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int64_t col = first + p * kRound;
            store_raw<kVector>(dx + col, of_row.of<T>(raw[p], col, valid_of<T>(columns - col)),
                               valid_of<T>(in.cols - col));
        }
    }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) rescale(FusedGradient gradient, const float* dloss) {
    constexpr int kSize = Pack<T>::kSize;
    const int64_t row = blockIdx.x;
    const float wanted = dloss[row], ratio = wanted / gradient.made_for;
    if (wanted == gradient.made_for) return;
    T* const dx = static_cast<T*>(gradient.data) + row * gradient.stride;
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * kSize; col < gradient.cols; col += kThreads * kSize) {
        const int valid = valid_of<T>(gradient.cols - col);
        float value[kSize];
        unpack<T>(load_written<kVector>(dx + col, valid), value);
#pragma unroll
        for (int k = 0; k < kSize; ++k) value[k] *= ratio;
        store_raw<kVector>(dx + col, pack<T>(value), valid);
    }
}

Gradient gradient_of(const LossTerms& terms, void* dlogits, int64_t dstride) {
    const double smooth = terms.label_smoothing / static_cast<double>(terms.vocab_size);
    return {dlogits, dstride, static_cast<float>(terms.z_loss), static_cast<float>(1 - terms.label_smoothing + smooth),
            static_cast<float>(smooth)};
}

template <class T>
bool rows_vectorize(const Logits& in) {
    return can_vectorize<T>(in.data, in.stride, in.cols);
}

}  // namespace

const char* cross_entropy_statistics_cuda(const Logits& logits, const RowStatistics& out, bool need_total,
                                          Stream stream) {
    if (logits.rows == 0) return nullptr;
    return message(dispatch_device(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel = rows_vectorize<T>(logits) ? statistics<T, true> : statistics<T, false>;
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream, logits, out,
                      need_total);
    }));
}

const char* cross_entropy_loss_cuda(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms,
                                    const RowStatistics& statistics, float* loss, Stream stream) {
    if (rows == 0) return nullptr;
    const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
    return message(
        launch(losses, dim3(blocks), dim3(kThreads), 0, stream, rows, targets, ignore_index, terms, statistics, loss));
}

const char* cross_entropy_backward_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics,
                                        const float* dloss, void* dlogits, int64_t dstride, Stream stream) {
    if (logits.rows == 0 || logits.cols == 0) return nullptr;
    return message(dispatch_device(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool vectorized = rows_vectorize<T>(logits) && can_vectorize<T>(dlogits, dstride, logits.cols);
        const auto kernel = vectorized ? backward<T, true> : backward<T, false>;
        const Gradient out = gradient_of(terms, dlogits, dstride);
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream, logits, statistics,
                      out, dloss);
    }));
}

const char* cross_entropy_fused_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& out,
                                     float dloss, void* dlogits, int64_t dstride, Stream stream) {
    if (logits.rows == 0) return nullptr;
    return message(dispatch_device(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool vectorized = rows_vectorize<T>(logits) && can_vectorize<T>(dlogits, dstride, logits.cols);
        const size_t row = static_cast<size_t>(logits.cols) * sizeof(T);
        const bool staged = vectorized && row + 1024 <= shared_memory_limit();  // leaves room for the static scratch
        const auto kernel = staged ? fused<T, true, true> : vectorized ? fused<T, true, false> : fused<T, false, false>;
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kFusedThreads), staged ? row : 0, stream,
                      logits, out, gradient_of(terms, dlogits, dstride), dloss, terms.label_smoothing > 0);
    }));
}

const char* cross_entropy_rescale_cuda(const FusedGradient& gradient, const float* dloss, Stream stream) {
    if (gradient.rows == 0 || gradient.cols == 0) return nullptr;
    return message(dispatch_device(gradient.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel =
            can_vectorize<T>(gradient.data, gradient.stride, gradient.cols) ? rescale<T, true> : rescale<T, false>;
        return launch(kernel, dim3(static_cast<unsigned>(gradient.rows)), dim3(kThreads), 0, stream, gradient, dloss);
    }));
}

}  // namespace neox
