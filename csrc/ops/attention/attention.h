// Exact softmax attention, computed in tiles with O(queries + keys) memory.
//
//   score(i, j) = cap(scale * q_i . k_j) - slope * |position(i) - j|   cap(x) = softcap * tanh(x / softcap), or x
//   lse_i       = log sum over visible j of exp(score(i, j))
//   p(i, j)     = exp(score(i, j) - lse_i) if j is visible to i, else 0
//   o_i         = sum over j of p(i, j) keep(i, j) v_j                  keep: 0 or 1 / (1 - dropout), from Philox
//
//   dv_j = sum_i p(i, j) keep(i, j) do_i       dp = keep(i, j) do_i . v_j      delta_i = do_i . o_i
//   ds   = p (dp - delta_i) cap'               dq_i = scale sum_j ds k_j       dk_j = scale sum_i ds q_i
//
// position(i) = i + keys - queries: the last query is aligned with the last key. A row that sees no key gives zeros and
// lse = -inf.
//
// Shapes: q, o [b, s, n, d], k, v [b, t, g, d], lse [b, n, s]; n query heads share g kv heads. The docs of
// neox/ops/attention.py list the layouts.
//
// Work per visible (query, key) pair and channel: forward 4 floating-point operations, backward 10 (14 if dq takes a
// pass of its own). Bytes moved, in elements: forward q, k, v and o once, and 4 bytes of lse per row. Backward q, k, v,
// o, do read and dq, dk, dv written once; dq summed with atomics adds fp32 read-modify-writes of dq. Keys and values
// are read again by every block of rows, from the L2 cache.
//
// Source: online softmax, Milakov & Gimelshein, arXiv:1805.02867; tiling and recomputation of the probabilities in the
// backward (section 3.2), Dao et al., arXiv:2205.14135 and arXiv:2307.08691. docs/attention.md describes the tiles.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace neox {

// Strides in elements. Query head h * heads + i of kv group h starts at h * group + i * head; the channels of a head
// are contiguous.
struct AttentionStrides {
    int64_t batch, sequence, group, head;
};

struct Attention {
    DType dtype;
    int64_t batch, queries, keys;
    int64_t groups, heads;  // kv heads; query heads per kv head
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
    float softcap;            // 0: no softcap
    float dropout;            // probability of zeroing, < 1
    uint64_t seed[2];         // of the dropout mask: key and high counter of Philox
    bool hopper;              // CUDA: the kernels for sm_90a; in the backward if dq is summed with atomics
};

struct AttentionGradients {
    const void* dout;  // [batch, queries, groups, heads, head_dim]
    AttentionStrides dout_strides;
    const void* out;   // [batch, queries, groups * heads, head_dim] contiguous, from the forward
    const float* lse;  // [batch, groups * heads, queries], from the forward
    void *dq, *dk, *dv;
    AttentionStrides dq_strides, dk_strides, dv_strides;
};

// out [batch, queries, groups * heads, head_dim] contiguous; lse [batch, groups * heads, queries].
void attention_forward_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel);

// Writes all of dq, dk and dv. The bits do not depend on the number of threads.
void attention_backward_cpu(const Attention& in, const AttentionGradients& grad, int64_t threads,
                            const Parallel& parallel);

// bfloat16 and float16, head_dim up to kMaxChannelsCuda, queries * heads below 2^31. `workspace` has the size that the
// corresponding function returns, in bytes, and is aligned to 16. The launchers return null or CUDA's error message.
constexpr int64_t kMaxChannelsCuda = 256;
int64_t attention_forward_workspace_cuda(const Attention& in);
const char* attention_forward_cuda(const Attention& in, void* out, float* lse, void* workspace, Stream stream);

// Why the kernels for sm_90a do not take a problem on the current device, or null.
const char* attention_hopper_problem_cuda(const Attention& in);

// deterministic: identical bits in every run, at 7 matrix products instead of 5. head_dim above 128 and the general
// kernels are always deterministic.
int64_t attention_backward_workspace_cuda(const Attention& in, bool deterministic);

// Shared memory per block in bytes: what forward and backward of a problem need, and the limit of the current device.
struct AttentionShared {
    int64_t forward, backward, limit;
};
AttentionShared attention_shared_cuda(int64_t head_dim, bool general);

const char* attention_backward_cuda(const Attention& in, const AttentionGradients& grad, bool deterministic,
                                    void* workspace, Stream stream);

}  // namespace neox
