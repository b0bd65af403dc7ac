// Element types of the kernels, without torch: kernels take raw pointers of these types.
#pragma once

#include <cstdint>
#include <cstring>

namespace neox {

enum class DType { kFloat32, kBFloat16, kFloat16 };  // kFloat16: CUDA only

// The upper half of an IEEE-754 binary32.
struct bf16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
    const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &word, sizeof(result));
    return result;
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

// Rounds to nearest, ties to even; any NaN becomes the quiet NaN 0x7fc0 (rounding its payload could carry into
// infinity).
template <>
inline bf16 from_float<bf16>(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    if (value != value) return bf16{0x7fc0};
    return bf16{static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}

// Calls body with a value of the C++ type of dtype: dispatch(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class Body>
void dispatch(DType dtype, const Body& body) {
    if (dtype == DType::kBFloat16) {
        body(bf16{});
    } else {
        body(float{});
    }
}

}  // namespace neox
