// Matrix products of small tiles with fp32 accumulation, and transposes, for the attention kernels on CPU. No torch.
//
// The elements of an operand are floats, or pairs of bf16 values adjacent along the summed dimension. With AVX512_BF16
// one instruction multiplies and adds both values of a pair: a bf16 product takes half the instructions and half the
// memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/vec.h"

namespace neox::attention {

// Rows of a product held in registers for `vectors` vectors of columns: 24 accumulators of 32 registers, or 12 of 16.
// Two multiply-adds per cycle at 4 cycles latency need 8 in flight.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int product_rows(int vectors) { return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int kMaxVectors = 2;
constexpr int product_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#endif

struct Pair {
    bf16 first, second;
};
static_assert(sizeof(Pair) == sizeof(float));

using neox::load;
using neox::store;

// load and store move kVecWidth elements as bits; spread broadcasts one to all lanes.
NEOX_INLINE Vec load(const Pair* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

NEOX_INLINE void store(Pair* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

NEOX_INLINE Vec spread(const float* p) { return splat(*p); }

NEOX_INLINE Vec spread(const Pair* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof(word));
    return from_bits(splat_int(word));
}

// Arithmetic on vectors of elements. An element holds kTerms terms of a sum.
template <class E>
struct Arithmetic;

template <>
struct Arithmetic<float> {
    using Scalar = float;  // one term
    static constexpr int64_t kTerms = 1;

    static NEOX_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }

    // Packs the terms of each lane into elements.
    static NEOX_INLINE Vec join(const Vec (&terms)[1]) { return terms[0]; }
};

// Element type of a tile loaded from a tensor of T.
template <class T>
struct ElementOf {
    using type = float;
};

#if defined(__AVX512BF16__) && NEOX_VEC_WIDTH == 16
template <>
struct Arithmetic<Pair> {
    using Scalar = bf16;
    static constexpr int64_t kTerms = 2;

    // Denormals are treated as zeros, as by every instruction of AVX512_BF16.
    static NEOX_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                      reinterpret_cast<__m512bh>(b)));
    }

    static NEOX_INLINE Vec join(const Vec (&terms)[2]) {
        const auto halves = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(terms[1]), reinterpret_cast<__m512>(terms[0]));
        return reinterpret_cast<Vec>(
            _mm512_permutexvar_epi16(neighbours(0, kVecWidth), reinterpret_cast<__m512i>(halves)));
    }

    // to[c] = (first[c], second[c]) for 2 * kVecWidth values.
    static NEOX_INLINE void interleave(Vec first, Vec second, Pair* to) {
        const __m512i a = reinterpret_cast<__m512i>(first), b = reinterpret_cast<__m512i>(second);
        store(to, reinterpret_cast<Vec>(_mm512_permutex2var_epi16(a, neighbours(0, 2 * kVecWidth), b)));
        store(to + kVecWidth,
              reinterpret_cast<Vec>(_mm512_permutex2var_epi16(a, neighbours(kVecWidth, 2 * kVecWidth), b)));
    }

  private:
    // Indices begin, begin + apart, begin + 1, begin + 1 + apart, ...
    static NEOX_INLINE __m512i neighbours(int begin, int apart) {
        return reinterpret_cast<__m512i>((lane_index() + begin) | ((lane_index() + begin + apart) << 16));
    }
};

template <>
struct ElementOf<bf16> {
    using type = Pair;
};
#endif

template <class T>
using Element = typename ElementOf<T>::type;

template <class E>
constexpr int64_t kTerms = Arithmetic<E>::kTerms;

// Left operand of a product, read one element at a time. Element (i, k) is data[i * row + k * step]; row or step is 1.
template <class E>
struct Left {
    const E* data;
    int64_t row;
    int64_t step;
};

// Destination of a product: the product is added, or stored times `factor`.
struct Into {
    float* data;
    int64_t row;
    bool add;
    float factor = 1.0f;
};

// c[i][0:V*width] = sum over k of a(i, k) * b[k][0:V*width] for i < R. Each sum starts at zero, runs over k in order
// and is then added to c, so that sums over many tiles round once per tile instead of once per element. The bits of a
// row do not depend on R, V or neighbouring rows.
template <int R, int V, bool kUnitRow, class E>
NEOX_INLINE void product_block(int64_t depth, Left<E> a, const E* b, int64_t b_row, Into c) {
    Vec sum[R][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * kVecWidth);
        const E* left = kUnitRow ? a.data + k * a.step : a.data + k;
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Vec x = spread(kUnitRow ? left + i : left + i * a.row);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[i][v] = Arithmetic<E>::multiply_add(x, right[v], sum[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* const at = c.data + i * c.row + v * kVecWidth;
            store(at, c.add ? load(at) + sum[i][v] : sum[i][v] * c.factor);
        }
    }
}

// GCC 12 allocates registers loop by loop and would spill parts of the right operand although it fits.
#if defined(__GNUC__) && !defined(__clang__)
#define NEOX_ONE_REGION __attribute__((optimize("ira-region=one")))
#else
#define NEOX_ONE_REGION
#endif

// Computes all rows of a panel of V vectors of columns.
template <int V, bool kUnitRow, class E>
NEOX_ONE_REGION inline void product_panel(int64_t rows, int64_t depth, Left<E> a, const E* b, int64_t b_row, Into c) {
    constexpr int R = product_rows(V);
    int64_t i = 0;
    const auto from = [&](int64_t row) { return Left<E>{a.data + row * a.row, a.row, a.step}; };
    const auto to = [&](int64_t row) { return Into{c.data + row * c.row, c.row, c.add, c.factor}; };
    for (; i + R <= rows; i += R) product_block<R, V, kUnitRow>(depth, from(i), b, b_row, to(i));
    for (; i + 4 <= rows; i += 4) product_block<4, V, kUnitRow>(depth, from(i), b, b_row, to(i));
    for (; i + 2 <= rows; i += 2) product_block<2, V, kUnitRow>(depth, from(i), b, b_row, to(i));
    for (; i < rows; ++i) product_block<1, V, kUnitRow>(depth, from(i), b, b_row, to(i));
}

// c [rows, columns] = a [rows, depth] * b [depth, columns]; columns is a multiple of the vector width, depth counts
// elements.
template <bool kUnitRow, class E>
inline void product(int64_t rows, int64_t columns, int64_t depth, Left<E> a, const E* b, int64_t b_row, Into c) {
    const auto panel = [&](auto vectors, int64_t j) {
        product_panel<decltype(vectors)::value, kUnitRow>(rows, depth, a, b + j, b_row,
                                                          Into{c.data + j, c.row, c.add, c.factor});
        return decltype(vectors)::value * kVecWidth;
    };
    for (int64_t j = 0; j < columns;) {
        const int64_t left = (columns - j) / kVecWidth;
        if (left >= kMaxVectors) {
            j += panel(std::integral_constant<int, kMaxVectors>{}, j);
        } else if (left >= 2) {
            j += panel(std::integral_constant<int, 2>{}, j);
        } else {
            j += panel(std::integral_constant<int, 1>{}, j);
        }
    }
}

// to[c][r] = from[r][c] for a square of kVecWidth rows and columns.
template <class E>
NEOX_INLINE void transpose_square(const E* from, int64_t from_row, E* to, int64_t to_row) {
    Vec rows[kVecWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) rows[i] = load(from + i * from_row);
    transpose_round<1>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) store(to + i * to_row, rows[i]);
}

// to [columns, rows] = transpose of from [rows, columns], both counts multiples of the vector width.
template <class E>
inline void transpose(const E* from, int64_t from_row, int64_t rows, int64_t columns, E* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += kVecWidth) {
        for (int64_t j = 0; j < columns; j += kVecWidth)
            transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
    }
}

}  // namespace neox::attention
