#include "data/packing.h"

#include <string>

#include "data/fault.h"

namespace neox::data {
namespace {

// A set of numbers below a bound that finds its smallest member >= a number: one bit per number, and levels above with
// a bit for every word that is not empty. Three levels cover 262,144 numbers, six cover int32.
class SortedSet {
  public:
    explicit SortedSet(int64_t bound) {
        do {
            bound = (bound + 63) / 64;
            levels_.emplace_back(static_cast<size_t>(bound));
        } while (bound > 1);
    }

    void insert(int64_t value) {
        for (auto& level : levels_) {
            level[static_cast<size_t>(value / 64)] |= uint64_t{1} << (value % 64);
            value /= 64;
        }
    }

    void erase(int64_t value) {
        for (auto& level : levels_) {
            uint64_t& word = level[static_cast<size_t>(value / 64)];
            word &= ~(uint64_t{1} << (value % 64));
            if (word != 0) return;
            value /= 64;
        }
    }

    // Smallest member >= `value`; -1 if there is none.
    int64_t at_least(int64_t value) const {
        for (size_t level = 0; level < levels_.size(); ++level) {
            const auto word = static_cast<size_t>(value / 64);
            if (word >= levels_[level].size()) return -1;
            const uint64_t above = levels_[level][word] >> (value % 64);
            if (above != 0) return descend(level, value + __builtin_ctzll(above));
            value = value / 64 + 1;
        }
        return -1;
    }

  private:
    int64_t descend(size_t level, int64_t value) const {
        while (level-- > 0) value = value * 64 + __builtin_ctzll(levels_[level][static_cast<size_t>(value)]);
        return value;
    }

    std::vector<std::vector<uint64_t>> levels_;
};

// Numbers of the segments from the longest to the shortest; equal sizes keep their order.
std::vector<int64_t> longest_first(const int32_t* sizes, int64_t count, int64_t capacity) {
    std::vector<int64_t> next(static_cast<size_t>(capacity) + 2);
    for (int64_t i = 0; i < count; ++i) {
        if (sizes[i] < 1 || sizes[i] > capacity)
            throw Fault("segment does not fit a sample")
                .at("segment " + std::to_string(i))
                .found(std::to_string(sizes[i]))
                .expected("1 to " + std::to_string(capacity));
        ++next[static_cast<size_t>(capacity - sizes[i]) + 1];
    }
    for (size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
    std::vector<int64_t> order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i)
        order[static_cast<size_t>(next[static_cast<size_t>(capacity - sizes[i])]++)] = i;
    return order;
}

}  // namespace

Packing best_fit(const int32_t* sizes, int64_t count, int64_t capacity) {
    if (capacity < 1 || capacity > INT32_MAX)
        throw Fault("capacity of a sample is out of range").found(std::to_string(capacity));
    const std::vector<int64_t> segments = longest_first(sizes, count, capacity);
    SortedSet rooms(capacity + 1);                                     // amounts of room that some open sample has
    std::vector<int64_t> open(static_cast<size_t>(capacity) + 1, -1);  // room -> the latest sample with that room
    // sample -> the previous sample with the same room
    std::vector<int64_t> below;
    std::vector<int64_t> sample_of(static_cast<size_t>(count));  // position in `segments` -> sample
    Packing out;
    out.starts.push_back(0);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t size = sizes[segments[static_cast<size_t>(i)]];
        int64_t room = rooms.at_least(size), sample;
        if (room < 0) {
            room = capacity;
            sample = static_cast<int64_t>(below.size());
            below.push_back(-1);
            out.starts.push_back(0);
        } else {
            sample = open[static_cast<size_t>(room)];
            open[static_cast<size_t>(room)] = below[static_cast<size_t>(sample)];
            if (open[static_cast<size_t>(room)] < 0) rooms.erase(room);
        }
        sample_of[static_cast<size_t>(i)] = sample;
        ++out.starts[static_cast<size_t>(sample) + 1];
        const int64_t left = room - size;
        if (left == 0) continue;
        below[static_cast<size_t>(sample)] = open[static_cast<size_t>(left)];
        open[static_cast<size_t>(left)] = sample;
        rooms.insert(left);
    }
    for (size_t i = 1; i < out.starts.size(); ++i) out.starts[i] += out.starts[i - 1];
    out.order.resize(static_cast<size_t>(count));
    std::vector<int64_t> next(out.starts.begin(), out.starts.end() - 1);
    for (int64_t i = 0; i < count; ++i)
        out.order[static_cast<size_t>(next[static_cast<size_t>(sample_of[static_cast<size_t>(i)])]++)] =
            segments[static_cast<size_t>(i)];
    return out;
}

}  // namespace neox::data
