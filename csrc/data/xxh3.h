// XXH3, 64 bits, seed 0 (xxHash specification, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): finds damage at the speed of
// memory, several times that of XXH64. Not a cryptographic hash: it guards against disks, not against attackers.
#pragma once

#include <array>
#include <cstdint>

namespace neox::data {

uint64_t xxh3(const void* bytes, uint64_t count);

// The same over a range that becomes available from its front on, such as a file that is read: each part is digested while it is in the cache.
class Xxh3 {
  public:
    // The `count` bytes at `bytes` need not be there yet.
    Xxh3(const void* bytes, uint64_t count);

    // The first `available` bytes are there.
    void advance(uint64_t available);

    // All bytes are there.
    uint64_t finish();

  private:
    const uint8_t* bytes_;
    uint64_t count_;
    uint64_t done_ = 0;  // bytes digested, in whole blocks of the algorithm
    alignas(64) std::array<uint64_t, 8> lanes_;
};

}  // namespace neox::data
