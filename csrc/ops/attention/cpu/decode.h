// The forward for a few query rows per kv head (attention_decode_cpu.cpp). No torch.
#pragma once

#include "ops/attention/attention.h"

namespace neox {

constexpr int64_t kDecodeRows = 8;  // (query, head) pairs per kv head up to which lanes of channels beat lanes of queries

// Whether attention_decode_cpu does this problem, and does it faster than the blocks.
bool attention_decodes(const Attention& in);

// As attention_forward_cpu.
void attention_decode_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel);

}  // namespace neox
