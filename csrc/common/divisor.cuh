// Integer division by a number that the host knows.
#pragma once

#include "common/device.cuh"

namespace neox {

// Division of 0 to 2^31 - 1 by a divisor known on the host, as a product and a shift; the GPU's integer division takes
// some 20 instructions. With 2^shift >= divisor the factor ceil(2^(31 + shift) / divisor) is too large by less than one
// part in 2^31 (Granlund and Montgomery, "Division by invariant integers using multiplication", theorem 4.2).
struct Divisor {
    uint32_t factor;
    int divisor, shift;  // shift 0: by 1

    static Divisor by(int divisor) {
        int shift = 0;
        while (int64_t{1} << shift < divisor) ++shift;
        return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + static_cast<uint64_t>(divisor) - 1) /
                                      static_cast<uint64_t>(divisor)),
                divisor, shift};
    }
    __device__ __forceinline__ int quotient(int dividend) const {
        return shift == 0 ? dividend
                          : static_cast<int>(__umulhi(static_cast<unsigned>(dividend), factor) >> (shift - 1));
    }
};

}  // namespace neox
