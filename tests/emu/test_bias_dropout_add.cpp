// The CUDA kernels of bias_dropout_add: with and without bias and dropout, odd sizes, strided and misaligned rows; the
// dropout mask bit for bit; and the bytes moved.
#include "common/philox.h"
#include "op_test.h"
#include "ops/bias_dropout_add/bias_dropout_add.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;

const int64_t kSeed[2] = {0x123456789abcdef, 0x7edcba987654321};

bool is_retained(int64_t row, int64_t col, int64_t cols, double p) {
    const auto word = static_cast<uint64_t>(row * ((cols + 3) / 4 * 4) + col);
    return neox::philox(static_cast<uint64_t>(kSeed[0]), word / 4, static_cast<uint64_t>(kSeed[1])).word[word % 4] >=
           p * 4294967296.0;
}

// Elements past a 16-byte boundary.
struct Offsets {
    size_t x, residual, dy, bias, y = 0, dx = 0;
};

template <class T>
void check(int64_t rows, int64_t cols, int64_t gap, const Offsets& offsets, bool with_bias, double p) {
    const auto count = static_cast<size_t>(rows * cols);
    emu_test::Rows<T> x("x", rows, cols, gap, offsets.x), residual("residual", rows, cols, 2 * gap, offsets.residual),
        dy("dy", rows, cols, 3 * gap, offsets.dy);
    Buffer<T> bias("bias", static_cast<size_t>(cols), Role::kCached, offsets.bias),
        y("y", count, Role::kStream, offsets.y), dx("dx", count, Role::kStream, offsets.dx),
        dbias("dbias", static_cast<size_t>(cols));
    x.random(1), residual.random(2), dy.random(3), bias.random(4);
    Buffer<float> partial("partial", static_cast<size_t>(neox::bias_dropout_add_partials_cuda(rows, cols) * cols));
    const neox::Dropout dropout{p > 0 ? kSeed : nullptr, p};
    const auto dtype = emu_test::dtype_of<T>();
    EXPECT(
        !neox::bias_dropout_add_forward_cuda({dtype, rows, cols, x.data(), x.stride, with_bias ? bias.data() : nullptr,
                                              residual.data(), residual.stride, dropout},
                                             y.data(), nullptr));
    EXPECT(!neox::bias_dropout_add_backward_cuda(
        {dtype, rows, cols, dy.data(), dy.stride, dropout, p > 0 ? dx.data() : nullptr,
         with_bias ? dbias.data() : nullptr, partial.data()},
        nullptr));
    std::vector<double> expected_y(count), expected_dx(count), expected_dbias(static_cast<size_t>(cols), 0.0);
    bool same_mask = true;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
            const auto at = static_cast<size_t>(row * cols + col), c = static_cast<size_t>(col);
            const double factor = p == 0 ? 1 : p < 1 && is_retained(row, col, cols, p) ? 1 / (1 - p) : 0;
            const double u = x.at(row, col) + (with_bias ? static_cast<double>(static_cast<float>(bias[c])) : 0.0);
            expected_y[at] = residual.at(row, col) + factor * u;
            expected_dx[at] = factor * dy.at(row, col);
            expected_dbias[c] += expected_dx[at];
            same_mask = same_mask && (p == 0 || (static_cast<float>(dx[at]) != 0) == (expected_dx[at] != 0));
        }
    }
    EXPECT(same_mask);
    EXPECT_NEAR(y, expected_y, "y");
    if (p > 0) EXPECT_NEAR(dx, expected_dx, "dx");
    if (with_bias) EXPECT_NEAR(dbias, expected_dbias, "dbias");
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        check<T>(1, 1, 0, {0, 0, 0, 0}, true, 0.3);
        check<T>(5, 17, 3, {1, 1, 1, 1}, true, 0.3);
        check<T>(9, 819, 0, {0, 0, 0, 0}, true, 0.5);
        check<T>(77, 264, 8, {0, 0, 0, 0}, true,
                 0.1);  // full packs, strided rows, more rows than a block processes at a time
        check<T>(37, 264, 0, {0, 0, 0, 0}, false, 0.3);
        check<T>(5, 264, 3, {0, 0, 0, 0}, true, 0.1);  // rows of complete packs, strides that are not multiples of one
        check<T>(37, 264, 0, {0, 0, 0, 0}, true, 0.0);
        for (const Offsets& alone : {Offsets{1, 0, 0, 0}, Offsets{0, 1, 0, 0}, Offsets{0, 0, 1, 0}, Offsets{0, 0, 0, 1},
                                     Offsets{0, 0, 0, 0, 1, 1}})
            check<T>(5, 264, 8, alone, true, 0.1);  // one misaligned tensor
        check<T>(3, 33, 0, {0, 0, 0, 0}, true, 1.0);
        check<T>(0, 16, 0, {0, 0, 0, 0}, true, 0.3);  // without rows, dbias is zero
    });
}

// The residual streams of Pythia-1.4B and Pythia-160M with fewer tokens.
void bytes() {
    using T = __nv_bfloat16;
    for (const int64_t cols : {2048, 768}) {
        const int64_t rows = cols == 768 ? 1024 : 256;
        const auto count = static_cast<size_t>(rows * cols);
        Buffer<T> x("x", count), residual("residual", count), dy("dy", count), y("y", count), dx("dx", count);
        Buffer<T> bias("bias", static_cast<size_t>(cols), Role::kCached), dbias("dbias", static_cast<size_t>(cols));
        Buffer<float> partial("partial", static_cast<size_t>(neox::bias_dropout_add_partials_cuda(rows, cols) * cols));
        x.random(1), residual.random(2), dy.random(3), bias.random(4);
        const neox::Dropout dropout{kSeed, 0.1};
        const auto dtype = emu_test::dtype_of<T>();
        const std::string setting = std::to_string(rows) + "x" + std::to_string(cols) + " bf16";
        const double size = static_cast<double>(count * sizeof(T));
        emu_test::expect_bytes("bias_dropout_add forward", setting, 3 * size, [&] {
            neox::bias_dropout_add_forward_cuda(
                {dtype, rows, cols, x.data(), cols, bias.data(), residual.data(), cols, dropout}, y.data(), nullptr);
        });
        emu_test::expect_bytes("bias_dropout_add backward", setting, 2 * size, [&] {
            neox::bias_dropout_add_backward_cuda(
                {dtype, rows, cols, dy.data(), cols, dropout, dx.data(), dbias.data(), partial.data()}, nullptr);
        });
    }
}

const emu_test::Operator registered{"bias_dropout_add", values, bytes};

}  // namespace
