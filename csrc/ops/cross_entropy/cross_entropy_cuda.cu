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

// Calls round(first, masked) for this thread's rounds of kAhead packs, kThreads packs apart, that begin before `end`.
// masked: whether a pack of the round passes the first `columns` columns. Only the last rounds of a row do, so that the
// others need no comparison per element.
template <class T, int kThreadsOfRow, class Round>
NEOX_DEVICE void for_rounds(int columns, int end, const Round& round) {
    constexpr int kSize = Pack<T>::kSize, kPacks = kAhead * kThreadsOfRow;
    constexpr int kSpan =
        (kPacks - kThreadsOfRow + 1) * kSize;  // from a thread's first column to the end of its last pack
    int first = static_cast<int>(threadIdx.x) * kSize;
    for (; first + kSpan <= columns; first += kPacks * kSize) round(first, std::false_type{});
    for (; first < end; first += kPacks * kSize) round(first, std::true_type{});
}

// Number of elements of the pack at `col` within the first `columns`.
template <class T, class Masked>
NEOX_DEVICE int valid_at(int col, int columns, Masked) {
    return Masked::value ? min(columns - col, Pack<T>::kSize) : Pack<T>::kSize;
}

// Adds kAhead packs to the statistics of a row: raw[0] at column `col`, each next one `apart` columns further.
template <class T, class Masked>
NEOX_DEVICE void add_packs(const uint4 (&raw)[kAhead], int col, int apart, int columns, Masked masked, bool need_total,
                           MaxSum& row, float& total) {
    constexpr int kSize = Pack<T>::kSize;
    float value[kAhead * kSize];
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
        float pack[kSize];
        unpack<T>(raw[p], pack);
        const int valid = valid_at<T>(col + p * apart, columns, masked);
#pragma unroll
        for (int k = 0; k < kSize; ++k) value[p * kSize + k] = k < valid ? pack[k] : -INFINITY;
        if (need_total) {
#pragma unroll
            for (int k = 0; k < kSize; ++k) total += k < valid ? pack[k] : 0.0f;
        }
    }
    row.add(value);
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) statistics(Logits in, RowStatistics out, bool need_total) {
    constexpr int kApart = kThreads * Pack<T>::kSize;
    STATIC_SMEM(float, scratch, [kWarps]);
    const int64_t row = blockIdx.x, target = in.targets[row], column = target - in.first_column;
    const int columns = static_cast<int>(in.num_columns);
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    if (target == in.ignore_index) {
        if (threadIdx.x == 0) out.max[row] = 0.0f, out.sum[row] = 1.0f, out.target[row] = 0.0f, out.total[row] = 0.0f;
        return;
    }
    MaxSum mine;
    float total = 0.0f;
    for_rounds<T, kThreads>(columns, columns, [&](int first, auto masked) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p)
            raw[p] = load_raw<kVector>(x + first + p * kApart, valid_at<T>(first + p * kApart, columns, masked));
        add_packs<T>(raw, first, kApart, columns, masked, need_total, mine, total);
    });
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
    float shift, factor, hot, smooth;

    __device__ __forceinline__ RowGradient(const Gradient& out, float max, float sum, float dloss)
        : shift(max), hot(dloss * out.hot), smooth(dloss * out.smooth) {
        factor = dloss * (1.0f + 2.0f * out.z_loss * (max + logf(sum))) / sum;
    }
    // Gradient of a logit that is not the target's.
    __device__ __forceinline__ float of(float logit) const { return exp_nonpositive(logit - shift) * factor - smooth; }
    // Gradient of a pack that does not contain the target. Elements from `valid` on are padding.
    template <class T>
    __device__ __forceinline__ uint4 of_pack(const uint4& raw, int valid) const {
        float value[Pack<T>::kSize];
        unpack<T>(raw, value);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) {
            const float gradient = of(value[k]);
            // computed first, then selected: inside ?: nvcc would branch around the exponential
            value[k] = k >= valid ? 0.0f : gradient;
        }
        return pack<T>(value);
    }
};

// The target's logit, read by the thread that stores its pack: only this thread can read it in place after others have
// begun to store. It stores the target's gradient after its packs, which then need no comparison per element.
template <class T, int kThreadsOfRow>
struct Target {
    bool mine;
    int column;
    float logit = 0.0f;

    // columns: 0 in ignored rows, which have no target
    __device__ __forceinline__ Target(const T* x, int64_t column_in, int columns)
        : mine(column_in >= 0 && column_in < columns &&
               static_cast<int>(column_in) / Pack<T>::kSize % kThreadsOfRow == static_cast<int>(threadIdx.x)),
          column(static_cast<int>(column_in)) {
        if (mine) logit = to_fp32(x[column]);
    }
    __device__ __forceinline__ void store(T* dx, const RowGradient& gradient) const {
        if (mine) dx[column] = from_fp32<T>(gradient.of(logit) - (gradient.hot - gradient.smooth));
    }
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) backward(Logits in, RowStatistics stats, Gradient out, const float* dloss) {
    constexpr int kApart = kThreads * Pack<T>::kSize;
    const int64_t row = blockIdx.x, target = in.targets[row];
    const int columns = target == in.ignore_index ? 0 : static_cast<int>(in.num_columns),  // zeros past them
        cols = static_cast<int>(in.cols);
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    T* const dx = static_cast<T*>(out.dlogits) + row * out.stride;
    const RowGradient gradient(out, stats.max[row], stats.sum[row], dloss[row]);
    const Target<T, kThreads> of_target(x, target - in.first_column, columns);
    for_rounds<T, kThreads>(columns, cols, [&](int first, auto masked) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p)
            raw[p] = load_written<kVector>(x + first + p * kApart, valid_at<T>(first + p * kApart, columns, masked));
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int col = first + p * kApart;
            store_raw<kVector>(dx + col, gradient.of_pack<T>(raw[p], valid_at<T>(col, columns, masked)),
                               valid_at<T>(col, cols, masked));
        }
    });
    of_target.store(dx, gradient);
}

// kStaged: a row fits into shared memory, one uint4 per pack.
template <class T, bool kVector, bool kStaged>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused(Logits in, RowStatistics out, Gradient gradient, float dloss, bool need_total) {
    static_assert(kVector || !kStaged);
    constexpr int kSize = Pack<T>::kSize, kApart = kFusedThreads * kSize;
    STATIC_SMEM(float, scratch, [kFusedWarps]);
    uint4* staged = nullptr;
    if constexpr (kStaged) {
        DYNAMIC_SMEM(memory);
        staged = reinterpret_cast<uint4*>(memory);
    }
    const int64_t row = blockIdx.x, target = in.targets[row], column = target - in.first_column;
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    T* const dx = static_cast<T*>(gradient.dlogits) + row * gradient.stride;
    // Requests the packs of this thread from `col` on, and returns the first that it did not request.
    [[maybe_unused]] const auto stage = [&](int col, int end) {
        for (; col < end; col += kApart) cp_async_16(staged + col / kSize, x + col);
        return col;
    };
    const int cols = static_cast<int>(in.cols), num_columns = static_cast<int>(in.num_columns);
    // 24 KiB of a row are in flight before its target is known. A row that is ignored does not need them.
    [[maybe_unused]] int col = static_cast<int>(threadIdx.x) * kSize;
    if constexpr (kStaged) col = stage(col, min(num_columns, kAhead * kApart));
    const int columns = target == in.ignore_index ? 0 : num_columns;
    if constexpr (kStaged) {
        stage(col, columns);
        cp_async_commit();
    }
    // The thread's pack at `col`, from shared memory or from global memory.
    const auto pack_at = [&](int at, auto masked) {
        if constexpr (kStaged) {
            return !decltype(masked)::value || at < columns ? staged[at / kSize] : make_uint4(0, 0, 0, 0);
        } else {
            return load_written<kVector>(x + at, valid_at<T>(at, columns, masked));
        }
    };
    const Target<T, kFusedThreads> of_target(x, column, columns);
    if (of_target.mine || (threadIdx.x == 0 && !(column >= 0 && column < columns))) out.target[row] = of_target.logit;
    if constexpr (kStaged) cp_async_wait<0>();
    MaxSum part;
    float total = 0.0f;
    for_rounds<T, kFusedThreads>(columns, columns, [&](int first, auto masked) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) raw[p] = pack_at(first + p * kApart, masked);
        add_packs<T>(raw, first, kApart, columns, masked, need_total, part, total);
    });
    MaxSum all = block_merge<kFusedWarps>(part, scratch);
    if (need_total) total = block_reduce<Sum, kFusedWarps>(total, scratch);
    if (columns == 0) all.max = 0.0f, all.sum = 1.0f;
    if (threadIdx.x == 0) out.max[row] = all.max, out.sum[row] = all.sum, out.total[row] = total;
    const RowGradient of_row(gradient, all.max, all.sum, dloss);
    for_rounds<T, kFusedThreads>(columns, cols, [&](int first, auto masked) {
        uint4 raw[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p) raw[p] = pack_at(first + p * kApart, masked);
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
            const int at = first + p * kApart;
            store_raw<kVector>(dx + at, of_row.of_pack<T>(raw[p], valid_at<T>(at, columns, masked)),
                               valid_at<T>(at, cols, masked));
        }
    });
    of_target.store(dx, of_row);
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

// Calls body with a value of the type of the logits. Columns are 32-bit numbers in the kernels.
template <class Body>
const char* run(const Logits& in, const Body& body) {
    if (in.cols >= 1 << 30) return message(cudaErrorInvalidValue);
    return message(dispatch_device(in.dtype, body));
}

template <class T>
bool rows_vectorize(const Logits& in) {
    return can_vectorize<T>(in.data, in.stride, in.cols);
}

}  // namespace

const char* cross_entropy_statistics_cuda(const Logits& logits, const RowStatistics& out, bool need_total,
                                          Stream stream) {
    if (logits.rows == 0) return nullptr;
    return run(logits, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel = rows_vectorize<T>(logits) ? statistics<T, true> : statistics<T, false>;
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream, logits, out,
                      need_total);
    });
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
    return run(logits, [&](auto zero) {
        using T = decltype(zero);
        const bool vectorized = rows_vectorize<T>(logits) && can_vectorize<T>(dlogits, dstride, logits.cols);
        const auto kernel = vectorized ? backward<T, true> : backward<T, false>;
        const Gradient out = gradient_of(terms, dlogits, dstride);
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream, logits, statistics,
                      out, dloss);
    });
}

const char* cross_entropy_fused_cuda(const Logits& logits, const LossTerms& terms, const RowStatistics& out,
                                     float dloss, void* dlogits, int64_t dstride, Stream stream) {
    if (logits.rows == 0) return nullptr;
    return run(logits, [&](auto zero) {
        using T = decltype(zero);
        const bool vectorized = rows_vectorize<T>(logits) && can_vectorize<T>(dlogits, dstride, logits.cols);
        const size_t row = static_cast<size_t>(logits.cols) * sizeof(T);
        const bool staged = vectorized && row + 1024 <= shared_memory_limit();  // leaves room for the static scratch
        const auto kernel = staged ? fused<T, true, true> : vectorized ? fused<T, true, false> : fused<T, false, false>;
        return launch(kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kFusedThreads), staged ? row : 0, stream,
                      logits, out, gradient_of(terms, dlogits, dstride), dloss, terms.label_smoothing > 0);
    });
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
