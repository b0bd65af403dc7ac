// Forward for a few query rows per kv head (attention_decode_cpu.cpp). No torch.
#pragma once

#include "ops/attention/attention.h"

namespace neox {

// up to as many (query, head) pairs per kv head, channels in the lanes are faster than queries in the lanes
constexpr int64_t kDecodeRows = 8;

// Whether attention_decode_cpu supports this problem and is faster than the query blocks.
bool attention_decodes(const Attention& in);

// Same contract as attention_forward_cpu.
void attention_decode_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel);

}  // namespace neox
