// A corpus of inputs for a random test, stored in corpus/NAME.hex: one input per line, in hexadecimal. It is replayed
// first, and half of the random inputs are mutations of one of its inputs.
//
// An input is added if it reaches an edge between basic blocks of the code under test that no earlier input has
// reached: the sanitized variant is compiled with -fsanitize-coverage=trace-pc, whose hook is in coverage.cpp. With
// NEOX_CORPUS_KEEP=1 the file is rewritten at the end, without inputs that later ones make redundant. The plain variant
// only replays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "coverage.h"

namespace data_test {

using Bytes = std::vector<uint8_t>;

class Corpus {
  public:
    using Run = std::function<void(const Bytes&)>;

    // Reads the file and runs all its inputs.
    Corpus(const std::string& name, const Run& run)
        : path_(std::string(NEOX_CORPUS_FOLDER "/") + name + ".hex"), run_(run), known_(kSteps) {
        std::ifstream file(path_);
        for (std::string line; std::getline(file, line);) {
            Bytes input;
            for (size_t i = 0; i + 1 < line.size(); i += 2)
                input.push_back(static_cast<uint8_t>(std::stoul(line.substr(i, 2), nullptr, 16)));
            inputs_.push_back(input);
            try_input(input);
        }
        replayed_ = inputs_.size();
    }

    size_t replayed() const { return replayed_; }
    const std::vector<Bytes>& inputs() const { return inputs_; }

    // Runs an input, and adds it if it reaches something new.
    void operator()(const Bytes& input) {
        if (try_input(input) && input.size() <= kLongest) inputs_.push_back(input);
    }

    // Writes the file if NEOX_CORPUS_KEEP is set: short inputs first, without those that add nothing.
    void keep() {
        if (!std::getenv("NEOX_CORPUS_KEEP")) return;
        std::fill(known_.begin(), known_.end(), 0);
        std::sort(inputs_.begin(), inputs_.end(),
                  [](const Bytes& a, const Bytes& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
        std::ofstream file(path_);
        size_t kept = 0;
        for (const Bytes& input : inputs_) {
            if (!try_input(input)) continue;
            for (const uint8_t byte : input) {
                char digits[3];
                std::snprintf(digits, sizeof digits, "%02x", byte);
                file << digits;
            }
            file << "\n";
            ++kept;
        }
        std::printf("%zu inputs in %s\n", kept, path_.c_str());
    }

  private:
    static constexpr size_t kLongest = 4096;

    bool try_input(const Bytes& input) {
        std::fill_n(steps_taken, kSteps, uint8_t{0});
        run_(input);
        bool fresh = false;
        for (size_t i = 0; i < kSteps; ++i) {
            if (steps_taken[i] && !known_[i]) known_[i] = 1, fresh = true;
        }
        return fresh;
    }

    std::string path_;
    Run run_;
    std::vector<uint8_t> known_;
    std::vector<Bytes> inputs_;
    size_t replayed_ = 0;
};

}  // namespace data_test
