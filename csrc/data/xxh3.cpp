#include "data/xxh3.h"

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "data/clones.h"

namespace neox::data {

namespace {

constexpr uint64_t kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u,
                                  0x27D4EB2F165667C5u};
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9u;
constexpr uint64_t kPrimeMx2 = 0x9FB21C651E98DF25u;

constexpr uint64_t kStripe = 64;
constexpr uint64_t kStripes = 16;  // per block: the number of 8-byte shifts of the secret
constexpr uint64_t kBlock = kStripe * kStripes;
constexpr uint64_t kSecretBytes = 192;

// The default secret, section "Default secret" of the specification.
alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

template <typename T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

uint64_t load64(const uint8_t* from) { return load<uint64_t>(from); }
uint64_t rotate(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t hash) {
    hash = (hash ^ (hash >> 37)) * kPrimeMx1;
    return hash ^ (hash >> 32);
}

uint64_t avalanche_xxh64(uint64_t hash) {
    hash = (hash ^ (hash >> 33)) * kPrime64[1];
    hash = (hash ^ (hash >> 29)) * kPrime64[2];
    return hash ^ (hash >> 32);
}

uint64_t mix16(const uint8_t* at, const uint8_t* secret) {
    return fold(load64(at) ^ load64(secret), load64(at + 8) ^ load64(secret + 8));
}

uint64_t up_to_16(const uint8_t* at, uint64_t count) {
    if (count > 8) {
        const uint64_t low = load64(at) ^ load64(kSecret + 24) ^ load64(kSecret + 32);
        const uint64_t high = load64(at + count - 8) ^ load64(kSecret + 40) ^ load64(kSecret + 48);
        return avalanche(count + __builtin_bswap64(low) + high + fold(low, high));
    }
    if (count >= 4) {
        const uint64_t both = load<uint32_t>(at + count - 4) + (static_cast<uint64_t>(load<uint32_t>(at)) << 32);
        uint64_t hash = both ^ load64(kSecret + 8) ^ load64(kSecret + 16);
        hash = (hash ^ rotate(hash, 49) ^ rotate(hash, 24)) * kPrimeMx2;
        hash = (hash ^ ((hash >> 35) + count)) * kPrimeMx2;
        return hash ^ (hash >> 28);
    }
    if (count == 0) return avalanche_xxh64(load64(kSecret + 56) ^ load64(kSecret + 64));
    const uint32_t all = (static_cast<uint32_t>(at[0]) << 16) | (static_cast<uint32_t>(at[count >> 1]) << 24) |
                         at[count - 1] | static_cast<uint32_t>(count << 8);
    return avalanche_xxh64(all ^ load<uint32_t>(kSecret) ^ load<uint32_t>(kSecret + 4));
}

uint64_t up_to_240(const uint8_t* at, uint64_t count) {
    uint64_t hash = count * kPrime64[0];
    if (count <= 128) {
        for (uint64_t i = (count - 1) / 32 + 1; i-- > 0;)
            hash += mix16(at + 16 * i, kSecret + 32 * i) + mix16(at + count - 16 * (i + 1), kSecret + 32 * i + 16);
        return avalanche(hash);
    }
    for (uint64_t i = 0; i < 8; ++i) hash += mix16(at + 16 * i, kSecret + 16 * i);
    hash = avalanche(hash);
    for (uint64_t i = 8; i < count / 16; ++i) hash += mix16(at + 16 * i, kSecret + 16 * (i - 8) + 3);
    return avalanche(hash + mix16(at + count - 16, kSecret + 136 - 17));
}

// Eight lanes at a time, for any vector width.
typedef uint64_t Lanes __attribute__((vector_size(64)));

// Hashes `stripes` stripes from `at` with the secret from `secret`. Each word is added to the neighbouring lane; since
// addition commutes, these sums are accumulated separately and swapped once at the end.
inline __attribute__((always_inline)) void accumulate(std::array<uint64_t, 8>& lanes, const uint8_t* at,
                                                      const uint8_t* secret, uint64_t stripes) {
    Lanes sum, beside = {};
    std::memcpy(&sum, lanes.data(), sizeof sum);
    for (uint64_t i = 0; i < stripes; ++i) {
        Lanes word, key;
        std::memcpy(&word, at + kStripe * i, sizeof word);
        std::memcpy(&key, secret + 8 * i, sizeof key);
        key ^= word;
        beside += word;
        sum += (key & 0xFFFFFFFFu) * (key >> 32);
    }
    for (int i = 0; i < 8; ++i) lanes[i] = sum[i] + beside[i ^ 1];
}

inline __attribute__((always_inline)) void scramble(std::array<uint64_t, 8>& lanes) {
    for (int i = 0; i < 8; ++i) {
        const uint64_t lane = lanes[i] ^ (lanes[i] >> 47) ^ load64(kSecret + kSecretBytes - kStripe + 8 * i);
        lanes[i] = lane * kPrime32[0];
    }
}

NEOX_CLONES void digest_blocks(std::array<uint64_t, 8>& lanes, const uint8_t* at, uint64_t blocks) {
    for (uint64_t i = 0; i < blocks; ++i) {
        accumulate(lanes, at + kBlock * i, kSecret, kStripes);
        scramble(lanes);
    }
}

uint64_t digest_end(std::array<uint64_t, 8> lanes, const uint8_t* at, uint64_t left, uint64_t count) {
    accumulate(lanes, at, kSecret, (left - 1) / kStripe);
    accumulate(lanes, at + left - kStripe, kSecret + kSecretBytes - kStripe - 7, 1);
    uint64_t hash = count * kPrime64[0];
    for (int i = 0; i < 4; ++i)
        hash += fold(lanes[2 * i] ^ load64(kSecret + 11 + 16 * i), lanes[2 * i + 1] ^ load64(kSecret + 19 + 16 * i));
    return avalanche(hash);
}

}  // namespace

uint64_t xxh3(const void* bytes, uint64_t count) { return Xxh3(bytes, count).finish(); }

Xxh3::Xxh3(const void* bytes, uint64_t count)
    : bytes_(static_cast<const uint8_t*>(bytes)),
      count_(count),
      lanes_{kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2], kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]} {}

void Xxh3::advance(uint64_t available) {
    if (count_ <= 240) return;
    // The last block is never complete: its last stripe is handled differently.
    const uint64_t blocks = ((available < count_ ? available : count_ - 1) - done_) / kBlock;
    digest_blocks(lanes_, bytes_ + done_, blocks);
    done_ += blocks * kBlock;
}

uint64_t Xxh3::finish() {
    if (count_ <= 16) return up_to_16(bytes_, count_);
    if (count_ <= 240) return up_to_240(bytes_, count_);
    advance(count_);
    return digest_end(lanes_, bytes_ + done_, count_ - done_, count_);
}

HashedRead read_xxh3(int descriptor, uint64_t offset, void* out, uint64_t count) {
    constexpr uint64_t kPart = 256 << 10;  // stays in the second-level cache between the read and the hash
    auto* bytes = static_cast<uint8_t*>(out);
    Xxh3 digest(bytes, count);
    HashedRead found;
    while (found.bytes < count) {
        const uint64_t part = std::min(count - found.bytes, kPart);
        const ssize_t got = ::pread(descriptor, bytes + found.bytes, part, static_cast<off_t>(offset + found.bytes));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            found.error = got < 0 ? errno : 0;
            return found;
        }
        found.bytes += static_cast<uint64_t>(got);
        digest.advance(found.bytes);
    }
    found.hash = digest.finish();
    return found;
}

}  // namespace neox::data
