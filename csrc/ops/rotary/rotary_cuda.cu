#include "common/columns.cuh"
#include "ops/rotary/rotary.h"

namespace neox {
namespace {

constexpr int kThreads = 256;
constexpr int kWaves = 64;  // most blocks per multiprocessor; with this many, a partial last wave costs little
// heads of a token per thread: one read of the tables serves them, and 128 bytes are in flight
constexpr int kHeads = 4;

template <class T>
struct Task {
    const T* x;
    T* y;
    Heads x_heads, y_heads;
    RotaryTables tables;
    int64_t tokens, seq;
    int64_t rotated, copied;  // packs of half of the rotated channels; packs of the others, if they are copied
    int64_t heads, chunks;    // chunks = ceil(heads / kHeads)
};

// Offset of a head of a token.
NEOX_DEVICE int64_t offset(const Heads& layout, int64_t batch, int64_t position, int64_t head) {
    const int64_t group = layout.groups == 1 ? 0 : head / layout.heads;
    return batch * layout.batch_stride + position * layout.seq_stride + group * layout.group_stride +
           (head - group * layout.heads) * layout.head_stride;
}

// Rotates one pack of each half of the rotated channels, for up to kHeads heads, kStep apart: neighbouring threads
// rotate neighbouring heads. x and y may alias, because each pack is read and written by the same thread.
template <class T, int kPack>
NEOX_DEVICE void turn(const Task<T>& task, int64_t batch, int64_t position, int64_t first, int64_t pack) {
    const int64_t half = task.rotated * kPack, column = pack * kPack;
    const int64_t row = batch * task.tables.batch_stride + position * task.tables.rotary_dim + column;
    Pack<T, kPack> low[kHeads], high[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int64_t head = first + i * task.chunks;
        if (head >= task.heads) continue;
        const T* const x = task.x + offset(task.x_heads, batch, position, head) + column;
        low[i] = fetch_mutable<kPack>(x);
        high[i] = fetch_mutable<kPack>(x + half);
    }
    float cos_low[kPack], cos_high[kPack], from_high[kPack], from_low[kPack];
    load(task.tables.cos + row, cos_low);
    load(task.tables.cos + row + half, cos_high);
    // Transposed map: each sine multiplies the other half, with the opposite sign.
    load(task.tables.sin + row + (task.tables.transposed ? half : 0), from_high);
    load(task.tables.sin + row + (task.tables.transposed ? 0 : half), from_low);
    const float sign = task.tables.transposed ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int64_t head = first + i * task.chunks;
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
        T* const y = task.y + offset(task.y_heads, batch, position, head) + column;
        store(y, a);
        store(y + half, b);
    }
}

template <class T, int kPack>
NEOX_DEVICE void copy(const Task<T>& task, int64_t batch, int64_t position, int64_t first, int64_t pack) {
    const int64_t column = (2 * task.rotated + pack) * kPack;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int64_t head = first + i * task.chunks;
        if (head >= task.heads) continue;
        float values[kPack];
        load(task.x + offset(task.x_heads, batch, position, head) + column, values);
        store(task.y + offset(task.y_heads, batch, position, head) + column, values);
    }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) rotate(Task<T> task) {
    const int64_t columns = task.rotated + task.copied;
    for (PackWalk at(task.tokens, columns * task.chunks); at.inside(); at.next()) {
        const int64_t batch = at.row / task.seq, position = at.row % task.seq;
        const int64_t first = at.col / columns, column = at.col % columns;
        if (column < task.rotated) {
            turn<T, kPack>(task, batch, position, first, column);
        } else {
            copy<T, kPack>(task, batch, position, first, column - task.rotated);
        }
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
    task.rotated = task.tables.rotary_dim / 2 / kPack;
    task.copied = task.x == task.y ? 0 : (size.head_dim - task.tables.rotary_dim) / kPack;
    const unsigned blocks = blocks_for(task.tokens * task.chunks * (task.rotated + task.copied), kThreads, kWaves);
    return launch(rotate<T, kPack>, dim3(blocks), dim3(kThreads), 0, stream, task);
}

}  // namespace

const char* rotary_cuda(DType dtype, const RotarySize& size, const RotaryTables& tables, const void* x,
                        const Heads& x_heads, void* y, const Heads& y_heads, Stream stream) {
    const int64_t tokens = size.batch * size.seq, heads = x_heads.groups * x_heads.heads;
    if (tokens == 0 || heads == 0) return nullptr;
    return message(dispatch_device(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Task<T> task{
            static_cast<const T*>(x),     static_cast<T*>(y), x_heads, y_heads, tables, tokens, size.seq, 0, 0, heads,
            (heads + kHeads - 1) / kHeads};
        if constexpr (sizeof(T) == 2) {  // GPT-NeoX-20B rotates halves of 12 channels, Pythia-2.8B of 10
            if (vectorizes<T, 8>(size, task)) return launch_rotate<T, 8>(size, task, stream);
        }
        if (vectorizes<T, 4>(size, task)) return launch_rotate<T, 4>(size, task, stream);
        if (vectorizes<T, 2>(size, task)) return launch_rotate<T, 2>(size, task, stream);
        return launch_rotate<T, 1>(size, task, stream);
    }));
}

}  // namespace neox
