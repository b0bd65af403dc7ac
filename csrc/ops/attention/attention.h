// Exact softmax attention in tiles: O(queries + keys) memory.
//
//   score(i, j) = cap(scale * q_i . k_j) - slope * |position(i) - j|      cap(x) = softcap * tanh(x / softcap), or x
//   p(i, j)     = exp(score(i, j) - lse_i) where j is visible to i, else 0     lse_i = log sum over visible j of exp(score(i, j))
//   o_i         = sum over j of p(i, j) keep(i, j) v_j                         keep: 0 or 1 / (1 - dropout), from Philox
//
// position(i) = i + keys - queries: the last query is aligned with the last key. A row that sees no key gives zeros and lse = -inf.
// Method: online softmax over tiles of keys (Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135), backward by
// recomputing the probabilities from lse (arXiv:2205.14135, section 3.2).
//
// Arithmetic per visible pair and channel: forward 4 operations, backward 10. docs/attention.md says how the tiles are laid out.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

// Distances between neighbours in elements. Query head h * heads + i of kv group h lies at h * group + i * head; the channels of a head
// are contiguous.
struct AttentionStrides {
    int64_t batch, sequence, group, head;
};

struct Attention {
    DType dtype;
    int64_t batch, queries, keys;
    int64_t groups, heads;  // kv heads, and query heads that share each
    int64_t head_dim;
    const void* q;  // [batch, queries, groups, heads, head_dim]
    const void* k;  // [batch, keys, groups, head_dim]
    const void* v;  // as k
    AttentionStrides q_strides, k_strides, v_strides;
    float scale;
    bool causal;              // key j is visible to query i only if j <= position(i)
    int64_t window;           // ... and only if j > position(i) - window; 0: no window
    const int32_t* segments;  // [batch, keys] or null: ... and only if segments[position(i)] == segments[j]
    const float* slopes;      // [groups * heads] or null: ALiBi
    float softcap;            // 0: none
    float dropout;            // probability of zeroing, < 1
    uint64_t seed[2];         // of the dropout mask: key and high counter of Philox
};

struct AttentionGradients {
    const void* dout;  // [batch, queries, groups, heads, head_dim]
    AttentionStrides dout_strides;
    const void* out;   // [batch, queries, groups * heads, head_dim] contiguous, of the forward
    const float* lse;  // [batch, groups * heads, queries], of the forward
    void *dq, *dk, *dv;
    AttentionStrides dq_strides, dk_strides, dv_strides;
};

// out [batch, queries, groups * heads, head_dim] contiguous; lse [batch, groups * heads, queries].
void attention_forward_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel);

// Writes all of dq, dk and dv. The result is the same bits for every number of threads.
void attention_backward_cpu(const Attention& in, const AttentionGradients& grad, int64_t threads, const Parallel& parallel);

// bfloat16 and float16, head_dim up to kMostChannelsCuda, queries * heads below 2^31. `workspace`: as many bytes as the function above says,
// aligned to 16.
constexpr int64_t kMostChannelsCuda = 256;
int64_t attention_forward_workspace_cuda(const Attention& in);
const char* attention_forward_cuda(const Attention& in, void* out, float* lse, void* workspace, Stream stream);

// deterministic: the same bits in every run, at 7 products instead of 5 where head_dim is at most 128 (above it, always so).
int64_t attention_backward_workspace_cuda(const Attention& in, bool deterministic);

// Shared memory of one block, bytes: what the forward and the backward of a problem need, and what a block of the current device may have.
struct AttentionShared {
    int64_t forward, backward, limit;
};
AttentionShared attention_shared_cuda(int64_t head_dim, bool general);

const char* attention_backward_cuda(const Attention& in, const AttentionGradients& grad, bool deterministic, void* workspace, Stream stream);

}  // namespace neox
