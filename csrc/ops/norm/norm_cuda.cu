// Forward: memory-bound, so that loads must be in flight at all times. A row is held in registers in its storage type
// (packs of 16 bytes, up to 8 per thread, all requested before the first is used): x is read once, and the three passes
// over it (mean, squares, result) cost no memory traffic.
//
// A row of up to 256 packs (bf16: 2,048 elements) is processed by a warp or a part of one and needs no barrier. 16 such
// warps on a multiprocessor of an H100 request 64 KiB at a time, where bandwidth times latency per multiprocessor is
// about 20 KiB. Longer rows take as many warps as leave 8 packs per thread. Blocks stay small, so that the loads of one
// block overlap the barriers of another. Rows of more than 3,072 packs are processed in a loop. Weights and biases are
// read from L1.
#include "common/reduce.cuh"
#include "common/row_packs.cuh"
#include "ops/norm/norm.h"

namespace neox {
namespace {

constexpr int kMaxThreads = 384;  // of a row held in registers
constexpr int kLoopThreads = 1024;
constexpr int kMaxPacks = 8;  // per thread
constexpr int kBlock = 128;   // threads of a block if a row has at most a warp
constexpr int kResident = 6;  // such blocks per multiprocessor; without a bound nvcc aims at more and spills

// x + residual, rounded to T.
template <class T>
NEOX_DEVICE uint4 add(const uint4& x, const uint4& residual) {
    float sum[Pack<T>::kSize], other[Pack<T>::kSize];
    unpack<T>(x, sum);
    unpack<T>(residual, other);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) sum[k] += other[k];
    return pack<T>(sum);
}

// One pack of x + residual, or of x.
template <class T, bool kVector>
NEOX_DEVICE uint4 load_sum(const NormForward& op, int64_t row, int64_t col, int valid) {
    const uint4 x = load_raw<kVector>(static_cast<const T*>(op.x) + row * op.x_stride + col, valid);
    if (!op.residual) return x;
    return add<T>(x, load_raw<kVector>(static_cast<const T*>(op.residual) + row * op.residual_stride + col, valid));
}

template <class T>
NEOX_DEVICE float sum_of(const uint4& raw) {
    float value[Pack<T>::kSize], sum = 0.0f;
    unpack<T>(raw, value);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) sum += value[k];
    return sum;
}

// Sum of (s - mean)^2. The mean of squares minus the squared mean would cancel if the mean is large.
template <class T>
NEOX_DEVICE float squares_of(const uint4& raw, float mean, int valid) {
    float value[Pack<T>::kSize], sum = 0.0f;
    unpack<T>(raw, value);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
        const float centred = k < valid ? value[k] - mean : 0.0f;
        sum += centred * centred;
    }
    return sum;
}

// Stores the sum and the outputs of one pack.
template <class T, bool kVector>
NEOX_DEVICE void write_outputs(const NormForward& op, int64_t row, int64_t col, int valid, const uint4& s, float mean,
                               float rstd) {
    constexpr int kSize = Pack<T>::kSize;
    if (op.residual) store_raw<kVector>(static_cast<T*>(op.sum) + row * op.cols + col, s, valid);
    float n[kSize];
    unpack<T>(s, n);
#pragma unroll
    for (int k = 0; k < kSize; ++k) n[k] = (n[k] - mean) * rstd;
#pragma unroll
    for (int output = 0; output < 2; ++output) {
        if (output == op.outputs) break;
        const T* const weight = static_cast<const T*>(op.parameters[output].weight);
        const T* const bias = static_cast<const T*>(op.parameters[output].bias);
        float w[kSize], b[kSize] = {}, y[kSize];
        unpack<T>(load_raw<kVector>(weight + col, valid), w);
        if (bias) unpack<T>(load_raw<kVector>(bias + col, valid), b);
#pragma unroll
        for (int k = 0; k < kSize; ++k) y[k] = n[k] * w[k] + b[k];
        store_raw<kVector>(static_cast<T*>(op.y[output]) + row * op.cols + col, pack<T>(y), valid);
    }
}

NEOX_DEVICE void write_statistics(const NormForward& op, int64_t row, float mean, float rstd) {
    if (threadIdx.x != 0) return;
    if (!op.rms) op.mean[row] = mean;
    op.rstd[row] = rstd;
}

// Block (threads of a row, rows).
template <class T, bool kVector, int kPacks>
__global__ void __launch_bounds__(kPacks < kMaxPacks ? kBlock : kMaxThreads, kPacks < kMaxPacks ? kResident : 1)
    forward(NormForward op) {
    constexpr int kSize = Pack<T>::kSize;
    STATIC_SMEM(float, scratch, [2][kMaxThreads / kWarpSize]);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    // rows past the last one are empty, but their threads take part in the warp's reductions
    const int cols = row < op.rows ? static_cast<int>(op.cols) : 0;
    const int step = static_cast<int>(blockDim.x) * kSize, first = static_cast<int>(threadIdx.x) * kSize;
    const auto valid = [&](int p) { return cols - (first + p * step); };
    uint4 s[kPacks];
    const T* const x = static_cast<const T*>(op.x) + row * op.x_stride + first;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) s[p] = load_raw<kVector>(x + p * step, valid(p));
    if (op.residual) {
        const T* const residual = static_cast<const T*>(op.residual) + row * op.residual_stride + first;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) s[p] = add<T>(s[p], load_raw<kVector>(residual + p * step, valid(p)));
    }
    float mean[1] = {}, squares[1] = {};
    if (!op.rms) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            // otherwise its fp32 values, twice the registers, would stay live to the end
            if (kPacks > 1) make_opaque(s[p]);
            mean[0] += sum_of<T>(s[p]);
        }
        row_sums(mean, scratch[0]);
        mean[0] /= static_cast<float>(op.cols);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
        if (kPacks > 1) make_opaque(s[p]);
        squares[0] += squares_of<T>(s[p], mean[0], valid(p));
    }
    row_sums(squares, scratch[1]);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(op.cols) + op.eps);
    if (cols == 0) return;
    write_statistics(op, row, mean[0], rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
        if (kPacks > 1) make_opaque(s[p]);
        if (valid(p) > 0) write_outputs<T, kVector>(op, row, first + p * step, valid(p), s[p], mean[0], rstd);
    }
}

// One block per row of any length. After the first pass its packs are read from L2.
template <class T, bool kVector>
__global__ void __launch_bounds__(kLoopThreads) forward_looped(NormForward op) {
    constexpr int kSize = Pack<T>::kSize;
    STATIC_SMEM(float, scratch, [2][kLoopThreads / kWarpSize]);
    const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * kSize,
                  first = static_cast<int64_t>(threadIdx.x) * kSize;
    float mean[1] = {}, squares[1] = {};
    if (!op.rms) {
#pragma unroll 4
        for (int64_t col = first; col < op.cols; col += step)
            mean[0] += sum_of<T>(load_sum<T, kVector>(op, row, col, valid_of<T>(op.cols - col)));
        row_sums(mean, scratch[0]);
        mean[0] /= static_cast<float>(op.cols);
    }
#pragma unroll 4
    for (int64_t col = first; col < op.cols; col += step) {
        squares[0] += squares_of<T>(load_sum<T, kVector>(op, row, col, valid_of<T>(op.cols - col)), mean[0],
                                    valid_of<T>(op.cols - col));
    }
    row_sums(squares, scratch[1]);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(op.cols) + op.eps);
    write_statistics(op, row, mean[0], rstd);
    for (int64_t col = first; col < op.cols; col += step) {
        const uint4 s = load_sum<T, kVector>(op, row, col, valid_of<T>(op.cols - col));
        write_outputs<T, kVector>(op, row, col, valid_of<T>(op.cols - col), s, mean[0], rstd);
    }
}

template <class T, bool kVector>
cudaError_t launch_forward(const NormForward& op, Stream stream) {
    const int64_t packs = (op.cols + Pack<T>::kSize - 1) / Pack<T>::kSize;
    const int64_t threads = row_threads(packs, kMaxPacks);
    if (threads > kMaxThreads)
        return launch(forward_looped<T, kVector>, dim3(static_cast<unsigned>(op.rows)), dim3(kLoopThreads), 0, stream,
                      op);
    const int64_t rows = threads > kWarpSize ? 1 : kBlock / threads;
    const dim3 grid(static_cast<unsigned>((op.rows + rows - 1) / rows)),
        block(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
    const int64_t each = (packs + threads - 1) / threads;
    const auto kernel = each <= 1   ? forward<T, kVector, 1>
                        : each <= 2 ? forward<T, kVector, 2>
                        : each <= 4 ? forward<T, kVector, 4>
                                    : forward<T, kVector, kMaxPacks>;
    return launch(kernel, grid, block, 0, stream, op);
}

template <class T>
bool packs_fit_all(const NormForward& op) {
    bool vectorized = can_vectorize<T>(op.x, op.x_stride, op.cols) &&
                      can_vectorize<T>(op.residual, op.residual ? op.residual_stride : 0, op.cols);
    for (const void* pointer :
         {op.parameters[0].weight, op.parameters[0].bias, op.parameters[1].weight, op.parameters[1].bias}) {
        vectorized = vectorized && can_vectorize<T>(pointer, 0, 0);
    }
    for (const void* pointer : {op.y[0], op.y[1], op.sum}) vectorized = vectorized && can_vectorize<T>(pointer, 0, 0);
    return vectorized;
}

}  // namespace

const char* norm_forward_cuda(const NormForward& op, Stream stream) {
    if (op.rows == 0) return nullptr;
    return message(dispatch_device(op.dtype, [&](auto zero) {
        using T = decltype(zero);
        return packs_fit_all<T>(op) ? launch_forward<T, true>(op, stream) : launch_forward<T, false>(op, stream);
    }));
}

}  // namespace neox
