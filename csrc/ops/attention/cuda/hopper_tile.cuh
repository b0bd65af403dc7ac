// Products of a warpgroup with tiles in shared memory. A tile [rows, kDim] consists of panels [rows, 64] whose rows of
// 128 bytes are swizzled, as bulk copies and Swizzle<64> write them.
#pragma once

#include "common/hopper.cuh"
#include "ops/attention/cuda/shared_tile.cuh"

namespace neox::attention {

constexpr unsigned kPanelRowBytes = 128;

// c [64, 8 kParts] = a b^T over kDim channels, in flight. a: 64 rows of a tile, b: 8 kParts rows; the next 64 channels
// are a_panel and b_panel bytes further.
template <class T, int kDim, int kParts>
NEOX_DEVICE void issue_nt(float (&c)[kParts][4], uint64_t a, unsigned a_panel, uint64_t b, unsigned b_panel) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
        wgmma<T, false, false>(c, advance(a, i / 4 * a_panel + i % 4 * 32), advance(b, i / 4 * b_panel + i % 4 * 32),
                               i > 0);
    }
    wgmma_commit();
}

// c [64, 8 kParts] += a b over 16 kSteps rows of a tile, in flight. b: matrix_descriptor(tile, bytes of a panel).
template <class T, int kSteps, int kParts>
NEOX_DEVICE void issue_nn(float (&c)[kParts][4], const uint32_t (&a)[kSteps][4], uint64_t b) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) wgmma<T, true>(c, a[i], advance(b, i * 16 * kPanelRowBytes), true);
    wgmma_commit();
}

// c [64, 8 kParts] = a^T b over 16 kSteps rows, in flight. a: a panel.
template <class T, int kSteps, int kParts>
NEOX_DEVICE void issue_tn(float (&c)[kParts][4], uint64_t a, uint64_t b) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        wgmma<T, true, true>(c, advance(a, i * 16 * kPanelRowBytes), advance(b, i * 16 * kPanelRowBytes), i > 0);
    }
    wgmma_commit();
}

// Copies rows row_of(0) to row_of(count - 1), followed by zeros, into a tile [kRows, kDim] by the threads of a
// warpgroup. The rows are aligned to 16 bytes.
template <int kRows, int kDim, class T, class RowOf>
NEOX_DEVICE void load_panels(T* tile, int count, const RowOf& row_of) {
    constexpr int kChunks = kDim / 8;
#pragma unroll 4
    for (int i = 0; i < kRows * kChunks / kWarpgroupSize; ++i) {
        const int at = i * kWarpgroupSize + static_cast<int>(threadIdx.x) % kWarpgroupSize, row = at / kChunks,
                  chunk = at % kChunks;
        cp_async_16(tile + chunk / 8 * (kRows * 64) + Swizzle<64>::at(row, chunk % 8), row_of(row) + chunk * 8,
                    row < count);
    }
}

}  // namespace neox::attention
