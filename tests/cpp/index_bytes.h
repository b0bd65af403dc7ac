// Builds and checks .idx files from the table in csrc/data/indexed_dataset.h, without the code under test.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace data_test {

struct IndexParts {
    uint8_t code = 8;
    uint32_t token_bytes = 2;
    std::vector<int32_t> sizes;
    std::vector<int64_t> borders{0};
};

inline void append(std::vector<uint8_t>& out, const void* value, size_t bytes) {
    const auto* from = static_cast<const uint8_t*>(value);
    out.insert(out.end(), from, from + bytes);
}

inline std::vector<uint8_t> index_bytes(const IndexParts& parts) {
    std::vector<uint8_t> out{'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, parts.code};
    const uint64_t counts[2] = {parts.sizes.size(), parts.borders.size()};
    append(out, counts, sizeof counts);
    for (const int32_t size : parts.sizes) append(out, &size, sizeof size);
    int64_t offset = 0;
    for (const int32_t size : parts.sizes) {
        append(out, &offset, sizeof offset);
        offset += static_cast<int64_t>(size) * parts.token_bytes;
    }
    for (const int64_t border : parts.borders) append(out, &border, sizeof border);
    return out;
}

inline uint32_t bytes_of_code(uint8_t code) {
    return code == 1 || code == 2 ? 1 : code == 3 || code == 8 ? 2 : code == 4 ? 4 : code == 5 ? 8 : 0;
}

// Whether the bytes are a well-formed index.
inline bool is_index(const std::vector<uint8_t>& bytes) {
    const auto u64 = [&](size_t at) {
        uint64_t value;
        std::memcpy(&value, bytes.data() + at, 8);
        return value;
    };
    if (bytes.size() < 34 || std::memcmp(bytes.data(), "MMIDIDX\0\0", 9) != 0 || u64(9) != 1) return false;
    const uint32_t token_bytes = bytes_of_code(bytes[17]);
    const unsigned __int128 sequences = u64(18), borders = u64(26);
    if (token_bytes == 0 || borders == 0 || 34 + 12 * sequences + 8 * borders != bytes.size()) return false;
    unsigned __int128 offset = 0;
    for (size_t i = 0; i < sequences; ++i) {
        int32_t size;
        std::memcpy(&size, bytes.data() + 34 + 4 * i, 4);
        if (size < 0 || u64(34 + 4 * static_cast<size_t>(sequences) + 8 * i) != offset) return false;
        offset += uint64_t{token_bytes} * static_cast<uint32_t>(size);
    }
    const size_t documents = 34 + 12 * static_cast<size_t>(sequences);
    for (size_t d = 0; d < borders; ++d) {
        const uint64_t border = u64(documents + 8 * d);
        if (d == 0 ? border != 0 : border < u64(documents + 8 * (d - 1))) return false;
    }
    return u64(bytes.size() - 8) == sequences;
}

}  // namespace data_test
