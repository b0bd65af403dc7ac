// The logits are the largest tensor of a model, and a row of them is long: a block takes one. Maximum and sum are found in one pass by rescaling
// the sum when the maximum grows (one more exponential per 32 elements), so the statistics read the logits once and need no room for a row;
// the gradient reads and writes them once, each pack by one thread, which is why it may be in place. Each thread requests 64 bytes before
// it uses any: 16 KiB a block, 4 or 5 blocks and 64 KiB a multiprocessor, where an H100's bandwidth times latency is about 20 KiB; there is
// no barrier until the end of the row, and other blocks load while one reduces. Two exponentials and some ten instructions an element
// take about half of the time that its 6 bytes take.
#include "common/reduce.cuh"
#include "common/row_packs.cuh"
#include "ops/cross_entropy/cross_entropy.h"

namespace neox {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kAhead = 4;  // packs that a thread requests at a time

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
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * kSize; first < in.num_columns; first += kThreads * kSize * kAhead) {
        uint4 raw[kAhead];
        float value[kAhead * kSize];
#pragma unroll
        for (int p = 0; p < kAhead; ++p)
            raw[p] = load_raw<kVector>(x + first + p * kThreads * kSize, valid_of<T>(in.num_columns - first - p * kThreads * kSize));
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            float pack[kSize];
            unpack<T>(raw[p], pack);
            const int valid = valid_of<T>(in.num_columns - first - p * kThreads * kSize);
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                value[p * kSize + k] = k < valid ? pack[k] : -INFINITY;
                if (need_total) total += k < valid ? pack[k] : 0.0f;
            }
        }
        mine.add(value);
    }
    const MaxSum all = block_merge<kWarps>(mine, scratch);
    if (need_total) total = block_reduce<Sum, kWarps>(total, scratch);
    if (threadIdx.x != 0) return;
    out.max[row] = all.max;
    out.sum[row] = all.sum;
    out.total[row] = total;
    out.target[row] = column >= 0 && column < in.num_columns ? to_fp32(x[column]) : 0.0f;
}

// A target outside the vocabulary, which only the host could refuse, gives NaN.
__global__ void __launch_bounds__(kThreads)
    losses(int64_t rows, const int64_t* targets, int64_t ignore_index, LossTerms terms, RowStatistics stats, float* loss) {
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
    const float* dloss;
    void* dlogits;
    int64_t stride;
    float z_loss, hot, smooth;  // hot: 1 - label smoothing; smooth: label smoothing / vocab_size
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) backward(Logits in, RowStatistics stats, Gradient out) {
    constexpr int kSize = Pack<T>::kSize;
    const int64_t row = blockIdx.x, target = in.targets[row];
    const bool ignored = target == in.ignore_index;
    const int64_t column = target - in.first_column, columns = ignored ? 0 : in.num_columns;  // beyond them: zeros
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    T* const dx = static_cast<T*>(out.dlogits) + row * out.stride;
    const float shift = stats.max[row], dloss = out.dloss[row], hot = dloss * out.hot, smooth = dloss * out.smooth;
    const float factor = dloss * (1.0f + 2.0f * out.z_loss * (shift + logf(stats.sum[row]))) / stats.sum[row];
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * kSize; first < in.cols; first += kThreads * kSize * kAhead) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int64_t col = first + p * kThreads * kSize;
            raw[p] = load_written<kVector>(x + col, valid_of<T>(columns - col));
        }
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int64_t col = first + p * kThreads * kSize;
            const int valid = valid_of<T>(columns - col);
            float value[kSize];
            unpack<T>(raw[p], value);
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                const float gradient = exp_nonpositive(value[k] - shift) * factor - smooth;
                value[k] = k >= valid ? 0.0f : col + k == column ? gradient - hot : gradient;
            }
            store_raw<kVector>(dx + col, pack<T>(value), valid_of<T>(in.cols - col));
        }
    }
}

template <class T>
bool rows_fit(const Logits& in) {
    return packs_fit<T>(in.data, in.stride, in.cols);
}

}  // namespace

const char* cross_entropy_statistics_cuda(const Logits& logits, const RowStatistics& out, bool need_total, Stream stream) {
    if (logits.rows == 0) return nullptr;
    return message(dispatch_device(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel = rows_fit<T>(logits) ? statistics<T, true> : statistics<T, false>;
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream, logits, out, need_total);
    }));
}

const char* cross_entropy_loss_cuda(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms, const RowStatistics& statistics,
                                    float* loss, Stream stream) {
    if (rows == 0) return nullptr;
    const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
    return message(launch(losses, dim3(blocks), dim3(kThreads), 0, stream, rows, targets, ignore_index, terms, statistics, loss));
}

const char* cross_entropy_backward_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics, const float* dloss, void* dlogits,
                                        int64_t dstride, Stream stream) {
    if (logits.rows == 0 || logits.cols == 0) return nullptr;
    const Gradient out{dloss,
                       dlogits,
                       dstride,
                       static_cast<float>(terms.z_loss),
                       static_cast<float>(1 - terms.label_smoothing),
                       static_cast<float>(terms.label_smoothing / static_cast<double>(terms.vocab_size))};
    return message(dispatch_device(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool fit = rows_fit<T>(logits) && packs_fit<T>(dlogits, dstride, logits.cols);
        const auto kernel = fit ? backward<T, true> : backward<T, false>;
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream, logits, statistics, out);
    }));
}

}  // namespace neox
