// The CUDA kernels of bias_gelu: odd sizes, strided and misaligned rows, with and without bias, both forms; and the
// bytes moved.
#include "op_test.h"
#include "ops/bias_gelu/bias_gelu.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;

double gelu(double u, bool tanh) {
    return tanh ? 0.5 * u * (1 + std::tanh(std::sqrt(2 / M_PI) * (u + 0.044715 * u * u * u)))
                : 0.5 * u * std::erfc(-u * M_SQRT1_2);
}

double slope(double u, bool tanh) {
    constexpr double kStep = 1e-5;
    return (gelu(u + kStep, tanh) - gelu(u - kStep, tanh)) / (2 * kStep);
}

// Elements past a 16-byte boundary.
struct Offsets {
    size_t x, dy, bias, y = 0, dx = 0;
};

template <class T>
void check(int64_t rows, int64_t cols, int64_t gap, const Offsets& offsets, bool with_bias, bool tanh) {
    const auto count = static_cast<size_t>(rows * cols);
    emu_test::Rows<T> x("x", rows, cols, gap, offsets.x), dy("dy", rows, cols, 2 * gap, offsets.dy);
    Buffer<T> bias("bias", static_cast<size_t>(cols), Role::kCached, offsets.bias),
        y("y", count, Role::kStream, offsets.y), dx("dx", count, Role::kStream, offsets.dx),
        dbias("dbias", static_cast<size_t>(cols));
    x.random(1, 2.0f), dy.random(2), bias.random(3);
    Buffer<float> partial("partial", static_cast<size_t>(neox::bias_gelu_partials_cuda(rows, cols) * cols));
    const neox::BiasGelu in{emu_test::dtype_of<T>(),          tanh, rows, cols, x.data(), x.stride,
                            with_bias ? bias.data() : nullptr};
    EXPECT(!neox::bias_gelu_forward_cuda(in, y.data(), nullptr));
    EXPECT(!neox::bias_gelu_backward_cuda(in, dy.data(), dy.stride, dx.data(), dbias.data(), partial.data(), nullptr));
    std::vector<double> expected_y(count), expected_dx(count), expected_dbias(static_cast<size_t>(cols), 0.0);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
            const auto at = static_cast<size_t>(row * cols + col), c = static_cast<size_t>(col);
            const double u = x.at(row, col) + (with_bias ? static_cast<double>(static_cast<float>(bias[c])) : 0.0);
            expected_y[at] = gelu(u, tanh);
            expected_dx[at] = slope(u, tanh) * dy.at(row, col);
            expected_dbias[c] += expected_dx[at];
        }
    }
    EXPECT_NEAR(y, expected_y, "y");
    EXPECT_NEAR(dx, expected_dx, "dx");
    if (with_bias) EXPECT_NEAR(dbias, expected_dbias, "dbias");
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        check<T>(1, 1, 0, {0, 0, 0}, true, false);
        check<T>(5, 17, 3, {1, 1, 1}, true, true);
        check<T>(37, 264, 8, {0, 0, 0}, true, false);  // full packs, strided rows
        check<T>(37, 264, 0, {0, 0, 0}, false, true);
        check<T>(5, 264, 3, {0, 0, 0}, true, false);  // rows of complete packs, strides that are not multiples of one
        for (const Offsets& alone : {Offsets{1, 0, 0}, Offsets{0, 1, 0}, Offsets{0, 0, 1}, Offsets{0, 0, 0, 1, 1}})
            check<T>(5, 264, 8, alone, true, false);  // one misaligned tensor
        check<T>(3, 819, 0, {0, 0, 0}, true, false);
        check<T>(640, 8, 0, {0, 0, 0}, true, false);  // more stripes than a thread of the second stage reads at a time
        check<T>(0, 16, 0, {0, 0, 0}, true, false);   // without rows, dbias is zero
    });
}

// The MLPs of Pythia-1.4B and Pythia-160M with fewer tokens.
void bytes() {
    using T = __nv_bfloat16;
    for (const int64_t cols : {4 * 2048, 4 * 768}) {
        const int64_t rows = 128;
        const auto count = static_cast<size_t>(rows * cols);
        Buffer<T> x("x", count), dy("dy", count), y("y", count), dx("dx", count);
        Buffer<T> bias("bias", static_cast<size_t>(cols), Role::kCached), dbias("dbias", static_cast<size_t>(cols));
        Buffer<float> partial("partial", static_cast<size_t>(neox::bias_gelu_partials_cuda(rows, cols) * cols));
        x.random(1), dy.random(2), bias.random(3);
        const neox::BiasGelu in{emu_test::dtype_of<T>(), false, rows, cols, x.data(), cols, bias.data()};
        const std::string setting = std::to_string(rows) + "x" + std::to_string(cols) + " bf16";
        const double size = static_cast<double>(count * sizeof(T));
        emu_test::expect_bytes("bias_gelu forward", setting, 2 * size,
                               [&] { neox::bias_gelu_forward_cuda(in, y.data(), nullptr); });
        emu_test::expect_bytes("bias_gelu backward", setting, 3 * size, [&] {
            neox::bias_gelu_backward_cuda(in, dy.data(), cols, dx.data(), dbias.data(), partial.data(), nullptr);
        });
    }
}

const emu_test::Operator registered{"bias_gelu", values, bytes};

}  // namespace
