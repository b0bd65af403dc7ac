#include <cmath>
#include <limits>

#include "common/vec.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread
constexpr int kChains = 4;         // independent partial results, which hide the latency of the additions
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Folds a row with fold(accumulator, values). Accumulators start at `start`; lanes past the end of the row hold
// `filler`.
template <class T, class Fold>
NEOX_INLINE void fold_row(const T* x, int64_t size, float filler, Vec (&accumulators)[kChains], const Fold& fold) {
    constexpr int64_t kStep = kChains * kVecWidth;
    int64_t i = 0;
    for (; i + kStep <= size; i += kStep) {
        for (int chain = 0; chain < kChains; ++chain)
            accumulators[chain] = fold(accumulators[chain], load(x + i + chain * kVecWidth));
    }
    for (; i + kVecWidth <= size; i += kVecWidth) accumulators[0] = fold(accumulators[0], load(x + i));
    if (i < size) {
        const Vec rest = load(x + i, size - i);
        accumulators[0] = fold(accumulators[0], lane_index() < static_cast<int32_t>(size - i) ? rest : splat(filler));
    }
}

template <class T>
float row_max(const T* x, int64_t size) {
    Vec best[kChains] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
    fold_row(x, size, -kInfinity, best, [](Vec a, Vec v) { return max(a, v); });
    return max_lane(max(max(best[0], best[1]), max(best[2], best[3])));
}

// A NaN in the row propagates to the sum, but not to the maximum.
template <class T>
float row_sum_exp(const T* x, int64_t size, float shift) {
    Vec sums[kChains] = {};
    fold_row(x, size, -kInfinity, sums, [shift](Vec a, Vec v) { return a + exp_nonpositive(v - shift); });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
float row_sum(const T* x, int64_t size) {
    Vec sums[kChains] = {};
    fold_row(x, size, 0.0f, sums, [](Vec a, Vec v) { return a + v; });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void statistics_of_row(const Logits& in, const RowStatistics& out, bool need_total, int64_t row) {
    out.total[row] = 0;
    out.target[row] = 0;
    if (in.targets[row] == in.ignore_index) {
        out.max[row] = 0;
        out.sum[row] = 1;
        return;
    }
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    const int64_t column = in.targets[row] - in.first_column;
    const float best = row_max(x, in.num_columns);
    out.max[row] = best;
    out.sum[row] = row_sum_exp(x, in.num_columns, best);
    if (column >= 0 && column < in.num_columns) out.target[row] = to_float(x[column]);
    if (need_total) out.total[row] = row_sum(x, in.num_columns);
}

template <class T>
void backward_row(const T* x, T* dx, int64_t size, float shift, float factor, float offset) {
    for_each_vec(size, [&](int64_t i, auto load, auto store) {
        store(dx + i, exp_nonpositive(load(x + i) - shift) * factor - offset);
    });
}

template <class T>
void gradient_of_row(const Logits& in, const LossTerms& terms, const RowStatistics& stats, float dloss, T* dx,
                     int64_t row) {
    const bool ignored = in.targets[row] == in.ignore_index;
    for (int64_t i = ignored ? 0 : in.num_columns; i < in.cols; ++i) dx[i] = from_float<T>(0);
    if (ignored) return;
    const T* const x = static_cast<const T*>(in.data) + row * in.stride;
    const double smooth = terms.label_smoothing / static_cast<double>(terms.vocab_size);
    const double log_sum = static_cast<double>(stats.max[row]) + std::log(static_cast<double>(stats.sum[row]));
    const double factor = dloss * (1 + 2 * terms.z_loss * log_sum) / stats.sum[row];
    const int64_t column = in.targets[row] - in.first_column;
    const bool local = column >= 0 && column < in.num_columns;
    const float logit = local ? to_float(x[column]) : 0;  // read before dx, which may alias x, is written
    backward_row(x, dx, in.num_columns, stats.max[row], static_cast<float>(factor), static_cast<float>(dloss * smooth));
    if (local) {
        const double share = std::exp(static_cast<double>(logit) - stats.max[row]) * factor;
        dx[column] = from_float<T>(static_cast<float>(share - dloss * (smooth + 1 - terms.label_smoothing)));
    }
}

// Calls body(row) for all rows. One thread processes a row.
template <class Body>
void for_rows(int64_t rows, int64_t cols, const Parallel& parallel, const Body& body) {
    parallel(rows, kGrain / (cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row);
    });
}

}  // namespace

void cross_entropy_statistics_cpu(const Logits& logits, const RowStatistics& out, bool need_total,
                                  const Parallel& parallel) {
    dispatch(logits.dtype, [&](auto zero) {
        for_rows(logits.rows, logits.cols, parallel,
                 [&](int64_t row) { statistics_of_row<decltype(zero)>(logits, out, need_total, row); });
    });
}

void cross_entropy_loss_cpu(int64_t rows, const int64_t* targets, int64_t ignore_index, const LossTerms& terms,
                            const RowStatistics& stats, float* loss, const Parallel& parallel) {
    parallel(rows, kGrain / 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const double shift = stats.max[row];
            const double log_sum = std::log(static_cast<double>(stats.sum[row]));
            const double mean = stats.total[row] / static_cast<double>(terms.vocab_size);
            const double smoothed = terms.label_smoothing * (shift - mean + log_sum);
            const double value = (1 - terms.label_smoothing) * (shift - stats.target[row] + log_sum) +
                                 (terms.label_smoothing > 0 ? smoothed : 0);
            const double squared = terms.z_loss > 0 ? terms.z_loss * (shift + log_sum) * (shift + log_sum) : 0;
            loss[row] = targets[row] == ignore_index ? 0.0f : static_cast<float>(value + squared);
        }
    });
}

void cross_entropy_backward_cpu(const Logits& logits, const LossTerms& terms, const RowStatistics& statistics,
                                const float* dloss, void* dlogits, int64_t dstride, const Parallel& parallel) {
    dispatch(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        for_rows(logits.rows, logits.cols, parallel, [&](int64_t row) {
            gradient_of_row(logits, terms, statistics, dloss[row], static_cast<T*>(dlogits) + row * dstride, row);
        });
    });
}

// The row is still in the thread's cache when its gradient is computed.
void cross_entropy_fused_cpu(const Logits& logits, const LossTerms& terms, const RowStatistics& out, float dloss,
                             void* dlogits, int64_t dstride, const Parallel& parallel) {
    dispatch(logits.dtype, [&](auto zero) {
        using T = decltype(zero);
        for_rows(logits.rows, logits.cols, parallel, [&](int64_t row) {
            statistics_of_row<T>(logits, out, terms.label_smoothing > 0, row);
            gradient_of_row(logits, terms, out, dloss, static_cast<T*>(dlogits) + row * dstride, row);
        });
    });
}

void cross_entropy_rescale_cpu(const FusedGradient& gradient, const float* dloss, const Parallel& parallel) {
    dispatch(gradient.dtype, [&](auto zero) {
        using T = decltype(zero);
        for_rows(gradient.rows, gradient.cols, parallel, [&](int64_t row) {
            if (dloss[row] == gradient.made_for) return;
            const float ratio = dloss[row] / gradient.made_for;
            T* const dx = static_cast<T*>(gradient.data) + row * gradient.stride;
            for_each_vec(gradient.cols, [&](int64_t i, auto load, auto store) { store(dx + i, load(dx + i) * ratio); });
        });
    });
}

}  // namespace neox
