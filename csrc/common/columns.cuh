// Kernels over a matrix [rows, cols]: partition for element-wise kernels, and column sums in two deterministic stages.
#pragma once

#include "common/vec.cuh"

namespace neox {

// Assigns the packs of a [rows, cols] matrix to the threads of a grid: consecutive threads get consecutive packs. One
// division per thread; each step is an addition.
struct PackWalk {
    int64_t row, col;            // of this thread's pack, col in packs
    int64_t row_step, col_step;  // to the thread's next pack
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

// Calls read(row, col) for kDepth packs and then write(row, col, result) for each of them, so that a thread has the
// loads of kDepth packs in flight. Results should be raw packs, not fp32: a conversion would wait for its load.
template <int kDepth, class Read, class Write>
NEOX_DEVICE void for_packs(int64_t rows, int64_t packs_per_row, const Read& read, const Write& write) {
    for (PackWalk at(rows, packs_per_row); at.inside();) {
        decltype(read(at.row, at.col)) item[kDepth];
        int64_t row[kDepth], col[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            row[i] = at.row;
            col[i] = at.col;
            if (at.inside()) item[i] = read(row[i], col[i]);
            at.next();
        }
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (row[i] < rows) write(row[i], col[i], item[i]);
        }
    }
}

// Number of blocks for `each` items per block, at most `waves` per multiprocessor.
inline unsigned blocks_for(int64_t items, int each, int waves) {
    const int64_t needed = (items + each - 1) / each, most = static_cast<int64_t>(multiprocessors()) * waves;
    return static_cast<unsigned>(needed < 1 ? 1 : needed < most ? needed : most);
}

// Column sums. Stage one: a block of kLanes x kRows threads owns kLanes packs of columns and a stripe of rows. Each
// thread sums its pack over every kRows-th row of the stripe; the block adds the kRows partial sums and writes one row
// of `partial` [stripes, cols]. Stage two adds the stripes in order. The order depends on the shape only, so that sums
// are reproducible bit for bit.
struct ColumnSums {
    static constexpr int kLanes = 32, kRows = 8, kThreads = kLanes * kRows;
    static constexpr int kBlocks = 4;  // per multiprocessor, at 64 registers per thread; stripes() makes two full waves
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    static constexpr int kResident = 2;  // code for sm_100 needs more registers; limited to 64 or 80 it spills
#else
    static constexpr int kResident = kBlocks;
#endif

    // Number of stripes: enough blocks to fill the GPU, at least 4 rows per thread. Independent of the dtype, so that
    // the scratch can be sized without knowing the alignment.
    static int64_t stripes(int64_t rows, int64_t cols) {
        const int64_t tiles = (cols + kLanes * 8 - 1) / (kLanes * 8);
        const int64_t wanted = (static_cast<int64_t>(multiprocessors()) * 2 * kBlocks + tiles - 1) / tiles;
        const int64_t most = (rows + kRows * 4 - 1) / (kRows * 4);
        const int64_t count = wanted < most ? wanted : most;
        return count < 1 ? 1 : count > 65535 ? 65535 : count;
    }
};

// This block's rows [begin, end).
struct Stripe {
    int64_t begin, end;
    __device__ __forceinline__ explicit Stripe(int64_t rows) {
        const int64_t size = (rows + gridDim.y - 1) / gridDim.y;
        begin = blockIdx.y * size;
        end = begin + size < rows ? begin + size : rows;
    }
};

// Calls read(row) and then write(row, result) for this thread's rows of the stripe, kDepth rows at a time as in
// for_packs.
template <int kDepth, class Read, class Write>
NEOX_DEVICE void for_stripe_rows(const Stripe& stripe, const Read& read, const Write& write) {
    for (int64_t row = stripe.begin + threadIdx.x / ColumnSums::kLanes; row < stripe.end;
         row += kDepth * ColumnSums::kRows) {
        decltype(read(row)) item[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (row + i * ColumnSums::kRows < stripe.end) item[i] = read(row + i * ColumnSums::kRows);
        }
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (row + i * ColumnSums::kRows < stripe.end) write(row + i * ColumnSums::kRows, item[i]);
        }
    }
}

// Adds the partial sums of a ColumnSums block's threads and writes them to partial[stripe][column, column + kPack). All
// threads must call it.
template <int kPack>
NEOX_DEVICE void write_stripe_sum(const float (&part)[kPack], float* partial, int64_t column, int64_t cols) {
    STATIC_SMEM(float, parts, [ColumnSums::kRows][ColumnSums::kLanes * kPack + 1]);
    const int lane = threadIdx.x % ColumnSums::kLanes, row = threadIdx.x / ColumnSums::kLanes;
#pragma unroll
    for (int k = 0; k < kPack; ++k) parts[row][lane * kPack + k] = part[k];
    __syncthreads();  // all partial sums are written
    for (int i = threadIdx.x; i < ColumnSums::kLanes * kPack; i += ColumnSums::kThreads) {
        const int64_t at = column - static_cast<int64_t>(lane) * kPack + i;  // the block's first column, plus i
        float sum = parts[0][i];
#pragma unroll
        for (int r = 1; r < ColumnSums::kRows; ++r) sum += parts[r][i];
        if (at < cols) partial[blockIdx.y * cols + at] = sum;
    }
    __syncthreads();  // all reads precede the writes of a second call
}

// Stage two for up to four matrices of partial sums in one launch, since a launch costs microseconds; blockIdx.y
// selects the matrix. A block assigns 16 threads to a column, so that its stripes are read in parallel.
template <class T>
struct StripeSums {
    static constexpr int kColumns = 32, kRows = 16;
    const float* partial[4] = {};  // [stripes, cols]
    T* sums[4] = {};               // [cols]
    int count = 0;

    void add(const float* from, T* to) {
        partial[count] = from;
        sums[count++] = to;
    }
};

template <class T>
__global__ void __launch_bounds__(StripeSums<T>::kColumns* StripeSums<T>::kRows)
    add_stripes(const __grid_constant__ StripeSums<T> in, int64_t stripes, int64_t cols) {
    using Shape = StripeSums<T>;
    STATIC_SMEM(float, parts, [Shape::kRows][Shape::kColumns]);
    const int lane = threadIdx.x % Shape::kColumns, first = threadIdx.x / Shape::kColumns;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * Shape::kColumns + lane;
    float sum = 0.0f;
    if (column < cols) {
        const float* const partial = in.partial[blockIdx.y] + column;
#pragma unroll 4
        for (int64_t stripe = first; stripe < stripes; stripe += Shape::kRows) sum += partial[stripe * cols];
    }
    parts[first][lane] = sum;
    __syncthreads();  // all partial sums are written
    if (first != 0 || column >= cols) return;
#pragma unroll
    for (int row = 1; row < Shape::kRows; ++row) sum += parts[row][lane];
    in.sums[blockIdx.y][column] = from_fp32<T>(sum);
}

template <class T>
cudaError_t launch_add_stripes(const StripeSums<T>& in, int64_t stripes, int64_t cols, Stream stream) {
    using Shape = StripeSums<T>;
    const dim3 grid(static_cast<unsigned>((cols + Shape::kColumns - 1) / Shape::kColumns),
                    static_cast<unsigned>(in.count));
    return launch(add_stripes<T>, grid, dim3(Shape::kColumns * Shape::kRows), 0, stream, in, stripes, cols);
}

}  // namespace neox
