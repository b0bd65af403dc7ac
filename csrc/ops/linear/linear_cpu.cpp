#include "common/reduce.h"
#include "common/vec.h"
#include "ops/linear/linear.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread

}  // namespace

void widen_cpu(const Matrix16& from, float* to, const Parallel& parallel) {
    parallel(from.rows, kGrain / (from.cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const bf16* const source = from.data + row * from.stride;
            float* const target = to + row * from.cols;
            for_each_vec(from.cols, [&](int64_t i, auto load, auto store) { store(target + i, load(source + i)); });
        }
    });
}

void widen_and_sum_cpu(const Matrix16& from, float* to, bf16* sums, float* partial, const Parallel& parallel) {
    const Blocks blocks(from.rows);
    parallel(blocks.count, kGrain / (from.cols * blocks.size + 1), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            float* const block_sums = partial + block * from.cols;
            for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
                const bool first = row == blocks.begin(block);
                const bf16* const source = from.data + row * from.stride;
                float* const target = to + row * from.cols;
                for_each_vec(from.cols, [&](int64_t i, auto load, auto store) {
                    const Vec value = load(source + i);
                    store(target + i, value);
                    store(block_sums + i, first ? value : load(static_cast<const float*>(block_sums) + i) + value);
                });
            }
        }
    });
    sum_blocks(partial, blocks.count, from.cols, sums, parallel);
}

void round_rows_cpu(const float* from, int64_t rows, int64_t cols, const bf16* bias, bf16* to, int64_t to_stride,
                    const Parallel& parallel) {
    parallel(rows, kGrain / (cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* const source = from + row * cols;
            bf16* const target = to + row * to_stride;
            for_each_vec(cols, [&](int64_t i, auto load, auto store) {
                store(target + i, bias ? load(source + i) + load(bias + i) : load(source + i));
            });
        }
    });
}

}  // namespace neox
