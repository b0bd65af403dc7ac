// attention's CUDA kernels against fp64: every mask, every instance of head_dim, packed and split layouts, both backwards; leaks and repetition
// to the bit; no bank conflicts of ldmatrix.
#include <limits>

#include "common/philox.h"
#include "op_test.h"
#include "ops/attention/attention.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;

struct Case {
    int64_t batch, queries, keys, groups, heads, dim;
    bool causal = true;
    int64_t window = 0;
    std::vector<int64_t> borders = {};  // where segments begin
    bool alibi = false;
    float softcap = 0, dropout = 0, scale = 0.2f;
    int64_t gap = 0;  // elements between heads
    size_t offset = 0;
};

// q, k and v as one projection [batch, keys, groups, heads + 2, dim + gap]: queries lie at the last positions. Gradients likewise.
template <class T>
struct Run {
    Case shape;
    int64_t row, positions;
    std::vector<int32_t> segments;
    std::vector<float> slopes;
    Buffer<T> qkv, dout, out, dqkv;
    Buffer<float> lse;

    static size_t size(const Case& c) { return static_cast<size_t>(c.batch * std::max(c.queries, c.keys) * c.groups * (c.heads + 2) * (c.dim + c.gap)); }
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
        for (int64_t i = 0; i < c.batch * c.keys && !c.borders.empty(); ++i) {
            int32_t id = 0;
            for (const int64_t border : c.borders) id += i % c.keys >= border + i / c.keys;  // one later in each batch
            segments.push_back(id);
        }
        for (int64_t h = 0; h < c.groups * c.heads && c.alibi; ++h) slopes.push_back(0.5f / static_cast<float>(h + 1));
    }

    size_t at(int64_t b, int64_t i, int64_t g, int64_t h, int64_t d) const {
        return static_cast<size_t>((b * positions + i) * row + (g * (shape.heads + 2) + h) * (shape.dim + shape.gap) + d);
    }
    size_t query(int64_t b, int64_t i, int64_t g, int64_t h) const { return at(b, i + positions - shape.queries, g, h, 0); }
    size_t key(int64_t b, int64_t j, int64_t g) const { return at(b, j + positions - shape.keys, g, shape.heads, 0); }
    size_t value(int64_t b, int64_t j, int64_t g) const { return at(b, j + positions - shape.keys, g, shape.heads + 1, 0); }

    neox::Attention task() const {
        const Case& c = shape;
        neox::Attention in{};
        in.dtype = emu_test::dtype_of<T>();
        in.batch = c.batch, in.queries = c.queries, in.keys = c.keys, in.groups = c.groups, in.heads = c.heads, in.head_dim = c.dim;
        in.q = qkv.data() + query(0, 0, 0, 0), in.k = qkv.data() + key(0, 0, 0), in.v = qkv.data() + value(0, 0, 0);
        in.q_strides = in.k_strides = in.v_strides = {positions * row, row, (c.heads + 2) * (c.dim + c.gap), c.dim + c.gap};
        in.scale = c.scale, in.causal = c.causal, in.window = c.window, in.softcap = c.softcap, in.dropout = c.dropout;
        in.segments = segments.empty() ? nullptr : segments.data();
        in.slopes = slopes.empty() ? nullptr : slopes.data();
        in.seed[0] = 12345, in.seed[1] = 678;
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
        grad.dq = dqkv.data() + query(0, 0, 0, 0), grad.dk = dqkv.data() + key(0, 0, 0), grad.dv = dqkv.data() + value(0, 0, 0);
        grad.dq_strides = grad.dk_strides = grad.dv_strides = in.q_strides;
        Buffer<float> workspace("workspace", static_cast<size_t>(neox::attention_backward_workspace_cuda(in, deterministic)) / 4);
        EXPECT(!neox::attention_backward_cuda(in, grad, deterministic, workspace.data(), nullptr));
    }
};

struct Expected {
    std::vector<double> out, dqkv;
};

// The formulas of attention.h, all probabilities written out.
template <class T>
Expected expect(const Run<T>& run) {
    const Case& c = run.shape;
    Expected result{std::vector<double>(run.out.size()), std::vector<double>(run.dqkv.size())};
    const auto x = [&](size_t i) { return static_cast<double>(static_cast<float>(run.qkv[i])); };
    const auto count = static_cast<size_t>(c.keys);
    const uint64_t threshold = neox::dropout_threshold(c.dropout), quads = (static_cast<uint64_t>(c.keys) + 3) / 4;
    for (int64_t r = 0; r < c.batch * c.groups * c.heads * c.queries; ++r) {
        const int64_t i = r % c.queries, h = r / c.queries % c.heads, g = r / c.queries / c.heads % c.groups, b = r / c.queries / c.heads / c.groups;
        const int64_t position = i + c.keys - c.queries;
        const size_t q = run.query(b, i, g, h), o = static_cast<size_t>((((b * c.queries + i) * c.groups + g) * c.heads + h) * c.dim);
        std::vector<double> p(count, 0.0), bend(count, 1.0), keep(count, 1.0), dp(count);
        double total = 0, delta = 0;
        for (int64_t j = 0; j < c.keys; ++j) {
            const auto at = static_cast<size_t>(j);
            double score = 0;
            for (int64_t d = 0; d < c.dim; ++d) score += c.scale * x(q + static_cast<size_t>(d)) * x(run.key(b, j, g) + static_cast<size_t>(d));
            if (c.softcap > 0) {
                const double t = std::tanh(score / c.softcap);
                score = c.softcap * t, bend[at] = 1 - t * t;
            }
            if (c.alibi) score -= static_cast<double>(run.slopes[static_cast<size_t>(g * c.heads + h)]) * std::abs(static_cast<double>(position - j));
            bool visible = (!c.causal || j <= position) && (!c.window || j > position - c.window);
            if (visible && !c.borders.empty()) {
                visible = run.segments[static_cast<size_t>(b * c.keys + j)] == run.segments[static_cast<size_t>(b * c.keys + position)];
            }
            p[at] = visible ? std::exp(score) : 0.0;
            total += p[at];
            if (c.dropout > 0) {
                const auto words = neox::philox(12345, static_cast<uint64_t>(r) * quads + static_cast<uint64_t>(j / 4), 678);
                keep[at] = words.word[j % 4] >= threshold ? 1 / (1 - static_cast<double>(c.dropout)) : 0.0;
            }
        }
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

template <class T>
std::vector<float> copy(const Buffer<T>& of) {
    std::vector<float> values(of.size());
    for (size_t i = 0; i < of.size(); ++i) values[i] = static_cast<float>(of[i]);
    return values;
}

// Results of the first schedule: every later one must give the same bits.
std::vector<std::vector<float>>& first_results() {
    static std::vector<std::vector<float>> results;
    return results;
}

template <class T>
void check(const Case& c, size_t index) {
    const std::string what = "case " + std::to_string(index) + " " + emu_test::name_of<T>();
    const uint64_t conflicts = simt::stats().ldmatrix_conflicts;
    Run<T> run(c);
    const Expected expected = expect(run);
    run.forward();
    EXPECT_NEAR(run.out, expected.out, what + " out");
    run.backward(false);
    EXPECT_NEAR(run.dqkv, expected.dqkv, what + " dqkv");
    for (size_t i = 0; i < run.dqkv.size(); ++i) run.dqkv[i] = T(0.0f);
    run.backward(true);
    EXPECT_NEAR(run.dqkv, expected.dqkv, what + " dqkv deterministic");
    EXPECT(simt::stats().ldmatrix_conflicts == conflicts);
    if (!std::is_same_v<T, __nv_bfloat16>) return;
    for (const auto& values : {copy(run.out), copy(run.dqkv)}) {
        const size_t place = 2 * index + (values.size() == run.dqkv.size());
        if (first_results().size() <= place) first_results().resize(place + 1);
        if (first_results()[place].empty()) first_results()[place] = values;
        emu_test::tally.check(first_results()[place] == values, (what + ": the same bits in every schedule").c_str(), __FILE__, __LINE__);
    }
}

std::vector<Case> cases() {
    Case documents{2, 129, 129, 1, 2, 64};
    documents.borders = {40, 41, 101};
    Case documents_full{1, 70, 129, 1, 1, 32};
    documents_full.causal = false, documents_full.borders = {64, 100};
    Case window{1, 130, 160, 1, 2, 64};
    window.window = 33;
    Case tile_end{1, 66, 128, 1, 1, 64};     // a tile of keys ends one key after the first row's position
    Case tile_begin{1, 100, 164, 1, 1, 64};  // a tile begins one key before the last row's window
    tile_begin.window = 163;
    Case one_key{1, 65, 65, 1, 1, 64};
    one_key.window = 1;
    Case full{1, 65, 129, 2, 1, 96};
    full.causal = false;
    Case more_queries{1, 300, 17, 1, 1, 64};  // whole blocks of rows see nothing
    Case decoding{2, 1, 300, 1, 4, 64};
    Case extras{1, 65, 129, 1, 2, 64};
    extras.alibi = true, extras.softcap = 1.5f, extras.dropout = 0.3f, extras.window = 90;
    Case negative{1, 33, 33, 1, 1, 32};
    negative.scale = -0.3f;
    Case loose{1, 65, 65, 1, 2, 33};  // nothing is aligned
    loose.gap = 2, loose.offset = 3;
    Case dropped{1, 40, 66, 1, 1, 128};
    dropped.dropout = 0.2f, dropped.causal = false;
    return {{1, 1, 1, 1, 1, 64},
            {1, 129, 129, 1, 1, 64},
            {1, 129, 129, 1, 1, 128},
            {1, 65, 65, 1, 1, 80},
            {1, 40, 40, 1, 1, 32},
            {1, 65, 65, 1, 1, 160},
            {1, 65, 65, 1, 1, 256},
            documents,
            documents_full,
            window,
            one_key,
            full,
            more_queries,
            decoding,
            extras,
            negative,
            loose,
            dropped,
            tile_end,
            tile_begin};
}

// Tokens after a border, or of another document, never move a bit of what lies before it.
void leaks(bool by_document) {
    Case c{1, 200, 200, 1, 2, 64};
    if (by_document) c.causal = false, c.borders = {131};
    std::vector<float> before[2];
    for (int pass = 0; pass < 2; ++pass) {
        Run<__nv_bfloat16> run(c);
        for (size_t i = 131 * static_cast<size_t>(run.row); pass && i < run.qkv.size(); ++i) run.qkv[i] = 3.0f * static_cast<float>(run.qkv[i]) + 5.0f;
        run.forward();
        if (by_document) run.backward(true);
        const std::vector<float> out = copy(run.out), gradient = copy(run.dqkv);
        const auto border = static_cast<ptrdiff_t>(131 * c.groups * c.heads * c.dim), gradient_border = static_cast<ptrdiff_t>(131 * run.row);
        before[pass].assign(out.begin(), out.begin() + border);
        before[pass].insert(before[pass].end(), gradient.begin(), gradient.begin() + gradient_border);
    }
    EXPECT(before[0] == before[1]);
}

void values() {
    const std::vector<Case> all = cases();
    for (size_t i = 0; i < all.size(); ++i) {
        check<__nv_bfloat16>(all[i], i);
        if (i < 2 || i == 14) check<__half>(all[i], i);
    }
    leaks(false);
    leaks(true);
}

const emu_test::Operator registered{"attention", values, nullptr};

}  // namespace
