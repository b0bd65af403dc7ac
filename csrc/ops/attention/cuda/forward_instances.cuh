// Tile shapes of the forward kernel per head_dim. docs/attention.md derives them.
#pragma once

#include "ops/attention/cuda/forward.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox::attention {

// {kDim, rows, keys, warps, stages, blocks per multiprocessor}
template <int kDim, bool kGeneral>
struct ForwardShapeOf;
template <>
struct ForwardShapeOf<64, false> : ForwardShape<64, 128, 64, 4, 4, 2> {};
template <>
struct ForwardShapeOf<96, false> : ForwardShape<96, 128, 64, 4, 4, 2> {};
template <>
struct ForwardShapeOf<128, false> : ForwardShape<128, 128, 64, 4, 2, 2> {};
template <>
struct ForwardShapeOf<256, false> : ForwardShape<256, 128, 64, 8, 3, 1> {};
// Half as many rows per warp: softcap, ALiBi and dropout need the registers.
template <>
struct ForwardShapeOf<64, true> : ForwardShape<64, 128, 64, 8, 4, 1> {};
template <>
struct ForwardShapeOf<128, true> : ForwardShape<128, 128, 64, 8, 3, 1> {};
template <>
struct ForwardShapeOf<256, true> : ForwardShape<256, 128, 32, 8, 3, 1> {};

template <class T>
cudaError_t launch_forward(const Forward<T>& task, int dim, bool general, Stream stream) {
    return dispatch_instance(dim, general, [&](auto constant, auto is_general) {
        using Shape = ForwardShapeOf<decltype(constant)::value, decltype(is_general)::value>;
        static_assert(Shape::kRows == kForwardRows);
        const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(task.order.tiles) * task.order.pairs),
                        static_cast<unsigned>(task.splits));
        return launch(forward_kernel<T, Shape, decltype(is_general)::value>, grid, dim3(Shape::kThreads),
                      Shape::kSharedBytes, stream, task);
    });
}

}  // namespace neox::attention
