// Tiles of 16-bit elements in shared memory: how they are laid out, filled in the background, and multiplied on tensor cores.
//
// A row of kDim elements is kDim / 8 chunks of 16 bytes. ldmatrix reads the same chunk of 8 consecutive rows, which must fall into 8 different
// groups of 4 banks: chunk c of row r is stored at place c ^ x(r), so that all ldmatrix below, and the 16-byte copies, are free of conflicts.
#pragma once

#include "common/ptx.cuh"

namespace neox::attention {

template <int kDim>
struct Swizzle {
    static constexpr int kChunks = kDim / 8;
    static_assert(kChunks % 4 == 0, "a row must be whole halves of the 128 bytes of all banks");

    // Element at which a chunk of a row begins. Where a row is whole multiples of 128 bytes, 8 rows need 8 places; else neighbouring rows
    // begin in different halves of the banks and pairs of rows need 4.
    NEOX_DEVICE int at(int row, int chunk) {
        const int x = kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
        return row * kDim + ((chunk ^ x) << 3);
    }
};

// One chunk, element by element: for rows that 16-byte copies cannot read. Channels from head_dim on become zeros.
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

// The reverse, for rows in a tile that this thread may read.
template <class T>
NEOX_DEVICE void store_chunk(const T* shared, T* row, int chunk, int head_dim, bool vectorized) {
    if (vectorized) {
        if (chunk * 8 < head_dim) *reinterpret_cast<uint4*>(row + chunk * 8) = *reinterpret_cast<const uint4*>(shared);
        return;
    }
    for (int i = 0; i < 8 && chunk * 8 + i < head_dim; ++i) row[chunk * 8 + i] = shared[i];
}

// Fills a tile [kRows, kDim] with the first `count` of the rows that row_of(i) points to, and zeros after them; in the background where `vectorized`
// says that rows allow 16-byte copies. All kThreads threads of the block take part.
template <int kRows, int kDim, int kThreads, class T, class RowOf>
NEOX_DEVICE void load_tile(T* tile, int count, int head_dim, bool vectorized, const RowOf& row_of) {
    constexpr int kChunks = Swizzle<kDim>::kChunks, kCount = kRows * kChunks;
    static_assert(kCount % kThreads == 0);
    if (vectorized) {
#pragma unroll
        for (int i = 0; i < kCount / kThreads; ++i) {
            const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / kChunks, chunk = at % kChunks;
            // a copy of nothing does not read its address
            cp_async_16(tile + Swizzle<kDim>::at(row, chunk), row_of(row) + chunk * 8, row < count && chunk * 8 < head_dim);
        }
    } else {
#pragma unroll 1
        for (int at = threadIdx.x; at < kCount; at += kThreads) {
            const int row = at / kChunks, chunk = at % kChunks;
            copy_elements(tile + Swizzle<kDim>::at(row, chunk), row_of(row), chunk, row < count ? head_dim : 0);
        }
    }
}

// Fragments. A is [16, 16] of mma.m16n8k16, B a pair of its [16, 8]; a pair of neighbouring B comes from one ldmatrix.
// `row` and `chunk` name the first of the 16 rows and of the two chunks in the tile.
template <int kDim, class T>
NEOX_DEVICE void load_a(uint32_t (&a)[4], const T* tile, int row, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    ldmatrix_x4(a, tile + Swizzle<kDim>::at(row + (lane & 15), chunk + (lane >> 4)));
}

// A = transpose of the tile's [16 of k, 16 of m].
template <int kDim, class T>
NEOX_DEVICE void load_a_transposed(uint32_t (&a)[4], const T* tile, int row, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    ldmatrix_x4<true>(a, tile + Swizzle<kDim>::at(row + (lane & 7) + (lane >> 4) * 8, chunk + (lane >> 3 & 1)));
}

// Two B whose n are the tile's rows: [16 of n, 16 of k].
template <int kDim, class T>
NEOX_DEVICE void load_b(uint32_t (&b)[4], const T* tile, int row, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    ldmatrix_x4(b, tile + Swizzle<kDim>::at(row + (lane & 7) + (lane >> 4) * 8, chunk + (lane >> 3 & 1)));
}

// Two B whose k are the tile's rows: [16 of k, 16 of n].
template <int kDim, class T>
NEOX_DEVICE void load_b_transposed(uint32_t (&b)[4], const T* tile, int row, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    ldmatrix_x4<true>(b, tile + Swizzle<kDim>::at(row + (lane & 15), chunk + (lane >> 4)));
}

NEOX_DEVICE void copy_fragment(uint32_t (&to)[4], const uint32_t (&from)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from[i];
}

// c0, c1 += a b for the pair of B in `pair`.
template <class T>
NEOX_DEVICE void mma_pair(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&pair)[4]) {
    const uint32_t low[2] = {pair[0], pair[1]}, high[2] = {pair[2], pair[3]};
    mma_m16n8k16<T>(c0, a, low);
    mma_m16n8k16<T>(c1, a, high);
}

// c [16 kM, kN] += a b^T over kDim: b is kN rows of a tile from `row` on, a comes from a_of(k, fragment), k in steps of 16.
template <class T, int kDim, int kM, int kN, class AOf>
NEOX_DEVICE void gemm_nt(float (&c)[kM][kN / 8][4], const AOf& a_of, const T* b, int row) {
    [[maybe_unused]] constexpr int kUnroll = kDim <= 128 ? kDim / 16 : 4;  // large heads whole: three times the code, and spills
#pragma unroll kUnroll
    for (int k = 0; k < kDim / 16; ++k) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) a_of(m, k, a[m]);
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
            uint32_t pair[4];
            load_b<kDim>(pair, b, row + n * 16, k * 2);
#pragma unroll
            for (int m = 0; m < kM; ++m) mma_pair<T>(c[m][2 * n], c[m][2 * n + 1], a[m], pair);
        }
    }
}

// c [16 kM, kN] += a b over kK: b is kK rows of a tile of kDim channels from `row` on, kN of them from `chunk` on.
template <class T, int kDim, int kM, int kK, int kN, class AOf>
NEOX_DEVICE void gemm_nn(float (&c)[kM][kN / 8][4], const AOf& a_of, const T* b, int row, int chunk) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) a_of(m, k, a[m]);
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
            uint32_t pair[4];
            load_b_transposed<kDim>(pair, b, row + k * 16, chunk + n * 2);
#pragma unroll
            for (int m = 0; m < kM; ++m) mma_pair<T>(c[m][2 * n], c[m][2 * n + 1], a[m], pair);
        }
    }
}

// Sums c [16, kN] as operands A: the two layouts agree, so that probabilities never leave the registers.
template <class T, int kN>
NEOX_DEVICE void sums_as_a(const float (&c)[kN / 8][4], uint32_t (&a)[kN / 16][4]) {
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
        a[k][0] = pack_pair<T>(c[2 * k][0], c[2 * k][1]);
        a[k][1] = pack_pair<T>(c[2 * k][2], c[2 * k][3]);
        a[k][2] = pack_pair<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
        a[k][3] = pack_pair<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
    }
}

// Sums c [16, kDim] times `factor[row half]` into 16 rows of a tile, from `row` on, that no other warp reads.
template <int kDim, class T>
NEOX_DEVICE void stage_rows(T* tile, int row, const float (&c)[kDim / 8][4], float low, float high) {
    const int lane = threadIdx.x % kWarpSize, first = row + lane / 4, within = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(tile + Swizzle<kDim>::at(first, n) + within) = pack_pair<T>(c[n][0] * low, c[n][1] * low);
        *reinterpret_cast<uint32_t*>(tile + Swizzle<kDim>::at(first + 8, n) + within) = pack_pair<T>(c[n][2] * high, c[n][3] * high);
    }
}

// Writes kRows rows of a tile, from `row` on, that this warp has staged; row_of(i) as in load_tile, null rows are left out.
template <int kRows, int kDim, class T, class RowOf>
NEOX_DEVICE void store_staged(const T* tile, int row, int head_dim, bool vectorized, const RowOf& row_of) {
    constexpr int kChunks = Swizzle<kDim>::kChunks;
    __syncwarp();  // the other lanes have staged their parts
#pragma unroll 2
    for (int at = threadIdx.x % kWarpSize; at < kRows * kChunks; at += kWarpSize) {
        T* const to = row_of(row + at / kChunks);
        if (to) store_chunk(tile + Swizzle<kDim>::at(row + at / kChunks, at % kChunks), to, at % kChunks, head_dim, vectorized);
    }
}

}  // namespace neox::attention
