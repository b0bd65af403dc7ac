#include "common/divisor.cuh"
#include "common/vec.cuh"
#include "ops/rotary/rotary.h"

namespace neox {
namespace {

constexpr int kThreads = 256;
// heads of a token per thread: one read of the tables serves them, and 128 bytes are in flight
constexpr int kHeads = 4;

template <class T>
struct Task {
    const T* x;
    T* y;
    Heads x_heads, y_heads;
    RotaryTables tables;
    int heads, chunks;    // chunks = ceil(heads / kHeads)
    int rotated, copied;  // packs of half of the rotated channels; packs of the others, if they are copied
    unsigned items;       // one per thread: tokens x chunks x packs
    Divisor by_token, by_packs, by_seq, by_x_group, by_y_group;
};

// Offset of a head of a token, without that of the token.
NEOX_DEVICE int64_t head_offset(const Heads& layout, const Divisor& by_group, int head) {
    const int group = by_group.quotient(head);
    return group * layout.group_stride + (head - group * by_group.divisor) * layout.head_stride;
}

// Rotates one pack of each half of the rotated channels, for up to kHeads heads, task.chunks apart: neighbouring
// threads rotate neighbouring heads. x and y may alias, because each pack is read and written by the same thread.
template <class T, int kPack>
NEOX_DEVICE void turn(const Task<T>& task, const T* x, T* y, int64_t row, int first, int column) {
    const int half = task.rotated * kPack;
    Pack<T, kPack> low[kHeads], high[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int head = first + i * task.chunks;
        if (head >= task.heads) continue;
        const T* const from = x + head_offset(task.x_heads, task.by_x_group, head) + column;
        low[i] = fetch_mutable<kPack>(from);
        high[i] = fetch_mutable<kPack>(from + half);
    }
    float cos_low[kPack], cos_high[kPack], from_high[kPack], from_low[kPack];
    row += column;
    load(task.tables.cos + row, cos_low);
    load(task.tables.cos + row + half, cos_high);
    // Transposed map: each sine multiplies the other half, with the opposite sign.
    load(task.tables.sin + row + (task.tables.transposed ? half : 0), from_high);
    load(task.tables.sin + row + (task.tables.transposed ? 0 : half), from_low);
    const float sign = task.tables.transposed ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int head = first + i * task.chunks;
        if (head >= task.heads) continue;
        float a[kPack], b[kPack];
        unpack(low[i], a);
        unpack(high[i], b);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
            const float x_low = a[k], x_high = b[k];
            a[k] = cos_low[k] * x_low - sign * from_high[k] * x_high;
            b[k] = cos_high[k] * x_high + sign * from_low[k] * x_low;
        }
        T* const to = y + head_offset(task.y_heads, task.by_y_group, head) + column;
        store(to, a);
        store(to + half, b);
    }
}

template <class T, int kPack>
NEOX_DEVICE void copy(const Task<T>& task, const T* x, T* y, int first, int column) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int head = first + i * task.chunks;
        if (head >= task.heads) continue;
        float values[kPack];
        load(x + head_offset(task.x_heads, task.by_x_group, head) + column, values);
        store(y + head_offset(task.y_heads, task.by_y_group, head) + column, values);
    }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) rotate(const __grid_constant__ Task<T> task) {
    const unsigned item = blockIdx.x * kThreads + threadIdx.x;
    if (item >= task.items) return;
    const int index = static_cast<int>(item), token = task.by_token.quotient(index);
    const int of_token = index - token * task.by_token.divisor, first = task.by_packs.quotient(of_token);
    const int pack = of_token - first * task.by_packs.divisor;
    const int64_t batch = task.by_seq.quotient(token), position = token - batch * task.by_seq.divisor;
    const T* const x = task.x + batch * task.x_heads.batch_stride + position * task.x_heads.seq_stride;
    T* const y = task.y + batch * task.y_heads.batch_stride + position * task.y_heads.seq_stride;
    if (pack < task.rotated) {
        const int64_t row = batch * task.tables.batch_stride + position * task.tables.rotary_dim;
        turn<T, kPack>(task, x, y, row, first, pack * kPack);
    } else {
        copy<T, kPack>(task, x, y, first, (task.rotated + pack) * kPack);
    }
}

// Whether every address at which a pack of kPack channels may start is a multiple of its size. Strides of dimensions of
// size 1 do not matter.
template <class T, int kPack>
bool vectorizes(const RotarySize& size, const void* start, const Heads& layout) {
    const auto strides_fit = [](int64_t count, int64_t stride) { return count == 1 || stride % kPack == 0; };
    return can_vectorize<T, kPack>(start, 0, 0) && strides_fit(size.batch, layout.batch_stride) &&
           strides_fit(size.seq, layout.seq_stride) && strides_fit(layout.groups, layout.group_stride) &&
           strides_fit(layout.heads, layout.head_stride);
}

template <class T, int kPack>
bool vectorizes(const RotarySize& size, const Task<T>& task) {
    const RotaryTables& tables = task.tables;
    const bool copies = task.x != task.y;
    return tables.rotary_dim / 2 % kPack == 0 && (!copies || (size.head_dim - tables.rotary_dim) % kPack == 0) &&
           can_vectorize<float, kPack>(tables.cos, 0, 0) && can_vectorize<float, kPack>(tables.sin, 0, 0) &&
           vectorizes<T, kPack>(size, task.x, task.x_heads) && vectorizes<T, kPack>(size, task.y, task.y_heads);
}

template <class T, int kPack>
cudaError_t launch_rotate(const RotarySize& size, Task<T> task, Stream stream) {
    task.rotated = static_cast<int>(task.tables.rotary_dim) / 2 / kPack;
    task.copied = task.x == task.y ? 0 : static_cast<int>(size.head_dim - task.tables.rotary_dim) / kPack;
    const int64_t packs = task.rotated + task.copied, tokens = size.batch * size.seq,
                  items = tokens * task.chunks * packs;
    if (items > INT32_MAX) return cudaErrorInvalidValue;  // 64 GB of misaligned heads, and 270 GB of others
    task.items = static_cast<unsigned>(items);
    task.by_token = Divisor::by(static_cast<int>(task.chunks * packs));
    task.by_packs = Divisor::by(static_cast<int>(packs));
    task.by_seq = Divisor::by(static_cast<int>(size.seq));
    task.by_x_group = Divisor::by(static_cast<int>(task.x_heads.heads));
    task.by_y_group = Divisor::by(static_cast<int>(task.y_heads.heads));
    const int64_t blocks = (items + kThreads - 1) / kThreads;
    return launch(rotate<T, kPack>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, task);
}

}  // namespace

const char* rotary_cuda(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x,
                        const Heads& x_heads, void* y, const Heads& y_heads, Stream stream) {
    const int64_t tokens = size.batch * size.seq, heads = x_heads.groups * x_heads.heads;
    if (tokens == 0 || heads == 0) return nullptr;
    return message(dispatch_device(dtype, [&](auto zero) {
        using T = decltype(zero);
        Task<T> task{};
        task.x = static_cast<const T*>(x), task.y = static_cast<T*>(y);
        task.x_heads = x_heads, task.y_heads = y_heads, task.tables = tables;
        task.heads = static_cast<int>(heads);
        task.chunks = (task.heads + kHeads - 1) / kHeads;
        if constexpr (sizeof(T) == 2) {  // GPT-NeoX-20B rotates halves of 12 channels, Pythia-2.8B of 10
            if (vectorizes<T, 8>(size, task)) return launch_rotate<T, 8>(size, task, stream);
        }
        if (vectorizes<T, 4>(size, task)) return launch_rotate<T, 4>(size, task, stream);
        if (vectorizes<T, 2>(size, task)) return launch_rotate<T, 2>(size, task, stream);
        return launch_rotate<T, 1>(size, task, stream);
    }));
}

}  // namespace neox
