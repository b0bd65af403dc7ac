// The CUDA kernels of scaled_masked_softmax: every partition of a row, from one column to rows that are read twice;
// shared and per-batch masks, the causal mask, rows without visible columns, strided and misaligned rows; and the bytes
// moved.
#include "op_test.h"
#include "ops/scaled_masked_softmax/scaled_masked_softmax.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;
using neox::ScoreRows;

enum class Hide { kNothing, kMask, kMaskPerBatch, kCausal };

constexpr int64_t kBatches = 2, kHeads = 2;
constexpr float kScale = 0.7f;

struct Case {
    int64_t seq, cols, gap;
    size_t offset;
    Hide hide;
    size_t y_offset = 0, mask_offset = 0;
};

// Whether a row sees each of its columns.
std::vector<bool> visible(const Case& c, int64_t row, const Buffer<uint8_t>& mask) {
    std::vector<bool> seen(static_cast<size_t>(c.cols), true);
    const int64_t i = row % c.seq, batch = c.hide == Hide::kMaskPerBatch ? row / (kHeads * c.seq) : 0;
    for (int64_t j = 0; j < c.cols; ++j) {
        if (c.hide == Hide::kCausal) seen[static_cast<size_t>(j)] = j <= i + c.cols - c.seq;
        if (c.hide == Hide::kMask || c.hide == Hide::kMaskPerBatch)
            seen[static_cast<size_t>(j)] = !mask[static_cast<size_t>((batch * c.seq + i) * c.cols + j)];
    }
    return seen;
}

template <class T>
void check(const Case& c) {
    const int64_t rows = kBatches * kHeads * c.seq, mask_batches = c.hide == Hide::kMaskPerBatch ? kBatches : 1;
    const auto count = static_cast<size_t>(rows * c.cols),
               spread = static_cast<size_t>((rows - 1) * (c.cols + c.gap) + c.cols);
    Buffer<T> x("x", spread, Role::kStream, c.offset), dy("dy", spread, Role::kStream, c.offset),
        y("y", count, Role::kStream, c.y_offset), dx("dx", count);
    Buffer<uint8_t> mask("mask", static_cast<size_t>(kBatches * c.seq * c.cols), Role::kCached, c.mask_offset);
    x.random(1, 3.0f), dy.random(2);
    std::mt19937 generator(3);
    // the first rows see no column
    for (size_t i = 0; i < mask.size(); ++i)
        mask[i] = static_cast<int64_t>(i) / c.cols % c.seq == 0 || generator() % 3 == 0;
    const bool masked = c.hide == Hide::kMask || c.hide == Hide::kMaskPerBatch;
    const ScoreRows in{emu_test::dtype_of<T>(),
                       kBatches,
                       kHeads,
                       c.seq,
                       c.cols,
                       kScale,
                       masked ? mask.data() : nullptr,
                       masked ? mask_batches : 0,
                       c.hide == Hide::kCausal};
    EXPECT(!neox::scaled_masked_softmax_forward_cuda(in, x.data(), c.cols + c.gap, y.data(), nullptr));
    EXPECT(!neox::scaled_masked_softmax_backward_cuda(in, dy.data(), c.cols + c.gap, y.data(), c.cols, dx.data(),
                                                      nullptr));
    std::vector<double> expected(count, 0.0), expected_dx(count, 0.0);
    bool hidden_are_zero = true;
    for (int64_t row = 0; row < rows; ++row) {
        const std::vector<bool> seen = visible(c, row, mask);
        const T *const x_row = x.data() + row * (c.cols + c.gap), *const dy_row = dy.data() + row * (c.cols + c.gap);
        double *const p = expected.data() + row * c.cols, *const dp = expected_dx.data() + row * c.cols,
                      best = -INFINITY, sum = 0, mean = 0;
        for (int64_t j = 0; j < c.cols; ++j)
            best = seen[static_cast<size_t>(j)]
                       ? std::max(best, static_cast<double>(static_cast<float>(x_row[j])) * kScale)
                       : best;
        for (int64_t j = 0; j < c.cols; ++j)
            sum += p[j] = seen[static_cast<size_t>(j)]
                              ? std::exp(static_cast<double>(static_cast<float>(x_row[j])) * kScale - best)
                              : 0;
        for (int64_t j = 0; j < c.cols; ++j) mean += (p[j] = sum > 0 ? p[j] / sum : 0) * static_cast<float>(dy_row[j]);
        for (int64_t j = 0; j < c.cols; ++j) {
            dp[j] = kScale * p[j] * (static_cast<float>(dy_row[j]) - mean);
            hidden_are_zero = hidden_are_zero && (seen[static_cast<size_t>(j)] ||
                                                  static_cast<float>(y[static_cast<size_t>(row * c.cols + j)]) == 0);
        }
    }
    EXPECT(hidden_are_zero);
    EXPECT_NEAR(y, expected, "y of " + std::to_string(c.cols) + " columns");
    EXPECT_NEAR(dx, expected_dx, "dx of " + std::to_string(c.cols) + " columns");
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        for (const Hide hide : {Hide::kNothing, Hide::kMask, Hide::kMaskPerBatch, Hide::kCausal}) {
            check<T>({3, 1, 0, 0, hide});
            check<T>({3, 17, 3, 1, hide});  // scalar, one warp
            check<T>({2, 819, 0, 0, hide});
            check<T>({3, 248, 8, 0, hide});  // packs, one warp
            check<T>({3, 248, 3, 0, hide});  // rows of complete packs, strides that are not multiples of one
            check<T>({2, 1000, 0, 0, hide});
            check<T>({1, 1816, 0, 0, hide});
        }
        check<T>({3, 248, 0, 0, Hide::kMask, 1, 0});  // y alone is misaligned
        check<T>({3, 248, 0, 0, Hide::kMask, 0, 1});  // the mask alone is misaligned
        check<T>({9, 40, 0, 0, Hide::kCausal});
        check<T>({40, 16, 0, 0, Hide::kCausal});  // the first rows see no column
    });
}

// One row of each partition of long rows, and rows that are read twice.
void long_rows() {
    using T = __nv_bfloat16;
    for (const Hide hide : {Hide::kMask, Hide::kCausal}) {
        for (const int64_t cols : {4096, 9000, 16640, 2049, 8193}) check<T>({2, cols, 0, 0, hide});
    }
    check<float>({2, 16640, 0, 0, Hide::kMask});
    // the next pack after those that a partition holds
    for (const int64_t cols : {257, 264, 1032, 2056, 4097, 4104, 16392}) check<T>({1, cols, 0, 0, Hide::kNothing});
}

void all_values() {
    values();
    long_rows();
}

// Long rows of the other types.
void instances() {
    for (const int64_t cols : {4096, 9000, 16640, 2049, 8193}) {
        check<float>({1, cols, 0, 0, Hide::kMask});
        check<__half>({1, cols, 0, 0, Hide::kMask});
    }
}

// Few scores: masked, and causal.
void bytes() {
    using T = __nv_bfloat16;
    const int64_t seq = 64, cols = 512;
    const auto count = static_cast<size_t>(seq * cols);
    Buffer<T> x("x", count), dy("dy", count), y("y", count), dx("dx", count);
    Buffer<uint8_t> mask("mask", count);
    x.random(1), dy.random(2);
    std::memset(mask.data(), 0, count);
    const double size = static_cast<double>(count * sizeof(T));
    ScoreRows in{emu_test::dtype_of<T>(), 1, 1, seq, cols, kScale, mask.data(), 1, false};
    emu_test::expect_bytes("masked softmax forward", "64x512 bf16", 2.5 * size,
                           [&] { neox::scaled_masked_softmax_forward_cuda(in, x.data(), cols, y.data(), nullptr); });
    emu_test::expect_bytes("masked softmax backward", "64x512 bf16", 3 * size, [&] {
        neox::scaled_masked_softmax_backward_cuda(in, dy.data(), cols, y.data(), cols, dx.data(), nullptr);
    });
    const int64_t square = 256;
    const auto area = static_cast<double>(square * square * static_cast<int64_t>(sizeof(T)));
    Buffer<T> sx("sx", static_cast<size_t>(square * square)), sdy("sdy", sx.size()), sy("sy", sx.size()),
        sdx("sdx", sx.size());
    sx.random(1), sdy.random(2);
    in = ScoreRows{emu_test::dtype_of<T>(), 1, 1, square, square, kScale, nullptr, 0, true};
    emu_test::expect_bytes("causal softmax forward", "256x256 bf16", 1.5 * area, [&] {
        neox::scaled_masked_softmax_forward_cuda(in, sx.data(), square, sy.data(), nullptr);
    });
    emu_test::expect_bytes("causal softmax backward", "256x256 bf16", 2 * area, [&] {
        neox::scaled_masked_softmax_backward_cuda(in, sdy.data(), square, sy.data(), square, sdx.data(), nullptr);
    });
}

const emu_test::Operator registered{"scaled_masked_softmax", all_values, bytes, instances};

}  // namespace
