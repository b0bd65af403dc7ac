// A problem of attention for the emulated CUDA kernels: tensors in a packed layout, the launchers, and results in fp64.
#pragma once

#include <map>

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
    int64_t group_gap = 0, row_gap = 0, batch_gap = 0;  // elements between groups, positions and batches
};

// Where the elements of a case are. q, k and v are one projection [batch, keys, groups, heads + 2, dim + gap], with the
// queries at the last positions. Gradients have the same layout.
struct Indices {
    Case shape;
    int64_t group, row, positions, batch;

    explicit Indices(const Case& c)
        : shape(c),
          group((c.heads + 2) * (c.dim + c.gap) + c.group_gap),
          row(c.groups * group + c.row_gap),
          positions(std::max(c.queries, c.keys)),
          batch(positions * row + c.batch_gap) {}

    size_t at(int64_t b, int64_t i, int64_t g, int64_t h, int64_t d) const {
        return static_cast<size_t>(b * batch + i * row + g * group + h * (shape.dim + shape.gap) + d);
    }
    size_t query(int64_t b, int64_t i, int64_t g, int64_t h) const {
        return at(b, i + positions - shape.queries, g, h, 0);
    }
    size_t key(int64_t b, int64_t j, int64_t g) const { return at(b, j + positions - shape.keys, g, shape.heads, 0); }
    size_t value(int64_t b, int64_t j, int64_t g) const {
        return at(b, j + positions - shape.keys, g, shape.heads + 1, 0);
    }
};

template <class T>
struct Run : Indices {
    std::vector<int32_t> segments;
    std::vector<float> slopes;
    Buffer<T> qkv, dout, out, dqkv;
    Buffer<float> lse;

    static size_t size(const Case& c) { return static_cast<size_t>(c.batch * Indices(c).batch); }
    static size_t rows(const Case& c) { return static_cast<size_t>(c.batch * c.queries * c.groups * c.heads); }

    explicit Run(const Case& c)
        : Indices(c),
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

    neox::Attention task() const {
        const Case& c = shape;
        neox::Attention in{};
        in.dtype = dtype_of<T>();
        in.batch = c.batch, in.queries = c.queries, in.keys = c.keys, in.groups = c.groups, in.heads = c.heads,
        in.head_dim = c.dim;
        in.q = qkv.data() + query(0, 0, 0, 0), in.k = qkv.data() + key(0, 0, 0), in.v = qkv.data() + value(0, 0, 0);
        in.q_strides = in.k_strides = in.v_strides = {batch, row, group, c.dim + c.gap};
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

// The inputs of a case.
struct Inputs {
    std::vector<double> qkv, dout;
    const int32_t* segments;
    const float* slopes;
};

// The formulas of attention.h with the full matrix of probabilities, in fp64.
Expected attention_reference(const Indices& indices, const Inputs& inputs);

template <class T>
Expected expected_of(const Run<T>& run) {
    Inputs inputs{std::vector<double>(run.qkv.size()), std::vector<double>(run.dout.size()), run.segments.data(),
                  run.slopes.data()};
    for (size_t i = 0; i < run.qkv.size(); ++i) inputs.qkv[i] = static_cast<float>(run.qkv[i]);
    for (size_t i = 0; i < run.dout.size(); ++i) inputs.dout[i] = static_cast<float>(run.dout[i]);
    return attention_reference(run, inputs);
}

template <class T>
std::vector<float> values_of(const Buffer<T>& buffer) {
    std::vector<float> values(buffer.size());
    for (size_t i = 0; i < buffer.size(); ++i) values[i] = static_cast<float>(buffer[i]);
    return values;
}

// Fails if `what` had other bits in an earlier schedule.
template <class T>
void expect_same_bits(const Buffer<T>& got, const std::string& what, const char* file, int line) {
    static std::map<std::string, std::vector<float>> first_results;
    const auto [first, inserted] = first_results.emplace(what, values_of(got));
    const bool same = inserted || first->second == values_of(got);
    tally.check(same, (what + ": the same bits in every schedule").c_str(), file, line);
}
#define EXPECT_SAME_BITS(got, what) emu_test::expect_same_bits(got, what, __FILE__, __LINE__)

inline Case with(Case c, void (*change)(Case&)) {
    change(c);
    return c;
}

}  // namespace emu_test
