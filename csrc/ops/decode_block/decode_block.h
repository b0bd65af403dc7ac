// One transformer block for a few new tokens with a KV cache (decoding): norms, QKV projection, rotary embedding,
// attention and MLP in one call, on buffers that stay in cache. With so few rows, dispatching a block's dozen operators
// one by one would cost as much as their work.
//
//   s = stream + delta,  u = norm1(s)
//   sequential:  s' = s + attention(u),   delta' = mlp(norm2(s'))
//   parallel:    s' = s,                  delta' = attention(u) + mlp(norm2(s))
//
// Each step runs the kernel of the corresponding operator and rounds where the operator rounds. The exception is delta'
// of the parallel form, which is rounded once after each of its two products.
//
// Shapes: stream, delta [b, s, h]; qkv weight [g (m + 2) d, h]; out weight [h, n d]; up and gate [f, h], down [h, f];
// caches [b, t, g, d].
//
// Bytes moved: the weights of the block once, the keys and values of the cache once. Activations stay in cache.
//
// Source: pre-norm transformer block of Llama (arXiv:2302.13971) and the parallel residual of GPT-J and GPT-NeoX
// (arXiv:2204.06745, section 2.1).
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
    int64_t batch, seq, hidden, width;  // seq: number of new tokens; width: of the MLP
    int64_t groups, heads, head_dim;    // kv heads; query heads per kv head
    bool rms, parallel;
    float eps;
    BlockActivation activation;
    NormParameters norms[2];  // of attention and MLP; if the second weight is null, both branches use the first
    const void* query_norm;   // [head_dim], weight of an RMS norm per head; or null
    const void* key_norm;
    Projection qkv, out, up, gate, down;  // rows of qkv are [groups, heads + 2, head_dim]; gate: gated activations only
    RotaryTables tables;                  // no rotation if cos is null
    // cache [batch, >= length + seq, groups, head_dim]; new tokens are written at `length`
    void* keys;
    void* values;
    int64_t cache_batch_stride;
    int64_t length;           // tokens in the cache
    const int32_t* segments;  // [batch, length + seq], or null
    const float* slopes;      // [groups * heads], or null
    float scale, softcap;
    int64_t window;
    const void* stream;  // [batch, seq, hidden] contiguous
    const void* delta;   // [batch, seq, hidden], not yet added to the stream; or null
};

// Writes the block's outputs stream and delta, [batch, seq, hidden] contiguous.
void decode_block_cpu(const DecodeBlock& op, void* stream, void* delta, const Parallel& parallel);

}  // namespace neox
