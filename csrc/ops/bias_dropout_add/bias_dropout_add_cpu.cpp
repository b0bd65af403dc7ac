#include "common/philox.h"
#include "common/reduce.h"
#include "common/vec.h"
#include "ops/bias_dropout_add/bias_dropout_add.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread
constexpr int64_t kChunk = 256;    // columns per batch of random words; a multiple of 4 and of kVecWidth

// Draws and applies the mask of one chunk of a row.
class Mask {
  public:
    Mask(const Dropout& dropout, int64_t cols)
        : dropout_(dropout),
          quads_((cols + 3) / 4),
          threshold_(dropout_threshold(dropout.p)),
          scale_(dropout.p < 1 ? static_cast<float>(1 / (1 - dropout.p)) : 0.0f) {}

    // For columns [first, first + kChunk) of a row; first is a multiple of kChunk.
    void draw(int64_t row, int64_t first) {
        if (!dropout_.seed) return;
        const uint64_t start =
            static_cast<uint64_t>(row) * static_cast<uint64_t>(quads_) + static_cast<uint64_t>(first / 4);
        philox_block<kChunk / 4>(static_cast<uint64_t>(dropout_.seed[0]), start,
                                 static_cast<uint64_t>(dropout_.seed[1]), words_);
    }

    // v scaled, or zero if dropped. i counts from the first column of the chunk.
    NEOX_INLINE Vec apply(Vec v, int64_t i) const {
        if (!dropout_.seed) return v;
        if (threshold_ > UINT32_MAX) return Vec{};
        VecUint words;
        std::memcpy(&words, words_ + i, sizeof(words));
        return words >= static_cast<uint32_t>(threshold_) ? v * scale_ : Vec{};
    }

  private:
    Dropout dropout_;
    int64_t quads_;  // groups of four columns in a row
    uint64_t threshold_;
    float scale_;
    uint32_t words_[kChunk];
};

// Draws the words of each chunk of a row and calls body(first, size).
template <class Body>
void for_chunks(Mask& mask, int64_t row, int64_t cols, const Body& body) {
    for (int64_t first = 0; first < cols; first += kChunk) {
        mask.draw(row, first);
        body(first, std::min(kChunk, cols - first));
    }
}

template <class T>
void forward(const BiasDropoutAdd& op, T* y, const Parallel& parallel) {
    const T* const bias = static_cast<const T*>(op.bias);
    parallel(op.rows, kGrain / (op.cols + 1), [&](int64_t begin, int64_t end) {
        Mask mask(op.dropout, op.cols);
        for (int64_t row = begin; row < end; ++row) {
            const T* const x = static_cast<const T*>(op.x) + row * op.x_stride;
            const T* const residual = static_cast<const T*>(op.residual) + row * op.residual_stride;
            for_chunks(mask, row, op.cols, [&](int64_t first, int64_t size) {
                for_each_vec(size, [&](int64_t i, auto load, auto store) {
                    const int64_t column = first + i;
                    const Vec v = bias ? load(x + column) + load(bias + column) : load(x + column);
                    store(y + row * op.cols + column, load(residual + column) + mask.apply(v, i));
                });
            });
        }
    });
}

template <class T>
void backward(const BiasDropoutAddBackward& op, const Parallel& parallel) {
    const Blocks blocks(op.rows);
    T* const dx = static_cast<T*>(op.dx);
    parallel(blocks.count, kGrain / (op.cols * blocks.size + 1), [&](int64_t begin, int64_t end) {
        Mask mask(op.dropout, op.cols);
        for (int64_t block = begin; block < end; ++block) {
            float* const sums = op.dbias ? op.partial + block * op.cols : nullptr;
            if (sums) std::fill_n(sums, op.cols, 0.0f);
            for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
                const T* const dy = static_cast<const T*>(op.dy) + row * op.dy_stride;
                for_chunks(mask, row, op.cols, [&](int64_t first, int64_t size) {
                    for_each_vec(size, [&](int64_t i, auto load, auto store) {
                        const int64_t column = first + i;
                        const Vec d = mask.apply(load(dy + column), i);
                        if (dx) store(dx + row * op.cols + column, d);
                        if (sums) store(sums + column, load(static_cast<const float*>(sums) + column) + d);
                    });
                });
            }
        }
    });
    if (op.dbias) sum_blocks(op.partial, blocks.count, op.cols, static_cast<T*>(op.dbias), parallel);
}

}  // namespace

void bias_dropout_add_forward_cpu(const BiasDropoutAdd& op, void* y, const Parallel& parallel) {
    dispatch(op.dtype, [&](auto zero) { forward(op, static_cast<decltype(zero)*>(y), parallel); });
}

void bias_dropout_add_backward_cpu(const BiasDropoutAddBackward& op, const Parallel& parallel) {
    dispatch(op.dtype, [&](auto zero) { backward<decltype(zero)>(op, parallel); });
}

}  // namespace neox
