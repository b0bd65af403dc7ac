// gelu, silu and relu with their derivatives (slopes), for elements of type T.
//
// The formulas are those of vec.h, with one exponential and one reciprocal each. In fp32 their accuracy is that of
// vec.h. A kernel that moves 4 bytes per 16-bit element has time for some 27 instructions per element (H200: 132 x 128
// lanes, 1.7 GHz, 4.3 TB/s), so the 16-bit types use cheaper polynomials with relative errors of 1e-5, a twentieth of
// an ulp of fp16. normcdff and expf would take 50 instructions.
#pragma once

#include "common/exp.cuh"

namespace neox {

struct ValueAndSlope {
    float value, slope;
};

// s = 1 / (1 + e^-v), and its slope, computed from e^-v because s (1 - s) cancels for s near 1.
template <class T>
NEOX_DEVICE ValueAndSlope logistic(float v) {
    const float e = exp_nonpositive<T>(-fabsf(v));
    const float inverse = fast_reciprocal(1.0f + e), other = e * inverse;
    return {v < 0.0f ? other : inverse, other * inverse};
}

// Cdf of the normal distribution, accurate in the lower tail, where (1 + erf) / 2 cancels, with the density as slope:
// normal() of vec.h. 16-bit types use a polynomial of degree 5 (error 9e-6).
template <class T>
NEOX_DEVICE ValueAndSlope normal(float v) {
    const float a = fabsf(v) > 14.5f ? 14.5f : fabsf(v);  // fminf would drop NaN
    const float gauss = exp_nonpositive<T>(-0.5f * (a * a));
    const float t = fast_reciprocal(1.0f + 0.3f * a);
    float q;
    if constexpr (sizeof(T) == 2) {
        q = t * -7.67005756e-2f + 2.14848936e-1f;
        q = q * t - 1.55975142e-2f;
        q = q * t + 1.43473372e-1f;
        q = q * t + 1.13922827e-1f;
        q = q * t + 1.20057419e-1f;
    } else {
        q = t * -2.06129293e-2f + 1.12376332e-1f;
        q = q * t - 2.28068840e-1f;
        q = q * t + 1.91583494e-1f;
        q = q * t - 7.92488617e-2f;
        q = q * t + 9.60586586e-2f;
        q = q * t + 7.84252892e-2f;
        q = q * t + 1.10227387e-1f;
        q = q * t + 1.19572834e-1f;
        q = q * t + 1.19686634e-1f;
    }
    const float tail = gauss * (t * q);
    return {v < 0.0f ? tail : 1.0f - tail, gauss * 0.398942280f};
}

// In all of them, the factor of a slope that has underflowed to 0 may be infinite.

template <class T>
NEOX_DEVICE ValueAndSlope silu(float u) {
    const ValueAndSlope s = logistic<T>(u);
    return {u * s.value, s.value + (s.slope > 0.0f ? u * s.slope : 0.0f)};
}

template <class T>
NEOX_DEVICE ValueAndSlope gelu(float u) {
    const ValueAndSlope p = normal<T>(u);
    return {u * p.value, p.value + (p.slope > 0.0f ? u * p.slope : 0.0f)};
}

template <class T>
NEOX_DEVICE ValueAndSlope gelu_tanh(float u) {
    const float square = u * u;
    const float z = u * (square * 0.0713548163f + 1.59576912f);  // 2c(u + a u^3)
    const float dz = square * 0.214064449f + 1.59576912f;        // 2c(1 + 3a u^2)
    const ValueAndSlope s = logistic<T>(z);
    return {u * s.value, s.value + (s.slope > 0.0f ? u * dz * s.slope : 0.0f)};
}

template <class T>
NEOX_DEVICE ValueAndSlope relu(float u) {
    return {u > 0.0f || u != u ? u : 0.0f, u > 0.0f ? 1.0f : 0.0f};
}

}  // namespace neox
