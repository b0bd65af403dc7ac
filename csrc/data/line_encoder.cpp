#include "data/line_encoder.h"

#include <cstring>

namespace neox::data {

namespace {

void add_id(int64_t id, LineState& state) {
    uint32_t* end = state.ids.room(1);
    *end = static_cast<uint32_t>(id);
    state.ids.set_end(end + 1);
}

// Encodes the text in state.text. A text without ids is counted as empty and not as a document.
void add_document(const TextEncoder& encoder, uint64_t count, const LineOptions& options, LineState& state) {
    const uint64_t before = state.ids.size();
    if (options.bos >= 0) add_id(options.bos, state);
    const uint64_t first = state.ids.size();
    encoder.encode(state.text.begin(), count, state);
    if (state.ids.size() == first) {
        state.ids.shrink_to(before);
        ++state.empty;
        return;
    }
    if (options.eod >= 0) add_id(options.eod, state);
    state.sizes.push_back(static_cast<int32_t>(state.ids.size() - before));
}

}  // namespace

void LineState::clear() {
    ids.clear();
    sizes.clear();
    unsure.clear();
    blank = empty = 0;
}

void encode_lines(const TextEncoder& encoder, const uint8_t* bytes, uint64_t count, const LineOptions& options,
                  LineState& state) {
    const uint8_t* const limit = bytes + count;
    uint64_t line = 0;
    for (const uint8_t* at = bytes; at < limit; ++line) {
        const auto* feed = static_cast<const uint8_t*>(std::memchr(at, '\n', static_cast<size_t>(limit - at)));
        const uint8_t* const end = feed == nullptr ? limit : feed;
        uint64_t length = 0;
        switch (read_json_line(at, end, limit, options.key, state.text, length)) {
            case LineKind::text:
                add_document(encoder, length, options, state);
                break;
            case LineKind::blank:
                ++state.blank;
                break;
            case LineKind::unsure:
                state.unsure.push_back(
                    {static_cast<uint64_t>(at - bytes), static_cast<uint64_t>(end - bytes), line, state.sizes.size()});
                break;
        }
        at = feed == nullptr ? limit : feed + 1;
    }
}

bool encode_text(const TextEncoder& encoder, const uint8_t* bytes, uint64_t count, const LineOptions& options,
                 LineState& state) {
    if (!valid_utf8(bytes, count)) return false;
    std::memcpy(state.text.room(count), bytes, count);
    add_document(encoder, count, options, state);
    return true;
}

std::unique_ptr<LineState> LineStates::acquire() {
    const std::lock_guard<std::mutex> held(mutex_);
    if (idle_.empty()) return std::make_unique<LineState>();
    std::unique_ptr<LineState> state = std::move(idle_.back());
    idle_.pop_back();
    return state;
}

void LineStates::release(std::unique_ptr<LineState> state) {
    const std::lock_guard<std::mutex> held(mutex_);
    idle_.push_back(std::move(state));
}

}  // namespace neox::data
