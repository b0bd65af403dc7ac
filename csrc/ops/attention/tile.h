// Tile arithmetic of the attention kernels on CPU: matrix products, transposes and exp2 on small fp32 tiles. No torch.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace neox::attention {

// Rows of a product that are kept in registers for `vectors` columns: 24 accumulators of 32 registers, 12 of 16. Two
// multiply-adds per cycle at 4 cycles latency need 8 in flight.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int product_rows(int vectors) { return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int kMaxVectors = 2;
constexpr int product_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#endif

// The left operand of a product, read one element at a time: element (i, k) is data[i * row + k * step]; one of both is 1.
struct Left {
    const float* data;
    int64_t row;
    int64_t step;
};

// c[i][0:V*width] (+)= sum over k of a(i, k) * b[k][0:V*width], i < R. Each sum starts at zero and runs over k in order; it is then added to c:
// sums over many tiles round once per tile, not once per element. The bits of a row don't depend on R, V, or on the rows beside it.
template <int R, int V, bool kUnitRow>
NEOX_INLINE void product_block(int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    Vec sum[R][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * kVecWidth);
        const float* left = kUnitRow ? a.data + k * a.step : a.data + k;
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Vec x = splat(kUnitRow ? left[i] : left[i * a.row]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[i][v] += x * right[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* const at = c + i * c_row + v * kVecWidth;
            store(at, accumulate ? load(at) + sum[i][v] : sum[i][v]);
        }
    }
}

// One panel of V vectors of columns, all rows.
template <int V, bool kUnitRow>
inline void product_panel(int64_t rows, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    constexpr int R = product_rows(V);
    int64_t i = 0;
    const auto at = [&](int64_t row) { return Left{a.data + row * a.row, a.row, a.step}; };
    for (; i + R <= rows; i += R) product_block<R, V, kUnitRow>(depth, at(i), b, b_row, c + i * c_row, c_row, accumulate);
    for (; i + 4 <= rows; i += 4) product_block<4, V, kUnitRow>(depth, at(i), b, b_row, c + i * c_row, c_row, accumulate);
    for (; i + 2 <= rows; i += 2) product_block<2, V, kUnitRow>(depth, at(i), b, b_row, c + i * c_row, c_row, accumulate);
    for (; i < rows; ++i) product_block<1, V, kUnitRow>(depth, at(i), b, b_row, c + i * c_row, c_row, accumulate);
}

// c [rows, columns] (+)= a [rows, depth] * b [depth, columns]; columns is a multiple of the vector width.
template <bool kUnitRow>
inline void product(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    for (int64_t j = 0; j < columns;) {
        const int64_t left = (columns - j) / kVecWidth;
        if (left >= kMaxVectors) {
            product_panel<kMaxVectors, kUnitRow>(rows, depth, a, b + j, b_row, c + j, c_row, accumulate);
            j += kMaxVectors * kVecWidth;
        } else if (left >= 2) {
            product_panel<2, kUnitRow>(rows, depth, a, b + j, b_row, c + j, c_row, accumulate);
            j += 2 * kVecWidth;
        } else {
            product_panel<1, kUnitRow>(rows, depth, a, b + j, b_row, c + j, c_row, accumulate);
            j += kVecWidth;
        }
    }
}

// to[c][r] = from[r][c] for a square of kVecWidth rows and columns.
NEOX_INLINE void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row) {
    Vec rows[kVecWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) rows[i] = load(from + i * from_row);
    transpose_round<1>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) store(to + i * to_row, rows[i]);
}

// to [columns, rows] = transpose of from [rows, columns], both counts multiples of the vector width.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += kVecWidth) {
        for (int64_t j = 0; j < columns; j += kVecWidth) transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
    }
}

}  // namespace neox::attention
