#include <cstring>
#include <vector>

#include "ops/bias_gelu/bias_gelu.h"
#include "ops/decode_block/decode_block.h"
#include "ops/gated/gated.h"
#include "ops/linear/linear.h"

namespace neox {
namespace {

// Buffers of one call, carved out of one allocation, sized for the widest element type.
class Buffers {
  public:
    explicit Buffers(const DecodeBlock& op)
        : rows(op.batch * op.seq),
          qkv_cols(op.groups * (op.heads + 2) * op.head_dim),
          attended_cols(op.groups * op.heads * op.head_dim),
          floats_(static_cast<size_t>(rows * (2 * op.hidden + qkv_cols + attended_cols + 3 * op.width +
                                              op.groups * op.heads + 2 * (1 + op.heads)) +
                                      8 * kAlign)) {
        for (void** buffer : {&normed[0], &normed[1]}) *buffer = take(rows * op.hidden);
        qkv = take(rows * qkv_cols);
        attended = take(rows * attended_cols);
        for (void** buffer : {&up, &gate, &inner}) *buffer = take(rows * op.width);
        lse = take(rows * op.groups * op.heads);
        statistics = take(2 * rows * (1 + op.heads));
    }

    const int64_t rows, qkv_cols, attended_cols;
    void *normed[2], *qkv, *attended, *up, *gate, *inner;
    float *lse, *statistics;

  private:
    static constexpr int64_t kAlign = 16;

    float* take(int64_t count) {
        float* const buffer = floats_.data() + used_;
        used_ += (count + kAlign - 1) / kAlign * kAlign;
        return buffer;
    }

    std::vector<float> floats_;
    int64_t used_ = 0;
};

// One transformer block, one step of decoding: see decode_block.h.
class Step {
  public:
    Step(const DecodeBlock& op, const Parallel& parallel) : op_(op), parallel_(parallel), buffers_(op) {}

    void run(void* stream, void* delta) {
        const void* const addend = op_.delta;
        if (!addend) std::memcpy(stream, op_.stream, bytes(buffers_.rows * op_.hidden));
        const bool dual = op_.parallel && op_.norms[1].weight;
        // the branch's output is the first addend, as in the operators' path
        norm(addend ? addend : op_.stream, addend ? op_.stream : nullptr, stream, 0, dual ? 2 : 1);
        attend();
        project(op_.out, buffers_.attended, buffers_.attended_cols, op_.hidden, nullptr, delta);
        if (op_.parallel) {
            feed_forward(buffers_.normed[dual ? 1 : 0], delta, delta);
        } else {
            norm(delta, stream, stream, 1, 1);
            feed_forward(buffers_.normed[0], nullptr, delta);
        }
    }

  private:
    size_t bytes(int64_t elements) const {
        return static_cast<size_t>(elements) * (op_.dtype == DType::kFloat32 ? 4 : 2);
    }

    void* at(const void* base, int64_t elements) const {
        return static_cast<char*>(const_cast<void*>(base)) + static_cast<int64_t>(bytes(elements));
    }

    // Writes x + residual to sum, and its norms with parameters [first, ...) to normed.
    void norm(const void* x, const void* residual, void* sum, int first, int outputs) {
        NormForward norm = {};
        norm.dtype = op_.dtype, norm.rms = op_.rms, norm.outputs = outputs;
        norm.rows = buffers_.rows, norm.cols = op_.hidden, norm.eps = op_.eps;
        norm.x = x, norm.residual = residual, norm.sum = sum;
        norm.x_stride = norm.residual_stride = op_.hidden;
        norm.mean = buffers_.statistics, norm.rstd = buffers_.statistics + buffers_.rows;
        for (int k = 0; k < outputs; ++k) norm.parameters[k] = op_.norms[first + k], norm.y[k] = buffers_.normed[k];
        norm_forward_cpu(norm, parallel_);
    }

    // RMS norm of `count` heads, in place.
    void norm_heads(void* heads, int64_t count, const void* weight) {
        NormForward norm = {};
        norm.dtype = op_.dtype, norm.rms = true, norm.outputs = 1;
        norm.rows = count, norm.cols = norm.x_stride = op_.head_dim, norm.eps = op_.eps;
        norm.x = norm.y[0] = heads;
        norm.parameters[0].weight = weight;
        norm.rstd = buffers_.statistics;
        norm_forward_cpu(norm, serial());
    }

    void project(const Projection& projection, const void* x, int64_t in, int64_t out, const void* added, void* y) {
        few_rows_cpu(FewRows{op_.dtype, buffers_.rows, in, out, x, in, projection.weight, in, projection.bias, added},
                     y, parallel_);
    }

    // Rotates keys and queries. Keys and values are written to the cache, queries in place.
    void rotate_and_store() {
        const int64_t d = op_.head_dim, group = (op_.heads + 2) * d, row = buffers_.qkv_cols,
                      cached_row = op_.groups * d;
        void* const key = at(buffers_.qkv, op_.heads * d);
        void* const keys = at(op_.keys, op_.length * cached_row);
        if (op_.tables.cos) {
            const RotarySize size{op_.batch, op_.seq, d};
            const Heads queries{op_.seq * row, row, group, d, op_.groups, op_.heads},
                from{op_.seq * row, row, group, 0, op_.groups, 1};
            rotary_cpu(op_.dtype, size, op_.tables, buffers_.qkv, queries, buffers_.qkv, queries, serial());
            rotary_cpu(op_.dtype, size, op_.tables, key, from, keys,
                       Heads{op_.cache_batch_stride, cached_row, d, 0, op_.groups, 1}, serial());
        } else {
            copy_heads(key, keys);
        }
        copy_heads(at(key, d), at(op_.values, op_.length * cached_row));
    }

    void copy_heads(const void* from, void* to) {
        const int64_t d = op_.head_dim, group = (op_.heads + 2) * d;
        for (int64_t row = 0; row < buffers_.rows; ++row) {
            const int64_t target = row / op_.seq * op_.cache_batch_stride + row % op_.seq * op_.groups * d;
            for (int64_t g = 0; g < op_.groups; ++g)
                std::memcpy(at(to, target + g * d), at(from, row * buffers_.qkv_cols + g * group), bytes(d));
        }
    }

    void attend() {
        const int64_t d = op_.head_dim, group = (op_.heads + 2) * d, row = buffers_.qkv_cols;
        project(op_.qkv, buffers_.normed[0], op_.hidden, row, nullptr, buffers_.qkv);
        for (int64_t i = 0; op_.query_norm && i < buffers_.rows * op_.groups; ++i) {
            norm_heads(at(buffers_.qkv, i * group), op_.heads, op_.query_norm);
            norm_heads(at(buffers_.qkv, i * group + op_.heads * d), 1, op_.key_norm);
        }
        rotate_and_store();
        Attention in = {};
        in.dtype = op_.dtype;
        in.batch = op_.batch, in.queries = op_.seq, in.keys = op_.length + op_.seq;
        in.groups = op_.groups, in.heads = op_.heads, in.head_dim = d;
        in.q = buffers_.qkv, in.k = op_.keys, in.v = op_.values;
        in.q_strides = {op_.seq * row, row, group, d};
        in.k_strides = in.v_strides = {op_.cache_batch_stride, op_.groups * d, d, d};
        in.scale = op_.scale, in.causal = true, in.window = op_.window, in.softcap = op_.softcap;
        in.segments = op_.segments, in.slopes = op_.slopes;
        attention_forward_cpu(in, buffers_.attended, buffers_.lse, parallel_);
    }

    // delta = mlp(x) + added; delta and added may alias.
    void feed_forward(const void* x, const void* added, void* delta) {
        const bool gated = op_.gate.weight != nullptr;
        // an activation without a gate adds the bias itself
        const Projection up{op_.up.weight, gated ? op_.up.bias : nullptr};
        project(up, x, op_.hidden, op_.width, nullptr, buffers_.up);
        if (gated) {
            project(op_.gate, x, op_.hidden, op_.width, nullptr, buffers_.gate);
            const Activation activation = op_.activation == BlockActivation::kGatedSilu   ? Activation::kSilu
                                          : op_.activation == BlockActivation::kGatedGelu ? Activation::kGelu
                                                                                          : Activation::kRelu;
            gated_forward_cpu(Gated{op_.dtype, activation, buffers_.rows, op_.width, buffers_.gate, op_.width,
                                    buffers_.up, op_.width},
                              buffers_.inner, parallel_);
        } else {
            const bool tanh = op_.activation == BlockActivation::kGeluTanh;
            bias_gelu_forward_cpu(
                BiasGelu{op_.dtype, tanh, buffers_.rows, op_.width, buffers_.up, op_.width, op_.up.bias},
                buffers_.inner, parallel_);
        }
        project(op_.down, buffers_.inner, op_.width, op_.hidden, added, delta);
    }

    const DecodeBlock& op_;
    const Parallel& parallel_;
    Buffers buffers_;
};

}  // namespace

void decode_block_cpu(const DecodeBlock& op, void* stream, void* delta, const Parallel& parallel) {
    Step(op, parallel).run(stream, delta);
}

}  // namespace neox
