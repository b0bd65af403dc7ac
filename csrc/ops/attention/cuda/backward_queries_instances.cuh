// Tile shapes of the dq kernel per head_dim. docs/attention.md derives them.
#pragma once

#include "ops/attention/cuda/backward_queries.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox::attention {

// {kDim, rows, keys}
template <int kDim, bool kGeneral>
struct QueriesShapeOf;
template <>
struct QueriesShapeOf<64, false> : QueriesShape<64, 128, 64> {};
template <>
struct QueriesShapeOf<96, false> : QueriesShape<96, 128, 64> {};
template <>
struct QueriesShapeOf<128, false> : QueriesShape<128, 128, 64> {};
template <>
struct QueriesShapeOf<256, false> : QueriesShape<256, 64, 32> {};
template <>
struct QueriesShapeOf<64, true> : QueriesShape<64, 128, 32> {};
template <>
struct QueriesShapeOf<128, true> : QueriesShape<128, 128, 32> {};
template <>
struct QueriesShapeOf<256, true> : QueriesShape<256, 64, 32> {};

template <class T>
cudaError_t launch_backward_queries(const Attention& in, const Backward<T>& task, Stream stream) {
    return dispatch_instance(instance_dim(in), is_general(in), [&](auto dim, auto general) {
        using Shape = QueriesShapeOf<decltype(dim)::value, decltype(general)::value>;
        Backward<T> queries_task = task;
        queries_task.order = block_order(in, ceil_divide(in.queries * in.heads, Shape::kRows), in.causal);
        const dim3 grid(
            static_cast<unsigned>(static_cast<int64_t>(queries_task.order.tiles) * queries_task.order.pairs));
        if (grid.x == 0) return cudaSuccess;
        return launch(backward_queries_kernel<T, Shape, decltype(general)::value>, grid, dim3(Shape::kThreads),
                      Shape::kSharedBytes, stream, queries_task);
    });
}

}  // namespace neox::attention
