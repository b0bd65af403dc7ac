#include <cmath>

#include "common/reduce.h"
#include "common/vec.h"
#include "ops/norm/norm.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread

template <class T>
const T* row_of(const void* base, int64_t row, int64_t stride) {
    return base ? static_cast<const T*>(base) + row * stride : nullptr;
}

// Writes s = x + residual to sum and returns it.
template <class T>
const T* add_residual(const NormForward& op, int64_t row) {
    const T* const x = row_of<T>(op.x, row, op.x_stride);
    if (!op.residual) return x;
    const T* const residual = row_of<T>(op.residual, row, op.residual_stride);
    T* const sum = static_cast<T*>(op.sum) + row * op.cols;
    for_each_vec(op.cols, [&](int64_t i, auto load, auto store) { store(sum + i, load(x + i) + load(residual + i)); });
    return sum;
}

struct Statistics {
    float mean, rstd;
};

// Variance of centred values. The mean of squares minus the squared mean would cancel if the mean is large.
template <class T, bool kRms>
Statistics statistics(const T* s, int64_t cols, float eps) {
    const float size = static_cast<float>(cols);
    const float mean =
        kRms ? 0.0f : sum(accumulate<Vec>(cols, [&](int64_t i, auto load, auto) { return load(s + i); })) / size;
    const float squares = sum(accumulate<Vec>(cols, [&](int64_t i, auto load, auto keep) {
        const Vec centred = keep(load(s + i) - mean);
        return centred * centred;
    }));
    return {mean, 1.0f / std::sqrt(squares / size + eps)};
}

template <class T, bool kRms>
void forward(const NormForward& op, const Parallel& parallel) {
    parallel(op.rows, kGrain / (op.cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* const s = add_residual<T>(op, row);
            const auto [mean, rstd] = statistics<T, kRms>(s, op.cols, op.eps);
            if (!kRms) op.mean[row] = mean;
            op.rstd[row] = rstd;
            for (int k = 0; k < op.outputs; ++k) {
                const T* const weight = static_cast<const T*>(op.parameters[k].weight);
                const T* const bias = static_cast<const T*>(op.parameters[k].bias);
                T* const y = static_cast<T*>(op.y[k]) + row * op.cols;
                for_each_vec(op.cols, [&, mean = mean, rstd = rstd](int64_t i, auto load, auto store) {
                    const Vec scaled = (load(s + i) - mean) * rstd * load(weight + i);
                    store(y + i, bias ? scaled + load(bias + i) : scaled);
                });
            }
        }
    });
}

struct GradientSums {
    Vec g, gn;
    NEOX_INLINE void operator+=(const GradientSums& other) {
        g += other.g;
        gn += other.gn;
    }
};

// Processes one row: writes ds and adds the row's terms of dw_k and db_k to the block's sums.
template <class T, bool kRms, int kOutputs>
void backward_row(const NormBackward& op, int64_t row, float* const* dweight, float* const* dbias) {
    const T* const s = row_of<T>(op.s, row, op.s_stride);
    const T* const dsum = row_of<T>(op.dsum, row, op.dsum_stride);
    const T* const dy0 = row_of<T>(op.dy[0], row, op.dy_stride[0]);
    const T* const dy1 = kOutputs > 1 ? row_of<T>(op.dy[1], row, op.dy_stride[1]) : nullptr;
    const T* const w0 = static_cast<const T*>(op.weight[0]);
    const T* const w1 = static_cast<const T*>(op.weight[1]);
    T* const ds = static_cast<T*>(op.ds) + row * op.cols;
    const float mean = kRms ? 0.0f : op.mean[row];
    const float rstd = op.rstd[row];
    const auto gradient = [&](int64_t i, auto load) {
        const Vec g = load(dy0 + i) * load(w0 + i);
        return kOutputs > 1 ? g + load(dy1 + i) * load(w1 + i) : g;
    };
    const GradientSums sums = accumulate<GradientSums>(op.cols, [&](int64_t i, auto load, auto) {
        const Vec g = gradient(i, load);
        return GradientSums{g, g * ((load(s + i) - mean) * rstd)};
    });
    const float mean_g = kRms ? 0.0f : sum(sums.g) / static_cast<float>(op.cols);
    const float mean_gn = sum(sums.gn) / static_cast<float>(op.cols);
    for_each_vec(op.cols, [&](int64_t i, auto load, auto store) {
        const auto add = [&](float* total, Vec v) { store(total + i, load(static_cast<const float*>(total) + i) + v); };
        const Vec n = (load(s + i) - mean) * rstd;
        const Vec d = (gradient(i, load) - mean_g - n * mean_gn) * rstd;
        store(ds + i, dsum ? d + load(dsum + i) : d);
        add(dweight[0], load(dy0 + i) * n);
        if (dbias[0]) add(dbias[0], load(dy0 + i));
        if (kOutputs > 1) add(dweight[1], load(dy1 + i) * n);
        if (kOutputs > 1 && dbias[1]) add(dbias[1], load(dy1 + i));
    });
}

template <class T, bool kRms, int kOutputs>
void backward(const NormBackward& op, const Parallel& parallel) {
    const Blocks blocks(op.rows);
    const int64_t plane = blocks.count * op.cols;  // elements per parameter in partial
    const auto partial = [&](int k, bool bias, int64_t block) {
        return bias && !op.dbias[k] ? nullptr : op.partial + (2 * k + (bias ? 1 : 0)) * plane + block * op.cols;
    };
    parallel(blocks.count, kGrain / (blocks.size * op.cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            float* const dweight[2] = {partial(0, false, block), kOutputs > 1 ? partial(1, false, block) : nullptr};
            float* const dbias[2] = {partial(0, true, block), kOutputs > 1 ? partial(1, true, block) : nullptr};
            for (float* sums : {dweight[0], dweight[1], dbias[0], dbias[1]}) {
                if (sums) std::fill_n(sums, op.cols, 0.0f);
            }
            for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row)
                backward_row<T, kRms, kOutputs>(op, row, dweight, dbias);
        }
    });
    for (int k = 0; k < kOutputs; ++k) {
        sum_blocks(op.partial + 2 * k * plane, blocks.count, op.cols, static_cast<T*>(op.dweight[k]), parallel);
        if (op.dbias[k])
            sum_blocks(op.partial + (2 * k + 1) * plane, blocks.count, op.cols, static_cast<T*>(op.dbias[k]), parallel);
    }
}

}  // namespace

void norm_forward_cpu(const NormForward& op, const Parallel& parallel) {
    dispatch(op.dtype, [&](auto zero) {
        using T = decltype(zero);
        (op.rms ? forward<T, true> : forward<T, false>)(op, parallel);
    });
}

void norm_backward_cpu(const NormBackward& op, const Parallel& parallel) {
    dispatch(op.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto one = op.rms ? backward<T, true, 1> : backward<T, false, 1>;
        const auto two = op.rms ? backward<T, true, 2> : backward<T, false, 2>;
        (op.outputs > 1 ? two : one)(op, parallel);
    });
}

}  // namespace neox
