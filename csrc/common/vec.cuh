// 128-bit access: Pack<T> is 16 bytes of T, held as fp32 while it is worked on.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace neox {

NEOX_DEVICE float to_fp32(float value) { return value; }
NEOX_DEVICE float to_fp32(__nv_bfloat16 value) { return __bfloat162float(value); }
NEOX_DEVICE float to_fp32(__half value) { return __half2float(value); }

template <class T>
NEOX_DEVICE T from_fp32(float value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16(value);
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half(value);
    } else {
        return value;
    }
}

template <class T>
struct alignas(16) Pack {
    static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
    T value[kSize];
};

// Whether rows that start at `pointer` and are `stride` elements apart, `size` long, can be read in packs.
template <class T>
inline bool packs_fit(const void* pointer, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % Pack<T>::kSize == 0 && size % Pack<T>::kSize == 0;
}

// kPack consecutive elements as fp32: one 16-byte access when kPack fills it, else element by element.
template <int kPack, class T>
NEOX_DEVICE void load(const T* pointer, float (&out)[kPack]) {
    if constexpr (kPack == Pack<T>::kSize) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(pointer));
        const Pack<T>& pack = *reinterpret_cast<const Pack<T>*>(&raw);
#pragma unroll
        for (int k = 0; k < kPack; ++k) out[k] = to_fp32(pack.value[k]);
    } else {
#pragma unroll
        for (int k = 0; k < kPack; ++k) out[k] = to_fp32(pointer[k]);
    }
}

template <int kPack, class T>
NEOX_DEVICE void store(T* pointer, const float (&in)[kPack]) {
    if constexpr (kPack == Pack<T>::kSize) {
        Pack<T> pack;
#pragma unroll
        for (int k = 0; k < kPack; ++k) pack.value[k] = from_fp32<T>(in[k]);
        *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&pack);
    } else {
#pragma unroll
        for (int k = 0; k < kPack; ++k) pointer[k] = from_fp32<T>(in[k]);
    }
}

}  // namespace neox
