// Parallel loops for the kernels, independent of the thread pool: bindings pass torch's, native tests a serial loop.
#pragma once

#include <algorithm>
#include <cstdint>

namespace neox {

// Splits [0, count) into ranges of at least `grain` and runs them on several threads. The result of a kernel must not
// depend on the split; reductions across rows therefore use Blocks below.
struct Parallel {
    using Body = void (*)(int64_t begin, int64_t end, void* context);
    using For = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

    For run;

    template <class F>
    void operator()(int64_t count, int64_t grain, const F& body) const {
        if (count <= 0) return;
        const Body call = [](int64_t begin, int64_t end, void* context) {
            (*static_cast<const F*>(context))(begin, end);
        };
        run(0, count, std::max<int64_t>(grain, 1), call, const_cast<void*>(static_cast<const void*>(&body)));
    }
};

inline Parallel serial() {
    return Parallel{
        [](int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) { body(begin, end, context); }};
}

// Partition of rows into at most 32 blocks that depends on the number of rows only. A sum over rows is computed per
// block and the blocks are added in order, so that its bits do not depend on the number of threads.
struct Blocks {
    int64_t rows;
    int64_t size;   // rows in each block except the last
    int64_t count;  // number of blocks

    explicit Blocks(int64_t rows_in)
        : rows(rows_in), size(std::max<int64_t>((rows_in + 31) / 32, 8)), count((rows_in + size - 1) / size) {}

    int64_t begin(int64_t block) const { return block * size; }
    int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }
};

}  // namespace neox
