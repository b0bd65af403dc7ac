// The CUDA kernels of gated: every activation, odd sizes, strided, misaligned and contiguous rows; and the bytes moved.
#include "op_test.h"
#include "ops/gated/gated.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;
using neox::Activation;

double act(double u, Activation activation) {
    if (activation == Activation::kSilu) return u / (1 + std::exp(-u));
    return activation == Activation::kGelu ? u * 0.5 * std::erfc(-u * M_SQRT1_2) : std::max(u, 0.0);
}

double slope(double u, Activation activation) {
    constexpr double kStep = 1e-5;
    if (activation == Activation::kRelu) return u > 0;
    return (act(u + kStep, activation) - act(u - kStep, activation)) / (2 * kStep);
}

// Elements past a 16-byte boundary.
struct Offsets {
    size_t x, gate, dy, y = 0, dx = 0, dgate = 0;
};

template <class T>
void check(Activation activation, int64_t rows, int64_t cols, int64_t gap, int64_t dy_gap, const Offsets& offsets) {
    const auto count = static_cast<size_t>(rows * cols);
    emu_test::Rows<T> x("x", rows, cols, gap, offsets.x), gate("gate", rows, cols, 2 * gap, offsets.gate),
        dy("dy", rows, cols, dy_gap, offsets.dy);
    Buffer<T> y("y", count, Role::kStream, offsets.y), dx("dx", count, Role::kStream, offsets.dx),
        dgate("dgate", count, Role::kStream, offsets.dgate);
    x.random(1, 2.0f), gate.random(2), dy.random(3);
    const neox::Gated in{emu_test::dtype_of<T>(), activation, rows, cols, x.data(), x.stride, gate.data(), gate.stride};
    EXPECT(!neox::gated_forward_cuda(in, y.data(), nullptr));
    EXPECT(!neox::gated_backward_cuda(in, dy.data(), dy.stride, dx.data(), dgate.data(), nullptr));
    std::vector<double> expected_y(count), expected_dx(count), expected_dgate(count);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
            const auto at = static_cast<size_t>(row * cols + col);
            const double u = x.at(row, col), g = gate.at(row, col), d = dy.at(row, col);
            expected_y[at] = act(u, activation) * g;
            expected_dx[at] = d * g * slope(u, activation);
            expected_dgate[at] = d * act(u, activation);
        }
    }
    EXPECT_NEAR(y, expected_y, "y");
    EXPECT_NEAR(dx, expected_dx, "dx");
    EXPECT_NEAR(dgate, expected_dgate, "dgate");
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        check<T>(Activation::kSilu, 1, 1, 0, 0, {0, 0, 0});
        check<T>(Activation::kGelu, 5, 17, 3, 9, {1, 1, 1});
        check<T>(Activation::kRelu, 5, 819, 0, 3, {1, 1, 1});
        check<T>(Activation::kSilu, 37, 264, 8, 24, {0, 0, 0});  // full packs, strided rows
        check<T>(Activation::kGelu, 8, 819, 0, 0, {0, 0, 0});    // full packs, because the rows are contiguous
        check<T>(Activation::kRelu, 3, 264, 0, 0, {0, 0, 0});
        // rows of complete packs, a stride that is not a multiple of one
        check<T>(Activation::kRelu, 5, 264, 3, 8, {0, 0, 0});
        check<T>(Activation::kRelu, 5, 264, 8, 3, {0, 0, 0});
        for (const Offsets& alone : {Offsets{1, 0, 0}, Offsets{0, 1, 0}, Offsets{0, 0, 1}, Offsets{0, 0, 0, 1, 1, 0},
                                     Offsets{0, 0, 0, 0, 0, 1}})
            check<T>(Activation::kRelu, 5, 264, 8, 8, alone);  // one misaligned tensor
        check<T>(Activation::kRelu, 0, 16, 0, 0, {0, 0, 0});
    });
}

// The MLP of Llama with few tokens. x and gate are halves of one buffer.
void bytes() {
    using T = __nv_bfloat16;
    const int64_t rows = 32, cols = 5632;
    const auto count = static_cast<size_t>(rows * cols);
    Buffer<T> both("x and gate", 2 * count), dy("dy", count), y("y", count), dx("dx", count), dgate("dgate", count);
    both.random(1), dy.random(2);
    const neox::Gated in{emu_test::dtype_of<T>(), Activation::kSilu, rows, cols, both.data(), 2 * cols,
                         both.data() + cols,      2 * cols};
    const double size = static_cast<double>(count * sizeof(T));
    emu_test::expect_bytes("gated forward", "32x5632 bf16", 3 * size,
                           [&] { neox::gated_forward_cuda(in, y.data(), nullptr); });
    emu_test::expect_bytes("gated backward", "32x5632 bf16", 5 * size,
                           [&] { neox::gated_backward_cuda(in, dy.data(), cols, dx.data(), dgate.data(), nullptr); });
}

const emu_test::Operator registered{"gated", values, bytes};

}  // namespace
