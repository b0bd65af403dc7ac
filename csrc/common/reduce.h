// Second stage of a sum over rows: adds the per-block sums in order (see Blocks in parallel.h).
#pragma once

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace neox {

// total [cols] = sum over blocks of partial [blocks, cols]; zeros when there is no block.
template <class T>
void sum_blocks(const float* partial, int64_t blocks, int64_t cols, T* total, const Parallel& parallel) {
    const int64_t chunks = (cols + kVecWidth - 1) / kVecWidth;
    parallel(chunks, 16384 / (kVecWidth * (blocks + 1)), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kVecWidth;
        const int64_t size = std::min(cols, end * kVecWidth) - first;
        for_each_vec(size, [&](int64_t i, auto load, auto store) {
            Vec sum = {};
            for (int64_t block = 0; block < blocks; ++block) sum += load(partial + block * cols + first + i);
            store(total + first + i, sum);
        });
    });
}

}  // namespace neox
