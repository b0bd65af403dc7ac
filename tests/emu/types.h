// Stand-ins for the CUDA language and its vector and 16-bit types, so that kernel sources compile with a host compiler.
// Part of the test-only SIMT emulator; a GPU build does not include this file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline  // not always_inline, which would double the compile time
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// A keyword cannot redirect static shared memory of a function template, so kernels use STATIC_SMEM
// (csrc/common/device.cuh).
#define __shared__ use_STATIC_SMEM_or_DYNAMIC_SMEM

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIMT_VECTOR_TYPES(T, name)                             \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
    struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR_TYPES(float, float)
SIMT_VECTOR_TYPES(int, int)
SIMT_VECTOR_TYPES(unsigned, uint)
#undef SIMT_VECTOR_TYPES

namespace simt {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// bfloat16, rounded to nearest even. Every NaN becomes the hardware's canonical NaN.
inline uint16_t encode_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float decode_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// binary16, rounded to nearest even.
inline uint16_t encode_half(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                                              // subnormal: a multiple of 2^-24
        const double steps = std::nearbyint(std::ldexp(static_cast<double>(float_of(magnitude)), 24));
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));
    }
    const uint32_t rebased = magnitude - 0x38000000;  // exponent bias 127 -> 15
    return static_cast<uint16_t>(sign | ((rebased + 0xfff + ((rebased >> 13) & 1)) >> 13));
}

inline float decode_half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31,
                   fraction = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | (fraction << 13));
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), float_of(sign));
    return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

// A 16-bit float without arithmetic: kernels must convert through fp32.
template <uint16_t (*Encode)(float), float (*Decode)(uint16_t)>
struct alignas(2) Float16 {
    uint16_t bits;
    Float16() = default;
    Float16(float value) : bits(Encode(value)) {}
    operator float() const { return Decode(bits); }
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T x, y;
};

}  // namespace simt

using __nv_bfloat16 = simt::Float16<simt::encode_bfloat16, simt::decode_bfloat16>;
using __half = simt::Float16<simt::encode_half, simt::decode_half>;
using __nv_bfloat162 = simt::Pair<__nv_bfloat16>;
using __half2 = simt::Pair<__half>;

inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __half __float2half(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }

inline unsigned __float_as_uint(float value) { return simt::bits_of(value); }
inline float __uint_as_float(unsigned bits) { return simt::float_of(bits); }
inline int __float_as_int(float value) { return static_cast<int>(simt::bits_of(value)); }
inline float __int_as_float(int bits) { return simt::float_of(static_cast<uint32_t>(bits)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678118654752f); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
using std::max;
using std::min;

// The parts of the runtime API that launchers use.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t& emulated_last_error() {
    static cudaError_t error = cudaSuccess;
    return error;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulated_last_error();
    emulated_last_error() = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
    std::memset(target, value, bytes);
    return cudaSuccess;
}
