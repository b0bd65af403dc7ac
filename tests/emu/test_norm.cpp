// The CUDA kernels of norm: one and two outputs, with and without mean, bias, residual and the gradient of the sum;
// every mapping of rows to threads (parts of a warp, warps, several packs, loops), strided and misaligned; and the
// bytes moved.
#include "op_test.h"
#include "ops/norm/norm.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;
using emu_test::Rows;

struct Case {
    int64_t rows, cols, gap;
    size_t offset;
    bool rms, bias, residual;
    int outputs;
    const char* alone = "";  // the one tensor that is misaligned by another element
};

size_t index(int64_t at) { return static_cast<size_t>(at); }

// The buffers of a case and the arguments of the launchers.
template <class T>
struct Norm {
    Case in;
    size_t count = index(in.rows * in.cols), cols = index(in.cols);
    bool two = in.outputs > 1;
    Rows<T> x = rows("x", 1), residual = rows("residual", 2, in.residual), dy1 = rows("dy1", 3),
            dy2 = rows("dy2", 4, two), dsum = rows("dsum", 5, in.residual);
    Buffer<T> w1{"w1", cols, Role::kCached, offset("w1")}, w2{"w2", cols, Role::kCached, offset("w2")};
    Buffer<T> b1{"b1", cols, Role::kCached, offset("b1")}, b2{"b2", cols, Role::kCached, offset("b2")};
    Buffer<T> y1{"y1", count}, y2{"y2", two ? count : 0}, sum{"sum", in.residual ? count : 0};
    // 8 bytes per row, read by all threads of the row: one cache line.
    Buffer<float> mean{"mean", in.rms ? 0 : index(in.rows), Role::kCached}, rstd{"rstd", index(in.rows), Role::kCached};
    Buffer<T> ds{"ds", count}, dw1{"dw1", cols}, dw2{"dw2", cols}, db1{"db1", cols}, db2{"db2", cols};
    std::unique_ptr<Buffer<float>> partial;

    explicit Norm(const Case& chosen) : in(chosen) {
        x.random(1, 2.0f, 1.0f), residual.random(2);
        w1.random(3, 1.0f, 1.0f), w2.random(4, 1.0f, 1.0f), b1.random(5), b2.random(6);
        dy1.random(7), dy2.random(8), dsum.random(9);
        partial = std::make_unique<Buffer<float>>(
            "partial", index(2 * in.outputs * neox::norm_partials_cuda(backward()) * in.cols));
    }
    size_t offset(const char* name) const { return in.offset + !std::strcmp(name, in.alone); }
    Rows<T> rows(const char* name, int64_t gaps, bool wanted = true) const {
        return {name, wanted ? in.rows : 0, in.cols, gaps * in.gap, offset(name)};
    }
    neox::NormForward forward() {
        neox::NormForward op = {};
        op.dtype = emu_test::dtype_of<T>(), op.rms = in.rms, op.outputs = in.outputs, op.rows = in.rows,
        op.cols = in.cols, op.eps = 1e-3f;
        op.x = x.data(), op.x_stride = x.stride, op.residual = in.residual ? residual.data() : nullptr,
        op.residual_stride = residual.stride;
        op.parameters[0] = {w1.data(), in.bias ? b1.data() : nullptr};
        if (two) op.parameters[1] = {w2.data(), in.bias ? b2.data() : nullptr};
        op.y[0] = y1.data(), op.y[1] = y2.data(), op.sum = sum.data(), op.mean = mean.data(), op.rstd = rstd.data();
        return op;
    }
    neox::NormBackward backward() {
        neox::NormBackward op = {};
        op.dtype = emu_test::dtype_of<T>(), op.rms = in.rms, op.outputs = in.outputs, op.rows = in.rows,
        op.cols = in.cols;
        op.s = in.residual ? sum.data() : x.data(), op.s_stride = in.residual ? in.cols : x.stride;
        op.mean = mean.data(), op.rstd = rstd.data(), op.weight[0] = w1.data(),
        op.weight[1] = two ? w2.data() : nullptr;
        op.dy[0] = dy1.data(), op.dy[1] = dy2.data(), op.dy_stride[0] = dy1.stride, op.dy_stride[1] = dy2.stride;
        op.dsum = in.residual ? dsum.data() : nullptr, op.dsum_stride = dsum.stride, op.ds = ds.data();
        op.dweight[0] = dw1.data(), op.dweight[1] = dw2.data(), op.dbias[0] = in.bias ? db1.data() : nullptr;
        op.dbias[1] = in.bias && two ? db2.data() : nullptr;
        if (partial) op.partial = partial->data();
        return op;
    }
};

// The formulas of norm.h in fp64 on the same inputs. s is rounded to T, as specified there.
struct Expected {
    std::vector<double> y[2], s, ds, dw[2], db[2];
};

template <class T>
Expected expected_of(Norm<T>& norm) {
    const Case& in = norm.in;
    Expected out;
    for (auto* v : {&out.y[0], &out.y[1], &out.s, &out.ds}) v->assign(norm.count, 0.0);
    for (auto* v : {&out.dw[0], &out.dw[1], &out.db[0], &out.db[1]}) v->assign(norm.cols, 0.0);
    const auto value = [](const Buffer<T>& buffer, size_t i) {
        return static_cast<double>(static_cast<float>(buffer[i]));
    };
    const Buffer<T>*weights[2] = {&norm.w1, &norm.w2}, *biases[2] = {&norm.b1, &norm.b2};
    const Rows<T>* dys[2] = {&norm.dy1, &norm.dy2};
    const double size = static_cast<double>(in.cols);
    std::vector<double> n(norm.cols), g(norm.cols);
    for (int64_t row = 0; row < in.rows; ++row) {
        const size_t to = index(row * in.cols);
        double mean = 0, squares = 0, mean_g = 0, mean_gn = 0;
        for (size_t i = 0; i < norm.cols; ++i) {
            const int64_t col = static_cast<int64_t>(i);
            const double s = norm.x.at(row, col) + (in.residual ? norm.residual.at(row, col) : 0.0);
            out.s[to + i] = static_cast<float>(T(static_cast<float>(s)));
            mean += in.rms ? 0.0 : out.s[to + i] / size;
        }
        for (size_t i = 0; i < norm.cols; ++i) squares += (out.s[to + i] - mean) * (out.s[to + i] - mean) / size;
        const double rstd = 1 / std::sqrt(squares + static_cast<double>(1e-3f));
        for (size_t i = 0; i < norm.cols; ++i) {
            n[i] = (out.s[to + i] - mean) * rstd;
            g[i] = 0;
            for (int k = 0; k < in.outputs; ++k) {
                const double dy = dys[k]->at(row, static_cast<int64_t>(i));
                out.y[k][to + i] = n[i] * value(*weights[k], i) + (in.bias ? value(*biases[k], i) : 0.0);
                g[i] += dy * value(*weights[k], i);
                out.dw[k][i] += dy * n[i];
                out.db[k][i] += dy;
            }
            mean_g += in.rms ? 0.0 : g[i] / size;
            mean_gn += g[i] * n[i] / size;
        }
        for (size_t i = 0; i < norm.cols; ++i) {
            out.ds[to + i] = rstd * (g[i] - mean_g - n[i] * mean_gn) +
                             (in.residual ? norm.dsum.at(row, static_cast<int64_t>(i)) : 0.0);
        }
    }
    return out;
}

template <class T>
void check(const Case& in) {
    Norm<T> norm(in);
    EXPECT(!neox::norm_forward_cuda(norm.forward(), nullptr));
    EXPECT(!neox::norm_backward_cuda(norm.backward(), nullptr));
    const Expected want = expected_of(norm);
    const std::string setting =
        std::string(emu_test::name_of<T>()) + " " + std::to_string(in.rows) + "x" + std::to_string(in.cols) + " ";
    EXPECT_NEAR(norm.y1, want.y[0], setting + "y1");
    EXPECT_NEAR(norm.ds, want.ds, setting + "ds");
    EXPECT_NEAR(norm.dw1, want.dw[0], setting + "dw1");
    if (in.bias) EXPECT_NEAR(norm.db1, want.db[0], setting + "db1");
    if (in.residual) EXPECT_NEAR(norm.sum, want.s, setting + "sum");
    if (!norm.two) return;
    EXPECT_NEAR(norm.y2, want.y[1], setting + "y2");
    EXPECT_NEAR(norm.dw2, want.dw[1], setting + "dw2");
    if (in.bias) EXPECT_NEAR(norm.db2, want.db[1], setting + "db2");
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        check<T>({21, 17, 3, 1, false, true, true, 1});   // parts of a warp, misaligned
        check<T>({37, 64, 8, 0, true, false, false, 2});  // parts of a warp, packs, strided
        // rows of complete packs, strides that are not multiples of one
        check<T>({5, 264, 3, 0, false, true, true, 2});
        for (const char* name : {"x", "residual", "w1", "w2", "b1", "b2", "dy1", "dy2", "dsum"})
            check<T>({3, 64, 8, 0, false, true, true, 2, name});
        check<T>({3, 64, 0, 0, false, true, false, 1, "x"});  // also what the backward reads
        check<T>({5, 20, 4, 0, false, true, false, 1});       // strides of complete packs, rows that are not
        check<T>({9, 264, 0, 0, false, true, true, 2});       // a warp, two packs per thread
        check<T>({11, 819, 0, 0, false, true, false, 1});     // the warps of a row synchronise at a named barrier
        check<T>({13, 1032, 0, 0, true, false, true, 1});     // four packs, several rows per block
        check<T>({3, 2056, 8, 0, false, true, true, 2});      // several warps, eight packs
        check<T>({2, 4500, 0, 0, false, true, false, 1});     // backward: one pack (fp32: four) per thread
        check<T>({1, 5000, 0, 0, true, true, true, 2});       // two outputs: two (fp32: four) packs
        check<T>({0, 16, 0, 0, false, true, false, 1});       // without rows, gradients of the parameters are zero
    });
    check<__nv_bfloat16>({1, 9000, 0, 0, false, true, false, 2});   // two outputs, four packs
    check<__nv_bfloat16>({1, 9000, 0, 0, true, false, true, 1});    // four packs per thread
    check<__nv_bfloat16>({1, 14000, 0, 0, false, false, true, 1});  // eight packs per thread
    check<float>({2, 7000, 0, 0, false, true, false, 1});           // eight packs per thread
    check<float>({2, 12601, 0, 0, false, true, true, 2});           // looped in both directions, scalar
    check<__nv_bfloat16>({2, 24584, 8, 0, true, false, false, 1});  // the same with packs, strided
}

// Every number of packs per thread, forward and backward, up to the loops over long rows.
void instances() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        for (const int64_t packs : {20, 50, 100, 250, 900, 1400, 2000, 3100}) {
            for (const int outputs : {1, 2}) {
                for (const size_t offset : {0, 1})
                    check<T>({1, packs * 16 / static_cast<int64_t>(sizeof(T)), 0, offset, false, true, true, outputs});
            }
        }
    });
}

// The norms of Pythia-1.4B and Pythia-160M with fewer tokens: layer norm, its dual form, and with a residual.
void bytes() {
    using T = __nv_bfloat16;
    for (const int64_t cols : {2048, 768}) {
        const int64_t rows = 512;
        const std::string setting = std::to_string(rows) + "x" + std::to_string(cols) + " bf16";
        const double size = static_cast<double>(rows * cols) * sizeof(T);
        for (const bool residual : {false, true}) {
            for (const int outputs : {1, 2}) {
                if (cols > 768 && (residual || outputs > 1)) continue;  // the others take 5 s of the emulator each
                Norm<T> norm({rows, cols, 0, 0, false, true, residual, outputs});
                const std::string name =
                    std::string(outputs > 1 ? "dual_" : "") + "layer_norm" + (residual ? "+residual" : "");
                const double more = (residual ? 1 : 0), second = outputs - 1;
                emu_test::expect_bytes(name + " forward", setting, (2 + 2 * more + second) * size,
                                       [&] { neox::norm_forward_cuda(norm.forward(), nullptr); });
                emu_test::expect_bytes(name + " backward", setting, (3 + more + second) * size,
                                       [&] { neox::norm_backward_cuda(norm.backward(), nullptr); });
            }
        }
    }
}

const emu_test::Operator registered{"norm", values, bytes, instances};

}  // namespace
