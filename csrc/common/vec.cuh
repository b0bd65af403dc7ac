// Vectorized access: a Pack is a few consecutive elements in storage type, moved by accesses of up to 128 bits and
// converted to fp32 for arithmetic.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"

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

// kCount elements, a power of two; 16 bytes by default.
template <class T, int kCount = 16 / static_cast<int>(sizeof(T))>
struct Pack {
    static constexpr int kSize = kCount;
    static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
    // The widest access that divides the pack.
    using Narrow = std::conditional_t<kBytes % 2 == 0, unsigned short, unsigned char>;
    using Word = std::conditional_t<
        kBytes % 16 == 0, uint4,
        std::conditional_t<kBytes % 8 == 0, uint2, std::conditional_t<kBytes % 4 == 0, unsigned, Narrow>>>;
    static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
    Word word[kWords];

    __device__ __forceinline__ T get(int k) const { return reinterpret_cast<const T*>(word)[k]; }
    __device__ __forceinline__ void set(int k, T value) { reinterpret_cast<T*>(word)[k] = value; }
};

// Whether rows that start at `pointer`, `stride` elements apart and `size` long, can be moved in packs of kCount.
template <class T, int kCount = Pack<T>::kSize>
inline bool can_vectorize(const void* pointer, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(pointer) % alignof(typename Pack<T, kCount>::Word) == 0 &&
           stride % kCount == 0 && size % kCount == 0;
}

// Loads a pack of data that no thread of the launch writes.
template <int kCount, class T>
NEOX_DEVICE Pack<T, kCount> fetch(const T* pointer) {
    Pack<T, kCount> pack;
    const auto* const words = reinterpret_cast<const typename Pack<T, kCount>::Word*>(pointer);
#pragma unroll
    for (int i = 0; i < pack.kWords; ++i) pack.word[i] = __ldg(words + i);
    return pack;
}

// The same for data that the launch writes: __ldg may read a cache that is not coherent with stores.
template <int kCount, class T>
NEOX_DEVICE Pack<T, kCount> fetch_mutable(const T* pointer) {
    Pack<T, kCount> pack;
    const auto* const words = reinterpret_cast<const typename Pack<T, kCount>::Word*>(pointer);
#pragma unroll
    for (int i = 0; i < pack.kWords; ++i) pack.word[i] = load_global(words + i);
    return pack;
}

// Loads the first `count` elements one by one, for misaligned rows, followed by zeros.
template <int kCount, class T>
NEOX_DEVICE Pack<T, kCount> fetch_first(const T* pointer, int64_t count) {
    Pack<T, kCount> pack = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        if (k < count) pack.set(k, pointer[k]);
    }
    return pack;
}

template <class T, int kCount>
NEOX_DEVICE void unpack(const Pack<T, kCount>& pack, float (&out)[kCount]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount % 2 == 0) {
        // bf16 is the upper half of fp32. One instruction per element; of __bfloat162float, nvcc makes three per pair.
        const unsigned* const pairs = reinterpret_cast<const unsigned*>(pack.word);
#pragma unroll
        for (int k = 0; k < kCount; ++k)
            out[k] = __uint_as_float(k % 2 ? pairs[k / 2] & 0xffff0000u : pairs[k / 2] << 16);
    } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) out[k] = to_fp32(pack.get(k));
    }
}

template <int kCount, class T>
NEOX_DEVICE void load(const T* pointer, float (&out)[kCount]) {
    unpack(fetch<kCount>(pointer), out);
}

template <class T, int kCount>
NEOX_DEVICE Pack<T, kCount> pack_of(const float (&in)[kCount]) {
    using P = Pack<T, kCount>;
    P pack;
    if constexpr (P::kBytes < 4) {
        pack.set(0, from_fp32<T>(in[0]));
    } else {
        unsigned bits[P::kBytes / 4];
#pragma unroll
        for (int i = 0; i < P::kBytes / 4; ++i) {
            if constexpr (sizeof(T) == 4) {
                bits[i] = __float_as_uint(in[i]);
            } else {
                bits[i] = pack_pair<T>(in[2 * i], in[2 * i + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < P::kWords; ++i) {
            if constexpr (P::kBytes % 16 == 0) {
                pack.word[i] = make_uint4(bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]);
            } else if constexpr (P::kBytes % 8 == 0) {
                pack.word[i] = make_uint2(bits[2 * i], bits[2 * i + 1]);
            } else {
                pack.word[i] = bits[i];
            }
        }
    }
    return pack;
}

template <int kCount, class T>
NEOX_DEVICE void store(T* pointer, const float (&in)[kCount]) {
    const auto pack = pack_of<T>(in);
    auto* const words = reinterpret_cast<typename Pack<T, kCount>::Word*>(pointer);
#pragma unroll
    for (int i = 0; i < pack.kWords; ++i) store_global(words + i, pack.word[i]);
}

template <int kCount, class T>
NEOX_DEVICE void store_first(T* pointer, int64_t count, const float (&in)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        if (k < count) pointer[k] = from_fp32<T>(in[k]);
    }
}

}  // namespace neox
