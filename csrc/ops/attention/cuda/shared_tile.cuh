// Tiles of 16-bit elements in shared memory: layout, asynchronous copies, and tensor-core products.
//
// A row of kDim elements is kDim / 8 chunks of 16 bytes. ldmatrix reads the same chunk of 8 consecutive rows, which
// must fall into 8 different groups of 4 banks. Chunk c of row r is therefore stored in slot c ^ x(r), so that neither
// ldmatrix nor the 16-byte copies have bank conflicts.
#pragma once

#include "common/ptx.cuh"

namespace neox::attention {

template <int kDim>
struct Swizzle {
    static constexpr int kChunks = kDim / 8;
    static_assert(kChunks % 4 == 0, "a row must be a multiple of 64 bytes, half of all banks");

    // If a row is a multiple of 128 bytes, 8 rows need 8 slots. Otherwise neighbouring rows begin in different halves
    // of the banks, and pairs of rows need 4 slots.
    static constexpr int kMask = kChunks % 8 == 0 ? 7 : 3;

    // Index of the first element of a chunk of a row.
    NEOX_DEVICE int at(int row, int chunk) {
        const int x = kMask == 7 ? row & 7 : row >> 1 & 3;
        return row * kDim + ((chunk ^ x) << 3);
    }
};

// Copies one chunk element by element, for rows that are not aligned to 16 bytes. Channels from head_dim on become
// zeros.
template <class T>
NEOX_DEVICE void copy_elements(T* shared, const T* row, int chunk, int head_dim) {
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(row) + chunk * 8;
    const int count = head_dim - chunk * 8;
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = 2 * i < count ? from[2 * i] : 0, high = 2 * i + 1 < count ? from[2 * i + 1] : 0;
        pairs[i] = low | high << 16;
    }
    *reinterpret_cast<uint4*>(shared) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Writes one chunk of a tile to a row in global memory.
template <class T>
NEOX_DEVICE void store_chunk(const T* shared, T* row, int chunk, int head_dim, bool vectorized) {
    if (vectorized) {
        if (chunk * 8 < head_dim) *reinterpret_cast<uint4*>(row + chunk * 8) = *reinterpret_cast<const uint4*>(shared);
        return;
    }
    for (int i = 0; i < 8 && chunk * 8 + i < head_dim; ++i) row[chunk * 8 + i] = shared[i];
}

// Fills a tile [kRows, kDim] with the rows row_of(0) to row_of(count - 1), followed by zeros. Vectorized rows are
// copied by cp.async. All kThreads threads of the block take part.
template <int kRows, int kDim, int kThreads, class T, class RowOf>
NEOX_DEVICE void load_tile(T* tile, int count, int head_dim, bool vectorized, const RowOf& row_of) {
    constexpr int kChunks = Swizzle<kDim>::kChunks, kCount = kRows * kChunks;
    static_assert(kCount % kThreads == 0);
    if (vectorized) {
#pragma unroll
        for (int i = 0; i < kCount / kThreads; ++i) {
            const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / kChunks, chunk = at % kChunks;
            // a predicated-off copy does not read its address
            cp_async_16(tile + Swizzle<kDim>::at(row, chunk), row_of(row) + chunk * 8,
                        row < count && chunk * 8 < head_dim);
        }
    } else {
#pragma unroll 1
        for (int at = threadIdx.x; at < kCount; at += kThreads) {
            const int row = at / kChunks, chunk = at % kChunks;
            copy_elements(tile + Swizzle<kDim>::at(row, chunk), row_of(row), chunk, row < count ? head_dim : 0);
        }
    }
}

// The same for rows [first, first + count) of a matrix whose rows are `stride` elements apart. A thread copies every
// kSlots-th chunk of every kStep-th row: its addresses in shared memory differ by immediates, and its global addresses
// need one 64-bit product.
template <int kRows, int kDim, int kThreads, class T>
NEOX_DEVICE void load_rows(T* tile, const T* matrix, int64_t stride, int first, int count, int head_dim,
                           bool vectorized) {
    constexpr int kSlots = Swizzle<kDim>::kMask + 1, kStep = kThreads / kSlots;
    static_assert(kRows % kStep == 0 && kStep % 8 == 0 && kThreads % kSlots == 0);
    if (!vectorized) {
        load_tile<kRows, kDim, kThreads>(tile, count, head_dim, false,
                                         [&](int i) { return matrix + (first + i) * stride; });
        return;
    }
    const int row = static_cast<int>(threadIdx.x) / kSlots, chunk = static_cast<int>(threadIdx.x) % kSlots;
    const SharedAddress to = shared_address(tile + Swizzle<kDim>::at(row, chunk));
    const T* const from = matrix + (first + row) * stride + chunk * 8;
#pragma unroll
    for (int j = 0; j < kDim / 8; j += kSlots) {
        const int rows_left = (chunk + j) * 8 < head_dim ? count - row : 0;
#pragma unroll
        for (int i = 0; i < kRows; i += kStep)
            cp_async_16(to + (i * kDim + j * 8) * 2, from + i * stride + j * 8, i < rows_left);
    }
}

// This lane's ldmatrix address of a fragment. The swizzle changes the lowest bits of the chunk only, and it is the same
// for rows 8 apart. The address of any other fragment is therefore this one, XOR a constant, plus an immediate offset:
// one instruction per chunk, none per row.
template <int kDim>
struct FragmentAddress {
    static constexpr int kSwizzled = Swizzle<kDim>::kMask;
    SharedAddress base;

    // The fragment at `row`, a multiple of 8, and `chunk`, even. Order of ldmatrix's matrices: rows 0-7 and 8-15 of the
    // first chunk, then of the second.
    template <class T>
    NEOX_DEVICE FragmentAddress rows_first(const T* tile, int row, int chunk = 0) {
        const int lane = threadIdx.x % kWarpSize;
        return {opaque(shared_address(tile + row * kDim + Swizzle<kDim>::at(lane & 15, chunk + (lane >> 4))))};
    }
    // The same with ldmatrix's matrices in the order: both chunks of rows 0-7, then of rows 8-15.
    template <class T>
    NEOX_DEVICE FragmentAddress chunks_first(const T* tile, int row, int chunk = 0) {
        const int lane = threadIdx.x % kWarpSize;
        return {shared_address(tile + row * kDim +
                               Swizzle<kDim>::at((lane & 7) + (lane >> 4) * 8, chunk + (lane >> 3 & 1)))};
    }
    // The fragment `row` rows (a multiple of 8) and `chunk` chunks further; `chunk` shares no bits with that of the
    // base. Constants after unrolling.
    __device__ __forceinline__ SharedAddress at(int row, int chunk) const {
        return (base ^ static_cast<SharedAddress>((chunk & kSwizzled) * 16)) +
               static_cast<SharedAddress>(row * kDim * 2 + (chunk & ~kSwizzled) * 16);
    }
};

NEOX_DEVICE void copy_fragment(uint32_t (&to)[4], const uint32_t (&from)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from[i];
}

// c0, c1 += a b for the two B fragments in `pair`.
template <class T>
NEOX_DEVICE void mma_pair(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&pair)[4]) {
    const uint32_t low[2] = {pair[0], pair[1]}, high[2] = {pair[2], pair[3]};
    mma_m16n8k16<T>(c0, a, low);
    mma_m16n8k16<T>(c1, a, high);
}

// Fragments are those of mma.m16n8k16: A [16, 16] and B [16, 8]. One ldmatrix loads A, or two neighbouring B.
//
// c [16 kM, kN] += a b^T over kDim channels. b: rows [row, row + kN) of a tile. a: a_of(m, k, fragment) loads rows 16 m
// and channels 16 k.
template <class T, int kDim, int kM, int kN, class AOf>
NEOX_DEVICE void gemm_nt(float (&c)[kM][kN / 8][4], const AOf& a_of, const T* b, int row) {
    // unrolled fully, large heads take three times the code and spill
    [[maybe_unused]] constexpr int kUnroll = kDim <= 128 ? kDim / 16 : 4;
    const auto address = FragmentAddress<kDim>::chunks_first(b, row);
#pragma unroll kUnroll
    for (int k = 0; k < kDim / 16; ++k) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) a_of(m, k, a[m]);
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
            uint32_t pair[4];
            ldmatrix_x4(pair, address.at(n * 16, k * 2));
#pragma unroll
            for (int m = 0; m < kM; ++m) mma_pair<T>(c[m][2 * n], c[m][2 * n + 1], a[m], pair);
        }
    }
}

// c [16 kM, kN] += a b over kK rows of a tile of kDim channels. b: rows_first of the tile. The columns are every
// kEvery-th pair of chunks.
template <class T, int kM, int kK, int kN, int kEvery = 1, int kDim, class AOf>
NEOX_DEVICE void gemm_nn(float (&c)[kM][kN / 8][4], const AOf& a_of, FragmentAddress<kDim> b) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) a_of(m, k, a[m]);
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
            uint32_t pair[4];
            ldmatrix_x4<true>(pair, b.at(k * 16, n * 2 * kEvery));
#pragma unroll
            for (int m = 0; m < kM; ++m) mma_pair<T>(c[m][2 * n], c[m][2 * n + 1], a[m], pair);
        }
    }
}

// Accumulators c [16, kN] as A fragments. The two layouts agree, so that probabilities stay in registers.
template <class T, int kN>
NEOX_DEVICE void accumulators_as_a(const float (&c)[kN / 8][4], uint32_t (&a)[kN / 16][4]) {
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
        a[k][0] = pack_pair<T>(c[2 * k][0], c[2 * k][1]);
        a[k][1] = pack_pair<T>(c[2 * k][2], c[2 * k][3]);
        a[k][2] = pack_pair<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
        a[k][3] = pack_pair<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
    }
}

// Writes accumulators c, scaled by `low` (rows 0-7) and `high` (rows 8-15), to rows [row, row + 16) of a tile. Their
// columns are every kEvery-th pair of chunks, from pair `first_pair` on.
template <int kDim, int kEvery = 1, class T>
NEOX_DEVICE void stage_rows(T* tile, int row, const float (&c)[kDim / kEvery / 8][4], float low, float high,
                            int first_pair = 0) {
    const int lane = threadIdx.x % kWarpSize, first = row + lane / 4, within = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / kEvery / 8; ++n) {
        const int chunk = (n / 2 * kEvery + first_pair) * 2 + n % 2;
        *reinterpret_cast<uint32_t*>(tile + Swizzle<kDim>::at(first, chunk) + within) =
            pack_pair<T>(c[n][0] * low, c[n][1] * low);
        *reinterpret_cast<uint32_t*>(tile + Swizzle<kDim>::at(first + 8, chunk) + within) =
            pack_pair<T>(c[n][2] * high, c[n][3] * high);
    }
}

// Writes rows [row, row + kRows) of a tile, staged by this warp, to row_of(i); rows for which that is null are skipped.
template <int kRows, int kDim, class T, class RowOf>
NEOX_DEVICE void store_staged(const T* tile, int row, int head_dim, bool vectorized, const RowOf& row_of) {
    constexpr int kChunks = Swizzle<kDim>::kChunks;
    __syncwarp();  // all lanes have staged their parts
#pragma unroll 2
    for (int at = threadIdx.x % kWarpSize; at < kRows * kChunks; at += kWarpSize) {
        T* const to = row_of(row + at / kChunks);
        if (to)
            store_chunk(tile + Swizzle<kDim>::at(row + at / kChunks, at % kChunks), to, at % kChunks, head_dim,
                        vectorized);
    }
}

}  // namespace neox::attention
