// Threads for the kernels without knowing whose they are: the binding passes torch's, native tests pass a serial loop.
#pragma once

#include <algorithm>
#include <cstdint>

namespace neox {

// Splits [0, count) into ranges of at least `grain` and runs them on several threads. Kernels must not let their result depend on
// how the range is split: reductions across rows go through Blocks below.
struct Parallel {
    using Body = void (*)(int64_t begin, int64_t end, void* context);
    using For = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

    For run;

    template <class F>
    void operator()(int64_t count, int64_t grain, const F& body) const {
        if (count <= 0) return;
        const Body call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
        run(0, count, std::max<int64_t>(grain, 1), call, const_cast<void*>(static_cast<const void*>(&body)));
    }
};

inline Parallel serial() {
    return Parallel{[](int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) { body(begin, end, context); }};
}

// A division of rows into at most 32 blocks that depends on nothing but their number. A sum over rows is formed per block and the
// blocks are added in order, so it is the same bits for every number of threads.
struct Blocks {
    int64_t rows;
    int64_t size;   // rows in each block but the last
    int64_t count;  // number of blocks

    explicit Blocks(int64_t rows_in) : rows(rows_in), size(std::max<int64_t>((rows_in + 31) / 32, 8)), count((rows_in + size - 1) / size) {}

    int64_t begin(int64_t block) const { return block * size; }
    int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }
};

}  // namespace neox
