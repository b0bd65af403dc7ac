#include "data/checksum.h"

#include <cstring>

#include "data/fault.h"
#include "data/file.h"

namespace neox::data {

namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

uint64_t rotate(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

template <typename T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

uint64_t round_lane(uint64_t lane, uint64_t word) { return rotate(lane + word * kPrime2, 31) * kPrime1; }

uint64_t merge_lane(uint64_t hash, uint64_t lane) { return (hash ^ round_lane(0, lane)) * kPrime1 + kPrime4; }

}  // namespace

uint64_t checksum(const void* bytes, uint64_t count, uint64_t seed) {
    const auto* at = static_cast<const uint8_t*>(bytes);
    uint64_t left = count;
    uint64_t hash;
    if (left >= 32) {
        uint64_t lane[4] = {seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1};
        for (; left >= 32; left -= 32, at += 32)
            for (int i = 0; i < 4; ++i) lane[i] = round_lane(lane[i], load<uint64_t>(at + 8 * i));
        hash = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);
        for (uint64_t value : lane) hash = merge_lane(hash, value);
    } else {
        hash = seed + kPrime5;
    }
    hash += count;
    for (; left >= 8; left -= 8, at += 8)
        hash = rotate(hash ^ round_lane(0, load<uint64_t>(at)), 27) * kPrime1 + kPrime4;
    if (left >= 4) {
        hash = rotate(hash ^ (load<uint32_t>(at) * kPrime1), 23) * kPrime2 + kPrime3;
        left -= 4, at += 4;
    }
    for (; left > 0; --left, ++at) hash = rotate(hash ^ (*at * kPrime5), 11) * kPrime1;
    hash = (hash ^ (hash >> 33)) * kPrime2;
    hash = (hash ^ (hash >> 29)) * kPrime3;
    return hash ^ (hash >> 32);
}

std::vector<uint64_t> file_block_checksums(const std::string& path, uint64_t block_bytes) {
    if (block_bytes == 0) throw Fault("block_bytes must be positive").found("0");
    const InputFile file(path);
    std::vector<uint8_t> buffer(std::min(block_bytes, file.size_at_open()));
    std::vector<uint64_t> sums;
    for (uint64_t offset = 0; offset < file.size_at_open(); offset += block_bytes) {
        const uint64_t bytes = std::min(block_bytes, file.size_at_open() - offset);
        file.read_at(buffer.data(), bytes, offset);
        sums.push_back(checksum(buffer.data(), bytes));
    }
    return sums;
}

uint64_t file_checksum(const std::string& path) {
    const InputFile file(path);
    const Mapping map(file);
    return checksum(map.bytes(), file.size_at_open());
}

}  // namespace neox::data
