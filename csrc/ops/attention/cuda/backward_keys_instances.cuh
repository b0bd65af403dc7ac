// Tile shapes of the dk and dv kernel per head_dim. docs/attention.md derives them.
#pragma once

#include "ops/attention/cuda/backward_keys.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox::attention {

// {kDim, keys, rows, rows in registers, computes dq, 16-key units per warp, warps that share them}
template <int kDim, bool kGeneral>
struct KeysShapeOf;
template <>
struct KeysShapeOf<64, false> : KeysShape<64, 128, 64, 32, true, 2, 2> {};
template <>
struct KeysShapeOf<96, false> : KeysShape<96, 128, 64, 32, true, 2, 2> {};
template <>
struct KeysShapeOf<128, false> : KeysShape<128, 128, 64, 32, true, 2, 2> {};
template <>
struct KeysShapeOf<256, false> : KeysShape<256, 64, 32, 32, false> {};
template <>
struct KeysShapeOf<64, true> : KeysShape<64, 128, 64, 32, false> {};
template <>
struct KeysShapeOf<128, true> : KeysShape<128, 128, 64, 16, false> {};
template <>
struct KeysShapeOf<256, true> : KeysShape<256, 64, 32, 16, false> {};

template <class T>
cudaError_t launch_backward_keys(const Attention& in, const Backward<T>& task, Stream stream) {
    return dispatch_instance(instance_dim(in), is_general(in), [&](auto dim, auto general) {
        constexpr int kDim = decltype(dim)::value;
        constexpr bool kGeneral = decltype(general)::value;
        using Shape = KeysShapeOf<kDim, kGeneral>;
        Backward<T> keys_task = task;
        keys_task.order = block_order(in, ceil_divide(in.keys, Shape::kKeys), false);
        const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(keys_task.order.tiles) * keys_task.order.pairs)),
            block(Shape::kThreads);
        if (grid.x == 0) return cudaSuccess;
        if constexpr (kDim <= 128) {
            return launch(backward_keys_kernel<T, Shape, kGeneral, true, true>, grid, block, Shape::kSharedBytes,
                          stream, keys_task);
        } else {  // the sums of both gradients do not fit in registers
            const cudaError_t error = launch(backward_keys_kernel<T, Shape, kGeneral, false, true>, grid, block,
                                             Shape::kSharedBytes, stream, keys_task);
            if (error != cudaSuccess) return error;
            return launch(backward_keys_kernel<T, Shape, kGeneral, true, false>, grid, block, Shape::kSharedBytes,
                          stream, keys_task);
        }
    });
}

}  // namespace neox::attention
