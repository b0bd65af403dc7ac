// Compiled with -O2 and without sanitizers in every variant: the kernels are tested, not the reference.
#include <cmath>

#include "attention_case.h"
#include "common/philox.h"

namespace emu_test {

namespace {

// One query: its scores, probabilities and what their gradients need, per key.
struct Query {
    int64_t batch, group, head, position;
    size_t q, out;
    std::vector<double> p, softcap_slope, keep, dp;
};

// Fills p, softcap_slope and keep. Returns the sum of the exponentials.
double probabilities(const Indices& at, const Inputs& in, Query& query, int64_t row) {
    const Case& c = at.shape;
    const uint64_t threshold = neox::dropout_threshold(c.dropout), quads = (static_cast<uint64_t>(c.keys) + 3) / 4;
    const double* const q = in.qkv.data() + query.q;
    double total = 0;
    for (int64_t j = 0; j < c.keys; ++j) {
        const double* const k = in.qkv.data() + at.key(query.batch, j, query.group);
        const auto to = static_cast<size_t>(j);
        double score = 0;
        for (int64_t d = 0; d < c.dim; ++d) score += c.scale * q[d] * k[d];
        if (c.softcap > 0) {
            const double t = std::tanh(score / c.softcap);
            score = c.softcap * t, query.softcap_slope[to] = 1 - t * t;
        }
        if (c.alibi)
            score -= static_cast<double>(in.slopes[query.group * c.heads + query.head]) *
                     std::abs(static_cast<double>(query.position - j));
        bool visible = (!c.causal || j <= query.position) && (!c.window || j > query.position - c.window);
        if (visible && !c.boundaries.empty()) {
            const int32_t* const segments = in.segments + query.batch * c.keys;
            visible = segments[j] == segments[query.position];
        }
        query.p[to] = visible ? std::exp(score) : 0.0;
        total += query.p[to];
        if (c.dropout > 0) {
            const auto words =
                neox::philox(12345, static_cast<uint64_t>(row) * quads + static_cast<uint64_t>(j / 4), 678);
            query.keep[to] = words.word[j % 4] >= threshold ? 1 / (1 - static_cast<double>(c.dropout)) : 0.0;
        }
    }
    for (double& p : query.p) p = total > 0 ? p / total : 0.0;
    return total;
}

// Adds the output and the gradients of one query.
void accumulate(const Indices& at, const Inputs& in, Query& query, Expected& result) {
    const Case& c = at.shape;
    const auto dim = static_cast<size_t>(c.dim), keys = static_cast<size_t>(c.keys);
    const double *const dout = in.dout.data() + query.out, *const q = in.qkv.data() + query.q;
    double *const out = result.out.data() + query.out, *const dq = result.dqkv.data() + query.q;
    double delta = 0;
    for (size_t j = 0; j < keys; ++j) {
        const size_t first = at.value(query.batch, static_cast<int64_t>(j), query.group);
        const double* const v = in.qkv.data() + first;
        double* const dv = result.dqkv.data() + first;
        const double weight = query.p[j] * query.keep[j];
        double dp = 0;
        for (size_t d = 0; d < dim; ++d) {
            out[d] += weight * v[d];
            dv[d] += weight * dout[d];
            dp += query.keep[j] * dout[d] * v[d];
        }
        query.dp[j] = dp;
        delta += query.p[j] * dp;
    }
    for (size_t j = 0; j < keys; ++j) {
        const size_t first = at.key(query.batch, static_cast<int64_t>(j), query.group);
        const double* const k = in.qkv.data() + first;
        double* const dk = result.dqkv.data() + first;
        const double ds = query.p[j] * (query.dp[j] - delta) * query.softcap_slope[j] * c.scale;
        for (size_t d = 0; d < dim; ++d) {
            dq[d] += ds * k[d];
            dk[d] += ds * q[d];
        }
    }
}

}  // namespace

Expected attention_reference(const Indices& indices, const Inputs& inputs) {
    const Case& c = indices.shape;
    const int64_t rows = c.batch * c.queries * c.groups * c.heads;
    Expected result{std::vector<double>(static_cast<size_t>(rows * c.dim)),
                    std::vector<double>(static_cast<size_t>(rows)), std::vector<double>(inputs.qkv.size())};
    const auto keys = static_cast<size_t>(c.keys);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = r % c.queries, h = r / c.queries % c.heads, g = r / c.queries / c.heads % c.groups,
                      b = r / c.queries / c.heads / c.groups;
        const int64_t out = (((b * c.queries + i) * c.groups + g) * c.heads + h) * c.dim;
        Query query{b,
                    g,
                    h,
                    i + c.keys - c.queries,
                    indices.query(b, i, g, h),
                    static_cast<size_t>(out),
                    std::vector<double>(keys, 0.0),
                    std::vector<double>(keys, 1.0),
                    std::vector<double>(keys, 1.0),
                    std::vector<double>(keys)};
        const double total = probabilities(indices, inputs, query, r);
        result.lse[static_cast<size_t>(r)] = std::log(total);
        accumulate(indices, inputs, query, result);
    }
    return result;
}

}  // namespace emu_test
