// Exponential of non-positive arguments, for results of type T.
#pragma once

#include "common/ptx.cuh"

namespace neox {

// e^v for v <= 0; 0 if the result would be subnormal, NaN for NaN. The rounding error of v log2(e) is compensated for
// fp32.
template <class T>
NEOX_DEVICE float exp_nonpositive(float v) {
    const float power = v * 1.44269504f;
    if constexpr (sizeof(T) == 2) return fast_exp2(power);
    const float rest = fmaf(v, 1.44269504f, -power) + v * 1.92596299e-8f;  // log2(e) in two parts
    const float e = fast_exp2(power);
    return v > -87.33f ? fmaf(e, rest * 0.693147181f, e) : v == v ? 0.0f : v;
}

}  // namespace neox
