// Which elements of a block of probabilities dropout keeps: the mask of the CPU kernel, bit for bit.
//
// One Philox call draws the words of four neighbouring keys of a row. The elements that need them lie in several lanes: each lane makes one of the
// calls, and the words are exchanged.
#pragma once

#include "common/philox.h"
#include "ops/attention/cuda/params.cuh"

namespace neox::attention {

// Words of keys [key / 4 * 4, + 4) of a row: word of key j is number ((b n + h) s + i) * ceil4(t) + j (attention.h).
NEOX_DEVICE PhiloxWords dropout_words(const Params& in, int pair, int row, int key) {
    const uint64_t quads = (static_cast<uint64_t>(in.keys) + 3) / 4;
    const uint64_t counter = static_cast<uint64_t>(in.index(pair, min(row, in.rows - 1))) * quads + static_cast<uint64_t>(key / 4);
    return philox(in.seed[0], counter, in.seed[1]);
}

// Bit i: element i of this lane's part of sums [16 rows, 8 keys] is kept. row: the lane's first of its two rows; key: the first of the 8.
NEOX_DEVICE unsigned keep_bits(const Params& in, int pair, int row, int key) {
    const int lane = threadIdx.x % kWarpSize;
    const bool odd = lane & 1;  // even lanes draw for the first row, odd ones for the second; each pair shares four keys
    const PhiloxWords own = dropout_words(in, pair, odd ? row + 8 : row, key + (lane & 2) * 2);
    const uint32_t other0 = __shfl_xor_sync(kFullWarp, odd ? own.word[0] : own.word[2], 1);
    const uint32_t other1 = __shfl_xor_sync(kFullWarp, odd ? own.word[1] : own.word[3], 1);
    const uint32_t words[4] = {odd ? other0 : own.word[0], odd ? other1 : own.word[1], odd ? own.word[2] : other0, odd ? own.word[3] : other1};
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<unsigned>(words[i] >= in.threshold) << i;
    return bits;
}

// The same for transposed sums [16 keys, 8 rows]; key and row: the first of the block.
NEOX_DEVICE unsigned keep_bits_transposed(const Params& in, int pair, int row, int key) {
    const int lane = threadIdx.x % kWarpSize, call = lane >> 2 & 3;  // lanes whose keys are the same but for the last two bits share four calls
    const PhiloxWords own = dropout_words(in, pair, row + lane % 4 * 2 + (call & 1), key + (lane >> 2 & 4) + (call >> 1) * 8);
    unsigned bits = 0;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int wanted = call ^ step;
        const uint32_t send = wanted & 2 ? (wanted & 1 ? own.word[3] : own.word[2]) : (wanted & 1 ? own.word[1] : own.word[0]);
        bits |= static_cast<unsigned>(__shfl_xor_sync(kFullWarp, send, step * 4) >= in.threshold) << wanted;
    }
    return bits;
}

}  // namespace neox::attention
