// The CUDA kernels of cross_entropy: full and sharded vocabularies, padding columns, ignored and invalid targets,
// z-loss and label smoothing, in-place gradients and gradients in a separate buffer, strided and misaligned rows; and
// the bytes moved.
#include "op_test.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;

constexpr int64_t kIgnored = -100;

struct Case {
    int64_t rows, cols, gap;
    size_t offset;
    int64_t vocab_size, shards;
    double z_loss, label_smoothing;
    bool in_place;
    int64_t gradient_gap = 0;  // of a gradient that is not in place
    size_t gradient_offset = 0;
};

size_t index(int64_t at) { return static_cast<size_t>(at); }

// The columns of one process and their results.
template <class T>
struct Shard {
    Case in;
    int64_t stride = in.cols + in.gap, gradient_stride = in.cols + in.gradient_gap, first, num_columns;
    Buffer<T> logits{"logits", index((in.rows - 1) * stride + in.cols), Role::kStream, in.offset};
    Buffer<T> gradient{"gradient", in.in_place ? 0 : index((in.rows - 1) * gradient_stride + in.cols), Role::kStream,
                       in.gradient_offset};
    Buffer<float> statistics{"statistics", index(4 * in.rows)};

    Shard(const Case& chosen, int64_t which) : in(chosen), first(which * in.cols) {
        num_columns = std::min(std::max(in.vocab_size - first, int64_t{0}), in.cols);
        logits.random(static_cast<unsigned>(3 + which), 4.0f);
    }
    neox::Logits describe(const Buffer<int64_t>& targets) {
        return {emu_test::dtype_of<T>(), in.rows, in.cols,        num_columns, first,
                logits.data(),           stride,  targets.data(), kIgnored};
    }
    neox::RowStatistics rows_of() {
        float* const data = statistics.data();
        return {data, data + in.rows, data + 2 * in.rows, data + 3 * in.rows};
    }
    void* dlogits() { return in.in_place ? logits.data() : gradient.data(); }
    int64_t dstride() const { return in.in_place ? stride : gradient_stride; }
    float dlogit(int64_t row, int64_t col) {
        return static_cast<float>(static_cast<const T*>(dlogits())[row * dstride() + col]);
    }
};

// Combines the statistics as a process group does between the kernels.
template <class T>
void combine(std::vector<std::unique_ptr<Shard<T>>>& shards, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        float max = -INFINITY, sum = 0.0f, target = 0.0f, total = 0.0f;
        for (auto& shard : shards) max = std::max(max, shard->rows_of().max[row]);
        for (auto& shard : shards) {
            const neox::RowStatistics mine = shard->rows_of();
            sum += mine.sum[row] * std::exp(mine.max[row] - max);
            target += mine.target[row], total += mine.total[row];
        }
        for (auto& shard : shards) {
            const neox::RowStatistics mine = shard->rows_of();
            mine.max[row] = max, mine.sum[row] = sum, mine.target[row] = target, mine.total[row] = total;
        }
    }
}

// The second row is ignored, and the last one has the last id.
void fill_targets(Buffer<int64_t>& targets, const Case& in) {
    for (int64_t row = 0; row < in.rows; ++row)
        targets[index(row)] = row == 1 ? kIgnored : row == in.rows - 1 ? in.vocab_size - 1 : row * 5 % in.vocab_size;
}

template <class T>
void check(const Case& in) {
    Buffer<int64_t> targets("targets", index(in.rows));
    fill_targets(targets, in);
    if (in.cols < in.vocab_size) targets[2] = in.cols;  // the first column of the second shard
    Buffer<float> dloss("dloss", index(in.rows)), loss("loss", index(in.rows));
    dloss.random(2);
    const neox::LossTerms terms{in.vocab_size, in.z_loss, in.label_smoothing};
    std::vector<std::unique_ptr<Shard<T>>> shards;
    std::vector<double> x;  // [rows, shards * cols], copied before gradients overwrite them
    for (int64_t i = 0; i < in.shards; ++i) shards.push_back(std::make_unique<Shard<T>>(in, i));
    for (int64_t row = 0; row < in.rows; ++row) {
        for (auto& shard : shards) {
            for (int64_t col = 0; col < in.cols; ++col)
                x.push_back(static_cast<float>(shard->logits[index(row * shard->stride + col)]));
        }
    }
    for (auto& shard : shards)
        EXPECT(!neox::cross_entropy_statistics_cuda(shard->describe(targets), shard->rows_of(), in.label_smoothing > 0,
                                                    nullptr));
    combine(shards, in.rows);
    EXPECT(!neox::cross_entropy_loss_cuda(in.rows, targets.data(), kIgnored, terms, shards[0]->rows_of(), loss.data(),
                                          nullptr));
    std::vector<double> expected_loss(index(in.rows)), expected(x.size());
    double scale = 0, error = 0;
    for (auto& shard : shards) {
        EXPECT(!neox::cross_entropy_backward_cuda(shard->describe(targets), terms, shard->rows_of(), dloss.data(),
                                                  shard->dlogits(), shard->dstride(), nullptr));
    }
    const int64_t width = in.shards * in.cols;
    for (int64_t row = 0; row < in.rows; ++row) {
        const double* const values = x.data() + row * width;
        const int64_t target = targets[index(row)];
        double sum = 0, total = 0;
        for (int64_t col = 0; col < in.vocab_size; ++col) sum += std::exp(values[col]), total += values[col];
        const double log_sum = std::log(sum), smoothing = in.label_smoothing,
                     vocab = static_cast<double>(in.vocab_size);
        if (target != kIgnored) {
            expected_loss[index(row)] = (1 - smoothing) * (log_sum - values[target]) +
                                        smoothing * (log_sum - total / vocab) + in.z_loss * log_sum * log_sum;
        }
        for (int64_t col = 0; col < width; ++col) {
            const double slope = (1 + 2 * in.z_loss * log_sum) * std::exp(values[col] - log_sum) - smoothing / vocab -
                                 (col == target ? 1 - smoothing : 0);
            const double want =
                target == kIgnored || col >= in.vocab_size ? 0.0 : slope * static_cast<double>(dloss[index(row)]);
            const double difference =
                std::abs(static_cast<double>(shards[index(col / in.cols)]->dlogit(row, col % in.cols)) - want);
            scale = std::max(scale, std::abs(want));
            error = difference <= error ? error : difference;  // NaN sticks
        }
    }
    const std::string setting =
        std::string(emu_test::name_of<T>()) + " " + std::to_string(in.rows) + "x" + std::to_string(in.cols);
    EXPECT_NEAR(loss, expected_loss, setting + " loss");
    emu_test::tally.check(error <= emu_test::tolerance<T>() * scale, (setting + " gradient").c_str(), __FILE__,
                          __LINE__, "error " + std::to_string(error) + ", scale " + std::to_string(scale));
}

// The fused kernel matches the two separate kernels. Rows whose dloss differs from the predicted one are rescaled, the
// others are not accessed.
template <class T>
void check_fused(const Case& in) {
    constexpr float kPredicted = 0.5f;
    Buffer<int64_t> targets("targets", index(in.rows));
    fill_targets(targets, in);
    Buffer<float> dloss("dloss", index(in.rows));
    dloss.random(2);
    for (int64_t row = 0; row < in.rows; row += 2) dloss[index(row)] = kPredicted;
    const neox::LossTerms terms{in.vocab_size, in.z_loss, in.label_smoothing};
    Shard<T> separate(in, 0), fused(in, 0);
    EXPECT(!neox::cross_entropy_statistics_cuda(separate.describe(targets), separate.rows_of(), in.label_smoothing > 0,
                                                nullptr));
    EXPECT(!neox::cross_entropy_backward_cuda(separate.describe(targets), terms, separate.rows_of(), dloss.data(),
                                              separate.dlogits(), separate.dstride(), nullptr));
    EXPECT(!neox::cross_entropy_fused_cuda(fused.describe(targets), terms, fused.rows_of(), kPredicted, fused.dlogits(),
                                           fused.dstride(), nullptr));
    const neox::FusedGradient gradient{emu_test::dtype_of<T>(), in.rows,         in.cols,
                                       fused.dlogits(),         fused.dstride(), kPredicted};
    const auto row_of = [&](int64_t row) { return static_cast<const T*>(fused.dlogits()) + row * fused.dstride(); };
    const std::vector<T> left(row_of(0), row_of(0) + in.cols);
    EXPECT(!neox::cross_entropy_rescale_cuda(gradient, dloss.data(), nullptr));
    EXPECT(!std::memcmp(left.data(), row_of(0), index(in.cols) * sizeof(T)));
    const std::string setting =
        std::string(emu_test::name_of<T>()) + " " + std::to_string(in.rows) + "x" + std::to_string(in.cols);
    std::vector<double> expected(4 * index(in.rows));
    for (size_t i = 0; i < expected.size(); ++i)
        expected[i] = i / index(in.rows) == 3 && in.label_smoothing == 0 ? 0.0 : separate.statistics[i];
    // both are fp32 sums, in different orders
    emu_test::expect_near(fused.statistics, expected, setting + " fused statistics", __FILE__, __LINE__, 1e-5);
    double scale = 0, error = 0;
    for (int64_t row = 0; row < in.rows; ++row) {
        for (int64_t col = 0; col < in.cols; ++col) {
            const double want = separate.dlogit(row, col), difference = std::abs(fused.dlogit(row, col) - want);
            scale = std::max(scale, std::abs(want));
            error = difference <= error ? error : difference;
        }
    }
    emu_test::tally.check(error <= emu_test::tolerance<T>() * scale, (setting + " fused gradient").c_str(), __FILE__,
                          __LINE__, "error " + std::to_string(error) + ", scale " + std::to_string(scale));
}

// An invalid target makes its loss NaN, and no other.
void wrong_targets() {
    Buffer<float> statistics("statistics", 12), loss("loss", 3);
    statistics.random(1, 0.1f, 2.0f);
    Buffer<int64_t> targets("targets", 3);
    targets[0] = -1, targets[1] = 4, targets[2] = 5;
    float* const data = statistics.data();
    EXPECT(!neox::cross_entropy_loss_cuda(3, targets.data(), kIgnored, {5, 0.0, 0.0},
                                          {data, data + 3, data + 6, data + 9}, loss.data(), nullptr));
    EXPECT(std::isnan(loss[0]));
    EXPECT(std::isfinite(loss[1]));
    EXPECT(std::isnan(loss[2]));
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        check<T>({4, 17, 3, 1, 17, 1, 0.0, 0.0, false});       // misaligned
        check<T>({5, 819, 0, 0, 800, 1, 0.05, 0.1, true});     // odd rows with padding, in place
        check<T>({5, 1032, 8, 0, 1029, 1, 0.1, 0.0, false});   // packs, the last one partly padding
        check<T>({3, 10000, 0, 0, 10000, 1, 0.0, 0.2, true});  // several iterations of a block
        check<T>({4, 264, 0, 0, 500, 2, 0.05, 0.1, true});     // two shards
        check<T>({4, 40, 0, 0, 30, 2, 0.0, 0.1, false});       // a shard of padding only
        check<T>({1, 1, 0, 0, 1, 1, 0.0, 0.0, false});
        check<T>({3, 64, 0, 0, 60, 1, 0.0, 0.1, false, 3, 0});         // aligned logits, the gradient's stride is not
        check<T>({3, 64, 0, 0, 60, 1, 0.0, 0.1, false, 0, 1});         // aligned logits, the gradient's base is not
        check_fused<T>({4, 17, 3, 1, 17, 1, 0.0, 0.0, true});          // misaligned: read twice
        check_fused<T>({5, 819, 0, 0, 800, 1, 0.05, 0.1, false});      // the gradient in a separate buffer
        check_fused<T>({5, 1032, 8, 0, 1029, 1, 0.1, 0.0, true});      // packs, the last one partly padding
        check_fused<T>({3, 20000, 0, 0, 20000, 1, 0.0, 0.2, true});    // several iterations of a block
        check_fused<T>({2, 120000, 0, 0, 119999, 1, 0.0, 0.0, true});  // more than shared memory holds
        check_fused<T>({3, 64, 0, 0, 60, 1, 0.0, 0.1, false, 3, 0});   // aligned logits, the gradient's stride is not
        check_fused<T>({3, 64, 0, 0, 60, 1, 0.0, 0.1, false, 0, 1});   // aligned logits, the gradient's base is not
    });
    wrong_targets();
}

// The vocabulary of Pythia with fewer tokens.
void bytes() {
    using T = __nv_bfloat16;
    const Case in{24, 50304, 0, 0, 50277, 1, 1e-4, 0.0, true};
    Shard<T> shard(in, 0);
    Buffer<int64_t> targets("targets", index(in.rows), Role::kCached);
    Buffer<float> dloss("dloss", index(in.rows), Role::kCached);
    for (int64_t row = 0; row < in.rows; ++row) targets[index(row)] = row * 2000, dloss[index(row)] = 0.5f;
    const double size = static_cast<double>(in.rows * in.cols) * sizeof(T);
    const std::string setting = "24x50304 bf16";
    const neox::LossTerms terms{in.vocab_size, in.z_loss, 0.0};
    emu_test::expect_bytes("cross_entropy forward", setting, size, [&] {
        neox::cross_entropy_statistics_cuda(shard.describe(targets), shard.rows_of(), false, nullptr);
    });
    emu_test::expect_bytes("cross_entropy backward, in place", setting, 2 * size, [&] {
        neox::cross_entropy_backward_cuda(shard.describe(targets), terms, shard.rows_of(), dloss.data(),
                                          shard.dlogits(), shard.dstride(), nullptr);
    });
    emu_test::expect_bytes("cross_entropy fused", setting, 2 * size, [&] {
        neox::cross_entropy_fused_cuda(shard.describe(targets), terms, shard.rows_of(), 0.5f, shard.dlogits(),
                                       shard.dstride(), nullptr);
        neox::cross_entropy_rescale_cuda(
            {emu_test::dtype_of<T>(), in.rows, in.cols, shard.dlogits(), shard.dstride(), 0.5f}, dloss.data(), nullptr);
    });
}

const emu_test::Operator registered{"cross_entropy", values, bytes};

}  // namespace
