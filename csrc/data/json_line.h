// The text of a JSON line, for the lines that are beyond doubt. Whatever is unusual is left to the caller's full parser, which also
// says what is wrong with it. What is accepted here is JSON, with NaN and Infinity and numbers of any size, as Python's json writes and reads it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace neox::data {

// Memory for one text and kPadding bytes behind it.
class TextBuffer {
  public:
    uint8_t* room(uint64_t count);  // for `count` bytes; the content is lost when it grows
    uint8_t* begin() { return bytes_.get(); }

  private:
    std::unique_ptr<uint8_t[]> bytes_;
    uint64_t capacity_ = 0;
};

enum class LineKind {
    text,    // an object with the key, whose value is a string
    blank,   // nothing but white space
    unsure,  // anything else
};

// Reads one line [at, end) without its line feed. `limit` >= end: bytes up to there may be read. For LineKind::text, `text` holds
// `count` bytes of valid UTF-8; of a key that occurs twice the last one counts.
LineKind read_json_line(const uint8_t* at, const uint8_t* end, const uint8_t* limit, const std::string& key, TextBuffer& text, uint64_t& count);

}  // namespace neox::data
