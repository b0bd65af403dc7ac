// Encodes blocks of a corpus: JSON lines, or one text.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "data/json_line.h"
#include "data/text_encoder.h"

namespace neox::data {

// A line that the fast parser leaves to the caller: bytes [first, last) of the block, its line number `line`, before
// document `document`.
struct UnsureLine {
    uint64_t first, last, line, document;
};

struct LineState : TextEncoder::State {
    TextBuffer text;
    std::vector<int32_t> sizes;  // ids of each document
    std::vector<UnsureLine> unsure;
    uint64_t blank = 0, empty = 0;

    void clear();
};

struct LineOptions {
    std::string key;   // of the text in a JSON object
    int64_t eod = -1;  // id appended to each document; -1 for none
    int64_t bos = -1;  // id prepended to each document; -1 for none
};

// Encodes complete lines; the last one may lack its line feed.
void encode_lines(const TextEncoder& encoder, const uint8_t* bytes, uint64_t count, const LineOptions& options,
                  LineState& state);

// Encodes one text. Returns false if it is not UTF-8.
bool encode_text(const TextEncoder& encoder, const uint8_t* bytes, uint64_t count, const LineOptions& options,
                 LineState& state);

// A pool of encoder states for several threads: as many as ever run at the same time.
class LineStates {
  public:
    std::unique_ptr<LineState> acquire();
    void release(std::unique_ptr<LineState> state);

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<LineState>> idle_;
};

}  // namespace neox::data
