// One transformer block for a few new tokens, keys and values of the earlier ones at hand (decoding): norms, fused projection, rotation, attention and
// MLP one after another on buffers that stay in cache. At so few rows the calls between a block's dozen kernels would cost as much as their work.
//
//   u = norm1(s), w = norm2(s'), s the residual stream    sequential: s' = s + attention(u), delta = mlp(w); parallel: s' = s, delta = attention(u) + mlp(w)
//
// Every step is the kernel that the operators run alone; a sum is rounded where they round it, except delta of the parallel form, which is rounded
// once per addend's product. Bytes moved: the block's weights, once; keys and values, once.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "ops/attention/attention.h"
#include "ops/norm/norm.h"
#include "ops/rotary/rotary.h"

namespace neox {

enum class BlockActivation { kGelu, kGeluTanh, kGatedSilu, kGatedGelu, kGatedRelu };

struct Projection {
    const void* weight;  // [out, in] contiguous
    const void* bias;    // [out], or null
};

struct DecodeBlock {
    DType dtype;
    int64_t batch, seq, hidden, width;  // seq new tokens; width of the MLP
    int64_t groups, heads, head_dim;    // kv heads, and query heads that share each
    bool rms, parallel;
    float eps;
    BlockActivation activation;
    NormParameters norms[2];  // of attention and MLP; second weight null: both branches read the first
    const void* query_norm;   // [head_dim] weight of an RMS norm per head, or null
    const void* key_norm;
    Projection qkv, out, up, gate, down;  // rows of qkv are [groups, heads + 2, head_dim]; gate: gated activations only
    RotaryTables tables;                  // cos null: no rotation
    void* keys;                           // cache [batch, >= length + seq, groups, head_dim], the new tokens at `length`
    void* values;
    int64_t cache_batch_stride;
    int64_t length;           // tokens in the cache
    const int32_t* segments;  // [batch, length + seq], or null
    const float* slopes;      // [groups * heads], or null
    float scale, softcap;
    int64_t window;
    const void* stream;  // [batch, seq, hidden] contiguous
    const void* delta;   // the same, still to be added to the stream; or null
};

// stream, delta [batch, seq, hidden] contiguous, of the block's end.
void decode_block_cpu(const DecodeBlock& op, void* stream, void* delta, const Parallel& parallel);

}  // namespace neox
