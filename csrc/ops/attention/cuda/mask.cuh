// What happens to a block of products of queries and keys, [16 kM rows, kKeys], in registers: softcap, ALiBi, masks, dropout.
#pragma once

#include "ops/attention/cuda/dropout.cuh"

namespace neox::attention {

// Softcap and ALiBi: products become scores in base 2.
template <int kM, int kKeys>
NEOX_DEVICE void apply_softcap_and_alibi(const Params& in, int group, int first_row, int first_key, float (&s)[kM][kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = min(first_row + m * 16 + half * 8 + lane / 4, in.rows - 1), distance = in.position(row) - key;
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

// Scores of keys that a row does not see become -inf.
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
            const int32_t own = __ldg(ids + min(position, in.keys - 1));  // positions beyond the last are those of no row
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (__ldg(ids + min(key + n * 8 + i, in.keys - 1)) != own) s[m][n][2 * half + i] = -INFINITY;
                }
            }
        }
    }
}

// Dropped probabilities become zeros; the others are divided by 1 - dropout at the end.
template <int kM, int kKeys>
NEOX_DEVICE void apply_dropout(const Params& in, int pair, int first_row, int first_key, float (&p)[kM][kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
            const unsigned kept = keep_bits(in, pair, first_row + m * 16 + lane / 4, first_key + n * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) p[m][n][i] = kept >> i & 1 ? p[m][n][i] : 0.0f;
        }
    }
}

}  // namespace neox::attention
