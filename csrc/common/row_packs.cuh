// Rows held in registers in their storage type: a pack of 16 bytes takes half the registers of its fp32 values, which
// are converted at each use.
#pragma once

#include "common/vec.cuh"

namespace neox {

template <class T>
NEOX_DEVICE void unpack(const uint4& raw, float (&out)[Pack<T>::kSize]) {
    Pack<T> pack;
    pack.word[0] = raw;
    unpack(pack, out);
}

template <class T>
NEOX_DEVICE uint4 pack(const float (&in)[Pack<T>::kSize]) {
    return pack_of<T>(in).word[0];
}

// Number of elements of a pack within a row that has `left` more.
template <class T>
NEOX_DEVICE int valid_of(int64_t left) {
    return static_cast<int>(left < Pack<T>::kSize ? left : Pack<T>::kSize);
}

// Loads the first `valid` elements of the pack at `pointer`, followed by zeros. kVector: rows are aligned
// (can_vectorize), and the full pack is read if any element is valid. Otherwise elements are loaded one by one, into
// the same thread, so that results do not depend on the alignment.
template <bool kVector, class T>
NEOX_DEVICE uint4 load_raw(const T* pointer, int valid) {
    if constexpr (kVector) {
        return valid > 0 ? __ldg(reinterpret_cast<const uint4*>(pointer)) : make_uint4(0, 0, 0, 0);
    } else {
        return fetch_first<Pack<T>::kSize>(pointer, valid).word[0];
    }
}

// The same for memory that the kernel also writes.
template <bool kVector, class T>
NEOX_DEVICE uint4 load_written(const T* pointer, int valid) {
    if constexpr (kVector) {
        return valid > 0 ? load_global(reinterpret_cast<const uint4*>(pointer)) : make_uint4(0, 0, 0, 0);
    } else {
        return load_raw<false>(pointer, valid);
    }
}

template <bool kVector, class T>
NEOX_DEVICE void store_raw(T* pointer, const uint4& raw, int valid) {
    if constexpr (kVector) {
        if (valid > 0) store_global(reinterpret_cast<uint4*>(pointer), raw);
    } else {
        Pack<T> pack;
        pack.word[0] = raw;
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) {
            if (k < valid) pointer[k] = pack.get(k);
        }
    }
}

}  // namespace neox
