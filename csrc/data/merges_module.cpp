#include "data/merges_module.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "data/byte_pair.h"

namespace py = pybind11;

namespace neox::data {
namespace {

// A growing array of bytes, always followed by one readable word.
class Bytes {
  public:
    size_t size() const { return size_; }
    const char* at(size_t place) const { return bytes_.data() + place; }
    char* room(size_t count) {
        if (bytes_.size() < size_ + count + sizeof(uint64_t)) bytes_.resize(2 * (size_ + count) + sizeof(uint64_t));
        return bytes_.data() + size_;
    }
    void set_size(size_t size) { size_ = size; }

  private:
    std::vector<char> bytes_ = std::vector<char>(sizeof(uint64_t));
    size_t size_ = 0;
};

// Maps the letters of a byte-level vocabulary to bytes.
class Letters {
  public:
    static constexpr size_t kNoSpace = SIZE_MAX;

    explicit Letters(const std::u32string& letters) {
        for (size_t byte = 0; byte < letters.size(); ++byte) {
            if (bytes_.size() <= letters[byte]) bytes_.resize(letters[byte] + 1, -1);
            bytes_[letters[byte]] = static_cast<int16_t>(byte);
        }
    }

    // Appends the bytes of a text; false if a letter stands for no byte. The first space is left out, and `space` gets
    // its position.
    bool append(const py::handle& text, Bytes& out, size_t& space) const {
        const auto length = static_cast<size_t>(PyUnicode_GET_LENGTH(text.ptr()));
        const void* data = PyUnicode_DATA(text.ptr());
        switch (PyUnicode_KIND(text.ptr())) {
            case PyUnicode_1BYTE_KIND:
                return append(static_cast<const Py_UCS1*>(data), length, out, space);
            case PyUnicode_2BYTE_KIND:
                return append(static_cast<const Py_UCS2*>(data), length, out, space);
            default:
                return false;
        }
    }

  private:
    template <typename Letter>
    bool append(const Letter* letters, size_t length, Bytes& out, size_t& space) const {
        char* const first = out.room(length);
        char* to = first;
        for (size_t i = 0; i < length; ++i) {
            const size_t letter = letters[i];
            if (letter < bytes_.size() && bytes_[letter] >= 0) {
                *to++ = static_cast<char>(bytes_[letter]);
            } else {
                if (letter != ' ' || space != kNoSpace) return false;
                space = static_cast<size_t>(to - first);
            }
        }
        out.set_size(out.size() + static_cast<size_t>(to - first));
        return true;
    }

    std::vector<int16_t> bytes_;  // by letter; -1 for none
};

// The tokens of a byte-level vocabulary by their bytes.
class ByteVocabulary {
  public:
    ByteVocabulary(const std::u32string& of_bytes, const py::dict& vocab) : letters(of_bytes) {
        size_t bits = 4;
        while ((size_t{1} << bits) < 2 * vocab.size()) ++bits;
        shift_ = 64 - bits;
        slots_.assign(size_t{1} << bits, 0);
        tokens_.reserve(vocab.size());
        for (const auto& [token, id] : vocab) {
            if (!PyUnicode_Check(token.ptr())) throw py::type_error("a token is not a string");
            const size_t start = bytes_.size();
            size_t space = Letters::kNoSpace;
            if (!letters.append(token, bytes_, space) || space != Letters::kNoSpace) {
                bytes_.set_size(start);  // no merge produces it
                continue;
            }
            const long long number = PyLong_AsLongLong(id.ptr());
            if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
            if (number < 0 || number > UINT32_MAX)
                throw py::value_error("id " + std::to_string(number) + " of a token");
            tokens_.push_back({start, bytes_.size() - start, static_cast<uint32_t>(number)});
            size_t at = hash(bytes_.at(start), bytes_.size() - start) >> shift_;
            while (slots_[at] != 0) at = (at + 1) & (slots_.size() - 1);
            slots_[at] = static_cast<uint32_t>(tokens_.size());
        }
    }

    // The id of a token; -1 if there is none. Reads one word past it.
    int64_t find(const char* wanted, size_t length) const {
        for (size_t at = hash(wanted, length) >> shift_; slots_[at] != 0; at = (at + 1) & (slots_.size() - 1)) {
            const Token& token = tokens_[slots_[at] - 1];
            if (token.length == length && same(bytes_.at(token.start), wanted, length)) return token.id;
        }
        return -1;
    }

    const Letters letters;

  private:
    struct Token {
        size_t start, length;
        uint32_t id;
    };
    static uint64_t word(const char* at, size_t left) {
        uint64_t word;
        std::memcpy(&word, at, sizeof word);
        return left >= sizeof word ? word : word & ((uint64_t{1} << 8 * left) - 1);
    }
    static bool same(const char* one, const char* other, size_t length) {
        for (size_t i = 0; i < length; i += 8)
            if (word(one + i, length - i) != word(other + i, length - i)) return false;
        return true;
    }
    static uint64_t hash(const char* bytes, size_t length) {
        uint64_t mixed = length;
        for (size_t i = 0; i < length; i += 8) {
            mixed = (mixed ^ word(bytes + i, length - i)) * 0x9E3779B97F4A7C15u;
            mixed ^= mixed >> 29;
        }
        return mixed * 0x9E3779B97F4A7C15u;
    }

    Bytes bytes_;
    std::vector<Token> tokens_;
    std::vector<uint32_t> slots_;  // open addressing: number of a token plus one; 0 is free
    size_t shift_;
};

// Whether a byte can occur in UTF-8.
bool occurs(int byte) { return byte != 0xC0 && byte != 0xC1 && byte < 0xF5; }

// Reads the two sides of a merge into `both` and returns where the second begins; Letters::kNoSpace if a side is not
// the text of a token.
size_t read_merge(const Letters& letters, const py::handle& merge, Bytes& both) {
    const auto refuse = [&](const char* reason) {
        throw py::value_error("merge " + std::string(py::str(merge)) + " " + reason);
    };
    both.set_size(0);
    size_t left = Letters::kNoSpace;
    if (PyUnicode_Check(merge.ptr())) {
        if (!letters.append(merge, both, left)) return Letters::kNoSpace;
        if (left == Letters::kNoSpace) refuse("has no space");
        return left;
    }
    const auto pair = py::cast<py::sequence>(merge);
    if (pair.size() != 2) refuse("is not a pair");
    for (const py::object side : pair) {
        if (!PyUnicode_Check(side.ptr())) refuse("is not of strings");
        size_t space = Letters::kNoSpace;
        if (!letters.append(side, both, space) || space != Letters::kNoSpace) return Letters::kNoSpace;
        if (left == Letters::kNoSpace) left = both.size();
    }
    return left;
}

}  // namespace

Merges read_merges(const std::u32string& letters, const py::dict& vocab, const py::list& merges) {
    const ByteVocabulary tokens(letters, vocab);
    Merges found;
    found.byte_ids.assign(256, BytePairs::kNone);
    Bytes text;
    for (int byte = 0; byte < 256; ++byte) {
        *text.room(1) = static_cast<char>(byte);
        const int64_t id = tokens.find(text.at(0), 1);
        if (id < 0 && occurs(byte)) throw py::value_error("byte " + std::to_string(byte) + " is not in the vocabulary");
        if (id >= BytePairs::kMaxIds) throw py::value_error("id " + std::to_string(id) + " of a byte");
        if (id >= 0) found.byte_ids[static_cast<size_t>(byte)] = static_cast<uint32_t>(id);
    }
    for (const auto& merge : merges) {
        const size_t left = read_merge(tokens.letters, merge, text);
        const char* const bytes = text.at(0);
        const size_t size = text.size();
        int64_t ids[3] = {-1, -1, -1};
        if (left != Letters::kNoSpace)
            ids[0] = tokens.find(bytes, left), ids[1] = tokens.find(bytes + left, size - left),
            ids[2] = tokens.find(bytes, size);
        if (*std::min_element(ids, ids + 3) < 0)
            throw py::value_error("merge " + std::string(py::str(merge)) +
                                  " is of tokens that are not in the vocabulary");
        const int64_t largest = *std::max_element(ids, ids + 3);
        if (largest >= BytePairs::kMaxIds) throw py::value_error("id " + std::to_string(largest) + " of a merge");
        found.left.push_back(static_cast<uint32_t>(ids[0]));
        found.right.push_back(static_cast<uint32_t>(ids[1]));
        found.merged.push_back(static_cast<uint32_t>(ids[2]));
    }
    return found;
}

}  // namespace neox::data
