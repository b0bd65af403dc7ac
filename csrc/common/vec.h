// Vectors of floats, by the compiler's vector extensions, and the functions that the kernels use on these vectors.
//
// Vec has NEOX_VEC_WIDTH lanes, by default as many as one register of the instruction set holds. The width can be
// overridden, so that code for 16 lanes can be tested on a machine whose registers hold 8 (the compiler splits it).
// Error bounds are the largest errors over a dense sweep of the argument (tests/cpp/test_vec.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_ps of GCC 11 and 12
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#ifndef NEOX_VEC_WIDTH
#if defined(__AVX512F__)
#define NEOX_VEC_WIDTH 16
#elif defined(__AVX__)
#define NEOX_VEC_WIDTH 8
#else
#define NEOX_VEC_WIDTH 4
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // all functions are inlined, so that no vector crosses an ABI boundary
#endif

#define NEOX_INLINE inline __attribute__((always_inline))

namespace neox {

constexpr int kVecWidth = NEOX_VEC_WIDTH;

typedef float Vec __attribute__((vector_size(4 * NEOX_VEC_WIDTH)));
typedef int32_t VecInt __attribute__((vector_size(4 * NEOX_VEC_WIDTH)));
typedef uint32_t VecUint __attribute__((vector_size(4 * NEOX_VEC_WIDTH)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * NEOX_VEC_WIDTH)));

NEOX_INLINE Vec splat(float value) { return value - Vec{}; }
NEOX_INLINE VecInt splat_int(int32_t value) { return value - VecInt{}; }
NEOX_INLINE VecInt bits(Vec v) { return reinterpret_cast<VecInt>(v); }
NEOX_INLINE Vec from_bits(VecInt v) { return reinterpret_cast<Vec>(v); }

// 0, 1, 2, ... in the lanes.
NEOX_INLINE VecInt lane_index() {
    VecInt v;
    for (int i = 0; i < kVecWidth; ++i) v[i] = i;
    return v;
}

// ---- memory: any alignment; with a count, only the first count < kVecWidth lanes are touched and the others read as
// zero ----

NEOX_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

NEOX_INLINE Vec load(const bf16* p) {
#if defined(__AVX512F__) && NEOX_VEC_WIDTH == 16
    const VecUint words =
        reinterpret_cast<VecUint>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && NEOX_VEC_WIDTH == 8
    const VecUint words =
        reinterpret_cast<VecUint>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    VecHalf half;
    std::memcpy(&half, p, sizeof(half));
    const VecUint words = __builtin_convertvector(half, VecUint);
#endif
    return reinterpret_cast<Vec>(words << 16);
}

template <class T>
NEOX_INLINE Vec load(const T* p, int64_t count) {
    T lanes[kVecWidth] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}

NEOX_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds like from_float<bf16>, except that AVX512_BF16's instruction flushes denormals to zero.
NEOX_INLINE void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__) && NEOX_VEC_WIDTH == 16
    const auto half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
    const VecUint word = reinterpret_cast<VecUint>(v);
    const VecUint sum = word + 0x7fffu + ((word >> 16) & 1u);
    const VecUint rounded = (v != v ? VecUint{} + 0x7fc00000u : sum) >> 16;
#if defined(__AVX512F__) && NEOX_VEC_WIDTH == 16
    const auto half = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded));
#elif defined(__AVX2__) && NEOX_VEC_WIDTH == 8
    const auto packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(rounded), reinterpret_cast<__m256i>(rounded));
    const auto half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    const auto half = __builtin_convertvector(rounded, VecHalf);
#endif
#endif
    std::memcpy(p, &half, sizeof(half));
}

template <class T>
NEOX_INLINE void store(T* p, Vec v, int64_t count) {
    T lanes[kVecWidth];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Calls body(i, load, store) for i = 0, kVecWidth, ... If the size is not a multiple of the width, the load and store
// of the last call access only the rest. One body therefore serves a row and its tail with the same arithmetic.
template <class Body>
NEOX_INLINE void for_each_vec(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + kVecWidth <= size; i += kVecWidth) {
        body(i, [](const auto* p) { return neox::load(p); }, [](auto* p, Vec v) { neox::store(p, v); });
    }
    if (const int64_t rest = size - i; rest > 0) {
        body(
            i, [rest](const auto* p) { return neox::load(p, rest); },
            [rest](auto* p, Vec v) { neox::store(p, v, rest); });
    }
}

// ---- arithmetic ----

NEOX_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
NEOX_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
NEOX_INLINE Vec abs(Vec v) { return from_bits(bits(v) & 0x7fffffff); }
NEOX_INLINE Vec copysign(Vec magnitude, Vec sign) {
    return from_bits((bits(magnitude) & 0x7fffffff) | (bits(sign) & splat_int(INT32_MIN)));
}

typedef float Quad __attribute__((vector_size(16)));

// Folds quarters of the vector with `join`, then the remaining lanes. The order depends on the width only.
template <class Join>
NEOX_INLINE float fold(Vec v, const Join& join) {
    constexpr int kQuads = kVecWidth / 4;
    Quad quads[kQuads];
    std::memcpy(quads, &v, sizeof(v));
    for (int step = kQuads / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) quads[i] = join(quads[i], quads[i + step]);
    }
    const Quad q = quads[0];
    const Quad pairs = join(q, Quad{q[2], q[3], q[0], q[1]});
    return join(pairs, Quad{pairs[1], pairs[0], pairs[3], pairs[2]})[0];
}

NEOX_INLINE float sum(Vec v) {
    return fold(v, [](Quad a, Quad b) { return a + b; });
}

NEOX_INLINE float max_lane(Vec v) {
    return fold(v, [](Quad a, Quad b) { return a > b ? a : b; });
}

// Transposes a square of kVecWidth vectors in registers: swaps one bit of the row index with the same bit of the lane
// index per round.
template <int kBit>
NEOX_INLINE void transpose_round(Vec (&rows)[kVecWidth]) {
    VecInt low, high;
    for (int lane = 0; lane < kVecWidth; ++lane) {
        low[lane] = (lane & kBit) ? kVecWidth + lane - kBit : lane;
        high[lane] = (lane & kBit) ? kVecWidth + lane : lane + kBit;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVecWidth; ++i) {
        if (i & kBit) continue;
        const Vec a = rows[i], b = rows[i + kBit];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + kBit] = __builtin_shuffle(a, b, high);
    }
    if constexpr (kBit * 2 < kVecWidth) transpose_round<kBit * 2>(rows);
}

// Sums across the lanes of kVecWidth vectors, as one vector.
NEOX_INLINE Vec sum_lanes(Vec (&rows)[kVecWidth]) {
    transpose_round<1>(rows);
    for (int step = kVecWidth / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) rows[i] += rows[i + step];
    }
    return rows[0];
}

// Sum over a row of the results of body(i, load, keep), a Vec or a struct with +=, as four interleaved partial sums: an
// addition takes four cycles and two can start per cycle. The order depends on the size only. Past the end of the row
// load returns zeros; a body that maps zero to another value must pass its vector through keep, which clears those
// lanes.
template <class Sum, class Body>
NEOX_INLINE Sum accumulate(int64_t size, const Body& body) {
    const auto load_all = [](const auto* p) { return neox::load(p); };
    const auto keep_all = [](Vec v) { return v; };
    Sum a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * kVecWidth <= size; i += 4 * kVecWidth) {
        a += body(i, load_all, keep_all);
        b += body(i + kVecWidth, load_all, keep_all);
        c += body(i + 2 * kVecWidth, load_all, keep_all);
        d += body(i + 3 * kVecWidth, load_all, keep_all);
    }
    for (; i + kVecWidth <= size; i += kVecWidth) a += body(i, load_all, keep_all);
    if (const int64_t rest = size - i; rest > 0) {
        b += body(
            i, [rest](const auto* p) { return neox::load(p, rest); },
            [rest](Vec v) { return lane_index() < static_cast<int32_t>(rest) ? v : Vec{}; });
    }
    a += b;
    c += d;
    a += c;
    return a;
}

// 1 / v for 2^-100 < v < 2^100, error <= 1 ulp.
NEOX_INLINE Vec reciprocal(Vec v) {
#if defined(__AVX512F__) && NEOX_VEC_WIDTH == 16
    // 14 bits, doubled by a Newton step
    const Vec y = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));
    return y + y * (1.0f - v * y);
#else
    return 1.0f / v;
#endif
}

// v = n ln 2 + r with |r| <= ln 2 / 2, in two parts of ln 2: e^r by a polynomial (minimax, weighted by e^-r), and n.
struct Exponential {
    Vec fraction;   // e^r
    Vec n;          // integer-valued
    VecInt biased;  // n + 0x4b400000
};

NEOX_INLINE Exponential exponential(Vec x) {
    // 1.5 * 2^23: the low bits of the sum's mantissa are the rounded integer
    const Vec shifted = x * 1.44269504f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = r * 1.38146085e-3f + 8.36871156e-3f;
    p = p * r + 4.16683875e-2f;
    p = p * r + 1.66665207e-1f;
    p = p * r + 4.99999934e-1f;
    return {(p * r) * r + r + 1.0f, n, bits(shifted)};
}

// e^v, error <= 1.5 ulp, including denormal results, infinities and NaN.
NEOX_INLINE Vec exp(Vec v) {
    const Vec x = max(splat(-104.0f), min(splat(89.0f), v));  // this order of operands propagates NaN
    const Exponential e = exponential(x);
#if defined(__AVX512F__) && NEOX_VEC_WIDTH == 16
    return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(e.fraction), reinterpret_cast<__m512>(e.n)));
#else
    // 2^n as two factors: n ranges from -150 to 128, and one exponent field holds neither end.
    const VecInt n = e.biased - 0x4b400000;
    const VecInt half = n >> 1;
    return (e.fraction * from_bits((half + 127) << 23)) * from_bits((n - half + 127) << 23);
#endif
}

// e^v for v <= 0, cheaper: error <= 1.5 ulp, 0 below -87.33 (where the result would be denormal), NaN for NaN.
NEOX_INLINE Vec exp_nonpositive(Vec v) {
    const Exponential e = exponential(max(splat(-88.0f), v));
    const Vec scale = from_bits((e.biased << 23) + (127 << 23));  // the shift drops the offset of biased
    return v < -87.33f ? Vec{} : e.fraction * scale;
}

struct Logistic {
    Vec value;  // 1 / (1 + e^-v)
    Vec slope;  // value (1 - value), without cancellation
};

// Error <= 3 ulp; of the slope <= 4 ulp.
NEOX_INLINE Logistic logistic(Vec v) {
    const Vec e = exp_nonpositive(-abs(v));
    const Vec inverse = reciprocal(1.0f + e);
    const Vec other = e * inverse;
    return {v < 0.0f ? other : inverse, other * inverse};
}

NEOX_INLINE Vec sigmoid(Vec v) { return logistic(v).value; }

// tanh v, error <= 3 ulp: an odd polynomial below 0.625, (1 - e^-2|v|) / (1 + e^-2|v|) above it.
NEOX_INLINE Vec tanh(Vec v) {
    const Vec a = abs(v);
    const Vec z = v * v;
    Vec p = z * -5.71703253e-3f + 2.06505756e-2f;
    p = p * z - 5.37434943e-2f;
    p = p * z + 1.33314912e-1f;
    p = p * z - 3.33332839e-1f;
    const Vec small = v + v * z * p;
    const Vec e = exp_nonpositive(-2.0f * a);
    const Vec large = copysign((1.0f - e) * reciprocal(1.0f + e), v);
    return a < 0.625f ? small : large;
}

struct Normal {
    Vec cdf;  // P(X <= v) of the standard normal distribution = (1 + erf(v / sqrt 2)) / 2
    Vec pdf;  // its density e^(-v^2/2) / sqrt(2 pi)
};

// Both from one exponential. The cdf retains relative accuracy in the lower tail (3e-6 for v >= -9; absolute error
// 2e-7), where (1 + erf) / 2 would cancel: cdf(-a) = e^(-a^2/2) t Q(t), t = 1 / (1 + 0.3 a), with Q a minimax
// polynomial of erfcx(a / sqrt 2) / 2t on [0, 14].
NEOX_INLINE Normal normal(Vec v) {
    const Vec a = min(splat(14.5f), abs(v));
    const Vec gauss = exp_nonpositive(a * a * -0.5f);
    const Vec t = reciprocal(1.0f + 0.3f * a);
    Vec q = t * -2.06129293e-2f + 1.12376332e-1f;
    q = q * t - 2.28068840e-1f;
    q = q * t + 1.91583494e-1f;
    q = q * t - 7.92488617e-2f;
    q = q * t + 9.60586586e-2f;
    q = q * t + 7.84252892e-2f;
    q = q * t + 1.10227387e-1f;
    q = q * t + 1.19572834e-1f;
    q = q * t + 1.19686634e-1f;
    const Vec tail = gauss * (t * q);
    const Vec cdf = v < 0.0f ? tail : 1.0f - tail;
    return Normal{cdf, gauss * 0.398942280f};
}

}  // namespace neox
