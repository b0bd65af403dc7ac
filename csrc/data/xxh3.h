// XXH3, 64 bits, seed 0 (xxHash specification, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
// Detects damage at memory speed, several times as fast as XXH64. It is not cryptographic: it does not detect
// deliberate changes.
#pragma once

#include <array>
#include <cstdint>

namespace neox::data {

uint64_t xxh3(const void* bytes, uint64_t count);

// The same for bytes that arrive in order, such as a file that is being read: each part is hashed while it is in the
// cache.
class Xxh3 {
  public:
    // The `count` bytes at `bytes` may be written later.
    Xxh3(const void* bytes, uint64_t count);

    // Hashes what is complete of the first `available` bytes, which have been written.
    void advance(uint64_t available);

    // Hashes the rest; all bytes have been written.
    uint64_t finish();

  private:
    const uint8_t* bytes_;
    uint64_t count_;
    uint64_t done_ = 0;  // bytes hashed, in complete blocks of the algorithm
    alignas(64) std::array<uint64_t, 8> lanes_;
};

// What read_xxh3 read: fewer bytes than asked for where the file ends or a read fails; `error` is then its errno, else
// 0.
struct HashedRead {
    uint64_t hash = 0, bytes = 0;
    int error = 0;
};

// Reads `count` bytes of a file from `offset` into `out` and hashes them, one cache-sized part after the other. The
// hash is 0 unless all were read.
HashedRead read_xxh3(int descriptor, uint64_t offset, void* out, uint64_t count);

}  // namespace neox::data
