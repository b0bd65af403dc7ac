// Shared by the backward kernels: the task, two statistics per row (lse and delta), and the kernels that run before and
// after.
//
//   p = 2^(score - lse)    dv_j = sum_i p dout_i         dp = dout_i . v_j
//   ds = p (dp - delta_i)  dq_i = scale sum_j ds k_j     dk_j = scale sum_i ds q_i
//
// with delta_i = dout_i . out_i, which equals the sum over j of p dp (arXiv:2205.14135, section 3.2).
#pragma once

#include "common/vec.cuh"
#include "ops/attention/cuda/mask.cuh"
#include "ops/attention/cuda/shared_tile.cuh"

namespace neox::attention {

constexpr int kRowPadding = 128;  // rows of a pair in the scratch tensors are padded to a multiple of every tile

template <class T>
struct Backward {
    Params in;
    BlockOrder order;
    Matrix<const T> q, k, v, out, dout;
    Matrix<T> dq, dk, dv;
    const float* lse;  // of the forward
    // [pairs, padded_rows]: {lse in base 2, infinite for padding and for rows that see no key; delta}
    float2* rows;
    int padded_rows;
    // [pairs, padded_rows, kDim], summed over key blocks with atomics; null: a separate kernel computes dq
    float* dq_sums;
};

// Computes rows[...] = {lse, delta} with 8 lanes per row.
template <class T>
__global__ void __launch_bounds__(256) prepare_kernel(const __grid_constant__ Backward<T> task) {
    const Params& in = task.in;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x / 8;
    const int pair = static_cast<int>(index / task.padded_rows), row = static_cast<int>(index % task.padded_rows),
              lane = threadIdx.x % 8;
    float delta = 0.0f;
    if (row < in.rows) {
        const T* const out = task.out.at(pair / in.groups, pair % in.groups) + in.row_offset(row, task.out.strides);
        const T* const dout = task.dout.at(pair / in.groups, pair % in.groups) + in.row_offset(row, task.dout.strides);
        if (task.out.vectorized && task.dout.vectorized) {
            for (int c = lane * 8; c < in.head_dim; c += 64) {
                float a[8], b[8];
                load(out + c, a);
                load(dout + c, b);
#pragma unroll
                for (int k = 0; k < 8; ++k) delta += a[k] * b[k];
            }
        } else {
            for (int c = lane; c < in.head_dim; c += 8) delta += to_fp32(out[c]) * to_fp32(dout[c]);
        }
    }
#pragma unroll
    for (int offset = 4; offset; offset /= 2) delta += __shfl_xor_sync(kFullWarp, delta, offset);
    if (lane) return;
    const float lse = row < in.rows ? task.lse[in.index(pair, row)] : -INFINITY;
    task.rows[index] = make_float2(lse == -INFINITY ? INFINITY : lse * kLog2E, delta);
}

// dq = scale * dq_sums, 8 channels per thread.
template <class T>
__global__ void __launch_bounds__(256) finish_dq_kernel(const __grid_constant__ Backward<T> task, int dim) {
    const Params& in = task.in;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, row_index = index / (dim / 8);
    const int pair = static_cast<int>(row_index / task.padded_rows),
              row = static_cast<int>(row_index % task.padded_rows);
    const int c = static_cast<int>(index % (dim / 8)) * 8;
    if (pair >= task.order.pairs || row >= in.rows || c >= in.head_dim) return;
    const float4* const sums = reinterpret_cast<const float4*>(task.dq_sums + row_index * dim + c);
    const float4 low = sums[0], high = sums[1];
    const float values[8] = {low.x * in.scale,  low.y * in.scale,  low.z * in.scale,  low.w * in.scale,
                             high.x * in.scale, high.y * in.scale, high.z * in.scale, high.w * in.scale};
    T* const dq = task.dq.at(pair / in.groups, pair % in.groups) + in.row_offset(row, task.dq.strides) + c;
    if (task.dq.vectorized) {
        store(dq, values);
    } else {
        for (int k = 0; k < 8 && c + k < in.head_dim; ++k) dq[k] = from_fp32<T>(values[k]);
    }
}

// One element of the general kernels. `product`, query times key, becomes the probability: zero if dropout removes it,
// else not yet divided by 1 - dropout. `dp`, dout times value, becomes ds, not yet scaled.
NEOX_DEVICE void finish_element(const Params& in, float slope, int distance, bool visible, bool keep, float lse,
                                float delta, float& product, float& dp) {
    float score = product * (in.scale * kLog2E), cap_slope = 1.0f;  // cap_slope: derivative of the softcap
    if (in.softcap > 0.0f) {
        const float t = in.capped(product);
        score = in.softcap * kLog2E * t;
        cap_slope = 1.0f - t * t;
    }
    score -= slope * fabsf(static_cast<float>(distance));
    const float power = fast_exp2(score - lse), p = visible ? power : 0.0f;
    dp = p * ((keep ? dp * in.keep_scale : 0.0f) - delta) * cap_slope;
    product = keep ? p : 0.0f;
}

// Launch the instance for a problem; one object file per kernel and element type. The first computes dk, dv and, if
// requested, dq_sums; the second dq.
template <class T>
cudaError_t launch_backward_keys(const Attention& in, const Backward<T>& task, Stream stream);
template <class T>
cudaError_t launch_backward_queries(const Attention& in, const Backward<T>& task, Stream stream);

}  // namespace neox::attention
