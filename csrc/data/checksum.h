// XXH64 (xxHash specification 0.1.1, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
// Detects damage at memory speed. It is not cryptographic: it does not detect deliberate changes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace neox::data {

uint64_t checksum(const void* bytes, uint64_t count, uint64_t seed = 0);

// One checksum per block of `block_bytes`; the last block may be shorter.
std::vector<uint64_t> file_block_checksums(const std::string& path, uint64_t block_bytes);

// One checksum of a complete file.
uint64_t file_checksum(const std::string& path);

}  // namespace neox::data
