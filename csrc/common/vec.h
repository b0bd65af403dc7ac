// Vectors of floats through the compiler's vector extensions, and the functions the kernels need on them.
//
// Vec has NEOX_VEC_WIDTH lanes: by default as many as one register of the instruction set holds. The width can be overridden, so that
// code for 16 lanes can be tested on a machine whose registers hold 8 (the compiler splits it). Error bounds below are the largest found
// over a dense sweep of the argument (tests/cpp/test_vec.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

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
#pragma GCC diagnostic ignored "-Wpsabi"  // every function here is inlined: no vector crosses an ABI boundary
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

// ---- memory: any alignment; with a count, only the first count < kVecWidth lanes are touched and the others read as zero ----

NEOX_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

NEOX_INLINE Vec load(const bf16* p) {
    VecHalf half;
    std::memcpy(&half, p, sizeof(half));
    return reinterpret_cast<Vec>(__builtin_convertvector(half, VecUint) << 16);
}

template <class T>
NEOX_INLINE Vec load(const T* p, int64_t count) {
    T lanes[kVecWidth] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}

NEOX_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds as from_float<bf16>.
NEOX_INLINE void store(bf16* p, Vec v) {
    const VecUint word = reinterpret_cast<VecUint>(v);
    const VecUint rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const VecHalf half = __builtin_convertvector(v != v ? VecUint{} + 0x7fc0u : rounded, VecHalf);
    std::memcpy(p, &half, sizeof(half));
}

template <class T>
NEOX_INLINE void store(T* p, Vec v, int64_t count) {
    T lanes[kVecWidth];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Calls body(i, load, store) for i = 0, kVecWidth, ...: the last call, if the size is no multiple of the width, gets a load and a store
// that touch only what is left. One body therefore serves the whole row and its tail, with the same arithmetic.
template <class Body>
NEOX_INLINE void for_each_vec(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + kVecWidth <= size; i += kVecWidth) {
        body(i, [](const auto* p) { return neox::load(p); }, [](auto* p, Vec v) { neox::store(p, v); });
    }
    if (const int64_t rest = size - i; rest > 0) {
        body(i, [rest](const auto* p) { return neox::load(p, rest); }, [rest](auto* p, Vec v) { neox::store(p, v, rest); });
    }
}

// ---- arithmetic ----

NEOX_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
NEOX_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
NEOX_INLINE Vec abs(Vec v) { return from_bits(bits(v) & 0x7fffffff); }
NEOX_INLINE Vec copysign(Vec magnitude, Vec sign) { return from_bits((bits(magnitude) & 0x7fffffff) | (bits(sign) & splat_int(INT32_MIN))); }

// Lanes are added pairwise: the order is fixed by the width alone.
NEOX_INLINE float sum(Vec v) {
    float lanes[kVecWidth];
    store(lanes, v);
    for (int step = kVecWidth / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    }
    return lanes[0];
}

NEOX_INLINE float max_lane(Vec v) {
    float lanes[kVecWidth];
    store(lanes, v);
    float best = lanes[0];
    for (int i = 1; i < kVecWidth; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
}

// e^v, error <= 1.5 ulp, denormal results, infinities and NaN included.
// v = n ln 2 + r with |r| <= ln 2 / 2, in two parts of ln 2; e^r by a polynomial (minimax, weighted by e^-r); 2^n in two factors, since
// n runs from -150 to 128 and one exponent field holds neither end.
NEOX_INLINE Vec exp(Vec v) {
    const Vec x = v > 89.0f ? splat(89.0f) : (v < -104.0f ? splat(-104.0f) : v);
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are the rounded integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = r * 1.38146085e-3f + 8.36871156e-3f;
    p = p * r + 4.16683875e-2f;
    p = p * r + 1.66665207e-1f;
    p = p * r + 4.99999934e-1f;
    p = (p * r) * r + r + 1.0f;
    const VecInt exponent = bits(shifted) - 0x4b400000;
    const VecInt half = exponent >> 1;
    return (p * from_bits((half + 127) << 23)) * from_bits((exponent - half + 127) << 23);
}

// 1 / (1 + e^-v), error <= 3 ulp.
NEOX_INLINE Vec sigmoid(Vec v) { return 1.0f / (1.0f + exp(-v)); }

// tanh v, error <= 3 ulp: an odd polynomial below 0.625, 1 - 2 / (e^2|v| + 1) above it.
NEOX_INLINE Vec tanh(Vec v) {
    const Vec a = abs(v);
    const Vec z = v * v;
    Vec p = z * -5.71703253e-3f + 2.06505756e-2f;
    p = p * z - 5.37434943e-2f;
    p = p * z + 1.33314912e-1f;
    p = p * z - 3.33332839e-1f;
    const Vec small = v + v * z * p;
    const Vec large = copysign(1.0f - 2.0f / (exp(2.0f * a) + 1.0f), v);
    return a < 0.625f ? small : large;
}

struct Normal {
    Vec cdf;  // P(X <= v) of the standard normal distribution = (1 + erf(v / sqrt 2)) / 2
    Vec pdf;  // its density e^(-v^2/2) / sqrt(2 pi)
};

// Both from one exponential. The cdf keeps its relative accuracy in the lower tail (<= 2e-6 for v >= -9), where (1 + erf) / 2 would
// cancel: cdf(-a) = e^(-a^2/2) t Q(t), t = 1 / (1 + 0.3 a), with Q a minimax polynomial of erfcx(a / sqrt 2) / 2t on [0, 14].
NEOX_INLINE Normal normal(Vec v) {
    const Vec a = min(abs(v), splat(14.5f));
    const Vec gauss = exp(a * a * -0.5f);
    const Vec t = 1.0f / (1.0f + 0.3f * a);
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
    return Normal{v != v ? v : cdf, v != v ? v : gauss * 0.398942280f};
}

// erf v, absolute error <= 2e-7.
NEOX_INLINE Vec erf(Vec v) { return 2.0f * normal(v * 1.41421356f).cdf - 1.0f; }

}  // namespace neox
