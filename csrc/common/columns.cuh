// Work over a matrix [rows, cols]: how to cut it for element-wise kernels, and column sums in two deterministic stages.
#pragma once

#include "common/vec.cuh"

namespace neox {

// Packs of a [rows, cols] matrix, dealt to the threads of a grid one after the other: consecutive threads get consecutive packs.
// One division per thread; every step is an addition.
struct PackWalk {
    int64_t row, col;            // of this thread's pack, in packs
    int64_t row_step, col_step;  // from one of its packs to the next
    int64_t rows, cols;

    __device__ __forceinline__ PackWalk(int64_t rows_in, int64_t packs_per_row) : rows(rows_in), cols(packs_per_row) {
        const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
        const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
        row = first / cols;
        col = first % cols;
        row_step = step / cols;
        col_step = step % cols;
    }
    __device__ __forceinline__ bool inside() const { return row < rows; }
    __device__ __forceinline__ void next() {
        row += row_step;
        col += col_step;
        if (col >= cols) {
            col -= cols;
            ++row;
        }
    }
};

// Blocks of `threads` for `items`, one each, but no more than fill the GPU `waves` times.
inline unsigned blocks_for(int64_t items, int threads, int waves) {
    const int64_t needed = (items + threads - 1) / threads, most = static_cast<int64_t>(multiprocessors()) * waves;
    return static_cast<unsigned>(needed < 1 ? 1 : needed < most ? needed : most);
}

// Column sums. Stage one: a block of kLanes x kRows threads owns kLanes packs of columns and a stripe of rows; each thread adds up its
// pack over every kRows-th row of the stripe, the block adds its kRows parts and writes one row of `partial` [stripes, cols].
// Stage two adds the stripes in order. Both orders depend on the shape alone, so sums repeat bit for bit.
struct ColumnSums {
    static constexpr int kLanes = 32, kRows = 8, kThreads = kLanes * kRows;

    // Stripes of rows: enough blocks to fill the GPU, at least 4 rows for each thread. Independent of dtype, so that the scratch can be
    // sized without knowing whether packs fit.
    static int64_t stripes(int64_t rows, int64_t cols) {
        const int64_t tiles = (cols + kLanes * 8 - 1) / (kLanes * 8);
        const int64_t wanted = (static_cast<int64_t>(multiprocessors()) * 8 + tiles - 1) / tiles;
        const int64_t most = (rows + kRows * 4 - 1) / (kRows * 4);
        const int64_t count = wanted < most ? wanted : most;
        return count < 1 ? 1 : count > 65535 ? 65535 : count;
    }
};

// This block's share of rows, [begin, end).
struct Stripe {
    int64_t begin, end;
    __device__ __forceinline__ explicit Stripe(int64_t rows) {
        const int64_t size = (rows + gridDim.y - 1) / gridDim.y;
        begin = blockIdx.y * size;
        end = begin + size < rows ? begin + size : rows;
    }
};

// Adds the threads' parts of a ColumnSums block and writes them to partial[stripe][column .. column + kPack). All threads call it.
template <int kPack>
NEOX_DEVICE void write_stripe_sum(const float (&part)[kPack], float* partial, int64_t column, int64_t cols) {
    STATIC_SMEM(float, parts, [ColumnSums::kRows][ColumnSums::kLanes * kPack + 1]);
    const int lane = threadIdx.x % ColumnSums::kLanes, row = threadIdx.x / ColumnSums::kLanes;
#pragma unroll
    for (int k = 0; k < kPack; ++k) parts[row][lane * kPack + k] = part[k];
    __syncthreads();  // all parts are written before they are added
    for (int i = threadIdx.x; i < ColumnSums::kLanes * kPack; i += ColumnSums::kThreads) {
        const int64_t at = column - static_cast<int64_t>(lane) * kPack + i;  // the block's first column, plus i
        float sum = parts[0][i];
#pragma unroll
        for (int r = 1; r < ColumnSums::kRows; ++r) sum += parts[r][i];
        if (at < cols) partial[blockIdx.y * cols + at] = sum;
    }
    __syncthreads();  // read before a second call writes
}

template <class T>
__global__ void __launch_bounds__(256) add_stripes(const float* partial, T* sums, int64_t stripes, int64_t cols) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= cols) return;
    float sum = 0.0f;
    for (int64_t stripe = 0; stripe < stripes; ++stripe) sum += partial[stripe * cols + column];
    sums[column] = from_fp32<T>(sum);
}

}  // namespace neox
