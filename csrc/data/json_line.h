// Fast parser for the text of common JSON lines. Anything unusual is left to the caller's full parser, which also
// reports errors. It accepts JSON with NaN, Infinity and numbers of any size, as Python's json writes and reads it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace neox::data {

// Memory for one text and kPadding bytes after it.
class TextBuffer {
  public:
    uint8_t* room(uint64_t count);  // space for `count` bytes; growing loses the content
    uint8_t* begin() { return bytes_.get(); }

  private:
    std::unique_ptr<uint8_t[]> bytes_;
    uint64_t capacity_ = 0;
};

enum class LineKind {
    text,    // an object with the key, whose value is a string
    blank,   // only white space
    unsure,  // anything else
};

// Reads one line [at, end), without its line feed. Bytes up to `limit` >= end may be read. For LineKind::text, `text`
// gets `count` bytes of valid UTF-8. If a key occurs twice, the last one counts.
LineKind read_json_line(const uint8_t* at, const uint8_t* end, const uint8_t* limit, const std::string& key,
                        TextBuffer& text, uint64_t& count);

}  // namespace neox::data
