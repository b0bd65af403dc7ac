// A problem of attention for the emulated CUDA kernels: tensors in a packed layout, the launchers, and results in fp64.
#pragma once

#include "common/philox.h"
#include "op_test.h"
#include "ops/attention/attention.h"

namespace emu_test {

struct Case {
    int64_t batch, queries, keys, groups, heads, dim;
    bool causal = true;
    int64_t window = 0;
    std::vector<int64_t> boundaries = {};  // positions at which segments start
    bool alibi = false;
    float softcap = 0, dropout = 0, scale = 0.2f;
    int64_t gap = 0;  // elements between heads
    size_t offset = 0;
    bool hopper = false;
};

// q, k and v as one projection [batch, keys, groups, heads + 2, dim + gap], with the queries at the last positions.
// Gradients have the same layout.
template <class T>
struct Run {
    Case shape;
    int64_t row, positions;
    std::vector<int32_t> segments;
    std::vector<float> slopes;
    Buffer<T> qkv, dout, out, dqkv;
    Buffer<float> lse;

    static size_t size(const Case& c) {
        return static_cast<size_t>(c.batch * std::max(c.queries, c.keys) * c.groups * (c.heads + 2) * (c.dim + c.gap));
    }
    static size_t rows(const Case& c) { return static_cast<size_t>(c.batch * c.queries * c.groups * c.heads); }

    explicit Run(const Case& c)
        : shape(c),
          row(c.groups * (c.heads + 2) * (c.dim + c.gap)),
          positions(std::max(c.queries, c.keys)),
          qkv("qkv", size(c), Role::kStream, c.offset),
          dout("dout", rows(c) * static_cast<size_t>(c.dim)),
          out("out", rows(c) * static_cast<size_t>(c.dim)),
          dqkv("dqkv", size(c), Role::kStream, c.offset),
          lse("lse", rows(c)) {
        qkv.random(1), dout.random(2);
        for (size_t i = 0; i < dqkv.size(); ++i) dqkv[i] = T(0.0f);  // gaps and unused positions are not written
        for (int64_t i = 0; i < c.batch * c.keys && !c.boundaries.empty(); ++i) {
            int32_t id = 0;
            // one position later in each batch
            for (const int64_t boundary : c.boundaries) id += i % c.keys >= boundary + i / c.keys;
            segments.push_back(id);
        }
        for (int64_t h = 0; h < c.groups * c.heads && c.alibi; ++h) slopes.push_back(0.5f / static_cast<float>(h + 1));
        simt::add_memory(segments.data(), segments.size() * sizeof(int32_t), "segments");
        simt::add_memory(slopes.data(), slopes.size() * sizeof(float), "slopes");
    }
    ~Run() {
        simt::remove_memory(segments.data());
        simt::remove_memory(slopes.data());
    }
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    size_t at(int64_t b, int64_t i, int64_t g, int64_t h, int64_t d) const {
        return static_cast<size_t>((b * positions + i) * row + (g * (shape.heads + 2) + h) * (shape.dim + shape.gap) +
                                   d);
    }
    size_t query(int64_t b, int64_t i, int64_t g, int64_t h) const {
        return at(b, i + positions - shape.queries, g, h, 0);
    }
    size_t key(int64_t b, int64_t j, int64_t g) const { return at(b, j + positions - shape.keys, g, shape.heads, 0); }
    size_t value(int64_t b, int64_t j, int64_t g) const {
        return at(b, j + positions - shape.keys, g, shape.heads + 1, 0);
    }

    neox::Attention task() const {
        const Case& c = shape;
        neox::Attention in{};
        in.dtype = dtype_of<T>();
        in.batch = c.batch, in.queries = c.queries, in.keys = c.keys, in.groups = c.groups, in.heads = c.heads,
        in.head_dim = c.dim;
        in.q = qkv.data() + query(0, 0, 0, 0), in.k = qkv.data() + key(0, 0, 0), in.v = qkv.data() + value(0, 0, 0);
        in.q_strides = in.k_strides =
            in.v_strides = {positions * row, row, (c.heads + 2) * (c.dim + c.gap), c.dim + c.gap};
        in.scale = c.scale, in.causal = c.causal, in.window = c.window, in.softcap = c.softcap, in.dropout = c.dropout;
        in.segments = segments.empty() ? nullptr : segments.data();
        in.slopes = slopes.empty() ? nullptr : slopes.data();
        in.seed[0] = 12345, in.seed[1] = 678;
        in.hopper = c.hopper;
        return in;
    }

    void forward() {
        const neox::Attention in = task();
        Buffer<float> workspace("workspace", static_cast<size_t>(neox::attention_forward_workspace_cuda(in)) / 4);
        EXPECT(!neox::attention_forward_cuda(in, out.data(), lse.data(), workspace.data(), nullptr));
    }

    void backward(bool deterministic) {
        const neox::Attention in = task();
        neox::AttentionGradients grad{};
        const int64_t n = shape.groups * shape.heads * shape.dim;
        grad.dout = dout.data(), grad.out = out.data(), grad.lse = lse.data();
        grad.dout_strides = {shape.queries * n, n, shape.heads * shape.dim, shape.dim};
        grad.dq = dqkv.data() + query(0, 0, 0, 0), grad.dk = dqkv.data() + key(0, 0, 0),
        grad.dv = dqkv.data() + value(0, 0, 0);
        grad.dq_strides = grad.dk_strides = grad.dv_strides = in.q_strides;
        Buffer<float> workspace("workspace",
                                static_cast<size_t>(neox::attention_backward_workspace_cuda(in, deterministic)) / 4);
        EXPECT(!neox::attention_backward_cuda(in, grad, deterministic, workspace.data(), nullptr));
    }
};

struct Expected {
    std::vector<double> out, lse, dqkv;
};

// The formulas of attention.h with the full matrix of probabilities.
template <class T>
Expected expected_of(const Run<T>& run) {
    const Case& c = run.shape;
    Expected result{std::vector<double>(run.out.size()), std::vector<double>(run.lse.size()),
                    std::vector<double>(run.dqkv.size())};
    const auto x = [&](size_t i) { return static_cast<double>(static_cast<float>(run.qkv[i])); };
    const auto count = static_cast<size_t>(c.keys);
    const uint64_t threshold = neox::dropout_threshold(c.dropout), quads = (static_cast<uint64_t>(c.keys) + 3) / 4;
    for (int64_t r = 0; r < c.batch * c.groups * c.heads * c.queries; ++r) {
        const int64_t i = r % c.queries, h = r / c.queries % c.heads, g = r / c.queries / c.heads % c.groups,
                      b = r / c.queries / c.heads / c.groups;
        const int64_t position = i + c.keys - c.queries;
        const size_t q = run.query(b, i, g, h),
                     o = static_cast<size_t>((((b * c.queries + i) * c.groups + g) * c.heads + h) * c.dim);
        std::vector<double> p(count, 0.0), bend(count, 1.0), keep(count, 1.0), dp(count);
        double total = 0, delta = 0;
        for (int64_t j = 0; j < c.keys; ++j) {
            const auto at = static_cast<size_t>(j);
            double score = 0;
            for (int64_t d = 0; d < c.dim; ++d)
                score += c.scale * x(q + static_cast<size_t>(d)) * x(run.key(b, j, g) + static_cast<size_t>(d));
            if (c.softcap > 0) {
                const double t = std::tanh(score / c.softcap);
                score = c.softcap * t, bend[at] = 1 - t * t;
            }
            if (c.alibi)
                score -= static_cast<double>(run.slopes[static_cast<size_t>(g * c.heads + h)]) *
                         std::abs(static_cast<double>(position - j));
            bool visible = (!c.causal || j <= position) && (!c.window || j > position - c.window);
            if (visible && !c.boundaries.empty()) {
                visible = run.segments[static_cast<size_t>(b * c.keys + j)] ==
                          run.segments[static_cast<size_t>(b * c.keys + position)];
            }
            p[at] = visible ? std::exp(score) : 0.0;
            total += p[at];
            if (c.dropout > 0) {
                const auto words =
                    neox::philox(12345, static_cast<uint64_t>(r) * quads + static_cast<uint64_t>(j / 4), 678);
                keep[at] = words.word[j % 4] >= threshold ? 1 / (1 - static_cast<double>(c.dropout)) : 0.0;
            }
        }
        result.lse[static_cast<size_t>(r)] = std::log(total);
        for (size_t j = 0; j < count; ++j) p[j] = total > 0 ? p[j] / total : 0.0;
        for (size_t j = 0; j < count; ++j) {
            const size_t v = run.value(b, static_cast<int64_t>(j), g);
            dp[j] = 0;
            for (size_t d = 0; d < static_cast<size_t>(c.dim); ++d) {
                const double dout = static_cast<float>(run.dout[o + d]);
                result.out[o + d] += p[j] * keep[j] * x(v + d);
                result.dqkv[v + d] += p[j] * keep[j] * dout;
                dp[j] += keep[j] * dout * x(v + d);
            }
            delta += p[j] * dp[j];
        }
        for (size_t j = 0; j < count; ++j) {
            const size_t k = run.key(b, static_cast<int64_t>(j), g);
            const double ds = p[j] * (dp[j] - delta) * bend[j] * c.scale;
            for (size_t d = 0; d < static_cast<size_t>(c.dim); ++d) {
                result.dqkv[q + d] += ds * x(k + d);
                result.dqkv[k + d] += ds * x(q + d);
            }
        }
    }
    return result;
}

inline Case with(Case c, void (*change)(Case&)) {
    change(c);
    return c;
}

}  // namespace emu_test
