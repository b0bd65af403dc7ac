// The dropout mask of a block of probabilities, bit for bit that of the CPU kernel.
//
// One Philox call draws the words of four neighbouring keys of a row. Several lanes hold the elements that need them,
// so each lane makes one call and the lanes exchange the words.
#pragma once

#include "common/philox.h"
#include "ops/attention/cuda/params.cuh"

namespace neox::attention {

// Words of keys [key / 4 * 4, key / 4 * 4 + 4) of a row. The word of key j has index ((b n + h) s + i) * ceil4(t) + j
// (attention.h).
NEOX_DEVICE PhiloxWords dropout_words(const Params& in, int pair, int row, int key) {
    const uint64_t quads = (static_cast<uint64_t>(in.keys) + 3) / 4;
    const uint64_t counter =
        static_cast<uint64_t>(in.index(pair, min(row, in.rows - 1))) * quads + static_cast<uint64_t>(key / 4);
    return philox(in.seed[0], counter, in.seed[1]);
}

// Bit i is set if element i of this lane's part of an accumulator [16 rows, 8 keys] is retained. row: the lane's first
// row; key: the first of the 8.
NEOX_DEVICE unsigned keep_bits(const Params& in, int pair, int row, int key) {
    const int lane = threadIdx.x % kWarpSize;
    // even lanes draw for the first row, odd lanes for the second; a pair of lanes shares four keys
    const bool odd = lane & 1;
    const PhiloxWords drawn = dropout_words(in, pair, odd ? row + 8 : row, key + (lane & 2) * 2);
    const uint32_t other0 = __shfl_xor_sync(kFullWarp, odd ? drawn.word[0] : drawn.word[2], 1);
    const uint32_t other1 = __shfl_xor_sync(kFullWarp, odd ? drawn.word[1] : drawn.word[3], 1);
    const uint32_t words[4] = {odd ? other0 : drawn.word[0], odd ? other1 : drawn.word[1], odd ? drawn.word[2] : other0,
                               odd ? drawn.word[3] : other1};
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<unsigned>(words[i] >= in.threshold) << i;
    return bits;
}

// The same for a transposed accumulator [16 keys, 8 rows]; key and row are the block's first.
NEOX_DEVICE unsigned keep_bits_transposed(const Params& in, int pair, int row, int key) {
    // lanes whose keys differ in the last two bits only share four calls
    const int lane = threadIdx.x % kWarpSize, call = lane >> 2 & 3;
    const PhiloxWords drawn =
        dropout_words(in, pair, row + lane % 4 * 2 + (call & 1), key + (lane >> 2 & 4) + (call >> 1) * 8);
    unsigned bits = 0;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int target = call ^ step;
        const uint32_t send =
            target & 2 ? (target & 1 ? drawn.word[3] : drawn.word[2]) : (target & 1 ? drawn.word[1] : drawn.word[0]);
        bits |= static_cast<unsigned>(__shfl_xor_sync(kFullWarp, send, step * 4) >= in.threshold) << target;
    }
    return bits;
}

}  // namespace neox::attention
