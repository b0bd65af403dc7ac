// Backward: s and dy are read once and ds is written once, by one persistent kernel with one block per multiprocessor.
//
// A thread processes the same packs of columns in all its rows, so that the sums over rows (dweight, dbias) are private
// to it. They live in shared memory, in slots that no other thread accesses until the end: no barrier, one instruction
// per element, and the registers are left for loads. A block of 1,024 threads processes several rows at a time (4 of
// 2,048 bf16 elements). Each row has a separate barrier, and the packs of the next row are requested before it, so that
// loads are in flight during reductions and stores: 32 KiB per multiprocessor at 1,024 threads, where bandwidth times
// latency is about 20 KiB. At the end the block adds the slots of its rows and writes one line of `partial`. With one
// block per multiprocessor these are a few hundred lines, 1 to 2 % of the traffic at 16,384 rows. add_stripes sums the
// lines. The order of every sum depends on the shape and the number of multiprocessors only.
//
// Rows whose slots do not fit into shared memory (bf16: more than 16,384 columns, 12,288 with two outputs) take two
// kernels, one for ds and one for the column sums, which read s and dy twice more, mostly from L2.
#include "common/columns.cuh"
#include "common/reduce.cuh"
#include "common/row_packs.cuh"
#include "ops/norm/norm.h"

namespace neox {
namespace {

constexpr int kMaxThreads = 1024, kMaxPacks = 8;

// Threads of a block, by packs of s and dy per thread: as many as the 65,536 registers of a multiprocessor allow
// without spills on any target. Registers are allocated to 4 warps at a time, one per quarter of a multiprocessor, so
// only multiples of 128 threads matter.
constexpr int threads_at_most(int packs, int outputs) {
    const int held = packs * (outputs + 1);
    return held <= 2 ? 1024 : held <= 6 ? 512 : held <= 12 ? 384 : 256;
}

// Matrices of `partial`: dweight of each output, and dbias of each if any output has a bias.
inline __host__ __device__ bool has_bias(const NormBackward& op) { return op.dbias[0] || op.dbias[1]; }
inline __host__ __device__ int planes(const NormBackward& op) { return op.outputs * (has_bias(op) ? 2 : 1); }

struct RowStatistics {
    float mean, rstd;
};

NEOX_DEVICE RowStatistics statistics_of(const NormBackward& op, unsigned row) {
    return {op.rms ? 0.0f : __ldg(op.mean + row), __ldg(op.rstd + row)};
}

// One thread's packs of one row. Past the last row they are zeros, which do not change any sum.
template <class T, bool kVector, int kPacks, int kOutputs>
struct RowPacks {
    uint4 s[kPacks], dy[kOutputs][kPacks];
    RowStatistics statistics;

    __device__ __forceinline__ void load(const NormBackward& op, unsigned row) {
        constexpr int kSize = Pack<T>::kSize;
        const bool inside = row < static_cast<unsigned>(op.rows);
        const int cols = inside ? static_cast<int>(op.cols) : 0;
        statistics = inside ? statistics_of(op, row) : RowStatistics{};
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            const int col = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kSize;
            s[p] = load_raw<kVector>(static_cast<const T*>(op.s) + row * op.s_stride + col, cols - col);
#pragma unroll
            for (int k = 0; k < kOutputs; ++k)
                dy[k][p] = load_raw<kVector>(static_cast<const T*>(op.dy[k]) + row * op.dy_stride[k] + col, cols - col);
        }
    }
};

NEOX_DEVICE void add_to(SharedAddress slot, const float* value) {
    float4 sum = load_shared(slot);
    sum.x += value[0], sum.y += value[1], sum.z += value[2], sum.w += value[3];
    store_shared(slot, sum);
}

// Computes n and g of one pack.
template <class T, int kOutputs>
struct Terms {
    static constexpr int kSize = Pack<T>::kSize;
    float n[kSize], g[kSize], dy[kOutputs][kSize];

    __device__ __forceinline__ Terms(const uint4& s, const uint4 (&raw_dy)[kOutputs], const uint4 (&weight)[kOutputs],
                                     RowStatistics row)
        : g() {
        unpack<T>(s, n);
#pragma unroll
        for (int k = 0; k < kSize; ++k) n[k] = (n[k] - row.mean) * row.rstd;
#pragma unroll
        for (int output = 0; output < kOutputs; ++output) {
            float w[kSize];
            unpack<T>(weight[output], w);
            unpack<T>(raw_dy[output], dy[output]);
#pragma unroll
            for (int k = 0; k < kSize; ++k) g[k] += dy[output][k] * w[k];
        }
    }
    // Adds to the sums of g and of g n. Elements past the end of the row have g = 0.
    __device__ __forceinline__ void add_to_sums(float (&sums)[2]) const {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
            sums[0] += g[k];
            sums[1] += g[k] * n[k];
        }
    }
    __device__ __forceinline__ uint4 gradient(const uint4& dsum, float mean_g, float mean_gn, float rstd) const {
        float d[kSize];
        unpack<T>(dsum, d);
#pragma unroll
        for (int k = 0; k < kSize; ++k) d[k] += (g[k] - mean_g - n[k] * mean_gn) * rstd;
        return pack<T>(d);
    }
};

// Adds the slots of the block's rows and writes the block's line of each matrix of partial.
template <class T, int kPacks>
NEOX_DEVICE void write_partial(const NormBackward& op, const float4* slots) {
    constexpr int kSize = Pack<T>::kSize, kQuads = kSize / 4;
    // slots of one row
    const int threads = static_cast<int>(blockDim.x), count = planes(op) * kPacks * kQuads * threads;
    const int step = threads * static_cast<int>(blockDim.y);
    for (int i = static_cast<int>(threadIdx.y) * threads + static_cast<int>(threadIdx.x); i < count; i += step) {
        float4 sum = slots[i];
        for (int row = 1; row < static_cast<int>(blockDim.y); ++row) {
            const float4 other = slots[row * count + i];
            sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
        }
        const int quad = i / threads % kQuads, p = i / (threads * kQuads) % kPacks,
                  plane = i / (threads * kQuads * kPacks);
        const int64_t col = static_cast<int64_t>(p * threads + i % threads) * kSize + quad * 4;
        float* const line =
            op.partial + (static_cast<int64_t>(plane) * gridDim.x + reload_block_index()) * op.cols + col;
        const float value[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (col + k < op.cols) line[k] = value[k];
        }
    }
}

// Block (threads of a row, rows). Slots: [rows][planes][kPacks][quads of a pack][threads] float4.
template <class T, bool kVector, int kPacks, int kOutputs>
__global__ void __launch_bounds__(threads_at_most(kPacks, kOutputs), 1) backward(NormBackward op) {
    constexpr int kSize = Pack<T>::kSize, kQuads = kSize / 4;
    // What the registers can hold: the next row, the weights (else read again from L1), and the values for the second
    // pass over a pack. fp16 needs more registers for conversions: with resident weights, one pack in 1,024 threads
    // spilled 8 bytes on sm_100.
    constexpr bool kTight = std::is_same_v<T, __half> && kPacks * kOutputs == 1;
    constexpr bool kAhead = kVector && kPacks * (kOutputs + 1) <= 8,
                   kResident = kVector && !kTight && kPacks * kOutputs <= 2, kKeep = kPacks == 1;
    STATIC_SMEM(float, scratch, [2][2 * kMaxThreads / kWarpSize]);
    DYNAMIC_SMEM(memory);
    const bool bias = has_bias(op);
    const int threads = static_cast<int>(blockDim.x), plane = kPacks * kQuads * threads;
    const SharedAddress slots =
        opaque(shared_address(reinterpret_cast<float4*>(memory) + static_cast<int>(threadIdx.y) * planes(op) * plane +
                              static_cast<int>(threadIdx.x)));
    const auto slot = [&](int i) { return slots + static_cast<SharedAddress>(i * threads * sizeof(float4)); };
    for (int i = 0; i < planes(op) * kPacks * kQuads; ++i) store_shared(slot(i), float4{});
    const auto column = [&](int p) { return (p * threads + static_cast<int>(threadIdx.x)) * kSize; };
    uint4 resident[kPacks][kOutputs];
    const auto load_weights = [&](int p, uint4(&weight)[kOutputs]) {
#pragma unroll
        for (int k = 0; k < kOutputs; ++k) {
            const T* pointer = static_cast<const T*>(op.weight[k]);
            if (!kResident) make_opaque(pointer);
            weight[k] = load_raw<kVector>(pointer + column(p), static_cast<int>(op.cols) - column(p));
        }
    };
#pragma unroll
    for (int p = 0; kResident && p < kPacks; ++p) load_weights(p, resident[p]);
    const unsigned step = gridDim.x * blockDim.y, rows = static_cast<unsigned>(op.rows);
    const float inverse = 1.0f / static_cast<float>(op.cols);
    RowPacks<T, kVector, kPacks, kOutputs> here, next;
    here.load(op, blockIdx.x * blockDim.y + threadIdx.y);
    const auto terms = [&](int p) {
        uint4 dy[kOutputs], weight[kOutputs];
        if (!kResident) load_weights(p, weight);
#pragma unroll
        for (int k = 0; k < kOutputs; ++k) dy[k] = here.dy[k][p];
        return Terms<T, kOutputs>(here.s[p], dy, kResident ? resident[p] : weight, here.statistics);
    };
    // All threads iterate equally often, even those without a row, because a warp may hold several rows.
    int parity = 0;
    for (unsigned base = blockIdx.x * blockDim.y; base < rows; base += step, parity ^= 1) {
        const unsigned row = base + threadIdx.y;
        const int cols = row < rows ? static_cast<int>(op.cols) : 0;
        const auto load_dsum = [&](int p) {
            return load_raw<kVector>(static_cast<const T*>(op.dsum) + row * op.dsum_stride + column(p),
                                     op.dsum ? cols - column(p) : 0);
        };
        uint4 dsum = make_uint4(0, 0, 0, 0);
        if (kKeep) dsum = load_dsum(0);
        if (kAhead) next.load(op, row + step);
        float sums[2] = {};
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            const auto pack = terms(p);
            pack.add_to_sums(sums);
#pragma unroll
            for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
                for (int quad = 0; quad < kQuads; ++quad) {
                    float dweight[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) dweight[j] = pack.dy[k][quad * 4 + j] * pack.n[quad * 4 + j];
                    const int at = ((bias ? 2 * k : k) * kPacks + p) * kQuads + quad;
                    add_to(slot(at), dweight);
                    if (bias) add_to(slot(at + kPacks * kQuads), pack.dy[k] + quad * 4);
                }
            }
        }
        row_sums(sums, scratch[parity]);
        const float mean_g = op.rms ? 0.0f : sums[0] * inverse, mean_gn = sums[1] * inverse;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            if (!kKeep) {
                make_opaque(here.s[p]);
                for (auto& dy : here.dy) make_opaque(dy[p]);
                dsum = load_dsum(p);
            }
            const uint4 ds = terms(p).gradient(dsum, mean_g, mean_gn, here.statistics.rstd);
            store_raw<kVector>(static_cast<T*>(op.ds) + row * op.cols + column(p), ds, cols - column(p));
        }
        if (kAhead) {
            here = next;
        } else if (base + step < rows) {
            here.load(op, row + step);
        }
    }
    __syncthreads();  // the slots of all rows are complete
    write_partial<T, kPacks>(op, reinterpret_cast<const float4*>(memory));
}

// Loads one pack of a row's terms.
template <class T, bool kVector, int kOutputs>
NEOX_DEVICE Terms<T, kOutputs> load_terms(const NormBackward& op, int64_t row, int64_t col, RowStatistics statistics) {
    uint4 dy[kOutputs], weight[kOutputs];
    const int valid = valid_of<T>(op.cols - col);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
        dy[k] = load_raw<kVector>(static_cast<const T*>(op.dy[k]) + row * op.dy_stride[k] + col, valid);
        weight[k] = load_raw<kVector>(static_cast<const T*>(op.weight[k]) + col, valid);
    }
    return Terms<T, kOutputs>(load_raw<kVector>(static_cast<const T*>(op.s) + row * op.s_stride + col, valid), dy,
                              weight, statistics);
}

// Computes ds of one row of any length.
template <class T, bool kVector, int kOutputs>
__global__ void __launch_bounds__(kMaxThreads) backward_looped(NormBackward op) {
    STATIC_SMEM(float, scratch, [2 * kMaxThreads / kWarpSize]);
    const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * Pack<T>::kSize,
                  first = static_cast<int64_t>(threadIdx.x) * Pack<T>::kSize;
    const RowStatistics statistics = statistics_of(op, blockIdx.x);
    float sums[2] = {};
    for (int64_t col = first; col < op.cols; col += step)
        load_terms<T, kVector, kOutputs>(op, row, col, statistics).add_to_sums(sums);
    row_sums(sums, scratch);
    const float mean_g = op.rms ? 0.0f : sums[0] / static_cast<float>(op.cols),
                mean_gn = sums[1] / static_cast<float>(op.cols);
    for (int64_t col = first; col < op.cols; col += step) {
        const int valid = valid_of<T>(op.cols - col);
        const uint4 dsum = op.dsum
                               ? load_raw<kVector>(static_cast<const T*>(op.dsum) + row * op.dsum_stride + col, valid)
                               : make_uint4(0, 0, 0, 0);
        const auto terms = load_terms<T, kVector, kOutputs>(op, row, col, statistics);
        store_raw<kVector>(static_cast<T*>(op.ds) + row * op.cols + col,
                           terms.gradient(dsum, mean_g, mean_gn, statistics.rstd), valid);
    }
}

// Computes the column sums of a ColumnSums block.
template <class T, bool kVector, int kOutputs>
__global__ void __launch_bounds__(ColumnSums::kThreads, 2) parameter_gradients(NormBackward op) {
    constexpr int kSize = Pack<T>::kSize;
    const int lane = threadIdx.x % ColumnSums::kLanes, first = threadIdx.x / ColumnSums::kLanes;
    const int64_t column = (static_cast<int64_t>(blockIdx.x) * ColumnSums::kLanes + lane) * kSize;
    float dweight[kOutputs][kSize] = {}, dbias[kOutputs][kSize] = {};
    const Stripe stripe(op.rows);
    for (int64_t row = stripe.begin + first; row < stripe.end; row += ColumnSums::kRows) {
        const auto terms =
            load_terms<T, kVector, kOutputs>(op, row, column, statistics_of(op, static_cast<unsigned>(row)));
#pragma unroll
        for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
                dweight[k][j] += terms.dy[k][j] * terms.n[j];
                dbias[k][j] += terms.dy[k][j];
            }
        }
    }
    const int64_t plane = static_cast<int64_t>(gridDim.y) * op.cols;
    const bool bias = has_bias(op);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
        write_stripe_sum(dweight[k], op.partial + (bias ? 2 * k : k) * plane, column, op.cols);
        if (bias) write_stripe_sum(dbias[k], op.partial + (2 * k + 1) * plane, column, op.cols);
    }
}

struct Plan {
    int threads, rows, packs;  // threads per row, rows per block, packs per thread; packs 0: looped
    int64_t lines;             // rows of partial
    size_t shared;
};

Plan plan(const NormBackward& op, int pack_size) {
    const int64_t packs = (op.cols + pack_size - 1) / pack_size;
    for (const int each : {1, 2, 4, 8}) {
        if (each * op.outputs > kMaxPacks) break;
        const int64_t threads = row_threads(packs, each), most = threads_at_most(each, op.outputs);
        if (threads > most) continue;
        int64_t rows = most / threads;
        if (threads > kWarpSize) {
            const int64_t wanted = (op.rows + multiprocessors() - 1) / multiprocessors();
            rows = std::min({rows, kNamedBarriers, std::max<int64_t>(wanted, 1)});
        }
        const size_t shared = static_cast<size_t>(rows * planes(op) * each * threads * pack_size) * sizeof(float);
        if (shared > shared_memory_limit() - 1024) break;  // leaves room for the static scratch
        return {static_cast<int>(threads), static_cast<int>(rows), each,
                std::min<int64_t>(multiprocessors(), (op.rows + rows - 1) / rows), shared};
    }
    return {0, 0, 0, ColumnSums::stripes(op.rows, op.cols), 0};
}

template <class T, bool kVector, int kOutputs>
cudaError_t launch_rows(const NormBackward& op, const Plan& plan, Stream stream) {
    if (plan.packs == 0) {
        const cudaError_t error = launch(backward_looped<T, kVector, kOutputs>, dim3(static_cast<unsigned>(op.rows)),
                                         dim3(kMaxThreads), 0, stream, op);
        if (error != cudaSuccess) return error;
        const int64_t tile = ColumnSums::kLanes * Pack<T>::kSize;
        const dim3 grid(static_cast<unsigned>((op.cols + tile - 1) / tile), static_cast<unsigned>(plan.lines));
        return launch(parameter_gradients<T, kVector, kOutputs>, grid, dim3(ColumnSums::kThreads), 0, stream, op);
    }
    auto kernel = backward<T, kVector, 1, kOutputs>;
    if (plan.packs == 4) kernel = backward<T, kVector, 4, kOutputs>;
    if constexpr (kOutputs == 1) {  // with one output, one pack allows more threads than two packs
        if (plan.packs == kMaxPacks) kernel = backward<T, kVector, kMaxPacks, 1>;
    } else {
        if (plan.packs == 2) kernel = backward<T, kVector, 2, 2>;
    }
    const dim3 block(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
    return launch(kernel, dim3(static_cast<unsigned>(plan.lines)), block, plan.shared, stream, op);
}

template <class T>
cudaError_t launch_backward(const NormBackward& op, Stream stream) {
    bool vector =
        can_vectorize<T>(op.s, op.s_stride, op.cols) && can_vectorize<T>(op.dsum, op.dsum ? op.dsum_stride : 0, 0);
    for (int k = 0; k < op.outputs; ++k)
        vector = vector && can_vectorize<T>(op.dy[k], op.dy_stride[k], 0) && can_vectorize<T>(op.weight[k], 0, 0);
    vector = vector && can_vectorize<T>(op.ds, 0, 0);
    const Plan chosen = plan(op, Pack<T>::kSize);
    if (op.rows > INT32_MAX) return cudaErrorInvalidValue;
    if (op.rows > 0) {
        const auto run = op.outputs > 1 ? (vector ? launch_rows<T, true, 2> : launch_rows<T, false, 2>)
                                        : (vector ? launch_rows<T, true, 1> : launch_rows<T, false, 1>);
        const cudaError_t error = run(op, chosen, stream);
        if (error != cudaSuccess) return error;
    }
    StripeSums<T> sums;
    const int64_t plane = chosen.lines * op.cols;
    const int spacing = has_bias(op) ? 2 : 1;
    for (int k = 0; k < op.outputs; ++k) {
        sums.add(op.partial + spacing * k * plane, static_cast<T*>(op.dweight[k]));
        if (op.dbias[k]) sums.add(op.partial + (spacing * k + 1) * plane, static_cast<T*>(op.dbias[k]));
    }
    return launch_add_stripes(sums, chosen.lines, op.cols, stream);
}

}  // namespace

int64_t norm_partials_cuda(const NormBackward& op) {
    return plan(op, op.dtype == DType::kFloat32 ? Pack<float>::kSize : Pack<__half>::kSize).lines;
}

const char* norm_backward_cuda(const NormBackward& op, Stream stream) {
    return message(dispatch_device(op.dtype, [&](auto zero) { return launch_backward<decltype(zero)>(op, stream); }));
}

}  // namespace neox
