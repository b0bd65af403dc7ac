// Softcap, ALiBi, masks and dropout on a block of scores [16 kM rows, kKeys] in registers.
#pragma once

#include "ops/attention/cuda/dropout.cuh"

namespace neox::attention {

// Applies softcap and ALiBi: products of queries and keys become scores in base 2.
template <int kM, int kKeys>
NEOX_DEVICE void apply_softcap_and_alibi(const Params& in, int group, int first_row, int first_key,
                                         float (&s)[kM][kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = min(first_row + m * 16 + half * 8 + lane / 4, in.rows - 1),
                      distance = in.position(row) - key;
            const float slope = slope_of(in, group, row);
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = s[m][n][2 * half + i];
                    score = in.score(score) - slope * fabsf(static_cast<float>(distance - n * 8 - i));
                }
            }
        }
    }
}

// Sets the scores of keys that a row does not see to -inf.
template <int kM, int kKeys>
NEOX_DEVICE void mask_scores(const Params& in, int batch, int first_row, int first_key, float (&s)[kM][kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane % 4 * 2, left = in.keys - key;
    const int32_t* const ids = in.segments ? in.segments + static_cast<int64_t>(batch) * in.keys : nullptr;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = in.position(first_row + m * 16 + half * 8 + lane / 4), distance = position - key;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const bool visible = n * 8 + i < left && static_cast<unsigned>(distance - n * 8 - i) <= in.reach;
                    if (!visible) s[m][n][2 * half + i] = -INFINITY;
                }
            }
            if (!ids) continue;
            // rows past the last one read the last id; they are not stored
            const int32_t row_id = __ldg(ids + min(position, in.keys - 1));
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (__ldg(ids + min(key + n * 8 + i, in.keys - 1)) != row_id) s[m][n][2 * half + i] = -INFINITY;
                }
            }
        }
    }
}

// Sets dropped probabilities to zero. The epilogue divides the others by 1 - dropout.
template <int kM, int kKeys>
NEOX_DEVICE void apply_dropout(const Params& in, int pair, int first_row, int first_key, float (&p)[kM][kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
            const unsigned keep = keep_bits(in, pair, first_row + m * 16 + lane / 4, first_key + n * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) p[m][n][i] = keep >> i & 1 ? p[m][n][i] : 0.0f;
        }
    }
}

}  // namespace neox::attention
